//! GGUF checkpoints of one or many files.

use super::{CheckpointFiles, Format};
use crate::gguf::{ByteOrder, GgufFile, Metadata as Values, Splits};
use crate::index::Entries;
use crate::safetensors::{Metadata, Opener, open_threads, try_map};
use crate::source::ByteSource;
use crate::{Error, Kind, Result};
use std::path::Path;
use std::sync::Arc;

/// Arrays of the metadata with more elements are told by type and length alone where all of it is made into texts.
const SHOWN_ELEMENTS: usize = 16;

/// Opens the file `source`, and with it all others of the model where it is a part of one.
pub(super) fn open_file(path: &Path, source: Arc<dyn ByteSource>, open: &Opener<'_>) -> Result<CheckpointFiles> {
    let first = GgufFile::open(source)?;
    let paths = Splits::paths(path, &first)?;
    if let [_] = paths.as_slice() {
        return merge(vec![first]);
    }
    let opened = try_map(&paths, open_threads(paths.len()), |_, part| {
        if part == path {
            return Ok(first.clone());
        }
        let source = open(part).map_err(|error| match is_absent(&error) {
            true => Error::new(Kind::MissingShard, "a part of a split file is missing")
                .with_path(part)
                .with_expected(format!("the {} parts that {} counts", paths.len(), path.display()))
                .with_got("no such file")
                .with_source(error),
            false => error,
        })?;
        GgufFile::open(source)
    })?;
    merge(opened)
}

fn is_absent(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

/// Opens sources, which are numbered in their order: whole files, or all parts of a split one.
pub(super) fn open_sources(sources: Vec<Arc<dyn ByteSource>>) -> Result<CheckpointFiles> {
    merge(try_map(&sources, open_threads(sources.len()), |_, source| GgufFile::open(Arc::clone(source)))?)
}

/// One index over all files. The files come first among the sources, the big-endian ones once more behind them as sources
/// from which they are read little-endian.
fn merge(opened: Vec<GgufFile>) -> Result<CheckpointFiles> {
    Splits::check(&opened)?;
    let file_count = opened.len();
    let mut sources: Vec<Arc<dyn ByteSource>> = opened.iter().map(|file| Arc::clone(file.source())).collect();
    let mut entries = Entries::default();
    for (number, file) in opened.iter().enumerate() {
        let from = match file.header().byte_order() {
            ByteOrder::Little => number,
            ByteOrder::Big => {
                sources.push(Arc::clone(file.tensor_source()));
                sources.len() - 1
            }
        };
        for info in file.index().iter() {
            entries
                .push(info.name(), info.dtype(), info.shape(), from, info.range())
                .map_err(|error| error.with_path(file.source().path()))?;
        }
    }
    let path = |file: usize| sources.get(file).map_or(Path::new(""), |source| source.path());
    let index = entries.into_index(|first, second| {
        Err(Error::new(Kind::DuplicateName, "two files hold a tensor of one name")
            .with_tensor(second.name())
            .with_path(path(second.file()))
            .with_offset(second.range().start())
            .with_expected("each name once")
            .with_got(format!("it in {} too", path(first.file()).display())))
    })?;
    Ok(CheckpointFiles {
        format: Format::Gguf,
        sources,
        file_count,
        metadata: Vec::new(),
        index,
        index_file: None,
        pytorch: Vec::new(),
        gguf: opened,
    })
}

/// The metadata of all files as texts. Where files disagree on a key, the first file's value stands.
pub(super) fn to_metadata(files: &[GgufFile]) -> Metadata {
    let mut all = Metadata::new();
    for (key, value) in files.iter().flat_map(|file| file.metadata().iter()) {
        if !all.contains_key(key) {
            all.insert(key.to_owned(), Values::to_text(&value, SHOWN_ELEMENTS));
        }
    }
    all
}
