//! What the pickle of a checkpoint says: tensors over storages, and values that are no tensors.

use crate::{Dtype, Kind};

/// A storage that a pickle names: a run of elements that stands elsewhere in the file, shared by any number of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StorageRef {
    /// The name of its entry below `data/`, or its key in a legacy file. Two may have the same one where a file
    /// contradicts itself.
    pub(crate) key: String,
    /// What its elements are; `None` for an untyped storage, whose `elements` are bytes.
    pub(crate) dtype: Option<Dtype>,
    /// Where it was when it was saved: `cpu`, `cuda:0`.
    pub(crate) location: String,
    /// How many elements the pickle says that it has. Not checked against the file here.
    pub(crate) elements: u64,
    /// Bytes of one element in the file: of a complex number those of both its parts.
    pub(crate) element_bytes: u64,
    /// Legacy files: the storage that this one is a part of, and where in it, in elements.
    pub(crate) view: Option<StorageView>,
}

/// A storage that is part of another one, as files of torch before 0.4 have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StorageView {
    /// The key of the storage that it is a part of.
    pub(crate) root: String,
    /// Where it begins in that one, in elements. It ends within: `offset` and the part's own elements are at most
    /// `elements`.
    pub(crate) offset: u64,
    /// How many elements the pickle says that the whole one has.
    pub(crate) elements: u64,
}

/// Where a tensor's elements stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// In number `storage` of [`Contents::storages`], from the byte `offset` on.
    Storage { storage: usize, offset: u64 },
    /// In the pickle itself, as numpy arrays do: number `bytes` of [`Contents::embedded`].
    Embedded { bytes: usize },
}

/// One tensor of a state_dict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorSpec {
    /// Its dotted name.
    pub(crate) name: String,
    /// What its elements are. Complex numbers that [`Dtype`] lacks are pairs of floats, with one more dimension.
    pub(crate) dtype: Dtype,
    /// Its dimensions, outermost first.
    pub(crate) shape: Vec<usize>,
    /// For each dimension the distance of neighbours, in bytes; never negative, 0 where it was expanded.
    /// Two neighbours of `F4` share a byte: its last stride is 1 and means the bytes, as if they were elements.
    pub(crate) strides: Vec<u64>,
    pub(crate) place: Place,
    /// How many bytes are swapped together where the file's byte order is not this format's: 1 for bytes, 4 for `F32`
    /// and for each part of `C64`.
    pub(crate) swap: u8,
    pub(crate) requires_grad: bool,
    /// Whether it is a `torch.nn.Parameter`.
    pub(crate) parameter: bool,
}

/// Everything of interest in a checkpoint's pickle.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    pub(crate) storages: Vec<StorageRef>,
    /// In the order of the state_dict.
    pub(crate) tensors: Vec<TensorSpec>,
    /// Bytes of tensors that stand in the pickle itself, in the order of this machine.
    pub(crate) embedded: Vec<Vec<u8>>,
    /// Tensors that cannot be read, and why: only who asks for one gets the error.
    pub(crate) unreadable: Vec<Unreadable>,
    /// What is no tensor, in the nesting of the file.
    pub(crate) values: serde_json::Value,
}

/// A tensor of a kind that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable {
    pub(crate) name: String,
    /// Whether its kind is not supported, or its description is broken.
    pub(crate) kind: Kind,
    /// Such as "a tensor on the meta device has no data".
    pub(crate) why: String,
}
