//! The program as scripts and people use it.
#![allow(clippy::unwrap_used)]

mod bench;
mod html;
mod inspect;
mod verify;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
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
    for command in ["", "inspect", "verify", "bench", "bench load"] {
        let args = command.split_whitespace().chain(["--help"]);
        let output = Command::new(env!("CARGO_BIN_EXE_uel")).args(args).output().unwrap();
        assert_exit(&output, 0, 0);
        let help = text(&output.stdout);
        assert!(help.contains("Example:\n  uel "), "{help}");
        assert!(!help.contains("__bench-run") && !help.contains("memcpy-bytes"), "{help}");
    }
}
