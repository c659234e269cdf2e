//! The fast path for tensors written the way every known writer writes them: no escapes, the fields in the order dtype,
//! shape, data_offsets, and either no whitespace or a space behind each colon and comma. Anything else is left to the
//! scanner.

use super::json::plain_end;
use crate::{Dtype, limits};
use std::ops::Range;

/// What the fast path found, not checked for anything but its form.
pub(super) struct Tensor {
    /// Where the name lies in the header.
    pub(super) name: Range<usize>,
    pub(super) dtype: Dtype,
    pub(super) begin: u64,
    pub(super) end_offset: u64,
    /// The position just behind the tensor's object.
    pub(super) end: usize,
}

/// Reads one tensor at `at`, its shape into `dims`; `None` where it is not in the usual form. `guess` is the dtype that
/// the tensor most likely has, `SPACED` whether a space stands behind each colon and comma.
#[inline]
pub(super) fn tensor<const SPACED: bool>(
    bytes: &[u8],
    at: usize,
    first: bool,
    guess: Dtype,
    dims: &mut Vec<usize>,
) -> Option<Tensor> {
    let mut at = if first { at } else { spaced::<SPACED, _>(bytes, at, b",")? };
    at = literal(bytes, at, b"\"")?;
    let name_start = at;
    at = plain_end(bytes, at);
    let name = name_start..at;
    at = spaced::<SPACED, _>(bytes, at, b"\":")?;
    at = spaced::<SPACED, _>(bytes, at, b"{\"dtype\":")?;
    at = literal(bytes, at, b"\"")?;

    let rest = bytes.get(at..)?;
    let guessed = guess.as_str().as_bytes();
    let dtype = if rest.starts_with(guessed) && rest.get(guessed.len()) == Some(&b'"') {
        at += guessed.len();
        guess
    } else {
        let len = rest.iter().take(16).position(|&byte| byte == b'"')?;
        at += len;
        Dtype::from_safetensors(std::str::from_utf8(rest.get(..len)?).ok()?)?
    };

    at = spaced::<SPACED, _>(bytes, at, b"\",")?;
    at = spaced::<SPACED, _>(bytes, at, b"\"shape\":")?;
    at = literal(bytes, at, b"[")?;
    dims.clear();
    if bytes.get(at) != Some(&b']') {
        loop {
            let dim;
            (dim, at) = integer(bytes, at)?;
            if dims.len() == limits::MAX_RANK {
                return None;
            }
            dims.push(usize::try_from(dim).ok()?);
            match bytes.get(at)? {
                b',' => at = spaced::<SPACED, _>(bytes, at, b",")?,
                b']' => break,
                _ => return None,
            }
        }
    }

    at = spaced::<SPACED, _>(bytes, at, b"],")?;
    at = spaced::<SPACED, _>(bytes, at, b"\"data_offsets\":")?;
    at = literal(bytes, at, b"[")?;
    let (begin, end_offset);
    (begin, at) = integer(bytes, at)?;
    at = spaced::<SPACED, _>(bytes, at, b",")?;
    (end_offset, at) = integer(bytes, at)?;
    let end = literal(bytes, at, b"]}")?;
    Some(Tensor { name, dtype, begin, end_offset, end })
}

#[inline(always)]
fn literal<const N: usize>(bytes: &[u8], at: usize, text: &[u8; N]) -> Option<usize> {
    (bytes.get(at..)?.first_chunk::<N>()? == text).then_some(at + N)
}

/// `text`, and a space behind it where the header has them.
#[inline(always)]
fn spaced<const SPACED: bool, const N: usize>(bytes: &[u8], at: usize, text: &[u8; N]) -> Option<usize> {
    let at = literal(bytes, at, text)?;
    if SPACED { literal(bytes, at, b" ") } else { Some(at) }
}

/// An integer of at most 19 digits, which cannot overflow, without leading zeros.
#[inline(always)]
fn integer(bytes: &[u8], start: usize) -> Option<(u64, usize)> {
    let (mut value, mut at) = (0u64, start);
    while let Some(digit) = bytes.get(at).map(|byte| byte.wrapping_sub(b'0')).filter(|&digit| digit < 10) {
        value = value.wrapping_mul(10).wrapping_add(u64::from(digit));
        at += 1;
    }
    let len = at - start;
    let leading_zero = len > 1 && bytes.get(start) == Some(&b'0');
    (len > 0 && len <= 19 && !leading_zero).then_some((value, at))
}
