#!/usr/bin/env python3
"""Resuming: on the same ranks and on others, in SFT, in DPO and across the switch, between ZeRO stages, deterministic or not.

An undisturbed run of four ranks is the yardstick: its save_start events carry hashes of weights, moments and references, its step events the
losses. A resumed run must restore those hashes, go on with the same samples, and have the same losses (bit for bit in deterministic mode)."""

import shutil

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, SWITCH = 90, 40
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def config(name, **change):
    return job.write_config(tmp, name, data, train_steps=STEPS, algo_warmup_sft_steps=SWITCH, checkpoint_every=10, **change)


def undisturbed(name, ranks, **change):
    job.run(ranks, config(name, **change))
    got = job.events(tmp / name)
    job.check(set(job.losses(got)) == set(range(1, STEPS + 1)), f"{name}: not every step has an event")
    job.check(len({e["loss"] for e in got if e["event"] == "step"}) > STEPS // 2, f"{name}: the losses do not move")
    return got


def samples(all_events):
    return {e["step"]: e["samples"] for e in all_events if e["event"] == "step"}


def resumed(name, source, want, at, ranks, bound=False, **change):
    """Resume from step `at` of run `source` on `ranks` and compare everything after it with the events `want`."""
    path = config(name, **change)
    shutil.copytree(job.step_dir(tmp / source / "ckpt", at), job.step_dir(tmp / name / "ckpt", at))
    text = f"step {at} of {source} on {ranks} ranks {change or ''}"
    job.run(ranks, path)
    got = job.events(tmp / name)
    resume = job.last(got, "resume")
    job.check(resume and resume["step"] == at and resume["ranks"] == ranks, f"{text}: resumed as {resume}")
    job.same_state(job.last(want, "save_start", step=at), resume, text)
    job.check(("ref_hash" in resume) == (at >= SWITCH), f"{text}: references restored in the wrong phase")
    after = range(at + 1, STEPS + 1)
    job.same_losses(job.losses(want), job.losses(got), after, text, bound)
    job.check([samples(want)[s] for s in after] == [samples(got)[s] for s in after], f"{text}: other samples")
    if not bound:
        crc = [job.last(e, "end")["weights_crc32c"] for e in (want, got)]
        job.check(crc[0] == crc[1], f"{text}: final weights {crc[1]}, not {crc[0]}")
    job.say(f"passed: {text}")
    return got


# Stop anywhere and go on with the same ranks.
whole = undisturbed("whole", 4)
path = config("killed")
first = job.start(4, path)
job.until(lambda: job.last(job.events(tmp / "killed"), "step", step=57), "step 57 does not come", first)
first.kill_rank(2)
job.check(first.wait() != 0, "mpirun calls a killed job a success")
newest = job.committed(tmp / "killed" / "ckpt")[-1]
job.run(4, path)
again = job.events(tmp / "killed")
job.check(job.last(again, "resume")["step"] == newest, f"resumed from {job.last(again, 'resume')['step']}, the newest step is {newest}")
job.same_state(job.last(whole, "save_start", step=newest), job.last(again, "resume"), "killed and resumed on 4 ranks")
job.same_losses(job.losses(whole), job.losses(again), range(1, STEPS + 1), "killed and resumed on 4 ranks")
job.check(len([e for e in again if e["event"] == "step"]) == STEPS, "metrics.jsonl has steps twice after a resume")
job.check(job.last(whole, "end")["weights_crc32c"] == job.last(again, "end")["weights_crc32c"], "killed and resumed: other final weights")
job.say(f"passed: killed at step 57 or later, resumed from {newest} on 4 ranks")

# Another number of ranks; from SFT across the switch, at the switch, and in DPO.
for ranks in (1, 2, 3, 4, 6):
    resumed(f"sft-{ranks}", "whole", whole, 20, ranks)
for at, ranks in ((SWITCH, 3), (60, 2), (60, 6)):
    resumed(f"dpo-{at}-{ranks}", "whole", whole, at, ranks)

# ZeRO 1 -> 0 and back.
resumed("zero-1-0", "whole", whole, 20, 2, parallel_zero=0)
resumed("zero-1-0-1", "zero-1-0", whole, 60, 3)

# Sums in the order of ranks: the same bits on the same ranks, rounding elsewhere.
loose = undisturbed("loose", 4, train_deterministic=False)
resumed("loose-4", "loose", loose, 20, 4, train_deterministic=False)
for ranks in (1, 3, 6):
    resumed(f"loose-{ranks}", "loose", loose, 20, ranks, bound=True, train_deterministic=False)
    resumed(f"loose-dpo-{ranks}", "loose", loose, SWITCH, ranks, bound=True, train_deterministic=False)
