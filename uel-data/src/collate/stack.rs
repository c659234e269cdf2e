//! Arrays of one shape, stacked.

use super::alike::stack_alike;
use super::{Collate, Part, collate, product, shown, tensor, with_rest};
use crate::{Array, Elements, Field, Fingerprint, Result, Value};

/// Stacks samples by the rules of torch's `default_collate`.
///
/// Arrays of one dtype and shape get a first dimension more; whole numbers become I64, real ones F64, yes and no U8, and
/// numbers of several kinds the widest of these; texts and bytes stay lists; lists, tuples and maps are collated element
/// by element. These things differ:
///
/// - A tuple stays a tuple, where torch makes a list.
/// - One real number makes the batch F64. In torch it is F32 where a whole number, or yes or no, stands first, and F64
///   otherwise.
/// - Samples that differ in kind are refused. torch widens arrays of several dtypes, leaves out the keys that the first
///   map lacks, gives back what begins with a text or bytes whatever follows, and takes tuples among lists.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stack;

pub(super) fn stack(arrays: Vec<Array>, part: &Part<'_>) -> Result<Field> {
    let Some(first) = arrays.first() else { return tensor(Vec::<u8>::new(), vec![0]) };
    let different = arrays.iter().position(|array| array.shape() != first.shape() || array.dtype() != first.dtype());
    if let Some((row, other)) = different.and_then(|row| Some((row, arrays.get(row)?))) {
        return Err(part.differs(row, "arrays of a batch must have one dtype and shape", shown(first), shown(other)));
    }
    let shape = with_rest(&[arrays.len()], first.shape());
    let mut elements = Elements::with_capacity(first.dtype(), product(&shape)?)?;
    for array in &arrays {
        elements.extend_from(array.elements())?;
    }
    tensor(elements, shape)
}

impl Collate for Stack {
    fn collate(&self, samples: Vec<Value>, indices: &[u64]) -> Result<Field> {
        if let Some(batch) = stack_alike(&samples) {
            return Ok(batch);
        }
        collate(samples, &mut Part { indices, path: String::new() }, &mut stack)
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("stack").finish()
    }
}
