//! Which tensors go into which file of a set, and the index file that says so.

use super::TensorMeta;
use crate::atomic;
use crate::disk::{Disk, Entry};
use crate::{Error, Kind, Result, limits};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Which tensors go into which file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    /// The files' names, as transformers names them: `model-00001-of-00002.safetensors`, or `model.safetensors` where there
    /// is one alone.
    pub names: Vec<String>,
    /// The tensors of each file.
    pub shards: Vec<Vec<TensorMeta>>,
    /// The bytes of all tensors.
    pub total_bytes: u64,
}

/// Distributes tensors over files of at most `max_shard_bytes` bytes of tensors each, whose names end in `extension`: the
/// rule of [`safetensors::write::plan_shards`](crate::safetensors::write::plan_shards).
pub(crate) fn plan_shards_named(
    metas: impl IntoIterator<Item = TensorMeta>,
    max_shard_bytes: u64,
    stem: &str,
    extension: &str,
) -> Result<ShardPlan> {
    let mut shards: Vec<Vec<TensorMeta>> = Vec::new();
    let (mut current, mut current_bytes, mut total) = (Vec::new(), 0u64, 0u64);
    for meta in metas {
        let byte_len = meta.byte_len()?;
        total = total.checked_add(byte_len).ok_or_else(|| {
            Error::new(Kind::Overflow, "the tensors' bytes cannot be counted in 64 bits").with_tensor(&meta.name)
        })?;
        if byte_len > max_shard_bytes {
            shards.push(vec![meta]);
            continue;
        }
        if current_bytes.saturating_add(byte_len) > max_shard_bytes {
            shards.push(std::mem::take(&mut current));
            current_bytes = 0;
        }
        current_bytes += byte_len;
        current.push(meta);
    }
    // No tensors at all are one file without tensors.
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    let count = shards.len();
    if count > limits::MAX_SHARDS {
        return Err(Error::new(Kind::Limit, "too many shards")
            .with_expected(format!("at most {}", limits::MAX_SHARDS))
            .with_got(count));
    }
    let names = match count {
        1 => vec![format!("{stem}.{extension}")],
        _ => (1..=count).map(|n| format!("{stem}-{n:05}-of-{count:05}.{extension}")).collect(),
    };
    Ok(ShardPlan { names, shards, total_bytes: total })
}

/// The text of an index file, as transformers writes it.
pub(crate) fn index_text(total_bytes: u64, weight_map: &BTreeMap<&str, &str>) -> Result<String> {
    let index = serde_json::json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map });
    let text = serde_json::to_string_pretty(&index)
        .map_err(|error| Error::new(Kind::Internal, "an index must be encodable as JSON").with_source(error))?;
    Ok(ascii(&text) + "\n")
}

/// The text as Python writes it: whatever is not ASCII as escapes.
fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            ' '..='~' | '\n' => text.push(c),
            c => text.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}"))),
        }
    }
    text
}

/// Whether a set needs an index file: one file alone does where an old index stands, which would go on naming old shards.
pub(crate) fn needs_index(disk: &dyn Disk, names: &[String], index: &Path) -> Result<bool> {
    if names.len() > 1 {
        return Ok(true);
    }
    let entry = disk.entry(index).map_err(|error| Error::io("look at", index, error))?;
    Ok(matches!(entry, Some(Entry::File | Entry::Symlink(_))))
}

/// Removes what killed saves of a set of this name left in `folder`, into however many files it was to go: the next save
/// under the same names would, but few sets have the same count again.
pub(crate) fn remove_abandoned(disk: &dyn Disk, folder: &Path, names: &[String]) {
    let Some((first, extension)) = names.first().and_then(|name| name.rsplit_once('.')) else { return };
    let stem = first.rsplit_once("-00001-of-").map_or(first, |(stem, _)| stem);
    for start in [format!("{stem}-"), format!("{stem}.{extension}.")] {
        atomic::remove_abandoned(disk, folder, &start);
    }
}

/// Each shard has a name of its own, and it is that of a file in the folder.
pub(crate) fn check_shard_names(plan: &ShardPlan) -> Result<()> {
    if plan.names.len() != plan.shards.len() || plan.names.is_empty() {
        return Err(Error::new(Kind::Argument, "a plan must have a name for each shard")
            .with_expected(format!("{} names, at least one", plan.shards.len()))
            .with_got(plan.names.len()));
    }
    let mut seen = HashSet::new();
    for name in &plan.names {
        let alone = Path::new(name).file_name().is_some_and(|own| own == name.as_str());
        if !alone || !seen.insert(name) {
            return Err(Error::new(Kind::Argument, "each shard must have a file name of its own").with_got(name));
        }
    }
    Ok(())
}
