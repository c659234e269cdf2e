//! Which tensors a load brings, and under which names: filters, renames and expectations.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use candle_core::{DType, Tensor};
use uel_core::{Dtype, Error, Kind, Result};

use super::Checkpoint;
use super::names::quoted;
use super::options::LoadOptions;
use crate::cast::Cast;
use crate::dtype::{Mapping, candle_dtype, mapping};

/// Names that an error lists at most.
const LISTED_NAMES: usize = 5;

/// One tensor of a load.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Its position in the index.
    pub(crate) position: usize,
    /// Its name for the caller, where that is not the one in the file.
    pub(crate) renamed: Option<String>,
    /// The dtype of the bytes in candle.
    pub(crate) dtype: DType,
    /// candle lacks the file's dtype, and `dtype` is a wider one.
    pub(crate) widened: bool,
    /// The dtype that the caller asked for, where it is another one.
    pub(crate) cast: Option<DType>,
}

impl Wanted {
    pub(crate) fn new(position: usize, stored: Dtype, asked: Option<DType>) -> Result<Self> {
        let (dtype, widened) = candle_dtype(stored)?;
        let cast = asked.filter(|&asked| asked != dtype && is_cast(dtype));
        Ok(Self { position, renamed: None, dtype, widened, cast })
    }

    /// The dtype that the caller gets.
    pub(crate) fn result_dtype(&self) -> DType {
        self.cast.unwrap_or(self.dtype)
    }

    /// The cast that the reading threads do.
    pub(crate) fn cast_on_the_way(&self) -> Option<Cast> {
        let to = self.cast.filter(|_| !self.widened)?;
        Cast::new(self.dtype, to)
    }
}

/// Whether a requested dtype applies to tensors of `dtype`: floats that candle computes with. Casting indices or masks
/// along with the weights would only break them.
pub(crate) fn is_cast(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16 | DType::F32 | DType::F64 | DType::F8E4M3)
}

/// A replaced or added tensor of a load, with its name for the caller.
pub(super) type Replaced = (String, Tensor);

impl Checkpoint {
    /// The tensors that `options` asks for, in the order of the index, and replaced or added ones.
    pub(super) fn select(&self, options: &LoadOptions) -> Result<(Vec<Wanted>, Vec<Replaced>)> {
        let index = self.index();
        // One look at the overlay: a tensor that is restored meanwhile must not be missing altogether.
        let replaced = self.all_replaced();
        for name in options.filter.names() {
            if index.position(name).is_none() && !replaced.contains_key(name) {
                return Err(self.unknown(name));
            }
        }
        let mut wanted = Vec::new();
        for (position, info) in index.iter().enumerate() {
            if !options.filter.matches(info.name()) || replaced.contains_key(info.name()) {
                continue;
            }
            let named = |error: Error| self.located(error, info);
            let mut want = Wanted::new(position, info.dtype(), options.dtype).map_err(named)?;
            want.renamed = options.rename.as_ref().map(|rename| rename(info.name()));
            wanted.push(want);
        }
        let rename = |name: &String| options.rename.as_ref().map_or_else(|| name.clone(), |rename| rename(name));
        let replaced: Vec<Replaced> = replaced
            .into_iter()
            .filter(|(name, _)| options.filter.matches(name))
            .map(|(name, tensor)| (rename(&name), tensor))
            .collect();

        if options.rename.is_some() || options.expected.is_some() {
            self.check_names(options, &wanted, &replaced)?;
        }
        Ok((wanted, replaced))
    }

    fn check_names(&self, options: &LoadOptions, wanted: &[Wanted], replaced: &[Replaced]) -> Result<()> {
        let mut names = HashSet::new();
        let own = |want: &'_ Wanted| self.index().at(want.position).map_or("", |info| info.name());
        let all = wanted.iter().map(|want| want.renamed.as_deref().unwrap_or_else(|| own(want)));
        for name in all.chain(replaced.iter().map(|(name, _)| name.as_str())) {
            if !names.insert(name) {
                return Err(Error::new(Kind::NameCollision, "renaming gives two tensors this name").with_tensor(name));
            }
        }
        let Some(expected) = &options.expected else { return Ok(()) };
        let expected: BTreeSet<&str> = expected.iter().map(String::as_str).collect();
        let missing: Vec<&str> = expected.iter().copied().filter(|name| !names.contains(name)).collect();
        if !missing.is_empty() && !options.allow_missing {
            return Err(listed(Kind::MissingTensors, "the checkpoint lacks expected tensors", &missing));
        }
        let mut unexpected: Vec<&str> = names.iter().copied().filter(|name| !expected.contains(name)).collect();
        unexpected.sort_unstable();
        if !unexpected.is_empty() && !options.allow_unexpected {
            return Err(listed(
                Kind::UnexpectedTensors,
                "the checkpoint has tensors that were not expected",
                &unexpected,
            ));
        }
        Ok(())
    }

    fn all_replaced(&self) -> BTreeMap<String, Tensor> {
        self.overlay().clone()
    }
}

fn listed(kind: Kind, message: &str, names: &[&str]) -> Error {
    let shown: Vec<String> = names.iter().take(LISTED_NAMES).map(|name| quoted(name)).collect();
    let more = names.len().saturating_sub(LISTED_NAMES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let error = Error::new(kind, format!("{message}: {}{more}", shown.join(", ")));
    match names.first() {
        Some(first) => error.with_tensor(first),
        None => error,
    }
}

/// Whether tensors of `dtype` are read along when all are. As floats quantized ones would take several times the memory of
/// the file, and are likely asked for as what they are.
pub(super) fn is_preloaded(dtype: Dtype) -> bool {
    mapping(dtype) != Mapping::Raw && dtype.as_block().is_none()
}
