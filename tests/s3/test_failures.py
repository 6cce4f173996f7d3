#!/usr/bin/env python3
"""One job under faults that stay: training goes on, each failure is told once with rank, key and cause, no listed step is broken, and once the fault is gone
the next save succeeds without a restart. What failed saves leave is gc's."""

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
FILES = {"method": "PUT|POST", "path": r"\.h5$"}
running = s3job.Job(tmp, "run", 2, URL, **s3job.LARGE)
running.saves_again("at the start")

FAILURES = {
    "503 without an end": ([{"fault": "slowdown", **FILES}], "503|SlowDown"),
    "429 without an end": ([{"fault": "throttled", **FILES}], "429|TooManyRequests"),
    "resets without an end": ([{"fault": "reset", "after": 1000, **FILES}], "reset|connection|Connection"),
    "no answer": ([{"fault": "hang", **FILES}], "time|too slow"),
    "quota full": ([{"fault": "quota", **FILES}], "[Qq]uota"),
    "an expired token": ([{"fault": "expired", **FILES}], "[Ee]xpired"),
    "a clock that is off": ([{"fault": "skewed", **FILES}], "clock|Skewed"),
    "access denied": ([{"fault": "reply", "status": 403, "code": "AccessDenied", **FILES}], "AccessDenied|403"),
    "no commit": ([{"fault": "internal", "path": r"metadata\.pb$", "method": "PUT"}], "500|InternalError"),
}
for text, (rules, cause) in FAILURES.items():
    before = s3job.all_listed_are_whole(URL, text, s3job.KEEP)
    control.rules(*rules)
    asked = running.ask()
    running.trains_on(text)
    event = running.outcome(asked)
    running.failed_once(event, cause, text)
    control.rules()
    job.check(s3job.all_listed_are_whole(URL, text, s3job.KEEP) == before, f"{text}: steps {before} before, now {s3job.committed(URL)}")
    running.saves_again(text)
    job.say(f"passed: {text}")
last = running.stop()
job.check(not job.error_lines(running.job.output), f"a failure became an error:\n{running.job.output}")

# Nothing of the failed saves is left but what gc finds.
job.tool("ckpt", "gc", URL, "--age=0")
steps = s3job.all_listed_are_whole(URL, "after gc")
left = [k for k in s3job.keys(URL) if k.startswith("step-") and int(k[5:17]) not in steps]
job.check(not left and not s3job.uploads(URL), f"gc leaves {left} {s3job.uploads(URL)}")

s3job.secret_stays_secret(tmp, root)
