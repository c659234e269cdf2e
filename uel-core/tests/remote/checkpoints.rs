//! Checkpoints at URLs, of every format and in as many files as they come.

use super::server::{Fault, Server};
use super::{options, pattern};
use std::path::Path;
use uel_core::checkpoint::{CheckpointFiles, FilesOptions, Format, open_source};
use uel_core::gguf::MetadataBuilder;
use uel_core::gguf::write::{GgufContents, GgufWriter};
use uel_core::pytorch::write::{PthWriter, StateDict};
use uel_core::save::{SaveOptions, TensorMeta};
use uel_core::source::ByteSourceExt;
use uel_core::source::remote::CacheOptions;
use uel_core::{Dtype, Kind};

fn files() -> FilesOptions {
    FilesOptions::new().with_remote(options())
}

/// A safetensors file of two tensors of `byte_len` bytes each.
fn safetensors(names: [&str; 2], byte_len: u64) -> Vec<u8> {
    let [first, second] = names;
    let end = byte_len * 2;
    let mut json = format!(
        r#"{{"{first}":{{"dtype":"U8","shape":[{byte_len}],"data_offsets":[0,{byte_len}]}},"{second}":{{"dtype":"U8","shape":[{byte_len}],"data_offsets":[{byte_len},{end}]}}}}"#
    );
    while json.len() % 8 != 0 {
        json.push(' ');
    }
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    file
}

fn whole_safetensors(names: [&str; 2], byte_len: usize) -> Vec<u8> {
    let mut file = safetensors(names, byte_len as u64);
    file.extend(pattern(byte_len * 2));
    file
}

fn put_file(server: &Server, path: &str, file: &Path) {
    server.put(path, std::fs::read(file).unwrap());
}

#[track_caller]
fn same_as_here(url: &str, file: &Path) -> usize {
    let (there, here) = (CheckpointFiles::open(url, &files()).unwrap(), CheckpointFiles::open(file, &files()).unwrap());
    assert_eq!((there.format(), there.index().len()), (here.format(), here.index().len()));
    for info in here.index().iter() {
        let found = there.index().get(info.name()).unwrap();
        assert_eq!((found.dtype(), found.shape()), (info.dtype(), info.shape()));
        let wanted = here.sources()[info.file()].read_range(info.range()).unwrap();
        assert_eq!(there.sources()[found.file()].read_range(found.range()).unwrap(), wanted, "{}", info.name());
    }
    here.index().len()
}

#[test]
fn a_look_at_two_gigabytes_is_a_request_of_half_a_megabyte() {
    let server = Server::start();
    let header = safetensors(["a", "b"], 1_000_000_000);
    let byte_len = header.len() as u64 + 2_000_000_000;
    server.put_sparse("/model.safetensors", header, byte_len);
    let files = CheckpointFiles::open(server.url("/model.safetensors"), &files()).unwrap();
    assert_eq!((files.index().len(), files.index().total_bytes()), (2, 2_000_000_000));
    let seen = server.take_seen();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen.iter().map(|seen| seen.body_bytes).sum::<u64>() <= 1_000_000);
}

/// Both formats, of which one has its names at the end, and the other a vocabulary at its beginning.
#[test]
fn a_look_at_two_gigabytes_of_other_formats_is_three_requests_at_most() {
    const TENSOR: usize = 500_000_000;
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let names = ["a", "b", "c", "d"];
    let metas = || names.map(|name| TensorMeta::new(name, Dtype::U8, [TENSOR]));
    let zeros = vec![0; TENSOR];
    let pytorch = folder.path().join("model.pth");
    let writer = PthWriter::create(&pytorch, StateDict::new(metas()), &SaveOptions::new()).unwrap();
    names.iter().for_each(|name| writer.write(name, Dtype::U8, &[TENSOR], &zeros).unwrap());
    writer.finish().unwrap();
    server.put_file("/model.pth", std::fs::File::open(&pytorch).unwrap());
    // Its disk space comes back when the server is gone.
    std::fs::remove_file(pytorch).unwrap();
    let gguf = folder.path().join("model.gguf");
    let tokens: Vec<String> = (0..32_000).map(|n| format!("token {n}")).collect();
    let metadata = MetadataBuilder::new().with("tokenizer.ggml.tokens", tokens).unwrap();
    let floats = names.map(|name| TensorMeta::new(name, Dtype::F32, [TENSOR / 4]));
    let contents = GgufContents::new(floats).with_metadata(metadata);
    let writer = GgufWriter::create(&gguf, contents, &SaveOptions::new()).unwrap();
    names.iter().for_each(|name| writer.write(name, Dtype::F32, &[TENSOR / 4], &zeros).unwrap());
    writer.finish().unwrap();
    server.put_file("/model.gguf", std::fs::File::open(&gguf).unwrap());
    // A GGUF header is read in steps that double, because nothing says how long it is: this one in two of 512 KiB.
    for (target, most) in [("/model.pth", 1_000_000), ("/model.gguf", 1_100_000)] {
        let files = CheckpointFiles::open(server.url(target), &files()).unwrap();
        assert_eq!((files.index().len(), files.index().total_bytes()), (4, 4 * TENSOR as u64));
        let seen = server.take_seen();
        let bytes: u64 = seen.iter().map(|seen| seen.body_bytes).sum();
        assert!(seen.len() <= 3 && bytes <= most, "{target}: {bytes} bytes, {seen:?}");
    }
}

#[test]
fn a_long_header_takes_a_second_request() {
    let server = Server::start();
    let names: Vec<String> = (0..20_000).map(|n| format!("model.layers.{n}.mlp.weight")).collect();
    let entries = names
        .iter()
        .enumerate()
        .map(|(n, name)| format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{n},{}]}}"#, n + 1));
    let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json.as_bytes());
    file.extend(vec![7; 20_000]);
    server.put("/model.safetensors", file);
    let files = CheckpointFiles::open(server.url("/model.safetensors"), &files()).unwrap();
    assert_eq!(files.index().len(), 20_000);
    assert_eq!(server.take_seen().len(), 2);
}

#[test]
fn pytorch_files_are_opened_by_their_two_ends() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.pth");
    let metas = ["a", "b", "c"].map(|name| TensorMeta::new(name, Dtype::U8, [8 << 20]));
    let writer = PthWriter::create(&path, StateDict::new(metas), &SaveOptions::new()).unwrap();
    for name in ["a", "b", "c"] {
        writer.write(name, Dtype::U8, &[8 << 20], &pattern(8 << 20)).unwrap();
    }
    writer.finish().unwrap();
    put_file(&server, "/model.pth", &path);
    let opened = CheckpointFiles::open(server.url("/model.pth"), &files()).unwrap();
    assert_eq!((opened.format(), opened.index().len()), (Format::Pytorch, 3));
    let seen = server.take_seen();
    assert!(seen.len() <= 3 && seen.iter().map(|seen| seen.body_bytes).sum::<u64>() <= 1_000_000, "{seen:?}");
    assert_eq!(same_as_here(&server.url("/model.pth"), &path), 3);
    assert_eq!(CheckpointFiles::faults(server.url("/model.pth"), &files()).len(), 0);
}

#[test]
fn gguf_files_whole_and_split() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let write = |name: &str, tensor: &str, split: Option<u16>| {
        let path = folder.path().join(name);
        let mut metadata = MetadataBuilder::new().with("general.architecture", "tiny").unwrap();
        if let Some(number) = split {
            metadata = metadata.with("split.no", number).unwrap().with("split.count", 2u16).unwrap();
        }
        let contents = GgufContents::new([TensorMeta::new(tensor, Dtype::F32, [1 << 18])]).with_metadata(metadata);
        let writer = GgufWriter::create(&path, contents, &SaveOptions::new()).unwrap();
        writer.write(tensor, Dtype::F32, &[1 << 18], &pattern(1 << 20)).unwrap();
        writer.finish().unwrap();
        put_file(&server, &format!("/m/{name}"), &path);
        path
    };
    let whole = write("model.gguf", "w", None);
    assert_eq!(same_as_here(&server.url("/m/model.gguf"), &whole), 1);
    // Of a split one any part brings the others.
    write("split-00001-of-00002.gguf", "a", Some(0));
    let part = write("split-00002-of-00002.gguf", "b", Some(1));
    assert_eq!(same_as_here(&server.url("/m/split-00002-of-00002.gguf?download=true"), &part), 2);
    server.remove("/m/split-00001-of-00002.gguf");
    let error = CheckpointFiles::open(server.url("/m/split-00002-of-00002.gguf"), &files()).unwrap_err();
    assert_eq!(error.kind(), Kind::MissingShard, "{error}");
}

#[test]
fn an_index_file_brings_its_shards_with_its_query() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let shards = ["model-00001-of-00002.safetensors", "odd name%20#?2.safetensors"];
    for (number, (shard, names)) in shards.iter().zip([["a", "b"], ["c", "d"]]).enumerate() {
        let bytes = whole_safetensors(names, 600_000 + number);
        std::fs::write(folder.path().join(shard), &bytes).unwrap();
        let target = if number == 0 { (*shard).to_owned() } else { "odd%20name%2520%23%3F2.safetensors".to_owned() };
        server.put(&format!("/m/{target}"), bytes);
    }
    let map = format!(r#"{{"weight_map":{{"a":"{0}","b":"{0}","c":"{1}","d":"{1}"}}}}"#, shards[0], shards[1]);
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, &map).unwrap();
    server.put("/m/model.safetensors.index.json", map.clone());
    let url = server.url("/m/model.safetensors.index.json?token=s3cr3t");
    assert_eq!(same_as_here(&url, &index), 4);
    let seen = server.take_seen();
    assert!(seen.iter().all(|seen| seen.target.ends_with("?token=s3cr3t")), "{seen:?}");
    // The index file and both shards, once each, and then what is not in their first bytes.
    assert_eq!(seen.iter().filter(|seen| seen.if_match.is_none()).count(), 3, "{seen:?}");
    let opened = CheckpointFiles::open(&url, &files()).unwrap();
    assert_eq!(opened.index_file().unwrap().to_str().unwrap(), server.url("/m/model.safetensors.index.json"));
    assert_eq!(CheckpointFiles::faults(&url, &files()).len(), 0);

    server.remove("/m/model-00001-of-00002.safetensors");
    let error = CheckpointFiles::open(&url, &files()).unwrap_err();
    assert_eq!(error.kind(), Kind::MissingShard, "{error}");
    assert!(error.to_string().contains("model-00001-of-00002.safetensors") && !error.to_string().contains("s3cr3t"));
}

#[test]
fn pytorch_shards_by_their_index_file() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    for (shard, tensor) in [("m-1.bin", "a"), ("m-2.bin", "b")] {
        let path = folder.path().join(shard);
        let dict = StateDict::new([TensorMeta::new(tensor, Dtype::F32, [300_000])]);
        let writer = PthWriter::create(&path, dict, &SaveOptions::new()).unwrap();
        writer.write(tensor, Dtype::F32, &[300_000], &pattern(1_200_000)).unwrap();
        writer.finish().unwrap();
        put_file(&server, &format!("/{shard}"), &path);
    }
    let index = folder.path().join("pytorch_model.bin.index.json");
    let map = r#"{"weight_map":{"a":"m-1.bin","b":"m-2.bin"}}"#;
    std::fs::write(&index, map).unwrap();
    server.put("/pytorch_model.bin.index.json", map);
    assert_eq!(same_as_here(&server.url("/pytorch_model.bin.index.json"), &index), 2);
}

#[test]
fn lists_mix_urls_and_paths() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    server.put("/get", whole_safetensors(["a", "b"], 700_000));
    let path = folder.path().join("x y.safetensors");
    std::fs::write(&path, whole_safetensors(["c", "d"], 10)).unwrap();
    let list = [server.url("/get?file=1"), format!("file://{}", path.to_str().unwrap().replace(' ', "%20"))];
    let opened = CheckpointFiles::open_list(&list, &files()).unwrap();
    assert_eq!(opened.index().len(), 4);
    let info = opened.index().get("b").unwrap();
    let bytes = opened.sources()[info.file()].read_range(info.range()).unwrap();
    assert_eq!(bytes, pattern(1_400_000)[700_000..]);
    assert_eq!(opened.path(1), path);
    let twice = [server.url("/get?file=1"), server.url("/get?file=2")];
    assert_eq!(CheckpointFiles::open_list(&twice, &files()).unwrap_err().kind(), Kind::DuplicateName);
    let local = CheckpointFiles::open(&list[1], &files()).unwrap();
    assert!(local.sources()[0].as_file().is_some());
}

#[test]
fn a_checkpoint_that_changes_while_it_is_read_is_an_error() {
    let server = Server::start();
    server.put("/model.safetensors", whole_safetensors(["a", "b"], 2 << 20));
    let opened = CheckpointFiles::open(server.url("/model.safetensors"), &files()).unwrap();
    server.put("/model.safetensors", whole_safetensors(["b", "a"], 2 << 20));
    let info = opened.index().get("b").unwrap();
    let error = opened.sources()[0].read_range(info.range()).unwrap_err();
    assert_eq!(error.kind(), Kind::Changed);
}

#[test]
fn every_part_takes_a_cache() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    server.put("/model.safetensors", whole_safetensors(["a", "b"], 2 << 20));
    let options = FilesOptions::new().with_remote(options().with_cache(CacheOptions::new(folder.path())));
    for requests in [2, 1] {
        server.take_seen();
        let opened = CheckpointFiles::open(server.url("/model.safetensors"), &options).unwrap();
        let info = opened.index().get("b").unwrap();
        assert_eq!(opened.sources()[0].read_range(info.range()).unwrap(), pattern(4 << 20)[2 << 20..]);
        assert_eq!(server.take_seen().len(), requests);
    }
    server.fail(vec![Fault::Status(404); 1]);
    assert_eq!(open_source(server.url("/model.safetensors"), &options).unwrap_err().kind(), Kind::Io);
}
