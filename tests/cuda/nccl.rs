//! Groups over NCCL: on the emulated driver, which has that library too, with threads as ranks and a device for each; on a GPU,
//! as far as there are GPUs.

#[allow(dead_code)]
#[path = "../shard/cases.rs"]
mod cases;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use uel::shard::{DeviceBytes, DeviceGroup, Incoming, Outgoing};
use uel::{Dtype, Error, GroupFiles, GroupLoader, Kind, NcclGroup, ProcessGroup, RankFault, Result, Split};
use uel::{ShardPlan, ThreadGroup};

use crate::emulated::{Emulated, OUT_OF_MEMORY, Turn};
use cases::{CPU, bytes, check, name, write};

/// Long enough for a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// A third of it is what a rank waits for another.
const SHORT: Duration = Duration::from_secs(3);

/// What a deadline may be missed by.
const SLACK: Duration = Duration::from_secs(3);

/// `ncclSystemError` and `ncclInternalError`, as the emulated library numbers what is to fail.
const SYSTEM_ERROR: u32 = 20_002;
const INTERNAL_ERROR: u32 = 3;

/// A turn with so many devices, if there are.
fn turn(ranks: usize, seed: u64) -> Option<Turn> {
    let mut turn = Turn::begin();
    // The pools of a device go with its last user, which may be a thread that is about to end.
    turn.keep_pinned();
    match Emulated::get() {
        Some(emulated) => {
            emulated.at_least_devices(ranks as u32);
            emulated.seed(seed);
        }
        None if (0..ranks).any(|rank| Device::new_cuda(rank).is_err()) => {
            println!("there are fewer than {ranks} devices");
            return None;
        }
        None => {}
    }
    Some(turn)
}

/// How ranks find each other.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// Over another group.
    Over,
    /// With NCCL alone.
    Alone,
}

/// Runs `work` on a thread for each rank, with a device of its own.
fn run<T: Send>(
    way: Way,
    ranks: usize,
    timeout: Duration,
    work: impl Fn(NcclGroup, &Device) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    run_armed(way, ranks, timeout, || (), work)
}

/// As [`run`], with `arm` called when the devices are there, and nothing else.
fn run_armed<T: Send>(
    way: Way,
    ranks: usize,
    timeout: Duration,
    arm: impl FnOnce(),
    work: impl Fn(NcclGroup, &Device) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let devices: Vec<Device> = (0..ranks).map(|rank| Device::new_cuda(rank).expect("a device")).collect();
    let id = if way == Way::Alone { Some(NcclGroup::unique_id().expect("an id")) } else { None };
    arm();
    let outcomes = ThreadGroup::run(ranks, timeout, |group| {
        let rank = group.rank();
        let device = &devices[rank];
        let group = match id {
            Some(id) => NcclGroup::new(&id, rank, ranks, device, timeout)?,
            None => NcclGroup::over(Arc::new(group), device)?,
        };
        work(group, device)
    });
    outcomes.expect("threads")
}

fn all<T>(outcomes: Vec<Result<T>>) -> Vec<T> {
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|error| panic!("{error}"))).collect()
}

fn sampled<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> std::result::Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    if let Err(error) = TestRunner::new_with_rng(config, random).run(strategy, test) {
        panic!("{error}");
    }
}

/// The same that groups of threads and of processes have to do, with devices.
#[test]
fn every_device_gets_what_a_plain_load_has() {
    let cases = if Emulated::get().is_some() { 24 } else { 4 };
    let way = prop_oneof![2 => Just(Way::Over), 1 => Just(Way::Alone)];
    sampled(
        cases,
        &(cases::any_files(), 1..5usize, 0..60usize, 0..1000u64, way),
        |(files, ranks, seed, schedule, way)| {
            let Some(_turn) = turn(ranks, schedule) else { return Ok(()) };
            let folder = tempfile::tempdir().expect("a folder");
            let paths = write(&files, folder.path());
            all(run(way, ranks, LONG, |group, device| check(Arc::new(group), device, &paths, seed).map(drop)));
            Ok(())
        },
    );
}

/// One rank, as one GPU has it.
#[test]
fn one_rank_needs_no_others() {
    for schedule in 0..4 {
        let Some(_turn) = turn(1, schedule) else { return };
        let folder = tempfile::tempdir().expect("a folder");
        let paths = write(&vec![vec![(Dtype::F32, vec![5, 3])], vec![(Dtype::U64, vec![4])]], folder.path());
        for (way, seed) in [(Way::Alone, 1), (Way::Over, 3)] {
            all(run(way, 1, LONG, |group, device| {
                group.barrier()?;
                let files = check(Arc::new(group), device, &paths, seed)?;
                assert!(files.tensor("layer.0.0.weight")?.device().same_device(device));
                Ok(())
            }));
        }
    }
}

/// Bytes of the host go through page-locked buffers in pieces, with NCCL alone.
#[test]
fn messages_of_any_length_arrive() {
    for (schedule, ranks) in [(0, 2), (7, 3), (8, 4)] {
        let Some(_turn) = turn(ranks, schedule) else { return };
        all(run(Way::Alone, ranks, LONG, |group, _| {
            let rank = group.rank();
            for len in [0, 1, 511, 100_000, (5 << 20) + 3] {
                let sent = |from: usize, at: usize| (at * 7 + from * 31 + len) as u8;
                let message = |from: usize| -> Vec<u8> { (0..len).map(|at| sent(from, at)).collect() };
                for root in 0..ranks {
                    let mut bytes = if rank == root { message(root) } else { vec![0; len] };
                    group.broadcast(root, &mut bytes)?;
                    assert!(bytes == message(root), "{len} bytes of {root} on {rank}");
                }
                let parts: Vec<Vec<u8>> = (0..ranks).map(message).collect();
                let parts: Vec<&[u8]> = if rank == 1 { parts.iter().map(Vec::as_slice).collect() } else { Vec::new() };
                let mut part = vec![0; len];
                group.scatter(1, &parts, &mut part)?;
                assert!(part == message(rank), "{len} bytes for {rank}");
                let mut gathered = vec![0; len * ranks];
                group.all_gather(&message(rank), &mut gathered)?;
                assert!(gathered.chunks(len.max(1)).zip(0..).all(|(part, from)| part == message(from)), "{len}");
            }
            group.barrier()
        }));
    }
}

/// What is sent comes from a device and lands on a device: the host's memory has no part in it but the upload, once.
#[test]
fn tensors_are_uploaded_once_and_arrive_on_the_device() {
    let Some(emulated) = Emulated::get() else { return };
    for files_on_device in [false, true] {
        let Some(_turn) = turn(3, 5) else { return };
        let folder = tempfile::tempdir().expect("a folder");
        let paths = write(&vec![vec![(Dtype::F32, vec![512, 600])]], folder.path());
        let expected = uel::Checkpoint::open(&paths[0]).unwrap().tensor("layer.0.0.weight", &CPU).unwrap();
        uel::reset_transfer_stats();
        let outcomes = run(Way::Over, 3, LONG, |group, device| {
            let mut loader = GroupLoader::new(Arc::new(group)).with_device(device);
            if files_on_device {
                loader = loader.with_files_on_device();
            }
            loader.add_files([(1, vec![&paths[0]])]);
            let files = loader.load_files()?;
            let whole = files.tensor("layer.0.0.weight")?;
            let part = files.sharded("layer.0.0.weight", 1)?;
            let fused = files.multi_cols(&["layer.0.0.weight", "layer.0.0.weight"], Split::new(0))?;
            // What was handed out outlives the files, and their memory.
            drop(files);
            Ok((whole, part, fused))
        });
        let file_bytes = std::fs::metadata(&paths[0]).unwrap().len();
        let tensor_bytes = 512 * 600 * 4;
        let uploaded = if files_on_device { file_bytes } else { 4 * tensor_bytes };
        assert_eq!(uel::transfer_stats().pinned_bytes, uploaded);
        assert_eq!((emulated.calls("cuMemcpyDtoHAsync_v2"), emulated.calls("ncclBroadcast")), (0, 3));
        for (rank, (whole, part, fused)) in all(outcomes).into_iter().enumerate() {
            assert_eq!(bytes(&whole.to_device(&CPU).unwrap()), bytes(&expected));
            let expected_part = cases::part(&expected, 1, rank, 3);
            assert_eq!(bytes(&part.to_device(&CPU).unwrap()), bytes(&expected_part));
            let rows = cases::part(&expected, 0, rank, 3);
            let twice = Tensor::cat(&[&rows, &rows], 0).unwrap();
            assert_eq!(bytes(&fused.to_device(&CPU).unwrap()), bytes(&twice));
        }
    }
}

/// Ranks without a device in the group have the host's memory in between, all of them.
#[test]
fn one_rank_on_the_cpu_takes_the_others_along() {
    let Some(_turn) = turn(2, 3) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let paths = write(&vec![vec![(Dtype::F32, vec![30, 7])]], folder.path());
    let outcomes = run(Way::Alone, 2, LONG, |group, device| {
        let device = if group.rank() == 0 { device } else { &CPU };
        check(Arc::new(group), device, &paths, 4).map(drop)
    });
    all(outcomes);
}

/// Ranks that read each other's memory, one of them for a device: all load a plan in the same steps.
#[test]
fn ranks_of_a_plan_may_have_different_devices() {
    let Some(_turn) = turn(1, 5) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let paths = write(
        &vec![vec![(Dtype::F32, vec![30, 7]), (Dtype::U8, vec![5])], vec![(Dtype::Bf16, vec![9, 4])]],
        folder.path(),
    );
    let plan = ShardPlan::new().with_columns("*.0.weight").expect("a pattern");
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let rank = group.rank();
        let device = if rank == 0 { CPU } else { Device::new_cuda(0).expect("a device") };
        let mut loader = GroupLoader::new(Arc::new(group)).with_device(&device);
        loader.add_paths(&paths);
        let tensors = loader.load_files()?.load_plan(&plan)?;
        let own = uel::Checkpoint::open_files(&paths)?.load_shard(&plan, rank, 2, None, &CPU)?;
        assert_eq!(tensors.len(), own.len());
        for (name, tensor) in own {
            assert!(tensors[&name].device().same_device(&device), "{name}");
            assert!(bytes(&tensors[&name].to_device(&CPU).expect("a copy")) == bytes(&tensor), "{name}");
        }
        Ok(())
    });
    all(outcomes.expect("threads"));
}

fn two_files(folder: &Path) -> Vec<PathBuf> {
    let large = (Dtype::F32, vec![300, 601]);
    write(&vec![vec![large, (Dtype::U8, vec![9])], vec![(Dtype::F16, vec![6, 4]), (Dtype::Bool, vec![5])]], folder)
}

fn loaded(group: Arc<dyn ProcessGroup>, device: &Device, paths: &[PathBuf]) -> Result<GroupFiles> {
    let mut loader = GroupLoader::new(group).with_device(device).with_dtype(DType::F16);
    loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
    loader.load_files()
}

/// All that a program would do.
fn work(group: Arc<dyn ProcessGroup>, device: &Device, paths: &[PathBuf]) -> Result<()> {
    let files = loaded(group, device, paths)?;
    files.tensor(&name(0, 0))?;
    files.sharded(&name(0, 0), 1)?;
    files.push(&name(1, 0), 0)?;
    files.load_plan(&ShardPlan::new().with_rows("*.1.0.*")?)?;
    Ok(())
}

/// Every call of the library and of the driver that can fail, on whichever rank makes it: all ranks return an error that names
/// one rank, or none does.
#[test]
fn calls_that_fail_are_errors_on_every_rank() {
    let Some(emulated) = Emulated::get() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let paths = two_files(folder.path());
    let functions = [
        ("ncclCommInitRankConfig", 3),
        ("ncclGroupStart", 4),
        ("ncclSend", 4),
        ("ncclRecv", 4),
        ("ncclGroupEnd", 4),
        ("ncclBroadcast", 6),
        ("ncclCommGetAsyncError", 30),
        ("ncclCommFinalize", 2),
        ("cuMemAllocAsync", 8),
        ("cuMemcpyHtoDAsync_v2", 4),
        ("cuEventRecord", 40),
    ];
    let mut failed = 0;
    for (function, most) in functions {
        for n in (1..=most).step_by(most as usize / 3 + 1) {
            let Some(_turn) = turn(3, n) else { return };
            let code = if function.starts_with("nccl") { SYSTEM_ERROR } else { OUT_OF_MEMORY };
            let arm = || emulated.fail_nth(Some(function), n, code);
            println!("{function} {n}");
            let load = |group: NcclGroup, device: &Device| work(Arc::new(group), device, &paths);
            let outcomes = run_armed(Way::Over, 3, LONG, arm, load);
            let spared = emulated.fail_none();
            let errors: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
            if errors.is_empty() {
                continue;
            }
            assert_eq!((errors.len(), spared), (3, 0), "{function} {n}: {errors:?}");
            let named: Vec<Option<usize>> =
                errors.iter().map(|error| RankFault::within(error).map(RankFault::rank)).collect();
            assert!(named.windows(2).all(|pair| pair[0] == pair[1] && pair[0].is_some()), "{function} {n}: {errors:?}");
            failed += 1;
        }
    }
    assert!(failed > 12, "{failed} failures");
}

/// What NCCL reports later, over a group and alone, with ranks that learn of another's end from NCCL and ranks that do not.
#[test]
fn errors_that_come_later_poison_every_rank() {
    let Some(emulated) = Emulated::get() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let paths = two_files(folder.path());
    for (way, told, n) in
        [(Way::Over, false, 45), (Way::Over, true, 70), (Way::Alone, true, 150), (Way::Alone, false, 150)]
    {
        let Some(_turn) = turn(2, n) else { return };
        emulated.nccl_remote_errors(told);
        let began = Instant::now();
        let arm = || emulated.nccl_async_error(n, INTERNAL_ERROR);
        let outcomes = run_armed(way, 2, 2 * SHORT, arm, |group, device| {
            let group: Arc<dyn ProcessGroup> = Arc::new(group);
            let outcome = work(Arc::clone(&group), device, &paths);
            // The group is of no more use, and says why.
            let again = group.barrier().expect_err("a poisoned group");
            assert_eq!(Some(again.to_string()), group.fault().map(|fault| fault.to_string()));
            outcome
        });
        for outcome in outcomes {
            let error = outcome.expect_err("every rank fails");
            assert!(RankFault::within(&error).is_some(), "{error}");
            assert!(matches!(error.kind(), Kind::Group | Kind::Timeout | Kind::Device), "{error}");
        }
        assert!(began.elapsed() < 2 * SHORT + SLACK, "{way:?}: {:?}", began.elapsed());
    }
}

/// How a rank fails before a transfer from device to device, or before an exchange of the hosts' bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Dies,
    Fails,
    IsSilent,
    Aborts,
}

/// A rank that fails at one of its operations.
#[derive(Debug)]
struct Failing {
    inner: NcclGroup,
    left: AtomicUsize,
    how: How,
}

impl Failing {
    fn step(&self) -> Result<()> {
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(1))) != Ok(1) {
            return Ok(());
        }
        let error = Error::new(Kind::Device, "this rank fails here");
        match self.how {
            How::Dies => std::panic::resume_unwind(Box::new("this rank dies")),
            How::Fails => Err(error),
            How::IsSilent => {
                std::thread::sleep(self.inner.timeout());
                Err(error)
            }
            How::Aborts => {
                self.inner.abort(&error);
                Ok(())
            }
        }
    }
}

impl ProcessGroup for Failing {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()> {
        self.step()?;
        self.inner.exchange(outgoing, incoming, patience)
    }

    fn abort(&self, cause: &Error) {
        self.inner.abort(cause);
    }

    fn fault(&self) -> Option<RankFault> {
        self.inner.fault()
    }

    fn on_device(&self, device: &Device) -> Option<&dyn DeviceGroup> {
        self.inner.on_device(device).map(|_| self as &dyn DeviceGroup)
    }
}

impl DeviceGroup for Failing {
    fn broadcast_device(&self, root: usize, bytes: DeviceBytes) -> Result<DeviceBytes> {
        self.step()?;
        self.inner.broadcast_device(root, bytes)
    }

    fn exchange_device(
        &self,
        outgoing: Vec<(usize, DeviceBytes)>,
        incoming: Vec<(usize, DeviceBytes)>,
    ) -> Result<Vec<DeviceBytes>> {
        self.step()?;
        self.inner.exchange_device(outgoing, incoming)
    }
}

/// Runs `work` on `ranks` ranks, of which `rank` fails at operation number `at`; whether it came so far.
fn fails_at(
    way: Way,
    paths: &[PathBuf],
    (ranks, rank): (usize, usize),
    at: usize,
    how: How,
    timeout: Duration,
) -> bool {
    let outcomes = run(way, ranks, timeout, |group, device| {
        let began = Instant::now();
        let is_it = group.rank() == rank;
        let outcome = match is_it {
            true => work(Arc::new(Failing { inner: group, left: AtomicUsize::new(at), how }), device, paths),
            false => work(Arc::new(group), device, paths),
        };
        assert!(is_it || began.elapsed() < timeout + SLACK, "{how:?} at {at}: {:?}", began.elapsed());
        outcome
    });
    if outcomes.iter().all(Result::is_ok) {
        return false;
    }
    for (other, outcome) in outcomes.iter().enumerate().filter(|(other, _)| *other != rank) {
        let error = outcome.as_ref().err().unwrap_or_else(|| panic!("{how:?} at {at}: rank {other} does not know"));
        let fault = RankFault::within(error).unwrap_or_else(|| panic!("{error}"));
        assert_eq!(fault.rank(), rank, "{how:?} at {at}, rank {other}: {error}");
    }
    assert!(outcomes[rank].is_err());
    true
}

/// At each operation, one after another, until the program comes to its end.
#[test]
fn a_rank_that_dies_or_fails_anywhere_is_named_by_all_others() {
    if Emulated::get().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let paths = two_files(folder.path());
    for (how, rank) in [(How::Dies, 0), (How::Fails, 1), (How::Aborts, 2), (How::Dies, 2)] {
        let failed = (1..1000).take_while(|&at| {
            let _turn = turn(3, at as u64);
            fails_at(Way::Over, &paths, (3, rank), at, how, LONG)
        });
        let failed = failed.count();
        assert!(failed > 15, "{how:?}, rank {rank}: {failed} operations");
    }
}

/// Over a group the silent rank is named by all; with NCCL alone two ranks know each other.
#[test]
fn a_rank_that_falls_silent_is_named_in_time() {
    if Emulated::get().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let paths = two_files(folder.path());
    for (way, ranks, rank, at) in [
        (Way::Over, 3, 2, 7),
        (Way::Over, 3, 1, 10),
        (Way::Over, 3, 0, 8),
        (Way::Alone, 2, 1, 8),
        (Way::Alone, 2, 0, 10),
    ] {
        let _turn = turn(ranks, at as u64);
        assert!(fails_at(way, &paths, (ranks, rank), at, How::IsSilent, SHORT), "{way:?} {at}");
    }
}

#[test]
fn ranks_that_do_not_join_are_an_error_in_time() {
    if Emulated::get().is_none() {
        return;
    }
    let _turn = turn(2, 0);
    let device = Device::new_cuda(0).expect("a device");
    let id = NcclGroup::unique_id().expect("an id");
    let began = Instant::now();
    let error = NcclGroup::new(&id, 1, 2, &device, Duration::from_millis(300)).expect_err("nobody else comes");
    assert_eq!((error.kind(), RankFault::within(&error).unwrap().rank()), (Kind::Timeout, 0));
    assert!(began.elapsed() < SLACK);
    assert_eq!(NcclGroup::new(&id, 2, 2, &device, LONG).unwrap_err().kind(), Kind::Argument);
    assert_eq!(NcclGroup::new(&id, 0, 2, &CPU, LONG).unwrap_err().kind(), Kind::Argument);
    // Two ranks on one device.
    let id = NcclGroup::unique_id().expect("an id");
    let (both, device) = (Barrier::new(2), &device);
    let join = |rank| {
        both.wait();
        NcclGroup::new(&id, rank, 2, device, LONG).map(drop)
    };
    let outcomes = std::thread::scope(|scope| {
        let threads = [0, 1].map(|rank| scope.spawn(move || join(rank)));
        threads.map(|thread| thread.join().expect("a rank"))
    });
    for outcome in outcomes {
        assert!(outcome.expect_err("no two ranks have one device").to_string().contains("invalid usage"));
    }
}

/// A library has the functions that are called, or the group says which one it lacks. The lane puts NVIDIA's library before the
/// emulated one, and says by its version which of them was to be found.
#[test]
fn the_library_has_what_is_called() {
    let version = NcclGroup::library_version().expect("a library with all functions");
    match std::env::var("UEL_NCCL_VERSION") {
        Ok(expected) => assert_eq!(version.to_string(), expected),
        Err(_) => println!("NCCL {version}"),
    }
}
