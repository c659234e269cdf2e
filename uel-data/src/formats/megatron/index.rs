//! The .idx file of a Megatron dataset, in its two kinds.

use uel_core::{Dtype, Kind, Result};

use crate::formats::DataFile;

/// The kind that Megatron writes today, and the older one that it has from fairseq.
const MAPPED: [u8; 9] = *b"MMIDIDX\0\0";
const CACHED: [u8; 8] = *b"TNTIDX\0\0";

/// Where the sequences lie in the .bin file.
#[derive(Clone, Debug)]
pub(super) struct Index {
    pub(super) dtype: Dtype,
    /// Where each sequence begins, in bytes.
    pub(super) starts: Vec<u64>,
    /// How many tokens it has.
    pub(super) lens: Vec<u64>,
    /// At which sequence each document begins, and behind the last one how many sequences there are.
    pub(super) documents: Vec<u64>,
}

impl Index {
    /// Reads an .idx file and compares it with the length of its .bin file.
    pub(super) fn read(idx: &DataFile, bin: &DataFile) -> Result<Self> {
        let mut reader = Cursor { file: idx, at: 0 };
        let index = if idx.read(0, idx.byte_len().min(9))? == MAPPED {
            reader.at = 9;
            Self::mapped(&mut reader)?
        } else if idx.read(0, idx.byte_len().min(8))? == CACHED {
            reader.at = 8;
            Self::cached(&mut reader)?
        } else {
            return Err(idx
                .error(Kind::UnknownFormat, 0, "the file is no index of Megatron's")
                .with_expected("MMIDIDX or TNTIDX"));
        };
        index.check(idx, bin)?;
        Ok(index)
    }

    fn mapped(reader: &mut Cursor<'_>) -> Result<Self> {
        reader.version()?;
        let [code] = reader.array::<1>()?;
        let dtype = dtype_of(u64::from(code), None, reader)?;
        let (sequences, documents) = (reader.number()?, reader.number()?);
        let lens = reader.numbers(sequences, 4)?;
        let starts = reader.numbers(sequences, 8)?;
        let documents = reader.numbers(documents, 8)?;
        // Multimodal datasets have a mode for each sequence behind.
        let rest = reader.file.byte_len() - reader.at;
        if rest != 0 && rest != sequences {
            return Err(reader
                .error(Kind::TrailingBytes, "bytes behind the index belong to nothing")
                .with_expected(format!("none, or {sequences}"))
                .with_got(format!("{rest} bytes")));
        }
        Ok(Self { dtype, starts, lens, documents })
    }

    fn cached(reader: &mut Cursor<'_>) -> Result<Self> {
        reader.version()?;
        let (code, width) = (reader.number()?, reader.number()?);
        let dtype = dtype_of(code, Some(width), reader)?;
        let (tensors, sizes) = (reader.number()?, reader.number()?);
        // fairseq's own files have neither the number of documents nor their list.
        let plain =
            tensors.checked_add(1).and_then(|offsets| offsets.checked_mul(2)?.checked_add(sizes)?.checked_mul(8));
        let rest = reader.file.byte_len() - reader.at;
        let documents = if plain == Some(rest) { None } else { Some(reader.number()?) };
        let offsets =
            tensors.checked_add(1).ok_or_else(|| reader.error(Kind::Overflow, "the number of tensors is too large"))?;
        let dims = reader.numbers(offsets, 8)?;
        let starts = reader.numbers(offsets, 8)?;
        let sizes = reader.numbers(sizes, 8)?;
        let documents = match documents {
            Some(documents) => reader.numbers(documents, 8)?,
            None => (0..=tensors).collect(),
        };
        if reader.at != reader.file.byte_len() {
            return Err(reader.error(Kind::TrailingBytes, "bytes behind the index belong to nothing"));
        }
        let mut lens = Vec::new();
        for dims in dims.windows(2) {
            let &[from, to] = dims else { continue };
            let shape =
                usize::try_from(from).ok().zip(usize::try_from(to).ok()).and_then(|(from, to)| sizes.get(from..to));
            let len = shape.and_then(|shape| shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim)));
            lens.push(len.ok_or_else(|| {
                reader
                    .error(Kind::Malformed, "the shape of a tensor lies outside the list of sizes")
                    .with_expected(format!("at most {}", sizes.len()))
                    .with_got(format!("{from}..{to}"))
            })?);
        }
        let width = u64::from(dtype.bits() / 8);
        let in_bytes = starts.iter().take(lens.len()).map(|&start| start.checked_mul(width));
        let starts = in_bytes.collect::<Option<_>>();
        let starts = starts.ok_or_else(|| reader.error(Kind::Overflow, "a sequence begins too far back"))?;
        Ok(Self { dtype, starts, lens, documents })
    }

    /// Every sequence lies in the .bin file, and documents are runs of sequences.
    fn check(&self, idx: &DataFile, bin: &DataFile) -> Result<()> {
        let width = u64::from(self.dtype.bits() / 8);
        for (number, (&start, &len)) in self.starts.iter().zip(&self.lens).enumerate() {
            let end = len.checked_mul(width).and_then(|byte_len| start.checked_add(byte_len));
            if end.is_none_or(|end| end > bin.byte_len()) {
                return Err(bin
                    .error(Kind::Truncated, start, format!("sequence {number} reaches behind the end of the file"))
                    .with_expected(format!("{len} tokens of {}", self.dtype))
                    .with_got(format!("{} bytes", bin.byte_len().saturating_sub(start))));
            }
        }
        let sequences = self.starts.len() as u64;
        let rising = self.documents.windows(2).all(|pair| matches!(pair, [from, to] if from <= to));
        let ends = match (self.documents.first(), self.documents.last()) {
            (Some(&first), Some(&last)) => first == 0 && last == sequences,
            _ => sequences == 0,
        };
        if !rising || !ends {
            return Err(idx
                .error(Kind::Malformed, 0, "the list of documents is not one of rising numbers of sequences")
                .with_expected(format!("0 to {sequences}"))
                .with_got(format!("{:?} to {:?}", self.documents.first(), self.documents.last())));
        }
        Ok(())
    }
}

/// The dtype of Megatron's number for it. Older files have doubles under the number of floats, which the width tells.
fn dtype_of(code: u64, width: Option<u64>, reader: &Cursor<'_>) -> Result<Dtype> {
    let dtype = match (code, width) {
        (1, _) => Dtype::U8,
        (2, _) => Dtype::I8,
        (3, _) => Dtype::I16,
        (4, _) => Dtype::I32,
        (5, _) => Dtype::I64,
        (6, _) | (7, Some(8)) => Dtype::F64,
        (7, _) => Dtype::F32,
        (8, _) => Dtype::U16,
        _ => {
            return Err(reader
                .error(Kind::UnknownDtype, "the element type is none of Megatron's")
                .with_expected("1 to 8")
                .with_got(code));
        }
    };
    match width {
        Some(width) if width != u64::from(dtype.bits() / 8) => Err(reader
            .error(Kind::SizeMismatch, "the element size is not that of the element type")
            .with_expected(dtype)
            .with_got(format!("{width} bytes"))),
        _ => Ok(dtype),
    }
}

struct Cursor<'a> {
    file: &'a DataFile,
    at: u64,
}

impl Cursor<'_> {
    fn error(&self, kind: Kind, message: &str) -> uel_core::Error {
        self.file.error(kind, self.at, message)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.file.array(self.at)?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn number(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn version(&mut self) -> Result<()> {
        match self.number()? {
            1 => Ok(()),
            other => Err(self
                .error(Kind::UnknownFormat, "the version of the index is unknown")
                .with_expected(1)
                .with_got(other)),
        }
    }

    /// `count` numbers of 4 or 8 bytes that are not negative. Memory is reserved only where the file has as many.
    fn numbers(&mut self, count: u64, width: u64) -> Result<Vec<u64>> {
        let byte_len = count
            .checked_mul(width)
            .filter(|&byte_len| self.file.check(self.at, byte_len).is_ok())
            .ok_or_else(|| {
                self.error(Kind::Truncated, "the index is shorter than its lists")
                    .with_expected(format!("{count} numbers of {width} bytes"))
                    .with_got(format!("{} bytes", self.file.byte_len().saturating_sub(self.at)))
            })?;
        let bytes = self.file.read(self.at, byte_len)?;
        let numbers: Option<Vec<u64>> = match width {
            4 => bytes.as_chunks().0.iter().map(|&number| u64::try_from(i32::from_le_bytes(number)).ok()).collect(),
            _ => bytes.as_chunks().0.iter().map(|&number| u64::try_from(i64::from_le_bytes(number)).ok()).collect(),
        };
        let numbers = numbers.ok_or_else(|| self.error(Kind::Malformed, "a number of the index is negative"))?;
        self.at += byte_len;
        Ok(numbers)
    }
}
