#!/usr/bin/env python3
"""A part that hangs, or crawls, near the end of a save is sent again on another connection: the save ends long before the stall time-out, nothing failed,
and the object is whole. The same fault with the time-out as the only way out would take STALL seconds."""

import os
import pathlib
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

STALL = 600

root = s3job.server("faults")
os.environ.update(TESSERA_S3_STALL_SECONDS=str(STALL), TESSERA_S3_RETRY_SECONDS=str(STALL))
control = s3job.control()
tmp = job.workspace()
job.write_data(tmp / "data")
URL = f"{root}/run"
running = s3job.Job(tmp, "run", 2, URL, **s3job.LARGE)
running.saves_again("at the start")
PARTS = {"method": "PUT", "query": "partNumber="}

LATE = {
    "a part without an answer": {"fault": "hang", "count": 1, **PARTS},
    "a part that crawls": {"fault": "slow", "rate": 2000, "count": 1, **PARTS},
    "a part of each rank without an answer": {"fault": "hang", "count": 2, **PARTS},
}
for text, rule in LATE.items():
    control.forget()
    control.rules(rule)
    begun = time.monotonic()
    got = running.save()
    took = time.monotonic() - begun
    job.check(control.applied() == [rule["count"]], f"{text}: applied {control.applied()}")
    job.check(got["event"] == "save" and took < STALL / 4, f"{text}: {got} after {took:.0f} s")
    control.rules()  # lets go of the late ones
    sent = [(r["path"], r["query"]) for r in control.log(**PARTS)]
    twice = {s for s in sent if sent.count(s) > 1}
    job.check(twice and len(sent) <= len(set(sent)) + 2 * rule["count"], f"{text}: {len(sent)} parts sent, of {len(set(sent))}: {sorted(twice)} twice")
    steps = s3job.all_listed_are_whole(URL, text, s3job.KEEP)
    job.check(steps[-1] == got["saved_step"], f"{text}: steps {steps}, saved {got['saved_step']}")
    job.say(f"passed: {text}: {took:.1f} s")

running.stop()
s3job.secret_stays_secret(tmp, root)
