//! Tied weights: tensors that are the same memory under several names.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::Tensor;

/// Leaves of tensors that share all their memory the first alone, and returns the others: other name, first name.
pub(super) fn untie(tensors: &mut Vec<(String, &Tensor)>) -> Vec<(String, String)> {
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
    aliases
}
