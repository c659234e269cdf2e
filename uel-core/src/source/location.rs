//! Paths and URLs: which of them a caller means, and what of a URL may be shown.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Whether `path` is a URL: a scheme of two letters or more, and `://`.
///
/// ```
/// use std::path::Path;
/// use uel_core::source::is_url;
/// assert!(is_url(Path::new("s3://bucket/model.safetensors")));
/// assert!(!is_url(Path::new("models/model.safetensors")));
/// assert!(!is_url(Path::new("C://model.safetensors")));
/// ```
pub fn is_url(path: &Path) -> bool {
    path.to_str().and_then(split_scheme).is_some()
}

/// A URL's scheme, and what stands behind its `://`.
pub(crate) fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let letters = scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    let begins = scheme.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
    (letters && begins && scheme.len() > 1).then_some((scheme, rest))
}

/// What of `path` goes into messages and reports: all of a path, and of a URL neither user and password nor query and
/// fragment, because those are where credentials and signatures stand.
///
/// ```
/// use std::path::Path;
/// use uel_core::source::shown;
/// let url = Path::new("https://me:secret@host/model.safetensors?X-Amz-Signature=secret");
/// assert_eq!(shown(url), Path::new("https://host/model.safetensors"));
/// assert_eq!(shown(Path::new("what?.bin")), Path::new("what?.bin"));
/// ```
pub fn shown(path: &Path) -> Cow<'_, Path> {
    let Some((scheme, rest)) = path.to_str().and_then(split_scheme) else { return Cow::Borrowed(path) };
    let end = rest.find(['?', '#']).unwrap_or(rest.len());
    let rest = rest.get(..end).unwrap_or_default();
    let host_end = rest.find('/').unwrap_or(rest.len());
    let user = rest.get(..host_end).and_then(|authority| authority.rfind('@')).map_or(0, |at| at + 1);
    Cow::Owned(PathBuf::from(format!("{scheme}://{}", rest.get(user..).unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        for url in ["http://h/x", "s3://b", "hf://a/b", "x-y+z.1://"] {
            assert!(is_url(Path::new(url)), "{url}");
        }
        for path in ["", "/a/b", "c://x", "://x", "1a://x", "a b://x", "http:/x", "./s3://x"] {
            assert!(!is_url(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        for (url, wanted) in [
            ("http://h:80/a%20b", "http://h:80/a%20b"),
            ("http://h?q=/x@y", "http://h"),
            ("http://u:p@h/a@b#f?x", "http://h/a@b"),
            ("http://u:p@q@h", "http://h"),
            ("s3://b/k?versionId=1", "s3://b/k"),
        ] {
            assert_eq!(shown(Path::new(url)), Path::new(wanted));
        }
    }
}
