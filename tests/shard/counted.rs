//! What the system counts: in a process of its own, because it counts for all threads together.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use uel::{Checkpoint, Dtype, GroupLoader, ShardPlan, ThreadGroup};

use super::cases::{CPU, write};
use super::{LONG, all};

const FOLDER: &str = "UEL_TEST_COUNTED";

/// What the files of `/proc` and the like add to what is read.
const NOTES: u64 = 64 << 10;

/// Three ranks, and files of some MB.
const RANKS: usize = 3;

fn files(folder: &Path) -> Vec<PathBuf> {
    let wide = || (Dtype::Bf16, vec![300, 6000]);
    write(&vec![vec![wide(), (Dtype::F32, vec![3, 200_000])], vec![wide(), wide()]], folder)
}

#[test]
fn the_system_counts_each_byte_once_and_nothing_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    files(folder.path());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "shard::counted::within", "--nocapture", "--ignored"])
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// The bytes that this process has asked the system for; what is mapped is not among them.
fn io_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().trim().parse().unwrap()
}

#[test]
#[ignore = "started by another test"]
fn within() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let paths: Vec<PathBuf> = [0, 1].map(|n| folder.join(format!("part-{n}.safetensors"))).to_vec();
    let total: u64 = paths.iter().map(|path| path.metadata().unwrap().len()).sum();
    let read = |work: &dyn Fn()| {
        let before = io_bytes();
        work();
        io_bytes() - before
    };
    // What is found out once in a process.
    drop(Checkpoint::open_files(&paths).unwrap().load_all(&CPU).unwrap());
    let plan = ShardPlan::new().with_rows("*.0.weight").unwrap().with_columns("*.1.weight").unwrap();

    let once = read(&|| {
        let work = |group| {
            let mut loader = GroupLoader::new(Arc::new(group));
            loader.add_paths(&paths);
            loader.load_files()?.load_plan(&plan)
        };
        drop(all(ThreadGroup::run(RANKS, LONG, work).unwrap()));
    });
    assert!((total..total + NOTES).contains(&once), "{once} of {total}");

    // Rows of 4000 bytes, 8000 apart: none is read along.
    let own = read(&|| {
        let checkpoint = Checkpoint::open_files(&paths).unwrap();
        for rank in 0..RANKS {
            drop(checkpoint.load_shard(&plan, rank, RANKS, None, &CPU).unwrap());
        }
    });
    assert!((total - NOTES..total + NOTES).contains(&own), "{own} of {total}");

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("part-0.safetensors") && !maps.contains("part-1.safetensors"), "{maps}");
}
