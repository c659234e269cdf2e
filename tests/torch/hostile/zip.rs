//! Zip archives written by hand, so that any field can lie.

/// What the local header and the directory each say of an entry.
#[derive(Clone)]
pub(super) struct Fields {
    pub(super) name: Vec<u8>,
    pub(super) flags: u16,
    pub(super) method: u16,
    pub(super) crc: u32,
    pub(super) compressed: u32,
    pub(super) size: u32,
    pub(super) extra: Vec<u8>,
}

#[derive(Clone)]
pub(super) struct Entry {
    /// As they stand in the file.
    pub(super) data: Vec<u8>,
    pub(super) local: Fields,
    pub(super) central: Fields,
    /// Where the directory says that the local header stands, if not where it does.
    pub(super) offset: Option<u32>,
}

impl Entry {
    pub(super) fn stored(name: &str, data: impl Into<Vec<u8>>) -> Self {
        let data = data.into();
        let len = data.len() as u32;
        let fields = Fields {
            name: name.as_bytes().to_vec(),
            flags: 0x800,
            method: 0,
            crc: crc32(&data),
            compressed: len,
            size: len,
            extra: Vec::new(),
        };
        Self { data, local: fields.clone(), central: fields, offset: None }
    }

    /// An entry that says it inflates to `size` bytes.
    pub(super) fn deflated(name: &str, data: Vec<u8>, size: u32) -> Self {
        Self::stored(name, data).both(|fields| (fields.method, fields.size) = (8, size))
    }

    pub(super) fn both(mut self, change: impl Fn(&mut Fields)) -> Self {
        change(&mut self.local);
        change(&mut self.central);
        self
    }

    pub(super) fn local(mut self, change: impl Fn(&mut Fields)) -> Self {
        change(&mut self.local);
        self
    }

    pub(super) fn at(mut self, offset: u32) -> Self {
        self.offset = Some(offset);
        self
    }
}

/// The record at the end; what is not given is true.
#[derive(Default)]
pub(super) struct End {
    pub(super) disk: u16,
    pub(super) count: Option<u16>,
    pub(super) directory_bytes: Option<u32>,
    pub(super) directory_offset: Option<u32>,
    /// Stands between the directory and the end record.
    pub(super) before: Vec<u8>,
    pub(super) comment: Vec<u8>,
}

pub(super) fn archive(entries: &[Entry]) -> Vec<u8> {
    archive_with(entries, &End::default())
}

pub(super) fn archive_with(entries: &[Entry], end: &End) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let offset = entry.offset.unwrap_or(file.len() as u32);
        file.extend(b"PK\x03\x04\x14\x00");
        file.extend(fields(&entry.local));
        file.extend((entry.local.name.len() as u16).to_le_bytes());
        file.extend((entry.local.extra.len() as u16).to_le_bytes());
        file.extend(&entry.local.name);
        file.extend(&entry.local.extra);
        file.extend(&entry.data);
        directory.extend(b"PK\x01\x02\x14\x00\x14\x00");
        directory.extend(fields(&entry.central));
        directory.extend((entry.central.name.len() as u16).to_le_bytes());
        directory.extend((entry.central.extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(&entry.central.name);
        directory.extend(&entry.central.extra);
    }
    let start = file.len() as u32;
    let count = end.count.unwrap_or(entries.len() as u16);
    file.extend(&directory);
    file.extend(&end.before);
    file.extend(b"PK\x05\x06");
    for number in [end.disk, end.disk, count, count] {
        file.extend(number.to_le_bytes());
    }
    file.extend(end.directory_bytes.unwrap_or(directory.len() as u32).to_le_bytes());
    file.extend(end.directory_offset.unwrap_or(start).to_le_bytes());
    file.extend((end.comment.len() as u16).to_le_bytes());
    file.extend(&end.comment);
    file
}

fn fields(fields: &Fields) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(fields.flags.to_le_bytes());
    bytes.extend(fields.method.to_le_bytes());
    bytes.extend([0; 4]);
    for number in [fields.crc, fields.compressed, fields.size] {
        bytes.extend(number.to_le_bytes());
    }
    bytes
}

/// The ZIP64 end record and its locator, which says that the record stands at `at`.
pub(super) fn zip64_end(count: u64, directory_bytes: u64, directory_offset: u64, at: u64) -> Vec<u8> {
    let mut bytes = b"PK\x06\x06".to_vec();
    bytes.extend(44u64.to_le_bytes());
    bytes.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for number in [count, count, directory_bytes, directory_offset] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(b"PK\x06\x07\x00\x00\x00\x00");
    bytes.extend(at.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes
}

/// The ZIP64 extra field with an entry's size and compressed size.
pub(super) fn zip64_extra(size: u64, compressed: u64) -> Vec<u8> {
    let mut bytes = vec![1, 0, 16, 0];
    bytes.extend(size.to_le_bytes());
    bytes.extend(compressed.to_le_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, &byte: &u8| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    };
    !bytes.iter().fold(!0, step)
}

/// A deflate stream of about `size` zero bytes, 1032 to one: a block whose code for "repeat 258 zeros" has two bits, both
/// zero, so that the stream is itself zeros.
pub(super) fn deflated_zeros(size: usize) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.put(0b101, 3); // the last block, with its own codes
    bits.put(29, 5); // 286 literal and length codes
    bits.put(0, 5); // 1 distance code
    bits.put(14, 4); // 18 code length codes, in the order that the format gives
    // Lengths of the codes for lengths: 18 (many zeros), 1 and 2 have two bits, 0 has two.
    for symbol in [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1] {
        bits.put(if [0, 1, 2, 18].contains(&symbol) { 2 } else { 0 }, 3);
    }
    // Codes by symbol: 0 is 00, 1 is 01, 2 is 10, 18 is 11; codes go in with their first bit first.
    let (one, two) = (|bits: &mut Bits| bits.code(0b01, 2), |bits: &mut Bits| bits.code(0b10, 2));
    let zeros = |bits: &mut Bits, count: u32| {
        bits.code(0b11, 2);
        bits.put(count - 11, 7);
    };
    two(&mut bits); // literal 0
    zeros(&mut bits, 138);
    zeros(&mut bits, 117);
    two(&mut bits); // 256, the end of the block
    zeros(&mut bits, 28);
    one(&mut bits); // 285, a length of 258
    one(&mut bits); // distance 1
    bits.code(0b10, 2); // a zero to repeat
    for _ in 0..size / 258 {
        bits.code(0, 1);
        bits.code(0, 1);
    }
    bits.code(0b11, 2);
    bits.bytes
}

#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    /// The lowest bit first, as numbers go in.
    fn put(&mut self, number: u32, bits: usize) {
        for bit in 0..bits {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= u8::from(number >> bit & 1 == 1) << (self.used % 8);
            self.used += 1;
        }
    }

    /// The highest bit first, as codes go in.
    fn code(&mut self, code: u32, bits: usize) {
        for bit in (0..bits).rev() {
            self.put(code >> bit, 1);
        }
    }
}

#[test]
fn the_bomb_inflates() {
    use std::io::Read as _;
    let size = 258 * 4000 + 1;
    let stream = deflated_zeros(size);
    assert!(stream.len() < 1100);
    let mut inflated = Vec::new();
    flate2::read::DeflateDecoder::new(stream.as_slice()).read_to_end(&mut inflated).unwrap();
    assert!(inflated.len() == size && inflated.iter().all(|&byte| byte == 0));
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}
