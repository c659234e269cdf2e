//! Files byte by byte, without any of the writer's care.

/// Numbers of types of values.
pub(crate) const U32: u32 = 4;
pub(crate) const BOOL: u32 = 7;
pub(crate) const STRING: u32 = 8;
pub(crate) const ARRAY: u32 = 9;

/// A file up to some byte.
#[derive(Clone)]
pub(crate) struct Raw {
    bytes: Vec<u8>,
    wide: bool,
    big: bool,
}

impl Raw {
    /// Magic and version.
    pub(crate) fn new(version: u32) -> Self {
        let raw = Self { bytes: b"GGUF".to_vec(), wide: version != 1, big: false };
        raw.u32(version)
    }

    pub(crate) fn big_endian() -> Self {
        let raw = Self { bytes: b"GGUF".to_vec(), wide: true, big: true };
        raw.u32(3)
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        let bytes = if self.big { value.to_be_bytes() } else { value.to_le_bytes() };
        self.bytes(&bytes)
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        let bytes = if self.big { value.to_be_bytes() } else { value.to_le_bytes() };
        self.bytes(&bytes)
    }

    /// A length, count or dimension.
    pub(crate) fn length(self, value: u64) -> Self {
        if self.wide { self.u64(value) } else { self.u32(value as u32) }
    }

    /// How many tensors and entries there are.
    pub(crate) fn counts(self, tensors: u64, entries: u64) -> Self {
        self.length(tensors).length(entries)
    }

    pub(crate) fn string(self, text: impl AsRef<[u8]>) -> Self {
        let text = text.as_ref();
        self.length(text.len() as u64).bytes(text)
    }

    /// A key and the type of its value.
    pub(crate) fn key(self, key: &str, value_type: u32) -> Self {
        self.string(key).u32(value_type)
    }

    /// The beginning of an array.
    pub(crate) fn array(self, element: u32, len: u64) -> Self {
        self.u32(element).length(len)
    }

    /// A tensor info, its dimensions in the order of the file.
    pub(crate) fn info(self, name: &str, dims: &[u64], dtype: u32, offset: u64) -> Self {
        let raw = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, &dim| raw.length(dim)).u32(dtype).u64(offset)
    }

    /// Padding up to the alignment, and so many bytes of data.
    pub(crate) fn data(mut self, alignment: usize, byte_len: usize) -> Vec<u8> {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment) + byte_len, 7);
        self.bytes
    }

    pub(crate) fn end(self) -> Vec<u8> {
        self.bytes
    }

    /// How many bytes there are so far.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// A small file with a number, a string, strings and nested arrays, and two tensors, the second of Q4_0.
pub(crate) fn small(raw: Raw) -> Vec<u8> {
    let raw = raw.counts(2, 4).key("n", U32).u32(7).key("s", STRING).string("text");
    let raw = raw.key("t", ARRAY).array(STRING, 2).string("a").string("bc");
    let raw = raw.key("nested", ARRAY).array(ARRAY, 2).array(BOOL, 1).bytes(&[1]).array(U32, 1).u32(5);
    raw.info("a", &[2], 0, 0).info("b", &[32, 2], 2, 32).data(32, 68)
}
