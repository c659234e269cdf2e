//! One full read of tensors: the sum of their words.

use crate::pieces::Pieces;
use candle_core::{CpuStorage, Storage, Tensor};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Elements that a thread reads before it looks for more.
const PIECE_LEN: NonZeroUsize = NonZeroUsize::new(1 << 20).unwrap();

/// Reads tensors on a number of threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    threads: usize,
}

impl Reader {
    pub(super) fn new(threads: usize) -> Self {
        Self { threads }
    }

    /// Reads every byte of CPU tensors, and returns how long that took.
    pub(super) fn read<'t>(self, tensors: impl IntoIterator<Item = &'t Tensor>) -> Duration {
        let began = Instant::now();
        black_box(self.sum(tensors));
        began.elapsed()
    }

    fn sum<'t>(self, tensors: impl IntoIterator<Item = &'t Tensor>) -> u64 {
        let tensors: Vec<&Tensor> = tensors.into_iter().collect();
        let lens = tensors.iter().map(|tensor| match &*tensor.storage_and_layout().0 {
            Storage::Cpu(storage) => len(storage) as u64,
            _ => 0,
        });
        let pieces = Pieces::new(lens, PIECE_LEN);
        let total = std::sync::atomic::AtomicU64::new(0);
        pieces.on_threads(self.threads, || {
            let mut sum = 0u64;
            while let Some((tensor, part)) = pieces.take() {
                let Some(tensor) = tensors.get(tensor) else { continue };
                if let Storage::Cpu(storage) = &*tensor.storage_and_layout().0 {
                    // Parts of a storage in memory fit `usize`.
                    sum = sum.wrapping_add(sum_part(storage, part.start as usize..part.end as usize));
                }
            }
            total.fetch_add(sum, std::sync::atomic::Ordering::Relaxed);
        });
        total.into_inner()
    }
}

fn len(storage: &CpuStorage) -> usize {
    match storage {
        CpuStorage::U8(v)
        | CpuStorage::F6E2M3(v)
        | CpuStorage::F6E3M2(v)
        | CpuStorage::F4(v)
        | CpuStorage::F8E8M0(v) => v.len(),
        CpuStorage::U32(v) => v.len(),
        CpuStorage::I16(v) => v.len(),
        CpuStorage::I32(v) => v.len(),
        CpuStorage::I64(v) => v.len(),
        CpuStorage::BF16(v) => v.len(),
        CpuStorage::F16(v) => v.len(),
        CpuStorage::F32(v) => v.len(),
        CpuStorage::F64(v) => v.len(),
        CpuStorage::F8E4M3(v) => v.len(),
    }
}

/// The sum of a part's words, each of the width of an element: narrower than a `u64`, but summed a vector at a time.
fn sum_part(storage: &CpuStorage, part: Range<usize>) -> u64 {
    macro_rules! sum {
        ($v:expr, $word:ty, $element:ident => $bits:expr) => {{
            let elements = $v.get(part).unwrap_or_default();
            u64::from(elements.iter().fold(0, |sum: $word, $element| sum.wrapping_add($bits)))
        }};
    }
    match storage {
        CpuStorage::U8(v)
        | CpuStorage::F6E2M3(v)
        | CpuStorage::F6E3M2(v)
        | CpuStorage::F4(v)
        | CpuStorage::F8E8M0(v) => sum!(v, u8, byte => *byte),
        CpuStorage::U32(v) => sum!(v, u32, word => *word),
        CpuStorage::I16(v) => sum!(v, u16, word => word.cast_unsigned()),
        CpuStorage::I32(v) => sum!(v, u32, word => word.cast_unsigned()),
        CpuStorage::I64(v) => sum!(v, u64, word => word.cast_unsigned()),
        CpuStorage::BF16(v) => sum!(v, u16, float => float.to_bits()),
        CpuStorage::F16(v) => sum!(v, u16, float => float.to_bits()),
        CpuStorage::F32(v) => sum!(v, u32, float => float.to_bits()),
        CpuStorage::F64(v) => sum!(v, u64, float => float.to_bits()),
        CpuStorage::F8E4M3(v) => sum!(v, u8, float => float.to_bits()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn every_word_counts_once() {
        let bytes = Tensor::ones(100, DType::U8, &Device::Cpu).unwrap();
        let long = Tensor::ones(2_500_001, DType::U32, &Device::Cpu).unwrap();
        let doubles = Tensor::new(&[f64::from_bits(7), f64::from_bits(9)], &Device::Cpu).unwrap();
        let empty = Tensor::zeros(0, DType::BF16, &Device::Cpu).unwrap();
        for threads in [1, 3] {
            let sum = Reader::new(threads).sum([&bytes, &empty, &long, &doubles]);
            assert_eq!(sum, 100 + 2_500_001 + 16);
        }
    }
}
