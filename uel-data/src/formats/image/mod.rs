//! Folders of images, one for each class.

mod decode;
mod transform;

pub use transform::ImageTransform;

use std::path::{Path, PathBuf};

use candle_core::DType;
use uel_core::limits::{MAX_DATA_FILES, MAX_IMAGE_FILE_BYTES};
use uel_core::source::{ByteSource as _, FileSource};
use uel_core::{Error, Kind};

use super::check_index;
use super::pieces::read_into;
use crate::{Array, Elements, Fingerprint, Layout, Result, Rows, SampleCx, Value};
use decode::Rgb;
use transform::Tools;

/// How deep folders may nest below a class.
const MAX_DEPTH: usize = 32;

/// The most folders below the root. Links may lead to one folder by many ways, so that few folders are listed often.
const MAX_FOLDERS: usize = 1 << 20;

/// The stage of the random numbers that crops and flips are made of.
const AUGMENT: u64 = 0x696d_6167_6500;

/// Images in folders, one folder for each class: the fields `image`, three channels before rows and columns, and
/// `label`, `U32`, the position of the class among the sorted names of the folders.
///
/// JPEG and PNG files are read, whatever their names say; files are found by the endings `jpg`, `jpeg` and `png`. Images are
/// decoded, cropped, resized and normalised straight into the batch, with random numbers that depend on seed, epoch and
/// index alone.
///
/// ```no_run
/// use uel_data::formats::{ImageFolder, ImageTransform};
/// let images = ImageFolder::open("imagenet/train", ImageTransform::random_resized_crop(224).with_flip(0.5))?;
/// println!("{:?}", images.classes());
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ImageFolder {
    root: PathBuf,
    classes: Vec<String>,
    /// Each file's path below the root and its class, sorted.
    files: Vec<(PathBuf, u32)>,
    transform: ImageTransform,
    layout: Layout,
    fingerprint: u64,
}

impl ImageFolder {
    /// Lists the files below `root`. No image is read.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] where a folder cannot be listed; [`Kind::Limit`] where there are more than
    /// [`MAX_DATA_FILES`] files, too many folders, or folders nest too deeply; [`Kind::Malformed`] where a link leads back
    /// to a folder that it stands in; [`Kind::Argument`] where there is no class, or the transform asks for the impossible.
    pub fn open(root: impl AsRef<Path>, transform: ImageTransform) -> uel_core::Result<Self> {
        let root = root.as_ref().to_path_buf();
        transform.check()?;
        let mut classes = Vec::new();
        let mut found = Found { root: &root, files: Vec::new(), folders: 0, above: Vec::new() };
        let mut fingerprint = transform.fingerprint(Fingerprint::new("image folder"));
        for (name, is_folder) in list(&root)? {
            if !is_folder {
                continue;
            }
            let class = u32::try_from(classes.len())
                .map_err(|_| Error::new(Kind::Limit, "there are too many classes").with_path(&root))?;
            found.collect(&PathBuf::from(&name), class)?;
            classes.push(name);
        }
        if classes.is_empty() {
            return Err(Error::new(Kind::Argument, "the folder has no folders, one for each class").with_path(&root));
        }
        let files = found.files;
        for (path, class) in &files {
            fingerprint = fingerprint.with_bytes(path.to_string_lossy().as_bytes()).with(u64::from(*class));
        }
        let layout = Layout::map([
            ("image", Layout::array(transform.dtype(), transform.shape())),
            ("label", Layout::array(DType::U32, [])),
        ]);
        Ok(Self { root, classes, files, transform, layout, fingerprint: fingerprint.finish() })
    }

    /// The names of the classes, by label.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    fn file(&self, index: u64) -> Result<(PathBuf, u32)> {
        check_index(index, self.files.len() as u64)?;
        let file = usize::try_from(index).ok().and_then(|index| self.files.get(index));
        let (path, class) = file.ok_or_else(|| crate::Error::new(Kind::Internal, "an image is no file"))?;
        Ok((self.root.join(path), *class))
    }

    fn append(&self, path: &Path, into: &mut Elements, cx: &mut SampleCx) -> Result<()> {
        cx.with_local(|cx, memory: &mut Memory| self.append_with(path, memory, into, cx))
    }

    fn append_with(&self, path: &Path, memory: &mut Memory, into: &mut Elements, cx: &mut SampleCx) -> Result<()> {
        let Memory { bytes, image, tools } = memory;
        let source = FileSource::open(path)?;
        if source.byte_len() > MAX_IMAGE_FILE_BYTES {
            return Err(Error::new(Kind::Limit, "the file of the image is too long")
                .with_path(path)
                .with_expected(format!("at most {MAX_IMAGE_FILE_BYTES} bytes"))
                .with_got(format!("{} bytes", source.byte_len()))
                .into());
        }
        // At most `MAX_IMAGE_FILE_BYTES`, and as many as the file has.
        bytes.resize(source.byte_len() as usize, 0);
        read_into(&source, 0, bytes)?;
        cx.decode(|cx| {
            decode::decode(bytes, image).map_err(|error| error.with_path(path))?;
            self.transform.append(image, &mut cx.rng(AUGMENT), tools, into)
        })
    }
}

/// Memory of a worker, used for one image after the other.
#[derive(Default)]
struct Memory {
    bytes: Vec<u8>,
    image: Rgb,
    tools: Tools,
}

impl crate::Dataset for ImageFolder {
    fn len(&self) -> u64 {
        self.files.len() as u64
    }

    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let (path, label) = self.file(index)?;
        let shape = self.transform.shape();
        let mut image = Elements::with_capacity(self.transform.dtype(), shape.iter().product())?;
        self.append(&path, &mut image, cx)?;
        let image = Array::new(shape, image)?;
        Ok(Value::Map(vec![("image".into(), image.into()), ("label".into(), Array::scalar(label).into())]))
    }

    fn layout(&self) -> Option<&Layout> {
        Some(&self.layout)
    }

    fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
        for (row, &index) in indices.iter().enumerate() {
            cx.check_cancelled()?;
            cx.at_row(row);
            let (path, label) = self.file(index)?;
            self.append(&path, rows.elements_mut(0)?, cx)?;
            rows.column_mut::<u32>(1)?.push(label);
        }
        Ok(())
    }

    fn describe(&self, index: u64) -> String {
        let file = usize::try_from(index).ok().and_then(|index| self.files.get(index));
        file.map(|(path, _)| path.display().to_string()).unwrap_or_default()
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

/// The names in a folder, sorted, and which are folders. Links count as what they lead to.
fn list(folder: &Path) -> uel_core::Result<Vec<(String, bool)>> {
    let failed = |error| Error::io("list", folder, error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().into_string();
        let name =
            name.map_err(|_| Error::new(Kind::NotUtf8, "the name of a file is not UTF-8").with_path(entry.path()))?;
        let is_folder = std::fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir());
        names.push((name, is_folder));
        if names.len() > MAX_DATA_FILES {
            return Err(Error::new(Kind::Limit, "the folder has too many files").with_path(folder));
        }
    }
    names.sort();
    Ok(names)
}

/// The images of all classes, as they are found.
struct Found<'a> {
    root: &'a Path,
    files: Vec<(PathBuf, u32)>,
    /// How many folders were listed.
    folders: usize,
    /// The folders that the one being listed stands in, by their real paths.
    above: Vec<PathBuf>,
}

impl Found<'_> {
    /// The images below a folder of a class.
    fn collect(&mut self, below: &Path, class: u32) -> uel_core::Result<()> {
        let folder = self.root.join(below);
        if self.above.len() > MAX_DEPTH {
            return Err(Error::new(Kind::Limit, "folders nest too deeply")
                .with_path(folder)
                .with_expected(format!("at most {MAX_DEPTH}")));
        }
        if self.folders >= MAX_FOLDERS {
            return Err(Error::new(Kind::Limit, "there are too many folders")
                .with_path(folder)
                .with_expected(format!("at most {MAX_FOLDERS}")));
        }
        self.folders += 1;
        let real = folder.canonicalize().map_err(|error| Error::io("list", &folder, error))?;
        if self.above.contains(&real) {
            return Err(
                Error::new(Kind::Malformed, "a link leads back to a folder that it stands in").with_path(folder)
            );
        }
        self.above.push(real);
        for (name, is_folder) in list(&folder)? {
            let path = below.join(&name);
            if is_folder {
                self.collect(&path, class)?;
                continue;
            }
            let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_ascii_lowercase);
            if matches!(ending.as_deref(), Some("jpg" | "jpeg" | "png")) {
                if self.files.len() >= MAX_DATA_FILES {
                    return Err(Error::new(Kind::Limit, "there are too many images").with_path(self.root));
                }
                self.files.push((path, class));
            }
        }
        self.above.pop();
        Ok(())
    }
}

#[cfg(all(test, unix))]
mod links;
#[cfg(test)]
mod tests;
