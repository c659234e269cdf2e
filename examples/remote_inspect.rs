//! Looks at a checkpoint on a server, reading its header and nothing else, and then brings one tensor of it.
//!
//! ```text
//! cargo run --release --features remote --example remote_inspect [-- URL]
//! ```
//!
//! URL is that of a file or of an index file: `s3://`, `gs://`, `az://`, `https://`, `http://`, or `hf://OWNER/NAME` for
//! what the local cache of the Hugging Face hub has. Credentials and regions come from the environment, as for the programs of
//! those services. Without a URL, the example makes a small checkpoint and serves it on this machine.
#![allow(clippy::print_stdout, reason = "an example prints")]

#[path = "support/serve.rs"]
mod serve;

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use uel::Checkpoint;
use uel::core::source::remote::RemoteOptions;

fn main() -> Result<(), Box<dyn Error>> {
    let served;
    let url = match std::env::args().nth(1) {
        Some(url) => url,
        None => {
            served = serve::file("model.safetensors", small_model()?)?;
            println!("no URL was given, so a small model is served at {served}");
            served
        }
    };

    let began = Instant::now();
    let options = RemoteOptions::new().with_concurrency(8);
    let checkpoint = Checkpoint::options().with_remote(options).open(&url)?;
    let (tensors, bytes) = (checkpoint.len(), checkpoint.index().total_bytes());
    println!("{tensors} tensors of {bytes} bytes, known after {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    for info in checkpoint.infos().take(10) {
        println!("  {} {} {:?}", info.name(), info.dtype(), info.shape());
    }

    // The smallest one, so that little is brought.
    if let Some(info) = checkpoint.infos().filter(|info| info.elem_count() > 0).min_by_key(|info| info.byte_len()) {
        let began = Instant::now();
        let tensor = checkpoint.tensor(info.name(), &Device::Cpu)?;
        let milliseconds = began.elapsed().as_secs_f64() * 1e3;
        println!("{} {:?} came in {milliseconds:.0} ms, {} bytes", info.name(), tensor.dims(), info.byte_len());
    }
    Ok(())
}

/// A safetensors file of some megabytes.
fn small_model() -> Result<Vec<u8>, Box<dyn Error>> {
    let device = Device::Cpu;
    let tensors = [
        ("embedding.weight", Tensor::randn(0f32, 1., (4000, 256), &device)?),
        ("head.weight", Tensor::randn(0f32, 1., (256, 4000), &device)?.to_dtype(DType::BF16)?),
        ("norm.weight", Tensor::ones(256, DType::F32, &device)?),
    ];
    Ok(safetensors::serialize(tensors, None)?)
}
