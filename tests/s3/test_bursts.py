#!/usr/bin/env python3
"""One job under bursts of faults that pass by themselves: each save succeeds in the end, each fault was met, and no listed step is broken."""

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
URL = f"{root}/run"
WRITES = {"method": "PUT|POST"}
FILES = {"method": "PUT|POST", "path": r"\.h5$"}
running = s3job.Job(tmp, "run", 2, URL, **s3job.LARGE)
running.saves_again("at the start")
job.check([r for r in control.log(query=r"partNumber=")], "no file goes up in parts")

# What passes by itself. Every rule must have been met, or it showed nothing.
BURSTS = {
    "503 SlowDown": [{"fault": "slowdown", "count": 10, **WRITES}],
    "503 with Retry-After": [{"fault": "slowdown", "headers": {"Retry-After": "1"}, "count": 3, **WRITES}],
    "500": [{"fault": "internal", "count": 10, **WRITES}],
    "429": [{"fault": "throttled", "count": 10, **WRITES}],
    "500 to a part": [{"fault": "internal", "count": 2, "query": "partNumber="}],
    "500 to the commit": [{"fault": "internal", "count": 2, "path": r"metadata\.pb$", "method": "PUT"}],
    "resets": [{"fault": "reset", "count": 5, **WRITES}],
    "resets in bodies": [{"fault": "reset", "count": 4, "after": 100_000, **FILES}],
    "lost replies": [{"fault": "lost", "count": 2, **FILES}, {"fault": "lost", "count": 1, "query": "uploadId=[^&]*$", "method": "POST"}],
    "a lost reply to the commit": [{"fault": "lost", "count": 1, "path": r"metadata\.pb$", "method": "PUT"}],
    "a frozen connection": [{"fault": "hang", "count": 2, **FILES}],
    "slow uploads": [{"fault": "slow", "rate": 4_000_000, "count": 6, **FILES}],
    "lists that lag": [{"fault": "lag", "seconds": 3}],
    "If-None-Match ignored": [{"fault": "strip"}],
}
for text, rules in BURSTS.items():
    control.rules(*rules)
    got = running.save()
    applied = control.applied()
    job.check(got["event"] == "save", f"{text}: {got}")
    job.check(all(applied) or "fault': 'lag" in str(rules), f"{text}: applied {applied}")
    control.rules()
    steps = s3job.all_listed_are_whole(URL, text, s3job.KEEP)
    job.check(steps[-1] == got["saved_step"], f"{text}: steps {steps}, saved {got['saved_step']}")
    job.say(f"passed: {text}: {applied}")

running.stop()
s3job.secret_stays_secret(tmp, root)
