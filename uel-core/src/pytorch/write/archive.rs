//! The zip archive as torch writes it, byte for byte: stored entries whose contents begin on multiples of 64 bytes, each
//! followed by a descriptor with its checksum, so that nothing has to be known of an entry's bytes before they come.

use std::fmt;

/// The folder in the archive that holds all entries. torch takes the file's name where it has one; a fixed name makes a
/// file's bytes depend on nothing but its content.
const FOLDER: &str = "archive";

/// What the contents of entries begin on a multiple of. Torch predicts offsets by it.
pub(super) const ALIGNMENT: u64 = 64;

/// The least value that does not stand in a field of 32 bits, but in one of 64.
const WIDE: u64 = u32::MAX as u64;

const LOCAL_HEADER_BYTES: u64 = 30;
const CENTRAL_HEADER_BYTES: u64 = 46;
const DESCRIPTOR_BYTES: u64 = 16;
const WIDE_DESCRIPTOR_BYTES: u64 = 24;
/// The zip64 end of the directory, its locator and the end of the directory.
const END_BYTES: u64 = 56 + 20 + 22;

/// A descriptor follows the content, and names are UTF-8.
const FLAGS: u16 = 0x0808;
/// As above, for an entry without content, which has no descriptor.
const FLAGS_EMPTY: u16 = 0x0800;

/// An extra field of 64-bit sizes and offsets.
const ZIP64: u16 = 1;
/// The extra field with which torch pads.
const PADDING: &[u8; 2] = b"FB";

/// What an entry is called below the folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Fixed(&'static str),
    /// The storage of that number.
    Storage(usize),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Fixed(name) => write!(f, "{FOLDER}/{name}"),
            Name::Storage(number) => write!(f, "{FOLDER}/data/{number}"),
        }
    }
}

/// An entry with its place in the file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    name: Name,
    /// Where its header begins.
    header: u64,
    /// Where its content begins.
    data: u64,
    byte_len: u64,
}

impl Entry {
    /// An entry whose header begins at `header`; `None` where it would end behind what offsets can say.
    pub(super) fn new(name: Name, header: u64, byte_len: u64) -> Option<Self> {
        let mut entry = Self { name, header, data: 0, byte_len };
        let unpadded = LOCAL_HEADER_BYTES + entry.name_len() + entry.wide_bytes() + PADDING.len() as u64 + 2;
        entry.data = header.checked_add(unpadded)?.checked_next_multiple_of(ALIGNMENT)?;
        // What comes behind the last entry is to fit too.
        entry.data.checked_add(byte_len)?.checked_add(1 << 40).filter(|&end| end <= i64::MAX as u64)?;
        Some(entry)
    }

    /// The offset of its content.
    pub(super) fn data(&self) -> u64 {
        self.data
    }

    /// The bytes of its content.
    pub(super) fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// The offset behind its content and descriptor.
    pub(super) fn end(&self) -> u64 {
        self.data + self.byte_len + self.descriptor_bytes()
    }

    /// What it takes in the directory.
    pub(super) fn directory_bytes(&self) -> u64 {
        let wide = if self.is_wide() { self.wide_bytes() } else { 0 };
        CENTRAL_HEADER_BYTES + self.name_len() + wide
    }

    fn name_len(&self) -> u64 {
        self.name.to_string().len() as u64
    }

    fn is_large(&self) -> bool {
        self.byte_len >= WIDE
    }

    fn is_far(&self) -> bool {
        self.header >= WIDE
    }

    fn is_wide(&self) -> bool {
        self.is_large() || self.is_far()
    }

    /// The bytes of its extra field of 64-bit numbers.
    fn wide_bytes(&self) -> u64 {
        match (self.is_large(), self.is_far()) {
            (false, false) => 0,
            (false, true) => 4 + 8,
            (true, false) => 4 + 16,
            (true, true) => 4 + 24,
        }
    }

    fn descriptor_bytes(&self) -> u64 {
        match (self.byte_len, self.is_wide()) {
            (0, _) => 0,
            (_, false) => DESCRIPTOR_BYTES,
            (_, true) => WIDE_DESCRIPTOR_BYTES,
        }
    }

    fn flags(&self) -> u16 {
        if self.byte_len == 0 { FLAGS_EMPTY } else { FLAGS }
    }

    /// The extra field of 64-bit numbers, with the stored size that is to stand in it.
    fn push_wide(&self, out: &mut Vec<u8>, stored: u64) {
        if !self.is_wide() {
            return;
        }
        push16(out, ZIP64);
        push16(out, self.wide_bytes().saturating_sub(4) as u16);
        if self.is_large() {
            push64(out, self.byte_len);
            push64(out, stored);
        }
        if self.is_far() {
            push64(out, self.header);
        }
    }

    /// The header, which ends where the content begins. Sizes and checksum stand in the descriptor; times are none.
    pub(super) fn push_header(&self, out: &mut Vec<u8>) {
        let name = self.name.to_string();
        let extra = self.data - self.header - LOCAL_HEADER_BYTES - name.len() as u64;
        out.extend_from_slice(b"PK\x03\x04");
        push16(out, 0);
        push16(out, self.flags());
        // The method, "stored", the time and the date, the checksum and two sizes.
        out.extend_from_slice(&[0; 2 + 4 + 12]);
        push16(out, name.len() as u16);
        push16(out, extra as u16);
        out.extend_from_slice(name.as_bytes());
        self.push_wide(out, 0);
        let padding = extra - self.wide_bytes() - 4;
        out.extend_from_slice(PADDING);
        push16(out, padding as u16);
        out.resize(out.len() + padding as usize, b'Z');
    }

    /// What follows the content.
    pub(super) fn push_descriptor(&self, out: &mut Vec<u8>, crc: u32) {
        if self.byte_len == 0 {
            return;
        }
        out.extend_from_slice(b"PK\x07\x08");
        push32(out, crc);
        for _ in 0..2 {
            if self.is_wide() {
                push64(out, self.byte_len);
            } else {
                push32(out, self.byte_len as u32);
            }
        }
    }

    /// What stands in the directory.
    pub(super) fn push_directory(&self, out: &mut Vec<u8>, crc: u32) {
        let name = self.name.to_string();
        let narrow = |wide: u64| wide.min(WIDE) as u32;
        out.extend_from_slice(b"PK\x01\x02");
        push16(out, 0);
        push16(out, 0);
        push16(out, self.flags());
        out.extend_from_slice(&[0; 2 + 4]);
        push32(out, crc);
        push32(out, narrow(self.byte_len));
        push32(out, narrow(self.byte_len));
        push16(out, name.len() as u16);
        push16(out, self.wide_bytes() as u16);
        // No comment, disk 0, no attributes.
        out.extend_from_slice(&[0; 2 + 2 + 2 + 4]);
        push32(out, narrow(self.header));
        out.extend_from_slice(name.as_bytes());
        self.push_wide(out, self.byte_len);
    }
}

/// Appends a whole entry whose content is known.
pub(super) fn push_entry(out: &mut Vec<u8>, entry: &Entry, content: &[u8], crc: u32) {
    entry.push_header(out);
    out.extend_from_slice(content);
    entry.push_descriptor(out, crc);
}

/// The length of a file whose directory begins at `start`.
pub(super) fn end_of_file(start: u64, directory_bytes: u64) -> u64 {
    start + directory_bytes + END_BYTES
}

/// Appends what ends the file: torch always writes the wide form, and the narrow one behind it.
pub(super) fn push_end(out: &mut Vec<u8>, entries: u64, start: u64, directory_bytes: u64) {
    out.extend_from_slice(b"PK\x06\x06");
    push64(out, 44);
    push16(out, 0x031e);
    push16(out, 45);
    out.extend_from_slice(&[0; 8]);
    push64(out, entries);
    push64(out, entries);
    push64(out, directory_bytes);
    push64(out, start);
    out.extend_from_slice(b"PK\x06\x07");
    push32(out, 0);
    push64(out, start + directory_bytes);
    push32(out, 1);
    out.extend_from_slice(b"PK\x05\x06");
    push32(out, 0);
    for _ in 0..2 {
        push16(out, entries.min(u64::from(u16::MAX)) as u16);
    }
    push32(out, directory_bytes.min(WIDE) as u32);
    push32(out, start.min(WIDE) as u32);
    push16(out, 0);
}

fn push16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn push32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn push64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}
