#!/usr/bin/env python3
"""The runner of vector files against other numbers, other names and wrong numbers.

make_rl.py draws inputs from a seed and computes what is expected in 60-digit decimals; every case that the runner
knows must pass. Then each expected number of each known case is moved by three tolerances, one at a time, and every
one of these copies must be reported as a failure, by name and field."""
import copy
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("TESSERA_BUILD", "build"), "tests", "golden")
SEEDS = range(1, 9)
F32 = ("kto_labelled", "ld_dpo", "token_logps", "temperature")
# told by their keys alone, whatever their name
BY_KEYS = {"dpo_metrics", "simpo", "orpo", "rpo", "kto_pair", "kto_unpaired", "kto_labelled", "wpo", "mpo", "ld_dpo", "dpo_at_reference",
           "token_logps", "temperature"}


def need(ok, *words):
    if not ok:
        print(*words)
        sys.exit(1)


def golden(*paths):
    """Exit status and the words after `pass`, `FAIL`, `skip` of every line, and the three counts."""
    r = subprocess.run([GOLDEN, *paths], capture_output=True, text=True)
    lines = {"pass": [], "FAIL": [], "skip": []}
    for line in r.stdout.splitlines()[:-1]:
        word, rest = line.split(" ", 1)
        lines[word].append(rest)
    counts = [int(w.split()[0]) for w in r.stdout.splitlines()[-1].split(", ")]
    return r.returncode, lines, counts, r.stderr


def write(folder, name, cases):
    path = os.path.join(folder, name)
    with open(path, "w") as f:
        json.dump({"cases": cases}, f)
    return path


def cases_of(path):
    with open(path) as f:
        return json.load(f)["cases"]


def known(path):
    """Names of the cases that pass, and nothing may fail."""
    rc, lines, counts, _ = golden(path)
    need(rc == 0 and counts[1] == 0, path, *lines["FAIL"])
    need(counts == [len(lines[k]) for k in ("pass", "FAIL", "skip")], "counts", counts)
    return [line.split(": ")[1] for line in lines["pass"]]


def leaves(value, path=()):
    """(path, number) of every number and boolean in a tree."""
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, list):
        value = enumerate(value)
    elif isinstance(value, (int, float)):
        yield path, value
        return
    else:
        return
    for key, inner in value:
        yield from leaves(inner, path + (key,))


def mutants(case):
    relative, absolute = (6e-5, 6e-7) if case["name"].startswith(F32) else (3e-10, 3e-14)
    for path, value in leaves(case["expected"]):
        m = copy.deepcopy(case)
        at = m["expected"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value + relative * abs(value) + absolute
        m["name"] += " " + "/".join(map(str, path))
        yield m


def other_numbers(folder):
    for seed in SEEDS:
        path = os.path.join(folder, "seed%d.json" % seed)
        subprocess.run([sys.executable, os.path.join(HERE, "make_rl.py"), path, "--seed", str(seed)], check=True,
                       stdout=subprocess.DEVNULL)
        names = known(path)
        need(len(names) >= 33 and "cdpo" in names and "token_logps" in names, path, names)


def other_names(folder):
    cases = cases_of(os.path.join(folder, "seed1.json"))
    names = known(os.path.join(folder, "seed1.json"))
    for form in ("%s_2", "7_%s", "drawn/%s/b"):
        renamed = [dict(c, name=form % c["name"]) for c in cases]
        got = known(write(folder, "renamed.json", renamed))
        need(got == [form % n for n in names], form, got)
    plain = [dict(c, name="case_%d" % i) for i, c in enumerate(cases)]
    got = {cases[int(n[5:])]["name"] for n in known(write(folder, "plain.json", plain))}
    need(got == BY_KEYS, "by keys alone:", sorted(got))


def wrong_numbers(folder):
    for source in (os.path.join(HERE, "rl.json"), os.path.join(folder, "seed2.json")):
        names = set(known(source))
        wrong = [m for c in cases_of(source) if c["name"] in names for m in mutants(c)]
        need(len(wrong) > 100, "mutants", len(wrong))
        rc, lines, counts, _ = golden(write(folder, "wrong.json", wrong))
        need(rc == 1 and counts == [0, len(wrong), 0], source, counts, *lines["pass"][:10])
        for m in wrong:
            name, path = m["name"].rsplit(" ", 1)
            field = path.split("/")[0]
            need(any(line.startswith("wrong.json: %s: %s" % (m["name"], field)) and "got" in line and "expected" in line
                     for line in lines["FAIL"]), "no line for", m["name"])
    with open(os.path.join(HERE, "diffusion.json")) as f:
        philox = json.load(f)["cases"]["philox4x32_10"]
    for path in (("kat", 1, "out", 3), ("normals_box_muller", 0, "normals", 2)):
        m = copy.deepcopy(philox)
        m[path[0]][path[1]][path[2]][path[3]] += 1
        rc, lines, counts, _ = golden(write(folder, "philox.json", {"philox4x32_10": m}))
        need(rc == 1 and counts == [0, 1, 0], "philox", counts)


def broken(folder):
    short = [c for c in cases_of(os.path.join(HERE, "rl.json")) if c["name"] == "dpo_sigmoid"]
    short[0]["inputs"]["chosen_lengths"] = [1, 2]
    rc, lines, counts, _ = golden(write(folder, "short.json", short))
    need(rc == 1 and "chosen_lengths" in lines["FAIL"][0], "short", lines)
    del short[0]["inputs"]["chosen_lengths"], short[0]["expected"]["loss"], short[0]["expected"]["per_pair_loss"]
    short[0]["expected"] = {"something": 1}
    rc, lines, counts, _ = golden(write(folder, "empty.json", short))
    need(rc == 1 and counts == [0, 1, 0], "nothing to compare", lines)
    with open(os.path.join(folder, "text.json"), "w") as f:
        f.write("{")
    for args in ([os.path.join(folder, "text.json")], [os.path.join(folder, "none.json")], []):
        rc, _, counts, said = golden(*args)
        need(rc == 2 and counts == [0, 0, 0] and said, "unreadable", args, rc, said)


with tempfile.TemporaryDirectory() as folder:
    other_numbers(folder)
    other_names(folder)
    wrong_numbers(folder)
    broken(folder)
print("golden: %d seeds, other names, wrong numbers and broken files are told apart" % len(SEEDS))
