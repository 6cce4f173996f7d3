#!/usr/bin/python3
"""view.h5 as h5py shows it: every tensor whole, against values computed here, of states cut over tensor-parallel, pipeline and ZeRO ranks;
from any folder, after the step was moved, with a decoy beside the reader; and what a missing shard looks like."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import states  # noqa: E402

SHOWN = {"bf16": np.float32, "f8e5m2": np.float16}  # what h5py makes of types that numpy has not
# a tensor that is a group's name as well, and one whose path another one has
MOVED = {("policy/model", "a"): "policy/model/a/_", ("policy/model", "same"): "policy/model/same_"}


LAST = len(states.MESHES)


def path_of(t):
    part, name = states.TENSORS[t][:2]
    return MOVED.get((part, name), f"{part}/{name}")


def check_tensor(f, t, step):
    part, name, alias, dtype, shape = states.TENSORS[t]
    d = f[path_of(t)]
    want = states.values(t, step)
    at = f"step {step} {part}/{name}"
    assert d.shape == shape, (at, d.shape)
    assert d.dtype == want.dtype, (at, d.dtype, want.dtype)
    got = d[()]
    assert np.asarray(got).tobytes() == want.tobytes(), (at, got, want)
    own = t if not alias else next(i for i, x in enumerate(states.TENSORS) if x[1] == alias)
    assert d.attrs["dtype"] in (dtype, dtype.encode()), at
    assert d.attrs["trainable"] == (own % 3 != 0), at
    assert d.is_virtual == (want.size > 0), at
    if shape and want.size > 3:  # a part of it alone
        some = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in shape)
        assert d[some].tobytes() == want[some].tobytes(), at


def check_view(path, step):
    with h5py.File(path, "r") as f:
        assert f.attrs["step"] == (1 if step == states.OTHER else step)
        for t in range(len(states.TENSORS)):
            check_tensor(f, t, step)
        link = f.get("policy/model/head.weight", getlink=True)
        assert isinstance(link, h5py.SoftLink) and link.path == "/policy/model/embed.weight", link
        found = []
        f.visititems(lambda name, d: found.append(name) if isinstance(d, h5py.Dataset) else None)
        assert sorted(found) == sorted(path_of(t) for t, x in enumerate(states.TENSORS) if not x[2]), found


def folder(root, step):
    return root / f"step-{step:012d}"


def check_places(root, tmp):
    """From another folder, moved, through a link, and beside a decoy."""
    step, old = 5, folder(root, 5)
    work = tmp / "work"
    work.mkdir()
    for shard in old.glob("*.h5"):
        if shard.name != "view.h5":
            with h5py.File(work / shard.name, "w") as f:
                f["decoy"] = 1
    os.chdir(work)
    check_view(old / "view.h5", step)
    check_view(os.path.relpath(old / "view.h5"), step)
    moved = tmp / "else" / "where"
    moved.parent.mkdir()
    shutil.move(old, moved)
    check_view(moved / "view.h5", step)
    (tmp / "link").symlink_to(moved)
    check_view(tmp / "link" / "view.h5", step)
    os.chdir(moved)
    check_view("view.h5", step)
    os.chdir(tmp)
    return moved


def check_missing(step_dir, step):
    """A shard that is not there shows as NaN, or 0 where the type has no NaN, and nothing complains: verify does."""
    lost = sorted(step_dir.glob("optim-*.h5"))[1]
    lost.rename(lost.with_suffix(".away"))
    seen = set()
    with h5py.File(step_dir / "view.h5", "r") as f:
        for t, (part, name, _, dtype, _) in enumerate(states.TENSORS):
            got, want = np.asarray(f[path_of(t)][()]), states.values(t, step)
            if part != "optim":
                assert got.tobytes() == want.tobytes(), name
                continue
            fill = {"f8e4m3": 0x7F, "e8m0": 0xFF}.get(dtype, np.nan if want.dtype.kind == "f" else 0)
            gone = np.isnan(got) if want.dtype.kind == "f" else got == fill
            assert (gone | (got == want)).all(), (name, got, want)
            if gone.any() and not gone.all():
                seen.add(dtype)
    assert seen >= {"f32", "f8e4m3", "f8e5m2"}, seen
    lost.with_suffix(".away").rename(lost)


def tool(*words):
    return subprocess.run([os.environ["TESSERA"], "ckpt", *map(str, words)], capture_output=True, text=True)


def check_tool(root):
    view = folder(root, LAST) / "view.h5"
    view.unlink()
    r = tool("view", root)
    assert r.returncode == 0 and f"step-{LAST:012d}/view.h5: 24 tensors" in r.stdout, r
    check_view(view, LAST)
    view.write_bytes(b"damaged")
    r = tool("view", root, LAST)
    assert r.returncode == 0, r
    check_view(view, LAST)
    r = tool("view", "mem:")
    assert r.returncode != 0 and r.stderr.count("\n") == 1 and "directory" in r.stderr, r
    assert tool("view", root, 70).returncode == 66
    r = tool("verify", root)
    assert r.returncode == 0 and "no damage" in r.stdout, r


def check_dump(root):
    """h5dump agrees, about a tensor that had to step aside."""
    r = subprocess.run(["h5dump", "-y", "-w", "0", "-d", "/policy/model/a/_", folder(root, 3) / "view.h5"], capture_output=True, text=True)
    data = r.stdout[r.stdout.index("DATA {") + 6:]
    t = next(i for i, x in enumerate(states.TENSORS) if x[:2] == ("policy/model", "a"))
    assert [int(v) for v in data[:data.index("}")].replace(",", " ").split()] == list(states.values(t, 3)), r


def main():
    program = os.path.join(os.environ["TESSERA_BUILD"], "tests", "test_view")
    with tempfile.TemporaryDirectory(prefix="tessera-test-") as name:
        tmp = pathlib.Path(name)
        root = tmp / "root"
        subprocess.run([program, "write", root], check=True)
        for step in range(1, len(states.MESHES) + 1):
            check_view(folder(root, step) / "view.h5", step)
        check_view(folder(pathlib.Path(f"{root}.other"), 1) / "view.h5", states.OTHER)
        check_dump(root)
        check_tool(root)
        check_missing(check_places(root, tmp), 5)
        os.chdir("/")
    print("every tensor whole, at every mesh")


if __name__ == "__main__":
    sys.exit(main())
