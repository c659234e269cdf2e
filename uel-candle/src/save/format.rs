//! The formats that files are written in.

use std::path::{Path, PathBuf};

/// The format of a file that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileFormat {
    /// `.safetensors`.
    #[default]
    Safetensors,
    /// `.pth`, `.pt` or `.bin`: an archive as `torch.save` writes it for a dict of tensors, which `torch.load` reads with
    /// `weights_only=True` and can map. It holds neither metadata nor hashes.
    PyTorch,
    /// `.gguf`. Plain tensors and blocks; the metadata are strings, unless an [`Edit`](crate::Edit) brings others. It holds
    /// no hashes, is not split, and has tied weights under one name only.
    Gguf,
}

impl FileFormat {
    /// The extensions of files of the format.
    pub const fn extensions(self) -> &'static [&'static str] {
        match self {
            FileFormat::Safetensors => &["safetensors"],
            FileFormat::PyTorch => &["pth", "pt", "bin", "ckpt"],
            FileFormat::Gguf => &["gguf"],
        }
    }

    /// The format that the extension of `path` stands for: safetensors unless it is `gguf` or one of PyTorch's.
    ///
    /// ```
    /// use uel_candle::FileFormat;
    /// assert_eq!(FileFormat::of_path("out/pytorch_model.bin"), FileFormat::PyTorch);
    /// assert_eq!(FileFormat::of_path("model.gguf"), FileFormat::Gguf);
    /// assert_eq!(FileFormat::of_path("out/model.safetensors"), FileFormat::Safetensors);
    /// assert_eq!(FileFormat::of_path("out"), FileFormat::Safetensors);
    /// ```
    pub fn of_path(path: impl AsRef<Path>) -> Self {
        let others = [FileFormat::PyTorch, FileFormat::Gguf];
        let found = others.into_iter().find(|format| format.own_extension(path.as_ref()).is_some());
        found.unwrap_or(FileFormat::Safetensors)
    }

    /// The index file of the shards that are written to `path`: see
    /// [`SaveOptions::with_max_shard_bytes`](crate::SaveOptions::with_max_shard_bytes).
    pub fn index_path(self, path: impl AsRef<Path>) -> PathBuf {
        let (folder, stem, extension) = self.shard_names(path.as_ref());
        folder.join(format!("{stem}.{extension}.index.json"))
    }

    /// The extension of `path` where it is one of the format.
    fn own_extension(self, path: &Path) -> Option<&'static str> {
        let extension = path.extension()?;
        self.extensions().iter().find(|own| extension.eq_ignore_ascii_case(own)).copied()
    }

    /// The folder, stem and extension of shards that are written to `path`: a folder, or the name that they share.
    pub(super) fn shard_names(self, path: &Path) -> (PathBuf, String, String) {
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let own = self.own_extension(path).filter(|_| !path.is_dir()).and_then(|own| {
            let stem = name.get(..name.len().checked_sub(own.len() + 1)?)?;
            Some((stem.to_owned(), own.to_owned()))
        });
        match own {
            Some((stem, extension)) => {
                let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                (folder.unwrap_or(Path::new(".")).to_path_buf(), stem, extension)
            }
            None => {
                let (stem, extension) = match self {
                    FileFormat::Safetensors => ("model", "safetensors"),
                    FileFormat::PyTorch => ("pytorch_model", "bin"),
                    FileFormat::Gguf => ("model", "gguf"),
                };
                (path.to_path_buf(), stem.to_owned(), extension.to_owned())
            }
        }
    }
}
