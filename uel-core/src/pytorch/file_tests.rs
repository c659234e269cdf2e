//! Archives made by hand: where their bytes are found, and what is refused.

use super::{Container, PytorchFile, PytorchOptions};
use crate::source::decorators::RecordingSource;
use crate::source::{ByteSource, ByteSourceExt, MemorySource};
use crate::{ByteRange, Kind, Result};
use std::io::Write;
use std::sync::Arc;

/// The pickle of `{"w": <6 floats of storage 0 as shape (2, 3)>, "t": <the same transposed>}`.
fn pickle() -> Vec<u8> {
    pickle_of("K\x02K\x03<", "K\x03K\x01<")
}

/// The same with another size and stride of `w`.
fn pickle_of(size: &str, stride: &str) -> Vec<u8> {
    let storage = "(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ";
    let tensor = |size: &str, stride: &str| {
        format!("ctorch._utils\n_rebuild_tensor_v2\n({storage}K\0{size}{stride}\u{89}ccollections\nOrderedDict\n)RtR")
    };
    // NEWFALSE is a byte of its own, not UTF-8.
    let body = format!("}}(X\x01\0\0\0w{}X\x01\0\0\0t{}u.", tensor(size, stride), tensor("K\x03K\x02<", "K\x01K\x03<"));
    let mut bytes = vec![0x80, 2];
    for c in body.chars() {
        match c {
            '<' => bytes.push(0x86),
            c => bytes.push(c as u8),
        }
    }
    bytes
}

fn floats() -> Vec<u8> {
    (0..6).flat_map(|n| (n as f32).to_le_bytes()).collect()
}

fn archive(entries: &[(&str, &[u8])], alignment: Option<u16>) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let mut options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        if let Some(alignment) = alignment {
            options = options.with_alignment(alignment);
        }
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn open(bytes: Vec<u8>) -> Result<PytorchFile> {
    PytorchFile::open(Arc::new(MemorySource::new("model.pth", bytes)), &PytorchOptions::new())
}

fn read(file: &PytorchFile, name: &str) -> Vec<f32> {
    let info = file.index().get(name).unwrap();
    let bytes = file.sources()[info.file()].read_range(info.range()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

#[test]
fn reads_what_is_aligned_and_what_is_not() {
    for alignment in [None, Some(64)] {
        let entries: [(&str, &[u8]); 3] =
            [("model/data.pkl", &pickle()), ("model/data/0", &floats()), ("model/version", b"3\n")];
        let file = open(archive(&entries, alignment)).unwrap();
        assert_eq!(file.container(), Container::Zip);
        assert_eq!(read(&file, "w"), [0., 1., 2., 3., 4., 5.]);
        assert_eq!(read(&file, "t"), [0., 3., 1., 4., 2., 5.]);
        assert_eq!(file.index().get("w").unwrap().file(), 0);
        assert_eq!(file.index().get("t").unwrap().file(), 1);
        assert_eq!(file.detail("t").unwrap().strides, [4, 12]);
        assert_eq!(file.entries().len(), 3);
        for position in 0..3 {
            file.check_entry(position).unwrap();
        }
    }
}

#[test]
fn big_endian_numbers_are_swapped() {
    let big: Vec<u8> = (0..6).flat_map(|n| (n as f32).to_be_bytes()).collect();
    let entries: [(&str, &[u8]); 3] = [("m/data.pkl", &pickle()), ("m/byteorder", b"big"), ("m/data/0", &big)];
    let file = open(archive(&entries, None)).unwrap();
    assert!(file.is_big_endian());
    assert_eq!(read(&file, "w"), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(read(&file, "t"), [0., 3., 1., 4., 2., 5.]);
    let entries: [(&str, &[u8]); 3] = [("m/data.pkl", &pickle()), ("m/byteorder", b"pdp"), ("m/data/0", &big)];
    assert_eq!(open(archive(&entries, None)).unwrap_err().kind(), Kind::Archive);
}

#[test]
fn refuses_archives_that_are_no_checkpoint() {
    let kind = |entries: &[(&str, &[u8])]| open(archive(entries, None)).unwrap_err().kind();
    assert_eq!(kind(&[("a/readme", b"hello")]), Kind::UnknownFormat);
    assert_eq!(kind(&[("a/data.pkl", &pickle()), ("b/data.pkl", &pickle())]), Kind::Archive);
    assert_eq!(kind(&[("a/data.pkl", &pickle())]), Kind::MissingField);
    assert_eq!(kind(&[("a/data.pkl", &pickle()), ("a/data/0", &floats()[..20])]), Kind::Truncated);
    assert_eq!(kind(&[("a/data.pkl", b"\x80\x02K\x01"), ("a/data/0", &floats())]), Kind::UnexpectedEof);
}

/// Eight storages, as torch lays them out.
fn many() -> Vec<u8> {
    let pickle = pickle();
    let floats = floats();
    let others: Vec<String> = (1..8).map(|n| format!("model/data/{n}")).collect();
    let mut entries: Vec<(&str, &[u8])> = vec![("model/data.pkl", &pickle), ("model/data/0", &floats)];
    entries.extend(others.iter().map(|name| (name.as_str(), floats.as_slice())));
    archive(&entries, Some(64))
}

#[test]
fn a_tensor_is_read_with_its_local_header_in_one_request() {
    let source = Arc::new(RecordingSource::new(MemorySource::new("model.pth", many())));
    let file = PytorchFile::open(Arc::clone(&source) as Arc<dyn ByteSource>, &PytorchOptions::new()).unwrap();
    let info = file.index().get("w").unwrap();
    let before = source.reads().len();
    file.sources()[0].read_range(info.range()).unwrap();
    let reads = source.reads();
    let [only] = reads.get(before..).unwrap() else { panic!("{reads:?}") };
    assert!(only.contains(info.range()) && only.byte_len() < info.range().byte_len() + 128);
    // The header was compared once.
    file.sources()[0].read_range(info.range()).unwrap();
    assert_eq!(source.reads().last().unwrap(), &info.range());
}

#[test]
fn a_local_header_that_contradicts_the_directory_is_refused_when_it_is_used() {
    let bytes = many();
    let start = open(bytes.clone()).unwrap().index().get("w").unwrap().range().start() as usize;
    let header = bytes[..start].windows(4).rposition(|four| four == b"PK\x03\x04").unwrap();
    // Signature, method, size, name.
    for (at, what) in [(0, "signature"), (8, "method"), (22, "size"), (31, "name")] {
        let mut broken = bytes.clone();
        broken[header + at] ^= 1;
        let file = open(broken).unwrap();
        let info = file.index().get("w").unwrap();
        for error in [
            file.sources()[0].read_range(info.range()).unwrap_err(),
            file.sources()[0].check(info.range()).unwrap_err(),
            file.sources()[0].read_range(ByteRange::from_len(info.range().start() + 1, 4).unwrap()).unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Archive, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
    }
}

#[test]
fn a_flipped_bit_is_found_by_its_crc() {
    let mut bytes = many();
    let range = open(bytes.clone()).unwrap().index().get("w").unwrap().range();
    bytes[range.start() as usize + 5] ^= 4;
    let file = open(bytes).unwrap();
    let position = file.entries().position(|(name, _)| name == "model/data/0").unwrap();
    assert_eq!(file.check_entry(position).unwrap_err().kind(), Kind::HashMismatch);
    // The pickle is compared whenever the file is opened.
    let mut bytes = many();
    let at = bytes.windows(8).position(|eight| eight == b"storagec").unwrap();
    bytes[at] ^= 1;
    assert_eq!(open(bytes).unwrap_err().kind(), Kind::HashMismatch);
}

#[test]
fn every_truncation_and_every_flipped_bit_ends_in_a_value() {
    let bytes = many();
    for len in 0..bytes.len() {
        assert!(open(bytes[..len].to_vec()).is_err(), "{len} bytes");
    }
    for at in 0..bytes.len() {
        for bit in [0x01, 0x80] {
            let mut broken = bytes.clone();
            broken[at] ^= bit;
            if let Ok(file) = open(broken) {
                for info in file.index().iter() {
                    let _ = file.sources()[info.file()].read_range(info.range());
                }
            }
        }
    }
}

#[test]
fn opens_archives_of_many_entries() {
    let (pickle, floats) = (pickle(), floats());
    let others: Vec<String> = (1..12_000).map(|n| format!("bf16-2000000000-10000/data/{n}")).collect();
    let mut entries: Vec<(&str, &[u8])> =
        vec![("bf16-2000000000-10000/data.pkl", &pickle), ("bf16-2000000000-10000/data/0", &floats)];
    entries.extend(others.iter().map(|name| (name.as_str(), floats.as_slice())));
    let file = open(archive(&entries, Some(64))).unwrap();
    assert_eq!(file.entries().len(), 12_001);
    assert_eq!(read(&file, "w"), [0., 1., 2., 3., 4., 5.]);
}

/// Two tensors whose bytes lie in one shared read: the second one's local header is compared too.
#[test]
fn a_read_that_reaches_into_the_next_entry_compares_its_header() {
    let bytes = many();
    let first = open(bytes.clone()).unwrap().index().get("w").unwrap().range();
    let header = first.end() as usize;
    assert_eq!(&bytes[header..header + 4], b"PK\x03\x04");
    let mut broken = bytes;
    broken[header] ^= 1;
    let file = open(broken).unwrap();
    let both = ByteRange::from_len(first.start(), 300).unwrap();
    let error = file.sources()[0].read_range(both).unwrap_err();
    assert!(error.to_string().contains("signature"), "{error}");
}

#[test]
fn tensors_without_bytes_lie_at_the_beginning_of_the_file() {
    // Big-endian, so that everything else is made from the file.
    let pickle = pickle_of("K\0K\x03<", "K\x03K\x01<");
    let entries: [(&str, &[u8]); 3] = [("m/data.pkl", &pickle), ("m/byteorder", b"big"), ("m/data/0", &floats())];
    let file = open(archive(&entries, None)).unwrap();
    for info in file.index().iter() {
        assert!(info.file() < file.sources().len());
        file.sources()[info.file()].read_range(info.range()).unwrap();
    }
    assert_eq!(file.index().get("w").unwrap().range(), ByteRange::default());
}
