#!/usr/bin/env python3
"""Loads and verify while the server fails, cuts replies short, stalls or answers slowly: they get over it with the right bytes. A flipped bit
is damage."""

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
URL, last = f"{root}/run", 4
path = job.write_config(tmp, "run", tmp / "data", checkpoint_url=URL, train_steps=last, checkpoint_every=2, algo_warmup_sft_steps=2, **s3job.LARGE)
job.run(2, path)

READS = {
    "503": [{"fault": "slowdown", "count": 5, "method": "GET"}],
    "429 to ranges": [{"fault": "throttled", "count": 5, "method": "GET", "path": r"\.h5$"}],
    "resets": [{"fault": "reset", "count": 3, "method": "GET"}],
    "resets in bodies": [{"fault": "reset", "count": 3, "after": 5000, "method": "GET", "path": r"\.h5$"}],
    "truncated bodies": [{"fault": "cut", "count": 4, "method": "GET", "path": r"\.h5$"}],
    "truncated metadata": [{"fault": "cut", "count": 2, "method": "GET", "path": r"metadata\.pb$"}],
    "slow bodies": [{"fault": "slow", "rate": 8_000_000, "count": 2, "method": "GET", "path": r"\.h5$"}],
    "a frozen connection": [{"fault": "hang", "count": 1, "method": "GET", "path": r"\.h5$"}],
}
saved = job.last(job.events(tmp / "run"), "save_start", step=last)
for text, rules in READS.items():
    control.rules(*rules)
    job.tool("ckpt", "verify", URL, last)
    job.check(all(control.applied()), f"reads, {text}: applied {control.applied()}")
    control.rules(*rules)
    name = "load-" + text.replace(" ", "-")
    job.run(3, path, f"run.dir={tmp / name}", f"train.steps={last}")
    job.check(all(control.applied()), f"loads, {text}: applied {control.applied()}")
    resume = job.last(job.events(tmp / name), "resume")
    job.check(resume and resume["step"] == last, f"loads, {text}: {resume}")
    job.same_state(saved, resume, f"loads, {text}")
    job.say(f"passed: reads, {text}")
control.rules({"fault": "flip", "after": 5000, "method": "GET", "path": r"\.h5$"})
out, err = job.tool("ckpt", "verify", URL, last, status=71)
job.say(f"passed: reads, a flipped bit: {out.splitlines()[0]}")
control.rules()
s3job.secret_stays_secret(tmp, root)
