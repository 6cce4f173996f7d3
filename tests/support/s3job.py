"""Jobs whose checkpoints are on an S3 server: job.py's functions, for URLs instead of folders.

A test calls server(KIND) first, which runs it again under tests/servers/with. What is stored is looked at with a client of its own (tests/servers/s3.py), not
by the program. secret_stays_secret() at the end looks for the secret key in all that the test's processes said, showed and stored."""

import base64
import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import job

SERVERS = pathlib.Path(__file__).resolve().parents[1] / "servers"
sys.path.insert(0, str(SERVERS))
import faults  # noqa: E402
import s3  # noqa: E402

# More than 8 MiB a file of two ranks, so that there are uploads in parts; little to compute; pieces that are not tiny.
LARGE = dict(model_layers=3, model_hidden=256, model_head_dim=64, model_ffn=1024, data_max_length=24, train_global_batch=4, train_lanes=4, parallel_bucket=4 << 20)
KEEP = 2  # steps of a Job
# A failure must show within seconds: a connection on which nothing comes, and tries that follow a failure.
LIMITS = {"TESSERA_S3_STALL_SECONDS": "2", "TESSERA_S3_RETRY_SECONDS": "4"}


def server(kind):
    """Go on only under tests/servers/with KIND, if the program has a store for s3: at all. Returns the URL to work in."""
    known = subprocess.run([job.TESSERA, "ckpt", "ls", "unknown:x"], capture_output=True, text=True).stderr
    if "s3:" not in known:
        print(f"skipped: this build has no store for s3: {known.strip()}")
        sys.exit(77)
    if os.environ.get("TESSERA_SERVER") != kind:
        os.execv(SERVERS / "with", ["with", kind, sys.executable, *sys.argv])
    os.environ.update(LIMITS)
    threading.Thread(target=_watch_titles, daemon=True).start()
    return os.environ["TESSERA_TEST_S3"]


def control():
    return faults.Control(os.environ["TESSERA_FAULTS"])


@functools.cache
def direct():
    """A client past the proxy: the server's own address is in its folder."""
    folder = os.environ["TESSERA_SERVER_DIR"]
    said = subprocess.run([sys.executable, SERVERS / f"{_script()}.py", "env", folder], capture_output=True, text=True, check=True).stdout
    env = dict(re.findall(r"export (\w+)='(.*)'", said))
    return s3.Client({**os.environ, **env})


def _script():
    return "swift" if os.environ["TESSERA_SERVER"] == "swift" else "radosgw"


def split(url):
    """Bucket and prefix."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


def keys(url, client=None):
    """{key below the URL: bytes}"""
    bucket, prefix = split(url)
    return {k[len(prefix) + 1:]: n for k, n in (client or direct()).keys(bucket, prefix + "/").items()}


def uploads(url):
    """Of objects below the URL, begun and neither completed nor aborted."""
    bucket, prefix = split(url)
    return direct().uploads(bucket, prefix + "/")


def committed(url):
    """Steps with a metadata.pb, ascending."""
    return sorted(int(m[1]) for m in (re.fullmatch(r"step-(\d{12})/metadata\.pb", k) for k in keys(url)) if m)


def all_listed_are_whole(url, text, keep=None):
    """Every step that is committed, as the server says, is listed by the program and passes verify; past the proxy. keep: a job is running that keeps so
    many steps: wait until it has removed the others."""
    if keep:
        job.until(lambda: len(committed(url)) <= keep, f"{text}: more than {keep} steps stay")
    steps = committed(url)
    proxy = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = direct().env["AWS_ENDPOINT_URL"]
    out, _ = job.tool("ckpt", "ls", url, "--json")
    listed = [entry["step"] for entry in json.loads(out) if not entry["damage"]]
    job.check(sorted(listed) == steps, f"{text}: steps {steps} are committed, ls says:\n{out}")
    if steps:
        job.tool("ckpt", "verify", url)
    os.environ["AWS_ENDPOINT_URL"] = proxy
    return steps


# ---- the server


def pid(name="rgw"):
    return int((pathlib.Path(os.environ["TESSERA_SERVER_DIR"]) / "run" / f"{name}.pid").read_text())


def radosgw(verb, *words):
    r = subprocess.run([sys.executable, SERVERS / "radosgw.py", verb, os.environ["TESSERA_SERVER_DIR"], *map(str, words)], capture_output=True, text=True)
    job.check(r.returncode == 0, f"radosgw {verb} {words}: {r.stdout}{r.stderr}")


# ---- the secret

_titles, _said = [], []


def _watch_titles():
    """Command lines of the program, as any user of the machine sees them."""
    seen = set()
    while True:
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and os.path.samefile(f"/proc/{entry}/exe", job.TESSERA):
                    for name in ("cmdline", "comm"):
                        title = pathlib.Path(f"/proc/{entry}/{name}").read_bytes()
                        if title not in seen:
                            seen.add(title)
                            _titles.append(title)
            except OSError:
                continue
        time.sleep(0.05)


def secret_forms():
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    encoded = base64.b64encode(secret).rstrip(b"=")
    return {secret, urllib.parse.quote(secret, safe="").encode(), encoded[:-1], secret.hex().encode()}


def secret_stays_secret(tmp, url):
    """Nowhere in outputs, titles, the files below tmp, and the objects below the URL is the secret."""
    forms = secret_forms()

    def look(where, data):
        job.check(not any(form in data for form in forms), f"the secret key is in {where}")

    outputs = [j.output.encode() for j in job._running] + [text.encode() for text in job.said]
    for number, text in enumerate(outputs):
        look(f"what process {number} said", text)
    for title in _titles:
        look("a process title", title)
    files = [p for p in tmp.rglob("*") if p.is_file()]
    for path in files:
        look(path, path.read_bytes())
    client, (bucket, _) = direct(), split(url)
    stored = keys(url)
    for key in stored:
        look(key, key.encode() + client.get(f"/{bucket}/{split(url)[1]}/{key}"))
    job.check(outputs and _titles, "nothing was looked at for the secret")
    job.say(f"passed: no secret in {len(outputs)} outputs, {len(_titles)} titles, {len(files)} files, {len(stored)} objects")


# ---- a job that saves when it is told to

class Job:
    """A run of many steps on the URL, without periodic saves; save() asks for one."""

    def __init__(self, tmp, name, ranks, url, **change):
        self.dir, self.name, self.url, self.ranks = tmp / name, name, url, ranks
        self.config = job.write_config(tmp, name, tmp / "data", checkpoint_url=url, train_steps=10**6, checkpoint_every=10**6, checkpoint_keep_last=KEEP,
                                       algo_warmup_sft_steps=0, **change)
        self.job = job.start(ranks, self.config)
        self.pids = self.job.pids()
        job.until(lambda: self.step() >= 3, "it does not train", self.job)

    def events(self, *names):
        return [e for e in job.events(self.dir) if e["event"] in names]

    def step(self):
        got = self.events("step")
        return got[-1]["step"] if got else 0

    def outcomes(self):
        return self.events("save", "save_failed")

    def ask(self):
        """Ask for a save; returns how many had ended before. It has begun, somewhere in its first request, when this returns."""
        before, begun = len(self.outcomes()), len(self.events("save_start"))
        os.kill(self.pids[0], signal.SIGUSR1)
        job.until(lambda: len(self.events("save_start")) > begun, f"{self.name}: no save begins", self.job)
        return before

    def outcome(self, before):
        """Of the save that was asked for: the event."""
        job.until(lambda: len(self.outcomes()) > before, f"{self.name}: a save does not end", self.job)
        return self.outcomes()[before]

    def save(self):
        return self.outcome(self.ask())

    def trains_on(self, text):
        at = self.step()
        job.until(lambda: self.step() >= at + 3, f"{text}: training stands still", self.job)

    def saves_again(self, text):
        """The next save, and the step is there and whole."""
        got = self.save()
        job.check(got["event"] == "save", f"{text}: the save after it failed: {got}")
        steps = all_listed_are_whole(self.url, text, KEEP)
        job.check(steps and steps[-1] == got["saved_step"], f"{text}: the newest step is {steps}, step {got['saved_step']} was reported as saved")

    def failed_once(self, event, cause, text):
        """The failure is told once: one event and one line, with rank, key and cause."""
        job.check(event["event"] == "save_failed", f"{text}: the save did not fail: {event}")
        error = event["error"]
        job.until(lambda: error in self.job.output, f"{text}: {event} is not told", self.job)  # mpirun passes lines on later
        lines = [line for line in self.job.output.splitlines() if error in line]
        job.check(len(lines) == 1, f"{text}: told {len(lines)} times:\n{self.job.output}")
        job.check(f"on rank {event.get('rank')}" in lines[0], f"{text}: {lines[0]}\nof rank {event.get('rank')}")
        for want in (r"step-\d{12}/\S+", cause):
            job.check(re.search(want, error), f"{text}: the error has nothing like {want}: {error}")
        job.say(f"  {text}: {error}")

    def stop(self):
        for pid in self.pids.values():
            os.kill(pid, signal.SIGTERM)
        job.check(self.job.wait() == 0 and job.last(job.events(self.dir), "stop"), f"{self.name} does not stop with a save:\n{self.job.output}")
        return job.last(job.events(self.dir), "stop")["step"]
