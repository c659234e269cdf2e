//! Checkpoints in several files, with an index file.

use super::{SaveOptions, SaveReport, StreamingWriter, TensorMeta, Written};
use crate::safetensors::set::{Member, commit_set};
use crate::{Dtype, Error, Kind, Result, limits};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

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

/// Distributes tensors over files of at most `max_shard_bytes` bytes of tensors each, in the order given: a file ends
/// before the tensor that would make it too large. A tensor that is larger has a file of its own, which comes before the one
/// that was being filled.
///
/// The rule and the names are those of huggingface_hub's `split_torch_state_dict_into_shards`.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::safetensors::write::{TensorMeta, plan_shards};
/// let metas = ["a", "b", "c"].map(|name| TensorMeta::new(name, Dtype::U8, [10]));
/// let plan = plan_shards(metas, 20, "model")?;
/// assert_eq!(plan.names, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
/// assert_eq!(plan.shards[0].len(), 2);
/// # Ok::<(), uel_core::Error>(())
/// ```
///
/// # Errors
///
/// Where a tensor's size cannot be counted, and [`Kind::Limit`] for too many files.
pub fn plan_shards(metas: impl IntoIterator<Item = TensorMeta>, max_shard_bytes: u64, stem: &str) -> Result<ShardPlan> {
    plan_shards_named(metas, max_shard_bytes, stem, "safetensors")
}

/// As [`plan_shards`], for files of any extension.
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

/// Writes a set of shards and its index file. Nothing of it stands in the folder until [`finish`](Self::finish), which
/// puts the index file there last.
///
/// Where the process ends while the files are put in place, [`recover_set`](crate::safetensors::recover_set), or the next
/// save of a set in that folder, completes it, and until then UEL refuses to open the folder. So a set that was there before
/// under the same names is replaced as a whole. Files of older sets under other names stay.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::safetensors::write::{SaveOptions, ShardedWriter, TensorMeta, plan_shards};
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// let metas = ["a", "b"].map(|name| TensorMeta::new(name, Dtype::U8, [10]));
/// let writer = ShardedWriter::create(folder, &plan_shards(metas, 10, "model")?, &SaveOptions::new())?;
/// writer.write("b", Dtype::U8, &[10], &[2; 10])?;
/// writer.write("a", Dtype::U8, &[10], &[1; 10])?;
/// writer.finish()?;
/// assert!(folder.join("model.safetensors.index.json").exists());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct ShardedWriter {
    folder: PathBuf,
    names: Vec<String>,
    shards: Vec<StreamingWriter>,
    owners: HashMap<String, usize>,
    options: SaveOptions,
}

impl ShardedWriter {
    /// Begins the files of `plan` in `folder`, which must exist.
    ///
    /// # Errors
    ///
    /// As [`StreamingWriter::create`]; [`Kind::DuplicateName`] where two files would hold a tensor;
    /// [`Kind::Argument`] with options that leave files under temporary names.
    pub fn create(folder: impl AsRef<Path>, plan: &ShardPlan, options: &SaveOptions) -> Result<Self> {
        let folder = folder.as_ref();
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if !options.rename {
            return Err(
                Error::new(Kind::Argument, "a set of shards cannot be left under temporary names").with_path(folder)
            );
        }
        check_shard_names(plan).map_err(|error| error.with_path(folder))?;
        let mut owners = HashMap::new();
        for (shard, metas) in plan.shards.iter().enumerate() {
            for meta in metas {
                if owners.insert(meta.name.clone(), shard).is_some() {
                    return Err(Error::new(Kind::DuplicateName, "two shards would hold a tensor of this name")
                        .with_path(folder)
                        .with_tensor(&meta.name));
                }
            }
        }
        let create = |(name, metas): (&String, &Vec<TensorMeta>)| {
            StreamingWriter::create(folder.join(name), metas.iter().cloned(), options)
        };
        let shards: Vec<StreamingWriter> = plan.names.iter().zip(&plan.shards).map(create).collect::<Result<_>>()?;
        // A link that is followed may lead elsewhere, and then the files cannot be put in place together.
        if let Some(away) = shards.iter().find(|shard| shard.path().parent() != Some(folder) && shards.len() > 1) {
            return Err(
                Error::new(Kind::Argument, "the files of a set must stand in its folder").with_path(away.path())
            );
        }
        Ok(Self { folder: folder.to_path_buf(), names: plan.names.clone(), shards, owners, options: options.clone() })
    }

    /// The writer of the shard that holds the tensor called `name`.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedTensors`] where none of that name was announced.
    pub fn shard_of(&self, name: &str) -> Result<&StreamingWriter> {
        self.owners.get(name).and_then(|&shard| self.shards.get(shard)).ok_or_else(|| {
            Error::new(Kind::UnexpectedTensors, "no tensor of this name was announced")
                .with_path(&self.folder)
                .with_tensor(name)
        })
    }

    /// The writers of all shards.
    pub fn shards(&self) -> &[StreamingWriter] {
        &self.shards
    }

    /// Writes the tensor called `name`: see [`StreamingWriter::write`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn write(&self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<()> {
        self.shard_of(name)?.write(name, dtype, shape, bytes)
    }

    /// Completes all files and puts them in their places, the index file last.
    ///
    /// # Errors
    ///
    /// As [`StreamingWriter::finish`]. Until every shard is complete and synced nothing is put in place.
    pub fn finish(self) -> Result<SaveReport> {
        let mut report = SaveReport::default();
        for shard in &self.shards {
            let own = shard.report();
            report.tensor_count += own.tensor_count;
            report.tensor_bytes += own.tensor_bytes;
            report.misaligned += own.misaligned;
        }
        let index = self.index_file(report.tensor_bytes)?;
        let mut members = Vec::new();
        for shard in self.shards {
            let (file, _, bytes) = shard.complete()?;
            members.push(Member { file, bytes });
        }
        if let Some((path, text)) = index {
            let file = self.options.create(&path)?;
            file.write_all_at(0, text.as_bytes())?;
            members.push(Member { file, bytes: text.len() as u64 });
        }
        report.files = members
            .iter()
            .map(|member| Written { path: member.file.path().to_path_buf(), bytes: member.bytes })
            .collect();
        match members.len() {
            1 => {
                for member in members {
                    self.options.finish(member.file, member.bytes)?;
                }
            }
            _ => {
                let files = members.into_iter().map(|member| member.file).collect();
                commit_set(&self.options.disk, &self.folder, files, self.options.durability)?;
            }
        }
        Ok(report)
    }

    /// The path and text of the index file, as transformers writes it; `None` for one file alone.
    fn index_file(&self, total_bytes: u64) -> Result<Option<(PathBuf, String)>> {
        if self.names.len() < 2 {
            return Ok(None);
        }
        let stem = self.names.first().and_then(|name| name.rsplit_once("-00001-of-")).map_or("model", |(stem, _)| stem);
        let mut weight_map = BTreeMap::new();
        for (name, shard) in &self.owners {
            weight_map.insert(name.as_str(), self.names.get(*shard).map_or("", String::as_str));
        }
        let text = index_text(total_bytes, &weight_map)?;
        Ok(Some((self.folder.join(format!("{stem}.safetensors.index.json")), text)))
    }
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
