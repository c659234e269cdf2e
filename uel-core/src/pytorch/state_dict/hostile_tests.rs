//! Pickles that were made to do harm: they end soon, with an error or with little memory.

use super::tests::{names, read, read_with, storage, two};
use super::*;
use crate::pytorch::pickle::assemble::*;
use crate::pytorch::pickle::unpickle;
use crate::{Kind, limits};
use proptest::prelude::*;
use std::time::{Duration, Instant};

fn kind(value: Vec<u8>) -> Kind {
    let begun = Instant::now();
    let kind = read_with(&pickle(value), &ContentsOptions::default()).unwrap_err().kind();
    assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
    kind
}

#[test]
fn doubled_lists_end_at_a_limit() {
    assert_eq!(kind(doubled(two("0"), 40)), Kind::Limit);
    assert_eq!(kind(doubled(int(1), 40)), Kind::Limit);
    assert_eq!(kind(doubled(dict(&[]), 200)), Kind::Limit);
    // Below a module's attributes tensors are passed over, but visited.
    let module = b"cmy\nNet\n)\x81".to_vec();
    let state = dict(&[("_parameters", dict(&[])), ("_modules", dict(&[])), ("x", doubled(two("0"), 40))]);
    assert_eq!(kind(build(module, state)), Kind::Limit);
}

#[test]
fn what_contains_itself_is_left_out() {
    let this = [put(dict(&[("t", two("0"))]), 9), text("me"), get(9), b"s".to_vec()].concat();
    let contents = read(this);
    assert_eq!(names(&contents), ["t"]);
    assert_eq!(contents.values["me"], "<recursion>");
    let object = put(b"cmy\nC\n)\x81".to_vec(), 9);
    let contents = read(build(object, dict(&[("me", get(9)), ("t", two("0"))])));
    assert_eq!(names(&contents), ["t"]);
    // A parameter whose data is itself, by way of its state.
    let parameter = put(call(global("torch.nn.parameter", "Parameter"), &[]), 9);
    let contents = read(build(parameter, tuple(&[get(9), none(), none(), flag(true), none()])));
    assert_eq!(contents.unreadable.len(), 1);
    // And one whose arguments hold it.
    let args = [put(list(&[]), 9), call(global("torch.nn.parameter", "Parameter"), &[get(9)]), b"a".to_vec()].concat();
    assert_eq!(read(args).unreadable.len(), 1);
}

#[test]
fn deep_nesting_is_cut() {
    let deep = |leaf: Vec<u8>| [vec![b']'; 100_000], leaf, vec![b'a'; 100_000]].concat();
    let contents = read(dict(&[("x", deep(int(1))), ("w", two("0"))]));
    assert_eq!(names(&contents), ["w"]);
    assert!(contents.unreadable.is_empty());
    let contents = read(dict(&[("x", deep(two("1"))), ("w", two("0"))]));
    assert_eq!((names(&contents), contents.unreadable.len()), (vec!["w"], 1));
    assert!(contents.unreadable[0].name.starts_with("x.0.0.0.") && contents.unreadable[0].why.contains("200 deep"));
    // Wrappers are unwrapped up to the same depth.
    let mut wrapped = global("torch._utils", "_rebuild_parameter");
    wrapped = [wrapped.repeat(1000), two("0"), b"\x85R".repeat(1000)].concat();
    assert_eq!(read(wrapped).unreadable.len(), 1);
}

/// Each of many values too deep leads to the same long way to a tensor.
#[test]
fn searching_below_the_cut_is_counted() {
    let way = put([vec![b']'; 50_000], two("0"), vec![b'a'; 50_000]].concat(), 9);
    let many: Vec<Vec<u8>> = (0..20_000).map(|_| list(&[get(9)])).collect();
    let value = [way, b"0".to_vec(), vec![b']'; 198], list(&many), vec![b'a'; 198]].concat();
    assert_eq!(kind(value), Kind::Limit);
}

#[test]
fn texts_are_counted() {
    let long = put(text(&"x".repeat(1 << 20)), 0);
    let value = list(&[long, list(&vec![get(0); 300])]);
    assert_eq!(kind(value), Kind::Limit);
    let key = "k".repeat(limits::MAX_NAME_BYTES + 1);
    assert_eq!(kind(dict(&[(&key, two("0"))])), Kind::Limit);
    let shared = [put(text(&"k".repeat(1 << 19)), 0), b"0".to_vec()].concat();
    let pair = || [b"}".to_vec(), get(0), two("0"), b"s".to_vec()].concat();
    let value = [shared, list(&(0..400).map(|_| pair()).collect::<Vec<_>>())].concat();
    assert_eq!(kind(value), Kind::Limit);
}

/// Work that a few bytes repeat: what is shared is looked at for each of its users.
#[test]
fn shared_values_that_cost_more_than_a_visit_are_counted() {
    let many = |value: Vec<u8>, user: Vec<u8>| [value, b"0".to_vec(), list(&vec![user; 20_000])].concat();
    // A dict that says one key 100,000 times.
    let same = [b"}(".to_vec(), b"NN".repeat(100_000), b"u".to_vec()].concat();
    assert_eq!(kind(many(put(same, 0), get(0))), Kind::Limit);
    // A long key in many dicts.
    let long = put(text(&"k".repeat(1 << 19)), 0);
    assert_eq!(
        kind(many(long, [b"}(".to_vec(), [get(0), none()].concat().repeat(50), b"u".to_vec()].concat())),
        Kind::Limit
    );
    // States that say nothing.
    let object = put([b"cmy\nC\n)\x81".to_vec(), b"Nb".repeat(100_000)].concat(), 0);
    assert_eq!(kind(many(object, get(0))), Kind::Limit);
    // Attributes of a module that are not shown.
    let hidden: Vec<String> = (0..50_000).map(|number| format!("_{number}")).collect();
    let mut state = vec![("_parameters", dict(&[])), ("_modules", dict(&[]))];
    state.extend(hidden.iter().map(|name| (name.as_str(), none())));
    assert_eq!(kind(many(put(build(b"cmy\nC\n)\x81".to_vec(), dict(&state)), 0), get(0))), Kind::Limit);
    // Bytes that are decoded.
    let bytes = put(text(&"\u{e9}".repeat(1 << 19)), 0);
    assert_eq!(kind(many(bytes, call(global("_codecs", "encode"), &[get(0), text("latin1")]))), Kind::Limit);
    // Keys of storages, each with another number of elements.
    let long = put(text(&"k".repeat(1 << 19)), 0);
    let storages = (0..20_000).map(|number| {
        persistent(tuple(&[text("storage"), global("torch", "FloatStorage"), get(0), text("cpu"), int(number)]))
    });
    let contents = read([long, b"0".to_vec(), list(&storages.collect::<Vec<_>>())].concat());
    assert!(contents.storages.is_empty() && contents.unreadable.len() == 20_000);
}

#[test]
fn many_and_long_globals_end_at_a_limit() {
    let many: Vec<u8> =
        (0..=limits::MAX_PICKLE_GLOBALS).flat_map(|number| global("m", &format!("C{number}"))).collect();
    assert_eq!(unpickle(&many).unwrap_err().kind(), Kind::Limit);
    assert_eq!(unpickle(&global("m", &"x".repeat(1000))).unwrap_err().kind(), Kind::Limit);
    let long =
        [put(text(&"x".repeat(1 << 20)), 0), [get(0), get(0), b"\x93".to_vec()].concat().repeat(20_000), b".".to_vec()];
    assert_eq!(unpickle(&long.concat()).unwrap().0.globals().len(), 1);
}

/// The deepest ways through the walk: objects, and attributes of tensors, with wrappers at the end.
#[test]
fn depth_of_every_kind_fits_the_stack() {
    let wrappers =
        || [global("torch._utils", "_rebuild_parameter").repeat(199), two("0"), b"\x85R".repeat(199)].concat();
    let objects = [b"cmy\nC\n)\x81}U\x01x".repeat(300), wrappers(), b"sb".repeat(300)].concat();
    let contents = read(objects);
    assert_eq!((contents.tensors.len(), contents.unreadable.len()), (0, 1));
    let objects = [b"cmy\nC\n)\x81}U\x01x".repeat(99), wrappers(), b"sb".repeat(99)].concat();
    assert_eq!(read(objects).tensors.len(), 1);
    let attributes = [[two("0"), b"}U\x01x".to_vec()].concat().repeat(300), wrappers(), b"sb".repeat(300)].concat();
    let contents = read(attributes);
    assert_eq!((contents.tensors.len(), contents.unreadable.len()), (limits::MAX_PICKLE_DEPTH, 1));
}

fn whole() -> Vec<Vec<u8>> {
    let made = [
        fixtures::WHOLE_MODULE,
        fixtures::SCRIPT,
        fixtures::VIEWS,
        fixtures::NUMPY_5,
        fixtures::QUANTIZED,
        fixtures::CSR,
    ];
    made.iter().map(|bytes| bytes.to_vec()).chain([pickle(dict(&[("s", storage("FloatStorage", "0", 2))]))]).collect()
}

fn check(bytes: &[u8]) {
    let Ok((pickle, consumed)) = unpickle(bytes) else { return };
    assert!(consumed <= bytes.len());
    let Ok(contents) = pickle.contents(&ContentsOptions::default()) else { return };
    for tensor in &contents.tensors {
        assert_eq!(tensor.shape.len(), tensor.strides.len());
        if let crate::pytorch::contents::Place::Storage { storage, offset } = tensor.place {
            let storage = &contents.storages[storage];
            let last: u64 = tensor
                .shape
                .iter()
                .zip(&tensor.strides)
                .map(|(&len, &stride)| (len as u64).saturating_sub(1) * stride)
                .sum();
            assert!(
                tensor.shape.contains(&0)
                    || offset + last < storage.elements * storage.element_bytes
                    || tensor.dtype == crate::Dtype::F4
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn mutated_checkpoints_never_panic(
        which in 0_usize..7,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = whole().swap_remove(which);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            let at = cut.index(bytes.len());
            bytes.remove(at);
        }
        check(&bytes);
    }

    /// Parts of pickles in any order, with memo numbers that mean something else than they did.
    #[test]
    fn pieces_of_checkpoints_never_panic(pieces in prop::collection::vec((0_usize..7, any::<prop::sample::Index>(), 1_usize..60), 1..12)) {
        let whole = whole();
        let mut bytes = Vec::new();
        for (which, start, len) in pieces {
            let start = start.index(whole[which].len());
            bytes.extend(whole[which][start..].iter().take(len));
        }
        bytes.push(b'.');
        check(&bytes);
    }
}

#[test]
fn the_checkpoints_that_are_mutated_are_well_formed() {
    for bytes in whole() {
        assert!(!read_with(&bytes, &ContentsOptions::default()).unwrap().tensors.is_empty());
    }
}
