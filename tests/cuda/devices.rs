//! Several devices at once, whose per-thread streams have one handle: what it means is the current context's.

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use uel::{BatchSize, Dtype, HostPool, PoolOptions, StreamOptions, transfer_to_gpu_pinned};

use crate::emulated::{Emulated, Turn};
use crate::scenario::{self, bytes_of, plain};
use crate::stream::{cases, for_any};

/// Random schedules for each that streams have.
const SHARE: u32 = 10;

/// Two devices on per-thread streams; `None` where there is one only.
fn devices(tracked: bool) -> Option<[Device; 2]> {
    let Ok(second) = Device::new_cuda(1) else {
        assert!(Emulated::get().is_none(), "the emulated driver has two devices");
        return None;
    };
    let devices = [Device::new_cuda(0).expect("a device"), second];
    for device in &devices {
        if let (Device::Cuda(device), false) = (device, tracked) {
            // SAFETY: these tests use tensors on the thread that got them from the stream.
            unsafe { device.disable_event_tracking() };
        }
    }
    Some(devices)
}

/// Drops a tensor as a program has to that does without cudarc's tracking: it then frees on the current context's queue.
fn release(tensor: Tensor) {
    make_current(tensor.device());
}

fn make_current(device: &Device) {
    if let Device::Cuda(device) = device {
        device.cuda_stream().context().bind_to_thread().expect("bound");
    }
}

#[derive(Clone, Debug)]
struct Schedule {
    /// Elements of each tensor, and its place: one of the devices, or the CPU.
    tensors: Vec<(usize, usize)>,
    threads: usize,
    batch: usize,
    budget: u64,
    taken: usize,
    chunk_bytes: usize,
    tracked: bool,
    /// A tensor that lies on the one device and is streamed to where the plan says.
    replaced: Option<usize>,
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    let elements = prop_oneof![3 => 1..300usize, 1 => 1..40_000usize];
    let place = prop_oneof![4 => Just(0usize), 4 => Just(1usize), 1 => Just(2usize)];
    (
        prop::collection::vec((elements, place), 1..14),
        (1..5usize, 1..6usize),
        prop_oneof![Just(0), 0..300_000u64],
        prop_oneof![2 => Just(usize::MAX), 1 => 0..6usize],
        prop::sample::select(&[4096usize, 65_536, 1 << 20][..]),
        any::<bool>(),
        prop::option::of(0..14usize),
    )
        .prop_map(|(tensors, (threads, batch), budget, taken, chunk_bytes, tracked, replaced)| Schedule {
            tensors,
            threads,
            batch,
            budget,
            taken,
            chunk_bytes,
            tracked,
            replaced,
        })
}

fn run(schedule: &Schedule, devices: &[Device; 2]) {
    let tensors = schedule.tensors.iter().map(|&(elements, _)| (Dtype::U32, elements)).collect();
    let (checkpoint, mut bytes) = scenario::checkpoint(&plain(tensors));
    if let Some(at) = schedule.replaced.filter(|&at| at < bytes.len()) {
        let values: Vec<u32> = (0..700).collect();
        bytes[at] = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let device = &devices[at % 2];
        checkpoint.replace(scenario::name(at), Tensor::from_vec(values, 700, device).expect("a tensor"));
    }
    let number = |name: &str| name.split('.').nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number");
    let places: Vec<usize> = schedule.tensors.iter().map(|&(_, place)| place).collect();
    let device_of = {
        let (devices, places) = (devices.clone(), places.clone());
        move |name: &str| devices.get(places[number(name)]).cloned().unwrap_or(Device::Cpu)
    };
    // Page-locked memory may be used from every context.
    let pool = PoolOptions::new().with_chunk_bytes(schedule.chunk_bytes).with_budget(2 * schedule.chunk_bytes);
    let options = StreamOptions::new(&Device::Cpu)
        .with_device_of(device_of.clone())
        .with_threads(schedule.threads)
        .with_batch(BatchSize::Tensors(schedule.batch))
        .with_budget(schedule.budget)
        .with_pool(&HostPool::pinned(&devices[0], pool).expect("a pool"));
    let mut kept = Vec::new();
    let mut stream = checkpoint.stream(checkpoint.names(), &options).expect("a stream");
    for batch in stream.by_ref().take(schedule.taken) {
        kept.extend(batch.expect("a batch"));
    }
    // What is left in the stream is of either device, whichever is current.
    make_current(&devices[schedule.threads % 2]);
    drop(stream);
    for (name, tensor) in kept {
        let at = number(&name);
        assert!(tensor.device().same_device(&device_of(&name)), "{name}");
        assert!(bytes_of(&tensor) == bytes[at], "{name}");
        // And on to the other device.
        let there = transfer_to_gpu_pinned(&tensor, &devices[at % 2]).expect("moved");
        release(tensor);
        assert!(bytes_of(&there) == bytes[at], "{name}");
        release(there);
    }
    if let Some(at) = schedule.replaced.filter(|&at| at < bytes.len()) {
        // The checkpoint's own clone is the last, and is dropped here.
        make_current(&devices[at % 2]);
        checkpoint.replace(scenario::name(at), Tensor::new(0u32, &Device::Cpu).expect("a tensor"));
    }
}

#[test]
fn any_schedule_on_two_devices_brings_each_tensor_to_its_own() {
    for_any(cases() / SHARE, &(any_schedule(), any::<u64>()), |(schedule, seed)| {
        let _turn = Turn::begin();
        let Some(devices) = devices(schedule.tracked) else { return };
        if let Some(emulated) = Emulated::get() {
            emulated.any_seed(seed);
        }
        run(&schedule, &devices);
        drop(devices);
        uel::trim_devices();
    });
}

/// By candle's own copy this is unordered: see `driver.rs`.
#[test]
fn tensors_move_between_devices_on_per_thread_streams() {
    Turn::each_schedule(|| {
        let Some([first, second]) = devices(true) else { return };
        {
            let here = Tensor::from_vec((0..300_000u32).collect(), 300_000, &first).expect("a tensor");
            let expected = bytes_of(&here);
            let there = transfer_to_gpu_pinned(&here, &second).expect("moved");
            drop(here);
            let back = transfer_to_gpu_pinned(&there, &first).expect("moved");
            drop(there);
            assert!(bytes_of(&back) == expected);
            // Elements that do not lie together.
            let across = back.reshape((300, 1000)).and_then(|tensor| tensor.narrow(0, 7, 100)).expect("a view");
            let there = transfer_to_gpu_pinned(&across, &second).expect("moved");
            assert!(bytes_of(&there) == expected[7 * 4000..107 * 4000]);
        }
        drop((first, second));
        uel::trim_devices();
    });
}
