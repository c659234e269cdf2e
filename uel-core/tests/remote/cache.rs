//! The cache on a local disk.

use super::server::{Fault, Object, Server};
use super::{open, options, pattern, range};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use uel_core::source::ByteSourceExt;
use uel_core::source::remote::{CacheOptions, RemoteOptions};

const BYTES: usize = 3_000_000;
const BLOCK: u64 = 512 << 10;

fn cached(folder: &Path) -> RemoteOptions {
    options().with_cache(CacheOptions::new(folder))
}

/// All files below `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn bytes_in(folder: &Path) -> u64 {
    files(folder).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

/// Reads all of `/object` and says how many requests and bytes it took.
#[track_caller]
fn read_all(server: &Server, target: &str, options: RemoteOptions, wanted: &[u8]) -> (usize, u64) {
    server.take_seen();
    let source = open(server, target, options).unwrap();
    assert_eq!(source.read_range(range(0, wanted.len() as u64)).unwrap(), wanted);
    for at in (0..wanted.len() as u64 - 20).step_by(70_001) {
        assert_eq!(source.read_array::<20>(at).unwrap(), wanted[at as usize..][..20]);
    }
    let seen = server.take_seen();
    (seen.len(), seen.iter().map(|seen| seen.body_bytes).sum())
}

#[test]
fn many_ranges_are_asked_for_at_once_and_each_block_once() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(16 << 20));
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", cached(folder.path()).with_head_bytes(100)).unwrap();
    server.take_seen();
    // Two in one block, one over a border, one that is empty, and blocks far from each other.
    let mut ranges = vec![range(BLOCK + 5, BLOCK + 9), range(BLOCK + 400_000, BLOCK + 400_001)];
    ranges.extend([range(3 * BLOCK - 2, 3 * BLOCK + 2), range(14 << 20, 14 << 20), range((16 << 20) - 1, 16 << 20)]);
    ranges.extend((4..14u64).map(|n| range(n << 20, (n << 20) + 5)));
    for wanted in [12, 0] {
        server.fail(vec![Fault::Slow(Duration::from_millis(30)); 20]);
        let read = source.read_ranges(&ranges).unwrap();
        for (range, read) in ranges.iter().zip(read) {
            assert_eq!(read, bytes[range.start() as usize..range.end() as usize], "{range}");
        }
        let seen = server.take_seen();
        assert_eq!(seen.len(), wanted, "{seen:?}");
    }
    assert!(server.most_running() > 4, "{}", server.most_running());
}

#[test]
fn what_was_read_is_not_asked_for_again() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(BYTES));
    server.put("/object", bytes.clone());
    let (_, first) = read_all(&server, "/object", cached(folder.path()), &bytes);
    assert_eq!(first, BYTES as u64);
    assert_eq!(files(folder.path()).len(), 6);
    assert!(files(folder.path()).iter().all(|path| path.extension().unwrap() == "block"));
    // Another process finds the same: only the version is asked for, with the first block.
    assert_eq!(read_all(&server, "/object", cached(folder.path()), &bytes), (1, BLOCK));
    let small = cached(folder.path()).with_head_bytes(10).with_request_bytes(5000);
    assert_eq!(read_all(&server, "/object", small, &bytes), (1, 10));
}

#[test]
fn another_version_or_url_is_another_object() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(BYTES));
    server.put("/object", bytes.clone());
    read_all(&server, "/object?part=1", cached(folder.path()), &bytes);
    // A signature says nothing of the object, everything else may.
    assert_eq!(read_all(&server, "/object?X-Amz-Signature=a&part=1&sig=b", cached(folder.path()), &bytes).0, 1);
    assert!(read_all(&server, "/object?part=2", cached(folder.path()), &bytes).1 > BYTES as u64 - 1);
    assert!(read_all(&server, "/object", cached(folder.path()), &bytes).1 > BYTES as u64 - 1);
    let mut other = bytes.clone();
    other.reverse();
    server.put("/object", other.clone());
    assert!(read_all(&server, "/object?part=1", cached(folder.path()), &other).1 > BYTES as u64 - 1);
    // Nothing in the folder tells a query.
    for path in files(folder.path()) {
        let content = fs::read(path).unwrap();
        assert!(!content.windows(6).any(|some| some == b"part=1" || some == b"X-Amz-"));
    }
}

#[test]
fn only_strong_etags_are_kept() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(BYTES));
    for (etag, modified) in [(Some("W/\"1\""), None), (None, Some("Sat, 21 Nov 2026 10:00:00 GMT"))] {
        let object = Object {
            bytes: bytes.clone().into(),
            byte_len: BYTES as u64,
            etag: etag.map(str::to_owned),
            modified: modified.map(str::to_owned),
            redirect: None,
            file: None,
        };
        server.put_object("/object", object);
        read_all(&server, "/object", cached(folder.path()), &bytes);
        assert!(files(folder.path()).is_empty());
    }
}

#[test]
fn a_damaged_file_is_found_and_fetched_anew() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(BYTES));
    server.put("/object", bytes.clone());
    read_all(&server, "/object", cached(folder.path()), &bytes);
    let blocks = files(folder.path());
    let damages: [fn(&mut Vec<u8>); 8] = [
        |content| *content.last_mut().unwrap() ^= 1,
        |content| content[0] ^= 1,
        |content| content[9] ^= 1,
        |content| content[17] ^= 1,
        |content| content[30] ^= 1,
        |content| content.truncate(content.len() - 1),
        |content| content.push(0),
        |content| content.clear(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        for path in &blocks {
            let mut content = fs::read(path).unwrap();
            damage(&mut content);
            fs::write(path, content).unwrap();
        }
        let (_, fetched) = read_all(&server, "/object", cached(folder.path()), &bytes);
        assert_eq!(fetched, BYTES as u64, "damage {number}");
        assert_eq!(read_all(&server, "/object", cached(folder.path()), &bytes), (1, BLOCK), "damage {number}");
    }
    // One block in the place of another is not taken for it.
    fs::copy(&blocks[0], &blocks[1]).unwrap();
    assert!(read_all(&server, "/object", cached(folder.path()), &bytes).0 <= 2);
    assert_eq!(read_all(&server, "/object", cached(folder.path()), &bytes), (1, BLOCK));
}

#[test]
fn the_oldest_go_where_there_is_too_much() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let most = 4 * BLOCK + 10_000;
    let options = || options().with_cache(CacheOptions::new(folder.path()).with_max_bytes(most));
    fs::write(folder.path().join("README"), "not ours").unwrap();
    fs::create_dir(folder.path().join("other")).unwrap();
    fs::write(folder.path().join("other/model.block"), vec![0; 1 << 20]).unwrap();
    let others = bytes_in(folder.path());
    for object in 0..5 {
        let bytes = pattern(BYTES + object);
        server.put("/object", bytes.clone());
        read_all(&server, "/object", options(), &bytes);
        assert!(bytes_in(folder.path()) - others <= most, "{}", bytes_in(folder.path()));
    }
    assert!(files(folder.path()).len() > 3);
    // The oldest by time go first.
    let blocks: Vec<_> =
        files(folder.path()).into_iter().filter(|path| !path.starts_with(folder.path().join("other"))).collect();
    let blocks: Vec<_> = blocks.into_iter().filter(|path| path.extension().is_some()).collect();
    for (age, path) in blocks.iter().enumerate() {
        let time = SystemTime::now() - Duration::from_secs(1000 * (age as u64 + 1));
        fs::File::options().append(true).open(path).unwrap().set_modified(time).unwrap();
    }
    server.put("/one", pattern(1_500_000));
    read_all(&server, "/one", options(), &pattern(1_500_000));
    assert!(!blocks.last().unwrap().exists() && bytes_in(folder.path()) - others <= most);
    // What a process left half-written goes some time later.
    let left = blocks[0].with_extension("part");
    fs::write(&left, "half").unwrap();
    let time = SystemTime::now() - Duration::from_secs(100_000);
    fs::File::options().append(true).open(&left).unwrap().set_modified(time).unwrap();
    server.put("/two", pattern(2_500_000));
    read_all(&server, "/two", options(), &pattern(2_500_000));
    assert!(!left.exists());
    assert!(folder.path().join("README").exists() && folder.path().join("other/model.block").exists());
}

#[test]
fn many_may_share_a_folder() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let bytes: Arc<[u8]> = pattern(BYTES).into();
    server.put("/object", &*bytes);
    // Too small for all of it, so that some remove what others are about to read.
    let most = 3 * BLOCK;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (server, bytes, folder) = (&server, &bytes, folder.path());
            scope.spawn(move || {
                for _ in 0..5 {
                    let cache = CacheOptions::new(folder).with_max_bytes(most);
                    let source = open(server, "/object", options().with_cache(cache)).unwrap();
                    assert_eq!(source.read_range(range(0, BYTES as u64)).unwrap(), **bytes);
                }
            });
        }
    });
    assert!(files(folder.path()).iter().all(|path| path.extension().unwrap() == "block"));
}

#[test]
fn a_folder_that_cannot_be_written_is_no_fault() {
    let (server, folder, bytes) = (Server::start(), tempfile::tempdir().unwrap(), pattern(BYTES));
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    server.put("/object", bytes.clone());
    read_all(&server, "/object", cached(&file), &bytes);
    read_all(&server, "/object", cached(&file.join("below")), &bytes);
    assert_eq!(fs::read(&file).unwrap(), b"");
}
