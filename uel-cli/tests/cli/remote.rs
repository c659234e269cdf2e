//! URLs as people give them to the program.

use crate::refused;
#[cfg(not(feature = "remote"))]
use crate::uel;

#[cfg(feature = "remote")]
#[allow(dead_code, reason = "other tests do more with it")]
#[path = "../../../tests/remote/moto.rs"]
mod moto;
#[cfg(feature = "remote")]
#[path = "../../../uel-core/tests/remote/server.rs"]
mod server;

#[test]
fn nothing_is_written_to_urls() {
    let dir = tempfile::tempdir().unwrap();
    let path = crate::model(&dir);
    let line = refused(&[&"convert", &path, &"s3://bucket/model.safetensors?s3cr3t"]);
    assert!(line.contains("written to this machine only") && !line.contains("s3cr3t"), "{line}");
}

#[test]
fn file_urls_are_paths() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", crate::model(&dir).display());
    assert!(crate::uel(&[&"inspect", &url]).status.success());
}

#[test]
fn a_cache_needs_a_folder() {
    assert_eq!(crate::uel(&[&"inspect", &"x.safetensors", &"--cache-size", &"1GB"]).status.code(), Some(2));
    #[cfg(not(feature = "remote"))]
    assert_eq!(crate::uel(&[&"inspect", &"x.safetensors", &"--cache", &"folder"]).status.code(), Some(2));
}

#[test]
#[cfg(not(feature = "remote"))]
fn without_the_feature_urls_are_refused_by_name() {
    for command in ["inspect", "verify"] {
        let line = refused(&[&command, &"https://host/model.safetensors?s3cr3t"]);
        assert!(line.contains("built without the feature `remote`") && !line.contains("s3cr3t"), "{line}");
    }
    assert_eq!(uel(&[&"bench", &"load", &"s3://bucket/key"]).status.code(), Some(1));
}

#[cfg(feature = "remote")]
mod with_the_feature {
    use super::moto::{Moto, environment, said};
    use super::server::{Fault, Server};
    use crate::{json_of, model, refused, shards, uel, write};
    use safetensors::tensor::Dtype;
    use serde_json::Value;
    use std::ffi::OsStr;
    use std::process::Command;

    fn json(args: &[&dyn AsRef<OsStr>]) -> Value {
        let output = uel(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        json_of(&output)
    }

    #[test]
    fn a_look_is_one_request() {
        let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
        server.put("/model.safetensors", std::fs::read(model(&dir)).unwrap());
        let url = server.url("/model.safetensors?sig=s3cr3t");
        let report = json(&[&"inspect", &"--json", &url]);
        assert_eq!(server.take_seen().len(), 1);
        assert_eq!(report["tensor_count"], 3);
        assert_eq!(report["path"], server.url("/model.safetensors"));
        assert_eq!(report["files"][0]["path"], server.url("/model.safetensors"));
        assert_eq!(report["format"], "safetensors");
        for command in ["verify", "inspect"] {
            let output = uel(&[&command, &url]);
            let text =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success() && !text.contains("s3cr3t"), "{text}");
        }
        let page = dir.path().join("page.html");
        assert!(uel(&[&"inspect", &url, &"--html", &page]).status.success());
        assert!(!std::fs::read_to_string(page).unwrap().contains("s3cr3t"));
    }

    #[test]
    fn a_look_at_two_gigabytes_is_three_requests_at_most() {
        const BYTES: u64 = 2_000_000_000;
        let server = Server::start();
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{BYTES}],"data_offsets":[0,{BYTES}]}}}}"#);
        let head = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        let byte_len = head.len() as u64 + BYTES;
        server.put_sparse("/model.safetensors", head, byte_len);
        let report = json(&[&"inspect", &"--json", &server.url("/model.safetensors")]);
        assert_eq!((report["tensor_count"].as_u64(), report["total_bytes"].as_u64()), (Some(1), Some(BYTES)));
        let seen = server.take_seen();
        let bytes: u64 = seen.iter().map(|seen| seen.body_bytes).sum();
        assert!((1..=3).contains(&seen.len()) && bytes <= 1_000_000, "{} requests, {bytes} bytes", seen.len());
    }

    #[test]
    #[ignore = "lane remote: needs moto"]
    fn buckets_are_read_by_every_command() {
        let (dir, mut moto) = (tempfile::tempdir().unwrap(), Moto::start());
        let path = model(&dir);
        moto.put("nets/model.safetensors", &path);
        let (url, out) = ("s3://models/nets/model.safetensors", dir.path().join("out.safetensors"));
        let address = moto.url.clone();
        let run = |args: &[&dyn AsRef<OsStr>]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_uel"));
            let output =
                command.args(args.iter().map(|arg| arg.as_ref())).envs(environment(&address)).output().unwrap();
            said(&output);
            output
        };
        moto.seen();
        let report = run(&[&"inspect", &"--json", &url]);
        assert!(report.status.success(), "{}", said(&report));
        assert_eq!(
            (json_of(&report)["tensor_count"].as_u64(), json_of(&report)["path"].as_str()),
            (Some(3), Some(url))
        );
        let (requests, bytes) = moto.seen();
        assert!((1..=3).contains(&requests) && bytes <= 1_000_000, "{requests} requests, {bytes} bytes");

        moto.tell("fail 503 2");
        let converted = run(&[&"convert", &"--json", &url, &out]);
        assert_eq!(json_of(&converted)["tensor_count"], 3, "{}", said(&converted));
        for other in [&path, &out] {
            assert!(run(&[&"diff", &url, other]).status.success());
        }
        let measured = run(&[&"bench", &"load", &url, &"--runs", &"1", &"--json", &"--memcpy-bytes", &"1000000"]);
        assert_eq!(json_of(&measured)["tensor_count"], 3, "{}", said(&measured));
        assert!(run(&[&"verify", &url]).status.success());
        let missing = run(&[&"inspect", &"s3://models/none.safetensors"]);
        assert_eq!(missing.status.code(), Some(1));
        assert!(said(&missing).contains("s3://models/none.safetensors: "), "{}", said(&missing));
    }

    #[test]
    fn what_is_wrong_is_one_line_without_secrets() {
        let server = Server::start();
        for command in ["inspect", "verify"] {
            for fault in [Fault::Status(403), Fault::Status(404), Fault::IgnoresRange] {
                server.put("/model.safetensors", vec![0; 100]);
                server.fail(vec![fault.clone(); 10]);
                let line = refused(&[&command, &server.url("/model.safetensors?sig=s3cr3t")]);
                assert!(line.contains("/model.safetensors: ") && !line.contains("s3cr3t"), "{line}");
                server.forget_faults();
            }
        }
        // What is there and no checkpoint is a verdict.
        let output = uel(&[&"verify", &server.url("/model.safetensors?sig=s3cr3t")]);
        assert_eq!(output.status.code(), Some(1));
    }

    #[test]
    fn what_was_read_is_kept_in_a_cache() {
        let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
        let path = dir.path().join("large.safetensors");
        write(&path, &[("w", Dtype::F32, &[1 << 20], vec![1; 4 << 20])]);
        server.put("/large.safetensors", std::fs::read(&path).unwrap());
        let (url, cache) = (server.url("/large.safetensors"), dir.path().join("cache"));
        let mut requests = Vec::new();
        for name in ["first", "second"] {
            let out = dir.path().join(format!("{name}.safetensors"));
            json(&[&"convert", &"--json", &"--cache", &cache, &"--cache-size", &"100MB", &url, &out]);
            requests.push(server.take_seen().len());
            assert!(uel(&[&"diff", &path, &out]).status.success());
        }
        // The second run asks whether it is the same object still.
        assert!(requests[0] > 1 && requests[1] == 1, "{requests:?}");
        json(&[&"bench", &"load", &"--json", &"--runs", &"1", &"--cache", &cache, &url]);
        assert!(server.take_seen().iter().map(|seen| seen.body_bytes).sum::<u64>() < 4 << 20);
    }

    #[test]
    fn conversion_brings_a_sharded_checkpoint_into_one_file() {
        let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
        shards(&dir);
        for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
            server.put(&format!("/m/{name}"), std::fs::read(dir.path().join(name)).unwrap());
        }
        let map = r#"{"weight_map":{"a.weight":"model-00001-of-00002.safetensors","b.weight":"model-00002-of-00002.safetensors"}}"#;
        server.put("/m/model.safetensors.index.json", map);
        let url = server.url("/m/model.safetensors.index.json");
        let out = dir.path().join("out/model.safetensors");
        std::fs::create_dir(dir.path().join("out")).unwrap();
        server.fail([Fault::Status(503), Fault::None, Fault::Reset(10)]);
        let report = json(&[&"convert", &"--json", &url, &out]);
        assert_eq!(report["tensor_count"], 2);
        assert!(uel(&[&"diff", &url, &out]).status.success());
        let bytes = dir.path().join("b.bin");
        assert!(uel(&[&"extract", &url, &"b.weight", &"-o", &bytes, &"--raw"]).status.success());
        assert_eq!(std::fs::read(bytes).unwrap(), [0; 5]);
    }

    #[test]
    fn loads_are_measured_from_urls() {
        let (dir, server) = (tempfile::tempdir().unwrap(), Server::start());
        let path = dir.path().join("large.safetensors");
        write(&path, &[("w", Dtype::F32, &[1 << 20], vec![1; 4 << 20])]);
        server.put("/large.safetensors", std::fs::read(&path).unwrap());
        let url = server.url("/large.safetensors?sig=s3cr3t");
        for mode in ["preload", "low-memory", "stream"] {
            let report = json(&[
                &"bench",
                &"load",
                &url,
                &"--mode",
                &mode,
                &"--runs",
                &"1",
                &"--json",
                &"--memcpy-bytes",
                &"1000000",
            ]);
            assert_eq!(
                (report["tensor_count"].as_u64(), report["bytes_read"].as_u64()),
                (Some(1), Some(4 << 20)),
                "{mode}"
            );
            assert_eq!(report["path"], server.url("/large.safetensors"));
        }
        for option in [&["--cold"][..], &["--vs", "candle"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_uel"));
            let output = command.args(["bench", "load", &url]).args(option).output().unwrap();
            assert_eq!(output.status.code(), Some(2), "{option:?}");
            assert!(!String::from_utf8_lossy(&output.stderr).contains("s3cr3t"));
        }
    }

    #[test]
    fn models_of_the_hub_are_read_from_its_cache() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("hub/models--me--net");
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::create_dir_all(repository.join("snapshots/abc")).unwrap();
        std::fs::write(repository.join("refs/main"), "abc").unwrap();
        std::fs::copy(model(&dir), repository.join("snapshots/abc/model.safetensors")).unwrap();
        let run = |url: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_uel"));
            command.args(["inspect", url]).env("HF_HOME", dir.path()).env_remove("HF_HUB_CACHE").output().unwrap()
        };
        for url in ["hf://me/net", "hf://me/net@main/model.safetensors", "hf://me/net@abc"] {
            let output = run(url);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert!(String::from_utf8_lossy(&output.stdout).contains("3 tensors"));
        }
        let output = run("hf://me/other");
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("not in the local cache"));
    }
}
