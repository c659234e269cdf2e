//! The same against a server that speaks S3: moto, which `scripts/test remote` brings.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use candle_core::DType;
use uel::core::checkpoint::{CheckpointFiles, FilesOptions};
use uel::{BatchSize, Checkpoint, Kind, LoadOptions, StreamOptions};

use super::moto::{Moto, environment, said};
use super::{assert_equal, loud, options, tensors, written};
use crate::checkpoint::{CPU, same};

/// The variable that tells a process of these tests that it is the one whose environment names the server.
const INNER: &str = "UEL_TEST_S3_FILES";

/// Runs the test `name` of this binary with an environment for `moto`, as a user would have it.
fn run_inner(url: &str, name: &str, folder: &Path) {
    run_inner_with(url, name, folder, &[]);
}

fn run_inner_with(url: &str, name: &str, folder: &Path, more: &[(&str, &Path)]) {
    let mut inner = Command::new(std::env::current_exe().unwrap());
    inner.args(["--exact", &format!("remote::s3::{name}"), "--nocapture", "--ignored"]).env(INNER, folder);
    let output = inner.envs(environment(url)).envs(more.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = said(&output);
    assert!(text.contains("1 passed") && loud::told(&text) > 0, "{text}");
}

/// The folder of the files that the server has, in a process that prints all that it logs; `None` where this is not the
/// inner one.
fn inner() -> Option<PathBuf> {
    let folder = std::env::var_os(INNER).map(PathBuf::from)?;
    loud::listen();
    Some(folder)
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
#[ignore = "lane remote: needs moto"]
fn servers_are_spoken_to_over_tls_and_have_to_be_known() {
    let folder = tempfile::tempdir().unwrap();
    let mut moto = Moto::start();
    written(&folder.path().join("model.safetensors"));
    moto.put("some/folder/model.safetensors", &folder.path().join("model.safetensors"));
    let (url, authority) = (moto.secure_url.clone(), moto.authority.clone());
    std::fs::write(folder.path().join("address"), &url).unwrap();
    run_inner_with(&url, "tls_within", folder.path(), &[("SSL_CERT_FILE", &authority), ("UEL_TEST_KNOWN", &authority)]);
    assert!(moto.seen().0 > 0);
    // Without the authority that vouches for it, nothing is asked of the server.
    run_inner(&url, "tls_within", folder.path());
    assert_eq!(moto.seen().0, 0);
}

#[test]
#[ignore = "lane remote: run by another test"]
fn tls_within() {
    let Some(folder) = inner() else { return };
    let known = std::env::var_os("UEL_TEST_KNOWN").is_some();
    let address = std::fs::read_to_string(folder.join("address")).unwrap();
    let wanted = Checkpoint::open(folder.join("model.safetensors")).unwrap().load_all(&CPU).unwrap();
    for url in [
        "s3://models/some/folder/model.safetensors".to_owned(),
        format!("{address}/models/some/folder/model.safetensors"),
    ] {
        let opened = options().open(&url);
        if known {
            assert_equal(&opened.unwrap().load_all(&CPU).unwrap(), &wanted);
            continue;
        }
        let error = opened.unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Remote, Some(Path::new(&url))), "{error}");
        let mut causes = vec![error.to_string()];
        let mut cause = std::error::Error::source(&error);
        while let Some(next) = cause {
            causes.push(next.to_string());
            cause = next.source();
        }
        assert!(causes.iter().any(|cause| cause.to_lowercase().contains("certificate")), "{causes:?}");
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
