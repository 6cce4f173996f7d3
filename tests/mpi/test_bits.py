#!/usr/bin/env python3
"""The same bits on any number of ranks, as files say it: losses and norms in metrics.jsonl number by number, and sha256 of the weights that
`tessera ckpt export` writes, of a tied and of an untied model at dp 1, 2, 4, 8, ZeRO 0, 1, 3 and pp 1, 2, 4 against one rank; and where a run changes its
layout in the middle. TESSERA_BITS=all: every dp x ZeRO x pp, up to 32 ranks, each resumed at another one; otherwise some of them."""

import hashlib
import json
import os
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, MIDDLE = 6, 3
KEYS = ("loss", "grad_norm", "entropy", "rewards/margins", "tokens")
tmp = job.workspace()
job.write_data(tmp / "data")

# dp, ZeRO, pp
if os.environ.get("TESSERA_BITS") == "all":
    every = [(dp, zero, pp) for pp in (1, 2, 4) for zero in (0, 1, 3) for dp in (1, 2, 4, 8)]
    LAYOUTS = {"tied": every, "untied": every}
    AFTER = 5  # has no common factor with 36, so that each is resumed at another dp, and most at another ZeRO stage
else:
    LAYOUTS = {"tied": [(8, 0, 1), (2, 3, 2), (4, 1, 1), (1, 0, 4), (1, 1, 1)], "untied": [(2, 1, 4), (8, 3, 1), (1, 3, 2), (2, 0, 1)]}
    AFTER = 1


def config(name, tied):
    return job.write_config(tmp, name, tmp / "data", model_tied=tied, train_steps=STEPS, algo_warmup_sft_steps=2, optim_schedule="constant", optim_lr=3e-3,
                            checkpoint_every=MIDDLE, checkpoint_view="never", data_heldout='""')


def train(name, tied, layout, *overrides):
    dp, zero, pp = layout
    job.run(dp * pp, config(name, tied), f"parallel.dp={dp}", f"parallel.zero={zero}", f"parallel.pp={pp}", *overrides)


def numbers(name):
    """{step: what its last event says}"""
    return {e["step"]: [e.get(k) for k in KEYS] for e in job.events(tmp / name) if e["event"] == "step"}


def weights(name, step):
    """(sha256 of names and bits of all tensors of an exported file, their number)"""
    out = tmp / "out"
    job.tool("ckpt", "export", tmp / name / "ckpt", step, out)
    raw = (out / "model.safetensors").read_bytes()
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    sha = hashlib.sha256()
    for tensor in sorted(header):
        begin, end = header[tensor]["data_offsets"]
        sha.update(f"{tensor} {header[tensor]['shape']} ".encode() + raw[8 + size + begin : 8 + size + end])
    return sha.hexdigest(), len(header)


def found(name):
    return numbers(name), {step: weights(name, step) for step in (MIDDLE, STEPS)}


def compare(want, name, text):
    got = found(name)
    for step in range(1, STEPS + 1):
        job.check(step in want[0] and got[0].get(step) == want[0][step], f"{text}: step {step} has {KEYS} {got[0].get(step)}, not {want[0].get(step)}")
    for step, sha in want[1].items():
        job.check(got[1][step] == sha, f"{text}: weights of step {step} have sha256 {got[1][step]}, not {sha}")


for kind, layouts in LAYOUTS.items():
    tied = kind == "tied"
    train(kind, tied, (1, 0, 1))
    one = found(kind)
    losses = [one[0][s][0] for s in range(1, STEPS + 1)]
    job.check(len(set(losses)) == STEPS and one[1][MIDDLE][0] != one[1][STEPS][0], f"{kind}: nothing is learnt: {losses}")
    job.check(one[1][STEPS][1] == 21 - tied, f"{kind}: {one[1][STEPS][1]} tensors are exported")
    for i, layout in enumerate(layouts):
        name = f"{kind}-" + "-".join(map(str, layout))
        train(name, tied, layout)
        compare(one, name, f"{name} (dp, ZeRO, pp)")
        other = layouts[(i + AFTER) % len(layouts)]
        train(name, tied, other, f"checkpoint.resume={MIDDLE}", "checkpoint.rewind=true")
        resume = job.last(job.events(tmp / name), "resume")
        job.check(resume and resume["step"] == MIDDLE and resume["ranks"] == other[0] * other[2], f"{name}: resumed as {resume}")
        compare(one, name, f"{name}, resumed at {other}")
    job.say(f"passed: {kind}: {len(layouts)} layouts have sha256 {one[1][STEPS][0][:16]} as one rank, also where the run changes to another")
