//! Sets of files, as huggingface_hub and transformers make them.

use super::*;
use crate::Kind;

fn sizes(sizes: &[usize], most: u64) -> Vec<Vec<usize>> {
    let metas = sizes.iter().enumerate().map(|(n, size)| TensorMeta::new(n.to_string(), Dtype::U8, [*size]));
    let plan = plan_shards(metas, most, "model").unwrap();
    assert_eq!(plan.total_bytes, sizes.iter().sum::<usize>() as u64);
    let count = plan.shards.len();
    let name = |n| format!("model-{:05}-of-{count:05}.safetensors", n + 1);
    match count {
        1 => assert_eq!(plan.names, ["model.safetensors"]),
        _ => assert_eq!(plan.names, (0..count).map(name).collect::<Vec<_>>()),
    }
    plan.shards.iter().map(|shard| shard.iter().map(|meta| meta.shape[0]).collect()).collect()
}

/// What `split_state_dict_into_shards_factory` of huggingface_hub does, line by line.
fn reference(sizes: &[usize], most: u64) -> Vec<Vec<usize>> {
    let (mut list, mut current, mut current_size) = (Vec::new(), Vec::new(), 0);
    for &size in sizes {
        if size as u64 > most {
            list.push(vec![size]);
            continue;
        }
        if (current_size + size) as u64 > most {
            list.push(current);
            (current, current_size) = (Vec::new(), 0);
        }
        current.push(size);
        current_size += size;
    }
    if !current.is_empty() {
        list.push(current);
    }
    list
}

#[test]
fn shards_are_those_of_huggingface_hub() {
    assert_eq!(sizes(&[6, 6, 2, 6, 2, 2], 10), [vec![6], vec![6, 2], vec![6, 2, 2]]);
    // A tensor over the limit stands before the shard that was being filled.
    assert_eq!(sizes(&[4, 20, 4], 10), [vec![20], vec![4, 4]]);
    assert_eq!(sizes(&[4, 20, 7, 30], 10), [vec![20], vec![4], vec![30], vec![7]]);
    assert_eq!(sizes(&[20], 10), [vec![20]]);
    assert_eq!(sizes(&[10, 10], 10), [vec![10], vec![10]]);
    assert_eq!(sizes(&[0, 0], 0), [vec![0, 0]]);
    assert_eq!(sizes(&[0, 1, 0], 0), [vec![1], vec![0, 0]]);
    assert_eq!(sizes(&[], 10), [Vec::<usize>::new()]);
    let error = plan_shards((0..100_001).map(|n| TensorMeta::new(n.to_string(), Dtype::U8, [1])), 1, "m").unwrap_err();
    assert_eq!(error.kind(), Kind::Limit);
    let huge = [TensorMeta::new("a", Dtype::U8, [usize::MAX]), TensorMeta::new("b", Dtype::U8, [1])];
    assert_eq!(plan_shards(huge, u64::MAX, "m").unwrap_err().kind(), Kind::Overflow);
}

proptest! {
    #[test]
    fn any_shards_are_those_of_huggingface_hub(given in proptest::collection::vec(0usize..30, 1..40), most in 0u64..40) {
        prop_assert_eq!(sizes(&given, most), reference(&given, most));
    }

    #[test]
    fn a_set_is_read_as_it_was_written(given in tensors(), most in 0u64..300, hashes in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan_shards(given.iter().map(|given| given.meta.clone()), most, "model").unwrap();
        let options = SaveOptions::new().with_hashes(hashes);
        let writer = ShardedWriter::create(folder.path(), &plan, &options).unwrap();
        for given in &given {
            let (name, dtype, shape, bytes) = given.parts();
            writer.write(name, dtype, shape, bytes).unwrap();
        }
        let report = writer.finish().unwrap();
        let written: Vec<_> = report.files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
        let mut there = names(folder.path());
        there.sort_by_key(|name| name.ends_with("json"));
        prop_assert_eq!(written, there);
        prop_assert!(report.files.iter().all(|file| std::fs::metadata(&file.path).unwrap().len() == file.bytes));
        prop_assert_eq!(SafetensorsFiles::faults(folder.path()).len(), 0);
        let files = SafetensorsFiles::open(folder.path(), Rules::Strict).unwrap();
        prop_assert_eq!(files.index().len(), given.len());
        for Given { meta, bytes } in &given {
            let info = files.index().get(&meta.name).unwrap();
            prop_assert_eq!(&files.sources()[info.file()].read_range(info.range()).unwrap(), bytes);
        }
    }
}

#[test]
fn the_index_file_is_text_as_transformers_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let metas = ["b\n\u{7f}é😀\"\\", "a"].map(|name| TensorMeta::new(name, Dtype::U8, [10]));
    let writer =
        ShardedWriter::create(folder.path(), &plan_shards(metas.clone(), 10, "mö").unwrap(), &SaveOptions::new());
    let writer = writer.unwrap();
    for meta in &metas {
        writer.write(&meta.name, Dtype::U8, &[10], &[1; 10]).unwrap();
    }
    writer.finish().unwrap();
    // json.dumps(index, indent=2, sort_keys=True) + "\n"
    let expected = r#"{
  "metadata": {
    "total_size": 20
  },
  "weight_map": {
    "a": "m\u00f6-00002-of-00002.safetensors",
    "b\n\u007f\u00e9\ud83d\ude00\"\\": "m\u00f6-00001-of-00002.safetensors"
  }
}
"#;
    assert_eq!(std::fs::read_to_string(folder.path().join("mö.safetensors.index.json")).unwrap(), expected);
}

/// Saves `sizes` in files of at most 10 bytes, each byte of them `byte`.
fn save_set(folder: &Path, sizes: &[usize], byte: u8) -> crate::Result<SaveReport> {
    let metas = sizes.iter().enumerate().map(|(n, size)| TensorMeta::new(n.to_string(), Dtype::U8, [*size]));
    let writer = ShardedWriter::create(folder, &plan_shards(metas, 10, "model")?, &SaveOptions::new())?;
    for (n, size) in sizes.iter().enumerate() {
        writer.write(&n.to_string(), Dtype::U8, &[*size], &vec![byte; *size])?;
    }
    writer.finish()
}

#[test]
fn one_file_in_place_of_a_set_is_what_the_folder_holds() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    save_set(folder, &[10, 10, 10], 1).unwrap();
    let report = save_set(folder, &[5, 5], 2).unwrap();
    let files = SafetensorsFiles::open(folder, Rules::Strict).unwrap();
    assert_eq!((files.index().len(), files.sources().len()), (2, 1));
    for info in files.index().iter() {
        assert_eq!(files.sources()[info.file()].read_range(info.range()).unwrap(), [2; 5]);
    }
    assert_eq!(SafetensorsFiles::faults(folder).len(), 0);
    let written: Vec<_> = report.files.iter().map(|file| file.path.strip_prefix(folder).unwrap()).collect();
    assert_eq!(written, [Path::new("model.safetensors"), Path::new("model.safetensors.index.json")]);
    assert!(names(folder).iter().all(|name| !name.starts_with('.')), "{:?}", names(folder));
    // And back again.
    save_set(folder, &[10, 10], 3).unwrap();
    assert_eq!(SafetensorsFiles::open(folder, Rules::Strict).unwrap().sources().len(), 2);
}

#[cfg(unix)]
#[test]
fn one_file_elsewhere_cannot_take_the_place_of_a_set() {
    let folder = tempfile::tempdir().unwrap();
    let (set, elsewhere) = (folder.path().join("set"), folder.path().join("elsewhere"));
    std::fs::create_dir(&set).unwrap();
    save_set(&set, &[10, 10], 1).unwrap();
    std::fs::write(&elsewhere, "old").unwrap();
    std::os::unix::fs::symlink(&elsewhere, set.join("model.safetensors")).unwrap();
    let options = SaveOptions::new().with_symlinks(crate::Symlinks::Follow);
    let plan = plan_shards([TensorMeta::new("a", Dtype::U8, [1])], 10, "model").unwrap();
    assert_eq!(ShardedWriter::create(&set, &plan, &options).unwrap_err().kind(), Kind::Argument);
    assert_eq!(std::fs::read(&elsewhere).unwrap(), b"old");
    assert_eq!(SafetensorsFiles::open(&set, Rules::Strict).unwrap().sources().len(), 2);
}

#[test]
fn what_a_killed_set_of_another_count_left_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sets: [&[usize]; 4] = [&[10, 10, 10], &[10, 10], &[10; 11], &[5]];
    // As killed processes leave them.
    for sizes in sets {
        let metas = sizes.iter().enumerate().map(|(n, size)| TensorMeta::new(n.to_string(), Dtype::U8, [*size]));
        let plan = plan_shards(metas, 10, "model").unwrap();
        let writer = ShardedWriter::create(folder, &plan, &SaveOptions::new()).unwrap();
        let left: Vec<_> =
            names(folder).into_iter().filter(|name| name.starts_with(".model") && name.ends_with(".uel-tmp")).collect();
        assert_eq!(left.len(), sizes.len());
        let copies: Vec<_> = left.iter().map(|name| folder.join(name.replace(".uel-tmp", "9.uel-tmp"))).collect();
        copies.iter().for_each(|copy| std::fs::write(copy, "left").unwrap());
        // Those of others stay: another stem, and what is no save's.
        let others = [".other-00001-of-00002.safetensors.0.1-1.uel-tmp", ".model-notes", ".model.safetensors.swp"];
        others.iter().for_each(|name| std::fs::write(folder.join(name), "other").unwrap());
        drop(writer);
        // One that is being written stays, too.
        let plan = plan_shards((0..6).map(|n| TensorMeta::new(n.to_string(), Dtype::U8, [10])), 10, "model").unwrap();
        let running = ShardedWriter::create(folder, &plan, &SaveOptions::new()).unwrap();
        let held = names(folder).into_iter().filter(|name| name.contains("-of-00006")).count();
        assert_eq!((held, copies.iter().filter(|copy| copy.exists()).count()), (6, 0), "{:?}", names(folder));
        save_set(folder, &[10, 10, 10, 10], 1).unwrap();
        assert_eq!(names(folder).into_iter().filter(|name| name.contains("-of-00006")).count(), 6);
        drop(running);
        let left: Vec<_> = names(folder).into_iter().filter(|name| name.starts_with('.')).collect();
        let mut expected = others.map(str::to_owned);
        expected.sort();
        assert_eq!(left, expected);
    }
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let plan = |names: &[&str], shards: &[&[&str]]| ShardPlan {
        names: names.iter().map(|name| name.to_string()).collect(),
        shards: shards
            .iter()
            .map(|shard| shard.iter().map(|name| TensorMeta::new(*name, Dtype::U8, [1])).collect())
            .collect(),
        total_bytes: 0,
    };
    let refused = |kind, plan: ShardPlan| {
        let error = ShardedWriter::create(folder.path(), &plan, &SaveOptions::new()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (kind, Some(folder.path())), "{error}");
        assert!(names(folder.path()).is_empty());
    };
    refused(Kind::Argument, plan(&[], &[]));
    refused(Kind::Argument, plan(&["a"], &[&["x"], &["y"]]));
    refused(Kind::Argument, plan(&["a", "b"], &[&["x"]]));
    refused(Kind::Argument, plan(&["a", "a"], &[&["x"], &["y"]]));
    refused(Kind::Argument, plan(&["a", "../b"], &[&["x"], &["y"]]));
    refused(Kind::Argument, plan(&["a", ".."], &[&["x"], &["y"]]));
    refused(Kind::Argument, plan(&["a", "b/"], &[&["x"], &["y"]]));
    refused(Kind::DuplicateName, plan(&["a", "b"], &[&["x"], &["x"]]));
    let error = ShardedWriter::create(folder.path(), &plan(&["a"], &[&["x"]]), &SaveOptions::new().with_rename(false))
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Argument);

    let writer =
        ShardedWriter::create(folder.path(), &plan(&["a", "b"], &[&["x"], &["y"]]), &SaveOptions::new()).unwrap();
    writer.write("x", Dtype::U8, &[1], &[1]).unwrap();
    assert_eq!(writer.write("z", Dtype::U8, &[1], &[1]).unwrap_err().kind(), Kind::UnexpectedTensors);
    assert_eq!(writer.finish().unwrap_err().kind(), Kind::MissingTensors);
    assert!(names(folder.path()).is_empty());
}
