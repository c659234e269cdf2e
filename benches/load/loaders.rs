//! The loaders: each brings every tensor of a file to where a program can use it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{CpuStorage, Device, Storage, Tensor};
use uel::{Checkpoint, Mode};

pub(crate) type Tensors = Vec<Tensor>;

fn values(tensors: HashMap<String, Tensor>) -> Tensors {
    tensors.into_values().collect()
}

/// Opens and loads everything.
pub(crate) fn uel(path: &Path, mode: Mode) -> Tensors {
    uel_with(path, mode, true)
}

pub(crate) fn uel_with(path: &Path, mode: Mode, may_map: bool) -> Tensors {
    values(open_with(path, mode, may_map).load_all(&Device::Cpu).unwrap())
}

pub(crate) fn open(path: &Path, mode: Mode) -> Checkpoint {
    open_with(path, mode, true)
}

fn open_with(path: &Path, mode: Mode, may_map: bool) -> Checkpoint {
    let options = Checkpoint::options().with_mode(mode);
    // SAFETY: nobody changes the benchmark's files while it runs.
    let options = if may_map { unsafe { options.with_mmap() } } else { options };
    options.open(path).unwrap()
}

/// Opens, then loads, uses and drops one tensor after another.
pub(crate) fn loop_one_by_one(path: &Path, mode: Mode, use_tensor: impl Fn(&Tensor)) {
    loop_with(path, mode, true, use_tensor);
}

pub(crate) fn loop_with(path: &Path, mode: Mode, may_map: bool, use_tensor: impl Fn(&Tensor)) {
    let checkpoint = open_with(path, mode, may_map);
    for info in checkpoint.infos() {
        let tensor = checkpoint.tensor(info.name(), &Device::Cpu).unwrap();
        use_tensor(&tensor);
        drop(tensor);
        // The pages stay in the page cache, so that the next round is as warm as this one.
    }
}

pub(crate) fn candle(path: &Path) -> Tensors {
    values(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
}

pub(crate) fn candle_mmap(path: &Path) -> Tensors {
    // SAFETY: nobody changes the benchmark's files while it runs.
    let file = unsafe { MmapedSafetensors::new(path) }.unwrap();
    file.tensors().iter().map(|(name, _)| file.load(name, &Device::Cpu).unwrap()).collect()
}

/// Reads every byte of every tensor once, on as many threads as there are processors.
pub(crate) fn read_all(tensors: &[Tensor]) -> u64 {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let work = || {
            let mut sum = 0u64;
            while let Some(tensor) = tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
                sum = sum.wrapping_add(read(tensor));
            }
            sum
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().fold(0u64, |sum, worker| sum.wrapping_add(worker.join().unwrap()))
    })
}

/// The same on the caller's thread, for what is too little to divide.
pub(crate) fn sum_all(tensors: &[Tensor]) -> u64 {
    tensors.iter().fold(0, |sum, tensor| sum.wrapping_add(read(tensor)))
}

/// Reads every byte of a bf16 or f32 tensor once: the sum of its elements' bits, as wide as an element is, so that memory
/// and not arithmetic limits it.
pub(crate) fn read(tensor: &Tensor) -> u64 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    match storage {
        CpuStorage::BF16(elements) => {
            u64::from(elements.iter().fold(0u16, |sum, element| sum.wrapping_add(element.to_bits())))
        }
        CpuStorage::F32(elements) => {
            u64::from(elements.iter().fold(0u32, |sum, element| sum.wrapping_add(element.to_bits())))
        }
        _ => panic!("another dtype"),
    }
}

/// The sum of a tensor's first and last element's bits: the least use there is.
pub(crate) fn touch(tensor: &Tensor) -> u64 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(elements)) = &*storage else { panic!("not bf16 on the CPU") };
    u64::from(elements[0].to_bits()) + u64::from(elements[elements.len() - 1].to_bits())
}
