//! Why a request failed, in words that hold no secret.
//!
//! Texts of the crates below name URLs with their queries, and bodies of answers, in which servers repeat what was signed.
//! So nothing of theirs is passed on but a status, a service's short code, and the last cause with URLs cut.

use super::object::Object;
use crate::{Error, Kind};
use object_store::client::{HttpError, HttpErrorKind};
use std::error::Error as StdError;
use std::io::{self, ErrorKind};

/// A failed request.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// The object may be empty: servers refuse the first bytes of those.
    pub(super) may_be_empty: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, may_be_empty: false }
    }
}

/// What can be told of a chain of errors.
#[derive(Debug, Default)]
struct Told {
    status: Option<u16>,
    code: Option<String>,
    http: Option<HttpErrorKind>,
    missing: bool,
    forbidden: bool,
    changed: bool,
    no_ranges: bool,
    last: String,
}

impl Told {
    fn by(error: &(dyn StdError + 'static)) -> Self {
        let mut told = Self::default();
        let mut next = Some(error);
        while let Some(error) = next {
            match error.downcast_ref::<object_store::Error>() {
                Some(object_store::Error::NotFound { .. }) => told.missing = true,
                Some(object_store::Error::Precondition { .. }) => told.changed = true,
                Some(object_store::Error::NotSupported { .. }) => told.no_ranges = true,
                Some(object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }) => {
                    told.forbidden = true
                }
                _ => {}
            }
            if let Some(http) = error.downcast_ref::<HttpError>() {
                told.http = Some(http.kind());
            }
            told.last = error.to_string();
            next = error.source();
        }
        const STATUS: &str = "status code: ";
        if let Some(at) = told.last.find(STATUS) {
            let rest = told.last.get(at + STATUS.len()..).unwrap_or_default();
            told.status = rest.get(..3).and_then(|digits| digits.parse().ok());
            told.code = code(rest);
            // Behind the status stands the body.
            told.last = String::new();
        }
        told.no_ranges |= told.last.contains("non-partial response");
        told
    }
}

/// The short code of a service's answer, such as `SlowDown`.
fn code(body: &str) -> Option<String> {
    const MAX_CODE_BYTES: usize = 64;
    let (_, rest) = body.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain =
        !code.is_empty() && code.len() <= MAX_CODE_BYTES && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    plain.then(|| code.to_owned())
}

/// `text` without queries of URLs and without users in them.
pub(super) fn scrubbed(text: &str) -> String {
    let is_end = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '(' | ')' | '<' | '>' | '`' | ',');
    let mut clean = String::new();
    for token in text.split_inclusive(is_end) {
        let body = token.trim_end_matches(is_end);
        let (scheme, rest) = match body.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest),
            None => (None, body),
        };
        // A query may come without its URL; signatures stand in those.
        let Some(scheme) = scheme else {
            clean.push_str(if body.contains('?') && body.contains('=') { "…" } else { body });
            clean.push_str(token.get(body.len()..).unwrap_or_default());
            continue;
        };
        let end = rest.find(['?', '#']).unwrap_or(rest.len());
        let rest = rest.get(..end).unwrap_or_default();
        let host_end = rest.find('/').unwrap_or(rest.len());
        let user = rest.get(..host_end).and_then(|authority| authority.rfind('@')).map_or(0, |at| at + 1);
        clean.push_str(scheme);
        clean.push_str("://");
        clean.push_str(rest.get(user..).unwrap_or_default());
        clean.push_str(token.get(body.len()..).unwrap_or_default());
    }
    clean
}

/// The failure of a request for the bytes of `object` from `offset` on.
#[cold]
pub(super) fn failure(object: &Object, offset: u64, error: &object_store::Error) -> Failure {
    let told = Told::by(error);
    let place = |error: Error| error.with_path(&object.shown);
    let failed = |kind: Kind, cause: ErrorKind, message: String| {
        place(Error::new(kind, message).with_offset(offset)).with_source(io::Error::new(cause, scrubbed(&told.last)))
    };
    let code = told.code.as_ref().map_or(String::new(), |code| format!(" ({code})"));
    let error = match (told.status, told.http) {
        _ if told.changed || told.status == Some(412) => changed(object),
        _ if told.missing || told.status == Some(404) => {
            let error = io::Error::new(ErrorKind::NotFound, "there is no such object");
            place(Error::io("open", &object.shown, error))
        }
        _ if told.forbidden || matches!(told.status, Some(401 | 403)) => {
            let why = format!("the server denies access{code}");
            place(Error::io("open", &object.shown, io::Error::new(ErrorKind::PermissionDenied, why)))
        }
        _ if told.no_ranges => failed(
            Kind::Remote,
            ErrorKind::Unsupported,
            "the server does not serve ranges of bytes, which reading in place needs".to_owned(),
        )
        .with_expected("206 Partial Content")
        .with_got("the whole object"),
        (Some(429), _) => failed(
            Kind::Remote,
            ErrorKind::Other,
            format!("the server asks for fewer requests, however often it is asked{code}"),
        )
        .with_got("status 429"),
        (Some(status), _) => failed(Kind::Remote, ErrorKind::Other, format!("the server refused the request{code}"))
            .with_got(format!("status {status}")),
        (None, Some(HttpErrorKind::Timeout)) => {
            failed(Kind::Timeout, ErrorKind::TimedOut, "the server did not answer in time".to_owned())
        }
        (None, Some(HttpErrorKind::Connect)) => failed(
            Kind::Remote,
            ErrorKind::NotConnected,
            format!("cannot connect to the server: {}", scrubbed(&told.last)),
        ),
        (None, Some(_)) => failed(
            Kind::Remote,
            ErrorKind::ConnectionReset,
            format!("the connection broke off: {}", scrubbed(&told.last)),
        ),
        (None, None) => failed(Kind::Remote, ErrorKind::Other, format!("the request failed: {}", scrubbed(&told.last))),
    };
    let may_be_empty = told.http.is_none() && matches!(told.status, None | Some(416));
    Failure { error, may_be_empty }
}

/// The object is another one than it was.
#[cold]
pub(super) fn changed(object: &Object) -> Error {
    Error::new(Kind::Changed, "the object on the server changed while it was in use").with_path(&object.shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_lose_their_secrets() {
        let text = "Error performing GET http://u:pw@h/k?X-Amz-Signature=abc in 3ms, url (https://h/x?sig=s#f): reset";
        assert_eq!(scrubbed(text), "Error performing GET http://h/k in 3ms, url (https://h/x): reset");
        assert_eq!(scrubbed("GET /k?sig=abc failed"), "GET … failed");
        assert_eq!(scrubbed("connection refused (os error 111)"), "connection refused (os error 111)");
    }

    #[test]
    fn codes_of_services() {
        assert_eq!(code("<Error><Code>SlowDown</Code></Error>").as_deref(), Some("SlowDown"));
        assert_eq!(code("<Code>a b</Code>"), None);
        assert_eq!(code("nothing"), None);
    }
}
