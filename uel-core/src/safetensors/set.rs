//! Sets of files that are replaced together, and what an interrupted replacement needs to be completed.
//!
//! One rename is atomic, several are not. Where the new files stand beside old ones of other names, the index file that
//! comes last decides which set is read. Where they replace old ones, the renames that are to come are written down first,
//! in a file that stays until all are done.

use crate::atomic::{AtomicFile, Durability, Symlinks};
use crate::disk::{Disk, Entry};
use crate::{Error, Kind, Result, limits};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A finished file of a set.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) file: AtomicFile,
    pub(super) bytes: u64,
}

/// The file that says which renames are under way in its folder.
pub(super) const JOURNAL: &str = ".uel-replacing.json";

/// How the names of finished files end that wait for their renames.
const WAITING_END: &str = ".uel-new";

/// The renames, as file names in the journal's folder, in their order.
#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    /// Removed before the first rename, so that nobody takes a mixture for a set.
    remove_first: String,
    /// From, to.
    renames: Vec<(String, String)>,
}

/// Puts the files of a set in their places, the last of them last. All stand in `folder`.
pub(super) fn commit_set(disk: &Arc<dyn Disk>, folder: &Path, mut files: Vec<AtomicFile>) -> Result<()> {
    for file in &files {
        file.sync()?;
    }
    let entry = |path: &Path| disk.entry(path).map_err(|error| Error::io("look at the destination", path, error));
    let replaces = files.iter().map(|file| entry(file.path())).collect::<Result<Vec<_>>>()?;
    let sync = || disk.sync_folder(folder).map_err(|error| Error::io("sync the folder", folder, error));
    if replaces.iter().all(Option::is_none) {
        let Some(mut index) = files.pop() else { return Ok(()) };
        for mut file in files {
            file.rename()?;
        }
        // The index must not be there before what it names.
        sync()?;
        index.rename()?;
        return index.sync_folder();
    }
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut renames = Vec::new();
    for file in &mut files {
        let to = name(file.path());
        let from = format!(".{to}{WAITING_END}");
        file.rename_to_wait(&folder.join(&from))?;
        renames.push((from, to));
    }
    let remove_first = renames.last().map_or_else(String::new, |(_, index)| index.clone());
    let text = serde_json::to_vec(&Journal { remove_first, renames })
        .map_err(|error| Error::new(Kind::Internal, "a journal must be encodable as JSON").with_source(error))?;
    let journal = AtomicFile::create(folder.join(JOURNAL), Arc::clone(disk), Durability::Durable, Symlinks::Refuse)?;
    journal.write_all_at(0, &text)?;
    journal.commit()?;
    complete(&**disk, folder, &text)
}

/// Does what a journal says, and removes it. It can be done again from the beginning at any time.
fn complete(disk: &dyn Disk, folder: &Path, text: &[u8]) -> Result<()> {
    let path = folder.join(JOURNAL);
    let journal: Journal = serde_json::from_slice(text).map_err(|error| {
        Error::new(Kind::Json, "the file that says which renames are under way is damaged")
            .with_path(&path)
            .with_source(error)
    })?;
    let here = |name: &str| match Path::new(name).file_name() {
        Some(own) if own == name => Ok(folder.join(name)),
        _ => Err(Error::new(Kind::Json, "renames must stay in the folder").with_path(&path).with_got(name)),
    };
    let there = |path: &Path| disk.entry(path).map_err(|error| Error::io("look at", path, error));
    let (waiting, last): (Vec<_>, _) = match journal.renames.split_last() {
        Some((last, rest)) => (rest.iter().collect(), Some(last)),
        None => (Vec::new(), None),
    };
    let rename = |(from, to): &(String, String)| -> Result<()> {
        let (from, to) = (here(from)?, here(to)?);
        if there(&from)?.is_some() {
            disk.rename(&from, &to).map_err(|error| Error::io("rename the finished file to it", &to, error))?;
        }
        Ok(())
    };
    // The old index goes while the new one waits: afterwards what stands there is the new one.
    let old = here(&journal.remove_first)?;
    let waits = match last {
        Some((from, _)) => there(&here(from)?)?.is_some(),
        None => false,
    };
    if waits && there(&old)?.is_some() {
        disk.remove(&old).map_err(|error| Error::io("remove the old index", &old, error))?;
    }
    let sync = || disk.sync_folder(folder).map_err(|error| Error::io("sync the folder", folder, error));
    sync()?;
    waiting.into_iter().try_for_each(rename)?;
    sync()?;
    last.map_or(Ok(()), rename)?;
    sync()?;
    match disk.remove(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
        _ => Ok(()),
    }
}

/// Completes a set that was being replaced in `folder` when its process ended. Returns whether there was one.
///
/// # Errors
///
/// [`Kind::Io`], and [`Kind::Json`] where the journal is damaged, which then can only be removed by hand.
pub fn recover_set(disk: &dyn Disk, folder: &Path) -> Result<bool> {
    let path = folder.join(JOURNAL);
    match disk.entry(&path) {
        Ok(Some(Entry::File)) => {}
        Ok(_) => return Ok(false),
        Err(error) => return Err(Error::io("look at", &path, error)),
    }
    let text = disk.read(&path, limits::MAX_JOURNAL_BYTES).map_err(|error| Error::io("read", &path, error))?;
    complete(disk, folder, &text)?;
    Ok(true)
}

/// An error where a set is being replaced in the folder of `index_file`, or was when a process ended.
pub(super) fn check_not_replacing(folder: &Path) -> Result<()> {
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
