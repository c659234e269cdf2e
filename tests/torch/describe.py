"""What torch.load gives for a checkpoint, in the words that UEL answers with: names, safetensors dtypes, bytes."""

import dataclasses
import enum
import json
import math
import re
import sys

import numpy as np
import torch

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
QUANTIZED = {torch.quint8: "U8", torch.qint8: "I8", torch.qint32: "I32"}
# What Rust compares with, where it cannot know the words: any value will do.
ANY = {"__any__": True}


class Description:
    """Flattens a loaded object: tensors by dotted name, values in their nesting."""

    def __init__(self):
        self.tensors = []
        self.unreadable = []
        self.bytes = bytearray()
        self.within = set()

    def add(self, name, dtype, shape, data, requires_grad=False, parameter=False):
        self.tensors.append({
            "name": name, "dtype": dtype, "shape": list(shape), "offset": len(self.bytes), "len": len(data),
            "requires_grad": requires_grad, "parameter": parameter,
        })
        self.bytes += data
        return f"<tensor {name}>"

    def tensor(self, name, tensor):
        attributes = {"requires_grad": tensor.requires_grad, "parameter": isinstance(tensor, torch.nn.Parameter)}
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            tensor = tensor.as_subclass(torch.Tensor)
        if tensor.device.type == "meta" or tensor.is_conj() or tensor.is_neg():
            self.unreadable.append(name)
            return ANY
        if tensor.is_nested:
            self.tensor(name + ".values", tensor.values())
            self.tensor(name + ".sizes", tensor._nested_tensor_size())
            self.tensor(name + ".strides", tensor._nested_tensor_strides())
            self.tensor(name + ".storage_offsets", tensor._nested_tensor_storage_offsets())
            return ANY
        if tensor.layout == torch.sparse_coo:
            self.tensor(name + ".indices", tensor._indices())
            self.tensor(name + ".values", tensor._values())
            return ANY
        if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
            self.tensor(name + ".crow_indices", tensor.crow_indices())
            self.tensor(name + ".col_indices", tensor.col_indices())
            self.tensor(name + ".values", tensor.values())
            return ANY
        if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
            self.tensor(name + ".ccol_indices", tensor.ccol_indices())
            self.tensor(name + ".row_indices", tensor.row_indices())
            self.tensor(name + ".values", tensor.values())
            return ANY
        if tensor.dtype in QUANTIZED:
            data = tensor.int_repr().contiguous()
            self.add(name, QUANTIZED[tensor.dtype], tensor.shape, raw(data), **attributes)
            if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
                self.tensor(name + ".scales", tensor.q_per_channel_scales())
                self.tensor(name + ".zero_points", tensor.q_per_channel_zero_points())
            return ANY
        shape, dtype = list(tensor.shape), tensor.dtype
        if dtype == torch.float4_e2m1fn_x2:
            # Two elements to a byte: the format's shape counts elements.
            return self.add(name, "F4", [*shape[:-1], shape[-1] * 2], raw(tensor.view(torch.uint8)), **attributes)
        if dtype == torch.complex128:
            return self.add(name, "F64", [*shape, 2], raw(tensor), **attributes)
        if dtype == torch.complex32:
            return self.add(name, "F16", [*shape, 2], raw(tensor), **attributes)
        return self.add(name, DTYPES[dtype], shape, raw(tensor), **attributes)

    def array(self, name, array):
        kinds = {"b1": "BOOL", "u1": "U8", "i1": "I8", "i2": "I16", "u2": "U16", "f2": "F16", "i4": "I32", "u4": "U32",
                 "f4": "F32", "c8": "C64", "i8": "I64", "u8": "U64", "f8": "F64", "c16": "F64"}
        kind = array.dtype.str[1:]
        if kind not in kinds:
            return ANY
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
        shape = [*array.shape, 2] if kind == "c16" else array.shape
        return self.add(name, kinds[kind], shape, little.tobytes())

    def value(self, name, value):
        """The JSON of a value; what is a tensor in it is added by its dotted name."""
        if isinstance(value, torch.Tensor):
            place = self.tensor(own(name), value)
            state = {key: item for key, item in vars(value).items() if not key.startswith("_")}
            return {"__tensor__": place, **self.mapping(name, state)} if state else place
        if isinstance(value, torch.nn.Module):
            self.mapping(name, value.state_dict())
            return ANY
        if isinstance(value, (torch.storage.TypedStorage, torch.UntypedStorage)):
            dtype = value.dtype if isinstance(value, torch.storage.TypedStorage) else torch.uint8
            untyped = value._untyped_storage if isinstance(value, torch.storage.TypedStorage) else value
            return self.tensor(own(name), torch.empty(0, dtype=dtype).set_(untyped))
        if isinstance(value, np.ndarray):
            return self.array(own(name), value)
        if isinstance(value, enum.Enum):
            return ANY
        if isinstance(value, np.generic):
            value = value.item()
            return value if isinstance(value, (bool, int, float, str)) else ANY
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return value if -(2**63) <= value < 2**64 else str(value)
        if isinstance(value, float):
            return value if math.isfinite(value) else ANY
        if isinstance(value, (dict, list, tuple, torch.Size)):
            if id(value) in self.within:
                return ANY
            self.within.add(id(value))
            try:
                if isinstance(value, dict):
                    return self.mapping(name, value)
                return [self.value(below(name, i), item) for i, item in enumerate(value)]
            finally:
                self.within.discard(id(value))
        if dataclasses.is_dataclass(value) or type(value).__module__ in ("argparse", "types", "cases"):
            # Its attributes are named as a dictionary's are; how an object is written as JSON is UEL's own affair.
            if getattr(value, "__dict__", None):
                self.mapping(name, vars(value))
            return ANY
        return ANY

    def mapping(self, name, mapping):
        keys = [(key, key if isinstance(key, str) else str(key)) for key in mapping]
        values = {text: self.value(below(name, text), mapping[key]) for key, text in keys}
        # An attribute of the OrderedDict that state_dict() gives: the versions of the modules.
        if hasattr(mapping, "_metadata"):
            values["_metadata"] = self.value(below(name, "_metadata"), mapping._metadata)
        return values

    def json(self, **more):
        return {"tensors": self.tensors, "unreadable": self.unreadable, **more}


def own(name):
    """The name of a tensor: what is the whole file is called `tensor`."""
    return "tensor" if name is None else name


def below(name, part):
    """The dotted name of what stands under `part` of `name`, which is None for the whole file."""
    return str(part) if name is None else f"{name}.{part}"


def raw(tensor):
    """Row-major little-endian bytes."""
    assert sys.byteorder == "little"
    tensor = tensor.contiguous().clone()
    if tensor.numel() == 0:
        return b""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def script(description, module):
    """A TorchScript module's tensors: parameters, buffers and attributes, by the path to them."""
    seen = dict([*module.named_parameters(), *module.named_buffers()])
    for name, tensor in seen.items():
        description.tensor(name, tensor)
    for path, part in module.named_modules():
        native = part._c
        # There is no list of the attributes' names but the printed one.
        for name in sorted(set(re.findall(r"^ *(\w+) = ", native.dump_to_str(False, True, False), re.MULTILINE))):
            place = f"{path}.{name}" if path else name
            value = native.getattr(name) if native.hasattr(name) else None
            if place not in seen and isinstance(value, (torch.Tensor, list, tuple, dict)):
                description.value(place, value)


def write(folder, file, value, as_script=False, **more):
    """Writes `expected/FILE.json`, and `expected/FILE.bytes` with the bytes of every tensor."""
    description = Description()
    values = script(description, value) or ANY if as_script else description.value(None, value)
    (folder / "expected").mkdir(exist_ok=True)
    name = file.replace("/", "__")
    (folder / "expected" / f"{name}.bytes").write_bytes(description.bytes)
    text = json.dumps({"path": file, **description.json(values=values, **more)}, indent=1)
    (folder / "expected" / f"{name}.json").write_text(text)
