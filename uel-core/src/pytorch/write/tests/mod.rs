//! What the writer promises, tried on good days and bad ones.

mod archive;
mod faults;
mod pickle;
mod shards;
mod streaming;

use super::*;
use crate::Dtype;
use crate::save::{SaveOptions, SaveReport, TensorMeta};
use proptest::prelude::*;
use proptest::sample::select;
use std::io::Read as _;
use std::path::Path;

/// A tensor with its bytes.
#[derive(Clone, Debug)]
struct Given {
    meta: TensorMeta,
    bytes: Vec<u8>,
}

impl Given {
    fn new(name: &str, dtype: Dtype, shape: &[usize], seed: u8) -> Self {
        let meta = TensorMeta::new(name, dtype, shape);
        let bytes = (0..meta.byte_len().unwrap()).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        Self { meta, bytes }
    }

    fn parts(&self) -> (&str, Dtype, &[usize], &[u8]) {
        (&self.meta.name, self.meta.dtype, &self.meta.shape, &self.bytes)
    }
}

fn metas(given: &[Given]) -> Vec<TensorMeta> {
    given.iter().map(|given| given.meta.clone()).collect()
}

fn some_tensors(seed: u8) -> Vec<Given> {
    vec![
        Given::new("a", Dtype::F32, &[3, 5], seed),
        Given::new("b", Dtype::U8, &[7], seed.wrapping_add(1)),
        Given::new("c", Dtype::Bf16, &[0, 4], seed),
        Given::new("d", Dtype::I64, &[40], seed.wrapping_add(2)),
        Given::new("e", Dtype::U16, &[], seed.wrapping_add(3)),
    ]
}

/// Any set of tensors that torch can hold.
fn tensors() -> impl Strategy<Value = Vec<Given>> {
    let dtypes: Vec<Dtype> = Dtype::ALL.iter().copied().filter(|dtype| !dtype.as_str().starts_with("F6")).collect();
    let shape = proptest::collection::vec(0usize..5, 0..4);
    let tensor = (select(dtypes), shape, any::<u8>()).prop_map(|(dtype, mut shape, seed)| {
        if dtype == Dtype::F4 && shape.last().is_none_or(|last| last % 2 == 1) {
            shape.push(2);
        }
        (dtype, shape, seed)
    });
    let name = prop_oneof![4 => "[a-z]{1,8}(\\.[a-z0-9]{1,6}){0,4}", 1 => any::<String>(), 1 => Just(String::new())];
    proptest::collection::hash_map(name, tensor, 0..12).prop_map(|tensors| {
        tensors.into_iter().map(|(name, (dtype, shape, seed))| Given::new(&name, dtype, &shape, seed)).collect()
    })
}

fn save(path: &Path, given: &[Given], options: &SaveOptions) -> crate::Result<SaveReport> {
    let writer = PthWriter::create(path, metas(given), options)?;
    for given in given {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes)?;
    }
    writer.finish()
}

/// An entry as the `zip` crate reads it, its checksum compared: name, where its content begins, the content.
type Read = (String, u64, Vec<u8>);

fn entries(file: impl std::io::Read + std::io::Seek) -> Vec<Read> {
    let mut archive = zip::ZipArchive::new(file).unwrap();
    let count = archive.len();
    let entry = |at| {
        let mut entry = archive.by_index(at).unwrap();
        assert_eq!(entry.compression(), zip::CompressionMethod::Stored);
        let (name, start) = (entry.name().unwrap().into_owned(), entry.data_start().unwrap());
        let mut content = Vec::new();
        assert_eq!(entry.read_to_end(&mut content).unwrap() as u64, entry.size());
        (name, start, content)
    };
    (0..count).map(entry).collect()
}

/// The file at `path` is an archive with these storages in their order and nothing that does not belong there. Returns its
/// pickle.
fn check(path: &Path, given: &[Given]) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let entries = entries(std::io::Cursor::new(&bytes));
    assert!(entries.iter().all(|(_, start, _)| start % 64 == 0));
    let names: Vec<_> = entries.iter().map(|(name, ..)| name.strip_prefix("archive/").unwrap()).collect();
    let storages: Vec<_> = (0..given.len()).map(|number| format!("data/{number}")).collect();
    let storages = storages.iter().map(String::as_str);
    let first = ["data.pkl", ".format_version", ".storage_alignment", "byteorder"];
    let expected: Vec<_> = first.into_iter().chain(storages).chain(["version", ".data/serialization_id"]).collect();
    assert_eq!(names, expected);
    let contents: Vec<&[u8]> = entries.iter().map(|(.., content)| &content[..]).collect();
    assert_eq!(contents[1..4], [&b"1"[..], b"64", b"little"]);
    for (given, (.., content)) in given.iter().zip(&entries[4..]) {
        assert!(&given.bytes == content, "{}", given.meta.name);
    }
    assert_eq!(contents[4 + given.len()], b"3\n");
    let id = contents[5 + given.len()];
    assert!(id.len() == 40 && id.iter().all(u8::is_ascii_digit));
    // Nothing but headers, padding and descriptors stands between the contents.
    let covered: usize = entries.iter().map(|(name, _, content)| 2 * name.len() + content.len()).sum();
    assert!(bytes.len() - covered < entries.len() * (30 + 46 + 16 + 4 + 63) + 98 + 1);
    contents[0].to_vec()
}

/// The names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
