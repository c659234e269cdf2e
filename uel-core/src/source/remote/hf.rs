//! `hf://`: files of models in the local cache of the Hugging Face hub, without any request.
//!
//! The cache has a folder for each repository, such as `models--openai-community--gpt2`. In it, `refs/main` holds the
//! commit that a branch or tag stood for when it was downloaded, and `snapshots/COMMIT` the files.

use crate::source::location::split_scheme;
use crate::{Error, Kind, Result, limits};
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The local cache of the Hugging Face hub.
///
/// ```
/// use uel_core::source::remote::HfCache;
/// # let root = tempfile::tempdir().unwrap();
/// # let repository = root.path().join("models--openai-community--gpt2");
/// # std::fs::create_dir_all(repository.join("refs")).unwrap();
/// # std::fs::create_dir_all(repository.join("snapshots/607a30d")).unwrap();
/// # std::fs::write(repository.join("refs/main"), "607a30d").unwrap();
/// # std::fs::write(repository.join("snapshots/607a30d/model.safetensors"), "").unwrap();
/// let cache = HfCache::new(root.path());
/// let path = cache.path("hf://openai-community/gpt2/model.safetensors")?;
/// assert!(path.ends_with("snapshots/607a30d/model.safetensors"));
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfCache {
    root: PathBuf,
}

impl HfCache {
    /// The cache in the folder `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache of this environment, where the hub's own libraries look for it: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, in
    /// `XDG_CACHE_HOME/huggingface` or in `~/.cache/huggingface`.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where none of them is set, and no home folder either.
    pub fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::by(variable).map(Self::new).ok_or_else(|| {
            Error::new(Kind::Argument, "there is no cache of the Hugging Face hub, because no folder is set for it")
                .with_expected("HF_HOME, or HOME, in the environment")
        })
    }

    fn by(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
        let in_cache = |cache: OsString| Path::new(&cache).join("huggingface").into_os_string();
        let in_home = |home: OsString| in_cache(Path::new(&home).join(".cache").into_os_string());
        let home = || {
            let home = variable("HF_HOME").or_else(|| variable("XDG_CACHE_HOME").map(in_cache));
            home.or_else(|| variable("HOME").or_else(|| variable("USERPROFILE")).map(in_home))
        };
        variable("HF_HUB_CACHE").map(PathBuf::from).or_else(|| home().map(|home| Path::new(&home).join("hub")))
    }

    /// The file or folder that `url` names: `hf://OWNER/NAME[@REVISION][/PATH]`, with `datasets/` or `spaces/` before the
    /// owner for those. Where there is no revision, it is `main`; a slash in one is written `%2F`. Old models have no owner.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] for another kind of URL; [`Kind::Io`] where the repository, the revision or the file is not in the
    /// cache.
    pub fn path(&self, url: &str) -> Result<PathBuf> {
        let malformed = |message: &str| {
            Error::new(Kind::Argument, message).with_path(url).with_expected("hf://OWNER/NAME[@REVISION][/PATH]")
        };
        let rest = match split_scheme(url) {
            Some(("hf", rest)) => rest,
            _ => return Err(malformed("the URL names nothing on the Hugging Face hub")),
        };
        let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
        let plain = |part: &&str| *part != "." && *part != ".." && !part.contains(['\\', '\0']);
        if !parts.iter().all(plain) {
            return Err(malformed("the URL leads out of its repository"));
        }
        let (kind, parts) = match parts.split_first() {
            Some((&"datasets", rest)) => ("datasets", rest),
            Some((&"spaces", rest)) => ("spaces", rest),
            _ => ("models", parts.as_slice()),
        };
        let mut missing = None;
        // With an owner first; of a model that has none, the second part is its file's.
        for owners in [1, 0] {
            let Some((named, path)) = parts.split_at_checked(owners + 1) else { continue };
            let (Some(last), Some(owner)) = (named.last(), named.get(..owners)) else { continue };
            let (name, revision) = last.split_once('@').unwrap_or((last, "main"));
            let mut folder = kind.to_owned();
            for part in owner.iter().chain([&name]) {
                folder.push_str("--");
                folder.push_str(part);
            }
            let folder = self.root.join(folder);
            if !folder.is_dir() {
                missing.get_or_insert(folder);
                continue;
            }
            let mut found = self.snapshot(&folder, &revision.replace("%2F", "/").replace("%2f", "/"))?;
            found.extend(path);
            return match found.try_exists() {
                Ok(true) => Ok(found),
                _ => Err(absent("the snapshot in the local cache has no such file", &found)),
            };
        }
        match missing {
            Some(folder) => Err(absent("the repository is not in the local cache of the Hugging Face hub", &folder)),
            None => Err(malformed("the URL names no repository")),
        }
    }

    /// The folder of the files of `revision`: a branch or tag that was downloaded, or a commit.
    fn snapshot(&self, repository: &Path, revision: &str) -> Result<PathBuf> {
        let is_plain = |name: &str| {
            let parts = || name.split('/');
            !name.is_empty()
                && name.len() as u64 <= limits::MAX_HF_REVISION_BYTES
                && parts().all(|part| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0', ':']))
        };
        if !is_plain(revision) {
            return Err(Error::new(Kind::Argument, "the revision is no name").with_path(repository).with_got(revision));
        }
        let path = repository.join("refs").join(revision);
        let mut commit = String::new();
        let opened = std::fs::File::open(&path);
        let read = opened.and_then(|file| file.take(limits::MAX_HF_REVISION_BYTES + 1).read_to_string(&mut commit));
        let commit = match read {
            Ok(_) => commit.trim(),
            Err(_) => revision,
        };
        if !is_plain(commit) || commit.contains('/') {
            let error = Error::new(Kind::Malformed, "the file of a revision must hold a commit").with_path(path);
            return Err(error.with_got(commit));
        }
        let snapshot = repository.join("snapshots").join(commit);
        if snapshot.is_dir() {
            return Ok(snapshot);
        }
        Err(absent(&format!("the revision {revision:?} is not in the local cache of the Hugging Face hub"), &snapshot))
    }
}

/// As [`HfCache::path`], in the cache of this environment.
///
/// # Errors
///
/// As [`HfCache::from_env`] and [`HfCache::path`].
pub fn hf_path(url: &str) -> Result<PathBuf> {
    HfCache::from_env()?.path(url)
}

#[cold]
fn absent(message: &str, path: &Path) -> Error {
    Error::new(Kind::Io, message).with_path(path).with_source(io::Error::new(ErrorKind::NotFound, "no such file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn cache() -> (tempfile::TempDir, HfCache) {
        let root = tempfile::tempdir().unwrap();
        for (folder, refs, commit, file) in [
            ("models--me--net", &["main", "refs/pr/1"][..], "abc123", "a/b.bin"),
            ("models--gpt2", &["main"], "def456", "model.safetensors"),
            ("datasets--me--net", &["main"], "0", "train.parquet"),
        ] {
            let folder = root.path().join(folder);
            for name in refs {
                let path = folder.join("refs").join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, format!("{commit}\n")).unwrap();
            }
            let file = folder.join("snapshots").join(commit).join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "x").unwrap();
        }
        let cache = HfCache::new(root.path());
        (root, cache)
    }

    #[test]
    fn finds_repositories_revisions_and_files() {
        let (_root, cache) = cache();
        let ends = |url: &str, end: &str| {
            let path = cache.path(url).unwrap();
            assert!(path.ends_with(end), "{url}: {}", path.display());
        };
        ends("hf://me/net/a/b.bin", "models--me--net/snapshots/abc123/a/b.bin");
        ends("hf://me/net@main", "models--me--net/snapshots/abc123");
        ends("hf://me/net@refs%2Fpr%2F1/a", "snapshots/abc123/a");
        ends("hf://me/net@abc123/a/b.bin", "snapshots/abc123/a/b.bin");
        ends("hf://gpt2/model.safetensors", "models--gpt2/snapshots/def456/model.safetensors");
        ends("hf://gpt2", "models--gpt2/snapshots/def456");
        ends("hf://datasets/me/net/train.parquet", "datasets--me--net/snapshots/0/train.parquet");
    }

    #[test]
    fn says_what_is_missing() {
        let (root, cache) = cache();
        for url in ["hf://you/net", "hf://me/net/c", "hf://me/net@v2", "hf://none"] {
            let error = cache.path(url).unwrap_err();
            assert_eq!(error.kind(), Kind::Io, "{url}");
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
            assert_eq!(cause.unwrap().kind(), ErrorKind::NotFound, "{url}");
        }
        for url in ["hf://", "hf://me/../x", "http://me/net", "hf://me/net@..", "hf://me/net@%2Fetc"] {
            assert_eq!(cache.path(url).unwrap_err().kind(), Kind::Argument, "{url}");
        }
        fs::write(root.path().join("models--me--net/refs/main"), "../../datasets--me--net/snapshots/0").unwrap();
        assert_eq!(cache.path("hf://me/net").unwrap_err().kind(), Kind::Malformed);
    }

    #[test]
    fn the_environment_says_where() {
        let by = |set: &[(&str, &str)]| {
            let found = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
            HfCache::by(found).map(|path| path.to_string_lossy().into_owned())
        };
        assert_eq!(by(&[]), None);
        assert_eq!(by(&[("HOME", "/h")]).as_deref(), Some("/h/.cache/huggingface/hub"));
        assert_eq!(by(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).as_deref(), Some("/x/huggingface/hub"));
        assert_eq!(by(&[("HF_HOME", "/f"), ("HOME", "/h")]).as_deref(), Some("/f/hub"));
        assert_eq!(by(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]).as_deref(), Some("/c"));
    }
}
