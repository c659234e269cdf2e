//! Numbers and strings as protocol 0 writes them, and strings that are no UTF-8.

use std::borrow::Cow;

/// What a decimal number in a pickle is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decimal<'a> {
    Small(i64),
    /// The digits, with a `-` before them where it is negative.
    Large(&'a str),
}

/// An integer in decimal, with a sign or without.
pub(super) fn decimal(text: &str) -> Option<Decimal<'_>> {
    let text = text.trim_ascii();
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    Some(text.parse().map_or(Decimal::Large(text), Decimal::Small))
}

/// A float as Python's `repr` writes it.
pub(super) fn float(text: &str) -> Option<f64> {
    text.trim_ascii().parse().ok()
}

/// An integer of two's complement, least significant byte first, where it fits.
pub(crate) fn long(bytes: &[u8]) -> Option<i128> {
    let negative = bytes.last().is_some_and(|&byte| byte & 0x80 != 0);
    let fill = if negative { 0xff } else { 0 };
    let mut whole = [fill; 16];
    for (i, &byte) in bytes.iter().enumerate() {
        match whole.get_mut(i) {
            Some(place) => *place = byte,
            None if byte == fill => {}
            None => return None,
        }
    }
    let value = i128::from_le_bytes(whole);
    ((value < 0) == negative).then_some(value)
}

/// A string in Python's quotes, with escapes: its bytes.
pub(super) fn quoted(line: &[u8]) -> Option<Cow<'_, [u8]>> {
    let line = line.trim_ascii();
    let (&quote, rest) = line.split_first()?;
    let (&last, inner) = rest.split_last()?;
    if last != quote || !matches!(quote, b'\'' | b'"') {
        return None;
    }
    if !inner.contains(&b'\\') {
        return Some(Cow::Borrowed(inner));
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut rest = inner.iter().copied();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>, radix| byte.and_then(|byte| char::from(byte).to_digit(radix));
        let escaped = match rest.next()? {
            b'\n' => continue,
            b'a' => 7,
            b'b' => 8,
            b't' => b'\t',
            b'n' => b'\n',
            b'v' => 11,
            b'f' => 12,
            b'r' => b'\r',
            b'x' => (digit(rest.next(), 16)? * 16 + digit(rest.next(), 16)?) as u8,
            first @ b'0'..=b'7' => {
                let mut value = u32::from(first - b'0');
                for _ in 0..2 {
                    let mut ahead = rest.clone();
                    let Some(next) = digit(ahead.next(), 8) else { break };
                    value = value * 8 + next;
                    rest = ahead;
                }
                value as u8
            }
            same @ (b'\\' | b'\'' | b'"') => same,
            other => {
                out.push(b'\\');
                other
            }
        };
        out.push(escaped);
    }
    Some(Cow::Owned(out))
}

/// A line in Python's `raw-unicode-escape`: Latin-1 with `\uXXXX` and `\UXXXXXXXX`.
pub(super) fn raw_unicode(line: &[u8]) -> Option<Cow<'_, str>> {
    if line.is_ascii() && !line.contains(&b'\\') {
        return std::str::from_utf8(line).ok().map(Cow::Borrowed);
    }
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        let digits = match (byte, rest.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => {
                out.push(char::from(byte));
                continue;
            }
        };
        let hex = std::str::from_utf8(rest.get(1..=digits)?).ok()?;
        let code = u32::from_str_radix(hex, 16).ok()?;
        push_code(&mut out, code);
        rest = rest.get(digits + 1..)?;
    }
    Some(Cow::Owned(out))
}

/// A character, or half of a surrogate pair, which is none: that is written as its escape, so that two names which differ
/// in nothing else stay two.
fn push_code(out: &mut String, code: u32) {
    match char::from_u32(code) {
        Some(character) => out.push(character),
        None => out.push_str(&format!("\\u{code:04x}")),
    }
}

/// A string of a pickle: UTF-8 in which lone surrogates may stand, as Python allows.
pub(super) fn unicode(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = str::from_utf8(bytes) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(bytes.len());
    let mut rest = bytes;
    while !rest.is_empty() {
        let (valid, broken) = match str::from_utf8(rest) {
            Ok(valid) => (valid, &[][..]),
            Err(error) => {
                let (valid, broken) = rest.split_at(error.valid_up_to());
                (str::from_utf8(valid).unwrap_or_default(), broken)
            }
        };
        out.push_str(valid);
        rest = match broken {
            // A surrogate in the form that UTF-8 would have for it.
            [0xed, second @ 0xa0..=0xbf, third @ 0x80..=0xbf, behind @ ..] => {
                push_code(&mut out, 0xd000 | u32::from(second & 0x3f) << 6 | u32::from(third & 0x3f));
                behind
            }
            [_, behind @ ..] => {
                out.push(char::REPLACEMENT_CHARACTER);
                behind
            }
            [] => broken,
        };
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_length() {
        for (bytes, value) in [
            (&[][..], 0),
            (&[0xff], -1),
            (&[0x7f], 127),
            (&[0xff, 0], 255),
            (&[0, 0xff], -256),
            (&[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19], 0x1950_a86a_20f9_469c_fc6c),
        ] {
            assert_eq!(long(bytes), Some(value), "{bytes:?}");
        }
        let mut longer = vec![0xff; 40];
        assert_eq!(long(&longer), Some(-1));
        longer.push(0x7f);
        assert_eq!(long(&longer), None);
        assert_eq!(long(&[0xff; 16]), Some(-1));
        let mut large = vec![0xff; 16];
        large.push(0);
        assert_eq!(long(&large), None, "2^128 - 1 does not fit");
        assert_eq!(decimal("-12"), Some(Decimal::Small(-12)));
        assert_eq!(decimal("+7 "), Some(Decimal::Small(7)));
        assert_eq!(decimal("99999999999999999999"), Some(Decimal::Large("99999999999999999999")));
        for wrong in ["", "-", "1x", "0x10", "1_0", "--1", "+-1"] {
            assert_eq!(decimal(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn strings_with_escapes() {
        let bytes = |line: &'static [u8]| quoted(line).map(Cow::into_owned);
        assert_eq!(bytes(b"'abc'"), Some(b"abc".to_vec()));
        assert_eq!(bytes(br#""a\x41\n\101\7\\\'\q""#), Some(b"aA\nA\x07\\'\\q".to_vec()));
        for wrong in [&b""[..], b"'", b"'a", b"'a\"", b"abc", br"'\x4'", br"'\'"] {
            assert_eq!(quoted(wrong), None, "{wrong:?}");
        }
        assert_eq!(raw_unicode(b"plain").as_deref(), Some("plain"));
        assert_eq!(raw_unicode(b"\xe9\\u00e9\\U0001f600\\n").as_deref(), Some("éé😀\\n"));
        assert_eq!(raw_unicode(b"\\ud800").as_deref(), Some("\\ud800"));
        assert_eq!(raw_unicode(b"\\u12"), None);
        assert_eq!(unicode(b"a\xed\xa0\x80b\xed\xbf\xbf\xff"), "a\\ud800b\\udfff\u{fffd}");
    }
}
