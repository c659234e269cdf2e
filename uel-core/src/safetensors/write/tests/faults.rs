//! Disks that are full, or fail at any operation.

use super::*;
use crate::disk::{FaultDisk, LocalDisk};
use crate::{Direct, Durability, Kind, Result};
use std::sync::Arc;

type Disk = Arc<FaultDisk<LocalDisk>>;

type Way = Box<dyn Fn(&Path, &[Given], Disk) -> Result<SaveReport>>;

/// The ways to save a file, each with everything that happens in it.
fn ways() -> Vec<(&'static str, Way)> {
    let save = |disk: Disk, (hashes, direct)| {
        let save = SaveOptions::new().with_disk(disk).with_durability(Durability::Durable).with_hashes(hashes);
        save.with_direct(direct)
    };
    let mut ways: Vec<(&str, Way)> = Vec::new();
    for hashes in [(false, Direct::Never), (true, Direct::Never), (true, Direct::Always)] {
        ways.push(("stream", Box::new(move |path, given, disk| stream(path, given, &save(disk, hashes)))));
        for reserved in [0, 10_000] {
            let options = move |disk| {
                let options = IncrementalOptions::new().with_save(save(disk, hashes));
                options.with_max_header_bytes(reserved).with_budget_bytes(100)
            };
            ways.push(("incremental", Box::new(move |path, given, disk| incremental(path, given, &options(disk)))));
        }
    }
    ways
}

/// More header than a reservation of nothing holds.
fn given() -> Vec<Given> {
    let mut given = some_tensors(1);
    given.extend((0..60).map(|n| Given::new(&format!("{n:0>60}"), Dtype::U8, &[n], n as u8)));
    given
}

#[test]
fn a_full_disk_leaves_nothing_and_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for old in [None, Some("old")] {
        if let Some(old) = old {
            std::fs::write(&path, old).unwrap();
        }
        for (way, save) in ways() {
            let mut room = 0;
            loop {
                let disk = Arc::new(FaultDisk::new(LocalDisk).with_room(room));
                let Err(error) = save(&path, &given(), disk) else { break };
                assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)), "{way} {room}: {error}");
                assert_eq!(
                    names(folder.path()),
                    old.map_or(vec![], |_| vec!["m.safetensors".to_owned()]),
                    "{way} {room}"
                );
                assert_eq!(std::fs::read(&path).ok().as_deref(), old.map(str::as_bytes));
                // Primes, so that every kind of place is met, and each byte at the beginning.
                room += if room < 20 { 1 } else { 211 };
            }
            check_any(&path, &given());
            assert_eq!(names(folder.path()), ["m.safetensors"], "{way}");
            match old {
                Some(old) => std::fs::write(&path, old).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
        }
    }
}

#[test]
fn every_byte_of_a_small_file_can_be_the_last_that_fits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = &some_tensors(1)[..2];
    for (way, save) in ways() {
        let mut rooms = 0..;
        let room = rooms.find(|&room| {
            let saved = save(&path, given, Arc::new(FaultDisk::new(LocalDisk).with_room(room)));
            if let Err(error) = &saved {
                assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)), "{way} {room}: {error}");
                assert!(names(folder.path()).is_empty(), "{way} {room}");
            }
            saved.is_ok()
        });
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!(room.is_some_and(|room| room >= bytes.min(300)), "{way}: {room:?} bytes were enough for {bytes}");
        check_any(&path, given);
        std::fs::remove_file(&path).unwrap();
    }
}

fn check_any(path: &Path, given: &[Given]) {
    let files = SafetensorsFiles::open(path, Rules::Strict).unwrap();
    check(path, given, &files.file_metadata(0).cloned());
}

#[test]
fn each_operation_may_fail() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for (way, save) in ways() {
        let mut failed = 0;
        for number in 0.. {
            std::fs::write(&path, "old").unwrap();
            let disk = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
            let saved = save(&path, &given(), Arc::clone(&disk));
            assert_eq!(names(folder.path()), ["m.safetensors"], "{way} {number}");
            let Err(error) = saved else {
                assert!(number >= disk.operation_count(), "{way}: the fault of operation {number} was lost");
                break;
            };
            failed += 1;
            assert!(error.kind() == Kind::Io && error.path().is_some(), "{error}");
            // The folder's sync is the one thing that comes behind the rename.
            if error.path() == Some(&*path) {
                assert_eq!(std::fs::read(&path).unwrap(), b"old", "{way} {number}: {error}");
            } else {
                assert_eq!(error.path(), Some(folder.path()));
                check_any(&path, &given());
            }
        }
        assert!(failed > 4, "{way}: {failed}");
    }
}

#[test]
fn a_set_of_shards_fails_whole_or_can_be_completed() {
    let plan = |given: &[Given]| plan_shards(given.iter().map(|given| given.meta.clone()), 100, "model").unwrap();
    let save = |folder: &Path, given: &[Given], disk: Disk| -> Result<SaveReport> {
        let options = SaveOptions::new().with_durability(Durability::Durable).with_disk(disk);
        let writer = ShardedWriter::create(folder, &plan(given), &options)?;
        for given in given {
            let (name, dtype, shape, bytes) = given.parts();
            writer.write(name, dtype, shape, bytes)?;
        }
        writer.finish()
    };
    let content = |folder: &Path| -> Vec<_> {
        let names = names(folder).into_iter();
        names.map(|name| (name.clone(), std::fs::read(folder.join(name)).unwrap())).collect()
    };
    let saved = |given: &[Given]| {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), given, Arc::new(FaultDisk::new(LocalDisk))).unwrap();
        content(folder.path())
    };
    let (old, new) = (saved(&some_tensors(1)), saved(&some_tensors(77)));
    for replace in [false, true] {
        let mut completed = 0;
        for number in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let folder = folder.path();
            let before = if replace { &old[..] } else { &[] };
            before.iter().for_each(|(name, bytes)| std::fs::write(folder.join(name), bytes).unwrap());
            let disk = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
            let result = save(folder, &some_tensors(77), disk);
            if let Err(error) = &result {
                assert!(error.path().is_some(), "{error}");
            }
            let recovered = crate::safetensors::recover_set(&LocalDisk, folder).unwrap();
            let left = content(folder);
            if result.is_ok() {
                assert!(!recovered && left == new);
                break;
            }
            completed += usize::from(recovered);
            let kept = if recovered { left == new } else { left == before || left == new };
            let found: Vec<_> = left.iter().map(|(name, _)| name).collect();
            assert!(kept, "{number} {recovered} {:?}: {found:?}", result.unwrap_err());
        }
        assert!(completed > 2);
    }
}
