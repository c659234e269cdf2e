//! What pickles mean: those that torch wrote, and kinds of values one by one.

use super::*;
use crate::pytorch::contents::{Contents, Place, StorageRef, TensorSpec};
use crate::pytorch::pickle::assemble::*;
use crate::pytorch::pickle::unpickle;
use crate::{Dtype, Kind};
use serde_json::json;

pub(super) fn read_with(bytes: &[u8], options: &ContentsOptions<'_>) -> Result<Contents> {
    unpickle(bytes)?.0.contents(options)
}

pub(super) fn read(value: Vec<u8>) -> Contents {
    read_with(&pickle(value), &ContentsOptions::default()).unwrap()
}

pub(super) fn state_key(key: &str) -> ContentsOptions<'_> {
    ContentsOptions { state_key: Some(key), ..ContentsOptions::default() }
}

pub(super) fn storage(class: &str, key: &str, elements: i64) -> Vec<u8> {
    persistent(tuple(&[text("storage"), global("torch", class), text(key), text("cpu"), int(elements)]))
}

/// Arguments of `_rebuild_tensor_v2`.
fn arguments(storage: Vec<u8>, offset: i64, size: &[i64], stride: &[i64]) -> Vec<Vec<u8>> {
    let hooks = call(global("collections", "OrderedDict"), &[]);
    vec![storage, int(offset), ints(size), ints(stride), flag(false), hooks]
}

pub(super) fn rebuild(function: &str, args: &[Vec<u8>]) -> Vec<u8> {
    call(global("torch._utils", function), args)
}

pub(super) fn over(storage: Vec<u8>, offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    rebuild("_rebuild_tensor_v2", &arguments(storage, offset, size, stride))
}

/// Two floats in a storage of their own.
pub(super) fn two(key: &str) -> Vec<u8> {
    over(storage("FloatStorage", key, 2), 0, &[2], &[1])
}

pub(super) fn names(contents: &Contents) -> Vec<&str> {
    contents.tensors.iter().map(|tensor| tensor.name.as_str()).collect()
}

pub(super) fn only(contents: &Contents) -> &TensorSpec {
    assert_eq!(contents.tensors.len(), 1, "{contents:?}");
    &contents.tensors[0]
}

/// Why the only tensor cannot be read.
pub(super) fn why(value: Vec<u8>) -> String {
    let contents = read(value);
    assert!(contents.tensors.is_empty() && contents.unreadable.len() == 1, "{contents:?}");
    assert_eq!(contents.unreadable[0].name, "tensor");
    contents.unreadable[0].why.clone()
}

fn error(value: Vec<u8>) -> crate::Error {
    let error = read_with(&pickle(dict(&[("x", value)])), &ContentsOptions::default()).unwrap_err();
    assert_eq!(error.tensor(), Some("x"), "{error}");
    error
}

#[test]
fn a_module_that_torch_saved_has_the_names_of_its_state_dict() {
    let contents = read_with(fixtures::WHOLE_MODULE, &ContentsOptions::default()).unwrap();
    assert_eq!(names(&contents), ["b", "l.weight"]);
    let weight = &contents.tensors[1];
    assert_eq!((weight.dtype, &weight.shape[..], &weight.strides[..]), (Dtype::F32, &[1, 2][..], &[8, 4][..]));
    assert!(weight.parameter && weight.requires_grad);
    assert!(!contents.tensors[0].parameter && !contents.tensors[0].requires_grad);
    let values = json!({
        "__class__": "__main__.N", "training": true, "k": 3, "b": "<tensor b>",
        "l": {"__class__": "torch.nn.modules.linear.Linear", "training": true, "in_features": 2, "out_features": 1,
              "weight": "<tensor l.weight>"},
    });
    assert_eq!(contents.values, values);
    assert_eq!(names(&read_with(fixtures::WHOLE_MODULE, &state_key("l")).unwrap()), ["weight"]);
}

#[test]
fn a_script_module_has_the_names_of_its_attributes() {
    let contents = read_with(fixtures::SCRIPT, &ContentsOptions::default()).unwrap();
    assert_eq!(names(&contents), ["b", "skip", "l.weight"]);
    assert_eq!(contents.values["__class__"], "__torch__.N");
    assert_eq!(contents.values["k"], 3);
}

#[test]
fn views_share_their_storage() {
    let contents = read_with(fixtures::VIEWS, &ContentsOptions::default()).unwrap();
    assert_eq!(names(&contents), ["w", "t", "col"]);
    let storage = StorageRef {
        key: "0".to_owned(),
        dtype: Some(Dtype::F32),
        location: "cpu".to_owned(),
        elements: 6,
        element_bytes: 4,
        view: None,
    };
    assert_eq!(contents.storages, [storage]);
    let got: Vec<_> = contents.tensors.iter().map(|t| (&t.shape[..], &t.strides[..], t.place.clone())).collect();
    let place = |offset| Place::Storage { storage: 0, offset };
    assert_eq!(got[0], (&[2, 3][..], &[12, 4][..], place(0)));
    assert_eq!(got[1], (&[3, 2][..], &[4, 12][..], place(0)));
    assert_eq!(got[2], (&[2][..], &[12][..], place(4)));
}

#[test]
fn numpy_arrays_are_tensors_in_the_order_of_this_machine() {
    let contents = read_with(fixtures::NUMPY_5, &ContentsOptions::default()).unwrap();
    let array = only(&contents);
    assert_eq!((array.name.as_str(), array.dtype, array.swap), ("a", Dtype::I16, 2));
    assert_eq!((&array.shape[..], &array.strides[..]), (&[2, 2][..], &[2, 4][..]), "in Fortran's order");
    let numbers: Vec<u8> = [0_i16, 2, 1, 3].iter().flat_map(|number| number.to_ne_bytes()).collect();
    assert_eq!(contents.embedded, [numbers]);
    assert_eq!(array.place, Place::Embedded { bytes: 0 });
    assert_eq!(contents.values["s"], 0.5);
}

fn array(code: &str, shape: &[i64], raw: Vec<u8>) -> Vec<u8> {
    let dtype = call(global("numpy", "dtype"), &[text(&code[1..]), int(0), int(1)]);
    let dtype = build(dtype, tuple(&[int(3), text(&code[..1]), none(), none(), none(), int(-1), int(-1), int(0)]));
    let empty =
        call(global("numpy.core.multiarray", "_reconstruct"), &[global("numpy", "ndarray"), ints(&[0]), bytes(b"b")]);
    build(empty, tuple(&[int(1), ints(shape), dtype, flag(false), raw]))
}

#[test]
fn numpy_arrays_of_older_protocols() {
    let latin = |raw: &str| call(global("_codecs", "encode"), &[text(raw), text("latin1")]);
    let contents = read(list(&[
        array("<i2", &[2], latin("\u{80}a\u{ff}\0")),
        array("<c16", &[1], bytes(&[7; 16])),
        array(">c8", &[1], bytes(&[1, 2, 3, 4, 5, 6, 7, 8])),
        array("|b1", &[], bytes(&[1])),
        put(array("<f8", &[0, 3], bytes(&[])), 1),
        get(1),
    ]));
    assert_eq!(names(&contents), ["0", "1", "2", "3", "4", "5"]);
    assert_eq!(contents.embedded[0], [0x80, b'a', 0xff, 0]);
    assert_eq!((contents.tensors[1].dtype, &contents.tensors[1].shape[..]), (Dtype::F64, &[1, 2][..]));
    if cfg!(target_endian = "little") {
        assert_eq!(contents.embedded[2], [4, 3, 2, 1, 8, 7, 6, 5]);
    }
    assert_eq!(contents.tensors[3].shape, [0; 0]);
    assert_eq!(contents.embedded.len(), 5, "an array that is shared has its bytes once");
    // Arrays of text and of objects are no tensors, but what is in them counts.
    let contents = read(array("|O8", &[2], list(&[text("a"), two("0")])));
    assert_eq!(names(&contents), ["__state__.4.1"]);
    assert_eq!(error(array("<f4", &[3], bytes(&[0; 8]))).kind(), Kind::SizeMismatch);
    assert_eq!(error(array("<f4", &[1 << 40, 1 << 40], bytes(&[]))).kind(), Kind::Overflow);
}

#[test]
fn quantised_tensors_are_integers_with_scales_beside_them() {
    let contents = read_with(fixtures::QUANTIZED, &ContentsOptions::default()).unwrap();
    assert_eq!(names(&contents), ["tensor", "tensor.scales", "tensor.zero_points"]);
    let dtypes: Vec<_> = contents.tensors.iter().map(|tensor| tensor.dtype).collect();
    assert_eq!(dtypes, [Dtype::I8, Dtype::F32, Dtype::F32]);
    assert_eq!(contents.values["axis"], 0);
    let scheme = tuple(&[global("torch", "per_tensor_affine"), float(0.1), int(3)]);
    let mut args = arguments(storage("QUInt8Storage", "0", 2), 0, &[2], &[1]);
    args.insert(4, scheme);
    let contents = read(dict(&[("q", rebuild("_rebuild_qtensor", &args))]));
    assert_eq!((only(&contents).name.as_str(), only(&contents).dtype), ("q", Dtype::U8));
    let values = json!({"__class__": "quantized tensor", "__tensor__": "<tensor q>", "qscheme": "torch.per_tensor_affine",
                        "scale": 0.1, "zero_point": 3});
    assert_eq!(contents.values["q"], values);
}

#[test]
fn sparse_and_nested_tensors_are_their_parts() {
    let contents = read_with(fixtures::CSR, &ContentsOptions::default()).unwrap();
    assert_eq!(names(&contents), ["m.crow_indices", "m.col_indices", "m.values"]);
    assert_eq!(contents.values["m"]["size"], json!([2, 2]));
    let layout = call(global("torch.serialization", "_get_layout"), &[text("torch.sparse_coo")]);
    let size = call(global("torch", "Size"), &[ints(&[2])]);
    let coo = rebuild("_rebuild_sparse_tensor", &[layout, tuple(&[two("0"), two("1"), size, flag(true)])]);
    let contents = read(dict(&[("m", coo)]));
    assert_eq!(names(&contents), ["m.indices", "m.values"]);
    assert_eq!((&contents.values["m"]["coalesced"], &contents.values["m"]["size"]), (&json!(true), &json!([2])));
    let nested = rebuild("_rebuild_nested_tensor", &[two("0"), two("1"), two("2"), two("3")]);
    assert_eq!(names(&read(nested)), ["tensor.values", "tensor.sizes", "tensor.strides", "tensor.storage_offsets"]);
}

#[test]
fn every_dtype() {
    for (class, dtype, bytes, swap) in [
        ("FloatStorage", Dtype::F32, 4, 4),
        ("BFloat16Storage", Dtype::Bf16, 2, 2),
        ("BoolStorage", Dtype::Bool, 1, 1),
        ("LongStorage", Dtype::I64, 8, 8),
        ("ComplexFloatStorage", Dtype::C64, 8, 4),
    ] {
        let contents = read(over(storage(class, "0", 9), 1, &[2, 3], &[1, 2]));
        let tensor = only(&contents);
        assert_eq!((tensor.dtype, tensor.swap, &tensor.shape[..]), (dtype, swap, &[2, 3][..]));
        assert_eq!(
            (&tensor.strides[..], &tensor.place),
            (&[bytes, 2 * bytes][..], &Place::Storage { storage: 0, offset: bytes })
        );
    }
    let contents = read(over(storage("ComplexDoubleStorage", "0", 9), 1, &[2], &[3]));
    let tensor = only(&contents);
    assert_eq!(
        (tensor.dtype, tensor.swap, &tensor.shape[..], &tensor.strides[..]),
        (Dtype::F64, 8, &[2, 2][..], &[48, 8][..])
    );
    let typed = |dtype: &str, bytes, size: &[i64], stride: &[i64]| {
        let storage = persistent(tuple(&[
            text("storage"),
            global("torch.storage", "UntypedStorage"),
            text("0"),
            text("cpu"),
            int(bytes),
        ]));
        let mut args = arguments(storage, 0, size, stride);
        args.push(global("torch", dtype));
        rebuild("_rebuild_tensor_v3", &args)
    };
    for (name, dtype, bytes) in [
        ("float8_e4m3fn", Dtype::F8E4M3, 1),
        ("float8_e8m0fnu", Dtype::F8E8M0, 1),
        ("uint16", Dtype::U16, 2),
        ("uint64", Dtype::U64, 8),
    ] {
        let contents = read(typed(name, 2 * bytes, &[2], &[1]));
        assert_eq!((only(&contents).dtype, only(&contents).strides[0]), (dtype, bytes as u64));
        assert_eq!((contents.storages[0].dtype, contents.storages[0].element_bytes), (None, 1));
        assert_eq!(error(typed(name, 2 * bytes - 1, &[2], &[1])).kind(), Kind::SizeMismatch);
    }
    let contents = read(typed("complex32", 8, &[2], &[1]));
    assert_eq!(
        (only(&contents).dtype, &only(&contents).shape[..], &only(&contents).strides[..]),
        (Dtype::F16, &[2, 2][..], &[4, 2][..])
    );
    let contents = read(typed("float4_e2m1fn_x2", 6, &[2, 3], &[3, 1]));
    assert_eq!(
        (only(&contents).dtype, &only(&contents).shape[..], &only(&contents).strides[..]),
        (Dtype::F4, &[2, 6][..], &[3, 1][..])
    );
    assert!(why(typed("float4_e2m1fn_x2", 6, &[3, 2], &[1, 3])).contains("two elements of a byte"));
    assert!(why(typed("int4", 6, &[2], &[1])).contains("fewer than 8 bits"));
    assert!(why(typed("float7", 6, &[2], &[1])).contains("torch.float7"));
    assert!(why(over(storage("QUInt4x2Storage", "0", 9), 0, &[2], &[1])).contains("several elements"));
}

#[test]
fn wrappers_are_taken_off() {
    let state = dict(&[("note", text("n")), ("extra", two("1"))]);
    let hooks = || call(global("collections", "OrderedDict"), &[]);
    let parameter = rebuild("_rebuild_parameter", &[two("0"), flag(true), hooks()]);
    let contents = read(parameter.clone());
    assert!(only(&contents).parameter && only(&contents).requires_grad);
    let with_state = rebuild("_rebuild_parameter_with_state", &[two("0"), flag(false), hooks(), state.clone()]);
    let contents = read(dict(&[("p", with_state)]));
    assert_eq!(names(&contents), ["p", "p.extra"]);
    assert!(contents.tensors[0].parameter && !contents.tensors[0].requires_grad);
    assert_eq!(contents.values["p"]["note"], "n");
    let subclass = call(
        global("torch._tensor", "_rebuild_from_type_v2"),
        &[
            global("torch._utils", "_rebuild_tensor_v2"),
            global("my", "Tensor"),
            tuple(&arguments(storage("FloatStorage", "0", 2), 0, &[2], &[1])),
            state,
        ],
    );
    assert_eq!(names(&read(dict(&[("t", subclass)]))), ["t", "t.extra"]);
    let from_cpu = |dtype| {
        rebuild(
            "_rebuild_device_tensor_from_cpu_tensor",
            &[two("0"), global("torch", dtype), text("xla:0"), flag(false)],
        )
    };
    assert_eq!(only(&read(from_cpu("float32"))).dtype, Dtype::F32);
    assert!(why(from_cpu("bfloat16")).contains("stored as F32"));
    let array = array("<f4", &[1], bytes(&[0; 4]));
    let xla = rebuild("_rebuild_xla_tensor", &[array, global("torch", "float32"), text("xla:0"), flag(false)]);
    assert_eq!(only(&read(xla)).place, Place::Embedded { bytes: 0 });
}

/// As torch before 0.4 wrote tensors and variables.
#[test]
fn instances_of_tensor_classes() {
    let state = || tuple(&[storage("FloatStorage", "0", 6), int(1), ints(&[2]), ints(&[2])]);
    let tensor = || build(call(global("torch", "FloatTensor"), &[]), state());
    assert_eq!(only(&read(tensor())).strides, [8]);
    let parameter = call(global("torch.nn.parameter", "Parameter"), &[tensor(), flag(false)]);
    let contents = read(parameter);
    assert!(only(&contents).parameter && !only(&contents).requires_grad);
    let empty = call(global("torch.nn.parameter", "Parameter"), &[]);
    let variable = build(empty, tuple(&[tensor(), none(), none(), flag(true), none()]));
    assert!(only(&read(variable)).requires_grad);
}

#[test]
fn what_cannot_be_read_says_why_and_what_stands_beside_it_is_read() {
    let meta =
        rebuild("_rebuild_meta_tensor_no_storage", &[global("torch", "float32"), ints(&[2]), ints(&[1]), flag(false)]);
    assert!(why(meta).contains("meta device"));
    let mut conjugated = arguments(storage("ComplexFloatStorage", "0", 2), 0, &[2], &[1]);
    conjugated.push(dict(&[("conj", flag(true))]));
    assert!(why(rebuild("_rebuild_tensor_v2", &conjugated)).contains("conjugating"));
    let within = call(global("torch.storage", "_load_from_bytes"), &[bytes(b"PK")]);
    assert!(why(within.clone()).contains("within the pickle"));
    assert!(why(over(within, 0, &[2], &[1])).contains("within the pickle"));
    let made = call(global("my", "make"), &[]);
    assert!(why(over(made.clone(), 0, &[2], &[1])).contains("its storage"));
    assert!(why(rebuild("_rebuild_parameter", &[made, flag(true), none()])).contains("my.make"));
    let wrapper = |state| {
        let inner = tuple(&[
            global("my", "Wrapped"),
            global("torch", "float32"),
            ints(&[2]),
            ints(&[1]),
            int(0),
            none(),
            none(),
            flag(false),
        ]);
        let function = global("torch._utils", "_rebuild_wrapper_subclass");
        call(global("torch._tensor", "_rebuild_from_type_v2"), &[function, global("my", "Wrapped"), inner, state])
    };
    let contents = read(dict(&[("w", wrapper(dict(&[("inner", two("0"))]))), ("b", two("1"))]));
    assert_eq!(names(&contents), ["w.inner", "b"]);
    assert_eq!(contents.unreadable[0].name, "w");
    assert!(contents.unreadable[0].why.contains("my.Wrapped"));
    let evil = call(global("os", "system"), &[text("true"), two("0")]);
    let contents = read(dict(&[("evil", evil), ("w", two("1"))]));
    assert_eq!(names(&contents), ["evil.1", "w"]);
    assert_eq!(contents.values["evil"]["__class__"], "os.system");
}

#[test]
fn tensors_that_contradict_themselves_are_errors_with_their_name() {
    let float = || storage("FloatStorage", "0", 6);
    for (offset, size, stride, kind) in [
        (0, &[7][..], &[1][..], Kind::SizeMismatch),
        (1, &[2, 3], &[3, 1], Kind::SizeMismatch),
        (6, &[], &[], Kind::SizeMismatch),
        (-1, &[1], &[1], Kind::Pickle),
        (0, &[-1], &[1], Kind::Pickle),
        (0, &[1], &[-1], Kind::Pickle),
        (0, &[1, 1], &[1], Kind::ShapeMismatch),
        (i64::MAX, &[2], &[1], Kind::Overflow),
        (0, &[i64::MAX, 2], &[i64::MAX, 1], Kind::Overflow),
        (0, &[i64::MAX, i64::MAX], &[0, 0], Kind::Overflow),
        (0, &[1; 65], &[1; 65], Kind::Limit),
    ] {
        let error = error(over(float(), offset, size, stride));
        assert_eq!(error.kind(), kind, "{offset} {size:?} {stride:?}: {error}");
    }
    assert_eq!(error(over(storage("FloatStorage", "0", i64::MAX), 0, &[1], &[1])).kind(), Kind::Overflow);
    assert_eq!(error(rebuild("_rebuild_tensor_v2", &[float()])).kind(), Kind::Pickle);
    let complex = over(storage("ComplexDoubleStorage", "0", 9), 0, &[1; 64], &[1; 64]);
    assert_eq!(error(complex).kind(), Kind::Limit, "its pairs are a 65th dimension");
}

#[test]
fn empty_and_expanded_tensors_need_little_storage() {
    let empty = read(over(storage("FloatStorage", "0", 0), 5, &[0, 3], &[3, 1]));
    assert_eq!((only(&empty).shape.len(), &only(&empty).place), (2, &Place::Storage { storage: 0, offset: 0 }));
    // 17.6 TB of the same four bytes are for the caller to judge.
    let wide = read(over(storage("FloatStorage", "0", 1), 0, &[1 << 21, 1 << 21], &[0, 0]));
    assert_eq!((&only(&wide).shape[..], &only(&wide).strides[..]), (&[1 << 21, 1 << 21][..], &[0, 0][..]));
    let one = read(over(storage("FloatStorage", "0", 1), 0, &[1], &[i64::MAX]));
    assert_eq!(only(&one).shape, [1], "the stride of a dimension of one is never used");
}
