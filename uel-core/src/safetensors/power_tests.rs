//! Losses of power at every moment of a save, a replaced set and a patch, with whatever was not synced lost or not.

use super::patch::{patch_regions, undo_patch_on};
use super::write::{
    IncrementalOptions, IncrementalWriter, SaveOptions, ShardedWriter, StreamingWriter, TensorMeta, plan_shards,
};
use crate::disk::{Direct, Disk, Operation, RecordingDisk};
use crate::save::set::{JOURNAL, recover_set};
use crate::{Dtype, Durability};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Subsets that are tried of what may or may not survive, unless there are fewer.
const SUBSETS: u64 = 256;

/// What may be left after each prefix of `operations` from number `from` on; `true` stands for the end.
fn losses(operations: &[Operation], from: usize, mut left: impl FnMut(Files, bool)) {
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    for done in from..=operations.len() {
        let mut undecided = Vec::new();
        RecordingDisk::after_power_loss(operations, done, |at| {
            undecided.push(at);
            true
        });
        let all = undecided.len() < 8;
        for subset in 0..if all { 1 << undecided.len() } else { SUBSETS } {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // The extremes are among those chosen at random.
            let kept = match subset {
                _ if all => subset,
                0 => 0,
                1 => u64::MAX,
                _ => random,
            };
            let survives =
                |at| undecided.iter().position(|&other| other == at).is_some_and(|n| kept >> (n % 64) & 1 == 1);
            left(RecordingDisk::after_power_loss(operations, done, survives), done == operations.len());
        }
    }
}

fn metas(sizes: &[usize]) -> Vec<TensorMeta> {
    sizes.iter().enumerate().map(|(n, size)| TensorMeta::new(n.to_string(), Dtype::U8, [*size])).collect()
}

/// Past the page cache, on a disk that takes that.
fn saving_to(disk: &RecordingDisk, durability: Durability) -> SaveOptions {
    SaveOptions::new().with_disk(disk.clone()).with_durability(durability).with_direct(Direct::Always)
}

fn stream(disk: &RecordingDisk, path: &Path, durability: Durability, byte: u8) {
    let options = saving_to(disk, durability).with_hashes(true);
    let writer = StreamingWriter::create(path, metas(&[100, 70_000]), &options).unwrap();
    writer.write("1", Dtype::U8, &[70_000], &[byte; 70_000]).unwrap();
    writer.write("0", Dtype::U8, &[100], &[byte; 100]).unwrap();
    writer.finish().unwrap();
}

fn incremental(disk: &RecordingDisk, path: &Path, durability: Durability, byte: u8) {
    let save = saving_to(disk, durability);
    // The header outgrows what is reserved, so that the data is moved.
    let options = IncrementalOptions::new().with_save(save).with_max_header_bytes(0);
    let writer = IncrementalWriter::create(path, &options).unwrap();
    for n in 0..70 {
        let name = format!("{n:0>60}");
        writer.write(&name, Dtype::U8, &[usize::from(n % 40 == 0)], &vec![byte; usize::from(n % 40 == 0)]).unwrap();
    }
    writer.finish().unwrap();
}

type Save = fn(&RecordingDisk, &Path, Durability, u8);

/// A tensor after the other, none of them whole blocks.
fn incremental_blocks(disk: &RecordingDisk, path: &Path, durability: Durability, byte: u8) {
    let options = IncrementalOptions::new().with_save(saving_to(disk, durability)).with_max_header_bytes(500);
    let writer = IncrementalWriter::create(path, &options).unwrap();
    for n in 0..4 {
        writer.write(&n.to_string(), Dtype::U8, &[9000], &[byte; 9000]).unwrap();
    }
    writer.finish().unwrap();
}

/// Whether blocks were written as direct writes must be: whole, and at their places.
fn wrote_blocks(operations: &[Operation]) -> bool {
    let whole = |value: usize| value > 0 && value.is_multiple_of(4096);
    operations.iter().any(|operation| match operation {
        Operation::Write(_, offset, bytes) => offset.is_multiple_of(4096) && whole(bytes.len()),
        _ => false,
    })
}

#[test]
fn a_file_is_the_old_one_or_the_new_one() {
    let path = PathBuf::from("/d/m.safetensors");
    let saves = [(stream as Save, false), (incremental, false), (stream, true), (incremental_blocks, true)];
    for (save, direct) in saves {
        for old in [None, Some(b"old".to_vec())] {
            for durability in [Durability::Durable, Durability::Atomic, Durability::Fast] {
                let disk = RecordingDisk::new(old.clone().map(|old| (path.clone(), old)));
                let disk = if direct { disk.with_direct_writes() } else { disk };
                let from = disk.operations().len();
                save(&disk, &path, durability, 7);
                assert!(!direct || wrote_blocks(&disk.operations()[from..]));
                let new = disk.files()[&path].clone();
                assert_eq!(disk.files().len(), 1, "no other file is left");
                let (mut seen, mut broken) = ([0, 0], 0);
                losses(&disk.operations(), from, |files, finished| {
                    match files.get(&path) {
                        found if found == old.as_ref() => seen[0] += 1,
                        Some(found) if *found == new => seen[1] += 1,
                        _ => broken += 1,
                    }
                    if finished && durability == Durability::Durable {
                        assert!(files.get(&path) == Some(&new));
                    }
                });
                assert!(seen[0] > 0 && seen[1] > 0, "{durability:?}: {seen:?}");
                assert_eq!(broken > 0, durability == Durability::Fast, "{durability:?}: {broken}");
            }
        }
    }
}

fn shards(disk: &RecordingDisk, durability: Durability, sizes: &[usize], byte: u8) {
    let plan = plan_shards(metas(sizes), 100, "model").unwrap();
    let writer = ShardedWriter::create("/d", &plan, &saving_to(disk, durability)).unwrap();
    for (n, size) in sizes.iter().enumerate() {
        writer.write(&n.to_string(), Dtype::U8, &[*size], &vec![byte; *size]).unwrap();
    }
    writer.finish().unwrap();
}

/// The index file and what it names.
fn set(files: &Files) -> Option<Vec<Option<Vec<u8>>>> {
    let index = files.get(Path::new("/d/model.safetensors.index.json"))?;
    let parsed: serde_json::Value = serde_json::from_slice(index).unwrap_or_default();
    let shards = parsed["weight_map"].as_object().into_iter().flatten();
    let mut set = vec![Some(index.clone())];
    set.extend(shards.map(|(_, name)| files.get(&Path::new("/d").join(name.as_str().unwrap())).cloned()));
    Some(set)
}

#[test]
fn a_set_is_the_old_one_or_the_new_one_once_recovered() {
    let sizes: [(Option<&[usize]>, &[usize]); 4] = [
        (None, &[60, 60]),
        (Some(&[50, 70]), &[60, 60]),
        (Some(&[90, 80, 70]), &[60, 60]),
        // One file alone, where the old index would hide it.
        (Some(&[90, 80]), &[60]),
    ];
    for (old_sizes, sizes) in sizes {
        let levels = [Durability::Durable, Durability::Atomic, Durability::Fast];
        for (durability, direct) in levels.into_iter().flat_map(|durability| [(durability, false), (durability, true)])
        {
            let disk = RecordingDisk::default();
            if let Some(sizes) = old_sizes {
                shards(&disk, Durability::Durable, sizes, 1);
            }
            let before = disk.files();
            let disk = RecordingDisk::new(before.clone());
            let disk = if direct { disk.with_direct_writes() } else { disk };
            let from = disk.operations().len();
            shards(&disk, durability, sizes, 2);
            let (old, new) = (set(&before), set(&disk.files()));
            assert!(
                disk.files().keys().all(|path| !path.to_string_lossy().contains("/.")),
                "{:?}",
                disk.files().keys()
            );
            let (mut seen, mut broken) = ([0, 0, 0], 0);
            losses(&disk.operations(), from, |files, finished| {
                let journal = files.contains_key(&Path::new("/d").join(JOURNAL));
                let after = RecordingDisk::new(files.clone());
                let recovered = recover_set(&after, Path::new("/d"));
                let found = set(&after.files());
                let whole = recovered.is_ok() && (found == old || found == new) && (journal || found == set(&files));
                // Shards that no index names are not taken for a checkpoint.
                broken += usize::from(!whole);
                seen[usize::from(found == new)] += 1;
                seen[2] += usize::from(journal);
                if finished && durability == Durability::Durable {
                    assert!(found == new && !journal);
                }
                // Recovered once, it stays.
                if durability != Durability::Fast {
                    assert!(!recover_set(&after, Path::new("/d")).unwrap());
                    assert!(!after.files().contains_key(&Path::new("/d").join(JOURNAL)));
                }
            });
            assert!(seen.iter().all(|&seen| seen > 0), "{durability:?}: {seen:?}");
            assert_eq!(broken > 0, durability == Durability::Fast, "{durability:?}: {broken}");
        }
    }
}

#[test]
fn what_recovers_a_set_may_be_interrupted_too() {
    let disk = RecordingDisk::default();
    shards(&disk, Durability::Durable, &[50, 70], 1);
    let before = disk.files();
    let disk = RecordingDisk::new(before.clone());
    let from = disk.operations().len();
    shards(&disk, Durability::Atomic, &[60, 60], 2);
    let (old, new) = (set(&before), set(&disk.files()));
    let operations = disk.operations();
    for done in from..=operations.len() {
        let left = RecordingDisk::after_power_loss(&operations, done, |at| at % 3 != 0);
        let disk = RecordingDisk::new(left);
        let from = disk.operations().len();
        recover_set(&disk, Path::new("/d")).unwrap();
        losses(&disk.operations(), from, |files, _| {
            let after = RecordingDisk::new(files);
            recover_set(&after, Path::new("/d")).unwrap();
            let found = set(&after.files());
            assert!(found == old || found == new);
        });
        // The next save of a set completes it as well, and is whole itself.
        let disk = RecordingDisk::new(RecordingDisk::after_power_loss(&operations, done, |at| at % 3 != 0));
        let from = disk.operations().len();
        shards(&disk, Durability::Durable, &[80, 80], 3);
        let third = set(&disk.files());
        assert!(third != new && third != old);
        assert!(disk.files().keys().all(|path| !path.to_string_lossy().contains(".uel-new")));
        losses(&disk.operations(), from, |files, _| {
            let after = RecordingDisk::new(files);
            recover_set(&after, Path::new("/d")).unwrap();
            let found = set(&after.files());
            assert!(found == old || found == new || found == third);
        });
    }
}

#[test]
fn a_patched_file_is_the_old_one_or_the_new_one_once_undone() {
    let path = PathBuf::from("/d/m.safetensors");
    let old: Vec<u8> = (0..200).collect();
    let recording = RecordingDisk::new([(path.clone(), old.clone())]);
    let from = recording.operations().len();
    let disk: Arc<dyn Disk> = Arc::new(recording.clone());
    patch_regions(&disk, &path, 200, &[(50, &[1; 100]), (0, &[2; 30])]).unwrap();
    let new = recording.files()[&path].clone();
    assert_eq!(recording.files().len(), 1);
    let (mut undone, mut seen) = (0, [0, 0]);
    losses(&recording.operations(), from, |files, finished| {
        let after = RecordingDisk::new(files);
        let from = after.operations().len();
        let was = undo_patch_on(&after, &path).unwrap();
        undone += usize::from(was);
        let found = after.files()[&path].clone();
        assert!(found == old || found == new && !was);
        seen[usize::from(found == new)] += 1;
        assert!(!finished || found == new);
        assert!(!undo_patch_on(&after, &path).unwrap());
        if undone % 4 == 1 {
            // Undoing may be interrupted too.
            losses(&after.operations(), from, |files, _| {
                let after = RecordingDisk::new(files);
                undo_patch_on(&after, &path).unwrap();
                assert!(after.files()[&path] == found);
            });
        }
    });
    assert!(undone > 5 && seen[0] > 0 && seen[1] > 0, "{undone} {seen:?}");
}

#[test]
fn a_save_over_an_interrupted_patch_is_not_undone_later() {
    let path = PathBuf::from("/d/m.safetensors");
    let recording = RecordingDisk::default();
    stream(&recording, &path, Durability::Durable, 1);
    let old = recording.files()[&path].clone();
    let disk: Arc<dyn Disk> = Arc::new(recording.clone());
    let from = recording.operations().len();
    patch_regions(&disk, &path, old.len() as u64, &[(400, &[9; 100])]).unwrap();
    let operations = recording.operations();
    let mut interrupted = 0;
    for done in from..operations.len() {
        let disk = RecordingDisk::new(RecordingDisk::after_power_loss(&operations, done, |_| true));
        interrupted += usize::from(disk.files().len() > 1);
        // Of the same length, so that what is kept of the old file would fit.
        stream(&disk, &path, Durability::Durable, 2);
        let new = disk.files()[&path].clone();
        assert_eq!(new.len(), old.len());
        assert!(!undo_patch_on(&disk, &path).unwrap());
        assert!(disk.files()[&path] == new);
    }
    assert!(interrupted > 2);
}
