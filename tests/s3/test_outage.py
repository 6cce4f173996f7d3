#!/usr/bin/env python3
"""The server dies, freezes, comes back and is full while a job saves: training goes on, each failure is told once, no listed step is broken, and saves succeed
again without a restart of the job."""

import os
import pathlib
import signal
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

root = s3job.server("faults")  # for slow uploads, so that saves are met under way
control = s3job.control()
tmp = job.workspace()
job.write_data(tmp / "data")
URL = f"{root}/run"
SLOW = {"fault": "slow", "rate": 200_000, "method": "PUT", "path": r"\.h5$"}
running = s3job.Job(tmp, "run", 3, URL)
running.saves_again("at the start")


def in_a_save():
    """A save whose uploads are under way."""
    control.forget()
    control.rules(SLOW)
    asked = running.ask()
    job.until(lambda: [r for r in control.log(fault="slow") if r["put"]], "no upload begins", running.job)
    return asked


def after(text, before):
    job.check(s3job.all_listed_are_whole(URL, text, s3job.KEEP) == before, f"{text}: steps {before} before, now {s3job.committed(URL)}")
    running.saves_again(text)
    job.say(f"passed: {text}")


# Killed for longer than tries go on.
before = s3job.all_listed_are_whole(URL, "before", s3job.KEEP)
asked = in_a_save()
os.kill(s3job.pid(), signal.SIGKILL)
running.trains_on("killed")
event = running.outcome(asked)
running.failed_once(event, "connect|reset|closed|server", "killed")
event = running.save()  # nobody is there at all
running.failed_once(event, "connect|reset|closed|server", "not there")
s3job.radosgw("start")
control.rules()
after("killed and restarted", before)

# Killed and back at once: the save gets over it.
asked = in_a_save()
os.kill(s3job.pid(), signal.SIGKILL)
s3job.radosgw("start")
control.rules()
event = running.outcome(asked)
if event["event"] == "save_failed":
    running.failed_once(event, "connect|reset|closed|server", "killed and back")
running.saves_again("killed and back")
job.say(f"passed: killed and back: {event['event']}")

# Frozen for longer than a request may stall.
before = s3job.all_listed_are_whole(URL, "before", s3job.KEEP)
asked = in_a_save()
os.kill(s3job.pid(), signal.SIGSTOP)
running.trains_on("frozen")
event = running.outcome(asked)
running.failed_once(event, "time|too slow", "frozen")
os.kill(s3job.pid(), signal.SIGCONT)
control.rules()
after("frozen", before)

# Frozen for a moment.
asked = in_a_save()
os.kill(s3job.pid(), signal.SIGSTOP)
running.trains_on("frozen for a moment")
os.kill(s3job.pid(), signal.SIGCONT)
control.rules()
event = running.outcome(asked)
job.check(event["event"] == "save", f"frozen for a moment: {event}")
running.saves_again("frozen for a moment")
job.say("passed: frozen for a moment")

# Full: the real quota of the user, below what a single file has.
before = s3job.all_listed_are_whole(URL, "before", s3job.KEEP)
s3job.radosgw("quota", 1000)
asked = running.ask()
running.trains_on("quota")
event = running.outcome(asked)
running.failed_once(event, "[Qq]uota", "quota")
s3job.radosgw("quota", "off")
after("quota", before)

last = running.stop()
job.check(not job.error_lines(running.job.output), f"a failure became an error:\n{running.job.output}")
job.run(2, running.config, f"run.dir={tmp / 'again'}", f"train.steps={last}")
job.same_state(job.last(job.events(running.dir), "save_start", step=last), job.last(job.events(tmp / "again"), "resume"), "after all that")
s3job.secret_stays_secret(tmp, root)
