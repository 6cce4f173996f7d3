#!/usr/bin/env python3
"""What a rank holds at ZeRO 0, 1, 2 and 3 is what docs/parallelism.md says: peak resident memory of 100 MB of parameters, less that of a model of
almost none, within 10 % of the page's formulas, written out here."""

import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

DP = S = 2
C, LAYERS, FFN, VOCAB, N, BUCKET = 512, 8, 1408, 258, 48, 1 << 20
B = 4 * C * C + 3 * C * FFN + 2 * C  # a block's parameters
E = VOCAB * C + C  # those outside
P = LAYERS * B + E
tmp = job.workspace()
job.write_data(tmp / "data")


def peak(name, zero, **model):
    shape = {"kind": "llama", "layers": LAYERS, "hidden": C, "heads": 8, "ffn": FFN, "tied": "true", **model}
    sections = {
        "run": {"name": name, "dir": tmp / name, "seed": 3},
        "model": shape,
        "data": {"sft": tmp / "data" / "sft.jsonl", "max_length": N},
        "algo": {"kind": "sft"},
        # as many lanes as ranks and a micro-batch each: no gradient waits for another (n = 0; on shards 1)
        "train": {"steps": 2, "global_batch": DP, "micro_batch": 1, "lanes": DP},
        "parallel": {"zero": zero, "bucket": BUCKET},
    }
    path = tmp / f"{name}.yaml"
    path.write_text("threads: 1\n" + "".join(f"{s}:\n" + "".join(f"  {k}: {v}\n" for k, v in rows.items()) for s, rows in sections.items()))
    job.run(DP, path)
    events = job.events(tmp / name)
    return job.last(events, "end")["peak_rss_bytes"], job.last(events, "run")


tied = 4 * VOCAB * C  # the output matrix's own gradient in deterministic mode
windows = E + 2 * B
formula = {
    0: 16 * P + tied,
    1: 8 * P + 8 * P / S + tied,
    2: 4 * P + 12 * P / S + 4 * windows + tied / S + tied,
    3: 16 * P / S + 8 * windows + tied / S + tied,
}
activations = 14 * N * C * LAYERS * 4
base, _ = peak("base", 0, layers=1, hidden=16, heads=2, ffn=16)
for zero, holds in formula.items():
    got, said = peak(f"zero{zero}", zero)
    want = base + holds + BUCKET * (DP - 1) + activations
    parts = " + ".join(f"{said[k] / 1e6:.1f}" for k in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "window_bytes", "message_bytes"))
    job.say(f"ZeRO {zero}: peak {got / 1e6:.1f} MB, formula {want / 1e6:.1f} ({base / 1e6:.1f} of them without parameters), said {parts}: {got / want - 1:+.1%}")
    job.check(abs(got / want - 1) < 0.1, f"ZeRO {zero}: a rank takes {got / 1e6:.1f} MB, the formula says {want / 1e6:.1f}")
