#!/usr/bin/python3
"""Weights from and to Hugging Face folders, by the program: import and export give back every bit (files read here by a parser of 20 lines);
view.h5 of the step has the same bits; a run on 2 ranks is exported, cast, sharded, and taken up by model.init_from on
1 and 2 ranks; adapters are exported merged and alone; what does not fit is one line and leaves nothing behind."""

import json
import os
import pathlib
import re
import shutil
import struct
import sys

sys.dont_write_bytecode = True
here = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "support"))
import h5py  # noqa: E402
import job  # noqa: E402

tmp = job.workspace()
fixtures = sorted((here / "fixtures").iterdir())
TIED = {"smollm2", "qwen3", "qwen3_moe"}
LATENT = {"model_type": "deepseek_v3", "num_experts_per_tok": 1, "n_routed_experts": 2, "moe_intermediate_size": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
          "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
          "n_shared_experts": 0}


def parse(path):
    """{name: (dtype, shape, bytes)} of one file, as its format is described."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    job.check(header.pop("__metadata__", None) == {"format": "pt"}, f"{path}: metadata")
    job.check(n % 8 == 0 and data[8:9] == b"{", f"{path}: header of {n} bytes")
    spans = sorted(t["data_offsets"] for t in header.values())
    job.check([s[0] for s in spans] == [0] + [s[1] for s in spans][:-1] and spans[-1][1] == len(data) - 8 - n, f"{path}: holes or overlaps")
    return {k: (t["dtype"], t["shape"], data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]) for k, t in header.items()}


def read(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return parse(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    out = {}
    for file in set(where.values()):
        found = parse(folder / file)
        job.check(all(where[k] == file for k in found), f"{file}: not as the index says")
        out |= found
    job.check(set(out) == set(where), f"{index}: names")
    return out


def bf16(raw):
    """Nearest even, of finite f32."""
    out = bytearray()
    for (u,) in struct.iter_unpack("<I", raw):
        out += struct.pack("<H", (u + 0x7FFF + (u >> 16 & 1)) >> 16)
    return bytes(out)


def view(root, want):
    job.tool("ckpt", "view", root)
    step = job.committed(root)[-1]
    with h5py.File(job.step_dir(root, step) / "view.h5", "r") as f:
        for name, (dtype, shape, raw) in want.items():
            expert = re.search(r"\.experts\.(\d+)\.", name)  # one tensor of all experts
            d = f[f"model/{name.replace(expert[0], '.experts.')}"][int(expert[1])] if expert else f[f"model/{name}"]
            job.check(list(d.shape) == shape, f"view of {name}: {d.shape}")
            if dtype == "F32":
                job.check(d[()].tobytes() == raw, f"view of {name}: values")


def round_trips():
    for folder in fixtures:
        root, out, again = tmp / f"root-{folder.name}", tmp / f"out-{folder.name}", tmp / f"again-{folder.name}"
        want = read(folder)
        job.tool("ckpt", "import", folder, root)
        job.check(job.committed(root) == [0], f"{folder.name}: steps {job.committed(root)}")
        job.tool("ckpt", "verify", root)
        job.tool("ckpt", "export", root, out)
        job.check(read(out) == want, f"{folder.name}: export differs")
        job.tool("ckpt", "export", f"{root}/step-{0:012d}", 0, again, "--shard-bytes=3000")
        job.check(read(again) == want and len(list(again.glob("model-*-of-*.safetensors"))) > 3, f"{folder.name}: shards differ")
        job.check(not list(tmp.glob("*.part-*")), "a .part- folder stayed")
        view(root, want)
        a, b = (json.loads((f / "config.json").read_text()) for f in (folder, out))
        for key in ("num_hidden_layers", "hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "model_type", "sliding_window"):
            job.check(a.get(key) == b.get(key), f"{folder.name}: {key} is {b.get(key)}, not {a.get(key)}")
        job.check(("lm_head.weight" in want) == (folder.name not in TIED), f"{folder.name}: lm_head")
    job.say(f"round trips of {len(fixtures)} folders")


def training():
    data = tmp / "data"
    job.write_data(data)
    run = job.write_config(tmp, "run", data, train_steps=16)
    job.run(2, run)
    ckpt = tmp / "run" / "ckpt"
    newest = job.committed(ckpt)[-1]
    for out, *more in (("whole", ), ("cut", "--shard-bytes=20000"), ("half", "--dtype=bf16")):
        job.tool("ckpt", "export", f"file:{ckpt}", tmp / out, *more)
    whole, half = read(tmp / "whole"), read(tmp / "half")
    vocabulary = json.loads((tmp / "whole" / "config.json").read_text())["vocab_size"]
    job.check([vocabulary] == whole["model.embed_tokens.weight"][1][:1], f"vocab_size is {vocabulary}, unlike the embedding's rows")
    job.check(read(tmp / "cut") == whole and "lm_head.weight" not in whole, "shards differ, or a tied head was written")
    view(ckpt, whole)
    job.check(all(half[k] == ("BF16", s, bf16(raw)) for k, (_, s, raw) in whole.items()), "bf16 is not the f32 rounded to nearest even")

    saved = job.last(job.events(tmp / "run"), "save_start", step=newest)
    crc = {}
    for name, folder, ranks in (("one", "whole", 1), ("two", "cut", 2), ("three", "half", 2)):
        path = job.write_config(tmp, name, data, train_steps=13, model_init_from=tmp / folder)
        if name != "two":  # every key from config.json
            path.write_text(re.sub(r"model:\n(  .*\n)+", f"model:\n  init_from: {tmp / folder}\n", path.read_text()))
        job.run(ranks, path)
        e = job.last(job.events(tmp / name), "init_from")
        job.check(e is not None, f"{name}: no event init_from")
        bytes_of = sum(len(raw) for _, _, raw in read(tmp / folder).values())
        job.check(e["bytes_read"] == bytes_of, f"{name}: {ranks} ranks read {e['bytes_read']} bytes of {bytes_of}")
        crc[name] = e["weights_crc32c"]
        job.run(ranks, path, "train.steps=14")  # resumes: the folder's weights are not taken again
        job.check(job.last(job.events(tmp / name), "resume") is not None, f"{name}: no resume")
    job.check(crc["one"] == crc["two"] != crc["three"], f"weights after init_from: {crc}")
    job.check(crc["one"] == saved["weights_crc32c"], "weights are not those that were saved")
    return data


def adapters(data):
    """Adapters on a folder's weights, trained cut over two ranks: merged, each weight is the folder's plus scale B A, rounded once; alone, they are
    what peft calls them."""
    path = job.write_config(tmp, "lora", data, train_steps=13, model_init_from=tmp / "whole", optim_lr=0.01)
    job.run(2, path, "lora.targets=*.q_proj,*.1.mlp.down_proj", "lora.rank=2", "lora.alpha=6", "parallel.tp=2")
    ckpt = tmp / "lora" / "ckpt"
    for out, *more in (("merged", ), ("merged-half", "--dtype=bf16"), ("adapter", "--adapter")):
        job.tool("ckpt", "export", ckpt, tmp / out, *more)
    base, merged, half, own = read(tmp / "whole"), read(tmp / "merged"), read(tmp / "merged-half"), parse(tmp / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp / "adapter" / "adapter_config.json").read_text())
    layers = config["target_modules"]
    job.check((config["r"], config["lora_alpha"], config["peft_type"], config["base_model_name_or_path"]) == (2, 6, "LORA", str(tmp / "whole")), config)
    wanted = {k.removesuffix(".weight") for k in base if ".q_proj." in k or ".1.mlp.down_proj." in k}
    job.check(set(layers) == wanted and len(layers) == len(wanted) >= 3, f"adapted: {layers}")
    job.check(set(own) == {f"base_model.model.{k}.lora_{m}.weight" for k in layers for m in "AB"}, f"names: {sorted(own)}")
    job.check(set(merged) == set(base), "merged: other names")
    for name, (dtype, shape, raw) in base.items():
        job.check(merged[name][:2] == (dtype, shape) and half[name][2] == bf16(merged[name][2]), f"merged: {name}: type, shape or bf16")
        if name.removesuffix(".weight") not in wanted:
            job.check(merged[name][2] == raw, f"merged: {name} has changed")
            continue
        (_, a_shape, a), (_, b_shape, b) = (own[f"base_model.model.{name.removesuffix('.weight')}.lora_{m}.weight"] for m in "AB")
        m, k = shape
        job.check(a_shape == [2, k] and b_shape == [m, 2], f"{name}: {a_shape}, {b_shape}")
        w, now, a, b = (struct.unpack(f"<{len(x) // 4}f", x) for x in (raw, merged[name][2], a, b))
        for i in range(m * k):
            want = w[i] + 3 * (b[i // k * 2] * a[i % k] + b[i // k * 2 + 1] * a[k + i % k])
            job.check(abs(now[i] - want) <= 6e-8 * abs(want) + 1e-12, f"{name}[{i}] is {now[i]}, not {want}")
        job.check(any(x != y for x, y in zip(w, now)), f"merged: {name} is the base")
    _, err = job.tool("ckpt", "export", tmp / "run" / "ckpt", tmp / "nowhere", "--adapter", status=65)
    job.check("no tensors in part adapter" in err and not (tmp / "nowhere").exists(), err)
    job.say(f"adapters of {len(layers)} layers, merged and alone")


def planted(data):
    """debug: nan names the op and the weight, once."""
    shutil.copytree(tmp / "whole", tmp / "planted-weights")
    name, row, column = "model.layers.1.mlp.gate_proj.weight", 5, 3
    path = tmp / "planted-weights" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    (n,) = struct.unpack("<Q", raw[:8])
    tensor = json.loads(raw[8:8 + n])[name]
    rows, columns = tensor["shape"]
    struct.pack_into("<f", raw, 8 + n + tensor["data_offsets"][0] + 4 * (row * columns + column), float("nan"))
    path.write_bytes(raw)
    config = job.write_config(tmp, "planted", data, model_init_from=tmp / "planted-weights")
    for debug, words in (("off", ["the loss is not finite at step 1", "debug: nan"]),
                         ("nan", ["step 1: ", f"op_linear of {name}, block 1, forward of micro-batch 0: ", f"{rows}] is nan at [0, {row}], element {row};",
                                  f"its weight [{rows}, {columns}] is nan at [{row}, {column}], element {row * columns + column}", "(rank 0)"])):
        out, err = job.tool("train", config, f"debug={debug}", "threads=1", status=65)
        errors = job.error_lines(out + err)
        job.check(len(errors) == 1 and all(w in errors[0] for w in words), f"debug={debug}: {err}")
    job.say("a planted NaN is named")


def refusals(data):
    base = here / "fixtures" / "linear"

    def broken(name, **keys):
        shutil.copytree(base, tmp / name)
        config = json.loads((tmp / name / "config.json").read_text())
        config.update(keys)
        (tmp / name / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
        return tmp / name

    for keys, words in (
            ({"model_type": "mixtral"}, 'model_type "mixtral" is not built'),
            ({"model_type": "deepseek_v4"}, 'model_type "deepseek_v4" is not built'),
            ({"model_type": "qwen3_moe"}, "key num_experts_per_tok is missing"),
            ({"model_type": "deepseek", "kv_lora_rank": 512}, "multi-head latent attention (kv_lora_rank) of deepseek is not built"),
            ({**LATENT, "v_head_dim": "gone"}, "key v_head_dim is missing"),
            ({**LATENT, "n_group": None}, "key n_group is missing"),
            ({**LATENT, "rope_interleave": False}, "rope_interleave: false is not built"),
            ({**LATENT, "topk_method": "greedy"}, "deepseek_v3 with another topk_method than noaux_tc is not built"),
            ({**LATENT, "scoring_func": "softmax"}, "deepseek_v3 with another scoring_func than sigmoid is not built"),
            ({**LATENT, "model_type": "deepseek_v2", "norm_topk_prob": True}, "deepseek_v2 with norm_topk_prob: true is not built"),
            ({**LATENT, "num_key_value_heads": 2}, "model.kv_heads: 2, but with model.kv_lora_rank there are as many as model.heads: 4"),
            (LATENT, "missing model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
            ({"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
             "missing model.layers.0.mlp.experts.0.gate_proj.weight; missing model.layers.0.mlp.experts.1.gate_proj.weight"),
            ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not built'),
            ({"hidden_size": "gone"}, "key hidden_size is missing"),
            ({"hidden_size": "wide"}, "key hidden_size is not a whole number"),
            ({"attention_bias": True}, "attention_bias: true is not built"),
            ({"quantization_config": {}}, "quantized weights"),
            ({"rope_parameters": {"rope_type": "longrope", "factor": 2}}, 'rope scaling "longrope" is not built'),
            ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope scaling without factor"),
            ({"num_hidden_layers": 3}, "missing model.layers.2."),
            ({"num_hidden_layers": 1}, "unexpected model.layers.1."),
            ({"intermediate_size": 25}, "(24, 16), not (25, 16), is the shape of model.layers.0.mlp.gate_proj.weight"),
    ):
        folder = broken("bad", **keys)
        _, err = job.tool("ckpt", "import", folder, tmp / "nowhere", status=None)
        job.check(job.tool.status in (65, 77) and words in err and err.count("\n") == 1, f"{keys}: {job.tool.status}: {err}")
        job.check(not (tmp / "nowhere").exists(), f"{keys}: left something behind")
        shutil.rmtree(folder)

    folder = broken("bad")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-1])
    _, err = job.tool("ckpt", "import", folder, tmp / "nowhere", status=71)
    job.check("model.safetensors: tensor" in err, err)
    _, err = job.tool("ckpt", "import", base, tmp / f"root-{base.name}", status=67)
    job.check("holds step 0 already" in err, err)
    before = sorted(os.listdir(tmp / f"out-{base.name}"))
    _, err = job.tool("ckpt", "export", tmp / f"root-{base.name}", tmp / f"out-{base.name}", status=67)
    job.check("is there already" in err and sorted(os.listdir(tmp / f"out-{base.name}")) == before, err)
    _, err = job.tool("ckpt", "export", tmp / f"root-{base.name}", 7, tmp / "nowhere", status=66)
    _, err = job.tool("ckpt", "export", tmp / f"root-{base.name}", tmp / "nowhere", "--dtype=i8", status=65)
    job.check("bf16, f16, f32 or f64" in err and not (tmp / "nowhere").exists(), err)

    path = job.write_config(tmp, "clash", data, train_steps=13, model_init_from=tmp / "whole", model_heads=3)
    out = job.run(2, path, status=65)
    job.check("model.heads: 3, but" in out and len(job.error_lines(out)) == 1, out)


round_trips()
data = training()
adapters(data)
planted(data)
refusals(data)
