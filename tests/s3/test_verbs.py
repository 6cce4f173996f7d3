#!/usr/bin/env python3
"""Every verb of `tessera ckpt` on s3:// URLs says what it says of the same steps in a folder, and errors of access are one clear line with what to check."""

import difflib
import os
import pathlib
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402
import s3job  # noqa: E402

root = s3job.server(sys.argv[1] if len(sys.argv) > 1 else "radosgw")
tmp = job.workspace()
job.write_data(tmp / "data")
FOLDER, URL = f"file:{tmp}/run/ckpt", f"{root}/run"
SIZES = dict(train_steps=12, checkpoint_every=4, checkpoint_keep_last=0, algo_warmup_sft_steps=4)
job.run(2, job.write_config(tmp, "run", tmp / "data", **SIZES))
path = job.write_config(tmp, "on-s3", tmp / "data", checkpoint_url=URL, **SIZES)
job.run(2, path)
job.check(s3job.committed(URL) == [4, 8, 12], f"steps {s3job.committed(URL)}")


def same(*words):
    """The same words about both roots, but for attempts, ages and the roots' names."""
    said = []
    for url in (FOLDER, URL):
        out, _ = job.tool("ckpt", words[0], url, *words[1:])
        for what, pattern in ((" ", " +"), ("URL", re.escape(url)), ("HEX", "[0-9a-f]{16}"), ("AGE", r"\d+ (s|min|h)\b"),
                              ("config", r"config \d+ bytes"), ("sum", r"\d+ bytes: no damage")):  # the URL is in the config
            out = re.sub(pattern, what, out)
        said.append(out.splitlines())
    job.check(said[0] == said[1], f"{words}: of the folder and of the bucket:\n" + "\n".join(difflib.unified_diff(*said, lineterm="")))
    job.check(said[0], f"{words}: says nothing")


same("ls")
same("show")
same("show", 4)
same("verify")
same("verify", 8, "-j", 3)
for a, b in ((FOLDER, URL), (URL, FOLDER)):
    job.tool("ckpt", "diff", a, 8, b, 8)
    job.tool("ckpt", "diff", f"{a}@12", f"{b}/step-000000000012")
out, _ = job.tool("ckpt", "diff", URL, 4, URL, 8, status=65)
job.check("differ" in out, f"diff of two steps:\n{out}")
job.tool("ckpt", "report", URL, 8)
job.say("passed: ls, show, verify, diff, report")

# Copies: from a folder, to a folder, cut anew, from bucket to bucket.
job.tool("ckpt", "copy", FOLDER, 8, f"{root}/copied")
job.tool("ckpt", "copy", f"{root}/copied", 8, f"file:{tmp}/back", "--ranks", 3)
job.tool("ckpt", "copy", f"file:{tmp}/back", 8, f"{root}/again", "--to", "dp=2,tp=2")
for url in (f"{root}/copied", f"file:{tmp}/back", f"{root}/again"):
    job.tool("ckpt", "verify", url)
    job.tool("ckpt", "diff", FOLDER, 8, url, 8)
_, err = job.tool("ckpt", "copy", FOLDER, 8, f"{root}/copied", status=None)
job.check(job.tool.status == 67 and "step 8 is" in err, f"a copy over a step that is there: {job.tool.status} {err}")
job.say("passed: copy")

# A view where only a folder can have one: it says why not, and leaves nothing.
before = s3job.keys(URL)
out, err = job.tool("ckpt", "view", URL, status=None)
job.check((job.tool.status == 0) or ("view" in err and "director" in err), f"view: {job.tool.status} {out}{err}")
if job.tool.status:
    job.check(s3job.keys(URL) == before, "a view that is refused leaves something")

# Marks, removal, gc; damage is seen and named.
job.tool("ckpt", "mark", URL, 4, "eval/x=0.5")
out, _ = job.tool("ckpt", "show", URL, 4)
job.check("eval/x" in out, f"a mark is not shown:\n{out}")
_, err = job.tool("ckpt", "rm", URL, 12, status=None)
job.check(job.tool.status and "force" in err, f"the newest step is removed: {err}")
job.tool("ckpt", "rm", URL, 4)
job.check(s3job.committed(URL) == [8, 12] and not [k for k in s3job.keys(URL) if k.startswith("step-000000000004/")], f"rm leaves {s3job.keys(URL)}")
client, (bucket, prefix) = s3job.direct(), s3job.split(URL)
client.put(f"/{bucket}/{prefix}/step-000000000010/model-00000.0123456789abcdef.h5", b"of a dead attempt")
file = next(k for k in s3job.keys(URL) if re.match(r"step-000000000012/model", k))
body = bytearray(client.get(f"/{bucket}/{prefix}/{file}"))
body[len(body) // 2] ^= 1
client.put(f"/{bucket}/{prefix}/{file}", bytes(body))
out, _ = job.tool("ckpt", "verify", URL, status=71)
job.check(file.rpartition("/")[2] in out, f"verify does not name {file}:\n{out}")
resumed = job.run(3, path, f"run.dir={tmp / 'resumed'}")
got = job.events(tmp / "resumed")
job.check(job.last(got, "resume")["step"] == 8, f"with the newest step damaged: {job.last(got, 'resume')}\n{resumed}")
job.same_losses(job.losses(job.events(tmp / "run")), job.losses(got), range(9, 13), "after a damaged step")
s3job.all_listed_are_whole(URL, "reached the damaged step again")
job.check(s3job.committed(URL) == [8, 12], f"steps {s3job.committed(URL)}")
job.tool("ckpt", "gc", URL, "--age=0")
left = [k for k in s3job.keys(URL) if not re.match(r"step-0000000000(08|12)/|LATEST$|LEASE/|reports/", k)]
job.check(not left, f"gc leaves {left}")
s3job.all_listed_are_whole(URL, "after gc")
job.say("passed: mark, rm, gc, damage")

# Access that fails: one line, what and where, what to check; never the secret.
env, wrong = dict(os.environ), {
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong" + os.environ["AWS_SECRET_ACCESS_KEY"][5:]}, URL, "AWS_SECRET_ACCESS_KEY|secret|[Ss]ignature"),
    "a wrong key id": ({"AWS_ACCESS_KEY_ID": "NOBODY:X"}, URL, "AWS_ACCESS_KEY_ID|access key"),
    "a wrong bucket": ({}, "s3://no-such-bucket/x", "bucket"),
    "nobody there": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, URL, "127.0.0.1:1|connect"),
    "no credentials": ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, URL, "AWS_ACCESS_KEY_ID"),
    "nothing below the URL": ({}, f"{root}/nothing", "nothing"),
}
for text, (change, url, cause) in wrong.items():
    for name, value in change.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    out, err = job.tool("ckpt", "ls", url, status=None)
    os.environ.update(env)
    lines = [line for line in err.splitlines() if line.strip()]
    job.check(job.tool.status > 0 and len(lines) == 1, f"{text}: exit status {job.tool.status}:\n{out}{err}")
    job.check(re.search(cause, lines[0]) and url.partition("s3://")[2].partition("/")[0] in lines[0], f"{text}: {lines[0]}")
    job.check("wrong" + env["AWS_SECRET_ACCESS_KEY"][5:] not in err, f"{text}: the wrong secret is told")
    job.say(f"  {text}: {lines[0]}")
s3job.secret_stays_secret(tmp, root)
