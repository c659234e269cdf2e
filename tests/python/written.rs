//! Files that UEL writes, as the Python package reads them.

use std::cell::RefCell;
use std::path::Path;

use proptest::prelude::*;
use uel::TensorMeta;
use uel::core::Dtype;
use uel::core::safetensors::write::{IncrementalOptions, IncrementalWriter, SaveOptions, StreamingWriter};

use super::{Contents, Reference, any_contents, assert_same, runner};

/// Which writer writes, and with how much room for the header.
#[derive(Clone, Debug)]
enum Writer {
    Streaming,
    Incremental { max_header_bytes: usize },
}

fn write(path: &Path, contents: &Contents, writer: &Writer) {
    let mut options = SaveOptions::new();
    if let Some(metadata) = &contents.metadata {
        options = options.with_metadata(metadata.clone());
    }
    let tensors = contents.tensors.iter().map(|(name, tensor)| {
        let dtype = Dtype::from_safetensors(&tensor.dtype).unwrap();
        (name, dtype, tensor)
    });
    match writer {
        Writer::Streaming => {
            let metas = tensors.clone().map(|(name, dtype, tensor)| TensorMeta::new(name, dtype, tensor.shape.clone()));
            let writer = StreamingWriter::create(path, metas, &options).unwrap();
            for (name, dtype, tensor) in tensors {
                writer.write(name, dtype, &tensor.shape, &tensor.bytes).unwrap();
            }
            writer.finish().unwrap();
        }
        Writer::Incremental { max_header_bytes } => {
            let options = IncrementalOptions::new().with_save(options).with_max_header_bytes(*max_header_bytes);
            let writer = IncrementalWriter::create(path, &options).unwrap();
            for (name, dtype, tensor) in tensors {
                writer.write(name, dtype, &tensor.shape, &tensor.bytes).unwrap();
            }
            writer.finish().unwrap();
        }
    }
}

#[test]
#[ignore = "lane python: scripts/test python"]
fn files_that_uel_writes_read_the_same_by_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("written.safetensors");
    let reference = RefCell::new(Reference::start());
    let writers = prop_oneof![
        2 => Just(Writer::Streaming),
        1 => (0..10_000usize).prop_map(|max_header_bytes| Writer::Incremental { max_header_bytes }),
    ];
    let result = runner(256).run(&(any_contents(), writers), |(contents, writer)| {
        write(&path, &contents, &writer);
        assert_same(&reference.borrow_mut().dump(&path), &contents, "read by the package");
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}
