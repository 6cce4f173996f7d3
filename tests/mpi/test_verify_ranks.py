#!/usr/bin/python3
"""`tessera ckpt verify` alone, with threads, and under mpirun: one report, whoever reads; the exit code of damage on every rank."""

import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

tmp = job.workspace()
job.write_data(tmp / "data")
job.run(2, job.write_config(tmp, "run", tmp / "data", train_steps=4, algo_warmup_sft_steps=0, checkpoint_every=2))
root = tmp / "run" / "ckpt"
job.check(job.committed(root) == [2, 4], f"steps {job.committed(root)}")


def on(ranks, *arguments):
    words = [job.TESSERA, "ckpt", "verify", *map(str, arguments)]
    if ranks:
        words = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *words]
    r = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=job.LIMIT_S, env=job.environment())
    return r.returncode, r.stdout, r.stderr


def same(status, lines, *arguments):
    want = None
    for ranks, more in ((0, ("-j", "1")), (0, ()), (0, ("-j3",)), (1, ()), (2, ("-j", "2")), (3, ())):
        code, out, err = on(ranks, *arguments, *more)
        job.check(code == status, f"verify on {ranks} ranks {more}: exit status {code}, not {status}:\n{out}{err}")
        job.check(len(out.splitlines()) == lines, f"verify on {ranks} ranks {more}: not {lines} lines:\n{out}")
        want = want or out
        job.check(out == want, f"verify on {ranks} ranks {more} says\n{out}instead of\n{want}")
        said = job.error_lines(err)
        job.check(len(said) == (1 if status else 0), f"{ranks} ranks print {len(said)} errors:\n{err}")
    return want


job.check("verified 2 steps" in same(0, 1, root) and ": no damage" in same(0, 1, root, 2), "no summary")
for file in job.step_dir(root, 2).glob("*-*.h5"):
    with open(file, "r+b") as f:
        data = bytearray(f.read())
        for at in range(5, len(data), len(data) // 3):
            data[at] ^= 0x10
        f.seek(0)
        f.write(data)
damaged = same(71, 1 + len(on(0, root)[1].splitlines()) - 1, root)
job.check("in 1 step" in damaged and damaged.count("\n") > 3, f"too little was found:\n{damaged}")
same(66, 0, root, 3)
same(66, 0, tmp / "nowhere")
print("one report for any number of ranks and threads")
