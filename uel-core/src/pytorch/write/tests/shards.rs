//! Sets of files.

use super::*;
use crate::Kind;

#[test]
fn a_set_has_an_index_as_transformers_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let given = [
        Given::new("a", Dtype::U8, &[10], 1),
        Given::new("b", Dtype::F32, &[5], 2),
        Given::new("c", Dtype::U8, &[9], 3),
    ];
    let plan = plan_shards(metas(&given), 20, "pytorch_model", "bin").unwrap();
    assert_eq!(plan.names.len(), 3);
    let tied = [("z".to_owned(), "b".to_owned())];
    let writer = PthShardedWriter::create(folder.path(), &plan, &tied, &SaveOptions::new()).unwrap();
    for given in given.iter().rev() {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes).unwrap();
    }
    assert_eq!(writer.write("x", Dtype::U8, &[1], &[1]).unwrap_err().kind(), Kind::UnexpectedTensors);
    let report = writer.finish().unwrap();
    assert_eq!((report.tensor_count, report.tensor_bytes, report.files.len()), (4, 39, 4));
    for (name, given) in plan.names.iter().zip(&given) {
        check(&folder.path().join(name), std::slice::from_ref(given));
    }
    let index = std::fs::read_to_string(folder.path().join("pytorch_model.bin.index.json")).unwrap();
    let expected = "{\n  \"metadata\": {\n    \"total_size\": 39\n  },\n  \"weight_map\": {\n    \
                    \"a\": \"pytorch_model-00001-of-00003.bin\",\n    \"b\": \"pytorch_model-00002-of-00003.bin\",\n    \
                    \"c\": \"pytorch_model-00003-of-00003.bin\",\n    \"z\": \"pytorch_model-00002-of-00003.bin\"\n  }\n}\n";
    assert_eq!(index, expected);
    assert_eq!(names(folder.path()).len(), 4);
}

#[test]
fn one_file_has_no_index() {
    let folder = tempfile::tempdir().unwrap();
    let given = some_tensors(1);
    let plan = plan_shards(metas(&given), 1 << 20, "model", "pth").unwrap();
    let writer = PthShardedWriter::create(folder.path(), &plan, &[], &SaveOptions::new()).unwrap();
    for given in &given {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write(name, dtype, shape, bytes).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(names(folder.path()), ["model.pth"]);
    check(&folder.path().join("model.pth"), &given);
}

#[test]
fn one_file_in_place_of_a_set_is_what_the_folder_holds() {
    let folder = tempfile::tempdir().unwrap();
    for (most, byte) in [(10, 1), (100, 2)] {
        let given = ["a", "b", "c"].map(|name| Given::new(name, Dtype::U8, &[10], byte));
        let plan = plan_shards(metas(&given), most, "pytorch_model", "bin").unwrap();
        let tied = [("z".to_owned(), "b".to_owned())];
        let writer = PthShardedWriter::create(folder.path(), &plan, &tied, &SaveOptions::new()).unwrap();
        for given in &given {
            let (name, dtype, shape, bytes) = given.parts();
            writer.write(name, dtype, shape, bytes).unwrap();
        }
        writer.finish().unwrap();
        if most == 100 {
            check(&folder.path().join("pytorch_model.bin"), &given);
        }
    }
    let index = std::fs::read_to_string(folder.path().join("pytorch_model.bin.index.json")).unwrap();
    assert_eq!(index.matches("\"pytorch_model.bin\"").count(), 4, "{index}");
    assert!(!index.contains("-of-"), "{index}");
}

#[test]
fn faulty_plans_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = plan_shards(metas(&some_tensors(1)), 60, "model", "bin").unwrap();
    let refused = |plan: &_, tied: &[(&str, &str)], options: &SaveOptions, kind| {
        let tied: Vec<_> = tied.iter().map(|(other, name)| ((*other).to_owned(), (*name).to_owned())).collect();
        let error = PthShardedWriter::create(folder.path(), plan, &tied, options).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.path().is_some() && names(folder.path()).is_empty());
    };
    let options = SaveOptions::new();
    refused(&plan, &[("x", "nowhere")], &options, Kind::UnknownTensor);
    refused(&plan, &[("a", "b")], &options, Kind::DuplicateName);
    refused(&plan, &[("x", "a"), ("x", "b")], &options, Kind::DuplicateName);
    refused(&plan, &[], &options.clone().with_rename(false), Kind::Argument);
    refused(&plan, &[], &options.clone().with_hashes(true), Kind::Argument);
    let again = plan.shards[0][0].clone();
    plan.shards[1].push(again);
    refused(&plan, &[], &options, Kind::DuplicateName);
    plan.names[0] = "../out.bin".to_owned();
    refused(&plan, &[], &options, Kind::Argument);
}
