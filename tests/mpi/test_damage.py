#!/usr/bin/env python3
"""A damaged step: seen by verify and by a resume, which names the place, falls back to the step before, reaches the step again and writes it
anew beside the renamed damaged one. And rewind: starting below the newest step is refused unless it was asked for."""

import shutil

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, EVERY = 24, 4
tmp = job.workspace()
job.write_data(tmp / "data")


def config(name, **change):
    return job.write_config(tmp, name, tmp / "data", train_steps=STEPS, checkpoint_every=EVERY, **change)


job.run(3, config("whole"))
whole = job.events(tmp / "whole")
crc = job.last(whole, "end")["weights_crc32c"]
job.check(job.committed(tmp / "whole" / "ckpt") == list(range(EVERY, STEPS + 1, EVERY)), "the undisturbed run misses steps")


def copy(name):
    """A run whose root is a copy of the undisturbed run's, and the folder of its newest step."""
    path = config(name)
    shutil.copytree(tmp / "whole" / "ckpt", tmp / name / "ckpt")
    return path, tmp / name / "ckpt", job.step_dir(tmp / name / "ckpt", STEPS)


def flip(file, at):
    with open(file, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 0x10]))


def payload_byte(file):
    """The place of a byte of a tensor: headers come first and padding is zero, so the last byte that is not zero."""
    content = file.read_bytes()
    return next(i for i in range(len(content) - 1, 0, -1) if content[i])


def falls_back(name, path, ckpt, words, ranks):
    """A job resumes from the step before, says `words`, writes the newest step again, and ends as the undisturbed run did."""
    damaged = sorted(p.name for p in job.step_dir(ckpt, STEPS).iterdir())
    output = job.run(ranks, path)
    said = [line for line in output.splitlines() if all(w in line for w in words)]
    job.check(len(said) == 1, f"{name}: {len(said)} lines with {words}:\n{output}")
    got = job.events(tmp / name)
    job.check(job.last(got, "resume")["step"] == STEPS - EVERY, f"{name}: resumed from {job.last(got, 'resume')['step']}")
    job.same_state(job.last(whole, "save_start", step=STEPS - EVERY), job.last(got, "resume"), name)
    job.check(job.last(got, "end")["weights_crc32c"] == crc, f"{name}: other final weights")
    bad = [p for p in ckpt.iterdir() if p.name.startswith(f"step-{STEPS:012d}.bad-")]
    job.check(len(bad) == 1, f"{name}: the damaged step was not kept under another name: {sorted(p.name for p in ckpt.iterdir())}")
    job.check(sorted(p.name for p in bad[0].iterdir()) == damaged, f"{name}: the damaged step's files were touched")
    job.tool("ckpt", "verify", f"file:{ckpt}", STEPS)
    job.tool("ckpt", "verify", f"file:{ckpt}")
    job.say(f"passed: {name}: {said[0]}")


# A byte of a tensor.
for part, ranks in (("model", 2), ("optim", 3), ("ref.logps", 1)):
    name = f"flip-{part}"
    path, ckpt, newest = copy(name)
    file = max(newest.glob(f"{part}-*.h5"), key=lambda p: p.stat().st_size)
    flip(file, payload_byte(file))
    out, err = job.tool("ckpt", "verify", f"file:{ckpt}", STEPS, status=64 + 7)
    told = [line for line in (out + err).splitlines() if file.name in line and str(STEPS) in line]
    job.check(told, f"{name}: verify does not name step and file:\n{out}{err}")
    falls_back(name, path, ckpt, ["damaged", f"step {STEPS}", file.name, "tensor", "offset"], ranks)

# A shard cut short, a shard gone, metadata cut short.
path, ckpt, newest = copy("short")
file = max(newest.glob("optim-*.h5"), key=lambda p: p.stat().st_size)
with open(file, "r+b") as f:
    f.truncate(file.stat().st_size - 1)
job.tool("ckpt", "verify", f"file:{ckpt}", STEPS, status=64 + 7)
falls_back("short", path, ckpt, [str(STEPS), file.name], 2)

path, ckpt, newest = copy("gone")
file = max(newest.glob("model-*.h5"), key=lambda p: p.stat().st_size)
file.unlink()
falls_back("gone", path, ckpt, [str(STEPS), file.name], 2)

path, ckpt, newest = copy("metadata")
with open(newest / "metadata.pb", "r+b") as f:
    f.truncate((newest / "metadata.pb").stat().st_size // 2)
job.tool("ckpt", "verify", f"file:{ckpt}", STEPS, status=64 + 7)
falls_back("metadata", path, ckpt, [str(STEPS), "metadata.pb"], 2)

# Every step damaged: no silent start from nothing.
path, ckpt, newest = copy("all")
for step in job.committed(ckpt):
    file = max(job.step_dir(ckpt, step).glob("model-*.h5"), key=lambda p: p.stat().st_size)
    flip(file, payload_byte(file))
j = job.start(2, path)
job.check(j.wait() != 0, f"all steps are damaged and the job starts over:\n{j.output}")
job.check(len(job.error_lines(j.output)) == 1, f"not one clear line:\n{j.output}")
job.say(f"passed: all steps damaged: {job.error_lines(j.output)[0]}")

# Rewind.
path, ckpt, newest = copy("rewind")
before = sorted(p.name for p in ckpt.iterdir() if p.name.startswith("step-"))
for resume in ("12", "never"):
    j = job.start(2, path, f"checkpoint.resume={resume}")
    job.check(j.wait() != 0, f"resume={resume} below the newest step was allowed without checkpoint.rewind")
    errors = job.error_lines(j.output)
    job.check(len(errors) == 1 and "rewind" in errors[0] and str(STEPS) in errors[0], f"resume={resume}: not one clear line:\n{j.output}")
    job.check(sorted(p.name for p in ckpt.iterdir() if p.name.startswith("step-")) == before, f"resume={resume}: a refused rewind changed steps")
output = job.run(2, path, "checkpoint.resume=12", "checkpoint.rewind=true")
got = job.events(tmp / "rewind")
job.check(job.last(got, "resume")["step"] == 12, "did not rewind to step 12")
job.same_losses(job.losses(whole), job.losses(got), range(13, STEPS + 1), "rewound to step 12")
retired = sorted(p.name.split(".")[0] for p in ckpt.iterdir() if ".retired-" in p.name)
job.check(retired == [f"step-{s:012d}" for s in (16, 20, 24)], f"retired: {retired}")
job.check(job.committed(ckpt) == list(range(EVERY, STEPS + 1, EVERY)), f"steps after the rewind: {job.committed(ckpt)}")
job.tool("ckpt", "verify", f"file:{ckpt}")
job.run(2, path, "checkpoint.resume=never", "checkpoint.rewind=true", f"train.steps={STEPS}")
got = job.events(tmp / "rewind")
job.check(job.last(got, "resume") is None and job.last(got, "end")["weights_crc32c"] == crc, "resume=never with rewind did not start over")
job.check(job.committed(ckpt) == list(range(EVERY, STEPS + 1, EVERY)), f"steps after starting over: {job.committed(ckpt)}")
j = job.start(2, path, "checkpoint.resume=13")
job.check(j.wait() != 0 and len(job.error_lines(j.output)) == 1 and "13" in job.error_lines(j.output)[0], f"a step that is not there:\n{j.output}")
job.say("passed: rewind")
