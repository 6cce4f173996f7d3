"""The states that `tests/test_view write ROOT` saves: which tensors there are and what every element of them is, for tests that read a
step by other means than the library. Nothing here is read from what was written."""

import numpy as np

MESHES = [(1, 1, 1, 1, 1), (1, 1, 1, 1, 3), (2, 1, 1, 1, 2), (1, 3, 1, 1, 1), (2, 3, 1, 1, 2), (1, 5, 1, 1, 1), (1, 2, 1, 1, 4), (1, 2, 1, 1, 1)]  # of steps 1, 2, ...

# Of these tensors step 8, and step 1 of ROOT.other, have no bytes of their own, but those of older steps of ROOT: {name: step}.
REFERENCES = {"big.m": 6, "cols.v": 5, "i64": 5, "100%_%b": 5}
REFERRING, OTHER = 8, "other"  # OTHER: instead of a step number

# part, name, alias of, dtype, shape: the order is the number that a tensor's values hang on
TENSORS = [
    ("policy/model", "embed.weight", None, "f32", (67, 16)),
    ("policy/model", "head.weight", "embed.weight", "f32", (67, 16)),
    ("policy/model", "layers.0.q/weight", None, "bf16", (33, 7)),
    ("policy/model", "layers.1.up", None, "f16", (12, 5, 6)),
    ("policy/model", "100%_%b", None, "f32", (9,)),
    ("policy/model", "a", None, "i32", (4,)),
    ("policy/model", "a/b", None, "i32", (5,)),
    ("policy/model", "same", None, "u8", (6,)),
    ("policy", "model/same", None, "i8", (7,)),
    ("policy/model", "empty", None, "f32", (0, 5)),
    ("policy/model", "scalar", None, "f64", ()),
    ("optim", "big.m", None, "f32", (300, 1100)),
    ("optim", "cols.v", None, "f64", (7, 11, 13)),
    ("optim", "e5m2", None, "f8e5m2", (5, 7)),
    ("optim", "e4m3", None, "f8e4m3", (5, 7)),
    ("optim", "e8m0", None, "e8m0", (3, 1, 5, 2)),
    ("optim", "u4x2", None, "u4x2", (31,)),
    ("optim", "i64", None, "i64", (9, 9)),
    ("optim", "i16", None, "i16", (1, 19)),
    ("optim", "u64", None, "u64", (19, 1)),
    ("optim", "u32", None, "u32", (2, 3, 4)),
    ("optim", "u16", None, "u16", (8,)),
    ("optim", "bool", None, "bool", (6, 6)),
    ("optim", "scalar", None, "f32", ()),
]
BYTES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "f8e5m2": 1, "e8m0": 1, "u4x2": 1, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
         "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1}


def bits(t, step):
    """The elements of tensor t of a step as they are stored: unsigned integers of the type's size, in the tensor's shape."""
    _, name, alias, dtype, shape = TENSORS[t]
    if step in (REFERRING, OTHER):
        step = REFERENCES.get(name, 1 if step == OTHER else step)
    if alias:
        t = next(i for i, x in enumerate(TENSORS) if x[1] == alias and x[0] == TENSORS[t][0])
    g = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64)
    start = (t * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB + 1) % 2**64
    with np.errstate(over="ignore"):
        h = g * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        h ^= h >> np.uint64(29)
        h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    whole = (h % np.uint64(2000003)).astype(np.int64) - 1000001
    unsigned = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}[BYTES[dtype]]
    u = lambda n: np.uint64(n)  # noqa: E731
    if dtype == "f64":
        out = (whole / 4).view(np.uint64)
    elif dtype == "f32":
        out = whole.astype(np.float32).view(np.uint32)
    elif dtype == "bf16":
        out = ((h % u(255)).astype(np.int64) - 127).astype(np.float32).view(np.uint32) >> np.uint32(16)
    elif dtype == "f16":
        out = (h & u(0x83FF)) | (u(1) + h // u(65536) % u(30)) << u(10)
    elif dtype == "f8e5m2":
        out = (h & u(0x83)) | (u(1) + h // u(256) % u(30)) << u(2)
    elif dtype == "bool":
        out = h & u(1)
    else:
        out = h
    return out.astype(unsigned).reshape(shape)


def values(t, step):
    """The same as numbers, as HDF5 shows them."""
    dtype = TENSORS[t][3]
    b = bits(t, step)
    if dtype == "bf16":
        return (b.astype(np.uint32) << 16).view(np.float32).reshape(b.shape)
    if dtype == "f8e5m2":
        return (b.astype(np.uint16) << 8).view(np.float16).reshape(b.shape)
    shown = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8}
    return b.view(shown[dtype]) if dtype in shown else b
