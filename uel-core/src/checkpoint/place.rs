//! Where a checkpoint stands: on this machine, or at a URL.

use super::FilesOptions;
use crate::source::location::split_scheme;
use crate::source::{ByteSource, FileSource, is_url};
use crate::{Error, Kind, Result};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(feature = "remote")]
use {
    crate::source::remote::{Remote, RemoteSource, hf_path},
    crate::source::shown,
    std::collections::HashMap,
    std::sync::{Mutex, PoisonError},
};

/// Where the files of one checkpoint are opened.
pub(super) struct Place<'a> {
    /// The path, or what of the URL may be shown. Everything else that belongs to the checkpoint stands beside it.
    path: Cow<'a, Path>,
    #[cfg(feature = "remote")]
    served: Option<Served>,
}

/// A query is nobody's business.
impl std::fmt::Debug for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Place").field(&self.path).finish()
    }
}

impl<'a> Place<'a> {
    /// The place that `path` names. No request is made.
    pub(super) fn of(path: &'a Path, options: &FilesOptions) -> Result<Self> {
        match local(path)? {
            Some(path) => Ok(Self {
                path,
                #[cfg(feature = "remote")]
                served: None,
            }),
            None => Self::at_url(path, options),
        }
    }

    #[cfg(feature = "remote")]
    fn at_url(path: &'a Path, options: &FilesOptions) -> Result<Self> {
        let text = path.to_str().unwrap_or_default();
        let query =
            text.split_once('#').map_or(text, |(url, _)| url).split_once('?').map(|(_, query)| query.to_owned());
        let served = Served {
            remote: Remote::new(options.remote.clone()),
            query,
            own: shown(path).into_owned(),
            opened: Mutex::default(),
        };
        // A user in the URL is refused by whoever opens it, so it must not be left out before.
        served.check(text)?;
        Ok(Self { path: shown(path), served: Some(served) })
    }

    #[cfg(not(feature = "remote"))]
    fn at_url(path: &'a Path, _: &FilesOptions) -> Result<Self> {
        Err(not_built(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file at `path`: the place itself, or one beside it.
    pub(super) fn open(&self, path: &Path) -> Result<Arc<dyn ByteSource>> {
        #[cfg(feature = "remote")]
        if let Some(served) = &self.served {
            return served.open(path);
        }
        Ok(Arc::new(FileSource::open(path)?))
    }
}

/// Opens the files of a list, some of which may be URLs.
pub(super) fn open_list<P: AsRef<Path> + Sync>(
    paths: &[P],
    options: &FilesOptions,
) -> Result<Vec<Arc<dyn ByteSource>>> {
    #[cfg(feature = "remote")]
    let remote = Remote::new(options.remote.clone());
    #[cfg(not(feature = "remote"))]
    let _ = options;
    crate::safetensors::try_map(paths, crate::safetensors::open_threads(paths.len()), |_, path| {
        let path = path.as_ref();
        if let Some(path) = local(path)? {
            return Ok(Arc::new(FileSource::open(path)?) as Arc<dyn ByteSource>);
        }
        #[cfg(feature = "remote")]
        return Ok(Arc::new(remote.open(path.to_str().unwrap_or_default())?) as Arc<dyn ByteSource>);
        #[cfg(not(feature = "remote"))]
        Err(not_built(path))
    })
}

/// The path of a file on this machine; `None` for a URL that is to be asked for.
fn local(path: &Path) -> Result<Option<Cow<'_, Path>>> {
    if !is_url(path) {
        return Ok(Some(Cow::Borrowed(path)));
    }
    let text = path.to_str().unwrap_or_default();
    match split_scheme(text) {
        Some(("file", rest)) => file_path(path, rest).map(|path| Some(Cow::Owned(path))),
        #[cfg(feature = "remote")]
        Some(("hf", _)) => hf_path(text).map(|path| Some(Cow::Owned(path))),
        _ => Ok(None),
    }
}

/// The path of a `file://` URL. Escapes stand for bytes.
fn file_path(url: &Path, rest: &str) -> Result<PathBuf> {
    let malformed = || {
        let error = Error::new(Kind::Argument, "the URL names no file on this machine").with_path(url);
        error.with_expected("file:///PATH")
    };
    let rest = rest.strip_prefix("localhost").unwrap_or(rest);
    if !rest.starts_with('/') || rest.contains(['?', '#']) {
        return Err(malformed());
    }
    let mut bytes = Vec::with_capacity(rest.len());
    let mut parts = rest.split('%');
    bytes.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
    for part in parts {
        let (digits, text) = part.split_at_checked(2).ok_or_else(malformed)?;
        let byte = u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+')).ok_or_else(malformed)?;
        bytes.push(byte);
        bytes.extend_from_slice(text.as_bytes());
    }
    String::from_utf8(bytes).map(PathBuf::from).map_err(|_| malformed())
}

#[cfg(not(feature = "remote"))]
fn not_built(path: &Path) -> Error {
    Error::new(Kind::Argument, "the path is a URL, and UEL was built without the feature `remote`").with_path(path)
}

/// Files that are asked for from a server.
#[cfg(feature = "remote")]
struct Served {
    remote: Remote,
    /// That of the URL that was given: what lets a server answer for one file may let it answer for those beside it.
    query: Option<String>,
    own: PathBuf,
    /// What was opened before: a file's beginning is asked for once.
    opened: Mutex<HashMap<PathBuf, Arc<RemoteSource>>>,
}

#[cfg(feature = "remote")]
impl Served {
    fn check(&self, text: &str) -> Result<()> {
        let authority = split_scheme(text).and_then(|(_, rest)| rest.split(['/', '?', '#']).next());
        match authority.is_some_and(|authority| authority.contains('@')) {
            true => Err(Error::new(Kind::Argument, "a URL must not hold a user or password")
                .with_path(&self.own)
                .with_expected("credentials in the environment")),
            false => Ok(()),
        }
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn ByteSource>> {
        let opened = || self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = opened().get(path) {
            return Ok(Arc::clone(source) as Arc<dyn ByteSource>);
        }
        let mut url = path.to_string_lossy().into_owned();
        if path != self.own
            && let Some((folder, name)) = url.rsplit_once('/')
        {
            // A name that an index file gives is no part of a URL yet.
            url = format!("{folder}/{}", name.replace('%', "%25").replace('?', "%3F").replace('#', "%23"));
        }
        if let Some(query) = &self.query {
            url.push('?');
            url.push_str(query);
        }
        let source = Arc::new(self.remote.open(&url)?);
        opened().insert(path.to_path_buf(), Arc::clone(&source));
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_this_machine() {
        let path = |url: &str| local(Path::new(url)).map(|path| path.map(|path| path.to_string_lossy().into_owned()));
        assert_eq!(path("a/b").unwrap().as_deref(), Some("a/b"));
        assert_eq!(path("file:///a%20b/c").unwrap().as_deref(), Some("/a b/c"));
        assert_eq!(path("file://localhost/a").unwrap().as_deref(), Some("/a"));
        for url in
            ["file://server/a", "file://a", "file:///a%2", "file:///%zz", "file:///%+1", "file:///a?b", "file:///%ff"]
        {
            assert_eq!(path(url).unwrap_err().kind(), Kind::Argument, "{url}");
        }
        assert!(path("s3://b/k").unwrap().is_none());
    }

    #[test]
    #[cfg(not(feature = "remote"))]
    fn without_the_feature_urls_are_refused() {
        for url in ["https://h/model.safetensors?secret", "s3://b/k", "hf://me/net"] {
            let error = Place::of(Path::new(url), &FilesOptions::new()).unwrap_err();
            assert_eq!(error.kind(), Kind::Argument);
            let text = error.to_string();
            assert!(text.contains("built without the feature `remote`") && !text.contains("secret"), "{text}");
        }
    }
}
