//! `uel verify`: every fault of a checkpoint, and on demand a scan of its values.

use crate::table::{Align, Table, count, one_line};
use crate::{Stop, to_stdout, write_json};
use serde::Serialize;
use std::io::{self, Write};
use std::path::PathBuf;
use uel_core::safetensors::{Rules, SafetensorsFiles};
use uel_core::source::ByteSourceExt;
use uel_core::{ByteRange, Dtype, Error, Kind, Result, TensorInfo};

#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  uel verify model.safetensors.index.json --deep")]
pub(crate) struct Args {
    /// A .safetensors file, a folder of shards, or the index.json of a sharded checkpoint
    path: PathBuf,
    /// Read every tensor too, and count NaN and infinite values; those are reported, not faults
    #[arg(long)]
    deep: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    path: String,
    ok: bool,
    faults: Vec<Fault<'a>>,
    #[serde(flatten)]
    scan: Option<&'a Scan>,
}

#[derive(Serialize)]
struct Fault<'a> {
    kind: &'static str,
    message: &'a str,
    file: Option<std::borrow::Cow<'a, str>>,
    tensor: Option<&'a str>,
    offset: Option<u64>,
    expected: Option<&'a str>,
    got: Option<&'a str>,
}

impl<'a> From<&'a Error> for Fault<'a> {
    fn from(error: &'a Error) -> Self {
        Self {
            kind: error.kind().as_str(),
            message: error.message(),
            file: error.path().map(|path| path.to_string_lossy()),
            tensor: error.tensor(),
            offset: error.offset(),
            expected: error.expected(),
            got: error.got(),
        }
    }
}

/// What a deep scan found: the tensors with values that are not finite.
#[derive(Debug, Default, Serialize)]
struct Scan {
    deep: Vec<NotFinite>,
    scanned_bytes: u64,
}

#[derive(Debug, Serialize)]
struct NotFinite {
    tensor: String,
    nan: u64,
    inf: u64,
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let mut faults = SafetensorsFiles::faults(&args.path);
    let scan = if args.deep { Some(scan(args, &mut faults)?) } else { None };

    // Where there is no checkpoint at all there is nothing to report on, and the error is the one line.
    if !args.json && faults.len() == 1 && faults.iter().all(|fault| is_absent(fault, args)) {
        return faults.pop().map_or(Ok(()), |fault| Err(fault.into()));
    }
    to_stdout(|out| match args.json {
        true => write_json(
            out,
            &Report {
                path: args.path.to_string_lossy().into_owned(),
                ok: faults.is_empty(),
                faults: faults.iter().map(Fault::from).collect(),
                scan: scan.as_ref(),
            },
        ),
        false => write_text(out, args, &faults, scan.as_ref()),
    })?;
    if faults.is_empty() {
        return Ok(());
    }
    Err(Stop::Verdict(format!("{}: not sound: {}", args.path.display(), count(faults.len(), "fault"))))
}

/// Whether the path itself could not be opened or holds no checkpoint.
fn is_absent(fault: &Error, args: &Args) -> bool {
    matches!(fault.kind(), Kind::Io | Kind::UnknownFormat | Kind::Argument) && fault.path() == Some(&*args.path)
}

fn write_text(out: &mut dyn Write, args: &Args, faults: &[Error], scan: Option<&Scan>) -> io::Result<()> {
    for fault in faults {
        writeln!(out, "{}: {}", fault.kind(), one_line(&fault.to_string()))?;
    }
    if let Some(scan) = scan {
        if !scan.deep.is_empty() {
            let mut table = Table::new([("tensor", Align::Left), ("nan", Align::Right), ("inf", Align::Right)]);
            for found in &scan.deep {
                table.row([found.tensor.clone(), found.nan.to_string(), found.inf.to_string()]);
            }
            table.write(out)?;
        }
        let found = count(scan.deep.len(), "tensor");
        writeln!(out, "scanned {} bytes: {found} with NaN or infinite values", scan.scanned_bytes)?;
    }
    if faults.is_empty() {
        writeln!(out, "{}: sound", one_line(&args.path.to_string_lossy()))?;
    }
    Ok(())
}

/// Reads every tensor. One that cannot be read becomes a fault; of a checkpoint that cannot be opened nothing is read.
fn scan(args: &Args, faults: &mut Vec<Error>) -> Result<Scan> {
    let mut scan = Scan::default();
    let files = match SafetensorsFiles::open(&args.path, Rules::Strict) {
        Ok(files) => files,
        // The faults say why already.
        Err(_) if !faults.is_empty() => return Ok(scan),
        Err(error) => return Err(error),
    };
    for info in files.index().iter() {
        match scan_tensor(&files, info, &mut scan.scanned_bytes) {
            Ok((0, 0)) => {}
            Ok((nan, inf)) => scan.deep.push(NotFinite { tensor: info.name().to_owned(), nan, inf }),
            Err(error) => faults.push(error.with_tensor(info.name()).with_path(files.path(info.file()))),
        }
    }
    Ok(scan)
}

/// Memory for one read; a whole number of elements of every dtype that is counted.
const PIECE_BYTES: u64 = 4 << 20;

/// The NaN and infinite values of one tensor.
fn scan_tensor(files: &SafetensorsFiles, info: TensorInfo<'_>, scanned: &mut u64) -> Result<(u64, u64)> {
    let Some(source) = files.sources().get(info.file()) else {
        return Err(Error::new(Kind::Internal, "the tensor lies in no file"));
    };
    let range = info.range();
    let (mut at, mut nan, mut inf) = (range.start(), 0, 0);
    while at < range.end() {
        let end = at.saturating_add(PIECE_BYTES).min(range.end());
        let piece = source.read_range(ByteRange::new(at, end).unwrap_or_default())?;
        let found = count_not_finite(info.dtype(), &piece);
        (at, nan, inf) = (end, nan + found.0, inf + found.1);
        *scanned += piece.len() as u64;
    }
    Ok((nan, inf))
}

/// How many NaN and infinite values there are in `bytes`: none for dtypes other than the common floats.
fn count_not_finite(dtype: Dtype, bytes: &[u8]) -> (u64, u64) {
    match dtype {
        Dtype::F64 => tally(bytes, |b| f64::from_le_bytes(b).is_nan(), |b| f64::from_le_bytes(b).is_infinite()),
        Dtype::F32 => tally(bytes, |b| f32::from_le_bytes(b).is_nan(), |b| f32::from_le_bytes(b).is_infinite()),
        Dtype::F16 => tally(bytes, |b| magnitude(b) > 0x7c00, |b| magnitude(b) == 0x7c00),
        Dtype::Bf16 => tally(bytes, |b| magnitude(b) > 0x7f80, |b| magnitude(b) == 0x7f80),
        // The finite kind: all ones is the only NaN, and there is no infinity.
        Dtype::F8E4M3 => tally(bytes, |[b]| b & 0x7f == 0x7f, |[_]| false),
        Dtype::F8E5M2 => tally(bytes, |[b]| b & 0x7f > 0x7c, |[b]| b & 0x7f == 0x7c),
        _ => (0, 0),
    }
}

/// A 16-bit float's bits without its sign.
fn magnitude(bytes: [u8; 2]) -> u16 {
    u16::from_le_bytes(bytes) & 0x7fff
}

fn tally<const N: usize>(
    bytes: &[u8],
    is_nan: impl Fn([u8; N]) -> bool,
    is_inf: impl Fn([u8; N]) -> bool,
) -> (u64, u64) {
    let (elements, _) = bytes.as_chunks::<N>();
    elements
        .iter()
        .fold((0, 0), |(nan, inf), &element| (nan + u64::from(is_nan(element)), inf + u64::from(is_inf(element))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_eight_bit_floats() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(count_not_finite(Dtype::F8E4M3, &all), (2, 0));
        assert_eq!(count_not_finite(Dtype::F8E5M2, &all), (6, 2));
        assert_eq!(count_not_finite(Dtype::U8, &all), (0, 0));
    }

    #[test]
    fn counts_of_sixteen_bit_floats() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        assert_eq!(count_not_finite(Dtype::F16, &all), (2 * 1023, 2));
        assert_eq!(count_not_finite(Dtype::Bf16, &all), (2 * 127, 2));
    }
}
