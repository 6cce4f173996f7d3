#!/usr/bin/env python3
"""Steady state: after the second step of a phase, training makes no call of our allocator, on no thread of no rank, but for saves, evaluations
and the switch of phases. A step's count reaches from the end of the step before to its own end, so what lies between two steps exempts the
second: a save from its save_start event to the step after its save event, an evaluation, a new phase. The lease is renewed
three times a second meanwhile. What the keeper does after a commit was told is no part of a step: views and retention are off, and AFTER steps behind a
save event are not looked at, for its report."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

AFTER = 25
tmp = job.workspace()
job.write_data(tmp / "data")


def allocating_steps(all_events):
    """(steps looked at, [(step, calls)] of those that called the allocator)"""
    seen, flying, between, after, looked, bad = {}, False, False, 0, 0, []
    for e in all_events:
        if e["event"] != "step":
            between = True
            after = AFTER if e["event"] == "save" else after
            flying = (flying or e["event"] == "save_start") and e["event"] not in ("save", "save_failed")
            continue
        seen[e["phase"]] = seen.get(e["phase"], 0) + 1
        if seen[e["phase"]] > 2 and not flying and not between and not after:
            looked += 1
            if e["allocations"]:
                bad.append((e["step"], e["allocations"]))
        between = False
        after -= after > 0
    return looked, bad


def steady(name, ranks, **change):
    path = job.write_config(tmp, name, tmp / "data", train_steps=160, algo_warmup_sft_steps=25, train_eval_every=9, checkpoint_every=50,
                            checkpoint_lease_seconds=1, checkpoint_view="never", checkpoint_keep_last=0, **change)
    job.run(ranks, path)
    got = job.events(tmp / name)
    job.check(max(e["allocations"] for e in got if e["event"] == "step") > 0, f"{name}: the count never moves, not even in a save")
    looked, bad = allocating_steps(got)
    job.check(looked >= 10, f"{name}: only {looked} steps without a save in flight")
    job.check(not bad, f"{name}: steps that called the allocator, and how often: {bad}")
    job.say(f"passed: {name}, {looked} steps")


for deterministic in (True, False):
    for zero in (0, 1):
        for ranks in (1, 3):
            steady(f"steady-{deterministic}-{zero}-{ranks}", ranks, train_deterministic=deterministic, parallel_zero=zero, parallel_progress=("calls", "thread")[zero])
steady("steady-3-3", 3, parallel_zero=3, algo_reference="live")  # three ranks for eight micro-batches: one idles
steady("steady-2-2x2", 4, parallel_zero=2, parallel_dp_shard=2, parallel_progress="thread")
steady("steady-tp", 4, parallel_dp=2, parallel_tp=2, parallel_sequence=True)
steady("steady-recompute", 2, parallel_tp=2, memory={"recompute": "block"})
