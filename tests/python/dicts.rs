//! Dictionaries as tensors: byte for byte what unifiedefficientloader makes, and read back the same.

use std::cell::RefCell;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use uel::{Kind, dict_to_tensor, tensor_to_dict};

use super::{Reference, runner};

impl Reference {
    /// The bytes of the tensor that the package makes of a dictionary given as JSON, or as a Python expression.
    fn dict(&mut self, how: &str, text: &str) -> Vec<u8> {
        let (answer, bytes) = self.ask(&json!({"op": "dict", how: text, "out": self.out.path()}));
        let by = if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            "unifiedefficientloader.tensor_utils"
        } else {
            "json" // the package cannot be installed there; the script calls what it calls
        };
        assert_eq!(answer["by"], by);
        bytes
    }

    /// Whether the package reads the dictionary `json` from a tensor of these bytes.
    fn reads(&mut self, bytes: &[u8], json: &str) -> bool {
        self.ask(&json!({"op": "undict", "bytes": bytes, "json": json})).0["same"] == true
    }
}

fn tensor(bytes: &[u8]) -> Tensor {
    Tensor::new(bytes, &Device::Cpu).unwrap()
}

fn float() -> impl Strategy<Value = f64> {
    let finite = |bits| f64::from_bits(bits);
    prop_oneof![
        any::<u64>().prop_map(finite).prop_filter("finite", |value| value.is_finite()),
        // Powers of two have neighbours at two distances, powers of ten change the notation.
        (-1074i32..1024).prop_map(|power| 2f64.powi(power)),
        (-320i32..309, -2i64..3).prop_map(|(power, ulps)| {
            let value: f64 = format!("1e{power}").parse().unwrap();
            f64::from_bits(value.to_bits().saturating_add_signed(ulps))
        }),
        any::<f32>().prop_filter("finite", |value| value.is_finite()).prop_map(f64::from),
        (-1000i32..1000).prop_map(|value| f64::from(value) / 100.),
        prop::sample::select(vec![0., -0., 1e16, 1e15, 9999999999999998., 1e-4, 1e-5, 1e-7, 1e22, 5e-324, f64::MAX]),
    ]
}

fn string() -> impl Strategy<Value = String> {
    let char = prop_oneof![
        4 => any::<char>(),
        4 => (0u8..128).prop_map(char::from),
        1 => prop::sample::select(vec!['"', '\\', '/', '\u{7f}', '\u{2028}', '\u{ffff}', '\u{10ffff}', 'é', '😀']),
    ];
    prop::collection::vec(char, 0..12).prop_map(String::from_iter)
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-100i64..100).prop_map(Value::from),
        float().prop_map(Value::from),
        string().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            dict(inner).prop_map(Value::from),
        ]
    })
}

/// Keys in the order in which they come, not sorted.
fn dict(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Map<String, Value>> {
    prop::collection::vec((string(), value), 0..6).prop_map(Map::from_iter)
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn dictionaries_are_byte_for_byte_the_packages() {
    let reference = RefCell::new(Reference::start());
    let result = runner(1000).run(&dict(value()), |dict| {
        let mut reference = reference.borrow_mut();
        let json = serde_json::to_string(&dict).unwrap();
        let theirs = reference.dict("json", &json);
        let ours: Vec<u8> = dict_to_tensor(&dict).unwrap().to_vec1().unwrap();
        prop_assert_eq!(String::from_utf8_lossy(&ours), String::from_utf8_lossy(&theirs));
        prop_assert!(reference.reads(&ours, &json));
        let read = tensor_to_dict(&tensor(&theirs)).unwrap();
        // As text, so that the order of the keys and the sign of zero count.
        prop_assert_eq!(serde_json::to_string(&read).unwrap(), json);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn what_only_python_has_becomes_json_or_is_refused() {
    let mut reference = Reference::start();
    let mut read = |python: &str| tensor_to_dict(&tensor(&reference.dict("python", python)));
    let keys = read("{3: 1, 2.5: 2, True: 3, None: 4, 'a': (5, 6)}").unwrap();
    assert_eq!(serde_json::to_string(&keys).unwrap(), r#"{"3":1,"2.5":2,"true":3,"null":4,"a":[5,6]}"#);
    let most = read("{'most': 2**64 - 1, 'least': -2**63, 'float': float(2**64)}").unwrap();
    assert_eq!(Value::from(most), json!({"most": u64::MAX, "least": i64::MIN, "float": 18446744073709551616.}));
    // Python has integers without end, and writes what is no JSON.
    assert_eq!(read("{'x': [2**64]}").unwrap_err().kind(), Kind::ValueRange);
    assert_eq!(read("{'x': -2**63 - 1}").unwrap_err().kind(), Kind::ValueRange);
    for value in ["float('nan')", "float('inf')", "-float('inf')", "'\\ud800'"] {
        assert_eq!(read(&format!("{{'x': {value}}}")).unwrap_err().kind(), Kind::Json, "{value}");
    }
    assert_eq!(read("[1, 2]").unwrap_err().kind(), Kind::JsonType);
}
