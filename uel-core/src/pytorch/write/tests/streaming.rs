//! Tensors in any order and in any parts.

use super::*;
use crate::Kind;
use serde_json::json;

/// Cuts a tensor into parts at `cuts`.
fn parts(bytes: &[u8], cuts: &[usize]) -> Vec<(u64, Vec<u8>)> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    ends.extend([0, bytes.len()]);
    ends.sort();
    ends.windows(2).map(|ends| (ends[0] as u64, bytes[ends[0]..ends[1]].to_vec())).collect()
}

proptest! {
    #[test]
    fn any_tensors_in_any_order_and_parts_give_the_same_file(
        given in tensors(),
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
        order in any::<u64>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (whole, cut) = (folder.path().join("whole.pth"), folder.path().join("cut.pt"));
        let report = save(&whole, &given, &SaveOptions::new()).unwrap();
        let bytes: u64 = given.iter().map(|given| given.bytes.len() as u64).sum();
        prop_assert_eq!((report.tensor_count, report.tensor_bytes), (given.len(), bytes));
        let written = report.files[0].bytes;
        prop_assert_eq!(written, std::fs::metadata(&whole).unwrap().len());
        check(&whole, &given);
        let writer = PthWriter::create(&cut, metas(&given), &SaveOptions::new()).unwrap();
        let all = given.iter().flat_map(|given| parts(&given.bytes, &cuts).into_iter().map(move |part| (given, part)));
        let mut all: Vec<_> = all.filter(|(given, (_, part))| given.bytes.is_empty() || !part.is_empty()).collect();
        let mut done = std::collections::HashSet::new();
        all.retain(|(given, (start, _))| done.insert((given.meta.name.clone(), *start)));
        all.sort_by_key(|(given, (start, _))| (given.meta.name.len() as u64 ^ start).wrapping_mul(order | 1));
        for (given, (start, part)) in &all {
            writer.write_part(&given.meta.name, *start, part).unwrap();
        }
        writer.finish().unwrap();
        prop_assert!(std::fs::read(&cut).unwrap() == std::fs::read(&whole).unwrap());
    }
}

#[test]
fn large_tensors_come_from_several_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole.pth"), folder.path().join("cut.pth"));
    let mut given = some_tensors(1);
    given.push(Given::new("large", Dtype::U8, &[1_000_003], 9));
    given.push(Given::new("larger", Dtype::F32, &[500, 701], 3));
    save(&whole, &given, &SaveOptions::new()).unwrap();
    check(&whole, &given);
    let writer = PthWriter::create(&cut, metas(&given), &SaveOptions::new()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (writer, given) = (&writer, &given);
            scope.spawn(move || {
                for given in given {
                    let parts = given.bytes.chunks(100_000.max(given.bytes.len() / 7)).zip(0u64..);
                    for (part, n) in parts.filter(|(_, n)| n % 4 == thread) {
                        let start = n * 100_000.max(given.bytes.len() as u64 / 7);
                        writer.write_part(&given.meta.name, start, part).unwrap();
                    }
                    if given.bytes.is_empty() && thread == 0 {
                        writer.write_part(&given.meta.name, 0, &[]).unwrap();
                    }
                }
            });
        }
    });
    writer.finish().unwrap();
    assert!(std::fs::read(&cut).unwrap() == std::fs::read(&whole).unwrap());
}

#[test]
fn other_content_gives_another_id() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let id = |given: &[Given]| {
        save(&path, given, &SaveOptions::new()).unwrap();
        entries(std::fs::File::open(&path).unwrap()).pop().unwrap().2
    };
    let first = id(&some_tensors(1));
    assert_eq!(id(&some_tensors(1)), first);
    let other = id(&some_tensors(2));
    assert!(other[..20] == first[..20] && other[20..] != first[20..]);
    let mut renamed = some_tensors(1);
    renamed[0].meta.name = "z".to_owned();
    assert_ne!(id(&renamed)[..20], first[..20]);
}

#[test]
fn what_was_not_announced_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let given = some_tensors(1);
    let dict = StateDict::new(metas(&given)).with_tied("tied", "a");
    let writer = PthWriter::create(&path, dict, &SaveOptions::new()).unwrap();
    let (a, bytes) = (&given[0].meta, &given[0].bytes);
    let refused = |result: crate::Result<()>, kind, name: &str| {
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.path(), error.tensor()), (kind, Some(&*path), Some(name)), "{error}");
    };
    refused(writer.write("x", Dtype::U8, &[1], &[1]), Kind::UnexpectedTensors, "x");
    refused(writer.write("tied", a.dtype, &a.shape, bytes), Kind::UnexpectedTensors, "tied");
    refused(writer.write("a", Dtype::I32, &a.shape, bytes), Kind::UnsupportedDtype, "a");
    refused(writer.write("a", Dtype::F32, &[5, 3], bytes), Kind::ShapeMismatch, "a");
    refused(writer.write("a", Dtype::F32, &a.shape, &bytes[1..]), Kind::SizeMismatch, "a");
    refused(writer.write_part("a", 1, bytes), Kind::Argument, "a");
    refused(writer.write_part("a", u64::MAX, bytes), Kind::Argument, "a");
    writer.write_part("a", 10, &bytes[10..20]).unwrap();
    for (start, end) in [(10, 20), (0, 11), (19, 21), (12, 13), (0, 60)] {
        refused(writer.write_part("a", start as u64, &bytes[start..end]), Kind::DuplicateName, "a");
    }
    // Nothing is nowhere in the way.
    writer.write_part("a", 10, &[]).unwrap();
    writer.write_part("a", 20, &bytes[20..]).unwrap();
    writer.write_part("a", 0, &bytes[..10]).unwrap();
    refused(writer.write("a", a.dtype, &a.shape, bytes), Kind::DuplicateName, "a");
    refused(writer.write_part("a", 60, &[]), Kind::DuplicateName, "a");
    let empty = &given[2].meta;
    writer.write("c", empty.dtype, &empty.shape, &[]).unwrap();
    refused(writer.write_part("c", 0, &[]), Kind::DuplicateName, "c");
    for given in &given[3..] {
        writer.write(&given.meta.name, given.meta.dtype, &given.meta.shape, &given.bytes).unwrap();
    }
    let error = writer.finish().unwrap_err();
    assert_eq!((error.kind(), error.tensor(), error.got()), (Kind::MissingTensors, Some("b"), Some("4")));
    assert!(names(folder.path()).is_empty());
}

#[test]
fn part_of_a_tensor_is_not_a_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    for (start, end) in [(0, 6), (1, 7), (0, 0)] {
        let given = Given::new("a", Dtype::U8, &[7], 1);
        let writer = PthWriter::create(&path, metas(std::slice::from_ref(&given)), &SaveOptions::new()).unwrap();
        writer.write_part("a", start as u64, &given.bytes[start..end]).unwrap();
        assert_eq!(writer.finish().unwrap_err().kind(), Kind::MissingTensors);
    }
    let writer = PthWriter::create(&path, [TensorMeta::new("a", Dtype::U8, [0])], &SaveOptions::new()).unwrap();
    assert_eq!(writer.finish().unwrap_err().kind(), Kind::MissingTensors);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn values_and_tied_names_add_no_storage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let given = some_tensors(5);
    let dict = StateDict::new(metas(&given)).with_tied("x", "a").with_tied("y", "a").with_tied("z", "c");
    let dict = dict.under("model").with_value("epoch", 3).with_value("config", json!({ "layers": [1, 2] }));
    let writer = PthWriter::create(&path, dict, &SaveOptions::new()).unwrap();
    for given in &given {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes).unwrap();
    }
    assert_eq!(writer.finish().unwrap().tensor_count, 8);
    let pickle = check(&path, &given);
    assert!(
        [&b"model"[..], b"epoch", b"config", b"layers"]
            .iter()
            .all(|word| pickle.windows(word.len()).any(|window| window == *word))
    );
}
