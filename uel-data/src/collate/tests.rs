use proptest::prelude::*;

use super::*;

fn floats(shape: &[usize], from: f32) -> Value {
    let count: usize = shape.iter().product();
    Array::new(shape, (0..count).map(|step| from + step as f32).collect::<Vec<_>>()).unwrap().into()
}

/// What torch 2.15's `default_collate` makes of the same samples.
#[test]
fn nested_samples_are_stacked_as_torch_does() {
    let sample = |number: i64| {
        let pair =
            Value::tuple([Value::Float(number as f64 / 2.0), Value::List(vec![number.into(), (number + 1).into()])]);
        Value::map([
            ("x", floats(&[2, 2], number as f32)),
            ("pair", pair),
            ("name", format!("n{number}").into()),
            ("flag", (number > 0).into()),
            ("raw", vec![number as u8].into()),
        ])
    };
    let batch = Stack.collate(vec![sample(0), sample(1)], &[0, 1]).unwrap();
    let x = batch.tensor("x").unwrap();
    assert_eq!(x.to_vec3::<f32>().unwrap(), [[[0., 1.], [2., 3.]], [[1., 2.], [3., 4.]]]);
    assert_eq!(batch.tensor("pair.0").unwrap().to_vec1::<f64>().unwrap(), [0.0, 0.5]);
    assert_eq!(batch.tensor("pair.1.0").unwrap().to_vec1::<i64>().unwrap(), [0, 1]);
    assert_eq!(batch.tensor("pair.1.1").unwrap().to_vec1::<i64>().unwrap(), [1, 2]);
    assert_eq!(batch.tensor("flag").unwrap().to_vec1::<u8>().unwrap(), [0, 1]);
    assert!(matches!(batch.get("name"), Some(Field::Strings(names)) if names == &["n0", "n1"]));
    assert!(matches!(batch.get("raw"), Some(Field::Bytes(runs)) if runs == &[vec![0], vec![1]]));
    assert!(matches!(batch.get("pair"), Some(Field::Tuple(_))));
    // One real number makes all real, wherever it stands, and one whole number makes all of yes and no whole.
    for (numbers, expected) in [
        ([Value::Float(0.5), Value::Int(2)], [0.5, 2.0]),
        ([Value::Int(2), Value::Float(0.5)], [2.0, 0.5]),
        ([Value::Bool(true), Value::Float(0.5)], [1.0, 0.5]),
    ] {
        let batch = Stack.collate(numbers.to_vec(), &[0, 1]).unwrap();
        assert_eq!(batch.tensor("").unwrap().to_vec1::<f64>().unwrap(), expected);
    }
    for numbers in [[Value::Bool(true), Value::Int(0)], [Value::Int(1), Value::Bool(false)]] {
        let batch = Stack.collate(numbers.to_vec(), &[0, 1]).unwrap();
        assert_eq!(batch.tensor("").unwrap().to_vec1::<i64>().unwrap(), [1, 0]);
    }
    // A scalar of its own dtype keeps it.
    let batch = Stack.collate(vec![Array::scalar(1u32).into(), Array::scalar(2u32).into()], &[0, 1]).unwrap();
    assert_eq!(batch.tensor("").unwrap().to_vec1::<u32>().unwrap(), [1, 2]);
}

/// Small values, mostly of few kinds, so that many lists of them are alike and as many are nearly so.
fn any_sample() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        4 => (0usize..3, 0usize..3).prop_map(|(rows, from)| floats(&[rows.max(1), 2], from as f32)),
        2 => (0u8..3).prop_map(|value| Array::scalar(value).into()),
        2 => (0i64..3).prop_map(Value::Int),
        2 => (0i64..3).prop_map(|value| Value::Float(value as f64)),
        1 => any::<bool>().prop_map(Value::Bool),
        1 => Just(Value::from("text")),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        let some = || proptest::collection::vec(inner.clone(), 0..3);
        let names = prop_oneof![9 => Just(["a", "b", "c"]), 1 => Just(["b", "a", "d"])];
        prop_oneof![
            some().prop_map(Value::List),
            some().prop_map(Value::Tuple),
            (names, some()).prop_map(|(names, values)| Value::map(names.into_iter().zip(values))),
        ]
    })
}

proptest! {
    /// What is stacked where it lies is what is stacked part by part.
    #[test]
    fn samples_that_are_alike_are_stacked_as_others_are(
        one in any_sample(), more in proptest::collection::vec((any_sample(), 0usize..4), 0..4),
    ) {
        let mut samples = vec![one.clone()];
        for (other, kind) in more {
            samples.push(if kind == 0 { other } else { one.clone() });
        }
        let indices: Vec<u64> = (0..samples.len() as u64).collect();
        let mut part = Part { indices: &indices, path: String::new() };
        let text = |field: &Field| crate::loader::tests::text(field);
        let part_by_part = collate(samples.clone(), &mut part, &mut stack::stack);
        if let Some(alike) = alike::stack_alike(&samples) {
            prop_assert_eq!(text(&alike), text(&part_by_part.unwrap()));
        } else {
            let same = samples.iter().all(|sample| *sample == one);
            prop_assert!(!same || format!("{one:?}").contains("Str"), "{:?}", samples);
        }
        let whole = Stack.collate(samples.clone(), &indices);
        let again = collate(samples, &mut part, &mut stack::stack);
        prop_assert_eq!(whole.as_ref().map(text).map_err(ToString::to_string), again.as_ref().map(text).map_err(ToString::to_string));
    }
}

/// The message names the sample by its index in the dataset, the field, and what both samples have.
#[test]
fn samples_that_do_not_fit_are_named() {
    let map = |value: Value| Value::map([("a", Value::tuple([value]))]);
    let cases = [
        (floats(&[3], 0.), floats(&[4], 0.), "F32 [3], as sample 70 has it", "F32 [4]"),
        (floats(&[1], 0.), Array::new(vec![1], vec![1u8]).unwrap().into(), "F32 [1]", "U8 [1]"),
        (1i64.into(), "text".into(), "int, as sample 70", "str"),
        (1i64.into(), Array::scalar(1i64).into(), "int", "array"),
        (true.into(), Value::List(vec![]), "bool", "list"),
        (Value::List(vec![]), Value::List(vec![1i64.into()]), "0 elements", "1 elements"),
        (Value::map([("k", 1i64.into())]), Value::map([("l", 1i64.into())]), "keys k", "keys l"),
        (Value::map([("k", 1i64.into())]), Value::map([("k", 1i64.into()), ("l", 1i64.into())]), "keys k", "keys k, l"),
    ];
    for (first, second, expected, got) in cases {
        let samples = vec![map(first.clone()), map(first), map(second)];
        let error = Stack.collate(samples, &[70, 80, 90]).unwrap_err();
        assert_eq!((error.kind(), error.index(), error.field()), (Kind::Collate, Some(90), Some("a.0")), "{error}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(got), "{text}");
    }
    assert!(Stack.collate(Vec::new(), &[]).is_err());
}

#[test]
fn keys_may_stand_in_another_order() {
    let samples = vec![
        Value::map([("a", 1i64.into()), ("b", 2i64.into())]),
        Value::map([("b", 4i64.into()), ("a", 3i64.into())]),
    ];
    let batch = Stack.collate(samples, &[0, 1]).unwrap();
    assert_eq!(batch.tensor("a").unwrap().to_vec1::<i64>().unwrap(), [1, 3]);
    // A key that stands twice does not stand for another one.
    let twice = vec![
        Value::map([("a", 1i64.into()), ("b", 2i64.into())]),
        Value::map([("a", 3i64.into()), ("a", 4i64.into())]),
    ];
    assert!(Stack.collate(twice, &[0, 1]).is_err());
}

#[test]
fn sequences_are_padded_packed_and_joined() {
    let sample = |len: usize, label: i64| Value::map([("x", floats(&[len, 2], 1.0)), ("y", label.into())]);
    let samples = || vec![sample(2, 0), sample(0, 1), sample(3, 2)];
    let indices = [0, 1, 2];
    let padded = Pad::new(-1.0).collate(samples(), &indices).unwrap();
    let values = padded.tensor("x.values").unwrap();
    assert_eq!(values.dims(), [3, 3, 2]);
    assert_eq!(values.get(0).unwrap().to_vec2::<f32>().unwrap(), [[1., 2.], [3., 4.], [-1., -1.]]);
    assert_eq!(padded.tensor("x.mask").unwrap().to_vec2::<u8>().unwrap(), [[1, 1, 0], [0, 0, 0], [1, 1, 1]]);
    assert_eq!(padded.tensor("y").unwrap().to_vec1::<i64>().unwrap(), [0, 1, 2]);

    let joined = Ragged.collate(samples(), &indices).unwrap();
    assert_eq!(joined.tensor("x.values").unwrap().dims(), [5, 2]);
    assert_eq!(joined.tensor("x.offsets").unwrap().to_vec1::<i64>().unwrap(), [0, 2, 2, 5]);

    let packed = Pack::new(5, 0.0).unwrap().collate(samples(), &indices).unwrap();
    assert_eq!(packed.tensor("x.values").unwrap().dims(), [1, 5, 2]);
    assert_eq!(packed.tensor("x.segments").unwrap().to_vec2::<i64>().unwrap(), [[1, 1, 3, 3, 3]]);
    assert_eq!(packed.tensor("x.positions").unwrap().to_vec2::<i64>().unwrap(), [[0, 1, 0, 1, 2]]);
    let error = Pack::new(2, 0.0).unwrap().collate(samples(), &[7, 8, 9]).unwrap_err();
    assert_eq!((error.index(), error.field()), (Some(9), Some("x")));

    // What is not to be padded must be of one shape.
    assert_eq!(Pad::new(0.0).only(["z"]).collate(samples(), &indices).unwrap_err().field(), Some("x"));
    let wide = vec![floats(&[2, 2], 0.), floats(&[2, 3], 0.)];
    assert!(Pad::new(0.0).collate(wide.clone(), &[0, 1]).is_err());
    assert!(Ragged.collate(wide, &[0, 1]).is_err());
    assert!(Pack::new(0, 0.0).is_err());
}

proptest! {
    /// What a collation says of a batch before it is made is no less than what it has.
    #[test]
    fn the_bytes_of_a_batch_are_known_before(
        lens in proptest::collection::vec(0usize..40, 1..20), rest in 1usize..4, multiple in 1usize..9, row in 40usize..100,
    ) {
        let sample = |&len: &usize| Value::map([
            ("x", floats(&[len, rest], 0.0)),
            ("y", Value::tuple([Array::new([len], vec![7u8; len]).unwrap().into(), Value::Int(len as i64)])),
            ("z", Value::List(vec!["text".into(), floats(&[2, 2], 0.0), Array::scalar(1.5f64).into()])),
        ]);
        let samples: Vec<Value> = lens.iter().map(sample).collect();
        let indices: Vec<u64> = (0..lens.len() as u64).collect();
        let pack = Pack::new(row, 0.0).unwrap();
        let collations: [&dyn Collate; 4] = [&Pad::new(0.0).multiple_of(multiple), &Pad::new(0.0), &pack, &Ragged];
        for collation in collations {
            let said = collation.batch_bytes(&samples);
            let made = collation.collate(samples.clone(), &indices).unwrap().byte_len();
            let own: u64 = samples.iter().map(Value::byte_len).sum();
            prop_assert!(made <= said, "{} {}", made, said);
            // Rows that are packed may be half full.
            let most = if collation.fingerprint() == pack.fingerprint() { 3 * made + row as u64 * 30 } else { made };
            prop_assert!(said <= most + own, "{} {}", made, said);
        }
        let alike: Vec<Value> = lens.iter().map(|_| sample(&5)).collect();
        prop_assert!(Stack.collate(alike.clone(), &indices).unwrap().byte_len() <= Stack.batch_bytes(&alike));
    }
}
