#!/usr/bin/env python3
"""kill -9 of a random rank at twenty random moments, most of them inside a save; each time the job goes on with another number of ranks.

One chain of attempts on one root. After each death the newest committed step is read from the folder, not by the program. The next attempt must
resume from exactly that step, restore the hashes of its save, and then have the losses of a run that nobody disturbed, bit for bit.
The draw is seeded; set KILL9_SEED for another one."""

import os
import random
import time

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

KILLS, STEPS, SWITCH, EVERY = 20, 240, 60, 4
draw = random.Random(int(os.environ.get("KILL9_SEED", "20")))
tmp = job.workspace()
job.write_data(tmp / "data")
ckpt = tmp / "killed" / "ckpt"


def config(name):
    return job.write_config(tmp, name, tmp / "data", train_steps=STEPS, algo_warmup_sft_steps=SWITCH, checkpoint_every=EVERY, checkpoint_keep_last=3,
                            model_hidden=64, model_head_dim=16, model_ffn=128)


class Attempt:
    """One job of the chain, with a metrics.jsonl of its own."""

    def __init__(self, number, ranks):
        self.dir = tmp / "killed" / f"attempt-{number}"
        self.newest = newest_step()
        self.job = job.start(ranks, path, f"run.dir={self.dir}")

    def events(self):
        return job.events(self.dir)

    def count(self, name):
        return len([e for e in self.events() if e["event"] == name])

    def until_more(self, name, more):
        """Until `more` further events of that name."""
        target = self.count(name) + more
        job.until(lambda: self.count(name) >= target, f"no {name} comes", self.job)

    def in_a_save(self):
        order = [e["event"] for e in self.events() if e["event"] in ("save_start", "save", "save_failed")]
        return bool(order) and order[-1] == "save_start"

    def check_resume(self, text):
        """If it got so far: it resumed from the newest committed step, and has what was saved there."""
        got = job.last(self.events(), "resume")
        if not job.last(self.events(), "run"):
            return
        job.check((got and got["step"]) == self.newest, f"{text}: resumed from {got}, the newest committed step is {self.newest}")
        if got:
            job.same_state(job.last(whole, "save_start", step=got["step"]), got, text)


def newest_step():
    return (job.committed(ckpt) or [None])[-1]


def kill_in_save(a):
    a.until_more("run", 1)
    a.until_more("save_start", draw.randint(1, 3))
    time.sleep(draw.uniform(0, 0.8 * save_seconds))


def kill_in_step(a):
    a.until_more("run", 1)
    a.until_more("step", draw.randint(1, 12))


def kill_in_start(a):
    """While it opens, reads metadata, or loads."""
    a.job.pids()
    time.sleep(draw.uniform(0, 0.5))


job.run(2, config("whole"))
whole = job.events(tmp / "whole")
want = job.losses(whole)
durations = sorted(e["seconds"] for e in whole if e["event"] == "save")
save_seconds = durations[len(durations) // 2]
path = config("killed")
plan = [kill_in_save] * 13 + [kill_in_step] * 4 + [kill_in_start] * 3
draw.shuffle(plan)
inside, seen = 0, {}


def finish(a, text):
    """After its death: what it logged is right and nothing committed is gone."""
    a.check_resume(text)
    for step, loss in job.losses(a.events()).items():
        job.check(loss == want[step], f"{text}: loss of step {step} is {loss!r}, not {want[step]!r}")
        seen[step] = loss
    after = newest_step()
    job.check(a.newest is None or after >= a.newest, f"{text}: step {a.newest} was committed before; now there are {job.committed(ckpt)}")
    return after


for n, kill in enumerate(plan, 1):
    ranks = draw.choice([1, 2, 3, 4, 6])
    victim = draw.randrange(ranks)
    text = f"kill {n} of {KILLS}: rank {victim} of {ranks}, {kill.__name__}"
    a = Attempt(n, ranks)
    kill(a)
    a.job.kill_rank(victim)
    job.check(a.job.wait() != 0, f"{text}: mpirun calls a killed job a success")
    inside += a.in_a_save()
    after = finish(a, text)
    at = a.events()[-1]["step"] if a.events() else a.newest
    job.say(f"{text}: at step {at}{' in a save' if a.in_a_save() else ''}; newest committed step {a.newest} -> {after}")

job.check(inside * 3 >= KILLS, f"only {inside} of {KILLS} kills fell into a save")
a = Attempt(KILLS + 1, draw.choice([1, 2, 3, 4, 6]))
job.check(a.job.wait() == 0, f"the last attempt failed:\n{a.job.output}")
finish(a, "the last attempt")
job.check(sorted(seen) == list(range(1, STEPS + 1)), "the attempts together miss steps")
job.check(job.last(a.events(), "end")["weights_crc32c"] == job.last(whole, "end")["weights_crc32c"], "other final weights than the undisturbed run")
leftover = [p.name for p in ckpt.iterdir() if ".bad-" in p.name]
job.check(not leftover, f"a kill made a committed step bad: {leftover}")
for step in job.committed(ckpt):
    job.tool("ckpt", "verify", f"file:{ckpt}", step)
job.say(f"passed: {KILLS} kills, {inside} inside a save")
