"""Objects to save: one checkpoint each, under a name that tells what it is about."""

import argparse
import dataclasses
import os
import types
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import torch
from torch import nn

PLAIN = {
    torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "bool",
    torch.complex32: "complex32", torch.complex64: "complex64", torch.complex128: "complex128",
}
# torch keeps these in untyped storages.
NEWER = {
    torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64", torch.float8_e4m3fn: "f8_e4m3fn",
    torch.float8_e5m2: "f8_e5m2", torch.float8_e4m3fnuz: "f8_e4m3fnuz", torch.float8_e5m2fnuz: "f8_e5m2fnuz",
    torch.float8_e8m0fnu: "f8_e8m0fnu", torch.float4_e2m1fn_x2: "f4_e2m1fn_x2",
}
generator = torch.Generator().manual_seed(12)


def filled(dtype, *shape):
    """A tensor whose bytes differ everywhere and mean something for the dtype."""
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype.is_floating_point or dtype.is_complex:
        data &= 0x3F  # no NaN: their payloads need not survive a copy
    if dtype == torch.uint64:
        data[7::8] &= 0x7F  # candle has I64 for it
    return (data.view(dtype) if count else torch.empty(0, dtype=dtype)).reshape(shape)


def numbers(*shape, dtype=torch.float32):
    count = int(np.prod(shape)) if shape else 1
    return torch.arange(count, dtype=torch.float64).add(0.5).reshape(shape).to(dtype)


class Tagged(torch.Tensor):
    """A subclass that pickles by torch's own road."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)

    def forward(self, x):
        return self.norm(self.proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())

    def forward(self, ids):
        return self.head(self.embed(ids))


@dataclasses.dataclass
class TrainState:
    weight: torch.Tensor
    steps: int


class RunsCommand:
    def __reduce__(self):
        return os.system, ("echo this must never be printed",)


class Custom:
    def __init__(self):
        self.inner = numbers(3)
        self.label = "custom"


def tensors():
    yield from (("dtype_" + name, {"t": filled(dtype, 3, 4), "same": filled(dtype, 2)}) for dtype, name in PLAIN.items())
    yield from (("dtype_" + name, {"t": filled(dtype, 3, 4), "same": filled(dtype, 2)}) for dtype, name in NEWER.items())
    many = [(d, n) for d, n in {**PLAIN, **NEWER}.items() if d != torch.float4_e2m1fn_x2]
    yield "dtypes_together", {name: filled(dtype, 5) for dtype, name in many}
    yield "scalars", {name: filled(dtype) for dtype, name in many}
    yield "empty_tensors", {name: filled(dtype, 0) for dtype, name in many}
    yield "zero_sized_dimensions", {"a": torch.empty(3, 0, 2), "b": torch.empty(0, 5), "c": torch.empty(0, 0)}
    yield "many_dimensions", {"t": numbers(*[2] * 10), "ones": numbers(*[1] * 64)}
    base = numbers(6, 8)
    yield "transposed", {"t": base.t(), "base": base}
    yield "permuted", {"t": numbers(2, 3, 4, 5).permute(3, 0, 2, 1), "channels_last":
                       numbers(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    yield "row_offset_view", {"t": base[2:5]}
    yield "column_slice", {"t": base[:, 3:6], "one": base[:, 4]}
    yield "strided", {"third": numbers(20)[::3], "second_columns": base[:, ::2], "both": base[1::2, 1::3]}
    yield "strided_wide", {"f64": numbers(9, 5, dtype=torch.float64)[::2, ::2], "c64": filled(torch.complex64, 6, 6)[::2, 1::2],
                           "c128": filled(torch.complex128, 6, 6).t()[1:], "u16": filled(torch.uint16, 6, 6)[:, ::3],
                           "f8": filled(torch.float8_e4m3fn, 6, 6).t(), "bool": filled(torch.bool, 6, 6)[:, 1]}
    yield "flipped", {"t": base.flip(0), "lr": base.flip(1)}
    yield "expanded", {"row": numbers(1, 4).expand(5, 4), "scalar": torch.tensor(7.5).expand(3, 3)}
    yield "overlapping", {"t": torch.as_strided(numbers(11), (4, 4), (2, 1), 1), "hankel": numbers(9).unfold(0, 4, 1)}
    big = numbers(1000, 100)
    yield "views_of_a_large_storage", {f"row{i}": big.narrow(0, i * 100, 2) for i in range(10)}
    yield "one_small_view_of_a_large_storage", {"t": big[500, 50:53]}
    tied = nn.Parameter(numbers(4, 5))
    yield "tied_weights", OrderedDict([("embed.weight", tied), ("bias", numbers(5)), ("head.weight", tied)])
    yield "tied_storage_other_shape", {"a": base, "b": base.view(8, 6), "c": base.view(-1)[4:]}
    yield "diagonal_view", {"t": numbers(5, 5).diagonal(), "off": numbers(5, 5).diagonal(1)}
    yield "real_and_imaginary_views", {"real": filled(torch.complex64, 4).real, "imag": filled(torch.complex64, 4).imag}
    yield "conjugate_and_negative_bits", {"conj": filled(torch.complex64, 4).conj(), "neg":
                                          filled(torch.complex64, 4).conj().imag, "plain": numbers(2)}
    yield "dimension_of_one_with_any_stride", {"t": torch.as_strided(numbers(6), (1, 3), (77, 2), 0)}
    yield "parameters", {"w": nn.Parameter(numbers(2, 3)), "frozen": nn.Parameter(numbers(3), requires_grad=False)}
    yield "requires_grad", {"t": numbers(3).requires_grad_(), "leaf": numbers(2)}
    attributed = nn.Parameter(numbers(3))
    attributed.tag = "kept"
    yield "parameter_with_attributes", {"w": attributed}
    hooked = numbers(3).requires_grad_()
    hooked.register_hook(print)
    yield "backward_hooks", {"t": hooked}
    yield "subclass", {"t": numbers(2, 2).as_subclass(Tagged), "plain": numbers(1)}
    attributed = numbers(2).as_subclass(Tagged)
    attributed.note = "n"
    yield "subclass_with_attributes", {"t": attributed}
    eye = torch.eye(4) * 3
    yield "sparse_coo", {"t": eye.to_sparse(), "uncoalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2))}
    yield "sparse_csr", {"t": eye.to_sparse_csr(), "dense": eye}
    yield "sparse_csc", {"t": eye.to_sparse_csc()}
    yield "sparse_bsr", {"t": eye.to_sparse_bsr((2, 2))}
    yield "quantized_per_tensor", {"quint8": torch.quantize_per_tensor(base, 0.1, 10, torch.quint8), "qint8":
                                   torch.quantize_per_tensor(base, 0.5, 0, torch.qint8), "qint32":
                                   torch.quantize_per_tensor(base, 0.01, 0, torch.qint32)}
    scales, zeros = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0, 5, 9])
    yield "quantized_per_channel", {"t": torch.quantize_per_channel(numbers(3, 4), scales, zeros, 0, torch.qint8), "u":
                                    torch.quantize_per_channel(numbers(2, 3), scales, zeros, 1, torch.quint8)}
    yield "meta_tensor", {"nothing": torch.empty(3, 4, device="meta"), "something": numbers(2)}
    yield "nested_tensor", {"t": torch.nested.nested_tensor([numbers(2, 3), numbers(4, 3)]), "plain": numbers(1)}


def roots():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    yield "root_dict", {"a": numbers(2, 3), "b": numbers(3)}
    yield "root_ordered_dict", OrderedDict([("z", numbers(2)), ("a", numbers(3))])
    yield "root_state_dict_with_metadata", module.state_dict()
    yield "root_nested", {"model": {"encoder": {"w": numbers(2)}, "decoder": OrderedDict(w=numbers(3))}, "v": 1}
    yield "root_list", [numbers(2), numbers(3, 3), {"inner": numbers(1)}]
    yield "root_tuple", (numbers(2), "text", 5, (numbers(4),))
    yield "root_tensor", numbers(3, 4)
    yield "root_parameter", nn.Parameter(numbers(3))
    yield "root_untyped_storage", numbers(5).untyped_storage()
    yield "root_typed_storage", torch.FloatStorage([1.5, 2.5, 3.5])
    yield "root_number", {"epoch": 3}
    yield "root_empty_dict", {}
    yield "storages_beside_tensors", {"storage": torch.LongStorage([1, 2, 3]), "t": numbers(2)}
    yield "other_containers", {"default": defaultdict(list, {"a": [numbers(2)]}), "counter": Counter("aab"), "set": {1, 2},
                               "frozen": frozenset("x"), "t": numbers(1), "size": torch.Size([2, 3]), "device":
                               torch.device("cpu"), "dtype": torch.float16, "range": range(3), "slice": slice(1, 2)}
    yield "integer_keys", {0: numbers(1), 1: {2: numbers(2)}, -3: numbers(3)}
    yield "values", {"epoch": 7, "loss": 0.125, "none": None, "yes": True, "text": "größe 日本", "bytes": b"\0\1\xff", "big":
                     2**63 - 1, "small": -(2**63), "huge": 2**80, "nan": float("nan"), "inf": float("inf"), "list":
                     [1, 2.5, "x", None, [False]], "tuple": (1, 2), "empty": {}, "t": numbers(2), "complex": 1 + 2j}
    model = Net()
    for kind, make in (("sgd_momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
                       ("adam", lambda p: torch.optim.Adam(p, lr=1e-3)),
                       ("adamw_tensor_lr", lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)))):
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10) if kind != "adamw_tensor_lr" else None
        model(torch.arange(7)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": 0.5}
        if scheduler:
            state["scheduler"] = scheduler.state_dict()
        yield "training_" + kind, state
    yield "random_state", {"torch": torch.get_rng_state(), "w": numbers(1)}
    arrays = ["?", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<i8", "<u8", "<f8", "<c8", "<c16"]
    yield "numpy_arrays", {kind.strip("<?") or "bool": np.arange(6).astype(kind).reshape(2, 3) for kind in arrays}
    yield "numpy_layouts", {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(4, dtype=">f4"),
                            "big_fortran": np.asfortranarray(np.arange(6).astype(">i8").reshape(2, 3)), "scalar":
                            np.array(5.5), "empty": np.empty((0, 3)), "view": np.arange(10)[::3]}
    yield "numpy_scalars", {"f64": np.float64(0.5), "f32": np.float32(1.5), "i64": np.int64(-4), "b": np.bool_(True), "t":
                            numbers(2)}
    yield "numpy_other", {"text": np.array(["a", "bc"]), "objects": np.array([1, "x"], dtype=object), "t": numbers(2)}
    yield "many_tensors_40_of_122_not_float", {f"layer{i}.{'count' if i % 3 == 0 else 'w'}": filled(
        (torch.int64, torch.bool)[i % 2] if i % 3 == 0 else torch.float32, i % 5 + 1, 3) for i in range(122)}
    yield "data_parallel_prefix", OrderedDict(("module." + k, v) for k, v in module.state_dict().items())
    yield "names", {"日本語.重み": numbers(1), "": numbers(2), " ": numbers(3), "n" * 10_000: numbers(4), "a.b.c.d": numbers(5),
                    'quote"\\': numbers(6), "line\nbreak\t\x01": numbers(7), "\U0001f600": numbers(8), "../up": numbers(9)}
    shared = {"w": numbers(3)}
    yield "shared_substructure", {"a": shared, "b": shared}
    recursive = {"w": numbers(3)}
    recursive["self"] = recursive
    yield "recursive", recursive
    yield "thousand_tensors", {f"h.{i}.weight": numbers(i % 7 + 1, 3) for i in range(1000)}
    yield "module_whole", Net()
    yield "module_inside_dict", {"net": Block(), "epoch": 1}
    yield "module_sequential_whole", module
    yield "unsafe_command_beside_tensors", {"good": numbers(2, 2), "bad": RunsCommand(), "after": numbers(3)}
    yield "unsafe_custom_class", {"object": Custom(), "w": numbers(2)}
    yield "unsafe_namespace", {"args": argparse.Namespace(lr=0.1, name="x"), "w": numbers(2)}
    yield "unsafe_simple_namespace", {"args": types.SimpleNamespace(t=numbers(2)), "w": numbers(2)}
    yield "unsafe_dataclass", TrainState(numbers(2, 3), 5)
    yield "unsafe_function", {"activation": torch.nn.functional.relu, "w": numbers(2)}
