"""Writes data files with Python's own writers into a folder, and expected.json with the samples that they hold.

    write.py FOLDER [image] [parquet]

Arrays are {"shape", "values"}: whole numbers as they are, floats as the bits of the double. Bytes are {"bytes"}.
"""

import csv
import gzip
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import numpy as np

folder = Path(sys.argv[1])
expected = []
chance = random.Random(7)
numbers = np.random.default_rng(7)


def array(value):
    value = np.asarray(value)
    if value.dtype.kind == "f":
        flat = value.astype("<f8").reshape(-1).view("<u8")
    else:
        flat = value.reshape(-1).astype(object)
    return {"shape": list(value.shape), "values": [int(number) for number in flat]}


def case(kind, paths, samples, **options):
    expected.append({"kind": kind, "paths": paths, "samples": samples, **options})


def some(dtype, shape):
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return numbers.integers(0, 2, shape).astype(dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return (numbers.standard_normal(shape) * 1e3).astype(dtype)
    info = np.iinfo(dtype)
    # What U64 has above I64 is refused.
    return numbers.integers(info.min, min(info.max, 2**63 - 1), shape, dtype=dtype, endpoint=True)


def npy():
    dtypes = ["?"] + [order + kind for order in "<>" for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")]
    for number, dtype in enumerate(dtypes):
        for shape in [(3,), (2, 3), (4, 2, 3), (0, 2), (2, 0)]:
            for order in "CF":
                value = np.asarray(some(np.dtype(dtype).newbyteorder("="), shape).astype(dtype), order=order)
                path = f"{number}{order}{'x'.join(map(str, shape))}.npy"
                np.save(folder / path, value)
                case("npy", [path], [{"x": array(row)} for row in value])
    value = some("f4", (3, 2))
    with open(folder / "two.npy", "wb") as out:
        np.lib.format.write_array(out, value, version=(2, 0))
    case("npy", ["two.npy"], [{"x": array(row)} for row in value])
    arrays = {"x": some("f8", (5, 70)), "label": some("u1", (5,)), "flags": some("?", (5, 2))}
    samples = [{name: array(value[row]) for name, value in arrays.items()} for row in range(5)]
    np.savez(folder / "stored.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    case("npz", ["stored.npz"], samples)
    case("npz", ["packed.npz"], samples)


def idx():
    codes = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}
    for dtype, code in codes.items():
        value = some(np.dtype(dtype).newbyteorder("="), (4, 3, 2)).astype(dtype)
        content = bytes([0, 0, code, 3]) + np.array(value.shape, ">i4").tobytes() + value.tobytes()
        for path, packed in [(f"{code}.idx", content), (f"{code}.idx.gz", gzip.compress(content))]:
            (folder / path).write_bytes(packed)
            case("idx", [path], [{"x": array(row)} for row in value])


def tokens():
    ids = numbers.integers(0, 65536, 1000).astype("<u2")
    (folder / "tokens.bin").write_bytes(ids.tobytes())
    windows = range(0, 1000 - 17 + 1, 5)
    samples = [{"input": array(ids[at : at + 16]), "target": array(ids[at + 1 : at + 17])} for at in windows]
    case("tokens", ["tokens.bin"], samples)


def texts():
    alphabet = ["a", "é", "\U0001f600", ",", '"', '""', "\n", "\r\n", " ", ";", "'", "x" * 50]
    text = lambda: "".join(chance.choice(alphabet) for _ in range(chance.randrange(8)))
    for number, (delimiter, quoting) in enumerate([(",", csv.QUOTE_MINIMAL), (";", csv.QUOTE_ALL), ("\t", csv.QUOTE_NONNUMERIC)]):
        rows = [[text() for _ in range(3)] for _ in range(200)]
        # A row of nothing but blanks is a blank line to some.
        rows = [row if "".join(row).strip() else ["-"] * 3 for row in rows]
        path = f"{number}.csv"
        with open(folder / path, "w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, delimiter=delimiter, quoting=quoting)
            writer.writerow(["one", "two", "three"])
            writer.writerows(rows)
        with open(folder / path, newline="", encoding="utf-8") as read:
            again = list(csv.reader(read, delimiter=delimiter))[1:]
        case("csv", [path], [dict(zip(["one", "two", "three"], row)) for row in again], delimiter=delimiter)
    lines = [chance.choice(["", "plain", "\t", "ü" * chance.randrange(100)]) for _ in range(300)]
    (folder / "lines.txt").write_bytes("\n".join(lines + ["last"]).encode())
    case("lines", ["lines.txt"], [{"text": line} for line in lines + ["last"]])
    values = [{"s": text(), "i": chance.randrange(-(2**63), 2**63), "l": [chance.randrange(9) for _ in range(3)]} for _ in range(100)]
    dump = lambda value: json.dumps(value, ensure_ascii=chance.random() < 0.5)
    (folder / "a.jsonl").write_text("".join(dump(value) + "\n" for value in values), encoding="utf-8")
    case("jsonl", ["a.jsonl"], [{**value, "l": array(np.array(value["l"], np.int64))} for value in values])


def archives():
    deep = "folder/" * 30
    names = ["000/a", "000/b.c/d", "long" * 40, deep + "x", "ünicode", deep + "é" * 60]
    for form, name in [(tarfile.USTAR_FORMAT, "ustar"), (tarfile.PAX_FORMAT, "pax"), (tarfile.GNU_FORMAT, "gnu")]:
        keys = [key for key in names if form != tarfile.USTAR_FORMAT or len(key.encode()) < 90]
        samples = []
        for path, mode in [(f"{name}.tar", "w"), (f"{name}.tar.gz", "w:gz")]:
            samples = []
            with tarfile.open(folder / path, mode, format=form) as out:
                directory = tarfile.TarInfo("000")
                directory.type = tarfile.DIRTYPE
                out.addfile(directory)
                for key in keys:
                    sample = {"__key__": key}
                    for field in ["jpg", "seg.PNG", "cls"]:
                        content = chance.randbytes(chance.choice([0, 1, 511, 512, 513, 5000]))
                        info = tarfile.TarInfo(f"{key}.{field}")
                        info.size = len(content)
                        info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
                        out.addfile(info, io.BytesIO(content))
                        sample[field.lower()] = {"bytes": list(content)}
                    link = tarfile.TarInfo(f"{key}.link")
                    link.type, link.linkname = tarfile.SYMTYPE, "nowhere" * 5
                    out.addfile(link)
                    samples.append(sample)
            case("webdataset", [path], samples)


def images():
    from PIL import Image

    for mode, ending, options in [("RGB", "jpg", {"quality": 95}), ("L", "jpg", {}), ("RGB", "png", {}), ("LA", "png", {}),
                                  ("RGBA", "png", {}), ("P", "png", {}), ("RGB", "jpeg", {"progressive": True})]:
        grid = np.add.outer(np.arange(60), np.arange(90))
        pixels = np.stack([grid, grid[::-1], grid * 255 // 150], -1).astype(np.uint8)
        name = f"{mode}{len(options)}.{ending}"
        path = folder / "images" / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert(mode).save(path, **options)
    for path in sorted((folder / "images" / "class").iterdir(), key=lambda path: path.name):
        image = Image.open(path).convert("RGB")
        small = image.resize((45, 30), Image.BILINEAR)
        width, height = 36 * 90 // 60, 36
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        centre = image.resize((width, height), Image.BILINEAR).crop((left, top, left + 32, top + 32))
        planes = lambda image: array(np.asarray(image).transpose(2, 0, 1))
        case("image", ["images", path.name], [{"resized": planes(small), "centre": planes(centre)}])


def parquet():
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 50
    columns = {
        "i": pa.array(some("i4", rows)), "u": pa.array(some("u2", rows)), "l": pa.array(some("i8", rows)),
        "f": pa.array(some("f4", rows)), "b": pa.array(some("?", rows).astype(bool)),
        "s": pa.array([None if row % 7 == 0 else f"text {row}é" for row in range(rows)]),
        "d": pa.array([[row, row + 1] if row % 3 else [] for row in range(rows)], pa.list_(pa.int32())),
        "raw": pa.array([bytes([row]) * row for row in range(rows)]),
    }
    table = pa.table(columns)
    samples = []
    for row in table.to_pylist():
        sample = {name: value for name, value in row.items() if value is not None}
        sample["f"] = array(np.float32(row["f"]))
        sample["d"] = array(np.array(row["d"], np.int64))
        sample["raw"] = {"bytes": list(row["raw"])}
        samples.append(sample)
    for number, (codec, version) in enumerate([("snappy", "1.0"), ("zstd", "2.0"), ("gzip", "1.0"), ("none", "2.0"), ("lz4", "1.0")]):
        path = f"{number}.parquet"
        pq.write_table(table, folder / path, compression=codec, data_page_version=version, row_group_size=20)
        case("parquet", [path], samples)


npy()
idx()
tokens()
texts()
archives()
for extra in sys.argv[2:]:
    {"image": images, "parquet": parquet}[extra]()
(folder / "expected.json").write_text(json.dumps(expected))
