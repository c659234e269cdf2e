"""GGUF files that the Python package `gguf` writes, and what it reads.

gguf_files.py write FOLDER    writes files of every dtype and type of values, and expected.json and expected.bin beside them
gguf_files.py read FOLDER     reads every .gguf file of the folder, into read.json and read.bin beside them
gguf_files.py dequantize FOLDER    dequantizes all tensors of model.gguf: their floats, one after another, into model.f32

Both JSON files have {"types": {name: [number, elements, bytes]}, "files": [{"path", "alignment", "version",
"metadata": [[key, types, value], ..], "tensors": [{"name", "dtype", "shape", "offset", "len"}, ..]}, ..]}; offsets are those
in the .bin file.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from gguf.constants import GGML_QUANT_SIZES, GGUFEndian

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
# Of Q8_1 the package has the size of long ago.
BLOCKS = [dtype for dtype in GGMLQuantizationType if dtype.name not in PLAIN and dtype.name != "Q8_1"]
T = GGUFValueType
VALUES = [
    ("u8", [T.UINT8], 200),
    ("i8", [T.INT8], -100),
    ("u16", [T.UINT16], 60_000),
    ("i16", [T.INT16], -30_000),
    ("u32", [T.UINT32], 4_000_000_000),
    ("i32", [T.INT32], -2_000_000_000),
    ("f32", [T.FLOAT32], 0.15625),
    ("bool", [T.BOOL], True),
    ("string", [T.STRING], "grüße\n"),
    ("u64", [T.UINT64], 2**64 - 1),
    ("i64", [T.INT64], -(2**63)),
    ("f64", [T.FLOAT64], 0.1),
    ("u8s", [T.ARRAY, T.UINT8], [0, 255]),
    ("i8s", [T.ARRAY, T.INT8], [-128, 127]),
    ("u16s", [T.ARRAY, T.UINT16], [0, 65535]),
    ("i16s", [T.ARRAY, T.INT16], [-32768, 5]),
    ("u32s", [T.ARRAY, T.UINT32], [2**32 - 1]),
    ("i32s", [T.ARRAY, T.INT32], list(range(-50, 50))),
    ("f32s", [T.ARRAY, T.FLOAT32], [1.5, -0.25]),
    ("bools", [T.ARRAY, T.BOOL], [True, False, True]),
    ("strings", [T.ARRAY, T.STRING], ["", "a", "Ġhello", "日本"]),
    ("u64s", [T.ARRAY, T.UINT64], [2**64 - 1, 0]),
    ("i64s", [T.ARRAY, T.INT64], [-(2**63), 1]),
    ("f64s", [T.ARRAY, T.FLOAT64], [0.1, 1e300]),
]
random = np.random.default_rng(7)


def plain(name, shape):
    data = random.integers(0, 256, int(np.prod(shape)) * np.dtype(PLAIN[name]).itemsize, dtype=np.uint8)
    return data.view(PLAIN[name]).reshape(shape)


def blocks(dtype, shape):
    """Blocks of any bytes: `shape` counts blocks along its last dimension."""
    return random.integers(0, 256, (*shape[:-1], shape[-1] * GGML_QUANT_SIZES[dtype][1]), dtype=np.uint8)


def add_values(writer, values):
    for key, types, value in values:
        writer.add_key_value(key, value, types[0], sub_type=types[1] if len(types) > 1 else None)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(folder):
    for alignment in (32, 64, 8):
        writer = GGUFWriter(folder / f"all-{alignment}.gguf", "llama")
        if alignment != 32:
            writer.add_custom_alignment(alignment)
        add_values(writer, VALUES)
        for name in PLAIN:
            writer.add_tensor(f"plain.{name}", plain(name, (3, 5)))
        for dtype in BLOCKS:
            writer.add_tensor(f"blocks.{dtype.name}", blocks(dtype, (2, 3)), raw_dtype=dtype)
        for rank in range(1, 5):
            writer.add_tensor(f"rank.{rank}", plain("F32", tuple(range(2, 2 + rank))))
        finish(writer)
    writer = GGUFWriter(folder / "big.gguf", "llama", endianess=GGUFEndian.BIG)
    add_values(writer, VALUES)
    for name in PLAIN:
        writer.add_tensor(f"plain.{name}", plain(name, (3, 5)))
    finish(writer)
    finish(GGUFWriter(folder / "nothing.gguf", "llama"))
    writer = GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=2)
    add_values(writer, VALUES[:3])
    for number in range(5):
        writer.add_tensor(f"t{number}", plain("I16", (4, 4)))
    finish(writer)


def dump(path, out):
    reader = GGUFReader(path)
    metadata = []
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents() if len(field.types) > 1 or field.types[0] != T.ARRAY else []
            metadata.append([name, [kind.name for kind in field.types], value])
    tensors = []
    for tensor in reader.tensors:
        dtype = tensor.tensor_type.name
        data = tensor.data.astype(PLAIN[dtype]) if dtype in PLAIN else tensor.data
        data = np.ascontiguousarray(data).tobytes()
        shape = [int(dim) for dim in reversed(tensor.shape)]
        tensors.append({"name": tensor.name, "dtype": dtype, "shape": shape, "offset": out.tell(), "len": len(data)})
        out.write(data)
    version = int(reader.fields["GGUF.version"].contents())
    alignment = int(reader.alignment)
    return {"path": path.name, "alignment": alignment, "version": version, "metadata": metadata, "tensors": tensors}


def main():
    folder = Path(sys.argv[2])
    if sys.argv[1] == "dequantize":
        with open(folder / "model.f32", "wb") as out:
            for tensor in GGUFReader(folder / "model.gguf").tensors:
                out.write(dequantize(tensor.data, tensor.tensor_type).astype("<f4").tobytes())
        return
    stem = "read"
    if sys.argv[1] == "write":
        stem = "expected"
        write(folder)
    types = {dtype.name: [int(dtype), *GGML_QUANT_SIZES[dtype]] for dtype in GGMLQuantizationType}
    with open(folder / f"{stem}.bin", "wb") as out:
        files = [dump(path, out) for path in sorted(folder.glob("*.gguf"))]
    (folder / f"{stem}.json").write_text(json.dumps({"types": types, "files": files}))


main()
