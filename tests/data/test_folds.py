#!/usr/bin/env python3
"""`tessera data prepare gsm8k ... folds=K`: cut by problem, complete, the same whatever the order of the source; and what launch/gsm8k_folds computes of it,
against sums over all resamples and closed forms."""

import collections
import importlib.machinery
import itertools
import json
import math
import pathlib
import random
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

tmp = job.workspace()
tool = importlib.machinery.SourceFileLoader("gsm8k_folds", str(pathlib.Path(__file__).resolve().parents[2] / "launch" / "gsm8k_folds")).load_module()


def source(folder, problems, reverse=False):
    """Problems with 1 or 2 right and 1 or 2 wrong solutions, some without either; problem 3's question comes twice."""
    folder.mkdir()
    draw, lines = random.Random(5), []
    for i in range(problems):
        right, wrong = draw.randrange(3), draw.randrange(3)
        row = {"question": f"Question {3 if i == 7 else i}?"}
        for j in range(right + wrong):
            row[f"model{j}"] = {"is_correct": j < right, "solution": f"Line {i} {j}\nA: {j}"}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text('{"question": "Q", "answer": "#### 1"}\n')
    (folder / "example_model_solutions.jsonl").write_text("\n".join(reversed(lines) if reverse else lines) + "\n")
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(some):
    return collections.Counter((r["prompt"], r["chosen"], r["rejected"]) for r in some)


def check_folds(folder, k):
    everything = keys(rows(folder / "prefs_train.jsonl") + rows(folder / "prefs_heldout.jsonl"))
    part = {(i, p): rows(folder / f"fold{i}_{p}.jsonl") for i in range(k) for p in tool.PARTS}
    sizes = [len({r["prompt"] for r in part[i, "test"]}) for i in range(k)]
    for i in range(k):
        whole = [part[i, p] for p in tool.PARTS]
        job.check(keys(sum(whole, [])) == everything, f"fold {i} of {k}: its files together are not all pairs")
        for a, b in itertools.combinations(whole, 2):
            job.check(not {r["prompt"] for r in a} & {r["prompt"] for r in b}, f"fold {i} of {k}: a problem is in two files")
        job.check(keys(part[i, "validation"]) == keys(part[(i + 1) % k, "test"]), f"fold {i} of {k}: the validation file is not the next test file")
    job.check(keys(sum((part[i, "test"] for i in range(k)), [])) == everything, f"{k} test files together are not all pairs, each once")
    job.check(max(sizes) - min(sizes) <= 2, f"{k} folds of {sizes} problems")  # 1 for the rounding, 1 for the question that comes twice
    job.check(not (folder / f"fold{k}_test.jsonl").exists(), f"more than {k} folds")
    return {name: keys(r) for name, r in part.items()}


there = source(tmp / "there", 40)
back = source(tmp / "back", 40, reverse=True)
for k in (3, 4, 5, 20):
    job.tool("data", "prepare", "gsm8k", there, tmp / f"a{k}", f"folds={k}")
    job.tool("data", "prepare", "gsm8k", there, tmp / f"b{k}", f"folds={k}", "heldout=0.5")
    job.tool("data", "prepare", "gsm8k", back, tmp / f"c{k}", f"folds={k}")
    job.tool("data", "prepare", "gsm8k", there, tmp / f"d{k}", f"folds={k}", "seed=1")
    parts = check_folds(tmp / f"a{k}", k)
    for i, p in parts:
        job.check((tmp / f"a{k}/fold{i}_{p}.jsonl").read_bytes() == (tmp / f"b{k}/fold{i}_{p}.jsonl").read_bytes(), f"fold {i}: not the same twice")
    job.check(parts == check_folds(tmp / f"c{k}", k), f"{k} folds depend on the order of the source")
    job.check(parts != check_folds(tmp / f"d{k}", k), f"{k} folds do not depend on the seed")
job.tool("data", "prepare", "gsm8k", there, tmp / "none")
job.check(len(list((tmp / "none").iterdir())) == 3, "folds that nobody asked for")
for k in (1, 2, 21, -1):
    job.check("fold" in job.tool("data", "prepare", "gsm8k", there, tmp / "bad", f"folds={k}", status=65)[1], f"folds={k} is taken")
job.check(not (tmp / "bad").exists() or not list((tmp / "bad").iterdir()), "files of a refused call")
job.say("passed: folds")


def enumerated(margins, problems):
    """Ends of the interval over all n^n equally likely resamples of n problems."""
    groups = collections.defaultdict(list)
    for m, p in zip(margins, problems):
        groups[p].append(m > 0)
    means = []
    for picked in itertools.product(groups.values(), repeat=len(groups)):
        means.append(sum(map(sum, picked)) / sum(map(len, picked)))
    means.sort()
    return means[len(means) * 25 // 1000], means[len(means) * 975 // 1000]


draw = random.Random(9)
for case in range(6):
    problems = [p for p in "abcde" for _ in range(draw.randint(1, 4))]
    margins = [draw.choice([-1.0, 0.0, 1e-300, 2.0]) for _ in problems]
    accuracy, lower, upper = tool.pooled(margins, problems, resamples=20000, seed=case)
    low, high = enumerated(margins, problems)
    job.check(accuracy == sum(m > 0 for m in margins) / len(margins), f"case {case}: accuracy {accuracy}")
    job.check(abs(lower - low) < 0.03 and abs(upper - high) < 0.03, f"case {case}: {lower} to {upper}, over all resamples {low} to {high}")
job.check(tool.pooled([0.0] * 5, "aabbc") == (0, 0, 0) and tool.pooled([1.0] * 5, "aabbc") == (1, 1, 1), "all wrong, all right")
one = tool.pooled([1.0, -1.0, 1.0], "aaa")
job.check(one == (2 / 3, 2 / 3, 2 / 3), f"one problem has no spread by problem: {one}")
job.check(tool.mean([math.log(2)] * 1001) == math.log(2) and tool.mean([]) is None, "a mean that is not exact")
job.say("passed: pooled bootstrap")

x = [{0: 1, 1: -1}, {0: 1}, {1: 1}, {0: -1, 2: 1}, {2: 1, 1: 1}]
for l2 in (0.1, 1.0, 30.0):
    w = tool.fit_logistic(x, 3, l2, sweeps=3000)
    for j in range(3):
        slope = sum(r.get(j, 0) * tool.sigmoid(-tool.dot(w, r)) for r in x) - l2 * w[j]
        job.check(abs(slope) < 1e-4 * max(1, l2), f"L2 {l2}: the slope of weight {j} is {slope} at the minimum")
for z in (-800.0, -1.0, 0.0, 3.0, 800.0):
    job.check(math.isclose(tool.log_loss(z), math.log1p(math.exp(-z)) if abs(z) < 700 else max(-z, 0), rel_tol=1e-12, abs_tol=1e-300), f"log loss of {z}")
pairs = [{"chosen": f"so {i}", "rejected": f"thus {i}"} for i in range(30)]
margins, l2 = tool.bag_of_words(pairs[:10], pairs[10:20], pairs[20:])
job.check(min(margins) > 0 and l2 == tool.L2[0], f"a word that always tells: {margins}, L2 {l2}")
turned = [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in pairs[10:20]]
job.check(tool.bag_of_words(pairs[:10], turned, pairs[20:])[1] == tool.L2[-1], "a validation file that says the opposite wants the strongest L2")
job.say("passed: bag of words")
