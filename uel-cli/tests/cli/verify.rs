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

/// The hash of what `bytes` holds, as a file has it.
fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", uel_core::safetensors::write::chunk_hash(bytes))
}

#[test]
fn deep_checks_every_hash() {
    const PIECE: usize = 2 << 20;
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("hashed.safetensors");
    let bytes: Vec<u8> = (0..3 * PIECE + 5).map(|n| (n % 251) as u8).collect();
    let text_of = |bytes: &[u8]| bytes.chunks(PIECE).map(hash).collect::<String>();
    let hashes = json!({"large": text_of(&bytes), "small": text_of(&[1, 2, 3]), "empty": ""}).to_string();
    let views = [("large", bytes.as_slice()), ("small", &[1, 2, 3]), ("empty", &[])].map(|(name, bytes)| {
        (name, safetensors::tensor::TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap())
    });
    let metadata = std::collections::HashMap::from([("uel.xxh3".to_owned(), hashes)]);
    safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();

    let output = uel(&[&"verify", &path, &"--deep"]);
    assert_exit(&output, 0, 0);
    assert!(text(&output.stdout).contains("\nchecked 3 tensors by hash\n"), "{}", text(&output.stdout));

    let mut file = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let large = header + file[header..].windows(4).position(|four| four == [0, 1, 2, 3]).unwrap();
    let small = header
        + file[header..]
            .windows(4)
            .position(|four| four[..3] == [1, 2, 3] && four[3] != 4)
            .unwrap_or(file.len() - 3 - header);
    let flips = [
        (large + 7, large),
        (large + 2 * PIECE - 1, large + PIECE),
        (large + 3 * PIECE + 4, large + 3 * PIECE),
        (small + 2, small),
    ];
    for (flip, _) in flips {
        file[flip] ^= 0x10;
    }
    std::fs::write(&path, &file).unwrap();
    // The headers are sound, and say no more.
    assert_exit(&uel(&[&"verify", &path]), 0, 0);
    let output = uel(&[&"verify", &path, &"--deep", &"--json"]);
    assert_exit(&output, 1, 1);
    let report = json_of(&output);
    assert_eq!(report["ok"], json!(false));
    let faults = report["faults"].as_array().unwrap();
    let mut found: Vec<_> = faults.iter().map(|fault| fault["offset"].as_u64().unwrap() as usize).collect();
    found.sort_unstable();
    let mut expected = flips.map(|(_, offset)| offset);
    expected.sort_unstable();
    assert_eq!(found, expected);
    for fault in faults {
        assert_eq!((&fault["kind"], &fault["file"]), (&json!("hash-mismatch"), &json!(path.to_str().unwrap())));
        assert!(fault["expected"].is_string() && fault["got"].is_string() && fault["expected"] != fault["got"]);
        let offset = fault["offset"].as_u64().unwrap() as usize;
        assert_eq!(fault["tensor"], if offset == small { "small" } else { "large" });
    }
    let output = uel(&[&"verify", &path, &"--deep"]);
    assert_exit(&output, 1, 1);
    assert_eq!(text(&output.stdout).matches("hash-mismatch: ").count(), 4, "{}", text(&output.stdout));
    assert!(text(&output.stdout).contains("checked 3 tensors by hash\n"));
}

#[test]
fn deep_names_missing_hashes() {
    let dir = TempDir::new().unwrap();
    for (hashes, kind) in [("{}", "hash-mismatch"), (r#"{"w":""}"#, "hash-mismatch"), ("[]", "json")] {
        let path = dir.path().join("few.safetensors");
        let view = safetensors::tensor::TensorView::new(Dtype::U8, vec![3], &[1, 2, 3]).unwrap();
        let metadata = std::collections::HashMap::from([("uel.xxh3".to_owned(), hashes.to_owned())]);
        safetensors::serialize_to_file([("w", view)], Some(metadata), &path).unwrap();
        let output = uel(&[&"verify", &path, &"--deep", &"--json"]);
        assert_exit(&output, 1, 1);
        let report = json_of(&output);
        assert_eq!(report["faults"].as_array().unwrap().len(), 1);
        assert_eq!((&report["faults"][0]["kind"], &report["scanned_bytes"]), (&json!(kind), &json!(3)));
    }
}
