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
    /// Samples that fail behind the stream, and such that take long there.
    unfinished: BTreeSet<u64>,
    slow: BTreeSet<u64>,
    /// Shards that cannot be opened.
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
        if let Value::Int(number) = &sample {
            let number = *number as u64;
            if self.slow.contains(&number) {
                std::thread::sleep(Duration::from_micros(300));
            }
            if self.unfinished.contains(&number) {
                return Err(Error::new(Kind::Dataset, format!("sample {number} is not to be finished")));
            }
        }
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
    let none = BTreeSet::new;
    Shards { lens, errors: none(), panics: none(), unfinished: none(), slow: none(), broken: none() }
}

fn numbers_of(epoch: Epoch) -> Vec<i64> {
    let of = |batch: Result<Batch>| batch.unwrap().tensor("0").unwrap().to_vec1::<i64>().unwrap();
    epoch.flat_map(of).collect()
}

#[derive(Clone, Debug)]
struct Case {
    dataset: Shards,
    batch: usize,
    window: usize,
    interleave: usize,
    shuffle: Option<u64>,
    drop_last: bool,
    on_error: OnError,
    rank: Option<(u64, u64)>,
}

prop_compose! {
    fn cases()(
        lens in proptest::collection::vec(0u64..20, 0..6),
        errors in proptest::collection::btree_set(samples(), 0..4),
        panics in proptest::collection::btree_set(samples(), 0..3),
        unfinished in proptest::collection::btree_set(samples(), 0..3),
        slow in proptest::collection::btree_set(samples(), 0..4),
        broken in proptest::collection::btree_set(0u64..6, 0..2),
        (batch, window, interleave) in (1usize..9, 0usize..16, 1usize..4),
        shuffle: Option<u64>,
        drop_last: bool,
        policy in 0usize..3,
        rank in prop_oneof![Just(None), (1..4u64, 0..4u64).prop_map(|(world, rank)| Some((rank % world, world)))],
    ) -> Case {
        let dataset = Shards { errors, panics, unfinished, slow, broken, ..whole(lens) };
        let on_error = [OnError::Fail, OnError::Skip { limit: 1000 }, OnError::Retry { times: 2 }][policy];
        Case { dataset, batch, window, interleave, shuffle, drop_last, on_error, rank }
    }
}

/// The number of some sample of some shard.
fn samples() -> impl Strategy<Value = u64> {
    (0u64..6, 0u64..20).prop_map(|(shard, at)| number(shard, at))
}

impl Case {
    fn builder(&self, workers: usize) -> DataLoaderBuilder {
        let builder = DataLoader::stream(self.dataset.clone()).batch_size(self.batch).interleave(self.interleave);
        let builder = builder.shuffle_window(self.window).drop_last(self.drop_last).seed(4).num_workers(workers);
        let builder = match self.shuffle {
            Some(seed) => builder.shuffle(seed),
            None => builder,
        };
        let builder = match self.rank {
            Some((rank, world)) => builder.distributed(rank, world, Tail::Pad),
            None => builder,
        };
        builder.on_error(self.on_error)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn streams_depend_on_nothing_but_what_determines_them(
        case in cases(),
        budget in prop_oneof![Just(u64::MAX), 1u64..2000],
        prefetch in 1usize..9,
        workers in 1usize..5,
        fewer in 0usize..3,
        at in 0usize..10,
        in_order: bool,
    ) {
        let build = |workers: usize| {
            let builder = case.builder(workers);
            let builder = match workers {
                0 => builder,
                _ => builder.in_order(in_order).prefetch(prefetch).prefetch_bytes(budget),
            };
            builder.build().unwrap()
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

    /// However often a run is interrupted, and with whatever workers it goes on, every batch is taken once.
    #[test]
    fn each_batch_of_streams_comes_once_over_any_number_of_resumes(
        case in cases(),
        parts in proptest::collection::vec((0usize..4, 0usize..5, any::<bool>(), 1usize..6), 0..7),
    ) {
        let sorted = |mut all: Vec<String>| { all.sort(); all };
        let expected = sorted(stream(case.builder(0).build().unwrap().epoch(3).unwrap()));
        let mut json = case.builder(0).build().unwrap().epoch(3).unwrap().state().to_json();
        let mut all = Vec::new();
        for (taken, workers, in_order, prefetch) in parts {
            let builder = case.builder(workers);
            let builder = if workers == 0 { builder } else { builder.in_order(in_order).prefetch(prefetch) };
            let mut epoch = builder.build().unwrap().resume(&LoaderState::from_json(&json).unwrap()).unwrap();
            all.extend(epoch.by_ref().take(taken).map(seen));
            json = epoch.state().to_json();
        }
        let state = LoaderState::from_json(&json).unwrap();
        all.extend(stream(case.builder(2).build().unwrap().resume(&state).unwrap()));
        prop_assert_eq!(sorted(all), expected);
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

/// Samples at the same place on several ranks are augmented each in its own way.
#[test]
fn ranks_draw_random_numbers_of_their_own() {
    let mut drawn = BTreeSet::new();
    for rank in 0..3 {
        let builder = DataLoader::stream(whole(vec![4; 6])).batch_size(3).seed(9).distributed(rank, 3, Tail::Pad);
        for batch in builder.num_workers(2).build().unwrap().epoch(1).unwrap() {
            let random = batch.unwrap().tensor("1").unwrap().to_vec1::<f64>().unwrap();
            drawn.extend(random.into_iter().map(f64::to_bits));
        }
    }
    assert_eq!(drawn.len(), 24);
}

/// A shard that cannot be opened is named by its own number, wherever the order puts it.
#[test]
fn a_broken_shard_is_described_as_itself() {
    let dataset = Shards { broken: [2].into(), ..whole(vec![2; 6]) };
    let mut places = BTreeSet::new();
    for seed in 0..20 {
        let loader = DataLoader::stream(dataset.clone()).shuffle(seed).build().unwrap();
        let errors: Vec<Error> = loader.epoch(0).unwrap().filter_map(Result::err).collect();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].description(), Some("shard 2, sample 0, offset 0"));
        places.insert(errors[0].index());
    }
    assert!(places.len() > 2);
}

/// A batch of which the place behind is not known does not move the state on: after a resume it is read once more, and left
/// out.
#[test]
fn a_state_is_no_further_than_its_place() {
    let build = |in_order: bool| {
        let builder = DataLoader::stream(whole(vec![9])).batch_size(1).num_workers(1);
        builder.in_order(in_order).build().unwrap()
    };
    let mut state = build(true).epoch(0).unwrap().state();
    state.ahead = vec![1, 4];
    let mut seen = vec![1, 4];
    for resumed in 0..7 {
        let mut epoch = build(resumed % 2 == 0).resume(&state).unwrap();
        seen.extend(epoch.next().map(|batch| batch.unwrap().number));
        state = LoaderState::from_json(&epoch.state().to_json()).unwrap();
        let (next, ahead) = (state.next, &state.ahead);
        assert!((0..9).all(|number| seen.contains(&number) == (number < next || ahead.contains(&number))), "{state:?}");
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..9).collect::<Vec<_>>());
    assert_eq!(build(true).resume(&state).unwrap().count(), 0);
}

/// A state of a run that skips samples is none of a run that does not: their batches differ.
#[test]
fn skipping_is_a_part_of_a_stream() {
    let build = |on_error| DataLoader::stream(whole(vec![9])).batch_size(2).on_error(on_error).build().unwrap();
    let state = |on_error| build(on_error).epoch(0).unwrap().state();
    let (skip, more) = (OnError::Skip { limit: 3 }, OnError::Skip { limit: 4 });
    assert!(build(more).resume(&state(skip)).is_ok());
    assert!(build(OnError::Retry { times: 1 }).resume(&state(OnError::Fail)).is_ok());
    assert_eq!(build(OnError::Fail).resume(&state(skip)).unwrap_err().kind(), Kind::State);
    assert_eq!(build(skip).resume(&state(OnError::Fail)).unwrap_err().kind(), Kind::State);
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
    let refused = |used: u64, window: usize| {
        let position = format!(r#"{{"open":[],"turn":0,"next":0,"samples":0,"used":{used}}}"#);
        let build = || DataLoader::stream(whole(vec![5, 5])).shuffle_window(window).build().unwrap();
        let json = build().epoch(0).unwrap().state().to_json();
        let json = json.replace("\"skipped\":0", &format!("\"skipped\":0,\"stream\":{position}"));
        let error = build().resume(&LoaderState::from_json(&json).unwrap()).err();
        error.map(|error| error.kind())
    };
    assert_eq!((refused(0, 0), refused(1, 0), refused(most, 0)), (None, Some(Kind::State), Some(Kind::State)));
    assert_eq!((refused(3, 4), refused(4, 4)), (None, Some(Kind::State)));
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
