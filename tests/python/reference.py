"""Answers what the Python packages make of something: one JSON object a line, in and out.

{"op": "dump", "path": FILE, "out": BIN} writes the bytes of every tensor to BIN, one after another, and answers
    {"metadata": {..} or null, "tensors": {name: {"dtype", "shape", "offset", "len"}}}
{"op": "slice", "path": FILE, "name": NAME, "ranges": [[start, stop], ..], "out": BIN} writes the slice's bytes to
    BIN and answers {"shape"}
{"op": "dict", "json": TEXT, "out": BIN} or {"op": "dict", "python": EXPRESSION, ..} writes the bytes of the tensor that
    unifiedefficientloader makes of a dictionary to BIN, and answers {"by": the module that made them}
{"op": "undict", "bytes": [..], "json": TEXT} answers {"same": whether it reads the dictionary TEXT from those bytes}
A refusal by the package is answered with {"error": its message}.
"""

import functools
import importlib.util
import json
import sys
import types

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

answers = sys.stdout
sys.stdout = sys.stderr  # whatever a package prints is no answer


def dump(request):
    with open(request["path"], "rb") as file:
        read = deserialize(file.read())
    with safe_open(request["path"], framework="np") as file:
        metadata = file.metadata()
    tensors = {}
    with open(request["out"], "wb") as out:
        for name, tensor in read:
            span = {"offset": out.tell(), "len": len(tensor["data"])}
            tensors[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], **span}
            out.write(tensor["data"])
    return {"metadata": metadata, "tensors": tensors}


def cut(request):
    with safe_open(request["path"], framework="np") as file:
        part = file.get_slice(request["name"])[tuple(slice(*bounds) for bounds in request["ranges"])]
    with open(request["out"], "wb") as out:
        out.write(part.tobytes())
    return {"shape": part.shape}


@functools.cache
def dictionaries():
    """unifiedefficientloader's own functions, or what they do where the package cannot be installed.

    The package asks for torch as soon as it is imported, which is too large to install for this. Of torch its two
    functions use `torch.tensor(list, dtype=torch.uint8)` alone, for which numpy stands in here.
    """
    found = importlib.util.find_spec("unifiedefficientloader")
    if found is None:
        return types.SimpleNamespace(
            __name__="json",
            dict_to_tensor=lambda value: np.array(list(json.dumps(value).encode("utf-8")), np.uint8),
            tensor_to_dict=lambda tensor: json.loads(bytes(tensor.tolist()).decode("utf-8")),
        )
    package = types.ModuleType(found.name)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[found.name] = package
    sys.modules.setdefault("torch", types.SimpleNamespace(uint8=np.uint8, tensor=np.array))
    return importlib.import_module("unifiedefficientloader.tensor_utils")


def same(left, right):
    """Equal in types, order of keys and the sign of zero too."""
    return repr(left) == repr(right)


def to_tensor(request):
    package = dictionaries()
    value = json.loads(request["json"]) if "json" in request else eval(request["python"])
    tensor = package.dict_to_tensor(value)
    if "json" in request:
        assert same(package.tensor_to_dict(tensor), value)
    with open(request["out"], "wb") as out:
        out.write(tensor.tobytes())
    return {"by": package.__name__}


def from_tensor(request):
    tensor = np.array(request["bytes"], np.uint8)
    return {"same": same(dictionaries().tensor_to_dict(tensor), json.loads(request["json"]))}


operations = {"dump": dump, "slice": cut, "dict": to_tensor, "undict": from_tensor}
for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = operations[request["op"]](request)
    except SafetensorError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
