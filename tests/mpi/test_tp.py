#!/usr/bin/env python3
"""Tensor parallelism under mpirun: a run of dp 2 x tp 2 is killed and goes on at other meshes; what it left opens on one rank, and is alike however it
was cut; `tessera eval` and model.init_from at tp. Padding of the vocabulary (258 rows over 4 ranks) reaches no checkpoint."""

import json
import pathlib
import re
import shutil
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, SWITCH = 60, 20
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def config(name, **change):
    return job.write_config(tmp, name, data, **{"train_steps": STEPS, "algo_warmup_sft_steps": SWITCH, "checkpoint_every": 5, **change})


def mesh(dp, tp, zero=1, sequence=False):
    return {"parallel_dp": dp, "parallel_tp": tp, "parallel_zero": zero, "parallel_sequence": sequence}


# Killed, and on at the same mesh: the bits of the undisturbed run.
job.run(4, config("whole", **mesh(2, 2)))
whole = job.events(tmp / "whole")
path = config("killed", **mesh(2, 2))
first = job.start(4, path)
job.until(lambda: job.last(job.events(tmp / "killed"), "step", step=33), "step 33 does not come", first)
first.kill_rank(3)
job.check(first.wait() != 0, "mpirun calls a killed job a success")
at = job.committed(tmp / "killed" / "ckpt")[-1]
roots = {name: shutil.copytree(tmp / "killed", tmp / name) for name in ("wide", "narrow")}
job.run(4, path)
again = job.events(tmp / "killed")
job.check(job.last(again, "resume")["step"] == at, f"resumed from {job.last(again, 'resume')['step']}, the newest step is {at}")
job.same_state(job.last(whole, "save_start", step=at), job.last(again, "resume"), "killed and resumed at dp 2, tp 2")
job.same_losses(job.losses(whole), job.losses(again), range(1, STEPS + 1), "killed and resumed at dp 2, tp 2")
job.say(f"passed: killed at step 33 or later, resumed from {at} at dp 2, tp 2")

# And on at others: the same tensors, losses but for rounding.
for name, ranks, cut in (("wide", 4, mesh(1, 4, sequence=True)), ("narrow", 3, mesh(3, 1, zero=0))):
    job.run(ranks, config(name, **cut))
    got = job.events(tmp / name)
    job.check(job.last(got, "resume")["step"] == at, f"{name}: resumed from {job.last(got, 'resume')}")
    job.same_state(job.last(whole, "save_start", step=at), job.last(got, "resume"), f"dp 2, tp 2 to {cut}")
    job.same_losses(job.losses(whole), job.losses(got), range(at + 1, STEPS + 1), f"dp 2, tp 2 to {cut}", bound=True)
    sent = {e["tp_sent_bytes"] > 0 for e in got if e["event"] == "step" and e["step"] > at}
    job.check(sent == {name == "wide"}, f"{name}: bytes sent over tp: {sent}")
    job.say(f"passed: from step {at} of dp 2, tp 2 at {cut}")

# Scored at tp 2 and, from the same step, on one rank: as training saw it.
want = job.last(whole, "eval", step=STEPS)
for ranks, cut in ((2, mesh(1, 2, sequence=True)), (1, mesh(1, 1))):
    scoring = job.Job(ranks, "eval", config("whole", **cut))
    job.check(scoring.wait() == 0, f"eval at {cut}: {scoring.output}")
    got = json.loads(next(line for line in scoring.output.splitlines() if line.startswith('{"step"')))
    job.check(got["step"] == STEPS and abs(got["loss"] - want["loss"]) <= 1e-5 and got["rewards/accuracy"] == want["rewards/accuracy"],
              f"eval at {cut}: {got}, training saw {want}")
job.say("passed: eval at tp 2 and on one rank")

# One step, saved at two meshes from the same weights: every tensor alike, and the vocabulary has its own rows only.
for name, ranks, cut in (("four", 4, mesh(1, 4)), ("one", 1, mesh(1, 1))):
    shutil.copytree(job.step_dir(tmp / "whole" / "ckpt", 40), job.step_dir(tmp / name / "ckpt", 40))
    job.run(ranks, config(name, train_steps=41, optim_lr=0, checkpoint_every=1, **cut))
out, _ = job.tool("ckpt", "diff", tmp / "four" / "ckpt", 41, tmp / "one" / "ckpt", 41, status=None)
differ = set(re.findall(r"differs  (\w+)/", out))
job.check(differ <= {"optim"} and re.search(r"[1-9]\d* tensors alike", out), f"saved at tp 4 and at one rank: {out}")
listing, _ = job.tool("ckpt", "show", tmp / "four" / "ckpt", 41)
job.check(re.search(r"model\.embed_tokens\.weight\s.*\b258\b", listing), f"no embedding of 258 rows: {listing}")
job.tool("ckpt", "verify", tmp / "four" / "ckpt", 41)
job.say("passed: saved at tp 4 and at one rank")

# Weights of a folder go to the parts of four ranks, and come back.
for root, step, out in ((tmp / "whole", STEPS, tmp / "out"), (tmp / "taken", 1, tmp / "back")):
    if root.name == "taken":
        job.run(4, config("taken", model_init_from=tmp / "out", algo_warmup_sft_steps=0, train_steps=1, optim_lr=0, **mesh(1, 4)))
    job.tool("ckpt", "export", root / "ckpt", step, out)
files = [(tmp / out / "model.safetensors").read_bytes() for out in ("out", "back")]
job.check(files[0] == files[1], "weights of a folder differ after they were taken up at tp 4")
job.say("passed: model.init_from at tp 4")

# What cannot be: one line, before anything is made.
for ranks, change, words in ((3, mesh(1, 3), "model.heads: 4"), (4, mesh(3, 2), "does not fit 4 ranks")):
    path = config("refused", **change)
    lines = job.error_lines(job.run(ranks, path, status=65))
    job.check(len(lines) == 1 and words in lines[0], f"{change}: {lines}")
job.check(not (tmp / "refused" / "ckpt").exists(), "a refused run has made its checkpoint root")
job.say("passed: refusals")
