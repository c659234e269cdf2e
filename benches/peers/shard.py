"""A rank of fastsafetensors with torch.distributed (gloo) on the CPU: `shard.py RANK RANKS STORE`. Rank 0 reads lines
`scatter FILES`, and answers with the seconds from when all ranks were there until all had their tensors."""

import os
import sys
import time

import torch
import torch.distributed as dist
from fastsafetensors import SafeTensorsFileLoader

COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
ROWS = ("o_proj", "down_proj")


def dimension(name):
    """As ShardPlan::llama divides it; None where each rank has all of it."""
    part = name.split(".")[-2]
    return 0 if part in COLUMNS else 1 if part in ROWS else None


def scatter(paths):
    ranks = dist.get_world_size()
    loader = SafeTensorsFileLoader(dist.group.WORLD, "cpu", nogds=True)
    loader.add_filenames({rank: paths[rank::ranks] for rank in range(ranks)})
    buffers = loader.copy_files_to_device()
    tensors = {}
    for name in loader.get_keys():
        dim = dimension(name)
        tensors[name] = buffers.get_tensor(name) if dim is None else buffers.get_sharded(name, dim)
    return loader, buffers, tensors


def bytes_read():
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


def main():
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    if rank == 0:
        print("ready fastsafetensors, torch", torch.__version__, flush=True)
    while True:
        line = [sys.stdin.readline() if rank == 0 else None]
        dist.broadcast_object_list(line, src=0)
        words = line[0].split()
        if not words:
            return
        dist.barrier()
        before, began = bytes_read(), time.perf_counter()
        loader, buffers, tensors = scatter(words[1:])
        dist.barrier()
        seconds = time.perf_counter() - began
        read = torch.tensor([bytes_read() - before])
        dist.all_reduce(read)
        del tensors
        buffers.close()
        loader.close()
        if rank == 0:
            print("seconds", seconds, read.item(), flush=True)


if __name__ == "__main__":
    main()
    if os.path.exists(sys.argv[3]):
        os.remove(sys.argv[3])
