#!/usr/bin/env python3
"""Steady state: after the second step of a phase, a training step makes no call of our allocator (all threads of rank 0), unless a save is in
flight. A save is in flight from its save_start event to its save event; evaluations and the switch of phases lie between steps."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

tmp = job.workspace()
job.write_data(tmp / "data")


def allocating_steps(all_events):
    """(steps looked at, [(step, calls)] of those that called the allocator)"""
    seen, flying, looked, bad = {}, False, 0, []
    for e in all_events:
        if e["event"] == "save_start":
            flying = True
        elif e["event"] in ("save", "save_failed"):
            flying = False
        elif e["event"] == "step":
            seen[e["phase"]] = seen.get(e["phase"], 0) + 1
            if seen[e["phase"]] > 2 and not flying:
                looked += 1
                if e["allocations"]:
                    bad.append((e["step"], e["allocations"]))
    return looked, bad


for deterministic in (True, False):
    for zero in (0, 1):
        for ranks in (1, 3):
            name = f"steady-{deterministic}-{zero}-{ranks}"
            path = job.write_config(tmp, name, tmp / "data", train_steps=60, algo_warmup_sft_steps=25, train_eval_every=9, checkpoint_every=20,
                                    checkpoint_lease_seconds=1, train_deterministic=deterministic, parallel_zero=zero)
            job.run(ranks, path)
            got = job.events(tmp / name)
            looked, bad = allocating_steps(got)
            job.check(looked >= 20, f"{name}: only {looked} steps without a save in flight")
            job.check(not bad, f"{name}: steps that called the allocator, and how often: {bad}")
            job.say(f"passed: {name}, {looked} steps")
