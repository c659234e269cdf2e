//! `uel bench`, on small files and with a small memory copy: what is measured means nothing here.

use crate::{assert_exit, json_of, keys, model, shards, text, uel, write};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Output;
use tempfile::TempDir;
use uel_core::source::{FileSystem, file_system};

const KEYS: [&str; 18] = [
    "bytes_copied",
    "bytes_mapped",
    "bytes_read",
    "chosen",
    "cold",
    "device",
    "gb_per_s",
    "memcpy_bytes",
    "memcpy_gb_per_s",
    "mode",
    "path",
    "peak_rss_bytes",
    "read_seconds",
    "reason",
    "runs",
    "seconds",
    "tensor_count",
    "vs",
];

fn bench(path: &Path, args: &[&str]) -> Output {
    let mut all: Vec<&dyn AsRef<OsStr>> = vec![&"bench", &"load", &path, &"--memcpy-bytes", &"100000"];
    all.extend(args.iter().map(|arg| arg as &dyn AsRef<OsStr>));
    uel(&all)
}

fn assert_times(medians: &Value, runs: usize) {
    let seconds = medians["seconds"].as_f64().unwrap();
    let all: Vec<f64> = medians["runs"].as_array().unwrap().iter().map(|run| run.as_f64().unwrap()).collect();
    assert_eq!(all.len(), runs);
    assert!(all.iter().any(|&run| run <= seconds) && all.iter().any(|&run| run >= seconds), "{medians}");
    assert!(medians["gb_per_s"].as_f64().unwrap() > 0.0);
    assert!(medians["read_seconds"].as_f64().unwrap() > 0.0);
    if cfg!(target_os = "linux") {
        assert!(medians["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
    }
}

#[test]
fn json_against_candle() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let output = bench(&path, &["--vs", "candle", "--runs", "2", "--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!(keys(&report), KEYS);
    assert_eq!(report["path"], path.to_str().unwrap());
    assert_eq!((&report["mode"], &report["device"], &report["cold"]), (&json!("auto"), &json!("cpu"), &json!(false)));
    assert_eq!((&report["tensor_count"], &report["memcpy_bytes"]), (&json!(3), &json!(100_000)));
    assert!(report["memcpy_gb_per_s"].as_f64().unwrap() > 0.0);
    let moved = report["bytes_mapped"].as_u64().unwrap() + report["bytes_copied"].as_u64().unwrap();
    assert_eq!(moved, 56);
    assert_times(&report, 2);
    assert_eq!(keys(&report["vs"]), ["candle", "candle-mmap"]);
    for peer in ["candle", "candle-mmap"] {
        let peer = &report["vs"][peer];
        assert_eq!(keys(peer), ["gb_per_s", "peak_rss_bytes", "read_seconds", "runs", "seconds"]);
        assert_times(peer, 2);
    }
}

#[test]
fn every_mode() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    for mode in ["preload", "low-memory", "mmap"] {
        let report = json_of(&bench(&path, &["--mode", mode, "--runs", "1", "--threads", "2", "--json"]));
        assert_eq!((&report["mode"], &report["chosen"]), (&json!(mode), &json!(mode)));
        assert_eq!(report["reason"], "asked for");
        assert_eq!((&report["tensor_count"], &report["vs"]), (&json!(3), &json!({})));
        let (mapped, copied) = if mode == "mmap" && cfg!(target_os = "linux") { (56, 0) } else { (0, 56) };
        assert_eq!((&report["bytes_mapped"], &report["bytes_copied"]), (&json!(mapped), &json!(copied)), "{mode}");
    }
}

#[test]
fn a_stream_is_read_and_dropped() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    for budget in [&[][..], &["--budget", "16B"]] {
        let args = [&["--mode", "stream", "--runs", "2", "--threads", "2", "--json"], budget].concat();
        let output = bench(&path, &args);
        assert_exit(&output, 0, 0);
        let report = json_of(&output);
        assert_eq!(keys(&report), KEYS);
        assert_eq!((&report["mode"], &report["chosen"]), (&json!("stream"), &json!("stream")));
        assert_eq!((&report["tensor_count"], &report["read_seconds"]), (&json!(3), &Value::Null));
        assert_eq!((&report["bytes_mapped"], &report["bytes_copied"]), (&json!(0), &json!(56)));
        assert!(report["bytes_read"].as_u64().unwrap() >= 56 && report["seconds"].as_f64().unwrap() > 0.0, "{report}");
    }
    let table = bench(&path, &["--mode", "stream", "--runs", "1", "--vs", "candle"]);
    assert!(text(&table.stdout).contains("mode stream on cpu: stream, asked for\n"), "{}", text(&table.stdout));
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_so() {
    let dir = TempDir::new().unwrap();
    let output = bench(&model(&dir), &["--device", "cuda:0"]);
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("this build has no CUDA") && stderr.contains("--features cuda"), "{stderr}");
}

#[test]
fn a_table_of_shards() {
    let dir = TempDir::new().unwrap();
    shards(&dir);
    let output = bench(dir.path(), &["--runs", "1", "--vs", "candle", "--mode", "preload"]);
    assert_exit(&output, 0, 0);
    let table = text(&output.stdout);
    let firsts: Vec<_> = table.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(firsts, ["loader", "uel", "candle", "candle-mmap", "mode", "2", "memcpy"], "{table}");
    assert!(table.contains("mode preload on cpu: preload, asked for\n"), "{table}");
    assert!(table.contains("2 tensors in 2 files, in the page cache; medians of 1 run\n"), "{table}");
    assert!(table.contains("(2 threads, 100.00 kB that were touched before)\n"), "{table}");
}

#[test]
fn what_candle_refuses_is_told_of_candle() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("bool.safetensors");
    write(&path, &[("flags", Dtype::BOOL, &[4], vec![1, 0, 1, 0])]);
    let report = bench(&path, &["--vs", "candle", "--runs", "1", "--json"]);
    assert_exit(&report, 0, 0);
    let report = json_of(&report);
    assert_eq!(report["tensor_count"], 1);
    for peer in ["candle", "candle-mmap"] {
        assert_eq!(keys(&report["vs"][peer]), ["error"]);
        assert!(report["vs"][peer]["error"].as_str().unwrap().contains("BOOL"), "{report}");
    }
    let table = bench(&path, &["--vs", "candle", "--runs", "1"]);
    assert!(text(&table.stdout).contains("\ncandle-mmap: failed: "), "{}", text(&table.stdout));
}

#[test]
fn cold() {
    // Beside the build, because temporary folders are often in memory.
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    // Far more than what reading the header brings into the cache; below 8 MiB mode auto does not map.
    for (size, little) in [(4 << 20, true), (16 << 20, false)] {
        write(&path, &[("w", Dtype::U8, &[size], vec![1; size])]);
        let output = bench(&path, &["--cold", "--runs", "1", "--vs", "candle", "--json"]);
        match file_system(&std::fs::File::open(&path).unwrap()) {
            Some(FileSystem::Memory) => assert_exit(&output, 1, 1),
            place if cfg!(target_os = "linux") => {
                assert_exit(&output, 0, 0);
                let report = json_of(&output);
                assert_eq!(report["cold"], true);
                if little {
                    let chosen = (&report["chosen"], &report["reason"], &report["bytes_copied"]);
                    assert_eq!(chosen, (&json!("preload"), &json!("little to load"), &json!(size)), "{report}");
                } else if place == Some(FileSystem::Local) && cfg!(target_arch = "x86_64") {
                    let reason = report["reason"].as_str().unwrap();
                    assert!(reason.ends_with(" of the files, and was filled"), "{report}");
                    let chosen = (&report["chosen"], &report["bytes_mapped"]);
                    assert_eq!(chosen, (&json!("mmap"), &json!(size)), "{report}");
                }
            }
            _ => assert_exit(&output, 1, 1),
        }
    }
}

#[test]
fn what_uel_refuses_is_one_line() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("complex.safetensors");
    write(&path, &[("z", Dtype::C64, &[1], vec![0; 8])]);
    let output = bench(&path, &["--runs", "1", "--json"]);
    assert_exit(&output, 1, 1);
    assert!(text(&output.stderr).contains("complex.safetensors") && text(&output.stderr).contains("C64"));
    assert!(output.stdout.is_empty());

    std::fs::write(&path, b"short").unwrap();
    assert_exit(&bench(&path, &["--json"]), 1, 1);
    assert_exit(&bench(&dir.path().join("none.safetensors"), &[]), 1, 1);
}

#[test]
fn usage() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    for (args, part) in [
        (["--device", "tpu"], "no such device"),
        (["--mode", "streamed"], "possible values: auto, preload, low-memory, mmap, stream"),
        (["--budget", "64MiB"], "--budget is for --mode stream"),
        (["--budget", "little"], "expected a size"),
        (["--vs", "torch"], "possible values: candle"),
        (["--runs", "0"], "1..=1000"),
        (["--threads", "0"], "zero"),
    ] {
        let output = bench(&path, &args);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(part), "{}", text(&output.stderr));
    }
    assert_eq!(uel(&[&"bench"]).status.code(), Some(2));
    assert_eq!(uel(&[&"bench", &"load"]).status.code(), Some(2));
}

#[test]
fn every_workload_is_loaded_and_reported() {
    for (workload, sample_bytes) in [
        ("mnist", 28.0 * 28.0 * 4.0 + 1.0),
        ("tokens", 2.0 * 1024.0 * 4.0),
        ("jpeg", 3.0 * 224.0 * 224.0 * 4.0 + 4.0),
        ("blobs", 1048576.0),
    ] {
        for workers in ["0", "2"] {
            let report = json_of(&uel(&[
                &"bench",
                &"data",
                &"--workload",
                &workload,
                &"--workers",
                &workers,
                &"--seconds",
                &"0.01",
                &"--json",
            ]));
            assert_eq!(
                keys(&report),
                [
                    "batch_size",
                    "bytes_per_s",
                    "cpu_seconds",
                    "drop_seconds",
                    "first_batch_seconds",
                    "peak_rss_bytes",
                    "samples",
                    "samples_per_s",
                    "seconds",
                    "workers",
                    "workload",
                ]
            );
            assert_eq!(report["workload"], workload);
            assert_eq!(report["workers"].to_string(), workers);
            let of = |key: &str| report[key].as_f64().unwrap();
            assert!(of("samples") >= 1.0 && of("first_batch_seconds") > 0.0 && of("drop_seconds") > 0.0, "{report}");
            let each = of("bytes_per_s") / of("samples_per_s");
            assert!((each - sample_bytes).abs() < 1e-3 * sample_bytes, "{workload}: {each} bytes a sample");
        }
    }
    let lines = uel(&[&"bench", &"data", &"--workload", &"tokens", &"--seconds", &"0.01"]);
    assert!(text(&lines.stdout).contains("samples/s"), "{lines:?}");
    assert_eq!(uel(&[&"bench", &"data", &"--workload", &"films"]).status.code(), Some(2));
    assert_eq!(uel(&[&"bench", &"data", &"--workload", &"mnist", &"--workers", &"x"]).status.code(), Some(2));
}
