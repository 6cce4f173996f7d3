#!/usr/bin/env python3
"""What a load asks the server for, by the proxy's records: a state saved by 4 ranks and loaded by 3 moves each stored byte once, by ranges; a load of the model
alone asks for no byte of the optimiser. Both by few requests, though the state is of many small pieces: ZeRO's buckets are 16 KiB."""

import json
import pathlib
import re
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

AMPLIFICATION = 1.05
PER_FILE, REQUEST = 4, 8 << 20  # requests: so many for a file, and one more for so many bytes
root = s3job.server("faults")
control = s3job.control()
tmp = job.workspace()
job.write_data(tmp / "data")
URL, STEPS = f"{root}/run", 6
path = job.write_config(tmp, "run", tmp / "data", checkpoint_url=URL, train_steps=STEPS, checkpoint_every=3, algo_warmup_sft_steps=3, **{**s3job.LARGE, "parallel_bucket": 16 << 10})
job.run(4, path)
whole = job.events(tmp / "run")
stored = {k: n for k, n in s3job.keys(URL).items() if k.startswith(f"step-{STEPS:012d}/") and k.endswith(".h5")}
job.check(sum(stored.values()) > 30 << 20 and len(stored) >= 8, f"too little to measure: {stored}")


def gets(part):
    """{key: [(first, last)]} of the ranges that came of files whose name begins like this."""
    found = {}
    for r in control.log(method="GET", path=r"/step-\d{12}/" + part + r"[^/]*\.h5$"):
        m = re.fullmatch(r"bytes=(\d+)-(\d+)", r["range"] or "")
        job.check(m, f"a file is read without a range: {r}")
        job.check(r["status"] == 206 and r["got"] == int(m[2]) - int(m[1]) + 1, f"a range that is not one: {r}")
        found.setdefault(r["path"], []).append((int(m[1]), int(m[2]) + 1))
    return found


def moved(ranges):
    """Bytes that came, and those of them that are different ones."""
    total = unique = 0
    for one in ranges.values():
        at = 0
        for first, end in sorted(one):
            total += end - first
            unique += max(0, end - max(first, at))
            at = max(at, end)
    return total, unique


def few(ranges, text):
    """They came by few requests. Returns how many."""
    count, (total, _) = sum(map(len, ranges.values())), moved(ranges)
    most = PER_FILE * len(ranges) + total // REQUEST
    job.check(count <= most, f"{text}: {count} requests for {total} bytes of {len(ranges)} files, {most} are enough: {ranges}")
    return count


# All of it, on three ranks.
control.forget()
job.run(3, path, f"run.dir={tmp / 'three'}")
resume = job.last(job.events(tmp / "three"), "resume")
job.same_state(job.last(whole, "save_start", step=STEPS), resume, "4 ranks to 3")
total, unique = moved(gets(""))
size = sum(stored.values())
job.check(total <= AMPLIFICATION * unique, f"4 to 3: {total} bytes came, {unique} different ones")
job.check(total <= AMPLIFICATION * size, f"4 to 3: {total} bytes came, {size} are stored")
count = few(gets(""), "4 to 3")
job.say(f"passed: 4 to 3 ranks: {total} bytes in {count} ranges, {unique} different ones, {size} stored: {total / unique:.4f}")

# The model alone: an evaluation, and a copy of one part.
def model_alone(text, run):
    control.forget()
    run()
    job.check(not gets("optim"), f"{text}: the optimiser is read: {gets('optim')}")
    total, unique = moved(gets("model"))
    size = sum(n for k, n in stored.items() if "/model" in k)
    job.check(unique > size // 2, f"{text}: {unique} bytes came, the model's files have {size}")
    job.check(total <= AMPLIFICATION * unique, f"{text}: {total} bytes came, {unique} different ones")
    job.say(f"passed: {text}: {total} bytes of the model's {size} in {sum(map(len, gets('model').values()))} ranges: {total / unique:.4f}; of the optimiser none")


def evaluate():
    r = subprocess.run(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "3", job.TESSERA, "eval", str(path), f"eval.step={STEPS}"],
                       stdin=subprocess.DEVNULL, capture_output=True, text=True, env=job.environment(), timeout=job.LIMIT_S, check=False)
    job.said.extend((r.stdout, r.stderr))
    job.check(r.returncode == 0 and json.loads(r.stdout)["step"] == STEPS, f"eval: {r}")


model_alone("eval on 3 ranks", evaluate)
few(gets("model"), "eval on 3 ranks")
model_alone("copy of a part", lambda: job.tool("ckpt", "copy", URL, STEPS, f"file:{tmp}/model", "--part", "model"))

# Looking at a step reads its metadata and a little of its files.
control.forget()
job.tool("ckpt", "ls", URL)
job.tool("ckpt", "show", URL)
total, _ = moved(gets(""))
job.check(total < size // 100, f"ls and show read {total} bytes of files")
s3job.secret_stays_secret(tmp, root)
