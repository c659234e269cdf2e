//! What a mapped tensor promises, in a program with the mapped allocator.
//!
//! Vectors that grow, shrink or change their element type are tested where vectors can be had: candle hands a
//! tensor's own out to nobody, see `mapped::tests` in uel-candle.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Tensor};
use uel::{CopyReason, Kind, LoadOptions, MappedAllocator, MmapFallback, Mode};

use crate::checkpoint::{CPU, MODES, cool, mapping, same, save};

/// Tensors that share pages with their neighbours, and one of many pages.
fn neighbours(path: &Path, add: f64) -> HashMap<String, Tensor> {
    let arange = |n: u32| (Tensor::arange(0f32, n as f32, &CPU).unwrap() + add).unwrap();
    let tensors = [
        ("a", arange(100)),
        ("b", arange(64 << 10).reshape((64, 1024)).unwrap()),
        ("c", arange(300).to_dtype(DType::F16).unwrap()),
        ("d", arange(7).to_dtype(DType::I64).unwrap()),
    ];
    save(path, &tensors);
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

fn is_mapped(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(path.to_str().unwrap())
}

#[track_caller]
fn assert_equal(left: &HashMap<String, Tensor>, right: &HashMap<String, Tensor>) {
    assert_eq!(left.len(), right.len());
    for (name, tensor) in left {
        assert!(same(tensor, &right[name]), "{name}");
    }
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    (folder, path)
}

#[test]
fn changes_in_place_reach_neither_the_file_nor_a_neighbour() {
    let (_folder, path) = folder();
    let expected = neighbours(&path, 0.);
    let before = std::fs::read(&path).unwrap();
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let mut tensors = checkpoint.load_all(&CPU).unwrap();
    let again = checkpoint.load_all(&CPU).unwrap();
    let one = checkpoint.tensor("b", &CPU).unwrap();
    assert_eq!(checkpoint.report().bytes_copied, 0, "{}", checkpoint.report());

    let changed = tensors.remove("b").unwrap();
    changed.slice_set(&Tensor::full(-1f32, (64, 3), &CPU).unwrap(), 1, 5).unwrap();
    changed.get(9).unwrap().zero_set().unwrap();
    let ids = Tensor::zeros((1, 1024), DType::U32, &CPU).unwrap();
    changed.scatter_set(&ids, &Tensor::full(-2f32, (1, 1024), &CPU).unwrap(), 0).unwrap();
    assert_eq!(changed.get(1).unwrap().get(6).unwrap().to_scalar::<f32>().unwrap(), -1.);
    assert_eq!(changed.get(9).unwrap().to_vec1::<f32>().unwrap(), [0.; 1024]);
    assert_eq!(changed.get(0).unwrap().to_vec1::<f32>().unwrap(), [-2.; 1024]);

    assert_equal(&again, &expected);
    assert!(same(&one, &expected["b"]), "each request has its own copy on write");
    assert_equal(
        &tensors,
        &expected.iter().filter(|(name, _)| *name != "b").map(|(k, v)| (k.clone(), v.clone())).collect(),
    );
    assert_equal(&checkpoint.load_all(&CPU).unwrap(), &expected);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(same(&uel::Checkpoint::open(&path).unwrap().tensor("b", &CPU).unwrap(), &expected["b"]));
    drop((checkpoint, tensors, again, one, changed));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(!is_mapped(&path));
}

#[test]
fn tensors_outlive_the_loader_and_are_dropped_anywhere() {
    let (folder, path) = folder();
    let expected = neighbours(&path, 0.);
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let tensors = checkpoint.load_all(&CPU).unwrap();
        let one = checkpoint.tensor("b", &CPU).unwrap();
        assert_eq!(is_mapped(&path), mode == Mode::Mmap || checkpoint.report().bytes_mapped > 0, "{mode}");
        let view = one.narrow(0, 60, 4).unwrap();
        drop((checkpoint, one));
        assert_equal(&tensors, &expected);
        let threads: Vec<_> = tensors.into_values().map(|tensor| std::thread::spawn(move || drop(tensor))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(view.get(3).unwrap().get(1023).unwrap().to_scalar::<f32>().unwrap(), 65535.);
        std::thread::spawn(move || drop(view)).join().unwrap();
        assert!(!is_mapped(&path), "{mode}");
    }
    folder.close().unwrap();
}

#[test]
fn tensors_of_a_replaced_file_keep_the_old_bytes() {
    let (folder, path) = folder();
    let expected = neighbours(&path, 0.);
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let loaded = checkpoint.load_all(&CPU).unwrap();
    let next = folder.path().join("next");
    let replaced = neighbours(&next, 7.);
    std::fs::rename(&next, &path).unwrap();
    // Those that were handed out, those that are asked for now, and those that are read into memory.
    assert_equal(&loaded, &expected);
    assert_equal(&checkpoint.load_all(&CPU).unwrap(), &expected);
    assert!(same(&checkpoint.tensor("c", &CPU).unwrap(), &expected["c"]));
    let read = checkpoint.load(&LoadOptions::new(&CPU).with_mode(Mode::Preload)).unwrap();
    assert_equal(&read.tensors, &expected);
    let new = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    assert_equal(&new.load_all(&CPU).unwrap(), &replaced);
    assert_equal(&loaded, &expected);
    // Deleted altogether, both stay.
    std::fs::remove_file(&path).unwrap();
    assert_equal(&new.load_all(&CPU).unwrap(), &replaced);
    assert_equal(&loaded, &expected);
}

#[test]
fn a_file_that_is_not_cached_is_read_through_the_page_cache_and_mapped() {
    let (_folder, path) = folder();
    let tensor = Tensor::arange(0u32, 6 << 20, &CPU).unwrap();
    save(&path, &[("w", tensor.clone())]);
    cool(&path);
    let checkpoint = mapping().with_mode(Mode::Auto).open(&path).unwrap();
    let loaded = checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    assert!(same(&loaded.tensors["w"], &tensor));
    let report = loaded.report;
    if report.chosen != Mode::Mmap || !report.reason.contains("%") {
        // Folders in memory, kernels that do not say what they cache.
        return eprintln!("not a file that can be dropped from the page cache: {}", report.reason);
    }
    assert_eq!((report.bytes_mapped, report.bytes_read, report.bytes_copied), (24 << 20, 24 << 20, 0));
    // Once it is cached nothing is read.
    let again = checkpoint.load(&LoadOptions::new(&CPU)).unwrap().report;
    assert_eq!((again.bytes_mapped, again.bytes_read), (24 << 20, 0));

    drop((checkpoint, loaded.tensors));
    cool(&path);
    let checkpoint = mapping().with_mode(Mode::Auto).open(&path).unwrap();
    for read in [24 << 20, 24 << 20] {
        // The second time the page cache has it: what was read stays what it was.
        assert!(same(&checkpoint.tensor("w", &CPU).unwrap(), &tensor));
        assert_eq!(checkpoint.report().bytes_read, read);
    }
}

#[test]
fn many_tensors_asked_for_again_leave_the_process_room_for_mappings() {
    const TENSORS: usize = 40_000;
    let (_folder, path) = folder();
    let value = Tensor::new(&[7f32], &CPU).unwrap();
    let tensors = (0..TENSORS).map(|n| (format!("t{n}"), &value));
    safetensors::serialize_to_file(tensors.collect::<Vec<_>>(), None, &path).unwrap();
    let checkpoint = mapping().with_mode(Mode::Mmap).open(&path).unwrap();
    let all = [checkpoint.load_all(&CPU).unwrap(), checkpoint.load_all(&CPU).unwrap()];
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(maps < 30_000, "{maps} mappings; Linux allows 65,530");
    assert!(all.iter().flat_map(HashMap::values).all(|tensor| tensor.to_vec1::<f32>().unwrap() == [7.]));
    std::thread::spawn(move || drop(all)).join().unwrap();
    assert!(checkpoint.report().copied[&CopyReason::Unmappable] > 0, "{}", checkpoint.report());
}

#[test]
fn a_file_cut_short_before_the_load_is_an_error() {
    for mode in MODES {
        let (_folder, path) = folder();
        let expected = neighbours(&path, 0.);
        let last = |checkpoint: &uel::Checkpoint| checkpoint.infos().last().unwrap().name().to_owned();
        // Within the last page that is left, where a mapping shows zeros, and pages before, where it faults.
        for missing in [1, 5000, 200_000] {
            neighbours(&path, 0.);
            let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            let len = file.metadata().unwrap().len();
            file.set_len(len - missing).unwrap();
            let name = last(&checkpoint);
            let errors = [
                checkpoint.load_all(&CPU).unwrap_err(),
                checkpoint.tensor(&name, &CPU).unwrap_err(),
                checkpoint.view(&name).unwrap_err(),
            ];
            for error in errors {
                assert!(matches!(error.kind(), Kind::UnexpectedEof | Kind::Changed), "{mode}: {error:?}");
                assert_eq!(error.path(), Some(&*path), "{mode}: {error}");
                assert!(error.tensor().is_some(), "{mode}: {error}");
            }
            // What is still there can be had.
            if mode != Mode::Preload {
                let first = checkpoint.infos().next().unwrap().name().to_owned();
                let tensor = checkpoint.tensor(&first, &CPU);
                assert!(same(&tensor.unwrap(), &expected[&first]), "{mode}");
            }
            assert_eq!(mapping().with_mode(mode).open(&path).unwrap_err().kind(), Kind::Truncated, "{mode}");
        }
    }
}

#[test]
fn measured_two_million_ordinary_allocations_beside_mapped_loads() {
    const THREADS: u32 = 4;
    const EACH: u32 = 500_000;
    let (_folder, path) = folder();
    let expected = neighbours(&path, 0.);
    let began = std::time::Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (path, expected) = (&path, &expected);
            scope.spawn(move || {
                let mut state = thread + 1;
                let mut next = move || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as usize
                };
                let mut kept: Vec<Vec<u32>> = vec![Vec::new(); 256];
                let mut tensors: Vec<(&String, Tensor)> = Vec::new();
                let mut checkpoint = None;
                for round in 0..EACH {
                    // Mostly small, some of pages, a few of their own mapping.
                    let len = match next() % 1000 {
                        0 => next() % (100 << 10),
                        1..20 => next() % 4096,
                        _ => next() % 64,
                    };
                    let mut vec: Vec<u32> = Vec::with_capacity(len + 1);
                    vec.push(round);
                    vec.resize(len + 1, 0);
                    vec[len] = round;
                    if next() % 8 == 0 {
                        vec.reserve_exact(len + 10); // moves, or grows where it is
                    }
                    let slot = next() % kept.len();
                    let old = std::mem::replace(&mut kept[slot], vec);
                    assert_eq!(old.first(), old.last(), "a block was overwritten");
                    if round % 2000 == 0 {
                        let open = || mapping().with_mode(Mode::Mmap).open(path).unwrap();
                        let checkpoint = checkpoint.get_or_insert_with(open);
                        let name = expected.keys().nth(next() % expected.len()).unwrap();
                        tensors.push((name, checkpoint.tensor(name, &CPU).unwrap()));
                    }
                    if round % 7000 == 0 {
                        checkpoint = None;
                        let at = next() % tensors.len();
                        let (name, tensor) = tensors.swap_remove(at);
                        assert!(same(&tensor, &expected[name]), "{name}");
                    }
                }
                assert!(tensors.iter().all(|(name, tensor)| same(tensor, &expected[*name])));
            });
        }
    });
    assert!(!is_mapped(&path));
    let took = began.elapsed();
    assert!(took < std::time::Duration::from_secs(20), "{took:?}");
}

/// Set for a process of this binary that has little address space.
const CRAMPED: &str = "UEL_TEST_CRAMPED";

#[test]
fn without_room_for_the_reservation_tensors_are_copied() {
    if std::env::var_os(CRAMPED).is_none() {
        // The allocator reserves 8 GiB at the least.
        let name = concat!(module_path!(), "::without_room_for_the_reservation_tensors_are_copied");
        let name = name.split_once("::").unwrap().1;
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -v 4194304 && exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
        let output = command.args(["--exact", name, "--nocapture"]).env(CRAMPED, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    assert!(!MappedAllocator::is_installed(), "nothing can be placed");
    let (_folder, path) = folder();
    let expected = neighbours(&path, 0.);
    let fallbacks =
        [(MmapFallback::Copy, CopyReason::NoAllocator), (MmapFallback::ProcessLifetime, CopyReason::Unmappable)];
    for (fallback, reason) in fallbacks {
        for mode in MODES {
            let checkpoint = mapping().with_mmap_fallback(fallback).with_mode(mode).open(&path).unwrap();
            assert_equal(&checkpoint.load_all(&CPU).unwrap(), &expected);
            assert!(same(&checkpoint.tensor("b", &CPU).unwrap(), &expected["b"]));
            let report = checkpoint.report();
            assert_eq!(report.bytes_mapped, 0, "{report}");
            if mode == Mode::Mmap {
                assert_eq!(report.copied.keys().collect::<Vec<_>>(), [&reason], "{report}");
            }
        }
    }
    assert_eq!(MappedAllocator::stats().regions, 0);
}

#[test]
fn cold_tensors_taken_in_their_order_are_read_ahead() {
    let (_folder, path) = folder();
    let names: Vec<String> = (0..12).map(|n| format!("w{n:02}")).collect();
    let tensors: Vec<(&str, Tensor)> = (0..)
        .zip(&names)
        .map(|(n, name)| (name.as_str(), Tensor::arange(n, n + (2u32 << 20), &CPU).unwrap()))
        .collect();
    for forwards in [true, false] {
        // A file of its own: what still reads ahead in another one holds its pages.
        let path = path.with_extension(forwards.to_string());
        save(&path, &tensors);
        cool(&path);
        let checkpoint = mapping().with_mode(Mode::Auto).open(&path).unwrap();
        let mut order: Vec<_> = tensors.iter().collect();
        if !forwards {
            order.reverse();
        }
        for (name, tensor) in order {
            assert!(same(&checkpoint.tensor(name, &CPU).unwrap(), tensor));
        }
        let report = checkpoint.report();
        if report.chosen != Mode::Mmap || !report.reason.contains("%") {
            return eprintln!("not a file that can be dropped from the page cache: {}", report.reason);
        }
        // None was copied, and each was read once, but for what the system had read ahead by itself.
        assert_eq!((report.bytes_mapped, report.bytes_copied), (96 << 20, 0));
        assert!((64 << 20..=96 << 20).contains(&report.bytes_read), "{report}");
    }
}
