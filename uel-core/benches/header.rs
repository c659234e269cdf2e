//! Decoding the header of a large mixture-of-experts model, against the reference implementation.
//!
//! `cargo bench -p uel-core --bench header`. The two take turns, so that a busy machine slows both alike.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::fmt::Write;
use std::hint::black_box;
use std::time::{Duration, Instant};
use uel_core::safetensors::{Header, Rules};

const ROUNDS: usize = 21;

fn header(tensors: usize) -> (String, u64) {
    let mut json = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut offset = 0u64;
    for i in 0..tensors {
        let (layer, expert, which) = (i / 1300, i / 5 % 260, i % 5);
        let (part, dtype, shape, bytes) = match which {
            0 => ("down_proj.weight", "BF16", "[6144,2048]", 6144 * 2048 * 2),
            1 => ("up_proj.weight", "BF16", "[2048,6144]", 6144 * 2048 * 2),
            2 => ("gate_proj.weight", "BF16", "[2048,6144]", 6144 * 2048 * 2),
            3 => ("gate_proj.weight_scale_inv", "F32", "[16,48]", 16 * 48 * 4),
            _ => ("up_proj.bias", "BF16", "[2048]", 4096),
        };
        write!(
            json,
            ",\"model.layers.{layer}.mlp.experts.{expert}.{part}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{offset},{}]}}",
            offset + bytes
        )
        .unwrap();
        offset += bytes;
    }
    json.push('}');
    (json, offset)
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn row(name: &str, mut times: Vec<Duration>, tensors: usize, bytes: usize) -> f64 {
    times.sort_unstable();
    let ms = |at: usize| times[at].as_secs_f64() * 1e3;
    let (median, low, high) = (ms(times.len() / 2), ms(0), ms(times.len() - 1));
    println!(
        "{name:<24} median {median:8.3} ms  min {low:8.3}  max {high:8.3}  {:7.1} ns/tensor  {:6.2} GB/s",
        median * 1e6 / tensors as f64,
        bytes as f64 / median / 1e6
    );
    median
}

fn main() {
    for (tensors, spaced) in [(200, false), (117_410, false), (117_410, true)] {
        let (mut json, data_len) = header(tensors);
        if spaced {
            // As Python's json module puts it.
            json = json.replace(':', ": ").replace(',', ", ");
        }
        let file_len = 8 + json.len() as u64 + data_len;
        println!("{tensors} tensors, header of {} bytes, {ROUNDS} rounds", json.len());
        let repeat = (20_000 / tensors).max(1);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(time(|| {
                for _ in 0..repeat {
                    black_box(Header::decode(black_box(json.as_bytes()), file_len, Rules::Strict).unwrap());
                }
            }));
            // `SafeTensors::deserialize` would want the data section in memory too; this is all it does besides.
            theirs.push(time(|| {
                for _ in 0..repeat {
                    let text = std::str::from_utf8(black_box(json.as_bytes())).unwrap();
                    black_box(serde_json::from_str::<safetensors::tensor::Metadata>(text).unwrap());
                }
            }));
        }
        let count = tensors * repeat;
        let ours = row("uel strict", ours, count, json.len() * repeat);
        let theirs = row("safetensors 0.8", theirs, count, json.len() * repeat);
        println!("ratio {:.2}", theirs / ours);
    }
}
