//! Storages, the names of tensors, and the values around them.

use super::tests::{names, only, over, read, read_with, rebuild, state_key, storage, two, why};
use super::*;
use crate::pytorch::contents::Place;
use crate::pytorch::pickle::assemble::*;
use crate::{Dtype, Kind};
use serde_json::json;

#[test]
fn storages_alone_and_views_of_them() {
    let contents = read(dict(&[("s", storage("HalfStorage", "7", 5))]));
    assert_eq!(
        (only(&contents).dtype, &only(&contents).shape[..], only(&contents).name.as_str()),
        (Dtype::F16, &[5][..], "s")
    );
    let view = |view: Vec<u8>| {
        persistent(tuple(&[text("storage"), global("torch", "FloatStorage"), int(77), text("cpu"), int(10), view]))
    };
    let contents = read(list(&[
        over(view(none()), 9, &[1], &[1]),
        over(view(tuple(&[text("v"), int(4), int(6)])), 5, &[1], &[1]),
        over(view(tuple(&[text("v"), int(4), int(6)])), 0, &[6], &[1]),
    ]));
    assert_eq!(contents.storages.len(), 2);
    assert_eq!((contents.storages[0].key.as_str(), contents.storages[0].elements), ("77", 10));
    assert_eq!((contents.storages[1].key.as_str(), contents.storages[1].elements), ("v", 6));
    let root = StorageView { root: "77".to_owned(), offset: 4, elements: 10 };
    assert_eq!(contents.storages[1].view, Some(root));
    assert!(why(over(view(tuple(&[text("v"), int(5), int(6)])), 0, &[1], &[1])).contains("persistent id"));
    let meta = persistent(tuple(&[text("storage"), global("torch", "FloatStorage"), text("0"), text("meta"), int(2)]));
    assert!(why(over(meta, 0, &[2], &[1])).contains("meta device"));
}

#[test]
fn tensors_that_tar_files_describe_outside() {
    let outside = |key: &str| {
        (key == "5").then(|| OutsideTensor {
            storage_class: "DoubleStorage".to_owned(),
            storage: "9".to_owned(),
            location: "cpu".to_owned(),
            elements: 6,
            view: None,
            storage_offset: 2,
            size: vec![2],
            stride: vec![1],
        })
    };
    let options = ContentsOptions { tensors: Some(&outside), ..ContentsOptions::default() };
    let parameter = rebuild("_rebuild_parameter", &[persistent(int(5)), flag(true), none()]);
    let bytes = pickle(dict(&[("t", persistent(text("5"))), ("p", parameter)]));
    let contents = read_with(&bytes, &options).unwrap();
    assert_eq!(names(&contents), ["t", "p"]);
    assert_eq!((contents.storages.len(), contents.tensors[0].dtype), (1, Dtype::F64));
    assert_eq!(contents.tensors[1].place, Place::Storage { storage: 0, offset: 16 });
    assert!(contents.tensors[1].parameter);
}

#[test]
fn names_follow_the_nesting() {
    let ordered = call(global("collections", "OrderedDict"), &[list(&[list(&[text("o"), two("0")])])]);
    let ordered = build(ordered, dict(&[("_metadata", dict(&[("", dict(&[("version", int(1))]))]))]));
    let object =
        build(b"cargparse\nNamespace\n)\x81".to_vec(), tuple(&[dict(&[("a", two("1"))]), dict(&[("slot", two("2"))])]));
    let default = call(global("collections", "defaultdict"), &[global("builtins", "list")]);
    let default = [default, text("d"), two("3"), b"s".to_vec()].concat();
    let set = call(global("__builtin__", "set"), &[list(&[int(1)])]);
    let keys =
        [b"}(".to_vec(), int(3), two("4"), flag(true), two("5"), tuple(&[int(1), text("x")]), two("6"), b"u".to_vec()]
            .concat();
    let twice = dict(&[("k", int(1)), ("other", int(2)), ("k", two("7"))]);
    let contents = read(dict(&[
        ("ordered", ordered),
        ("object", object),
        ("default", default),
        ("set", set),
        ("keys", keys),
        ("list", list(&[int(1), tuple(&[two("8")])])),
        ("twice", twice),
        ("module.x", two("9")),
    ]));
    let expected = [
        "ordered.o",
        "object.a",
        "object.slot",
        "default.d",
        "keys.3",
        "keys.True",
        "keys.(1, x)",
        "list.1.0",
        "twice.k",
        "module.x",
    ];
    assert_eq!(names(&contents), expected);
    assert_eq!(contents.values["ordered"]["_metadata"], json!({"": {"version": 1}}));
    assert_eq!(contents.values["set"], json!([1]));
    assert_eq!(contents.values["twice"], json!({"k": "<tensor twice.k>", "other": 2}));
    assert_eq!(contents.values["list"], json!([1, ["<tensor list.1.0>"]]));
}

#[test]
fn values_that_are_no_tensors() {
    let contents = read(dict(&[
        ("nan", float(f64::NAN)),
        ("inf", float(f64::NEG_INFINITY)),
        ("big", b"L36893488147419103232L\n".to_vec()),
        ("u64", b"L18446744073709551615L\n".to_vec()),
        ("bytes", bytes(b"abc")),
        ("none", none()),
        ("dtype", global("torch", "bfloat16")),
        ("device", call(global("torch", "device"), &[text("cuda"), int(1)])),
        ("size", call(global("torch", "Size"), &[ints(&[2, 3])])),
        ("complex", call(global("builtins", "complex"), &[float(1.5), float(-2.0)])),
        ("path", call(global("pathlib", "PosixPath"), &[text("/"), text("a")])),
        ("bytearray", call(global("builtins", "bytearray"), &[bytes(b"ab")])),
        ("list", call(global("torch.jit._pickle", "build_intlist"), &[list(&[int(1)])])),
    ]));
    let values = json!({
        "nan": "NaN", "inf": "-Infinity", "big": "36893488147419103232", "u64": "18446744073709551615", "bytes": "<3 bytes>",
        "none": null, "dtype": "torch.bfloat16", "device": "cuda:1", "size": [2, 3], "complex": "1.5-2j",
        "path": {"__class__": "pathlib.PosixPath", "__args__": ["/", "a"]}, "bytearray": "<2 bytes>", "list": [1],
    });
    assert_eq!(contents.values, values);
    assert!(contents.tensors.is_empty());
}

#[test]
fn a_state_key_leads_to_what_is_read() {
    let inner = dict(&[("w", two("0")), ("x.y", dict(&[("z", two("1"))]))]);
    let bytes = pickle(dict(&[("model", dict(&[("net", inner)])), ("list", list(&[two("2")])), ("model.net", int(1))]));
    let read = |key| read_with(&bytes, &state_key(key));
    assert_eq!(names(&read("model").unwrap()), ["net.w", "net.x.y.z"]);
    assert_eq!(names(&read("model.net.x.y").unwrap()), ["z"], "though there is a key of the first two parts");
    assert_eq!(names(&read("list.0").unwrap()), ["tensor"]);
    let error = read("optimizer").unwrap_err();
    assert_eq!((error.kind(), error.got()), (Kind::UnknownTensor, Some("optimizer")));
    assert_eq!(error.expected(), Some("a path that begins with one of model, list, model.net"));
    assert_eq!(read("list.0.x").unwrap_err().kind(), Kind::UnknownTensor);
}

#[test]
fn two_tensors_of_one_name_are_refused_with_both_places() {
    let bytes = pickle(dict(&[("a.b", two("0")), ("a", dict(&[("b", two("1"))])), ("c", two("2"))]));
    let error = read_with(&bytes, &ContentsOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.tensor()), (Kind::NameCollision, Some("a.b")));
    assert_eq!(error.got(), Some(r#"["a.b"] and ["a"]["b"]"#));
    assert!(error.message().contains("state_key"));
    assert_eq!(names(&read_with(&bytes, &state_key("a")).unwrap()), ["b"]);
}
