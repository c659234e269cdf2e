//! `uel merge`.

use crate::{assert_exit, f32s, json_of, keys, names_in, refused, text, uel, values_of, write};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use uel_candle::Checkpoint;

fn file(dir: &TempDir, name: &str, tensors: &[(&str, &[f32])]) -> PathBuf {
    let path = dir.path().join(name);
    let bytes: Vec<_> = tensors.iter().map(|(name, values)| (*name, [values.len()], f32s(values))).collect();
    let views: Vec<_> =
        bytes.iter().map(|(name, shape, bytes)| (*name, Dtype::F32, &shape[..], bytes.clone())).collect();
    write(&path, &views);
    path
}

#[test]
fn files_of_different_names() {
    let dir = TempDir::new().unwrap();
    let (a, b) = (file(&dir, "a.safetensors", &[("a", &[1.0])]), file(&dir, "b.safetensors", &[("b", &[2.0, 3.0])]));
    let out = dir.path().join("out.safetensors");
    let output = uel(&[&"merge", &a, &b, &"-o", &out, &"--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!(keys(&report), ["peak_rss_bytes", "seconds", "tensor_count", "written"]);
    assert_eq!((&report["tensor_count"], &report["written"][0]["path"]), (&json!(2), &json!(out.to_str().unwrap())));
    assert_eq!((values_of(&out, "a"), values_of(&out, "b")), (vec![1.0], vec![2.0, 3.0]));
    assert_eq!(Checkpoint::open(&out).unwrap().metadata()["format"], "pt");

    // The output may be an input.
    assert_exit(&uel(&[&"merge", &a, &b, &"-o", &a, &"--dtype", &"f32", &"--exclude", &"x"]), 0, 0);
    assert_eq!(values_of(&a, "b"), [2.0, 3.0]);
    assert_eq!(names_in(dir.path()), ["a.safetensors", "b.safetensors", "out.safetensors"]);
}

#[test]
fn a_name_in_two_files() {
    let dir = TempDir::new().unwrap();
    let (a, b) = (file(&dir, "a.safetensors", &[("w", &[1.0])]), file(&dir, "b.safetensors", &[("w", &[2.0])]));
    let out = dir.path().join("out.safetensors");
    let told = refused(&[&"merge", &a, &b, &"--output", &out]);
    assert!(told.contains("a.safetensors") && told.contains("b.safetensors") && told.contains("\"w\""), "{told}");
    assert_eq!(names_in(dir.path()), ["a.safetensors", "b.safetensors"]);
}

#[test]
fn averages() {
    let dir = TempDir::new().unwrap();
    let a = file(&dir, "a.safetensors", &[("w", &[1.0, 2.0]), ("x", &[8.0])]);
    let b = file(&dir, "b.safetensors", &[("w", &[3.0, -2.0]), ("x", &[0.0])]);
    let out = dir.path().join("out.safetensors");
    assert_exit(&uel(&[&"merge", &"--average", &a, &b, &"-o", &out]), 0, 0);
    assert_eq!((values_of(&out, "w"), values_of(&out, "x")), (vec![2.0, 0.0], vec![4.0]));
    assert_exit(&uel(&[&"merge", &a, &b, &"--average", &"--weights", &"0.25,0.75", &"-o", &out]), 0, 0);
    assert_eq!(values_of(&out, "w"), [2.5, -1.0]);

    let c = file(&dir, "c.safetensors", &[("w", &[3.0, -2.0])]);
    std::fs::remove_file(&out).unwrap();
    let told = refused(&[&"merge", &"--average", &a, &c, &"-o", &out]);
    assert!(told.contains("\"x\""), "{told}");
    let d = file(&dir, "d.safetensors", &[("w", &[3.0]), ("x", &[0.0])]);
    refused(&[&"merge", &"--average", &a, &d, &"-o", &out]);
    assert!(!out.exists());
}

/// A base with a matrix of ones, and an adapter whose B·A is `[[2, 4], [6, 12]]`, of rank 1.
fn adapter(dir: &TempDir, names: (&str, &str), alpha: Option<(&str, f32)>) -> (PathBuf, PathBuf) {
    let base = dir.path().join("base.safetensors");
    write(&base, &[("layer.q.weight", Dtype::F32, &[2, 2], f32s(&[1.0; 4])), ("n", Dtype::F32, &[1], f32s(&[5.0]))]);
    let folder = dir.path().join("adapter");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("adapter_model.safetensors");
    let mut tensors = vec![
        (names.0, Dtype::F32, &[1, 2][..], f32s(&[1.0, 2.0])),
        (names.1, Dtype::F32, &[2, 1][..], f32s(&[2.0, 6.0])),
    ];
    tensors.extend(alpha.map(|(name, alpha)| (name, Dtype::F32, &[][..], f32s(&[alpha]))));
    write(&path, &tensors);
    (base, path)
}

const PEFT: (&str, &str) = ("base_model.model.layer.q.lora_A.weight", "base_model.model.layer.q.lora_B.weight");

#[test]
fn adapters_of_peft() {
    let dir = TempDir::new().unwrap();
    let (base, adapter) = adapter(&dir, PEFT, None);
    let folder = adapter.parent().unwrap();
    let (config, out) = (folder.join("adapter_config.json"), dir.path().join("out.safetensors"));
    let told = refused(&[&"merge", &base, &"--lora", &adapter, &"-o", &out]);
    assert!(told.contains("--scale") && told.contains("adapter_config.json"), "{told}");
    for (text, expected) in [
        (json!({"r": 4, "lora_alpha": 8, "rank_pattern": {}}), [5.0, 9.0, 13.0, 25.0]),
        (json!({"r": 4, "lora_alpha": 1, "use_rslora": true}), [2.0, 3.0, 4.0, 7.0]),
    ] {
        std::fs::write(&config, text.to_string()).unwrap();
        for given in [&adapter as &Path, folder] {
            assert_exit(&uel(&[&"merge", &base, &"--lora", &given, &"-o", &out]), 0, 0);
            assert_eq!(values_of(&out, "layer.q.weight"), expected);
            assert_eq!(values_of(&out, "n"), [5.0]);
        }
    }
    assert_exit(&uel(&[&"merge", &base, &"--lora", &folder, &"--scale", &"-1", &"-o", &out]), 0, 0);
    assert_eq!(values_of(&out, "layer.q.weight"), [-1.0, -3.0, -5.0, -11.0]);

    std::fs::remove_file(&out).unwrap();
    for (text, part) in [
        ("{", "adapter_config.json"),
        (r#"{"lora_alpha": 1}"#, "--scale"),
        (r#"{"r": 0, "lora_alpha": 1}"#, "--scale"),
        (r#"{"r": 1, "lora_alpha": 1, "rank_pattern": {"q": 2}}"#, "rank_pattern"),
        (r#"{"r": 1, "lora_alpha": 1, "fan_in_fan_out": true}"#, "fan_in_fan_out"),
    ] {
        std::fs::write(&config, text).unwrap();
        let told = refused(&[&"merge", &base, &"--lora", &adapter, &"-o", &out]);
        assert!(told.contains(part), "{told}");
    }
    assert!(!out.exists());
}

#[test]
fn adapters_with_alphas() {
    let dir = TempDir::new().unwrap();
    let names = ("layer.q.lora_down.weight", "layer.q.lora_up.weight");
    let (base, adapter) = adapter(&dir, names, Some(("layer.q.alpha", 0.5)));
    // The output is the base, and the new weights are not F32.
    assert_exit(&uel(&[&"merge", &base, &"--lora", &adapter, &"-o", &base, &"--dtype", &"f16"]), 0, 0);
    assert_exit(&uel(&[&"convert", &base, &base, &"--dtype", &"f32"]), 0, 0);
    assert_eq!(values_of(&base, "layer.q.weight"), [2.0, 3.0, 4.0, 7.0]);
}

#[test]
fn an_adapter_for_another_model() {
    let dir = TempDir::new().unwrap();
    let (_, adapter) = adapter(&dir, PEFT, None);
    let other = file(&dir, "other.safetensors", &[("layer.k.weight", &[1.0])]);
    let out = dir.path().join("out.safetensors");
    let told = refused(&[&"merge", &other, &"--lora", &adapter, &"--scale", &"1", &"-o", &out]);
    assert!(told.contains("layer.q.weight"), "{told}");
    assert!(!out.exists());
}

#[test]
fn usage() {
    let dir = TempDir::new().unwrap();
    let a = file(&dir, "a.safetensors", &[("w", &[1.0])]);
    let a = a.to_str().unwrap();
    for args in [
        &[a][..],
        &["-o", "out"],
        &[a, "-o", "out", "--weights", "1"],
        &[a, "-o", "out", "--average", "--weights", "0.5,0.5"],
        &[a, "-o", "out", "--average", "--weights", "NaN"],
        &[a, "-o", "out", "--scale", "1"],
        &[a, "-o", "out", "--average", "--lora", "x"],
    ] {
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"merge"];
        all.extend(args.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
        let output = uel(&all);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    }
}

/// A file of `byte_len` bytes of BF16 in tensors of 100 MB. It is sparse: what is read is zeros.
fn sparse(path: &Path, prefix: &str, byte_len: u64) {
    const TENSOR_BYTES: u64 = 100_000_000;
    let entry = |n: u64| {
        let (start, end) = (n * TENSOR_BYTES, (n + 1) * TENSOR_BYTES);
        format!(r#""{prefix}.{n}":{{"dtype":"BF16","shape":[5000,10000],"data_offsets":[{start},{end}]}}"#)
    };
    let count = byte_len / TENSOR_BYTES;
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let start = file.stream_position().unwrap();
    file.set_len(start + count * TENSOR_BYTES).unwrap();
    // A value that is not zero, at the very end.
    file.seek(SeekFrom::End(-2)).unwrap();
    file.write_all(&[0x80, 0x3f]).unwrap();
}

/// The output is twice as large as both inputs. `UEL_TEST_MERGE_BYTES` sets the bytes of each input.
#[test]
fn measured_a_merge_with_a_cast_needs_little_memory() {
    let byte_len = std::env::var("UEL_TEST_MERGE_BYTES").map_or(2_000_000_000, |bytes| bytes.parse().unwrap());
    merges_in_little_memory(byte_len, &[]);
    // Through the page cache, which is another road.
    merges_in_little_memory(byte_len.div_ceil(4).next_multiple_of(100_000_000), &["--durability", "fast"]);
}

fn merges_in_little_memory(byte_len: u64, durability: &[&str]) {
    // Beside the build, because temporary folders are often in memory.
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [a, b, out] = ["a", "b", "out"].map(|name| dir.path().join(format!("{name}.safetensors")));
    sparse(&a, "a", byte_len);
    sparse(&b, "b", byte_len);
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
        vec![&"merge", &a, &b, &"-o", &out, &"--dtype", &"f32", &"--json"];
    arguments.extend(durability.iter().map(|argument| argument as &dyn AsRef<std::ffi::OsStr>));
    let output = uel(&arguments);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    let tensors = byte_len / 100_000_000 * 2;
    assert_eq!(report["tensor_count"], tensors);
    assert!(report["written"][0]["bytes"].as_u64().unwrap() > tensors * 200_000_000);
    if let Some(peak) = report["peak_rss_bytes"].as_u64() {
        assert!(peak < 256_000_000, "{peak} bytes");
    }
    let checkpoint = Checkpoint::open(&out).unwrap();
    let last = format!("a.{}", tensors / 2 - 1);
    let last = checkpoint.slice(&last, (4999, 9998..), &candle_core::Device::Cpu).unwrap();
    assert_eq!(last.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0, 1.0]);
}
