#!/usr/bin/env python3
"""Experts on several ranks under mpirun: the losses of one rank, whose routes are replayed; what ep 2 saved goes on at ep 1 and ep 4 with the same hashes. And
`tessera eval` of a model with experts and adapters: the same from one rank, from several, from ep 2, and from the merged weights alone; and adapters alone."""

import json
import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import job  # noqa: E402

STEPS, CUT = 8, 4
tmp = job.workspace()
data = tmp / "data"
job.write_data(data)
EXPERTS = dict(model_layers=3, model_experts=8, model_experts_per_token=2, model_expert_ffn=16, model_shared_experts=1, model_first_dense=1, model_router="sigmoid",
               model_router_bias=True, model_balance_rate=0.01, model_qk_norm=True)


def config(name, **change):
    return job.write_config(tmp, name, data, **{**EXPERTS, "train_steps": STEPS, "algo_warmup_sft_steps": 2, "optim_schedule": "constant", "optim_lr": 3e-3,
                                                "checkpoint_every": CUT, "checkpoint_view": "never", **change})


def compare(name):
    got = job.events(tmp / name)
    job.same_losses(job.losses(whole), job.losses(got), range(1, STEPS + 1), name, bound=True)
    return got


job.run(1, config("whole"), f"train.routes=record:{tmp / 'routes'}")
whole = job.events(tmp / "whole")
replay = f"train.routes=replay:{tmp / 'routes'}"

path = config("dealt")
job.run(4, path, "parallel.ep=2", "parallel.dp=2", replay)
events = compare("dealt")
steps = [e for e in events if e["event"] == "step"]
job.check(all(e["ep_sent_bytes"] > 0 for e in steps), "nothing went to the experts of other ranks")
saved = job.last(events, "save_start", step=CUT)
for ranks, ep, pp in ((2, 1, 1), (4, 4, 1), (4, 2, 2)):
    text = f"ep 2 to ep {ep} on {ranks} ranks"
    job.run(ranks, path, f"parallel.ep={ep}", f"parallel.pp={pp}", f"checkpoint.resume={CUT}", "checkpoint.rewind=true", replay)
    resume = job.last(compare("dealt"), "resume")
    job.check(resume["step"] == CUT and resume["ranks"] == ranks, f"{text}: resumed as {resume}")
    job.same_state(saved, resume, text)
    job.say(f"passed: {text}")


def score(ranks, path, *overrides):
    """(the object on stdout, the objects of eval.pairs)"""
    pairs = tmp / "pairs.jsonl"
    pairs.unlink(missing_ok=True)
    r = subprocess.run(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), job.TESSERA, "eval", str(path), f"eval.pairs={pairs}", *overrides],
                       stdin=subprocess.DEVNULL, capture_output=True, text=True, env=job.environment(), timeout=job.LIMIT_S, check=False)
    job.check(r.returncode == 0, f"eval {overrides} on {ranks} ranks: exit status {r.returncode}: {r.stderr}")
    return json.loads(r.stdout), [json.loads(line) for line in pairs.read_text().splitlines()]


def near(got, want, bound, text):
    job.check(len(got) == len(want) > 10, f"{text}: {len(got)} pairs, not {len(want)}")
    for a, b in zip(got, want):
        for key in ("logps", "ref_logps"):
            for x, y in zip(a[key], b[key]):
                job.check(abs(x - y) <= bound * abs(y), f"{text}: row {a['row']}: {key} {a[key]}, not {b[key]}")


# Adapters of attention and of experts; the reference is the model without them.
lora = config("lora", lora={"targets": "['*.q_proj', '*.experts.*']", "rank": 4}, algo_warmup_sft_steps=0, algo_reference="base", model_balance_rate=0)
job.run(4, lora, "parallel.ep=2", "parallel.dp=2")
for path, reference in ((config("dealt"), "eval.reference=0"), (lora, "eval.reference=")):
    want = score(1, path, reference)
    job.check(len({r["margin"] for r in want[1]}) > 10 and any(abs(r["margin"]) > 1e-3 for r in want[1]), f"{path.name}: nothing was learnt: {want}")
    job.check(score(3, path, reference) == want, f"{path.name}: other scores on 3 ranks")
    for mesh in (("parallel.ep=2", "parallel.dp=2"), ("parallel.ep=4",), ("parallel.ep=2", "parallel.pp=2")):
        near(score(4, path, reference, *mesh)[1], want[1], 1e-5, f"{path.name} at {mesh}")
    job.say(f"passed: eval of {path.name}")

# Initial weights that are the merged ones, with adapters that do nothing yet.
job.tool("ckpt", "export", tmp / "lora" / "ckpt", STEPS, tmp / "merged")
got = score(1, lora, "eval.reference=0", f"model.init_from={tmp / 'merged'}")[1]
near([dict(r, logps=r["ref_logps"]) for r in got], [dict(r, ref_logps=r["logps"]) for r in got], 1e-5, "merged weights")
job.say("passed: merged weights")

# Alone they have the names that peft has for layers of single experts.
job.tool("ckpt", "export", tmp / "lora" / "ckpt", STEPS, tmp / "adapter", "--adapter")
raw = (tmp / "adapter" / "adapter_model.safetensors").read_bytes()
shapes = {k: v["shape"] for k, v in json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")]).items() if k != "__metadata__"}
model = json.loads((tmp / "merged" / "config.json").read_text())
c, heads, f = model["hidden_size"], model["num_attention_heads"] * model["head_dim"], EXPERTS["model_expert_ffn"]
layers = {f"model.layers.{i}.self_attn.q_proj": (heads, c) for i in range(3)}
layers |= {f"model.layers.{i}.mlp.experts.{e}.{n}_proj": (c, f) if n == "down" else (f, c) for i in (1, 2) for e in range(8) for n in ("gate", "up", "down")}
wanted = {f"base_model.model.{k}.lora_{ab}.weight": [4, n] if ab == "A" else [m, 4] for k, (m, n) in layers.items() for ab in "AB"}
job.check(shapes == wanted, f"adapters: {sorted(set(map(str, shapes.items())) ^ set(map(str, wanted.items())))[:6]}")
targets = json.loads((tmp / "adapter" / "adapter_config.json").read_text())["target_modules"]
job.check(sorted(targets) == sorted(layers), f"target_modules: {targets}")
job.say("passed: adapters alone")
