//! Epochs that are left early leave no file open.

use super::{KINDS, builder, end_in_time, run_again, write_files};

const INNER: &str = "UEL_TEST_HANDLES";

const EXITS: u64 = 1000;

/// What is open in this process: all of it, and how much of that stands below `folder`.
fn open(folder: &std::path::Path) -> (usize, usize) {
    let targets: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .collect();
    (targets.len(), targets.iter().filter(|target| target.starts_with(folder)).count())
}

/// Whether it is so, or comes to be soon: threads that were joined are seen for a moment.
fn soon(mut is_so: impl FnMut() -> bool) -> bool {
    (0..200).any(|_| {
        let now = is_so();
        if !now {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        now
    })
}

fn inner() {
    end_in_time();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().canonicalize().unwrap();
    write_files(&path);
    let before = open(&path);
    assert_eq!(before.1, 0);
    for kind in KINDS {
        for persistent in [true, false] {
            let loader = builder(kind, &path).num_workers(3).persistent_workers(persistent).build().unwrap();
            loader.epoch(0).unwrap().next().unwrap().unwrap();
            let opened = open(&path);
            // The files are open, or the test says nothing.
            assert_eq!(opened.1, 4, "{kind}");
            for round in 0..EXITS / 4 {
                let mut epoch = loader.epoch(round).unwrap();
                assert_eq!(epoch.by_ref().take((round % 4) as usize).filter(Result::is_ok).count() as u64, round % 4);
            }
            assert!(soon(|| open(&path) == opened), "{kind}: {opened:?}, then {:?}", open(&path));
            drop(loader);
            assert!(soon(|| open(&path) == before), "{kind}: {before:?}, then {:?}", open(&path));
        }
    }
    println!("no file is open");
}

#[test]
fn a_thousand_early_exits_leave_no_file_open() {
    if std::env::var_os(INNER).is_some() {
        return inner();
    }
    // Alone in its process: other tests open files too.
    let process = run_again("handles::a_thousand_early_exits_leave_no_file_open", &[(INNER, "1")]);
    let output = process.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("no file is open"), "{text}");
}
