#!/usr/bin/env python3
"""Saves that no step number asks for: SIGTERM and SIGUSR1, to one rank, to several, to mpirun, again and again; the wall-clock limit; periods in
seconds and `auto`; and what a save that is due does to one in flight. Every such save is at one step on all ranks (else it could not be
committed), a stopped run ends with 0 after its save is committed, and going on from there gives the same losses as a run that was left alone."""

import os
import pathlib
import signal
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

RANKS = 3
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def config(name, steps, **change):
    return job.write_config(tmp, name, data, **{"train_steps": steps, "algo_warmup_sft_steps": 10, "checkpoint_every": 0, **change})


def saves(name):
    return [e["saved_step"] for e in job.events(tmp / name) if e["event"] == "save"]


def at_step(name, n, running):
    job.until(lambda: any(e["event"] == "step" and e["step"] >= n for e in job.events(tmp / name)), f"{name}: step {n} does not come", running)


def stopped(name, running, by):
    """The step at which it stopped, after looking at everything that should be there."""
    status = running.wait()
    job.check(status == 0, f"{name}: exit status {status}:\n{running.output}")
    got = job.events(tmp / name)
    stop = job.last(got, "stop")
    job.check(stop and stop["by"] == by and not job.last(got, "end"), f"{name}: ended with {stop} and {job.last(got, 'end')}")
    step = stop["step"]
    job.check(f"stopped by {by} at step {step}, saved" in running.output, f"{name}: no clear line:\n{running.output}")
    job.check(max(job.losses(got)) == step, f"{name}: trained to {max(job.losses(got))}, stopped at {step}")
    job.check(stop["saved_step"] == step and job.committed(tmp / name / "ckpt") == [step], f"{name}: {job.committed(tmp / name / 'ckpt')} saved, not {step}")
    job.tool("ckpt", "verify", tmp / name / "ckpt")
    return step


# SIGTERM to one rank stops all; the resumed run is the undisturbed one.
FAR = 1000000
for rank in (0, RANKS - 1):
    name = f"term-{rank}"
    path = config(name, FAR, optim_schedule="constant")
    running = job.start(RANKS, path)
    at_step(name, 20, running)
    for _ in range(3):
        os.kill(running.pids()[rank], signal.SIGTERM)
    step = stopped(name, running, "SIGTERM")
job.run(RANKS, path, f"train.steps={step + 5}")
again = job.events(tmp / name)
job.check(job.last(again, "resume")["step"] == step and job.last(again, "end")["step"] == step + 5, "the stopped run does not go on")
job.run(RANKS, config("whole", step + 5, optim_schedule="constant"))
job.same_losses(job.losses(job.events(tmp / "whole")), job.losses(again), range(1, step + 6), "stopped and resumed")
job.say(f"passed: SIGTERM at one rank, stopped at {step}, went on")

# SIGUSR1: save and go on; through mpirun to all, twice in a row, then one rank alone.
path = config("usr1", FAR)
running = job.start(RANKS, path)
at_step("usr1", 15, running)
running.process.send_signal(signal.SIGUSR1)
running.process.send_signal(signal.SIGUSR1)
job.until(lambda: saves("usr1"), "SIGUSR1 brings no save", running)
first = saves("usr1")
at_step("usr1", first[-1] + 30, running)
job.check(1 <= len(saves("usr1")) <= 2, f"two signals at once brought the saves {saves('usr1')}")
os.kill(running.pids()[1], signal.SIGUSR1)
job.until(lambda: saves("usr1")[-1] > first[-1] + 1, "SIGUSR1 to one rank brings no save", running)
job.check(running.alive(), "SIGUSR1 ended the job")
count = len(saves("usr1"))
at_step("usr1", saves("usr1")[-1] + 50, running)
job.check(len(saves("usr1")) == count, f"saves that nobody asked for: {saves('usr1')}")
for pid in running.pids().values():
    os.kill(pid, signal.SIGTERM)
status = running.wait()
job.check(status == 0 and job.last(job.events(tmp / "usr1"), "stop"), f"usr1: exit status {status}:\n{running.output}")
job.say(f"passed: SIGUSR1, saves {saves('usr1')}")

# The wall-clock limit, and a start that finds it passed at once.
limit = 1.5
running = job.start(RANKS, config("limit", FAR, train_max_seconds=limit))
step = stopped("limit", running, "train.max_seconds")
seconds = sum(e["seconds"] for e in job.events(tmp / "limit") if e["event"] == "step")
job.check(seconds < limit + 1, f"stopped after {seconds} s of training, the limit is {limit}")
running = job.start(2, config("at-once", FAR, train_max_seconds=1e-3))
job.check(stopped("at-once", running, "train.max_seconds") <= 3, "a passed limit lets it train on")
out = job.run(1, config("unsaved", 20), "checkpoint.url=", "train.max_seconds=1", status=65)
job.check("checkpoint.url" in out, f"max_seconds without checkpoints: {out}")
job.say(f"passed: max_seconds, {seconds:.2f} s")

# Without checkpoints a signal ends the job as ever.
running = job.start(1, config("bare", FAR), "checkpoint.url=")
at_step("bare", 5, running)
os.kill(running.pids()[0], signal.SIGTERM)
job.check(running.wait() != 0, "SIGTERM without checkpoints was swallowed")
job.say("passed: no checkpoints, no held signals")

# Periods in seconds: the time between saves is the period and at most a few steps more.
every = 0.3
job.run(2, config("timed", FAR, checkpoint_every=f"{every}s", train_max_seconds=3))
took = {e["step"]: e["seconds"] for e in job.events(tmp / "timed") if e["event"] == "step"}
timed = saves("timed")
job.check(len(timed) >= 4, f"timed saves: {timed}")
between = [sum(took[s] for s in range(a + 1, b + 1)) for a, b in zip(timed, timed[1:-1])]
job.check(all(every * 0.6 < b < every + 0.7 for b in between), f"seconds of training between saves: {between}")
out = job.run(2, config("auto", FAR, checkpoint_every="auto", checkpoint_mtbf=0.5, train_max_seconds=3))
job.check(3 <= len(saves("auto")) <= 400, f"auto saves: {saves('auto')}")
job.run(2, config("auto-rare", FAR, checkpoint_every="auto", train_max_seconds=1))
job.check(len(saves("auto-rare")) == 1, f"a day between failures, and within a second the saves {saves('auto-rare')}")
out = job.run(1, config("nonsense", 20, checkpoint_every="10m"), status=65)
job.check("10m" in out and "600s" in out, f"a wrong period: {out}")
job.say(f"passed: timed {timed}, auto {saves('auto')}")

# Overlap: a save due at every step, while the one before is hardly ever done.
for overlap in ("wait", "skip", "cancel"):
    name = f"overlap-{overlap}"
    job.run(2, config(name, 40, checkpoint_every=1, checkpoint_overlap=overlap))
    got = job.events(tmp / name)
    kinds = {k: [e.get("saving") for e in got if e["event"] == k] for k in ("save_start", "save_skipped", "save_cancelled")}
    done = job.committed(tmp / name / "ckpt")
    job.check(done == saves(name) and done[-1] == 40, f"{name}: committed {done}, reported {saves(name)}")
    job.check(len(kinds["save_start"]) == len(done) + len(kinds["save_cancelled"]), f"{name}: {kinds} for {done}")
    job.check(len(kinds["save_start"]) + len(kinds["save_skipped"]) == 40, f"{name}: {kinds}")
    job.check(not set(kinds["save_cancelled"]) & set(done), f"{name}: cancelled and committed")
    expected = {"wait": len(done) == 40, "skip": kinds["save_skipped"] and not kinds["save_cancelled"],
                "cancel": kinds["save_cancelled"] and not kinds["save_skipped"]}
    job.check(expected[overlap], f"{name}: {kinds} for {done}")
    job.tool("ckpt", "verify", tmp / name / "ckpt")
    job.say(f"passed: {name}, {len(done)} of 40 committed")
