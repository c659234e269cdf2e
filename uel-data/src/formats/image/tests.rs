use super::*;
use crate::Dataset;
use crate::formats::testkit::*;

fn png(width: u32, height: u32, color: png::ColorType, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(color);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().unwrap().write_image_data(pixels).unwrap();
    bytes
}

/// A grey JPEG of 16 x 8 pixels: the left block 200, the right one 56 in the mean.
fn jpeg() -> Vec<u8> {
    let mut bytes = vec![0xff, 0xd8, 0xff, 0xdb, 0, 67, 0];
    bytes.extend([1; 64]);
    bytes.extend([0xff, 0xc0, 0, 11, 8, 0, 8, 0, 16, 1, 1, 0x11, 0]);
    // Lengths of DC differences: 10 and 11 bits, codes of one and two bits. AC: end of block, code 0.
    bytes.extend([0xff, 0xc4, 0, 21, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 11]);
    bytes.extend([0xff, 0xc4, 0, 20, 0x10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend([0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0]);
    // DC is 8 times the distance from 128: +576, then -576, a difference of -1152.
    let bits = format!("0{:010b}0{}{:011b}0", 576, "10", 2047 - 1152);
    let padded = format!("{bits:1<32}");
    for byte in padded.as_bytes().chunks(8) {
        let byte = u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap();
        bytes.push(byte);
        if byte == 0xff {
            bytes.push(0);
        }
    }
    bytes.extend([0xff, 0xd9]);
    bytes
}

fn decoded(bytes: &[u8]) -> uel_core::Result<Rgb> {
    let mut image = Rgb::default();
    decode::decode(bytes, &mut image).map(|()| image)
}

#[test]
fn every_kind_of_png_becomes_rgb() {
    let cases: [(png::ColorType, &[u8], &[u8]); 4] = [
        (png::ColorType::Grayscale, &[7, 9], &[7, 7, 7, 9, 9, 9]),
        (png::ColorType::GrayscaleAlpha, &[7, 0, 9, 255], &[7, 7, 7, 9, 9, 9]),
        (png::ColorType::Rgb, &[1, 2, 3, 4, 5, 6], &[1, 2, 3, 4, 5, 6]),
        (png::ColorType::Rgba, &[1, 2, 3, 0, 4, 5, 6, 255], &[1, 2, 3, 4, 5, 6]),
    ];
    for (color, pixels, expected) in cases {
        let image = decoded(&png(2, 1, color, pixels)).unwrap();
        assert_eq!((image.width, image.height, &*image.pixels), (2, 1, expected), "{color:?}");
    }
}

#[test]
fn a_jpeg_becomes_rgb() {
    let image = decoded(&jpeg()).unwrap();
    assert_eq!((image.width, image.height, image.pixels.len()), (16, 8, 16 * 8 * 3));
    assert!(image.pixels.chunks(48).all(|row| row[..24].iter().all(|&byte| byte == 200)));
    assert!(image.pixels.chunks(48).all(|row| row[24..].iter().all(|&byte| byte == 56)));
}

#[test]
fn broken_images_are_refused() {
    assert_eq!(decoded(b"GIF89a").err().unwrap().kind(), Kind::UnknownFormat);
    let whole = jpeg();
    assert_eq!(decoded(&whole[..100]).err().unwrap().kind(), Kind::Malformed);
    let mut huge = whole.clone();
    let frame = huge.windows(2).position(|bytes| bytes == [0xff, 0xc0]).unwrap();
    huge[frame + 5..frame + 9].fill(0xff);
    assert_eq!(decoded(&huge).err().unwrap().kind(), Kind::Limit);
    let mut bomb = png(2, 1, png::ColorType::Rgb, &[0; 6]);
    bomb[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let sum = crc32fast::hash(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(decoded(&bomb).err().unwrap().kind(), Kind::Limit);
    let pixels: Vec<u8> = (0..192).collect();
    for bytes in [whole, png(8, 8, png::ColorType::Rgb, &pixels)] {
        hostile(&[("x", bytes)], |files| {
            let bytes = files[0].read(0, files[0].byte_len()).unwrap();
            let _ = decoded(&bytes);
        });
    }
}

fn folder() -> Folder {
    let folder = Folder::new();
    let pixels: Vec<u8> = (0..4 * 2 * 3).map(|byte| byte * 10).collect();
    folder.write("cat/b.png", &png(4, 2, png::ColorType::Rgb, &pixels));
    folder.write("cat/deep/a.PNG", &png(4, 2, png::ColorType::Rgb, &pixels));
    folder.write("ant/x.jpg", &jpeg());
    folder.write("ant/notes.txt", b"no image");
    folder.write("stray.png", b"in no class");
    std::fs::create_dir(folder.path().join("bee")).unwrap();
    folder
}

#[test]
fn a_folder_is_a_dataset() {
    let folder = folder();
    let images = ImageFolder::open(folder.path(), ImageTransform::resize(4, 2)).unwrap();
    assert_eq!(images.classes(), ["ant", "bee", "cat"]);
    assert_eq!((images.len(), images.describe(1)), (3, "cat/b.png".to_owned()));
    let planes: Vec<u8> = (0..3).flat_map(|channel| (0..8).map(move |pixel| (pixel * 3 + channel) * 10)).collect();
    assert_eq!(get(&images, 1).get("image"), Some(&array(&[3, 2, 4], planes.clone())));
    assert_eq!(get(&images, 1).get("label"), Some(&array(&[], vec![2u32])));
    check(&images);

    let mirror = ImageTransform::resize(4, 2).with_flip(1.0).with_normalise([0.5, 0.0, 0.0], [0.5, 1.0, 2.0]);
    let images = ImageFolder::open(folder.path(), mirror).unwrap();
    let expected: Vec<f32> = planes
        .chunks(4)
        .enumerate()
        .flat_map(|(row, bytes)| {
            let (mean, deviation) = [(0.5, 0.5), (0.0, 1.0), (0.0, 2.0)][row / 2];
            bytes.iter().rev().map(move |&byte| (f32::from(byte) / 255.0 - mean) / deviation)
        })
        .collect();
    assert_eq!(get(&images, 1).get("image"), Some(&array(&[3, 2, 4], expected)));
    check(&images);

    let centre = ImageFolder::open(folder.path(), ImageTransform::centre_crop(2, 2)).unwrap();
    let middle: Vec<u8> = planes.chunks(4).flat_map(|row| row[1..3].to_vec()).collect();
    assert_eq!(get(&centre, 1).get("image"), Some(&array(&[3, 2, 2], middle)));
}

#[test]
fn random_crops_depend_on_the_sample_alone() {
    let folder = folder();
    let images = ImageFolder::open(folder.path(), ImageTransform::random_resized_crop(3).with_flip(0.5)).unwrap();
    let draw = |epoch: u64, keys: &[u64]| {
        let mut cx = SampleCx::new(1, epoch);
        cx.begin(keys);
        let mut rows = Rows::new(images.layout().unwrap(), keys.len()).unwrap();
        images.write_rows(&vec![1; keys.len()], &mut rows, &mut cx).unwrap();
        rows.column_mut::<u8>(0).unwrap().to_vec()
    };
    let both = draw(0, &[5, 6]);
    assert_eq!(both[27..], draw(0, &[6]));
    assert_eq!(both[..27], draw(0, &[5]));
    let crops: std::collections::HashSet<Vec<u8>> = (0..20).map(|key| draw(0, &[key])).collect();
    assert!(crops.len() > 5, "{}", crops.len());
    assert!((0..20).any(|epoch| draw(epoch, &[5]) != draw(0, &[5])));
}

#[test]
fn impossible_transforms_and_folders_are_refused() {
    let folder = folder();
    let kind = |transform| ImageFolder::open(folder.path(), transform).unwrap_err().kind();
    assert_eq!(kind(ImageTransform::resize(0, 4)), Kind::Argument);
    assert_eq!(kind(ImageTransform::resize(u32::MAX, u32::MAX)), Kind::Argument);
    assert_eq!(kind(ImageTransform::centre_crop(3, 4)), Kind::Argument);
    assert_eq!(kind(ImageTransform::resize(4, 4).with_flip(f64::NAN)), Kind::Argument);
    assert_eq!(kind(ImageTransform::random_resized_crop(4).with_scale(0.5, 0.2)), Kind::Argument);
    assert_eq!(kind(ImageTransform::resize(4, 4).with_normalise([0.; 3], [1., 0., 1.])), Kind::Argument);
    let transform = ImageTransform::resize(4, 4);
    assert_eq!(ImageFolder::open(folder.path().join("bee"), transform.clone()).unwrap_err().kind(), Kind::Argument);
    assert_eq!(ImageFolder::open(folder.path().join("absent"), transform.clone()).unwrap_err().kind(), Kind::Io);
    folder.write("ant/x.jpg", b"not a JPEG");
    let broken = ImageFolder::open(folder.path(), transform).unwrap();
    let error = broken.get(0, &mut SampleCx::new(0, 0)).unwrap_err();
    assert!(error.to_string().contains("x.jpg") && error.kind() == Kind::UnknownFormat, "{error}");
    // The loader tells decoding from reading.
    let mut epoch = crate::DataLoader::builder(broken).build().unwrap().epoch(0).unwrap();
    let errors: Vec<crate::Error> = epoch.by_ref().filter_map(Result::err).collect();
    assert_eq!((errors.len(), errors[0].index(), errors[0].stage()), (1, Some(0), Some(crate::Stage::Decode)));
    assert!(epoch.stats().decode > std::time::Duration::ZERO);
}
