//! What ranks tell each other about their files: names, dtypes, shapes and places, so that nobody reads another's headers.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uel_core::{BlockDtype, ByteRange, Dtype, Error, Kind, Result, TensorIndexBuilder};

use super::files::Read;

/// The longest account of a rank's tensors, in bytes: some hundred for each.
pub(super) const MAX_ACCOUNT_BYTES: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Account {
    file: usize,
    name: String,
    dtype: String,
    shape: Vec<usize>,
    start: u64,
    end: u64,
    /// It does not stand in its file as it is, but in a source that the owner makes of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    made: bool,
}

/// The tensors in the files that a rank read.
pub(super) fn encode(read: &Read) -> Result<Vec<u8>> {
    let mut tensors = Vec::new();
    for (&file, held) in &read.held {
        tensors.extend(held.checkpoint.index().iter().map(|info| Account {
            file,
            name: info.name().to_owned(),
            dtype: info.dtype().as_str().to_owned(),
            shape: info.shape().to_vec(),
            start: info.range().start(),
            end: info.range().end(),
            made: info.file() > 0,
        }));
    }
    let bytes = serde_json::to_vec(&tensors).map_err(|error| {
        Error::new(Kind::Internal, "the names and shapes of tensors are always JSON").with_source(error)
    })?;
    if bytes.len() as u64 > MAX_ACCOUNT_BYTES {
        return Err(Error::new(Kind::Limit, "a rank has too many tensors, or tensors with too long names")
            .with_expected(format!("at most {MAX_ACCOUNT_BYTES} bytes"))
            .with_got(bytes.len()));
    }
    Ok(bytes)
}

/// Adds the tensors of a rank. `is_own` says which files are that rank's.
/// Names of tensors that do not stand in their files as they are go to `made`.
pub(super) fn decode(
    bytes: &[u8],
    is_own: impl Fn(usize) -> bool,
    index: &mut TensorIndexBuilder,
    made: &mut HashSet<String>,
) -> Result<()> {
    let unreadable = |message: &str| Error::new(Kind::Group, format!("a rank sent {message}"));
    let tensors: Vec<Account> = serde_json::from_slice(bytes)
        .map_err(|error| unreadable("an account of its tensors that cannot be read").with_source(error))?;
    for Account { file, name, dtype, shape, start, end, made: is_made } in tensors {
        let named = |error: Error| error.with_tensor(&name);
        let known = Dtype::from_safetensors(&dtype);
        let block = || BlockDtype::ALL.iter().find(|block| block.as_str() == dtype).copied().map(Dtype::Block);
        let dtype =
            known.or_else(block).ok_or_else(|| named(unreadable("a dtype that is not known").with_got(&dtype)))?;
        let range = ByteRange::new(start, end).ok_or_else(|| named(unreadable("bytes that end before they begin")))?;
        if !is_own(file) {
            return Err(named(unreadable("a tensor of a file that it does not have")));
        }
        index.push(&name, dtype, &shape, file, range)?;
        if is_made {
            made.insert(name);
        }
    }
    Ok(())
}
