//! Quantized tensors go to a device through page-locked memory, into the padded memory that candle has them in.

use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QTensor};
use uel::{Checkpoint, Kind, LoadOptions, Mode, StreamOptions};

use crate::emulated::{Emulated, OUT_OF_MEMORY, Turn};

const DTYPES: [GgmlDType; 6] =
    [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::F16, GgmlDType::F32];

fn model(path: &Path) -> Vec<(String, QTensor)> {
    let make = |n: usize| {
        let rows = [1, 3, 40, 9000][n % 4];
        let tensor = Tensor::randn(0f32, 1., (rows, 256), &Device::Cpu).expect("a tensor");
        (format!("{n}"), QTensor::quantize(&tensor, DTYPES[n % DTYPES.len()]).expect("quantized"))
    };
    let tensors: Vec<(String, QTensor)> = (0..24).map(make).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = File::create(path).expect("a file");
    candle_core::quantized::gguf_file::write(&mut file, &[], &named).expect("written");
    tensors
}

fn same(there: &QTensor, here: &QTensor, device: &Device) {
    assert!(there.device().same_device(device));
    assert_eq!((there.dtype(), there.shape()), (here.dtype(), here.shape()));
    assert!(there.data().expect("back") == here.data().expect("bytes"));
}

#[test]
fn quantized_tensors_go_to_the_device_through_page_locked_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let tensors = model(&path);
    let total: u64 = tensors.iter().map(|(_, tensor)| tensor.storage_size_in_bytes() as u64).sum();
    Turn::each_schedule(|| {
        {
            let device = Device::new_cuda(0).expect("a device");
            for mode in [Mode::LowMemory, Mode::Preload] {
                let checkpoint = Checkpoint::options().with_mode(mode).open(&path).expect("opens");
                uel::reset_transfer_stats();
                let loaded = checkpoint.load_qtensors(&LoadOptions::new(&device)).expect("loads");
                assert_eq!(uel::transfer_stats().pinned_bytes, total);
                assert_eq!(loaded.report.bytes_copied, total);
                tensors.iter().for_each(|(name, tensor)| same(&loaded.tensors[name], tensor, &device));
                let (name, tensor) = &tensors[3];
                same(&checkpoint.qtensor(name, &device).expect("loads"), tensor, &device);
                let one = tensor.storage_size_in_bytes() as u64;
                assert_eq!(uel::transfer_stats().pinned_bytes, total + one);
            }
            let checkpoint = Checkpoint::open(&path).expect("opens");
            let options = StreamOptions::new(&device).with_budget(400_000);
            let stream = checkpoint.stream_qtensors(checkpoint.names(), &options).expect("a stream");
            let came: Vec<_> = stream.flat_map(|batch| batch.expect("comes")).collect();
            assert_eq!(came.len(), tensors.len());
            for (name, there) in &came {
                let (_, here) = tensors.iter().find(|(own, _)| own == name).expect("asked for");
                same(there, here, &device);
            }
            // The rest is dropped where it is.
            let mut stream = checkpoint.stream_qtensors(checkpoint.names(), &options).expect("a stream");
            stream.next().expect("one").expect("comes");
        }
        uel::trim_devices();
    });
}

#[test]
fn a_device_without_room_for_blocks_is_an_error_that_leaks_nothing() {
    let Some(emulated) = Emulated::get() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let tensors = model(&path);
    let mut failures = 0;
    for n in 1.. {
        let _turn = Turn::begin();
        let called = {
            let device = Device::new_cuda(0).expect("a device");
            let checkpoint = Checkpoint::open(&path).expect("opens");
            let before = emulated.calls("cuMemAllocAsync");
            emulated.fail_nth(Some("cuMemAllocAsync"), n, OUT_OF_MEMORY);
            let loaded = checkpoint.load_qtensors(&LoadOptions::new(&device));
            emulated.fail_none();
            let called = emulated.calls("cuMemAllocAsync") - before;
            match loaded {
                Err(error) => {
                    assert!(matches!(error.kind(), Kind::OutOfMemory | Kind::Candle), "{error}");
                    assert!(error.tensor().is_some(), "{error}");
                    failures += 1;
                }
                Ok(loaded) => {
                    assert!(called < n);
                    tensors.iter().for_each(|(name, tensor)| same(&loaded.tensors[name], tensor, &device));
                }
            }
            called
        };
        uel::trim_devices();
        if called < n {
            break;
        }
    }
    // One for the bytes of each, and one for its blocks.
    assert_eq!(failures, 2 * tensors.len());
}
