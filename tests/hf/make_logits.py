#!/usr/bin/env python3
"""make_logits.py FOLDER...: logits of transformers for the model in each folder (config.json, safetensors), in f32 on the CPU, for token
ids drawn here; written to FOLDER/logits.safetensors. build/tests/hf_logits FOLDER... compares the program's own with them.
Needs torch, transformers, safetensors (docs/recipes.md, "Weights from and to Hugging Face")."""
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TOKENS = 40


def make(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        logits = model(ids).logits[0]
    save_file({"input_ids": ids[0].contiguous(), "logits": logits.float().contiguous()}, f"{folder}/logits.safetensors")
    print(f"{folder}: {type(model).__name__}, {TOKENS} x {logits.shape[1]} logits up to {logits.abs().max():.3f}")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        make(path)
