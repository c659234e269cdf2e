"""Writes safetensors files with the Python package, and what it reads back from each.

usage: write_corpus.py FOLDER

FOLDER gets the files, `expected.bin` (the bytes of every tensor, one after another) and `expected.json`: a list of
{"path", "metadata", "tensors": {name: {"dtype", "shape", "offset", "len"}}}, where path is a file or a folder of
shards. Nothing stands in it that the package itself does not read back from the file.
"""

import json
import os
import random
import struct
import sys

import numpy as np
import safetensors.numpy
from safetensors import TensorSpec, deserialize, safe_open, serialize_file

# The package's name for a dtype, the name in the header, bits per element.
WRITABLE = [
    ("bool", "BOOL", 8),
    ("float4_e2m1fn_x2", "F4", 8),  # given in pairs: the header's last dimension is twice as long
    ("uint8", "U8", 8),
    ("int8", "I8", 8),
    ("float8_e5m2", "F8_E5M2", 8),
    ("float8_e4m3fn", "F8_E4M3", 8),
    ("float8_e8m0fnu", "F8_E8M0", 8),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", 8),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", 8),
    ("int16", "I16", 16),
    ("uint16", "U16", 16),
    ("float16", "F16", 16),
    ("bfloat16", "BF16", 16),
    ("int32", "I32", 32),
    ("uint32", "U32", 32),
    ("float32", "F32", 32),
    ("complex64", "C64", 64),
    ("float64", "F64", 64),
    ("int64", "I64", 64),
    ("uint64", "U64", 64),
]
# What only a header written by hand can have: the package reads these two but does not write them.
BY_HAND = [(None, "F6_E2M3", 6), (None, "F6_E3M2", 6), (None, "F4", 4)]
NUMPY = ["bool", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "c8", "f8", "i8", "u8", ">f4", ">i8"]
NAMES = [
    "",
    " ",
    "model.layers.0.self_attn.q_proj.weight",
    "日本語.重み",
    "größe",
    "\U0001f600",
    'quote " backslash \\ slash /',
    "line\nbreak\ttab\x01\x7f",
    "\u2028\ufeff\ufffd",
    "n" * 10_000,
    "__metadata",
]

random.seed(20)
folder = sys.argv[1]
expected = []
blob = open(os.path.join(folder, "expected.bin"), "wb")


def data(byte_len):
    return random.randbytes(byte_len)


def elements(shape):
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def expect(path, files):
    """Notes what the package reads back from `files`, which together are the checkpoint at `path`."""
    metadata, tensors = None, {}
    for file in files:
        with open(os.path.join(folder, file), "rb") as opened:
            read = deserialize(opened.read())
        with safe_open(os.path.join(folder, file), framework="np") as opened:
            metadata = opened.metadata()
        for name, tensor in read:
            assert name not in tensors, name
            tensors[name] = {
                "dtype": tensor["dtype"],
                "shape": tensor["shape"],
                "offset": blob.tell(),
                "len": len(tensor["data"]),
            }
            blob.write(tensor["data"])
    expected.append({"path": path, "metadata": metadata, "tensors": tensors})


def write(path, tensors, metadata=None):
    """Writes {name: (the package's dtype, shape, bytes)} with the package."""
    kept, specs = [], {}
    for name, (dtype, shape, raw) in tensors.items():
        buffer = np.frombuffer(raw or b"\0", np.uint8)
        kept.append(buffer)
        specs[name] = TensorSpec(dtype=dtype, shape=shape, data_ptr=buffer.ctypes.data, data_len=len(raw))
    serialize_file(specs, os.path.join(folder, path), metadata)


def write_by_hand(path, tensors, metadata=None, pad=0, reverse=False, **style):
    """Writes {name: (header dtype, shape, bytes)} under a header of any length, order and style."""
    header, raw = [], b""
    for name, (dtype, shape, part) in tensors.items():
        span = [len(raw), len(raw) + len(part)]
        fields = {"dtype": dtype, "shape": shape, "data_offsets": span}
        if reverse:
            fields = dict(reversed(fields.items()))
        header.append((name, fields))
        raw += part
    if metadata is not None:
        header.insert(0, ("__metadata__", metadata))
    if reverse:
        header.reverse()
    text = json.dumps(dict(header), **style).encode() + b" " * pad
    with open(os.path.join(folder, path), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + raw)
    return len(text)


def single(path, *args, **kwargs):
    write(path, *args, **kwargs)
    expect(path, [path])


def single_by_hand(path, *args, **kwargs):
    write_by_hand(path, *args, **kwargs)
    expect(path, [path])


every = {header: (dtype, [3, 5], data(15 * bits // 8)) for dtype, header, bits in WRITABLE}
single("every_dtype.safetensors", every)
single("metadata.safetensors", every, {"format": "np", "": "empty key", "größe": "日本語", 'a"b\\': "\n\x00"})

for dtype, header, bits in WRITABLE:
    shapes = {"vector": [7], "matrix": [2, 3], "none": [0], "hollow": [3, 0, 2], "deep": [1, 2, 1, 2, 1, 2, 1, 1, 1]}
    if header != "F4":
        shapes["scalar"] = []
    tensors = {name: (dtype, shape, data(elements(shape) * bits // 8)) for name, shape in shapes.items()}
    single(f"shapes_{header}.safetensors", tensors)

arrays = {}
for dtype in NUMPY:
    wanted = np.dtype(dtype)
    raw = np.frombuffer(data(24 * wanted.itemsize), wanted.newbyteorder("=")).reshape(2, 3, 4)
    arrays[dtype] = (raw.view(np.uint8) & 1).view(bool)[..., :4].copy() if dtype == "bool" else raw.astype(wanted)
safetensors.numpy.save_file(arrays, os.path.join(folder, "numpy.safetensors"), {"framework": "numpy"})
expect("numpy.safetensors", ["numpy.safetensors"])

named = {name: ("float16", [2, 2], data(8)) for name in NAMES}
single("names.safetensors", named)
single("many.safetensors", {f"blocks.{i}.weight": ("bfloat16", [i % 5, 3], data(i % 5 * 6)) for i in range(5000)})
large = {"a": ("uint8", [(5 << 20) + 1], data((5 << 20) + 1)), "b": ("uint8", [3], data(3))}
large |= {"c": ("float32", [768, 1024], data(768 * 4096)), "d": ("int64", [], data(8))}
single("large.safetensors", large)
single("empty.safetensors", {})
single_by_hand("only_metadata.safetensors", {}, {"format": "pt"})
single_by_hand("empty_metadata.safetensors", {"x": ("U8", [1], b"x")}, {})

by_hand = {header: (header, [2, 4], data(8 * bits // 8)) for _, header, bits in WRITABLE + BY_HAND if header != "F4"}
by_hand["F4"] = ("F4", [2, 4], data(4))
lengths = set()
for pad in range(8):
    path = f"unaligned_{pad}.safetensors"
    lengths.add(write_by_hand(path, by_hand, {"format": "pt"}, pad=pad) % 8)
    expect(path, [path])
assert lengths == set(range(8))
single_by_hand("reversed.safetensors", by_hand, {"format": "pt"}, reverse=True)
single_by_hand("indented.safetensors", by_hand, {"format": "pt"}, indent=4)
single_by_hand("compact.safetensors", by_hand, {"format": "pt"}, separators=(",", ":"))
escaped = {name: ("U8", [3], data(3)) for name in NAMES}
single_by_hand("escaped_names.safetensors", escaped, {"größe": "\U0001f600"}, ensure_ascii=True)
single_by_hand("plain_names.safetensors", escaped, {"größe": "\U0001f600"}, ensure_ascii=False)
single_by_hand("long_padding.safetensors", by_hand, pad=100_000)

os.mkdir(os.path.join(folder, "sharded"))
weight_map, shards, names = {}, [], list(every)
for shard in range(3):
    path = f"model-{shard + 1:05}-of-00003.safetensors"
    part = {name: every[name] for name in names[shard::3]}
    write(os.path.join("sharded", path), part, {"format": "pt"})
    weight_map |= {name: path for name in part}
    shards.append(os.path.join("sharded", path))
index = {"metadata": {"total_size": sum(len(raw) for _, _, raw in every.values())}, "weight_map": weight_map}
with open(os.path.join(folder, "sharded", "model.safetensors.index.json"), "w") as file:
    json.dump(index, file, indent=2, sort_keys=True)
expect("sharded", shards)

blob.close()
with open(os.path.join(folder, "expected.json"), "w") as file:
    json.dump(expected, file)
