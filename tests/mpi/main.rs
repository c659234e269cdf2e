//! Ranks that are processes, started by `mpirun`: this program starts itself again.
//!
//! Needs `mpirun` in the path, and the crate's feature `mpi`; `scripts/test mpi` sees to both.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests"
)]

#[path = "../shard/cases.rs"]
mod cases;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use uel::{Kind, MpiGroup, ProcessGroup, RankFault, Result};

use cases::{Watched, check, loaded, name, two_files, work, write};

/// A run of `mpirun` that takes longer has hung.
const DEADLINE: Duration = Duration::from_secs(150);

/// How long ranks may take where all goes well.
const LONG: Duration = Duration::from_secs(90);

/// How long they may take where one is silent or dead. A third of it is waited for a rank to come.
const SHORT: Duration = Duration::from_secs(9);

/// What a deadline may be missed by, and a group takes to tell the others.
const SLACK: Duration = Duration::from_secs(4);

/// What a rank of a run tells the test that started it.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Outcome {
    /// The rank that its error names.
    named: Option<usize>,
    kind: Option<String>,
    text: String,
    seconds: f64,
}

/// Runs `scenario` on `ranks` processes, and returns what each said; a rank that died says nothing.
fn mpirun(ranks: usize, scenario: &str, at: usize, folder: &Path) -> Vec<Option<Outcome>> {
    let log = std::fs::File::create(folder.join("log")).unwrap();
    for rank in 0..ranks {
        let _ = std::fs::remove_file(folder.join(format!("outcome-{rank}.json")));
    }
    let mut child = Command::new("mpirun")
        .args(["--allow-run-as-root", "--oversubscribe", "--enable-recovery", "-n", &ranks.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["rank", "--exact", "--ignored", "--nocapture"])
        .env("UEL_MPI_SCENARIO", scenario)
        .env("UEL_MPI_AT", at.to_string())
        .env("UEL_MPI_FOLDER", folder)
        // What containers forbid, and what is not under test.
        .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("mpirun is in the path");
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > DEADLINE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{scenario} at {at} on {ranks} ranks hangs: {}", read_log(folder));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    (0..ranks)
        .map(|rank| {
            let text = std::fs::read(folder.join(format!("outcome-{rank}.json"))).ok()?;
            Some(serde_json::from_slice(&text).unwrap())
        })
        .collect()
}

fn read_log(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("log")).unwrap_or_default()
}

/// The process that `mpirun` starts.
#[test]
#[ignore = "lane mpi: started by mpirun"]
fn rank() {
    let Ok(scenario) = std::env::var("UEL_MPI_SCENARIO") else { return };
    let folder = PathBuf::from(std::env::var_os("UEL_MPI_FOLDER").unwrap());
    let at: usize = std::env::var("UEL_MPI_AT").unwrap().parse().unwrap();
    let timeout = if matches!(&*scenario, "check" | "messages" | "large" | "absent" | "other") { LONG } else { SHORT };
    let group = MpiGroup::world_with_timeout(timeout).unwrap();
    assert_eq!(MpiGroup::world().unwrap_err().kind(), Kind::Argument);
    let rank = group.rank();
    group.barrier().unwrap();
    let began = Instant::now();
    let mut kept = None;
    let outcome = run(&scenario, at, &folder, group, &mut kept);
    let seconds = began.elapsed().as_secs_f64();
    let error = outcome.as_ref().err();
    let outcome = Outcome {
        named: error.and_then(RankFault::within).map(RankFault::rank),
        kind: error.map(|error| error.kind().to_string()),
        text: error.map(ToString::to_string).unwrap_or_default(),
        seconds,
    };
    let partial = folder.join(format!("outcome-{rank}.partial"));
    std::fs::write(&partial, serde_json::to_vec(&outcome).unwrap()).unwrap();
    std::fs::rename(partial, folder.join(format!("outcome-{rank}.json"))).unwrap();
}

/// Does what the scenario says. A group that lives on when the error is there is put into `kept`: its end waits for MPI's, and that
/// for ranks which are dead.
fn run(
    scenario: &str,
    at: usize,
    folder: &Path,
    group: MpiGroup,
    kept: &mut Option<Arc<dyn ProcessGroup>>,
) -> Result<()> {
    let mut kept = |group: Arc<dyn ProcessGroup>| Arc::clone(kept.insert(group));
    let paths = files_of(folder);
    let (rank, last) = (group.rank(), group.size() - 1);
    // Another rank fails each time.
    let victim = at % group.size();
    match scenario {
        "large" => large(&group),
        "check" | "messages" => {
            let lends = scenario == "check";
            let group: Arc<dyn ProcessGroup> = match lends {
                true => Arc::new(group),
                false => Arc::new(Watched::new(group, |_, _| Ok(()))),
            };
            let several = group.size() > 1;
            let cases = std::fs::read_dir(folder).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir());
            for case in 0..cases.count() {
                let paths = files_of(&folder.join(format!("case-{case}")));
                let files = check(Arc::clone(&group), &cases::CPU, &paths, case + at)?;
                assert!(!several || files.lends_memory() == (lends && memory_may_be_read()));
            }
            Ok(())
        }
        "absent" => {
            let mut paths = paths;
            paths[1] = folder.join("absent.safetensors");
            work(kept(Arc::new(group)), &paths)
        }
        "other" => {
            let files = loaded(Arc::new(group), &paths)?;
            files.tensor(&name(usize::from(rank == last), 0)).map(drop)
        }
        _ if rank != victim => work(kept(Arc::new(group)), &paths),
        fault => work(Arc::new(failing(at, group, fault).lending(at.is_multiple_of(2))), &paths),
    }
}

/// Whether the system lets a process read the memory of another one that is none of its own: `mpirun`'s, as the ranks are to
/// each other.
fn memory_may_be_read() -> bool {
    std::fs::File::open(format!("/proc/{}/mem", std::os::unix::process::parent_id())).is_ok()
}

fn files_of(folder: &Path) -> Vec<PathBuf> {
    let path = |n| folder.join(format!("part-{n}.safetensors"));
    (0..).map(path).take_while(|path| path.exists()).collect()
}

/// A part that takes more than one message of MPI.
fn large(group: &MpiGroup) -> Result<()> {
    const BYTES: usize = (1 << 30) + (100 << 20) + 7;
    let byte = |n: usize| (n.wrapping_mul(2_654_435_761) >> 13) as u8;
    let mut bytes = vec![0; BYTES];
    if group.rank() == 1 {
        bytes.iter_mut().enumerate().for_each(|(n, into)| *into = byte(n));
    }
    group.broadcast(1, &mut bytes)?;
    assert!(bytes.iter().enumerate().all(|(n, got)| *got == byte(n)));
    Ok(())
}

/// A rank that fails at exchange number `at`.
fn failing(at: usize, group: MpiGroup, fault: &str) -> Watched<MpiGroup> {
    let fault = fault.to_owned();
    Watched::failing(group, at, move |group, error| {
        match fault.as_str() {
            "killed" => {
                let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
                std::thread::sleep(DEADLINE);
            }
            "silent" => std::thread::sleep(group.timeout()),
            "leaves" => std::panic::resume_unwind(Box::new("this rank panics")),
            _ => {}
        }
        Err(error)
    })
}

#[test]
fn every_process_gets_what_a_plain_load_has() {
    for ranks in 1..=4 {
        let folder = tempfile::tempdir().unwrap();
        let mut runner = TestRunner::default();
        let mut all = Vec::new();
        for case in 0..6 {
            let files = cases::any_files().new_tree(&mut runner).unwrap().current();
            let folder = folder.path().join(format!("case-{case}"));
            std::fs::create_dir(&folder).unwrap();
            write(&files, &folder);
            all.push(files);
        }
        for scenario in ["check", "messages"] {
            for outcome in mpirun(ranks, scenario, ranks, folder.path()) {
                let done = outcome.as_ref().is_some_and(|outcome| outcome.text.is_empty());
                assert!(done, "{scenario}, {ranks} ranks, {outcome:?}\n{all:?}\n{}", read_log(folder.path()));
            }
        }
    }
}

/// 1.1 GiB, which MPI could not count in one message of its own were it twice as much.
#[test]
fn more_bytes_than_a_message_has_arrive() {
    let folder = tempfile::tempdir().unwrap();
    for outcome in mpirun(2, "large", 0, folder.path()) {
        assert!(outcome.as_ref().is_some_and(|outcome| outcome.text.is_empty()), "{}", read_log(folder.path()));
    }
}

/// Checks that every rank but the one that failed names it, in time.
fn assert_named(outcomes: &[Option<Outcome>], rank: usize, kinds: &[Kind], within: Duration, folder: &Path) {
    for (at, outcome) in outcomes.iter().enumerate().filter(|(at, _)| *at != rank) {
        let Some(outcome) = outcome else { panic!("rank {at} said nothing: {}", read_log(folder)) };
        assert_eq!(outcome.named, Some(rank), "rank {at}: {outcome:?}");
        let kind = outcome.kind.as_deref();
        assert!(kinds.iter().any(|expected| kind == Some(expected.as_str())), "rank {at}: {outcome:?}");
        assert!(outcome.seconds < within.as_secs_f64(), "rank {at}: {outcome:?}");
    }
}

#[test]
fn a_process_that_cannot_read_or_asks_for_something_else_is_named() {
    let folder = tempfile::tempdir().unwrap();
    two_files(folder.path());
    let outcomes = mpirun(3, "absent", 0, folder.path());
    assert_named(&outcomes, 1, &[Kind::Io], LONG / 4, folder.path());
    assert!(outcomes[1].as_ref().unwrap().text.contains("absent.safetensors"), "{outcomes:?}");
    let outcomes = mpirun(3, "other", 0, folder.path());
    assert_named(&outcomes, 2, &[Kind::Group], LONG / 4, folder.path());
    assert_eq!(outcomes[2].as_ref().unwrap().named, Some(2));
}

/// Exchanges of the work of these tests, in each of which a rank fails: which one, follows from the number. The loading, the
/// transfers of a tensor and the steps between them are among them. Where the number is even, ranks read each other's memory, and
/// where it is odd, they send messages.
const EXCHANGES: [usize; 7] = [1, 3, 8, 10, 14, 17, 21];

#[test]
fn a_process_that_fails_is_named() {
    let folder = tempfile::tempdir().unwrap();
    two_files(folder.path());
    for at in EXCHANGES {
        let outcomes = mpirun(3, "fails", at, folder.path());
        assert_named(&outcomes, at % 3, &[Kind::Device], SHORT, folder.path());
        assert_eq!(outcomes[at % 3].as_ref().unwrap().named, Some(at % 3));
    }
}

#[test]
fn a_process_that_leaves_is_named_at_once() {
    let folder = tempfile::tempdir().unwrap();
    two_files(folder.path());
    for at in EXCHANGES {
        let outcomes = mpirun(3, "leaves", at, folder.path());
        assert_named(&outcomes, at % 3, &[Kind::Group], SHORT / 3, folder.path());
    }
}

#[test]
fn a_process_that_falls_silent_is_named_in_time() {
    let folder = tempfile::tempdir().unwrap();
    two_files(folder.path());
    for at in [1, 9, 12, 15] {
        let outcomes = mpirun(3, "silent", at, folder.path());
        assert_named(&outcomes, at % 3, &[Kind::Timeout], SHORT + SLACK, folder.path());
    }
}

#[test]
fn a_process_that_is_killed_is_named_in_time() {
    let folder = tempfile::tempdir().unwrap();
    two_files(folder.path());
    for at in EXCHANGES {
        let outcomes = mpirun(3, "killed", at, folder.path());
        assert_eq!(outcomes[at % 3], None);
        assert_named(&outcomes, at % 3, &[Kind::Timeout, Kind::Group], SHORT + SLACK, folder.path());
    }
}
