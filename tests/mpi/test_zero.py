#!/usr/bin/env python3
"""ZeRO 0 to 3 and splits of dp over MPI: losses bit for bit those of one rank; a checkpoint written at ZeRO 3 on four ranks goes on at ZeRO 0 on
two, and the other way round, with the same hashes of weights and moments at every save and the same losses."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, CUT = 16, 9  # the schedule is constant: any other looks at train.steps
tmp = job.workspace()
job.write_data(tmp / "data")


def config(name, **change):
    return job.write_config(tmp, name, tmp / "data", train_steps=STEPS, optim_schedule="constant", algo_warmup_sft_steps=4, checkpoint_every=3, checkpoint_view="never", **change)


def compare(name):
    got = job.events(tmp / name)
    job.same_losses(job.losses(whole), job.losses(got), range(1, STEPS + 1), name)
    for saved in (e for e in got if e["event"] == "save_start" and job.last(whole, "save_start", step=e["step"])):
        job.same_state(job.last(whole, "save_start", step=saved["step"]), saved, f"{name}, step {saved['step']}")
    job.check(job.last(whole, "end")["weights_crc32c"] == job.last(got, "end")["weights_crc32c"], f"{name}: other final weights")
    job.say(f"passed: {name}")
    return got


job.run(1, config("whole", parallel_zero=0))
whole = job.events(tmp / "whole")
job.check(len({e["weights_hash"] for e in whole if e["event"] == "save_start"}) > 4, "the weights do not move")

job.run(4, config("replicas", parallel_zero=3, parallel_dp_shard=2, memory={"recompute": "block"}))
compare("replicas")

for name, first, then in (("3-to-0", (4, 3), (2, 0)), ("0-to-3", (2, 0), (4, 3)), ("2-to-1", (4, 2), (3, 1))):
    path = config(name, parallel_zero=first[1])
    job.run(first[0], path, f"train.steps={CUT}")
    job.run(then[0], path, f"parallel.zero={then[1]}")
    resume = job.last(job.events(tmp / name), "resume")
    job.check(resume and resume["step"] == CUT and resume["ranks"] == then[0], f"{name}: resumed as {resume}")
    job.same_state(job.last(job.events(tmp / name), "save_start", step=CUT), resume, name)
    compare(name)
