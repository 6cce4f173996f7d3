#!/usr/bin/env python3
"""tessera ckpt report on a terminal: a report written by hand, as docs/checkpoint.md has its fields, shown in colours
there, and without an escape anywhere with NO_COLOR, on a dumb terminal and in a pipe."""
import json
import os
import pty
import subprocess
import tempfile

WRITE = [0.1, 0.2, 0.3, 0.9]
GROUNDS = [19, 25, 30, 196]  # of the 256 colours, for digits 1, 2, 3, 9


def show(root, terminal, **env):
    env = {**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm", **env}
    line = [os.environ["TESSERA"], "ckpt", "report", root, "--stage", "write"]
    if not terminal:
        return subprocess.run(line, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    ours, theirs = pty.openpty()
    subprocess.run(line, env=env, check=True, stdout=theirs)
    os.close(theirs)
    text = os.read(ours, 65536).decode().replace("\r\n", "\n")
    os.close(ours)
    return text


def main():
    zero = [0, 0, 0, 0]
    stage = dict(bytes=zero, s=WRITE, wait_s=zero, retries=zero, begin_s=zero, end_s=[1, 1, 1, 1])
    report = dict(version=1, kind="save", step=7, attempt="0" * 16, time_ns=5, world=4,
                  mesh=dict(pp=1, dp=2, ep=1, cp=1, tp=2), s=1.5, interval_s=600,
                  ranks=dict(begin_s=zero, s=[1, 1, 1, 1], stall_s=zero, bytes=[1000] * 4), stages=dict(write=stage))
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(root + "/reports")
        with open(root + "/reports/save-000000000007.json", "w", encoding="ascii") as f:
            json.dump(report, f, indent=1)
        colour = show(root, True)
        plain = show(root, False)
        assert "   0   1 2\n   1   3 9\n" in plain, plain
        assert "rank 3 (dp 1, tp 1): write 0.900 s, the median is 0.200 s" in plain, plain
        assert plain == show(root, True, NO_COLOR="1") == show(root, True, TERM="dumb"), plain
        assert "\x1b" not in plain
        for digit, ground in zip("1239", GROUNDS):
            assert f"\x1b[48;5;{ground};38;5;{16 if digit == '9' else 231}m {digit} \x1b[0m" in colour, colour
        assert show(root, True, NO_COLOR="") == colour  # set and empty is not set
    print("ok")


main()
