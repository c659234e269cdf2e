//! `uel recover`: what a killed process left half done.

use crate::table::one_line;
use crate::{Stop, to_stdout, write_json};
use serde::Serialize;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use uel_core::disk::LocalDisk;
use uel_core::safetensors::{recover_set, undo_patch};
use uel_core::{Error, Result};

/// How the name of the file begins and ends that keeps what a patch overwrites; the patched file's name is between.
const UNDO: (&str, &str) = (".", ".uel-undo");

/// Complete an interrupted replacement of shards, and undo interrupted patches.
///
/// A folder of shards that were being replaced gets the new ones; a file that was being patched gets its old bytes back.
/// Where nothing was interrupted nothing is done. No other process may be writing to the files meanwhile.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  uel recover sharded/\n  uel recover model.safetensors")]
pub(crate) struct Args {
    /// A folder, or a file in it: of the folder all patched files are looked at, of a file it alone
    path: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    path: String,
    /// Whether an interrupted replacement was completed.
    completed_set: bool,
    /// The files whose patches were undone.
    undone_patches: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let path = &args.path;
    let is_folder = path.is_dir();
    let folder = match path.parent() {
        _ if is_folder => path,
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let completed_set = recover_set(&LocalDisk, folder)?;
    // An index file that was to be replaced may be gone until the replacement is complete.
    fs::metadata(path).map_err(|error| Error::io("look at", path, error))?;
    let index = path.extension().is_some_and(|extension| extension == "json");
    let files = if is_folder || index { patched(folder)? } else { vec![path.clone()] };
    let mut undone_patches = Vec::new();
    for file in files {
        if undo_patch(&file)? {
            undone_patches.push(file.to_string_lossy().into_owned());
        }
    }
    let report = Report { path: path.to_string_lossy().into_owned(), completed_set, undone_patches };
    to_stdout(|out| if args.json { write_json(out, &report) } else { write_text(out, folder, &report) })
}

/// The files of a folder whose patches were interrupted.
fn patched(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| Error::io("list", folder, error))? {
        let name = entry.map_err(|error| Error::io("list", folder, error))?.file_name();
        // Only names in UTF-8 can be taken apart; others have to be given by themselves.
        let own = name.to_str().and_then(|name| name.strip_prefix(UNDO.0)?.strip_suffix(UNDO.1));
        if let Some(own) = own.filter(|own| !own.is_empty()) {
            files.push(folder.join(own));
        }
    }
    files.sort();
    Ok(files)
}

fn write_text(out: &mut dyn Write, folder: &Path, report: &Report) -> io::Result<()> {
    if report.completed_set {
        writeln!(out, "{}: completed an interrupted replacement", one_line(&folder.to_string_lossy()))?;
    }
    for file in &report.undone_patches {
        writeln!(out, "{}: undid an interrupted patch", one_line(file))?;
    }
    if !report.completed_set && report.undone_patches.is_empty() {
        writeln!(out, "{}: nothing was interrupted", one_line(&report.path))?;
    }
    Ok(())
}
