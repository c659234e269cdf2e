//! What only a process of its own shows: what is left of one that is killed, and which files one has open.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests and what they share"
)]

#[cfg(target_os = "linux")]
mod handles;
mod killed;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use uel_data::formats::{LinesStream, TokenWindows, Tokens};
use uel_data::{Array, DataLoader, DataLoaderBuilder, DatasetExt as _, IterableExt as _, Value};

/// How long one of these programs may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is loaded.
const KINDS: [&str; 2] = ["rows", "stream"];

/// Token files, and files of lines of which one is gzip's.
fn write_files(folder: &Path) {
    for shard in 0..4u16 {
        let ids: Vec<u8> = (0..3000u16).flat_map(|at| (at ^ (shard << 12)).to_le_bytes()).collect();
        std::fs::write(tokens(folder, shard), ids).unwrap();
        let lines: String = (0..150 + 20 * shard).map(|line| format!("line {line} of {shard}\n")).collect();
        if shard == 2 {
            let mut file = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            file.write_all(lines.as_bytes()).unwrap();
            std::fs::write(texts(folder, shard), file.finish().unwrap()).unwrap();
        } else {
            std::fs::write(texts(folder, shard), lines).unwrap();
        }
    }
}

fn tokens(folder: &Path, shard: u16) -> PathBuf {
    folder.join(format!("train-{shard}.bin"))
}

fn texts(folder: &Path, shard: u16) -> PathBuf {
    folder.join(format!("part-{shard}.txt"))
}

/// A loader of the files, with random numbers in its samples.
fn builder(kind: &str, folder: &Path) -> DataLoaderBuilder {
    if kind == "stream" {
        let lines = LinesStream::open((0..4).map(|shard| texts(folder, shard))).unwrap();
        let noisy = lines.map("noise", |line, cx| {
            std::thread::sleep(Duration::from_micros(200));
            Ok(Value::tuple([line, Value::Float(cx.rng(0).uniform())]))
        });
        return DataLoader::stream(noisy).batch_size(9).interleave(4).shuffle_window(40).shuffle(5);
    }
    let windows = TokenWindows::new(uel_core::Dtype::U16, 16);
    let tokens = Tokens::open((0..4).map(|shard| tokens(folder, shard)), &windows).unwrap();
    let noisy = tokens.map("noise", |row, cx| {
        std::thread::sleep(Duration::from_micros(200));
        Ok(Value::tuple([row, Array::scalar(cx.rng(0).uniform_f32()).into()]))
    });
    DataLoader::builder(noisy).batch_size(9).shuffle(5)
}

/// Runs the test `name` of this program once more, with these variables, and its output to be read.
fn run_again(name: &str, variables: &[(&str, &str)]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Ends this process when it takes too long, so that nobody waits for it for ever.
fn end_in_time() {
    std::thread::spawn(|| {
        std::thread::sleep(PATIENCE);
        std::process::exit(3);
    });
}
