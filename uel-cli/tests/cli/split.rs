//! `uel split`.

use crate::{assert_exit, json_of, keys, model, names_in, refused, text, uel};
use serde_json::{Value, json};
use tempfile::TempDir;
use uel_candle::Checkpoint;

#[test]
fn names_and_index_are_those_of_hugging_face() {
    let dir = TempDir::new().unwrap();
    let (src, folder) = (model(&dir), dir.path().join("new").join("sharded"));
    let output = uel(&[&"split", &src, &folder, &"--shard-size", &"24", &"--json"]);
    assert_exit(&output, 0, 0);
    let report = json_of(&output);
    assert_eq!(keys(&report), ["peak_rss_bytes", "seconds", "tensor_count", "written"]);
    assert_eq!(report["tensor_count"], 3);
    let names = [1, 2, 3].map(|n| format!("model-0000{n}-of-00003.safetensors"));
    assert_eq!(names_in(&folder)[..3], names);
    assert_eq!(names_in(&folder)[3..], ["model.safetensors.index.json"]);
    let written = report["written"].as_array().unwrap();
    assert_eq!(written.len(), 4);
    for file in written {
        let path = std::path::Path::new(file["path"].as_str().unwrap());
        assert_eq!(file["bytes"], std::fs::metadata(path).unwrap().len());
    }

    let index = std::fs::read_to_string(folder.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 56);
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 3);
    let (whole, parts) = (Checkpoint::open(&src).unwrap(), Checkpoint::open(&folder).unwrap());
    for info in whole.infos() {
        assert_eq!(whole.read(info.name()).unwrap(), parts.read(info.name()).unwrap());
        let file = parts.sources()[parts.info(info.name()).unwrap().file()].path().file_name().unwrap();
        assert_eq!(index["weight_map"][info.name()], json!(file.to_str().unwrap()));
    }
    assert_exit(&uel(&[&"verify", &folder]), 0, 0);
}

#[test]
fn what_fits_in_one_file_has_no_index() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("one");
    let output = uel(&[&"split", &model(&dir), &folder, &"--shard-size", &"1GiB", &"--metadata", &"k=v"]);
    assert_exit(&output, 0, 0);
    assert_eq!(names_in(&folder), ["model.safetensors"]);
    assert!(text(&output.stdout).contains("3 tensors in 1 file"), "{}", text(&output.stdout));
    assert_eq!(Checkpoint::open(&folder).unwrap().metadata()["k"], "v");
}

#[test]
fn faults() {
    let dir = TempDir::new().unwrap();
    let (src, folder) = (model(&dir), dir.path().join("out"));
    refused(&[&"split", &dir.path().join("none.safetensors"), &folder, &"--shard-size", &"1GB"]);
    // A file stands where the folder is to be.
    refused(&[&"split", &src, &src.join("x"), &"--shard-size", &"1GB"]);
    assert_eq!(names_in(dir.path()), ["model.safetensors"]);
    assert_eq!(uel(&[&"split", &src, &folder]).status.code(), Some(2));
    assert_eq!(uel(&[&"split", &src, &folder, &"--shard-size", &"x"]).status.code(), Some(2));
}
