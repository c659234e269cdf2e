//! The program as scripts and people use it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod bench;
mod convert;
mod diff;
mod extract;
mod gguf;
mod html;
mod inspect;
mod merge;
#[cfg(target_os = "linux")]
mod progress;
mod pytorch;
mod recover;
mod remote;
mod split;
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

/// The names of everything in a folder, hidden files too.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The values of an F32 tensor.
fn values_of(path: &Path, name: &str) -> Vec<f32> {
    let checkpoint = uel_candle::Checkpoint::open(path).unwrap();
    assert_eq!(checkpoint.info(name).unwrap().dtype(), uel_core::Dtype::F32);
    let bytes = checkpoint.read(name).unwrap();
    bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// The one line on stderr of a command that failed, and that it wrote nothing else.
#[track_caller]
fn refused(args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = uel(args);
    assert_exit(&output, 1, 1);
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    text(&output.stderr).to_owned()
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
    for command in
        ["", "inspect", "verify", "convert", "merge", "split", "diff", "extract", "recover", "bench", "bench load"]
    {
        let args = command.split_whitespace().chain(["--help"]);
        let output = Command::new(env!("CARGO_BIN_EXE_uel")).args(args).output().unwrap();
        assert_exit(&output, 0, 0);
        let help = text(&output.stdout);
        assert!(help.contains("Example:\n  uel "), "{help}");
        assert!(!help.contains("__bench-run") && !help.contains("memcpy-bytes"), "{help}");
    }
}
