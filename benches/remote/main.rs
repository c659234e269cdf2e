//! Loads of 2 GB from a server on loopback, each in a process of its own, and what the same server gives to plain sockets.
//!
//! ```sh
//! cargo bench --features remote --bench remote
//! ```
//!
//! `UEL_BENCH_DIR` says where the file goes, `UEL_BENCH_ROUNDS` how often each is measured. The server runs on the same
//! processors as what is measured.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark ends where something fails; not all that is shared is used"
)]

#[path = "../load/claims.rs"]
mod claims;
#[path = "../load/files.rs"]
mod files;
#[path = "../load/measure.rs"]
mod measure;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use candle_core::Device;
use uel::{Checkpoint, Mode, StreamOptions};

#[global_allocator]
static ALLOC: uel::MappedAllocator = uel::MappedAllocator::new();

/// What a measuring process is told: the mode, and the URL or path.
const TASK: &str = "UEL_REMOTE_TASK";

fn main() {
    if let Ok(task) = std::env::var(TASK) {
        let (mode, from) = task.split_once(' ').unwrap();
        return load(mode, from);
    }
    let path = files::bf16_file(&files::folder(), 200);
    files::read_through(&path);
    let address = serve(&path);
    let url = format!("http://{address}/model.safetensors");
    println!("| {:<28} | median ms | min ms | max ms | GB/s | peak memory MB |", "");
    println!("| :--- | ---: | ---: | ---: | ---: | ---: |");
    let here = path.display().to_string();
    let tasks = [
        ("plain sockets, 4 at once", "sockets", &address.to_string()),
        ("preload, remote", "preload", &url),
        ("low-memory, remote", "low-memory", &url),
        ("stream, remote", "stream", &url),
        ("preload, the file", "preload", &here),
        ("stream, the file", "stream", &here),
    ];
    let mut all: Vec<Vec<(f64, f64)>> = vec![Vec::new(); tasks.len()];
    for _ in 0..claims::rounds(5) {
        for ((_, mode, from), measured) in tasks.iter().zip(&mut all) {
            measured.push(measure(mode, from));
        }
    }
    for ((name, ..), mut measured) in tasks.iter().zip(all) {
        measured.sort_by(|a, b| a.0.total_cmp(&b.0));
        let median = measured[measured.len() / 2].0;
        let peak = measured.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
        let (least, most) = (measured[0].0, measured[measured.len() - 1].0);
        let rate = files::BYTES as f64 / 1e9 / median;
        println!(
            "| {name:<28} | {:.0} | {:.0} | {:.0} | {rate:.2} | {peak:.0} |",
            median * 1e3,
            least * 1e3,
            most * 1e3
        );
    }
    // The threads of the server go with the process.
}

/// The seconds that a process of its own took, and its peak of memory in MB.
fn measure(mode: &str, from: &str) -> (f64, f64) {
    let output = Command::new(std::env::current_exe().unwrap()).env(TASK, format!("{mode} {from}")).output().unwrap();
    assert!(output.status.success(), "{mode} {from}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (seconds, peak) = text.trim().split_once(' ').unwrap();
    (seconds.parse().unwrap(), peak.parse().unwrap())
}

fn load(mode: &str, from: &str) {
    let began = Instant::now();
    match mode {
        "sockets" => sockets(from.parse().unwrap()),
        "preload" => {
            drop(Checkpoint::options().with_mode(Mode::Preload).open(from).unwrap().load_all(&Device::Cpu).unwrap());
        }
        "low-memory" => {
            let checkpoint = Checkpoint::options().with_mode(Mode::LowMemory).open(from).unwrap();
            checkpoint.names().iter().for_each(|name| drop(checkpoint.tensor(name, &Device::Cpu).unwrap()));
        }
        _ => {
            let checkpoint = Checkpoint::open(from).unwrap();
            let names = checkpoint.names();
            let stream = checkpoint.stream(&names, &StreamOptions::new(&Device::Cpu)).unwrap();
            assert_eq!(stream.map(|batch| batch.unwrap().len()).sum::<usize>(), names.len());
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: f64 = peak.trim().trim_end_matches(" kB").trim().parse().unwrap();
    println!("{seconds} {}", kib * 1024. / 1e6);
}

/// Asks for the file in four parts at once, and forgets what comes.
fn sockets(address: SocketAddr) {
    let part = files::BYTES / 4;
    std::thread::scope(|scope| {
        for n in 0..4 {
            scope.spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let range = format!("bytes={}-{}", n * part, (n + 1) * part - 1);
                write!(stream, "GET / HTTP/1.1\r\nHost: x\r\nRange: {range}\r\n\r\n").unwrap();
                let mut buffer = vec![0; 1 << 20];
                let mut left = part;
                while left > 0 {
                    // The head of the answer counts along: it is some hundred bytes.
                    let read = stream.read(&mut buffer).unwrap() as u64;
                    assert!(read > 0);
                    left = left.saturating_sub(read);
                }
            });
        }
    });
}

/// A server of one file, whose bytes go from the page cache to the sockets.
fn serve(path: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, path) = (listener.local_addr().unwrap(), path.to_path_buf());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let path: PathBuf = path.clone();
            std::thread::spawn(move || drop(answer(stream.unwrap(), &path)));
        }
    });
    address
}

fn answer(stream: TcpStream, path: &Path) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let byte_len = path.metadata()?.len();
    let mut requests = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut range = None;
        loop {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if let Some(asked) = line.to_ascii_lowercase().trim().strip_prefix("range: bytes=") {
                range = asked.split_once('-').map(|(start, end)| (start.parse().unwrap(), end.parse().ok()));
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let (start, last): (u64, Option<u64>) = range.expect("a range");
        let end = last.map_or(byte_len, |last| last + 1).min(byte_len);
        write!(
            stream,
            "HTTP/1.1 206 Fine\r\nETag: \"one\"\r\nContent-Range: bytes {start}-{}/{byte_len}\r\nContent-Length: {}\r\n\r\n",
            end - 1,
            end - start
        )?;
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        std::io::copy(&mut file.take(end - start), &mut stream)?;
    }
}
