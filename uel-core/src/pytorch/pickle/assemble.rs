//! Pickles for tests, put together by hand.

use super::opcodes as op;

pub(crate) fn none() -> Vec<u8> {
    vec![op::NONE]
}

pub(crate) fn flag(value: bool) -> Vec<u8> {
    vec![if value { op::NEWTRUE } else { op::NEWFALSE }]
}

pub(crate) fn int(value: i64) -> Vec<u8> {
    let bytes = value.to_le_bytes();
    [&[op::LONG1, 8], &bytes[..]].concat()
}

pub(crate) fn float(value: f64) -> Vec<u8> {
    [&[op::BINFLOAT], &value.to_be_bytes()[..]].concat()
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&[op::BINUNICODE], &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn bytes(bytes: &[u8]) -> Vec<u8> {
    [&[op::BINBYTES], &(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

pub(crate) fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

pub(crate) fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [&[op::MARK], &items.concat()[..], &[op::TUPLE]].concat()
}

pub(crate) fn ints(items: &[i64]) -> Vec<u8> {
    tuple(&items.iter().map(|&item| int(item)).collect::<Vec<_>>())
}

pub(crate) fn list(items: &[Vec<u8>]) -> Vec<u8> {
    [&[op::EMPTY_LIST, op::MARK], &items.concat()[..], &[op::APPENDS]].concat()
}

pub(crate) fn dict(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let pairs: Vec<u8> = pairs.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [&[op::EMPTY_DICT, op::MARK], &pairs[..], &[op::SETITEMS]].concat()
}

pub(crate) fn call(function: Vec<u8>, args: &[Vec<u8>]) -> Vec<u8> {
    [function, tuple(args), vec![op::REDUCE]].concat()
}

pub(crate) fn build(object: Vec<u8>, state: Vec<u8>) -> Vec<u8> {
    [object, state, vec![op::BUILD]].concat()
}

pub(crate) fn persistent(name: Vec<u8>) -> Vec<u8> {
    [name, vec![op::BINPERSID]].concat()
}

pub(crate) fn put(value: Vec<u8>, index: u8) -> Vec<u8> {
    [value, vec![op::BINPUT, index]].concat()
}

pub(crate) fn get(index: u8) -> Vec<u8> {
    vec![op::BINGET, index]
}

pub(crate) fn pickle(value: Vec<u8>) -> Vec<u8> {
    [vec![op::PROTO, 2], value, vec![op::STOP]].concat()
}

/// A list of two references to a list of two references, and so on, `levels` high, around `leaf`.
pub(crate) fn doubled(leaf: Vec<u8>, levels: u8) -> Vec<u8> {
    let mut out = put(leaf, 0);
    for level in 0..levels {
        out.push(op::POP);
        out.extend(put(list(&[get(level), get(level)]), level + 1));
    }
    out
}
