//! What a path stands for, before any format is asked.

use crate::safetensors::{IndexFile, Opener, folder_layout_error, read_index_file};
use crate::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// What is to be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Safetensors: a folder of shards, or an index file that names them.
    Safetensors,
    /// The index file of PyTorch shards.
    PytorchIndex(PathBuf),
    /// The PyTorch files of a folder.
    Pytorch(Vec<PathBuf>),
    /// A single file, whose first bytes are to be looked at.
    File,
}

/// The endings of PyTorch files.
const SUFFIXES: [&str; 4] = [".bin", ".pth", ".pt", ".ckpt"];

const INDEX_SUFFIX: &str = ".bin.index.json";

/// What `path` stands for.
pub(super) fn find(path: &Path, open: &Opener<'_>) -> Result<Found> {
    if path.is_dir() {
        return folder(path);
    }
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(Found::File);
    }
    // What is wrong with an index file is said by whoever opens it.
    let pytorch = read_index_file(path, open).is_ok_and(|json| {
        IndexFile::decode_strictly(&json).is_ok_and(|index_file| {
            let is_pytorch = |shard: &str| SUFFIXES.iter().any(|suffix| shard.ends_with(suffix));
            !index_file.shards.is_empty() && index_file.shards.iter().all(|shard| is_pytorch(shard))
        })
    });
    Ok(if pytorch { Found::PytorchIndex(path.to_path_buf()) } else { Found::Safetensors })
}

fn folder(path: &Path) -> Result<Found> {
    let Some(nothing) = folder_layout_error(path) else { return Ok(Found::Safetensors) };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| Error::io("list", path, error))? {
        let name = entry.map_err(|error| Error::io("list", path, error))?.file_name();
        names.extend(name.to_str().filter(|name| !name.starts_with('.')).map(str::to_owned));
    }
    names.sort();
    let indexes: Vec<&String> = names.iter().filter(|name| name.ends_with(INDEX_SUFFIX)).collect();
    let usual = indexes.iter().find(|name| **name == "pytorch_model.bin.index.json");
    match (usual.or(indexes.first()), indexes.len()) {
        (Some(index), len) if usual.is_some() || len == 1 => return Ok(Found::PytorchIndex(path.join(index))),
        (Some(_), _) => return Err(several(path, "index files", &indexes)),
        (None, _) => {}
    }
    if names.iter().any(|name| name == "pytorch_model.bin") {
        return Ok(Found::Pytorch(vec![path.join("pytorch_model.bin")]));
    }
    let files: Vec<&String> =
        names.iter().filter(|name| SUFFIXES.iter().any(|suffix| name.ends_with(suffix))).collect();
    match files.as_slice() {
        [] => Err(nothing),
        [only] => Ok(Found::Pytorch(vec![path.join(only)])),
        _ if files.iter().all(|name| is_shard(name)) => {
            Ok(Found::Pytorch(files.iter().map(|name| path.join(name)).collect()))
        }
        _ => Err(several(path, "PyTorch files", &files)),
    }
}

/// Whether a file is called `STEM-00001-of-00003.bin`.
fn is_shard(name: &str) -> bool {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    stem.rsplit_once("-of-")
        .is_some_and(|(rest, total)| digits(total) && rest.rsplit_once('-').is_some_and(|(_, number)| digits(number)))
}

fn several(path: &Path, what: &str, names: &[&String]) -> Error {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(|name| name.as_str()).collect();
    Error::new(Kind::Argument, format!("the folder has several {what}; name the one to open"))
        .with_path(path)
        .with_got(shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_of(names: &[&str]) -> Result<Found> {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let strip = |paths: Vec<PathBuf>| paths.iter().map(|path| path.file_name().unwrap().into()).collect();
        Ok(match super::folder(folder.path())? {
            Found::Pytorch(paths) => Found::Pytorch(strip(paths)),
            Found::PytorchIndex(path) => Found::PytorchIndex(path.file_name().unwrap().into()),
            other => other,
        })
    }

    #[test]
    fn finds_the_checkpoint_of_a_folder() {
        assert_eq!(folder_of(&["a.safetensors", "pytorch_model.bin"]).unwrap(), Found::Safetensors);
        let beside = ["pytorch_model.bin", "training_args.bin", "optimizer.pt"];
        assert_eq!(folder_of(&beside).unwrap(), Found::Pytorch(vec!["pytorch_model.bin".into()]));
        let shards = ["m-00001-of-00002.bin", "m-00002-of-00002.bin"];
        assert_eq!(folder_of(&shards).unwrap(), Found::Pytorch(shards.map(PathBuf::from).to_vec()));
        let indexed = ["pytorch_model.bin.index.json", "m-00001-of-00002.bin"];
        assert_eq!(folder_of(&indexed).unwrap(), Found::PytorchIndex(indexed[0].into()));
        assert_eq!(folder_of(&["only.pth", "config.json"]).unwrap(), Found::Pytorch(vec!["only.pth".into()]));
        assert_eq!(folder_of(&["a.pth", "b.pt"]).unwrap_err().kind(), Kind::Argument);
        assert_eq!(folder_of(&["config.json"]).unwrap_err().kind(), Kind::UnknownFormat);
    }
}
