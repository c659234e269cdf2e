"""Reads batches of samples, one JSON line each, and writes what torch's default_collate makes of them."""

import json
import sys

import torch
from torch.utils.data import default_collate

DTYPES = {"U8": torch.uint8, "U32": torch.uint32, "I64": torch.int64, "F32": torch.float32, "F64": torch.float64}


def sample(value):
    kind, content = value["kind"], value["value"]
    if kind == "array":
        return torch.tensor(content, dtype=DTYPES[value["dtype"]]).reshape(value["shape"])
    if kind == "bytes":
        return bytes(content)
    if kind == "list":
        return [sample(one) for one in content]
    if kind == "tuple":
        return tuple(sample(one) for one in content)
    if kind == "map":
        return {name: sample(one) for name, one in content}
    return content


def batch(value):
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        numbers = value.to(torch.float64).flatten().tolist()
        return {"kind": "tensor", "dtype": dtype, "shape": list(value.shape), "value": numbers}
    if isinstance(value, dict):
        return {"kind": "map", "value": [[name, batch(one)] for name, one in value.items()]}
    # Texts and bytes are given back as they came, and lists and tuples of fields come as lists.
    value = list(value)
    if value and all(isinstance(one, str) for one in value):
        return {"kind": "texts", "value": value}
    if value and all(isinstance(one, bytes) for one in value):
        return {"kind": "bytes", "value": [list(one) for one in value]}
    return {"kind": "list", "value": [batch(one) for one in value]}


for line in sys.stdin:
    try:
        made = default_collate([sample(one) for one in json.loads(line)])
    except Exception as error:
        answer = {"kind": "error", "value": f"{type(error).__name__}: {error}"}
    else:
        try:
            answer = batch(made)
        except TypeError:
            # A batch that begins with a text is given back whatever else is in it.
            answer = {"kind": "mixed", "value": repr(made)}
    print(json.dumps(answer))
