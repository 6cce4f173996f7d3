#!/usr/bin/env python3
"""Credentials of a command expire in the middle of a save: each rank asks the command again, the save succeeds, nothing failed; and what is used from then on
is the new key: the server knows the old one no more."""

import os
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

RANKS = 2
root = s3job.server("faults")
control = s3job.control()
tmp = job.workspace()
job.write_data(tmp / "data")
URL = f"{root}/run"
OLD = {"AWS_ACCESS_KEY_ID": "OLDKEY00000000000000", "AWS_SECRET_ACCESS_KEY": "old" * 12}
NEW = {name: os.environ[name] for name in OLD}
s3job.radosgw("key", *OLD.values())
s3job.direct()

# Where nobody looks for the secret: the command, what it prints, and a line for each time it was asked.
keys = pathlib.Path(os.environ["TESSERA_SERVER_DIR"]) / "keys"
keys.mkdir()


def give(pair):
    text = '{"Version":1,"AccessKeyId":"%s","SecretAccessKey":"%s"}' % tuple(pair.values())
    (keys / "next").write_text(text)
    os.replace(keys / "next", keys / "now")


def asked():
    return len((keys / "asked").read_text().splitlines())


(keys / "command").write_text(f"#!/bin/sh\necho once >> {keys}/asked\nexec cat {keys}/now\n")
(keys / "command").chmod(0o700)
(keys / "config").write_text(f"[default]\ncredential_process = {keys}/command\n")
give(OLD)
for name in OLD:
    del os.environ[name]
os.environ["AWS_CONFIG_FILE"] = str(keys / "config")

running = s3job.Job(tmp, "run", RANKS, URL)
event = running.save()
job.check(event["event"] == "save", f"with the old key: {event}")
give(NEW)
before = asked()
control.rules(*({"fault": "expired", "count": 1, "method": "PUT|POST", "path": rf"-{rank:05}\.[^/]*\.h5$"} for rank in range(RANKS)))
at = running.ask()
running.trains_on("expired")
event = running.outcome(at)
job.check(control.applied() == [1] * RANKS, f"expired: applied {control.applied()}")
job.check(event["event"] == "save", f"expired: {event}")
job.check(asked() == before + RANKS, f"expired: the command was asked {asked() - before} times by {RANKS} ranks")
control.rules()
job.say(f"passed: expired in a save on each of {RANKS} ranks, and renewed")

s3job.radosgw("key", OLD["AWS_ACCESS_KEY_ID"], "off")
old = s3job.s3.Client({**s3job.direct().env, **OLD})
job.until(lambda: old.request("GET", f"/{s3job.split(URL)[0]}").status == 403, "the server still takes the old key", running.job)
running.saves_again("with the new key")
running.stop()
job.check(not job.error_lines(running.job.output), f"an error:\n{running.job.output}")
job.say("passed: the new key alone from then on")
os.environ.update(NEW)
s3job.secret_stays_secret(tmp, root)
