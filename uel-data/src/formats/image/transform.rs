//! What becomes of an image on its way into a row: cropped, resized, mirrored, normalised.

use candle_core::DType;
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use uel_core::limits::MAX_IMAGE_PIXELS;
use uel_core::{Error, Kind, Result};

use super::decode::Rgb;
use crate::{Buffer, Element, Elements, Fingerprint, Rng};

/// How often a random crop is drawn before the middle of the image is taken.
const ATTEMPTS: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Crop {
    /// Area as a part of the image's, and width by height.
    Random { scale: (f64, f64), ratio: (f64, f64) },
    /// The middle, after the shorter side was resized to this.
    Centre { shorter: u32 },
    /// All of it, whatever its sides.
    Whole,
}

/// What becomes of an image: a crop of fixed size, resized with a bilinear filter as Pillow does it, with three channels
/// before rows and columns.
///
/// ```
/// use uel_data::formats::ImageTransform;
/// let train = ImageTransform::random_resized_crop(224)
///     .with_flip(0.5)
///     .with_normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
/// let validate = ImageTransform::centre_crop(256, 224).with_normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
/// # let _ = (train, validate);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ImageTransform {
    crop: Crop,
    width: u32,
    height: u32,
    flip: f64,
    /// Mean and deviation of each channel; without them pixels stay bytes.
    normalise: Option<([f32; 3], [f32; 3])>,
}

impl ImageTransform {
    fn new(crop: Crop, width: u32, height: u32) -> Self {
        Self { crop, width, height, flip: 0.0, normalise: None }
    }

    /// A random part of 8 to 100% of the image with sides of 3:4 to 4:3, resized to `size` in both directions, as
    /// torchvision's `RandomResizedCrop` has it.
    pub fn random_resized_crop(size: u32) -> Self {
        Self::new(Crop::Random { scale: (0.08, 1.0), ratio: (0.75, 4.0 / 3.0) }, size, size)
    }

    /// The middle `size` pixels in both directions, after the shorter side was resized to `shorter`.
    pub fn centre_crop(shorter: u32, size: u32) -> Self {
        Self::new(Crop::Centre { shorter }, size, size)
    }

    /// The whole image, resized to these sides.
    pub fn resize(width: u32, height: u32) -> Self {
        Self::new(Crop::Whole, width, height)
    }

    /// Another range of areas for random crops, as parts of the image's area.
    #[must_use]
    pub fn with_scale(mut self, smallest: f64, largest: f64) -> Self {
        if let Crop::Random { scale, .. } = &mut self.crop {
            *scale = (smallest, largest);
        }
        self
    }

    /// Another range of width by height for random crops.
    #[must_use]
    pub fn with_ratio(mut self, narrowest: f64, widest: f64) -> Self {
        if let Crop::Random { ratio, .. } = &mut self.crop {
            *ratio = (narrowest, widest);
        }
        self
    }

    /// Mirrors left and right with this probability.
    #[must_use]
    pub fn with_flip(mut self, probability: f64) -> Self {
        self.flip = probability;
        self
    }

    /// Gives `F32`: the byte by 255, less the mean of its channel, by the deviation. Otherwise rows are `U8`.
    #[must_use]
    pub fn with_normalise(mut self, mean: [f32; 3], deviation: [f32; 3]) -> Self {
        self.normalise = Some((mean, deviation));
        self
    }

    pub(super) fn dtype(&self) -> DType {
        if self.normalise.is_some() { DType::F32 } else { DType::U8 }
    }

    pub(super) fn shape(&self) -> [usize; 3] {
        [3, self.height as usize, self.width as usize]
    }

    pub(super) fn fingerprint(&self, hash: Fingerprint) -> Fingerprint {
        hash.with_bytes(format!("{self:?}").as_bytes())
    }

    pub(super) fn check(&self) -> Result<()> {
        let pixels = u64::from(self.width) * u64::from(self.height);
        let sound = match self.crop {
            Crop::Random { scale: (least, most), ratio: (narrow, wide) } => {
                0.0 < least && least <= most && most <= 1.0 && 0.0 < narrow && narrow <= wide && wide.is_finite()
            }
            Crop::Centre { shorter } => self.width <= shorter && self.height <= shorter,
            Crop::Whole => true,
        };
        let divides = self.normalise.is_none_or(|(_, deviation)| deviation.iter().all(|&value| value != 0.0));
        if sound && divides && (1..=MAX_IMAGE_PIXELS).contains(&pixels) && (0.0..=1.0).contains(&self.flip) {
            return Ok(());
        }
        Err(Error::new(Kind::Argument, "the transform of images asks for the impossible").with_got(format!("{self:?}")))
    }

    /// The part of the image that is taken: left, top, width, height.
    fn part(&self, width: u32, height: u32, rng: &mut Rng) -> [f64; 4] {
        let (w, h) = (f64::from(width), f64::from(height));
        match self.crop {
            Crop::Whole => [0.0, 0.0, w, h],
            Crop::Random { scale, ratio } => {
                for _ in 0..ATTEMPTS {
                    let area = w * h * (scale.0 + (scale.1 - scale.0) * rng.uniform());
                    let (narrow, wide) = (ratio.0.ln(), ratio.1.ln());
                    let sides = (narrow + (wide - narrow) * rng.uniform()).exp();
                    let (part_w, part_h) = ((area * sides).sqrt().round(), (area / sides).sqrt().round());
                    if (1.0..=w).contains(&part_w) && (1.0..=h).contains(&part_h) {
                        // Whole numbers that are not negative and below the image's sides.
                        let left = rng.below((w - part_w) as u64 + 1) as f64;
                        let top = rng.below((h - part_h) as u64 + 1) as f64;
                        return [left, top, part_w, part_h];
                    }
                }
                // As much of the middle as the allowed sides permit.
                let (part_w, part_h) = match w / h {
                    sides if sides < ratio.0 => (w, (w / ratio.0).round().clamp(1.0, h)),
                    sides if sides > ratio.1 => ((h * ratio.1).round().clamp(1.0, w), h),
                    _ => (w, h),
                };
                [((w - part_w) / 2.0).floor(), ((h - part_h) / 2.0).floor(), part_w, part_h]
            }
            Crop::Centre { shorter } => {
                let shorter = f64::from(shorter);
                let (new_w, new_h) =
                    if w <= h { (shorter, (shorter * h / w).floor()) } else { ((shorter * w / h).floor(), shorter) };
                // Where the crop of the resized image lies in the one that is not, so that it is resized once.
                let (out_w, out_h) = (f64::from(self.width), f64::from(self.height));
                let left = ((new_w - out_w) / 2.0).round_ties_even();
                let top = ((new_h - out_h) / 2.0).round_ties_even();
                let (by_x, by_y) = (w / new_w, h / new_h);
                let (part_w, part_h) = ((out_w * by_x).min(w), (out_h * by_y).min(h));
                [(left * by_x).min(w - part_w), (top * by_y).min(h - part_h), part_w, part_h]
            }
        }
    }

    /// Appends the transformed image to a column.
    pub(super) fn append(
        &self,
        image: &Rgb,
        rng: &mut Rng,
        tools: &mut Tools,
        into: &mut Elements,
    ) -> crate::Result<()> {
        let [left, top, width, height] = self.part(image.width, image.height, rng);
        let mirrored = rng.chance(self.flip);
        let wrong = |error: &dyn std::fmt::Display| {
            Error::new(Kind::Malformed, format!("the image cannot be resized: {error}"))
        };
        // Typed, because the call that takes any pixel compiles the resizing of all of them: 6 MB.
        let from =
            TypedImageRef::<U8x3>::from_buffer(image.width, image.height, &image.pixels).map_err(|e| wrong(&e))?;
        let (out_w, out_h) = (self.width as usize, self.height as usize);
        tools.resized.resize(out_w * out_h * 3, 0);
        let mut to =
            TypedImage::<U8x3>::from_buffer(self.width, self.height, &mut tools.resized).map_err(|e| wrong(&e))?;
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Bilinear))
            .crop(left, top, width, height);
        tools.resizer.resize_typed(&from, &mut to, &options).map_err(|e| wrong(&e))?;
        let pixels = tools.resized.as_chunks::<3>().0;
        match (self.normalise, into) {
            (Some((mean, deviation)), Elements::F32(column)) => {
                for channel in 0..3 {
                    let (mean, deviation) = (part(&mean, channel), part(&deviation, channel));
                    let table: [f32; 256] = std::array::from_fn(|byte| (byte as f32 / 255.0 - mean) / deviation);
                    // A byte is always in the table.
                    let value = |byte: u8| table.get(usize::from(byte)).copied().unwrap_or_default();
                    append_rows(column, pixels, out_w, mirrored, |pixel| value(pick(pixel, channel)));
                }
            }
            (None, Elements::U8(column)) => {
                for channel in 0..3 {
                    append_rows(column, pixels, out_w, mirrored, |pixel| pick(pixel, channel));
                }
            }
            _ => return Err(Error::new(Kind::Internal, "the column of images has another dtype").into()),
        }
        Ok(())
    }
}

fn pick(pixel: &[u8; 3], channel: usize) -> u8 {
    pixel.get(channel).copied().unwrap_or_default()
}

fn part(values: &[f32; 3], channel: usize) -> f32 {
    values.get(channel).copied().unwrap_or_default()
}

/// Appends what `value` makes of each pixel, row by row.
fn append_rows<T: Element>(
    column: &mut Buffer<T>,
    pixels: &[[u8; 3]],
    width: usize,
    mirrored: bool,
    value: impl Fn(&[u8; 3]) -> T + Copy,
) {
    for row in pixels.chunks_exact(width.max(1)) {
        if mirrored {
            column.extend(row.iter().rev().map(value));
        } else {
            column.extend(row.iter().map(value));
        }
    }
}

/// What resizing needs besides the image, used again for the next one.
#[derive(Debug, Default)]
pub(super) struct Tools {
    resizer: Resizer,
    resized: Vec<u8>,
}
