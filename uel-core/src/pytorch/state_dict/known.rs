//! The classes and functions that have a meaning here.

use super::element::{Element, element, storage_element};
use crate::pytorch::pickle::Global;

/// How a tensor is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rebuild {
    /// Also `_rebuild_tensor`, which has fewer arguments.
    Strided,
    /// With a dtype, over an untyped storage.
    Typed,
    Parameter,
    Sparse,
    Quantized,
    FromNumpy,
    FromCpu,
    Nested,
    /// A function and its arguments, for a subclass of Tensor.
    FromType,
    Meta,
    Wrapper,
    /// The class itself, with arguments or a state, as files of torch before 0.4 have it.
    Class,
}

/// What a class or function means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Rebuild(Rebuild),
    /// A storage class: its elements, `None` for bytes without a type.
    Storage(Option<&'static Element>),
    Dtype(&'static Element),
    Size,
    Device,
    /// A function of one string that says everything: a layout, a memory format.
    Named,
    LoadFromBytes,
    Mapping,
    Sequence,
    Encode,
    Bytes,
    Complex,
    /// A function that returns its first argument.
    Identity,
    JitTensorId,
    NumpyReconstruct,
    NumpyFromBuffer,
    NumpyScalar,
    NumpyDtype,
    /// `copyreg._reconstructor`, whose first argument is the class.
    Reconstructor,
    /// `copyreg.__newobj__`, likewise.
    NewObject,
    Other,
}

pub(super) fn known(global: &Global) -> Known {
    let (module, name) = global.path();
    let rebuild = Known::Rebuild;
    match (module, name) {
        ("torch._utils", _) => match name {
            "_rebuild_tensor" | "_rebuild_tensor_v2" => rebuild(Rebuild::Strided),
            "_rebuild_tensor_v3" => rebuild(Rebuild::Typed),
            "_rebuild_parameter" | "_rebuild_parameter_with_state" => rebuild(Rebuild::Parameter),
            "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor" => rebuild(Rebuild::Sparse),
            "_rebuild_qtensor" => rebuild(Rebuild::Quantized),
            "_rebuild_device_tensor_from_numpy" | "_rebuild_xla_tensor" | "_rebuild_mlc_tensor" => {
                rebuild(Rebuild::FromNumpy)
            }
            "_rebuild_device_tensor_from_cpu_tensor" => rebuild(Rebuild::FromCpu),
            "_rebuild_nested_tensor" => rebuild(Rebuild::Nested),
            "_rebuild_meta_tensor_no_storage" => rebuild(Rebuild::Meta),
            "_rebuild_wrapper_subclass" => rebuild(Rebuild::Wrapper),
            _ => Known::Other,
        },
        ("torch._tensor" | "torch.tensor", "_rebuild_from_type" | "_rebuild_from_type_v2") => {
            rebuild(Rebuild::FromType)
        }
        ("torch.nn.parameter", "Parameter" | "Buffer") | ("torch.tensor" | "torch._tensor", "Tensor") => {
            rebuild(Rebuild::Class)
        }
        ("torch.autograd.variable", "Variable") => rebuild(Rebuild::Class),
        ("torch", "Size") => Known::Size,
        ("torch", "device") => Known::Device,
        ("torch.serialization", "_get_layout") | ("torch.utils", "_get_memory_format") => Known::Named,
        ("torch.storage", "_load_from_bytes") => Known::LoadFromBytes,
        ("torch.jit._pickle", "build_tensor_from_id") => Known::JitTensorId,
        ("torch.jit._pickle", _) => Known::Identity,
        ("collections", "OrderedDict" | "defaultdict" | "Counter") | ("builtins", "dict") => Known::Mapping,
        ("builtins", "list" | "tuple" | "set" | "frozenset") | ("collections", "deque") => Known::Sequence,
        ("_codecs", "encode") => Known::Encode,
        ("builtins", "bytes" | "bytearray") => Known::Bytes,
        ("builtins", "complex") => Known::Complex,
        ("copyreg", "_reconstructor") => Known::Reconstructor,
        ("copyreg", "__newobj__") => Known::NewObject,
        ("numpy", "dtype") => Known::NumpyDtype,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Known::NumpyReconstruct,
        ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Known::NumpyScalar,
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Known::NumpyFromBuffer,
        _ if module == "torch" || module.starts_with("torch.") => of_torch(module, name),
        _ => Known::Other,
    }
}

fn of_torch(module: &str, name: &str) -> Known {
    if matches!(name, "UntypedStorage" | "_UntypedStorage") {
        return Known::Storage(None);
    }
    if let Some(element) = storage_element(name) {
        return Known::Storage(Some(element));
    }
    match module {
        "torch" => match element(name) {
            Some(element) => Known::Dtype(element),
            None if name == "Tensor" || is_tensor_class(name) => Known::Rebuild(Rebuild::Class),
            None => Known::Other,
        },
        "torch.cuda" if is_tensor_class(name) => Known::Rebuild(Rebuild::Class),
        _ => Known::Other,
    }
}

/// Such as `FloatTensor`.
fn is_tensor_class(name: &str) -> bool {
    name.strip_suffix("Tensor").is_some_and(|kind| storage_element(&format!("{kind}Storage")).is_some())
}
