//! The corpus: named files, built in code, and what is to be said of each.

mod json;
mod layout;
mod prefix;

use uel_core::Kind;

/// What the strict rules and the reference implementation say of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    /// Both accept it.
    Accepted,
    /// Both refuse it, the strict rules with this kind.
    Refused(Kind),
    /// The reference accepts it, the strict rules do not, for a reason that the documentation of `Rules` names.
    StricterThanReference(Kind, &'static str),
}

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) expect: Expect,
    /// Built when needed, because some are large.
    pub(crate) bytes: Box<dyn Fn() -> Vec<u8>>,
}

/// Collects cases.
#[derive(Default)]
pub(crate) struct Corpus(Vec<Case>);

impl Corpus {
    fn add(&mut self, name: &'static str, expect: Expect, bytes: impl Fn() -> Vec<u8> + 'static) {
        self.0.push(Case { name, expect, bytes: Box::new(bytes) });
    }

    fn accepted(&mut self, name: &'static str, json: impl Into<String>, data_len: usize) {
        self.json(name, Expect::Accepted, json, data_len);
    }

    fn refused(&mut self, name: &'static str, kind: Kind, json: impl Into<String>, data_len: usize) {
        self.json(name, Expect::Refused(kind), json, data_len);
    }

    fn stricter(&mut self, reason: &'static str, name: &'static str, kind: Kind, json: impl Into<String>, data: usize) {
        self.json(name, Expect::StricterThanReference(kind, reason), json, data);
    }

    fn json(&mut self, name: &'static str, expect: Expect, json: impl Into<String>, data_len: usize) {
        let json = json.into();
        self.add(name, expect, move || file(&json, data_len));
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let mut corpus = Corpus::default();
    prefix::add(&mut corpus);
    json::add(&mut corpus);
    layout::add(&mut corpus);
    corpus.0
}

/// A file with this header and a data section of so many bytes.
pub(crate) fn file(json: impl AsRef<[u8]>, data_len: usize) -> Vec<u8> {
    let json = json.as_ref();
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json);
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

/// One tensor of a header; the name is JSON text without its quotes.
pub(crate) fn tensor(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// A header of one tensor of four bytes, whose object is given.
fn one(object: &str) -> String {
    format!(r#"{{"a":{object}}}"#)
}

/// A header of these tensors.
fn all(tensors: &[String]) -> String {
    format!("{{{}}}", tensors.join(","))
}
