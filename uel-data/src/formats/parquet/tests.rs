use ::parquet::data_type::{ByteArray, ByteArrayType, DoubleType, FloatType, Int32Type, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;
use crate::formats::testkit::*;
use crate::{Dataset, IterableDataset};

/// Two row groups of three and two rows.
fn file(compression: ::parquet::basic::Compression) -> Vec<u8> {
    let schema = "message schema {
        REQUIRED INT64 id;
        REQUIRED FLOAT x;
        OPTIONAL BYTE_ARRAY text (UTF8);
        REQUIRED BYTE_ARRAY raw;
        OPTIONAL GROUP ids (LIST) { REPEATED GROUP list { REQUIRED INT32 element; } }
        REQUIRED DOUBLE y;
    }";
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut writer =
        SerializedFileWriter::new(&mut bytes, Arc::new(parse_message_type(schema).unwrap()), Arc::new(properties))
            .unwrap();
    for rows in [0i64..3, 3..5] {
        let rows: Vec<i64> = rows.collect();
        let mut group = writer.next_row_group().unwrap();
        macro_rules! column {
            ($type:ty, $values:expr, $definitions:expr, $repetitions:expr) => {{
                let mut column = group.next_column().unwrap().unwrap();
                column.typed::<$type>().write_batch(&$values, $definitions, $repetitions).unwrap();
                column.close().unwrap();
            }};
        }
        column!(Int64Type, rows, None, None);
        column!(FloatType, rows.iter().map(|&row| row as f32 / 2.0).collect::<Vec<_>>(), None, None);
        // The first row of each group has no text.
        let texts: Vec<ByteArray> =
            rows[1..].iter().map(|row| ByteArray::from(format!("row {row}").as_str())).collect();
        let definitions: Vec<i16> = rows.iter().map(|&row| i16::from(row != rows[0])).collect();
        column!(ByteArrayType, texts, Some(&definitions), None);
        column!(
            ByteArrayType,
            rows.iter().map(|&row| ByteArray::from(vec![row as u8; 2])).collect::<Vec<_>>(),
            None,
            None
        );
        // Row n has the list n, n + 1.
        let lists: Vec<i32> = rows.iter().flat_map(|&row| [row as i32, row as i32 + 1]).collect();
        let repetitions: Vec<i16> = rows.iter().flat_map(|_| [0, 1]).collect();
        column!(Int32Type, lists, Some(&vec![2; lists.len()]), Some(&repetitions));
        column!(DoubleType, rows.iter().map(|&row| row as f64).collect::<Vec<_>>(), None, None);
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

fn row(number: i64) -> Value {
    let mut entries = vec![("id", Value::Int(number)), ("x", array(&[], vec![number as f32 / 2.0]))];
    if number != 0 && number != 3 {
        entries.push(("text", Value::from(format!("row {number}"))));
    }
    entries.push(("raw", Value::Bytes(vec![number as u8; 2])));
    entries.push(("ids", array(&[2], vec![number, number + 1])));
    entries.push(("y", Value::Float(number as f64)));
    Value::map(entries)
}

#[test]
fn rows_by_index_and_as_streams() {
    use ::parquet::basic::{Compression, ZstdLevel};
    let folder = Folder::new();
    let all = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(ZstdLevel::default()),
        Compression::GZIP(Default::default()),
        Compression::LZ4_RAW,
    ];
    for compression in all {
        let bytes = file(compression);
        let files = vec![folder.open("a.parquet", &bytes), memory("b.parquet", &bytes)];
        let rows = Parquet::new(files.clone(), &[]).unwrap();
        let expected: Vec<Value> = (0..10).map(|index| row(index % 5)).collect();
        assert_eq!((0..rows.len()).map(|index| get(&rows, index)).collect::<Vec<_>>(), expected);
        assert_eq!(rows.describe(9), "b.parquet, row group 1, row 1");
        check(&rows);
        let stream = ParquetStream::new(files.clone(), &[]).unwrap();
        assert_eq!((stream.shards(), drain(&stream)), (4, expected));
        let picked = Parquet::new(files, &["y", "id"]).unwrap();
        assert_eq!(get(&picked, 7), Value::map([("id", Value::Int(2)), ("y", Value::Float(2.0))]));
        assert_ne!(picked.fingerprint(), rows.fingerprint());
    }
}

#[test]
fn broken_files_are_refused() {
    let bytes = file(::parquet::basic::Compression::SNAPPY);
    let kind = |bytes: &[u8]| Parquet::new(vec![memory("x.parquet", bytes)], &[]).unwrap_err().kind();
    assert_eq!(kind(b""), Kind::Malformed);
    assert_eq!(kind(&bytes[..bytes.len() - 4]), Kind::Malformed);
    let absent = Parquet::new(vec![memory("x.parquet", &bytes)], &["z"]).unwrap_err();
    assert_eq!((absent.kind(), absent.tensor()), (Kind::MissingField, Some("z")));
    hostile(&[("x.parquet", bytes)], |files| {
        read_some(Parquet::new(files.clone(), &[]));
        drain_some(ParquetStream::new(files, &[]));
    });
}
