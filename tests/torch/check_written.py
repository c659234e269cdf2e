"""Checks a folder of PyTorch files that UEL wrote against torch itself.

    check_written.py FOLDER

FOLDER/written.json lists the files: {"file", "tensors": [{"name", "dtype", "shape", "offset", "len", "storage"}], "key",
"values", "order"}. The bytes of each tensor stand in FOLDER/written.bin; tensors of one storage number share memory. `key` is
where the tensors stand in the outermost dict, or null. Each file has to load safely, mapped or not, with the offsets that
torch predicts, to the same bytes, and has to be what torch.save writes, but for the entry that tells files apart.
"""

import io
import json
import pathlib
import re
import sys
import zipfile

import torch
from torch.utils.serialization import config

ID = re.compile(rb"(?<=serialization_id)(.*?)\d{40}PK\x07\x08....", re.DOTALL)


def raw_bytes(tensor):
    """The bytes of a tensor, whatever its dtype."""
    assert tensor.is_contiguous()
    flat = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * tensor.element_size(),
        (tensor.numel() * tensor.element_size(),),
    )
    return flat.numpy().tobytes()


def check_tensors(found, expected, blob, mapped):
    names = [tensor["name"] for tensor in expected]
    assert list(found)[: len(names)] == names, "names, or their order"
    storages = {}
    for wanted in expected:
        name = wanted["name"]
        tensor = found[name]
        assert type(tensor) is torch.Tensor and not tensor.requires_grad, name
        assert str(tensor.dtype) == "torch." + wanted["dtype"], (name, tensor.dtype)
        assert list(tensor.shape) == wanted["shape"], (name, tensor.shape)
        assert raw_bytes(tensor) == blob[wanted["offset"] : wanted["offset"] + wanted["len"]], name
        if wanted["len"]:
            address = tensor.untyped_storage().data_ptr()
            assert not mapped or address % 64 == 0, name
            assert storages.setdefault(wanted["storage"], address) == address, name
    assert len(set(storages.values())) == len(storages), "tensors that are not tied share memory"


def same(left, right):
    """Equality that tells 1 from 1.0 and True."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def check_load(path, wanted, blob):
    loads = [{"mmap": False}, {"mmap": True}, {"mmap": True, "offsets": True}]
    for options in loads:
        config.load.calculate_storage_offsets = options.pop("offsets", False)
        loaded = torch.load(path, weights_only=True, **options)
        config.load.calculate_storage_offsets = False
        assert type(loaded) is dict
        tensors = loaded if wanted["key"] is None else loaded[wanted["key"]]
        check_tensors(tensors, wanted["tensors"], blob, options["mmap"])
        values = {key: loaded[key] for key in loaded if key in wanted["values"]}
        assert same(values, wanted["values"]), values
        count = len(wanted["tensors"]) if wanted["key"] is None else 1
        assert len(loaded) == count + len(wanted["values"])
    return loaded


def without_id(written):
    """The file without the number that tells it from others, and its two checksums."""
    assert ID.search(written)
    written = ID.sub(rb"\1", written)
    at = written.rindex(b"PK\x01\x02")
    return written[: at + 16] + written[at + 20 :]


def check_archive(path):
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            name, extra = (int.from_bytes(lengths[at : at + 2], "little") for at in (0, 2))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0, entry.filename


def check(folder, wanted, blob):
    path = folder / wanted["file"]
    check_archive(path)
    loaded = check_load(path, wanted, blob)
    torchs = io.BytesIO()
    torch.save(loaded, torchs)
    written = path.read_bytes()
    if wanted["values"]:
        # Python's pickler finds equal words again, so that the pickles differ; what they hold does not.
        return
    assert without_id(torchs.getvalue()) == without_id(written), "torch.save writes something else"


def main():
    folder = pathlib.Path(sys.argv[1])
    blob = (folder / "written.bin").read_bytes()
    files = json.loads((folder / "written.json").read_text())
    assert files
    for wanted in files:
        try:
            check(folder, wanted, blob)
        except Exception as error:
            error.add_note(f"in {wanted['file']}")
            raise
    print(f"{len(files)} files, {sum(len(wanted['tensors']) for wanted in files)} tensors")


main()
