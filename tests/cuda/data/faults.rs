//! Datasets and drivers that fail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use uel::data::collate::CollateFn;
use uel::data::dataset::FnDataset;
use uel::data::{
    Array, Batch, DataLoader, Dataset, Field, Fingerprint, Kind, Layout, OnError, Result, Rows, SampleCx, Stage, Value,
};

use super::{Faults, Noisy, builder, expected, is_drivers, seen};
use crate::emulated::{Emulated, Turn};
use crate::scenario::bytes_of;
use crate::stream::FALLIBLE;

/// What a failed call costs is one batch, which says so; never memory, and never another batch.
#[test]
fn a_driver_that_refuses_any_one_call_costs_a_batch() {
    let Some(emulated) = Emulated::get() else { return };
    for (rows, workers) in [(true, 2), (true, 0), (false, 2)] {
        let dataset = Noisy::new(40, 30, rows);
        let expected = expected(builder(dataset.clone(), 6, 0), 0);
        // Once a loader is there, the stream for copies is too.
        for function in FALLIBLE.into_iter().filter(|function| *function != "cuStreamCreate") {
            let mut failures = 0;
            for n in 1.. {
                let _turn = Turn::begin();
                let device = Device::new_cuda(0).expect("a device");
                let loader = builder(dataset.clone(), 6, workers).device(&device).build().expect("a loader");
                // The stream for copies is there.
                drop(uel::HostPool::pinned(&device, uel::PoolOptions::new()).expect("a pool"));
                let before = emulated.calls(function);
                emulated.refuse(function, n);
                let kept: Vec<Result<Batch>> = loader.epoch(0).expect("an epoch").collect();
                let called = emulated.calls(function) - before;
                emulated.fail_none_on(&device);
                drop(loader);
                drop(device);
                assert_eq!(kept.len(), expected.len());
                let mut lost = 0;
                for (batch, expected) in kept.iter().zip(&expected) {
                    match batch {
                        Err(error) => {
                            assert!(is_drivers(error), "{function} {n}: {error}");
                            lost += 1;
                        }
                        batch => assert_eq!(&seen(batch), expected, "{function} {n}"),
                    }
                }
                assert!(lost <= 1, "{function} {n}: {lost} batches are lost");
                drop(kept);
                uel::trim_devices();
                if called < n {
                    break;
                }
                failures += 1;
            }
            // Events are waited for only where nothing else helps.
            assert!(failures > 0 || function == "cuEventSynchronize", "{function} is never called");
        }
    }
}

/// Where a device is full, each batch that does not fit says how much was asked; once there is room, batches come again.
#[test]
fn a_full_device_is_an_error_of_the_batches_that_do_not_fit() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let loader = builder(Noisy::new(40, 1000, true), 10, 2).device(&device).build().expect("a loader");
        emulated.memory_limit(emulated.number("/live/device_bytes") + 20_000);
        let errors: Vec<_> = loader.epoch(0).expect("an epoch").map(|batch| batch.expect_err("no room")).collect();
        assert_eq!(errors.len(), 4);
        for (number, error) in errors.iter().enumerate() {
            assert_eq!((error.kind(), error.stage()), (Kind::OutOfMemory, Some(Stage::Transfer)));
            assert_eq!((error.epoch(), error.batch()), (Some(0), Some(number as u64)));
            assert!(error.worker().is_some() && error.cause().expected() == Some("40000 bytes"), "{error}");
        }
        emulated.memory_limit(1 << 30);
        assert_eq!(loader.epoch(0).expect("an epoch").filter(Result::is_ok).count(), 4);
    }
    uel::trim_devices();
}

/// A worker that panics, or fails, while it has a slab gives it back: there is one only, and every batch fails once.
#[test]
fn a_worker_that_panics_gives_its_slab_back() {
    Turn::each_schedule(|| {
        {
            let device = Device::new_cuda(0).expect("a device");
            let faults = Faults {
                panics: (0..50).step_by(2).collect(),
                errors: (1..50).step_by(6).collect(),
                ..Faults::default()
            };
            for on_error in [OnError::Fail, OnError::Retry { times: 1 }] {
                let dataset = || Noisy::new(50, 9, true).with(faults.clone());
                let expected = expected(builder(dataset(), 1, 0).on_error(on_error), 0);
                let loader = builder(dataset(), 1, 2).on_error(on_error).prefetch_bytes(1).device(&device);
                let loader = loader.build().expect("a loader");
                let kept: Vec<_> = loader.epoch(0).expect("an epoch").collect();
                assert_eq!(kept.iter().filter(|batch| batch.is_err()).count(), 34);
                assert_eq!(kept.iter().map(seen).collect::<Vec<_>>(), expected);
                if let Some(emulated) = Emulated::get() {
                    assert_eq!(emulated.number("/live/pinned_bytes"), 4096);
                }
            }
        }
        uel::trim_devices();
    });
}

/// A dataset that says when its slab is written, for the driver to say whether a copy out of it is under way yet.
struct Watched {
    layout: Layout,
    violated: Arc<AtomicBool>,
    /// Where rows were written.
    places: Arc<Mutex<std::collections::BTreeSet<usize>>>,
}

impl Dataset for Watched {
    fn len(&self) -> u64 {
        400
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        Ok(Array::new([64], vec![index as f32; 64])?.into())
    }
    fn layout(&self) -> Option<&Layout> {
        Some(&self.layout)
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, _: &mut SampleCx) -> Result<()> {
        let column = rows.column_mut::<f32>(0)?;
        for &index in indices {
            let before = column.len();
            column.extend_from_slice(&[index as f32; 64]);
            let row = &column[before..];
            self.places.lock().expect("the places").insert(row.as_ptr().addr());
            // SAFETY: floats are made of bytes, and these are borrowed.
            let bytes = unsafe { std::slice::from_raw_parts(row.as_ptr().cast::<u8>(), size_of_val(row)) };
            if Emulated::get().is_some_and(|emulated| emulated.host_access(bytes, true) > 0) {
                self.violated.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("watched").finish()
    }
}

/// Rows are written into page-locked memory itself, which is used again only when the copy out of it is over.
#[test]
fn a_slab_is_not_written_while_it_is_copied() {
    Turn::each_schedule(|| {
        for workers in [0, 1, 3] {
            let device = Device::new_cuda(0).expect("a device");
            let (violated, places) = (Arc::new(AtomicBool::new(false)), Arc::default());
            let layout = Layout::array(DType::F32, [64]);
            let dataset = Watched { layout, violated: Arc::clone(&violated), places: Arc::clone(&places) };
            let loader = DataLoader::builder(dataset).batch_size(10).num_workers(workers).device(&device).build();
            let loader = loader.expect("a loader");
            for batch in loader.epoch(0).expect("an epoch") {
                let batch = batch.expect("a batch");
                let values = batch.tensor("").expect("a tensor").to_vec2::<f32>().expect("read back");
                let written: Vec<u64> = values.iter().map(|row| row[0] as u64).collect();
                assert_eq!(written, batch.indices);
            }
            assert!(!violated.load(Ordering::Relaxed), "a slab was written while it was copied");
            // Of 400 rows of 256 bytes, each of `workers + 1` slabs has 10.
            let slabs = workers.max(1) + 1;
            assert!(places.lock().expect("the places").len() <= 10 * slabs);
            drop((loader, device));
        }
        uel::trim_devices();
    });
}

/// Slow samples hold slabs for long. Whoever waits for them neither fails nor hangs, and an epoch that is left waits for one
/// sample alone.
#[test]
fn slow_samples_are_waited_for_and_left() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let pause = Duration::from_millis(30);
        let dataset = || {
            FnDataset::new("slow", 300, move |index, _| {
                std::thread::sleep(pause);
                Ok(Value::Int(index as i64))
            })
        };
        let loader = DataLoader::builder(dataset()).batch_size(5).num_workers(3).device(&device).build().expect("one");
        let mut epoch = loader.epoch(0).expect("an epoch");
        assert_eq!(epoch.next().expect("a batch").expect("a batch").indices, [0, 1, 2, 3, 4]);
        let began = Instant::now();
        drop(epoch);
        drop(loader);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
    uel::trim_devices();
}

/// A collation's own tensors are brought too, those on a device already stay there, and one that panics is an error.
#[test]
fn tensors_of_any_collation_are_brought() {
    Turn::each_schedule(|| {
        {
            let device = Device::new_cuda(0).expect("a device");
            let there = Tensor::from_vec(vec![5u8, 6], 2, &device).expect("a tensor");
            let kept_there = there.clone();
            let collate = CollateFn::new("mixed", move |samples: Vec<Value>, indices: &[u64]| {
                assert!(indices.first() != Some(&8), "cannot collate this");
                // Larger than a buffer of the pool, and in another order than in memory.
                let large: Vec<u32> = (0..1_500_000u32).map(|n| n + samples.len() as u32).collect();
                let large = Tensor::from_vec(large, (1000, 1500), &Device::Cpu)?.t()?;
                let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?;
                let parts = vec![Field::Tensor(large), Field::Tensor(kept_there.clone()), Field::Tensor(empty)];
                Ok(Field::Map(vec![
                    ("parts".into(), Field::List(parts)),
                    ("names".into(), Field::Strings(vec!["a".into()])),
                ]))
            });
            let dataset = FnDataset::new("numbers", 12, |index, _| Ok(Value::Int(index as i64)));
            let loader = DataLoader::builder(dataset).batch_size(4).num_workers(2).collate(collate).device(&device);
            let batches: Vec<_> = loader.build().expect("a loader").epoch(0).expect("an epoch").collect();
            let [first, second, third] = &batches[..] else { panic!("{batches:?}") };
            assert_eq!(third.as_ref().map(|_| ()).map_err(|error| error.kind()), Err(Kind::WorkerPanic));
            for batch in [first, second] {
                let batch = batch.as_ref().expect("a batch");
                assert!(super::is_on(&batch.data, &device));
                let large = batch.tensor("parts.0").expect("a tensor");
                let expected: Vec<u8> = (0..1500u32)
                    .flat_map(|column| (0..1000u32).map(move |row| row * 1500 + column + 4))
                    .flat_map(u32::to_le_bytes)
                    .collect();
                assert_eq!(large.dims(), [1500, 1000]);
                assert!(bytes_of(large) == expected);
                assert_eq!(bytes_of(batch.tensor("parts.1").expect("a tensor")), [5, 6]);
                assert_eq!(batch.tensor("parts.2").expect("a tensor").dims(), [0, 4]);
            }
            drop(there);
        }
        uel::trim_devices();
    });
}
