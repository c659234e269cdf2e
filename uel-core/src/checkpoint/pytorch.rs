//! PyTorch checkpoints of one or many files.

use super::{CheckpointFiles, Format};
use crate::pytorch::{PytorchFile, PytorchOptions};
use crate::safetensors::{IndexFile, Opener, missing_shard, open_threads, read_index_file, shard_paths, try_map};
use crate::source::ByteSource;
use crate::{Error, Kind, Result, TensorIndex, TensorIndexBuilder};
use std::path::Path;
use std::sync::Arc;

/// Opens sources, which are numbered in their order.
pub(super) fn open_sources(sources: Vec<Arc<dyn ByteSource>>, options: &PytorchOptions) -> Result<CheckpointFiles> {
    let open = |_: usize, source: &Arc<dyn ByteSource>| PytorchFile::open(Arc::clone(source), options);
    merge(try_map(&sources, open_threads(sources.len()), open)?)
}

/// Opens the shards that an index file names, and holds them to its weight_map.
pub(super) fn open_index_file(path: &Path, options: &PytorchOptions, open: &Opener<'_>) -> Result<CheckpointFiles> {
    let json = read_index_file(path, open)?;
    let index_file = IndexFile::decode_strictly(&json)?;
    let shards = shard_paths(path, &index_file);
    let opened = try_map(&shards, open_threads(shards.len()), |_, shard| {
        let source = open(shard).map_err(|error| missing_shard(error, shard, path))?;
        let format = Format::of(&*source)?;
        if format != Format::Pytorch {
            return Err(Error::new(Kind::UnknownFormat, "the shard is no PyTorch file")
                .with_path(shard)
                .with_expected(Format::Pytorch)
                .with_got(format));
        }
        PytorchFile::open(source, options)
    })?;
    let mut files = merge(opened)?;
    for (name, shard) in &index_file.weights {
        let path = shards.get(*shard);
        let error = match files.index.get(name) {
            Some(info) if path.is_some_and(|path| files.path(info.file()) == path) => continue,
            Some(info) => Error::new(Kind::WeightMap, "the tensor lies in another shard than the weight_map says")
                .with_expected(path.map_or(String::new(), |path| path.display().to_string()))
                .with_got(files.path(info.file()).display()),
            None => Error::new(Kind::WeightMap, "the shard lacks a tensor that the weight_map says it holds")
                .with_expected(format!("it in {}", path.map_or(Path::new(""), |path| path).display()))
                .with_got("no shard with it"),
        };
        return Err(error.with_tensor(name));
    }
    files.index_file = Some(path.to_path_buf());
    Ok(files)
}

/// One index over all files. The files come first among the sources, what is made from them behind.
fn merge(opened: Vec<PytorchFile>) -> Result<CheckpointFiles> {
    let file_count = opened.len();
    let mut sources: Vec<Arc<dyn ByteSource>> = Vec::with_capacity(file_count);
    let mut made = Vec::new();
    let mut numbers = Vec::with_capacity(file_count);
    for file in &opened {
        let (first, rest) =
            file.sources().split_first().ok_or_else(|| Error::new(Kind::Internal, "an opened file has no source"))?;
        sources.push(Arc::clone(first));
        numbers.push(file_count + made.len());
        made.extend(rest.iter().cloned());
    }
    sources.append(&mut made);
    // Of a single file the numbers are those of its sources.
    if let [only] = opened.as_slice() {
        let index = only.index().clone();
        return Ok(files(sources, file_count, index, opened));
    }
    let mut index = TensorIndexBuilder::with_capacity(opened.iter().map(|file| file.index().len()).sum(), 0);
    for (number, (file, &made)) in opened.iter().zip(&numbers).enumerate() {
        for info in file.index().iter() {
            let to = if info.file() == 0 { number } else { made + info.file() - 1 };
            let pushed = index.push(info.name(), info.dtype(), info.shape(), to, info.range());
            pushed.map_err(|error| match sources.get(number) {
                Some(source) => error.with_path(source.path()),
                None => error,
            })?;
        }
    }
    Ok(files(sources, file_count, index.finish(), opened))
}

fn files(
    sources: Vec<Arc<dyn ByteSource>>,
    file_count: usize,
    index: TensorIndex,
    pytorch: Vec<PytorchFile>,
) -> CheckpointFiles {
    CheckpointFiles {
        format: Format::Pytorch,
        sources,
        file_count,
        metadata: Vec::new(),
        index,
        index_file: None,
        pytorch,
        gguf: Vec::new(),
    }
}
