//! What is loaded: data of the sizes that training has, made up of random numbers.

use super::jpeg::{Random, made_up};
use std::path::Path;
use std::sync::Arc;
use uel_data::formats::{DataFile, FixedRecords, Idx, ImageFolder, ImageTransform, TokenWindows, Tokens};
use uel_data::{Dataset, Error, Result};

/// Samples of MNIST.
const DIGITS: u32 = 60_000;
/// Tokens of two bytes: 64 MiB of them.
const TOKENS: usize = 32 << 20;
const WINDOW: usize = 1024;
/// JPEG files, of the usual size of photographs in ImageNet.
const IMAGES: u64 = 128;
const IMAGE_SIDES: (u16, u16) = (500, 375);
/// Samples of 1 MiB.
const BLOBS: usize = 256;

/// The kinds of data.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// 60,000 images of 28 x 28 bytes and their labels in IDX files, in batches of 64
    Mnist,
    /// Windows of 1,024 tokens of 16 bits, in batches of 16
    Tokens,
    /// JPEG files of 500 x 375 pixels; random crops resized to 224 x 224 and normalised, in batches of 32
    Jpeg,
    /// Records of 1 MiB, in batches of 16
    Blobs,
}

impl Workload {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mnist => "mnist",
            Self::Tokens => "tokens",
            Self::Jpeg => "jpeg",
            Self::Blobs => "blobs",
        }
    }

    pub(crate) fn batch_size(self) -> usize {
        match self {
            Self::Mnist => 64,
            Self::Tokens | Self::Blobs => 16,
            Self::Jpeg => 32,
        }
    }

    /// The data, all of it in memory but for the files of images, which are made in `folder`.
    pub(crate) fn dataset(self, folder: &Path) -> Result<Arc<dyn Dataset>> {
        Ok(match self {
            Self::Mnist => {
                let images = [&[0, 0, 8, 3][..], &DIGITS.to_be_bytes(), &[0, 0, 0, 28, 0, 0, 0, 28]].concat();
                let labels = [&[0, 0, 8, 1][..], &DIGITS.to_be_bytes()].concat();
                let images = DataFile::from_bytes("images", random(images, DIGITS as usize * 28 * 28))?;
                let labels = DataFile::from_bytes("labels", random(labels, DIGITS as usize))?;
                Arc::new(Idx::new([("image", images), ("label", labels)])?.with_normalised("image", 0.0, 1.0)?)
            }
            Self::Tokens => {
                let tokens = DataFile::from_bytes("tokens", random(Vec::new(), TOKENS * 2))?;
                Arc::new(Tokens::new(vec![tokens], &TokenWindows::new(uel_core::Dtype::U16, WINDOW))?)
            }
            Self::Jpeg => {
                let class = folder.join("class");
                std::fs::create_dir_all(&class).map_err(|error| uel_core::Error::io("make", &class, error))?;
                for image in 0..IMAGES {
                    let path = class.join(format!("{image:04}.jpg"));
                    std::fs::write(&path, made_up(IMAGE_SIDES.0, IMAGE_SIDES.1, image))
                        .map_err(|error| Error::from(uel_core::Error::io("write", &path, error)))?;
                }
                let transform = ImageTransform::random_resized_crop(224)
                    .with_flip(0.5)
                    .with_normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
                Arc::new(ImageFolder::open(folder, transform)?)
            }
            Self::Blobs => {
                let records = DataFile::from_bytes("blobs", random(Vec::new(), BLOBS << 20))?;
                Arc::new(FixedRecords::new(vec![records], 1 << 20)?)
            }
        })
    }
}

/// `head`, and `len` random bytes behind it.
fn random(head: Vec<u8>, len: usize) -> Vec<u8> {
    let (mut bytes, mut random) = (head, Random(7));
    let end = bytes.len() + len;
    bytes.reserve(len + 8);
    while bytes.len() < end {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(end);
    bytes
}
