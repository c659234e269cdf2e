//! A process that loads is killed, again and again, and another one goes on with what it last wrote down.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;

use candle_core::DType;
use uel_data::{Batch, Field, Fingerprint, LoaderState};

use super::{KINDS, builder, end_in_time, run_again, write_files};

const FOLDER: &str = "UEL_TEST_KILLED_FOLDER";
const KIND: &str = "UEL_TEST_KILLED_KIND";
const STATE: &str = "UEL_TEST_KILLED_STATE";
const WORKERS: &str = "UEL_TEST_KILLED_WORKERS";

const LIMIT: &str = "UEL_TEST_KILLED_LIMIT";

/// How many batches a process takes beyond those after which it is killed: the kill comes somewhere among them.
const MORE: usize = 10;

/// What begins a line of a process that is to be killed.
const MARK: &str = "batch: ";

const EPOCHS: u64 = 2;

fn hash(print: Fingerprint, field: &Field) -> Fingerprint {
    match field {
        Field::Tensor(tensor) => {
            let numbers = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            numbers.iter().fold(print.with(numbers.len() as u64), |print, number| print.with(number.to_bits()))
        }
        Field::Strings(texts) => texts.iter().fold(print, |print, text| print.with_bytes(text.as_bytes())),
        Field::Map(entries) => entries.iter().fold(print, |print, (_, field)| hash(print, field)),
        Field::Tuple(fields) | Field::List(fields) => fields.iter().fold(print, hash),
        other => panic!("{other:?}"),
    }
}

/// All that is in a batch, in short.
fn digest(batch: &Batch) -> String {
    let print = batch.indices.iter().fold(Fingerprint::new("batch"), |print, &index| print.with(index));
    format!("{}.{}:{:016x}", batch.epoch, batch.number, hash(print, &batch.data).finish())
}

/// Loads from `state` on, or from the beginning, to the end of the last epoch.
fn load(kind: &str, folder: &Path, workers: usize, state: Option<&str>, mut take: impl FnMut(&str, String)) {
    let loader = builder(kind, folder).num_workers(workers).build().unwrap();
    let mut epoch = match state {
        Some(json) => loader.resume(&LoaderState::from_json(json).unwrap()).unwrap(),
        None => loader.epoch(0).unwrap(),
    };
    loop {
        let number = epoch.state().epoch;
        while let Some(batch) = epoch.next() {
            let digest = digest(&batch.unwrap());
            take(&digest, epoch.state().to_json());
        }
        if number + 1 >= EPOCHS {
            return;
        }
        epoch = loader.epoch(number + 1).unwrap();
    }
}

/// The process that is killed: it says which batches it took, and where it stands behind each.
fn child(folder: &Path) {
    end_in_time();
    let variable = |name: &str| std::env::var(name).unwrap();
    let state = Some(variable(STATE)).filter(|state| !state.is_empty());
    let (mut taken, limit) = (0, variable(LIMIT).parse::<usize>().unwrap());
    load(&variable(KIND), folder, variable(WORKERS).parse().unwrap(), state.as_deref(), |digest, state| {
        // One write, so that a line is whole or not there.
        let mut out = std::io::stdout().lock();
        out.write_all(format!("\n{MARK}{digest} {state}\n").as_bytes()).unwrap();
        out.flush().unwrap();
        taken += 1;
        if taken >= limit {
            loop {
                std::thread::sleep(super::PATIENCE);
            }
        }
    });
}

#[test]
fn a_killed_process_is_gone_on_with_by_others() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return child(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    write_files(folder.path());
    for kind in KINDS {
        let mut expected = Vec::new();
        load(kind, folder.path(), 2, None, |digest, _| expected.push(digest.to_owned()));
        assert!(expected.len() > 120, "{}", expected.len());

        let (mut taken, mut state, mut kills) = (Vec::new(), String::new(), 0);
        // Each round lets more batches pass: before the first one, within both epochs, and to the end.
        let rounds = [(2, 0), (1, 5), (3, 17), (0, 29), (4, 31), (2, usize::MAX)];
        for (round, (workers, patience)) in rounds.into_iter().enumerate() {
            let mut process = run_again(
                "killed::a_killed_process_is_gone_on_with_by_others",
                &[
                    (FOLDER, folder.path().to_str().unwrap()),
                    (KIND, kind),
                    (STATE, &state),
                    (WORKERS, &workers.to_string()),
                    (LIMIT, &patience.saturating_add(MORE).to_string()),
                ],
            );
            let mut lines = BufReader::new(process.stdout.take().unwrap());
            let (mut line, mut seen, mut killed) = (String::new(), 0, false);
            loop {
                if seen >= patience && !killed {
                    process.kill().unwrap();
                    killed = true;
                }
                line.clear();
                // What was written before the end counts, whoever reads it.
                if lines.read_line(&mut line).unwrap() == 0 {
                    break;
                }
                let Some(batch) = line.strip_prefix(MARK).and_then(|batch| batch.strip_suffix('\n')) else { continue };
                let (digest, after) = batch.split_once(' ').unwrap();
                taken.push(digest.to_owned());
                state = after.to_owned();
                seen += 1;
            }
            let status = process.wait().unwrap();
            kills += usize::from(killed && !status.success());
            assert!(killed || status.success(), "{kind}, round {round}: {status}");
        }
        assert_eq!(taken, expected, "{kind}");
        assert_eq!(kills, 5, "{kind}: each but the last is killed at its work");
    }
}
