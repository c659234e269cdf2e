//! Objects on servers: a server of the tests' own, which breaks its promises as told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests and what they share")]

mod cache;
mod checkpoints;
mod faults;
mod reads;
mod secrets;
mod server;

use server::Server;
use std::time::Duration;
use uel_core::ByteRange;
use uel_core::source::remote::{Remote, RemoteOptions, RemoteSource};

/// Retries at once, and small limits, so that tests are short and cross them.
fn options() -> RemoteOptions {
    RemoteOptions::new()
        .with_backoff(Duration::from_millis(1))
        .with_deadline(Duration::from_secs(20))
        .with_timeout(Duration::from_secs(5))
        .with_retries(4)
}

fn open(server: &Server, path: &str, options: RemoteOptions) -> uel_core::Result<RemoteSource> {
    Remote::new(options).open(&server.url(path))
}

/// Bytes that differ everywhere.
fn pattern(byte_len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..byte_len).map(|_| random(&mut state) as u8).collect()
}

/// A xorshift step.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}
