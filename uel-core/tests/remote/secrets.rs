//! Queries, passwords and what servers say of signatures are in no message.

use super::server::{Fault, SECRET, Server};
use super::{open, options, pattern, range};
use std::error::Error as _;
use uel_core::checkpoint::{CheckpointFiles, FilesOptions};
use uel_core::source::remote::Remote;
use uel_core::source::{ByteSource, ByteSourceExt};
use uel_core::{Error, Kind};

const QUERY: &str = "X-Amz-Signature=s3cr3t&token=s3cr3t%2Fx";

/// Everything that anybody could print of an error.
fn all_of(error: &Error) -> String {
    let mut text = format!("{error} {error:?} {error:#?} {:?}", error.path());
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(" / {cause} {cause:?}"));
        next = cause.source();
    }
    text
}

#[track_caller]
fn is_clean(error: &Error) {
    let text = all_of(error);
    assert!(!text.contains(SECRET) && !text.contains("X-Amz") && !text.contains("s3cr3t"), "{text}");
}

#[test]
fn no_error_tells_a_query_or_a_body() {
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Status(404),
        Fault::Status(403),
        Fault::Status(401),
        Fault::Status(400),
        Fault::Status(412),
        Fault::Status(302),
        Fault::Status(304),
        Fault::Garbage,
        Fault::Reset(0),
        Fault::Unmarked(1000),
        Fault::Long(10),
        Fault::IgnoresRange,
        Fault::Shifted(-100),
        Fault::Mislabelled,
        Fault::Etag("\"other\""),
    ];
    let server = Server::start();
    server.put("/object", pattern(2 << 20));
    let target = format!("/object?{QUERY}");
    let source = open(&server, &target, options()).unwrap();
    assert!(!format!("{source:?} {:?}", source.path()).contains(SECRET));
    for fault in faults {
        server.fail(vec![fault.clone(); 20]);
        is_clean(&source.read_range(range(1 << 20, 2 << 20)).expect_err(&format!("{fault:?}")));
        server.forget_faults();
        server.fail(vec![fault.clone(); 20]);
        if let Err(error) = open(&server, &target, options()) {
            is_clean(&error);
        }
        server.forget_faults();
    }
    is_clean(&source.read_range(range(1, (2 << 20) + 1)).unwrap_err());
    let dead = server.url(&target);
    drop(server);
    is_clean(&Remote::new(options()).open(&dead).unwrap_err());
    is_clean(&CheckpointFiles::open(&dead, &FilesOptions::new().with_remote(options())).unwrap_err());
}

#[test]
fn what_a_url_names_arrives_as_it_stands() {
    let server = Server::start();
    for target in ["/a%20b/%C3%A9.bin?q=%2F&x=a+b", "/a//b/../c?", "/%2e%2E?x", "/plus+and~tilde%25"] {
        let path = target.split('?').next().unwrap();
        // A client takes dots out, as every client does.
        let path = if path.contains("..") { "/a//c" } else { path };
        let path = if path == "/%2e%2E" { "/" } else { path };
        server.put(path, pattern(1000));
        let source = open(&server, target, options()).unwrap();
        assert_eq!(source.read_range(range(0, 1000)).unwrap(), pattern(1000));
        let seen = server.take_seen();
        let query = target.split_once('?').map_or(String::new(), |(_, query)| format!("?{query}"));
        assert_eq!(seen[0].target, format!("{path}{query}"));
    }
    // What stands behind # stays here.
    server.put("/object", pattern(10));
    open(&server, "/object?a=b#c", options()).unwrap();
    assert_eq!(server.take_seen()[0].target, "/object?a=b");
}

#[test]
fn urls_that_name_no_object_are_refused_before_any_request() {
    let remote = Remote::new(options());
    for url in [
        "http://me:s3cr3t@127.0.0.1:1/x",
        "https://s3cr3t@127.0.0.1:1/x",
        "s3://me:s3cr3t@bucket/key",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/folder/",
        "s3:///key",
        "s3://bucket/key?versionId=s3cr3t",
        "ftp://host/x?s3cr3t",
        "http://",
        "http://[::1",
        "no url",
        "gs://bucket/a//b",
    ] {
        let error = remote.open(url).expect_err(url);
        assert_eq!(error.kind(), Kind::Argument, "{url}: {error}");
        is_clean(&error);
    }
    let files = FilesOptions::new().with_remote(options());
    for url in ["http://me:s3cr3t@127.0.0.1:1/x", "ftp://host/x?s3cr3t"] {
        let error = CheckpointFiles::open(url, &files).unwrap_err();
        assert_eq!(error.kind(), Kind::Argument, "{url}: {error}");
        is_clean(&error);
    }
}
