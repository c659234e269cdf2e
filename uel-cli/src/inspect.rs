//! `uel inspect`: what a checkpoint holds, from its headers alone.

use crate::args::Opening;
use crate::table::{Align, Table, count, escape, one_line, size};
use crate::{Stop, html, to_stdout, write_json};
use globset::{Glob, GlobMatcher};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uel_core::ByteSource;
use uel_core::TensorInfo;
use uel_core::checkpoint::CheckpointFiles;
use uel_core::pytorch::PytorchFile;
use uel_core::safetensors::write::HASHES_KEY;
use uel_core::source::shown;

#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  uel inspect model/ --json --filter 'model.layers.0.*'\n  uel inspect model.safetensors --html model.html"
)]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, the index.json of a sharded checkpoint, or (with the
    /// feature `remote`) the URL of one
    path: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Write one HTML page to OUT, with tables to filter and sort, that needs no other file and no network
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,
    /// Only tensors whose name contains TEXT, or matches it as a glob where it has any of *?[{
    #[arg(long, value_name = "TEXT", value_parser = Filter::parse)]
    filter: Option<Filter>,
}

/// Which tensors are of interest.
#[derive(Clone, Debug)]
enum Filter {
    Substring(String),
    Glob(GlobMatcher),
}

impl Filter {
    fn parse(text: &str) -> Result<Self, globset::Error> {
        if text.contains(['*', '?', '[', '{']) {
            return Ok(Self::Glob(Glob::new(text)?.compile_matcher()));
        }
        Ok(Self::Substring(text.to_owned()))
    }

    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Substring(part) => name.contains(part),
            Self::Glob(glob) => glob.is_match(name),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    path: String,
    format: &'static str,
    files: Vec<FileEntry>,
    /// Texts; of GGUF files numbers, booleans and arrays too.
    metadata: serde_json::Value,
    /// What PyTorch files have besides tensors: one value for each file.
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<&'a serde_json::Value>>,
    tensors: Vec<TensorEntry<'a>>,
    total_bytes: u64,
    tensor_count: usize,
}

#[derive(Serialize)]
struct FileEntry {
    path: String,
    bytes: u64,
    /// What kind of PyTorch file it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
}

#[derive(Serialize)]
struct TensorEntry<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [usize],
    bytes: u64,
    file: std::borrow::Cow<'a, str>,
    offset: u64,
    /// Of PyTorch files: which storage it is a part of, and how its elements lie there.
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    detail: Option<Detail>,
}

#[derive(Serialize)]
struct Detail {
    storage: String,
    storage_offset: u64,
    /// In bytes.
    strides: Vec<u64>,
    requires_grad: bool,
    /// Whether its bytes are made from the file's: `offset` then counts in what is made.
    derived: bool,
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let files = args.opening.files(&args.path)?;
    let wanted = |info: &TensorInfo<'_>| args.filter.as_ref().is_none_or(|filter| filter.matches(info.name()));
    let infos: Vec<_> = files.index().iter().filter(wanted).collect();
    if let Some(path) = &args.html {
        html::write_file(path, &shown(&args.path), &files, &infos)?;
    }
    to_stdout(|out| match (args.json, &args.html) {
        (true, _) => write_json(out, &report(&args.path, &files, &infos)),
        (false, Some(path)) => writeln!(out, "wrote {}", one_line(&path.to_string_lossy())),
        (false, None) => write_tables(out, &files, &infos),
    })
}

fn report<'a>(path: &Path, files: &'a CheckpointFiles, infos: &[TensorInfo<'a>]) -> Report<'a> {
    let file_entry = |(number, source): (usize, &Arc<dyn ByteSource>)| FileEntry {
        path: source.path().to_string_lossy().into_owned(),
        bytes: source.byte_len(),
        container: files.pytorch().get(number).map(|file| file.container().to_string()),
    };
    let detail = |info: &TensorInfo<'a>| {
        let found = files.pytorch().iter().find_map(|file| file.detail(info.name()))?;
        Some(Detail {
            storage: found.storage,
            storage_offset: found.storage_offset,
            strides: found.strides,
            requires_grad: found.requires_grad,
            derived: info.file() >= files.files().len(),
        })
    };
    let tensor_entry = |info: &TensorInfo<'a>| TensorEntry {
        name: info.name(),
        dtype: info.dtype().as_str(),
        shape: info.shape(),
        bytes: info.byte_len(),
        file: files.path(info.file()).to_string_lossy(),
        offset: info.range().start(),
        detail: detail(info),
    };
    Report {
        path: shown(path).to_string_lossy().into_owned(),
        format: files.format().as_str(),
        files: files.files().iter().enumerate().map(file_entry).collect(),
        metadata: metadata(files),
        values: (!files.pytorch().is_empty()).then(|| files.pytorch().iter().map(PytorchFile::values).collect()),
        tensors: infos.iter().map(tensor_entry).collect(),
        total_bytes: total(infos),
        tensor_count: infos.len(),
    }
}

/// The metadata of all files, all of it. Where GGUF files disagree on a key, the first file's value stands, too.
fn metadata(files: &CheckpointFiles) -> serde_json::Value {
    let mut all = serde_json::Map::new();
    for (key, value) in files.gguf().iter().flat_map(|file| file.metadata().iter()) {
        if !all.contains_key(key) {
            all.insert(key.to_owned(), value.to_json());
        }
    }
    if files.gguf().is_empty() {
        all.extend(files.to_metadata().into_iter().map(|(key, value)| (key, value.into())));
    }
    all.into()
}

fn write_tables(out: &mut dyn Write, files: &CheckpointFiles, infos: &[TensorInfo<'_>]) -> io::Result<()> {
    let mut tensors = Table::new([
        ("name", Align::Left),
        ("dtype", Align::Left),
        ("shape", Align::Left),
        ("size", Align::Right),
        ("file", Align::Left),
    ]);
    for info in infos {
        tensors.row([
            info.name().to_owned(),
            info.dtype().to_string(),
            format!("{:?}", info.shape()),
            size(info.byte_len()),
            file_name(files.path(info.file())),
        ]);
    }
    tensors.write(out)?;

    write_totals(out, "dtype", infos, |info| info.dtype().as_str())?;
    write_totals(out, "module", infos, |info| module(info.name()))?;

    writeln!(out)?;
    let mut shards = Table::new([("file", Align::Left), ("size", Align::Right)]);
    for source in files.files() {
        shards.row([source.path().to_string_lossy().into_owned(), size(source.byte_len())]);
    }
    shards.write(out)?;

    let metadata = files.to_metadata();
    if !metadata.is_empty() {
        writeln!(out, "\nmetadata")?;
        for (key, value) in &metadata {
            // A megabyte of digits tells nobody anything, nor does a template of pages; `--json` has them.
            match key == HASHES_KEY {
                true => writeln!(out, "  {key}: hashes ({} bytes)", value.len())?,
                false if files.gguf().is_empty() => writeln!(out, "  {}: {}", escape(key), escape(value))?,
                false => writeln!(out, "  {}: {}", escape(key), escape(&shortened(value)))?,
            }
        }
    }

    for file in files.pytorch() {
        write_values(out, file)?;
    }
    writeln!(out, "\n{}", summary(files, infos))
}

/// What a PyTorch file has besides tensors, a line for each: all of it is in `--json`.
fn write_values(out: &mut dyn Write, file: &PytorchFile) -> io::Result<()> {
    for tensor in file.unreadable() {
        writeln!(out, "\ncannot be read: {}: {}", one_line(&tensor.name), one_line(&tensor.why))?;
    }
    let is_tensor = |value: &serde_json::Value| value.as_str().is_some_and(|text| text.starts_with("<tensor "));
    let Some(values) = file.values().as_object() else { return Ok(()) };
    let values: Vec<_> = values.iter().filter(|(_, value)| !is_tensor(value)).collect();
    if values.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nvalues ({})", file.container())?;
    for (key, value) in values {
        writeln!(out, "  {}: {}", escape(key), escape(&shortened(&value.to_string())))?;
    }
    Ok(())
}

/// The beginning of a text that may be long.
fn shortened(text: &str) -> String {
    const SHOWN_CHARS: usize = 100;
    let cut: String = text.chars().take(SHOWN_CHARS).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut}{more}")
}

/// How much there is of everything, in one line.
pub(crate) fn summary(files: &CheckpointFiles, infos: &[TensorInfo<'_>]) -> String {
    let (bytes, all) = (total(infos), files.index().len());
    let of = if infos.len() == all { String::new() } else { format!(" (of {all})") };
    let (tensors, shards) = (count(infos.len(), "tensor"), count(files.files().len(), "file"));
    format!("{tensors}{of}, {} ({bytes} bytes), {shards}", size(bytes))
}

/// How many tensors and bytes there are of each `key`.
pub(crate) fn totals<'a>(
    infos: &[TensorInfo<'a>],
    key: impl Fn(&TensorInfo<'a>) -> &'a str,
) -> BTreeMap<&'a str, (usize, u64)> {
    let mut totals: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for info in infos {
        let (tensors, bytes) = totals.entry(key(info)).or_default();
        *tensors += 1;
        *bytes = bytes.saturating_add(info.byte_len());
    }
    totals
}

fn write_totals<'a>(
    out: &mut dyn Write,
    title: &str,
    infos: &[TensorInfo<'a>],
    key: impl Fn(&TensorInfo<'a>) -> &'a str,
) -> io::Result<()> {
    writeln!(out)?;
    let mut table = Table::new([(title, Align::Left), ("tensors", Align::Right), ("size", Align::Right)]);
    for (key, (tensors, bytes)) in totals(infos, key) {
        table.row([key.to_owned(), tensors.to_string(), size(bytes)]);
    }
    table.write(out)
}

/// The first two components of the module that a tensor belongs to: `model.layers` for `model.layers.0.mlp.weight`,
/// `lm_head` for `lm_head.weight`, and `-` for a tensor of no module.
pub(crate) fn module(name: &str) -> &str {
    let Some((module, _)) = name.rsplit_once('.') else { return "-" };
    match module.match_indices('.').nth(1) {
        Some((end, _)) => module.get(..end).unwrap_or(module),
        None => module,
    }
}

fn total(infos: &[TensorInfo<'_>]) -> u64 {
    infos.iter().map(TensorInfo::byte_len).fold(0, u64::saturating_add)
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_leave_out_the_parameter() {
        assert_eq!(module("model.layers.0.mlp.weight"), "model.layers");
        assert_eq!(module("model.norm.weight"), "model.norm");
        assert_eq!(module("lm_head.weight"), "lm_head");
        assert_eq!(module("scale"), "-");
        assert_eq!(module("..."), ".");
    }

    #[test]
    fn filters() {
        assert!(Filter::parse("attn").unwrap().matches("h.0.attn.weight"));
        assert!(!Filter::parse("attn.*").unwrap().matches("h.0.attn.weight"));
        assert!(Filter::parse("h.*.{attn,mlp}.*").unwrap().matches("h.0.attn.weight"));
        assert!(Filter::parse("[").is_err());
    }
}
