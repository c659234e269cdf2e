//! What every format is held to: rows written are samples got, from memory and from disk, and no bytes make it panic.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::DataFile;
use crate::{Array, Cursor, Dataset, IterableDataset, Result, Rows, SampleCx, Value};

pub(crate) fn memory(name: &str, bytes: &[u8]) -> DataFile {
    DataFile::from_bytes(name, bytes.to_vec()).unwrap()
}

/// A folder with files that are removed with it.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The file in the folder, read with positioned reads.
    pub(crate) fn open(&self, name: &str, bytes: &[u8]) -> DataFile {
        DataFile::open(self.write(name, bytes)).unwrap()
    }
}

pub(crate) fn get(dataset: &dyn Dataset, index: u64) -> Value {
    dataset.get(index, &mut SampleCx::new(0, 0)).unwrap()
}

pub(crate) fn array<T>(shape: &[usize], elements: Vec<T>) -> Value
where
    crate::Elements: From<Vec<T>>,
{
    Array::new(shape, elements).unwrap().into()
}

/// Rows are what samples are, in any order, and none is behind the last one.
pub(crate) fn check(dataset: &dyn Dataset) {
    let cx = &mut SampleCx::new(0, 0);
    let len = dataset.len();
    assert!(dataset.get(len, cx).is_err() && dataset.get(u64::MAX, cx).is_err());
    assert!((0..len.min(5)).all(|index| !dataset.describe(index).is_empty()));
    let Some(layout) = dataset.layout() else { return };
    let forward: Vec<u64> = (0..len).collect();
    let backward: Vec<u64> = forward.iter().rev().copied().collect();
    let twice: Vec<u64> = forward.iter().flat_map(|&index| [index, index]).collect();
    for indices in [forward, backward, twice] {
        let mut written = Rows::new(layout, indices.len()).unwrap();
        dataset.write_rows(&indices, &mut written, cx).unwrap();
        let mut pushed = Rows::new(layout, indices.len()).unwrap();
        for &index in &indices {
            pushed.push(&dataset.get(index, cx).unwrap()).unwrap();
        }
        for column in 0..written.columns() {
            assert_eq!(written.elements_mut(column).unwrap(), pushed.elements_mut(column).unwrap());
        }
    }
    assert!(dataset.write_rows(&[len], &mut Rows::new(layout, 1).unwrap(), cx).is_err());
}

/// All samples of all shards, and that each cursor leads to the sample behind it.
pub(crate) fn drain(dataset: &dyn IterableDataset) -> Vec<Value> {
    let cx = &mut SampleCx::new(0, 0);
    let mut all = Vec::new();
    for shard in 0..dataset.shards() {
        let mut samples: Vec<Value> = Vec::new();
        let mut cursors: Vec<Cursor> = Vec::new();
        let mut stream = dataset.open(shard, None).unwrap();
        loop {
            cursors.push(stream.cursor());
            match stream.next(cx).unwrap() {
                Some(sample) => samples.push(sample),
                None => break,
            }
        }
        for (position, &cursor) in cursors.iter().enumerate() {
            let mut resumed = dataset.open(shard, Some(cursor)).unwrap();
            assert_eq!(resumed.next(cx).unwrap().as_ref(), samples.get(position), "{cursor:?}");
        }
        all.append(&mut samples);
    }
    all
}

/// A change to some bytes of a file.
#[derive(Clone, Debug)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Number(prop::sample::Index, u64),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
}

fn mutations() -> impl Strategy<Value = Vec<(prop::sample::Index, Mutation)>> {
    let index = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        0u64..70_000,
        any::<u64>()
    ];
    let mutation = prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (index(), prop_oneof![Just(0u8), Just(0xff), Just(0x7f), Just(b'"'), Just(b'\n'), Just(b'}')])
            .prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (index(), number).prop_map(|(at, number)| Mutation::Number(at, number)),
        index().prop_map(Mutation::Cut),
        (index(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (index(), 1usize..600).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ];
    prop::collection::vec((index(), mutation), 1..4)
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Set(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Number(at, number) => {
                // Headers stand at the beginning, so half of the numbers do.
                let at = at.index(bytes.len()) % 64.min(bytes.len());
                for (to, from) in bytes[at..].iter_mut().zip(number.to_le_bytes()) {
                    *to = from;
                }
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Remove(at, len) => {
                let at = at.index(bytes.len());
                bytes.drain(at..(at + len).min(bytes.len()));
            }
        }
    }
}

/// Opens mutated files, and reads what they then hold. Whatever comes of it is right, as long as it comes.
pub(crate) fn hostile(files: &[(&str, Vec<u8>)], read: impl Fn(Vec<DataFile>)) {
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    runner
        .run(&mutations(), |mutations| {
            let mut mutated: Vec<Vec<u8>> = files.iter().map(|(_, bytes)| bytes.clone()).collect();
            for (file, mutation) in &mutations {
                mutation.apply(&mut mutated[file.index(files.len())]);
            }
            read(files.iter().zip(&mutated).map(|((name, _), bytes)| memory(name, bytes)).collect());
            Ok(())
        })
        .unwrap();
}

/// Reads some samples of a dataset that may hold anything.
pub(crate) fn read_some<E>(dataset: Result<impl Dataset, E>) {
    let Ok(dataset) = dataset else { return };
    let cx = &mut SampleCx::new(0, 0);
    for index in (0..dataset.len().min(4)).chain(dataset.len().checked_sub(1)) {
        let _ = dataset.describe(index);
        // A header may promise rows that are large but there: a row of a small file is small.
        let _ = dataset.get(index, cx);
    }
    if let Some(layout) = dataset.layout()
        && layout.row_bytes().is_some_and(|bytes| bytes < 1 << 20)
        && dataset.len() > 0
        && let Ok(mut rows) = Rows::new(layout, 2)
    {
        let _ = dataset.write_rows(&[0, dataset.len() - 1], &mut rows, cx);
    }
}

/// Reads all of a stream that may hold anything.
pub(crate) fn drain_some<E>(dataset: Result<impl IterableDataset, E>) {
    let Ok(dataset) = dataset else { return };
    for shard in 0..dataset.shards() {
        let Ok(mut stream) = dataset.open(shard, None) else { continue };
        let mut count = 0;
        while !matches!(stream.next(&mut SampleCx::new(0, 0)), Ok(None)) {
            count += 1;
            assert!(count < 100_000, "the stream never ends");
        }
    }
}
