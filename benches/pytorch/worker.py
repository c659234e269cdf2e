"""Times what Python readers do with a file: reads lines `WHAT PATH`, and answers each with seconds."""

import sys
import time

import torch
import zipslicer


def make(path, count):
    each = 2_000_000_000 // 2 // count // 32 * 32
    torch.save({f"model.layers.{n // 256}.mlp.experts.{n % 256}.weight": torch.full((each // 32, 32), n, dtype=torch.bfloat16)
                for n in range(count)}, path)


def torch_load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def torch_mmap(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def zipslicer_open(path):
    return zipslicer.load(path)


def zipslicer_names_and_shapes(path):
    tensors = zipslicer.load(path)
    return [tensors.get_meta(name) for name in tensors.keys()]


WORK = {work.__name__: work for work in (torch_load, torch_mmap, zipslicer_open, zipslicer_names_and_shapes)}

print("ready", torch.__version__, flush=True)
for line in sys.stdin:
    what, path, *rest = line.split()
    if what == "make":
        make(path, int(rest[0]))
        print(0.0, flush=True)
        continue
    began = time.perf_counter()
    kept = WORK[what](path)
    took = time.perf_counter() - began
    del kept
    print(took, flush=True)
