//! Checkpoints in several files, with an index file.

use super::{PthWriter, StateDict};
use crate::save::set::{Member, commit_set};
use crate::save::shards::{check_shard_names, index_text, needs_index, plan_shards_named, remove_abandoned};
use crate::save::{SaveOptions, SaveReport, ShardPlan, TensorMeta, Written};
use crate::{Dtype, Error, Kind, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Distributes tensors over files as [`safetensors::write::plan_shards`](crate::safetensors::write::plan_shards) does, under
/// names with another `extension`: for transformers `stem` is `pytorch_model` and `extension` `bin`, which gives
/// `pytorch_model-00001-of-00002.bin`.
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::pytorch::write::plan_shards;
/// use uel_core::save::TensorMeta;
/// let metas = ["a", "b"].map(|name| TensorMeta::new(name, Dtype::U8, [10]));
/// let plan = plan_shards(metas, 10, "pytorch_model", "bin")?;
/// assert_eq!(plan.names, ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]);
/// # Ok::<(), uel_core::Error>(())
/// ```
///
/// # Errors
///
/// As there.
pub fn plan_shards(
    metas: impl IntoIterator<Item = TensorMeta>,
    max_shard_bytes: u64,
    stem: &str,
    extension: &str,
) -> Result<ShardPlan> {
    plan_shards_named(metas, max_shard_bytes, stem, extension)
}

/// Writes a set of PyTorch files and its index file. Nothing of it stands in the folder until [`finish`](Self::finish),
/// which puts the index file there last, and an interrupted one is completed as a set of safetensors files is:
/// see [`ShardedWriter`](crate::safetensors::write::ShardedWriter).
///
/// ```
/// use uel_core::Dtype;
/// use uel_core::pytorch::write::{PthShardedWriter, plan_shards};
/// use uel_core::save::{SaveOptions, TensorMeta};
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// let metas = ["a", "b"].map(|name| TensorMeta::new(name, Dtype::U8, [10]));
/// let plan = plan_shards(metas, 10, "pytorch_model", "bin")?;
/// let writer = PthShardedWriter::create(folder, &plan, &[], &SaveOptions::new())?;
/// writer.write("b", Dtype::U8, &[10], &[2; 10])?;
/// writer.write("a", Dtype::U8, &[10], &[1; 10])?;
/// writer.finish()?;
/// assert!(folder.join("pytorch_model.bin.index.json").exists());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Debug)]
pub struct PthShardedWriter {
    folder: PathBuf,
    names: Vec<String>,
    shards: Vec<PthWriter>,
    owners: HashMap<String, usize>,
    /// Other names of tied tensors, and the shards that they stand in.
    tied: Vec<(String, usize)>,
    options: SaveOptions,
}

impl PthShardedWriter {
    /// Begins the files of `plan` in `folder`, which must exist. `tied` are other names of tensors: other name, name; they
    /// stand in the same file.
    ///
    /// # Errors
    ///
    /// As [`PthWriter::create`]; [`Kind::DuplicateName`] where two files would hold a tensor; [`Kind::UnknownTensor`] where a
    /// tied name is that of no tensor; [`Kind::Argument`] with options that leave files under temporary names.
    pub fn create(
        folder: impl AsRef<Path>,
        plan: &ShardPlan,
        tied: &[(String, String)],
        options: &SaveOptions,
    ) -> Result<Self> {
        let folder = folder.as_ref();
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if !options.is_renamed() {
            return Err(
                Error::new(Kind::Argument, "a set of shards cannot be left under temporary names").with_path(folder)
            );
        }
        check_shard_names(plan).map_err(|error| error.with_path(folder))?;
        let twice = |name: &str| {
            let message = "two tensors of the set would have this name";
            Error::new(Kind::DuplicateName, message).with_path(folder).with_tensor(name)
        };
        let mut owners = HashMap::new();
        for (shard, metas) in plan.shards.iter().enumerate() {
            for meta in metas {
                if owners.insert(meta.name.clone(), shard).is_some() {
                    return Err(twice(&meta.name));
                }
            }
        }
        let mut dicts: Vec<StateDict> = plan.shards.iter().map(|metas| StateDict::new(metas.iter().cloned())).collect();
        let mut others = BTreeMap::new();
        for (other, name) in tied {
            let owner = owners.get(name).and_then(|&shard| Some((shard, dicts.get_mut(shard)?)));
            let (shard, dict) = owner.ok_or_else(|| {
                Error::new(Kind::UnknownTensor, "a tied name is that of no tensor")
                    .with_path(folder)
                    .with_tensor(other)
                    .with_got(name)
            })?;
            if owners.contains_key(other) || others.insert(other.clone(), shard).is_some() {
                return Err(twice(other));
            }
            *dict = std::mem::take(dict).with_tied(other.clone(), name.clone());
        }
        remove_abandoned(&**options.disk(), folder, &plan.names);
        let create = |(name, dict): (&String, StateDict)| PthWriter::create(folder.join(name), dict, options);
        let shards: Vec<PthWriter> = plan.names.iter().zip(dicts).map(create).collect::<Result<_>>()?;
        // A link that is followed may lead elsewhere, and then the files cannot be put in place together.
        let together = needs_index(&**options.disk(), &plan.names, &index_path(folder, &plan.names))?;
        if let Some(away) = shards.iter().find(|shard| shard.path().parent() != Some(folder) && together) {
            return Err(
                Error::new(Kind::Argument, "the files of a set must stand in its folder").with_path(away.path())
            );
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            names: plan.names.clone(),
            shards,
            owners,
            tied: others.into_iter().collect(),
            options: options.clone(),
        })
    }

    /// The writer of the shard that holds the tensor called `name`.
    ///
    /// # Errors
    ///
    /// [`Kind::UnexpectedTensors`] where none of that name was announced.
    pub fn shard_of(&self, name: &str) -> Result<&PthWriter> {
        self.owners.get(name).and_then(|&shard| self.shards.get(shard)).ok_or_else(|| {
            Error::new(Kind::UnexpectedTensors, "no tensor of this name was announced")
                .with_path(&self.folder)
                .with_tensor(name)
        })
    }

    /// The writers of all shards.
    pub fn shards(&self) -> &[PthWriter] {
        &self.shards
    }

    /// Writes the tensor called `name`: see [`PthWriter::write`].
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
    /// As [`PthWriter::finish`]. Until every shard is complete and synced nothing is put in place.
    pub fn finish(self) -> Result<SaveReport> {
        let mut report = SaveReport::default();
        for shard in &self.shards {
            let own = shard.report();
            report.tensor_count += own.tensor_count;
            report.tensor_bytes += own.tensor_bytes;
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
        if members.len() == 1 {
            for member in members {
                self.options.finish(member.file, member.bytes)?;
            }
        } else {
            let files = members.into_iter().map(|member| member.file).collect();
            commit_set(self.options.disk(), &self.folder, files, self.options.durability())?;
        }
        Ok(report)
    }

    /// The path and text of the index file; `None` where there is to be none.
    fn index_file(&self, total_bytes: u64) -> Result<Option<(PathBuf, String)>> {
        let path = index_path(&self.folder, &self.names);
        if !needs_index(&**self.options.disk(), &self.names, &path)? {
            return Ok(None);
        }
        let mut weight_map = BTreeMap::new();
        let tied = self.tied.iter().map(|(name, shard)| (name, shard));
        for (name, shard) in self.owners.iter().chain(tied) {
            weight_map.insert(name.as_str(), self.names.get(*shard).map_or("", String::as_str));
        }
        let text = index_text(total_bytes, &weight_map)?;
        Ok(Some((path, text)))
    }
}

/// Where the index file of these shards stands, if they have one.
fn index_path(folder: &Path, names: &[String]) -> PathBuf {
    let first = names.first().map_or("", String::as_str);
    let stem = first.rsplit_once("-00001-of-").map_or("pytorch_model", |(stem, _)| stem);
    let extension = first.rsplit_once('.').map_or("bin", |(_, extension)| extension);
    folder.join(match names {
        [one] => format!("{one}.index.json"),
        _ => format!("{stem}.{extension}.index.json"),
    })
}
