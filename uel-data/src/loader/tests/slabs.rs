//! Batches that go the road of those for a device, here to the CPU: the same batches. On CUDA devices, `tests/cuda/data.rs`.

use candle_core::Device;
use proptest::prelude::*;

use super::*;
use crate::dataset::FnDataset;

fn builder(dataset: Noisy, batch: usize, workers: usize) -> DataLoaderBuilder {
    DataLoader::builder(dataset)
        .batch_size(batch)
        .num_workers(workers)
        .shuffle(4)
        .on_error(OnError::Skip { limit: 100 })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn batches_through_slabs_are_the_same(
        len in 0u64..60,
        width in 0usize..5,
        batch in 1usize..12,
        workers in 0usize..4,
        budget in prop_oneof![Just(None), (1u64..2000).prop_map(Some)],
        rows: bool,
        fails in proptest::collection::btree_set(0u64..60, 0..4),
        panics in proptest::collection::btree_set(0u64..60, 0..2),
        left in 0usize..4,
    ) {
        let dataset = Noisy::new(len, width).with(Faults { errors: fails, panics, ..Faults::default() });
        let dataset = if rows { dataset.rows() } else { dataset };
        let expected = stream(builder(dataset.clone(), batch, 0).build().unwrap().epoch(1).unwrap());
        let mut loader = builder(dataset, batch, workers).slabs_on_cpu();
        if let (Some(budget), true) = (budget, workers > 0) {
            loader = loader.prefetch_bytes(budget);
        }
        let loader = loader.build().unwrap();
        for _ in loader.epoch(0).unwrap().take(left) {}
        let mut epoch = loader.epoch(1).unwrap();
        prop_assert_eq!(epoch.by_ref().map(seen).collect::<Vec<_>>(), &expected[..]);
        let slabs = epoch.job().road.as_ref().unwrap().slabs().clone();
        let stats = slabs.pool().stats();
        drop(epoch);
        // Every buffer went back, also those of workers that panicked.
        drop(loader);
        prop_assert_eq!(slabs.pool().stats().used_bytes, 0);
        prop_assert!(stats.allocated_bytes <= stats.chunk_bytes * (workers.max(1) + 1));
        if let (Some(budget), true) = (budget, workers > 0) {
            // Each buffer is a whole number of pages.
            let pages = 4096 * (workers as u64 + 1);
            prop_assert!(stats.allocated_bytes as u64 <= budget.max(stats.chunk_bytes as u64) + pages);
        }
        let first = expected.iter().position(|batch| batch.starts_with("1 ")).map(|first| first as u64);
        if let Some(number) = first {
            let number = number.min(len.div_ceil(batch as u64) - 1);
            let replayed = seen(builder(Noisy::new(len, width), batch, 0).slabs_on_cpu().build().unwrap().replay(1, number));
            let inline = seen(builder(Noisy::new(len, width), batch, 0).build().unwrap().replay(1, number));
            prop_assert_eq!(replayed, inline);
        }
    }
}

/// Slabs stay from epoch to epoch, and an epoch beside another has its own.
#[test]
fn slabs_are_used_again() {
    let loader = builder(Noisy::new(40, 3).rows(), 4, 2).slabs_on_cpu().build().unwrap();
    let memory = |epoch: &Epoch| epoch.job().road.as_ref().unwrap().slabs().pool().stats();
    let mut first = loader.epoch(0).unwrap();
    let mut beside = loader.epoch(1).unwrap();
    assert_eq!(first.by_ref().chain(beside.by_ref()).filter(Result::is_ok).count(), 20);
    assert_eq!((memory(&first).leases, memory(&beside).leases), (10, 10));
    drop((beside, first));
    let again = loader.epoch(2).unwrap();
    assert!(memory(&again).leases >= 10);
    assert_eq!(again.count(), 10);
}

/// Workers that are slow over their samples keep nobody waiting for a slab for longer than that, nor make it fail.
#[test]
fn a_loader_that_is_dropped_does_not_wait_for_slabs() {
    let pause = Duration::from_millis(30);
    let dataset = Noisy::new(1000, 2).rows().with(Faults { slow: (0..1000).collect(), pause, ..Faults::default() });
    let loader = builder(dataset, 50, 3).slabs_on_cpu().prefetch_bytes(100).build().unwrap();
    let epoch = loader.epoch(0).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let began = std::time::Instant::now();
    drop(epoch);
    drop(loader);
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
}

/// A dataset that writes more than its rows, and takes them back.
struct Wasteful(Layout);

impl Dataset for Wasteful {
    fn len(&self) -> u64 {
        12
    }
    fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> {
        Ok(Array::scalar(index as u32).into())
    }
    fn layout(&self) -> Option<&Layout> {
        Some(&self.0)
    }
    fn write_rows(&self, indices: &[u64], rows: &mut Rows, _: &mut SampleCx) -> Result<()> {
        let column = rows.column_mut::<u32>(0)?;
        let end = column.len() + indices.len();
        column.extend(indices.iter().map(|&index| index as u32));
        column.extend([7; 1000]);
        column.truncate(end);
        Ok(())
    }
    fn fingerprint(&self) -> u64 {
        1
    }
}

#[test]
fn what_leaves_its_slab_arrives_too() {
    let builder = || DataLoader::builder(Wasteful(Layout::array(DType::U32, []))).batch_size(5);
    let expected = stream(builder().build().unwrap().epoch(0).unwrap());
    assert_eq!(expected.len(), 3);
    for workers in [0, 2] {
        let loader = builder().num_workers(workers).slabs_on_cpu().build().unwrap();
        assert_eq!(stream(loader.epoch(0).unwrap()), expected);
    }
}

/// Texts stay where they are, and what is nested is found.
#[test]
fn tensors_are_sent_from_within_any_nesting() {
    let dataset = || {
        FnDataset::new("nested", 9, |index, _| {
            let list = Value::List(vec![Value::from("text"), Value::Float(index as f64)]);
            Ok(Value::map([("a", Value::tuple([list, Value::Bool(index > 4)])), ("b", Value::Int(index as i64))]))
        })
    };
    let expected = stream(DataLoader::builder(dataset()).batch_size(4).build().unwrap().epoch(0).unwrap());
    let mut epoch = DataLoader::builder(dataset()).batch_size(4).slabs_on_cpu().build().unwrap().epoch(0).unwrap();
    assert_eq!(epoch.by_ref().map(seen).collect::<Vec<_>>(), expected);
    assert!(epoch.stats().transfer > Duration::ZERO);
}

#[test]
fn page_locked_memory_without_a_device_is_refused() {
    let builder = || DataLoader::builder(Noisy::new(4, 1)).device(&Device::Cpu);
    let error = builder().pin_memory(true).build().unwrap_err();
    assert!(error.kind() == Kind::Argument && error.to_string().contains("pin_memory needs a CUDA device"), "{error}");
    let mut epoch = builder().pin_memory(false).build().unwrap().epoch(0).unwrap();
    assert_eq!(epoch.by_ref().filter(Result::is_ok).count(), 4);
    assert!(epoch.job().road.is_none() && epoch.stats().transfer.is_zero());
}
