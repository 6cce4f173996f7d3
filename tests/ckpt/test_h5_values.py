#!/usr/bin/python3
"""What other people's tools see in a shard file: h5py and h5dump, against values computed here.

tests/test_h5shard writes the sample; this script knows only the documented attributes and the value of element g of each dtype."""
import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np

DTYPES = ("f64 f32 f16 bf16 f8e4m3 f8e5m2 e8m0 u4x2 i64 i32 i16 i8 u64 u32 u16 u8 bool").split()
SHAPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": np.float32, "f8e5m2": np.float16,
          "i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8,
          "u64": np.uint64, "u32": np.uint32, "u16": np.uint16}


def value(dtype, g):
    """Element g as a number."""
    whole = (g * 7 + 3) % 97
    if dtype in ("f64", "f32", "f16", "bf16"):
        return (whole - 48) * 0.25
    if dtype == "f8e5m2":
        return (-1 if g % 3 == 0 else 1) * (1 + g % 4 / 4) * 2.0 ** (g % 5 - 2)
    if dtype in ("f8e4m3", "e8m0", "u4x2"):
        return (g * 7 + 3) % 256
    if dtype == "bool":
        return whole % 2
    return whole - 48 if dtype[0] == "i" else whole


def check_dataset(tensor, d, covered):
    dtype = d.attrs["dtype"]
    dtype = dtype.decode() if isinstance(dtype, bytes) else dtype
    assert tensor.endswith("." + dtype), (tensor, dtype)
    assert d.dtype == SHAPES.get(dtype, np.uint8), (d.name, d.dtype)
    begin, end = (int(v) for v in d.attrs["run"])
    shape = tuple(int(v) for v in d.attrs["global_shape"]) if "global_shape" in d.attrs else ()
    assert ("box_offset" in d.attrs) == ("box_length" in d.attrs) == bool(shape)
    off = tuple(int(v) for v in d.attrs["box_offset"]) if shape else ()
    length = tuple(int(v) for v in d.attrs["box_length"]) if shape else ()
    volume = int(np.prod(length, dtype=np.int64))
    whole = (begin, end) == (0, volume)
    assert d.shape == (length if whole else (end - begin,)), (d.name, d.shape, length, begin, end)
    ids = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    box = ids[tuple(slice(o, o + n) for o, n in zip(off, length))].reshape(-1)[begin:end]
    got = np.asarray(d[()]).reshape(-1)
    want = [value(dtype, int(g)) for g in box]
    assert list(got) == want, (d.name, got, want)
    seen = covered.setdefault(tensor, np.zeros(ids.size, dtype=int))
    seen[box] += 1
    return whole, got.size


def check_h5py(path):
    covered, kinds = {}, set()
    with h5py.File(path, "r") as f:
        def visit(name, d):
            if isinstance(d, h5py.Dataset):
                whole, n = check_dataset(name.rsplit("/", 1)[0], d, covered)
                kinds.add((whole, n > 0, d.ndim))
        f.visititems(visit)
        assert set(f.keys()) >= {"deep", "cube.f32", "model.layers.2.weight.f32"}, list(f.keys())
        assert set(f["deep"].keys()) >= {"er", "empty.f32"}
    assert len(covered) == 4 * len(DTYPES), len(covered)
    for tensor, seen in covered.items():
        assert (seen == 1).all(), (tensor, seen)
    assert kinds >= {(True, True, 2), (True, True, 3), (True, True, 0), (True, False, 2), (False, True, 1), (False, False, 1)}, kinds


def check_h5dump(path):
    def dump(dataset):
        return subprocess.run(["h5dump", "-y", "-w", "0", "-d", dataset, path], check=True, capture_output=True, text=True).stdout
    text = dump("/cube.bf16/p0")
    data = text[text.index("DATA {") + 6:text.index("}", text.index("DATA {"))]
    assert [float(v) for v in data.replace(",", " ").split()] == [value("bf16", g) for g in range(24)], text
    assert "16-bit little-endian floating-point" in text, text
    for name in ("global_shape", "box_offset", "box_length", "run", "dtype"):
        assert f'ATTRIBUTE "{name}"' in text, (name, text)
    assert "H5T_STD_I16LE" in dump("/cube.i16/p0") and "H5T_IEEE_F32LE" in dump("/cube.f32/p0")


def main():
    program = os.path.join(os.environ["TESSERA_BUILD"], "tests", "test_h5shard")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sample.h5")
        subprocess.run([program, "write", path], check=True)
        check_h5py(path)
        check_h5dump(path)
    print("every value, shape and attribute as written")


if __name__ == "__main__":
    sys.exit(main())
