//! Faults of the length, the encoding and the frame of the header.

use super::{Corpus, Expect, all, file, tensor};
use uel_core::Kind;

pub(super) fn add(corpus: &mut Corpus) {
    lengths(corpus);
    frame(corpus);
    encoding(corpus);
}

fn lengths(corpus: &mut Corpus) {
    let refused = Expect::Refused;
    let with_len = |len: u64| {
        move || {
            let mut bytes = file("{}", 100);
            bytes[..8].copy_from_slice(&len.to_le_bytes());
            bytes
        }
    };
    corpus.add("empty file", refused(Kind::HeaderTooSmall), Vec::new);
    corpus.add("file of one byte", refused(Kind::HeaderTooSmall), || vec![b'{']);
    corpus.add("file of seven bytes", refused(Kind::HeaderTooSmall), || vec![0; 7]);
    corpus.add("length and nothing else", refused(Kind::HeaderTruncated), || 2u64.to_le_bytes().to_vec());
    corpus.add("header of no bytes", refused(Kind::HeaderStart), || vec![0; 8]);
    corpus.add("header of no bytes before data", refused(Kind::HeaderStart), || vec![0; 64]);
    corpus.add("length one over the limit", refused(Kind::HeaderTooLarge), with_len(100_000_001));
    corpus.add("length at the limit in a short file", refused(Kind::HeaderTruncated), with_len(100_000_000));
    corpus.add("length 2^32", refused(Kind::HeaderTooLarge), with_len(1 << 32));
    corpus.add("length 2^63 - 1", refused(Kind::HeaderTooLarge), with_len(i64::MAX as u64));
    corpus.add("length 2^63", refused(Kind::HeaderTooLarge), with_len(1 << 63));
    corpus.add("length 2^64 - 1", refused(Kind::HeaderTooLarge), with_len(u64::MAX));
    corpus.add("length 2^64 - 8", refused(Kind::HeaderTooLarge), with_len(u64::MAX - 7));
    corpus.add("length one behind the end", refused(Kind::HeaderTruncated), with_len(103));
    corpus.add("length one too short", refused(Kind::Json), with_len(1));
    corpus.add("length in big-endian order", refused(Kind::HeaderTooLarge), || {
        let mut bytes = file("{}", 0);
        bytes[..8].reverse();
        bytes
    });
    corpus.add("a web page", refused(Kind::HeaderTooLarge), || b"<!DOCTYPE html><html></html>".to_vec());
    corpus.add("a zip archive", refused(Kind::HeaderTooLarge), || b"PK\x03\x04\x00\x00\x08\x08\x00\x00".to_vec());
    corpus.add("a pointer of git lfs", refused(Kind::HeaderTooLarge), || {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec()
    });
    corpus.add("length at the limit, all spaces", refused(Kind::Json), || {
        let mut json = vec![b' '; 100_000_000];
        json[0] = b'{';
        file(json, 0)
    });
    corpus.add("a name of a hundred megabytes", Expect::StricterThanReference(Kind::Limit, "name-limit"), || {
        file(all(&[tensor(&"n".repeat(99_999_900), "U8", "[1]", 0, 1)]), 1)
    });
}

fn frame(corpus: &mut Corpus) {
    let one = all(&[tensor("a", "F32", "[1]", 0, 4)]);
    corpus.accepted("no tensors", "{}", 0);
    corpus.accepted("no tensors, metadata", r#"{"__metadata__":{}}"#, 0);
    corpus.accepted("spaces behind the header", format!("{one}       "), 4);
    corpus.accepted("a megabyte of spaces", format!("{one}{}", " ".repeat(1 << 20)), 4);
    let spaced = one.replace(':', " \t:\r\n").replace(',', " \t,\r\n").replace('}', " \n}").replace('[', "[ ");
    corpus.accepted("whitespace between all tokens", spaced, 4);
    for (name, json) in [
        ("space before the header", format!(" {one}")),
        ("line end before the header", format!("\n{one}")),
        ("much space before the header", format!("{}{one}", "\t ".repeat(1000))),
    ] {
        corpus.stricter("leading-whitespace", name, Kind::HeaderStart, json, 4);
    }
    corpus.stricter("padding", "line end behind the header", Kind::HeaderPadding, format!("{one}\n"), 4);
    corpus.stricter("padding", "tabs behind the header", Kind::HeaderPadding, format!("{one}  \t\t "), 4);
    corpus.refused("zero byte before the header", Kind::HeaderStart, format!("\0{one}"), 4);
    corpus.refused("byte order mark", Kind::HeaderStart, format!("\u{feff}{one}"), 4);
    corpus.refused("padding of zero bytes", Kind::Json, format!("{one}\0\0\0"), 4);
    corpus.refused("letters behind the header", Kind::Json, format!("{one} x"), 4);
    corpus.refused("a brace too many", Kind::Json, format!("{one}}}"), 4);
    corpus.refused("two headers", Kind::Json, format!("{one}{one}"), 4);
    corpus.refused("an array", Kind::HeaderStart, format!("[{one}]"), 4);
    corpus.refused("a string", Kind::HeaderStart, "\"{}\"", 0);
    corpus.refused("a number", Kind::HeaderStart, "0", 0);
    corpus.refused("null", Kind::HeaderStart, "null", 0);
}

fn encoding(corpus: &mut Corpus) {
    let named = |name: &'static [u8]| {
        move || {
            let json = all(&[tensor("@", "F32", "[1]", 0, 4)]).into_bytes();
            let at = json.iter().position(|&byte| byte == b'@').unwrap();
            file([&json[..at], name, &json[at + 1..]].concat(), 4)
        }
    };
    for (name, bytes) in [
        ("a byte that is never UTF-8", &b"\xff"[..]),
        ("a continuation byte alone", b"\x80"),
        ("an overlong slash", b"\xc0\xaf"),
        ("half a character", b"\xe2\x82"),
        ("a surrogate in UTF-8", b"\xed\xa0\x80"),
        ("a character behind the last", b"\xf4\x90\x80\x80"),
    ] {
        corpus.add(name, Expect::Refused(Kind::NotUtf8), named(bytes));
    }
    corpus.add("the last character", Expect::Accepted, named(b"\xf4\x8f\xbf\xbf"));
    corpus.add("padding that is not UTF-8", Expect::Refused(Kind::NotUtf8), || file(b"{}   \xff", 0));
    corpus.add("UTF-16", Expect::Refused(Kind::Json), || file(b"{\0}\0", 0));
    corpus.add("UTF-32 with its mark", Expect::Refused(Kind::NotUtf8), || file(b"\xff\xfe\0\0{\0\0\0}\0\0\0", 0));
}
