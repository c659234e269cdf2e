use std::io::{Cursor, Write as _};

use super::*;
use crate::Dataset;
use crate::Value;
use crate::formats::testkit::*;

/// An .npy file of version 1.
pub(crate) fn npy(descr: &str, fortran: bool, shape: &str, elements: &[u8]) -> Vec<u8> {
    let order = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(elements);
    bytes
}

#[test]
fn arrays_in_both_orders_and_all_versions() {
    let folder = Folder::new();
    let plain = npy("<i2", false, "(2, 3)", &[1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]);
    let fortran = npy(">i2", true, "(2, 3)", &[0, 1, 0, 4, 0, 2, 0, 5, 0, 3, 0, 6]);
    let mut second = b"\x93NUMPY\x02\x00".to_vec();
    second.extend(((plain.len() - 12 - 10) as u32).to_le_bytes());
    second.extend(&plain[10..]);
    for bytes in [&plain, &fortran, &second] {
        for file in [memory("x.npy", bytes), folder.open("x.npy", bytes)] {
            let dataset = Npy::new([("x", file)]).unwrap();
            assert_eq!(get(&dataset, 1).get("x"), Some(&array(&[3], vec![4i16, 5, 6])));
            check(&dataset);
        }
    }
    let cube: Vec<u8> = (0..24).collect();
    let cube = Npy::new([("x", memory("c", &npy("|u1", true, "(2, 3, 4)", &cube)))]).unwrap();
    // Element [1, 2, 3] is the last in either order; [1, j, k] lies at 1 + 2j + 6k.
    let expected: Vec<u8> = (0..3).flat_map(|j| (0..4).map(move |k| 1 + 2 * j + 6 * k)).collect();
    assert_eq!(get(&cube, 1).get("x"), Some(&array(&[3, 4], expected)));
    let shards = vec![memory("0.npy", &plain), memory("1.npy", &plain)];
    let shards = Npy::sharded([("x", shards)]).unwrap();
    assert_eq!((shards.len(), shards.describe(3)), (4, "1.npy, row 1 at byte 134".to_owned()));
    check(&shards);
    let other = vec![memory("0.npy", &plain), memory("1.npy", &npy("<i4", false, "(1, 3)", &[0; 12]))];
    assert_eq!(Npy::sharded([("x", other)]).unwrap_err().kind(), Kind::ShapeMismatch);
}

#[test]
fn faults_of_npy_files_are_told_apart() {
    let kind = |bytes: &[u8]| Npy::new([("x", memory("x.npy", bytes))]).unwrap_err().kind();
    assert_eq!(kind(b"\x93NUMPX\x01\x00\x00\x00"), Kind::UnknownFormat);
    assert_eq!(kind(b"\x93NUMPY\x04\x00\x00\x00"), Kind::UnknownFormat);
    assert_eq!(kind(b"\x93NUMPY\x01\x00\xff\x00{}"), Kind::HeaderTruncated);
    assert_eq!(kind(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"), Kind::HeaderTooLarge);
    assert_eq!(kind(&npy("<f4", false, "()", &[0; 4])), Kind::ShapeMismatch);
    assert_eq!(kind(&npy("<f4", false, "(2,)", &[0; 7])), Kind::Truncated);
    assert_eq!(kind(&npy("<f4", true, "(4294967296, 4294967296, 4294967296)", &[0; 8])), Kind::Truncated);
    assert_eq!(kind(&npy("<c8", false, "(1,)", &[0; 8])), Kind::UnsupportedDtype);
    assert_eq!(kind(&npy("<f16", false, "(1,)", &[0; 16])), Kind::UnsupportedDtype);
}

/// An .npz archive, stored or deflated.
fn npz(members: &[(&str, Vec<u8>)], deflated: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut directory = Vec::new();
    for (name, content) in members {
        let packed = if deflated {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap()
        } else {
            content.clone()
        };
        let mut fields = vec![20u8, 0, 0, 0, if deflated { 8 } else { 0 }, 0, 0, 0, 0, 0];
        fields.extend(crc32fast::hash(content).to_le_bytes());
        fields.extend((packed.len() as u32).to_le_bytes());
        fields.extend((content.len() as u32).to_le_bytes());
        fields.extend((name.len() as u16).to_le_bytes());
        fields.extend([0, 0]);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&fields);
        directory.extend([0; 10]);
        directory.extend((bytes.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        bytes.extend(b"PK\x03\x04");
        bytes.extend(&fields);
        bytes.extend(name.as_bytes());
        bytes.extend(packed);
    }
    let start = bytes.len() as u32;
    bytes.extend(&directory);
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([(members.len() as u16).to_le_bytes(), (members.len() as u16).to_le_bytes()].concat());
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend(start.to_le_bytes());
    bytes.extend([0, 0]);
    bytes
}

fn members() -> [(&'static str, Vec<u8>); 2] {
    [
        ("x.npy", npy("<f4", false, "(2, 1)", &[1f32, 2.].map(f32::to_le_bytes).concat())),
        ("y.npy", npy("|b1", false, "(2,)", &[0, 1])),
    ]
}

#[test]
fn members_of_archives_stored_and_deflated() {
    let folder = Folder::new();
    for deflated in [false, true] {
        let bytes = npz(&members(), deflated);
        zip::ZipArchive::new(Cursor::new(&bytes)).unwrap();
        for file in [memory("a.npz", &bytes), folder.open("a.npz", &bytes)] {
            let dataset = Npy::from_npz(&file, &[]).unwrap();
            let expected = Value::map([("x", array(&[1], vec![2f32])), ("y", array(&[], vec![1u8]))]);
            assert_eq!(get(&dataset, 1), expected);
            check(&dataset);
            assert_eq!(get(&Npy::from_npz(&file, &["y"]).unwrap(), 0), Value::map([("y", array(&[], vec![0u8]))]));
            assert_eq!(Npy::from_npz(&file, &["z"]).unwrap_err().kind(), Kind::UnknownTensor);
        }
        let mut torn = bytes.clone();
        torn[0] = b'Q';
        assert_eq!(Npy::from_npz(&memory("a", &torn), &[]).unwrap_err().kind(), Kind::Archive);
    }
    // Rows of stored members are read one by one: only a reading of all of it tells.
    let mut flipped = npz(&members(), false);
    assert!(Npy::verify_npz(&memory("a", &flipped), &[]).is_ok());
    let value = flipped.windows(4).position(|bytes| bytes == 2f32.to_le_bytes()).unwrap();
    flipped[value] ^= 1;
    assert!(Npy::from_npz(&memory("a", &flipped), &[]).is_ok());
    assert!(Npy::verify_npz(&memory("a", &flipped), &["y"]).is_ok());
    let error = Npy::verify_npz(&memory("a", &flipped), &[]).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::HashMismatch, Some("x")));
    let mut wrong = npz(&members(), true);
    let directory = wrong.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    wrong[directory + 16] ^= 1;
    assert_eq!(Npy::from_npz(&memory("a", &wrong), &[]).unwrap_err().kind(), Kind::HashMismatch);
    wrong[directory + 16] ^= 1;
    wrong[directory + 27] = 0xff;
    assert_eq!(Npy::from_npz(&memory("a", &wrong), &[]).unwrap_err().kind(), Kind::Limit);
    assert_eq!(Npy::from_npz(&memory("a", b"PK"), &[]).unwrap_err().kind(), Kind::Archive);
}

#[test]
fn no_bytes_make_arrays_panic() {
    let elements: Vec<u8> = (0..48).collect();
    for fortran in [false, true] {
        hostile(&[("x", npy(">f8", fortran, "(2, 3)", &elements))], |files| {
            read_some(Npy::new([("x", files[0].clone())]));
        });
    }
    for deflated in [false, true] {
        hostile(&[("x", npz(&members(), deflated))], |files| read_some(Npy::from_npz(&files[0], &[])));
    }
}
