//! Casts while loading: bit for bit what candle makes of the same tensor, special values included.

use std::collections::HashMap;

use candle_core::{CpuStorage, DType, Storage, Tensor};
use uel::LoadOptions;

use crate::checkpoint::{CPU, MODES, mapping};

/// The bits of a floating-point tensor's elements.
fn bits(tensor: &Tensor) -> Vec<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    assert!(layout.is_contiguous() && layout.start_offset() == 0);
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    match storage {
        CpuStorage::BF16(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        CpuStorage::F16(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        CpuStorage::F32(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        CpuStorage::F64(values) => values.iter().map(|value| value.to_bits()).collect(),
        CpuStorage::F8E4M3(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        _ => panic!("{:?}", tensor.dtype()),
    }
}

/// Numbers that look random but are the same in every run.
fn noise(len: usize) -> Vec<u64> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state ^ (state >> 29)
    };
    (0..len).map(|_| next()).collect()
}

/// Every pattern of the short dtypes; of the long ones any patterns, those of their own exponents, and those that round
/// where a short one does: half way between two of its numbers, and just beside.
fn tensors() -> HashMap<String, Tensor> {
    let short: Vec<u16> = (0..=u16::MAX).collect();
    let half_way =
        |value: f32| [value, f32::from_bits(value.to_bits() + 1), f32::from_bits(value.to_bits().max(1) - 1)];
    let mut f32s: Vec<f32> = noise(30_000).into_iter().map(|bits| f32::from_bits(bits as u32)).collect();
    for &bits in &short {
        let of_f16 = half::f16::from_bits(bits).to_f32();
        f32s.extend(half_way(f32::from_bits(of_f16.to_bits() | 0x1000)));
        f32s.extend(half_way(f32::from_bits(u32::from(bits) << 16 | 0x8000)));
    }
    f32s.extend([
        0.,
        -0.,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        65504.,
        65520.,
    ]);
    let mut f64s: Vec<f64> = noise(30_000).into_iter().map(f64::from_bits).collect();
    f64s.extend(f32s.iter().map(|&value| f64::from(value)));
    f64s.extend(f32s.iter().map(|&value| f64::from_bits(f64::from(value).to_bits() | 0x1000_0000)));
    let f16s: Vec<half::f16> = short.iter().map(|&bits| half::f16::from_bits(bits)).collect();
    let bf16s: Vec<half::bf16> = short.iter().map(|&bits| half::bf16::from_bits(bits)).collect();
    let f8s: Vec<float8::F8E4M3> = (0..=u8::MAX).map(float8::F8E4M3::from_bits).collect();
    let named = [
        // Also large enough to be cast by several threads.
        ("f16 large", Tensor::new(f16s.repeat(9), &CPU)),
        ("f16", Tensor::new(f16s, &CPU)),
        ("bf16 large", Tensor::new(bf16s.repeat(9), &CPU)),
        ("bf16", Tensor::new(bf16s, &CPU)),
        ("f32 few", Tensor::new(&f32s[..1001], &CPU)),
        ("f32", Tensor::new(f32s, &CPU)),
        ("f64 few", Tensor::new(&f64s[..1001], &CPU)),
        ("f64", Tensor::new(f64s, &CPU)),
        ("f8", Tensor::new(f8s, &CPU)),
        ("none", Tensor::zeros((0, 3), DType::F16, &CPU)),
    ];
    named.into_iter().map(|(name, tensor)| (name.to_owned(), tensor.unwrap())).collect()
}

#[test]
fn a_cast_while_loading_is_candles_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensors = tensors();
    safetensors::serialize_to_file(&tensors, None, &path).unwrap();
    // The same with the data at an odd offset.
    let odd = folder.path().join("odd.safetensors");
    let file = std::fs::read(&path).unwrap();
    let (len, rest) = file.split_first_chunk::<8>().unwrap();
    let len = u64::from_le_bytes(*len) as usize;
    let header = [&rest[..len], b" "].concat();
    std::fs::write(&odd, [&(header.len() as u64).to_le_bytes(), &header[..], &rest[len..]].concat()).unwrap();

    for to in [DType::BF16, DType::F16, DType::F32, DType::F64] {
        // candle never returns from F8E4M3 to F64.
        let names: Vec<&String> = tensors.keys().filter(|name| (name.as_str(), to) != ("f8", DType::F64)).collect();
        let expected: HashMap<&String, Vec<u64>> =
            names.iter().map(|&name| (name, bits(&tensors[name].to_dtype(to).unwrap()))).collect();
        for (path, mode) in MODES.iter().flat_map(|&mode| [(&path, mode), (&odd, mode)]) {
            let checkpoint = mapping().with_mode(mode).open(path).unwrap();
            let options = LoadOptions::new(&CPU).with_dtype(to).with_names(names.iter().map(|name| name.as_str()));
            let loaded = checkpoint.load(&options).unwrap().tensors;
            let weights = checkpoint.var_builder(to, &CPU);
            for &name in &names {
                let shape = tensors[name].shape();
                let others = [checkpoint.tensor_as(name, Some(to), &CPU).unwrap(), weights.get(shape, name).unwrap()];
                for got in [&loaded[name]].into_iter().chain(&others) {
                    assert_eq!((got.dtype(), got.shape()), (to, shape), "{name} to {to:?}, {mode}");
                    let got = bits(got);
                    let differs = got.iter().zip(&expected[name]).position(|(got, expected)| got != expected);
                    if let Some(at) = differs {
                        let (from, got, expected) = (bits(&tensors[name])[at], got[at], expected[name][at]);
                        panic!("{name} to {to:?}, {mode}: {from:#x} becomes {got:#x}, in candle {expected:#x}");
                    }
                }
            }
        }
    }
}
