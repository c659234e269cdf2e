//! One object on a server, and one request for some of its bytes.

use super::failure::{Failure, changed, failure};
use crate::source::Version;
use crate::{ByteRange, Error, Kind, Result};
use futures_util::StreamExt;
use object_store::path::Path as ObjectPath;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

/// What requests go to.
pub(super) struct Object {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) location: ObjectPath,
    /// The URL as messages show it.
    pub(super) shown: PathBuf,
    /// What the disk cache calls it; `None` where it is not to be kept.
    pub(super) key: Option<String>,
}

/// Clients hold credentials and whole URLs, and show them.
impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Object").field(&self.shown).finish()
    }
}

/// What tells one version of an object from another, taken from the first answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    pub(super) byte_len: u64,
    etag: Option<String>,
    modified: Option<SystemTime>,
}

impl Pin {
    fn of(meta: &ObjectMeta) -> Self {
        // The crate has the epoch stand for a header that is not there.
        let modified = Some(SystemTime::from(meta.last_modified)).filter(|time| *time != SystemTime::UNIX_EPOCH);
        Self { byte_len: meta.size, etag: meta.e_tag.clone().filter(|etag| !etag.is_empty()), modified }
    }

    /// An ETag that promises the same bytes. A weak one promises the same meaning.
    pub(super) fn strong(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }

    /// Whether `other` is the same version, as far as can be told. Where there are ETags the time does not count: servers
    /// behind one address may have different ones.
    fn is(&self, other: &Self) -> bool {
        let same = match (&self.etag, &other.etag) {
            (Some(own), Some(others)) => own == others,
            (None, None) => self.modified == other.modified,
            _ => false,
        };
        same && self.byte_len == other.byte_len
    }

    pub(super) fn version(&self) -> Version {
        let tag = self.etag.as_ref().map(|etag| twox_hash::XxHash3_64::oneshot(etag.as_bytes()));
        Version { byte_len: self.byte_len, modified: self.modified, tag }
    }
}

/// What one request brought: the bytes in the pieces in which they arrived.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) pin: Pin,
    pub(super) pieces: Vec<bytes::Bytes>,
}

impl Object {
    /// The bytes of `range`, as far as the object goes, if it still is the version `pin`.
    pub(super) async fn get(&self, range: ByteRange, pin: Option<&Pin>) -> Result<Answer, Failure> {
        let failed = |error| failure(self, range.start(), &error);
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.start()..range.end())),
            if_match: pin.and_then(Pin::strong).map(str::to_owned),
            ..GetOptions::default()
        };
        let got = self.store.get_opts(&self.location, options).await.map_err(failed)?;
        let answered = Pin::of(&got.meta);
        if pin.is_some_and(|pin| !pin.is(&answered)) {
            return Err(changed(self).into());
        }
        if answered.etag.is_none() && answered.modified.is_none() {
            let message =
                "the server names neither an ETag nor a time of modification, so that a change would not be seen";
            return Err(Error::new(Kind::Remote, message).with_path(&self.shown).into());
        }
        let end = range.end().min(answered.byte_len);
        let expected = end.saturating_sub(range.start());
        let wrong = |got: String| {
            Error::new(Kind::Remote, "the server sent other bytes than were asked for")
                .with_path(&self.shown)
                .with_offset(range.start())
                .with_expected(format!("{expected} bytes from {}", range.start()))
                .with_got(got)
        };
        if got.range != (range.start()..end) {
            return Err(wrong(format!("bytes {}..{}", got.range.start, got.range.end)).into());
        }
        let (mut pieces, mut arrived) = (Vec::new(), 0u64);
        let mut body = got.into_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(failed)?;
            arrived = arrived.saturating_add(piece.len() as u64);
            if arrived > expected {
                return Err(wrong(format!("{arrived} bytes and more")).into());
            }
            pieces.push(piece);
        }
        if arrived != expected {
            return Err(wrong(format!("{arrived} bytes")).into());
        }
        Ok(Answer { pin: answered, pieces })
    }

    /// The version of an object that has no bytes, which no range can ask for; `None` where it has some.
    pub(super) async fn empty(&self) -> Result<Option<Pin>, Failure> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        let got = self.store.get_opts(&self.location, options).await.map_err(|error| failure(self, 0, &error))?;
        Ok(Some(Pin::of(&got.meta)).filter(|pin| pin.byte_len == 0))
    }
}
