//! Tensors that are replaced in place.

use super::patch::{journal_path, patch_regions, undo_patch_on};
use super::write::{HASH_CHUNK_BYTES, Hashes, IncrementalOptions, IncrementalWriter, SaveOptions};
use super::{Rules, SafetensorsFiles, patch, undo_patch};
use crate::atomic::Hold;
use crate::disk::{Disk, FaultDisk, LocalDisk, RecordingDisk};
use crate::{Dtype, Kind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LARGE: usize = HASH_CHUNK_BYTES + 5;

fn save(path: &Path, hashes: bool) {
    let save = SaveOptions::new().with_hashes(hashes).with_metadata_entry("k", "v");
    let writer = IncrementalWriter::create(path, &IncrementalOptions::new().with_save(save)).unwrap();
    writer.write("a\"é", Dtype::U8, &[4], &[1, 2, 3, 4]).unwrap();
    writer.write("large", Dtype::U8, &[LARGE], &vec![5; LARGE]).unwrap();
    writer.finish().unwrap();
}

#[test]
fn a_tensor_is_replaced_and_its_hashes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for hashes in [false, true] {
        save(&path, hashes);
        let before = std::fs::read(&path).unwrap();
        patch(&path, "large", Dtype::U8, &[LARGE], &vec![6; LARGE]).unwrap();
        patch(&path, "a\"é", Dtype::U8, &[4], &[9; 4]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), before.len());
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("a\"é").unwrap().data(), [9; 4]);
        assert!(read.tensor("large").unwrap().data() == vec![6; LARGE]);
        let files = SafetensorsFiles::open(&path, Rules::Strict).unwrap();
        let metadata = files.file_metadata(0).unwrap();
        assert_eq!(metadata["k"], "v");
        let found = Hashes::from_metadata(metadata).unwrap();
        assert_eq!(found.is_some(), hashes);
        if let Some(found) = found {
            found.check("a\"é", 0, &[9; 4]).unwrap();
            found.check("large", 0, &[6; HASH_CHUNK_BYTES]).unwrap();
            found.check("large", 1, &[6; 5]).unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(!undo_patch(&path).unwrap());
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    save(&path, true);
    let before = std::fs::read(&path).unwrap();
    let refused = |kind, name: &str, dtype, shape: &[usize], bytes: &[u8]| {
        let error = patch(&path, name, dtype, shape, bytes).unwrap_err();
        assert_eq!((error.kind(), error.path()), (kind, Some(&*path)), "{error}");
        assert!(error.tensor().is_some());
        assert!(std::fs::read(&path).unwrap() == before);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    };
    refused(Kind::UnknownTensor, "b", Dtype::U8, &[4], &[1; 4]);
    refused(Kind::UnsupportedDtype, "a\"é", Dtype::I8, &[4], &[1; 4]);
    refused(Kind::ShapeMismatch, "a\"é", Dtype::U8, &[2, 2], &[1; 4]);
    refused(Kind::SizeMismatch, "a\"é", Dtype::U8, &[4], &[1; 5]);
    assert_eq!(patch(folder.path().join("none"), "a", Dtype::U8, &[4], &[1; 4]).unwrap_err().kind(), Kind::Io);
    #[cfg(unix)]
    {
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = patch(&link, "a\"é", Dtype::U8, &[4], &[1; 4]).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Argument, Some(&*link)));
        assert!(std::fs::read(&path).unwrap() == before);
    }
}

/// The file as a patch left it in the middle, and what it kept.
fn interrupted() -> (Vec<u8>, Vec<u8>) {
    let path = PathBuf::from("/d/m");
    let disk = RecordingDisk::new([(path.clone(), (0..100).collect())]);
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    patch_regions(&shared, &path, 100, &[(10, &[0xAA; 30]), (60, &[0xBB; 20])]).unwrap();
    let operations = disk.operations();
    let states = (0..operations.len()).rev().map(|done| RecordingDisk::after_power_loss(&operations, done, |_| true));
    let mut last = states.filter(|files| files.contains_key(&journal_path(&path)));
    let files = last.next().unwrap();
    (files[&path].clone(), files[&journal_path(&path)].clone())
}

#[test]
fn an_interrupted_patch_is_refused_on_opening_and_undone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let (file, journal) = interrupted();
    std::fs::write(&path, &file).unwrap();
    std::fs::write(journal_path(&path), &journal).unwrap();
    let error = SafetensorsFiles::open(&path, Rules::Strict).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::Interrupted, Some(&*path)));
    // While one patches, nobody else undoes it.
    let hold = Hold::take(&LocalDisk, folder.path().join(".m.uel-lock")).unwrap();
    assert_eq!(undo_patch(&path).unwrap_err().kind(), Kind::Interrupted);
    assert_eq!(patch(&path, "a", Dtype::U8, &[1], &[1]).unwrap_err().kind(), Kind::Interrupted);
    drop(hold);
    // One that was killed left its lock, which nobody holds.
    std::fs::write(folder.path().join(".m.uel-lock"), "").unwrap();
    assert!(undo_patch(&path).unwrap());
    assert_eq!(std::fs::read(&path).unwrap(), (0..100).collect::<Vec<u8>>());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_damaged_copy_is_refused_and_nothing_changes() {
    let (file, journal) = interrupted();
    let path = PathBuf::from("/d/m");
    let undo = |file: &[u8], journal: Vec<u8>| {
        let disk = RecordingDisk::new([(path.clone(), file.to_vec()), (journal_path(&path), journal)]);
        let undone = undo_patch_on(&disk, &path);
        (undone, disk.files()[&path].clone())
    };
    assert!(undo(&file, journal.clone()).0.unwrap());
    for len in 0..journal.len() {
        let (undone, left) = undo(&file, journal[..len].to_vec());
        assert_eq!(undone.unwrap_err().kind(), Kind::Json);
        assert!(left == file);
    }
    for bit in 0..journal.len() * 8 {
        let mut damaged = journal.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let (undone, left) = undo(&file, damaged);
        let error = undone.unwrap_err();
        assert!(error.kind() == Kind::Json && error.path() == Some(&*journal_path(&path)), "{bit}: {error}");
        assert!(left == file);
    }
    for other in [&file[..99], &[&file[..], &[0]].concat()] {
        let (undone, left) = undo(other, journal.clone());
        assert_eq!(undone.unwrap_err().kind(), Kind::Changed);
        assert!(left == other);
    }
}

#[test]
fn a_fault_while_patching_brings_the_old_bytes_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let old: Vec<u8> = (0..100).collect();
    for number in 0.. {
        std::fs::write(&path, &old).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
        let patched = patch_regions(&disk, &path, 100, &[(10, &[0xAA; 30]), (60, &[0xBB; 20])]);
        let Err(error) = patched else { break };
        assert!(error.kind() == Kind::Io && error.path().is_some(), "{error}");
        let undone = undo_patch(&path).unwrap();
        let left = std::fs::read(&path).unwrap();
        // The one exception is the folder's sync behind everything else.
        assert!(left == old || !undone && error.message().contains("sync the folder"), "{number}: {error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn what_was_kept_of_a_file_that_is_gone_is_no_obstacle() {
    let (_, journal) = interrupted();
    let path = PathBuf::from("/d/m");
    let disk = RecordingDisk::new([(journal_path(&path), journal)]);
    assert!(!undo_patch_on(&disk, &path).unwrap());
    assert!(disk.files().is_empty());
}

#[test]
fn a_patched_shard_is_noticed_through_the_index_file() {
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("a.safetensors");
    save(&shard, false);
    let index = folder.path().join("model.safetensors.index.json");
    let names = r#"{"a\"é":"a.safetensors","large":"a.safetensors"}"#;
    std::fs::write(&index, format!("{{\"metadata\":{{}},\"weight_map\":{names}}}")).unwrap();
    SafetensorsFiles::open(&index, Rules::Strict).unwrap();
    std::fs::write(journal_path(&shard), "kept").unwrap();
    for path in [&*index, folder.path()] {
        assert_eq!(SafetensorsFiles::open(path, Rules::Strict).unwrap_err().kind(), Kind::Interrupted);
    }
}
