//! Writers: every dtype, any order, faults of callers and disks.

use super::*;
use crate::disk::{Direct, FaultDisk, LocalDisk};
use crate::gguf::{ByteOrder, GgufFile, MetadataBuilder, Version};
use crate::save::{SaveOptions, SaveReport, TensorMeta};
use crate::source::{ByteSourceExt, FileSource};
use crate::{BlockDtype, Dtype, Durability, Kind, Result};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Debug)]
struct Given {
    meta: TensorMeta,
    bytes: Vec<u8>,
}

impl Given {
    fn new(name: &str, dtype: Dtype, shape: &[usize], seed: u8) -> Self {
        let meta = TensorMeta::new(name, dtype, shape);
        let byte_len = meta.byte_len().unwrap() as usize;
        let bytes = (0..byte_len).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        Self { meta, bytes }
    }
}

fn dtypes() -> Vec<Dtype> {
    let plain = Dtype::ALL.iter().copied().filter(|&dtype| crate::gguf::type_id(dtype).is_some());
    plain.chain(BlockDtype::ALL.iter().copied().map(Dtype::Block)).collect()
}

/// Two rows of three blocks of every dtype.
fn one_of_each() -> Vec<Given> {
    let given =
        |dtype: Dtype| Given::new(dtype.as_str(), dtype, &[2, 3 * dtype.block().0 as usize], dtype.bits() as u8);
    dtypes().into_iter().map(given).collect()
}

fn contents(given: &[Given]) -> GgufContents {
    let metadata = MetadataBuilder::new().with("general.architecture", "test").unwrap();
    GgufContents::new(given.iter().map(|given| given.meta.clone())).with_metadata(metadata)
}

fn save(path: &Path, given: &[Given], contents: GgufContents, options: &SaveOptions) -> Result<SaveReport> {
    let writer = GgufWriter::create(path, contents, options)?;
    for Given { meta, bytes } in given.iter().rev() {
        writer.write(&meta.name, meta.dtype, &meta.shape, bytes)?;
    }
    writer.finish()
}

fn check(path: &Path, given: &[Given]) {
    let file = GgufFile::open(Arc::new(FileSource::open(path).unwrap())).unwrap();
    assert_eq!(file.index().len(), given.len());
    let mut end = file.header().data_start();
    for Given { meta, bytes } in given {
        let info = file.index().get(&meta.name).unwrap();
        assert_eq!((info.dtype(), info.shape()), (meta.dtype, &meta.shape[..]));
        // One behind the other, in the order in which they were announced.
        assert_eq!(info.range().start(), end);
        end = info.range().end().next_multiple_of(file.header().alignment());
        assert_eq!(file.tensor_source().read_range(info.range()).unwrap(), *bytes, "{}", meta.name);
    }
    assert_eq!(file.source().byte_len(), end.max(file.header().data_start()));
}

fn names(folder: &Path) -> Vec<String> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn every_dtype_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let all = one_of_each();
    assert_eq!(all.len(), 34);
    for version in [Version::V1, Version::V2, Version::V3] {
        let report = save(&path, &all, contents(&all).with_version(version), &SaveOptions::new()).unwrap();
        assert_eq!((report.tensor_count, report.files.len()), (34, 1));
        assert_eq!(report.files[0].bytes, std::fs::metadata(&path).unwrap().len());
        check(&path, &all);
    }
    // Without those that no one can say in the other byte order.
    let undefined = ["IQ2_XXS", "IQ3_XXS", "IQ1_M"];
    let defined: Vec<Given> = all.iter().filter(|given| !undefined.contains(&&*given.meta.name)).cloned().collect();
    assert_eq!(defined.len(), 31);
    save(&path, &defined, contents(&defined).with_byte_order(ByteOrder::Big), &SaveOptions::new()).unwrap();
    check(&path, &defined);
    for given in all.iter().filter(|given| undefined.contains(&&*given.meta.name)) {
        let contents = contents(std::slice::from_ref(given)).with_byte_order(ByteOrder::Big);
        let error = GgufWriter::create(&path, contents, &SaveOptions::new()).unwrap_err();
        assert_eq!((error.kind(), error.tensor()), (Kind::UnsupportedDtype, Some(&*given.meta.name)));
    }
}

#[test]
fn big_endian_files_are_the_other_way_round() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let q4k = Given::new("q", Dtype::Block(BlockDtype::Q4K), &[256], 0);
    let f32 = Given::new("f", Dtype::F32, &[2], 9);
    let both = [f32, q4k];
    save(&path, &both, contents(&both).with_byte_order(ByteOrder::Big), &SaveOptions::new()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(&bytes[4..8], [0, 0, 0, 3]);
    let file = GgufFile::open(Arc::new(FileSource::open(&path).unwrap())).unwrap();
    let start = file.header().data_start() as usize;
    let [f, q] = both.map(|given| given.bytes);
    assert_eq!(bytes[start..start + 8], [f[3], f[2], f[1], f[0], f[7], f[6], f[5], f[4]]);
    assert_eq!(bytes[start + 32..start + 36], [q[1], q[0], q[3], q[2]]);
    assert_eq!(bytes[start + 36..start + 32 + 144], q[4..]);
    // Any part is read as the whole is, between the tensors too.
    let source = file.tensor_source();
    let whole = source.read_range(crate::ByteRange::new(0, source.byte_len()).unwrap()).unwrap();
    assert_eq!((&whole[start..start + 8], &whole[start + 32..start + 176]), (&f[..], &q[..]));
    for (from, to) in
        [(start - 3, start + 1), (start + 1, start + 3), (start + 7, start + 35), (start + 33, start + 90)]
    {
        let part = crate::ByteRange::new(from as u64, to as u64).unwrap();
        assert_eq!(source.read_range(part).unwrap(), whole[from..to], "{part}");
    }
}

#[test]
fn parts_come_in_any_order_and_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let given = [Given::new("a", Dtype::I8, &[200_000], 1), Given::new("none", Dtype::F16, &[0, 3], 0)];
    let writer = GgufWriter::create(&path, contents(&given), &SaveOptions::new()).unwrap();
    let bytes = &given[0].bytes;
    for (from, to) in [(150_000, 200_000), (10, 90_000), (0, 10), (90_000, 150_000)] {
        writer.write_part("a", from as u64, &bytes[from..to]).unwrap();
        let again = writer.write_part("a", from as u64 + 5, &bytes[from + 5..to]).unwrap_err();
        assert_eq!(again.kind(), Kind::DuplicateName);
    }
    let kind = |result: Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(writer.write_part("a", 0, &[])), Kind::DuplicateName);
    assert_eq!(kind(writer.write_part("a", 199_999, &[0; 2])), Kind::Argument);
    assert_eq!(kind(writer.write_part("a", u64::MAX, &[0])), Kind::Argument);
    assert_eq!(kind(writer.write("b", Dtype::I8, &[1], &[0])), Kind::UnexpectedTensors);
    assert_eq!(kind(writer.write("none", Dtype::F32, &[0, 3], &[])), Kind::UnsupportedDtype);
    assert_eq!(kind(writer.write("none", Dtype::F16, &[3, 0], &[])), Kind::ShapeMismatch);
    assert_eq!(kind(writer.write("none", Dtype::F16, &[0, 3], &[0; 2])), Kind::SizeMismatch);
    writer.write_part("none", 0, &[]).unwrap();
    writer.finish().unwrap();
    check(&path, &given);
}

#[test]
fn nothing_is_there_until_all_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let given = one_of_each();
    let writer = GgufWriter::create(&path, contents(&given), &SaveOptions::new()).unwrap();
    writer.write_part("F32", 0, &given.iter().find(|given| given.meta.name == "F32").unwrap().bytes[4..]).unwrap();
    assert!(!path.exists());
    let error = writer.finish().unwrap_err();
    assert_eq!((error.kind(), error.got()), (Kind::MissingTensors, Some("0")));
    assert!(names(folder.path()).is_empty());
}

#[test]
fn contents_that_no_file_can_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let refused = |metas: Vec<TensorMeta>, options: &SaveOptions| {
        let error = GgufWriter::create(&path, metas, options).unwrap_err();
        assert_eq!(error.path(), Some(&*path), "{error}");
        error.kind()
    };
    let plain = SaveOptions::new();
    let meta = |dtype, shape: &[usize]| TensorMeta::new("a", dtype, shape);
    for dtype in [Dtype::U8, Dtype::Bool, Dtype::F8E4M3, Dtype::F4, Dtype::C64, Dtype::U64] {
        assert_eq!(refused(vec![meta(dtype, &[2])], &plain), Kind::UnsupportedDtype);
    }
    assert_eq!(refused(vec![meta(Dtype::F32, &[1; 5])], &plain), Kind::Limit);
    assert_eq!(refused(vec![meta(Dtype::F32, &[1]), meta(Dtype::F16, &[1])], &plain), Kind::DuplicateName);
    assert_eq!(refused(vec![meta(Dtype::Block(BlockDtype::Q4_0), &[3, 16])], &plain), Kind::PartialBlock);
    assert_eq!(refused(vec![meta(Dtype::I8, &[1 << 62]),], &plain), Kind::Overflow);
    assert_eq!(refused(vec![meta(Dtype::I8, &[1])], &SaveOptions::new().with_hashes(true)), Kind::Argument);
    let five = GgufContents::new([meta(Dtype::I8, &[1 << 32])]).with_version(Version::V1);
    assert_eq!(GgufWriter::create(&path, five, &plain).unwrap_err().kind(), Kind::Overflow);
    assert!(names(folder.path()).is_empty());
}

#[test]
fn metadata_of_the_options_are_strings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let options = SaveOptions::new().with_metadata_entry("general.architecture", "other").with_metadata_entry("k", "v");
    save(&path, &[], contents(&[]), &options).unwrap();
    let file = GgufFile::open(Arc::new(FileSource::open(&path).unwrap())).unwrap();
    assert_eq!(file.metadata().get_str("general.architecture").unwrap(), "test");
    assert_eq!(file.metadata().get_str("k").unwrap(), "v");
}

#[test]
fn alignments_are_those_of_the_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let given = [Given::new("a", Dtype::I8, &[3], 1), Given::new("b", Dtype::F64, &[9], 2)];
    for alignment in [1u32, 8, 64, 4096, 1 << 14] {
        let metadata = MetadataBuilder::new().with("general.alignment", alignment).unwrap();
        for direct in [Direct::Never, Direct::Always] {
            let options = SaveOptions::new().with_direct(direct);
            save(&path, &given, contents(&given).with_metadata(metadata.clone()), &options).unwrap();
            check(&path, &given);
            let bytes = std::fs::read(&path).unwrap();
            let file = GgufFile::open(Arc::new(FileSource::open(&path).unwrap())).unwrap();
            assert_eq!(file.header().alignment(), u64::from(alignment));
            let ends: Vec<(u64, u64)> = [(file.header().header_len(), file.header().data_start())]
                .into_iter()
                .chain(
                    file.index()
                        .iter()
                        .map(|info| (info.range().end(), info.range().end().next_multiple_of(alignment.into()))),
                )
                .collect();
            for (from, to) in ends {
                assert!(bytes[from as usize..to as usize].iter().all(|&byte| byte == 0), "{alignment}: {from}..{to}");
            }
        }
    }
}

#[test]
fn a_disk_that_fails_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let given = [Given::new("a", Dtype::I8, &[30], 1), Given::new("large", Dtype::I8, &[70_001], 3)];
    let durable = |disk| SaveOptions::new().with_durability(Durability::Durable).with_disk(disk);
    let mut failed = 0;
    for number in 0.. {
        std::fs::write(&path, "old").unwrap();
        let disk = Arc::new(FaultDisk::new(LocalDisk).failing_at(number));
        let saved = save(&path, &given, contents(&given), &durable(Arc::clone(&disk)));
        assert_eq!(names(folder.path()), ["m.gguf"], "{number}");
        let Err(error) = saved else {
            assert!(number >= disk.operation_count(), "the fault of operation {number} was lost");
            break;
        };
        failed += 1;
        assert_eq!(error.kind(), Kind::Io, "{error}");
        if error.path() == Some(&*path) {
            assert_eq!(std::fs::read(&path).unwrap(), b"old", "{number}: {error}");
        } else {
            // Only the folder's sync comes behind the rename.
            assert_eq!(error.path(), Some(folder.path()));
            check(&path, &given);
        }
    }
    assert!(failed > 6, "{failed}");
    for room in (0..70_300).step_by(977) {
        std::fs::write(&path, "old").unwrap();
        let disk = Arc::new(FaultDisk::new(LocalDisk).with_room(room));
        let error = save(&path, &given, contents(&given), &durable(disk)).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)), "{room}: {error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}

#[test]
fn threads_write_different_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let given: Vec<Given> =
        (0..200).map(|n| Given::new(&format!("t{n}"), Dtype::F32, &[n * 37 % 500 + 1], n as u8)).collect();
    let writer = GgufWriter::create(&path, contents(&given), &SaveOptions::new()).unwrap();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let (writer, given) = (&writer, &given);
            scope.spawn(move || {
                for Given { meta, bytes } in given.iter().skip(part).step_by(4) {
                    writer.write(&meta.name, meta.dtype, &meta.shape, bytes).unwrap();
                }
            });
        }
    });
    writer.finish().unwrap();
    check(&path, &given);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_file_is_read_as_it_was_written(
        shapes in vec((select(dtypes()), vec(0usize..4, 0..4), any::<u8>()), 0..8),
        alignment in select(vec![1u32, 8, 32, 128]),
        big in any::<bool>(),
    ) {
        let order = if big { ByteOrder::Big } else { ByteOrder::Little };
        let given: Vec<Given> = shapes.into_iter().enumerate().filter_map(|(n, (dtype, mut shape, seed))| {
            if dtype.as_block().is_some() {
                shape.push(dtype.block().0 as usize);
            }
            let undefined = big && ["IQ2_XXS", "IQ3_XXS", "IQ1_M"].contains(&dtype.as_str());
            (!undefined).then(|| Given::new(&format!("tensor {n}"), dtype, &shape, seed))
        }).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let metadata = MetadataBuilder::new().with("general.alignment", alignment).unwrap();
        let contents = contents(&given).with_metadata(metadata).with_byte_order(order);
        save(&path, &given, contents, &SaveOptions::new()).unwrap();
        check(&path, &given);
    }
}
