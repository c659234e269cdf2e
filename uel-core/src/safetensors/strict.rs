//! The decoder of [`Rules::Strict`](super::Rules::Strict): one pass over the header, then one over the offsets.

use super::fast;
use super::faults::Faults;
use super::header::{Metadata, PREFIX_BYTES};
use super::json::{Scanner, Typed, space_end};
use crate::index::{Entries, TensorIndex, TensorInfo, check_size};
use crate::{ByteRange, Dtype, Error, Kind, Result, limits};
use std::collections::HashMap;
use std::collections::btree_map::Entry;

pub(super) struct Decoded {
    pub(super) index: TensorIndex,
    pub(super) metadata: Option<Metadata>,
}

/// The tensors of a sound header.
pub(super) fn decode(json: &[u8], file_len: u64) -> Result<Decoded> {
    Decoder::new(json, file_len, Faults::Stop)?.run()
}

/// Every fault, and what was decoded where there is none.
pub(super) fn faults(json: &[u8], file_len: u64) -> Result<Decoded, Vec<Error>> {
    let mut decoder = Decoder::new(json, file_len, Faults::collect()).map_err(|error| vec![error])?;
    let decoded = decoder.run();
    match decoded {
        Ok(decoded) if matches!(&decoder.faults, Faults::Collect(list) if list.is_empty()) => Ok(decoded),
        decoded => Err(decoder.faults.into_list(decoded.err())),
    }
}

struct Decoder<'a> {
    scan: Scanner<'a>,
    file_len: u64,
    data_start: u64,
    entries: Entries,
    /// Where the next tensor begins, as long as all tensors so far followed each other without a gap.
    next_start: Option<u64>,
    dims: Vec<usize>,
    metadata: Option<Metadata>,
    seen_metadata: bool,
    /// A faulty tensor was left out, so that a hole may be of its making.
    incomplete: bool,
    faults: Faults,
}

impl<'a> Decoder<'a> {
    fn new(json: &'a [u8], file_len: u64, faults: Faults) -> Result<Self> {
        let text = utf8(json, PREFIX_BYTES)?;
        if json.first() != Some(&b'{') {
            let got = text.chars().next().map_or("an empty header".to_owned(), |c| format!("{c:?}"));
            return Err(Error::new(Kind::HeaderStart, "the header does not begin with '{'")
                .with_offset(PREFIX_BYTES)
                .with_expected("'{'")
                .with_got(got));
        }
        let data_start = PREFIX_BYTES + json.len() as u64;
        Ok(Self {
            scan: Scanner::new(text, PREFIX_BYTES),
            file_len,
            data_start,
            entries: Entries::default(),
            next_start: Some(data_start),
            dims: Vec::new(),
            metadata: None,
            seen_metadata: false,
            incomplete: false,
            faults,
        })
    }

    fn run(&mut self) -> Result<Decoded> {
        self.scan.expect(b'{')?;
        let mut first = true;
        let mut last_dtype = Dtype::Bf16;
        let mut spaced = false;
        loop {
            let fast = if spaced { fast::tensor::<true> } else { fast::tensor::<false> };
            if let Some(tensor) = fast(self.scan.bytes(), self.scan.at(), first, last_dtype, &mut self.dims)
                && let Some(name) = self.scan.slice(tensor.name.clone())
                && self.push_fast(name, &tensor)
            {
                last_dtype = tensor.dtype;
                self.scan.jump(tensor.end);
            } else {
                let Some((name, at)) = self.scan.next_key(first)? else { break };
                spaced = self.scan.peek() == Some(b' ');
                if name == "__metadata__" {
                    self.metadata_object(at)?;
                } else {
                    self.tensor(&name, at)?;
                }
            }
            first = false;
        }
        self.padding()?;
        let index = self.index()?;
        Ok(Decoded { index, metadata: self.metadata.take() })
    }

    /// Takes over what the fast path found. Whatever is wrong with it is left for the slow path to find again and
    /// explain.
    #[inline]
    fn push_fast(&mut self, name: &str, tensor: &fast::Tensor) -> bool {
        if name.len() > limits::MAX_NAME_BYTES || name == "__metadata__" {
            return false;
        }
        let range = ByteRange::new(tensor.begin, tensor.end_offset).and_then(|range| range.offset_by(self.data_start));
        match range {
            Some(range) if check_size(name, tensor.dtype, &self.dims, range).is_ok() => {
                self.push(name, tensor.dtype, range).is_ok()
            }
            _ => false,
        }
    }

    #[inline]
    fn push(&mut self, name: &str, dtype: Dtype, range: ByteRange) -> Result<()> {
        if self.entries.is_full() {
            self.reserve();
        }
        self.entries.push(name, dtype, &self.dims, 0, range)?;
        self.next_start = self.next_start.filter(|&next| next == range.start()).map(|_| range.end());
        Ok(())
    }

    /// Makes room for as many tensors as the rest of the header holds, if they are like those seen so far. The first
    /// few only teach the average.
    #[cold]
    fn reserve(&mut self) {
        let seen = self.entries.len();
        let (name_bytes, dims) = self.entries.arena_lens();
        if seen < 32 {
            self.entries.reserve(32, 32 * 64, 32 * 4);
            return;
        }
        let scanned = self.scan.at().max(1) as u64;
        let left = (self.scan.bytes().len() - self.scan.at()) as u64;
        // A sixteenth on top, because a second estimate would move everything.
        let scale = |n: usize| {
            let estimate = (n as u64).saturating_mul(left) / scanned;
            (estimate + estimate / 16 + 16) as usize
        };
        self.entries.reserve(scale(seen), scale(name_bytes), scale(dims));
    }

    fn metadata_object(&mut self, at: usize) -> Result<()> {
        if std::mem::replace(&mut self.seen_metadata, true) {
            let error = self.scan.error(Kind::DuplicateKey, at, "__metadata__ stands twice");
            self.faults.report(error.with_expected("each key once").with_got("a second __metadata__"))?;
        }
        let entered = self.scan.typed_object("an object of strings")?;
        if self.faults.check(entered.map_err(|error| error.with_tensor("__metadata__")))?.is_none() {
            return Ok(());
        }
        let mut metadata = self.metadata.take().unwrap_or_default();
        let mut first = true;
        while let Some((key, at)) = self.scan.next_key(first)? {
            first = false;
            let value = self.scan.typed_string("a string")?;
            let value = value.map_err(|error| error.with_tensor("__metadata__"));
            let Some(value) = self.faults.check(value)? else { continue };
            if metadata.len() >= limits::MAX_METADATA_ENTRIES {
                let limit = limits::MAX_METADATA_ENTRIES;
                return Err(self.scan.too_many(at, "too many entries in __metadata__", limit));
            }
            match metadata.entry(key.into_owned()) {
                Entry::Vacant(vacant) => {
                    vacant.insert(value.into_owned());
                }
                Entry::Occupied(taken) => {
                    let error = self.scan.error(Kind::DuplicateKey, at, "a key of __metadata__ stands twice");
                    self.faults.report(error.with_expected("each key once").with_got(taken.key()))?;
                }
            }
        }
        self.metadata = Some(metadata);
        Ok(())
    }

    /// One tensor's object, whatever its order of fields and whitespace.
    fn tensor(&mut self, name: &str, at: usize) -> Result<()> {
        let offset = self.scan.offset(at);
        let fields = self.fields().map_err(|error| error.with_tensor(name))?;
        let Some((dtype, (begin, end))) = self.faults.check(fields.map_err(|error| error.with_tensor(name)))? else {
            self.incomplete = true;
            return Ok(());
        };
        let place = |error: Error| error.with_tensor(name).with_offset(offset);
        let Some(range) = self.faults.check(self.range(begin, end).map_err(place))? else {
            self.incomplete = true;
            return Ok(());
        };
        self.faults.check(check_size(name, dtype, &self.dims, range).map_err(place))?;
        self.push(name, dtype, range).map_err(place)
    }

    fn range(&self, begin: u64, end: u64) -> Result<ByteRange> {
        let range = ByteRange::new(begin, end).ok_or_else(|| {
            Error::new(Kind::OffsetsReversed, "data_offsets end before they begin")
                .with_expected(format!("an end of at least {begin}"))
                .with_got(end)
        })?;
        range.offset_by(self.data_start).ok_or_else(|| {
            Error::new(Kind::Overflow, "data_offsets do not fit 64 bits behind the header")
                .with_expected(format!("at most {}", u64::MAX - self.data_start))
                .with_got(end)
        })
    }

    /// The fields of a tensor; the shape is left in `self.dims`. The inner error is the first fault that leaves the
    /// tensor without meaning.
    fn fields(&mut self) -> Result<Typed<(Dtype, (u64, u64))>> {
        let start = self.scan.at();
        if let Err(fault) = self.scan.typed_object("an object with dtype, shape and data_offsets")? {
            return Ok(Err(fault));
        }
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        let mut fault = None;
        let mut first = true;
        while let Some((key, at)) = self.scan.next_key(first)? {
            first = false;
            let twice = match &*key {
                "dtype" => dtype.replace(self.dtype()?).is_some(),
                "shape" => shape.replace(self.shape()?).is_some(),
                "data_offsets" => offsets.replace(self.offsets()?).is_some(),
                _ => {
                    self.scan.skip_value()?;
                    fault = fault.or(Some(self.unknown_field(&key, at)));
                    false
                }
            };
            if twice {
                let error = self.scan.error(Kind::DuplicateKey, at, "a field of a tensor stands twice");
                fault = fault.or(Some(error.with_expected("each field once").with_got(&key)));
            }
        }
        let there = [("dtype", dtype.is_some()), ("shape", shape.is_some()), ("data_offsets", offsets.is_some())];
        let missing = |field: &str| {
            let there: Vec<_> = there.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
            let got = if there.is_empty() { "no field".to_owned() } else { format!("{} alone", there.join(" and ")) };
            Err(self.scan.error(Kind::MissingField, start, "a tensor lacks a field").with_expected(field).with_got(got))
        };
        Ok(match (fault, dtype, shape, offsets) {
            (Some(fault), ..) => Err(fault),
            (_, Some(Err(error)), ..) | (_, _, Some(Err(error)), _) | (_, _, _, Some(Err(error))) => Err(error),
            (_, None, ..) => missing("dtype"),
            (_, _, None, _) => missing("shape"),
            (_, _, _, None) => missing("data_offsets"),
            (_, Some(Ok(dtype)), Some(Ok(())), Some(Ok(offsets))) => Ok((dtype, offsets)),
        })
    }

    #[cold]
    fn unknown_field(&self, key: &str, at: usize) -> Error {
        self.scan
            .error(Kind::UnknownField, at, "a tensor has an unknown field")
            .with_expected("dtype, shape or data_offsets")
            .with_got(key)
    }

    fn dtype(&mut self) -> Result<Typed<Dtype>> {
        self.scan.skip_space();
        let at = self.scan.at();
        let name = self.scan.typed_string("the name of a dtype")?;
        Ok(name.and_then(|name| {
            Dtype::from_safetensors(&name).ok_or_else(|| {
                self.scan
                    .error(Kind::UnknownDtype, at, "unknown dtype")
                    .with_expected("one of the dtypes of safetensors 0.8")
                    .with_got(name)
            })
        }))
    }

    fn shape(&mut self) -> Result<Typed<()>> {
        self.dims.clear();
        if let Err(fault) = self.scan.typed_array("an array of dimensions")? {
            return Ok(Err(fault));
        }
        let mut fault = None;
        while self.scan.next_element(self.dims.is_empty() && fault.is_none())? {
            let at = self.scan.at();
            let dim = self.scan.typed_unsigned("a dimension")?.and_then(|dim| {
                usize::try_from(dim).map_err(|_| {
                    self.scan
                        .error(Kind::Overflow, at, "a dimension does not fit this platform")
                        .with_expected(format!("at most {}", usize::MAX))
                        .with_got(dim)
                })
            });
            match dim {
                // One more than allowed is kept, so that the check of the size sees that there are too many.
                Ok(dim) if self.dims.len() <= limits::MAX_RANK => self.dims.push(dim),
                Ok(_) => {}
                Err(error) => fault = fault.or(Some(error)),
            }
        }
        Ok(fault.map_or(Ok(()), Err))
    }

    fn offsets(&mut self) -> Result<Typed<(u64, u64)>> {
        const WHAT: &str = "an array of two byte offsets";
        self.scan.skip_space();
        let start = self.scan.at();
        if let Err(fault) = self.scan.typed_array(WHAT)? {
            return Ok(Err(fault));
        }
        let (mut count, mut pair, mut fault) = (0usize, [0; 2], None);
        while self.scan.next_element(count == 0)? {
            match (self.scan.typed_unsigned("a byte offset")?, pair.get_mut(count)) {
                (Ok(value), Some(place)) => *place = value,
                (Ok(_), None) => {}
                (Err(error), _) => fault = fault.or(Some(error)),
            }
            count += 1;
        }
        if count != 2 {
            let error = self.scan.error(Kind::JsonType, start, "a JSON value has the wrong type");
            fault = fault.or(Some(error.with_expected(WHAT).with_got(format!("{count} elements"))));
        }
        let [begin, end] = pair;
        Ok(fault.map_or(Ok((begin, end)), Err))
    }

    /// Behind the closing brace only spaces may stand.
    fn padding(&mut self) -> Result<()> {
        let end = self.scan.at();
        let bytes = self.scan.bytes();
        let padding = bytes.get(end..).unwrap_or_default();
        // Eight at once, as padding may be as large as headers.
        let plain = 8 * padding.chunks_exact(8).take_while(|chunk| chunk == b"        ").count();
        let Some(odd) = padding.iter().skip(plain).position(|&byte| byte != b' ') else { return Ok(()) };
        let odd = end + plain + odd;
        let garbage = space_end(bytes, odd);
        let error = |kind, at, message| {
            let got = bytes.get(at).map_or_else(String::new, |byte| format!("{:?}", char::from(*byte)));
            self.scan.error(kind, at, message).with_expected("spaces only").with_got(got)
        };
        if garbage < bytes.len() {
            return Err(error(Kind::Json, garbage, "the header goes on behind its closing brace"));
        }
        let error = error(Kind::HeaderPadding, odd, "the header is padded with something else than spaces");
        self.faults.report(error)
    }

    fn index(&mut self) -> Result<TensorIndex> {
        let room = self.faults.room();
        let mut duplicates = Vec::new();
        let index = std::mem::take(&mut self.entries).into_index(|first, second| {
            let error = duplicate(first, second);
            if duplicates.len() + 1 >= room {
                return Err(error);
            }
            duplicates.push(error);
            Ok(())
        });
        let (index, last) = match index {
            Ok(index) => (Some(index), None),
            Err(error) => (None, Some(error)),
        };
        duplicates.extend(last);
        for error in located(&self.scan, duplicates) {
            self.faults.report(error)?;
        }
        let index = index.ok_or_else(|| Error::new(Kind::Internal, "a duplicate name ended the index and no list"))?;
        // Where every tensor began at the end of the one before, only the end of the file is left to check.
        if self.next_start != Some(self.file_len) {
            self.layout(&index)?;
        }
        Ok(index)
    }

    /// Tensors must cover the data section without holes and overlaps, whatever their order in the header.
    #[cold]
    fn layout(&mut self, index: &TensorIndex) -> Result<()> {
        let mut end = self.data_start;
        let mut before: Option<TensorInfo<'_>> = None;
        let mut past_the_end = None;
        for info in index.iter() {
            let range = info.range();
            // Listed as a duplicate already.
            if before.is_some_and(|before| before.name() == info.name() && before.range() == range) {
                continue;
            }
            if range.start() > end && !self.incomplete {
                self.faults.report(
                    Error::new(Kind::Hole, "bytes before the tensor belong to none")
                        .with_tensor(info.name())
                        .with_offset(end)
                        .with_expected(format!("the tensor to begin at byte {end}"))
                        .with_got(format!("byte {}", range.start())),
                )?;
            } else if range.start() < end {
                let other = before.map_or("", |before| before.name());
                self.faults.report(
                    Error::new(Kind::Overlap, "the tensor begins inside another")
                        .with_tensor(info.name())
                        .with_offset(range.start())
                        .with_expected(format!("the tensor to begin at byte {end}, where \"{other}\" ends"))
                        .with_got(format!("byte {}", range.start())),
                )?;
            }
            if range.end() > self.file_len {
                past_the_end = past_the_end.or(Some(info));
            }
            if range.end() >= end {
                end = range.end();
                before = Some(info);
            }
        }
        if let Some(info) = past_the_end {
            self.faults.report(
                Error::new(Kind::Truncated, "the file ends before its tensors do")
                    .with_tensor(info.name())
                    .with_offset(self.file_len)
                    .with_expected(format!("a file of {end} bytes"))
                    .with_got(format!("{} bytes", self.file_len)),
            )?;
        } else if end < self.file_len && !self.incomplete {
            self.faults.report(
                Error::new(Kind::TrailingBytes, "bytes behind the last tensor belong to none")
                    .with_offset(end)
                    .with_expected(format!("a file of {end} bytes"))
                    .with_got(format!("{} bytes", self.file_len)),
            )?;
        }
        Ok(())
    }
}

/// The text of `json`, whose first byte has the offset `base` in its file.
pub(super) fn utf8(json: &[u8], base: u64) -> Result<&str> {
    std::str::from_utf8(json).map_err(|error| {
        let at = error.valid_up_to();
        let got = json.get(at).map_or_else(String::new, |byte| format!("the byte {byte:#04x}"));
        Error::new(Kind::NotUtf8, "the JSON text is not UTF-8")
            .with_offset(base + at as u64)
            .with_expected("a character in UTF-8")
            .with_got(got)
            .with_source(error)
    })
}

#[cold]
fn duplicate(first: TensorInfo<'_>, second: TensorInfo<'_>) -> Error {
    Error::new(Kind::DuplicateName, "the tensor name stands twice")
        .with_tensor(second.name())
        .with_expected("each name once")
        .with_got(format!("bytes {} and {}", first.range(), second.range()))
}

/// Where a name stands.
#[derive(Default)]
struct Places {
    /// How many of them are looked for.
    wanted: usize,
    found: Vec<usize>,
    /// How many of them have been given to an error.
    given: usize,
}

/// Says where duplicate names stand for the second time, the third and so on. The header is read once more for all of them
/// together: keeping the position of every name would cost all sound files, and reading it for each would take hours.
#[cold]
fn located(scan: &Scanner<'_>, errors: Vec<Error>) -> Vec<Error> {
    if errors.is_empty() {
        return errors;
    }
    let mut places: HashMap<&str, Places> = HashMap::new();
    for name in errors.iter().filter_map(Error::tensor) {
        // The first place is none of a duplicate.
        places.entry(name).or_insert(Places { wanted: 1, given: 1, ..Places::default() }).wanted += 1;
    }
    // A header that ends in a fault has its places up to there.
    let _ = find_keys(scan, &mut places);
    let mut offsets = Vec::new();
    for error in &errors {
        let own = error.tensor().and_then(|name| places.get_mut(name));
        offsets.push(own.and_then(|own| {
            own.given += 1;
            own.found.get(own.given - 1).copied()
        }));
    }
    let with_offset = |(error, at): (Error, Option<usize>)| match at {
        Some(at) => error.with_offset(scan.offset(at)),
        None => error,
    };
    errors.into_iter().zip(offsets).map(with_offset).collect()
}

/// Finds the places that are wanted, and ends with the last of them.
fn find_keys(scan: &Scanner<'_>, places: &mut HashMap<&str, Places>) -> Result<()> {
    let mut missing: usize = places.values().map(|own| own.wanted).sum();
    let mut scan = scan.clone();
    scan.jump(0);
    scan.expect(b'{')?;
    let mut first = true;
    while missing > 0
        && let Some((key, at)) = scan.next_key(first)?
    {
        first = false;
        if let Some(own) = places.get_mut(&*key)
            && own.found.len() < own.wanted
        {
            own.found.push(at);
            missing -= 1;
        }
        scan.skip_value()?;
    }
    Ok(())
}
