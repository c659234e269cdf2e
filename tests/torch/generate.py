"""Writes PyTorch checkpoints of every kind, and what torch reads from each.

usage: generate.py FOLDER [WHEELS]

FOLDER gets the checkpoints and `expected/NAME.json` with `expected/NAME.bytes`: see `describe.write`. WHEELS is a folder
with the packages of scripts/torch-packages.txt, whose checkpoints are unpacked and described too.
"""

import io
import json
import pathlib
import pickle
import sys
import types
import warnings
import zipfile

import numpy as np
import torch
from safetensors.torch import save_file

import cases
import craft
import describe
from cases import filled, numbers

warnings.simplefilter("ignore")


def save(value, **options):
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def load(data):
    # What a pickle here calls is not run by the comparison either.
    return torch.load(io.BytesIO(data), weights_only=False, map_location="cpu", pickle_module=harmless())


def harmless():
    """The pickle module without `os`, and with empty classes for those that are not installed."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split(".")[0] in ("os", "posix", "nt"):
                return lambda *_: describe.ANY
            try:
                return super().find_class(module, name)
            except (ModuleNotFoundError, AttributeError):
                return type(name, (), {"__module__": module, "__setstate__": lambda self, state: None})

    module = types.ModuleType("harmless")
    module.__dict__.update(pickle.__dict__)
    module.Unpickler = Unpickler
    module.load = lambda file, **options: Unpickler(file, **options).load()
    return module


class Corpus:
    def __init__(self, folder):
        self.folder = folder
        self.count = 0

    def add(self, name, data, expected=None, **more):
        """A checkpoint; what is expected is what torch loads from it, unless it is given."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        describe.write(self.folder, name, load(data) if expected is None else expected, **more)
        self.count += 1

    def saved(self, name, value, **options):
        torch.save(value, self.folder / name, **options)
        describe.write(self.folder, name, load((self.folder / name).read_bytes()))
        self.count += 1


def objects(corpus):
    for name, value in [*cases.tensors(), *cases.roots()]:
        corpus.saved(name + ".pth", value)
    # A name can stand for two tensors: both cannot be had.
    clash = {"a.b": numbers(2), "a": {"b": numbers(3)}}
    torch.save(clash, corpus.folder / "two_tensors_of_one_name.pth")
    describe.write(corpus.folder, "two_tensors_of_one_name.pth", {}, refused="name-collision")
    corpus.count += 1


def containers(corpus):
    base = numbers(6, 8)
    value = {"w": base, "view": base[1:3, ::2], "tied": base, "bias": filled(torch.float16, 7), "n": 3}
    every = {name: filled(dtype, 5) for dtype, name in cases.PLAIN.items()}
    newer = {name: filled(dtype, 4) for dtype, name in cases.NEWER.items()}
    for protocol in (1, 2, 3, 4, 5):  # torch writes 0 so that it cannot read it
        corpus.add(f"protocol{protocol}.pth", save(value, pickle_protocol=protocol))
        corpus.add(f"legacy_protocol{protocol}.pth",
                   save(value, pickle_protocol=protocol, _use_new_zipfile_serialization=False))
    array = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "f": np.asfortranarray(np.ones((2, 3))), "w": base}
    for protocol in (2, 4, 5):
        corpus.add(f"numpy_protocol{protocol}.pth", save(array, pickle_protocol=protocol))
    old = {"_use_new_zipfile_serialization": False}
    # In this form torch writes dtypes that have no storage class of their own, and fails to read them.
    half = {"complex32": every["complex32"]}
    corpus.add("legacy_every_dtype.pth", save({k: v for k, v in every.items() if k not in half}, **old))
    corpus.add("legacy_newer_dtypes.pth", save(newer | half, **old), newer | half)
    corpus.add("legacy_shared_storage.pth", save({f"v{i}": base[i] for i in range(6)} | {"t": base.t()}, **old))
    corpus.add("legacy_empty_and_scalar.pth", save({"e": torch.empty(0, 3), "s": torch.tensor(2.5), "x": base}, **old))
    corpus.add("legacy_module.pth", save(cases.Net(), **old))
    corpus.add("legacy_root_tensor.pth", save(base, **old))
    corpus.add("legacy_unsafe.pth", save({"good": base, "bad": cases.RunsCommand()}, **old))
    corpus.add("legacy_sparse.pth", save({"s": torch.eye(3).to_sparse()}, **old))
    views, expected = craft.legacy_with_views()
    corpus.add("legacy_storage_views.pth", views, expected)
    path = corpus.folder / "tar_form.pth"
    path.write_bytes(craft.tar_checkpoint())
    describe.write(corpus.folder, path.name, torch.load(path, weights_only=False))

    archive = save(value)
    for name, options in {
        "zip_from_memory": {},
        "zip_deflated": {"compression": zipfile.ZIP_DEFLATED},
        "zip_unaligned": {},
        "zip_zip64_everywhere": {"force_zip64": True},
        "zip_comment": {"comment": b"made by hand " * 50},
        "zip_no_byteorder": {"drop": ("byteorder", ".format_version", ".storage_alignment")},
        "zip_no_version_record": {"drop": ("version",)},
        "zip_reversed_entries": {"order": lambda record: [-ord(c) for c in record[0]]},
        "zip_other_prefix": {"rename": lambda name: "some model v1.2/" + name.split("/", 1)[1]},
        "zip_unicode_prefix": {"rename": lambda name: "モデル/" + name.split("/", 1)[1]},
        "zip_more_records": {"add": [("archive/extra/notes.txt", b"text"), ("archive/.data/other", b"x")]},
        "zip_data_descriptors": {"seekable": False},
        "zip_data_descriptors_deflated": {"seekable": False, "compression": zipfile.ZIP_DEFLATED},
    }.items():
        data = archive if name == "zip_from_memory" else craft.rezip(archive, **options)
        corpus.add(name + ".pth", data, load(archive))
    # A name of 21 characters makes the first entry of the directory as long as the records behind the directory, which
    # misled readers that look for the directory from the end.
    corpus.saved("name_of_21_characters.pth", value)
    for alignment in (1, 8, 128, 4096):
        torch.utils.serialization.config.save.storage_alignment = alignment
        corpus.saved(f"zip_storage_alignment_{alignment}.pth", value)
    torch.utils.serialization.config.save.storage_alignment = 64
    torch.serialization.set_crc32_options(False)
    corpus.saved("zip_without_crc.pth", value)
    torch.serialization.set_crc32_options(True)
    flat = {**every, "strided": filled(torch.float32, 6, 6)[::2, 1::2]}
    corpus.add("big_endian.pth", craft.big_endian(save(flat), craft.storage_units(flat)), flat)
    path = corpus.folder / "zip_over_4_gib.pth"
    after = craft.sparse_zip64(path, (4 << 30) + 12345)
    describe.write(corpus.folder, path.name, after, huge=["big"], any_values=True)
    corpus.count += 2  # this and the tar form


def scripted(corpus):
    net = cases.Block().eval()
    for name, module in {"torchscript_script": torch.jit.script(net), "torchscript_trace":
                         torch.jit.trace(net, torch.zeros(2, 5)), "torchscript_sequential":
                         torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.LSTM(4, 5)
                                                              ))}.items():
        torch.jit.save(module, corpus.folder / f"{name}.pt")
        describe.write(corpus.folder, f"{name}.pt", torch.jit.load(corpus.folder / f"{name}.pt"), as_script=True)
        corpus.count += 1


def sharded(corpus):
    whole = {f"layer{i}.weight": numbers(3, i + 1) for i in range(9)}
    folder = corpus.folder / "sharded"
    folder.mkdir()
    weight_map = {}
    for shard in range(3):
        file = f"pytorch_model-{shard + 1:05}-of-00003.bin"
        part = {name: tensor for i, (name, tensor) in enumerate(whole.items()) if i % 3 == shard}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
    for path in ("sharded", "sharded/pytorch_model.bin.index.json"):
        describe.write(corpus.folder, path, whole, any_values=True)
        corpus.count += 1
    single = corpus.folder / "folder_with_one_bin"
    single.mkdir()
    torch.save(whole, single / "pytorch_model.bin")
    describe.write(corpus.folder, "folder_with_one_bin", whole, any_values=True)
    save_file(whole, corpus.folder / "safetensors_called_model.bin")
    describe.write(corpus.folder, "safetensors_called_model.bin", whole, any_values=True, not_pickle=True)
    torch.save(whole, corpus.folder / "no_extension")
    describe.write(corpus.folder, "no_extension", whole)
    corpus.count += 3


def packages(corpus, wheels):
    """Checkpoints that packages ship. Nothing of the packages is installed or run."""
    found = 0
    for wheel in sorted(wheels.glob("*.whl")):
        package = wheel.name.split("-")[0].lower()
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                path = pathlib.PurePosixPath(info.filename)
                if path.suffix not in (".pt", ".pth", ".ckpt", ".tar", ".jit") or ".data" in info.filename:
                    continue
                data = archive.read(info)
                name = f"package_{package}_{path.parent.name}_{path.name}"
                (corpus.folder / name).write_bytes(data)
                if path.suffix == ".jit":
                    describe.write(corpus.folder, name, torch.jit.load(io.BytesIO(data), map_location="cpu"), True)
                else:
                    describe.write(corpus.folder, name, load(data), any_values=package == "pesto_pitch")
                found += 1
    assert found >= 10, found
    return found


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    corpus = Corpus(folder)
    for write in (objects, containers, scripted, sharded):
        write(corpus)
    found = packages(corpus, pathlib.Path(sys.argv[2])) if len(sys.argv) > 2 else 0
    print(f"{corpus.count} checkpoints, {found} from packages", file=sys.stderr)


main()
