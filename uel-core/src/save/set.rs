//! Sets of files that are put in place together, and what an interrupted one needs to be completed.
//!
//! One rename is atomic, several are not. So the renames that are to come are written down first, in a file that stays until
//! all are done, and while it is there UEL refuses to open the folder.

use crate::atomic::{AtomicFile, Durability, Hold, Symlinks};
use crate::disk::{Disk, Entry};
use crate::safetensors::patch::undo_patch_on;
use crate::{Error, Kind, Result, limits};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A finished file of a set.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) file: AtomicFile,
    pub(crate) bytes: u64,
}

/// The file that says which renames are under way in its folder.
pub(crate) const JOURNAL: &str = ".uel-replacing.json";

/// How the names of finished files begin that wait for their renames.
const WAITING_START: &str = ".uel-new.";

/// The file that is held by whoever puts a set in place, or recovers one.
const LOCK: &str = ".uel-replacing.lock";

/// The renames, as file names in the journal's folder, in their order.
#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    /// Removed before the first rename, so that nobody takes a mixture for a set.
    remove_first: String,
    /// From, to.
    renames: Vec<(String, String)>,
}

/// Puts the files of a set in their places, the last of them last. All stand in `folder`.
pub(crate) fn commit_set(
    disk: &Arc<dyn Disk>,
    folder: &Path,
    mut files: Vec<AtomicFile>,
    durability: Durability,
) -> Result<()> {
    for file in &files {
        file.sync()?;
    }
    // Two sets that are put in place at once would be mixed.
    let _hold = Hold::take(&**disk, folder.join(LOCK))?;
    // What the journal of an interrupted set names must not be replaced by what waits of this one.
    recover_held(&**disk, folder)?;
    disk.remove_abandoned(folder, WAITING_START, "");
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut renames = Vec::new();
    for file in &files {
        undo_patch_on(&**disk, file.path())?;
        let name = file.path().file_name().and_then(|name| name.to_str());
        let name = name.filter(|name| folder.join(name) == file.path()).ok_or_else(|| {
            Error::new(Kind::Argument, "the files of a set must stand in its folder").with_path(file.path())
        })?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // No save uses such a name again: a journal that a loss of power brings back finds nothing to rename.
        let time = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        renames.push((format!("{WAITING_START}{}-{time}-{number}", std::process::id()), name.to_owned()));
    }
    let waiting: Vec<PathBuf> = renames.iter().map(|(from, _)| folder.join(from)).collect();
    let remove_first = renames.last().map_or_else(String::new, |(_, index)| index.clone());
    let journal = Journal { remove_first, renames };
    let written = write_journal(disk, folder, &journal, &mut files, &waiting, durability);
    if let Err(error) = written {
        // With a journal there they belong to the next one who recovers.
        if !matches!(disk.entry(&folder.join(JOURNAL)), Ok(Some(_))) {
            for path in waiting {
                let _ = disk.remove(&path);
            }
        }
        return Err(error);
    }
    complete(&**disk, folder, journal, durability)
}

/// Gives the files the names under which they wait, and writes down what is to be done.
fn write_journal(
    disk: &Arc<dyn Disk>,
    folder: &Path,
    journal: &Journal,
    files: &mut [AtomicFile],
    waiting: &[PathBuf],
    durability: Durability,
) -> Result<()> {
    for (file, path) in files.iter_mut().zip(waiting) {
        file.rename_to_wait(path)?;
    }
    // What the journal names must be there whenever the journal is.
    sync(disk, folder, durability)?;
    let text = serde_json::to_vec(journal)
        .map_err(|error| Error::new(Kind::Internal, "a journal must be encodable as JSON").with_source(error))?;
    let lasting = match durability {
        Durability::Fast => Durability::Fast,
        Durability::Atomic | Durability::Durable => Durability::Durable,
    };
    let file = AtomicFile::create(folder.join(JOURNAL), Arc::clone(disk), lasting, Symlinks::Refuse)?;
    file.write_all_at(0, &text)?;
    file.commit()
}

fn sync(disk: &dyn Disk, folder: &Path, durability: Durability) -> Result<()> {
    if durability == Durability::Fast {
        return Ok(());
    }
    disk.sync_folder(folder).map_err(|error| Error::io("sync the folder", folder, error))
}

/// Does what a journal says, and removes it. It can be done again from the beginning at any time.
fn complete(disk: &dyn Disk, folder: &Path, journal: Journal, durability: Durability) -> Result<()> {
    let path = folder.join(JOURNAL);
    let here = |name: &str| match Path::new(name).file_name() {
        Some(own) if own == name => Ok(folder.join(name)),
        _ => Err(Error::new(Kind::Json, "renames must stay in the folder").with_path(&path).with_got(name)),
    };
    let mut renames = Vec::new();
    for (from, to) in &journal.renames {
        renames.push((here(from)?, here(to)?));
    }
    let old = here(&journal.remove_first)?;
    let there = |path: &Path| match disk.entry(path) {
        Ok(entry) => Ok(entry.is_some()),
        Err(error) => Err(Error::io("look at", path, error)),
    };
    let rename = |(from, to): &(PathBuf, PathBuf)| match there(from)? {
        true => disk.rename(from, to).map_err(|error| Error::io("rename the finished file to it", to, error)),
        false => Ok(()),
    };
    let Some((last, first)) = renames.split_last() else {
        return remove_journal(disk, folder, &path, durability);
    };
    // The old index goes while the new one waits: afterwards what stands there is the new one.
    if there(&last.0)? && there(&old)? {
        disk.remove(&old).map_err(|error| Error::io("remove the old index", &old, error))?;
        sync(disk, folder, durability)?;
    }
    first.iter().try_for_each(rename)?;
    sync(disk, folder, durability)?;
    rename(last)?;
    sync(disk, folder, durability)?;
    remove_journal(disk, folder, &path, durability)
}

fn remove_journal(disk: &dyn Disk, folder: &Path, path: &Path, durability: Durability) -> Result<()> {
    match disk.remove(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("remove", path, error)),
        _ => {}
    }
    sync(disk, folder, durability)
}

/// Completes a set that was being put in place in `folder` when its process ended. Returns whether there was one.
///
/// # Errors
///
/// [`Kind::Interrupted`] where a process is at it just now; [`Kind::Io`]; [`Kind::Json`] where what says which renames are to
/// come is damaged, which then can only be removed by hand.
pub fn recover_set(disk: &dyn Disk, folder: &Path) -> Result<bool> {
    if !interrupted(disk, folder)? {
        return Ok(false);
    }
    let _hold = Hold::take(disk, folder.join(LOCK))?;
    let recovered = recover_held(disk, folder)?;
    disk.remove_abandoned(folder, WAITING_START, "");
    Ok(recovered)
}

fn interrupted(disk: &dyn Disk, folder: &Path) -> Result<bool> {
    let path = folder.join(JOURNAL);
    match disk.entry(&path) {
        Ok(entry) => Ok(entry == Some(Entry::File)),
        Err(error) => Err(Error::io("look at", &path, error)),
    }
}

/// Does so for a caller who holds the lock.
fn recover_held(disk: &dyn Disk, folder: &Path) -> Result<bool> {
    if !interrupted(disk, folder)? {
        return Ok(false);
    }
    let path = folder.join(JOURNAL);
    let text = disk.read(&path, limits::MAX_JOURNAL_BYTES).map_err(|error| Error::io("read", &path, error))?;
    let journal = serde_json::from_slice(&text).map_err(|error| {
        Error::new(Kind::Json, "the file that says which renames are under way is damaged")
            .with_path(&path)
            .with_source(error)
    })?;
    complete(disk, folder, journal, Durability::Durable)?;
    Ok(true)
}

/// An error where a set is being replaced in the folder of `index_file`, or was when a process ended.
pub(crate) fn check_not_replacing(folder: &Path) -> Result<()> {
    let path: PathBuf = folder.join(JOURNAL);
    match std::fs::symlink_metadata(&path) {
        Err(_) => Ok(()),
        Ok(_) => Err(Error::new(
            Kind::Interrupted,
            "the files of this folder are being replaced, or were when the process that saved them ended; `uel recover` \
             completes that",
        )
        .with_path(path)),
    }
}
