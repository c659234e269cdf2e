//! What a loader holds: bytes on the device and page-locked ones, and batches that are kept.

use candle_core::Device;
use proptest::prelude::*;
use uel::data::{Batch, DataLoader, Result};

use super::{Noisy, builder, expected, seen};
use crate::emulated::{Emulated, Turn};
use crate::stream::{cases, for_any};

/// Random schedules for each that streams have.
const SHARE: u32 = 20;

/// Slabs are whole pages.
const PAGE: u64 = 4096;

/// The gaps between the columns of a batch.
const GAPS: u64 = 4 * 64;

/// Buffers for batches without a layout.
const BUFFER: u64 = 4 << 20;

/// On the device are at most the budget's bytes, or one batch, and the batch that the consumer has; page-locked is no more
/// than the budget, or one slab, and no more slabs than there are workers and one.
#[test]
fn bytes_in_flight_stay_within_the_budget() {
    let any = (1..120u64, 1..600usize, 1..20usize, 1..100_000u64, 1..6usize, any::<bool>(), any::<u64>());
    for_any(cases() / SHARE, &any, |(len, width, batch, budget, workers, rows, seed)| {
        let _turn = Turn::begin();
        {
            let device = Device::new_cuda(0).expect("a device");
            let Some(emulated) = Emulated::get() else { return };
            emulated.seed(seed);
            let before = emulated.number("/live/device_bytes");
            let dataset = Noisy::new(len, width, rows);
            let largest = dataset.row_bytes() * (batch as u64).min(len);
            let loader = builder(dataset, batch, workers).device(&device).prefetch(20).prefetch_bytes(budget);
            let mut epoch = loader.build().expect("a loader").epoch(0).expect("an epoch");
            // A slow consumer, so that the workers run ahead as far as they may.
            std::thread::sleep(std::time::Duration::from_millis(2));
            epoch.by_ref().for_each(|batch| drop(batch.expect("a batch")));
            let most = epoch.stats().most_bytes;
            if rows {
                assert!(most <= budget.max(largest), "{most} of {budget}");
                let slabs = workers as u64 + 1;
                let slab = largest + GAPS;
                let pinned = emulated.number("/high_water/pinned_bytes");
                assert!(pinned <= budget.max(slab).min(slabs * slab) + slabs * PAGE, "{pinned} are pinned");
            }
            let there = emulated.number("/high_water/device_bytes") - before;
            if rows {
                assert!(there <= budget.max(largest) + largest, "{there} on the device of {budget}");
            } else {
                // Sizes of samples are known when they are read, so the batch that is due may go beyond.
                assert!(there <= budget + 2 * largest, "{there} on the device of {budget}");
                let pinned = emulated.number("/high_water/pinned_bytes");
                assert!(pinned <= budget.max(PAGE).min((workers as u64 + 1) * BUFFER) + PAGE, "{pinned} are pinned");
            }
        }
        uel::trim_devices();
    });
}

/// Kept over epochs, and after the loader and the device's handle are gone, batches are as they were; and the loader goes on
/// whoever keeps them, as they hold nothing of its page-locked memory.
#[test]
fn kept_batches_are_never_overwritten() {
    Turn::each_schedule(|| {
        for (rows, workers) in [(true, 0), (true, 3), (false, 2)] {
            let dataset = Noisy::new(90, 40, rows);
            let device = Device::new_cuda(0).expect("a device");
            let loader = builder(dataset.clone(), 4, workers).device(&device).build().expect("a loader");
            let mut kept: Vec<Result<Batch>> = Vec::new();
            for epoch in 0..3 {
                kept.extend(loader.epoch(epoch).expect("an epoch"));
            }
            drop((loader, device));
            let expected: Vec<String> =
                (0..3).flat_map(|epoch| expected(builder(dataset.clone(), 4, 0), epoch)).collect();
            assert_eq!(kept.iter().map(seen).collect::<Vec<_>>(), expected);
        }
        uel::trim_devices();
    });
}

/// One copy for each tensor of a batch, out of one slab; one event behind them.
#[test]
fn a_batch_costs_one_copy_for_each_of_its_tensors() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        let loader = builder(Noisy::new(60, 500, true), 10, 1).device(&device).build().expect("a loader");
        assert_eq!(loader.epoch(0).expect("an epoch").filter(Result::is_ok).count(), 6);
        uel::reset_transfer_stats();
        let copies = emulated.calls("cuMemcpyHtoDAsync_v2");
        let pinned = emulated.calls("cuMemHostAlloc");
        let mut epoch = loader.epoch(1).expect("an epoch");
        let batches = epoch.by_ref().filter(Result::is_ok).count() as u64;
        assert_eq!(batches, 6);
        assert_eq!(emulated.calls("cuMemcpyHtoDAsync_v2") - copies, 4 * batches);
        assert!(emulated.calls("cuMemHostAlloc") - pinned <= 1, "slabs stay from epoch to epoch");
        let stats = uel::transfer_stats();
        assert_eq!((stats.pinned, stats.fallback), (batches, 0));
        assert_eq!(stats.pinned_bytes, 60 * Noisy::new(60, 500, true).row_bytes());
        assert!(epoch.stats().transfer > std::time::Duration::ZERO);
        assert_eq!(epoch.stats().bytes, stats.pinned_bytes);
    }
    uel::trim_devices();
}

/// Workers end, and nothing is left, when an epoch is left with copies under way.
#[test]
fn early_exits_leave_nothing() {
    Turn::each_schedule(|| {
        let device = Device::new_cuda(0).expect("a device");
        for rows in [true, false] {
            for persistent in [true, false] {
                let loader: DataLoader = builder(Noisy::new(200, 50, rows), 3, 3)
                    .device(&device)
                    .persistent_workers(persistent)
                    .build()
                    .expect("a loader");
                for round in 0..12u64 {
                    let mut epoch = loader.epoch(round).expect("an epoch");
                    let taken = epoch.by_ref().take((round % 4) as usize).filter(Result::is_ok).count();
                    assert_eq!(taken as u64, round % 4);
                }
            }
        }
        // What is still live on the device or page-locked is found by the turn's end.
        drop(device);
        uel::trim_devices();
    });
}
