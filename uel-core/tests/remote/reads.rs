//! What is read, and by how many requests.

use super::server::{Fault, Server};
use super::{open, options, pattern, random, range};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use uel_core::Kind;
use uel_core::source::remote::object_store::memory::InMemory;
use uel_core::source::remote::object_store::{ObjectStoreExt, path::Path as ObjectPath};
use uel_core::source::remote::{CacheOptions, Remote, RemoteOptions};
use uel_core::source::{ByteSource, ByteSourceExt, conformance};

/// The contract of sources, with everything by requests: the first bytes, which the opening brings, are few.
fn conforms(options: RemoteOptions) {
    let server = Server::start();
    let count = AtomicUsize::new(0);
    conformance::check(|bytes| {
        let path = format!("/{}", count.fetch_add(1, Ordering::Relaxed));
        server.put(&path, bytes);
        Box::new(open(&server, &path, options.clone().with_head_bytes(1000)).unwrap())
    })
    .unwrap();
    assert!(server.take_seen().iter().all(|seen| seen.method == "HEAD" || seen.range.is_some()));
}

#[test]
fn objects_on_servers_conform() {
    conforms(options());
}

#[test]
fn with_the_smallest_requests_they_conform() {
    conforms(options().with_request_bytes(1).with_concurrency(3).with_budget(1));
}

#[test]
fn with_a_cache_they_conform() {
    let folder = tempfile::tempdir().unwrap();
    conforms(options().with_cache(CacheOptions::new(folder.path())));
}

#[test]
fn objects_in_memory_conform() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    conformance::check(|bytes| {
        let store = Arc::new(InMemory::new());
        runtime.block_on(store.put(&ObjectPath::from("a/b"), bytes.to_vec().into())).unwrap();
        let remote = Remote::new(options().with_head_bytes(100));
        Box::new(remote.open_object(store, "a/b", "memory:///a/b").unwrap())
    })
    .unwrap();
}

#[test]
fn opening_is_one_request_and_names_the_version() {
    let server = Server::start();
    let bytes = pattern(3 << 20);
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", options()).unwrap();
    assert_eq!(source.byte_len(), 3 << 20);
    assert_eq!(source.path().to_str().unwrap(), server.url("/object"));
    assert_eq!(source.read_range(range(0, 512 << 10)).unwrap(), bytes[..512 << 10]);
    let seen = server.take_seen();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0].method.as_str(), seen[0].range.as_deref()), ("GET", Some("bytes=0-524287")));

    let again = open(&server, "/object", options()).unwrap();
    assert!(source.version().tag.is_some() && source.version() == again.version());
    server.put("/object", pattern(2 << 20));
    assert_ne!(open(&server, "/object", options()).unwrap().version(), source.version());
}

#[test]
fn every_request_after_the_first_names_the_etag() {
    let server = Server::start();
    let bytes = pattern(9 << 20);
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", options()).unwrap();
    assert_eq!(source.read_range(range(0, 9 << 20)).unwrap(), bytes);
    let seen = server.take_seen();
    assert!(seen[1..].iter().all(|seen| seen.if_match.is_some()), "{seen:?}");
    // Every byte once: the first ones are kept.
    assert_eq!(seen.iter().map(|seen| seen.body_bytes).sum::<u64>(), 9 << 20);
    assert!(seen.len() <= 5, "{}", seen.len());
}

#[test]
fn small_reads_share_a_request() {
    let server = Server::start();
    let bytes = pattern(4 << 20);
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", options()).unwrap();
    for at in (0..100u64).map(|n| (1 << 20) + n * 1000) {
        assert_eq!(source.read_array::<16>(at).unwrap(), bytes[at as usize..][..16]);
    }
    // As archives are opened: from their end, backwards.
    for at in (1..100u64).map(|n| (4 << 20) - n * 2000) {
        assert_eq!(source.read_array::<16>(at).unwrap(), bytes[at as usize..][..16]);
    }
    let seen = server.take_seen();
    assert_eq!(seen.len(), 3, "{seen:?}");
}

#[test]
fn long_reads_are_many_requests_at_once_within_their_number() {
    let server = Server::start();
    let bytes = pattern(5 << 20);
    server.put("/object", bytes.clone());
    let options = options().with_request_bytes(128 << 10).with_concurrency(3).with_head_bytes(100);
    let source = open(&server, "/object", options).unwrap();
    server.fail(vec![Fault::Slow(Duration::from_millis(20)); 40]);
    std::thread::scope(|scope| {
        for n in 0..4u64 {
            let (source, bytes) = (&source, &bytes);
            scope.spawn(move || {
                let (start, end) = ((n << 20) + 1000, (n + 1) << 20);
                assert_eq!(source.read_range(range(start, end)).unwrap(), bytes[start as usize..end as usize]);
            });
        }
    });
    assert_eq!(server.most_running(), 3);
}

#[test]
fn the_budget_bounds_what_is_in_flight() {
    let server = Server::start();
    let bytes = pattern(3 << 20);
    server.put("/object", bytes.clone());
    let few = options().with_request_bytes(64 << 10).with_head_bytes(100).with_budget(128 << 10);
    let source = open(&server, "/object", few).unwrap();
    server.fail(vec![Fault::Slow(Duration::from_millis(10)); 40]);
    assert_eq!(source.read_range(range(0, 3 << 20)).unwrap(), bytes);
    assert_eq!(server.most_running(), 2);
}

#[test]
fn many_ranges_share_requests_and_run_at_once() {
    let server = Server::start();
    let bytes = pattern(16 << 20);
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", options().with_head_bytes(100)).unwrap();
    server.take_seen();
    let mut ranges: Vec<_> = (0..1000u64).map(|n| range((1 << 20) + n * 300, (1 << 20) + n * 300 + 100)).collect();
    ranges.extend((0..8u64).map(|n| range((4 << 20) + n * (1 << 20), (4 << 20) + n * (1 << 20) + 5)));
    ranges.extend([range(5, 5), range((16 << 20) - 1, 16 << 20), range(3 << 20, (3 << 20) + 9)]);
    server.fail(vec![Fault::Slow(Duration::from_millis(30)); 20]);
    let read = source.read_ranges(&ranges).unwrap();
    for (range, read) in ranges.iter().zip(read) {
        assert_eq!(read, bytes[range.start() as usize..range.end() as usize], "{range}");
    }
    let seen = server.take_seen();
    assert_eq!(seen.len(), 11, "{seen:?}");
    assert!(server.most_running() > 4, "{}", server.most_running());
    assert!(seen.iter().map(|seen| seen.body_bytes).sum::<u64>() < 400_000);
    let beyond = source.read_ranges(&[range(0, 1), range(1, (16 << 20) + 1)]).unwrap_err();
    assert_eq!(beyond.kind(), Kind::UnexpectedEof);
}

#[test]
fn an_empty_object_is_one() {
    let server = Server::start();
    server.put("/empty", []);
    let source = open(&server, "/empty", options()).unwrap();
    assert_eq!(source.byte_len(), 0);
    assert!(source.read_range(range(0, 0)).unwrap().is_empty());
    server.fail([Fault::IgnoresRange]);
    assert_eq!(open(&server, "/empty", options()).unwrap().byte_len(), 0);
}

#[test]
fn random_reads_from_many_threads_are_right() {
    let server = Server::start();
    let bytes = pattern(6 << 20);
    server.put("/object", bytes.clone());
    let source = open(&server, "/object", options().with_request_bytes(300_000).with_budget(1 << 20)).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..=6u64 {
            let (source, bytes) = (&source, &bytes);
            scope.spawn(move || {
                let mut state = thread;
                for _ in 0..30 {
                    let start = random(&mut state) % (6 << 20);
                    let len = random(&mut state) % ((6 << 20) - start).min(1 << (random(&mut state) % 21 + 1));
                    let read = source.read_range(range(start, start + len)).unwrap();
                    assert_eq!(read, bytes[start as usize..(start + len) as usize]);
                }
            });
        }
    });
}

/// Reads block the thread. Within an executor that is no good manners, and must not panic.
fn reads_within_an_executor(server: &Server) {
    let source = open(server, "/object", options()).unwrap();
    assert_eq!(source.read_range(range(0, 2 << 20)).unwrap().len(), 2 << 20);
    assert_eq!(source.read_array::<2>((2 << 20) - 2).unwrap().len(), 2);
    assert_eq!(open(server, "/none", options()).unwrap_err().kind(), Kind::Io);
}

#[test]
fn reads_work_within_executors() {
    let server = Server::start();
    server.put("/object", pattern(2 << 20));
    // What `#[tokio::main]` makes, of both kinds.
    let many = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    many.block_on(async {
        reads_within_an_executor(&server);
        tokio::task::yield_now().await;
    });
    let one = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    one.block_on(async { reads_within_an_executor(&server) });
    // And one that is dropped within the other.
    many.block_on(async {
        let remote = Remote::new(options());
        drop(remote.open(&server.url("/object")).unwrap());
        drop(remote);
    });
}

#[tokio::test]
async fn reads_work_in_asynchronous_tests() {
    let server = Server::start();
    server.put("/object", pattern(2 << 20));
    reads_within_an_executor(&server);
}
