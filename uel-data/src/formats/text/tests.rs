use std::io::Write as _;

use super::*;
use crate::formats::testkit::*;
use crate::{Array, Dataset, IterableDataset};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn all(dataset: &dyn Dataset) -> Vec<Value> {
    check(dataset);
    (0..dataset.len()).map(|index| get(dataset, index)).collect()
}

fn texts(values: &[Value]) -> Vec<&str> {
    let text = |value: &'_ Value| matches!(value.get("text"), Some(Value::Str(_)));
    assert!(values.iter().all(text));
    values
        .iter()
        .filter_map(|value| if let Some(Value::Str(text)) = value.get("text") { Some(text.as_str()) } else { None })
        .collect()
}

#[test]
fn lines_by_index_and_as_streams() {
    let one = b"\xef\xbb\xbffirst\r\n\nth\xc3\xafrd".to_vec();
    let two = b"fourth\n".to_vec();
    let expected = ["first", "", "thïrd", "fourth"];
    let folder = Folder::new();
    let on_disk = vec![folder.open("one.txt", &one), folder.open("two.txt", &two)];
    for files in [vec![memory("one.txt", &one), memory("two.txt", &two)], on_disk.clone()] {
        let lines = Lines::new(files.clone(), &IndexCache::None).unwrap();
        assert_eq!(texts(&all(&lines)), expected);
        assert_eq!(lines.describe(2), "one.txt, line 3 at byte 11");
        assert_eq!(lines.describe(3), "two.txt, line 1 at byte 0");
        assert_eq!(texts(&drain(&LinesStream::new(files).unwrap())), expected);
    }
    let cached = Lines::new(on_disk.clone(), &IndexCache::Beside).unwrap();
    let again = Lines::new(on_disk, &IndexCache::Beside).unwrap();
    assert_eq!(all(&cached), all(&again));
    assert_eq!(cached.fingerprint(), again.fingerprint());
    let packed = vec![memory("one.txt.gz", &gzip(&one)), memory("two.txt.gz", &gzip(&two))];
    assert_eq!(texts(&drain(&LinesStream::new(packed.clone()).unwrap())), expected);
    assert_eq!(Lines::new(packed, &IndexCache::None).unwrap_err().kind(), Kind::Argument);
    let empty = Lines::new(vec![memory("e", b"")], &IndexCache::None).unwrap();
    assert!(empty.is_empty());
    let broken = Lines::new(vec![memory("b.txt", b"good\nb\xffd\n")], &IndexCache::None).unwrap();
    let error = broken.get(1, &mut SampleCx::new(0, 0)).unwrap_err();
    assert_eq!(error.kind(), Kind::NotUtf8);
    assert!(error.to_string().contains("b.txt: at byte 5: record 2: the text is not UTF-8"), "{error}");
    assert_eq!(error.cause().offset(), Some(5));
}

#[test]
fn long_lines_cross_the_pieces_of_a_stream() {
    let text: String = (0..40).map(|line| format!("{}\n", "abc".repeat(line * 1000))).collect();
    let expected: Vec<&str> = text.lines().collect();
    let folder = Folder::new();
    for file in [folder.open("long", text.as_bytes()), memory("long.gz", &gzip(text.as_bytes()))] {
        assert_eq!(texts(&drain(&LinesStream::new(vec![file]).unwrap())), expected);
    }
    let lines = Lines::new(vec![folder.open("long", text.as_bytes())], &IndexCache::None).unwrap();
    assert_eq!(texts(&all(&lines)), expected);
}

#[test]
fn json_values_become_samples() {
    let text = br#"{"s": "a\u00e9", "i": -3, "f": 2.5, "b": true, "n": null, "l": [1, 2], "m": [1, 0.5], "e": [], "t": ["x"], "o": {"k": 1}}

{"i": 9223372036854775807}"#;
    let file = memory("a.jsonl", text);
    let jsonl = Jsonl::new(vec![file.clone()], &IndexCache::None).unwrap();
    assert_eq!(jsonl.len(), 2);
    let floats = |values: Vec<f64>| Value::from(Array::new(vec![values.len()], values).unwrap());
    let ints = |values: Vec<i64>| Value::from(Array::new(vec![values.len()], values).unwrap());
    let first = Value::map([
        ("s", Value::from("aé")),
        ("i", Value::Int(-3)),
        ("f", Value::Float(2.5)),
        ("b", Value::Bool(true)),
        ("l", ints(vec![1, 2])),
        ("m", floats(vec![1.0, 0.5])),
        ("e", ints(vec![])),
        ("t", Value::List(vec![Value::from("x")])),
        ("o", Value::map([("k", Value::Int(1))])),
    ]);
    assert_eq!(all(&jsonl), [first.clone(), Value::map([("i", Value::Int(i64::MAX))])]);
    assert_eq!(drain(&JsonlStream::new(vec![file.clone()]).unwrap()), all(&jsonl));
    let picked = jsonl.clone().with_fields(["f", "i"]);
    assert_eq!(get(&picked, 0), Value::map([("f", Value::Float(2.5)), ("i", Value::Int(-3))]));
    let error = picked.get(1, &mut SampleCx::new(0, 0)).unwrap_err();
    assert_eq!((error.kind(), error.field()), (Kind::MissingField, Some("f")));
    assert_ne!(picked.fingerprint(), jsonl.fingerprint());
    let stream = JsonlStream::new(vec![file]).unwrap();
    assert_ne!(stream.fingerprint(), stream.clone().with_fields(["i"]).unwrap().fingerprint());
}

#[test]
fn broken_json_says_where_and_the_stream_goes_on() {
    let cases: [(&str, Kind); 8] = [
        ("{\"a\": }", Kind::Json),
        ("{\"a\": 1, \"a\": 2}", Kind::Json),
        ("[1, null]", Kind::Json),
        ("18446744073709551615", Kind::Json),
        ("{} {}", Kind::Json),
        ("null", Kind::JsonType),
        ("\u{1}", Kind::Json),
        ("{\"a\": 1e999}", Kind::Json),
    ];
    for (line, kind) in cases {
        let text = format!("{{\"ok\": 1}}\n{line}\n{{\"ok\": 2}}");
        let file = memory("x.jsonl", text.as_bytes());
        let jsonl = Jsonl::new(vec![file.clone()], &IndexCache::None).unwrap();
        let error = jsonl.get(1, &mut SampleCx::new(0, 0)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("record 2") && error.cause().offset() == Some(10), "{error}");
        let stream = JsonlStream::new(vec![file]).unwrap();
        let mut stream =
            stream.shards().checked_sub(1).map(|_| IterableDataset::open(&stream, 0, None).unwrap()).unwrap();
        let cx = &mut SampleCx::new(0, 0);
        assert!(stream.next(cx).is_ok());
        assert_eq!(stream.next(cx).unwrap_err().to_string(), error.to_string());
        assert_eq!(stream.next(cx).unwrap().unwrap().get("ok"), Some(&Value::Int(2)));
        assert!(stream.next(cx).unwrap().is_none() && stream.next(cx).unwrap().is_none());
    }
    let deep = "[".repeat(100_000);
    let jsonl = Jsonl::new(vec![memory("deep", deep.as_bytes())], &IndexCache::None).unwrap();
    assert_eq!(jsonl.get(0, &mut SampleCx::new(0, 0)).unwrap_err().kind(), Kind::Json);
}

#[test]
fn csv_with_quotes_and_types() {
    let text = b"id,name,x\r\n1,\"Doe, \"\"J\"\"\nJr\",0.5\r\n\r\n 2 ,5\" disk,-1e3\n3,,inf";
    let folder = Folder::new();
    let names = ["Doe, \"J\"\nJr", "5\" disk", ""];
    for file in [memory("a.csv", text), folder.open("a.csv", text)] {
        let plain = Csv::new(vec![file.clone()], &CsvOptions::new(), &IndexCache::None).unwrap();
        let rows = all(&plain);
        assert_eq!(
            rows.iter().map(|row| row.get("name").cloned().unwrap()).collect::<Vec<_>>(),
            names.map(Value::from)
        );
        assert_eq!(rows[1].get("id"), Some(&Value::from(" 2 ")));
        assert_eq!(drain(&CsvStream::new(vec![file.clone()], &CsvOptions::new()).unwrap()), rows);
        let options = CsvOptions::new().with_column("x", CsvType::F32).with_column("id", CsvType::U32);
        let numbers = Csv::new(vec![file.clone(), file], &options, &IndexCache::None).unwrap();
        assert!(numbers.layout().is_some() && numbers.len() == 6);
        let expected = Value::map([("x", array(&[], vec![-1e3f32])), ("id", array(&[], vec![2u32]))]);
        assert_eq!(all(&numbers)[4], expected);
    }
    let bare = CsvOptions::new().without_header().with_delimiter(b'\t').with_column("1", CsvType::I64);
    let bare = Csv::new(vec![memory("t", b"a\t-4\nb\t5\n")], &bare, &IndexCache::None).unwrap();
    assert_eq!(all(&bare), [-4i64, 5].map(|value| Value::map([("1", array(&[], vec![value]))])));
}

#[test]
fn faults_of_csv_are_told_apart() {
    let open = |text: &[u8], options: &CsvOptions| Csv::new(vec![memory("f.csv", text)], options, &IndexCache::None);
    let typed = CsvOptions::new().with_column("b", CsvType::I64);
    let cases: [(&[u8], Kind, &str); 6] = [
        (b"a,b\n1,2.5\n", Kind::ValueRange, "record 2"),
        (b"a,b\n1,\n", Kind::ValueRange, "field b"),
        (b"a,b\n1\n", Kind::Malformed, "expected 2, got 1"),
        (b"a,b\n1,2,3\n", Kind::Malformed, "expected 2, got 3"),
        (b"a,b\n\"1\"x,2\n", Kind::Malformed, "closing quote"),
        (b"a,b\n1,\"2\n", Kind::Malformed, "never closed"),
    ];
    for (text, kind, part) in cases {
        let csv = open(text, &typed).unwrap();
        let error = csv.get(0, &mut SampleCx::new(0, 0)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(part) && error.cause().offset() == Some(4), "{error}");
    }
    assert_eq!(open(b"a\n1", &typed).unwrap_err().kind(), Kind::MissingField);
    assert_eq!(open(b"a,a\n1,2", &CsvOptions::new()).unwrap_err().kind(), Kind::DuplicateName);
    assert_eq!(open(b"a", &CsvOptions::new().with_delimiter(b'"')).unwrap_err().kind(), Kind::Argument);
    let files = vec![memory("1", b"a,b\n"), memory("2", b"a,c\n")];
    let differ = Csv::new(files, &CsvOptions::new(), &IndexCache::None).unwrap_err();
    assert_eq!((differ.kind(), differ.got()), (Kind::ShapeMismatch, Some("a, c")));
    assert_eq!(open(b"", &CsvOptions::new()).unwrap().len(), 0);
}

#[test]
fn no_text_makes_these_formats_panic() {
    let jsonl = b"{\"a\": [1, 2.5], \"b\": \"x\\n\"}\n\n{\"a\": {\"b\": true}}\n".to_vec();
    let csv = b"a,b\n1,\"x\n\"\"\"\n2,y\n".to_vec();
    hostile(&[("a", jsonl.clone())], |files| {
        read_some(Lines::new(files.clone(), &IndexCache::None));
        read_some(Jsonl::new(files.clone(), &IndexCache::None));
        drain_some(JsonlStream::new(files));
    });
    for bytes in [csv, gzip(&jsonl)] {
        hostile(&[("a", bytes)], |files| {
            read_some(Csv::new(files.clone(), &CsvOptions::new(), &IndexCache::None));
            read_some(Csv::new(files.clone(), &CsvOptions::new().with_column("a", CsvType::I64), &IndexCache::None));
            drain_some(CsvStream::new(files.clone(), &CsvOptions::new()));
            drain_some(LinesStream::new(files));
        });
    }
}
