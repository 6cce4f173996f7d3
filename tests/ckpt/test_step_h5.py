#!/usr/bin/python3
"""Every .h5 of a step, read by HDF5's own tools: h5dump and h5py open it, and tensors put together from their pieces by attributes alone
(global_shape, box_offset, box_length, run) have the right values: those of a one-rank, unsharded run bit for bit, and those that AdamW's
formulas give for one step from the initial weights."""

import json
import subprocess

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

try:
    import h5py
    import numpy as np
except ImportError as e:
    job.fail(f"{e}: install python3-h5py, and run this with /usr/bin/python3")

BETA1, BETA2, LR, DECAY, EPS = 0.9, 0.95, 1e-3, 0.1, 1e-8
tmp = job.workspace()
job.write_data(tmp / "data")


def read_step(folder):
    """{(part, tensor): whole array}, from the files alone. Fails on a hole or an overlap."""
    whole, filled = {}, {}

    def piece(part, tensor, d):
        a = d.attrs
        shape = tuple(int(v) for v in a.get("global_shape", ()))
        off = tuple(int(v) for v in a.get("box_offset", ()))
        length = tuple(int(v) for v in a.get("box_length", ()))
        begin, end = (int(v) for v in a["run"])
        key = (part, tensor)
        if key not in whole:
            whole[key], filled[key] = np.zeros(shape, d.dtype), np.zeros(shape, np.int32)
        job.check(whole[key].shape == shape and whole[key].dtype == d.dtype, f"{key}: pieces disagree on shape or type")
        volume = int(np.prod(length, dtype=np.int64)) if shape else 1
        if (begin, end) == (0, volume):
            job.check(d.shape == length, f"{key}: a box of {length} is a dataset of {d.shape}")
        else:
            job.check(d.shape == (end - begin,), f"{key}: a run of {end - begin} is a dataset of {d.shape}")
        value = d[()].reshape(-1)
        places = np.arange(begin, end)
        index = tuple(np.array(off)[:, None] + np.array(np.unravel_index(places, length))) if shape else ()
        whole[key][index] = value if shape else value[0]
        filled[key][index] += 1

    files = sorted(folder.glob("*-*.h5"))
    job.check(files, f"{folder} has no .h5 files")
    for file in files:
        part = file.name.rsplit("-", 1)[0]
        dump = subprocess.run(["h5dump", "-H", str(file)], capture_output=True, text=True)
        job.check(dump.returncode == 0 and not dump.stderr, f"h5dump -H {file.name}: {dump.stderr}")
        dump = subprocess.run(["h5dump", str(file)], capture_output=True, text=True)
        job.check(dump.returncode == 0 and not dump.stderr, f"h5dump {file.name}: {dump.stderr}")
        with h5py.File(file, "r") as f:
            found = []
            f.visititems(lambda name, d: found.append((name.rpartition("/")[0], d)) if isinstance(d, h5py.Dataset) else None)
            job.check(len(found) == dump.stdout.count("DATASET \""), f"{file.name}: h5dump and h5py see different datasets")
            for tensor, d in found:
                piece(part, tensor, d)
    for key, count in filled.items():
        job.check((count == 1).all(), f"{key}: {int((count == 0).sum())} elements missing, {int((count > 1).sum())} twice")
    return whole


def step(name, ranks, at, **change):
    path = job.write_config(tmp, name, tmp / "data", checkpoint_every=1, optim_clip=0, optim_warmup_steps=0, optim_schedule="constant", optim_beta1=BETA1,
                            optim_beta2=BETA2, optim_eps=EPS, optim_weight_decay=DECAY, algo_warmup_sft_lr=0, **change)
    job.run(ranks, path)
    return read_step(job.step_dir(tmp / name / "ckpt", at))


def same(a, b, text):
    job.check(sorted(a) == sorted(b), f"{text}: tensors {sorted(set(a) ^ set(b))} are in one only")
    for key in a:
        job.check(a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes(), f"{text}: {key} differs")


SHORT = dict(train_steps=2, algo_warmup_sft_steps=1)
three = step("three", 3, 2, optim_lr=LR, **SHORT)
same(three, step("one", 1, 2, optim_lr=LR, parallel_zero=0, **SHORT), "three ranks with ZeRO 1 against one rank with ZeRO 0")

# Step 1 by formula, from the weights of a run whose learning rate is 0.
LONG = dict(train_steps=3, algo_warmup_sft_steps=2)
first = step("first", 3, 1, optim_lr=LR, **LONG)
init = step("still", 2, 1, optim_lr=0, **LONG)
weights = sorted(t for p, t in init if p == "model")
job.check("model.embed_tokens.weight" in weights and len(weights) == 2 + 2 * 9, f"the model's tensors: {weights}")
for name in weights:
    w0 = init["model", name].astype(np.float64)
    m, v = (first["optim", f"{name}.{k}"].astype(np.float64) for k in ("exp_avg", "exp_avg_sq"))
    w1 = first["model", name].astype(np.float64)
    if name.endswith("norm.weight"):
        job.check((w0 == 1).all(), f"{name} does not start at 1")
    else:
        job.check(abs(w0.mean()) < 4 * w0.std() / w0.size**0.5 and 0.001 < w0.std() < 0.03, f"{name}: mean {w0.mean()}, deviation {w0.std()} at the start")
    g = m / (1 - BETA1)
    job.check(np.abs(g).max() > 0, f"{name}: no gradient")
    job.check(np.allclose(v, (1 - BETA2) * g * g, rtol=1e-5, atol=1e-30), f"{name}: exp_avg_sq is not (1 - beta2) g^2")
    decay = DECAY if w0.ndim == 2 else 0.0
    want = w0 - LR * (g / (np.abs(g) + EPS) + decay * w0)
    job.check(np.allclose(w1, want, rtol=3e-7, atol=1e-7), f"{name}: not one AdamW step from the start, off by {np.abs(w1 - want).max()}")

# The references of DPO: one pair of sums a row, in the order of the file.
for prefix, rows in (("", 64), ("heldout.", 24)):
    job.check((three["ref.logps", f"{prefix}row"] == np.arange(rows)).all(), f"{prefix}row is not 0, 1, 2, ...")
    logp = three["ref.logps", f"{prefix}logp"]
    job.check(logp.shape == (rows, 2) and np.isfinite(logp).all() and (logp < 0).all(), f"{prefix}logp: {logp.shape}, {logp.min()} to {logp.max()}")

# What the program says about the step: each piece lies where HDF5 says its dataset does, with the same box and run.
out, _ = job.tool("ckpt", "show", f"file:{tmp / 'three' / 'ckpt'}", 2, "--json")
shown = json.loads(out)
job.check(shown["step"] == 2 and shown["world"] == 3 and shown["mesh"]["dp"] == 3, f"ckpt show: {out[:400]}")
told = set()
for tensor in shown["tensors"]:
    for p in tensor["pieces"]:
        name = shown["files"][p["file"]]["name"]
        if p["bytes"]:
            told.add((name, tensor["name"], p["offset"], p["bytes"], tuple(p["box_offset"]), tuple(p["box_length"]), tuple(p["run"])))
there = set()
for file in job.step_dir(tmp / "three" / "ckpt", 2).glob("*-*.h5"):
    with h5py.File(file, "r") as f:

        def note(name, d):
            if isinstance(d, h5py.Dataset) and d.size:
                box = (tuple(int(v) for v in d.attrs.get(k, ())) for k in ("box_offset", "box_length", "run"))
                there.add((file.name, name.rpartition("/")[0], d.id.get_offset(), d.id.get_storage_size(), *box))

        f.visititems(note)
job.check(told == there, f"metadata and HDF5 disagree: {sorted(told ^ there)[:4]}")

# The view, written beside the step by the run itself, shows the same whole tensors.
with h5py.File(job.step_dir(tmp / "three" / "ckpt", 2) / "view.h5", "r") as f:
    for (part, name), value in three.items():
        d = f[f"{part.replace('.', '/')}/{name}"]
        job.check(d.is_virtual and d.shape == value.shape and d[()].tobytes() == value.tobytes(), f"the view's {part}/{name}")
    job.check(f["model/lm_head.weight"] == f["model/model.embed_tokens.weight"], "the view's tied weights")
path = job.write_config(tmp, "plain", tmp / "data", checkpoint_every=1, checkpoint_view="never", **SHORT)
job.run(2, path)
job.check(job.committed(tmp / "plain" / "ckpt") == [1, 2] and not list((tmp / "plain" / "ckpt").glob("*/view.h5")), "a view that was not wanted")

aliases = {t["name"]: t["alias_of"] for t in shown["tensors"] if t["alias_of"]}
job.check(aliases == {"lm_head.weight": "model.embed_tokens.weight"}, f"tied weights are shown as {aliases}")
job.say(f"passed: {len(three)} tensors of a step of three ranks")
