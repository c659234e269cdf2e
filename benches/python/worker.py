"""Times what Python readers and writers do with a file: reads lines `WHAT PATH`, and answers each with seconds."""

import sys
import time

import torch

sources = {}


def make(path, count):
    """A checkpoint of 2 GB of bf16 in `count` tensors."""
    each = 2_000_000_000 // 2 // int(count) // 32 * 32
    name = "model.layers.{}.mlp.experts.{}.weight"
    torch.save({name.format(n // 256, n % 256): torch.full((each // 32, 32), n, dtype=torch.bfloat16)
                for n in range(int(count))}, path)


def torch_load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def torch_mmap(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def zipslicer_open(path):
    import zipslicer
    return zipslicer.load(path)


def zipslicer_names_and_shapes(path):
    tensors = zipslicer_open(path)
    return [tensors.get_meta(name) for name in tensors.keys()]


def hold(path):
    """Keeps the tensors of a safetensors file, to be written."""
    import safetensors.torch
    sources["tensors"] = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def incremental_write(path):
    from unifiedefficientloader import IncrementalSafetensorsWriter
    with IncrementalSafetensorsWriter(path) as writer:
        writer.write_dict(sources["tensors"])


def safetensors_write(path):
    import safetensors.torch
    safetensors.torch.save_file(sources["tensors"], path)


print("ready", torch.__version__, flush=True)
for line in sys.stdin:
    what, *arguments = line.split()
    work = globals()[what]
    began = time.perf_counter()
    kept = work(*arguments)
    took = time.perf_counter() - began
    del kept
    # Libraries may print too.
    print("seconds", took, flush=True)
