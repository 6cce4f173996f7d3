"""Starts the real program under mpirun for tests, watches its metrics.jsonl, and kills ranks of it.

A test imports this file, calls workspace() for a folder that is gone at the end, write_data() and write_config() for a tiny run, and start() or
run() for jobs. Whatever a test started and left alive is killed at its end, by pid. check() and fail() end the test with a message.

Only the standard library, so that /usr/bin/python3 and any other python runs it.
"""

import atexit
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TESSERA = os.environ.get("TESSERA") or sys.exit("set TESSERA to the program under test")
POLL_S = 0.001
LIMIT_S = 240  # of a single wait: far beyond what any of these jobs takes

_running = []
said = []  # by the tools that have run


def fail(text):
    print("FAILED: " + text, file=sys.stderr, flush=True)
    sys.exit(1)


def check(condition, text):
    if not condition:
        fail(text)


def say(text):
    print(text, flush=True)


def workspace():
    """A new folder; removed at exit, after what was started has ended."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="tessera-test-"))

    def clean():
        for job in _running:
            job.stop()
        shutil.rmtree(path, ignore_errors=True)

    atexit.register(clean)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return path


# ---- data and configs


def write_data(folder, rows=64, heldout=24):
    """sft.jsonl, prefs.jsonl, heldout.jsonl: sums, with a wrong answer as the rejected one. Lengths differ, so packs do."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)

    def pairs(n):
        for _ in range(n):
            a, b = draw.randrange(10 ** draw.randint(1, 3)), draw.randrange(100)
            wrong = a + b + draw.choice([-10, -1, 1, 2, 10])
            yield f"{a}+{b}=", f"{a + b}. " * draw.randint(1, 3), f"{wrong}. " * draw.randint(1, 3)

    with open(folder / "sft.jsonl", "w") as f:
        for prompt, right, _ in pairs(rows):
            f.write(json.dumps({"prompt": prompt, "completion": right}) + "\n")
    for name, n in (("prefs.jsonl", rows), ("heldout.jsonl", heldout)):
        with open(folder / name, "w") as f:
            for prompt, right, wrong in pairs(n):
                f.write(json.dumps({"prompt": prompt, "chosen": right, "rejected": wrong}) + "\n")


# A run that takes milliseconds a step: eight micro-batches, so that eight lanes have one each, and small buckets, so that ZeRO cuts many.
BASE = {
    "threads": 1,
    "run": {"name": "test", "seed": 3},
    "model": {"kind": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48, "tied": "true"},
    "data": {"max_length": 48},
    "algo": {"kind": "dpo", "beta": 0.1, "warmup_sft_steps": 12, "warmup_sft_lr": 3e-4},
    "train": {"steps": 24, "global_batch": 8, "micro_batch": 1, "log_every": 1000, "deterministic": "true", "lanes": 8},
    "optim": {"lr": 3e-4, "schedule": "cosine", "warmup_steps": 4},
    "parallel": {"zero": 1, "bucket": 16384},
    "checkpoint": {"every": 4, "keep_last": 0, "state_hash": "true", "chunk_bytes": "1MiB"},
}


def write_config(folder, name, data, **change):
    """folder/NAME.yaml for a run in folder/NAME, with checkpoints in folder/NAME/ckpt. change: "train.steps" is written train_steps."""
    sections = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE.items()}
    sections["run"]["dir"] = folder / name
    sections["checkpoint"]["url"] = f"file:{folder / name / 'ckpt'}"
    for key, file in (("sft", "sft.jsonl"), ("prefs", "prefs.jsonl"), ("heldout", "heldout.jsonl")):
        sections["data"][key] = data / file
    for key, value in change.items():
        section, _, rest = key.partition("_")
        value = str(value).lower() if isinstance(value, bool) else value
        if section in sections and isinstance(sections[section], dict):
            sections[section][rest] = value
        else:
            sections[key] = value
    path = folder / f"{name}.yaml"
    with open(path, "w") as f:
        for section, value in sections.items():
            if isinstance(value, dict):
                f.write(f"{section}:\n" + "".join(f"  {k}: {v}\n" for k, v in value.items()))
            else:
                f.write(f"{section}: {value}\n")
    return path


# ---- jobs


def environment():
    env = dict(os.environ)
    if os.geteuid() == 0:
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return env


def rank_pids(mpirun):
    """{rank: pid} of the children of mpirun that have become the program."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as f:
                parent = int(f.read().rpartition(")")[2].split()[1])
            if parent != mpirun:
                continue
            with open(f"/proc/{entry}/environ", "rb") as f:
                environ = dict(v.partition(b"=")[::2] for v in f.read().split(b"\0"))
            if os.path.samefile(f"/proc/{entry}/exe", TESSERA):
                found[int(environ[b"OMPI_COMM_WORLD_RANK"])] = int(entry)
        except (OSError, KeyError, ValueError):
            continue  # it ended meanwhile, or has not got so far
    return found


class Job:
    """mpirun -np RANKS tessera ARGUMENTS; its output is in `output`. environ: variables that only the ranks get."""

    def __init__(self, ranks, *arguments, environ=None):
        self.ranks = ranks
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        only = [word for name, value in (environ or {}).items() for word in ("-x", f"{name}={value}")]
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", *only, "-np", str(ranks), TESSERA, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, env=environment())
        _running.append(self)

    @property
    def output(self):
        self.log.seek(0)
        return self.log.read()

    def alive(self):
        return self.process.poll() is None

    def wait(self):
        """The exit status; every rank is gone then."""
        pids = rank_pids(self.process.pid) if self.alive() else {}
        try:
            status = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.stop()
            fail(f"the job did not end within {LIMIT_S} s; it said:\n{self.output}")
        until(lambda: not any(_is_program(pid) for pid in pids.values()), "ranks outlive mpirun")
        return status

    def pids(self):
        """{rank: pid}, once all ranks are there."""
        return until(lambda: (lambda p: p if len(p) == self.ranks else None)(rank_pids(self.process.pid)), "the ranks do not start", self)

    def kill_rank(self, rank):
        os.kill(self.pids()[rank], signal.SIGKILL)

    def stop(self):
        pids = rank_pids(self.process.pid).values()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if self.alive():
            self.process.kill()
            self.process.wait()
        end = time.monotonic() + 10
        while any(_is_program(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(POLL_S)


def _is_program(pid):
    try:
        return os.path.samefile(f"/proc/{pid}/exe", TESSERA)
    except OSError:
        return False


def until(condition, text, job=None):
    """Poll until condition() is true and return it; the test fails after LIMIT_S, or when `job` ends before."""
    end = time.monotonic() + LIMIT_S
    while True:
        ended = job and not job.alive()
        value = condition()
        if value:
            return value
        if ended:
            fail(f"{text}: the job ended with {job.process.returncode} and said:\n{job.output}")
        if time.monotonic() > end:
            fail(text + (f"; the job said:\n{job.output}" if job else ""))
        time.sleep(POLL_S)


def start(ranks, config, *overrides, **options):
    return Job(ranks, "train", config, *overrides, **options)


def run(ranks, config, *overrides, status=0):
    """Run to the end, check the exit status, return what was printed."""
    job = start(ranks, config, *overrides)
    got = job.wait()
    check(got == status, f"{ranks} ranks of {config.name} {' '.join(overrides)}: exit status {got}, not {status}:\n{job.output}")
    return job.output


def tool(*arguments, status=0):
    """The program alone, without mpirun. Returns (stdout, stderr); the exit status stays in tool.status."""
    r = subprocess.run([TESSERA, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    tool.status = r.returncode
    said.extend((r.stdout, r.stderr))
    check(status is None or r.returncode == status, f"tessera {' '.join(map(str, arguments))}: exit status {r.returncode}, not {status}:\n{r.stdout}{r.stderr}")
    return r.stdout, r.stderr


def error_lines(output):
    """The lines by which the program reports errors (mpirun adds a block of its own)."""
    return [line for line in output.splitlines() if re.match(r"tessera(\[\d+\])?:? error: ", line)]


# ---- what a run left


def events(folder):
    """The objects of folder/metrics.jsonl, in order; none before it exists. A line still being written is left out."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def last(all_events, name, **fields):
    found = [e for e in all_events if e["event"] == name and all(e.get(k) == v for k, v in fields.items())]
    return found[-1] if found else None


def losses(all_events):
    """{step: loss}"""
    return {e["step"]: e["loss"] for e in all_events if e["event"] == "step"}


def committed(ckpt):
    """Steps with a metadata.pb, ascending: read from the folder, not by the program."""
    if not ckpt.is_dir():
        return []
    return sorted(int(d.name[5:]) for d in ckpt.iterdir() if d.name[5:].isdigit() and (d / "metadata.pb").is_file())


def step_dir(ckpt, step):
    return ckpt / f"step-{step:012d}"


def same_state(saved, resumed, text):
    """The hashes of a save_start and a resume event."""
    for key in ("weights_hash", "moments_hash", "ref_hash"):
        check(saved.get(key) == resumed.get(key), f"{text}: {key} {resumed.get(key)} restored, {saved.get(key)} saved")
    check("weights_hash" in saved and "moments_hash" in saved, f"{text}: no hashes in the save_start event")


def same_losses(want, got, steps, text, bound=False):
    """Losses of `steps` bitwise equal; bound: within 1e-5 max(|L|, 0.1)."""
    for s in steps:
        check(s in want and s in got, f"{text}: no loss of step {s}")
        limit = 1e-5 * max(abs(want[s]), 0.1) if bound else 0.0
        check(abs(got[s] - want[s]) <= limit, f"{text}: loss of step {s} is {got[s]!r}, not {want[s]!r}")
