//! Datasets whose files are at URLs give the batches that the same files give on this machine.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use candle_core::DType;
use uel::core::checkpoint::FilesOptions;
use uel::core::source::remote::RemoteOptions;
use uel::core::{Dtype, Kind};
use uel::data::formats::{
    DataFile, FixedRecords, IndexCache, Lines, LinesStream, RecordLayout, TokenWindows, Tokens, WebDatasetStream,
};
use uel::data::{Batch, DataLoader, DataLoaderBuilder, Field, IterableDataset, LoaderState};

use super::server::{Fault, Server};

const SHARDS: usize = 3;

/// Files on this machine, and the same at URLs.
struct Files {
    server: Server,
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self { server: Server::start(), folder: tempfile::tempdir().unwrap() }
    }

    fn put(&self, name: &str, bytes: &[u8]) -> [PathBuf; 2] {
        let path = self.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let target = format!("/{name}");
        self.server.put(&target, bytes);
        [path, PathBuf::from(self.server.url(&target))]
    }

    /// Shards of bytes that `make` makes, here and there.
    fn shards(&self, ending: &str, make: impl Fn(usize) -> Vec<u8>) -> [Vec<PathBuf>; 2] {
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for shard in 0..SHARDS {
            let [path, url] = self.put(&format!("part-{shard}.{ending}"), &make(shard));
            here.push(path);
            there.push(url);
        }
        [here, there]
    }
}

fn options() -> FilesOptions {
    let remote = RemoteOptions::new()
        .with_backoff(Duration::from_millis(1))
        .with_timeout(Duration::from_secs(5))
        .with_deadline(Duration::from_secs(20))
        .with_retries(4);
    FilesOptions::new().with_remote(remote)
}

fn opened(urls: &[PathBuf]) -> Vec<DataFile> {
    urls.iter().map(|url| DataFile::open_with(url, &options()).unwrap()).collect()
}

/// 1.6 MB of ids, more than what opening a file brings along.
fn ids(shard: usize) -> Vec<u8> {
    (0..800_000u32).flat_map(|at| ((at ^ (shard as u32 * 7919)) as u16).to_le_bytes()).collect()
}

fn lines(shard: usize) -> Vec<u8> {
    (0..20_000).flat_map(|line| format!("line {line} of shard {shard}, {}\n", line * line).into_bytes()).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn text(field: &Field) -> String {
    match field {
        Field::Tensor(tensor) => {
            let numbers = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            format!("{:?} {:?} {numbers:?}", tensor.dtype(), tensor.dims())
        }
        Field::Map(entries) => entries.iter().map(|(name, field)| format!("{name}: {}; ", text(field))).collect(),
        other => format!("{other:?}"),
    }
}

fn seen(batch: uel::data::Result<Batch>) -> String {
    let batch = batch.unwrap();
    format!("{} {:?} {}", batch.number, batch.indices, text(&batch.data))
}

/// The batches of both, from the beginning, and from the middle on in turns: what one saved the other resumes.
fn compare(here: DataLoaderBuilder, there: [DataLoaderBuilder; 2]) {
    let [there, fewer] = there;
    let (here, there, fewer) = (here.build().unwrap(), there.num_workers(2).build().unwrap(), fewer.build().unwrap());
    let expected: Vec<String> = here.epoch(1).unwrap().map(seen).collect();
    assert!(expected.len() > 8);
    assert_eq!(there.epoch(1).unwrap().map(seen).collect::<Vec<_>>(), expected);
    let mut epoch = there.epoch(1).unwrap();
    let first: Vec<String> = epoch.by_ref().take(3).map(seen).collect();
    let state = LoaderState::from_json(&epoch.state().to_json()).unwrap();
    drop(epoch);
    for loader in [&here, &there, &fewer] {
        let rest = loader.resume(&state).unwrap().map(seen);
        assert!(first.iter().cloned().chain(rest).eq(expected.iter().cloned()));
    }
}

#[test]
fn rows_of_shards_at_urls() {
    let files = Files::new();
    let [here, there] = files.shards("bin", ids);
    let windows = TokenWindows::new(Dtype::U16, 8192);
    let loader = |tokens: Tokens| DataLoader::builder(tokens).batch_size(16).shuffle(3);
    compare(
        loader(Tokens::open(&here, &windows).unwrap()),
        [loader(Tokens::open(&there, &windows).unwrap()), loader(Tokens::new(opened(&there), &windows).unwrap())],
    );
    let whole = DataFile::preload(&there[1]).unwrap();
    assert_eq!(whole.fingerprint(), DataFile::open(&here[1]).unwrap().fingerprint());
    assert_eq!(whole.read(0, whole.byte_len()).unwrap(), ids(1));
}

#[test]
fn lines_and_archives_at_urls() {
    let files = Files::new();
    let [here, there] = files.shards("txt.gz", |shard| gzip(&lines(shard)));
    let loader =
        |lines: LinesStream| DataLoader::stream(lines).batch_size(3000).interleave(2).shuffle_window(500).shuffle(1);
    let stream = |paths: &[PathBuf]| LinesStream::open(paths).unwrap();
    compare(loader(stream(&here)), [loader(stream(&there)), loader(LinesStream::new(opened(&there)).unwrap())]);

    let [here, there] = files.shards("txt", lines);
    let loader = |paths: &[PathBuf], cache: &IndexCache| {
        DataLoader::builder(Lines::open(paths, cache).unwrap()).batch_size(3000).shuffle(1)
    };
    let folder = IndexCache::Folder(files.folder.path().to_path_buf());
    compare(loader(&here, &IndexCache::None), [loader(&there, &IndexCache::Beside), loader(&there, &folder)]);

    let [here, there] = files.shards("tar", |shard| {
        let mut tar = tar::Builder::new(Vec::new());
        for sample in 0..12usize {
            let bytes = vec![(shard * 16 + sample) as u8; 90_000 + sample];
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, format!("{sample:03}.bin"), bytes.as_slice()).unwrap();
        }
        tar.into_inner().unwrap()
    });
    let loader = |paths: &[PathBuf]| DataLoader::stream(WebDatasetStream::open_files(paths).unwrap()).batch_size(3);
    compare(loader(&here), [loader(&there), loader(&there)]);
}

/// Each row of 1 MiB is asked for once, and front to back a stream asks in pieces of a megabyte.
#[test]
fn a_row_is_one_request() {
    let files = Files::new();
    let bytes: Vec<u8> = (0..8u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let [_, url] = files.put("rows.bin", &bytes);
    let layout = RecordLayout::new(1 << 20).with_field("row", Dtype::U8, &[1 << 20], 0);
    let records = FixedRecords::with_layout(opened(std::slice::from_ref(&url)), &layout).unwrap();
    let loader = DataLoader::builder(records).batch_size(1).num_workers(2).build().unwrap();
    files.server.take_seen();
    for (row, batch) in loader.epoch(0).unwrap().enumerate() {
        let tensor = batch.unwrap().tensor("row").unwrap().flatten_all().unwrap();
        assert_eq!(tensor.to_vec1::<u8>().unwrap(), bytes[row << 20..(row + 1) << 20]);
    }
    let requests = files.server.take_seen().len();
    assert!(requests <= 9, "{requests} requests for 8 rows");

    let text: Vec<u8> = bytes.iter().map(|byte| if *byte == 0 { b'\n' } else { b'a' + byte % 26 }).collect();
    let [here, there] = files.put("text.txt", &text);
    let stream = LinesStream::new(opened(&[there])).unwrap();
    files.server.take_seen();
    let cx = &mut uel::data::SampleCx::new(0, 0);
    let count = |lines: &LinesStream, cx: &mut uel::data::SampleCx| {
        let mut stream = lines.open(0, None).unwrap();
        std::iter::from_fn(|| stream.next(cx).unwrap()).count()
    };
    let expected = count(&LinesStream::open([here]).unwrap(), cx);
    assert_eq!(count(&stream, cx), expected);
    let requests = files.server.take_seen().len();
    assert!(requests <= 10, "{requests} requests for 8 MiB");
}

/// What a server fails at for a moment is asked for again; an object that changed is an error of its batch.
#[test]
fn failures_of_the_server() {
    let files = Files::new();
    let [here, there] = files.shards("bin", ids);
    let windows = TokenWindows::new(Dtype::U16, 8192);
    let expected: Vec<String> = DataLoader::builder(Tokens::open(&here, &windows).unwrap())
        .batch_size(16)
        .build()
        .unwrap()
        .epoch(0)
        .unwrap()
        .map(seen)
        .collect();
    let loader = DataLoader::builder(Tokens::new(opened(&there), &windows).unwrap());
    let loader = loader.batch_size(16).num_workers(2).build().unwrap();
    files.server.fail([Fault::Status(503), Fault::Reset(1000), Fault::Short(10), Fault::None, Fault::Status(500)]);
    assert_eq!(loader.epoch(0).unwrap().map(seen).collect::<Vec<_>>(), expected);

    // What a source has read it may hold, so that this takes files that were only opened.
    let loader = DataLoader::builder(Tokens::new(opened(&there), &windows).unwrap());
    let loader = loader.batch_size(16).num_workers(2).build().unwrap();
    files.server.put("/part-1.bin", ids(5));
    let batches: Vec<_> = loader.epoch(0).unwrap().collect();
    assert_eq!(batches.len(), expected.len());
    let error = batches.into_iter().find_map(Result::err).unwrap();
    assert_eq!(error.kind(), Kind::Changed, "{error}");
    assert!(error.batch().is_some() && error.to_string().contains("part-1.bin"), "{error}");
}
