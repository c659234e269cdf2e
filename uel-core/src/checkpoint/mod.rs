//! Checkpoints of any format: what a path stands for, and one index over all its tensors.

mod folder;
mod format;
mod gguf;
mod place;
mod pytorch;

pub use format::Format;

use crate::gguf::GgufFile;
use crate::pytorch::{PytorchFile, PytorchOptions};
use crate::safetensors::{Metadata, Opener, Rules, SafetensorsFiles, merged, open_threads, try_map};
#[cfg(feature = "remote")]
use crate::source::remote::RemoteOptions;
use crate::source::{ByteSource, is_url};
use crate::{ByteRange, Error, Kind, Result, TensorIndex};
use folder::Found;
use place::Place;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How checkpoints are opened, format by format.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FilesOptions {
    /// Which rules safetensors headers are held to.
    pub rules: Rules,
    /// What is taken from PyTorch files.
    pub pytorch: PytorchOptions,
    /// How objects at URLs are read.
    #[cfg(feature = "remote")]
    pub remote: RemoteOptions,
}

impl FilesOptions {
    /// Strict rules, everything in a PyTorch file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Holds safetensors headers to `rules`.
    #[must_use]
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Opens PyTorch files with `options`.
    #[must_use]
    pub fn with_pytorch(mut self, options: PytorchOptions) -> Self {
        self.pytorch = options;
        self
    }

    /// Reads objects at URLs as `options` say.
    #[cfg(feature = "remote")]
    #[must_use]
    pub fn with_remote(mut self, options: RemoteOptions) -> Self {
        self.remote = options;
        self
    }
}

/// Any number of files of one format, with one index over all their tensors.
///
/// ```no_run
/// use uel_core::checkpoint::{CheckpointFiles, FilesOptions};
/// let files = CheckpointFiles::open("model.pth", &FilesOptions::new())?;
/// println!("{}: {} tensors", files.format(), files.index().len());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct CheckpointFiles {
    format: Format,
    sources: Vec<Arc<dyn ByteSource>>,
    /// How many of the sources are files; those behind are made from them.
    file_count: usize,
    metadata: Vec<Option<Metadata>>,
    index: TensorIndex,
    index_file: Option<PathBuf>,
    pytorch: Vec<PytorchFile>,
    gguf: Vec<GgufFile>,
}

impl CheckpointFiles {
    /// Opens a file, a folder, or the index file of a sharded checkpoint. A file's first bytes say which format it has,
    /// whatever its name is; a folder is searched for safetensors files, then for PyTorch files, then for a GGUF file. Of a GGUF
    /// file that is split any part stands for all.
    ///
    /// The path may be a URL: `file://`, and with the feature `remote` `s3://`, `gs://`, `az://`, `http://` and `https://` of
    /// a file or an index file, and `hf://` of what is in the local cache of the Hugging Face hub.
    ///
    /// # Errors
    ///
    /// As [`SafetensorsFiles::open`], [`PytorchFile::open`] and [`GgufFile::open`]; [`Kind::Split`] and
    /// [`Kind::MissingShard`] for the parts of a split file.
    pub fn open(path: impl AsRef<Path>, options: &FilesOptions) -> Result<Self> {
        let place = Place::of(path.as_ref(), options)?;
        Self::open_with(place.path(), options, &|path| place.open(path))
    }

    /// Opens the files of a list, numbered in its order. Any of them may be a URL.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); [`Kind::Argument`] where they have different formats.
    pub fn open_list<P: AsRef<Path> + Sync>(paths: &[P], options: &FilesOptions) -> Result<Self> {
        if paths.iter().any(|path| is_url(path.as_ref())) {
            return Self::from_sources(place::open_list(paths, options)?, options);
        }
        Self::open_list_with(paths, options, &open_file)
    }

    /// Like [`open`](Self::open), with files opened by `open`. Only folders are listed by this function itself.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and those of `open`.
    pub fn open_with(path: impl AsRef<Path>, options: &FilesOptions, open: &Opener<'_>) -> Result<Self> {
        let path = path.as_ref();
        match folder::find(path, open)? {
            Found::Safetensors => Ok(SafetensorsFiles::open_with(path, options.rules, open)?.into()),
            Found::PytorchIndex(index_path) => {
                let opened = pytorch::open_index_file(&index_path, &options.pytorch, open);
                opened.map_err(|error| error.with_path(&index_path))
            }
            Found::Pytorch(paths) | Found::Gguf(paths) => Self::open_list_with(&paths, options, open),
            Found::File => {
                let source = open(path)?;
                match Format::of(&*source)? {
                    Format::Pytorch => pytorch::open_sources(vec![source], &options.pytorch),
                    Format::Gguf => gguf::open_file(path, source, open),
                    Format::Safetensors => {
                        let opened = |_: &Path| Ok(Arc::clone(&source));
                        Ok(SafetensorsFiles::open_with(path, options.rules, &opened)?.into())
                    }
                }
            }
        }
    }

    /// Opens the files of a list, numbered in its order, with files opened by `open`.
    ///
    /// # Errors
    ///
    /// As [`open_with`](Self::open_with); [`Kind::Argument`] where they have different formats. The parts of a split GGUF file
    /// must be there, each once, in any order.
    pub fn open_list_with<P: AsRef<Path> + Sync>(
        paths: &[P],
        options: &FilesOptions,
        open: &Opener<'_>,
    ) -> Result<Self> {
        let sources = try_map(paths, open_threads(paths.len()), |_, path| open(path.as_ref()))?;
        match common_format(&sources)? {
            Format::Pytorch => return pytorch::open_sources(sources, &options.pytorch),
            Format::Gguf => return gguf::open_sources(sources),
            Format::Safetensors => {}
        }
        let opened = |wanted: &Path| {
            let found = paths.iter().zip(&sources).find(|(path, _)| path.as_ref() == wanted);
            found.map_or_else(|| open(wanted), |(_, source)| Ok(Arc::clone(source)))
        };
        Ok(SafetensorsFiles::open_list_with(paths, options.rules, &opened)?.into())
    }

    /// Opens sources, numbered in their order.
    ///
    /// # Errors
    ///
    /// As [`open_list_with`](Self::open_list_with).
    pub fn from_sources(sources: Vec<Arc<dyn ByteSource>>, options: &FilesOptions) -> Result<Self> {
        match common_format(&sources)? {
            Format::Pytorch => pytorch::open_sources(sources, &options.pytorch),
            Format::Gguf => gguf::open_sources(sources),
            Format::Safetensors => Ok(SafetensorsFiles::from_sources(sources, options.rules)?.into()),
        }
    }

    /// Every fault of the checkpoint at `path`; empty where it is sound. Of a PyTorch or GGUF file the first is found, and of
    /// a GGUF file that opens each string that is not UTF-8.
    pub fn faults(path: impl AsRef<Path>, options: &FilesOptions) -> Vec<Error> {
        let place = match Place::of(path.as_ref(), options) {
            Ok(place) => place,
            Err(error) => return vec![error],
        };
        let path = place.path();
        let open: &Opener<'_> = &|path| place.open(path);
        let found = match folder::find(path, open) {
            Ok(found) => found,
            // What concerns safetensors says more.
            Err(error) => return vec![error],
        };
        let format = match found {
            Found::Safetensors => Format::Safetensors,
            Found::Pytorch(_) | Found::PytorchIndex(_) => Format::Pytorch,
            Found::Gguf(_) => Format::Gguf,
            Found::File => match open(path).and_then(|source| Format::of(&*source)) {
                Ok(format) => format,
                Err(error) => return vec![error],
            },
        };
        if format != Format::Safetensors {
            let files = match Self::open_with(path, options, open) {
                Ok(files) => files,
                Err(error) => return vec![error],
            };
            let strings = |file: &GgufFile| {
                file.metadata()
                    .faults()
                    .into_iter()
                    .map(|error| error.with_path(file.source().path()))
                    .collect::<Vec<_>>()
            };
            if format == Format::Gguf {
                return files.gguf().iter().flat_map(strings).collect();
            }
            // What opening took from the directory alone is compared with the local headers.
            let whole = |source: &Arc<dyn ByteSource>| ByteRange::new(0, source.byte_len()).unwrap_or_default();
            return files.files().iter().filter_map(|source| source.check(whole(source)).err()).collect();
        }
        SafetensorsFiles::faults_with(path, open)
    }

    /// The format of the files.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The tensors of all files.
    pub fn index(&self) -> &TensorIndex {
        &self.index
    }

    /// Where bytes are read from, in the order of [`TensorInfo::file`](crate::TensorInfo::file): the files, then
    /// sources that are made from them.
    pub fn sources(&self) -> &[Arc<dyn ByteSource>] {
        &self.sources
    }

    /// The files alone.
    pub fn files(&self) -> &[Arc<dyn ByteSource>] {
        self.sources.get(..self.file_count).unwrap_or(&self.sources)
    }

    /// The path of source number `file`, empty where there is none.
    pub fn path(&self, file: usize) -> &Path {
        self.sources.get(file).map_or(Path::new(""), |source| source.path())
    }

    /// The index file that named the shards, where there was one.
    pub fn index_file(&self) -> Option<&Path> {
        self.index_file.as_deref()
    }

    /// The `__metadata__` of safetensors file number `file`.
    pub fn file_metadata(&self, file: usize) -> Option<&Metadata> {
        self.metadata.get(file)?.as_ref()
    }

    /// The `__metadata__` of all files together. Where files disagree on a key, the first file's value stands. Of GGUF files
    /// the values are texts, short arrays JSON, and of longer ones only types and lengths are told:
    /// [`gguf`](Self::gguf) has all.
    pub fn to_metadata(&self) -> Metadata {
        if self.format == Format::Gguf {
            return gguf::to_metadata(&self.gguf);
        }
        merged(&self.metadata)
    }

    /// The bytes of all files, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.files().iter().map(|source| source.byte_len()).fold(0, u64::saturating_add)
    }

    /// The PyTorch files, in the order of [`files`](Self::files); none of another format.
    pub fn pytorch(&self) -> &[PytorchFile] {
        &self.pytorch
    }

    /// The GGUF files, in the order of [`files`](Self::files); none of another format. Of a split one the first has the
    /// metadata.
    pub fn gguf(&self) -> &[GgufFile] {
        &self.gguf
    }
}

impl From<SafetensorsFiles> for CheckpointFiles {
    fn from(files: SafetensorsFiles) -> Self {
        let SafetensorsFiles { sources, metadata, index, index_file } = files;
        let file_count = sources.len();
        Self {
            format: Format::Safetensors,
            sources,
            file_count,
            metadata,
            index,
            index_file,
            pytorch: Vec::new(),
            gguf: Vec::new(),
        }
    }
}

/// Opens one file of whatever content, which may be at a URL.
///
/// # Errors
///
/// As [`CheckpointFiles::open`], where it concerns no format.
pub fn open_source(path: impl AsRef<Path>, options: &FilesOptions) -> Result<Arc<dyn ByteSource>> {
    let place = Place::of(path.as_ref(), options)?;
    place.open(place.path())
}

fn open_file(path: &Path) -> Result<Arc<dyn ByteSource>> {
    Ok(Arc::new(crate::source::FileSource::open(path)?))
}

/// The format of all the sources; safetensors where there is none.
fn common_format(sources: &[Arc<dyn ByteSource>]) -> Result<Format> {
    let mut common = None;
    for source in sources {
        let format = Format::of(&**source)?;
        if *common.get_or_insert(format) != format {
            return Err(Error::new(Kind::Argument, "the files of one checkpoint must have one format")
                .with_path(source.path())
                .with_expected(common.unwrap_or(format))
                .with_got(format));
        }
    }
    Ok(common.unwrap_or(Format::Safetensors))
}
