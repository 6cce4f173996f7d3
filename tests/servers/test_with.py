#!/usr/bin/env python3
"""tests/servers/with: exit statuses, what its command sees, two at once, and that nothing stays, however it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

WITH = pathlib.Path(__file__).resolve().parent / "with"
TELL = """import os, pathlib, sys
d = pathlib.Path(os.environ["TESSERA_SERVER_DIR"])
print(d, *[f.read_text() for f in sorted((d / "run").glob("*.pid"))], os.environ["AWS_SECRET_ACCESS_KEY"], os.environ.get("http_proxy"), flush=True)
sys.exit(int(sys.stdin.readline()))"""


def check(condition, text):
    if not condition:
        print("FAILED: " + text, file=sys.stderr)
        sys.exit(1)


def start(tmp, kind="radosgw"):
    env = {**os.environ, "TMPDIR": tmp, "http_proxy": "http://127.0.0.1:1", "AWS_PROFILE": "other", "AWS_SESSION_TOKEN": "x"}
    return subprocess.Popen([WITH, kind, sys.executable, "-c", TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def ours(pid, folder):
    try:
        return folder in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


with tempfile.TemporaryDirectory(prefix="tsr-w-") as tmp:
    running = [start(tmp) for _ in range(3)]
    lines = [p.stdout.readline() for p in running]
    if all(line.startswith("skipped: ") for line in lines):
        check([p.wait() for p in running] == [77] * 3, "it skips without 77")
        print(lines[0], end="")
        sys.exit(77)
    seen = [line.split() for line in lines]
    check(all(len(words) == 6 and words[5] == "None" for words in seen), f"what a command sees: {seen}")
    check(len({w[0] for w in seen}) == 3 and len({w[4] for w in seen}) == 3, f"folders or secrets are shared: {seen}")
    for folder, *pids in (w[:4] for w in seen):
        check(all(ours(pid, folder) for pid in pids), f"these do not run: {folder} {pids}")
    # One command ends by itself, one `with` is asked to end, and one is killed.
    running[0].stdin.write("3\n")
    running[0].stdin.close()
    running[1].send_signal(signal.SIGTERM)
    running[2].kill()
    check([p.wait(60) for p in running] == [3, 128 + signal.SIGTERM, -signal.SIGKILL], f"exit statuses {[p.returncode for p in running]}")
    end = time.monotonic() + 60
    while any(ours(pid, w[0]) for w in seen for pid in w[1:4]):
        check(time.monotonic() < end, f"daemons outlive their end: {seen}")
        time.sleep(0.01)
    check([os.path.exists(w[0]) for w in seen[:2]] == [False, False], "a folder stays")
    bare = subprocess.run([WITH, "radosgw", "true"], env={**os.environ, "PATH": os.path.dirname(sys.executable)}, capture_output=True, text=True)
    if not os.path.exists(os.path.dirname(sys.executable) + "/radosgw"):
        check(bare.returncode == 77 and bare.stdout.startswith("skipped: ") and len(bare.stdout.splitlines()) == 1, f"without packages: {bare}")
    check(subprocess.run([WITH, "oracle", "true"], capture_output=True).returncode == 1, "an unknown kind")
print("passed: with")
