#!/usr/bin/python3
"""tessera ckpt diff on real steps: the same training on one rank and on three, with and without ZeRO, is cut differently and holds the same values;
another seed does not. The largest difference is that of h5py."""

import pathlib
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import h5py  # noqa: E402
import job  # noqa: E402

tmp = job.workspace()
data = tmp / "data"
job.write_data(data)


def root(name, ranks, **change):
    job.run(ranks, job.write_config(tmp, name, data, train_steps=12, algo_warmup_sft_steps=6, checkpoint_every=4, **change))
    return tmp / name / "ckpt"


one, three, plain, other = root("one", 1), root("three", 3), root("plain", 2, parallel_zero=0), root("other", 2, run_seed=4)
for a, b in ((one, three), (three, one), (three, plain)):
    for step in (4, 12):
        out, _ = job.tool("ckpt", "diff", a, step, b, step)
        job.check(re.search(r"[1-9]\d* tensors alike, 0 not", out), f"{a} and {b}: {out}")
out, _ = job.tool("ckpt", "diff", one, 4, three, 12, status=65)
job.check("only in the second  ref/logps/logp" in out and "differs  model/" in out, f"two steps of a run: {out}")
job.say("passed: alike however it is cut")


def element_map(ckpt, step, name):
    """Of a tensor of part model, whole in one piece; None for an alias, which has no bytes of its own."""
    with h5py.File(next(job.step_dir(ckpt, step).glob("model-*.h5"))) as f:
        return f[name]["p0"][()].astype("f8") if name in f else None


out, _ = job.tool("ckpt", "diff", one, 12, tmp / "other" / "ckpt", 12, status=65)
found = dict(re.findall(r"differs  model/(\S+)  \d+ of \d+ elements, max abs difference (\S+)", out))
job.check(len(found) > 5, f"another seed: {out}")
whole = root("whole", 1, run_seed=4)
compared = 0
for name, value in found.items():
    a, b = element_map(one, 12, name), element_map(whole, 12, name)
    if a is not None and b is not None and a.size == b.size:
        compared += 1
        want = abs(a.ravel() - b.ravel()).max()
        job.check(abs(float(value) - want) <= 1e-8 * want, f"{name}: max abs difference {value}, h5py says {want}")
job.check(compared > 3, f"{compared} tensors compared")
job.say(f"passed: {compared} largest differences")
