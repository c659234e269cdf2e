//! `uel diff`.

use crate::{assert_exit, f32s, json_of, keys, model, refused, text, uel, write};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn diff(a: &Path, b: &Path, args: &[&str], code: i32) -> Value {
    let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"diff", &a, &b, &"--json"];
    all.extend(args.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
    let output = uel(&all);
    assert_exit(&output, code, usize::from(code == 1));
    let report = json_of(&output);
    assert_eq!(keys(&report), ["different", "equal", "only_left", "only_right"]);
    assert_eq!(report["equal"], code == 0);
    report
}

fn pair(dir: &TempDir, left: crate::Tensors<'_>, right: crate::Tensors<'_>) -> (PathBuf, PathBuf) {
    let paths = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    write(&paths.0, left);
    write(&paths.1, right);
    paths
}

#[test]
fn equal_checkpoints() {
    let dir = TempDir::new().unwrap();
    let (src, folder) = (model(&dir), dir.path().join("sharded"));
    assert_exit(&uel(&[&"split", &src, &folder, &"--shard-size", &"24"]), 0, 0);
    let report = diff(&src, &folder, &[], 0);
    assert_eq!(report, json!({"equal": true, "only_left": [], "only_right": [], "different": []}));
    let output = uel(&[&"diff", &src, &src]);
    assert_exit(&output, 0, 0);
    assert_eq!(text(&output.stdout), "3 tensors equal, of 3 compared (56 B)\n");
}

#[test]
fn tied_tensors_are_compared_under_each_name() {
    let dir = TempDir::new().unwrap();
    let tied = dir.path().join("tied.safetensors");
    let bytes = f32s(&[1.0, 2.0]);
    let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![2], &bytes).unwrap();
    let metadata = std::collections::HashMap::from([("head".to_owned(), "embed".to_owned())]);
    safetensors::serialize_to_file([("embed", view)], Some(metadata), &tied).unwrap();
    for (head, code) in [(vec![1.0, 2.0], 0), (vec![1.0, 3.0], 1)] {
        let untied = dir.path().join("untied.safetensors");
        write(&untied, &[("embed", Dtype::F32, &[2], f32s(&[1.0, 2.0])), ("head", Dtype::F32, &[2], f32s(&head))]);
        for (a, b) in [(&tied, &untied), (&untied, &tied)] {
            let report = diff(a, b, &[], code);
            assert_eq!((&report["only_left"], &report["only_right"]), (&json!([]), &json!([])));
            let different = report["different"].as_array().unwrap();
            assert_eq!(different.len(), code as usize);
            assert!(different.iter().all(|entry| entry["name"] == "head" && entry["max_abs"] == 1.0), "{report}");
            assert_eq!(diff(a, b, &["--tolerance-abs", "1"], 0)["different"], json!([]));
        }
    }
}

#[test]
fn names_that_are_tied_on_both_sides_are_compared_by_what_they_are_tied_to() {
    let dir = TempDir::new().unwrap();
    let (one, other) = (f32s(&[1.0, 2.0]), f32s(&[1.0, 5.0]));
    let file = |name: &str, head: Option<&str>| {
        let view = |bytes| safetensors::tensor::TensorView::new(Dtype::F32, vec![2], bytes).unwrap();
        let metadata = head.map(|to| std::collections::HashMap::from([("head".to_owned(), to.to_owned())]));
        let path = dir.path().join(name);
        safetensors::serialize_to_file([("one", view(&one)), ("other", view(&other))], metadata, &path).unwrap();
        path
    };
    let (to_one, to_other, none) = (file("a", Some("one")), file("b", Some("other")), file("c", None));
    assert_eq!(diff(&to_one, &file("d", Some("one")), &[], 0)["different"], json!([]));
    let different = &diff(&to_one, &to_other, &[], 1)["different"];
    assert_eq!((&different[0]["name"], &different[0]["max_abs"]), (&json!("head"), &json!(3.0)));
    assert_eq!(different.as_array().unwrap().len(), 1);
    assert_eq!(diff(&to_one, &none, &[], 1)["only_left"], json!(["head"]));
    assert_eq!(diff(&none, &to_one, &[], 1)["only_right"], json!(["head"]));
}

#[test]
fn every_reason() {
    let dir = TempDir::new().unwrap();
    let (a, b) = pair(
        &dir,
        &[
            ("same", Dtype::F32, &[1], f32s(&[1.0])),
            ("left", Dtype::U8, &[1], vec![0]),
            ("shape", Dtype::U8, &[2], vec![0; 2]),
            ("dtype", Dtype::U8, &[1], vec![0]),
            ("float", Dtype::F32, &[2], f32s(&[1.0, 1.5])),
            ("nan", Dtype::F32, &[2], f32s(&[f32::NAN, 4.0])),
            ("values", Dtype::F32, &[3], f32s(&[1.0, -4.0, f32::NAN])),
            ("zero", Dtype::F32, &[1], f32s(&[0.0])),
            ("infinite", Dtype::F32, &[1], f32s(&[f32::INFINITY])),
            ("packed", Dtype::F4, &[2], vec![1]),
            ("integers", Dtype::I64, &[1], i64::MAX.to_le_bytes().to_vec()),
        ],
        &[
            ("same", Dtype::F32, &[1], f32s(&[1.0])),
            ("right", Dtype::U8, &[1], vec![0]),
            ("shape", Dtype::U8, &[1, 2], vec![0; 2]),
            ("dtype", Dtype::I8, &[1], vec![0]),
            ("float", Dtype::BF16, &[2], vec![0x80, 0x3f, 0x80, 0x3f]),
            ("nan", Dtype::F32, &[2], f32s(&[0.0, 5.0])),
            ("values", Dtype::F32, &[3], f32s(&[1.5, -3.0, f32::NAN])),
            ("zero", Dtype::F32, &[1], f32s(&[-0.0])),
            ("infinite", Dtype::F32, &[1], f32s(&[1.0])),
            ("packed", Dtype::F4, &[2], vec![2]),
            ("integers", Dtype::I64, &[1], (i64::MAX - 2).to_le_bytes().to_vec()),
        ],
    );
    let report = diff(&a, &b, &[], 1);
    assert_eq!((&report["only_left"], &report["only_right"]), (&json!(["left"]), &json!(["right"])));
    let found = |name: &str| {
        let different = report["different"].as_array().unwrap();
        let entry = different.iter().find(|entry| entry["name"] == name).unwrap();
        assert_eq!(keys(entry), ["max_abs", "max_rel", "name", "reason"]);
        (entry["reason"].clone(), entry["max_abs"].clone(), entry["max_rel"].clone())
    };
    assert_eq!(report["different"].as_array().unwrap().len(), 9);
    assert_eq!(found("shape"), (json!("shape"), Value::Null, Value::Null));
    assert_eq!(found("dtype"), (json!("dtype"), Value::Null, Value::Null));
    assert_eq!(found("float"), (json!("dtype"), json!(0.5), json!(0.5 / 1.5)));
    assert_eq!(found("nan"), (json!("nan"), json!(1.0), json!(0.2)));
    assert_eq!(found("values"), (json!("values"), json!(1.0), json!(0.5 / 1.5)));
    assert_eq!(found("zero"), (json!("values"), json!(0.0), json!(0.0)));
    assert_eq!(found("infinite"), (json!("values"), Value::Null, Value::Null));
    assert_eq!(found("packed"), (json!("values"), Value::Null, Value::Null));
    assert_eq!(found("integers").1, json!(2.0));

    let output = uel(&[&"diff", &a, &b]);
    assert_exit(&output, 1, 1);
    let shown = text(&output.stdout);
    for part in ["only in the first: left\n", "only in the second: right\n", "1 tensor equal, of 10 compared"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert!(text(&output.stderr).contains("differ: 2 tensors in one alone, 9 different"), "{}", text(&output.stderr));
}

#[test]
fn tolerances() {
    let dir = TempDir::new().unwrap();
    let (a, b) =
        pair(&dir, &[("w", Dtype::F32, &[2], f32s(&[100.0, 1.0]))], &[("w", Dtype::F32, &[2], f32s(&[101.0, 1.0]))]);
    diff(&a, &b, &[], 1);
    diff(&a, &b, &["--tolerance-abs", "0.9"], 1);
    diff(&a, &b, &["--tolerance-abs", "1"], 0);
    diff(&a, &b, &["--tolerance-rel", "0.009"], 1);
    diff(&a, &b, &["--tolerance-rel", "1e-2"], 0);
    diff(&a, &b, &["--tolerance-rel", "1e-2", "--tolerance-abs", "0"], 0);
}

/// Tensors of several pieces, of which one of the last differs in its last element.
#[test]
fn large_tensors_are_compared_to_their_ends() {
    let dir = TempDir::new().unwrap();
    let mut values = vec![1f32; 300_001];
    let same = f32s(&values);
    values[300_000] = 1.25;
    let other = f32s(&values);
    let shape: &[usize] = &[300_001];
    let (a, b) = pair(
        &dir,
        &[("x", Dtype::F32, shape, same.clone()), ("y", Dtype::F32, shape, same.clone())],
        &[("x", Dtype::F32, shape, same), ("y", Dtype::F32, shape, other)],
    );
    let report = diff(&a, &b, &[], 1);
    assert_eq!(report["different"], json!([{"name": "y", "reason": "values", "max_abs": 0.25, "max_rel": 0.2}]));
}

#[test]
fn a_cast_is_seen_by_its_values() {
    let dir = TempDir::new().unwrap();
    let (src, half) = (dir.path().join("src.safetensors"), dir.path().join("half.safetensors"));
    let values: Vec<f32> = (0..1000).map(|n| n as f32 / 7.0).collect();
    write(&src, &[("w", Dtype::F32, &[1000], f32s(&values))]);
    assert_exit(&uel(&[&"convert", &src, &half, &"--dtype", &"f16"]), 0, 0);
    let report = diff(&src, &half, &["--tolerance-rel", "1"], 1);
    let entry = &report["different"][0];
    assert_eq!(entry["reason"], "dtype");
    let rel = entry["max_rel"].as_f64().unwrap();
    assert!(rel > 0.0 && rel < 5e-4, "{rel}");
}

#[test]
fn faults_and_usage() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let told = refused(&[&"diff", &path, &dir.path().join("none.safetensors"), &"--json"]);
    assert!(told.contains("none.safetensors"), "{told}");
    assert_eq!(uel(&[&"diff", &path]).status.code(), Some(2));
    assert_eq!(uel(&[&"diff", &path, &path, &"--tolerance-abs", &"-1"]).status.code(), Some(2));
    assert_eq!(uel(&[&"diff", &path, &path, &"--tolerance-rel", &"NaN"]).status.code(), Some(2));
}
