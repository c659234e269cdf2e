//! What the writers promise, tried on good days and bad ones.

mod direct;
mod faults;
mod hashes;
mod incremental;
mod layout;
mod shards;
mod streaming;

use super::*;
use crate::Dtype;
use crate::safetensors::{Metadata, Rules, SafetensorsFiles};
use crate::source::ByteSourceExt;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// A tensor with its bytes.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub(super) meta: TensorMeta,
    pub(super) bytes: Vec<u8>,
}

impl Given {
    pub(super) fn new(name: &str, dtype: Dtype, shape: &[usize], seed: u8) -> Self {
        let meta = TensorMeta::new(name, dtype, shape);
        let bytes = (0..meta.byte_len().unwrap()).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        Self { meta, bytes }
    }

    pub(super) fn parts(&self) -> (&str, Dtype, &[usize], &[u8]) {
        (&self.meta.name, self.meta.dtype, &self.meta.shape, &self.bytes)
    }
}

fn shape_of(dtype: Dtype) -> impl Strategy<Value = Vec<usize>> {
    let block = dtype.block().0 as usize;
    proptest::collection::vec(0usize..5, 0..4).prop_map(move |mut shape| {
        if !shape.iter().product::<usize>().is_multiple_of(block) {
            shape.push(block);
        }
        shape
    })
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => "[a-z]{1,8}(\\.[a-z0-9]{1,6}){0,4}",
        3 => any::<String>(),
        1 => Just(String::new()),
        1 => Just("__metadata__ ".to_owned()),
        1 => Just("__metadata".to_owned()),
        1 => Just("x\"\\\u{0}\u{7f}\u{2028}é😀".repeat(4000)),
    ]
}

/// Any set of tensors that a file can hold, in any order.
pub(super) fn tensors() -> impl Strategy<Value = Vec<Given>> {
    let tensor = select(Dtype::ALL).prop_flat_map(|dtype| (Just(dtype), shape_of(dtype), any::<u8>()));
    let shuffled = proptest::collection::hash_map(name(), tensor, 0..12);
    shuffled.prop_map(|tensors| {
        let kept = tensors.into_iter().filter(|(name, _)| name != "__metadata__");
        kept.map(|(name, (dtype, shape, seed))| Given::new(&name, dtype, &shape, seed)).collect()
    })
}

pub(super) fn metadata(most: usize) -> impl Strategy<Value = Option<Metadata>> {
    let text = || prop_oneof![3 => "[a-z]{0,6}", 1 => any::<String>()];
    proptest::option::of(proptest::collection::btree_map(text(), text(), 0..=most))
}

pub(super) fn options(metadata: &Option<Metadata>) -> SaveOptions {
    match metadata {
        Some(metadata) => SaveOptions::new().with_metadata(metadata.clone()),
        None => SaveOptions::new(),
    }
}

/// What the reference implementation writes.
pub(super) fn reference(tensors: &[Given], metadata: &Option<Metadata>, path: &Path) -> Vec<u8> {
    let views = tensors.iter().map(|Given { meta, bytes }| {
        let dtype = serde_json::from_value(meta.dtype.as_str().into()).unwrap();
        let view = safetensors::tensor::TensorView::new(dtype, meta.shape.clone(), bytes).unwrap();
        (meta.name.clone(), view)
    });
    let metadata: Option<HashMap<_, _>> = metadata.clone().map(|metadata| metadata.into_iter().collect());
    safetensors::serialize_to_file(views, metadata, path).unwrap();
    std::fs::read(path).unwrap()
}

/// The file at `path` holds these tensors and no others, as UEL reads it and as the reference does.
pub(super) fn check(path: &Path, tensors: &[Given], metadata: &Option<Metadata>) {
    let files = SafetensorsFiles::open(path, Rules::Strict).unwrap();
    assert_eq!(files.index().len(), tensors.len());
    assert_eq!(files.file_metadata(0), metadata.as_ref());
    let bytes = std::fs::read(path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), tensors.len());
    for Given { meta, bytes } in tensors {
        let info = files.index().get(&meta.name).unwrap();
        assert_eq!((info.dtype(), info.shape()), (meta.dtype, &*meta.shape));
        assert_eq!(&files.sources()[0].read_range(info.range()).unwrap(), bytes);
        let view = theirs.tensor(&meta.name).unwrap();
        assert_eq!(
            (view.dtype().to_string(), view.shape(), view.data()),
            (meta.dtype.to_string(), &*meta.shape, &**bytes)
        );
    }
}

/// The names in a folder.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Three tensors, one of them of several pieces when hashed.
pub(super) fn some_tensors(seed: u8) -> Vec<Given> {
    vec![
        Given::new("a", Dtype::F32, &[3, 5], seed),
        Given::new("b", Dtype::U8, &[7], seed.wrapping_add(1)),
        Given::new("c", Dtype::Bf16, &[0, 4], seed),
        Given::new("d", Dtype::I64, &[40], seed.wrapping_add(2)),
    ]
}

pub(super) fn stream(path: &Path, tensors: &[Given], options: &SaveOptions) -> crate::Result<SaveReport> {
    let writer = StreamingWriter::create(path, tensors.iter().map(|given| given.meta.clone()), options)?;
    for given in tensors {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes)?;
    }
    writer.finish()
}

pub(super) fn incremental(path: &Path, tensors: &[Given], options: &IncrementalOptions) -> crate::Result<SaveReport> {
    let writer = IncrementalWriter::create(path, options)?;
    for given in tensors {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes)?;
    }
    writer.finish()
}

/// Metadata of one entry.
pub(super) fn entry(key: &str, value: &str) -> Option<Metadata> {
    Some(BTreeMap::from([(key.to_owned(), value.to_owned())]))
}
