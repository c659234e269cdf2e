//! `uel recover`.

use crate::{assert_exit, json_of, model, names_in, refused, text, uel, write};
use safetensors::tensor::Dtype;
use serde_json::json;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use uel_candle::{Checkpoint, Edit, Kind, SaveOptions};
use uel_core::disk::{FaultDisk, LocalDisk};

/// Shards of bytes that are all `value`.
fn save(folder: &Path, value: u8, options: SaveOptions) -> uel_candle::Result<()> {
    let src = folder.parent().unwrap().join(format!("{value}.safetensors"));
    write(&src, &[("a", Dtype::U8, &[100], vec![value; 100]), ("b", Dtype::U8, &[100], vec![value; 100])]);
    let checkpoint = Checkpoint::open(&src)?;
    Edit::new(&checkpoint).write(folder, &options.with_max_shard_bytes(100)).map(|_| ())
}

/// A folder whose shards were being replaced when the disk failed.
fn interrupted_set(dir: &TempDir) -> PathBuf {
    let attempt = |fault: u64| {
        let folder = dir.path().join(format!("set-{fault}"));
        save(&folder, 1, SaveOptions::new()).unwrap();
        let faulty = SaveOptions::new().with_disk(FaultDisk::new(LocalDisk).failing_at(fault));
        let saved = save(&folder, 2, faulty);
        match Checkpoint::open(&folder) {
            Err(error) if error.kind() == Kind::Interrupted => Some(folder),
            _ => {
                assert!(saved.is_err(), "no fault leaves the set half replaced");
                None
            }
        }
    };
    (0..200).find_map(attempt).unwrap()
}

#[test]
fn interrupted_sets_are_completed() {
    for file in [None, Some("model.safetensors.index.json")] {
        let dir = TempDir::new().unwrap();
        let folder = interrupted_set(&dir);
        let path = file.map_or(folder.clone(), |file| folder.join(file));
        let told = refused(&[&"inspect", &folder]);
        assert!(told.contains("uel recover"), "{told}");
        let output = uel(&[&"recover", &path, &"--json"]);
        assert_exit(&output, 0, 0);
        let shown = path.to_str().unwrap();
        assert_eq!(json_of(&output), json!({"path": shown, "completed_set": true, "undone_patches": []}));
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!((checkpoint.read("a").unwrap(), checkpoint.read("b").unwrap()), (vec![2; 100], vec![2; 100]));
        assert_eq!(names_in(&folder).len(), 3, "{:?}", names_in(&folder));
        let output = uel(&[&"recover", &path]);
        assert_exit(&output, 0, 0);
        assert_eq!(text(&output.stdout), format!("{shown}: nothing was interrupted\n"));
    }
}

/// Leaves `path` as a process does that is killed while it patches the last tensor's bytes.
fn interrupt_patch(path: &Path) {
    let old = std::fs::read(path).unwrap();
    let (start, len) = (old.len() - 8, 8);
    let mut journal = b"UELUNDO1".to_vec();
    for word in [old.len(), 1, start, len] {
        journal.extend((word as u64).to_le_bytes());
    }
    journal.extend(&old[start..]);
    let mut hash = twox_hash::XxHash3_64::new();
    hash.write(&journal);
    journal.extend(hash.finish().to_le_bytes());
    let name = path.file_name().unwrap().to_str().unwrap();
    std::fs::write(path.with_file_name(format!(".{name}.uel-undo")), journal).unwrap();
    let mut new = old;
    new[start..start + 5].fill(9);
    std::fs::write(path, new).unwrap();
}

#[test]
fn interrupted_patches_are_undone() {
    for whole_folder in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = model(&dir);
        let before = std::fs::read(&path).unwrap();
        interrupt_patch(&path);
        refused(&[&"inspect", &path]);
        let given = if whole_folder { dir.path() } else { &path };
        let output = uel(&[&"recover", &given]);
        assert_exit(&output, 0, 0);
        assert_eq!(text(&output.stdout), format!("{}: undid an interrupted patch\n", path.display()));
        assert!(std::fs::read(&path).unwrap() == before);
        assert_eq!(names_in(dir.path()), ["model.safetensors"]);
        assert_exit(&uel(&[&"verify", &path]), 0, 0);
    }
}

#[test]
fn nothing_to_do_and_faults() {
    let dir = TempDir::new().unwrap();
    let path = model(&dir);
    let report = json_of(&uel(&[&"recover", &path, &"--json"]));
    assert_eq!(report, json!({"path": path.to_str().unwrap(), "completed_set": false, "undone_patches": []}));
    let told = refused(&[&"recover", &dir.path().join("none.safetensors")]);
    assert!(told.contains("none.safetensors"), "{told}");

    // A copy that is damaged is not written back.
    let before = std::fs::read(&path).unwrap();
    std::fs::write(dir.path().join(".model.safetensors.uel-undo"), b"UELUNDO1 and no more").unwrap();
    let told = refused(&[&"recover", &path]);
    assert!(told.contains("uel-undo"), "{told}");
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(uel(&[&"recover"]).status.code(), Some(2));
}
