//! Text for people: aligned columns, sizes, and names that cannot disturb a terminal.

use std::io::{self, Write};

/// Which side of its column a cell keeps to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Align {
    Left,
    Right,
}

/// No column is padded beyond this width; longer cells stick out. A file may hold one name of a megabyte among a million
/// short ones.
const MAX_WIDTH: usize = 160;

/// Rows of cells under a heading, one alignment for each column.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(heading: [(&str, Align); N]) -> Self {
        Self { align: heading.map(|(_, align)| align), rows: vec![heading.map(|(title, _)| title.to_owned())] }
    }

    /// Adds a row. Its cells are escaped.
    pub(crate) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| escape(&cell)));
    }

    /// Writes the columns two spaces apart, without spaces at line ends.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().min(MAX_WIDTH).max(*width);
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), align) in row.iter().zip(widths).zip(self.align) {
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                match align {
                    Align::Left => line.extend([cell, padding.as_str(), "  "]),
                    Align::Right => line.extend([padding.as_str(), cell, "  "]),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `text` with everything escaped that is not a printable character, and backslashes doubled so that it stays clear
/// what was escaped.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='[' | ']'..='~' => escaped.push(c),
            c => escaped.extend(c.escape_debug()),
        }
    }
    escaped
}

/// A message as one line: what is not printable is escaped, while backslashes and quotes stay, because messages escape
/// names themselves.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => line.push(c),
            c => line.extend(c.escape_debug()),
        }
    }
    line
}

/// `bytes` in decimal units, as storage is sold: a GB is 1e9 bytes.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1e3, UNITS[0]);
    for larger in &UNITS[1..] {
        // 999.995 would be rounded up to 1000.00.
        if value < 999.995 {
            break;
        }
        (value, unit) = (value / 1e3, larger);
    }
    format!("{value:.2} {unit}")
}

/// "1 tensor", "2 tensors".
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_tail() {
        let mut table = Table::new([("name", Align::Left), ("size", Align::Right), ("file", Align::Left)]);
        table.row(["a\n\u{1b}[31m".into(), "5 B".into(), "x".into()]);
        table.row(["é\u{202e}".into(), "1.00 kB".into(), String::new()]);
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        let expected = "name              size  file\na\\n\\u{1b}[31m      5 B  x\né\\u{202e}      1.00 kB\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn messages_stay_one_plain_line() {
        assert_eq!(one_line("a\n\u{1b}[2J\u{202e}\u{2028} \"é\\"), "a\\n\\u{1b}[2J\\u{202e}\\u{2028} \"é\\");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1000), "1.00 kB");
        assert_eq!(size(999_999), "1.00 MB");
        assert_eq!(size(13_470_000_000), "13.47 GB");
        assert_eq!(size(u64::MAX), "18.45 EB");
    }

    #[test]
    fn backslashes_stay_distinct_from_escapes() {
        assert_ne!(escape("\\n"), escape("\n"));
        assert_eq!(escape("it's \"q\""), "it's \"q\"");
    }
}
