//! JPEG and PNG files as RGB pixels.

use std::io::Cursor;

use uel_core::limits::{MAX_IMAGE_FILE_BYTES, MAX_IMAGE_PIXELS};
use uel_core::{Error, Kind, Result};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Every block of 64 pixels takes a bit at least.
const MAX_JPEG_PIXELS_PER_BYTE: u64 = 512;

/// Deflate makes at most 1032 bytes of one, and a byte holds at most 8 pixels.
const MAX_PNG_PIXELS_PER_BYTE: u64 = 1032 * 8;

/// Pixels of 3 bytes, row after row.
#[derive(Debug, Default)]
pub(super) struct Rgb {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) pixels: Vec<u8>,
}

/// Decodes a file into memory that is used again and again.
pub(super) fn decode(bytes: &[u8], into: &mut Rgb) -> Result<()> {
    if bytes.len() as u64 > MAX_IMAGE_FILE_BYTES {
        return Err(Error::new(Kind::Limit, "the file of the image is too long")
            .with_expected(format!("at most {MAX_IMAGE_FILE_BYTES} bytes"))
            .with_got(format!("{} bytes", bytes.len())));
    }
    if bytes.starts_with(b"\xff\xd8\xff") {
        jpeg(bytes, into)
    } else if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        png(bytes, into)
    } else {
        let head = bytes.get(..bytes.len().min(8)).unwrap_or_default();
        Err(Error::new(Kind::UnknownFormat, "the image is neither JPEG nor PNG").with_got(format!("{head:02x?}")))
    }
}

/// Takes the size that a header says, where the file is long enough to hold as many pixels.
fn begin(width: u64, height: u64, file_bytes: u64, pixels_per_byte: u64, into: &mut Rgb) -> Result<usize> {
    let pixels = width.saturating_mul(height);
    let limit = MAX_IMAGE_PIXELS.min(file_bytes.saturating_mul(pixels_per_byte));
    if pixels == 0 || pixels > limit {
        return Err(Error::new(Kind::Limit, "the image has no pixels, or too many for a file of its length")
            .with_expected(format!("1 to {limit}"))
            .with_got(format!("{width} x {height}")));
    }
    let too_large = |_| Error::new(Kind::Limit, "the image is too wide or too high");
    (into.width, into.height) = (width.try_into().map_err(too_large)?, height.try_into().map_err(too_large)?);
    // At most 2^28 pixels of 3 bytes.
    Ok((pixels * 3) as usize)
}

fn reserve(into: &mut Rgb, byte_len: usize) -> Result<()> {
    into.pixels.try_reserve(byte_len.saturating_sub(into.pixels.len())).map_err(|_| {
        Error::new(Kind::OutOfMemory, "cannot reserve memory for an image").with_got(format!("{byte_len} bytes"))
    })?;
    into.pixels.resize(byte_len, 0);
    Ok(())
}

fn jpeg(bytes: &[u8], into: &mut Rgb) -> Result<()> {
    let broken = |error: zune_jpeg::errors::DecodeErrors| {
        Error::new(Kind::Malformed, format!("the JPEG file is broken: {error:?}"))
    };
    let side = usize::from(u16::MAX);
    let options = DecoderOptions::default()
        .set_max_width(side)
        .set_max_height(side)
        .set_strict_mode(true)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(broken)?;
    let (width, height) = decoder.info().map_or((0, 0), |info| (u64::from(info.width), u64::from(info.height)));
    let byte_len = begin(width, height, bytes.len() as u64, MAX_JPEG_PIXELS_PER_BYTE, into)?;
    if decoder.output_buffer_size() != Some(byte_len) {
        return Err(Error::new(Kind::Malformed, "the JPEG file does not become RGB pixels"));
    }
    reserve(into, byte_len)?;
    decoder.decode_into(&mut into.pixels).map_err(broken)
}

fn png(bytes: &[u8], into: &mut Rgb) -> Result<()> {
    let broken = |error: png::DecodingError| Error::new(Kind::Malformed, format!("the PNG file is broken: {error}"));
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 64 << 20 });
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let (width, height) = (u64::from(reader.info().width), u64::from(reader.info().height));
    let byte_len = begin(width, height, bytes.len() as u64, MAX_PNG_PIXELS_PER_BYTE, into)?;
    let (color, _) = reader.output_color_type();
    let channels = color.samples();
    let decoded = byte_len / 3 * channels;
    if reader.output_buffer_size() != Some(decoded) {
        return Err(Error::new(Kind::Malformed, "the PNG file does not become pixels of 8 bits"));
    }
    reserve(into, decoded.max(byte_len))?;
    reader.next_frame(into.pixels.get_mut(..decoded).unwrap_or_default()).map_err(broken)?;
    match channels {
        3 => {}
        // Grey becomes three equal channels, from the back so that no pixel is overwritten before it is read.
        1 | 2 => {
            for pixel in (0..byte_len / 3).rev() {
                let grey = into.pixels.get(pixel * channels).copied().unwrap_or_default();
                if let Some(rgb) = into.pixels.get_mut(pixel * 3..pixel * 3 + 3) {
                    rgb.fill(grey);
                }
            }
        }
        // What is seen through does not count, as in torchvision.
        _ => {
            for pixel in 0..byte_len / 3 {
                into.pixels.copy_within(pixel * 4..pixel * 4 + 3, pixel * 3);
            }
        }
    }
    into.pixels.truncate(byte_len);
    Ok(())
}
