//! Disks that are full, fail at any operation, or lose power.

use super::*;
use crate::disk::{FaultDisk, LocalDisk, RecordingDisk};
use crate::{Durability, Kind};
use std::path::PathBuf;
use std::sync::Arc;

/// Small tensors, and one that is not gathered.
fn given() -> Vec<Given> {
    let mut given = some_tensors(1);
    given.insert(2, Given::new("large", Dtype::U8, &[70_001], 3));
    given
}

fn durable(disk: impl crate::disk::Disk + 'static) -> SaveOptions {
    SaveOptions::new().with_durability(Durability::Durable).with_disk(disk)
}

#[test]
fn a_full_disk_leaves_nothing_and_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    for old in [None, Some("old")] {
        if let Some(old) = old {
            std::fs::write(&path, old).unwrap();
        }
        let mut room = 0;
        loop {
            let disk = FaultDisk::new(LocalDisk).with_room(room);
            let Err(error) = save(&path, &given(), &durable(disk)) else { break };
            assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)), "{room}: {error}");
            assert_eq!(names(folder.path()), old.map_or(vec![], |_| vec!["m.pth".to_owned()]), "{room}");
            assert_eq!(std::fs::read(&path).ok().as_deref(), old.map(str::as_bytes));
            room += if room < 20 { 1 } else { 211 };
        }
        assert!(room > 70_001);
        check(&path, &given());
        assert_eq!(names(folder.path()), ["m.pth"]);
    }
}

#[test]
fn each_operation_may_fail() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let mut failed = 0;
    for number in 0.. {
        std::fs::write(&path, "old").unwrap();
        let disk = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
        let saved = save(&path, &given(), &durable(Arc::clone(&disk)));
        assert_eq!(names(folder.path()), ["m.pth"], "{number}");
        let Err(error) = saved else {
            assert!(number >= disk.operation_count(), "the fault of operation {number} was lost");
            break;
        };
        failed += 1;
        assert_eq!(error.kind(), Kind::Io, "{error}");
        // The folder's sync is the one thing that comes behind the rename.
        if error.path() == Some(&*path) {
            assert_eq!(std::fs::read(&path).unwrap(), b"old", "{number}: {error}");
        } else {
            assert_eq!(error.path(), Some(folder.path()));
            check(&path, &given());
        }
    }
    assert!(failed > 6, "{failed}");
}

#[test]
fn a_file_with_a_failed_write_is_never_finished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let large = Given::new("large", Dtype::U8, &[70_001], 3);
    for number in 0.. {
        let disk = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
        let options = durable(Arc::clone(&disk));
        let Ok(writer) = PthWriter::create(&path, metas(std::slice::from_ref(&large)), &options) else { continue };
        let written = writer.write("large", Dtype::U8, &[70_001], &large.bytes);
        let finished = writer.finish();
        assert!(written.is_ok() || finished.is_err(), "{number}");
        if finished.is_ok() {
            assert!(number >= disk.operation_count());
            break;
        }
        std::fs::remove_file(&path).ok();
    }
    check(&path, &[large]);
}

#[test]
fn a_loss_of_power_leaves_the_old_file_or_the_new_one() {
    let path = PathBuf::from("/d/m.pth");
    for durability in [Durability::Durable, Durability::Atomic, Durability::Fast] {
        let disk = RecordingDisk::new([(path.clone(), b"old".to_vec())]);
        let from = disk.operations().len();
        let options = SaveOptions::new().with_disk(disk.clone()).with_durability(durability);
        save(&path, &given(), &options).unwrap();
        let new = disk.files()[&path].clone();
        assert_eq!(disk.files().len(), 1, "no other file is left");
        let operations = disk.operations();
        let (mut seen, mut broken) = ([0, 0], 0);
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        for done in from..=operations.len() {
            for subset in 0..200u64 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // Nothing survives, everything does, or whatever chance has it.
                let kept = [0, u64::MAX].get(subset as usize).copied().unwrap_or(random >> 20);
                let files = RecordingDisk::after_power_loss(&operations, done, |at| kept >> (at % 44) & 1 == 1);
                match files.get(&path) {
                    Some(found) if found == b"old" => seen[0] += 1,
                    Some(found) if *found == new => seen[1] += 1,
                    _ => broken += 1,
                }
                if done == operations.len() && durability == Durability::Durable {
                    assert!(files.get(&path) == Some(&new));
                }
            }
        }
        assert!(seen[0] > 0 && seen[1] > 0, "{durability:?}: {seen:?}");
        assert_eq!(broken > 0, durability == Durability::Fast, "{durability:?}: {broken}");
    }
}
