"""Times what data loaders of Python do with the workloads of `benches/data`: reads lines `LOADER WORKLOAD FOLDER`, and
answers each with the samples and the seconds of a second of batches."""

import os
import sys
import time

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(1)
SECONDS = 1.0
BATCHES = {"mnist": 64, "rows": 64, "tokens": 16, "jpeg": 32, "blobs": 16}


class Digits(Dataset):
    """The bytes of an IDX file, as torchvision's ToTensor makes floats of them."""

    def __init__(self, folder):
        images = numpy.fromfile(os.path.join(folder, "digits.idx"), "u1", offset=16)
        self.images = torch.from_numpy(images.reshape(-1, 28, 28))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index].to(torch.float32).div(255)}


class Rows(Dataset):
    """Rows of f32, as a file of 60,000 of them has them in memory."""

    def __init__(self, folder):
        self.images = torch.from_numpy(numpy.fromfile(os.path.join(folder, "digits.f32"), "<f4").reshape(-1, 28, 28))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index]}


class Tokens(Dataset):
    def __init__(self, folder):
        self.tokens = numpy.memmap(os.path.join(folder, "tokens.u16"), "<u2", "r")

    def __len__(self):
        return (len(self.tokens) - 1) // 1024

    def __getitem__(self, index):
        window = torch.from_numpy(self.tokens[index * 1024:index * 1024 + 1025].astype(numpy.int64))
        return {"input": window[:-1], "target": window[1:]}


class Blobs(Dataset):
    def __init__(self, folder):
        self.blobs = torch.from_numpy(numpy.fromfile(os.path.join(folder, "blobs.u8"), "u1").reshape(-1, 1 << 20))

    def __len__(self):
        return len(self.blobs)

    def __getitem__(self, index):
        return self.blobs[index]


class Images(Dataset):
    """Random resized crops of 224 pixels, mirrored and normalised, by Pillow and torch."""

    def __init__(self, folder):
        folder = os.path.join(folder, "jpeg", "class")
        self.paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
        self.mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self.deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        width, height = image.size
        box = (0, 0, width, height)
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(0.08, 1.0).item()
            sides = float(torch.exp(torch.empty(1).uniform_(-0.28768207, 0.28768207)))
            w, h = round((area * sides) ** 0.5), round((area / sides) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(torch.randint(width - w + 1, (1,))), int(torch.randint(height - h + 1, (1,)))
                box = (left, top, left + w, top + h)
                break
        image = image.resize((224, 224), Image.BILINEAR, box=box)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return {"image": pixels.sub_(self.mean).div_(self.deviation), "label": 0}


DATASETS = {"mnist": Digits, "rows": Rows, "tokens": Tokens, "jpeg": Images, "blobs": Blobs}


def endless(name, dataset, workload):
    """Batches of one epoch after the other. A name is a library and a number of workers."""
    library, workers = name.rsplit("-", 1)
    batch, workers = BATCHES[workload], int(workers)
    if library == "torch":
        loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    else:
        from unifiedefficientloader.unified_data_loader import UnifiedDataLoader
        loader = UnifiedDataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)
    while True:
        yield from loader


def measure(loader, workload, folder):
    dataset = DATASETS[workload](folder)
    batches = endless(loader, dataset, workload)
    for _ in range(3):
        next(batches)
    samples, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        next(batches)
        samples += BATCHES[workload]
    return samples, time.perf_counter() - began


if __name__ == "__main__":
    print("ready", torch.__version__, flush=True)
    for line in sys.stdin:
        loader, workload, folder = line.split(maxsplit=2)
        try:
            samples, seconds = measure(loader, workload, folder.rstrip("\n"))
            print("samples", samples, seconds, flush=True)
        except ImportError as error:
            print("missing", error.name, flush=True)
