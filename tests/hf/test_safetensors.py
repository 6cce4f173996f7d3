#!/usr/bin/env python3
"""The safetensors package reads what `tessera ckpt export` wrote, in one file and in shards. Not run (77) where it is not installed."""

import pathlib
import sys

sys.dont_write_bytecode = True
here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "support"))
import job  # noqa: E402

try:
    from safetensors import safe_open
except ImportError:
    job.say("safetensors is not installed")
    sys.exit(77)


def read(folder):
    out = {}
    for file in folder.glob("*.safetensors"):
        if file.name == "logits.safetensors":
            continue
        with safe_open(file, "np") as f:
            job.check(f.metadata() == {"format": "pt"}, f"{file}: metadata {f.metadata()}")
            out |= {name: f.get_tensor(name) for name in f.keys()}
    return out


tmp = job.workspace()
for folder in sorted((here / "fixtures").iterdir()):
    if folder.name == "mistral":  # bf16, which numpy has not
        continue
    job.tool("ckpt", "import", folder, tmp / folder.name)
    want = read(folder)
    for out, *more in (("one", ), ("cut", "--shard-bytes=3000")):
        job.tool("ckpt", "export", tmp / folder.name, tmp / f"{folder.name}-{out}", *more)
        got = read(tmp / f"{folder.name}-{out}")
        job.check(set(got) == set(want), f"{folder.name}, {out}: names")
        job.check(all(got[k].dtype == want[k].dtype and got[k].shape == want[k].shape and (got[k] == want[k]).all() for k in want), f"{folder.name}, {out}")
