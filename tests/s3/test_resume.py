#!/usr/bin/env python3
"""Train on S3, kill -9 a rank in the middle of an upload, go on with another number of ranks: the losses and hashes are those of a run on a disk that nobody
disturbed. What a killed rank leaves is orphan uploads, which gc aborts, and nothing that is listed. And only the ranges that are needed are read."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

root = s3job.server("faults")
control = s3job.control()
tmp = job.workspace()
job.write_data(tmp / "data")
URL = f"{root}/killed"
STEPS, EVERY = 9, 2
SIZES = dict(train_steps=STEPS, checkpoint_every=EVERY, algo_warmup_sft_steps=3, **s3job.LARGE)


def config(name, url, **change):
    return job.write_config(tmp, name, tmp / "data", checkpoint_url=url, **SIZES, **change)


job.run(2, config("whole", f"file:{tmp}/whole/ckpt"))
whole = job.events(tmp / "whole")
want, seen = job.losses(whole), {}


def attempt(name, ranks, newest):
    """A job on the root that is killed in the middle of an upload of the first save that begins. Returns its events."""
    control.forget()
    # Every part takes its time.
    control.rules({"fault": "slow", "method": "PUT", "query": r"partNumber=", "rate": 400_000})
    j = job.start(ranks, config("killed", URL), f"run.dir={tmp / name}")
    victim = ranks - 1
    job.until(lambda: [r for r in control.log(method="PUT", query=r"partNumber=") if r["put"]], "no upload in parts comes", j)
    j.kill_rank(victim)
    job.check(j.wait() != 0, "mpirun calls a killed job a success")
    control.rules()
    job.say(f"{name}: rank {victim} of {ranks} was killed in an upload; newest step {newest} -> {s3job.committed(URL)[-1:]}")
    return check(name, newest)


def check(name, newest):
    got = job.events(tmp / name)
    resume = job.last(got, "resume")
    job.check((resume and resume["step"]) == newest, f"{name}: resumed from {resume}, the newest step was {newest}")
    if resume:
        job.same_state(job.last(whole, "save_start", step=newest), resume, name)
    for step, loss in job.losses(got).items():
        job.check(loss == want[step], f"{name}: loss of step {step} is {loss!r}, not {want[step]!r}")
        seen[step] = loss
    return got


attempt("first", 2, None)
job.check(s3job.committed(URL) == [], f"a step was committed without its files: {s3job.committed(URL)}")
job.check(s3job.uploads(URL), "a kill in the middle of an upload left no upload: was it one?")
job.check(not [k for k in s3job.keys(URL) if k.endswith("metadata.pb")], "metadata of a save that was killed")

# Two saves are committed before the next kill.
second = job.start(3, config("killed", URL), f"run.dir={tmp / 'second'}")
job.until(lambda: job.last(job.events(tmp / "second"), "save", saved_step=2 * EVERY), f"step {2 * EVERY} is never saved", second)
second.kill_rank(0)
second.wait()
newest = s3job.committed(URL)[-1]
check("second", None)
attempt("third", 1, newest)
newest = s3job.committed(URL)[-1]
job.run(4, config("killed", URL), f"run.dir={tmp / 'last'}")
last = check("last", newest)
job.check(sorted(seen) == list(range(1, STEPS + 1)), f"the attempts together miss steps: {sorted(seen)}")
job.check(job.last(last, "end")["weights_crc32c"] == job.last(whole, "end")["weights_crc32c"], "other final weights than the undisturbed run")
s3job.all_listed_are_whole(URL, "after the last attempt")
job.say("passed: killed in uploads, resumed on 3, 1 and 4 ranks")

orphans = s3job.uploads(URL)
job.check(orphans, "no upload is left for gc")
before = s3job.keys(URL)
out, _ = job.tool("ckpt", "gc", URL, "--age=0", "--dry-run")
job.check(s3job.uploads(URL) == orphans and s3job.keys(URL) == before, f"a dry run removes:\n{out}")
out, _ = job.tool("ckpt", "gc", URL, "--age=0")
job.check(s3job.uploads(URL) == [], f"uploads stay: {s3job.uploads(URL)}; gc said:\n{out}")
steps = s3job.all_listed_are_whole(URL, "after gc")
gone = {k for k in before if k not in s3job.keys(URL)}
job.check(gone and not any("metadata.pb" in k for k in gone), f"gc removed {gone}")
job.say(f"passed: gc aborted {len(orphans)} uploads and removed {len(gone)} objects of dead attempts; steps {steps} are whole")
s3job.secret_stays_secret(tmp, root)
