//! Faults of the JSON text, of the types of its values, and of what stands twice or is not defined.

use super::{Corpus, all, one, tensor};
use uel_core::Kind;

pub(super) fn add(corpus: &mut Corpus) {
    syntax(corpus);
    strings(corpus);
    depth(corpus);
    numbers(corpus);
    types(corpus);
    fields(corpus);
    names(corpus);
    metadata(corpus);
}

/// A header of one tensor with these values of its fields, each JSON text.
fn with(dtype: &str, shape: &str, offsets: &str) -> String {
    one(&format!(r#"{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}"#))
}

fn shape(shape: &str) -> String {
    with("\"F32\"", shape, "[0,4]")
}

fn offsets(offsets: &str) -> String {
    with("\"F32\"", "[1]", offsets)
}

fn syntax(corpus: &mut Corpus) {
    let tensor = tensor("a", "F32", "[1]", 0, 4);
    for (name, json) in [
        ("an open brace", "{".to_owned()),
        ("no closing brace", format!("{{{tensor}")),
        ("a comma alone", "{,}".to_owned()),
        ("a comma before the brace", format!("{{{tensor},}}")),
        ("a comma first", format!("{{,{tensor}}}")),
        ("two commas", format!("{{{tensor},,\"__metadata__\":{{}}}}")),
        ("no comma", format!("{{{tensor}\"__metadata__\":{{}}}}")),
        ("no colon", format!("{{{}}}", tensor.replace("\"a\":", "\"a\""))),
        ("a semicolon", format!("{{{}}}", tensor.replace("\"a\":", "\"a\";"))),
        ("single quotes", format!("{{{}}}", tensor.replace('"', "'"))),
        ("a name without quotes", format!("{{{}}}", tensor.replace("\"a\"", "a"))),
        ("a number for a name", format!("{{{}}}", tensor.replace("\"a\"", "1"))),
        ("a comment", format!("{{/* */{tensor}}}")),
        ("a comma behind the last dimension", shape("[1,]")),
        ("a comma before the first dimension", shape("[,1]")),
        ("a bracket closed by a brace", shape("[1}")),
        ("a comma behind the last field", one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4],}"#)),
        ("a word cut short", shape("[nul]")),
        ("a word too long", shape("truee")),
        ("not a number", shape("[NaN]")),
        ("infinity", shape("[Infinity]")),
    ] {
        corpus.refused(name, Kind::Json, json, 4);
    }
}

fn strings(corpus: &mut Corpus) {
    let named = |name: &str| all(&[tensor(name, "F32", "[1]", 0, 4)]);
    for (name, json) in [
        ("a name without end", "{\"a".to_owned()),
        ("a long name without end", format!("{{\"{}", "a".repeat(1 << 20))),
        ("a backslash at the end", "{\"a\\".to_owned()),
        ("a line end in a name", named("a\nb")),
        ("a tab in a name", named("a\tb")),
        ("a zero byte in a name", named("a\0b")),
        ("the last control character in a name", named("0123456789\u{1f}")),
        ("an unknown escape", named("\\x41")),
        ("an escape of three digits", named("\\u123")),
        ("an escape with a sign", named("\\u+041")),
        ("an escape in braces", named("\\u{41}")),
        ("a high surrogate alone", named("\\ud83d")),
        ("a high surrogate before a letter", named("\\ud83dx")),
        ("a high surrogate before another escape", named("\\ud83d\\u0041")),
        ("a high surrogate twice", named("\\ud83d\\ud83d")),
        ("a low surrogate alone", named("\\ude00")),
        ("surrogates in the wrong order", named("\\ude00\\ud83d")),
    ] {
        corpus.refused(name, Kind::Json, json, 4);
    }
    corpus.accepted("a surrogate pair", named("\\ud83d\\ude00"), 4);
    corpus.accepted("escapes of all kinds", named("\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\u00E9\\uFFFF"), 4);
    corpus.accepted("delete is no control character", named("a\u{7f}"), 4);
    corpus.accepted("a dtype with escapes", with("\"\\u0046\\u0033\\u0032\"", "[1]", "[0,4]"), 4);
    corpus.accepted("a field with escapes", shape("[1]").replace("dtype", "dt\\u0079pe"), 4);
}

fn depth(corpus: &mut Corpus) {
    let deep = |open: &str| open.repeat(100_000);
    corpus.refused("arrays 100,000 deep for a tensor", Kind::JsonDepth, one(&deep("[")), 4);
    corpus.refused("objects 100,000 deep for a tensor", Kind::Json, one(&deep("{")), 4);
    corpus.refused("named objects 100,000 deep", Kind::JsonDepth, shape(&deep("{\"a\":")), 4);
    corpus.refused("a shape 100,000 deep", Kind::JsonDepth, shape(&deep("[")), 4);
    corpus.refused("offsets 100,000 deep", Kind::JsonDepth, offsets(&deep("[")), 4);
    corpus.refused("metadata 100,000 deep", Kind::JsonDepth, format!("{{\"__metadata__\":{{\"a\":{}", deep("[")), 0);
    let unknown = |levels: usize| {
        let value = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        shape("[1]").replace("\"dtype\"", &format!("\"x\":{value},\"dtype\""))
    };
    corpus.stricter("unknown-field", "an unknown field 50 deep", Kind::UnknownField, unknown(50), 4);
    corpus.refused("an unknown field 1000 deep", Kind::JsonDepth, unknown(1000), 4);
}

fn numbers(corpus: &mut Corpus) {
    for (name, number, kind) in [
        ("a dimension of -1", "-1", Kind::JsonType),
        ("a dimension of -0", "-0", Kind::JsonType),
        ("a dimension of 1.0", "1.0", Kind::JsonType),
        ("a dimension of 1e0", "1e0", Kind::JsonType),
        ("a dimension of 1E+2", "1E+2", Kind::JsonType),
        ("a dimension of 1e400", "1e400", Kind::JsonType),
        ("a dimension of 01", "01", Kind::Json),
        ("a dimension of 00", "00", Kind::Json),
        ("a dimension of +1", "+1", Kind::Json),
        ("a dimension of 0x1", "0x1", Kind::Json),
        ("a dimension of .5", ".5", Kind::Json),
        ("a dimension of 1.", "1.", Kind::Json),
        ("a dimension of 1e", "1e", Kind::Json),
        ("a dimension of 1_000", "1_000", Kind::Json),
        ("a minus alone", "-", Kind::Json),
        ("a dimension in other digits", "\u{661}", Kind::Json),
        ("a dimension of 2^64", "18446744073709551616", Kind::Overflow),
        ("a dimension of 10^19 + 1", "10000000000000000001", Kind::Overflow),
        ("a dimension of 2^64 - 1", "18446744073709551615", Kind::Overflow),
    ] {
        corpus.refused(name, kind, shape(&format!("[{number}]")), 4);
    }
    corpus.refused("a dimension of a million digits", Kind::Overflow, shape(&format!("[{}]", "9".repeat(1 << 20))), 4);
    corpus.refused("an offset of -4", Kind::JsonType, offsets("[-4,0]"), 4);
    corpus.refused("an offset of 4.0", Kind::JsonType, offsets("[0,4.0]"), 4);
    corpus.refused("an offset of 04", Kind::Json, offsets("[0,04]"), 4);
    corpus.refused("an offset of 2^64", Kind::Overflow, offsets("[0,18446744073709551616]"), 4);
    corpus.refused("an offset of 2^64 + 4", Kind::Overflow, offsets("[0,18446744073709551620]"), 4);
}

fn types(corpus: &mut Corpus) {
    for (name, json) in [
        ("a string for a tensor", one("\"F32\"")),
        ("a number for a tensor", one("4")),
        ("null for a tensor", one("null")),
        ("an empty array for a tensor", one("[]")),
        ("a number for a dtype", with("32", "[1]", "[0,4]")),
        ("null for a dtype", with("null", "[1]", "[0,4]")),
        ("an array for a dtype", with("[\"F32\"]", "[1]", "[0,4]")),
        ("an object with a value for a dtype", with("{\"F32\":1}", "[1]", "[0,4]")),
        ("null for a shape", shape("null")),
        ("a number for a shape", shape("1")),
        ("a string for a shape", shape("\"[1]\"")),
        ("an object for a shape", shape("{}")),
        ("an array in a shape", shape("[[1]]")),
        ("a string in a shape", shape("[\"1\"]")),
        ("null in a shape", shape("[null]")),
        ("a boolean in a shape", shape("[true]")),
        ("null for offsets", offsets("null")),
        ("a number for offsets", offsets("4")),
        ("an object for offsets", offsets("{\"0\":0,\"1\":4}")),
        ("no offsets", offsets("[]")),
        ("one offset", offsets("[4]")),
        ("three offsets", offsets("[0,4,4]")),
        ("a hundred thousand offsets", offsets(&format!("[0{}]", ",4".repeat(100_000)))),
        ("strings for offsets", offsets("[\"0\",\"4\"]")),
        ("null for an offset", offsets("[0,null]")),
    ] {
        corpus.refused(name, Kind::JsonType, json, 4);
    }
    let array = one(r#"["F32",[1],[0,4]]"#);
    corpus.stricter("tensor-as-array", "an array for a tensor", Kind::JsonType, array, 4);
    let object = with("{\"F32\":null}", "[1]", "[0,4]");
    corpus.stricter("dtype-as-object", "an object for a dtype", Kind::JsonType, object, 4);
    for (name, dtype) in [
        ("an unknown dtype", "F31"),
        ("a dtype in lower case", "f32"),
        ("an empty dtype", ""),
        ("a dtype with a space", "F32 "),
        ("a dtype of a later version", "F2"),
        ("a dtype of torch", "torch.float32"),
    ] {
        corpus.refused(name, Kind::UnknownDtype, with(&format!("{dtype:?}"), "[1]", "[0,4]"), 4);
    }
    let long = with(&format!("{:?}", "F".repeat(1 << 20)), "[1]", "[0,4]");
    corpus.refused("a dtype of a megabyte", Kind::UnknownDtype, long, 4);
}

fn fields(corpus: &mut Corpus) {
    let (dtype, dims, span) = ("\"dtype\":\"F32\"", "\"shape\":[1]", "\"data_offsets\":[0,4]");
    let object = |fields: &[&str]| one(&format!("{{{}}}", fields.join(",")));
    corpus.accepted("fields in another order", object(&[span, dims, dtype]), 4);
    corpus.refused("no fields", Kind::MissingField, object(&[]), 4);
    corpus.refused("no dtype", Kind::MissingField, object(&[dims, span]), 4);
    corpus.refused("no shape", Kind::MissingField, object(&[dtype, span]), 4);
    corpus.refused("no data_offsets", Kind::MissingField, object(&[dtype, dims]), 4);
    for (name, twice) in [("dtype twice", dtype), ("shape twice", dims), ("data_offsets twice", span)] {
        corpus.refused(name, Kind::DuplicateKey, object(&[dtype, dims, span, twice]), 4);
    }
    let unknown = object(&[dtype, dims, "\"strides\":[1]", span]);
    corpus.stricter("unknown-field", "an unknown field", Kind::UnknownField, unknown, 4);
    let cased = object(&[dtype, dims, span, "\"Shape\":[1]"]);
    corpus.stricter("unknown-field", "a field in another case", Kind::UnknownField, cased, 4);
}

fn names(corpus: &mut Corpus) {
    const REASON: &str = "duplicate-name";
    let first = tensor("a", "F32", "[1]", 0, 4);
    let twice = |second: String| all(&[first.clone(), second]);
    let same = twice(first.clone());
    corpus.stricter(REASON, "a name twice with the same span", Kind::DuplicateName, same, 4);
    let other = all(&[tensor("a", "F32", "[1]", 4, 8), first.clone()]);
    corpus.stricter(REASON, "a name twice, the last one fits", Kind::DuplicateName, other, 4);
    let escaped = twice(tensor("\\u0061", "F32", "[1]", 0, 4));
    corpus.stricter(REASON, "a name twice, once with escapes", Kind::DuplicateName, escaped, 4);
    let dtypes = twice(tensor("a", "I32", "[1]", 0, 4));
    corpus.stricter(REASON, "a name twice with two dtypes", Kind::DuplicateName, dtypes, 4);
    let both = twice(tensor("a", "F32", "[1]", 4, 8));
    corpus.refused("a name twice, both needed", Kind::DuplicateName, both, 8);
    let many = all(&vec![first.clone(); 10_000]);
    corpus.stricter(REASON, "a name ten thousand times", Kind::DuplicateName, many, 4);

    corpus.accepted("an empty name", all(&[tensor("", "F32", "[1]", 0, 4)]), 4);
    corpus.accepted("names that differ in case", twice(tensor("A", "F32", "[1]", 4, 8)), 8);
    corpus.accepted("a name of a megabyte", all(&[tensor(&"n".repeat(1 << 20), "U8", "[1]", 0, 1)]), 1);
    let long = all(&[tensor(&"n".repeat((1 << 20) + 1), "U8", "[1]", 0, 1)]);
    corpus.stricter("name-limit", "a name one byte over a megabyte", Kind::Limit, long, 1);
    let escaped = all(&[tensor(&"\\u00e9".repeat(4 << 20), "U8", "[1]", 0, 1)]);
    corpus.stricter("name-limit", "a name of eight megabytes in escapes", Kind::Limit, escaped, 1);
    let mixed = all(&[tensor(&format!("\\n{}", "é".repeat(8 << 20)), "U8", "[1]", 0, 1)]);
    corpus.stricter("name-limit", "a name of sixteen megabytes behind an escape", Kind::Limit, mixed, 1);
}

fn metadata(corpus: &mut Corpus) {
    let of = |value: &str| format!("{{\"__metadata__\":{value}}}");
    corpus.accepted("metadata in escapes", r#"{"__metadat\u0061__":{"k":"\u0076"}}"#, 0);
    corpus.stricter("null-metadata", "null for metadata", Kind::JsonType, of("null"), 0);
    for (name, json) in [
        ("an array for metadata", of("[]")),
        ("a string for metadata", of("\"pt\"")),
        ("a number in metadata", of("{\"k\":1}")),
        ("null in metadata", of("{\"k\":null}")),
        ("an object in metadata", of("{\"k\":{}}")),
        ("an array in metadata", of("{\"k\":[\"v\"]}")),
        ("a tensor called metadata", all(&[tensor("__metadata__", "U8", "[0]", 0, 0)])),
    ] {
        corpus.refused(name, Kind::JsonType, json, 0);
    }
    corpus.refused("a number for a key in metadata", Kind::Json, of("{1:\"v\"}"), 0);
    corpus.refused("metadata twice", Kind::DuplicateKey, "{\"__metadata__\":{},\"__metadata__\":{}}", 0);
    let twice = "{\"__metadata__\":{},\"\\u005f_metadata__\":{}}";
    corpus.refused("metadata twice, once with escapes", Kind::DuplicateKey, twice, 0);
    const REASON: &str = "duplicate-metadata-key";
    corpus.stricter(REASON, "a key twice in metadata", Kind::DuplicateKey, of(r#"{"k":"v","k":"w"}"#), 0);
    let escaped = of(r#"{"k":"v","\u006b":"v"}"#);
    corpus.stricter(REASON, "a key twice in metadata, once with escapes", Kind::DuplicateKey, escaped, 0);
    let entries = |n: usize| (0..n).map(|i| format!("\"{i}\":\"\"")).collect::<Vec<_>>().join(",");
    corpus.accepted("50,000 entries in metadata", of(&format!("{{{}}}", entries(50_000))), 0);
    let more = of(&format!("{{{}}}", entries(50_001)));
    corpus.stricter("metadata-limit", "50,001 entries in metadata", Kind::Limit, more, 0);
}
