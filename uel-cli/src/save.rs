//! What commands that write checkpoints have in common: the work, its progress and its report.

use crate::memory::peak_rss_bytes;
use crate::progress::Progress;
use crate::table::{count, one_line, size};
use crate::{Stop, to_stdout, write_json};
use serde::Serialize;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;
use uel_candle::{Edit, FileFormat, SaveOptions, Written};
use uel_core::source::{is_url, shown};
use uel_core::{Error, Kind, Result};

/// What was written.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    written: Vec<File>,
    tensor_count: usize,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct File {
    path: String,
    bytes: u64,
}

impl Report {
    /// What was done since `began`.
    pub(crate) fn new(files: &[Written], tensor_count: usize, began: Instant) -> Self {
        let file = |file: &Written| File { path: file.path.to_string_lossy().into_owned(), bytes: file.bytes };
        Self {
            written: files.iter().map(file).collect(),
            tensor_count,
            seconds: began.elapsed().as_secs_f64(),
            peak_rss_bytes: peak_rss_bytes(),
        }
    }

    /// Prints it as one JSON object, or as text.
    pub(crate) fn print(&self, json: bool) -> Result<(), Stop> {
        to_stdout(|out| if json { write_json(out, self) } else { self.write_text(out) })
    }

    fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        for file in &self.written {
            writeln!(out, "wrote {} ({})", one_line(&file.path), size(file.bytes))?;
        }
        let (tensors, files) = (count(self.tensor_count, "tensor"), count(self.written.len(), "file"));
        let peak = self.peak_rss_bytes.map_or_else(String::new, |bytes| format!(", peak memory {}", size(bytes)));
        writeln!(out, "{tensors} in {files}, {:.2} s{peak}", self.seconds)
    }
}

/// Writes `edit` to `path`: one file, or shards of at most `shard_bytes` bytes of tensors, in the format that its
/// extension stands for.
pub(crate) fn write(
    edit: &Edit,
    path: &Path,
    mut options: SaveOptions,
    shard_bytes: Option<u64>,
    began: Instant,
) -> Result<Report> {
    if is_url(path) {
        let error = Error::new(Kind::Argument, "checkpoints are written to this machine only").with_path(shown(path));
        return Err(error.with_expected("a path"));
    }
    // Folders that come into being for the shards go again where those do not.
    let is_new = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
    let new_folders: Vec<&Path> = path.ancestors().take_while(is_new).filter(|_| shard_bytes.is_some()).collect();
    options = options.with_format(FileFormat::of_path(path));
    if let Some(bytes) = shard_bytes {
        options = options.with_max_shard_bytes(bytes);
    }
    let progress = Progress::of_bytes(0);
    let options = options.with_progress(move |done| progress.set(done.bytes_done, done.bytes_total));
    let written = edit.write(path, &options);
    for folder in new_folders.into_iter().filter(|_| written.is_err()) {
        // Fails unless it is an empty folder, which is all that is meant.
        let _ = std::fs::remove_dir(folder);
    }
    let report = written?;
    Ok(Report::new(&report.files, report.tensor_count, began))
}
