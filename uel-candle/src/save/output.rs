//! One file or a set of shards of either format, as whoever fills them sees it.

use std::path::Path;

use uel_core::pytorch::write::{PthShardedWriter, PthWriter, StateDict};
use uel_core::safetensors::write::{self, SaveReport, ShardPlan, ShardedWriter, StreamingWriter, TensorMeta};
use uel_core::{Dtype, Error, Result};

use super::FileFormat;

/// What a file is to be, its tensors aside.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) format: FileFormat,
    pub(crate) core: write::SaveOptions,
    /// Other names of tied weights, and their names, where the format has them: safetensors has them in its metadata.
    pub(crate) tied: Vec<(String, String)>,
}

impl Target {
    /// A file of `format` whose tensors have other names too.
    pub(crate) fn new(format: FileFormat, mut core: write::SaveOptions, tied: Vec<(String, String)>) -> Self {
        let tied = match format {
            FileFormat::Safetensors => {
                for (other, name) in tied {
                    core = core.with_metadata_entry(other, name);
                }
                Vec::new()
            }
            FileFormat::PyTorch => tied,
        };
        Self { format, core, tied }
    }
}

/// The writer of one file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer<'a> {
    Safetensors(&'a StreamingWriter),
    PyTorch(&'a PthWriter),
}

impl<'a> Writer<'a> {
    pub(crate) fn path(self) -> &'a Path {
        match self {
            Self::Safetensors(writer) => writer.path(),
            Self::PyTorch(writer) => writer.path(),
        }
    }

    pub(crate) fn write(self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.write(name, dtype, shape, bytes),
            Self::PyTorch(writer) => writer.write(name, dtype, shape, bytes),
        }
    }

    pub(crate) fn write_part(self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.write_part(name, offset, bytes),
            Self::PyTorch(writer) => writer.write_part(name, offset, bytes),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Output {
    One(StreamingWriter),
    Set(ShardedWriter),
    OnePth(PthWriter),
    SetPth(PthShardedWriter),
}

impl Output {
    /// One file at `path`, or with `max_shard_bytes` a set of shards: in the folder `path`, or beside `path` and named
    /// after it where that ends as files of the format do.
    pub(crate) fn create(
        path: &Path,
        metas: Vec<TensorMeta>,
        max_shard_bytes: Option<u64>,
        target: &Target,
    ) -> Result<Self> {
        let Target { format, core, tied } = target;
        if let Some(max_shard_bytes) = max_shard_bytes {
            return Self::create_set(path, metas, max_shard_bytes, target);
        }
        match format {
            FileFormat::Safetensors => StreamingWriter::create(path, metas, core).map(Self::One),
            FileFormat::PyTorch => {
                let dict = StateDict::new(metas);
                let dict = tied.iter().fold(dict, |dict, (other, name)| dict.with_tied(other, name));
                PthWriter::create(path, dict, core).map(Self::OnePth)
            }
        }
    }

    fn create_set(path: &Path, metas: Vec<TensorMeta>, max_shard_bytes: u64, target: &Target) -> Result<Self> {
        let Target { format, core, tied } = target;
        let (folder, stem, extension) = format.shard_names(path);
        let plan: Result<ShardPlan> = match format {
            FileFormat::Safetensors => write::plan_shards(metas, max_shard_bytes, &stem),
            FileFormat::PyTorch => uel_core::pytorch::write::plan_shards(metas, max_shard_bytes, &stem, &extension),
        };
        let plan = plan.map_err(|error| error.with_path(path))?;
        std::fs::create_dir_all(&folder).map_err(|error| Error::io("create the folder", &folder, error))?;
        match format {
            FileFormat::Safetensors => ShardedWriter::create(&folder, &plan, core).map(Self::Set),
            FileFormat::PyTorch => PthShardedWriter::create(&folder, &plan, tied, core).map(Self::SetPth),
        }
    }

    /// The writer of the file that holds the tensor called `name`.
    pub(crate) fn writer(&self, name: &str) -> Result<Writer<'_>> {
        match self {
            Self::One(writer) => Ok(Writer::Safetensors(writer)),
            Self::Set(writer) => writer.shard_of(name).map(Writer::Safetensors),
            Self::OnePth(writer) => Ok(Writer::PyTorch(writer)),
            Self::SetPth(writer) => writer.shard_of(name).map(Writer::PyTorch),
        }
    }

    /// Whether any file goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        match self {
            Self::One(writer) => writer.is_direct(),
            Self::Set(writer) => writer.shards().iter().any(StreamingWriter::is_direct),
            Self::OnePth(writer) => writer.is_direct(),
            Self::SetPth(writer) => writer.shards().iter().any(PthWriter::is_direct),
        }
    }

    /// All tensors' names in the order in which they lie in the files.
    pub(crate) fn names(&self) -> Vec<String> {
        let of = |writer: &StreamingWriter| writer.tensors().map(|meta| meta.name.clone()).collect::<Vec<_>>();
        let of_pth = |writer: &PthWriter| writer.tensors().map(|meta| meta.name.clone()).collect::<Vec<_>>();
        match self {
            Self::One(writer) => of(writer),
            Self::Set(writer) => writer.shards().iter().flat_map(of).collect(),
            Self::OnePth(writer) => of_pth(writer),
            Self::SetPth(writer) => writer.shards().iter().flat_map(of_pth).collect(),
        }
    }

    pub(crate) fn finish(self) -> Result<SaveReport> {
        match self {
            Self::One(writer) => writer.finish(),
            Self::Set(writer) => writer.finish(),
            Self::OnePth(writer) => writer.finish(),
            Self::SetPth(writer) => writer.finish(),
        }
    }
}
