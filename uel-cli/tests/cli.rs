//! The program as scripts and people use it.
#![allow(clippy::unwrap_used)]

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

type Tensors<'a> = &'a [(&'a str, Dtype, &'a [usize], Vec<u8>)];

fn write(path: &Path, tensors: Tensors<'_>) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(metadata), path).unwrap();
}

/// Three tensors in `model.safetensors`.
fn model(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("model.safetensors");
    write(
        &path,
        &[
            ("model.layers.0.mlp.weight", Dtype::F32, &[2, 3], vec![0; 24]),
            ("model.layers.1.mlp.weight", Dtype::F32, &[2, 3], vec![0; 24]),
            ("lm_head.weight", Dtype::BF16, &[4], vec![0; 8]),
        ],
    );
    path
}

fn shards(dir: &TempDir) {
    write(&dir.path().join("model-00001-of-00002.safetensors"), &[("a.weight", Dtype::U8, &[3], vec![0; 3])]);
    write(&dir.path().join("model-00002-of-00002.safetensors"), &[("b.weight", Dtype::U8, &[5], vec![0; 5])]);
}

fn uel(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_uel")).args(args.iter().map(|arg| arg.as_ref())).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn json_of(output: &Output) -> Value {
    assert_eq!(output.stdout.iter().filter(|&&byte| byte == b'\n').count(), 1);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

#[track_caller]
fn assert_exit(output: &Output, code: i32, stderr_lines: usize) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), stderr_lines, "{stderr}");
}

#[test]
fn inspect_json() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let output = uel(&[&"inspect", &path, &"--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!(keys(&report), ["files", "format", "metadata", "path", "tensor_count", "tensors", "total_bytes"]);
    let shown = path.to_str().unwrap();
    let len = std::fs::metadata(&path).unwrap().len();
    assert_eq!(report["path"], shown);
    assert_eq!(report["format"], "safetensors");
    assert_eq!(report["files"], json!([{"path": shown, "bytes": len}]));
    assert_eq!(report["metadata"], json!({"format": "pt"}));
    assert_eq!(report["total_bytes"], 56);
    assert_eq!(report["tensor_count"], 3);
    assert_eq!(
        report["tensors"][0],
        json!({
            "name": "model.layers.0.mlp.weight", "dtype": "F32", "shape": [2, 3], "bytes": 24, "file": shown,
            "offset": len - 56
        })
    );
}

#[test]
fn inspect_table() {
    let dir = TempDir::new().unwrap();
    let output = uel(&[&"inspect", &model(&dir)]);
    assert_exit(&output, 0, 0);
    let rows: Vec<Vec<&str>> = text(&output.stdout).lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["name", "dtype", "shape", "size", "file"]);
    assert_eq!(rows[1], ["model.layers.0.mlp.weight", "F32", "[2,", "3]", "24", "B", "model.safetensors"]);
    for row in [["BF16", "1", "8", "B"], ["F32", "2", "48", "B"], ["lm_head", "1", "8", "B"]] {
        assert!(rows.contains(&row.to_vec()), "{row:?} in {rows:?}");
    }
    assert!(rows.contains(&vec!["model.layers", "2", "48", "B"]), "{rows:?}");
    assert!(rows.contains(&vec!["format:", "pt"]), "{rows:?}");
    assert!(text(&output.stdout).ends_with("\n3 tensors, 56 B (56 bytes), 1 file\n"));
}

#[test]
fn names_cannot_disturb_the_terminal() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("wild.safetensors");
    write(&path, &[("a\n\u{1b}[2J\u{202e}", Dtype::U8, &[1], vec![0])]);
    let output = uel(&[&"inspect", &path]);
    assert_exit(&output, 0, 0);
    assert!(text(&output.stdout).contains("a\\n\\u{1b}[2J\\u{202e}  U8"), "{}", text(&output.stdout));
    assert!(!output.stdout.contains(&0x1b));
    assert_eq!(json_of(&uel(&[&"inspect", &path, &"--json"]))["tensors"][0]["name"], "a\n\u{1b}[2J\u{202e}");
}

#[test]
fn inspect_filter() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let names = |filter: &str| {
        let report = json_of(&uel(&[&"inspect", &path, &"--json", &"--filter", &filter]));
        let tensors = report["tensors"].as_array().unwrap();
        assert_eq!(report["tensor_count"], tensors.len());
        assert_eq!(report["total_bytes"], tensors.iter().map(|t| t["bytes"].as_u64().unwrap()).sum::<u64>());
        tensors.iter().map(|tensor| tensor["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("head"), ["lm_head.weight"]);
    assert_eq!(names("*.mlp.*").len(), 2);
    assert_eq!(names("model.layers.{1,2}.*"), ["model.layers.1.mlp.weight"]);
    assert!(names("mlp*").is_empty());
    let table = uel(&[&"inspect", &path, &"--filter", &"head"]);
    assert!(text(&table.stdout).ends_with("\n1 tensor (of 3), 8 B (8 bytes), 1 file\n"));
}

#[test]
fn sharded_folder() {
    let dir = TempDir::new().unwrap();
    shards(&dir);
    let report = json_of(&uel(&[&"inspect", &dir.path(), &"--json"]));
    assert_eq!(report["files"].as_array().unwrap().len(), 2);
    assert_eq!(report["tensor_count"], 2);
    assert!(report["tensors"][1]["file"].as_str().unwrap().ends_with("model-00002-of-00002.safetensors"));
    assert_exit(&uel(&[&"verify", &dir.path()]), 0, 0);

    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    let output = uel(&[&"verify", &dir.path(), &"--json"]);
    assert_exit(&output, 1, 1);
    assert_eq!(json_of(&output)["faults"][0]["kind"], "missing-shard");
}

#[test]
fn index_file() {
    let dir = TempDir::new().unwrap();
    shards(&dir);
    let path = dir.path().join("model.safetensors.index.json");
    let index = |total: u64, second: &str| {
        json!({"metadata": {"total_size": total}, "weight_map": {
            "a.weight": "model-00001-of-00002.safetensors", second: "model-00002-of-00002.safetensors"}})
    };
    std::fs::write(&path, index(8, "b.weight").to_string()).unwrap();
    assert_exit(&uel(&[&"verify", &path, &"--deep"]), 0, 0);
    std::fs::write(&path, index(9, "c.weight").to_string()).unwrap();
    let output = uel(&[&"verify", &path, &"--json"]);
    assert_exit(&output, 1, 1);
    let report = json_of(&output);
    let kinds: Vec<_> = report["faults"].as_array().unwrap().iter().map(|fault| &fault["kind"]).collect();
    assert_eq!(kinds, ["weight-map", "weight-map", "index-file"]);
}

#[test]
fn verify_sound() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let output = uel(&[&"verify", &path]);
    assert_exit(&output, 0, 0);
    assert_eq!(text(&output.stdout), format!("{}: sound\n", path.display()));
    let report = json_of(&uel(&[&"verify", &path, &"--json"]));
    assert_eq!(report, json!({"path": path.to_str().unwrap(), "ok": true, "faults": []}));
}

#[test]
fn verify_truncated() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(len - 1).unwrap();
    let output = uel(&[&"verify", &path]);
    assert_exit(&output, 1, 1);
    assert!(text(&output.stdout).starts_with("truncated: "), "{}", text(&output.stdout));
    assert_eq!(text(&output.stderr), format!("uel: {}: not sound: 1 fault\n", path.display()));

    let output = uel(&[&"verify", &path, &"--json", &"--deep"]);
    assert_exit(&output, 1, 1);
    let report = json_of(&output);
    assert_eq!(keys(&report), ["deep", "faults", "ok", "path", "scanned_bytes"]);
    assert_eq!((&report["ok"], &report["scanned_bytes"]), (&json!(false), &json!(0)));
    let fault = &report["faults"][0];
    assert_eq!(keys(fault), ["expected", "file", "got", "kind", "message", "offset", "tensor"]);
    assert_eq!(fault["kind"], "truncated");
    assert_eq!(fault["file"], path.to_str().unwrap());

    assert_exit(&uel(&[&"inspect", &path]), 1, 1);
}

#[test]
fn verify_names_every_fault() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("twice.safetensors");
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"b":{"dtype":"X9","shape":[1],"data_offsets":[2,3]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 3]].concat();
    std::fs::write(&path, bytes).unwrap();
    let output = uel(&[&"verify", &path, &"--json"]);
    assert_exit(&output, 1, 1);
    let report = json_of(&output);
    let kinds: Vec<_> = report["faults"].as_array().unwrap().iter().map(|fault| &fault["kind"]).collect();
    assert!(kinds.contains(&&json!("duplicate-name")) && kinds.contains(&&json!("unknown-dtype")), "{kinds:?}");
    let lines = text(&uel(&[&"verify", &path]).stdout).lines().count();
    assert_eq!(lines, kinds.len());
}

#[test]
fn verify_duplicate_across_files() {
    let dir = TempDir::new().unwrap();
    for name in ["x.safetensors", "y.safetensors"] {
        write(&dir.path().join(name), &[("same", Dtype::U8, &[1], vec![0])]);
    }
    let output = uel(&[&"verify", &dir.path(), &"--json"]);
    assert_exit(&output, 1, 1);
    let fault = &json_of(&output)["faults"][0];
    assert_eq!((&fault["kind"], &fault["tensor"]), (&json!("duplicate-name"), &json!("same")));
    assert!(fault["file"].as_str().unwrap().ends_with("y.safetensors"));
}

#[test]
fn deep_counts() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("nan.safetensors");
    // More than one piece of 4 MiB, with a NaN in the last element.
    let long: Vec<u8> = vec![0f32; 1_100_000].into_iter().chain([f32::NAN]).flat_map(f32::to_le_bytes).collect();
    let doubles: Vec<u8> = [f64::NAN, -f64::NAN, f64::NEG_INFINITY].into_iter().flat_map(f64::to_le_bytes).collect();
    write(
        &path,
        &[
            ("long", Dtype::F32, &[1_100_001], long.clone()),
            ("double", Dtype::F64, &[3], doubles),
            ("half", Dtype::F16, &[2], vec![0x00, 0x7c, 0x01, 0xfc]),
            ("brain", Dtype::BF16, &[2], vec![0x80, 0x7f, 0x7f, 0x7f]),
            ("bytes", Dtype::U8, &[2], vec![0xff, 0xff]),
            ("empty", Dtype::F32, &[0], vec![]),
        ],
    );
    let output = uel(&[&"verify", &path, &"--deep", &"--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!((&report["ok"], &report["faults"]), (&json!(true), &json!([])));
    assert_eq!(report["scanned_bytes"], long.len() + 24 + 4 + 4 + 2);
    let mut deep = report["deep"].as_array().unwrap().clone();
    deep.sort_by_key(|entry| entry["tensor"].as_str().unwrap().to_owned());
    let expected = json!([
        {"tensor": "brain", "nan": 0, "inf": 1},
        {"tensor": "double", "nan": 2, "inf": 1},
        {"tensor": "half", "nan": 1, "inf": 1},
        {"tensor": "long", "nan": 1, "inf": 0},
    ]);
    assert_eq!(Value::Array(deep), expected);

    let output = uel(&[&"verify", &path, &"--deep"]);
    assert_exit(&output, 0, 0);
    assert!(text(&output.stdout).contains(": 4 tensors with NaN or infinite values\n"), "{}", text(&output.stdout));
}

#[test]
fn exit_codes() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("no\nsuch.safetensors");
    for command in ["inspect", "verify"] {
        for path in [missing.as_path(), dir.path()] {
            let output = uel(&[&command, &path]);
            assert_exit(&output, 1, 1);
            assert!(output.stdout.is_empty());
        }
        assert_eq!(uel(&[&command]).status.code(), Some(2));
    }
    assert_exit(&uel(&[&"verify", &missing, &"--deep"]), 1, 1);
    let output = uel(&[&"verify", &missing, &"--json"]);
    assert_exit(&output, 1, 1);
    assert_eq!(json_of(&output)["faults"][0]["kind"], "io");
    assert_eq!(uel(&[]).status.code(), Some(2));
    assert_eq!(uel(&[&"frobnicate"]).status.code(), Some(2));
    assert_eq!(uel(&[&"inspect", &"x", &"--filter", &"["]).status.code(), Some(2));
}

#[test]
fn help_has_examples() {
    for args in [&["--help"] as &[&str], &["inspect", "--help"], &["verify", "--help"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_uel")).args(args).output().unwrap();
        assert_exit(&output, 0, 0);
        assert!(text(&output.stdout).contains("Example:\n  uel "), "{}", text(&output.stdout));
    }
}

/// A checkpoint whose listing is larger than any pipe, read by one who leaves after ten bytes.
#[test]
fn closed_pipe_is_success() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("many.safetensors");
    let names: Vec<String> = (0..20_000).map(|number| format!("module.{number}.weight")).collect();
    let tensors: Vec<_> = names.iter().map(|name| (name.as_str(), Dtype::U8, &[0usize] as &[usize], vec![])).collect();
    write(&path, &tensors);
    for json in [None, Some("--json")] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_uel"))
            .arg("inspect")
            .arg(&path)
            .args(json)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 10]).unwrap();
        drop(stdout);
        assert_exit(&child.wait_with_output().unwrap(), 0, 0);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn full_disk_is_told() {
    let dir = TempDir::new().unwrap();
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_uel")).arg("inspect").arg(model(&dir)).stdout(full).output().unwrap();
    assert_exit(&output, 1, 1);
}
