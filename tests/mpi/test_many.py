#!/usr/bin/env python3
"""8 and 16 ranks under mpirun, more than there are cores: jobs at various meshes end, with one rank's losses: bit for bit without tp, else within
rounding; some with a thread that drives messages. What 16 ranks saved goes on at 8."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, CUT = 9, 6
MODEL = dict(model_layers=4, train_steps=STEPS, algo_warmup_sft_steps=3, train_global_batch=16, optim_schedule="constant", checkpoint_every=CUT, checkpoint_view="never")
tmp = job.workspace()
job.write_data(tmp / "data")


def config(name, **change):
    change = {"parallel_" + k if k not in ("memory",) else k: v for k, v in change.items()}
    return job.write_config(tmp, name, tmp / "data", **MODEL, **change)


def compare(name, bits):
    job.same_losses(whole, job.losses(job.events(tmp / name)), range(1, STEPS + 1), name, bound=not bits)
    job.say(f"passed: {name}")


job.run(1, config("whole", zero=0))
whole = job.losses(job.events(tmp / "whole"))

MESHES = (
    (8, dict(pp=2, dp=2, tp=2, sequence=True)),
    (8, dict(dp=8, zero=3, dp_shard=4, memory={"recompute": "block"}, progress="thread")),
    (16, dict(pp=4, dp=2, tp=2, stages="[0, 2, 1, 1]", schedule="zero-bubble", progress="thread")),
    (16, dict(dp=16, zero=2, dp_shard=2)),
)
for ranks, mesh in MESHES:
    name = f"{ranks}-" + "-".join(f"{k}{v}" for k, v in mesh.items() if k in ("pp", "dp", "tp", "zero"))
    job.run(ranks, config(name, **mesh))
    compare(name, bits="tp" not in mesh)

(ranks, mesh), (fewer, other) = MESHES[2], MESHES[1]
job.run(ranks, config("moved", **mesh), f"train.steps={CUT}")
job.run(fewer, config("moved", **other))
got = job.events(tmp / "moved")
resume = job.last(got, "resume")
job.check(resume and resume["step"] == CUT and resume["ranks"] == fewer, f"resumed as {resume}")
job.same_state(job.last(got, "save_start", step=CUT), resume, "16 ranks to 8")
compare("moved", bits=False)
