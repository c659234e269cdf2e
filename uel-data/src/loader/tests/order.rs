use proptest::prelude::*;

use super::budget::Odd;
use super::*;
use crate::sampler::{BucketBatches, RandomSampler, SubsetSampler, Tail, TokenBatches, WeightedSampler};

#[derive(Clone, Debug)]
struct Case {
    dataset: Noisy,
    batch: usize,
    picks: Picks,
    drop_last: bool,
    on_error: OnError,
}

/// Which samples come in which batches.
#[derive(Clone, Copy, Debug)]
enum Picks {
    Sequential,
    Shuffled(u64),
    Weighted { seed: u64, replacement: bool },
    Subset(Option<u64>),
    Distributed { rank: u64, world: u64, tail: Tail },
    Buckets { window: usize },
    Tokens { window: usize },
    Odd { says: Option<u64> },
}

fn picks() -> impl Strategy<Value = Picks> {
    prop_oneof![
        1 => Just(Picks::Sequential),
        3 => any::<u64>().prop_map(Picks::Shuffled),
        1 => (any::<u64>(), any::<bool>()).prop_map(|(seed, replacement)| Picks::Weighted { seed, replacement }),
        1 => any::<Option<u64>>().prop_map(Picks::Subset),
        1 => (1..4u64, 0..4u64, any::<bool>()).prop_map(|(world, rank, pad)| Picks::Distributed {
            rank: rank % world,
            world,
            tail: if pad { Tail::Pad } else { Tail::Drop },
        }),
        1 => (1..5usize).prop_map(|window| Picks::Buckets { window }),
        1 => (1..30usize).prop_map(|window| Picks::Tokens { window }),
        1 => prop_oneof![Just(None), (0..12u64).prop_map(Some)].prop_map(|says| Picks::Odd { says }),
    ]
}

prop_compose! {
    fn cases()(
        len in 0u64..60,
        width in 0usize..5,
        rows: bool,
        batch in 1usize..12,
        picks in picks(),
        drop_last: bool,
        fails in proptest::collection::btree_set(0u64..60, 0..4),
        panics in proptest::collection::btree_set(0u64..60, 0..2),
        shapes in proptest::collection::btree_set(0u64..60, 0..2),
        slow in proptest::collection::btree_set(0u64..60, 0..4),
        policy in 0usize..3,
    ) -> Case {
        let pause = Duration::from_micros(300);
        let shapes = if rows { shapes } else { BTreeSet::new() };
        let dataset = Noisy::new(len, width).with(Faults { errors: fails, panics, shapes, slow, pause });
        let on_error = [OnError::Fail, OnError::Skip { limit: 1000 }, OnError::Retry { times: 2 }][policy];
        Case { dataset: if rows { dataset.rows() } else { dataset }, batch, picks, drop_last, on_error }
    }
}

impl Case {
    fn builder(&self, workers: usize) -> DataLoaderBuilder {
        let base = DataLoader::builder(self.dataset.clone()).on_error(self.on_error).num_workers(workers).seed(5);
        let fixed = |builder: DataLoaderBuilder| builder.batch_size(self.batch).drop_last(self.drop_last);
        let len = self.dataset.len;
        let random = || RandomSampler::new(len, 1);
        let lengths = || (0..len).map(|index| index as u32 % 17 + 1).collect::<Vec<_>>();
        let weights = || (0..len).map(|index| (index % 3 + 1) as f64).collect::<Vec<_>>();
        match self.picks {
            Picks::Sequential => fixed(base),
            Picks::Shuffled(seed) => fixed(base).shuffle(seed),
            Picks::Weighted { seed, replacement } => {
                fixed(base).sampler(WeightedSampler::new(weights(), len, replacement, seed).unwrap())
            }
            Picks::Subset(seed) => {
                let even: Vec<u64> = (0..len).step_by(2).collect();
                fixed(base).sampler(match seed {
                    Some(seed) => SubsetSampler::shuffled(even, seed),
                    None => SubsetSampler::new(even),
                })
            }
            Picks::Distributed { rank, world, tail } => fixed(base).shuffle(3).distributed(rank, world, tail),
            Picks::Buckets { window } => {
                let batches = BucketBatches::new(random(), lengths(), self.batch, window, self.drop_last, 2);
                base.batch_sampler(batches.unwrap())
            }
            Picks::Tokens { window } => {
                base.batch_sampler(TokenBatches::new(random(), lengths(), 64, window, 2).unwrap())
            }
            Picks::Odd { says } => base.batch_sampler(Odd { len, most: 11, says }),
        }
    }

    /// Whether no index comes twice, and whether all come.
    fn picks_each_once(&self) -> (bool, bool) {
        match self.picks {
            Picks::Weighted { replacement, .. } => (!replacement, false),
            Picks::Subset(_) => (true, false),
            Picks::Distributed { tail, .. } => (tail == Tail::Drop, false),
            Picks::Tokens { .. } | Picks::Odd { .. } => (true, true),
            _ => (true, !self.drop_last),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The stream is the same with any number of workers, prefetch and budget, after early exits, and from any batch on
    /// with any other number of workers.
    #[test]
    fn the_stream_depends_on_nothing_but_what_determines_it(
        case in cases(),
        budget in prop_oneof![Just(u64::MAX), 1u64..2000],
        prefetch in 1usize..9,
        left in 0usize..8,
        at in 0usize..8,
        workers in prop_oneof![Just(1usize), Just(2), Just(3), Just(16)],
        fewer in 0usize..4,
    ) {
        let inline = case.builder(0).build().unwrap();
        let expected = stream(inline.epoch(1).unwrap());
        let loader = case.builder(workers).prefetch(prefetch).prefetch_bytes(budget).build().unwrap();
        for _ in loader.epoch(0).unwrap().take(left) {}
        prop_assert_eq!(&stream(loader.epoch(1).unwrap()), &expected);

        let mut epoch = loader.epoch(1).unwrap();
        let first: Vec<String> = epoch.by_ref().take(at).map(seen).collect();
        let json = epoch.state().to_json();
        prop_assert!(json.len() < 200, "{}", json);
        let state = LoaderState::from_json(&json).unwrap();
        drop(epoch);
        let other = case.builder(fewer).build().unwrap();
        prop_assert_eq!([first, stream(other.resume(&state).unwrap())].concat(), &expected[..]);

        // Each index once.
        let skips = case.on_error == OnError::Skip { limit: 1000 };
        let mut indices: Vec<u64> = Vec::new();
        for batch in case.builder(workers).build().unwrap().epoch(1).unwrap() {
            match batch {
                Ok(batch) => indices.extend(batch.indices),
                Err(_) => prop_assert!(!skips),
            }
        }
        let distinct: BTreeSet<u64> = indices.iter().copied().collect();
        let (once, all) = case.picks_each_once();
        prop_assert!(!once || distinct.len() == indices.len());
        if skips && all {
            let faults = &case.dataset.faults;
            let bad = |index: &u64| [&faults.errors, &faults.panics, &faults.shapes].iter().any(|set| set.contains(index));
            prop_assert_eq!(distinct, (0..case.dataset.len).filter(|index| !bad(index)).collect());
        }
    }

    /// In completion order the same batches come, each once, and a resume brings those that were not taken.
    #[test]
    fn completion_order_brings_the_same_batches(case in cases(), at in 0usize..8, workers in 1usize..5) {
        let sorted = |mut all: Vec<String>| { all.sort(); all };
        let expected = sorted(stream(case.builder(0).build().unwrap().epoch(0).unwrap()));
        let loader = case.builder(workers).in_order(false).build().unwrap();
        let mut epoch = loader.epoch(0).unwrap();
        let first: Vec<String> = epoch.by_ref().take(at).map(seen).collect();
        let state = epoch.state();
        drop(epoch);
        let rest = stream(loader.resume(&state).unwrap());
        prop_assert_eq!(sorted([first.clone(), rest].concat()), &expected[..]);
        let rest = stream(case.builder(0).build().unwrap().resume(&state).unwrap());
        prop_assert_eq!(sorted([first, rest].concat()), &expected[..]);
    }

    /// However often a run is interrupted, and with whatever workers it goes on, every batch is taken once.
    #[test]
    fn each_batch_comes_once_over_any_number_of_resumes(
        case in cases(),
        parts in proptest::collection::vec((0usize..4, 0usize..5, any::<bool>(), 1usize..6), 0..7),
    ) {
        let sorted = |mut all: Vec<String>| { all.sort(); all };
        let expected = sorted(stream(case.builder(0).build().unwrap().epoch(3).unwrap()));
        let mut json = case.builder(0).build().unwrap().epoch(3).unwrap().state().to_json();
        let mut all = Vec::new();
        for (taken, workers, in_order, prefetch) in parts {
            let builder = case.builder(workers);
            let loader = if workers == 0 { builder } else { builder.in_order(in_order).prefetch(prefetch) }.build().unwrap();
            let mut epoch = loader.resume(&LoaderState::from_json(&json).unwrap()).unwrap();
            all.extend(epoch.by_ref().take(taken).map(seen));
            json = epoch.state().to_json();
        }
        let state = LoaderState::from_json(&json).unwrap();
        all.extend(stream(case.builder(2).build().unwrap().resume(&state).unwrap()));
        prop_assert_eq!(sorted(all), expected);
    }

    /// One batch by itself is what the epoch had there.
    #[test]
    fn a_replayed_batch_is_the_same(case in cases(), workers in 0usize..3) {
        let loader = case.builder(workers).build().unwrap();
        let count = loader.batches(2).unwrap().unwrap();
        for batch in loader.epoch(2).unwrap() {
            let number = batch.as_ref().map_or_else(|error| error.batch().unwrap(), |batch| batch.number);
            prop_assert_eq!(seen(loader.replay(2, number)), seen(batch));
        }
        prop_assert!(loader.replay(2, count).is_err());
    }
}

/// Written row by row or sample by sample, with all samples at once or one at a time: the same numbers.
#[test]
fn both_roads_make_the_same_batches() {
    let slow: BTreeSet<u64> = (0..100).collect();
    let faults = Faults { slow, pause: Duration::from_micros(400), ..Faults::default() };
    let of = |dataset: Noisy| {
        stream(DataLoader::builder(dataset).batch_size(50).shuffle(1).build().unwrap().epoch(0).unwrap())
    };
    let expected = of(Noisy::new(100, 3));
    assert_eq!(of(Noisy::new(100, 3).rows()), expected);
    assert_eq!(of(Noisy::new(100, 3).rows().with(faults.clone())), expected);
    assert_eq!(of(Noisy::new(100, 3).with(faults)), expected);
}

#[test]
fn epochs_differ_in_order_and_randomness() {
    let loader = DataLoader::builder(Noisy::new(50, 2)).batch_size(50).shuffle(1).build().unwrap();
    let one = loader.epoch(0).unwrap().next().unwrap().unwrap();
    let two = loader.epoch(1).unwrap().next().unwrap().unwrap();
    assert_ne!(one.indices, two.indices);
    let noise = |batch: &Batch, index: u64| {
        let row = batch.indices.iter().position(|&other| other == index).unwrap();
        batch.tensor("noise.0").unwrap().get(row).unwrap().to_vec1::<f32>().unwrap()
    };
    assert_ne!(noise(&one, 7), noise(&two, 7));
    assert_ne!(noise(&one, 7), noise(&one, 8));
}

/// Ranks together have the batches of one.
#[test]
fn the_global_order_does_not_depend_on_the_world() {
    let batches = |rank, world: u64| {
        let builder = DataLoader::builder(Noisy::new(103, 1)).batch_size(12 / world as usize).shuffle(3).seed(3);
        let loader = builder.distributed(rank, world, Tail::Drop).num_workers(2).build().unwrap();
        loader.epoch(4).unwrap().map(|batch| batch.unwrap().indices).collect::<Vec<_>>()
    };
    let global = |world: u64| {
        let ranks: Vec<Vec<Vec<u64>>> = (0..world).map(|rank| batches(rank, world)).collect();
        let whole = |number: usize| {
            let rows = ranks[0][number].len();
            (0..rows).flat_map(|row| ranks.iter().map(move |rank| rank[number][row])).collect::<Vec<_>>()
        };
        (0..8).map(whole).collect::<Vec<_>>()
    };
    let alone = global(1);
    for world in [2, 3, 4, 6, 12] {
        assert_eq!(global(world), alone, "{world}");
    }
    // A state of one world is one of the other.
    let build = |world: u64| {
        let builder = DataLoader::builder(Noisy::new(103, 1)).batch_size(12 / world as usize).shuffle(3);
        builder.distributed(0, world, Tail::Drop).build().unwrap()
    };
    let mut epoch = build(2).epoch(4).unwrap();
    epoch.next();
    let next = build(4).resume(&epoch.state()).unwrap().next().unwrap().unwrap();
    assert_eq!(next.indices, [alone[1][0], alone[1][4], alone[1][8]]);
}

#[test]
fn batches_of_other_shapes_arrive_in_order_too() {
    let lengths: Vec<u32> = (0..200).map(|index| index % 17 + 1).collect();
    let random = || RandomSampler::new(200, 1);
    let of = |workers: usize, tokens: bool| {
        let builder = DataLoader::builder(Noisy::new(200, 1)).num_workers(workers);
        let builder = if tokens {
            builder.batch_sampler(TokenBatches::new(random(), lengths.clone(), 64, 20, 2).unwrap())
        } else {
            builder.batch_sampler(BucketBatches::new(random(), lengths.clone(), 7, 4, false, 2).unwrap())
        };
        stream(builder.build().unwrap().epoch(1).unwrap())
    };
    for tokens in [false, true] {
        let expected = of(0, tokens);
        assert!(expected.len() > 20);
        assert_eq!(of(3, tokens), expected);
    }
}

#[test]
fn small_and_empty_datasets_have_the_batches_they_have() {
    for workers in [0, 2] {
        let count = |len, batch, drop_last| {
            let builder = DataLoader::builder(Noisy::new(len, 1)).batch_size(batch).drop_last(drop_last);
            builder
                .num_workers(workers)
                .build()
                .unwrap()
                .epoch(0)
                .unwrap()
                .map(|batch| batch.unwrap().len())
                .collect::<Vec<_>>()
        };
        let none: Vec<usize> = vec![];
        assert_eq!(count(0, 4, false), none);
        assert_eq!(count(3, 4, true), none);
        assert_eq!(count(3, 4, false), [3]);
        assert_eq!(count(1, 1, false), [1]);
        assert_eq!(count(5, 2, true), [2, 2]);
    }
}

/// A state of other data or other batches is refused.
#[test]
fn a_state_of_another_run_is_refused() {
    let state = |builder: DataLoaderBuilder| builder.build().unwrap().epoch(0).unwrap().state();
    let base = || DataLoader::builder(Noisy::new(10, 1)).batch_size(2).shuffle(1);
    let loader = base().build().unwrap();
    assert!(loader.resume(&state(base().num_workers(3))).is_ok());
    let others = [
        DataLoader::builder(Noisy::new(11, 1)).batch_size(2).shuffle(1),
        DataLoader::builder(Noisy::new(10, 1)).batch_size(3).shuffle(1),
        DataLoader::builder(Noisy::new(10, 1)).batch_size(2).shuffle(2).seed(1),
        base().seed(2),
        base().drop_last(true),
        base().collate(crate::collate::Ragged),
    ];
    for other in others {
        assert_eq!(loader.resume(&state(other)).unwrap_err().kind(), Kind::State);
    }
    // A state within a struct of the program's comes by no check of its version.
    let mut newer = state(base());
    newer.version += 1;
    let json = serde_json::to_string(&[newer]).unwrap();
    let [newer]: [LoaderState; 1] = serde_json::from_str(&json).unwrap();
    assert_eq!(loader.resume(&newer).unwrap_err().kind(), Kind::State);
    for json in ["", "{}", "[1]", r#"{"version":2,"dataset":0,"batches":0,"epoch":0,"next":0,"samples":0,"skipped":0}"#]
    {
        assert_eq!(LoaderState::from_json(json).unwrap_err().kind(), Kind::State, "{json}");
    }
}

/// A state that stands behind the end, or is no state of any run, ends the epoch at once.
#[test]
fn a_state_behind_the_end_has_no_batches() {
    let base = || DataLoader::builder(Noisy::new(10, 1)).batch_size(2);
    let mut state = base().build().unwrap().epoch(0).unwrap().state();
    state.next = u64::MAX;
    state.ahead = vec![3, u64::MAX];
    for workers in [0, 2] {
        assert_eq!(base().num_workers(workers).build().unwrap().resume(&state).unwrap().count(), 0);
    }
}

/// At 9/10 of a billion shuffled samples, from a state to the batch.
#[test]
fn measured_resume_takes_no_longer_for_a_billion_samples() {
    let build = || DataLoader::builder(Noisy::new(1_000_000_000, 1).rows()).batch_size(64).shuffle(1).build().unwrap();
    let mut state = build().epoch(0).unwrap().state();
    state.next = 900_000_000 / 64;
    let best = (0..20).map(|_| {
        let loader = build();
        let began = std::time::Instant::now();
        let batch = loader.resume(&state).unwrap().next().unwrap().unwrap();
        assert_eq!(batch.number, state.next);
        began.elapsed()
    });
    assert!(best.min().unwrap() < Duration::from_millis(1));
}
