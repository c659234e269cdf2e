//! Batches are stacked as torch's `default_collate` stacks them, but for what the documentation of `Stack` says.

use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::DType;
use serde_json::{Value as Json, json};
use uel::data::collate::{Collate as _, Stack};
use uel::data::{Array, Elements, Field, Kind, Rng, Value};

const BATCHES: u64 = 4000;

/// A random value, nested less deeply the lower it stands.
fn value(rng: &mut Rng, depth: u64) -> Value {
    let some = |rng: &mut Rng| -> Vec<Value> { (0..rng.below(3)).map(|_| value(rng, depth - 1)).collect() };
    match rng.below(if depth == 0 { 8 } else { 12 }) {
        0 | 1 => array(rng),
        2 | 3 => Value::Int(rng.below(7) as i64 - 3),
        4 => Value::Float(rng.below(9) as f64 / 4.0 - 1.0),
        5 => Value::Bool(rng.chance(0.5)),
        6 => Value::from(["", "a", "text"][rng.below(3) as usize]),
        7 => Value::Bytes(vec![7; rng.below(3) as usize]),
        8 => Value::List(some(rng)),
        9 => Value::Tuple(some(rng)),
        _ => {
            let values = some(rng);
            Value::map(["a", "b", "c"].into_iter().zip(values))
        }
    }
}

fn array(rng: &mut Rng) -> Value {
    let shape: Vec<usize> = (0..rng.below(3)).map(|_| rng.below(3) as usize).collect();
    let numbers: Vec<u8> = (0..shape.iter().product::<usize>()).map(|_| rng.below(100) as u8).collect();
    let elements: Elements = match rng.below(5) {
        0 => numbers.into(),
        1 => numbers.iter().map(|&number| u32::from(number)).collect::<Vec<_>>().into(),
        2 => numbers.iter().map(|&number| i64::from(number) - 50).collect::<Vec<_>>().into(),
        3 => numbers.iter().map(|&number| f32::from(number) / 8.0).collect::<Vec<_>>().into(),
        _ => numbers.iter().map(|&number| f64::from(number) / 8.0).collect::<Vec<_>>().into(),
    };
    Array::new(shape, elements).unwrap().into()
}

/// A value of the same nesting with other numbers, or now and then something else in a place.
fn alike(rng: &mut Rng, like: &Value, change: f64) -> Value {
    if rng.chance(change) {
        return value(rng, 1);
    }
    let mut each = |values: &[Value]| values.iter().map(|value| alike(rng, value, change)).collect::<Vec<_>>();
    match like {
        Value::List(values) => Value::List(each(values)),
        Value::Tuple(values) => Value::Tuple(each(values)),
        Value::Map(entries) => {
            let mut entries: Vec<_> =
                entries.iter().map(|(name, value)| (name.clone(), alike(rng, value, change))).collect();
            // Another order of keys is no difference.
            if rng.chance(0.3) {
                entries.reverse();
            }
            Value::Map(entries)
        }
        Value::Int(_) => Value::Int(rng.below(100) as i64),
        Value::Float(_) => Value::Float(rng.below(100) as f64 / 8.0),
        Value::Bool(_) => Value::Bool(rng.chance(0.5)),
        Value::Str(_) => Value::from(["x", "yz"][rng.below(2) as usize]),
        Value::Bytes(_) => Value::Bytes(vec![9; rng.below(4) as usize]),
        other => other.clone(),
    }
}

fn numbers(elements: &Elements) -> Vec<f64> {
    match elements {
        Elements::U8(numbers) => numbers.iter().map(|&number| number.into()).collect(),
        Elements::U32(numbers) => numbers.iter().map(|&number| number.into()).collect(),
        Elements::I64(numbers) => numbers.iter().map(|&number| number as f64).collect(),
        Elements::F32(numbers) => numbers.iter().map(|&number| number.into()).collect(),
        Elements::F64(numbers) => numbers.to_vec(),
        other => panic!("{:?}", other.dtype()),
    }
}

/// A sample as the script reads it.
fn told(value: &Value) -> Json {
    let kind = value.kind();
    let all = |values: &[Value]| values.iter().map(told).collect::<Vec<_>>();
    let content = match value {
        Value::Array(array) => {
            let elements = array.elements();
            let whole = !matches!(elements, Elements::F32(_) | Elements::F64(_));
            let content = match whole {
                true => numbers(elements).iter().map(|&number| json!(number as i64)).collect::<Vec<_>>(),
                false => numbers(elements).iter().map(|&number| json!(number)).collect(),
            };
            let dtype = format!("{:?}", array.dtype());
            return json!({"kind": "array", "dtype": dtype, "shape": array.shape(), "value": content});
        }
        Value::Int(number) => json!(number),
        Value::Float(number) => json!(number),
        Value::Bool(is_so) => json!(is_so),
        Value::Str(text) => json!(text),
        Value::Bytes(bytes) => json!(bytes),
        Value::List(values) | Value::Tuple(values) => json!(all(values)),
        Value::Map(entries) => {
            json!(entries.iter().map(|(name, value)| json!([&**name, told(value)])).collect::<Vec<_>>())
        }
        other => panic!("{other:?}"),
    };
    json!({"kind": kind, "value": content})
}

/// Whether a field is what torch made.
fn is_same(field: &Field, torch: &Json) -> bool {
    let all = |fields: &[Field]| {
        let others = torch["value"].as_array().unwrap();
        // Nothing at all is an empty list, whatever it is a list of.
        torch["kind"] == "list"
            && fields.len() == others.len()
            && fields.iter().zip(others).all(|(field, other)| is_same(field, other))
    };
    match field {
        Field::Tensor(tensor) => {
            let numbers = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let dtypes: &[&str] = match tensor.dtype() {
                DType::U8 => &["uint8", "bool"],
                DType::U32 => &["uint32"],
                DType::I64 => &["int64"],
                DType::F32 => &["float32"],
                // Where a whole number stands before a real one.
                DType::F64 => &["float64", "float32"],
                other => panic!("{other:?}"),
            };
            torch["kind"] == "tensor"
                && dtypes.contains(&torch["dtype"].as_str().unwrap())
                && torch["shape"] == json!(tensor.dims())
                && torch["value"] == json!(numbers)
        }
        Field::Strings(texts) => torch["kind"] == "texts" && torch["value"] == json!(texts),
        Field::Bytes(runs) => torch["kind"] == "bytes" && torch["value"] == json!(runs),
        Field::List(fields) | Field::Tuple(fields) => all(fields),
        Field::Map(entries) => {
            let others = torch["value"].as_array().unwrap();
            torch["kind"] == "map"
                && entries.len() == others.len()
                && entries
                    .iter()
                    .zip(others)
                    .all(|((name, field), other)| other[0].as_str() == Some(&**name) && is_same(field, &other[1]))
        }
        other => panic!("{other:?}"),
    }
}

/// Whether samples differ in kind somewhere, which torch does not always mind.
fn differ_in_kind(samples: &[&Value]) -> bool {
    let is_number = |value: &Value| matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_));
    let first = samples[0];
    let alike = |value: &&Value| value.kind() == first.kind() || is_number(value) && is_number(first);
    if !samples.iter().all(alike) {
        return true;
    }
    let inner = |of: &dyn Fn(&Value) -> Option<Value>| {
        let parts: Vec<Value> = samples.iter().filter_map(|sample| of(sample)).collect();
        parts.len() < samples.len() || differ_in_kind(&parts.iter().collect::<Vec<_>>())
    };
    match first {
        Value::Array(array) => {
            samples.iter().any(|other| !matches!(other, Value::Array(other) if other.dtype() == array.dtype()))
        }
        Value::List(values) | Value::Tuple(values) => (0..values.len()).any(|at| {
            inner(&|sample| match sample {
                Value::List(values) | Value::Tuple(values) => values.get(at).cloned(),
                _ => None,
            })
        }),
        Value::Map(entries) => {
            let len = |sample: &&Value| matches!(sample, Value::Map(others) if others.len() != entries.len());
            samples.iter().any(len) || entries.iter().any(|(name, _)| inner(&|sample| sample.get(name).cloned()))
        }
        _ => false,
    }
}

#[test]
#[ignore = "lane torch: scripts/test torch"]
fn random_samples_are_collated_as_torch_does() {
    let mut rng = Rng::new(&[20_26]);
    let batches: Vec<Vec<Value>> = (0..BATCHES)
        .map(|number| {
            let first = value(&mut rng, 3);
            let change = [0.0, 0.05, 0.3][(number % 3) as usize];
            let rest: Vec<Value> = (0..rng.below(4)).map(|_| alike(&mut rng, &first, change)).collect();
            std::iter::once(first).chain(rest).collect()
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("batches");
    let lines: String =
        batches.iter().map(|batch| format!("{}\n", json!(batch.iter().map(told).collect::<Vec<_>>()))).collect();
    std::fs::write(&path, lines).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/torch/collate.py");
    let output = Command::new(super::python())
        .arg(script)
        .stdin(std::fs::File::open(&path).unwrap())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    let answers: Vec<Json> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), batches.len());

    let (mut same, mut refused, mut stricter) = (0, 0, 0);
    for (batch, torch) in batches.into_iter().zip(answers) {
        let indices: Vec<u64> = (0..batch.len() as u64).collect();
        match Stack.collate(batch.clone(), &indices) {
            Ok(field) => {
                assert!(is_same(&field, &torch), "{batch:?}\nbecame {field:?}\nand in torch {torch}");
                same += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::Collate, "{error}");
                if torch["kind"] == "error" {
                    refused += 1;
                } else {
                    let samples: Vec<&Value> = batch.iter().collect();
                    assert!(differ_in_kind(&samples), "{error}: {batch:?}\nbecame in torch {torch}");
                    stricter += 1;
                }
            }
        }
    }
    println!("{same} the same, {refused} refused by both, {stricter} by one");
    assert!(same > 1500 && refused > 100 && stricter > 50, "{same} {refused} {stricter}");
}
