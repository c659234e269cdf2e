//! Ranks that are threads: what each gets, and what becomes of a rank that fails.

mod cases;
#[cfg(target_os = "linux")]
mod counted;
mod faults;
mod slices;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::{DType, Tensor};
use proptest::prelude::*;
use uel::shard::{Incoming, Outgoing};
use uel::{Dtype, Error, GroupLoader, Kind, ProcessGroup, RankFault, Result, SingleGroup, Split, ThreadGroup};

use cases::{CPU, Watched, bytes, check, safetensors, write};

/// Long enough for a busy machine.
const LONG: Duration = Duration::from_secs(120);

fn all<T>(outcomes: Vec<Result<T>>) -> Vec<T> {
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|error| panic!("{error}"))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_gets_what_a_plain_load_has(files in cases::any_files(), ranks in 1..5usize, seed in 0..12usize) {
        let folder = tempfile::tempdir().unwrap();
        let paths = write(&files, folder.path());
        all(ThreadGroup::run(ranks, LONG, |group| check(Arc::new(group), &CPU, &paths, seed).map(drop)).unwrap());
    }
}

#[test]
fn one_rank_needs_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let paths = write(&vec![vec![(Dtype::F32, vec![5, 3])], vec![(Dtype::U64, vec![4])]], folder.path());
    let files = check(Arc::new(SingleGroup::new()), &CPU, &paths, 1).unwrap();
    assert_eq!((files.group().size(), files.buffers()), (1, 1));
    assert_eq!(files.sharded("layer.0.0.weight", 0).unwrap().dims(), [5, 3]);
}

/// Files that are given to no rank are spread by their bytes; maps say who has what.
#[test]
fn maps_say_who_has_what() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [10, 900, 400, 500];
    let paths = write(&sizes.map(|size| vec![(Dtype::U8, vec![size])]).to_vec(), folder.path());
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let rank = group.rank();
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_paths(&paths);
        let files = loader.load_files()?;
        assert_eq!(files.files_of_rank(0), [&paths[0], &paths[1]]);
        assert_eq!(files.files_of_rank(1), [&paths[2], &paths[3]]);
        assert_eq!(files.keys_of_rank(1), ["layer.2.0.weight", "layer.3.0.weight"]);
        assert_eq!(files.keys_of_file(&paths[3]), ["layer.3.0.weight"]);
        assert_eq!(files.owner("layer.1.0.weight")?, 0);
        assert_eq!(files.files().map(|(owner, _)| owner).collect::<Vec<_>>(), [0, 0, 1, 1]);
        assert_eq!(files.owner("layer.9").unwrap_err().kind(), Kind::UnknownTensor);
        let largest = std::fs::metadata(&paths[1]).unwrap().len();
        assert!(rank == 1 || files.bytes_read() > largest);
        assert_eq!(files.buffers(), 1);
        Ok(())
    });
    all(outcomes.unwrap());
}

/// What a rank is to read may come from a map, which has another order in each process.
#[test]
fn files_may_be_added_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let paths = write(&(1..=6).map(|size| vec![(Dtype::U8, vec![size])]).collect(), folder.path());
    let outcomes = ThreadGroup::run(3, LONG, |group| {
        let (rank, mut loader) = (group.rank(), GroupLoader::new(Arc::new(group)));
        let mut files: Vec<(usize, Vec<&std::path::PathBuf>)> =
            (0..3).map(|n| (n, vec![&paths[n], &paths[n + 3]])).collect();
        files.rotate_left(rank);
        if rank == 2 {
            files.iter_mut().for_each(|(_, paths)| paths.reverse());
        }
        loader.add_files(files.into_iter().collect::<std::collections::HashMap<_, _>>());
        let files = loader.load_files()?;
        let all = files.files().map(|(rank, path)| (rank, path.to_path_buf())).collect::<Vec<_>>();
        let ours: Vec<&std::path::Path> = files.files_of_rank(rank);
        assert_eq!(ours.len(), 2);
        assert!(ours.contains(&paths[rank].as_path()) && ours.contains(&paths[rank + 3].as_path()));
        let sizes =
            (0..6).map(|n| Ok(files.tensor(&cases::name(n, 0))?.dims1().unwrap())).collect::<Result<Vec<_>>>()?;
        assert_eq!(sizes, [1, 2, 3, 4, 5, 6]);
        Ok(all)
    });
    let all = all(outcomes.unwrap());
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
}

/// Ranks that ask for the same name of different checkpoints are told; each gets its own where all ask for the same.
#[test]
fn files_of_the_same_names_are_told_apart() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let shape = vec![vec![(Dtype::F32, vec![7])], vec![(Dtype::F32, vec![9])]];
    let paths = folders.each_ref().map(|folder| write(&shape, folder.path()));
    let name = cases::name(0, 0);
    for crossed in [false, true] {
        let outcomes = ThreadGroup::run(2, LONG, |inner| {
            let rank = inner.rank();
            let group: Arc<dyn ProcessGroup> = Arc::new(Messages { inner, longest: 2000 });
            let mut loaded = Vec::new();
            for paths in &paths {
                let mut loader = GroupLoader::new(Arc::clone(&group));
                loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
                loaded.push(loader.load_files()?);
            }
            if crossed && rank == 1 {
                loaded.reverse();
            }
            loaded[0].tensor(&name)?;
            loaded[1].tensor(&name).map(drop)
        });
        for outcome in outcomes.unwrap() {
            match outcome {
                Ok(()) => assert!(!crossed, "the bytes of one file came as those of another"),
                Err(error) => assert!(crossed && error.kind() == Kind::Group, "{error}"),
            }
        }
    }
}

/// One thread of a rank waits while another one is in the middle of a step, whichever files the two are of.
#[test]
fn two_threads_of_a_rank_take_turns() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [a, b] = [[8000, 9000], [9000, 8000]].map(|sizes| sizes.map(|size| vec![(Dtype::U32, vec![size])]).to_vec());
    let paths = [write(&a, folders[0].path()), write(&b, folders[1].path())];
    let outcomes = ThreadGroup::run(2, LONG, |inner| {
        let group: Arc<dyn ProcessGroup> = Arc::new(Messages { inner, longest: 700 });
        let mut loaded = Vec::new();
        for paths in &paths {
            let mut loader = GroupLoader::new(Arc::clone(&group));
            loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
            loaded.push(loader.load_files()?);
        }
        let (gate, [first, second]) = (std::sync::Barrier::new(2), [&loaded[0], &loaded[1]]);
        // Either order is one that a rank may choose; where ranks choose differently they are told, and nothing is mixed up.
        std::thread::scope(|scope| {
            let threads = [(first, &paths[0]), (second, &paths[1])].map(|(files, paths)| {
                let gate = &gate;
                scope.spawn(move || {
                    gate.wait();
                    let plain = uel::Checkpoint::open_files(paths).unwrap();
                    for file in [0, 1, 0, 1, 0] {
                        let name = cases::name(file, 0);
                        let Ok(tensor) = files.tensor(&name) else { return };
                        assert!(bytes(&tensor) == bytes(&plain.tensor(&name, &CPU).unwrap()), "{name}");
                    }
                })
            });
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
        Ok(())
    });
    all(outcomes.unwrap());
}

/// A group checks what it reads where it is asked to, as a checkpoint does.
#[test]
fn damage_is_found_by_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(format!("{name}.safetensors")));
    for (path, name) in paths.iter().zip(["a.weight", "b.weight"]) {
        let tensor = Tensor::arange(0u32, 3_000_000, &CPU).unwrap();
        uel::save_with([(name, &tensor)], path, &uel::SaveOptions::new().with_hashes(true)).unwrap();
    }
    let load = |verified: bool| {
        let outcomes = ThreadGroup::run(2, LONG, |group| {
            let options = uel::Checkpoint::options().with_verified(verified);
            let mut loader = GroupLoader::new(Arc::new(group)).with_options(options);
            loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
            loader.load_files()?.tensor("b.weight")
        });
        outcomes.unwrap()
    };
    all(load(true));
    let mut file = std::fs::read(&paths[1]).unwrap();
    let last = file.len() - 3;
    file[last] ^= 4;
    std::fs::write(&paths[1], file).unwrap();
    all(load(false));
    for outcome in load(true) {
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), RankFault::within(&error).unwrap().rank()), (Kind::HashMismatch, 1), "{error}");
        assert!(error.to_string().contains("b.weight"), "{error}");
    }
}

/// A buffer lives as long as a view of it, whatever becomes of the loader; tensors need no buffer.
#[test]
fn buffers_live_as_long_as_what_was_taken_from_them() {
    let folder = tempfile::tempdir().unwrap();
    let paths = write(&vec![vec![(Dtype::F32, vec![1000, 5])], vec![(Dtype::U8, vec![77])]], folder.path());
    let expected = std::fs::read(&paths[0]).unwrap();
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let rank = group.rank();
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_files([(0, paths.clone())]);
        let files = loader.load_files()?;
        let tensor = files.tensor("layer.0.0.weight")?;
        let view = files.view("layer.0.0.weight");
        if rank == 1 {
            assert_eq!(view.unwrap_err().kind(), Kind::Argument);
            assert!(!files.release_file(&paths[0]));
            // The owner gave the file up before it was asked: all learn of it, and go on.
            let error = files.tensor("layer.0.0.weight").unwrap_err();
            assert_eq!((error.kind(), RankFault::within(&error).unwrap().rank()), (Kind::Argument, 0));
            return Ok(files.tensor("layer.1.0.weight")?.dims().to_vec());
        }
        let view = view?;
        assert!(files.release_file(&paths[0]) && !files.release_file(&paths[0]));
        let error = files.tensor("layer.0.0.weight").unwrap_err();
        assert!(error.to_string().contains("released"), "{error}");
        let other = files.tensor("layer.1.0.weight")?;
        drop(files);
        assert_eq!((view.dtype(), view.shape()), (Dtype::F32, &[1000, 5][..]));
        assert!(expected.ends_with(view.as_bytes()) && view.len() == 20_000);
        assert_eq!(tensor.dims(), [1000, 5]);
        Ok(other.dims().to_vec())
    });
    assert_eq!(all(outcomes.unwrap()), [[77], [77]]);
}

#[test]
fn queries_keys_and_values_are_fused_across_ranks() {
    let folder = tempfile::tempdir().unwrap();
    // Of different heights, as with fewer heads for keys and values, and on different ranks.
    let shapes = [[8, 6], [4, 6], [4, 6]].map(|shape| vec![(Dtype::Bf16, shape.to_vec())]);
    let paths = write(&shapes.to_vec(), folder.path());
    let names = [0, 1, 2].map(|file| cases::name(file, 0));
    let plain = uel::Checkpoint::open_files(&paths).unwrap();
    let fused = all(ThreadGroup::run(3, LONG, |group| {
        let mut loader = GroupLoader::new(Arc::new(group)).with_dtype(DType::F32);
        loader.add_files((0..3).map(|n| (n, vec![&paths[n]])));
        loader.load_files()?.multi_cols(&names, Split::new(0).with_unit(2))
    })
    .unwrap());
    // Two units of the keys are too few for the last rank, and so are four of the queries in blocks of two.
    for (rank, got) in fused.iter().enumerate().take(2) {
        let parts = names.each_ref().map(|name| {
            let units = plain.info(name).unwrap().shape()[0] / 2;
            let block = units.div_ceil(3);
            let (start, end) = ((rank * block).min(units) * 2, ((rank + 1) * block).min(units) * 2);
            plain.tensor_as(name, Some(DType::F32), &CPU).unwrap().narrow(0, start, end - start).unwrap()
        });
        assert_eq!(bytes(got), bytes(&Tensor::cat(&parts, 0).unwrap()), "rank {rank}");
        let alone = plain.multi_cols(&names, Split::new(0).with_unit(2), rank, 3, &CPU).unwrap();
        assert_eq!(bytes(&alone.to_dtype(DType::F32).unwrap()), bytes(got), "rank {rank}");
    }
    assert_eq!(fused.iter().map(Tensor::dims).collect::<Vec<_>>(), [[8, 6], [8, 6], [0, 6]]);
}

/// PyTorch files, read whole and opened from memory, are like others.
#[test]
fn pytorch_files_are_read_by_a_group() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pth");
    let tensor = Tensor::arange(0f32, 40., &CPU).unwrap().reshape((8, 5)).unwrap();
    let options = uel::SaveOptions::new().with_format(uel::FileFormat::PyTorch);
    uel::save_with([("w", &tensor)], &path, &options).unwrap();
    let parts = all(ThreadGroup::run(2, LONG, |group| {
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_files([(1, vec![&path])]);
        loader.load_files()?.sharded("w", 1)
    })
    .unwrap());
    assert_eq!(parts[0].dims(), [8, 3]);
    assert_eq!(bytes(&Tensor::cat(&parts, 1).unwrap()), bytes(&tensor));
}

/// What can be had of a GGUF file alone can be had of it in a group, blocks among it, and what cannot is the same error.
#[test]
fn gguf_files_are_read_by_a_group() {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let tensor = Tensor::arange(0f32, 64. * 512., &CPU).unwrap().reshape((64, 512)).unwrap();
    let [plain_tensor, blocks, half] =
        [GgmlDType::F32, GgmlDType::Q8_0, GgmlDType::F16].map(|dtype| QTensor::quantize(&tensor, dtype).unwrap());
    let tensors = [("f", &plain_tensor), ("q", &blocks), ("h", &half)];
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &[], &tensors).unwrap();
    let plain = uel::Checkpoint::open(&path).unwrap();
    type Outcomes = Vec<std::result::Result<Vec<u8>, Kind>>;
    let told = |outcome: Result<Tensor>| outcome.map(|tensor| bytes(&tensor)).map_err(|error| error.kind());
    let outcomes = all(ThreadGroup::run(2, LONG, |group| {
        let rank = group.rank();
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_files([(1, vec![&path])]);
        let files = loader.load_files()?;
        let got: Outcomes = (tensors.iter())
            .flat_map(|(name, _)| [files.tensor(name), files.sharded(name, 0), files.sharded(name, 1)])
            .map(told)
            .collect();
        let alone: Outcomes = (tensors.iter())
            .flat_map(|(name, _)| {
                let part = |dim| plain.sharded(name, dim, rank, 2, &CPU);
                [plain.tensor(name, &CPU), part(0), part(1)]
            })
            .map(told)
            .collect();
        assert!(got == alone, "{:?} and {:?}", kinds(&got), kinds(&alone));
        Ok(got)
    })
    .unwrap());
    fn kinds(outcomes: &Outcomes) -> Vec<Option<Kind>> {
        outcomes.iter().map(|outcome| outcome.as_ref().err().copied()).collect()
    }
    assert!(kinds(&outcomes[0])[..3].iter().all(Option::is_none), "floats are tensors");
}

/// A value that does not fit is found by one rank only, after all bytes were sent: all return its error, and go on.
#[test]
fn a_part_that_cannot_be_made_fails_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let values: Vec<u8> = [1, 2, 3, u64::MAX].iter().flat_map(|value: &u64| value.to_le_bytes()).collect();
    let good = ("good".to_owned(), Dtype::U8, vec![2], vec![1, 2]);
    std::fs::write(&path, safetensors(&[("ids".to_owned(), Dtype::U64, vec![4], values), good])).unwrap();
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_files([(0, vec![&path])]);
        let files = loader.load_files()?;
        let error = files.sharded("ids", 0).unwrap_err();
        assert_eq!((error.kind(), RankFault::within(&error).unwrap().rank()), (Kind::ValueRange, 1), "{error}");
        files.tensor("good")
    });
    assert_eq!(all(outcomes.unwrap()).len(), 2);
}

/// A group whose ranks send each other messages, and short ones.
#[derive(Debug)]
struct Messages {
    inner: ThreadGroup,
    longest: usize,
}

impl ProcessGroup for Messages {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }

    fn message_bytes(&self) -> usize {
        self.longest
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()> {
        let lens = outgoing.iter().map(|message| message.bytes.len());
        // Notes that are gathered go as they are.
        let longest = lens.chain(incoming.iter().map(|message| message.into.len())).max().unwrap_or(0);
        assert!(longest <= self.longest.max(1024), "{longest} bytes in a message");
        self.inner.exchange(outgoing, incoming, patience)
    }

    fn abort(&self, cause: &Error) {
        self.inner.abort(cause);
    }

    fn fault(&self) -> Option<RankFault> {
        self.inner.fault()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Ranks that cannot read each other's memory get the same by messages, of which a tensor takes many.
    #[test]
    fn messages_bring_the_same(files in cases::any_files(), ranks in 1..5usize, seed in 0..12usize, longest in 1025..5000usize) {
        let folder = tempfile::tempdir().unwrap();
        let paths = write(&files, folder.path());
        let work = |inner| check(Arc::new(Messages { inner, longest }), &CPU, &paths, seed).map(drop);
        all(ThreadGroup::run(ranks, LONG, work).unwrap());
    }
}

/// Parts longer than a message are sent in several, and arrive whole.
#[test]
fn long_parts_are_sent_in_several_messages() {
    let part = |rank: usize| (0..10_007).map(|n| (n * (rank + 3)) as u8).collect::<Vec<u8>>();
    let outcomes = ThreadGroup::run(3, LONG, |inner| {
        let group = Messages { inner, longest: 1 << 10 };
        let (rank, mut all) = (group.rank(), part(1));
        if rank != 1 {
            all.fill(0);
        }
        group.broadcast(1, &mut all)?;
        assert!(all == part(1));
        let parts: Vec<Vec<u8>> = (0..3).map(|rank| part(rank)[rank * 1000..].to_vec()).collect();
        let mut own = vec![0; parts[rank].len()];
        let slices: Vec<&[u8]> = if rank == 2 { parts.iter().map(Vec::as_slice).collect() } else { Vec::new() };
        group.scatter(2, &slices, &mut own)?;
        assert!(own == parts[rank]);
        match rank {
            0 => group.send(1, &parts[0])?,
            1 => {
                let mut into = vec![0; parts[0].len()];
                group.recv(0, &mut into)?;
                assert!(into == parts[0]);
            }
            _ => {}
        }
        group.barrier()
    });
    all(outcomes.unwrap());
}

/// What each rank gets by a plan, by messages and where it lies, is what it reads by itself, and each byte is read once.
#[test]
fn a_plan_brings_the_same_on_every_road() {
    let folder = tempfile::tempdir().unwrap();
    let shapes = vec![
        vec![(Dtype::Bf16, vec![300, 170]), (Dtype::F32, vec![64, 33, 5]), (Dtype::U64, vec![40])],
        vec![(Dtype::F16, vec![3, 900]), (Dtype::F32, vec![0, 7]), (Dtype::Bool, vec![12, 10])],
    ];
    let paths = write(&shapes, folder.path());
    let total: u64 = paths.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    let plan = uel::ShardPlan::new().with_rows("*.0.weight").unwrap().with_columns("*.1.weight").unwrap();
    let plan = plan.with_split("layer.1.2.weight", Split::new(1).with_sections(2)).unwrap();
    for (dtype, lends) in [(None, true), (None, false), (Some(DType::F32), true), (Some(DType::BF16), true)] {
        let outcomes = ThreadGroup::run(3, LONG, |inner| {
            let group: Arc<dyn ProcessGroup> = match lends {
                true => Arc::new(inner),
                false => Arc::new(Messages { inner, longest: 2000 }),
            };
            let rank = group.rank();
            let (mut loader, recorded) = cases::recording(group);
            if let Some(dtype) = dtype {
                loader = loader.with_dtype(dtype);
            }
            loader.add_paths(&paths);
            let tensors = loader.load_files()?.load_plan(&plan)?;
            let read: u64 = recorded.lock().unwrap().iter().map(|source| source.bytes_read()).sum();
            Ok((rank, tensors, read))
        });
        let plain = uel::Checkpoint::open_files(&paths).unwrap();
        let mut read = 0;
        for (rank, tensors, bytes_read) in all(outcomes.unwrap()) {
            let own = plain.load_shard(&plan, rank, 3, dtype, &CPU).unwrap();
            assert_eq!(tensors.len(), own.len());
            for (name, tensor) in own {
                assert_eq!((tensors[&name].dtype(), tensors[&name].dims()), (tensor.dtype(), tensor.dims()), "{name}");
                assert!(bytes(&tensors[&name]) == bytes(&tensor), "{name}, rank {rank}, {dtype:?}, {lends}");
            }
            read += bytes_read;
        }
        assert_eq!(read, total);
    }
}

/// A rank whose bytes that it sends are counted.
fn counting(inner: ThreadGroup, sent: &Arc<AtomicUsize>) -> Watched<ThreadGroup> {
    let sent = Arc::clone(sent);
    Watched::new(inner, move |_, outgoing| {
        sent.fetch_add(outgoing.iter().map(|message| message.bytes.len()).sum(), Ordering::Relaxed);
        Ok(())
    })
}

/// The bytes that are sent are the fewer of the stored and the cast ones, and a part goes to its rank alone.
#[test]
fn casts_are_made_where_fewer_bytes_are_sent() {
    const ELEMENTS: usize = 400_000;
    let folder = tempfile::tempdir().unwrap();
    // What all steps say of themselves is less than this.
    let notes = 20_000;
    for (stored, asked, bytes_each) in [
        (Dtype::F32, Some(DType::BF16), 2),
        (Dtype::Bf16, Some(DType::F32), 2),
        (Dtype::F32, None, 4),
        (Dtype::F64, Some(DType::F32), 4),
    ] {
        let paths = write(&vec![vec![(stored, vec![2, ELEMENTS / 2])]], folder.path());
        for (parts, ranks) in [(false, 3), (true, 2)] {
            let outcomes = ThreadGroup::run(ranks, LONG, |group| {
                let (rank, sent) = (group.rank(), Arc::new(AtomicUsize::new(0)));
                let mut loader = GroupLoader::new(Arc::new(counting(group, &sent)));
                if let Some(dtype) = asked {
                    loader = loader.with_dtype(dtype);
                }
                loader.add_files([(1, vec![&paths[0]])]);
                let files = loader.load_files()?;
                match parts {
                    false => files.tensor("layer.0.0.weight")?,
                    true => files.sharded("layer.0.0.weight", 1)?,
                };
                Ok((rank, sent.load(Ordering::Relaxed)))
            });
            for (rank, sent) in all(outcomes.unwrap()) {
                let expected = match (rank, parts) {
                    (1, false) => 2 * ELEMENTS * bytes_each,
                    (1, true) => ELEMENTS / 2 * bytes_each,
                    _ => 0,
                };
                assert!((expected..expected + notes).contains(&sent), "{stored} as {asked:?}, rank {rank}: {sent}");
            }
        }
    }
}
