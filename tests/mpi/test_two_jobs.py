#!/usr/bin/env python3
"""Two jobs on one root: the second ends with one clear error and the first does not notice. Once the first is killed, a new one starts at once."""

import time

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

tmp = job.workspace()
job.write_data(tmp / "data")
LEASE = 30  # seconds; longer than a take-over from a dead job may take
path = job.write_config(tmp, "run", tmp / "data", train_steps=1000000, checkpoint_every=10, checkpoint_keep_last=3, checkpoint_lease_seconds=LEASE)


def step_now():
    got = [e for e in job.events(tmp / "run") if e["event"] == "step"]
    return got[-1]["step"] if got else 0


first = job.start(2, path)
job.until(lambda: len(job.committed(tmp / "run" / "ckpt")) >= 1, "the first job saves nothing", first)
for ranks in (2, 3):  # the same config, so the same metrics.jsonl too
    second = job.start(ranks, path)
    status = second.wait()
    errors = job.error_lines(second.output)
    job.check(status == 64 + 3, f"the second job ended with {status}, not {64 + 3} (EXISTS):\n{second.output}")
    job.check(len(errors) == 1, f"the second job printed {len(errors)} errors:\n{second.output}")
    job.check(str(tmp / "run" / "ckpt") in errors[0], f"the error does not name the root: {errors[0]}")
    job.say(f"refused: {errors[0]}")
    job.check(first.alive(), f"the first job ended:\n{first.output}")
at = step_now()
saves = len([e for e in job.events(tmp / "run") if e["event"] == "save"])
job.until(lambda: step_now() > at and len([e for e in job.events(tmp / "run") if e["event"] == "save"]) >= saves + 2, "the first job stands still", first)
steps = [e["step"] for e in job.events(tmp / "run") if e["event"] == "step"]
job.check(steps == list(range(1, len(steps) + 1)), "the second job has disturbed metrics.jsonl of the first")
job.check(job.last(job.events(tmp / "run"), "save_failed") is None, "a save of the first job failed")

first.kill_rank(1)
first.wait()
newest = job.committed(tmp / "run" / "ckpt")[-1]
began = time.monotonic()
third = job.start(2, path)
job.until(lambda: (job.last(job.events(tmp / "run"), "resume") or {}).get("step") == newest, "the third job does not resume", third)
took = time.monotonic() - began
job.check(took < LEASE / 2, f"the third job waited {took:.1f} s for a lease whose owner is dead")
job.until(lambda: len(job.committed(tmp / "run" / "ckpt")) and job.committed(tmp / "run" / "ckpt")[-1] > newest, "the third job saves nothing", third)
third.kill_rank(0)
third.wait()
job.say(f"passed: a new job resumed from step {newest} {took:.1f} s after the first was killed")
