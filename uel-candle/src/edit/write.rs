//! Writing what was edited: piece by piece by several threads, or tensor by tensor through a closure.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use uel_core::safetensors::write::{self, IncrementalOptions, SaveReport};
use uel_core::{Error, Kind, Result};

use super::piece::{self, Pieces};
use super::{Change, Edit, MapFn, Planned, is_float, is_quantized};
use crate::checkpoint::Tally;
use crate::dtype::{Mapping, mapping};
use crate::save::output::{Output, Target};
use crate::save::{FileFormat, IncrementalWriter, SaveOptions, in_parallel, threads};

impl Edit {
    /// Writes the new checkpoint: one file, or with [`SaveOptions::with_max_shard_bytes`] a set of shards. The inputs may
    /// be at the destination: they are replaced only when the new files are complete. A PyTorch file
    /// ([`SaveOptions::with_format`]) has the tensors in the order of their bytes in the inputs, and not their metadata.
    ///
    /// # Errors
    ///
    /// [`Kind::DuplicateName`] where two tensors have one name, [`Kind::NameCollision`] where a tied weight's is that of an
    /// entry of the metadata, [`Kind::UnsupportedDtype`] for a cast to a dtype that is no
    /// float of candle's; those of reading, writing and closures. The destination is then untouched.
    pub fn write(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<SaveReport> {
        let path = path.as_ref();
        let prepared = match options.format {
            // Readers of GGUF files know no ties.
            FileFormat::Gguf => self.clone().untie().with_blocks_again(),
            _ => self.clone().with_blocks_named(),
        };
        prepared.map_err(|error| error.with_path(path))?.write_as_it_is(path, options)
    }

    fn write_as_it_is(&self, path: &Path, options: &SaveOptions) -> Result<SaveReport> {
        // Left out without a word they would be lost where the destination is the source.
        if let Some(unreadable) = self.unreadable.first() {
            return Err(unreadable.error().with_expected("tensors that can be read, or this one filtered out"));
        }
        for planned in &self.outputs {
            let cast =
                !matches!(planned.change, Change::Reinterpreted(_)) && planned.dtype != planned.base.info()?.dtype();
            if cast && !is_float(planned.dtype) && !is_quantized(planned.dtype) {
                return Err(Error::new(Kind::UnsupportedDtype, "tensors are cast to floats that candle computes with")
                    .with_path(path)
                    .with_tensor(&planned.name)
                    .with_expected("BF16, F16, F32, F64 or F8_E4M3")
                    .with_got(planned.dtype));
            }
        }
        let mut core = options.core.clone();
        let set = core.metadata().cloned();
        let aliases = self.aliases().map_err(|error| error.with_path(path))?;
        let is_safetensors = options.format == FileFormat::Safetensors;
        let is_pytorch = options.format == FileFormat::PyTorch;
        if !is_pytorch && (!self.metadata.is_empty() || set.is_some()) {
            let mut metadata = self.metadata.clone();
            metadata.extend(set.into_iter().flatten());
            let taken = |(other, name): &&(String, String)| metadata.get(other).is_some_and(|value| value != name);
            if is_safetensors && let Some((other, _)) = aliases.iter().find(taken) {
                return Err(Error::new(
                    Kind::NameCollision,
                    "the metadata has an entry of a tied weight's name already",
                )
                .with_path(path)
                .with_tensor(other));
            }
            core = core.with_metadata(metadata);
        }
        match &self.map {
            Some(_) if !is_safetensors => Err(Error::new(
                Kind::Argument,
                "what a closure returns is not known in advance, which a PyTorch or GGUF file has to be",
            )
            .with_path(path)),
            Some(map) => self.write_mapped(path, map, core, options),
            None => {
                let mut target = Target::new(options.format, core, aliases);
                target.gguf = self.gguf.clone();
                self.write_streamed(path, &target, options)
            }
        }
    }

    /// The metadata entries of tied weights: other name, name. Closures name what they return themselves.
    fn aliases(&self) -> Result<Vec<(String, String)>> {
        if self.map.is_some() {
            return Ok(Vec::new());
        }
        let mut names: HashSet<&str> = self.outputs.iter().map(|planned| planned.name.as_str()).collect();
        let mut aliases = Vec::new();
        for planned in &self.outputs {
            for alias in &planned.aliases {
                if !names.insert(alias) {
                    return Err(Error::new(Kind::DuplicateName, "a tied weight has the name of another tensor")
                        .with_tensor(alias));
                }
                aliases.push((alias.clone(), planned.name.clone()));
            }
        }
        Ok(aliases)
    }

    fn write_streamed(&self, path: &Path, target: &Target, options: &SaveOptions) -> Result<SaveReport> {
        let output = Output::create(path, self.metas()?, options.max_shard_bytes, target)?;
        let by_name: HashMap<&str, &Planned> =
            self.outputs.iter().map(|planned| (planned.name.as_str(), planned)).collect();
        let mut tasks = Vec::new();
        let mut total = 0u64;
        for name in output.names() {
            let Some(planned) = by_name.get(name.as_str()) else { continue };
            total = total.saturating_add(planned.base.info()?.byte_len());
            piece::tasks(planned, output.writer(&name)?, &mut tasks)?;
        }
        let tally = Tally::new(total, options.progress.as_ref());
        let read = |bytes| tally.add(bytes);
        in_parallel(threads(options, &output), tasks.len(), &|at| match tasks.get(at) {
            Some(task) => task.run(&read),
            None => Ok(()),
        })?;
        drop(tasks);
        output.finish()
    }

    fn write_mapped(
        &self,
        path: &Path,
        map: &MapFn,
        core: write::SaveOptions,
        options: &SaveOptions,
    ) -> Result<SaveReport> {
        if options.max_shard_bytes.is_some() {
            return Err(
                Error::new(Kind::Argument, "what a closure returns cannot be sharded in the same step").with_path(path)
            );
        }
        let writer = IncrementalWriter::create_with(path, &IncrementalOptions::new().with_save(core))?;
        let total = self.outputs.iter().map(|planned| planned.base.info().map_or(0, |info| info.byte_len())).sum();
        let tally = Tally::new(total, options.progress.as_ref());
        for planned in &self.outputs {
            let info = planned.base.info()?;
            let located = |error: Error| error.with_tensor(&planned.name);
            let mut pieces = Pieces::default();
            if matches!(mapping(info.dtype()), Mapping::Same(_)) && !planned.opaque {
                let tensor = pieces.whole(planned).map_err(located)?;
                for (name, tensor) in map(&planned.name, tensor).map_err(located)? {
                    writer.write(&name, &tensor).map_err(|error| error.with_tensor(&name))?;
                }
            } else {
                let mut tensor = writer.inner().begin(&planned.name, planned.dtype, planned.shape()?)?;
                pieces.each(planned, &mut |bytes| tensor.write(bytes)).map_err(located)?;
                tensor.finish()?;
            }
            tally.add(info.byte_len());
        }
        writer.finish()
    }
}
