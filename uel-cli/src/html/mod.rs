//! `uel inspect --html`: one page that needs nothing else.
//!
//! Names and metadata are strangers' text. Every one of them goes through [`text`], none stands in the script or in
//! a style, and the page forbids itself to fetch anything.

use crate::Stop;
use crate::inspect::{file_name, module, summary, totals};
use crate::table::{escape, size};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use uel_core::TensorInfo;
use uel_core::checkpoint::CheckpointFiles;

const HEAD: &str = include_str!("head.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Writes the page about a checkpoint to `path`. A file that is there stays whole until the page takes its place.
pub(crate) fn write_file(
    path: &Path,
    about: &Path,
    files: &CheckpointFiles,
    infos: &[TensorInfo<'_>],
) -> Result<(), Stop> {
    let same = |file: &Path| fs::canonicalize(file).ok().is_some_and(|file| fs::canonicalize(path).ok() == Some(file));
    let mut own = files.files().iter().map(|source| source.path()).chain(files.index_file());
    let written = match own.any(same) {
        true => Err(io::Error::other("it is a file of the checkpoint")),
        false => replace(path, |out| write_page(out, about, files, infos)),
    };
    written.map_err(|error| Stop::File(path.to_path_buf(), error))
}

/// Writes a sibling of `path` and renames it to `path`.
fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    // A link stays a link, and what it leads to is replaced.
    let target = match fs::canonicalize(path) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_path_buf(),
        Err(error) => return Err(error),
    };
    if fs::metadata(&target).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io::Error::other("it is no regular file"));
    }
    let Some(name) = target.file_name() else { return Err(io::Error::other("it is no name of a file")) };
    let mut sibling = std::ffi::OsString::from(".");
    sibling.push(name);
    sibling.push(format!(".{}.tmp", std::process::id()));
    let sibling: PathBuf = target.with_file_name(sibling);

    let mut out = BufWriter::new(File::create_new(&sibling)?);
    let written = write(&mut out).and_then(|()| out.flush()).and_then(|()| out.get_ref().sync_all());
    let (file, _) = out.into_parts();
    drop(file);
    let done = written.and_then(|()| fs::rename(&sibling, &target));
    if done.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&sibling);
    }
    done
}

fn write_page(out: &mut dyn Write, about: &Path, files: &CheckpointFiles, infos: &[TensorInfo<'_>]) -> io::Result<()> {
    let title = text(&about.to_string_lossy());
    writeln!(out, "{HEAD}<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>")?;
    writeln!(out, "<body>\n<h1>{title}</h1>\n<p>{}</p>", text(&summary(files, infos)))?;

    write_totals(out, "dtype", &totals(infos, |info| info.dtype().as_str()))?;
    write_totals(out, "module", &totals(infos, |info| module(info.name())))?;

    writeln!(out, "<h2>Files</h2>\n<table>\n<tr><th>file<th class=n>size</tr>")?;
    for source in files.files() {
        writeln!(out, "<tr><td>{}{}</tr>", text(&source.path().to_string_lossy()), byte_cell(source.byte_len()))?;
    }
    writeln!(out, "</table>")?;

    let metadata = files.to_metadata();
    if !metadata.is_empty() {
        writeln!(out, "<h2>Metadata</h2>\n<table>")?;
        for (key, value) in &metadata {
            writeln!(out, "<tr><th>{}<td>{}</tr>", text(key), text(value))?;
        }
        writeln!(out, "</table>")?;
    }

    writeln!(
        out,
        "<h2>Tensors</h2>\n<p><input id=filter type=search placeholder=\"Filter\" aria-label=\"Filter tensors\"> \
         <span id=shown>{0} of {0}</span></p>\n<table id=tensors>\n<thead><tr>\
         <th aria-sort=none>name<th aria-sort=none>dtype<th aria-sort=none>shape<th aria-sort=none class=n>size\
         <th aria-sort=none>file</tr></thead>\n<tbody>",
        infos.len()
    )?;
    for info in infos {
        writeln!(
            out,
            "<tr><td>{}<td>{}<td data-v=\"{}\">{:?}{}<td>{}</tr>",
            text(info.name()),
            info.dtype(),
            // Shapes are in the order of their numbers of elements.
            info.elem_count(),
            info.shape(),
            byte_cell(info.byte_len()),
            text(&file_name(files.path(info.file())))
        )?;
    }
    writeln!(out, "</tbody>\n</table>\n<script>\n{SCRIPT}</script>\n</body>\n</html>")
}

fn write_totals(out: &mut dyn Write, of: &str, totals: &BTreeMap<&str, (usize, u64)>) -> io::Result<()> {
    writeln!(out, "<h2>By {of}</h2>\n<table>\n<tr><th>{of}<th class=n>tensors<th class=n>size</tr>")?;
    for (key, (tensors, bytes)) in totals {
        writeln!(out, "<tr><td>{}<td class=n>{tensors}{}</tr>", text(key), byte_cell(*bytes))?;
    }
    writeln!(out, "</table>")
}

fn byte_cell(bytes: u64) -> String {
    format!("<td class=n data-v=\"{bytes}\">{}", size(bytes))
}

/// `text` as the content of an element: what cannot be seen is shown as an escape, and nothing of it is markup.
fn text(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in escape(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_never_markup() {
        assert_eq!(text("</script><b a='\"&\u{202e}\n"), "&lt;/script&gt;&lt;b a=&#39;&quot;&amp;\\u{202e}\\n");
        assert_eq!(text("größe 重み"), "größe 重み");
    }

    #[test]
    fn a_failed_write_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.html");
        fs::write(&path, "old").unwrap();
        assert!(replace(&path, |_| Err(io::Error::other("no"))).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        replace(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(replace(dir.path(), |_| Ok(())).is_err());
    }
}
