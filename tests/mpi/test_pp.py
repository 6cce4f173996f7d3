#!/usr/bin/env python3
"""Pipelines under mpirun: a run of pp 4 is killed and goes on at pp 4, at pp 2 x dp 2 and on one rank, with the bits of one rank's undisturbed run;
no step allocates; what four stages saved opens on one rank; `tessera eval` and model.init_from on stages."""

import json
import pathlib
import re
import shutil
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, SWITCH = 24, 8
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def config(name, **change):
    settings = {"train_steps": STEPS, "algo_warmup_sft_steps": SWITCH, "checkpoint_every": 4, "model_layers": 3, "model_tied": True}
    return job.write_config(tmp, name, data, **{**settings, **change})


def stages(pp, dp=1, zero=1, layers="", schedule="1f1b"):
    return {"parallel_pp": pp, "parallel_dp": dp, "parallel_zero": zero, "parallel_stages": layers, "parallel_schedule": schedule}


job.run(1, config("whole"))
whole = job.events(tmp / "whole")

# Killed on four stages, and on from there.
path = config("killed", **stages(4))
first = job.start(4, path)
job.until(lambda: job.last(job.events(tmp / "killed"), "step", step=14), "step 14 does not come", first)
first.kill_rank(2)
job.check(first.wait() != 0, "mpirun calls a killed job a success")
at = job.committed(tmp / "killed" / "ckpt")[-1]
roots = {name: shutil.copytree(tmp / "killed", tmp / name) for name in ("half", "one")}
for name, ranks, cut in (("killed", 4, stages(4, schedule="zero-bubble")), ("half", 4, stages(2, dp=2, zero=0, layers="2,1")), ("one", 1, stages(1))):
    job.run(ranks, config(name, **cut))
    got = job.events(tmp / name)
    job.check(job.last(got, "resume")["step"] == at, f"{name}: resumed from {job.last(got, 'resume')}, the newest step is {at}")
    job.same_state(job.last(whole, "save_start", step=at), job.last(got, "resume"), f"pp 4 to {cut}")
    job.same_losses(job.losses(whole), job.losses(got), range(1, STEPS + 1), f"pp 4 to {cut}")
    job.same_state(job.last(whole, "save_start", step=STEPS), job.last(got, "save_start", step=STEPS), f"pp 4 to {cut}, at the end")
    evals = [job.last(e, "eval", step=STEPS) for e in (whole, got)]
    job.check(evals[0] == evals[1], f"{name}: evaluated as {evals[1]}, one rank as {evals[0]}")
    job.say(f"passed: from step {at} of pp 4 at {cut}")

# A step without a save allocates nothing, and no more micro-batches are in flight than stages follow.
job.run(4, config("steady", checkpoint_every=0, train_steps=14, algo_warmup_sft_steps=6, **stages(4)))
steps = [e for e in job.events(tmp / "steady") if e["event"] == "step"]
busy = [(e["step"], e["allocations"]) for e in steps if e["step"] not in (1, 2, 7, 8) and e["allocations"]]
job.check(not busy, f"allocations in steps: {busy}")
job.check({e["pp_in_flight"] for e in steps} == {4}, f"in flight: {[e['pp_in_flight'] for e in steps]}")
job.say("passed: no allocation in a step, 4 micro-batches in flight")

# Scored on two stages and on one.
want = job.last(whole, "eval", step=STEPS)
scoring = job.Job(2, "eval", config("killed", **stages(2)))
job.check(scoring.wait() == 0, f"eval: {scoring.output}")
got = json.loads(next(line for line in scoring.output.splitlines() if line.startswith('{"step"')))
job.check(got["step"] == STEPS and got["loss"] == want["loss"] and got["rewards/accuracy"] == want["rewards/accuracy"], f"eval: {got}, training saw {want}")

# What four stages saved is what one rank saved; as weights of a folder it comes back through four stages.
out, _ = job.tool("ckpt", "diff", tmp / "whole" / "ckpt", STEPS, tmp / "killed" / "ckpt", STEPS, status=None)
job.check(not re.search(r"differs  (model|optim)/", out) and re.search(r"[1-9]\d* tensors alike", out), f"saved on one rank and on four stages: {out}")
job.tool("ckpt", "verify", tmp / "killed" / "ckpt", STEPS)
for root, step, out in ((tmp / "killed", STEPS, tmp / "out"), (tmp / "taken", 1, tmp / "back")):
    if root.name == "taken":
        job.run(4, config("taken", model_init_from=tmp / "out", algo_warmup_sft_steps=0, train_steps=1, optim_lr=0, **stages(4)))
    job.tool("ckpt", "export", root / "ckpt", step, out)
files = [(tmp / out / "model.safetensors").read_bytes() for out in ("out", "back")]
job.check(files[0] == files[1], "weights of a folder differ after four stages took them up")
job.say("passed: eval, diff, verify, export and model.init_from")

# What cannot be: one line, before anything is made.
for ranks, change, words in ((6, stages(6), "legal is 1 to 5"), (2, stages(2, layers="2,2"), "does not add up")):
    lines = job.error_lines(job.run(ranks, config("refused", **change), status=65))
    job.check(len(lines) == 1 and words in lines[0], f"{change}: {lines}")
job.check(not (tmp / "refused" / "ckpt").exists(), "a refused run has made its checkpoint root")
job.say("passed: refusals")
