#!/usr/bin/env python3
"""Which steps a run leaves behind under keep_last, keep_every and keep_best, against a replay of the rules over the losses in its metrics."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

EVERY, WARMUP, STEPS = 5, 12, 70
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def replay(values, last, every, best, sign):
    """What stays after the last commit; a step's value is known from the next commit on."""
    there = []
    for step in range(EVERY, STEPS + 1, EVERY):
        there.append(step)
        known = sorted((s for s in there[:-1] if s in values), key=lambda s: (sign * values[s], s), reverse=True)
        there = [s for s in there if s in there[-last:] or (every and s % every == 0) or s in known[:best]]
    return there


def kept(name, metric, source, **rules):
    change = {f"checkpoint_{k}": v for k, v in rules.items()}
    job.run(2, job.write_config(tmp, name, data, train_steps=STEPS, algo_warmup_sft_steps=WARMUP, checkpoint_every=EVERY, train_eval_every=10,
                                checkpoint_keep_metric=metric, **change))
    values = {e["step"]: e[source[1]] for e in job.events(tmp / name) if e["event"] == source[0] and e["step"] > WARMUP and source[1] in e}
    want = replay(values, rules["keep_last"], rules.get("keep_every", 0), rules.get("keep_best", 0), -1 if rules.get("keep_order") == "lowest" else 1)
    got = job.committed(tmp / name / "ckpt")
    job.check(got == want, f"{name}: {got} stay, not {want}; the metric: {values}")
    for step in got:
        mark = job.step_dir(tmp / name / "ckpt", step) / ("mark." + metric.replace("/", "."))
        job.check(mark.exists() == (step in values), f"{name}: step {step} has {'a' if mark.exists() else 'no'} metric")
        job.check(step not in values or float(mark.read_text().split()[0]) == values[step], f"{name}: step {step} is marked {mark.exists() and mark.read_text()}")
    job.tool("ckpt", "verify", tmp / name / "ckpt")
    job.say(f"passed: {name}, {got} stay")


kept("lowest", "loss", ("step", "loss"), keep_last=2, keep_every=30, keep_best=2, keep_order="lowest")
kept("highest", "rewards/margins", ("step", "rewards/margins"), keep_last=1, keep_best=3)
kept("evaluated", "eval/logps/accuracy", ("eval", "logps/accuracy"), keep_last=1, keep_best=1)
kept("every", "loss", ("step", "loss"), keep_last=1, keep_every=20)

for change, words in ((["checkpoint.keep_best=1", "checkpoint.keep_metric="], "keep_metric"), (["checkpoint.keep_metric=los"], "rewards/margins"),
                      (["checkpoint.keep_last=0"], "keep_last 0"), (["checkpoint.keep_metric=eval/logps/accuracy", "data.heldout="], "data.heldout")):
    out = job.run(1, tmp / "lowest.yaml", *change, status=65)
    job.check(words in out, f"{change}: {out}")
job.say("passed: wrong rules")
