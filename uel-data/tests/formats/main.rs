//! Data files written by Python hold the samples that Python says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests and what they share")]

mod python {
    use std::path::{Path, PathBuf};
    use std::process::{Command, Stdio};

    use serde_json::{Value as Json, json};
    use uel_data::formats::*;
    use uel_data::{Array, Dataset, Elements, IterableDataset, SampleCx, Value};

    /// `UEL_PYTHON`, or the interpreter that `scripts/python-env` makes for the lane.
    fn python() -> PathBuf {
        if let Some(python) = std::env::var_os("UEL_PYTHON") {
            return python.into();
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/python-env");
        let output =
            Command::new("sh").arg(script).arg("formats-requirements.txt").stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().trim_end().into()
    }

    fn array(array: &Array) -> Json {
        let bits = |values: Vec<f64>| values.into_iter().map(|value| json!(value.to_bits())).collect::<Vec<_>>();
        let values = match array.elements() {
            Elements::U8(values) => values.iter().map(|&value| json!(value)).collect(),
            Elements::U32(values) => values.iter().map(|&value| json!(value)).collect(),
            Elements::I16(values) => values.iter().map(|&value| json!(value)).collect(),
            Elements::I32(values) => values.iter().map(|&value| json!(value)).collect(),
            Elements::I64(values) => values.iter().map(|&value| json!(value)).collect(),
            Elements::F16(values) => bits(values.iter().map(|value| value.to_f64()).collect()),
            Elements::F32(values) => bits(values.iter().map(|&value| value.into()).collect()),
            Elements::F64(values) => bits(values.to_vec()),
            other => panic!("{:?}", other.dtype()),
        };
        json!({"shape": array.shape(), "values": values})
    }

    fn as_json(value: &Value) -> Json {
        match value {
            Value::Array(values) => array(values),
            Value::Int(value) => json!(value),
            Value::Float(value) => json!(value.to_bits()),
            Value::Bool(value) => json!(value),
            Value::Str(text) => json!(text),
            Value::Bytes(bytes) => json!({"bytes": bytes}),
            Value::Map(entries) => entries.iter().map(|(key, value)| (key.to_string(), as_json(value))).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn by_index(dataset: impl Dataset) -> Vec<Json> {
        let cx = &mut SampleCx::new(0, 0);
        (0..dataset.len()).map(|index| as_json(&dataset.get(index, cx).unwrap())).collect()
    }

    fn streamed(dataset: impl IterableDataset) -> Vec<Json> {
        let cx = &mut SampleCx::new(0, 0);
        let mut samples = Vec::new();
        for shard in 0..dataset.shards() {
            let mut stream = dataset.open(shard, None).unwrap();
            while let Some(sample) = stream.next(cx).unwrap() {
                samples.push(as_json(&sample));
            }
        }
        samples
    }

    /// Every road on which a file of this kind can be read.
    fn read(case: &Json, folder: &Path) -> Vec<Vec<Json>> {
        let path = folder.join(case["paths"][0].as_str().unwrap());
        let none = &IndexCache::None;
        match case["kind"].as_str().unwrap() {
            "npy" => vec![
                by_index(Npy::open([("x", &path)]).unwrap()),
                by_index(Npy::new([("x", DataFile::preload(&path).unwrap())]).unwrap()),
            ],
            "npz" => vec![
                by_index(Npy::open_npz(&path, &[]).unwrap()),
                by_index(Npy::from_npz(&DataFile::preload(&path).unwrap(), &[]).unwrap()),
            ],
            "idx" => vec![by_index(Idx::new([("x", DataFile::open(&path).unwrap())]).unwrap())],
            "tokens" => {
                let windows = TokenWindows::new(uel_core::Dtype::U16, 16).with_stride(5);
                vec![by_index(Tokens::open([&path], &windows).unwrap())]
            }
            "lines" => vec![
                by_index(Lines::open([&path], none).unwrap()),
                by_index(Lines::open([&path], &IndexCache::Beside).unwrap()),
                by_index(Lines::open([&path], &IndexCache::Beside).unwrap()),
                streamed(LinesStream::open([&path]).unwrap()),
            ],
            "jsonl" => {
                vec![by_index(Jsonl::open([&path], none).unwrap()), streamed(JsonlStream::open([&path]).unwrap())]
            }
            "csv" => {
                let options = CsvOptions::new().with_delimiter(case["delimiter"].as_str().unwrap().as_bytes()[0]);
                vec![
                    by_index(Csv::open([&path], &options, none).unwrap()),
                    streamed(CsvStream::open([&path], &options).unwrap()),
                ]
            }
            "webdataset" => {
                let mut roads = vec![streamed(WebDatasetStream::open_files([&path]).unwrap())];
                if path.extension().is_some_and(|ending| ending == "tar") {
                    roads.push(by_index(WebDataset::open([&path]).unwrap()));
                }
                roads
            }
            #[cfg(feature = "parquet")]
            "parquet" => vec![
                by_index(Parquet::open([&path], &[]).unwrap()),
                streamed(ParquetStream::open_files([&path], &[]).unwrap()),
            ],
            other => panic!("{other}"),
        }
    }

    fn written(extras: &[&str]) -> (tempfile::TempDir, Vec<Json>) {
        let folder = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats/write.py");
        let status = Command::new(python()).arg(script).arg(folder.path()).args(extras).status().unwrap();
        assert!(status.success());
        let expected = std::fs::read(folder.path().join("expected.json")).unwrap();
        (folder, serde_json::from_slice(&expected).unwrap())
    }

    fn compare(case: &Json, folder: &Path) {
        let expected = case["samples"].as_array().unwrap();
        for (road, samples) in read(case, folder).iter().enumerate() {
            assert_eq!(samples.len(), expected.len(), "{}, road {road}", case["paths"]);
            for (number, (got, expected)) in samples.iter().zip(expected).enumerate() {
                assert_eq!(got, expected, "{}, road {road}, sample {number}", case["paths"]);
            }
        }
    }

    #[test]
    #[ignore = "lane formats: scripts/test formats"]
    fn data_files_hold_what_python_wrote() {
        let (folder, cases) = written(&[]);
        assert!(cases.len() > 250);
        cases.iter().for_each(|case| compare(case, folder.path()));
    }

    #[cfg(feature = "parquet")]
    #[test]
    #[ignore = "lane formats: scripts/test formats"]
    fn parquet_files_hold_what_pyarrow_wrote() {
        let (folder, cases) = written(&["parquet"]);
        let cases: Vec<_> = cases.iter().filter(|case| case["kind"] == "parquet").collect();
        assert_eq!(cases.len(), 5);
        cases.iter().for_each(|case| compare(case, folder.path()));
    }

    /// JPEG decoders may differ by some steps, and resizing by one.
    #[cfg(feature = "image")]
    #[test]
    #[ignore = "lane formats: scripts/test formats"]
    fn images_look_as_pillow_sees_them() {
        let (folder, cases) = written(&["image"]);
        let cases: Vec<_> = cases.iter().filter(|case| case["kind"] == "image").collect();
        assert_eq!(cases.len(), 7);
        let open = |transform| ImageFolder::open(folder.path().join("images"), transform).unwrap();
        let roads = [
            ("resized", by_index(open(ImageTransform::resize(45, 30)))),
            ("centre", by_index(open(ImageTransform::centre_crop(36, 32)))),
        ];
        for (name, samples) in roads {
            for (case, sample) in cases.iter().zip(samples) {
                let expected = &case["samples"][0][name];
                let got = &sample["image"];
                assert_eq!(got["shape"], expected["shape"]);
                let pairs = got["values"].as_array().unwrap().iter().zip(expected["values"].as_array().unwrap());
                let steps: Vec<u64> =
                    pairs.map(|(got, expected)| got.as_u64().unwrap().abs_diff(expected.as_u64().unwrap())).collect();
                let (most, sum) = (steps.iter().max().unwrap(), steps.iter().sum::<u64>());
                let mean = sum as f64 / steps.len() as f64;
                assert!(*most <= 12 && mean < 1.0, "{name} {}: most {most}, mean {mean}", case["paths"]);
            }
        }
    }
}
