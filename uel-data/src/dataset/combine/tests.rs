use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::DType;

use super::*;
use crate::{Array, DataLoader, Kind, Layout, Stage};

/// Numbers from somewhere on, each with noise; counts how often it is asked.
#[derive(Debug)]
struct Numbers {
    from: i64,
    len: u64,
    layout: Layout,
    asked: Arc<AtomicU64>,
}

fn numbers(from: i64, len: u64) -> Numbers {
    let layout = Layout::tuple([Layout::array(DType::I64, []), Layout::array(DType::F64, [1])]);
    Numbers { from, len, layout, asked: Arc::default() }
}

impl Dataset for Numbers {
    fn len(&self) -> u64 {
        self.len
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        assert!(index < self.len);
        self.asked.fetch_add(1, Ordering::Relaxed);
        let noise = Array::new(vec![1], vec![cx.rng(0).uniform()])?;
        Ok(Value::tuple([Value::Int(self.from + index as i64), noise.into()]))
    }
    fn layout(&self) -> Option<&Layout> {
        Some(&self.layout)
    }
    fn describe(&self, index: u64) -> String {
        format!("number {}", self.from + index as i64)
    }
    fn fingerprint(&self) -> u64 {
        self.from as u64 ^ self.len << 32
    }
}

fn of(dataset: &dyn Dataset) -> Vec<Value> {
    let mut cx = SampleCx::new(1, 0);
    (0..dataset.len())
        .map(|index| {
            cx.begin(&[index]);
            dataset.get(index, &mut cx).unwrap()
        })
        .collect()
}

fn firsts(dataset: &dyn Dataset) -> Vec<i64> {
    let first = |value: &Value| match value.get("0") {
        Some(&Value::Int(number)) => number,
        other => panic!("{other:?}"),
    };
    of(dataset).iter().map(first).collect()
}

/// One by one, many at once, and written into rows: the same, in any order of indices.
fn agrees(dataset: &dyn Dataset) {
    let alone = of(dataset);
    let len = dataset.len();
    let indices: Vec<u64> = (0..len).map(|position| (position * 7 + 3) % len.max(1)).collect();
    let mut cx = SampleCx::new(1, 0);
    cx.begin(&indices);
    let mut many = Vec::new();
    dataset.get_many(&indices, &mut cx, &mut many).unwrap();
    let expected: Vec<Value> = indices.iter().map(|&index| alone[index as usize].clone()).collect();
    assert_eq!(many, expected);
    let Some(layout) = dataset.layout() else { return };
    let mut rows = crate::Rows::new(layout, indices.len()).unwrap();
    let mut pushed = crate::Rows::new(layout, indices.len()).unwrap();
    cx.begin(&indices);
    dataset.write_rows(&indices, &mut rows, &mut cx).unwrap();
    expected.iter().for_each(|value| pushed.push(value).unwrap());
    for column in 0..rows.columns() {
        assert_eq!(rows.elements_mut(column).unwrap(), pushed.elements_mut(column).unwrap());
    }
}

#[test]
fn every_combination_reads_as_its_parts_do() {
    let boxed = |from, len| Box::new(numbers(from, len)) as Box<dyn Dataset>;
    let concat = || Concat::new([boxed(0, 3), boxed(100, 0), boxed(200, 2)]).unwrap();
    let interleave = |lens: [u64; 3]| {
        let [a, b, c] = lens;
        Interleave::new([(boxed(0, a), 2), (boxed(100, b), 1), (boxed(200, c), 1)]).unwrap()
    };
    assert_eq!(firsts(&concat()), [0, 1, 2, 200, 201]);
    assert_eq!(firsts(&numbers(5, 4).take(2)), [5, 6]);
    assert_eq!(firsts(&numbers(5, 4).take(9)), [5, 6, 7, 8]);
    assert_eq!(firsts(&numbers(5, 2).repeat(3)), [5, 6, 5, 6, 5, 6]);
    let mixed = firsts(&interleave([10, 10, 10]));
    // Twenty by share; then the first part has no more.
    assert_eq!(mixed.len(), 20);
    for turn in mixed.chunks(4) {
        assert_eq!(turn.iter().filter(|&&number| number < 100).count(), 2);
        assert_ne!(turn[0] < 100, turn[1] < 100);
    }
    for (part, from) in [0, 100, 200].into_iter().enumerate() {
        let own: Vec<i64> = mixed.iter().copied().filter(|number| (from..from + 100).contains(number)).collect();
        assert_eq!(own, (from..from + if part == 0 { 10 } else { 5 }).collect::<Vec<_>>());
    }
    assert!(firsts(&interleave([10, 0, 10])).len() < 4);
    let even = numbers(0, 9).filter(|value| Ok(matches!(value.get("0"), Some(Value::Int(n)) if n % 2 == 0))).unwrap();
    assert_eq!(firsts(&even), [0, 2, 4, 6, 8]);
    let mapped = || numbers(0, 5).map("twice", |value, _| Ok(Value::tuple([value.clone(), value])));
    let all: [Box<dyn Dataset>; 9] = [
        Box::new(concat()),
        Box::new(interleave([6, 3, 3])),
        Box::new(numbers(0, 5).take(3)),
        Box::new(numbers(0, 5).repeat(2)),
        Box::new(even),
        Box::new(mapped().map("noise", |value, cx| Ok(Value::tuple([value, Value::Float(cx.rng(0).uniform())])))),
        Box::new(numbers(0, 5).zip(numbers(9, 7))),
        Box::new(numbers(0, 5).cache(u64::MAX)),
        Box::new(Concat::new([Box::new(numbers(0, 4).repeat(2)) as Box<dyn Dataset>, Box::new(concat())]).unwrap()),
    ];
    let mut prints: Vec<u64> = all.iter().map(|dataset| dataset.fingerprint()).collect();
    for dataset in &all {
        agrees(dataset);
        let last = dataset.len() - 1;
        assert!(dataset.describe(last).starts_with("number "), "{}", dataset.describe(last));
    }
    prints.sort_unstable();
    prints.dedup();
    assert_eq!(prints.len(), all.len());
    assert_ne!(mapped().fingerprint(), numbers(0, 5).map("thrice", |value, _| Ok(value)).fingerprint());
    assert!(Interleave::new([(boxed(0, 1), 0)]).is_err());
    assert!(Interleave::new([]).is_err());
}

/// Parts of one sample draw different numbers, and so does a repeated one.
#[test]
fn randomness_is_not_shared() {
    let noise = |value: &Value, path: &str| format!("{:?}", value.get(path).unwrap());
    for value in of(&numbers(0, 5).zip(numbers(0, 5))) {
        assert_ne!(noise(&value, "0.1"), noise(&value, "1.1"));
    }
    let twice = of(&numbers(0, 5).repeat(2));
    assert_ne!(noise(&twice[0], "1"), noise(&twice[5], "1"));
    let map = numbers(0, 3).map("a", |value, cx| {
        let drawn = Array::new(vec![1], vec![cx.rng(0).uniform()])?;
        Ok(Value::tuple([value, drawn.into()]))
    });
    for value in of(&map) {
        assert_ne!(noise(&value, "0.1"), noise(&value, "1"));
    }
}

#[test]
fn a_cache_asks_once_and_keeps_to_its_bytes() {
    let inner = numbers(0, 100);
    let asked = Arc::clone(&inner.asked);
    let one = of(&numbers(0, 1))[0].byte_len();
    let cached = inner.cache(one * 48);
    let first = of(&cached);
    assert_eq!(of(&cached), first);
    // The first 48 stay.
    assert_eq!(asked.load(Ordering::Relaxed), 100 + 52);
    assert_eq!(cached.byte_len(), one * 48);
}

/// A closure that fails is the stage *decode*, and its time counts there.
#[test]
fn a_closure_that_fails_fails_in_decoding() {
    let dataset = numbers(0, 20).map("torn", |value, _| {
        std::thread::sleep(std::time::Duration::from_micros(200));
        match value.get("0") {
            Some(Value::Int(13)) => Err(Error::new(Kind::Dataset, "torn")),
            Some(Value::Int(17)) => panic!("sample 17 is cursed"),
            _ => Ok(value),
        }
    });
    let mut epoch = DataLoader::builder(dataset).batch_size(4).num_workers(2).build().unwrap().epoch(0).unwrap();
    let errors: Vec<Error> = epoch.by_ref().filter_map(Result::err).collect();
    let places: Vec<_> = errors.iter().map(|error| (error.index(), error.stage())).collect();
    assert_eq!(places, [(Some(13), Some(Stage::Decode)), (Some(17), Some(Stage::Decode))]);
    assert_eq!(errors[0].description(), Some("number 13"));
    assert!(epoch.stats().decode > std::time::Duration::from_millis(2));
    assert_eq!(numbers(0, 3).filter(|_| Err(Error::new(Kind::Dataset, "no"))).unwrap_err().index(), Some(0));
}
