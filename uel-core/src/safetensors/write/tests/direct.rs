//! Files that are written past the page cache hold what others do.

use super::*;
use crate::disk::LocalDisk;
use crate::limits::DIRECT_SAVE_BYTES;
use crate::{Direct, Durability};

/// Larger than what is written directly by itself, in tensors that end anywhere.
fn large() -> Vec<Given> {
    let sizes = [9_000_001, 3, 4096, 700_000, 0, 65_536, 12_345_678, 1, 8_388_608, 5_000_000];
    let given = |(n, size): (usize, &usize)| Given::new(&format!("t{n}"), Dtype::U8, &[*size], n as u8);
    sizes.iter().enumerate().map(given).collect()
}

/// Whether a byte of a file is in the page cache.
#[cfg(target_os = "linux")]
fn is_cached(path: &Path, offset: u64) -> bool {
    use rustix::io::{Errno, ReadWriteFlags, preadv2};
    let file = std::fs::File::open(path).unwrap();
    let mut byte = [0];
    let read = preadv2(&file, &mut [std::io::IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT);
    !matches!(read, Err(Errno::AGAIN))
}

#[test]
fn large_files_from_several_threads_are_those_of_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    let given = large();
    for (hashes, durability, direct) in [
        (false, Durability::Atomic, Direct::Auto),
        (true, Durability::Durable, Direct::Auto),
        (true, Durability::Fast, Direct::Always),
    ] {
        let save = |path: &Path, direct| {
            let options = SaveOptions::new().with_durability(durability).with_hashes(hashes).with_direct(direct);
            let writer = StreamingWriter::create(path, given.iter().map(|given| given.meta.clone()), &options).unwrap();
            let was_direct = writer.is_direct();
            std::thread::scope(|scope| {
                for part in 0..3 {
                    let (writer, given) = (&writer, &given);
                    scope.spawn(move || {
                        for given in given.iter().skip(part).step_by(3) {
                            let (name, dtype, shape, bytes) = given.parts();
                            writer.write(name, dtype, shape, bytes).unwrap();
                        }
                    });
                }
            });
            writer.finish().unwrap();
            was_direct
        };
        let (plain, past) = (folder.path().join("plain.safetensors"), folder.path().join("past.safetensors"));
        assert!(!save(&plain, Direct::Never));
        let was_direct = save(&past, direct);
        #[cfg(target_os = "linux")]
        if was_direct {
            assert!(!is_cached(&past, 20 << 20), "what was written directly is not in the page cache");
        }
        let _ = was_direct;
        assert!(std::fs::read(&past).unwrap() == std::fs::read(&plain).unwrap());
        check(&past, &given, &SafetensorsFiles::open(&past, Rules::Strict).unwrap().file_metadata(0).cloned());
    }
}

#[test]
fn only_large_files_that_are_synced_are_written_directly_by_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let is_direct = |bytes: u64, options: SaveOptions| {
        let metas = [TensorMeta::new("a", Dtype::U8, [bytes as usize])];
        StreamingWriter::create(folder.path().join("m.safetensors"), metas, &options).unwrap().is_direct()
    };
    // Whether this file system has direct writes at all.
    let possible = is_direct(1, SaveOptions::new().with_direct(Direct::Always));
    assert_eq!(is_direct(DIRECT_SAVE_BYTES, SaveOptions::new()), possible);
    assert!(!is_direct(DIRECT_SAVE_BYTES - 4096, SaveOptions::new()));
    assert!(!is_direct(DIRECT_SAVE_BYTES, SaveOptions::new().with_durability(Durability::Fast)));
    assert!(!is_direct(DIRECT_SAVE_BYTES, SaveOptions::new().with_direct(Direct::Never)));
}

/// A file that becomes large while it is written, and then has its data moved, up or not at all.
#[test]
fn a_file_may_grow_into_direct_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = large();
    for (header_bytes, hashes) in [(0, false), (0, true), (100_000, true)] {
        for direct in [Direct::Auto, Direct::Always, Direct::Never] {
            let save = SaveOptions::new().with_hashes(hashes).with_direct(direct);
            let options = IncrementalOptions::new().with_save(save).with_max_header_bytes(header_bytes);
            let report = incremental(&path, &given, &options).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), report.files[0].bytes);
            check(&path, &given, &SafetensorsFiles::open(&path, Rules::Strict).unwrap().file_metadata(0).cloned());
        }
    }
}

/// Small files are read back and moved down when they are finished.
#[test]
fn small_files_may_be_written_directly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = some_tensors(5);
    for durability in [Durability::Fast, Durability::Atomic, Durability::Durable] {
        let save = SaveOptions::new().with_durability(durability).with_direct(Direct::Always).with_disk(LocalDisk);
        stream(&path, &given, &save).unwrap();
        check(&path, &given, &None);
        incremental(&path, &given, &IncrementalOptions::new().with_save(save)).unwrap();
        check(&path, &given, &None);
    }
}
