//! One file or a set of shards, as whoever fills them sees it.

use std::path::Path;

use uel_core::Result;
use uel_core::safetensors::write::{self, SaveReport, ShardedWriter, StreamingWriter, TensorMeta, plan_shards};

/// The end of a checkpoint file's name.
const END: &str = ".safetensors";

/// The name that shards share where the destination is a folder.
const STEM: &str = "model";

#[derive(Debug)]
pub(crate) enum Output {
    One(StreamingWriter),
    Set(ShardedWriter),
}

impl Output {
    /// One file at `path`, or with `max_shard_bytes` a set of shards: in the folder `path`, or beside `path` and named
    /// after it where that ends in `.safetensors`.
    pub(crate) fn create(
        path: &Path,
        metas: Vec<TensorMeta>,
        max_shard_bytes: Option<u64>,
        options: &write::SaveOptions,
    ) -> Result<Self> {
        let Some(max_shard_bytes) = max_shard_bytes else {
            return StreamingWriter::create(path, metas, options).map(Self::One);
        };
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let (folder, stem) = match name.strip_suffix(END) {
            Some(stem) => (path.parent().filter(|parent| !parent.as_os_str().is_empty()), stem),
            None => (Some(path), STEM),
        };
        let folder = folder.unwrap_or(Path::new("."));
        let plan = plan_shards(metas, max_shard_bytes, stem).map_err(|error| error.with_path(path))?;
        std::fs::create_dir_all(folder).map_err(|error| uel_core::Error::io("create the folder", folder, error))?;
        ShardedWriter::create(folder, &plan, options).map(Self::Set)
    }

    /// The writer of the file that holds the tensor called `name`.
    pub(crate) fn writer(&self, name: &str) -> Result<&StreamingWriter> {
        match self {
            Self::One(writer) => Ok(writer),
            Self::Set(writer) => writer.shard_of(name),
        }
    }

    /// Whether any file goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        match self {
            Self::One(writer) => writer.is_direct(),
            Self::Set(writer) => writer.shards().iter().any(StreamingWriter::is_direct),
        }
    }

    /// All tensors' names in the order in which they lie in the files.
    pub(crate) fn names(&self) -> Vec<String> {
        let of = |writer: &StreamingWriter| writer.tensors().map(|meta| meta.name.clone()).collect::<Vec<_>>();
        match self {
            Self::One(writer) => of(writer),
            Self::Set(writer) => writer.shards().iter().flat_map(of).collect(),
        }
    }

    pub(crate) fn finish(self) -> Result<SaveReport> {
        match self {
            Self::One(writer) => writer.finish(),
            Self::Set(writer) => writer.finish(),
        }
    }
}
