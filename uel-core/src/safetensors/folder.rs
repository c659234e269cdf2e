//! Which files make up a checkpoint that was given as a path.

use crate::source::is_url;
use crate::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// What a path stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Files that hold tensors.
    Files(Vec<PathBuf>),
    /// An index file, which names the shards beside it.
    IndexFile(PathBuf),
}

const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// What `path` stands for: a folder, an index file (by its suffix `.json`) or a single file.
pub(super) fn layout(path: &Path) -> Result<Layout> {
    if !is_url(path) && path.is_dir() {
        return folder(path);
    }
    if path.extension().is_some_and(|extension| extension == "json") {
        return Ok(Layout::IndexFile(path.to_path_buf()));
    }
    Ok(Layout::Files(vec![path.to_path_buf()]))
}

/// Why a folder holds no safetensors files at all; `None` where it holds some, in whatever state.
pub(crate) fn folder_layout_error(path: &Path) -> Option<Error> {
    folder(path).err().filter(|error| error.kind() == Kind::UnknownFormat)
}

fn folder(path: &Path) -> Result<Layout> {
    let (mut files, mut indexes) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(path).map_err(|error| Error::io("list", path, error))? {
        let name = entry.map_err(|error| Error::io("list", path, error))?.file_name();
        // Names that are not UTF-8 cannot stand in an index file, and hidden files are leftovers of other programs.
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        if name.ends_with(INDEX_SUFFIX) {
            indexes.push(name.to_owned());
        } else if name.ends_with(SUFFIX) {
            files.push(name.to_owned());
        }
    }
    files.sort();
    indexes.sort();
    let usual = indexes.iter().find(|name| *name == "model.safetensors.index.json");
    match (usual.or(indexes.first()), indexes.len()) {
        (Some(index), len) if usual.is_some() || len == 1 => return Ok(Layout::IndexFile(path.join(index))),
        (Some(_), _) => {
            return Err(Error::new(Kind::Argument, "the folder has several index files; name the one to open")
                .with_path(path)
                .with_expected("one")
                .with_got(indexes.join(", ")));
        }
        (None, _) => {}
    }
    if files.is_empty() {
        return Err(Error::new(Kind::UnknownFormat, "the folder holds no checkpoint")
            .with_path(path)
            .with_expected("files whose names end with .safetensors, .bin, .pth, .pt or .gguf")
            .with_got("none"));
    }
    if let Some(missing) = missing_shard(&files) {
        return Err(Error::new(Kind::MissingShard, "a shard is not in the folder")
            .with_path(path.join(missing))
            .with_expected("all the shards that the file names count")
            .with_got("no such file"));
    }
    Ok(Layout::Files(files.iter().map(|name| path.join(name)).collect()))
}

/// The first gap where all files are named `stem-00001-of-00003.safetensors` with one stem and one total.
fn missing_shard(files: &[String]) -> Option<String> {
    let parse = |name: &str| -> Option<(String, u32, String)> {
        let (rest, total) = name.strip_suffix(SUFFIX)?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        Some((stem.to_owned(), number.parse().ok()?, total.to_owned()))
    };
    let shards: Vec<_> = files.iter().map(|name| parse(name)).collect::<Option<_>>()?;
    let (stem, _, total) = shards.first()?;
    let count: u32 = total.parse().ok()?;
    if shards.iter().any(|(other, _, of)| other != stem || of != total) {
        return None;
    }
    let width = total.len();
    let present: std::collections::BTreeSet<u32> = shards.iter().map(|(_, number, _)| *number).collect();
    let first = u32::from(!present.contains(&0));
    let missing = (first..first.saturating_add(count)).find(|number| !present.contains(number))?;
    Some(format!("{stem}-{missing:0width$}-of-{total}{SUFFIX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_of(names: &[&str]) -> (tempfile::TempDir, Result<Layout>) {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let layout = layout(folder.path());
        (folder, layout)
    }

    #[test]
    fn finds_shards_and_index_files() {
        let (folder, found) = folder_of(&["b.safetensors", "a.safetensors", "._a.safetensors", "config.json"]);
        let files = ["a.safetensors", "b.safetensors"].map(|name| folder.path().join(name)).to_vec();
        assert_eq!(found.unwrap(), Layout::Files(files));

        let (folder, found) = folder_of(&["a.safetensors", "x.safetensors.index.json"]);
        assert_eq!(found.unwrap(), Layout::IndexFile(folder.path().join("x.safetensors.index.json")));

        let both = ["model.fp16.safetensors.index.json", "model.safetensors.index.json"];
        let (folder, found) = folder_of(&both);
        assert_eq!(found.unwrap(), Layout::IndexFile(folder.path().join(both[1])));
    }

    #[test]
    fn refuses_what_is_unclear() {
        assert_eq!(folder_of(&["config.json"]).1.unwrap_err().kind(), Kind::UnknownFormat);
        let two = ["a.safetensors.index.json", "b.safetensors.index.json"];
        assert_eq!(folder_of(&two).1.unwrap_err().kind(), Kind::Argument);
        let error = folder_of(&["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"]).1.unwrap_err();
        assert_eq!(error.kind(), Kind::MissingShard);
        assert!(error.to_string().contains("m-00002-of-00003.safetensors"), "{error}");
        assert!(folder_of(&["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]).1.is_ok());
        assert!(folder_of(&["m-00001-of-00002.safetensors", "extra.safetensors"]).1.is_ok());
        assert!(folder_of(&["m-1-of-4000000000.safetensors"]).1.is_err());
    }
}
