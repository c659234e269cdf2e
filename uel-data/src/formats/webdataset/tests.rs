use std::io::Write as _;

use super::*;
use crate::formats::testkit::*;
use crate::{Dataset, IterableDataset};

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        // Long names become entries of their own.
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn sample(key: &str, fields: &[(&str, &[u8])]) -> Value {
    let fields = fields.iter().map(|(name, bytes)| (name.to_string(), Value::Bytes(bytes.to_vec())));
    Value::map(std::iter::once((KEY.to_owned(), Value::from(key))).chain(fields))
}

fn samples(dataset: &WebDataset) -> Vec<Value> {
    check(dataset);
    (0..dataset.len()).map(|index| get(dataset, index)).collect()
}

#[test]
fn neighbours_with_one_key_are_a_sample() {
    let long = format!("{}/deep", "folder".repeat(30));
    let jpg = format!("{long}.jpg");
    let big = vec![7u8; 3_000_000];
    let one = archive(&[
        ("__index__", b"not a sample"),
        ("a/1.v.JPG", b"jpg"),
        ("a/1.cls", b"3"),
        ("a/README", b"no dot"),
        ("a.b/2.seg.png", b""),
        (&jpg, &big),
        ("a/1.cls", b"4"),
    ]);
    let two = archive(&[("a/1.txt", b"another archive")]);
    let expected = [
        sample("a/1", &[("v.jpg", b"jpg"), ("cls", b"3")]),
        sample("a.b/2", &[("seg.png", b"")]),
        sample(&long, &[("jpg", &big)]),
        sample("a/1", &[("cls", b"4")]),
        sample("a/1", &[("txt", b"another archive")]),
    ];
    let folder = Folder::new();
    for files in [
        vec![memory("one.tar", &one), memory("two.tar", &two)],
        vec![folder.open("one.tar", &one), folder.open("two.tar", &two)],
    ] {
        let dataset = WebDataset::new(files.clone()).unwrap();
        assert_eq!(samples(&dataset), expected);
        assert_eq!(dataset.describe(0), "one.tar, a/1 at byte 1536");
        assert_eq!(drain(&WebDatasetStream::new(files).unwrap()), expected);
    }
    let packed = vec![memory("one.tar.gz", &gzip(&one)), memory("two.tar.gz", &gzip(&two))];
    assert_eq!(drain(&WebDatasetStream::new(packed.clone()).unwrap()), expected);
    assert_eq!(WebDataset::new(packed).unwrap_err().kind(), Kind::Argument);
}

#[test]
fn pax_names_and_sizes_and_the_folders_of_ustar() {
    let mut builder = ::tar::Builder::new(Vec::new());
    builder
        .append_pax_extensions([("comment", &b"x=y\n"[..]), ("path", "päx.txt".as_bytes()), ("size", b"3")])
        .unwrap();
    let mut header = ::tar::Header::new_ustar();
    header.set_path("short.txt").unwrap();
    header.set_size(3);
    header.set_cksum();
    builder.append(&header, &b"one"[..]).unwrap();
    let mut header = ::tar::Header::new_ustar();
    let path = format!("{}/file.txt", "d".repeat(120));
    header.set_path(&path).unwrap();
    header.set_size(3);
    header.set_cksum();
    builder.append(&header, &b"two"[..]).unwrap();
    let mut link = ::tar::Header::new_ustar();
    link.set_path("link.txt").unwrap();
    link.set_entry_type(::tar::EntryType::Symlink);
    link.set_size(0);
    link.set_cksum();
    builder.append(&link, &b""[..]).unwrap();
    let bytes = builder.into_inner().unwrap();
    let dataset = WebDataset::new(vec![memory("pax.tar", &bytes)]).unwrap();
    let deep = format!("{}/file", "d".repeat(120));
    assert_eq!(samples(&dataset), [sample("päx", &[("txt", b"one")]), sample(&deep, &[("txt", b"two")])]);
    // Without the blocks of zeros at the end, as some programs leave archives.
    let cut = &bytes[..bytes.len() - 1024];
    assert_eq!(samples(&WebDataset::new(vec![memory("cut.tar", cut)]).unwrap()).len(), 2);
}

#[test]
fn faults_of_archives_are_told_apart() {
    let sound = archive(&[("a.txt", b"one"), ("b.txt", b"two")]);
    let both = |bytes: &[u8]| {
        let indexed = WebDataset::new(vec![memory("x.tar", bytes)]).unwrap_err();
        let stream = WebDatasetStream::new(vec![memory("x.tar", bytes)]).unwrap();
        let mut stream = IterableDataset::open(&stream, 0, None).unwrap();
        let cx = &mut SampleCx::new(0, 0);
        let streamed = loop {
            match stream.next(cx) {
                Ok(Some(_)) => {}
                Ok(None) => panic!("no error"),
                Err(error) => break error,
            }
        };
        assert_eq!(streamed.kind(), indexed.kind());
        assert!(stream.next(cx).unwrap().is_none());
        (indexed.kind(), indexed.offset())
    };
    // A file that belongs to no sample is passed over, but not its missing end.
    let last = archive(&[("a.txt", b"one"), ("README", &[1; 600])]);
    for end in [1536, 1537, 1536 + 599] {
        assert_eq!(both(&last[..end]).0, Kind::Truncated, "{end}");
    }
    assert_eq!(drain(&WebDatasetStream::new(vec![memory("x.tar", &last[..1536 + 600])]).unwrap()).len(), 1);
    let mut sum = sound.clone();
    sum[1024 + 100] ^= 1;
    assert_eq!(both(&sum), (Kind::Malformed, Some(1024)));
    assert_eq!(both(&sound[..1100]), (Kind::Truncated, Some(1024)));
    assert_eq!(both(&sound[..1537]), (Kind::Truncated, Some(1024)));
    assert_eq!(both(&archive(&[("a.txt", b""), ("a.TXT", b"")])), (Kind::DuplicateName, Some(512)));
    assert_eq!(both(b"no archive at all, and shorter than a block"), (Kind::Truncated, Some(0)));
    assert_eq!(both(&[b'x'; 600]), (Kind::Malformed, Some(0)));
    let many: Vec<(String, &[u8])> = (0..2).map(|number| (format!("a.{number}"), &b""[..])).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    assert_eq!(WebDataset::new(vec![memory("x", &archive(&many))]).unwrap().len(), 1);
    let mut huge = ::tar::Header::new_gnu();
    huge.set_path("a.txt").unwrap();
    huge.set_size(u64::MAX / 2);
    huge.set_cksum();
    // A stream does not know how much there is, and refuses what no memory holds.
    let files = vec![memory("x.tar", huge.as_bytes())];
    assert_eq!(WebDataset::new(files.clone()).unwrap_err().kind(), Kind::Truncated);
    let stream = WebDatasetStream::new(files).unwrap();
    let mut stream = IterableDataset::open(&stream, 0, None).unwrap();
    assert_eq!(stream.next(&mut SampleCx::new(0, 0)).unwrap_err().kind(), Kind::Limit);
    let mut name = ::tar::Header::new_gnu();
    name.set_entry_type(::tar::EntryType::GNULongName);
    name.set_size(2 << 20);
    name.set_cksum();
    let name = [&name.as_bytes()[..], &vec![b'n'; 2 << 20]].concat();
    assert_eq!(both(&name), (Kind::Limit, Some(0)));
}

#[test]
fn no_bytes_make_archives_panic() {
    let long = format!("{}.txt", "n".repeat(150));
    let bytes = archive(&[("a.txt", b"one"), (&long, b"two"), ("b.txt", b"three")]);
    // A wrong sum hides what stands behind it, so sums are put right again.
    let resum = |bytes: &mut [u8]| {
        for block in bytes.chunks_exact_mut(512) {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    };
    hostile(&[("x.tar", bytes)], |files| {
        let mut bytes = files[0].read(0, files[0].byte_len()).unwrap();
        for _ in 0..2 {
            let files = vec![memory("x.tar", &bytes)];
            read_some(WebDataset::new(files.clone()));
            drain_some(WebDatasetStream::new(files));
            resum(&mut bytes);
        }
    });
}
