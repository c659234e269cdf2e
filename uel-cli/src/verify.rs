//! `uel verify`: every fault of a checkpoint, and on demand a scan of its values and a check of its hashes.

use crate::args::Opening;
use crate::scan::{Scan, scan};
use crate::table::{Align, Table, count, one_line};
use crate::{Stop, crc, to_stdout, write_json};
use serde::Serialize;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use uel_core::checkpoint::{CheckpointFiles, Format, open_source};
use uel_core::pytorch::{Global, PytorchFile, Verdict, scan_globals};
use uel_core::source::shown;
use uel_core::{Error, Kind, Result};

#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  uel verify model.safetensors.index.json --deep")]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    path: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Read every tensor too: check the hashes and CRCs of files that have them, and count NaN and infinite values (which
    /// are reported, and no faults)
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
    /// What the pickles of PyTorch files name; absent for other formats.
    #[serde(skip_serializing_if = "Option::is_none")]
    globals: Option<&'a [GlobalEntry]>,
    /// Tensors of PyTorch files that are described and cannot be read; absent for other formats.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<Vec<Unreadable>>,
    #[serde(flatten)]
    scan: Option<&'a Scan>,
}

#[derive(Serialize)]
struct Unreadable {
    tensor: String,
    why: String,
}

/// A class or function that a pickle names.
#[derive(Serialize)]
struct GlobalEntry {
    global: String,
    offset: u64,
    verdict: &'static str,
    called: bool,
    file: String,
}

impl GlobalEntry {
    fn new(global: &Global, path: &Path) -> Self {
        Self {
            global: format!("{}.{}", global.module(), global.name()),
            offset: global.offset(),
            verdict: match global.verdict() {
                Verdict::Allowed => "allowed",
                Verdict::Dangerous => "dangerous",
                _ => "unknown",
            },
            called: global.is_called(),
            file: path.to_string_lossy().into_owned(),
        }
    }

    fn fault(&self) -> Error {
        let error = Error::new(Kind::DangerousGlobal, "the pickle names what can run code where Python loads it");
        error.with_path(&self.file).with_got(&self.global)
    }

    /// What `torch.load` would do with it.
    fn in_words(&self) -> &'static str {
        match (self.verdict, self.called) {
            ("allowed", _) => "makes tensors or plain data",
            ("dangerous", true) => "DANGEROUS: torch.load(weights_only=False) would run it",
            ("dangerous", false) => "DANGEROUS: torch.load(weights_only=False) would import it",
            (_, true) => "torch.load(weights_only=False) would run it; weights_only=True refuses it",
            (_, false) => "torch.load(weights_only=False) would import it; weights_only=True refuses it",
        }
    }
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

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let mut faults = CheckpointFiles::faults(&args.path, &args.opening.options());
    let scan = if args.deep { Some(deep_scan(args, &mut faults)?) } else { None };
    let globals = globals_of(args);
    let unreadable = globals.as_ref().map(|_| unreadable_of(args));
    faults.extend(globals.iter().flatten().filter(|global| global.verdict == "dangerous").map(GlobalEntry::fault));

    // Where there is no checkpoint at all there is nothing to report on, and the error is the one line.
    if !args.json && faults.len() == 1 && faults.iter().all(|fault| is_absent(fault, args)) {
        return faults.pop().map_or(Ok(()), |fault| Err(fault.into()));
    }
    to_stdout(|out| match args.json {
        true => write_json(
            out,
            &Report {
                path: shown(&args.path).to_string_lossy().into_owned(),
                ok: faults.is_empty(),
                faults: faults.iter().map(Fault::from).collect(),
                globals: globals.as_deref(),
                unreadable,
                scan: scan.as_ref(),
            },
        ),
        false => {
            for tensor in unreadable.iter().flatten() {
                writeln!(out, "cannot be read: {}: {}", one_line(&tensor.tensor), one_line(&tensor.why))?;
            }
            write_text(out, args, &faults, globals.as_deref(), scan.as_ref())
        }
    })?;
    if faults.is_empty() {
        return Ok(());
    }
    Err(Stop::Verdict(format!("{}: not sound: {}", shown(&args.path).display(), count(faults.len(), "fault"))))
}

/// Whether the path itself could not be opened or holds no checkpoint.
fn is_absent(fault: &Error, args: &Args) -> bool {
    matches!(fault.kind(), Kind::Io | Kind::Remote | Kind::Timeout | Kind::UnknownFormat | Kind::Argument)
        && fault.path() == Some(&*shown(&args.path))
}

fn unreadable_of(args: &Args) -> Vec<Unreadable> {
    let Ok(files) = args.opening.files(&args.path) else { return Vec::new() };
    let tensors = files.pytorch().iter().flat_map(PytorchFile::unreadable);
    tensors.map(|tensor| Unreadable { tensor: tensor.name.clone(), why: tensor.why.clone() }).collect()
}

/// What the pickles of PyTorch files name: of files that cannot be opened too, as far as their pickles can be read.
fn globals_of(args: &Args) -> Option<Vec<GlobalEntry>> {
    if let Ok(files) = args.opening.files(&args.path) {
        let entries = |file: &PytorchFile| {
            let path = file.sources().first().map_or(PathBuf::new(), |source| source.path().to_path_buf());
            file.globals().iter().map(|global| GlobalEntry::new(global, &path)).collect::<Vec<_>>()
        };
        return (files.format() == Format::Pytorch).then(|| files.pytorch().iter().flat_map(entries).collect());
    }
    let source = open_source(&args.path, &args.opening.options()).ok()?;
    let globals = scan_globals(&*source).ok()?;
    Some(globals.iter().map(|global| GlobalEntry::new(global, &shown(&args.path))).collect())
}

fn write_text(
    out: &mut dyn Write,
    args: &Args,
    faults: &[Error],
    globals: Option<&[GlobalEntry]>,
    scan: Option<&Scan>,
) -> io::Result<()> {
    if let Some(globals) = globals {
        let several = globals.iter().any(|global| globals.first().is_some_and(|first| first.file != global.file));
        let mut table =
            Table::new([("global", Align::Left), ("byte", Align::Right), ("what loading means", Align::Left)]);
        for global in globals {
            let place = if several { format!(" (in {})", one_line(&global.file)) } else { String::new() };
            let words = format!("{}{place}", global.in_words());
            table.row([one_line(&global.global), global.offset.to_string(), words]);
        }
        table.write(out)?;
        let refused = globals.iter().filter(|global| global.verdict != "allowed").count();
        let dangerous = globals.iter().filter(|global| global.verdict == "dangerous").count();
        writeln!(
            out,
            "{} named, {refused} that weights_only=True refuses, {dangerous} dangerous; UEL runs none",
            count(globals.len(), "global")
        )?;
    }
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
        if let Some(hashed) = scan.hashed {
            writeln!(out, "checked {} by hash", count(hashed, "tensor"))?;
        }
    }
    if faults.is_empty() {
        writeln!(out, "{}: sound", one_line(&shown(&args.path).to_string_lossy()))?;
    }
    Ok(())
}

/// Reads every tensor. One that cannot be read becomes a fault, and so does every piece with a wrong hash; of a checkpoint that cannot be opened nothing is read.
fn deep_scan(args: &Args, faults: &mut Vec<Error>) -> Result<Scan> {
    match args.opening.files(&args.path) {
        Ok(files) => {
            let mut scan = scan(&files);
            faults.append(&mut scan.faults);
            faults.extend(crc::faults(&files));
            Ok(scan)
        }
        // The faults say why already.
        Err(_) if !faults.is_empty() => Ok(Scan::default()),
        Err(error) => Err(error),
    }
}
