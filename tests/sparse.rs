//! Files that have holes instead of data, so that they cost no disk; reading them is like reading any other. And how much
//! memory a process holds that streams them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use candle_core::{Device, Tensor};
use uel::{Checkpoint, StreamOptions};

/// A file of bf16 tensors of these sizes in bytes, in this order, called `t0`, `t1` and so on.
pub(crate) fn file(path: PathBuf, sizes: &[u64]) -> PathBuf {
    let mut offset = 0;
    let tensor = |(n, byte_len): (usize, &u64)| {
        let start = offset;
        offset += byte_len;
        format!("\"t{n}\":{{\"dtype\":\"BF16\",\"shape\":[{}],\"data_offsets\":[{start},{offset}]}}", byte_len / 2)
    };
    let mut header = format!("{{{}}}", sizes.iter().enumerate().map(tensor).collect::<Vec<_>>().join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + offset).unwrap();
    path
}

/// `total` bytes in tensors from 2 bytes to 256 MiB, in no order of size.
pub(crate) fn mixed(total: u64) -> Vec<u64> {
    let mut sizes = vec![256 << 20, 100_000_002, 3 << 20, 200 << 20];
    sizes.extend((0..2000u64).map(|n| n * n % 60_000 / 2 * 2 + 2));
    sizes.extend((0..90u64).map(|n| (n % 17 + 1) << 20));
    while sizes.iter().sum::<u64>() < total {
        sizes.push(40 << 20);
    }
    // Neighbours differ in size.
    let count = sizes.len();
    assert!(!count.is_multiple_of(1009));
    (0..count).map(|n| sizes[n * 1009 % count]).collect()
}

/// A value, in bytes, that the system says of this process.
pub(crate) fn kilobytes(key: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// Bytes of the files that are streamed.
const TOTAL: u64 = 4_000_000_000;

/// The budget of a stream for which none is said.
const BUDGET: usize = 256 << 20;

/// What a stream's process may hold beside the budget, the program itself included.
const ALLOWANCE: usize = 64 << 20;

const PATH: &str = "UEL_TEST_STREAM_OF";
const PACE: &str = "UEL_TEST_STREAM_PACE";

/// The body of the test called `test`: streams files of several shapes, each in a process of its own, by a consumer that
/// takes tensors as fast as they come and by one that lets the stream fill its budget.
pub(crate) fn streams_hold_their_budget(test: &str) {
    if let Some(path) = std::env::var_os(PATH) {
        return stream(Path::new(&path), std::env::var(PACE).unwrap().parse().unwrap());
    }
    let folder = tempfile::tempdir().unwrap();
    // One size, all sizes, and sizes that the system's allocator serves; the largest fills the budget.
    let small = (0..).map(|n: u64| n * 7919 % 1_000_000 / 2 * 2 + 2);
    let shapes = [
        ("one", vec![40_000_000; (TOTAL / 40_000_000) as usize]),
        ("mixed", mixed(TOTAL)),
        ("small", small.take((TOTAL / 500_000) as usize).collect()),
    ];
    let mut failed = Vec::new();
    for (name, sizes) in shapes {
        let path = file(folder.path().join(format!("{name}.safetensors")), &sizes);
        assert!(sizes.iter().sum::<u64>() > TOTAL / 10 * 9);
        for pace in [0, 4000] {
            let [resident, high_water] = measured(test, &path, pace);
            println!("{name}, {pace} ns a page: resident {resident}, high water {high_water}");
            assert!(high_water <= BUDGET);
            if pace > 0 {
                // Otherwise nothing was measured.
                assert!(resident >= BUDGET / 2, "the budget was used");
            }
            if resident > BUDGET + ALLOWANCE {
                failed.push(format!("{name}, {pace} ns a page: {resident} bytes"));
            }
        }
    }
    assert!(failed.is_empty(), "more than {} bytes were resident: {failed:?}", BUDGET + ALLOWANCE);
}

fn measured(test: &str, path: &Path, pace: u32) -> [usize; 2] {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(PATH, path)
        .env(PACE, pace.to_string())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let line = stdout.lines().find_map(|line| line.split_once("measured: ")).unwrap().1;
    let measured: Vec<usize> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
    measured.try_into().unwrap()
}

/// Streams and drops every tensor, `pace` nanoseconds for every page of it, and prints the most memory that was resident,
/// less what is a file's, and the most that the stream held.
fn stream(path: &Path, pace: u32) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut tensors = checkpoint.stream(checkpoint.names(), &StreamOptions::new(&Device::Cpu)).unwrap().tensors();
    let mut bytes = 0;
    for tensor in tensors.by_ref() {
        let (_, tensor): (String, Tensor) = tensor.unwrap();
        let byte_len = tensor.elem_count() * 2;
        bytes += byte_len as u64;
        if pace > 0 {
            std::thread::sleep(Duration::from_nanos(u64::from(pace)) * (byte_len / 4096) as u32);
        }
    }
    assert_eq!(bytes, checkpoint.index().total_bytes());
    let resident = kilobytes("VmHWM:") - kilobytes("RssFile:");
    println!("measured: {resident} {}", tensors.stats().high_water_bytes);
}
