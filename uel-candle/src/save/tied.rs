//! Tied weights: tensors that are the same memory under several names.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::Tensor;
use uel_core::safetensors::write;
use uel_core::{Error, Kind, Result};

/// Leaves of tensors that share all their memory the first alone, and enters the others in the metadata: `other name →
/// first name`, the form of the Python package's `save_model`.
pub(super) fn untie(
    tensors: &mut Vec<(String, &Tensor)>,
    mut options: write::SaveOptions,
) -> Result<write::SaveOptions> {
    let mut first: HashMap<(usize, usize, Vec<usize>, Vec<usize>), String> = HashMap::new();
    let mut aliases = Vec::new();
    tensors.retain(|(name, tensor)| {
        let (storage, layout) = tensor.storage_and_layout();
        // Tensors without elements have no memory to share.
        if layout.shape().elem_count() == 0 {
            return true;
        }
        let address = (&raw const *storage).addr();
        let key = (address, layout.start_offset(), layout.dims().to_vec(), layout.stride().to_vec());
        match first.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(name.clone());
                true
            }
            Entry::Occupied(kept) => {
                aliases.push((name.clone(), kept.get().clone()));
                false
            }
        }
    });
    for (alias, kept) in aliases {
        if options.metadata().is_some_and(|metadata| metadata.contains_key(&alias)) {
            return Err(Error::new(Kind::NameCollision, "the metadata has an entry of a tied weight's name already")
                .with_tensor(&alias));
        }
        options = options.with_metadata_entry(alias, kept);
    }
    Ok(options)
}
