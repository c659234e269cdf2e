//! Random loaders on random schedules.

use std::sync::Arc;

use candle_core::Device;
use proptest::prelude::*;
use uel::data::sampler::{BatchSampler, Batches, DistributedSampler, RandomSampler, SequentialSampler, Tail};
use uel::data::{Batch, DataLoader, DataLoaderBuilder, LoaderState, OnError, Result};

use super::{Faults, Noisy, expected, is_drivers, is_on, seen};
use crate::emulated::{Emulated, Turn};
use crate::stream::{DeviceKind, FALLIBLE, cases, for_any};

/// Random schedules for each that streams have.
const SHARE: u32 = 2;

/// Which samples come in which batches.
#[derive(Clone, Copy, Debug)]
enum Order {
    Shuffled(u64),
    Sequential,
    Distributed {
        rank: u64,
        world: u64,
    },
    /// Batches of several sizes; what they say of the largest may be nothing, or wrong.
    Odd {
        says: Option<u64>,
    },
}

#[derive(Clone, Debug)]
struct Case {
    dataset: Noisy,
    batch: usize,
    order: Order,
    drop_last: bool,
    on_error: OnError,
    workers: usize,
    other_workers: usize,
    budget: Option<u64>,
    prefetch: Option<usize>,
    pinned: bool,
    in_order: bool,
    /// Batches that are taken of an epoch that is then left, and before the run is resumed.
    left: usize,
    at: usize,
    /// Whether the epoch is taken on another thread than it is begun.
    elsewhere: bool,
    failure: Option<(&'static str, u64)>,
}

fn any_case() -> impl Strategy<Value = Case> {
    let order = prop_oneof![
        any::<u64>().prop_map(Order::Shuffled),
        Just(Order::Sequential),
        (1..4u64, 0..4u64).prop_map(|(world, rank)| Order::Distributed { rank: rank % world, world }),
        prop_oneof![Just(None), (0..12u64).prop_map(Some)].prop_map(|says| Order::Odd { says }),
    ];
    let width = prop_oneof![3 => 0..9usize, 2 => 0..400usize, 1 => 0..4000usize];
    let some = |most| prop::collection::btree_set(0..60u64, 0..most);
    let faults = (some(4), some(2), some(4)).prop_map(|(errors, panics, slow)| Faults { errors, panics, slow });
    let on_error =
        prop::sample::select(&[OnError::Fail, OnError::Skip { limit: 1000 }, OnError::Retry { times: 2 }][..]);
    let budget = prop_oneof![Just(None), (1..3000u64).prop_map(Some), (1..300_000u64).prop_map(Some)];
    (
        (0..60u64, width, any::<bool>(), prop_oneof![1 => Just(Faults::default()), 1 => faults]),
        (1..12usize, order, any::<bool>(), on_error),
        (
            0..5usize,
            0..4usize,
            budget,
            prop::option::of(1..6usize),
            prop::bool::weighted(0.9),
            prop::bool::weighted(0.8),
        ),
        (0..5usize, 0..6usize, any::<bool>()),
        prop::option::weighted(0.2, (prop::sample::select(&FALLIBLE[..]), 1..60u64)),
    )
        .prop_map(
            |(
                (len, width, rows, faults),
                (batch, order, drop_last, on_error),
                (workers, other_workers, budget, prefetch, pinned, in_order),
                (left, at, elsewhere),
                failure,
            )| Case {
                dataset: Noisy::new(len, width, rows).with(faults),
                batch,
                order,
                drop_last,
                on_error,
                workers,
                other_workers,
                budget,
                prefetch,
                pinned,
                in_order,
                left,
                at,
                elsewhere,
                failure,
            },
        )
}

/// Batches of 1 to 11 samples.
struct Odd {
    len: u64,
    says: Option<u64>,
}

fn first(batch: u64) -> u64 {
    // After the batches of 1 to 11 samples come others of 1 to 11.
    batch / 11 * 66 + (batch % 11) * (batch % 11 + 1) / 2
}

impl Batches for Odd {
    fn len(&self) -> u64 {
        (0..).find(|&batch| first(batch) >= self.len).unwrap_or(0)
    }
    fn largest(&self) -> Option<u64> {
        self.says
    }
    fn append(&self, number: u64, out: &mut Vec<u64>) {
        out.extend(first(number)..first(number + 1).min(self.len));
    }
}

impl BatchSampler for Odd {
    fn batches(&self, _: u64) -> Result<Arc<dyn Batches>> {
        Ok(Arc::new(Odd { ..*self }))
    }
    fn fingerprint(&self) -> u64 {
        self.len
    }
}

impl Case {
    fn builder(&self, workers: usize) -> DataLoaderBuilder {
        let len = self.dataset.len;
        let builder = DataLoader::builder(self.dataset.clone()).on_error(self.on_error).num_workers(workers).seed(5);
        match self.order {
            Order::Shuffled(seed) => builder.batch_size(self.batch).drop_last(self.drop_last).shuffle(seed),
            Order::Sequential => builder.batch_size(self.batch).sampler(SequentialSampler::new(len)),
            Order::Distributed { rank, world } => {
                let sampler = DistributedSampler::new(RandomSampler::new(len, 3), rank, world, Tail::Drop);
                builder.batch_size(self.batch).sampler(sampler.expect("a sampler"))
            }
            Order::Odd { says } => builder.batch_sampler(Odd { len, says }),
        }
    }

    fn on(&self, workers: usize, device: &Device) -> DataLoader {
        let mut builder = self.builder(workers).device(device).pin_memory(self.pinned).in_order(true);
        if workers > 0 {
            builder = builder.in_order(self.in_order);
            if let Some(budget) = self.budget {
                builder = builder.prefetch_bytes(budget);
            }
            if let Some(prefetch) = self.prefetch {
                builder = builder.prefetch(prefetch);
            }
        }
        builder.build().expect("a loader")
    }

    /// Compares all that was taken with what the CPU has.
    fn compare(&self, kept: &[Result<Batch>], expected: &[String], device: &Device) {
        let mut missing: Vec<&String> = expected.iter().collect();
        let mut lost = 0;
        for (at, batch) in kept.iter().enumerate() {
            if let Err(error) = batch
                && is_drivers(error)
            {
                assert!(self.failure.is_some(), "{error}");
                lost += 1;
                continue;
            }
            if let Ok(batch) = batch {
                assert!(is_on(&batch.data, device));
            }
            let seen = seen(batch);
            if self.in_order && lost == 0 {
                assert_eq!(expected.get(at), Some(&seen));
            }
            let found = missing.iter().position(|expected| **expected == seen);
            missing.remove(found.unwrap_or_else(|| panic!("not expected, or twice: {seen}")));
        }
        assert_eq!(missing.len(), lost, "{missing:?}");
    }

    /// An epoch in two parts by two loaders, after another one that was left.
    fn run(&self, device: &Device) {
        let expected = expected(self.builder(0), 1);
        let mut kept = Vec::new();
        let (first, second) = (self.on(self.workers, device), self.on(self.other_workers, device));
        if let (Some(emulated), Some((function, n))) = (Emulated::get(), self.failure) {
            emulated.refuse(function, n);
        }
        let run = |kept: &mut Vec<Result<Batch>>| -> Result<()> {
            let mut left = first.epoch(0)?;
            let mut other = Vec::new();
            other.extend(left.by_ref().take(self.left));
            drop(left);
            let mut epoch = first.epoch(1)?;
            kept.extend(epoch.by_ref().take(self.at));
            let state = LoaderState::from_json(&epoch.state().to_json())?;
            drop(epoch);
            drop(other);
            let mut rest = second.resume(&state)?;
            kept.extend(rest.by_ref());
            Ok(())
        };
        match run(&mut kept) {
            Ok(()) => {}
            Err(error) => {
                assert!(self.failure.is_some() && is_drivers(&error), "{error}");
                kept.clear();
                if let Some(emulated) = Emulated::get() {
                    emulated.fail_none_on(device);
                }
                return;
            }
        }
        if let Some(emulated) = Emulated::get() {
            emulated.fail_none_on(device);
        }
        // Kept beyond their loaders.
        drop((first, second));
        self.compare(&kept, &expected, device);
    }
}

#[test]
fn any_loader_brings_the_batches_of_the_cpu() {
    let any = (any_case(), any::<u64>(), prop::sample::select(&DeviceKind::ALL[..]));
    for_any(cases() / SHARE, &any, |(case, seed, kind)| {
        let _turn = Turn::begin();
        {
            let device = kind.device();
            if let Some(emulated) = Emulated::get() {
                emulated.any_seed(seed);
            }
            if case.elsewhere {
                std::thread::scope(|scope| scope.spawn(|| case.run(&device)).join()).expect("the consumer's thread");
            } else {
                case.run(&device);
            }
        }
        uel::trim_devices();
    });
}
