//! Lane `python`: agreement with the Python packages, byte for byte, in both directions.

mod dicts;
mod gguf;
mod values;
mod written;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::checkpoint::{CPU, MODES, mapping, same};

/// What a file holds, in the words of its header.
#[derive(Debug, Default, PartialEq)]
struct Contents {
    metadata: Option<BTreeMap<String, String>>,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Clone, PartialEq)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = &self.bytes[..self.bytes.len().min(16)];
        write!(f, "{} {:?}, {} bytes {head:?}..", self.dtype, self.shape, self.bytes.len())
    }
}

/// Reads a file, or a folder of shards, as raw bytes. Each tensor is read on two roads, which must agree.
fn load_with_uel(path: &Path) -> Contents {
    let checkpoint = uel::Checkpoint::open(path).unwrap();
    let device = candle_core::Device::Cpu;
    let metadata = (0..checkpoint.paths().len()).find_map(|file| checkpoint.file_metadata(file)).cloned();
    let mut contents = Contents { metadata, ..Contents::default() };
    for info in checkpoint.infos() {
        let bytes = checkpoint.read(info.name()).unwrap();
        let raw: Vec<u8> = checkpoint.raw_tensor(info.name(), &device).unwrap().to_vec1().unwrap();
        assert_eq!(raw, bytes, "{}", info.name());
        let tensor = Tensor { dtype: info.dtype().to_string(), shape: info.shape().to_vec(), bytes };
        assert!(contents.tensors.insert(info.name().to_owned(), tensor).is_none());
    }
    contents
}

/// The bytes of `tensor[start..stop, ..]`, row-major, cut out by the byte runs of uel-core.
fn slice_with_uel(path: &Path, name: &str, ranges: &[(usize, usize)]) -> Vec<u8> {
    use uel::core::slice::Bounds;
    let checkpoint = uel::Checkpoint::open(path).unwrap();
    let bounds: Vec<Bounds> = ranges.iter().map(|&(start, stop)| Bounds::from(start..stop)).collect();
    let info = checkpoint.info(name).unwrap();
    let slice = uel::core::TensorSlice::of(&info, &bounds).unwrap();
    let bytes = checkpoint.read(name).unwrap();
    let runs = slice.runs().flat_map(|run| bytes[run.start() as usize..run.end() as usize].to_vec());
    let cut: Vec<u8> = runs.collect();
    if let uel::candle::dtype::Mapping::Same(_) = uel::candle::dtype::mapping(info.dtype()) {
        let tensor = checkpoint.slice(name, bounds, &candle_core::Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), slice.result_shape());
        if tensor.dtype() == candle_core::DType::F32 {
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>(), cut);
        }
    }
    cut
}

/// The interpreter that has the reference packages: `UEL_PYTHON`, or the one that `scripts/python-env` makes.
fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("UEL_PYTHON") {
        return python.into();
    }
    printed_by("python-env", &[])
}

/// The path that a script of this repository prints.
pub(crate) fn printed_by(script: &str, arguments: &[&str]) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script);
    let output = Command::new("sh").arg(&script).args(arguments).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{} failed ({})", script.display(), output.status);
    String::from_utf8(output.stdout).unwrap().trim_end().into()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name)
}

/// A Python process that answers what the package reads from a file.
struct Reference {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    out: tempfile::NamedTempFile,
}

impl Reference {
    fn start() -> Self {
        let mut command = Command::new(python());
        command.arg(source("reference.py")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let requests = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, requests, answers, out: tempfile::NamedTempFile::new().unwrap() }
    }

    fn ask(&mut self, request: &Value) -> (Value, Vec<u8>) {
        writeln!(self.requests, "{request}").unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer.get("error"), None, "{request}");
        (answer, std::fs::read(self.out.path()).unwrap())
    }

    fn dump(&mut self, path: &Path) -> Contents {
        let request = json!({"op": "dump", "path": path, "out": self.out.path()});
        let (answer, bytes) = self.ask(&request);
        contents(&answer, &bytes)
    }

    fn slice(&mut self, path: &Path, name: &str, ranges: &[(usize, usize)]) -> Vec<u8> {
        let request = json!({"op": "slice", "path": path, "name": name, "ranges": ranges, "out": self.out.path()});
        self.ask(&request).1
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        // Its input ends when `requests` is dropped, but only after this; a test that failed should not wait either.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn contents(answer: &Value, bytes: &[u8]) -> Contents {
    let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let tensor = |fields: &Value| {
        let (offset, len) = (number(&fields["offset"]), number(&fields["len"]));
        Tensor {
            dtype: fields["dtype"].as_str().unwrap().to_owned(),
            shape: fields["shape"].as_array().unwrap().iter().map(number).collect(),
            bytes: bytes[offset..offset + len].to_vec(),
        }
    };
    let tensors = answer["tensors"].as_object().unwrap();
    Contents {
        metadata: serde_json::from_value(answer["metadata"].clone()).unwrap(),
        tensors: tensors.iter().map(|(name, fields)| (name.clone(), tensor(fields))).collect(),
    }
}

/// Equal, or the first difference, without printing megabytes of names.
#[track_caller]
fn assert_same(got: &Contents, expected: &Contents, what: &str) {
    assert_eq!(got.metadata, expected.metadata, "{what}: metadata");
    assert_eq!(got.tensors.len(), expected.tensors.len(), "{what}: number of tensors");
    for ((got_name, got), (name, expected)) in got.tensors.iter().zip(&expected.tensors) {
        assert_eq!(got_name, name, "{what}");
        assert!(got == expected, "{what}: {name}: got {got:?}, expected {expected:?}");
    }
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn files_written_by_the_package_read_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let status = Command::new(python()).arg(source("write_corpus.py")).arg(folder.path()).status().unwrap();
    assert!(status.success());
    let bytes = std::fs::read(folder.path().join("expected.bin")).unwrap();
    let expected = std::fs::read(folder.path().join("expected.json")).unwrap();
    let expected: Vec<Value> = serde_json::from_slice(&expected).unwrap();
    assert!(expected.len() >= 40);
    let mut dtypes = std::collections::BTreeSet::new();
    for file in &expected {
        let path = file["path"].as_str().unwrap();
        let expected = contents(file, &bytes);
        assert_same(&load_with_uel(&folder.path().join(path)), &expected, path);
        dtypes.extend(expected.tensors.into_values().map(|tensor| tensor.dtype));
    }
    assert_eq!(dtypes.len(), 22);
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn a_real_model_reads_the_same() {
    let path = std::env::var_os("UEL_MINILM").map_or_else(|| printed_by("fetch-minilm", &[]), PathBuf::from);
    let path = path.join("model.safetensors");
    let contents = load_with_uel(&path);
    assert_eq!(contents.tensors.len(), 104);
    assert_same(&contents, &Reference::start().dump(&path), "all-MiniLM-L6-v2");

    let candles = candle_core::safetensors::load(&path, &CPU).unwrap();
    for mode in MODES {
        let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
        let loaded = checkpoint.load_all(&CPU).unwrap();
        assert_eq!(loaded.len(), candles.len(), "{mode}");
        for (name, tensor) in loaded {
            assert!(same(&tensor, &candles[&name]), "{mode}: {name}");
            assert!(same(&checkpoint.tensor(&name, &CPU).unwrap(), &tensor), "{mode}: {name}, alone");
        }
    }
}

/// Every dtype: its name, and the elements and bytes of its smallest whole block.
const DTYPES: [(&str, usize, usize); 22] = [
    ("BOOL", 1, 1),
    ("F4", 2, 1),
    ("F6_E2M3", 4, 3),
    ("F6_E3M2", 4, 3),
    ("U8", 1, 1),
    ("I8", 1, 1),
    ("F8_E5M2", 1, 1),
    ("F8_E4M3", 1, 1),
    ("F8_E8M0", 1, 1),
    ("F8_E4M3FNUZ", 1, 1),
    ("F8_E5M2FNUZ", 1, 1),
    ("I16", 1, 2),
    ("U16", 1, 2),
    ("F16", 1, 2),
    ("BF16", 1, 2),
    ("I32", 1, 4),
    ("U32", 1, 4),
    ("F32", 1, 4),
    ("C64", 1, 8),
    ("F64", 1, 8),
    ("I64", 1, 8),
    ("U64", 1, 8),
];

/// Bytes that differ everywhere, made from a seed.
fn filler(mut seed: u64, len: usize) -> Vec<u8> {
    let mut step = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    (0..len).map(|_| step()).collect()
}

fn tensor() -> impl Strategy<Value = Tensor> {
    let shape = prop::collection::vec(prop_oneof![8 => 1..5usize, 1 => Just(0), 1 => 5..70usize], 0..5);
    (prop::sample::select(&DTYPES[..]), shape, any::<u64>()).prop_map(|((dtype, elements, bytes), mut shape, seed)| {
        if elements > 1 {
            match shape.last_mut() {
                Some(last) => *last *= elements,
                None => shape.push(elements),
            }
        }
        let len = shape.iter().product::<usize>() / elements * bytes;
        Tensor { dtype: dtype.to_owned(), shape, bytes: filler(seed, len) }
    })
}

fn any_contents() -> impl Strategy<Value = Contents> {
    let name = "[a-z0-9_.]{1,24}|\\PC{0,12}|.{0,8}".prop_filter("reserved", |name| name != "__metadata__");
    let metadata = prop::option::of(prop::collection::btree_map("\\PC{0,8}", ".{0,16}", 0..4));
    (metadata, prop::collection::btree_map(name, tensor(), 0..12))
        .prop_map(|(metadata, tensors)| Contents { metadata, tensors })
}

/// How a header is written, within what the format allows.
#[derive(Clone, Debug)]
enum Style {
    /// By the reference implementation: sorted by alignment, padded to 8.
    Reference,
    /// By hand: tensors in the order of their names, any padding, so that the data may start anywhere.
    ByHand { pretty: bool, padding: usize },
}

fn style() -> impl Strategy<Value = Style> {
    let by_hand = (any::<bool>(), 0..24usize).prop_map(|(pretty, padding)| Style::ByHand { pretty, padding });
    prop_oneof![Just(Style::Reference), by_hand]
}

fn write(contents: &Contents, style: &Style) -> Vec<u8> {
    match style {
        // The reference writes `{},"__metadata__":{..}}` for metadata without tensors, which it refuses to read.
        Style::Reference if !contents.tensors.is_empty() || contents.metadata.is_none() => {
            let views = contents.tensors.iter().map(|(name, tensor)| {
                let dtype = serde_json::from_value(Value::String(tensor.dtype.clone())).unwrap();
                (name, TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap())
            });
            let metadata = contents.metadata.clone().map(|metadata| metadata.into_iter().collect());
            safetensors::serialize(views, metadata).unwrap()
        }
        Style::Reference => write(contents, &Style::ByHand { pretty: false, padding: 0 }),
        Style::ByHand { pretty, padding } => {
            let mut header = serde_json::Map::new();
            if let Some(metadata) = &contents.metadata {
                header.insert("__metadata__".to_owned(), json!(metadata));
            }
            let mut data = Vec::new();
            for (name, Tensor { dtype, shape, bytes }) in &contents.tensors {
                let start = data.len();
                data.extend_from_slice(bytes);
                let fields = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
                header.insert(name.clone(), fields);
            }
            let header = if *pretty { serde_json::to_string_pretty(&header) } else { serde_json::to_string(&header) };
            let header = header.unwrap() + &" ".repeat(*padding);
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend_from_slice(header.as_bytes());
            file.extend_from_slice(&data);
            file
        }
    }
}

/// A runner whose failures are printed with their input instead of being kept in a file.
fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn generated_files_read_the_same_as_by_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("generated.safetensors");
    let reference = std::cell::RefCell::new(Reference::start());
    let result = runner(512).run(&(any_contents(), style()), |(written, style)| {
        std::fs::write(&path, write(&written, &style)).unwrap();
        assert_same(&reference.borrow_mut().dump(&path), &written, "read by the package");
        assert_same(&load_with_uel(&path), &written, "read by UEL");
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn slices_are_the_same_as_by_the_package() {
    // What numpy has a type for: the package slices no other.
    let dtypes = prop::sample::select(vec!["BOOL", "U8", "I16", "F16", "U32", "F32", "C64", "I64", "F64"]);
    let bounds = (1..9usize).prop_flat_map(|dim| (Just(dim), 0..dim)).prop_flat_map(|(dim, start)| {
        (start + 1..=dim).prop_map(move |stop| (dim, (start, stop))) // never empty: the package refuses those
    });
    let cuts = (dtypes, prop::collection::vec(bounds, 1..5), 0..3usize, any::<u64>());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sliced.safetensors");
    let reference = std::cell::RefCell::new(Reference::start());
    let result = runner(256).run(&cuts, |(dtype, bounds, whole, seed)| {
        let (shape, mut ranges): (Vec<usize>, Vec<(usize, usize)>) = bounds.into_iter().unzip();
        ranges.truncate(shape.len().saturating_sub(whole).max(1)); // the last dimensions whole
        let size = DTYPES.iter().find(|(name, ..)| *name == dtype).unwrap().2;
        let bytes = filler(seed, shape.iter().product::<usize>() * size);
        // BOOL as numpy has it.
        let bytes = if dtype == "BOOL" { bytes.iter().map(|byte| byte & 1).collect() } else { bytes };
        let tensor = Tensor { dtype: dtype.to_owned(), shape, bytes };
        let tensors = BTreeMap::from([("before".to_owned(), tensor.clone()), ("x".to_owned(), tensor)]);
        let file = write(&Contents { metadata: None, tensors }, &Style::ByHand { pretty: false, padding: 3 });
        std::fs::write(&path, file).unwrap();
        let expected = reference.borrow_mut().slice(&path, "x", &ranges);
        prop_assert_eq!(slice_with_uel(&path, "x", &ranges), expected);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}
