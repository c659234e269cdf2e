//! Ranks that fail, die, fall silent or ask for something else: every rank returns an error that names the one at fault.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use uel::core::source::decorators::FaultSource;
use uel::core::source::{ByteSource, FileSource};
use uel::shard::Outgoing;
use uel::{Error, GroupFiles, GroupLoader, Kind, ProcessGroup, RankFault, Result, ShardPlan, ThreadGroup};

use super::LONG;
use super::cases::{Watched, loaded, name, two_files, work};

/// A third of it is what a rank waits for another: enough for threads of a busy machine to come.
const SHORT: Duration = Duration::from_secs(3);

/// What a deadline may be missed by.
const SLACK: Duration = Duration::from_secs(2);

/// The rank that all outcomes name, with one kind of error.
fn named<T>(outcomes: &[Result<T>]) -> (usize, Kind) {
    let faults: Vec<(usize, Kind)> = (outcomes.iter())
        .map(|outcome| {
            let error = outcome.as_ref().err().expect("every rank fails");
            (RankFault::within(error).unwrap_or_else(|| panic!("{error}")).rank(), error.kind())
        })
        .collect();
    assert!(faults.windows(2).all(|pair| pair[0] == pair[1]), "{faults:?}");
    faults[0]
}

#[test]
fn a_file_that_cannot_be_read_fails_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    let missing = vec![paths[0].clone(), folder.path().join("absent.safetensors")];
    let outcomes = ThreadGroup::run(3, LONG, |group| loaded(Arc::new(group), &missing)).unwrap();
    assert_eq!(named(&outcomes), (1, Kind::Io));
    let text = outcomes[2].as_ref().unwrap_err().to_string();
    assert!(text.contains("rank 1") && text.contains("absent.safetensors"), "{text}");

    let damaged = folder.path().join("damaged.safetensors");
    std::fs::write(&damaged, [&8u64.to_le_bytes()[..], b"{\"w\":{}}"].concat()).unwrap();
    let damaged = vec![damaged, paths[1].clone()];
    let outcomes = ThreadGroup::run(3, LONG, |group| loaded(Arc::new(group), &damaged)).unwrap();
    assert_eq!(named(&outcomes), (0, Kind::MissingField));

    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let mut loader = GroupLoader::new(Arc::new(group)).with_opener(|path| {
            let source = FaultSource::new(FileSource::open(path)?);
            let bad = path.ends_with("part-1.safetensors");
            let source = if bad { source.failing_at_offset(60, std::io::ErrorKind::Other) } else { source };
            Ok(Arc::new(source) as Arc<dyn ByteSource>)
        });
        loader.add_files([(0, vec![&paths[0]]), (1, vec![&paths[1]])]);
        loader.load_files()
    });
    assert_eq!(named(&outcomes.unwrap()), (1, Kind::Io));
}

#[test]
fn files_that_do_not_fit_together_fail_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    // A rank that does not exist.
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let mut loader = GroupLoader::new(Arc::new(group));
        loader.add_files([(2, vec![&paths[0]])]);
        loader.load_files()
    });
    assert_eq!(named(&outcomes.unwrap()).1, Kind::Argument);
    // A tensor in two files.
    let twice = vec![paths[0].clone(), folder.path().join("copy.safetensors")];
    std::fs::copy(&paths[0], &twice[1]).unwrap();
    let outcomes = ThreadGroup::run(2, LONG, |group| loaded(Arc::new(group), &twice)).unwrap();
    assert_eq!(named(&outcomes).1, Kind::DuplicateName);
    // Other files on another rank.
    let outcomes = ThreadGroup::run(3, LONG, |group| {
        let reversed: Vec<PathBuf> = paths.iter().rev().cloned().collect();
        let paths = if group.rank() == 2 { &reversed } else { &paths };
        loaded(Arc::new(group), paths)
    });
    assert_eq!(named(&outcomes.unwrap()), (2, Kind::Group));
}

/// Errors that all ranks see before anything is sent leave the group as it was.
#[test]
fn what_nobody_can_have_is_an_error_and_no_end() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let files = loaded(Arc::new(group), &paths)?;
        let no_names: [&str; 0] = [];
        for (error, kind) in [
            (files.tensor("absent").unwrap_err(), Kind::UnknownTensor),
            (files.sharded(&name(0, 0), 2).unwrap_err(), Kind::Argument),
            (files.push(&name(0, 0), 2).unwrap_err(), Kind::Argument),
            (files.multi_cols(&no_names, 0).unwrap_err(), Kind::Argument),
            (files.multi_cols(&[name(0, 0), name(1, 0)], 0).unwrap_err(), Kind::Argument),
        ] {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(RankFault::within(&error).is_some(), "{error}");
        }
        files.tensor(&name(1, 0)).map(|tensor| tensor.dims().to_vec())
    });
    for outcome in outcomes.unwrap() {
        assert_eq!(outcome.unwrap(), [6, 4]);
    }
}

/// Whatever a rank asks for in the place of what the others ask for.
#[test]
fn a_rank_that_asks_for_something_else_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    type Ask = fn(&GroupFiles) -> Result<()>;
    let other: [Ask; 6] = [
        |files| files.tensor(&name(0, 1)).map(drop),
        |files| files.sharded(&name(1, 0), 0).map(drop),
        |files| files.push(&name(1, 0), 0).map(drop),
        |files| files.multi_cols(&[name(1, 0)], 0).map(drop),
        |files| files.load_plan(&ShardPlan::new()).map(drop),
        |files| files.tensor("absent").map(drop),
    ];
    // Rank 0 is what nobody is compared with because of its number.
    for (ask, odd) in other.into_iter().zip([2, 0, 1, 0, 2, 0]) {
        let began = Instant::now();
        let outcomes = ThreadGroup::run(3, LONG, |group| {
            let rank = group.rank();
            let files = loaded(Arc::new(group), &paths)?;
            let outcome = match rank {
                _ if rank == odd => ask(&files),
                _ => files.tensor(&name(1, 0)).map(drop),
            };
            // The group is of no more use, and says why.
            let again = files.tensor(&name(1, 0)).unwrap_err();
            assert_eq!(again.to_string(), outcome.as_ref().unwrap_err().to_string());
            outcome
        })
        .unwrap();
        assert_eq!(named(&outcomes), (odd, Kind::Group));
        assert!(outcomes[0].as_ref().unwrap_err().to_string().contains("layer.1.0.weight"));
        assert!(began.elapsed() < LONG / 4, "nobody waited");
    }
    // The same question in another place of the order, and plans that differ.
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let rank = group.rank();
        let files = loaded(Arc::new(group), &paths)?;
        let pattern = if rank == 0 { "*.0.0.*" } else { "*.1.0.*" };
        files.load_plan(&ShardPlan::new().with_columns(pattern)?)
    });
    assert_eq!(named(&outcomes.unwrap()), (1, Kind::Group));
}

/// How a rank fails in the middle of an exchange.
#[derive(Clone, Copy, Debug)]
enum How {
    /// Its thread panics, and with it the rank is dropped.
    Dies,
    /// Its exchange fails, and the rank goes on.
    Fails,
    /// It says nothing for longer than all others wait.
    IsSilent,
    /// It gives the group up.
    Aborts,
}

/// A rank that fails at exchange number `at`.
fn failing(at: usize, group: ThreadGroup, how: How) -> Watched<ThreadGroup> {
    Watched::failing(group, at, move |group, error| match how {
        // Without the panic hook, which would print a backtrace for each.
        How::Dies => std::panic::resume_unwind(Box::new("this rank dies")),
        How::Fails => Err(error),
        How::IsSilent => {
            std::thread::sleep(group.timeout());
            Err(error)
        }
        How::Aborts => {
            group.abort(&error);
            Ok(())
        }
    })
}

/// Runs `work` on `ranks` ranks, of which `rank` fails at exchange number `at`; whether it came so far.
fn fails_at(
    paths: &[PathBuf],
    (ranks, rank): (usize, usize),
    at: usize,
    how: How,
    lends: bool,
    timeout: Duration,
) -> bool {
    let outcomes = ThreadGroup::run(ranks, timeout, |group| {
        let began = Instant::now();
        let is_it = group.rank() == rank;
        let outcome = match is_it {
            true => work(Arc::new(failing(at, group, how).lending(lends)), paths),
            false => work(Arc::new(group), paths),
        };
        assert!(is_it || began.elapsed() < timeout + SLACK, "{how:?} at {at}: {:?}", began.elapsed());
        outcome
    })
    .unwrap();
    if outcomes.iter().all(Result::is_ok) {
        return false;
    }
    for (at, outcome) in outcomes.iter().enumerate().filter(|(at, _)| *at != rank) {
        let error = outcome.as_ref().err().unwrap_or_else(|| panic!("rank {at} does not know"));
        let fault = RankFault::within(error).unwrap_or_else(|| panic!("{error}"));
        assert_eq!(fault.rank(), rank, "{how:?}: {error}");
    }
    assert!(outcomes[rank].is_err());
    true
}

/// At each exchange, one after another, until the program comes to its end.
#[test]
fn a_rank_that_dies_or_fails_anywhere_is_named_by_all_others() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    for (how, lends) in [How::Dies, How::Fails, How::Aborts].into_iter().flat_map(|how| [(how, false), (how, true)]) {
        for rank in 0..3 {
            let failed = (1..1000).take_while(|&at| fails_at(&paths, (3, rank), at, how, lends, LONG)).count();
            assert!(failed > 15, "{how:?}, rank {rank}: {failed} exchanges");
        }
    }
}

proptest! {
    // Each takes as long as ranks wait.
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn a_rank_that_falls_silent_is_named_in_time(rank in 0..3usize, at in 1..18usize, lends: bool) {
        let folder = tempfile::tempdir().unwrap();
        let paths = two_files(folder.path());
        prop_assert!(fails_at(&paths, (3, rank), at, How::IsSilent, lends, SHORT));
    }
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let paths = two_files(folder.path());
    let began = Instant::now();
    let outcomes = ThreadGroup::run(3, LONG, |group| {
        let rank = group.rank();
        let files = loaded(Arc::new(group), &paths)?;
        if rank == 1 {
            return Err(Error::new(Kind::Argument, "no more"));
        }
        files.tensor(&name(0, 0))
    })
    .unwrap();
    for at in [0, 2] {
        let error = outcomes[at].as_ref().unwrap_err();
        assert_eq!((error.kind(), RankFault::within(error).unwrap().rank()), (Kind::Group, 1));
    }
    assert!(began.elapsed() < LONG / 4, "nobody waited");
}

/// Messages of other lengths, wrong ranks, and what a group refuses before it sends.
#[test]
fn exchanges_are_checked() {
    let outcomes = ThreadGroup::run(2, LONG, |group| {
        let (other, bytes) = (1 - group.rank(), [1u8; 4]);
        let mut into = [0; 4];
        let twice = [Outgoing { to: other, bytes: &bytes }; 2];
        assert_eq!(group.exchange(&twice, &mut [], LONG).unwrap_err().kind(), Kind::Argument);
        let own = [Outgoing { to: group.rank(), bytes: &bytes }];
        assert_eq!(group.exchange(&own, &mut [], LONG).unwrap_err().kind(), Kind::Argument);
        assert_eq!(group.send(2, &bytes).unwrap_err().kind(), Kind::Argument);
        assert_eq!(group.broadcast(2, &mut into).unwrap_err().kind(), Kind::Argument);
        assert_eq!(group.all_gather(&bytes, &mut into).unwrap_err().kind(), Kind::Argument);
        if group.rank() == 0 {
            assert_eq!(group.scatter(0, &[&bytes], &mut into).unwrap_err().kind(), Kind::Argument);
            group.send(1, &bytes)?;
            group.scatter(0, &[&bytes[..2], &bytes], &mut into[..2])?;
            group.send(1, &bytes[..3])?;
            return group.barrier();
        }
        group.recv(0, &mut into)?;
        assert_eq!(into, bytes);
        group.scatter(0, &[], &mut into)?;
        group.recv(0, &mut into)
    })
    .unwrap();
    assert_eq!(named(&outcomes), (0, Kind::Group));
    assert_eq!(ThreadGroup::new(0).unwrap_err().kind(), Kind::Argument);
}
