//! Loads to a device, single transfers, and the way back to files.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use uel::{Checkpoint, IncrementalOptions, IncrementalWriter, SaveOptions, transfer_to_gpu_pinned};

use crate::emulated::Turn;
use crate::scenario::bytes_of;

fn tensors() -> HashMap<String, Tensor> {
    let of = |n: usize, dtype| Tensor::arange(0f32, n as f32, &Device::Cpu).and_then(|tensor| tensor.to_dtype(dtype));
    let mut tensors = HashMap::new();
    for (n, dtype) in [DType::F32, DType::BF16, DType::U8, DType::I64, DType::F8E4M3].into_iter().enumerate() {
        for elements in [0, 1, 1000, 2_000_003] {
            tensors.insert(format!("{n}.{elements}"), of(elements, dtype).expect("a tensor"));
        }
    }
    tensors
}

#[test]
fn loads_go_to_the_device_through_page_locked_memory() {
    let _turn = Turn::begin();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let tensors = tensors();
    uel::save(&tensors, &path).expect("saved");
    {
        let device = Device::new_cuda(0).expect("a device");
        let checkpoint = Checkpoint::open(&path).expect("opens");
        uel::reset_transfer_stats();
        let loaded = checkpoint.load_all(&device).expect("loads");
        assert_eq!(loaded.len(), tensors.len());
        for (name, tensor) in &tensors {
            assert!(loaded[name].device().same_device(&device));
            assert_eq!(bytes_of(&loaded[name]), bytes_of(tensor), "{name}");
        }
        let bytes: u64 = checkpoint.infos().map(|info| info.byte_len()).sum();
        assert_eq!(uel::transfer_stats().pinned_bytes, bytes);
        let single = checkpoint.tensor("0.2000003", &device).expect("loads");
        assert_eq!(bytes_of(&single), bytes_of(&tensors["0.2000003"]));
        assert_eq!(uel::transfer_stats().pinned_bytes, bytes + 8_000_012);
        let builder = checkpoint.var_builder(DType::F32, &device);
        let built = builder.get(1000, "0.1000").expect("builds");
        assert!(built.device().same_device(&device));
        assert_eq!(bytes_of(&built), bytes_of(&tensors["0.1000"]));
    }
    uel::trim_devices();
}

#[test]
fn single_tensors_are_moved() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        for tensor in tensors().values() {
            let there = transfer_to_gpu_pinned(tensor, &device).expect("moved");
            assert!(there.device().same_device(&device));
            assert_eq!(bytes_of(&there), bytes_of(tensor));
            let back = transfer_to_gpu_pinned(&there, &Device::Cpu).expect("moved");
            assert_eq!(bytes_of(&back), bytes_of(tensor));
        }
        let strided = Tensor::arange(0u32, 6_000, &Device::Cpu)
            .and_then(|t| t.reshape((60, 100)))
            .and_then(|t| t.t())
            .expect("a view");
        let there = transfer_to_gpu_pinned(&strided, &device).expect("moved");
        assert_eq!(bytes_of(&there), bytes_of(&strided.force_contiguous().expect("contiguous")));
    }
    uel::trim_devices();
}

#[test]
fn tensors_on_a_device_are_saved() {
    Turn::each_schedule(|| {
        let folder = tempfile::tempdir().expect("a folder");
        {
            let device = Device::new_cuda(0).expect("a device");
            let here = tensors();
            let there: HashMap<String, Tensor> = here
                .iter()
                .filter(|(_, tensor)| tensor.dtype() != DType::F8E4M3)
                // Copied on the device, and so still under way when the save begins.
                .map(|(name, tensor)| (name.clone(), tensor.to_device(&device).and_then(|t| t.copy()).expect("there")))
                .collect();
            let expected: HashMap<String, Tensor> =
                here.into_iter().filter(|(name, _)| there.contains_key(name)).collect();
            let (a, b, c) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("c"));
            uel::save(&expected, &a).expect("saved");
            uel::save_with(there.iter(), &b, &SaveOptions::new().with_threads(3)).expect("saved");
            assert!(std::fs::read(&a).expect("a file") == std::fs::read(&b).expect("a file"));
            let writer = IncrementalWriter::create_with(&c, &IncrementalOptions::new()).expect("a writer");
            writer.write_batch(there.iter()).expect("written");
            writer.finish().expect("saved");
            let loaded = Checkpoint::open(&c).and_then(|checkpoint| checkpoint.load_all(&Device::Cpu)).expect("loads");
            for (name, tensor) in &expected {
                assert_eq!(bytes_of(&loaded[name]), bytes_of(tensor), "{name}");
            }
        }
        uel::trim_devices();
    });
}

#[test]
fn the_rate_of_page_locked_memory_is_measured() {
    let _turn = Turn::begin();
    {
        let device = Device::new_cuda(0).expect("a device");
        for bytes in [0, 10 << 20, 100 << 20] {
            let rate = uel::pinned_rate(&device, bytes).expect("measured");
            assert!(rate.is_finite() && rate > 0., "{rate}");
        }
        // The buffers were given back.
        let tensor = Tensor::arange(0f32, 3_000_000., &Device::Cpu).expect("a tensor");
        let there = transfer_to_gpu_pinned(&tensor, &device).expect("moved");
        assert_eq!(bytes_of(&there), bytes_of(&tensor));
    }
    assert_eq!(uel::pinned_rate(&Device::Cpu, 1).expect_err("refused").kind(), uel::Kind::Argument);
    uel::trim_devices();
}
