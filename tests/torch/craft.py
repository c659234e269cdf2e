"""Checkpoints that today's torch.save does not write: older containers, other byte orders, other zip layouts."""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict

import torch

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
SYS_INFO = {"protocol_version": PROTOCOL_VERSION, "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4}}


class StorageStub:
    """Stands for a storage in a pickle; `id` is its persistent id."""

    def __init__(self, id):
        self.id = id


class TensorStub:
    """A tensor over a stub, by one of torch's rebuild functions."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class StubPickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, StorageStub) else None


def pickled(value, protocol=2):
    out = io.BytesIO()
    StubPickler(out, protocol).dump(value)
    return out.getvalue()


def legacy(value, storages, protocol=2, sys_info=SYS_INFO):
    """A file as torch.save wrote it until 1.5. `storages` is a list of (key, elements, bytes)."""
    keys = [key for key, _, _ in storages]
    parts = [pickled(part, protocol) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, sys_info, value, keys)]
    return b"".join(parts) + b"".join(struct.pack("<q", n) + data for _, n, data in storages)


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def legacy_with_views():
    """As torch before 0.4 wrote storages that are parts of others: with a view in the persistent id."""
    root = lambda view: StorageStub(("storage", torch.FloatStorage, "94023", "cpu", 12, view))
    rebuild = torch._utils._rebuild_tensor
    value = OrderedDict()
    value["whole"] = TensorStub(rebuild, root(None), 0, (3, 4), (4, 1))
    value["part"] = TensorStub(rebuild, root(("94100", 4, 6)), 0, (2, 3), (3, 1))
    value["part_of_part"] = TensorStub(rebuild, root(("94100", 4, 6)), 2, (2,), (2,))
    value["tail"] = TensorStub(rebuild, root(("94101", 10, 2)), 0, (2,), (1,))
    numbers = [i + 0.5 for i in range(12)]
    tensor = torch.tensor(numbers)
    expected = OrderedDict(whole=tensor.reshape(3, 4), part=tensor[4:10].reshape(2, 3),
                           part_of_part=torch.stack([tensor[6], tensor[8]]), tail=tensor[10:])
    return legacy(value, [("94023", 12, floats(*numbers))]), expected


def tar_checkpoint():
    """The tar form, which torch wrote before 0.1.10: storages, views of them, tensors, and a pickle over both."""
    numbers = [float(i) for i in range(20)]
    ints = list(range(7))
    storages = pickled(2)
    storages += pickled((11, "cpu", torch.FloatStorage)) + struct.pack("<q", 20) + floats(*numbers)
    storages += pickled((12, "cpu", torch.LongStorage)) + struct.pack("<q", 7) + struct.pack("<7q", *ints)
    storages += pickled([(13, 11, 5, 10)])  # storage 13 is ten elements of 11

    def tensor(key, storage, kind, sizes, strides, offset):
        n = len(sizes)
        return pickled((key, storage, kind)) + struct.pack(f"<ii{n}q{n}qq", n, 0, *sizes, *strides, offset)

    tensors = pickled(4)
    tensors += tensor(101, 11, torch.FloatTensor, (4, 5), (5, 1), 0)
    tensors += tensor(102, 11, torch.FloatTensor, (5, 2), (1, 5), 10)
    tensors += tensor(103, 12, torch.LongTensor, (3,), (2,), 1)
    tensors += tensor(104, 13, torch.FloatTensor, (2, 2), (4, 1), 1)
    value = OrderedDict([("weight", StorageStub("101")), ("transposed", StorageStub("102")),
                         ("steps", StorageStub("103")), ("of_view", StorageStub("104")), ("epoch", 4)])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("storages", storages), ("tensors", tensors), ("pickle", pickled(value))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def rezip(data, compression=zipfile.ZIP_STORED, rename=lambda name: name, drop=(), add=(), force_zip64=False,
          comment=b"", order=None, seekable=True):
    """The same records, written by Python's zipfile: unaligned, and otherwise as asked."""

    class Pipe(io.BytesIO):
        """Cannot seek, so that zipfile writes data descriptors."""

        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation

        def tell(self):
            raise io.UnsupportedOperation

    out = io.BytesIO() if seekable else Pipe()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.comment = comment
        records = [record for record in entries(data) if record[0].split("/", 1)[1] not in drop]
        for name, content in sorted([*records, *add], key=order) if order else [*records, *add]:
            info = zipfile.ZipInfo(rename(name))
            info.compress_type = compression
            with archive.open(info, "w", force_zip64=force_zip64) as entry:
                entry.write(content)
    return out.getvalue()


def big_endian(data, element_bytes):
    """The same archive as a big-endian machine writes it. `element_bytes` gives the unit that is swapped for a key."""
    changed = []
    for name, content in entries(data):
        _, _, inner = name.partition("/")
        if inner == "byteorder":
            content = b"big"
        elif inner.startswith("data/"):
            unit = element_bytes[inner.removeprefix("data/")]
            content = b"".join(content[i:i + unit][::-1] for i in range(0, len(content), unit))
        changed.append((name, content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in changed:
            archive.writestr(name, content)
    return out.getvalue()


def storage_units(value):
    """For each storage key of a flat dict saved by torch.save, the bytes that are swapped together."""
    units, seen = {}, {}
    for tensor in value.values():
        pointer = tensor.untyped_storage()._cdata
        if pointer not in seen:
            seen[pointer] = str(len(seen))
            parts = 2 if tensor.dtype.is_complex else 1
            units[seen[pointer]] = tensor.element_size() // parts
    return units


def sparse_zip64(path, big_bytes):
    """An archive over 4 GiB whose first storage is a hole, written by hand so that it costs no disk. The tensor `after`
    lies behind it."""
    names = {"big": "0", "after": "1"}
    storage = lambda kind, key, n: StorageStub(("storage", kind, key, "cpu", n))
    rebuild = torch._utils._rebuild_tensor_v2
    value = {
        "big": TensorStub(rebuild, storage(torch.ByteStorage, names["big"], big_bytes), 0, (big_bytes,), (1,), False,
                          OrderedDict()),
        "after": TensorStub(rebuild, storage(torch.FloatStorage, names["after"], 6), 0, (2, 3), (3, 1), False,
                            OrderedDict()),
    }
    after = floats(*range(6))
    crc, block = 0, bytes(1 << 24)
    for start in range(0, big_bytes, len(block)):
        crc = zlib.crc32(block[:big_bytes - start], crc)
    records = [("big/data.pkl", pickled(value), None), ("big/byteorder", b"little", None),
               ("big/data/0", None, (big_bytes, crc)), ("big/data/1", after, None), ("big/version", b"3\n", None)]
    central = b""
    with open(path, "wb") as file:
        for name, data, hole in records:
            size, checksum = hole or (len(data), zlib.crc32(data))
            offset = file.tell()
            wide = size >= 0xFFFFFFFF
            name = name.encode()
            sizes = struct.pack("<II", *([0xFFFFFFFF] * 2 if wide else [size, size]))
            extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
            common = struct.pack("<HHHHHI", 45, 0x800, 0, 0, 0x21, checksum) + sizes
            file.write(b"PK\3\4" + common + struct.pack("<HH", len(name), len(extra)) + name + extra)
            if hole:
                file.seek(size, 1)
            else:
                file.write(data)
            fields = ([size, size] if wide else []) + ([offset] if offset >= 0xFFFFFFFF else [])
            extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
            where = min(offset, 0xFFFFFFFF)
            central += b"PK\1\2" + struct.pack("<H", 45) + common
            central += struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, where) + name + extra
        start = file.tell()
        file.write(central)
        end = file.tell()
        n = len(records)
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, n, n, len(central), start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, len(central), 0xFFFFFFFF, 0))
    return {"after": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
