//! The beginnings of shards.

use super::{Cursor, IterableDataset, SampleStream};
use crate::{Fingerprint, Result, SampleCx, Value};

/// Streams of which every shard ends early: [`IterableExt::take_of_each`](super::IterableExt::take_of_each).
#[derive(Clone, Debug)]
pub struct TakeStreams<D> {
    inner: D,
    samples: u64,
}

impl<D> TakeStreams<D> {
    pub(super) fn new(inner: D, samples: u64) -> Self {
        Self { inner, samples }
    }
}

struct Taken {
    inner: Box<dyn SampleStream>,
    samples: u64,
}

impl SampleStream for Taken {
    fn next(&mut self, cx: &mut SampleCx) -> Result<Option<Value>> {
        if self.inner.cursor().sample >= self.samples {
            return Ok(None);
        }
        let sample = self.inner.next(cx)?;
        // A filter may have gone on past the last sample that counts.
        Ok(sample.filter(|_| self.inner.cursor().sample <= self.samples))
    }
    fn cursor(&self) -> Cursor {
        self.inner.cursor()
    }
}

impl<D: IterableDataset> IterableDataset for TakeStreams<D> {
    fn shards(&self) -> u64 {
        self.inner.shards()
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(Taken { inner: self.inner.open(shard, cursor)?, samples: self.samples }))
    }
    fn describe(&self, shard: u64, cursor: Cursor) -> String {
        self.inner.describe(shard, cursor)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("take").with(self.inner.fingerprint()).with(self.samples).finish()
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        self.inner.finish(sample, cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::formats::{DataFile, LinesStream};
    use crate::{Batch, DataLoader, Field, IterableExt as _, LoaderState, Result, Value};

    /// Files of so many lines, each with its file and number.
    fn files(lens: &[usize]) -> LinesStream {
        let file = |(file, &len): (usize, &usize)| {
            let lines: String = (0..len).map(|line| format!("{file}.{line}\n")).collect();
            DataFile::from_bytes(format!("{file}.txt"), lines.into_bytes()).unwrap()
        };
        LinesStream::new(lens.iter().enumerate().map(file).collect()).unwrap()
    }

    /// The lines of batches.
    fn lines(epoch: impl Iterator<Item = Result<Batch>>) -> Vec<String> {
        let of = |batch: Result<Batch>| match batch.unwrap().data.get("text") {
            Some(Field::Strings(lines)) => lines.clone(),
            other => panic!("{other:?}"),
        };
        epoch.flat_map(of).collect()
    }

    fn is_even(line: &Value) -> Result<bool> {
        Ok(matches!(line.get("text"), Some(Value::Str(text)) if text.ends_with(['0', '2', '4', '6', '8'])))
    }

    proptest! {
        /// Each shard ends where it was told to, with a filter before or behind it, and after any resume.
        #[test]
        fn the_first_samples_of_each_shard_come_once(
            lens in proptest::collection::vec(0usize..30, 1..5),
            most in 0u64..35,
            filtered: bool,
            interleave in 1usize..4,
            window in 0usize..12,
            batch in 1usize..6,
            workers in 0usize..3,
            stops in proptest::collection::vec(0usize..6, 0..4),
        ) {
            let build = |workers: usize| {
                let builder = match filtered {
                    true => DataLoader::stream(files(&lens).filter("even", is_even).take_of_each(most)),
                    false => DataLoader::stream(files(&lens).take_of_each(most)),
                };
                builder.batch_size(batch).interleave(interleave).shuffle_window(window).num_workers(workers).build().unwrap()
            };
            let whole = lines(build(0).epoch(0).unwrap());
            let mut epoch = build(workers).epoch(0).unwrap();
            let mut taken = Vec::new();
            for stop in stops {
                taken.extend(lines(epoch.by_ref().take(stop)));
                let state = LoaderState::from_json(&epoch.state().to_json()).unwrap();
                epoch = build(2 - workers).resume(&state).unwrap();
            }
            taken.extend(lines(epoch));
            prop_assert_eq!(&taken, &whole);

            let first = |(file, &len): (usize, &usize)| {
                let kept = (0..len.min(most as usize)).filter(|line| !filtered || line % 2 == 0);
                kept.map(move |line| format!("{file}.{line}")).collect::<Vec<_>>()
            };
            let mut expected: Vec<String> = lens.iter().enumerate().flat_map(first).collect();
            expected.sort();
            taken.sort();
            prop_assert_eq!(taken, expected);
        }
    }
}
