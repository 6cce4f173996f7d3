#!/usr/bin/env python3
"""`tessera eval`: the best step is the one that training's validation file says, its scores are those that training saw, the policy at its own reference
scores exactly 0 and ln 2, whatever the number of ranks; nothing of the run is touched. And launch/gsm8k_folds from end to end."""

import json
import math
import os
import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

WARMUP, STEPS, EVERY, BETA = 6, 30, 3, 0.1
LN2 = math.log(2)
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)
job.write_data(tmp / "other", rows=5, heldout=17)


def config(name, **change):
    return job.write_config(tmp, name, data, **{
        "train_steps": STEPS, "train_eval_every": EVERY, "algo_warmup_sft_steps": WARMUP, "optim_lr": 3e-3, "optim_schedule": "constant",
        "checkpoint_every": EVERY, "checkpoint_keep_last": 1, "checkpoint_keep_every": WARMUP, "checkpoint_keep_best": 1, "checkpoint_keep_metric": "eval/loss",
        "checkpoint_keep_order": "lowest", **change})


def score(ranks, path, *overrides, status=0):
    """(the object on stdout, the lines of eval.pairs)"""
    pairs = tmp / "pairs.jsonl"
    pairs.unlink(missing_ok=True)
    r = subprocess.run(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), job.TESSERA, "eval", str(path), f"eval.pairs={pairs}", *overrides],
                       stdin=subprocess.DEVNULL, capture_output=True, text=True, env=job.environment(), timeout=job.LIMIT_S, check=False)
    job.check(r.returncode == status, f"eval {overrides}: exit status {r.returncode}, not {status}: {r.stderr}")
    return (json.loads(r.stdout), pairs.read_text()) if status == 0 else r.stderr


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_as_event(got, event, text):
    for key in ("loss", "rewards/accuracy", "rewards/accuracy_lo", "rewards/accuracy_hi", "logps/margin", "logps/accuracy"):
        job.check(got[key] == event[key], f"{text}: {key} is {got[key]!r}, training saw {event[key]!r}")


def check_lines(got, text, beta):
    lines = [json.loads(line) for line in text.splitlines()]
    job.check([r["row"] for r in lines] == list(range(got["pairs"])), "rows are not counted from 0")
    mean = 0
    for r in lines:
        margin = (r["logps"][0] - r["logps"][1]) - (r["ref_logps"][0] - r["ref_logps"][1])
        job.check(r["margin"] == margin, f"row {r['row']}: margin {r['margin']}, log-probabilities say {margin}")
        job.check(math.isclose(r["loss"], math.log1p(math.exp(-beta * margin)), rel_tol=1e-9), f"row {r['row']}: loss {r['loss']} at margin {margin}")
        mean += r["loss"] / len(lines)
    job.check(math.isclose(mean, got["loss"], rel_tol=1e-12), f"loss {got['loss']}, the pairs' mean {mean}")
    job.check(got["rewards/accuracy"] == sum(r["margin"] > 0 for r in lines) / len(lines), "accuracy")
    return lines


path = config("run")
job.run(2, path)
evals = {e["step"]: e for e in job.events(tmp / "run") if e["event"] == "eval" and "loss" in e}
job.check(evals[WARMUP]["loss"] == LN2 and evals[WARMUP]["rewards/accuracy"] == 0, f"policy = reference: {evals[WARMUP]}")
losses = {s: e["loss"] for s, e in evals.items() if s > WARMUP}
best = min(losses, key=lambda s: (losses[s], -s))
job.check(len(losses) == (STEPS - WARMUP) // EVERY and len(set(losses.values())) > 2, f"nothing to choose from: {losses}")
before = contents(tmp / "run")

got, text = score(2, path, "eval.step=best")
job.check(got["step"] == best and got["reference"] == WARMUP, f"the best step is {got['step']} against {got['reference']}; validation losses: {losses}")
same_as_event(got, evals[best], "the best step")
check_lines(got, text, BETA)
for ranks in (1, 3):
    job.check(score(ranks, path, "eval.step=best") == (got, text), f"other scores on {ranks} ranks")
got, _ = score(1, path)
job.check(got["step"] == STEPS, f"the newest step is {got['step']}")
same_as_event(got, evals[STEPS], "the newest step")

# another file of pairs: its reference values are computed for it; the choice of the step is not its business
other = f"data.heldout={tmp / 'other' / 'heldout.jsonl'}"
turned = tmp / "turned.jsonl"
with open(turned, "w", encoding="utf-8") as f:
    for line in (data / "heldout.jsonl").read_text().splitlines():
        r = json.loads(line)
        f.write(json.dumps({"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]}) + "\n")
for file in (other, f"data.heldout={turned}"):
    got, text = score(2, path, "eval.step=best", file)
    job.check(got["step"] == best, f"{file}: step {got['step']}")
    check_lines(got, text, BETA)
    got, text = score(2, path, f"eval.step={WARMUP}", file)
    job.check(got["rewards/accuracy"] == 0 and got["rewards/accuracy_hi"] == 0 and got["loss"] == LN2, f"{file}: policy = reference: {got}")
    for r in check_lines(got, text, BETA):
        job.check(r["margin"] == 0 and r["loss"] == LN2 and r["logps"] == r["ref_logps"], f"{file}: policy = reference: {r}")
got, text = score(1, path, "eval.reference=0", "algo.beta=0.5")
job.check(got["reference"] == 0 and len({r["loss"] for r in check_lines(got, text, 0.5)}) > 1, "initial weights as the reference")
job.check(contents(tmp / "run") == before, "eval has changed the run")
job.say(f"passed: best step {best} of {losses}")

for overrides, status, words in ((["eval.step=7"], 66, "no valid step 7"), (["eval.step=5"], 66, "eval.step 5"),
                                 (["eval.step=bst"], 65, "newest, best"), (["eval.reference=x"], 65, "step number"),
                                 (["eval.reference=7"], 66, "keep_every"),
                                 (["data.heldout=", "checkpoint.keep_best=0", "checkpoint.keep_metric="], 65, "data.heldout"),
                                 (["eval.step=best", "checkpoint.keep_best=0", "checkpoint.keep_metric="], 65, "keep_metric"),
                                 (["eval.step=best", "checkpoint.keep_metric=eval/logps/margin"], 66, "eval/logps/margin"),
                                 (["model.hidden=16"], 65, ""), (["checkpoint.url=file:/nowhere/at/all"], 66, ""), (["checkpoint.url="], 65, "checkpoint.url"),
                                 (["eval.pairs=/nowhere/at/all"], 66, "eval.pairs"), ([f"data.heldout={data / 'sft.jsonl'}"], 65, "preference")):
    job.check(words in score(2, path, *overrides, status=status), f"eval {overrides}: no \"{words}\"")
job.say("passed: wrong calls")

live = config("live", algo_reference="live")
job.run(2, live)
got, _ = score(2, live, "eval.step=best")
job.check(got["step"] == best and got["reference"] == f"ref/model of {best}", f"live: {got}")
same_as_event(got, evals[best], "a live reference")
job.say("passed: live reference")

# launch/gsm8k_folds: the same table when only test files change sides, but for what is scored on them
folds = pathlib.Path(__file__).resolve().parents[2] / "launch" / "gsm8k_folds"
cut = tmp / "cut"
cut.mkdir()
(cut / "sft.jsonl").write_bytes((data / "sft.jsonl").read_bytes())
rows = (data / "prefs.jsonl").read_text().splitlines(keepends=True)
for k in range(3):
    for p, part in enumerate(("test", "validation")):
        (cut / f"fold{k}_{part}.jsonl").write_text("".join(rows[(k + p) % 3::3]))
    (cut / f"fold{k}_train.jsonl").write_text("".join(rows[(k + 2) % 3::3]))


def table(out):
    r = subprocess.run([sys.executable, folds, cut, "--config", path, "--tessera", job.TESSERA, "--ranks", "2", "--out", tmp / out],
                       capture_output=True, text=True, env=dict(os.environ, **job.environment()), timeout=job.LIMIT_S, check=False)
    job.check(r.returncode == 0, f"launch/gsm8k_folds: {r.stderr}")
    return json.loads((tmp / out / "result.json").read_text()), r.stdout


first, printed = table("first")
dpo, bag, longer, shorter, still = first["methods"].values()
job.check(first["pairs"] == len(rows), f"{first['pairs']} pairs of {len(rows)}")
job.check((still["accuracy"], still["upper"], still["loss"]) == (0, 0, LN2) and "0.693147180560" in printed, f"policy = reference: {still}")
job.check(all(m["lower"] <= m["accuracy"] <= m["upper"] for m in first["methods"].values()), f"intervals: {first}")
job.check(table("first")[0] == first, "another table from the same runs")
for k in range(3):
    file = cut / f"fold{k}_test.jsonl"
    turn = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]}) + "\n" for r in turn))
second = table("second")[0]["methods"]
same_choice = [m["chosen"] for m in second.values()] == [m["chosen"] for m in first["methods"].values()]
job.check(same_choice, f"the test files have a say in the choice: {first} {second}")
swapped = list(second.values())
job.check(math.isclose(swapped[0]["accuracy"], 1 - dpo["accuracy"]) and swapped[2]["accuracy"] == shorter["accuracy"], f"sides changed: {first} {second}")
job.say("passed: launch/gsm8k_folds")
