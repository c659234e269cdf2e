//! candle on the driver: what UEL builds on, and that the emulated driver sees faults where a program has some.

use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{DType, Device, Tensor};
use float8::F8E4M3;
use half::{bf16, f16};

use crate::emulated::{Emulated, OUT_OF_MEMORY, Turn};

/// A tensor of each dtype that candle copies without a kernel.
fn tensors(device: &Device) -> Vec<Tensor> {
    let shape = (3, 5);
    let floats: Vec<f32> = (0..15u8).map(|i| f32::from(i) * 0.25 - 1.0).collect();
    let of = |tensor: candle_core::Result<Tensor>| tensor.expect("a tensor");
    vec![
        of(Tensor::from_vec((0..15u8).collect(), shape, device)),
        of(Tensor::from_vec((0..15u32).map(|i| i << 20).collect(), shape, device)),
        of(Tensor::from_vec((0..15i16).map(|i| i - 7).collect(), shape, device)),
        of(Tensor::from_vec((0..15i32).map(|i| i - 7).collect(), shape, device)),
        of(Tensor::from_vec((0..15i64).map(|i| (i - 7) << 40).collect(), shape, device)),
        of(Tensor::from_vec(floats.iter().map(|&v| bf16::from_f32(v)).collect(), shape, device)),
        of(Tensor::from_vec(floats.iter().map(|&v| f16::from_f32(v)).collect(), shape, device)),
        of(Tensor::from_vec(floats.clone(), shape, device)),
        of(Tensor::from_vec(floats.iter().map(|&v| f64::from(v) / 3.0).collect(), shape, device)),
        of(Tensor::from_vec(floats.iter().map(|&v| F8E4M3::from_f32(v)).collect(), shape, device)),
    ]
}

fn assert_same(a: &Tensor, b: &Tensor) {
    assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()));
    let text = |tensor: &Tensor| tensor.to_device(&Device::Cpu).expect("back").to_string();
    assert_eq!(text(a), text(b));
}

fn round_trips(device: &Device) {
    for (there, here) in tensors(device).iter().zip(&tensors(&Device::Cpu)) {
        assert!(there.device().is_cuda());
        assert_same(there, here);
        assert_same(&here.to_device(device).expect("there"), here);
    }
}

#[test]
fn tensors_go_there_and_back() {
    Turn::each_schedule(|| round_trips(&Device::new_cuda(0).expect("a device")));
}

#[test]
fn tensors_go_there_and_back_on_a_stream_of_their_own() {
    Turn::each_schedule(|| round_trips(&Device::new_cuda_with_stream(0).expect("a device")));
}

#[test]
fn zeros_are_zeros() {
    Turn::each_schedule(|| {
        let device = Device::new_cuda(0).expect("a device");
        for dtype in [DType::U8, DType::I64, DType::BF16, DType::F32, DType::F64] {
            let zeros = Tensor::zeros((7, 9), dtype, &device).expect("zeros");
            assert_same(&zeros, &Tensor::zeros((7, 9), dtype, &Device::Cpu).expect("zeros"));
        }
    });
}

#[test]
fn tensors_go_from_device_to_device() {
    Turn::each_schedule(|| {
        let Ok(second) = Device::new_cuda_with_stream(1) else {
            assert!(Emulated::get().is_none(), "the emulated driver has two devices");
            println!("there is one device only");
            return;
        };
        let first = Device::new_cuda_with_stream(0).expect("a device");
        for (here, there) in tensors(&first).iter().zip(&tensors(&second)) {
            assert!(!here.device().same_device(there.device()));
            assert_same(here, there);
            assert_same(&here.to_device(&second).expect("across"), there);
        }
    });
}

/// cudarc 0.19.10 drops an event of the source's context between its wait and the copy, and with it makes that context
/// current: the handle of the per-thread stream then names the source's, which nothing orders with the target's. When
/// this fails, cudarc has changed, and the test above may use these devices too.
#[test]
fn a_copy_between_devices_on_per_thread_streams_is_unordered() {
    if Emulated::get().is_none() {
        return;
    }
    let mut turn = Turn::begin();
    turn.expect_violations(&["unordered", "use after free"]);
    let (first, second) = (Device::new_cuda(0).expect("a device"), Device::new_cuda(1).expect("a device"));
    let here = Tensor::from_vec(vec![1u32; 10], 10, &first).expect("a tensor");
    let across = here.to_device(&second).expect("across").to_vec1::<u32>().expect("back");
    assert_ne!(across, [1; 10], "as late as it may, the copy comes too late");
}

#[test]
fn tensors_are_used_and_dropped_on_another_thread() {
    Turn::each_schedule(|| {
        for device in [Device::new_cuda(0), Device::new_cuda_with_stream(0)] {
            let device = device.expect("a device");
            let (there, expected) = (tensors(&device), tensors(&Device::Cpu));
            device.synchronize().expect("synchronised");
            let used = std::thread::spawn(move || {
                for (there, here) in there.iter().zip(&expected) {
                    assert_same(there, here);
                }
            });
            used.join().expect("the thread");
        }
    });
}

#[test]
fn pinned_memory_is_read_when_the_copy_runs() {
    Turn::each_schedule(|| {
        let context = CudaContext::new(0).expect("a context");
        let stream = context.new_stream().expect("a stream");
        // SAFETY: the memory is written before it is read.
        let mut pinned = unsafe { context.alloc_pinned_with_flags::<u32>(1000, 0) }.expect("pinned memory");
        for round in 0..4 {
            // Waits for the copy of the round before.
            pinned.as_mut_slice().expect("its bytes").fill(round);
            let there = stream.clone_htod(&pinned).expect("there");
            assert_eq!(stream.clone_dtoh(&there).expect("back"), vec![round; 1000]);
        }
    });
}

#[test]
fn an_unordered_copy_is_reported() {
    let Some(emulated) = Emulated::get() else { return };
    let mut turn = Turn::begin();
    turn.expect_violations(&["unordered"]);
    {
        let context = CudaContext::new(0).expect("a context");
        // Without its events nothing orders the two streams.
        // SAFETY: that is the fault that the driver is to see; it keeps the bytes apart by itself.
        unsafe { context.disable_event_tracking() };
        let (one, other) = (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
        let there = one.clone_htod(&[1u8; 64]).expect("there");
        assert_eq!(emulated.violations(), 0);
        other.clone_dtoh(&there).expect("back");
        assert!(emulated.violations() > 0, "a copy that nothing orders is not seen");
    }
}

#[test]
fn an_allocation_that_fails_is_an_error_and_the_next_one_works() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    let device = Device::new_cuda(0).expect("a device");
    emulated.fail_nth(Some("cuMemAllocAsync"), 2, OUT_OF_MEMORY);
    let make = || Tensor::from_vec(vec![1f32; 100], 100, &device);
    let kept = make().expect("the first");
    let error = make().expect_err("the second").to_string();
    assert!(error.contains("OUT_OF_MEMORY"), "{error}");
    assert_same(&make().expect("the third"), &kept);
}

#[test]
fn the_memory_of_a_device_ends() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    emulated.memory_limit(1 << 20);
    let device = Device::new_cuda(0).expect("a device");
    let make = || Tensor::from_vec(vec![1f32; 200 << 10], 200 << 10, &device);
    let kept = make().expect("there is room for one");
    assert!(make().is_err(), "there is none for two");
    drop(kept);
    make().expect("there is room again");
    assert_eq!(emulated.number("/high_water/device_bytes"), 800 << 10);
}

#[test]
fn calls_that_fail_are_errors_and_leave_nothing_behind() {
    let Some(emulated) = Emulated::get() else { return };
    let _turn = Turn::begin();
    let there_and_back = || {
        let device = Device::new_cuda_with_stream(0)?;
        Tensor::from_vec(vec![7u8; 10], 10, &device)?.to_vec1::<u8>()
    };
    for function in ["cuMemAllocAsync", "cuStreamCreate", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"] {
        let mut failed = 0;
        let calls = emulated.fail_each(Some(function), OUT_OF_MEMORY, |_| match there_and_back() {
            Ok(back) => assert_eq!(back, [7; 10]),
            Err(_) => failed += 1,
        });
        assert!(calls > 0 && failed == calls, "{function}: {failed} of {calls} calls");
    }
}
