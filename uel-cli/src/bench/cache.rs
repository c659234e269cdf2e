//! The page cache before a run: made to hold the files, or to drop them.

use super::mapped::resident_bytes;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::Duration;
use uel_core::source::{Advice, FileSystem, advise, file_system};
use uel_core::{ByteRange, Error, Kind, Result};

/// The share of a file that may stay in the page cache in a cold run.
const MAX_RESIDENT: f64 = 0.01;

/// Pages that are in use for a moment, for readahead say, are dropped at another try.
const TRIES: u32 = 4;

const PIECE_BYTES: usize = 1 << 20;

/// Reads the file once, so that the page cache holds it.
pub(super) fn warm(path: &Path) -> Result<()> {
    let failed = |error| Error::io("read", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Makes the page cache drop the file, and makes sure that it did.
pub(super) fn chill(path: &Path) -> Result<()> {
    let failed = |error| Error::io("open", path, error);
    let file = File::open(path).map_err(failed)?;
    let byte_len = file.metadata().map_err(failed)?.len();
    let Some(all) = ByteRange::new(0, byte_len).filter(|all| !all.is_empty()) else { return Ok(()) };
    let unknown = |error| Error::io("tell how much the page cache holds of", path, error);

    // Only what is on the disk can be dropped. Some file systems refuse this to readers; then the check below decides.
    let _ = file.sync_all();
    let mut resident = 0.0;
    for attempt in 0..TRIES {
        std::thread::sleep(Duration::from_millis(20) * attempt);
        advise(&file, all, Advice::DontNeed);
        resident = resident_bytes(&file).map_err(unknown)? as f64 / byte_len as f64;
        if resident <= MAX_RESIDENT {
            return Ok(());
        }
    }
    let remedy = match file_system(&file) {
        Some(FileSystem::Memory) => "its file system is in memory: copy it to a disk",
        _ => "end the programs that have it open, or copy it to a local disk and run as its owner",
    };
    Err(Error::new(Kind::Io, format!("the page cache does not drop the file, so no run would be cold; {remedy}"))
        .with_path(path)
        .with_expected("at most 1% of it cached")
        .with_got(format!("{:.0}%", (resident * 100.0).min(100.0))))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn warm_and_cold() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let byte_len = 3 * 4096 + 1;
        std::fs::write(file.path(), vec![1; byte_len]).unwrap();
        warm(file.path()).unwrap();
        assert!(resident_bytes(file.as_file()).unwrap() >= byte_len as u64);
        match file_system(file.as_file()) {
            Some(FileSystem::Memory) => {
                let error = chill(file.path()).unwrap_err().to_string();
                assert!(error.contains("100%") && error.contains("in memory"), "{error}");
            }
            _ => {
                chill(file.path()).unwrap();
                assert_eq!(resident_bytes(file.as_file()).unwrap(), 0);
            }
        }
    }

    #[test]
    fn what_stays_is_an_error_with_a_remedy() {
        // Where there is no such folder, or it is something else, there is nothing to see.
        let Ok(file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
        if file_system(file.as_file()) != Some(FileSystem::Memory) {
            return;
        }
        std::fs::write(file.path(), vec![1; 8192]).unwrap();
        let error = chill(file.path()).unwrap_err().to_string();
        assert!(error.contains("expected at most 1%") && error.contains("copy it to a disk"), "{error}");
    }
}
