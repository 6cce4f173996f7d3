#!/usr/bin/python3
"""A reader of checkpoints written from docs/checkpoint-format.md alone: no code of ours, no protobuf package, a crc32c of its own. It lists the
steps that count, checks every byte of them, puts every tensor together, and compares with values computed apart."""

import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import states  # noqa: E402

# ---- crc32c (Castagnoli), reflected, by table


def crc_table():
    table = []
    for i in range(256):
        c = i
        for _ in range(8):
            c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
        table.append(c)
    return table


TABLE = crc_table()


def crc32c(data):
    c = 0xFFFFFFFF
    for byte in data:
        c = TABLE[(c ^ byte) & 0xFF] ^ c >> 8
    return c ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283

# ---- protobuf's wire format


def varint(b, at):
    value = shift = 0
    while True:
        value |= (b[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not b[at - 1] & 0x80:
            return value, at


def fields(b):
    """{number: [values]}: integers for varint and fixed fields, bytes for the others."""
    out, at = {}, 0
    while at < len(b):
        key, at = varint(b, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(b, at)
        elif kind == 1:
            value, at = struct.unpack_from("<Q", b, at)[0], at + 8
        elif kind == 5:
            value, at = struct.unpack_from("<I", b, at)[0], at + 4
        else:
            assert kind == 2, f"wire type {kind}"
            n, at = varint(b, at)
            assert at + n <= len(b), "a field leaves its message"
            value, at = b[at:at + n], at + n
        out.setdefault(key >> 3, []).append(value)
    return out


def packed(message, number):
    """A packed column of varints; the writer may have cut it into several fields."""
    out = []
    for b in message.get(number, []):
        at = 0
        while at < len(b):
            value, at = varint(b, at)
            out.append(value)
    return out


# ---- metadata.pb

DTYPE = {1: ("f64", 8), 2: ("f32", 4), 3: ("f16", 2), 4: ("bf16", 2), 5: ("f8e4m3", 1), 6: ("f8e5m2", 1), 7: ("e8m0", 1), 8: ("u4x2", 1), 9: ("i64", 8),
         10: ("i32", 4), 11: ("i16", 2), 12: ("i8", 1), 13: ("u64", 8), 14: ("u32", 4), 15: ("u16", 2), 16: ("u8", 1), 17: ("bool", 1)}
BLOCK, PAGE = 1 << 20, 4096


class Damaged(Exception):
    pass


def need(condition, text):
    if not condition:
        raise Damaged(text)


def read_metadata(path):
    raw = path.read_bytes()
    need(len(raw) >= 24 and raw[:8] == b"TESSERA\x89", "magic")
    version, length, crc = struct.unpack_from("<IQI", raw, 8)
    need(length == len(raw) - 24 and crc32c(raw[24:]) == crc, "length or checksum of metadata.pb")
    m = fields(raw[24:])
    need(m.get(21, [1])[0] == version, "version")
    assert version in (1, 2), f"a format of version {version}"
    need(version == 2 or 22 not in m, "owners in version 1")
    return m


def product(v):
    n = 1
    for x in v:
        n *= x
    return n


def pieces_of(m):
    """Tensors with their pieces: box, run, file, offset, bytes, checksums."""
    parts = [p.decode() for p in m.get(10, [])]
    off, length = packed(m, 12), packed(m, 13)
    runs = list(zip(packed(m, 14), packed(m, 15), packed(m, 16)))
    file, page = packed(m, 17), packed(m, 18)
    crcs = [c for b in m.get(19, []) for c in struct.unpack(f"<{len(b) // 4}I", b)]
    box_at = run_at = since = i = crc_at = 0
    out = []
    for raw in m.get(11, []):
        t = fields(raw)
        dtype, size = DTYPE[t[3][0]]
        shape = tuple(packed(t, 4))
        tensor = {"owner_name": t[9][0].decode() if 9 in t else None,
                  "part": parts[t[1][0]], "name": t[2][0].decode(), "dtype": dtype, "shape": shape, "trainable": bool(t[5][0]),
                  "alias": t[6][0].decode() if 6 in t else None, "pieces": []}
        for _ in range(t[7][0]):
            box = off[box_at:box_at + len(shape)], length[box_at:box_at + len(shape)]
            box_at += len(shape)
            run = 0, product(box[1])
            if run_at < len(runs) and runs[run_at][0] == since:
                run = runs[run_at][1], runs[run_at][1] + runs[run_at][2]
                run_at, since = run_at + 1, 0
            else:
                since += 1
            n = (run[1] - run[0]) * size
            blocks = -(-n // BLOCK)
            tensor["pieces"].append({"box": box, "run": run, "file": file[i], "offset": page[i] * PAGE, "bytes": n, "crc": crcs[crc_at:crc_at + blocks],
                                     "number": len(tensor["pieces"])})
            crc_at += blocks
            i += 1
        out.append(tensor)
    need(i == len(file) == len(page) and box_at == len(off) == len(length) and run_at == len(runs) and crc_at == len(crcs), "columns do not fit")
    return out


# ---- which steps count


def files_of(m, folder):
    """The files with their folders: the step's, or an owner's."""
    owners = [folder] * 1
    for o in map(fields, m.get(22, [])):
        url = o[4][0].decode() if 4 in o else None
        owners.append((pathlib.Path(re.sub("^file:", "", url)) if url else folder.parent) / f"step-{o[1][0]:012d}")
    return [{"name": f[1][0].decode(), "bytes": f[2][0], "header": f[3][0], "crc": f[4][0], "own": not f.get(5, [0])[0],
             "path": owners[f.get(5, [0])[0]] / f[1][0].decode()} for f in map(fields, m.get(9, []))]


def read_step(folder):
    m = read_metadata(folder / "metadata.pb")
    for f in files_of(m, folder):
        need(f["path"].is_file() and f["path"].stat().st_size == f["bytes"], f"{f['name']} is missing or has another length")
    return m


def steps(root):
    """Step numbers that count, ascending; and those that are damaged."""
    good, bad = [], []
    for entry in root.iterdir():
        if not re.fullmatch(r"step-\d{12,}", entry.name) or not (entry / "metadata.pb").exists():
            continue
        try:
            m = read_step(entry)
            need(m[4][0] == int(entry.name[5:]), "another step's metadata")
            good.append(m[4][0])
        except Damaged:
            bad.append(int(entry.name[5:]))
    return sorted(good), sorted(bad)


# ---- bytes


def boxes_of_run(length, begin, end):
    """A run of a box's row-major order as boxes: (offset in the box, lengths), in the run's order."""
    n = len(length)
    if begin >= end:
        return
    if not n:
        yield (), ()
        return
    row = [product(length[d + 1:]) for d in range(n)]  # elements of one index of dimension d
    at = begin
    while at < end:
        d = next(d for d in range(n) if at % row[d] == 0 and row[d] <= end - at)
        index = at // row[d] % length[d]
        count = min((end - at) // row[d], length[d] - index)
        yield (tuple(at // row[k] % length[k] for k in range(d)) + (index,) + (0,) * (n - d - 1),
               (1,) * d + (count,) + tuple(length[d + 1:]))
        at += count * row[d]


def check_piece(data, p, where):
    need(len(data) == p["bytes"], f"{where}: short")
    for b, crc in enumerate(p["crc"]):
        need(crc32c(data[b * BLOCK:(b + 1) * BLOCK]) == crc, f"{where}: block {b}")


def assemble(folder, m, t):
    """The tensor's elements as unsigned integers of their size."""
    dtype = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}[dict(DTYPE.values())[t["dtype"]]]
    whole, filled = np.zeros(t["shape"], dtype), np.zeros(t["shape"], np.int32)
    for p in t["pieces"]:
        f = files_of(m, folder)[p["file"]]
        assert f["own"] == (t["owner_name"] is None), t
        with open(f["path"], "rb") as h:
            h.seek(p["offset"])
            data = h.read(p["bytes"])
        check_piece(data, p, f"{t['part']}/{t['name']} in {f['name']}")
        flat, at = np.frombuffer(data, dtype), 0
        found = list(boxes_of_run(p["box"][1], *p["run"]))
        assert len(found) <= max(1, 2 * len(t["shape"]) - 1), found
        for off, length in found:
            n = product(length)
            place = tuple(slice(a + b, a + b + k) for a, b, k in zip(p["box"][0], off, length))
            whole[place] = flat[at:at + n].reshape(length)
            filled[place] += 1
            at += n
        assert at == flat.size
        check_dataset(f["path"], t, p, flat)
    need((filled == 1).all(), f"{t['name']}: holes or overlaps")
    return whole


def check_dataset(path, t, p, flat):
    """The same bytes are the dataset NAME/pN of the shard."""
    with h5py.File(path, "r") as h:
        d = h[f"{t['owner_name'] or t['name']}/p{p['number']}"]
        assert d.id.get_offset() == p["offset"] and tuple(d.attrs["run"]) == p["run"], d
        assert d.shape == (tuple(p["box"][1]) if p["run"] == (0, product(p["box"][1])) else (p["run"][1] - p["run"][0],))
        assert d.size * flat.itemsize == p["bytes"]
        if t["shape"]:
            assert (list(d.attrs["box_offset"]), list(d.attrs["box_length"])) == tuple(map(list, p["box"])) and tuple(d.attrs["global_shape"]) == t["shape"]


def check_files(folder, m, tensors):
    """Every byte: headers by their checksum, payloads by theirs (done), the rest is zero."""
    for i, f in enumerate(files_of(m, folder)):
        if not f["own"]:
            continue  # but for what is referred to, the owner's to check
        data = f["path"].read_bytes()
        need(crc32c(data[:f["header"]]) == f["crc"], f"{f['name']}: header")
        at = f["header"]
        for offset, n in sorted((p["offset"], p["bytes"]) for t in tensors for p in t["pieces"] if p["file"] == i and p["bytes"]):
            need(offset >= at and not any(data[at:offset]), f"{f['name']}: padding before {offset}")
            at = offset + n
        need(not any(data[at:]), f"{f['name']}: padding at the end")


def check_step(root, step, of=None):
    """of: whose values, where the number does not say it."""
    folder = root / f"step-{step:012d}"
    refers = states.REFERRING in (step, of) or of == states.OTHER
    m = read_step(folder)
    tensors = pieces_of(m)
    names = [(t["part"], t["name"]) for t in tensors]
    assert names == sorted(names) == sorted(x[:2] for x in states.TENSORS), names
    check_files(folder, m, tensors)
    for t in tensors:
        number = next(i for i, x in enumerate(states.TENSORS) if x[:2] == (t["part"], t["name"]))
        _, _, alias, dtype, shape = states.TENSORS[number]
        assert (t["alias"], t["dtype"], t["shape"], t["trainable"]) == (alias, dtype, shape, number % 3 != 0), t
        holder = next(x for x in tensors if (x["part"], x["name"]) == (t["part"], t["alias"])) if t["alias"] else t
        got, want = assemble(folder, m, holder), states.bits(number, of or step)
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes(), (step, t["name"])
    mesh = states.MESHES[1 if of == states.OTHER else step - 1]
    assert (m[4][0], tuple(packed(m, 6)), m[7][0], m[8][0]) == (step, mesh, product(mesh), b"test")
    assert m[2][0] and all(f"{m[2][0]:016x}" in f["name"] for f in files_of(m, folder) if f["own"])
    assert {t["name"] for t in tensors if t["owner_name"]} == (set(states.REFERENCES) if refers else set())
    parts = [p.decode() for p in m[10]]
    blobs = {}
    for b in map(fields, m.get(20, [])):
        blobs[parts[b[1][0]], b[2][0].decode(), b[3][0] >> 1 ^ -(b[3][0] & 1)] = b[4][0]  # sint32: zigzag
    want = {("extra", "config", -1): b"a: 1\n"}
    want.update({("rng", "state", r): struct.pack("<i", r) for r in range(product(mesh))})
    assert blobs == want, blobs
    return sum(len(boxes) > 1 for t in tensors for p in t["pieces"] for boxes in [list(boxes_of_run(p["box"][1], *p["run"]))])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def refused(root, step):
    try:
        check_step(root, step)
    except Damaged:
        return True
    return False


def check_rules(root):
    """What does not count, and that damage is seen."""
    assert steps(root) == (list(range(1, len(states.MESHES) + 1)), [])
    latest = (root / "LATEST").read_text()
    assert latest == f"step-{len(states.MESHES):012d}\n", latest
    at = lambda s: root / f"step-{s:012d}"  # noqa: E731
    shutil.copytree(at(1), root / "step-000000000009.bad-00000000000000aa")
    shutil.copytree(at(1), at(10))
    (at(10) / "metadata.pb").unlink()
    shutil.copytree(at(1), at(11))  # another step's
    flip(at(2) / "metadata.pb", 100)
    model = sorted(at(3).glob("policy.model-*.h5"))[0]
    with open(model, "ab") as f:
        f.write(b"\0")
    sorted(at(4).glob("*-*.h5"))[0].unlink()
    assert steps(root) == ([1, 5, 6, 7, 8], [2, 3, 4, 11]), steps(root)
    big = max(at(6).glob("optim-*.h5"), key=lambda p: p.stat().st_size)
    for place in (0, 5000, big.stat().st_size // 2, big.stat().st_size - 1):
        flip(big, place)
        assert 6 in steps(root)[0] and refused(root, 6), place
        flip(big, place)
    assert not refused(root, 6) and not refused(root, 8)
    flip(big, big.stat().st_size // 2)  # an owner's byte that is referred to
    assert refused(root, 8)
    flip(big, big.stat().st_size // 2)
    big.rename(big.with_suffix(".away"))
    assert steps(root) == ([1, 5, 7], [2, 3, 4, 6, 8, 11]), steps(root)
    big.with_suffix(".away").rename(big)


def main():
    program = os.path.join(os.environ["TESSERA_BUILD"], "tests", "test_view")
    with tempfile.TemporaryDirectory(prefix="tessera-test-") as name:
        root = pathlib.Path(name) / "root"
        subprocess.run([program, "write", root], check=True)
        ragged = sum(check_step(root, step) for step in range(1, len(states.MESHES) + 1))
        check_step(pathlib.Path(f"{root}.other"), 1, states.OTHER)
        assert ragged > 20, f"only {ragged} runs of several boxes"
        check_rules(root)
    print(f"read as the document says; {ragged} runs of several boxes")


if __name__ == "__main__":
    sys.exit(main())
