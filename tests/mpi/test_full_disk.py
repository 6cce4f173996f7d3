#!/usr/bin/env python3
"""A file system too small for the second save. on_error: warn trains on, keeps the first step valid and leaves nothing half-written;
on_error: stop ends with one clear line and the exit code of NO_SPACE. Runs itself in a mount name space of its own."""

import os
import shutil
import subprocess

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

if "TESSERA_OWN_MOUNTS" not in os.environ:
    for own in (["unshare", "-m"], ["unshare", "-m", "--propagation", "unchanged"]):  # the second in a chroot
        probe = subprocess.run([*own, "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt && umount /mnt"], capture_output=True, text=True)
        if probe.returncode == 0:
            os.execvpe("unshare", [*own, sys.executable, __file__], {**os.environ, "TESSERA_OWN_MOUNTS": "1"})
    job.say(f"skipped: no tmpfs can be mounted here: {probe.stderr.strip()}")
    sys.exit(77)

tmp = job.workspace()
job.write_data(tmp / "data")
# Large enough that a step's bytes are tensors, not headers; steps 10, 20, 30 are saved, the second cannot fit.
SIZES = dict(train_steps=30, checkpoint_every=10, model_hidden=64, model_head_dim=16, model_ffn=128, algo_warmup_sft_steps=5)


def bytes_of(folder):
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


job.run(2, job.write_config(tmp, "room", tmp / "data", **SIZES))
one = bytes_of(job.step_dir(tmp / "room" / "ckpt", 10))
disk = tmp / "disk"
disk.mkdir()


def small_disk():
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * one) // 1024 + 64}k", "tmpfs", str(disk)], check=True)


def umount():
    subprocess.run(["umount", str(disk)], check=True)


def steps_on_disk(ckpt):
    return sorted(p.name for p in ckpt.iterdir() if p.name.startswith("step-"))


def first_step_is_whole(ckpt):
    job.check(job.committed(ckpt) == [10], f"committed steps {job.committed(ckpt)}, not only 10")
    job.check(steps_on_disk(ckpt) == ["step-000000000010"], f"a failed save left something: {steps_on_disk(ckpt)}")
    job.tool("ckpt", "verify", f"file:{ckpt}", 10)


for is_async in (True, False):
    small_disk()
    name = f"warn-{is_async}"
    path = job.write_config(tmp, name, tmp / "data", checkpoint_url=f"file:{disk}/ckpt", checkpoint_async=is_async, checkpoint_on_error="warn", **SIZES)
    output = job.run(2, path)
    got = job.events(tmp / name)
    failed = [e for e in got if e["event"] == "save_failed"]
    job.check(len(failed) == 2, f"{name}: {len(failed)} save_failed events, not those of steps 20 and 30:\n{output}")
    job.check(all("No space left" in e["error"] for e in failed), f"{name}: the error does not say what is wrong: {failed}")
    job.check(job.last(got, "end") and job.last(got, "end")["step"] == 30, f"{name}: training stopped:\n{output}")
    job.same_losses(job.losses(job.events(tmp / "room")), job.losses(got), range(1, 31), name)
    job.check(not job.error_lines(output), f"{name}: a warning became an error:\n{output}")
    first_step_is_whole(disk / "ckpt")
    # The same disk, when there is room again, goes on from step 10.
    shutil.copytree(disk / "ckpt", tmp / f"{name}-copy")
    umount()
    path = job.write_config(tmp, f"{name}-again", tmp / "data", checkpoint_url=f"file:{tmp}/{name}-copy", **SIZES)
    job.run(3, path)
    job.check(job.last(job.events(tmp / f"{name}-again"), "resume")["step"] == 10, f"{name}: did not resume from step 10")
    job.say(f"passed: {name}")

    small_disk()
    name = f"stop-{is_async}"
    path = job.write_config(tmp, name, tmp / "data", checkpoint_url=f"file:{disk}/ckpt", checkpoint_async=is_async, checkpoint_on_error="stop", **SIZES)
    output = job.run(2, path, status=64 + 6)
    errors = job.error_lines(output)
    job.check(len(errors) == 1, f"{name}: {len(errors)} error lines:\n{output}")
    job.check("No space left" in errors[0] and "step-000000000020" in errors[0], f"{name}: the error does not name what and where: {errors[0]}")
    first_step_is_whole(disk / "ckpt")
    umount()
    job.say(f"passed: {name}: {errors[0]}")
