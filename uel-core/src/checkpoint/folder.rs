//! What a path stands for, before any format is asked.

use crate::gguf::SplitName;
use crate::safetensors::{IndexFile, Opener, folder_layout_error, read_index_file};
use crate::source::is_url;
use crate::{Error, Kind, Result};
use std::collections::BTreeSet;
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
    /// The GGUF files of a folder.
    Gguf(Vec<PathBuf>),
    /// A single file, whose first bytes are to be looked at.
    File,
}

/// The endings of PyTorch files.
const SUFFIXES: [&str; 4] = [".bin", ".pth", ".pt", ".ckpt"];

const INDEX_SUFFIXES: [&str; 3] = [".bin.index.json", ".pth.index.json", ".pt.index.json"];

/// What `path` stands for.
pub(super) fn find(path: &Path, open: &Opener<'_>) -> Result<Found> {
    if !is_url(path) && path.is_dir() {
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
    let indexes: Vec<&String> =
        names.iter().filter(|name| INDEX_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))).collect();
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
    let shards: Vec<Shard<'_>> = files.iter().filter_map(|name| Shard::of(name)).collect();
    match (files.as_slice(), shards.first()) {
        ([], _) => Ok(Found::Gguf(gguf_files(path, &names)?.ok_or(nothing)?)),
        (_, Some(first)) if shards.len() == files.len() && shards.iter().all(|shard| shard.is_with(first)) => {
            if let Some(missing) = first.missing(&shards) {
                return Err(Error::new(Kind::MissingShard, "a shard is not in the folder")
                    .with_path(path.join(missing))
                    .with_expected("all the shards that the file names count")
                    .with_got("no such file"));
            }
            Ok(Found::Pytorch(files.iter().map(|name| path.join(name)).collect()))
        }
        ([only], _) => Ok(Found::Pytorch(vec![path.join(only)])),
        _ => Err(several(path, "PyTorch files", &files)),
    }
}

/// The GGUF file of a folder, or all parts of one that is split; `None` where there is none.
fn gguf_files(path: &Path, names: &[String]) -> Result<Option<Vec<PathBuf>>> {
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf")).collect();
    let parts: Vec<SplitName> = files.iter().filter_map(|name| SplitName::of(name)).collect();
    match (files.as_slice(), parts.first()) {
        ([], _) => Ok(None),
        (_, Some(first)) if parts.len() == files.len() && parts.iter().all(|part| part.is_with(first)) => {
            if let Some(missing) = (1..=first.count).find(|&number| parts.iter().all(|part| part.number != number)) {
                return Err(Error::new(Kind::MissingShard, "a part of a split file is not in the folder")
                    .with_path(path.join(first.part(missing)))
                    .with_expected(format!("all {} parts", first.count))
                    .with_got("no such file"));
            }
            Ok(Some(files.iter().map(|name| path.join(name)).collect()))
        }
        ([only], _) => Ok(Some(vec![path.join(only)])),
        _ => Err(several(path, "GGUF files", &files)),
    }
}

/// The parts of a name such as `STEM-00001-of-00003.bin`.
struct Shard<'a> {
    stem: &'a str,
    number: &'a str,
    total: &'a str,
    extension: &'a str,
}

impl<'a> Shard<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let (rest, extension) = name.rsplit_once('.')?;
        let (rest, total) = rest.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(number) && digits(total)).then_some(Self { stem, number, total, extension })
    }

    fn is_with(&self, other: &Self) -> bool {
        (self.stem, self.total, self.extension) == (other.stem, other.total, other.extension)
    }

    /// The name of the first shard that is not among `shards`. They are counted from 1, or from 0 where there is one.
    fn missing(&self, shards: &[Self]) -> Option<String> {
        let present: BTreeSet<u32> = shards.iter().filter_map(|shard| shard.number.parse().ok()).collect();
        let first = u32::from(!present.contains(&0));
        let mut all = first..first.saturating_add(self.total.parse().ok()?);
        let missing = all.find(|number| !present.contains(number))?;
        let (Self { stem, total, extension, .. }, width) = (self, self.number.len());
        Some(format!("{stem}-{missing:0width$}-of-{total}.{extension}"))
    }
}

fn several(path: &Path, what: &str, names: &[&String]) -> Error {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(|name| name.as_str()).collect();
    Error::new(Kind::Argument, format!("the folder has several {what}; name the one to open"))
        .with_path(path)
        .with_expected("one")
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
            Found::Gguf(paths) => Found::Gguf(strip(paths)),
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
        let named = ["m.pth.index.json", "m-00001-of-00002.pth"];
        assert_eq!(folder_of(&named).unwrap(), Found::PytorchIndex(named[0].into()));
        assert_eq!(folder_of(&["a.pth", "b.pt"]).unwrap_err().kind(), Kind::Argument);
        let error = folder_of(&["m-00001-of-00003.bin", "m-00003-of-00003.bin"]).unwrap_err();
        assert_eq!(error.kind(), Kind::MissingShard);
        assert!(error.to_string().contains("m-00002-of-00003.bin"), "{error}");
        assert_eq!(folder_of(&["m-00001-of-00002.bin"]).unwrap_err().kind(), Kind::MissingShard);
        let two = ["m-00001-of-00001.bin", "n-00001-of-00001.bin"];
        assert_eq!(folder_of(&two).unwrap_err().kind(), Kind::Argument);
        assert_eq!(folder_of(&["config.json"]).unwrap_err().kind(), Kind::UnknownFormat);
    }

    #[test]
    fn finds_gguf_files() {
        assert_eq!(folder_of(&["q4.gguf", "config.json"]).unwrap(), Found::Gguf(vec!["q4.gguf".into()]));
        let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
        assert_eq!(folder_of(&parts).unwrap(), Found::Gguf(parts.map(PathBuf::from).to_vec()));
        assert_eq!(folder_of(&["m.gguf", "m.safetensors"]).unwrap(), Found::Safetensors);
        assert_eq!(folder_of(&["q4.gguf", "q8.gguf"]).unwrap_err().kind(), Kind::Argument);
        assert_eq!(folder_of(&["m-00001-of-00002.gguf", "n.gguf"]).unwrap_err().kind(), Kind::Argument);
        let error = folder_of(&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"]).unwrap_err();
        assert_eq!(error.kind(), Kind::MissingShard);
        assert!(error.to_string().contains("m-00002-of-00003.gguf"), "{error}");
    }
}
