//! A JSON scanner over bytes in memory: strict, without recursion, and every refusal says at which byte.

use crate::{Error, Kind, Result, limits};
use std::borrow::Cow;

/// Walks through a JSON text value by value.
#[derive(Clone, Debug)]
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    /// The offset in the file of the text's first byte.
    base: u64,
}

/// A value, or the fault that it is not of the wanted kind. The scanner stands behind the value either way.
pub(crate) type Typed<T> = Result<T, Error>;

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str, base: u64) -> Self {
        Self { text, at: 0, base }
    }

    /// Position in the text.
    #[inline]
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Moves to a position in the text that the caller has scanned up to by itself.
    #[inline]
    pub(crate) fn jump(&mut self, at: usize) {
        self.at = at;
    }

    /// Offset in the file of the position `at`.
    pub(crate) fn offset(&self, at: usize) -> u64 {
        self.base + at as u64
    }

    #[inline]
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    /// The text between two positions, where both are character boundaries.
    #[inline]
    pub(crate) fn slice(&self, range: std::ops::Range<usize>) -> Option<&'a str> {
        self.text.get(range)
    }

    #[inline]
    pub(crate) fn peek(&self) -> Option<u8> {
        self.bytes().get(self.at).copied()
    }

    #[inline]
    pub(crate) fn skip_space(&mut self) {
        if self.peek().is_some_and(is_space) {
            self.at = space_end(self.bytes(), self.at + 1);
        }
    }

    #[inline]
    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// An error of `kind` at position `at`.
    #[cold]
    pub(crate) fn error(&self, kind: Kind, at: usize, message: &str) -> Error {
        Error::new(kind, message).with_offset(self.offset(at))
    }

    /// The refusal of what stands at position `at`, because `limit` of its kind stand before it.
    #[cold]
    pub(crate) fn too_many(&self, at: usize, message: &str, limit: usize) -> Error {
        self.error(Kind::Limit, at, message).with_expected(format!("at most {limit}")).with_got("one more")
    }

    /// Malformed JSON at the current position, where `expected` would have been right.
    #[cold]
    fn malformed(&self, expected: &str) -> Error {
        self.unexpected("malformed JSON", expected)
    }

    /// The refusal of the character at the current position.
    #[cold]
    pub(crate) fn unexpected(&self, message: &str, expected: &str) -> Error {
        let got = match self.text.get(self.at..).and_then(|rest| rest.chars().next()) {
            Some(c) => format!("{c:?}"),
            None => "the end".to_owned(),
        };
        self.error(Kind::Json, self.at, message).with_expected(expected).with_got(got)
    }

    /// Passes over whitespace and `byte`.
    pub(crate) fn expect(&mut self, byte: u8) -> Result<()> {
        self.skip_space();
        if self.eat(byte) { Ok(()) } else { Err(self.malformed(&format!("{:?}", char::from(byte)))) }
    }

    /// The next key of an object, with the scanner behind its colon, or `None` behind the closing brace. `first` tells
    /// whether the opening brace was the last token.
    pub(crate) fn next_key(&mut self, first: bool) -> Result<Option<(Cow<'a, str>, usize)>> {
        self.skip_space();
        if self.eat(b'}') {
            return Ok(None);
        }
        if !first {
            if !self.eat(b',') {
                return Err(self.malformed("',' or '}'"));
            }
            self.skip_space();
        }
        let at = self.at;
        if self.peek() != Some(b'"') {
            return Err(self.malformed(if first { "a string or '}'" } else { "a string" }));
        }
        let key = self.key()?;
        self.expect(b':')?;
        Ok(Some((key, at)))
    }

    /// Whether an array goes on with another value. `first` tells whether the opening bracket was the last token.
    pub(crate) fn next_element(&mut self, first: bool) -> Result<bool> {
        self.skip_space();
        if self.eat(b']') {
            return Ok(false);
        }
        if !first && !self.eat(b',') {
            return Err(self.malformed("',' or ']'"));
        }
        self.skip_space();
        if !first && self.peek() == Some(b']') {
            return Err(self.malformed("a value"));
        }
        Ok(true)
    }

    /// Enters an object. Another value is passed over and refused.
    pub(crate) fn typed_object(&mut self, what: &str) -> Result<Typed<()>> {
        self.typed(b'{', what)
    }

    /// Enters an array. Another value is passed over and refused.
    pub(crate) fn typed_array(&mut self, what: &str) -> Result<Typed<()>> {
        self.typed(b'[', what)
    }

    fn typed(&mut self, open: u8, what: &str) -> Result<Typed<()>> {
        self.skip_space();
        if self.eat(open) {
            return Ok(Ok(()));
        }
        Ok(Err(self.pass_over(what)?))
    }

    /// A string. Another value is passed over and refused.
    pub(crate) fn typed_string(&mut self, what: &str) -> Result<Typed<Cow<'a, str>>> {
        self.skip_space();
        if self.peek() == Some(b'"') {
            return Ok(Ok(self.string()?));
        }
        Ok(Err(self.pass_over(what)?))
    }

    /// A non-negative integer of 64 bits. Another value is passed over and refused.
    pub(crate) fn typed_unsigned(&mut self, what: &str) -> Result<Typed<u64>> {
        self.skip_space();
        let start = self.at;
        if !self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            return Ok(Err(self.pass_over(what)?));
        }
        self.number()?;
        let digits = self.text.get(start..self.at).unwrap_or_default();
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            let error = self.error(Kind::JsonType, start, "a JSON value has the wrong type");
            return Ok(Err(error.with_expected(what).with_got(format!("the number {digits}"))));
        }
        Ok(digits.parse().map_err(|_| {
            self.error(Kind::Overflow, start, "a number does not fit 64 bits").with_expected(what).with_got(digits)
        }))
    }

    /// Passes over a value that is not `what`, and says so.
    #[cold]
    fn pass_over(&mut self, what: &str) -> Result<Error> {
        let start = self.at;
        let got = match self.peek() {
            Some(b'{') => "an object",
            Some(b'[') => "an array",
            Some(b'"') => "a string",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            Some(b'-') => "a negative number",
            _ => "a number",
        };
        self.skip_value()?;
        Ok(self.error(Kind::JsonType, start, "a JSON value has the wrong type").with_expected(what).with_got(got))
    }

    /// Passes over one value of any type, checking that it is well-formed.
    pub(crate) fn skip_value(&mut self) -> Result<()> {
        // One bit per level tells objects from arrays.
        let mut stack = [false; limits::MAX_JSON_DEPTH];
        let mut depth = 0usize;
        let mut first = true;
        loop {
            let in_object = depth.checked_sub(1).and_then(|top| stack.get(top)).copied();
            let more = match in_object {
                None => depth == 0 && first,
                Some(true) => self.next_key(first)?.is_some(),
                Some(false) => self.next_element(first)?,
            };
            if !more {
                depth = match depth.checked_sub(1) {
                    Some(outer) if outer > 0 => outer,
                    _ => return Ok(()),
                };
                first = false;
                continue;
            }
            self.skip_space();
            match self.peek() {
                Some(open @ (b'{' | b'[')) => {
                    let Some(level) = stack.get_mut(depth) else {
                        return Err(self
                            .error(Kind::JsonDepth, self.at, "JSON is nested too deeply")
                            .with_expected(format!("at most {} levels", limits::MAX_JSON_DEPTH))
                            .with_got("one more"));
                    };
                    *level = open == b'{';
                    self.at += 1;
                    depth += 1;
                    first = true;
                    continue;
                }
                Some(b'"') => drop(self.string_of(0)?),
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.word("true")?,
                Some(b'f') => self.word("false")?,
                Some(b'n') => self.word("null")?,
                _ => return Err(self.malformed("a value")),
            }
            first = false;
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn word(&mut self, word: &str) -> Result<()> {
        if self.bytes().get(self.at..).is_some_and(|rest| rest.starts_with(word.as_bytes())) {
            self.at += word.len();
            return Ok(());
        }
        Err(self.malformed(word))
    }

    /// Passes over a number of the JSON grammar: no leading zeros, digits on both sides of a point.
    fn number(&mut self) -> Result<()> {
        self.eat(b'-');
        if self.eat(b'0') {
            if self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
                return Err(self.malformed("no digit behind a leading zero"));
            }
        } else {
            self.digits()?;
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            let _sign = self.eat(b'+') || self.eat(b'-');
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<()> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == start { Err(self.malformed("a digit")) } else { Ok(()) }
    }

    /// The string that begins at the current quote, borrowed where it has no escapes.
    pub(crate) fn string(&mut self) -> Result<Cow<'a, str>> {
        self.string_of(usize::MAX)
    }

    /// A key, which may not be longer than a tensor name. Without that limit escapes could make a large copy.
    fn key(&mut self) -> Result<Cow<'a, str>> {
        let start = self.at;
        let key = self.string_of(limits::MAX_NAME_BYTES + 1)?;
        if key.len() > limits::MAX_NAME_BYTES {
            return Err(self
                .error(Kind::Limit, start, "a name is too long")
                .with_tensor(&key)
                .with_expected(format!("at most {} bytes", limits::MAX_NAME_BYTES))
                .with_got(format!("{} bytes", self.at - start - 2)));
        }
        Ok(key)
    }

    /// A string of which at least `keep` bytes are wanted if it has escapes; the rest may be left out.
    fn string_of(&mut self, keep: usize) -> Result<Cow<'a, str>> {
        let start = self.at + 1;
        self.at = plain_end(self.bytes(), start);
        if self.eat(b'"') {
            return Ok(Cow::Borrowed(self.text.get(start..self.at - 1).unwrap_or_default()));
        }
        let mut run = start;
        let mut owned = String::new();
        loop {
            if owned.len() < keep {
                let plain = self.text.get(run..self.at).unwrap_or_default();
                // A cut moves back by up to three bytes to a boundary, and must leave too much rather than too little.
                let end = plain.floor_char_boundary((keep - owned.len()).saturating_add(3));
                owned.push_str(plain.get(..end).unwrap_or_default());
            }
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(owned));
                }
                Some(b'\\') => {
                    let c = self.escape()?;
                    if owned.len() < keep {
                        owned.push(c);
                    }
                }
                Some(_) => return Err(self.malformed("no control character in a string")),
                None => return Err(self.malformed("'\"'")),
            }
            run = self.at;
            self.at = plain_end(self.bytes(), run);
        }
    }

    fn escape(&mut self) -> Result<char> {
        let start = self.at;
        self.at += 1;
        let simple = match self.peek() {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                self.at += 1;
                return self.unicode_escape(start);
            }
            _ => return Err(self.malformed("an escape character")),
        };
        self.at += 1;
        Ok(simple)
    }

    fn unicode_escape(&mut self, start: usize) -> Result<char> {
        let high = self.hex4()?;
        let code = match high {
            0xD800..=0xDBFF if self.bytes().get(self.at..).is_some_and(|rest| rest.starts_with(b"\\u")) => {
                self.at += 2;
                let low = self.hex4()?;
                let offset = low.checked_sub(0xDC00).filter(|&offset| offset < 0x400);
                offset.map(|offset| 0x10000 + ((high - 0xD800) << 10) + offset)
            }
            _ => Some(high),
        };
        code.and_then(char::from_u32).ok_or_else(|| {
            self.error(Kind::Json, start, "malformed JSON").with_expected("a surrogate pair").with_got("half of one")
        })
    }

    fn hex4(&mut self) -> Result<u32> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.peek().and_then(|byte| char::from(byte).to_digit(16));
            code = code << 4 | digit.ok_or_else(|| self.malformed("four hexadecimal digits"))?;
            self.at += 1;
        }
        Ok(code)
    }
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// Whether JSON allows the byte between two tokens.
#[inline]
pub(crate) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

/// Where the whitespace from `at` ends. A header may hold a hundred megabytes of it, so eight bytes are looked at at
/// once.
pub(crate) fn space_end(bytes: &[u8], mut at: usize) -> usize {
    // The high bit of each byte that is not zero. No carry leaves a byte, so all marks are right.
    let not_zero = |word: u64| (((word & !HIGHS) + !HIGHS) | word) & HIGHS;
    let differs = |word: u64, byte: u8| not_zero(word ^ (ONES * u64::from(byte)));
    while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let word = u64::from_le_bytes(*chunk);
        let mut other = differs(word, b' ');
        if other != 0 {
            other &= differs(word, b'\t') & differs(word, b'\n') & differs(word, b'\r');
        }
        if other != 0 {
            return at + (other.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    while bytes.get(at).copied().is_some_and(is_space) {
        at += 1;
    }
    at
}

/// Where the run of plain string bytes from `at` ends: at a quote, a backslash, a control character or the end.
#[inline]
pub(crate) fn plain_end(bytes: &[u8], mut at: usize) -> usize {
    // Eight bytes at once: a byte's high bit is set where the byte is zero after the XOR, or below 0x20. Bytes above
    // a true hit may be marked wrongly by the borrow, but the lowest mark is always right.
    while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let word = u64::from_le_bytes(*chunk);
        let quote = word ^ (ONES * b'"' as u64);
        let slash = word ^ (ONES * b'\\' as u64);
        let hits = ((quote.wrapping_sub(ONES) & !quote)
            | (slash.wrapping_sub(ONES) & !slash)
            | (word.wrapping_sub(ONES * 0x20) & !word))
            & HIGHS;
        if hits != 0 {
            return at + (hits.trailing_zeros() / 8) as usize;
        }
        at += 8;
    }
    while bytes.get(at).is_some_and(|&byte| byte != b'"' && byte != b'\\' && byte >= 0x20) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn skip(text: &str) -> Result<usize> {
        let mut scan = Scanner::new(text, 0);
        scan.skip_value()?;
        scan.skip_space();
        if scan.at() == text.len() { Ok(scan.at()) } else { Err(scan.malformed("the end")) }
    }

    #[test]
    fn strings_are_unescaped() {
        for (json, text) in [
            (r#""plain""#, "plain"),
            (r#""a\"\\\/\b\f\n\r\tz""#, "a\"\\/\u{8}\u{c}\n\r\tz"),
            (r#""\u0061\u00e9\u20ac\ud83d\ude00""#, "aé€😀"),
            (r#""é€😀 and some more""#, "é€😀 and some more"),
            (r#""""#, ""),
        ] {
            let mut scan = Scanner::new(json, 0);
            assert_eq!(scan.string().unwrap(), text);
            assert_eq!(scan.at(), json.len());
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(skip(&nested(limits::MAX_JSON_DEPTH)).is_ok());
        assert_eq!(skip(&nested(limits::MAX_JSON_DEPTH + 1)).unwrap_err().kind(), Kind::JsonDepth);
        assert_eq!(skip(&"[".repeat(1_000_000)).unwrap_err().kind(), Kind::JsonDepth);
    }

    fn fragment() -> impl Strategy<Value = String> {
        let tokens = [
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "\"a\"",
            "\"\\u0041\"",
            "\"\\ud800\"",
            "\"\\udc00\\ud800\"",
            "\"",
            "\\",
            "0",
            "1",
            "01",
            "-",
            "-0",
            "-1.5e+3",
            "1.",
            ".5",
            "1e",
            "true",
            "false",
            "null",
            "nul",
            " ",
            "\n",
            "\t",
            "\u{1}",
            "é",
            "1E9",
            "\"\u{7f}\"",
            "\"\\x\"",
        ];
        prop_oneof![
            proptest::collection::vec(proptest::sample::select(tokens.to_vec()), 0..12)
                .prop_map(|tokens| tokens.concat()),
            any::<String>(),
            any::<String>().prop_map(|text| format!("[{}]", serde_json::Value::String(text))),
        ]
    }

    proptest! {
        #[test]
        fn accepts_what_serde_json_accepts(text in fragment()) {
            let theirs = serde_json::from_str::<serde_json::Value>(&text).map_err(|error| error.to_string());
            // Numbers that are only passed over may have any size.
            prop_assume!(!theirs.as_ref().is_err_and(|error| error.starts_with("number out of range")));
            prop_assert_eq!(skip(&text).is_ok(), theirs.is_ok(), "{}", text);
        }

        #[test]
        fn plain_runs_end_at_the_first_special_byte(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let slow = bytes.iter().position(|&b| b == b'"' || b == b'\\' || b < 0x20).unwrap_or(bytes.len());
            prop_assert_eq!(plain_end(&bytes, 0), slow);
        }

        #[test]
        fn whitespace_ends_at_the_first_other_byte(
            spaces in proptest::collection::vec(proptest::sample::select(b" \t\n\r".to_vec()), 0..40),
            rest in proptest::collection::vec(any::<u8>(), 0..12),
        ) {
            let bytes = [spaces, rest].concat();
            let slow = bytes.iter().position(|&byte| !is_space(byte)).unwrap_or(bytes.len());
            prop_assert_eq!(space_end(&bytes, 0), slow);
        }
    }
}
