//! What servers do wrong: the right bytes come, or an error that says what happened.

use super::server::{Fault, Object, Server};
use super::{open, options, pattern, range};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uel_core::source::remote::{Remote, RemoteSource};
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Error, Kind};

const MIB: u64 = 1 << 20;

fn opened(server: &Server) -> (RemoteSource, Vec<u8>) {
    let bytes = pattern(3 << 20);
    server.put("/object", bytes.clone());
    (open(server, "/object", options()).unwrap(), bytes)
}

/// What a read of a megabyte gives after `faults`, and how many requests it took.
fn read_after(faults: &[Fault]) -> (Result<(), Error>, usize) {
    let server = Server::start();
    let (source, bytes) = opened(&server);
    server.take_seen();
    server.fail(faults.iter().cloned());
    let read = source.read_range(range(MIB, 2 * MIB));
    let requests = server.take_seen().len();
    (read.map(|read| assert_eq!(read, bytes[MIB as usize..2 * MIB as usize])), requests)
}

#[test]
fn what_passes_is_tried_again() {
    for (faults, requests) in [
        (vec![Fault::Status(500)], 2),
        (vec![Fault::Status(500), Fault::Status(502), Fault::Status(503)], 4),
        (vec![Fault::Throttled(503), Fault::Throttled(429)], 3),
        (vec![Fault::Reset(0)], 2),
        (vec![Fault::Reset(1)], 2),
        (vec![Fault::Reset(500_000)], 2),
        (vec![Fault::Short(500_000)], 2),
        (vec![Fault::Short(300_000), Fault::Reset(400_000), Fault::Status(503)], 4),
        (vec![Fault::Slow(Duration::from_millis(100))], 1),
    ] {
        let (read, made) = read_after(&faults);
        read.unwrap_or_else(|error| panic!("{faults:?}: {error}"));
        assert_eq!(made, requests, "{faults:?}");
    }
}

#[test]
fn what_stays_is_an_error_that_says_so() {
    for (fault, kind, words) in [
        (Fault::Status(500), Kind::Remote, "status 500"),
        (Fault::Throttled(429), Kind::Remote, "fewer requests"),
        (Fault::Throttled(503), Kind::Remote, "status 503"),
        (Fault::Status(404), Kind::Io, "no such object"),
        (Fault::Status(403), Kind::Io, "denies access"),
        (Fault::Status(401), Kind::Io, "denies access"),
        (Fault::Status(400), Kind::Remote, "status 400"),
        (Fault::Status(412), Kind::Changed, "changed"),
        (Fault::Garbage, Kind::Remote, "broke off"),
        (Fault::Reset(0), Kind::Remote, "broke off"),
        (Fault::Unmarked(500_000), Kind::Remote, "Content-Length"),
        (Fault::Unmarked(0), Kind::Remote, "Content-Length"),
        (Fault::Long(10), Kind::Remote, "Content-Length"),
        (Fault::IgnoresRange, Kind::Remote, "ranges"),
        (Fault::Shifted(100), Kind::Remote, ""),
        (Fault::Shifted(-100), Kind::Remote, ""),
        (Fault::Mislabelled, Kind::Remote, ""),
        (Fault::Etag("\"other\""), Kind::Changed, "changed"),
    ] {
        let (read, _) = read_after(&vec![fault.clone(); 20]);
        let error = read.expect_err(&format!("{fault:?}"));
        assert_eq!(error.kind(), kind, "{fault:?}: {error}");
        assert!(error.to_string().contains(words), "{fault:?}: {error}");
        assert!(error.to_string().contains("/object: "), "{error}");
    }
}

#[test]
fn an_object_that_changes_is_an_error() {
    for honours in [true, false] {
        let server = Server::start();
        let (source, _) = opened(&server);
        if !honours {
            server.ignore_if_match();
        }
        let mut other = pattern(3 << 20);
        other.reverse();
        server.put("/object", other);
        for (start, end) in [(MIB, 2 * MIB), (MIB, MIB + 10), (3 * MIB - 1, 3 * MIB)] {
            assert_eq!(source.read_range(range(start, end)).unwrap_err().kind(), Kind::Changed, "{honours}");
        }
        server.remove("/object");
        assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap_err().kind(), Kind::Io);
    }
}

#[test]
fn an_object_that_changes_in_the_midst_of_an_answer_is_an_error() {
    for honours in [true, false] {
        let server = Server::start();
        let (source, _) = opened(&server);
        if !honours {
            server.ignore_if_match();
        }
        // The rest, which is asked for again, is another version's.
        server.fail([Fault::Reset(100_000), Fault::Etag("\"other\"")]);
        let error = source.read_range(range(MIB, 2 * MIB)).unwrap_err();
        let expected = if honours { Kind::Changed } else { Kind::Remote };
        assert_eq!(error.kind(), expected, "{error}");
    }
}

#[test]
fn without_etags_the_time_of_modification_counts() {
    let server = Server::start();
    let bytes: Arc<[u8]> = pattern(2 << 20).into();
    let object = |modified: Option<&str>| Object {
        bytes: Arc::clone(&bytes),
        byte_len: 2 << 20,
        etag: None,
        modified: modified.map(str::to_owned),
        redirect: None,
        file: None,
    };
    server.put_object("/object", object(Some("Sat, 21 Nov 2026 10:00:00 GMT")));
    let source = open(&server, "/object", options()).unwrap();
    assert!(source.version().modified.is_some());
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap(), bytes[MIB as usize..]);
    assert!(server.take_seen().iter().all(|seen| seen.if_match.is_none()));
    server.put_object("/object", object(Some("Sat, 21 Nov 2026 10:00:01 GMT")));
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap_err().kind(), Kind::Changed);

    server.put_object("/object", object(None));
    let error = open(&server, "/object", options()).unwrap_err();
    assert_eq!(error.kind(), Kind::Remote);
    assert!(error.to_string().contains("neither an ETag nor a time"), "{error}");
}

#[test]
fn weak_etags_are_compared_and_not_sent() {
    let server = Server::start();
    let bytes: Arc<[u8]> = pattern(2 << 20).into();
    let object = |etag: &str| Object {
        bytes: Arc::clone(&bytes),
        byte_len: 2 << 20,
        etag: Some(etag.to_owned()),
        modified: None,
        redirect: None,
        file: None,
    };
    server.put_object("/object", object("W/\"1\""));
    let source = open(&server, "/object", options()).unwrap();
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap(), bytes[MIB as usize..]);
    assert!(server.take_seen().iter().all(|seen| seen.if_match.is_none()));
    server.put_object("/object", object("W/\"2\""));
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap_err().kind(), Kind::Changed);
}

#[test]
fn servers_that_never_answer_are_given_up() {
    let server = Server::start();
    let (source, _) = opened(&server);
    let began = Instant::now();
    server.fail(vec![Fault::Silence; 10]);
    let impatient = Remote::new(options().with_timeout(Duration::from_millis(200)).with_retries(2));
    let error = impatient.open(&server.url("/object")).unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
    let short = Remote::new(options().with_deadline(Duration::from_millis(300)));
    let error = short.open(&server.url("/object")).unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
    assert!(began.elapsed() < Duration::from_secs(8));
    server.forget_faults();
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap().len(), MIB as usize);
}

#[test]
fn nobody_there_is_an_error() {
    let server = Server::start();
    let url = server.url("/object");
    drop(server);
    let error = Remote::new(options()).open(&url).unwrap_err();
    assert_eq!(error.kind(), Kind::Remote);
    assert!(error.to_string().contains("cannot connect"), "{error}");
}

#[test]
fn a_server_without_ranges_is_refused_by_name() {
    let server = Server::start();
    server.put("/object", pattern(100));
    server.fail(vec![Fault::IgnoresRange; 3]);
    let error = open(&server, "/object", options()).unwrap_err();
    assert_eq!(error.kind(), Kind::Remote);
    assert!(error.to_string().contains("does not serve ranges"), "{error}");
}

#[test]
fn redirects_are_followed_to_their_end() {
    let server = Server::start();
    let (_, bytes) = opened(&server);
    let other = Server::start();
    other.redirect("/there", server.url("/object?signature=of-the-target"));
    other.redirect("/here", "/there");
    let source = open(&other, "/here", options()).unwrap();
    assert_eq!(source.read_range(range(MIB, 2 * MIB)).unwrap(), bytes[MIB as usize..2 * MIB as usize]);
    assert_eq!(source.path().to_str().unwrap(), other.url("/here"));
    other.redirect("/round", "/round");
    let error = open(&other, "/round", options()).unwrap_err();
    assert_eq!(error.kind(), Kind::Remote, "{error}");
}

fn fault() -> impl Strategy<Value = Fault> {
    let some = 0usize..400_000;
    prop_oneof![
        4 => Just(Fault::None),
        1 => prop_oneof![Just(500u16), Just(503), Just(429), Just(404), Just(403), Just(412)].prop_map(Fault::Status),
        1 => Just(Fault::Throttled(503)),
        2 => some.clone().prop_map(Fault::Short),
        2 => some.clone().prop_map(Fault::Reset),
        1 => some.prop_map(Fault::Unmarked),
        1 => (1usize..1000).prop_map(Fault::Long),
        1 => Just(Fault::IgnoresRange),
        1 => (-5000i64..5000).prop_map(Fault::Shifted),
        1 => Just(Fault::Mislabelled),
        1 => Just(Fault::Etag("\"other\"")),
        1 => Just(Fault::Garbage),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 50, ..ProptestConfig::default() })]

    /// Whatever a server does, what is read is what it has, or an error.
    #[test]
    fn never_wrong_bytes(
        faults in prop::collection::vec(fault(), 0..12),
        reads in prop::collection::vec((0u64..1_000_000, 0u64..400_000), 1..5),
        cached in any::<bool>(),
    ) {
        let server = Server::start();
        let bytes = pattern(1_000_000);
        server.put("/object", bytes.clone());
        let folder = tempfile::tempdir().unwrap();
        let mut options = options().with_request_bytes(100_000).with_head_bytes(3000);
        if cached {
            options = options.with_cache(uel_core::source::remote::CacheOptions::new(folder.path()));
        }
        server.fail(faults);
        let source = (0..20).find_map(|_| open(&server, "/object", options.clone()).ok());
        let source = source.expect("the faults come to an end");
        for (start, len) in reads {
            let end = (start + len).min(1_000_000);
            match source.read_range(range(start, end)) {
                Ok(read) => prop_assert_eq!(&read, &bytes[start as usize..end as usize]),
                Err(error) => prop_assert!(
                    matches!(error.kind(), Kind::Remote | Kind::Io | Kind::Changed | Kind::Timeout),
                    "{:?}", error
                ),
            }
            let read = source.read_ranges(&[range(start, end), range(start / 2, start / 2 + 10)]);
            if let Ok(read) = read {
                prop_assert_eq!(&read[0], &bytes[start as usize..end as usize]);
            }
        }
        // The faults leave nothing behind, unless the first answer was one with another ETag.
        server.forget_faults();
        if source.version() == open(&server, "/object", options).unwrap().version() {
            prop_assert_eq!(source.read_range(range(0, 1_000_000)).unwrap(), bytes);
        } else {
            let error = source.read_range(range(0, 1_000_000)).unwrap_err();
            prop_assert_eq!(error.kind(), Kind::Changed, "{}", error);
        }
    }
}
