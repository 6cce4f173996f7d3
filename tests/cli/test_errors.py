#!/usr/bin/env python3
"""Wrong input: each row of the table below must end the program with a non-zero status and exactly one error line that names the facts, without
mpirun and, where ranks could disagree, on two."""

import os
import pathlib
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

INVALID, NOT_FOUND, IO, DEVICE, UNSUPPORTED = 65, 66, 69, 76, 77
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)
good = job.write_config(tmp, "good", data, train_steps=2, algo_warmup_sft_steps=1)
text = good.read_text()
failures = []


def one_error(name, status, output, want, words):
    errors = job.error_lines(output)
    wrong = []
    if status not in want:
        wrong.append(f"exit status {status}, not one of {want}")
    if len(errors) != 1:
        wrong.append(f"{len(errors)} error lines")
    wrong += [f"no {w!r} in the error" for w in words if not errors or w not in errors[0]]
    if wrong:
        failures.append(f"{name}: {'; '.join(wrong)}:\n{output}")
    else:
        job.say(f"passed: {name}: {errors[0][:160]}")


ALONE = (0,)  # no mpirun: for what no rank could see otherwise than another


def train(name, config, overrides, want, words, ranks=(0, 2)):
    for n in ranks:
        if n == 0:
            out, err = job.tool("train", config, *overrides, status=None)
            one_error(name, job.tool.status, out + err, want, words)
            continue
        j = job.start(n, config, *overrides)
        status = j.wait()
        one_error(f"{name}, {n} ranks", status, j.output, want, words)


def edited(name, old, new):
    """A config with one text replaced, and the number of the line in question."""
    job.check(text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in the config")
    path = tmp / f"{name}.yaml"
    path.write_text(text.replace(old, new))
    return path, text[: text.index(old)].count("\n") + 1


def jsonl(name, content):
    path = tmp / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


job.run(2, good)  # the config that all rows change is a good one
job.check(job.last(job.events(tmp / "good"), "end")["step"] == 2, "the good config does not run")

# --- the config
for name, old, new, words in (
    ("unknown key", "  global_batch: 8", "  globl_batch: 8", ["train.globl_batch", "global_batch"]),
    ("unknown section", "optim:", "optimiser:", ["optimiser", "optim"]),
    ("wrong type", "  global_batch: 8", "  global_batch: many", ["train.global_batch", "many", "integer"]),
    ("fraction for an integer", "  global_batch: 8", "  global_batch: 8.5", ["train.global_batch", "8.5"]),
    ("out of range", "  zero: 1", "  zero: 4", ["parallel.zero", "4", "0 to 3"]),
    ("no such choice", "  schedule: cosine", "  schedule: cosin", ["optim.schedule", "cosin", "constant", "linear"]),
    ("no such size", "  bucket: 16384", "  bucket: 16 furlongs", ["parallel.bucket", "16 furlongs"]),
    ("no boolean", "  deterministic: true", "  deterministic: perhaps", ["train.deterministic", "perhaps"]),
    ("set twice", "  global_batch: 8", "  global_batch: 8\n  global_batch: 8", ["train.global_batch", "before"]),
    ("a list for a value", "  global_batch: 8", "  global_batch: [8]", ["train.global_batch", "list"]),
    ("no YAML", "  global_batch: 8", "  global_batch: 'eight", []),
    ("tabs", "  global_batch: 8", "\tglobal_batch: 8", []),
):
    path, line = edited("edited", old, new)
    # an unknown section is found at its first key; where YAML itself breaks, libyaml's line is some line after
    where = f"{path}:" if name in ("no YAML", "tabs") else f"{path}:{line + (name in ('set twice', 'unknown section'))}:"
    train(name, path, [], [INVALID], [where, *words], ranks=(2,) if name in ("unknown key", "no YAML") else ALONE)

for name, old, words in (
    ("required key", "  steps: 2\n", ["train.steps", "required"]),
    ("no model kind", "  kind: llama\n", ["model.kind", "required"]),
    ("no algorithm", "  kind: dpo\n", ["algo.kind", "required"]),
):
    train(name, edited("edited", old, "")[0], [], [INVALID], ["edited.yaml", *words], ranks=ALONE)

train("no config", tmp / "absent.yaml", [], [NOT_FOUND], [str(tmp / "absent.yaml")])
train("config is a folder", tmp, [], [INVALID], [str(tmp)])
train("empty config", jsonl("empty.yaml", ""), [], [INVALID], ["empty.yaml", "mapping"], ranks=ALONE)

for name, overrides, words in (
    ("no key=value", ["train.steps"], ["train.steps", "key=value"]),
    ("unknown override", ["train.stepps=3"], ["command line", "train.stepps", "steps"]),
    ("override out of range", ["train.steps=0"], ["command line", "train.steps"]),
    ("micro_batch", ["train.micro_batch=3"], ["micro_batch 3", "global_batch 8"]),
    ("lanes", ["train.lanes=6"], ["train.lanes", "6", "power of two"]),
    ("no step left", ["algo.warmup_sft_steps=2"], ["warmup_sft_steps 2", "train.steps 2"]),
    ("no data", ["data.prefs="], ["data.prefs", "required"]),
    ("no such model", ["model.kind=lama"], ["model.kind", "lama", "llama"]),
    ("no such algorithm", ["algo.kind=dpoo"], ["algo.kind", "dpoo", "dpo", "sft"]),
    ("heads", ["model.head_dim=0", "model.hidden=33"], ["33", "heads"]),
    ("kv_heads", ["model.kv_heads=3"], ["4", "kv_heads", "3"]),
    ("odd head", ["model.head_dim=7"], ["head_dim", "7", "even"]),
    ("resume", ["checkpoint.resume=latest"], ["checkpoint.resume", "latest", "newest-valid"]),
):
    train(name, good, overrides, [INVALID], words, ranks=ALONE)

# --- ranks
train("too few lanes", good, ["train.lanes=2"], [INVALID], ["lanes", "2", "4"], ranks=(4,))
train("sixteen ranks of eight lanes", good, [], [INVALID], ["lanes", "8", "16"], ranks=(16,))
train("dp is not the ranks", good, ["parallel.dp=3"], [INVALID], ["3", "2"], ranks=(2,))

# --- data
row = '{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n'
for name, content, words in (
    ("bad JSON", row * 4 + '{"prompt": "1+1=", "chosen": "2"\n' + row, [":5", "not a JSON object"]),
    ("no object", row + "17\n", [":2", "object"]),
    ("missing key", row + '{"prompt": "1+1=", "chosen": "2"}\n', [":2", "rejected"]),
    ("wrong type", row + row + '{"prompt": "1+1=", "chosen": 2, "rejected": "3"}\n', [":3", "chosen", "string"]),
    ("other kind", '{"prompt": "1+1=", "completion": "2"}\n', [":1", "preference"]),
    ("kinds mixed", row + '{"chosen": "2", "rejected": "3"}\n', [":2"]),
    ("no UTF-8", row.encode() + b'{"prompt": "\xff", "chosen": "2", "rejected": "3"}\n', [":2"]),
    ("empty", "", ["rows"]),
    ("nothing to learn", '{"prompt": "1", "chosen": "2", "rejected": "2"}\n', ["dropped"]),
):
    path = jsonl("rows.jsonl", content)
    train(f"data, {name}", good, [f"data.prefs={path}"], [INVALID], [str(path), *words], ranks=(2,) if name == "bad JSON" else ALONE)
train("no data file", good, [f"data.sft={tmp}/absent.jsonl"], [NOT_FOUND], [f"{tmp}/absent.jsonl"])
train("data file is a folder", good, [f"data.heldout={tmp}"], [INVALID, IO], [str(tmp)])

# --- places
blocker = jsonl("blocker", "a file, not a folder")
train("run.dir below a file", good, [f"run.dir={blocker}/run"], [INVALID, NOT_FOUND, IO], [str(blocker)])
train("checkpoint below a file", good, [f"checkpoint.url=file:{blocker}/ckpt"], [INVALID, NOT_FOUND, IO], [str(blocker)])
train("read-only place", good, ["checkpoint.url=file:/proc/ckpt"], [INVALID, NOT_FOUND, IO], ["/proc/ckpt"])
train("no such store", good, ["checkpoint.url=gopher:hole"], [INVALID], ["gopher", "file"])
if os.geteuid() == 0:
    job.say("as root every folder is writable: the rows above stand for those that are not")

# --- devices
if not any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
    train("cuda without a GPU", good, ["device=cuda"], [DEVICE, UNSUPPORTED], ["cuda"])

# --- another run's checkpoint
train("other seed", good, ["run.seed=4"], [INVALID], ["run.seed", "3", "4"])
train("other model and batch", good, ["model.hidden=64", "train.global_batch=16"], [INVALID], ["model.hidden", "32", "64", "train.global_batch"], ranks=(2,))

# --- the command line
for name, arguments, want, words in (
    ("no verb", [], [INVALID], ["verb", "train"]),
    ("unknown verb", ["trian"], [INVALID], ["trian", "train"]),
    ("no config named", ["train"], [INVALID], ["CONFIG"]),
    ("ckpt, no verb", ["ckpt"], [INVALID], ["ls", "show", "verify"]),
    ("ckpt, unknown verb", ["ckpt", "list", tmp], [INVALID], ["list", "ls"]),
    ("ckpt, no URL", ["ckpt", "ls"], [INVALID], ["URL"]),
    ("ckpt, no root", ["ckpt", "ls", tmp / "absent"], [NOT_FOUND], [str(tmp / "absent")]),
    ("ckpt, no step", ["ckpt", "verify", tmp / "good" / "ckpt", 77], [NOT_FOUND], ["77"]),
    ("ckpt, step is no number", ["ckpt", "show", tmp / "good" / "ckpt", "newest"], [INVALID], ["newest"]),
    ("data, no verb", ["data"], [INVALID], ["prepare"]),
    ("data, unknown", ["data", "prepare", "algebra", tmp], [INVALID], ["algebra", "arithmetic"]),
    ("data, bad option", ["data", "prepare", "arithmetic", tmp / "out", "rows=none"], [INVALID], ["rows", "none"]),
    ("data, nothing to show", ["data", "show", tmp / "absent.jsonl"], [NOT_FOUND], [str(tmp / "absent.jsonl")]),
):
    out, err = job.tool(*arguments, status=None)
    one_error(name, job.tool.status, out + err, want, words)

job.check(job.last(job.events(tmp / "good"), "end")["step"] == 2, "one of the refused jobs has disturbed the good run's metrics")
job.tool("ckpt", "verify", f"file:{tmp / 'good' / 'ckpt'}")
version = re.fullmatch(r"tessera \d+\.\d+\.\d+ \(build (\S+)\)\n", job.tool("--version")[0])
job.check(version and f"build tessera {version[1]}\n" in job.tool("ckpt", "show", tmp / "good" / "ckpt", 2)[0],
          "tessera --version does not name the build that its checkpoints name")
if failures:
    job.fail(f"{len(failures)} rows\n\n" + "\n".join(failures))
