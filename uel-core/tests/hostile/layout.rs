//! Faults of sizes and offsets.

use super::{Corpus, all, tensor};
use uel_core::Kind;

pub(super) fn add(corpus: &mut Corpus) {
    cover(corpus);
    sizes(corpus);
    overflows(corpus);
    many(corpus);
}

/// A tensor of bytes.
fn bytes(name: &str, begin: u64, end: u64) -> String {
    tensor(name, "U8", &format!("[{}]", end.abs_diff(begin)), begin, end)
}

fn cover(corpus: &mut Corpus) {
    let two = |a: (u64, u64), b: (u64, u64)| all(&[bytes("a", a.0, a.1), bytes("b", b.0, b.1)]);
    corpus.accepted("tensors in another order than their bytes", two((4, 8), (0, 4)), 8);
    corpus.accepted("nothing at the start", two((0, 0), (0, 4)), 4);
    corpus.accepted("nothing between two", all(&[bytes("a", 0, 4), bytes("b", 4, 4), bytes("c", 4, 8)]), 8);
    corpus.accepted("nothing at the end", two((0, 4), (4, 4)), 4);
    corpus.refused("a hole at the start", Kind::Hole, all(&[bytes("a", 1, 5)]), 5);
    corpus.refused("a hole in the middle", Kind::Hole, two((0, 4), (5, 8)), 8);
    corpus.refused("a hole of the size of the file", Kind::Hole, two((0, 4), (1 << 40, (1 << 40) + 4)), 8);
    corpus.refused("nothing behind the end", Kind::Hole, two((0, 4), (100, 100)), 4);
    corpus.refused("a shared byte", Kind::Overlap, two((0, 4), (3, 7)), 7);
    corpus.refused("two tensors of the same bytes", Kind::Overlap, two((0, 4), (0, 4)), 4);
    corpus.refused("a tensor inside another", Kind::Overlap, two((0, 8), (2, 4)), 8);
    corpus.refused("nothing inside a tensor", Kind::Overlap, two((0, 8), (4, 4)), 8);
    corpus.refused("offsets that end before they begin", Kind::OffsetsReversed, all(&[bytes("a", 4, 0)]), 4);
    corpus.refused("reversed offsets of nothing", Kind::OffsetsReversed, all(&[tensor("a", "U8", "[0]", 4, 0)]), 4);
    corpus.refused("no data", Kind::Truncated, all(&[bytes("a", 0, 4)]), 0);
    corpus.refused("one byte of data missing", Kind::Truncated, two((0, 4), (4, 8)), 7);
    corpus.refused("data for one of two tensors", Kind::Truncated, two((0, 4), (4, 8)), 4);
    corpus.refused("a byte of data too many", Kind::TrailingBytes, two((0, 4), (4, 8)), 9);
    corpus.refused("data without tensors", Kind::TrailingBytes, "{}", 8);
    corpus.refused("offsets that count from the start of the file", Kind::Hole, all(&[bytes("a", 70, 74)]), 4);
}

fn sizes(corpus: &mut Corpus) {
    corpus.accepted("a scalar", all(&[tensor("a", "F64", "[]", 0, 8)]), 8);
    corpus.accepted("two elements of F4", all(&[tensor("a", "F4", "[2]", 0, 1)]), 1);
    corpus.accepted("four elements of F6", all(&[tensor("a", "F6_E2M3", "[2,2]", 0, 3)]), 3);
    corpus.accepted("no elements of F4", all(&[tensor("a", "F4", "[3,0]", 0, 0)]), 0);
    for (name, dtype, shape, end) in [
        ("three elements of F4", "F4", "[3]", 2),
        ("a scalar of F4", "F4", "[]", 1),
        ("two elements of F6", "F6_E3M2", "[2]", 2),
        ("three elements of F6", "F6_E2M3", "[3]", 3),
    ] {
        corpus.refused(name, Kind::PartialByte, all(&[tensor("a", dtype, shape, 0, end)]), end as usize);
    }
    for (name, shape, end) in [
        ("a shape too small for the offsets", "[1]", 8u64),
        ("a shape too large for the offsets", "[3]", 8),
        ("a scalar without bytes", "[]", 0),
        ("bytes for no elements", "[0]", 4),
        ("bytes for no elements in many dimensions", "[4,0,4]", 64),
        ("a shape 2^58 too large", "[288230376151711744]", 8),
    ] {
        corpus.refused(name, Kind::SizeMismatch, all(&[tensor("a", "F32", shape, 0, end)]), end as usize);
    }
    let rank = |n: usize| all(&[tensor("a", "F32", &format!("[{}1]", "1,".repeat(n - 1)), 0, 4)]);
    corpus.accepted("64 dimensions", rank(64), 4);
    corpus.stricter("rank-limit", "65 dimensions", Kind::Limit, rank(65), 4);
    corpus.stricter("rank-limit", "a million dimensions", Kind::Limit, rank(1_000_000), 4);
}

fn overflows(corpus: &mut Corpus) {
    for (name, dtype, shape) in [
        ("elements overflow", "U8", "[4294967296,4294967296]"),
        ("elements overflow to the right size", "U8", "[4294967296,4294967296,4294967296,4]"),
        ("elements overflow by one", "U8", "[3,6148914691236517206]"),
        ("bits overflow", "U8", "[2305843009213693952]"),
        ("bytes overflow", "F64", "[2305843009213693952]"),
        ("bytes overflow to none", "F32", "[4611686018427387904]"),
        ("elements overflow before a zero", "U8", "[9223372036854775808,4,0]"),
    ] {
        corpus.refused(name, Kind::Overflow, all(&[tensor("a", dtype, shape, 0, 0)]), 0);
    }
    for (name, shape) in [
        ("elements overflow behind a zero", "[0,18446744073709551615,18446744073709551615]"),
        ("elements overflow around a zero", "[4294967296,0,4294967296]"),
        ("bits overflow behind a zero", "[0,18446744073709551615]"),
    ] {
        let json = all(&[tensor("a", "F32", shape, 0, 0)]);
        corpus.stricter("zero-hides-overflow", name, Kind::Overflow, json, 0);
    }
    // The largest tensor whose bits can be counted, side by side until the offsets cannot.
    let largest = (1u64 << 61) - 1;
    let row = |n: u64| {
        let tensors: Vec<_> = (0..n).map(|i| bytes(&format!("t{i}"), i * largest, (i + 1) * largest)).collect();
        all(&tensors)
    };
    corpus.refused("seven of the largest tensors", Kind::Truncated, row(7), 4);
    corpus.refused("eight of the largest tensors", Kind::Overflow, row(8), 4);
    let end = tensor("a", "U8", "[0]", u64::MAX, u64::MAX);
    corpus.refused("nothing at the end of the address space", Kind::Overflow, all(&[end]), 0);
    let all_bytes = tensor("a", "U8", "[18446744073709551615]", 0, u64::MAX);
    corpus.refused("a tensor as large as the address space", Kind::Overflow, all(&[all_bytes]), 0);
}

fn many(corpus: &mut Corpus) {
    let empty = |n: usize| all(&(0..n).map(|i| bytes(&i.to_string(), 0, 0)).collect::<Vec<_>>());
    corpus.accepted("fifty thousand empty tensors", empty(50_000), 0);
    let backwards: Vec<_> = (0..20_000u64).rev().map(|i| bytes(&i.to_string(), i, i + 1)).collect();
    corpus.accepted("twenty thousand tensors backwards", all(&backwards), 20_000);
    let faulty: Vec<_> = (0..20_000).map(|i| format!("\"{i}\":1")).collect();
    corpus.refused("twenty thousand faulty tensors", Kind::JsonType, all(&faulty), 0);
    let stacked: Vec<_> = (0..20_000).map(|i| bytes(&i.to_string(), 0, 4)).collect();
    corpus.refused("twenty thousand tensors of the same bytes", Kind::Overlap, all(&stacked), 4);
    // Each name's second place is far behind the first, so that looking for them one by one takes long.
    let mut repeated: Vec<_> = (0..15_000).map(|i| bytes(&i.to_string(), 0, 0)).collect();
    repeated.extend((0..2_000).map(|i| bytes(&i.to_string(), 0, 0)));
    corpus.stricter("duplicate-name", "two thousand names repeated at the end", Kind::DuplicateName, all(&repeated), 0);
}
