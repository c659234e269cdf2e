"""Times what Python readers and writers do with a file: reads lines `WHAT PATH`, and answers each with seconds; or `has
MODULE`, and answers whether it can be imported."""

import contextlib
import importlib
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


def async_stream(path):
    """Every tensor, dropped as it comes, with the batches that the package's own `load_all` has."""
    from unifiedefficientloader import UnifiedSafetensorsLoader
    with UnifiedSafetensorsLoader(path, low_memory=True) as loader:
        for batch in loader.async_stream(loader.keys(), batch_size=16, prefetch_batches=2):
            del batch


def safetensors_cuda(path):
    import safetensors.torch
    tensors = safetensors.torch.load_file(path, device="cuda:0")
    torch.cuda.synchronize()
    return tensors


def fastsafetensors_cuda(path, device="cuda:0"):
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
    with contextlib.closing(SafeTensorsFileLoader(SingleGroup(), device, nogds=True)) as loader:
        loader.add_filenames({0: [path]})
        with contextlib.closing(loader.copy_files_to_device()) as buffers:
            tensors = {name: buffers.get_tensor(name) for name in list(buffers.key_to_rank_lidx)}
            if device != "cpu":
                torch.cuda.synchronize()
            # They are views of the buffers, which end here.
            del tensors


def instanttensor_cuda(path):
    from instanttensor import safe_open
    with safe_open(path, framework="pt", device=0) as file:
        tensors = dict(file.tensors())
    torch.cuda.synchronize()
    return tensors


def importable(module):
    try:
        importlib.import_module(module)
        return True
    except Exception:
        return False


print("ready", torch.__version__, flush=True)
for line in sys.stdin:
    what, *arguments = line.split()
    if what == "has":
        print("has", importable(*arguments), flush=True)
        continue
    work = globals()[what]
    began = time.perf_counter()
    kept = work(*arguments)
    took = time.perf_counter() - began
    del kept
    # Libraries may print too.
    print("seconds", took, flush=True)
