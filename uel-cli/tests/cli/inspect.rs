//! `uel inspect`.

use crate::{assert_exit, json_of, keys, model, text, uel, write};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::io::Read;
use std::process::{Command, Stdio};
use tempfile::TempDir;

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
fn a_very_long_name_sticks_out_of_its_column() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("long.safetensors");
    let long = "n".repeat(70_000);
    write(&path, &[(&long, Dtype::U8, &[1], vec![0]), ("short", Dtype::U8, &[1], vec![0])]);
    for args in [&[&"inspect" as &dyn AsRef<std::ffi::OsStr>, &path][..], &[&"verify", &path, &"--deep"]] {
        let output = uel(args);
        assert_exit(&output, 0, 0);
        assert!(output.stdout.len() < 72_000, "{}", output.stdout.len());
    }
    assert!(text(&uel(&[&"inspect", &path]).stdout).contains(&format!("\n{long}  U8 ")));
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
