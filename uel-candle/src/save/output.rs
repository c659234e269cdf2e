//! One file or a set of shards of any format, as whoever fills them sees it.

use std::path::Path;

use uel_core::gguf::write::{GgufContents, GgufWriter};
use uel_core::gguf::{Metadata, MetadataBuilder};
use uel_core::pytorch::write::{PthShardedWriter, PthWriter, StateDict};
use uel_core::safetensors::write::{self, SaveReport, ShardPlan, ShardedWriter, StreamingWriter, TensorMeta};
use uel_core::{Dtype, Error, Kind, Result};

use super::FileFormat;

/// What a file is to be, its tensors aside.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) format: FileFormat,
    pub(crate) core: write::SaveOptions,
    /// Other names of tied weights, and their names, where the format has them: safetensors has them in its metadata.
    pub(crate) tied: Vec<(String, String)>,
    /// The metadata of a GGUF file.
    pub(crate) gguf: GgufHead,
}

/// What a GGUF file has besides tensors.
#[derive(Clone, Debug, Default)]
pub(crate) struct GgufHead {
    /// The file whose version and byte order the new one has.
    pub(crate) like: Option<Metadata>,
    pub(crate) metadata: MetadataBuilder,
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
            FileFormat::PyTorch | FileFormat::Gguf => tied,
        };
        Self { format, core, tied, gguf: GgufHead::default() }
    }
}

/// The writer of one file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Writer<'a> {
    Safetensors(&'a StreamingWriter),
    PyTorch(&'a PthWriter),
    Gguf(&'a GgufWriter),
}

impl<'a> Writer<'a> {
    pub(crate) fn path(self) -> &'a Path {
        match self {
            Self::Safetensors(writer) => writer.path(),
            Self::PyTorch(writer) => writer.path(),
            Self::Gguf(writer) => writer.path(),
        }
    }

    pub(crate) fn write(self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.write(name, dtype, shape, bytes),
            Self::PyTorch(writer) => writer.write(name, dtype, shape, bytes),
            Self::Gguf(writer) => writer.write(name, dtype, shape, bytes),
        }
    }

    pub(crate) fn write_part(self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Safetensors(writer) => writer.write_part(name, offset, bytes),
            Self::PyTorch(writer) => writer.write_part(name, offset, bytes),
            Self::Gguf(writer) => writer.write_part(name, offset, bytes),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Output {
    One(StreamingWriter),
    Set(ShardedWriter),
    OnePth(PthWriter),
    SetPth(PthShardedWriter),
    Gguf(GgufWriter),
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
        let Target { format, core, tied, gguf } = target;
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
            FileFormat::Gguf => {
                if let Some((other, _)) = tied.first() {
                    return Err(Error::new(Kind::Argument, "a GGUF file has a tied weight under one name only")
                        .with_path(path)
                        .with_tensor(other));
                }
                let contents = GgufContents::new(metas);
                let contents = match &gguf.like {
                    Some(metadata) => contents.like(metadata),
                    None => contents,
                };
                GgufWriter::create(path, contents.with_metadata(gguf.metadata.clone()), core).map(Self::Gguf)
            }
        }
    }

    fn create_set(path: &Path, metas: Vec<TensorMeta>, max_shard_bytes: u64, target: &Target) -> Result<Self> {
        let Target { format, core, tied, .. } = target;
        let (folder, stem, extension) = format.shard_names(path);
        let plan: Result<ShardPlan> = match format {
            FileFormat::Safetensors => write::plan_shards(metas, max_shard_bytes, &stem),
            FileFormat::PyTorch => uel_core::pytorch::write::plan_shards(metas, max_shard_bytes, &stem, &extension),
            FileFormat::Gguf => Err(Error::new(Kind::Argument, "split GGUF files are not written")),
        };
        let plan = plan.map_err(|error| error.with_path(path))?;
        std::fs::create_dir_all(&folder).map_err(|error| Error::io("create the folder", &folder, error))?;
        match format {
            FileFormat::Safetensors => ShardedWriter::create(&folder, &plan, core).map(Self::Set),
            FileFormat::PyTorch => PthShardedWriter::create(&folder, &plan, tied, core).map(Self::SetPth),
            // Without a plan nobody comes here.
            FileFormat::Gguf => Err(Error::new(Kind::Internal, "split GGUF files are not written")),
        }
    }

    /// The writer of the file that holds the tensor called `name`.
    pub(crate) fn writer(&self, name: &str) -> Result<Writer<'_>> {
        match self {
            Self::One(writer) => Ok(Writer::Safetensors(writer)),
            Self::Set(writer) => writer.shard_of(name).map(Writer::Safetensors),
            Self::OnePth(writer) => Ok(Writer::PyTorch(writer)),
            Self::SetPth(writer) => writer.shard_of(name).map(Writer::PyTorch),
            Self::Gguf(writer) => Ok(Writer::Gguf(writer)),
        }
    }

    /// Whether any file goes past the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        match self {
            Self::One(writer) => writer.is_direct(),
            Self::Set(writer) => writer.shards().iter().any(StreamingWriter::is_direct),
            Self::OnePth(writer) => writer.is_direct(),
            Self::SetPth(writer) => writer.shards().iter().any(PthWriter::is_direct),
            Self::Gguf(writer) => writer.is_direct(),
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
            Self::Gguf(writer) => writer.tensors().map(|meta| meta.name.clone()).collect(),
        }
    }

    pub(crate) fn finish(self) -> Result<SaveReport> {
        match self {
            Self::One(writer) => writer.finish(),
            Self::Set(writer) => writer.finish(),
            Self::OnePth(writer) => writer.finish(),
            Self::SetPth(writer) => writer.finish(),
            Self::Gguf(writer) => writer.finish(),
        }
    }
}
