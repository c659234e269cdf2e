//! `uel verify`.

use crate::{assert_exit, json_of, keys, model, shards, text, uel, write};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

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
fn faults_cannot_disturb_the_terminal() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("wild\u{202e}.safetensors");
    let header = "{\"a\u{202e}\u{2028}\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,1]}}";
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0]].concat()).unwrap();
    let output = uel(&[&"verify", &path]);
    assert_exit(&output, 1, 1);
    for shown in [text(&output.stdout), text(&output.stderr)] {
        assert!(shown.contains("wild\\u{202e}.safetensors") && shown.is_ascii(), "{shown}");
    }
    assert!(text(&output.stdout).contains("tensor \"a\\u{202e}\\u{2028}\""), "{}", text(&output.stdout));
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
    // More pieces than one, with a NaN in the last element.
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
