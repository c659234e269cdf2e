//! Legacy files, tar archives and lists of shards that lie.

use std::path::Path;

use super::Expect::{Cheap, Refused, Sound, Unreadable};
use super::pickle::{Pickle, dict};
use super::{Corpus, archives, six_floats};

const SHORT: &[&str] =
    &["truncated", "unexpected-eof", "pickle", "limit", "overflow", "archive", "missing-field", "size-mismatch"];

/// The legacy form: magic number, version, machine, object, keys, and each storage behind its length.
fn legacy(magic: [u8; 10], object: Vec<u8>, keys: &[&str], storages: &[(i64, Vec<u8>)]) -> Vec<u8> {
    let mut file = [&[0x80, 2, 0x8a, 10], &magic[..], b"."].concat();
    file.extend(Pickle::new().raw(b"M\xE9\x03").stop());
    let machine = Pickle::new().raw(b"}(").text("protocol_version").raw(b"M\xE9\x03").text("little_endian").raw([0x88]);
    file.extend(machine.raw(b"u").stop());
    file.extend(object);
    file.extend(keys.iter().fold(Pickle::new().raw(b"]("), |pickle, key| pickle.text(key)).raw(b"e").stop());
    for (elements, bytes) in storages {
        file.extend(elements.to_le_bytes());
        file.extend(bytes);
    }
    file
}

const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// A storage of the legacy form has one field more: no view.
fn six(pickle: Pickle) -> Pickle {
    let storage = |p: Pickle| {
        let id = p.raw(b"(").text("storage").global("torch", "FloatStorage").text("0").text("cpu");
        id.int(6).raw(b"NtQ")
    };
    pickle.tensor_over(storage, 0, &[2, 3], &[3, 1])
}

fn part(offset: i64, elements: i64) -> impl Fn(Pickle) -> Pickle {
    move |pickle| {
        let storage = |p: Pickle| {
            let id = p.raw(b"(").text("storage").global("torch", "FloatStorage").text("0").text("cpu").int(6);
            id.raw(b"(").text("part").int(offset).int(elements).raw(b"ttQ")
        };
        pickle.tensor_over(storage, 0, &[elements.max(0)], &[1])
    }
}

pub(super) fn legacy_sound() -> Vec<u8> {
    legacy(MAGIC, dict(&[("w", &six)]), &["0"], &[(6, six_floats())])
}

/// A tar archive of these files.
fn tar(files: &[(&str, Vec<u8>)], change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, data) in files {
        let mut header = vec![0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = b'0';
        header[257..263].copy_from_slice(b"ustar\0");
        header[263..265].copy_from_slice(b"00");
        change(&mut header);
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        archive.extend(header);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn number(value: i64) -> Vec<u8> {
    Pickle::new().int(value).stop()
}

fn tar_storages(count: i64, elements: i64) -> Vec<u8> {
    let key = Pickle::new().raw(b"(").int(11).text("cpu").global("torch", "FloatStorage").raw(b"t").stop();
    [number(count), key, elements.to_le_bytes().to_vec(), six_floats(), Pickle::new().raw(b"]").stop()].concat()
}

fn tar_tensors(count: i64, dimensions: i32, storage: i64) -> Vec<u8> {
    let key = Pickle::new().raw(b"(").int(101).int(storage).global("torch", "FloatTensor").raw(b"t").stop();
    let mut tensors = [number(count), key, dimensions.to_le_bytes().to_vec(), vec![0; 4]].concat();
    for number in [2i64, 3, 3, 1, 0] {
        tensors.extend(number.to_le_bytes());
    }
    tensors
}

fn tar_of(storages: Vec<u8>, tensors: Vec<u8>) -> Vec<u8> {
    let object = dict(&[("w", &|p| p.text("101").raw(b"Q"))]);
    tar(&[("storages", storages), ("tensors", tensors), ("pickle", object)], |_| {})
}

pub(super) fn tar_sound() -> Vec<u8> {
    tar_of(tar_storages(1, 6), tar_tensors(1, 2, 11))
}

pub(super) fn add(corpus: &mut Corpus) {
    corpus.file("legacy, sound", Sound, legacy_sound());
    let object = || dict(&[("t", &six), ("w", &six)]);
    let short = || Unreadable(SHORT, &["storage", "end", "bytes", "elements"]);
    let one = |elements, bytes| legacy(MAGIC, object(), &["0"], &[(elements, bytes)]);
    corpus.file("legacy, storage of 2^60 elements", short(), one(1 << 60, six_floats()));
    corpus.file("legacy, storage of 2^63 - 1 elements", short(), one(i64::MAX, six_floats()));
    corpus.file("legacy, storage of negative length", short(), one(-6, six_floats()));
    corpus.file("legacy, storage cut off", short(), one(6, vec![0; 20]));
    corpus.file("legacy, storage of fewer elements than promised", short(), one(2, vec![0; 8]));
    corpus.file("legacy, no storages", short(), legacy(MAGIC, object(), &[], &[]));
    let unknown = legacy(MAGIC, object(), &["7", "0"], &[(6, vec![0; 24]), (6, six_floats())]);
    corpus.file("legacy, key of a storage that nobody has", Cheap, unknown);
    let other = Refused(&["unknown-format", "pickle"], &["format", "magic", "pickle"]);
    corpus.file("legacy, another magic number", other, legacy([1; 10], object(), &["0"], &[(6, six_floats())]));
    let view = || Unreadable(SHORT, &["view", "storage", "reach", "outside", "negative"]);
    let viewed = |t: &dyn Fn(Pickle) -> Pickle| legacy(MAGIC, dict(&[("t", t)]), &["0"], &[(6, six_floats())]);
    corpus.file("legacy, view behind its root", view(), viewed(&part(4, 3)));
    corpus.file("legacy, view at the end of numbers", view(), viewed(&part(i64::MAX, 3)));
    corpus.file("legacy, view of negative length", view(), viewed(&part(0, -3)));
    corpus.file("tar, sound", Sound, tar_sound());
    let lies = || Refused(SHORT, &["storage", "tensor", "end", "tar", "dimension"]);
    corpus.file("tar, 2^62 storages", lies(), tar_of(tar_storages(1 << 62, 6), tar_tensors(1, 2, 11)));
    corpus.file("tar, storage of 2^60 elements", lies(), tar_of(tar_storages(1, 1 << 60), tar_tensors(1, 2, 11)));
    corpus.file("tar, 2^62 tensors", lies(), tar_of(tar_storages(1, 6), tar_tensors(1 << 62, 2, 11)));
    corpus.file("tar, 2^31 - 1 dimensions", lies(), tar_of(tar_storages(1, 6), tar_tensors(1, i32::MAX, 11)));
    corpus.file("tar, negative dimensions", lies(), tar_of(tar_storages(1, 6), tar_tensors(1, -1, 11)));
    corpus.file("tar, tensor without a storage", Cheap, tar_of(tar_storages(1, 6), tar_tensors(1, 2, 99)));
    let huge = tar(&[("storages", tar_storages(1, 6))], |header| header[124..135].copy_from_slice(b"77777777777"));
    corpus.file("tar, entry of 8 GB", Refused(SHORT, &["tar", "end", "entry"]), huge);
    corpus.file(
        "text",
        Refused(&["unknown-format", "header-too-large", "header-truncated", "header-too-small"], &["format", "header"]),
        b"this is no checkpoint at all, and was never one".to_vec(),
    );
    let empty = &["unknown-format", "header-too-small", "truncated"];
    corpus.file("empty file", Refused(empty, &["format", "empty", "short", "bytes", "header"]), Vec::new());
    shards(corpus);
}

fn shards(corpus: &mut Corpus) {
    const INDEX: &[&str] = &["index-file", "missing-shard", "weight-map", "io"];
    let indexed = |weight_map: &'static str| {
        move |folder: &Path| {
            // A file that the index must not lead to.
            std::fs::write(folder.join("outside.bin"), archives::sound()).unwrap();
            let inner = folder.join("hostile");
            std::fs::create_dir(&inner).unwrap();
            std::fs::write(inner.join("pytorch_model-00001-of-00001.bin"), archives::sound()).unwrap();
            let index = inner.join("pytorch_model.bin.index.json");
            std::fs::write(&index, format!(r#"{{"metadata":{{}},"weight_map":{{{weight_map}}}}}"#)).unwrap();
            index
        }
    };
    corpus.written("index, sound", Sound, indexed(r#""w":"pytorch_model-00001-of-00001.bin""#));
    let leads = || Refused(INDEX, &["shard", "index", "weight_map", "folder", "name"]);
    corpus.written("index leads upwards", leads(), indexed(r#""w":"../outside.bin""#));
    corpus.written("index leads to an absolute path", leads(), indexed(r#""w":"/etc/passwd""#));
    corpus.written(
        "index names a shard that is not there",
        leads(),
        indexed(r#""w":"pytorch_model-00002-of-00002.bin""#),
    );
    corpus.written(
        "index names a tensor that is not there",
        leads(),
        indexed(r#""x":"pytorch_model-00001-of-00001.bin""#),
    );
    corpus.written("index names a folder", leads(), indexed(r#""w":".""#));
    corpus.written("index names nothing", leads(), indexed(r#""w":"""#));
}
