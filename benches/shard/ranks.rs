//! Ranks that are processes: they stay, do what they are told, and say how long it took.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const RANK: &str = "UEL_SHARD_RANK";

/// Whether this process is one of the ranks.
pub(crate) fn is_rank() -> bool {
    std::env::var_os(RANK).is_some()
}

/// The processes of a group. Rank 0 is told what to do, and answers.
#[derive(Debug)]
pub(crate) struct Ranks {
    children: Vec<Child>,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Ranks {
    /// This program under `mpirun`.
    pub(crate) fn mpi(ranks: usize) -> Self {
        let mut command = Command::new("mpirun");
        command
            .args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &ranks.to_string()])
            .arg(std::env::current_exe().unwrap())
            .env(RANK, "1");
        Self::of(vec![], command)
    }

    /// fastsafetensors with torch.distributed, by the interpreter that `UEL_PEERS` names.
    pub(crate) fn python(ranks: usize) -> Option<Self> {
        let python = std::env::var_os("UEL_PEERS")?;
        let store = std::env::temp_dir().join(format!("uel-ranks-{}", std::process::id()));
        // Ranks that find what earlier ones left there would wait for those.
        let _ = std::fs::remove_file(&store);
        let rank = |rank: usize| {
            let mut command = Command::new(&python);
            command
                .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/shard.py"))
                .args([rank.to_string(), ranks.to_string()])
                .arg(&store)
                .stdin(Stdio::null());
            command
        };
        let others = (1..ranks).map(|n| rank(n).stdout(Stdio::null()).spawn().expect("python")).collect();
        Some(Self::of(others, rank(0)))
    }

    fn of(mut children: Vec<Child>, mut first: Command) -> Self {
        let mut child = first.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("ranks");
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        children.push(child);
        let mut ranks = Self { children, to, from };
        println!("ranks: {}", ranks.answer("ready "));
        ranks
    }

    fn answer(&mut self, prefix: &str) -> String {
        loop {
            let mut line = String::new();
            self.from.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the ranks ended");
            if let Some(answer) = line.strip_prefix(prefix) {
                return answer.trim().to_owned();
            }
        }
    }

    /// How long it took, from when all ranks were there until all had done it, and what they read together.
    pub(crate) fn run(&mut self, what: &str, paths: &[PathBuf]) -> (Duration, u64) {
        let paths: Vec<_> = paths.iter().map(|path| path.to_str().unwrap()).collect();
        writeln!(self.to, "{what} {}", paths.join(" ")).unwrap();
        self.to.flush().unwrap();
        let answer = self.answer("seconds ");
        let (seconds, bytes) = answer.split_once(' ').unwrap();
        (Duration::from_secs_f64(seconds.parse().unwrap()), bytes.parse().unwrap())
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(not(feature = "mpi"))]
pub(crate) fn serve() {}

/// The life of a rank under `mpirun`.
#[cfg(feature = "mpi")]
pub(crate) fn serve() {
    use crate::work::{TIMEOUT, io_bytes, is_mapped, own_of, plan, scatter_of};
    use std::sync::Arc;
    use std::time::Instant;
    use uel::{MpiGroup, ProcessGroup};

    const LINE: usize = 4096;
    let group: Arc<dyn ProcessGroup> = Arc::new(MpiGroup::world_with_timeout(TIMEOUT).unwrap());
    let (rank, ranks) = (group.rank(), group.size());
    if rank == 0 {
        println!("ready {ranks} processes of MPI");
    }
    loop {
        let mut line = [b' '; LINE];
        if rank == 0 {
            let mut text = String::new();
            std::io::stdin().read_line(&mut text).unwrap();
            line[..text.len()].copy_from_slice(text.as_bytes());
        }
        group.broadcast(0, &mut line).unwrap();
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split_whitespace();
        let Some(what) = words.next() else { return };
        let paths: Vec<PathBuf> = words.map(PathBuf::from).collect();
        group.barrier().unwrap();
        let (before, began) = (io_bytes(), Instant::now());
        let tensors = match what {
            "own" => own_of(&paths, &plan(), rank, ranks),
            _ => scatter_of(&paths, Arc::clone(&group)),
        };
        let read = io_bytes() - before;
        group.barrier().unwrap();
        let seconds = began.elapsed().as_secs_f64();
        assert!(!is_mapped(&paths), "a file is mapped");
        drop(tensors);
        let mut all = vec![0; 8 * ranks];
        group.all_gather(&read.to_le_bytes(), &mut all).unwrap();
        let read: u64 = all.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).sum();
        if rank == 0 {
            println!("seconds {seconds} {read}");
        }
    }
}
