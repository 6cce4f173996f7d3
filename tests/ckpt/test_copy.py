#!/usr/bin/python3
"""`tessera ckpt copy`: whole, recut for other meshes, in part; every value of the copy as h5py shows it in its view, against values computed
here; damage refused; a copy killed at any moment leaves no listed step, and the next one works; bounded memory."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here))

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import states  # noqa: E402
from test_view_h5py import folder, path_of  # noqa: E402

TESSERA = os.environ["TESSERA"]


def tool(*words, status=0):
    r = subprocess.run([TESSERA, "ckpt", *map(str, words)], capture_output=True, text=True)
    assert r.returncode == status, (words, r)
    return r.stdout + r.stderr


def check_values(root, step, tensors, of=None):
    with h5py.File(folder(root, step) / "view.h5", "r") as f:
        for t in tensors:
            part, name = states.TENSORS[t][:2]
            path = path_of(t) if path_of(t) in f else f"{part}/{name}"
            got = np.asarray(f[path][()])
            assert got.tobytes() == states.values(t, of or step).tobytes() and got.shape == states.TENSORS[t][4], (step, name)


def shown(root, step):
    return json.loads(tool("show", root, step, "--json"))


def sizes(root, step):
    """Part and rank of the shard files, with their lengths."""
    return sorted((p.name.rsplit(".", 2)[0], p.stat().st_size) for p in folder(root, step).glob("*-*.h5"))


ALL = range(len(states.TENSORS))
LAST = len(states.MESHES)


def check_whole(source, tmp):
    """Cut as it was: the same pieces at the same places of the same files, the same blobs; all steps, one after another, in one root."""
    to = tmp / "whole"
    for step in range(1, LAST + 1):
        out = tool("copy", source, step, to) if step < LAST else tool("copy", source, to)
        assert f"copied step {step}: 24 tensors" in out, out
        check_values(to, step, ALL)
        tool("diff", source, step, to, step)
        a, b = shown(source, step), shown(to, step)
        places = [[[(x["files"][p["file"]]["name"].split(".")[0], p["offset"], p["box_offset"], p["box_length"], p["run"]) for p in t["pieces"]]
                   for t in x["tensors"]] for x in (a, b)]
        if step == states.REFERRING:  # what it refers to is copied into it
            assert sizes(source, step) != sizes(to, step)
            continue
        assert places[0] == places[1] and a["blobs"] == b["blobs"] and a["mesh"] == b["mesh"] and a["build"] == b["build"], step
        assert sizes(source, step) == sizes(to, step), step
        assert a["attempt"] != b["attempt"] and a["run"] != b["run"]
    assert "no damage" in tool("verify", to)
    shutil.copytree(to, tmp / "alone")
    for step in range(1, LAST):
        shutil.rmtree(folder(tmp / "alone", step))
    check_values(tmp / "alone", LAST, ALL)  # it needs no other step
    tool("copy", f"{source}.other", to.with_suffix(".other"))
    check_values(to.with_suffix(".other"), 1, ALL, states.OTHER)
    assert "committed there already" in tool("copy", source, 3, to, status=67)
    assert tool("ls", to).count("\n") == 1 + LAST
    assert (to / "LATEST").read_text() == f"step-{LAST:012d}\n"


def check_recut(source, tmp):
    for i, words in enumerate((("--ranks", "1"), ("--ranks=3",), ("--to", "tp=4"), ("--to=pp=2,dp=2,tp=3",), ("--to", "dp=5,ep=1"))):
        to = tmp / f"cut{i}"
        for step in (1, 5, 6, states.REFERRING):
            of = [(source, "--step", step), (f"{source}@{step}",), (folder(source, step),), (source, step)][(i + step) % 4]
            out = tool("copy", of[0], *of[1:], to, *words, "--part", "!rng")
            found = int(re.search(r"in (\d+) files", out).group(1))
            assert i > 0 or found == 3, out  # one rank writes a file a part
            assert len(list(folder(to, step).glob("*-*.h5"))) == found
            check_values(to, step, ALL)
            tool("diff", source, step, to, step)
        assert "no damage" in tool("verify", to)
    step = shown(tmp / "cut3", 5)
    assert step["mesh"] == {"pp": 2, "dp": 2, "ep": 1, "cp": 1, "tp": 3} and step["world"] == 12
    boxes = {t["name"]: sorted((p["box_offset"], p["box_length"]) for p in t["pieces"]) for t in step["tensors"]}
    assert boxes["embed.weight"] == [([0, 0], [22, 16]), ([22, 0], [22, 16]), ([44, 0], [23, 16])], boxes["embed.weight"]
    ranks = {int(step["files"][p["file"]]["name"].rsplit("-", 1)[1][:5]) for t in step["tensors"] if t["name"] == "layers.1.up" for p in t["pieces"]}
    assert ranks and min(ranks) >= 6, ranks  # the second stage's


def check_part(source, tmp):
    to = tmp / "part"
    tool("copy", source, 5, to, "--part", "policy/*", "--match", "head*", "--match=layers*")
    with h5py.File(folder(to, 5) / "view.h5", "r") as f:
        names = sorted(f["policy/model"])
        assert names == ["embed.weight", "head.weight", "layers.0.q", "layers.1.up"], names  # the alias brings its holder
    check_values(to, 5, [0, 1, 2, 3])
    assert shown(to, 5)["blobs"] == []
    assert "no tensor is selected" in tool("copy", source, 5, tmp / "none", "--match", "nothing", status=66)
    assert tool("ls", tmp / "none").startswith("no committed step")


def check_refusals(source, tmp):
    to = tmp / "refused"
    for words, status in ((("copy",), 65), (("copy", source), 65), (("copy", source, to, "--to"), 65), (("copy", source, to, "--to", "xp=2"), 65),
                          (("copy", source, to, "--to", "tp=0"), 65), (("copy", source, to, "--to", "tp=2x"), 65), (("copy", source, to, "--what"), 65),
                          (("copy", source, to, "--ranks", "0"), 65), (("copy", source, to, "--ranks", "2", "--to", "tp=2"), 65),
                          (("copy", source, 3, to, "--step", "4"), 65), (("copy", source, 99, to), 66), (("copy", source, folder(to, 3)), 65),
                          (("copy", tmp / "nowhere", to), 66), (("copy", source, 5, to, "--ranks", "2"), 65)):
        out = tool(*words, status=status)
        assert out.count("\n") == 1, out
    assert "rank" in tool("copy", source, 5, to, "--ranks", "2", status=65)  # rng/state of 12 ranks
    assert "no committed step" in tool("ls", to)
    assert not [p for p in to.glob("step-*")], "a refused copy leaves files"


def check_damage(source, tmp):
    """A byte of a block that is copied."""
    for at, path in enumerate(sorted(folder(source, 4).glob("*-*.h5"))[:4]):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        out = tool("copy", source, 4, tmp / "damaged", status=71)
        assert "checksum" in out and path.name in out, out
        assert "no committed step" in tool("ls", tmp / "damaged") and not list((tmp / "damaged").glob("step-*"))
        path.write_bytes(data)
    tool("copy", source, 4, tmp / "damaged")


def check_kill(source, tmp):
    """Killed while it writes: nothing is listed; again: it works."""
    to = tmp / "killed"
    began = time.monotonic()
    tool("copy", source, 5, tmp / "timed")
    whole = time.monotonic() - began
    seen = 0
    for i in range(12):
        p = subprocess.Popen([TESSERA, "ckpt", "copy", source, "5", to], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * i / 12)
        p.send_signal(signal.SIGKILL)
        code = p.wait()
        listed = (folder(to, 5) / "metadata.pb").exists()
        seen += code == -signal.SIGKILL and not listed
        if listed:
            break
    assert seen, "no copy was killed"
    if not listed:
        if to.exists():
            assert "no committed step" in tool("ls", to)
        tool("copy", source, 5, to)
    else:
        tool("view", to, 5)  # it may have died between the commit and the view
    check_values(to, 5, ALL)
    assert "no damage" in tool("verify", to)
    tool("gc", to, "--age=0")
    assert "no damage" in tool("verify", to)
    left = {p.name for p in folder(to, 5).iterdir()}
    attempt = re.search(r"attempt ([0-9a-f]{16})", tool("show", to, 5)).group(1)
    assert all(attempt in n or n in ("metadata.pb", "view.h5") for n in left), left


def check_memory(program, tmp):
    """A step of 384 MiB, as it is and cut across its pieces: memory is that of the cache and a chunk."""
    subprocess.run([program, "large", tmp / "large", "384"], check=True)
    for i, words in enumerate(((), ("--to", "tp=2"))):
        p = subprocess.Popen([TESSERA, "ckpt", "copy", tmp / "large", tmp / f"large{i}", *words], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        assert status == 0 and used.ru_maxrss < 160 << 10, (words, status, used.ru_maxrss)
        assert "no damage" in tool("verify", tmp / f"large{i}", "-j", "2")
    return used.ru_maxrss >> 10


def main():
    program = os.path.join(os.environ["TESSERA_BUILD"], "tests", "test_view")
    with tempfile.TemporaryDirectory(prefix="tessera-test-") as name:
        tmp = pathlib.Path(name)
        source = tmp / "root"
        subprocess.run([program, "write", source], check=True)
        check_whole(source, tmp)
        check_recut(source, tmp)
        check_part(source, tmp)
        check_refusals(source, tmp)
        check_damage(source, tmp)
        check_kill(source, tmp)
        most = check_memory(program, tmp)
    print(f"every copy is what was saved; {most} MiB of memory for 384 MiB")


if __name__ == "__main__":
    sys.exit(main())
