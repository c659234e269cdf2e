"""Answers what the Python safetensors package reads from a file: one JSON object a line, in and out.

{"op": "dump", "path": FILE, "out": BIN} writes the bytes of every tensor to BIN, one after another, and answers
    {"metadata": {..} or null, "tensors": {name: {"dtype", "shape", "offset", "len"}}}
{"op": "slice", "path": FILE, "name": NAME, "ranges": [[start, stop], ..], "out": BIN} writes the slice's bytes to
    BIN and answers {"shape"}
A refusal by the package is answered with {"error": its message}.
"""

import json
import sys

from safetensors import SafetensorError, deserialize, safe_open


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


for line in sys.stdin:
    request = json.loads(line)
    try:
        answer = {"dump": dump, "slice": cut}[request["op"]](request)
    except SafetensorError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
