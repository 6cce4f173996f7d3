#!/usr/bin/python3
"""A checkpoint of pp 2 x dp 2 x tp 2, ZeRO 1: it opens on one rank, exports to safetensors, and reads whole through its HDF5 view, and all three have
the same bits: of every parameter, and of the moments in the view and on one rank. The vocabulary (258 rows) does not divide, stages are uneven."""

import json
import os
import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import h5py  # noqa: E402
import job  # noqa: E402
import numpy as np  # noqa: E402

STEP = 4
MESHES = {
    "even": {"parallel_pp": 2, "parallel_dp": 2, "parallel_tp": 2},
    "interleaved": {"parallel_pp": 2, "parallel_dp": 2, "parallel_tp": 2, "parallel_schedule": "interleaved", "parallel_stages": "[0, 2, 1, 0]"},
}
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def config(name, steps=STEP, **change):
    return job.write_config(tmp, name, data, train_steps=steps, algo_warmup_sft_steps=2, checkpoint_every=2, model_layers=3, model_qkv_bias=True, **change)


def exported(root, step, out):
    """{name: array} of a safetensors file, read by its format alone."""
    job.tool("ckpt", "export", root, step, out)
    raw = (out / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, t in header.items():
        job.check(t["dtype"] == "F32", f"{name} is exported as {t['dtype']}")
        begin, end = t["data_offsets"]
        found[name] = np.frombuffer(raw[8 + size + begin : 8 + size + end], "<f4").reshape(t["shape"])
    return found


def viewed(root, step, part):
    """{name: array} of a part, through view.h5 and h5py."""
    found = {}
    with h5py.File(job.step_dir(root, step) / "view.h5", "r") as f:
        f[part].visititems(lambda name, d: found.update({name: d[()]}) if isinstance(d, h5py.Dataset) else None)
    return found


def same(want, got, text):
    job.check(set(want) <= set(got) and len(want) > 10, f"{text}: {sorted(set(want) - set(got))} are missing")
    for name, x in want.items():
        job.check(x.shape == got[name].shape and x.tobytes() == got[name].tobytes(), f"{text}: {name} differs")


for name, mesh in MESHES.items():
    job.run(8, config(name, parallel_zero=1, model_tied=name == "even", **mesh))
    root = tmp / name / "ckpt"
    view = job.step_dir(root, STEP) / "view.h5"
    view.unlink(missing_ok=True)
    job.tool("ckpt", "view", root, STEP)
    weights, moments = viewed(root, STEP, "model"), viewed(root, STEP, "optim")
    file = exported(root, STEP, tmp / f"{name}.out")
    same(file, weights, f"{name}: exported, and in the view")
    job.check(len(moments) == 2 * len(file), f"{name}: {len(moments)} moments of {len(file)} tensors")
    job.check(all(np.isfinite(x).all() and x.shape == file[n.rpartition(".exp_avg")[0]].shape for n, x in moments.items()), f"{name}: moments are no moments")
    job.check(sum(np.any(x) for x in moments.values()) > len(moments) // 2, f"{name}: moments are zero")

    # One rank takes all of it up, and what it holds has the hashes of what was saved; a step at rate 0 keeps the weights, and saves them whole.
    saved = job.last(job.events(tmp / name), "save_start", step=STEP)
    job.run(1, config(name, steps=STEP + 1, optim_lr=0, model_tied=name == "even"))
    events = job.events(tmp / name)
    job.check(job.last(events, "resume")["step"] == STEP, f"{name}: resumed from {job.last(events, 'resume')}")
    job.same_state(saved, job.last(events, "resume"), f"{name}: on one rank")
    alone = exported(root, STEP + 1, tmp / f"{name}.alone")
    same(alone, file, f"{name}: as one rank holds it, and exported")
    job.check(set(alone) == set(file), f"{name}: one rank has {sorted(set(alone) ^ set(file))} more or less")
    out = subprocess.run([os.environ["TESSERA"], "ckpt", "verify", root, str(STEP)], capture_output=True, text=True)
    job.check(out.returncode == 0, f"{name}: {out.stdout}{out.stderr}")
    job.say(f"passed: {name}: {len(file)} tensors and {len(moments)} moments")
