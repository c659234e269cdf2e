//! Checkpoints in several files, with an index file.

use super::{SaveOptions, SaveReport, ShardPlan, StreamingWriter, TensorMeta, Written};
use crate::save::set::{Member, commit_set};
use crate::save::shards::{check_shard_names, index_text, needs_index, plan_shards_named, remove_abandoned};
use crate::{Dtype, Error, Kind, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

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

/// Writes a set of shards and its index file. Nothing of it stands in the folder until [`finish`](Self::finish), which
/// puts the index file there last.
///
/// Where the process ends while the files are put in place, [`recover_set`](crate::safetensors::recover_set), or the next
/// save of a set in that folder, completes it, and until then UEL refuses to open the folder. So a set that was there before
/// under the same names is replaced as a whole. Files of older sets under other names stay.
///
/// One file alone has no index file, unless an older set's stands there: then it is replaced by one that names the file.
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
        remove_abandoned(&*options.disk, folder, &plan.names);
        let create = |(name, metas): (&String, &Vec<TensorMeta>)| {
            StreamingWriter::create(folder.join(name), metas.iter().cloned(), options)
        };
        let shards: Vec<StreamingWriter> = plan.names.iter().zip(&plan.shards).map(create).collect::<Result<_>>()?;
        // A link that is followed may lead elsewhere, and then the files cannot be put in place together.
        let together = needs_index(&*options.disk, &plan.names, &index_path(folder, &plan.names))?;
        if let Some(away) = shards.iter().find(|shard| shard.path().parent() != Some(folder) && together) {
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

    /// The path and text of the index file, as transformers writes it; `None` where there is to be none.
    fn index_file(&self, total_bytes: u64) -> Result<Option<(PathBuf, String)>> {
        let path = index_path(&self.folder, &self.names);
        if !needs_index(&*self.options.disk, &self.names, &path)? {
            return Ok(None);
        }
        let mut weight_map = BTreeMap::new();
        for (name, shard) in &self.owners {
            weight_map.insert(name.as_str(), self.names.get(*shard).map_or("", String::as_str));
        }
        let text = index_text(total_bytes, &weight_map)?;
        Ok(Some((path, text)))
    }
}

/// Where the index file of these shards stands, if they have one.
fn index_path(folder: &Path, names: &[String]) -> PathBuf {
    let stem = names.first().and_then(|name| name.rsplit_once("-00001-of-")).map_or("model", |(stem, _)| stem);
    folder.join(match names {
        [one] => format!("{one}.index.json"),
        _ => format!("{stem}.safetensors.index.json"),
    })
}
