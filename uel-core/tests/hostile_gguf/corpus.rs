//! The corpus: named files, built in code, and what is to be said of each.

use super::raw::{ARRAY, BOOL, Raw, STRING, U32};
use uel_core::Kind;

pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The kind and the offset of the fault; `None` where there is none.
    pub(crate) expect: Option<(Kind, u64)>,
    /// Built when needed, because some are large.
    pub(crate) bytes: Box<dyn Fn() -> Vec<u8>>,
}

/// Collects cases.
#[derive(Default)]
struct Corpus(Vec<Case>);

impl Corpus {
    fn refused(&mut self, name: &'static str, kind: Kind, at: u64, bytes: impl Fn() -> Vec<u8> + 'static) {
        self.0.push(Case { name, expect: Some((kind, at)), bytes: Box::new(bytes) });
    }

    fn accepted(&mut self, name: &'static str, bytes: impl Fn() -> Vec<u8> + 'static) {
        self.0.push(Case { name, expect: None, bytes: Box::new(bytes) });
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut corpus = Corpus::default();
    beginnings(&mut corpus);
    counts(&mut corpus);
    values(&mut corpus);
    arrays(&mut corpus);
    infos(&mut corpus);
    places(&mut corpus);
    corpus.0
}

fn v3() -> Raw {
    Raw::new(3)
}

fn beginnings(corpus: &mut Corpus) {
    corpus.refused("empty file", Kind::HeaderTooSmall, 0, Vec::new);
    corpus.refused("magic alone", Kind::HeaderTooSmall, 0, || b"GGUF".to_vec());
    corpus.refused("seven bytes", Kind::HeaderTooSmall, 0, || b"GGUF\x03\0\0".to_vec());
    corpus.refused("magic and version alone", Kind::HeaderTruncated, 8, || v3().end());
    corpus.refused("the magic of an older format", Kind::UnknownFormat, 0, || b"tjgg\x03\0\0\0\0\0\0\0".to_vec());
    corpus.refused("magic reversed", Kind::UnknownFormat, 0, || b"FUGG\x03\0\0\0\0\0\0\0".to_vec());
    corpus.refused("a web page", Kind::UnknownFormat, 0, || b"<!DOCTYPE html><html></html>".to_vec());
    corpus.refused("version 0", Kind::Version, 4, || Raw::new(0).counts(0, 0).end());
    corpus.refused("version 4", Kind::Version, 4, || Raw::new(4).counts(0, 0).end());
    corpus.refused("version of all ones", Kind::Version, 4, || Raw::new(u32::MAX).counts(0, 0).end());
    corpus.refused("version 4 big-endian", Kind::Version, 4, || Raw::new(4 << 24).counts(0, 0).end());
}

fn counts(corpus: &mut Corpus) {
    corpus.refused("2^64 - 1 tensors", Kind::Limit, 8, || v3().counts(u64::MAX, 0).end());
    corpus.refused("2^63 tensors", Kind::Limit, 8, || v3().counts(1 << 63, 0).data(32, 1000));
    corpus.refused("sixteen million tensors in a short file", Kind::HeaderTruncated, 8, || {
        v3().counts(16_000_000, 0).data(32, 1000)
    });
    corpus.refused("one tensor more than there is room for", Kind::HeaderTruncated, 8, || {
        // Behind the first count there are 8 + 2 * 24 bytes, which is room for two.
        v3().counts(3, 0).bytes(&[0; 48]).end()
    });
    corpus.refused("2^64 - 1 entries", Kind::Limit, 16, || v3().counts(0, u64::MAX).end());
    corpus.refused("2^63 entries", Kind::Limit, 16, || v3().counts(0, 1 << 63).data(32, 1000));
    corpus.refused("65536 entries in a short file", Kind::HeaderTruncated, 16, || v3().counts(0, 1 << 16).data(32, 99));
    corpus.refused("2^32 - 1 tensors in version 1", Kind::Limit, 8, || Raw::new(1).counts(u32::MAX.into(), 0).end());
    corpus.refused("2^32 - 1 entries in version 1", Kind::Limit, 12, || Raw::new(1).counts(0, u32::MAX.into()).end());
    corpus.refused("counts of another byte order", Kind::Limit, 8, || v3().counts(1 << 56, 0).data(32, 99));
    corpus.refused("an entry that is not there", Kind::HeaderTruncated, 16, || v3().counts(0, 1).end());
    corpus.refused("the second entry is cut", Kind::HeaderTruncated, 51, || {
        v3().counts(0, 2).key("a", BOOL).bytes(&[1]).key("b", U32).bytes(&[0; 3]).end()
    });
}

fn values(corpus: &mut Corpus) {
    let entry = || v3().counts(0, 1);
    corpus.refused("a key of 2^64 - 1 bytes", Kind::Limit, 24, move || entry().u64(u64::MAX).data(32, 99));
    corpus.refused("a key one byte over the limit", Kind::Limit, 24, move || {
        entry().string("k".repeat(65_536)).u32(BOOL).bytes(&[1]).end()
    });
    corpus
        .accepted("a key as long as the limit", move || entry().string("k".repeat(65_535)).u32(BOOL).bytes(&[1]).end());
    corpus.refused("a key that reaches out of the file", Kind::HeaderTruncated, 24, move || {
        entry().u64(100).data(32, 60)
    });
    corpus.refused("a key that is not UTF-8", Kind::NotUtf8, 33, move || {
        entry().string(b"a\xffb").u32(BOOL).bytes(&[1]).end()
    });
    corpus.refused("a key cut within a letter", Kind::NotUtf8, 32, move || {
        entry().string(b"\xc3").u32(BOOL).bytes(&[1]).end()
    });
    corpus.refused("type 13", Kind::ValueType, 33, move || entry().key("a", 13).u64(0).end());
    corpus.refused("type of all ones", Kind::ValueType, 33, move || entry().key("a", u32::MAX).u64(0).end());
    corpus
        .refused("a number that is cut", Kind::HeaderTruncated, 37, move || entry().key("a", U32).bytes(&[0; 3]).end());
    corpus.refused("a boolean of 2", Kind::ValueRange, 37, move || entry().key("a", BOOL).bytes(&[2]).end());
    corpus.refused("a boolean of 255 in an array", Kind::ValueRange, 51, move || {
        entry().key("a", ARRAY).array(BOOL, 3).bytes(&[0, 1, 255]).end()
    });
    corpus.refused("a string of 2^64 - 1 bytes", Kind::Limit, 37, move || entry().key("a", STRING).u64(u64::MAX).end());
    corpus.refused("a string of 2^63 bytes", Kind::Limit, 37, move || entry().key("a", STRING).u64(1 << 63).end());
    corpus.refused("a string of 200 MB in a short file", Kind::HeaderTruncated, 37, move || {
        entry().key("a", STRING).u64(200_000_000).data(32, 1000)
    });
    corpus.refused("a string one byte longer than the file", Kind::HeaderTruncated, 37, move || {
        entry().key("a", STRING).u64(5).bytes(b"text").end()
    });
    corpus.refused("a string of 4 GB in version 1", Kind::Limit, 25, || {
        Raw::new(1).counts(0, 1).key("a", STRING).length(u32::MAX.into()).end()
    });
    corpus.accepted("a string that is not UTF-8", move || entry().key("a", STRING).string(b"\xff\xfe").end());
    corpus.refused("a key twice", Kind::DuplicateKey, 46, || {
        v3().counts(0, 2).key("a", BOOL).bytes(&[1]).key("a", U32).u32(1).end()
    });
    corpus.refused("a key twice, far apart", Kind::DuplicateKey, 24 + 14 * 100 + 8, || {
        let raw = (0..100u8).fold(v3().counts(0, 101), |raw, n| {
            let key = char::from(b'!' + n % 90).to_string();
            if n < 90 { raw.key(&key, BOOL).bytes(&[0]) } else { raw.string([n - 90 + 1]).u32(BOOL).bytes(&[0]) }
        });
        raw.key("!", BOOL).bytes(&[0]).end()
    });
    corpus.accepted("an empty key", move || entry().key("", BOOL).bytes(&[1]).end());
}

fn arrays(corpus: &mut Corpus) {
    let array = || v3().counts(0, 1).key("a", ARRAY);
    corpus.refused("an array of an unknown type", Kind::ValueType, 37, move || array().array(99, 0).end());
    corpus.refused("an array of 2^64 - 1 bytes", Kind::Limit, 41, move || array().array(0, u64::MAX).end());
    corpus.refused("an array whose bytes overflow", Kind::Limit, 41, move || array().array(10, 1 << 61).data(32, 99));
    corpus.refused("2^26 + 1 elements", Kind::Limit, 41, move || array().array(0, (1 << 26) + 1).end());
    corpus.refused("2^26 numbers in a short file", Kind::HeaderTruncated, 41, move || {
        array().array(10, 1 << 26).data(32, 1000)
    });
    corpus.refused("2^26 strings in a short file", Kind::HeaderTruncated, 41, move || {
        array().array(STRING, 1 << 26).data(32, 1000)
    });
    corpus.refused("2^26 arrays in a short file", Kind::HeaderTruncated, 41, move || {
        array().array(ARRAY, 1 << 26).data(32, 1000)
    });
    corpus.refused("a number more than there are", Kind::HeaderTruncated, 41, move || {
        array().array(U32, 3).u32(1).u32(2).bytes(&[0; 3]).end()
    });
    corpus.refused("the last of many strings is cut", Kind::HeaderTruncated, 49 + 1000 * 9, move || {
        let raw = (0..1000).fold(array().array(STRING, 1001), |raw, _| raw.string("x"));
        raw.u64(9).bytes(&[0; 8]).end()
    });
    corpus.refused("a string among strings of 2^60 bytes", Kind::Limit, 58, move || {
        array().array(STRING, 2).string("x").u64(1 << 60).end()
    });
    // Each level is the type and the length of the next, which is 12 bytes.
    corpus.accepted("arrays in arrays, 16 deep", move || {
        (0..15).fold(array(), |raw, _| raw.array(ARRAY, 1)).array(U32, 1).u32(1).end()
    });
    corpus.refused("arrays in arrays, 17 deep", Kind::ArrayDepth, 37 + 17 * 12, move || {
        (0..16).fold(array(), |raw, _| raw.array(ARRAY, 1)).array(U32, 1).u32(1).end()
    });
    corpus.refused("arrays in arrays, a million deep", Kind::ArrayDepth, 37 + 17 * 12, move || {
        (0..1_000_000).fold(array(), |raw, _| raw.array(ARRAY, 1)).array(U32, 0).end()
    });
    corpus.accepted("a million empty arrays", move || {
        (0..1_000_000).fold(array().array(ARRAY, 1_000_000), |raw, _| raw.array(U32, 0)).end()
    });
    corpus
        .accepted("a million empty strings", move || array().array(STRING, 1_000_000).bytes(&vec![0; 8_000_000]).end());
    corpus.refused("arrays that each claim the rest of the file", Kind::HeaderTruncated, 49 + 16 + 4, move || {
        // The second claims what the first has.
        array().array(ARRAY, 2).array(U32, 1).u32(0).u32(U32).u64(100).bytes(&[0; 64]).end()
    });
    corpus.refused("more entries behind a long array", Kind::HeaderTruncated, 37 + 12 + 4_000_000, || {
        let raw = v3().counts(0, 2).key("a", ARRAY).array(U32, 1_000_000).bytes(&vec![0; 4_000_000]);
        raw.bytes(&[9; 7]).end()
    });
}

fn infos(corpus: &mut Corpus) {
    let one = || v3().counts(1, 0);
    corpus.refused("a name of 2^64 - 1 bytes", Kind::Limit, 24, move || one().u64(u64::MAX).data(32, 99));
    corpus.refused("a name over the limit", Kind::Limit, 24, move || {
        one().info(&"n".repeat((1 << 20) + 1), &[], 0, 0).data(32, 32)
    });
    corpus.refused("a name that is not UTF-8", Kind::NotUtf8, 32, move || {
        one().string(b"\x80").u32(0).u32(0).u64(0).data(32, 32)
    });
    corpus.refused("five dimensions", Kind::Limit, 33, move || one().info("a", &[1; 5], 0, 0).data(32, 32));
    corpus.refused("2^32 - 1 dimensions", Kind::Limit, 33, move || {
        one().string("a").u32(u32::MAX).bytes(&[1; 64]).data(32, 32)
    });
    corpus.refused("dimensions that are cut", Kind::HeaderTruncated, 45, move || {
        one().string("a").u32(2).u64(1).bytes(&[0; 7]).end()
    });
    // Behind the name and the number of dimensions.
    corpus.refused("a dimension of 2^64 - 1", Kind::Overflow, 37, move || {
        one().info("a", &[u64::MAX], 0, 0).data(32, 32)
    });
    corpus.refused("a dimension of 2^62", Kind::Overflow, 37, move || one().info("a", &[1 << 62], 0, 0).data(32, 32));
    corpus.refused("dimensions whose product overflows", Kind::Overflow, 37, move || {
        one().info("a", &[1 << 32, 1 << 32], 0, 0).data(32, 32)
    });
    corpus.refused("dimensions whose product is 2^64 + 1", Kind::Overflow, 37, move || {
        one().info("a", &[67_280_421_310_721, 274_177], 24, 0).data(32, 32)
    });
    corpus.refused("an overflow behind a zero", Kind::Overflow, 37, move || {
        one().info("a", &[0, u64::MAX, 2], 0, 0).data(32, 32)
    });
    corpus.refused("blocks whose bytes overflow", Kind::Overflow, 37, move || {
        one().info("a", &[1 << 63], 15, 0).data(32, 32)
    });
    for (name, id) in
        [("type 4, given up", 4), ("type 31, given up", 31), ("type 38, given up", 38), ("type 1000", 1000)]
    {
        corpus.refused(name, Kind::UnknownDtype, 45, move || one().info("a", &[32], id, 0).data(32, 32));
    }
    corpus.refused("a row of half a block", Kind::PartialBlock, 37, move || one().info("a", &[16], 2, 0).data(32, 32));
    corpus.refused("rows of half a block each", Kind::PartialBlock, 37, move || {
        one().info("a", &[16, 2], 2, 0).data(32, 32)
    });
    corpus.refused("a scalar of blocks", Kind::PartialBlock, 37, move || one().info("a", &[], 12, 0).data(32, 256));
    corpus.refused("a name twice", Kind::DuplicateName, 24 + 33, || {
        v3().counts(2, 0).info("a", &[1], 0, 0).info("a", &[1], 0, 32).data(32, 64)
    });
    corpus.refused("a name twice, the second first in the file", Kind::DuplicateName, 24 + 33, || {
        v3().counts(2, 0).info("a", &[1], 0, 32).info("a", &[1], 0, 0).data(32, 64)
    });
    corpus.refused("an info that is not there", Kind::HeaderTruncated, 24 + 33, || {
        v3().counts(2, 0).info("a", &[1], 0, 0).bytes(&[0; 7]).end()
    });
}

fn places(corpus: &mut Corpus) {
    let aligned = |alignment| v3().counts(1, 1).key("general.alignment", U32).u32(alignment);
    // Where the value of the alignment stands, and the offset of the only tensor behind it.
    let value_at = aligned(1).len() - 4;
    let offset_at = |raw: Raw| raw.len() - 8;
    corpus.refused("alignment 0", Kind::Alignment, value_at, move || aligned(0).info("a", &[1], 0, 0).data(32, 32));
    corpus.refused("alignment 3", Kind::Alignment, value_at, move || aligned(3).info("a", &[1], 0, 0).data(32, 32));
    corpus.refused("alignment of all ones", Kind::Alignment, value_at, move || {
        aligned(u32::MAX).info("a", &[1], 0, 0).data(32, 32)
    });
    corpus.refused("alignment as a string", Kind::ValueType, value_at, || {
        v3().counts(0, 1).key("general.alignment", STRING).string("32").end()
    });
    corpus.refused("alignment as a boolean", Kind::ValueType, value_at, || {
        v3().counts(0, 1).key("general.alignment", BOOL).bytes(&[1]).end()
    });
    corpus.refused("alignment twice", Kind::DuplicateKey, value_at + 4 + 8, move || {
        v3().counts(0, 2).key("general.alignment", U32).u32(32).key("general.alignment", U32).u32(1).end()
    });
    let at = offset_at(aligned(1 << 31).info("a", &[1], 0, 0));
    corpus.refused("alignment of 2 GB in a short file", Kind::Truncated, at, move || {
        aligned(1 << 31).info("a", &[1], 0, 0).data(32, 99)
    });
    let one = |offset| v3().counts(1, 0).info("a", &[1], 0, offset);
    let at = offset_at(one(0));
    corpus.refused("an offset that is not aligned", Kind::Alignment, at, move || one(4).data(32, 64));
    corpus.refused("an offset of 2^64 - 1", Kind::Alignment, at, move || one(u64::MAX).data(32, 64));
    corpus.refused("an offset whose end overflows", Kind::Overflow, at, move || one(u64::MAX - 31).data(32, 64));
    corpus.refused("an offset of 2^63", Kind::Truncated, at, move || one(1 << 63).data(32, 64));
    corpus.refused("a tensor one byte behind the end", Kind::Truncated, at, move || one(0).data(32, 3));
    corpus.refused("a tensor behind the end", Kind::Truncated, at, move || one(64).data(32, 64));
    corpus.refused("a file that ends within its padding", Kind::Truncated, at, move || one(0).end());
    corpus.refused("a tensor of 2^60 bytes", Kind::Truncated, at, move || {
        v3().counts(1, 0).info("a", &[1 << 58], 0, 0).data(32, 64)
    });
    let two =
        |a: u64, b: u64, elements: u64| v3().counts(2, 0).info("a", &[elements], 0, a).info("b", &[elements], 0, b);
    let data_start = two(0, 0, 1).len().next_multiple_of(32);
    corpus.refused("two tensors at one place", Kind::Overlap, data_start, move || two(0, 0, 1).data(32, 64));
    corpus.refused("two tensors that overlap", Kind::Overlap, data_start + 32, move || two(0, 32, 9).data(32, 99));
    corpus.refused("two that overlap, in the other order", Kind::Overlap, data_start + 32, move || {
        two(32, 0, 9).data(32, 99)
    });
    let within = || v3().counts(2, 0).info("a", &[64], 0, 0).info("b", &[1], 0, 64);
    let data_start = within().len().next_multiple_of(32);
    corpus.refused("a tensor within another", Kind::Overlap, data_start + 64, move || within().data(32, 256));
    corpus.accepted("bytes behind the last tensor", move || one(0).data(32, 10_000));
    corpus.accepted("a hundred thousand tensors", || {
        (0..100_000u64)
            .fold(v3().counts(100_000, 0), |raw, n| raw.info(&format!("blk.{n}"), &[8], 0, n * 32))
            .data(32, 3_200_000)
    });
    corpus.refused("a hundred thousand tensors, all at one place", Kind::Overlap, 3_800_032, || {
        let raw = (0..100_000u64).fold(v3().counts(100_000, 0), |raw, n| raw.info(&format!("{n:06}"), &[2], 0, 0));
        raw.data(32, 64)
    });
}
