"""Writes tensors of every dtype, aligned and not, and the values that numpy and ml_dtypes see in them.

usage: write_values.py FOLDER

FOLDER gets the files, `values.bin` and `values.json`: a list of {"path", "dtype", "tensors": {name: {"shape", "bytes":
[start, end], "values": [start, end]}}}, where both spans are of values.bin: the tensor's bytes in the file, and its
values as float64, or as int64 for integers and booleans. Dtypes that candle stores but does not compute with, or lacks,
have no values.
"""

import json
import os
import random
import struct
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import TensorSpec, serialize_file

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F4": ml_dtypes.float4_e2m1fn,
    "F6_E2M3": ml_dtypes.float6_e2m3fn,
    "F6_E3M2": ml_dtypes.float6_e3m2fn,
}
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
WITHOUT_VALUES = {"C64", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
# The package's name where it is not numpy's, for the dtypes that safetensors.numpy itself does not take.
NOT_NUMPY = {"F4": "float4_e2m1fn_x2"}

random.seed(21)
folder = sys.argv[1]
files = []
blob = open(os.path.join(folder, "values.bin"), "wb")


def note(data):
    start = blob.tell()
    blob.write(data)
    return [start, blob.tell()]


def array(name, shape):
    """Every bit pattern of a byte, and any of larger elements with those that are special."""
    dtype = np.dtype(DTYPES[name])
    count = int(np.prod(shape, dtype=np.int64))
    if dtype.itemsize == 1:
        most = 2 if name == "BOOL" else 1 << BITS.get(name, 8)
        return np.array([n % most for n in range(count)], np.uint8).view(dtype).reshape(shape)
    raw = np.frombuffer(random.randbytes(count * dtype.itemsize), dtype).copy()
    if name == "U64":
        raw >>= np.uint64(1)  # candle has nothing for larger ones
    elif dtype.kind in "fV" or name == "BF16":
        special = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40]
        raw[: len(special)] = np.array(special, np.float64).astype(dtype)[:count]
    return raw.reshape(shape)


def packed(name, values):
    """The bytes as they stand in the file: elements of less than a byte follow one another from the lowest bit on."""
    bits = BITS.get(name)
    if bits is None:
        return values.tobytes()
    number = 0
    for place, element in enumerate(values.tobytes()):
        number |= element << (place * bits)
    return number.to_bytes(values.size * bits // 8, "little")


def described(name, arrays):
    tensors = {}
    for key, values in arrays.items():
        tensors[key] = {"shape": list(values.shape), "bytes": note(packed(name, values))}
        if name not in WITHOUT_VALUES:
            wide = np.float64 if values.dtype.kind in "fV" else np.int64
            tensors[key]["values"] = note(values.astype(wide).tobytes())
    return tensors


def by_the_package(name, arrays):
    path = f"{name}.safetensors"
    if name not in BITS and name != "C64" and DTYPES[name].__module__ == "numpy":
        safetensors.numpy.save_file(arrays, os.path.join(folder, path))
    else:
        specs, kept = {}, []
        for key, values in arrays.items():
            raw = packed(name, values)
            kept.append(np.frombuffer(raw or b"\0", np.uint8))
            shape = list(values.shape)
            if name == "F4":
                shape[-1] //= 2  # given in pairs
            pointer = kept[-1].ctypes.data
            dtype = NOT_NUMPY.get(name, values.dtype.name)
            specs[key] = TensorSpec(dtype=dtype, shape=shape, data_ptr=pointer, data_len=len(raw))
        serialize_file(specs, os.path.join(folder, path), None)
    return path


def by_hand(name, arrays, pad):
    """A header of any length, so that the data starts at any offset."""
    header, data = {}, b""
    for key, values in arrays.items():
        raw = packed(name, values)
        span = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": name, "shape": list(values.shape), "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * ((pad - len(text)) % 8)
    path = f"{name}_{pad}.safetensors"
    with open(os.path.join(folder, path), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    return path


for name in DTYPES:
    shapes = {"all": (256,), "matrix": (3, 4, 2), "none": (0,), "hollow": (2, 0, 4)}
    if name not in BITS:
        shapes |= {"odd": (7,), "scalar": ()}
    arrays = {key: array(name, shape) for key, shape in shapes.items()}
    tensors = described(name, arrays)
    paths = [by_hand(name, arrays, pad) for pad in range(8)]
    if name not in ("F6_E2M3", "F6_E3M2"):  # the package reads these but does not write them
        paths.append(by_the_package(name, arrays))
    files += [{"path": path, "dtype": name, "tensors": tensors} for path in paths]

blob.close()
with open(os.path.join(folder, "values.json"), "w") as file:
    json.dump(files, file)
