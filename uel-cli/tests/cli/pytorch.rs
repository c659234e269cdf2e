//! PyTorch files in every command.

use crate::{assert_exit, json_of, model, text, uel};
use std::path::PathBuf;
use tempfile::TempDir;

/// The tensors of [`model`] in `model.pth`.
fn pth(dir: &TempDir) -> PathBuf {
    let (source, path) = (model(dir), dir.path().join("model.pth"));
    assert_exit(&uel(&[&"convert", &source, &path]), 0, 0);
    path
}

#[test]
fn is_inspected() {
    let dir = TempDir::new().unwrap();
    let path = pth(&dir);
    let report = json_of(&uel(&[&"inspect", &path, &"--json"]));
    assert_eq!((&report["format"], &report["tensor_count"]), (&"pytorch".into(), &3.into()));
    assert_eq!(report["files"][0]["container"], "zip");
    let head = report["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == "lm_head.weight").unwrap();
    assert_eq!((&head["strides"], &head["derived"]), (&serde_json::json!([2]), &false.into()));
    assert!(report["values"][0].is_object());
    let output = uel(&[&"inspect", &path]);
    let printed = text(&output.stdout);
    assert!(printed.contains("lm_head.weight") && printed.contains("3 tensors"), "{printed}");
    let page = dir.path().join("page.html");
    assert_exit(&uel(&[&"inspect", &path, &"--html", &page]), 0, 0);
    assert!(std::fs::read_to_string(page).unwrap().contains("lm_head.weight"));
}

#[test]
fn is_verified_and_scanned() {
    let dir = TempDir::new().unwrap();
    let path = pth(&dir);
    let output = uel(&[&"verify", &path, &"--deep"]);
    assert_exit(&output, 0, 0);
    let printed = text(&output.stdout);
    assert!(printed.contains("torch._utils._rebuild_tensor_v2"), "{printed}");
    assert!(printed.contains("0 that weights_only=True refuses, 0 dangerous"), "{printed}");
    let report = json_of(&uel(&[&"verify", &path, &"--json"]));
    let globals = report["globals"].as_array().unwrap();
    assert!(globals.iter().all(|global| global["verdict"] == "allowed"), "{globals:?}");

    // A bit of a tensor: only who reads all finds it.
    let mut bytes = std::fs::read(&path).unwrap();
    let range = json_of(&uel(&[&"inspect", &path, &"--json"]))["tensors"][0]["offset"].as_u64().unwrap() as usize;
    bytes[range] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_exit(&uel(&[&"verify", &path]), 0, 0);
    let output = uel(&[&"verify", &path, &"--deep", &"--json"]);
    assert_exit(&output, 1, 1);
    assert_eq!(json_of(&output)["faults"][0]["kind"], "hash-mismatch");
}

#[test]
fn a_pickle_that_would_run_something_is_a_fault_and_runs_nothing() {
    let dir = TempDir::new().unwrap();
    let (path, witness) = (dir.path().join("evil.pkl"), dir.path().join("witness"));
    let command = format!("touch {}", witness.display());
    let mut pickle = b"\x80\x02cposix\nsystem\nX".to_vec();
    pickle.extend((command.len() as u32).to_le_bytes());
    pickle.extend(command.as_bytes());
    pickle.extend(b"\x85R.");
    std::fs::write(&path, pickle).unwrap();
    let output = uel(&[&"verify", &path, &"--json"]);
    assert_exit(&output, 1, 1);
    let report = json_of(&output);
    assert_eq!(report["globals"][0]["global"], "posix.system");
    assert_eq!(
        (&report["globals"][0]["verdict"], &report["globals"][0]["called"]),
        (&"dangerous".into(), &true.into())
    );
    let kinds: Vec<_> = report["faults"].as_array().unwrap().iter().map(|fault| fault["kind"].clone()).collect();
    assert!(kinds.contains(&"dangerous-global".into()), "{kinds:?}");
    let output = uel(&[&"verify", &path]);
    let printed = text(&output.stdout);
    assert!(printed.contains("DANGEROUS: torch.load(weights_only=False) would run it"), "{printed}");
    assert!(!witness.exists());
}

#[test]
fn is_converted_both_ways_compared_and_extracted() {
    let dir = TempDir::new().unwrap();
    let path = pth(&dir);
    let [back, shards, again] = ["back.safetensors", "sharded", "again.pt"].map(|name| dir.path().join(name));
    assert_exit(&uel(&[&"convert", &path, &back]), 0, 0);
    assert_exit(&uel(&[&"diff", &path, &back]), 0, 0);
    assert_exit(&uel(&[&"convert", &path, &shards, &"--shard-size", &"30"]), 0, 0);
    assert_exit(&uel(&[&"diff", &path, &shards]), 0, 0);
    assert_exit(&uel(&[&"convert", &shards, &again]), 0, 0);
    assert_exit(&uel(&[&"diff", &path, &again]), 0, 0);
    assert_eq!(std::fs::read(&again).unwrap().len(), std::fs::read(&path).unwrap().len());
    let bin = dir.path().join("bin/pytorch_model.bin");
    assert_exit(&uel(&[&"convert", &path, &bin, &"--shard-size", &"30"]), 0, 0);
    let index = dir.path().join("bin/pytorch_model.bin.index.json");
    assert_exit(&uel(&[&"verify", &index, &"--deep"]), 0, 0);
    assert_exit(&uel(&[&"diff", &index, &path]), 0, 0);

    let out = dir.path().join("head.npy");
    assert_exit(&uel(&[&"extract", &path, &"lm_head.weight", &"-o", &out, &"--dtype", &"f32"]), 0, 0);
    assert!(std::fs::read(out).unwrap().starts_with(b"\x93NUMPY"));
    let output = uel(&[&"inspect", &path, &"--state-key", &"model"]);
    assert_exit(&output, 1, 1);
    assert!(text(&output.stderr).contains("lm_head.weight"), "{}", text(&output.stderr));
}

#[test]
fn is_measured() {
    let dir = TempDir::new().unwrap();
    let path = pth(&dir);
    let output = uel(&[&"bench", &"load", &path, &"--runs", &"1", &"--json"]);
    assert_exit(&output, 0, 0);
}

/// Both directions hold pieces only, however large the tensors are.
#[test]
fn measured_converting_pytorch_files_needs_little_memory() {
    use candle_core::{DType, Device, Tensor};
    let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [source, pth, back] = ["source.safetensors", "model.pth", "back.safetensors"].map(|name| dir.path().join(name));
    let large = Tensor::ones((300, 1_000_000), DType::U8, &Device::Cpu).unwrap();
    let small = Tensor::arange(0f32, 100., &Device::Cpu).unwrap();
    uel_candle::save(&std::collections::HashMap::from([("large", large), ("small", small)]), &source).unwrap();
    for (from, to) in [(&source, &pth), (&pth, &back)] {
        let output = uel(&[&"convert", from, to, &"--durability", &"fast", &"--json"]);
        assert_exit(&output, 0, 0);
        if let Some(peak) = json_of(&output)["peak_rss_bytes"].as_u64() {
            assert!(peak < 64_000_000, "{peak} bytes");
        }
    }
    assert_exit(&uel(&[&"diff", &source, &back]), 0, 0);
}
