//! Checkpoints of one and many files, in real folders and from injected sources.

use super::*;
use crate::source::decorators::{FaultSource, RecordingSource};
use crate::source::{ByteSource, MemorySource};
use crate::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file whose tensors are one byte each.
fn file_of(names: &[&str], metadata: &str) -> Vec<u8> {
    let tensor =
        |(i, name): (usize, &&str)| format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1);
    let mut parts: Vec<String> = names.iter().enumerate().map(tensor).collect();
    if !metadata.is_empty() {
        parts.push(format!(r#""__metadata__":{metadata}"#));
    }
    let json = format!("{{{}}}", parts.join(","));
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), &vec![7; names.len()]].concat()
}

/// A file system in memory.
#[derive(Default)]
struct Disk(BTreeMap<PathBuf, Vec<u8>>);

impl Disk {
    fn with(mut self, path: &str, bytes: impl AsRef<[u8]>) -> Self {
        self.0.insert(path.into(), bytes.as_ref().to_vec());
        self
    }

    fn source(&self, path: &Path) -> Result<MemorySource<Vec<u8>>> {
        match self.0.get(path) {
            Some(bytes) => Ok(MemorySource::new(path, bytes.clone())),
            None => Err(Error::io("open", path, std::io::ErrorKind::NotFound.into())),
        }
    }

    fn open(&self, path: &str) -> Result<SafetensorsFiles> {
        SafetensorsFiles::open_with(path, Rules::Strict, &|path| Ok(Arc::new(self.source(path)?)))
    }

    fn faults(&self, path: &str) -> Vec<String> {
        let faults = SafetensorsFiles::faults_with(path, &|path| Ok(Arc::new(self.source(path)?)));
        faults.iter().map(|error| format!("{error:?}")).collect()
    }
}

fn sharded(weight_map: &str) -> Disk {
    Disk::default()
        .with("m/s-1.safetensors", file_of(&["a", "b"], r#"{"format":"pt","n":"1"}"#))
        .with("m/s-2.safetensors", file_of(&["c"], r#"{"format":"pt","n":"2","x":""}"#))
        .with("m/i.json", format!(r#"{{"metadata":{{"total_size":3}},"weight_map":{{{weight_map}}}}}"#))
}

const SOUND: &str = r#""c":"s-2.safetensors","a":"s-1.safetensors","b":"s-1.safetensors""#;

#[test]
fn opens_shards_through_their_index_file() {
    let disk = sharded(SOUND);
    let files = disk.open("m/i.json").unwrap();
    let tensors: Vec<_> = files.index().iter().map(|info| (info.name(), files.path(info.file()))).collect();
    let [first, second] = ["m/s-1.safetensors", "m/s-2.safetensors"].map(Path::new);
    assert_eq!(tensors, [("a", first), ("b", first), ("c", second)]);
    assert_eq!(files.index_file(), Some(Path::new("m/i.json")));
    assert_eq!(files.file_metadata(1).unwrap()["n"], "2");
    let merged = files.to_metadata();
    assert_eq!((merged.len(), &*merged["n"]), (3, "1"));
    assert_eq!(
        files.file_bytes(),
        disk.0.iter().filter(|(p, _)| !p.ends_with("i.json")).map(|(_, b)| b.len() as u64).sum::<u64>()
    );
    assert!(disk.faults("m/i.json").is_empty());
}

#[test]
fn weight_map_and_shards_must_agree() {
    let kind = |weight_map: &str| {
        let disk = sharded(weight_map);
        let error = disk.open("m/i.json").unwrap_err();
        assert!(error.path().is_some(), "{error}");
        let faults = disk.faults("m/i.json");
        assert!(faults.iter().any(|fault| *fault == format!("{error:?}")), "{error:?} is not among {faults:#?}");
        (error.kind(), error.to_string())
    };
    let (missing, text) = kind(&SOUND.replace("s-2", "s-3"));
    assert_eq!(missing, Kind::MissingShard);
    let shard = Path::new("m").join("s-3.safetensors").display().to_string();
    assert!(text.contains(&shard) && text.contains("m/i.json"), "{text}");
    assert_eq!(kind(&format!(r#"{SOUND},"d":"s-2.safetensors""#)).0, Kind::WeightMap);
    assert_eq!(kind(&SOUND.replace(r#""a":"s-1.safetensors","#, "")).0, Kind::WeightMap);
    assert_eq!(kind(&SOUND.replace(r#""a":"s-1"#, r#""a":"s-2"#)).0, Kind::WeightMap);
    assert_eq!(kind(&format!(r#"{SOUND},"a":"s-1.safetensors""#)).0, Kind::DuplicateKey);
    assert_eq!(kind(&SOUND.replace("s-2.", "../m/s-2.")).0, Kind::IndexFile);
    assert_eq!(kind(&SOUND.replace("\"s-2.safetensors\"", "2")).0, Kind::JsonType);
}

#[test]
fn a_name_in_two_files_names_both() {
    let disk = sharded(SOUND).with("m/s-2.safetensors", file_of(&["b", "c"], ""));
    let error = disk.open("m/i.json").unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::DuplicateName, Some("b")));
    let text = error.to_string();
    assert!(text.contains("s-1.safetensors") && text.contains("s-2.safetensors"), "{text}");
}

#[test]
fn a_wrong_total_size_is_a_fault_but_no_refusal() {
    let index = format!(r#"{{"metadata":{{"total_size":4}},"weight_map":{{{SOUND}}}}}"#);
    let disk = sharded(SOUND).with("m/i.json", index);
    assert!(disk.open("m/i.json").is_ok());
    let faults = disk.faults("m/i.json");
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with("Kind::IndexFile") || faults[0].starts_with("IndexFile"), "{faults:?}");
}

#[test]
fn faults_of_all_files_are_listed() {
    let mut torn = file_of(&["c"], "");
    torn.pop();
    let disk = sharded(&format!(r#"{SOUND},"e":"s-9.safetensors""#))
        .with("m/s-1.safetensors", file_of(&["a", "a"], "{\"k\":1}"))
        .with("m/s-2.safetensors", torn);
    let faults = disk.faults("m/i.json").join("\n");
    for part in ["JsonType", "DuplicateName", "Truncated", "MissingShard", "s-1.", "s-2.", "s-9."] {
        assert!(faults.contains(part), "{part} is not among\n{faults}");
    }
}

#[test]
fn opening_reads_headers_and_nothing_else() {
    let bytes = file_of(&["a", "b", "c"], "");
    let source = Arc::new(RecordingSource::new(MemorySource::new("x.safetensors", bytes.clone())));
    let files =
        SafetensorsFiles::from_sources(vec![Arc::clone(&source) as Arc<dyn ByteSource>], Rules::Strict).unwrap();
    assert_eq!(files.index().len(), 3);
    let reads: Vec<_> = source.reads().iter().map(|read| (read.start(), read.end())).collect();
    assert_eq!(reads, [(0, 8), (8, bytes.len() as u64 - 3)]);
}

#[test]
fn short_reads_and_failures_of_the_storage() {
    let bytes = file_of(&["a", "b", "c"], "");
    let source = || FaultSource::new(MemorySource::new("x.safetensors", bytes.clone()));
    assert_eq!(Header::read(&source().with_short_reads(5), Rules::Strict).unwrap().index().len(), 3);
    for read in 0..2 {
        let error =
            Header::read(&source().failing_at_read(read, std::io::ErrorKind::Other), Rules::Strict).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Io, Some(Path::new("x.safetensors"))));
        let interrupted = source().failing_at_read(read, std::io::ErrorKind::Interrupted);
        assert_eq!(Header::read(&interrupted, Rules::Strict).unwrap().index().len(), 3);
    }
    for len in 0..bytes.len() as u64 - 3 {
        assert!(Header::read(&source().truncated_to(len), Rules::Strict).is_err());
    }
}

#[test]
fn opens_real_folders() {
    let folder = tempfile::tempdir().unwrap();
    for i in 0..40 {
        let name = format!("t{i}");
        std::fs::write(folder.path().join(format!("s-{i:02}.safetensors")), file_of(&[&name], "")).unwrap();
    }
    let files = SafetensorsFiles::open(folder.path(), Rules::Strict).unwrap();
    assert_eq!(files.index().iter().map(|info| (info.file(), info.name().to_owned())).collect::<Vec<_>>(), {
        (0..40).map(|i| (i, format!("t{i}"))).collect::<Vec<_>>()
    });
    assert!(SafetensorsFiles::faults(folder.path()).is_empty());
    let error = SafetensorsFiles::open(folder.path().join("none.safetensors"), Rules::Strict).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
}
