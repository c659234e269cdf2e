//! Zip archives whose records contradict each other, or ask for what is not there.

use super::Expect::{Cheap, Refused, Sound, Unreadable};
use super::pickle::{dict, sound as w};
use super::zip::{End, Entry, archive, archive_with, deflated_zeros, zip64_end, zip64_extra};
use super::{Corpus, six_floats};

const ARCHIVE: &[&str] = &["archive", "truncated", "overlap", "limit", "unexpected-eof"];
const FORMAT: &[&str] = &["archive", "truncated", "unknown-format", "limit", "unexpected-eof"];
const TRUNCATED: &[&str] = &["truncated", "archive", "unexpected-eof"];

/// The records of a checkpoint with one tensor.
fn records() -> Vec<Entry> {
    with(dict(&[("w", &w)]))
}

/// The same with another pickle.
pub(super) fn with(pickle: Vec<u8>) -> Vec<Entry> {
    vec![
        Entry::stored("hostile/data.pkl", pickle),
        Entry::stored("hostile/byteorder", "little"),
        Entry::stored("hostile/data/0", six_floats()),
        Entry::stored("hostile/version", "3\n"),
    ]
}

pub(super) fn sound() -> Vec<u8> {
    archive(&records())
}

/// The sound file with its storage changed.
fn storage(change: impl Fn(Entry) -> Entry) -> Vec<u8> {
    let mut entries = with(dict(&[("t", &w)]));
    entries[2] = change(entries[2].clone());
    archive(&entries)
}

/// The sound file with its pickle's entry changed.
fn pickle(change: impl Fn(Entry) -> Entry) -> Vec<u8> {
    let mut entries = records();
    entries[0] = change(entries[0].clone());
    archive(&entries)
}

fn more(entries: impl IntoIterator<Item = Entry>) -> Vec<u8> {
    let mut all = records();
    all.extend(entries);
    archive(&all)
}

fn ended(end: End) -> Vec<u8> {
    archive_with(&records(), &end)
}

pub(super) fn add(corpus: &mut Corpus) {
    corpus.file("sound", Sound, sound());
    corpus.file("sound, reversed", Sound, archive(&records().into_iter().rev().collect::<Vec<_>>()));
    compressed(corpus);
    headers(corpus);
    directory(corpus);
    names(corpus);
}

fn compressed(corpus: &mut Corpus) {
    const GIB: usize = 1 << 30;
    let bomb = || deflated_zeros(GIB);
    let small = Unreadable(&["archive", "limit"], &["inflate", "compressed", "longer", "bytes"]);
    corpus.file(
        "storage inflates to far more than it says",
        small,
        storage(|entry| Entry {
            data: bomb(),
            ..entry.both(|fields| (fields.method, fields.compressed) = (8, bomb().len() as u32))
        }),
    );
    let bombs = |name: &str, size: usize| Entry::deflated(name, deflated_zeros(size), size as u32);
    let pickled = Refused(&["pickle", "limit", "archive"], &["pickle", "inflate", "compressed", "opcode", "crc"]);
    corpus.file("pickle inflates to 900 MB of zeros", pickled, pickle(|_| bombs("hostile/data.pkl", 900_000_000)));
    let limit = Refused(&["limit", "pickle", "archive"], &["data.pkl", "pickle", "inflate", "limit"]);
    corpus.file(
        "pickle inflates to 4 GB",
        limit,
        pickle(|_| Entry::deflated("hostile/data.pkl", deflated_zeros(GIB), u32::MAX - 1)),
    );
    let other = archive(&[records(), vec![bombs("hostile/data/1", GIB)]].concat());
    corpus.file("a bomb that no tensor uses", Sound, other);
    corpus.file("byteorder inflates to 1 GiB", Refused(&["limit", "archive"], &["byteorder", "byte order"]), {
        let mut entries = records();
        entries[1] = bombs("hostile/byteorder", GIB);
        archive(&entries)
    });
    let garbage = Unreadable(ARCHIVE, &["inflate", "deflate", "compressed"]);
    corpus.file(
        "storage is no deflate stream",
        garbage,
        storage(|entry| Entry { data: vec![0xFF; 24], ..entry.both(|fields| fields.method = 8) }),
    );
    let garbage = Refused(ARCHIVE, &["inflate", "deflate", "compressed"]);
    corpus.file("pickle is no deflate stream", garbage, pickle(|entry| entry.both(|fields| fields.method = 8)));
    let short = Unreadable(TRUNCATED, &["inflate", "deflate", "compressed", "ends"]);
    corpus.file(
        "storage inflates to less than it says",
        short,
        storage(|entry| {
            let data = deflated_zeros(1);
            let len = data.len() as u32;
            Entry { data, ..entry.both(|fields| (fields.method, fields.compressed) = (8, len)) }
        }),
    );
    let method = &["archive", "unsupported-dtype", "unknown-format"][..1];
    let unknown = |what| (what, Unreadable(method, &["method", "compress"]));
    for (name, expect, number) in [("unknown method", unknown(()).1, 99), ("method LZMA", unknown(()).1, 14)] {
        corpus.file(name, expect, storage(|entry| entry.both(|fields| fields.method = number)));
    }
    let pickled = Refused(method, &["method", "compress"]);
    corpus.file("pickle by an unknown method", pickled, pickle(|entry| entry.both(|fields| fields.method = 99)));
    let encrypted = || Unreadable(&["archive"], &["encrypt"]);
    corpus.file("encrypted storage", encrypted(), storage(|entry| entry.both(|fields| fields.flags |= 1)));
    let pickled = Refused(&["archive"], &["encrypt"]);
    corpus.file("encrypted pickle", pickled, pickle(|entry| entry.both(|fields| fields.flags |= 1)));
}

fn headers(corpus: &mut Corpus) {
    let disagree = || Unreadable(ARCHIVE, &["local header", "header", "share bytes"]);
    corpus.file(
        "local header of another name",
        disagree(),
        storage(|entry| entry.local(|fields| fields.name = b"hostile/data/9".to_vec())),
    );
    corpus.file(
        "local header of a longer name",
        disagree(),
        storage(|entry| entry.local(|fields| fields.name = b"hostile/data/0000000".to_vec())),
    );
    corpus.file(
        "local header of another size",
        disagree(),
        storage(|entry| entry.local(|fields| (fields.size, fields.compressed) = (12, 12))),
    );
    corpus.file("local header of another method", disagree(), storage(|entry| entry.local(|fields| fields.method = 8)));
    corpus.file("storage points to no header", disagree(), storage(|entry| entry.at(7)));
    corpus.file("storage points to the pickle", disagree(), storage(|entry| entry.at(0)));
    let beyond = || Unreadable(TRUNCATED, &["end of the file", "ends", "behind", "beyond"]);
    corpus.file("storage behind the end of the file", beyond(), storage(|entry| entry.at(1 << 30)));
    corpus.file(
        "storage longer than the file",
        beyond(),
        storage(|entry| entry.both(|fields| (fields.size, fields.compressed) = (1 << 30, 1 << 30))),
    );
    let stored = Unreadable(ARCHIVE, &["stored", "size", "bytes"]);
    corpus.file("stored with two sizes", stored, storage(|entry| entry.both(|fields| fields.size = 48)));
    let wide = |size, compressed| {
        storage(move |entry| {
            entry.both(|fields| {
                (fields.size, fields.compressed) = (u32::MAX, u32::MAX);
                fields.extra = zip64_extra(size, compressed);
            })
        })
    };
    let absurd = || Unreadable(ARCHIVE, &["end of the file", "behind", "beyond", "large", "invalid", "exceeds"]);
    corpus.file("64-bit sizes of all ones", absurd(), wide(u64::MAX, u64::MAX));
    corpus.file("64-bit sizes that overflow an offset", absurd(), wide(u64::MAX - 60, u64::MAX - 60));
    corpus.file("64-bit sizes of 8 EiB", absurd(), wide(1 << 63, 1 << 63));
    corpus.file(
        "64-bit sizes promised and absent",
        Unreadable(ARCHIVE, &["end of the file", "behind", "extra", "zip64", "beyond"]),
        storage(|entry| entry.both(|fields| (fields.size, fields.compressed) = (u32::MAX, u32::MAX))),
    );
    corpus.file(
        "extra field longer than its entry",
        Cheap,
        storage(|entry| entry.both(|fields| fields.extra = vec![1, 0, 0xFF, 0xFF, 0])),
    );
    let overlap = Unreadable(&["overlap", "archive"], &["share", "overlap", "header"]);
    let inside = Entry::stored("hostile/data/0", [0; 24]);
    let inner = archive(std::slice::from_ref(&inside));
    corpus.file("storage inside another entry", overlap, {
        let mut entries = with(dict(&[("t", &w)]));
        let before: usize = entries[..2].iter().map(|entry| 30 + entry.local.name.len() + entry.data.len()).sum();
        entries[2] = Entry::stored("hostile/data/9", inner);
        let at = before + 30 + "hostile/data/9".len();
        let mut pointing = inside.clone().at(at as u32);
        // Its own local header is another one, of a record that nobody asks for.
        pointing.local.name = b"hostile/data/8".to_vec();
        entries.push(pointing);
        archive(&entries)
    });
    corpus.file("wrong checksum", Cheap, storage(|entry| entry.both(|fields| fields.crc ^= 1)));
}

fn directory(corpus: &mut Corpus) {
    let lies = || Refused(FORMAT, &["archive", "directory", "zip"]);
    corpus.file("directory behind the end", lies(), ended(End { directory_offset: Some(1 << 31), ..End::default() }));
    corpus.file("directory at the start", lies(), ended(End { directory_offset: Some(0), ..End::default() }));
    corpus.file("too many entries promised", lies(), ended(End { count: Some(60_000), ..End::default() }));
    corpus.file("too few entries promised", Cheap, ended(End { count: Some(1), ..End::default() }));
    corpus.file("directory of another length", Cheap, ended(End { directory_bytes: Some(10), ..End::default() }));
    let long = End { directory_bytes: Some(u32::MAX - 1), ..End::default() };
    corpus.file("directory longer than the file", Cheap, ended(long));
    let disks = Refused(FORMAT, &["disk", "archive", "zip"]);
    corpus.file("one of many disks", disks, ended(End { disk: 3, ..End::default() }));
    let wide = |count, bytes, offset, at| {
        let end = End {
            count: Some(u16::MAX),
            directory_bytes: Some(u32::MAX),
            directory_offset: Some(u32::MAX),
            before: zip64_end(count, bytes, offset, at),
            ..End::default()
        };
        ended(end)
    };
    corpus.file("64-bit count of all ones", lies(), wide(u64::MAX, 200, 100, 400));
    corpus.file("64-bit directory of 8 EiB", lies(), wide(4, 1 << 63, 100, 400));
    corpus.file("64-bit directory at the end of numbers", lies(), wide(4, 200, u64::MAX - 10, 400));
    corpus.file("64-bit record that points nowhere", lies(), wide(4, 200, 100, u64::MAX));
    let nothing =
        || Refused(&["archive", "unknown-format", "missing-field"], &["data.pkl", "entr", "archive", "checkpoint"]);
    corpus.file("no entry at all", nothing(), archive(&[]));
    corpus.file("no data.pkl", nothing(), archive(&records()[1..]));
    corpus.file("two of data.pkl", Refused(&["duplicate-name", "archive"], &["data.pkl", "one name", "two"]), {
        more([Entry::stored("hostile/data.pkl", dict(&[]))])
    });
    corpus.file(
        "data.pkl in two folders",
        Refused(&["archive", "duplicate-name", "unknown-format"], &["data.pkl", "folder", "prefix"]),
        more([Entry::stored("other/data.pkl", dict(&[]))]),
    );
    let twice = Refused(&["duplicate-name", "archive"], &["data/0", "one name", "two"]);
    corpus.file("two storages of one name", twice, more([Entry::stored("hostile/data/0", [9; 24])]));
    corpus.file("an end record in the comment", Cheap, {
        let comment = archive(&[Entry::stored("other/data.pkl", dict(&[]))]);
        ended(End { comment, ..End::default() })
    });
    corpus.file("junk behind the archive", Cheap, [sound(), vec![0x5A; 300]].concat());
    corpus.file("junk before the archive", Cheap, [vec![0x5A; 300], sound()].concat());
    corpus.file("many empty entries", Sound, more((0..20_000).map(|n| Entry::stored(&format!("hostile/x/{n}"), []))));
    let storage = Unreadable(&["archive", "missing-field", "pickle"], &["data/0", "storage"]);
    let mut absent = with(dict(&[("t", &w)]));
    absent.remove(2);
    corpus.file("no storage", storage, archive(&absent));
    let short = Unreadable(TRUNCATED, &["storage", "data/0", "bytes"]);
    let mut cut = with(dict(&[("t", &w)]));
    cut[2] = Entry::stored("hostile/data/0", [0; 20]);
    corpus.file("storage shorter than its tensor", short, archive(&cut));
}

fn names(corpus: &mut Corpus) {
    let below = |prefix: &str| {
        let rename = |fields: &mut super::zip::Fields| {
            let name = String::from_utf8(fields.name.clone()).unwrap();
            fields.name = name.replace("hostile/", prefix).into_bytes();
        };
        archive(&records().into_iter().map(|entry| entry.both(rename)).collect::<Vec<_>>())
    };
    let folder = || Refused(&["archive", "unknown-format"], &["no data.pkl"]);
    corpus.file("absolute names", folder(), below("/etc/"));
    corpus.file("names that lead upwards", folder(), below("../../"));
    corpus.file("names without a folder", Cheap, below(""));
    corpus.file("a name of 60,000 bytes", Cheap, below(&("n".repeat(60_000) + "/")));
    corpus.file("a name that is not UTF-8", Refused(&["not-utf8"], &["name", "utf-8"]), {
        more([Entry::stored("x", []).both(|fields| fields.name = b"hostile/\xFF\xFE".to_vec())])
    });
    corpus.file("a name with a zero byte", Cheap, more([Entry::stored("hostile/data/0\0", [1; 24])]));
    for (name, order) in [("byteorder is neither", "middle"), ("byteorder is empty", "")] {
        let mut entries = records();
        entries[1] = Entry::stored("hostile/byteorder", order);
        corpus.file(name, Refused(&["archive", "unknown-format"], &["byteorder", "byte order"]), archive(&entries));
    }
}
