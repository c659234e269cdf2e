//! GGUF files on the command line.

use crate::{json_of, uel};
use serde_json::json;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use uel_core::gguf::MetadataBuilder;
use uel_core::gguf::write::{GgufContents, GgufWriter};
use uel_core::save::{SaveOptions, TensorMeta};
use uel_core::{BlockDtype, Dtype};

const Q4_K: Dtype = Dtype::Block(BlockDtype::Q4K);

fn write(path: &Path, tensors: &[(&str, Dtype, &[usize])], metadata: MetadataBuilder) {
    let metas = tensors.iter().map(|(name, dtype, shape)| TensorMeta::new(*name, *dtype, *shape));
    let writer =
        GgufWriter::create(path, GgufContents::new(metas).with_metadata(metadata), &SaveOptions::new()).unwrap();
    for (number, (name, dtype, shape)) in (1u8..).zip(tensors) {
        let byte_len = TensorMeta::new(*name, *dtype, *shape).byte_len().unwrap();
        writer.write(name, *dtype, shape, &vec![number; byte_len as usize]).unwrap();
    }
    writer.finish().unwrap();
}

fn metadata() -> MetadataBuilder {
    let tokens: Vec<String> = (0..100).map(|n| format!("t{n}")).collect();
    let metadata = MetadataBuilder::new().with("general.architecture", "llama").unwrap();
    metadata.with("llama.block_count", 2u32).unwrap().with("tokens", tokens).unwrap()
}

fn model(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("model.gguf");
    write(&path, &[("blk.0.ffn.weight", Q4_K, &[3, 512]), ("norm.weight", Dtype::F32, &[4])], metadata());
    path
}

#[test]
fn inspect_shows_blocks_and_typed_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir);
    let output = uel(&[&"inspect", &path, &"--json"]);
    assert!(output.status.success());
    let report = json_of(&output);
    assert_eq!(report["format"], "gguf");
    assert_eq!(report["metadata"]["llama.block_count"], 2);
    assert_eq!(report["metadata"]["tokens"].as_array().unwrap().len(), 100);
    let blocks = &report["tensors"][0];
    assert_eq!((&blocks["name"], &blocks["dtype"]), (&json!("blk.0.ffn.weight"), &json!("Q4_K")));
    assert_eq!((&blocks["shape"], &blocks["bytes"]), (&json!([3, 512]), &json!(3 * 2 * 144)));
    assert_eq!((&report["tensor_count"], &report["total_bytes"]), (&json!(2), &json!(3 * 2 * 144 + 16)));

    let text = String::from_utf8(uel(&[&"inspect", &path]).stdout).unwrap();
    assert!(text.contains("Q4_K") && text.contains("tokens: [100 × string]"), "{text}");
    let page = dir.path().join("page.html");
    assert!(uel(&[&"inspect", &path, &"--html", &page]).status.success());
    assert!(std::fs::read_to_string(page).unwrap().contains("Q4_K"));
}

#[test]
fn verify_names_the_fault() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir);
    for deep in [&["--json"][..], &["--json", "--deep"]] {
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"verify", &path];
        args.extend(deep.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
        let output = uel(&args);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(json_of(&output)["faults"], json!([]));
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 32]).unwrap();
    let output = uel(&[&"verify", &path, &"--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report = json_of(&output);
    assert_eq!((&report["ok"], &report["faults"][0]["kind"]), (&json!(false), &json!("truncated")));
    assert_eq!(report["faults"][0]["tensor"], "norm.weight");
    assert!(report["faults"][0]["offset"].is_u64() && report["faults"][0]["expected"].is_string());
    assert_eq!(report.get("globals"), None);
}

#[test]
fn parts_of_a_split_file_are_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    for (number, name) in [(0u16, "a"), (1, "b")] {
        let split = metadata().with("split.no", number).unwrap().with("split.count", 2u16).unwrap();
        let path = dir.path().join(format!("m-0000{}-of-00002.gguf", number + 1));
        write(&path, &[(name, Dtype::I8, &[3])], split.with("split.tensors.count", 2i32).unwrap());
    }
    let second = dir.path().join("m-00002-of-00002.gguf");
    for path in [dir.path(), &second] {
        let report = json_of(&uel(&[&"inspect", &path, &"--json"]));
        assert_eq!((&report["tensor_count"], report["files"].as_array().unwrap().len()), (&json!(2), 2));
        assert!(uel(&[&"verify", &path]).status.success());
    }
    std::fs::remove_file(&second).unwrap();
    let first = dir.path().join("m-00001-of-00002.gguf");
    let output = uel(&[&"verify", &first, &"--json"]);
    assert_eq!(json_of(&output)["faults"][0]["kind"], "missing-shard");
    assert!(String::from_utf8(uel(&[&"inspect", &first]).stderr).unwrap().contains("m-00002-of-00002.gguf"));
}

#[test]
fn blocks_are_extracted_and_compared_and_go_into_no_other_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir);
    let raw = dir.path().join("blocks.bin");
    assert!(uel(&[&"extract", &path, &"blk.0.ffn.weight", &"-o", &raw, &"--raw"]).status.success());
    assert_eq!(std::fs::read(&raw).unwrap(), [1; 3 * 2 * 144]);
    for out in ["blocks.npy", "blocks.safetensors"] {
        let out = dir.path().join(out);
        let output = uel(&[&"extract", &path, &"blk.0.ffn.weight", &"-o", &out]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8(output.stderr).unwrap().contains("Q4_K"));
        assert!(!out.exists());
    }
    let norm = dir.path().join("norm.safetensors");
    assert!(uel(&[&"extract", &path, &"norm.weight", &"-o", &norm]).status.success());

    let other = dir.path().join("other.gguf");
    std::fs::copy(&path, &other).unwrap();
    assert!(uel(&[&"diff", &path, &other]).status.success());
    let mut bytes = std::fs::read(&other).unwrap();
    let at = bytes.len() - 40;
    bytes[at] ^= 1;
    std::fs::write(&other, &bytes).unwrap();
    let report = json_of(&uel(&[&"diff", &path, &other, &"--json"]));
    assert_eq!(report["different"][0]["name"], "blk.0.ffn.weight");
}

#[test]
fn conversions_quantize_dequantize_and_change_metadata() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(&dir);
    let original = std::fs::read(&path).unwrap();
    let at = |name: &str| dir.path().join(name);
    let ok = |arguments: &[&dyn AsRef<std::ffi::OsStr>]| {
        let output = uel(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    };
    // Unchanged, byte for byte, and after a change and its reverse, too.
    let copy = at("copy.gguf");
    ok(&[&"convert", &path, &copy]);
    assert!(std::fs::read(&copy).unwrap() == original);
    let changed = at("changed.gguf");
    ok(&[
        &"convert",
        &path,
        &changed,
        &"--set",
        &"llama.block_count=7",
        &"--set",
        &"a:f64=0.5",
        &"--remove",
        &"tokens",
    ]);
    let metadata = json_of(&uel(&[&"inspect", &changed, &"--json"]))["metadata"].clone();
    assert_eq!((&metadata["llama.block_count"], &metadata["a"]), (&json!(7), &json!(0.5)));
    assert!(metadata["tokens"].is_null());
    let back = at("back.gguf");
    ok(&[&"convert", &copy, &back, &"--set", &"llama.block_count=7"]);
    ok(&[&"convert", &back, &back, &"--set", &"llama.block_count=2"]);
    assert!(std::fs::read(&back).unwrap() == original);

    // Blocks become floats, and floats blocks where rows allow it.
    let wide = at("wide.safetensors");
    ok(&[&"convert", &path, &wide, &"--dtype", &"f32"]);
    let dtypes = |path: &PathBuf| {
        let tensors = json_of(&uel(&[&"inspect", path, &"--json"]))["tensors"].as_array().unwrap().clone();
        let of = |name: &str| tensors.iter().find(|tensor| tensor["name"] == name).unwrap()["dtype"].clone();
        (of("blk.0.ffn.weight"), of("norm.weight"))
    };
    assert_eq!(dtypes(&wide), (json!("F32"), json!("F32")));
    let small = at("small.gguf");
    let note = ok(&[&"convert", &wide, &small, &"--dtype", &"q8_0", &"--set", &"general.architecture=llama"]);
    assert!(note.contains("norm.weight") && !note.contains("ffn"), "{note}");
    assert_eq!(dtypes(&small), (json!("Q8_0"), json!("F32")));

    // What no other format holds is refused, and leaves nothing behind.
    for arguments in [vec!["--dtype", "q4_0"], vec!["--set", "a=1"], vec![]] {
        let out = at("out.safetensors");
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"convert", &path, &out];
        all.extend(arguments.iter().map(|argument| argument as &dyn AsRef<std::ffi::OsStr>));
        assert!(!uel(&all).status.success() && !out.exists(), "{arguments:?}");
    }
    assert!(!uel(&[&"convert", &path, &at("x.gguf"), &"--remove", &"nothing"]).status.success());
}
