use proptest::prelude::*;

use super::*;
use crate::sampler::Tail;
use crate::{Cursor, SampleStream};

/// Shards of these lengths, whose samples say where they come from.
#[derive(Clone, Debug)]
struct Shards {
    lens: Vec<u64>,
    errors: BTreeSet<u64>,
    panics: BTreeSet<u64>,
    broken: BTreeSet<u64>,
}

struct Shard {
    of: Shards,
    shard: u64,
    at: u64,
}

/// The number of a sample by shard and place.
fn number(shard: u64, at: u64) -> u64 {
    shard * 1000 + at
}

impl IterableDataset for Shards {
    fn shards(&self) -> u64 {
        self.lens.len() as u64
    }
    fn open(&self, shard: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        if self.broken.contains(&shard) {
            return Err(Error::new(Kind::Io, "no such shard"));
        }
        Ok(Box::new(Shard { of: self.clone(), shard, at: cursor.map_or(0, |cursor| cursor.sample) }))
    }
    fn fingerprint(&self) -> u64 {
        self.lens.iter().fold(Fingerprint::new("shards"), |print, &len| print.with(len)).finish()
    }
    fn finish(&self, sample: Value, cx: &mut SampleCx) -> Result<Value> {
        Ok(Value::tuple([sample, Value::Float(cx.rng(0).uniform())]))
    }
}

impl SampleStream for Shard {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        if self.at >= self.of.lens[self.shard as usize] {
            return Ok(None);
        }
        let number = number(self.shard, self.at);
        assert!(!self.of.panics.contains(&number), "sample {number} is cursed");
        self.at += 1;
        if self.of.errors.contains(&number) {
            return Err(Error::new(Kind::Dataset, format!("sample {number} is torn")));
        }
        Ok(Some(Value::Int(number as i64)))
    }
    fn cursor(&self) -> Cursor {
        Cursor { sample: self.at, offset: 0 }
    }
}

fn whole(lens: Vec<u64>) -> Shards {
    Shards { lens, errors: BTreeSet::new(), panics: BTreeSet::new(), broken: BTreeSet::new() }
}

fn numbers_of(epoch: Epoch) -> Vec<i64> {
    let of = |batch: Result<Batch>| batch.unwrap().tensor("0").unwrap().to_vec1::<i64>().unwrap();
    epoch.flat_map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn streams_depend_on_nothing_but_what_determines_them(
        lens in proptest::collection::vec(0u64..20, 0..6),
        errors in proptest::collection::btree_set(0u64..20, 0..3),
        panics in proptest::collection::btree_set(1000u64..1020, 0..2),
        batch in 1usize..9,
        window in 0usize..16,
        interleave in 1usize..4,
        shuffle: Option<u64>,
        skip: bool,
        drop_last: bool,
        workers in 1usize..5,
        fewer in 0usize..3,
        at in 0usize..10,
        in_order: bool,
    ) {
        let dataset = Shards { errors, panics, ..whole(lens) };
        let build = |workers: usize| {
            let builder = DataLoader::stream(dataset.clone()).batch_size(batch).interleave(interleave).seed(4);
            let builder = builder.shuffle_window(window).drop_last(drop_last).num_workers(workers);
            let builder = builder.on_error(if skip { OnError::Skip { limit: 100 } } else { OnError::Fail });
            let builder = match shuffle { Some(seed) => builder.shuffle(seed), None => builder };
            builder.in_order(in_order || workers == 0).build().unwrap()
        };
        let sorted = |mut all: Vec<String>| { if !in_order { all.sort() } all };
        let expected = sorted(stream(build(0).epoch(1).unwrap()));
        prop_assert_eq!(&sorted(stream(build(workers).epoch(1).unwrap())), &expected);
        let mut epoch = build(workers).epoch(1).unwrap();
        let first: Vec<String> = epoch.by_ref().take(at).map(seen).collect();
        let state = LoaderState::from_json(&epoch.state().to_json()).unwrap();
        drop(epoch);
        let rest = stream(build(fewer).resume(&state).unwrap());
        prop_assert_eq!(sorted([first, rest].concat()), expected);
    }

    /// Every sample once, on one rank, whatever the shards' lengths are.
    #[test]
    fn ranks_share_shards_and_each_sample_comes_once(
        lens in proptest::collection::vec(0u64..20, 0..8), world in 1u64..5, window in 0usize..10, shuffle: Option<u64>,
    ) {
        let mut all = Vec::new();
        for rank in 0..world {
            let builder = DataLoader::stream(whole(lens.clone())).batch_size(3).shuffle_window(window).num_workers(2);
            let builder = builder.distributed(rank, world, Tail::Pad);
            let builder = match shuffle { Some(seed) => builder.shuffle(seed), None => builder };
            all.extend(numbers_of(builder.build().unwrap().epoch(0).unwrap()));
        }
        all.sort_unstable();
        let of = |(shard, &len): (usize, &u64)| (0..len).map(move |at| number(shard as u64, at) as i64);
        prop_assert_eq!(all, lens.iter().enumerate().flat_map(of).collect::<Vec<_>>());
    }
}

#[test]
fn shards_are_read_by_turns_and_shuffled_in_windows() {
    let base = |interleave| DataLoader::stream(whole(vec![3, 2, 3])).batch_size(4).interleave(interleave);
    let of = |builder: DataLoaderBuilder| numbers_of(builder.build().unwrap().epoch(0).unwrap());
    assert_eq!(of(base(1)), [0, 1, 2, 1000, 1001, 2000, 2001, 2002]);
    assert_eq!(of(base(2)), [0, 1000, 1, 1001, 2, 2000, 2001, 2002]);
    let shuffled = of(base(1).shuffle_window(4).seed(2));
    assert_ne!(shuffled, of(base(1)));
    let mut first = shuffled[..4].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 1000]);
}

/// Torn samples, streams that panic and shards that cannot be opened are errors, and the rest arrives.
#[test]
fn faults_of_streams_are_named_and_the_rest_arrives() {
    let dataset = Shards { errors: [1].into(), panics: [1001].into(), broken: [2].into(), ..whole(vec![3, 3, 3, 3]) };
    for workers in [0, 2] {
        let build = |on_error| {
            let builder = DataLoader::stream(dataset.clone()).batch_size(1).num_workers(workers).on_error(on_error);
            builder.build().unwrap()
        };
        let all: Vec<Result<Batch>> = build(OnError::Fail).epoch(0).unwrap().collect();
        let kinds: Vec<Option<Kind>> = all.iter().map(|batch| batch.as_ref().err().map(Error::kind)).collect();
        // Shard 1 ends where it panicked.
        let expected =
            [None, Some(Kind::Dataset), None, None, Some(Kind::WorkerPanic), Some(Kind::Io), None, None, None];
        assert_eq!(kinds, expected);
        let error = all[1].as_ref().unwrap_err();
        assert_eq!((error.index(), error.batch()), (Some(1), Some(1)));
        assert_eq!(error.description(), Some("shard 0, sample 1, offset 0"));
        let numbers = numbers_of(build(OnError::Skip { limit: 3 }).epoch(0).unwrap());
        assert_eq!(numbers, [0, 2, 1000, 3000, 3001, 3002]);
    }
    assert!(DataLoader::stream(dataset).build().unwrap().replay(0, 0).is_err());
}

/// A dataset that panics wherever it can.
struct Cursed {
    inside: &'static str,
}

struct CursedStream {
    inside: &'static str,
    at: u64,
}

impl IterableDataset for Cursed {
    fn shards(&self) -> u64 {
        assert!(self.inside != "shards", "is cursed");
        2
    }
    fn open(&self, _: u64, cursor: Option<Cursor>) -> Result<Box<dyn SampleStream>> {
        assert!(self.inside != "open", "is cursed");
        Ok(Box::new(CursedStream { inside: self.inside, at: cursor.unwrap_or_default().sample }))
    }
    fn describe(&self, _: u64, _: Cursor) -> String {
        panic!("is cursed")
    }
    fn fingerprint(&self) -> u64 {
        0
    }
    fn finish(&self, sample: Value, _: &mut SampleCx) -> Result<Value> {
        assert!(self.inside != "finish", "is cursed");
        Ok(sample)
    }
}

impl SampleStream for CursedStream {
    fn next(&mut self, _: &mut SampleCx) -> Result<Option<Value>> {
        assert!(self.inside != "next", "is cursed");
        self.at += 1;
        Ok((self.at <= 3).then_some(Value::Int(self.at as i64)))
    }
    fn cursor(&self) -> Cursor {
        assert!(self.inside != "cursor" || self.at != 2, "is cursed");
        Cursor { sample: self.at, offset: 0 }
    }
}

/// Wherever a dataset panics, the epoch comes to its end, and says so.
#[test]
fn no_panic_of_a_stream_is_lost_or_waited_for() {
    for inside in ["shards", "open", "next", "cursor", "finish"] {
        for workers in [0, 2] {
            let loader = DataLoader::stream(Cursed { inside }).batch_size(1).num_workers(workers).build().unwrap();
            let panicked = |error: &Error| error.kind() == Kind::WorkerPanic;
            match loader.epoch(0) {
                Err(error) => assert!(panicked(&error) && inside == "shards"),
                // A stream whose place is not known cannot be gone on with for ever.
                Ok(epoch) => {
                    assert!(epoch.take(20).any(|batch| batch.is_err_and(|error| panicked(&error))), "{inside}")
                }
            }
        }
    }
}

/// Whatever stands in a state, reading from it neither panics nor waits for ever.
#[test]
fn a_state_that_nobody_saved_does_no_harm() {
    let state = DataLoader::stream(whole(vec![5, 5])).build().unwrap().epoch(0).unwrap().state();
    let json = state.to_json();
    let most = u64::MAX;
    let positions = [
        format!(r#"{{"open":[],"turn":{most},"next":{most},"samples":{most},"used":{most}}}"#),
        format!(
            r#"{{"open":[[{most},{{"sample":{most},"offset":{most}}}]],"turn":7,"next":0,"samples":{most},"used":9}}"#
        ),
        r#"{"open":[[0,{"sample":2,"offset":0}],[0,{"sample":2,"offset":0}]],"turn":1,"next":2,"samples":1,"used":0}"#
            .into(),
    ];
    for position in positions {
        let json = json.replace("\"skipped\":0", &format!("\"skipped\":{most},\"stream\":{position}"));
        let state = LoaderState::from_json(&json).unwrap();
        for workers in [0, 2] {
            let loader = DataLoader::stream(whole(vec![5, 5])).num_workers(workers).build().unwrap();
            if let Ok(epoch) = loader.resume(&state) {
                assert!(epoch.count() <= 20);
            }
        }
    }
}
