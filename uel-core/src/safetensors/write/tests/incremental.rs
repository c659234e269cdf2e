//! Files whose tensors come one by one.

use super::*;
use crate::Kind;
use crate::disk::{Disk, DiskFile, Entry, LocalDisk, RecordingDisk};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A file system whose files write when they are let.
#[derive(Debug, Default)]
struct Gate {
    /// Bytes that may still be written.
    open: Mutex<usize>,
    opened: Condvar,
    written: AtomicUsize,
}

#[derive(Debug)]
struct SlowDisk(Arc<Gate>);

#[derive(Debug)]
struct SlowFile(Arc<dyn DiskFile>, Arc<Gate>);

impl Gate {
    fn let_through(&self, bytes: usize) {
        *self.open.lock().unwrap() += bytes;
        self.opened.notify_all();
    }
}

impl Disk for SlowDisk {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        LocalDisk.entry(path)
    }
    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        LocalDisk.read(path, limit)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        LocalDisk.open(path)
    }
    fn create(&self, path: &Path, like: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(SlowFile(LocalDisk.create(path, like)?, Arc::clone(&self.0))))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        LocalDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        LocalDisk.remove(path)
    }
    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        LocalDisk.sync_folder(folder)
    }
    fn remove_abandoned(&self, folder: &Path, start: &str, end: &str) {
        LocalDisk.remove_abandoned(folder, start, end);
    }
}

impl DiskFile for SlowFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let mut open = self.1.open.lock().unwrap();
        while *open == 0 {
            open = self.1.opened.wait(open).unwrap();
        }
        let part = bytes.len().min(*open).min(1000);
        *open -= part;
        drop(open);
        let written = self.0.write_at(offset, &bytes[..part])?;
        self.1.written.fetch_add(written, Ordering::SeqCst);
        Ok(written)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }
    fn set_len(&self, byte_len: u64) -> io::Result<()> {
        self.0.set_len(byte_len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

type Len = fn(usize) -> usize;

/// A payload that is let go of, and asked for, in strange ways.
struct Payload<F: Fn(usize) -> usize, D: Fn()> {
    bytes: Vec<u8>,
    asked: AtomicUsize,
    len: F,
    dropped: D,
}

impl<F: Fn(usize) -> usize, D: Fn()> AsRef<[u8]> for Payload<F, D> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..(self.len)(self.asked.fetch_add(1, Ordering::SeqCst))]
    }
}

impl<F: Fn(usize) -> usize, D: Fn()> Drop for Payload<F, D> {
    fn drop(&mut self) {
        (self.dropped)();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_was_written_is_read(
        given in tensors(),
        metadata in metadata(4),
        reserved in 0usize..20_000,
        budget in 0usize..3000,
        threads in 0usize..4,
        hashes in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let incremental = IncrementalOptions::new()
            .with_save(options(&metadata).with_hashes(hashes))
            .with_max_header_bytes(reserved)
            .with_budget_bytes(budget)
            .with_threads(threads);
        let writer = IncrementalWriter::create(&path, &incremental).unwrap();
        for (n, given) in given.iter().enumerate() {
            let (name, dtype, shape, bytes) = given.parts();
            match n % 4 {
                0 => writer.write(name, dtype, shape, bytes).unwrap(),
                1 => writer.write_owned(name, dtype, shape, bytes.to_vec()).unwrap(),
                2 => writer.write_batch([(name, dtype, shape, bytes)]).unwrap(),
                _ => {
                    let mut tensor = writer.begin(name, dtype, shape).unwrap();
                    bytes.chunks(7).for_each(|part| tensor.write(part).unwrap());
                    tensor.finish().unwrap();
                }
            }
        }
        let report = writer.finish().unwrap();
        prop_assert_eq!(report.tensor_count, given.len());
        prop_assert_eq!(report.files[0].bytes, std::fs::metadata(&path).unwrap().len());
        if hashes {
            let files = SafetensorsFiles::open(&path, Rules::Strict).unwrap();
            let found = Hashes::from_metadata(files.file_metadata(0).unwrap()).unwrap().unwrap();
            prop_assert_eq!(found.len(), given.len());
            let mut shown = metadata.unwrap_or_default();
            shown.insert(HASHES_KEY.to_owned(), files.file_metadata(0).unwrap()[HASHES_KEY].clone());
            check(&path, &given, &Some(shown));
        } else {
            check(&path, &given, &metadata);
        }
        prop_assert_eq!(names(folder.path()), ["m.safetensors"]);
    }
}

#[test]
fn no_more_than_the_budget_waits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let gate = Arc::new(Gate::default());
    let options = IncrementalOptions::new()
        .with_save(SaveOptions::new().with_disk(SlowDisk(Arc::clone(&gate))))
        .with_budget_bytes(100_000)
        .with_threads(2);
    let given: Vec<_> = (0..100).map(|n| Given::new(&format!("t{n}"), Dtype::U8, &[5000], n)).collect();
    let writer = IncrementalWriter::create(&path, &options).unwrap();
    let (pushed, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for given in &given {
                let (name, dtype, shape, bytes) = given.parts();
                writer.write(name, dtype, shape, bytes).unwrap();
                let pushed = pushed.fetch_add(bytes.len(), Ordering::SeqCst) + bytes.len();
                let waits = pushed.saturating_sub(gate.written.load(Ordering::SeqCst));
                most.fetch_max(waits, Ordering::SeqCst);
            }
        });
        // With nothing written the writer has to stop below the budget by itself.
        let mut before = usize::MAX;
        while before != pushed.load(Ordering::SeqCst) || before == 0 {
            before = pushed.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!((50_000..=100_000).contains(&before), "{before}");
        for _ in 0..20 {
            gate.let_through(25_000);
            std::thread::sleep(Duration::from_millis(2));
        }
        gate.let_through(1 << 40);
    });
    // A piece that is half written counts as waiting until its end.
    assert!(most.load(Ordering::SeqCst) <= 100_000, "{most:?}");
    writer.finish().unwrap();
    check(&path, &given, &None);
}

#[test]
fn what_was_handed_over_lands_even_if_the_buffer_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let gate = Arc::new(Gate::default());
    let save = SaveOptions::new().with_disk(SlowDisk(Arc::clone(&gate)));
    let writer = IncrementalWriter::create(&path, &IncrementalOptions::new().with_save(save)).unwrap();
    let given = Given::new("a", Dtype::U8, &[5 << 20], 1);
    let mut buffer = given.bytes.clone();
    writer.write("a", Dtype::U8, &[5 << 20], &buffer).unwrap();
    buffer.fill(0);
    gate.let_through(1 << 40);
    writer.finish().unwrap();
    check(&path, &[given], &None);
}

#[test]
fn a_header_that_outgrows_its_reservation_moves_the_data() {
    let many: Vec<_> =
        (0..300).map(|n| Given::new(&format!("layer.{n}.weight"), Dtype::U8, &[n, 3], n as u8)).collect();
    let mut large = many.clone();
    large.push(Given::new("large", Dtype::U8, &[9 << 20], 5));
    let bytes = |given: &[Given]| given.iter().map(|given| given.bytes.len() as u64).sum::<u64>();
    for given in [&many, &large] {
        let options = |save| IncrementalOptions::new().with_save(save).with_max_header_bytes(100);
        // On a file system that may insert blocks, and on one that cannot.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let report = incremental(&path, given, &options(SaveOptions::new())).unwrap();
        assert_eq!((report.bytes_moved, report.tensor_bytes), (bytes(given), bytes(given)));
        check(&path, given, &None);

        let disk = RecordingDisk::default();
        let at = PathBuf::from("/d/m.safetensors");
        incremental(&at, given, &options(SaveOptions::new().with_disk(disk.clone()))).unwrap();
        let copied = &disk.files()[&at];
        assert!(*copied == std::fs::read(&path).unwrap());

        let report = incremental(&path, given, &IncrementalOptions::new()).unwrap();
        assert_eq!(report.bytes_moved, 0);
        check(&path, given, &None);
    }
}

#[test]
fn reservations_up_to_the_limit_can_be_filled() {
    let disk = RecordingDisk::default();
    let path = PathBuf::from("/d/m.safetensors");
    let save = || SaveOptions::new().with_disk(disk.clone());
    let options = |bytes| IncrementalOptions::new().with_save(save()).with_max_header_bytes(bytes);
    let error = IncrementalWriter::create(&path, &options(100_000_001)).unwrap_err();
    assert_eq!((error.kind(), error.path()), (Kind::Argument, Some(&*path)));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let most = IncrementalOptions::new().with_max_header_bytes(100_000_000);
    incremental(&path, &[Given::new("a", Dtype::U8, &[9 << 20], 0)], &most).unwrap();
    SafetensorsFiles::open(&path, Rules::Strict).unwrap();
}

#[test]
fn small_files_are_not_padded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = some_tensors(3);
    incremental(&path, &given, &IncrementalOptions::new()).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() < 1000);
    incremental(&path, &[], &IncrementalOptions::new()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"\x08\0\0\0\0\0\0\0{}      ");
    check(&path, &[], &None);
}

#[test]
fn faults_of_the_arguments_leave_the_writer_usable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let given = some_tensors(3);
    let writer = IncrementalWriter::create(&path, &IncrementalOptions::new()).unwrap();
    let refused = |kind, tensor: &str, result: crate::Result<()>| {
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.tensor(), error.path()), (kind, Some(tensor), Some(&*path)), "{error}");
    };
    let (name, dtype, shape, bytes) = given[0].parts();
    writer.write(name, dtype, shape, bytes).unwrap();
    refused(Kind::DuplicateName, "a", writer.write(name, dtype, shape, bytes));
    refused(Kind::DuplicateName, "a", writer.write_owned(name, dtype, shape, bytes.to_vec()));
    refused(Kind::DuplicateName, "a", writer.begin(name, dtype, shape).map(drop));
    refused(Kind::SizeMismatch, "b", writer.write("b", dtype, shape, &bytes[1..]));
    refused(Kind::SizeMismatch, "b", writer.write_owned("b", dtype, shape, bytes[1..].to_vec()));
    refused(Kind::Overflow, "b", writer.begin("b", Dtype::U8, &[usize::MAX]).map(drop));
    refused(Kind::Overflow, "b", writer.begin("b", Dtype::F32, &[usize::MAX]).map(drop));
    refused(Kind::Argument, "__metadata__", writer.write("__metadata__", Dtype::U8, &[1], &[1]));
    let shape: &[usize] = &[2];
    let batch = |first, second| {
        writer.write_batch([(first, Dtype::U8, shape, &[1, 2][..]), (second, Dtype::U8, shape, &[3, 4])])
    };
    refused(Kind::DuplicateName, "a", batch("b", "a"));
    refused(Kind::DuplicateName, "b", batch("b", "b"));
    refused(Kind::Argument, "__metadata__", batch("b", "__metadata__"));
    // Nothing of those batches was entered.
    for given in &given[1..] {
        let (name, dtype, shape, bytes) = given.parts();
        writer.write_batch([(name, dtype, shape, bytes)]).unwrap();
    }
    assert!(!path.exists());
    writer.finish().unwrap();
    check(&path, &given, &None);
    for error in [writer.finish().unwrap_err(), writer.write("z", Dtype::U8, &[1], &[1]).unwrap_err()] {
        assert_eq!((error.kind(), error.path()), (Kind::Argument, Some(&*path)), "{error}");
    }
    assert_eq!(names(folder.path()), ["m.safetensors"]);
}

#[test]
fn a_tensor_that_is_not_complete_fails_the_save_and_waits_for_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let create = || IncrementalWriter::create(&path, &IncrementalOptions::new()).unwrap();
    let missing = |error: crate::Error| {
        assert_eq!((error.kind(), error.tensor(), error.path()), (Kind::MissingTensors, Some("a"), Some(&*path)));
        assert!(names(folder.path()).is_empty());
    };
    // Held over the end of the file by the thread that ends it.
    let writer = create();
    let mut open = writer.begin("a", Dtype::U8, &[4]).unwrap();
    missing(writer.finish().unwrap_err());
    assert!(open.write(&[1, 2, 3, 4]).and_then(|()| open.finish()).is_err());

    let writer = create();
    drop(writer.begin("a", Dtype::U8, &[4]).unwrap());
    missing(writer.finish().unwrap_err());

    let writer = create();
    let mut open = writer.begin("a", Dtype::U8, &[4]).unwrap();
    assert_eq!(open.write(&[0; 5]).unwrap_err().kind(), Kind::SizeMismatch);
    open.write(&[0; 3]).unwrap();
    assert_eq!(open.finish().unwrap_err().kind(), Kind::SizeMismatch);
    missing(writer.finish().unwrap_err());

    // Without its end nothing is left either.
    create().write("a", Dtype::U8, &[2], &[1, 2]).unwrap();
    let writer = create();
    writer.begin("a", Dtype::U8, &[4]).map(|tensor| drop((writer, tensor))).unwrap();
    assert!(names(folder.path()).is_empty());
}

#[test]
fn what_is_handed_over_may_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let size = 5 << 20;
    let payload =
        |len: fn(usize) -> usize, dropped: fn()| Payload { bytes: vec![1; 5 << 20], asked: 0.into(), len, dropped };
    // Asked by the caller's thread, by a writing thread, and let go of there; each with the writer used afterwards.
    let strange: [(Len, fn()); 5] = [
        (|_| 5 << 20, || panic!("dropped")),
        (|n| if n == 0 { 5 << 20 } else { panic!("asked") }, || {}),
        (|n| if n == 0 { 5 << 20 } else { 100 }, || {}),
        (|n| if n < 2 { 5 << 20 } else { panic!("asked") }, || panic!("dropped")),
        (|n| if n == 0 { panic!("asked") } else { 5 << 20 }, || {}),
    ];
    for (n, (len, dropped)) in strange.into_iter().enumerate() {
        for threads in [1, 3] {
            let options = IncrementalOptions::new().with_threads(threads).with_budget_bytes(4 << 20);
            let writer = IncrementalWriter::create(&path, &options).unwrap();
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                writer.write_owned("a", Dtype::U8, &[size], payload(len, dropped))
            }));
            let later = writer.write("b", Dtype::U8, &[size], &vec![2; size]);
            let finished = writer.finish();
            match n {
                // Let go of behind the write: the file is whole, or the save fails.
                0 => match finished {
                    Ok(report) => assert!(report.tensor_count == 2 && later.is_ok()),
                    Err(error) => assert_eq!(error.path(), Some(&*path)),
                },
                // It panicked before it was entered.
                4 => assert!(caught.is_err() && later.is_ok() && finished.unwrap().tensor_count == 1),
                _ => {
                    let error = finished.unwrap_err();
                    assert_eq!(error.path(), Some(&*path), "{n}: {error}");
                }
            }
            let _ = std::fs::remove_file(&path);
            assert!(names(folder.path()).is_empty(), "{n}");
        }
    }
}

#[test]
fn the_file_that_is_read_may_be_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let old = some_tensors(1);
    stream(&path, &old, &SaveOptions::new()).unwrap();
    let files = SafetensorsFiles::open(&path, Rules::Strict).unwrap();
    let writer = IncrementalWriter::create(&path, &IncrementalOptions::new()).unwrap();
    for info in files.index().iter() {
        let mut bytes = files.sources()[0].read_range(info.range()).unwrap();
        bytes.iter_mut().for_each(|byte| *byte ^= 255);
        writer.write_owned(info.name(), info.dtype(), info.shape(), bytes).unwrap();
    }
    check(&path, &old, &None);
    writer.finish().unwrap();
    let mut new = old.clone();
    new.iter_mut().for_each(|given| given.bytes.iter_mut().for_each(|byte| *byte ^= 255));
    check(&path, &new, &None);
    // Whoever has the old file open keeps it.
    for Given { meta, bytes } in &old {
        let range = files.index().get(&meta.name).unwrap().range();
        assert_eq!(&files.sources()[0].read_range(range).unwrap(), bytes);
    }
}

#[test]
fn many_threads_write_while_one_finishes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for round in 0..20 {
        let options = IncrementalOptions::new().with_budget_bytes(10_000).with_threads(2);
        let writer = IncrementalWriter::create(&path, &options).unwrap();
        let written = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (writer, written) = (&writer, &written);
                scope.spawn(move || {
                    for n in 0..200 {
                        let given = Given::new(&format!("{thread}.{n}"), Dtype::U8, &[700], n as u8);
                        let (name, dtype, shape, bytes) = given.parts();
                        match writer.write(name, dtype, shape, bytes) {
                            Ok(()) => written.lock().unwrap().push(given),
                            Err(error) => return assert_eq!(error.kind(), Kind::Argument),
                        }
                    }
                });
            }
            std::thread::sleep(Duration::from_micros(200 * round));
            writer.finish().unwrap();
        });
        check(&path, &written.into_inner().unwrap(), &None);
    }
}
