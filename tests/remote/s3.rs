//! The same against a server that speaks S3: moto, which `scripts/test remote` brings.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use candle_core::DType;
use uel::core::checkpoint::{CheckpointFiles, FilesOptions};
use uel::{BatchSize, Checkpoint, Kind, LoadOptions, StreamOptions};

use super::{assert_equal, options, tensors, written};
use crate::checkpoint::{CPU, same};

/// The variable that tells a process of these tests that it is the one whose environment names the server.
const INNER: &str = "UEL_TEST_S3_FILES";

/// The server's process, which ends with this.
struct Moto {
    process: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    url: String,
}

impl Moto {
    fn start() -> Self {
        let python = std::env::var_os("UEL_MOTO").expect("scripts/test remote sets UEL_MOTO");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/remote/s3_server.py");
        let mut process =
            Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = process.stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stdin = process.stdin.take();
        let mut moto = Self { process, stdin, lines, url: String::new() };
        moto.url = moto.line();
        moto
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(60)).expect("moto answers")
    }

    fn tell(&mut self, line: &str) -> String {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    fn put(&mut self, key: &str, path: &Path) {
        assert_eq!(self.tell(&format!("put {key} {}", path.display())), "done");
    }

    /// Requests for objects since the last call, and the bytes that they brought.
    fn seen(&mut self) -> (usize, u64) {
        let line = self.tell("seen");
        let (requests, bytes) = line.split_once(' ').unwrap();
        (requests.parse().unwrap(), bytes.parse().unwrap())
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs the test `name` of this binary with an environment for `moto`, as a user would have it.
fn run_inner(url: &str, name: &str, folder: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("remote::s3::{name}"), "--nocapture", "--ignored"])
        .env(INNER, folder)
        .env("AWS_ENDPOINT_URL", url)
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "AKIATEST")
        .env("AWS_SECRET_ACCESS_KEY", "s3cr3t")
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert!(!text.contains("s3cr3t") && !text.contains("AKIATEST"), "{text}");
}

/// The folder of the files that the server has; `None` where this is not the inner process.
fn inner() -> Option<PathBuf> {
    std::env::var_os(INNER).map(PathBuf::from)
}

#[test]
#[ignore = "lane remote: needs moto"]
fn every_road_reads_what_is_in_a_bucket() {
    let folder = tempfile::tempdir().unwrap();
    let mut moto = Moto::start();
    for name in ["model.safetensors", "model.pth"] {
        written(&folder.path().join(name));
        moto.put(&format!("some/folder/{name}"), &folder.path().join(name));
    }
    let sharded = uel::SaveOptions::new().with_max_shard_bytes(4 << 20);
    let shards = folder.path().join("sharded");
    std::fs::create_dir(&shards).unwrap();
    let tensors = tensors();
    uel::save_with(tensors.iter().map(|(name, tensor)| (name, tensor)), shards.join("model.safetensors"), &sharded)
        .unwrap();
    for entry in std::fs::read_dir(&shards).unwrap() {
        let path = entry.unwrap().path();
        moto.put(&format!("sharded/{}", path.file_name().unwrap().to_str().unwrap()), &path);
    }
    run_inner(&moto.url, "roads_within", folder.path());
    moto.tell("fail 503 3");
    moto.tell("fail 500 2");
    run_inner(&moto.url, "faults_within", folder.path());
    moto.seen();
    run_inner(&moto.url, "a_look_within", folder.path());
    let (requests, bytes) = moto.seen();
    assert!((1..=3).contains(&requests) && bytes <= 1_000_000, "{requests} requests, {bytes} bytes");
    // Another object of the same length takes its place while one process has it open.
    let other = folder.path().join("other");
    let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    std::fs::write(&other, bytes.into_iter().rev().collect::<Vec<_>>()).unwrap();
    let (stdin, url) = (moto.stdin.take(), moto.url.clone());
    std::thread::scope(|scope| {
        let inner = scope.spawn(|| run_inner(&url, "changes_within", folder.path()));
        wait_for(&folder.path().join("opened"));
        writeln!(&mut stdin.as_ref().unwrap(), "put some/folder/model.safetensors {}", other.display()).unwrap();
        assert_eq!(moto.line(), "done");
        std::fs::write(folder.path().join("changed"), "").unwrap();
        inner.join().unwrap();
    });
}

/// Waits for a file that another process makes.
fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "{} did not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "lane remote: run by another test"]
fn roads_within() {
    let Some(folder) = inner() else { return };
    for name in ["model.safetensors", "model.pth"] {
        let url = format!("s3://models/some/folder/{name}");
        let here = Checkpoint::open(folder.join(name)).unwrap();
        let wanted = here.load_all(&CPU).unwrap();
        let there = options().open(&url).unwrap();
        assert_equal(&there.load_all(&CPU).unwrap(), &wanted);
        let cast = LoadOptions::new(&CPU).with_dtype(DType::F32);
        assert_equal(&there.load(&cast).unwrap().tensors, &here.load(&cast).unwrap().tensors);
        let slice = there.slice("layers.1.weight", (3..5, ..), &CPU).unwrap();
        assert!(same(&slice, &here.slice("layers.1.weight", (3..5, ..), &CPU).unwrap()));
        let stream = StreamOptions::new(&CPU).with_batch(BatchSize::Tensors(5));
        for batch in there.stream(there.names(), &stream).unwrap() {
            for (name, tensor) in batch.unwrap() {
                assert!(same(&tensor, &wanted[&name]), "{name}");
            }
        }
    }
    let sharded = options().open("s3://models/sharded/model.safetensors.index.json").unwrap();
    let wanted = Checkpoint::open(folder.join("sharded")).unwrap().load_all(&CPU).unwrap();
    assert_equal(&sharded.load_all(&CPU).unwrap(), &wanted);
    for (url, kind) in [
        ("s3://models/none.safetensors", Kind::Io),
        ("s3://no-such-bucket/none.safetensors", Kind::Io),
        ("s3://models/", Kind::Argument),
    ] {
        let error = options().open(url).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[test]
#[ignore = "lane remote: run by another test"]
fn faults_within() {
    let Some(folder) = inner() else { return };
    let wanted = Checkpoint::open(folder.join("model.safetensors")).unwrap().load_all(&CPU).unwrap();
    let there = options().open("s3://models/some/folder/model.safetensors").unwrap();
    assert_equal(&there.load_all(&CPU).unwrap(), &wanted);
}

#[test]
#[ignore = "lane remote: run by another test"]
fn a_look_within() {
    if inner().is_none() {
        return;
    }
    let files = CheckpointFiles::open("s3://models/some/folder/model.safetensors", &FilesOptions::new()).unwrap();
    assert_eq!(files.index().len(), tensors().len());
}

#[test]
#[ignore = "lane remote: run by another test"]
fn changes_within() {
    let Some(folder) = inner() else { return };
    let there = options().open("s3://models/some/folder/model.safetensors").unwrap();
    std::fs::write(folder.join("opened"), "").unwrap();
    wait_for(&folder.join("changed"));
    let error = there.load_all(&CPU).unwrap_err();
    assert_eq!(error.kind(), Kind::Changed, "{error}");
}
