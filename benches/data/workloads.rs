//! What is loaded, in files that torch reads too.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;
use uel::core::Dtype;
use uel::data::formats::{
    DataFile, FixedRecords, Idx, ImageFolder, ImageTransform, RecordLayout, TokenWindows, Tokens,
};
use uel::data::{Array, Dataset, Fingerprint, Layout, Result, Rows, SampleCx, Value};

use super::jpeg::{Random, made_up};
use super::{Candidate, SECONDS};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    /// The bytes of an IDX file, which become F32 between 0 and 1.
    Mnist,
    /// As many rows that are F32 in the file already.
    Rows,
    Tokens,
    Jpeg,
    Blobs,
}

impl Workload {
    pub(crate) const ALL: [Self; 5] = [Self::Mnist, Self::Rows, Self::Tokens, Self::Jpeg, Self::Blobs];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mnist => "mnist",
            Self::Rows => "rows",
            Self::Tokens => "tokens",
            Self::Jpeg => "jpeg",
            Self::Blobs => "blobs",
        }
    }

    pub(crate) fn batch_size(self) -> usize {
        match self {
            Self::Mnist | Self::Rows => 64,
            Self::Jpeg => 32,
            Self::Tokens | Self::Blobs => 16,
        }
    }
}

/// A workload's dataset, and its files.
pub(crate) struct Data {
    pub(crate) workload: Workload,
    pub(crate) folder: TempDir,
    pub(crate) dataset: Arc<dyn Dataset>,
}

impl Data {
    pub(crate) fn new(workload: Workload) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, len: usize| -> PathBuf {
            let path = folder.path().join(name);
            std::fs::write(&path, random_bytes(len)).unwrap();
            path
        };
        let dataset: Arc<dyn Dataset> = match workload {
            Workload::Mnist => {
                let path = folder.path().join("digits.idx");
                let header = [&[0, 0, 8, 3][..], &60_000u32.to_be_bytes(), &[0, 0, 0, 28, 0, 0, 0, 28]].concat();
                std::fs::write(&path, [header, random_bytes(60_000 * 28 * 28)].concat()).unwrap();
                let images = DataFile::preload(path).unwrap();
                Arc::new(Idx::new([("image", images)]).unwrap().with_normalised("image", 0.0, 1.0).unwrap())
            }
            Workload::Rows => {
                let layout = RecordLayout::new(28 * 28 * 4).with_field("image", Dtype::F32, &[28, 28], 0);
                let file = DataFile::preload(file("digits.f32", 60_000 * 28 * 28 * 4)).unwrap();
                Arc::new(FixedRecords::with_layout(vec![file], &layout).unwrap())
            }
            Workload::Tokens => {
                let file = DataFile::preload(file("tokens.u16", 64 << 20)).unwrap();
                Arc::new(Tokens::new(vec![file], &TokenWindows::new(Dtype::U16, 1024)).unwrap())
            }
            Workload::Blobs => {
                let file = DataFile::preload(file("blobs.u8", 256 << 20)).unwrap();
                Arc::new(FixedRecords::new(vec![file], 1 << 20).unwrap())
            }
            Workload::Jpeg => {
                let class = folder.path().join("jpeg/class");
                std::fs::create_dir_all(&class).unwrap();
                for image in 0..128 {
                    std::fs::write(class.join(format!("{image:04}.jpg")), made_up(500, 375, image)).unwrap();
                }
                let transform = ImageTransform::random_resized_crop(224)
                    .with_flip(0.5)
                    .with_normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
                Arc::new(ImageFolder::open(folder.path().join("jpeg"), transform).unwrap())
            }
        };
        Self { workload, folder, dataset }
    }

    pub(crate) fn sample_bytes(&self) -> f64 {
        self.dataset.layout().and_then(Layout::row_bytes).unwrap() as f64
    }

    /// Copies of random rows into fresh memory: nothing that makes batches can be faster. For samples that are copied.
    pub(crate) fn gather(&self) -> Option<Candidate<'static>> {
        if !matches!(self.workload, Workload::Rows | Workload::Blobs) {
            return None;
        }
        let row = self.sample_bytes() as usize;
        let (bytes, batch_size) = (random_bytes(row * self.dataset.len() as usize), self.workload.batch_size());
        let mut random = Random(1);
        Some((
            "a bare gather, 1 thread".to_owned(),
            Box::new(move || Some(gather(&bytes, row, batch_size, &mut random))),
        ))
    }

    /// A tensor for each sample, and `Tensor::stack`, which is what candle-datasets' `Batcher` makes a batch with.
    pub(crate) fn batcher(&self) -> Option<Candidate<'static>> {
        if !matches!(self.workload, Workload::Mnist | Workload::Rows) {
            return None;
        }
        let images = Tensor::zeros((60_000, 28, 28), DType::F32, &Device::Cpu).unwrap();
        let mut random = Random(1);
        let measure = move || {
            let (mut samples, began) = (0, Instant::now());
            while began.elapsed() < SECONDS {
                let rows: Vec<Tensor> =
                    (0..64).map(|_| images.get((random.next() % 60_000) as usize).unwrap()).collect();
                samples += black_box(Tensor::stack(&rows, 0).unwrap()).dim(0).unwrap();
            }
            Some((samples as f64, began.elapsed().as_secs_f64()))
        };
        Some(("Tensor::stack (Batcher)".to_owned(), Box::new(measure)))
    }
}

fn gather(bytes: &[u8], row: usize, batch_size: usize, random: &mut Random) -> (f64, f64) {
    let rows = (bytes.len() / row) as u64;
    let (mut samples, began) = (0, Instant::now());
    while began.elapsed() < SECONDS {
        let mut batch: Vec<u8> = Vec::with_capacity(row * batch_size);
        for _ in 0..batch_size {
            let at = (random.next() % rows) as usize * row;
            batch.extend_from_slice(&bytes[at..at + row]);
        }
        samples += batch_size;
        black_box(batch);
    }
    (samples as f64, began.elapsed().as_secs_f64())
}

/// A bare gather of the rows that [`Pixels`] has.
pub(crate) fn gather_seconds_per_row() -> f64 {
    let (samples, seconds) = gather(&random_bytes(60_000 * 16), 16, 64, &mut Random(1));
    seconds / samples
}

fn random_bytes(len: usize) -> Vec<u8> {
    let mut random = Random(7);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// Samples so small that nothing but the loader takes time: four numbers.
pub(crate) struct Pixels {
    values: Vec<[f32; 4]>,
    layout: Option<Layout>,
}

impl Pixels {
    /// With rows that are written into the batch, or sample by sample with a label beside them.
    pub(crate) fn new(rows: bool) -> Self {
        let layout = rows.then(|| Layout::array(DType::F32, [4]));
        Self { values: vec![[0.5; 4]; 60_000], layout }
    }
}

impl Dataset for Pixels {
    fn len(&self) -> u64 {
        self.values.len() as u64
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        let image = Array::new([4], self.values[index as usize].to_vec())?;
        Ok(Value::map([("image", image.into()), ("label", Value::Int(7))]))
    }
    fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, _: &mut SampleCx) -> Result<()> {
        let column = rows.column_mut::<f32>(0)?;
        indices.iter().for_each(|&index| column.extend_from_slice(&self.values[index as usize]));
        Ok(())
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("pixels").finish()
    }
}

/// The numbers below a large one.
pub(crate) struct Numbers(pub(crate) u64);

impl Dataset for Numbers {
    fn len(&self) -> u64 {
        self.0
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        Ok(Value::Int(index as i64))
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("numbers").with(self.0).finish()
    }
}
