//! gs:// and az:// against the tests' own server, in the place that the environment of each gives its emulators: what UEL asks
//! for, and what it makes of the answers. What Google and Microsoft check of a request, this server does not.

use std::path::{Path, PathBuf};
use std::process::Command;

use uel::core::checkpoint::{CheckpointFiles, FilesOptions};
use uel::{Checkpoint, Mode};

use super::server::{Fault, Object, Server};
use super::{assert_equal, options, written};
use crate::checkpoint::{CPU, same};

/// The variable that tells a process of these tests that it is the one whose environment names the server.
const INNER: &str = "UEL_TEST_CLOUD_FILES";

const OBJECT: &str = "/bucket/folder/model.safetensors";

/// As Google's clients ask for it.
const ENCODED: &str = "/bucket/folder%2Fmodel%2Esafetensors";

/// Runs the test `name` of this binary with an environment for `server`, as a user of an emulator would have it.
fn run_inner(server: &Server, name: &str, folder: &Path) {
    let url = server.url("");
    let account = serde_json::json!({
        "gcs_base_url": url, "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": "",
    });
    let account_path = folder.join("account.json");
    std::fs::write(&account_path, account.to_string()).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("remote::clouds::{name}"), "--nocapture", "--ignored"])
        .env(INNER, folder)
        .env("GOOGLE_SERVICE_ACCOUNT", account_path)
        .env("GOOGLE_ALLOW_HTTP", "true")
        .env("AZURE_STORAGE_ENDPOINT", url)
        .env("AZURE_ALLOW_HTTP", "true")
        .env("AZURE_STORAGE_ACCOUNT_NAME", "account")
        // "s3cr3t" in base64.
        .env("AZURE_STORAGE_ACCOUNT_KEY", "czNjcjN0")
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{:#?}", server.take_seen());
    assert!(!text.contains("s3cr3t") && !text.contains("czNjcjN0"), "{text}");
}

fn put(server: &Server, target: &str, bytes: Vec<u8>) {
    let byte_len = bytes.len() as u64;
    let modified = Some("Sat, 21 Nov 2026 12:00:00 GMT".to_owned());
    let etag = Some("\"0x8D1\"".to_owned());
    server.put_object(target, Object { bytes: bytes.into(), byte_len, etag, modified, redirect: None, file: None });
}

fn reads(scheme: &str, target: &str) {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start();
    let path = folder.path().join("model.safetensors");
    written(&path);
    put(&server, target, std::fs::read(&path).unwrap());
    run_inner(&server, &format!("{scheme}_within"), folder.path());
    let seen = server.take_seen();
    assert!(seen.iter().filter(|seen| seen.target == target).count() > 3, "{seen:#?}");
    assert!(seen.iter().all(|seen| seen.range.is_some()), "whole objects are not asked for: {seen:#?}");
    // What may pass is tried again.
    server.fail([Fault::Status(503), Fault::None, Fault::Reset(100), Fault::Status(500), Fault::Throttled(429)]);
    run_inner(&server, &format!("{scheme}_within"), folder.path());
    server.forget_faults();
}

#[test]
fn google_cloud_storage_is_read() {
    reads("gs", ENCODED);
}

#[test]
fn azure_blob_storage_is_read() {
    reads("az", OBJECT);
}

fn within(scheme: &str) {
    let Some(folder) = std::env::var_os(INNER).map(PathBuf::from) else { return };
    let wanted = Checkpoint::open(folder.join("model.safetensors")).unwrap().load_all(&CPU).unwrap();
    let url = format!("{scheme}:/{OBJECT}");
    let checkpoint = options().with_mode(Mode::LowMemory).open(&url).unwrap();
    assert_equal(&checkpoint.load_all(&CPU).unwrap(), &wanted);
    let part = checkpoint.sharded("layers.0.weight", 0, 1, 2, &CPU).unwrap();
    assert!(same(&part, &wanted["layers.0.weight"].narrow(0, 500, 500).unwrap().contiguous().unwrap()));
    let absent = options().open(url.replace("model", "absent")).unwrap_err();
    assert!(absent.to_string().contains("no such object"), "{absent}");
    let files = CheckpointFiles::open(&url, &FilesOptions::new()).unwrap();
    assert_eq!(files.index().len(), wanted.len());
}

#[test]
#[ignore = "lane remote: started by another test"]
fn gs_within() {
    within("gs");
}

#[test]
#[ignore = "lane remote: started by another test"]
fn az_within() {
    within("az");
}
