//! Threads and devices: who takes batches, who uses and drops them, and how many loaders there are.

use candle_core::Device;
use uel::data::{Batch, Epoch, Field, LoaderState, OnError, Result};

use super::{Faults, Noisy, builder, expected, is_on, seen};
use crate::emulated::{Emulated, Turn};
use crate::scenario::bytes_of;
use crate::stream::{Copy, DeviceKind};

/// An epoch begun on one thread is taken on others by turns; batches are used and dropped on yet another one.
#[test]
fn batches_may_be_taken_used_and_dropped_on_any_thread() {
    Turn::each_schedule(|| {
        for (own_stream, rows, workers) in [(false, true, 2), (true, true, 2), (false, false, 1), (false, true, 0)] {
            let device = DeviceKind::of(own_stream, true).device();
            let dataset = Noisy::new(48, 100, rows);
            let expected = expected(builder(dataset.clone(), 6, 0), 0);
            let loader = builder(dataset, 6, workers).device(&device).build().expect("a loader");
            let mut epoch = loader.epoch(0).expect("an epoch");
            let mut users = Vec::new();
            for expected in expected {
                let take = move || {
                    let batch = epoch.next().expect("a batch");
                    (epoch, batch)
                };
                let (next, batch): (Epoch, Result<Batch>) = std::thread::spawn(take).join().expect("the taker");
                epoch = next;
                users.push(std::thread::spawn(move || {
                    assert_eq!(seen(&batch), expected);
                    drop(batch);
                }));
            }
            assert!(epoch.next().is_none());
            drop((loader, epoch, device));
            users.into_iter().for_each(|user| user.join().expect("the user's thread"));
        }
        uel::trim_devices();
    });
}

/// Without cudarc's own tracking, the hand-over alone orders the consumer's work after the copies, and its frees after both;
/// what is dropped before anybody had it is freed after its copies too.
#[test]
fn without_tracking_the_consumer_still_comes_after_the_copies() {
    Turn::each_schedule(|| {
        for own_stream in [false, true] {
            for (rows, workers) in [(true, 3), (true, 0), (false, 2)] {
                let device = DeviceKind::of(own_stream, false).device();
                let dataset = Noisy::new(60, 200, rows);
                let expected = expected(builder(dataset.clone(), 4, 0), 0);
                let loader = builder(dataset, 4, workers).device(&device).build().expect("a loader");
                for (batch, expected) in loader.epoch(0).expect("an epoch").zip(&expected) {
                    // Freed at once: the next ones get this memory.
                    assert_eq!(&seen(&batch), expected);
                }
                let noise = |batch: &Batch| batch.tensor("noise.0").expect("a tensor").clone();
                let mut copies = Vec::new();
                for batch in loader.epoch(0).expect("an epoch") {
                    // Freed while the copy of it waits.
                    copies.push(Copy::of(&noise(&batch.expect("a batch"))));
                }
                let once_more = loader.epoch(0).expect("an epoch");
                for (copy, batch) in copies.iter().zip(once_more) {
                    assert!(copy.bytes() == bytes_of(&noise(&batch.expect("a batch"))));
                }
                let mut left = loader.epoch(1).expect("an epoch");
                drop(left.next());
                drop(left);
                drop(loader.epoch(2).expect("an epoch"));
            }
        }
        uel::trim_devices();
    });
}

/// Several loaders at once, on one device and on two, and one whose epochs overlap.
#[test]
fn several_loaders_share_devices() {
    Turn::each_schedule(|| {
        {
            let mut devices = vec![Device::new_cuda(0).expect("a device")];
            match Device::new_cuda(1) {
                Ok(device) => devices.push(device),
                Err(_) => assert!(Emulated::get().is_none(), "the emulated driver has two devices"),
            }
            let dataset = |at: usize| Noisy::new(40 + at as u64, 50 + at, at.is_multiple_of(2));
            let loaders: Vec<_> = (0..4)
                .map(|at| {
                    builder(dataset(at), 5, 1 + at % 3).device(&devices[at % devices.len()]).build().expect("one")
                })
                .collect();
            let epochs = |number| loaders.iter().map(move |loader| loader.epoch(number).expect("an epoch"));
            let mut running: Vec<(usize, u64, Epoch, Vec<Result<Batch>>)> = (0..3)
                .flat_map(|number| epochs(number).enumerate().map(move |(at, epoch)| (at, number, epoch, Vec::new())))
                .collect();
            let mut any = true;
            while any {
                any = false;
                for (_, _, epoch, kept) in &mut running {
                    let next = epoch.next();
                    any |= next.is_some();
                    kept.extend(next);
                }
            }
            for (at, number, epoch, kept) in running {
                drop(epoch);
                let device = &devices[at % devices.len()];
                assert!(kept.iter().all(|batch| is_on(&batch.as_ref().expect("a batch").data, device)));
                let kept: Vec<String> = kept.iter().map(seen).collect();
                assert_eq!(kept, expected(builder(dataset(at), 5, 0), number));
            }
        }
        uel::trim_devices();
    });
}

/// A run goes on on another device, or on the CPU, from the state that it has here; a batch is had once more by its number.
#[test]
fn states_know_no_device() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let faults = Faults { errors: [7].into(), ..Faults::default() };
        let dataset = || Noisy::new(50, 10, true).with(faults.clone());
        let expected = expected(builder(dataset(), 4, 0), 0);
        let places = [device.clone(), Device::Cpu, device.clone()];
        let mut state: Option<LoaderState> = None;
        let mut all = Vec::new();
        for (at, place) in places.iter().enumerate() {
            let loader = builder(dataset(), 4, at).device(place).build().expect("a loader");
            let mut epoch = match &state {
                Some(state) => loader.resume(state).expect("resumed"),
                None => loader.epoch(0).expect("an epoch"),
            };
            let most = if at + 1 == places.len() { usize::MAX } else { 4 };
            for batch in epoch.by_ref().take(most) {
                assert!(is_on(&batch.as_ref().expect("a batch").data, place));
                all.push(seen(&batch));
            }
            state = Some(epoch.state());
            assert_eq!(seen(&loader.replay(0, 5)), expected[5]);
        }
        assert_eq!(all, expected);
    }
    uel::trim_devices();
}

/// A batch of which every sample was skipped sends nothing; samples without elements arrive as such.
#[test]
fn batches_without_bytes_need_nothing() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let faults = Faults { errors: (0..10).collect(), ..Faults::default() };
        let dataset = || Noisy::new(20, 0, true).with(faults.clone());
        let in_order = |workers| {
            let builder = uel::data::DataLoader::builder(dataset()).batch_size(5).num_workers(workers);
            builder.on_error(OnError::Skip { limit: 100 })
        };
        let expected = expected(in_order(0), 0);
        assert_eq!(expected.len(), 2);
        for workers in [0, 2] {
            let loader = in_order(workers).device(&device).build().expect("a loader");
            let batches: Vec<_> = loader.epoch(0).expect("an epoch").collect();
            assert_eq!(batches.iter().map(seen).collect::<Vec<_>>(), expected);
            let Some(Field::Tensor(noise)) = batches[0].as_ref().expect("a batch").get("noise.0") else { panic!() };
            assert!(noise.device().same_device(&device) && noise.dims() == [5, 0]);
        }
    }
    uel::trim_devices();
}
