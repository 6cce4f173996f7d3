#!/usr/bin/env python3
"""make_fixtures.py: the small random models under tests/hf/fixtures, one of each family and scaling of positions, by transformers; with
their logits. Run once (torch 2.15, transformers 5.23 made those in the repository)."""
import os
import shutil

import make_logits
import torch
from transformers import (DeepseekV2Config, DeepseekV3Config, Dots1Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig,
                          AutoModelForCausalLM)

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


def rope(**more):
    return dict(rope_theta=100.0, **more)


MODELS = {
    "llama3": LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False,
                          rope_parameters=rope(rope_type="llama3", factor=8.0, original_max_position_embeddings=16,
                                               low_freq_factor=1.0, high_freq_factor=4.0)),
    "linear": LlamaConfig(**SMALL, num_key_value_heads=4, rope_parameters=rope(rope_type="linear", factor=4.0)),
    "yarn": LlamaConfig(**SMALL, num_key_value_heads=1, head_dim=16,
                        rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0,
                                             beta_slow=1.0)),
    "smollm2": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=rope(rope_type="default")),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=7, rope_parameters=rope(rope_type="default")),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=9, max_window_layers=1,
                         rope_parameters=rope(rope_type="default")),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
                         rope_parameters=rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=32)),
    "qwen3_moe": Qwen3MoeConfig(**{**SMALL, "num_hidden_layers": 3}, num_key_value_heads=2, head_dim=8, num_experts=4,
                                num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True, mlp_only_layers=[1],
                                tie_word_embeddings=True, rope_parameters=rope(rope_type="default")),
    "dots1": Dots1Config(**SMALL, num_key_value_heads=2, head_dim=8, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
                         moe_intermediate_size=8, norm_topk_prob=True, first_k_dense_replace=1, routed_scaling_factor=2.5, n_group=4,
                         topk_group=2, sliding_window=None, rope_parameters=rope(rope_type="default")),
    "deepseek_v2": DeepseekV2Config(**SMALL, n_routed_experts=6, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=8,
                                    first_k_dense_replace=1, routed_scaling_factor=3.0, topk_method="group_limited_greedy", n_group=3,
                                    topk_group=2, q_lora_rank=None, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=12,
                                    rope_parameters=rope(rope_type="default")),
    "deepseek_v3": DeepseekV3Config(**SMALL, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
                                    moe_intermediate_size=8, norm_topk_prob=True, first_k_dense_replace=1, routed_scaling_factor=2.5,
                                    n_group=4, topk_group=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=8,
                                    v_head_dim=9, num_nextn_predict_layers=0,
                                    rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0,
                                                         beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7)),
}

for name, config in MODELS.items():
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if name == "mistral" else torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # larger than usual, so that no part of the model drowns
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim > 1 else 0.5) + (1.0 if p.ndim == 1 else 0.0))
        for n, b in model.named_buffers():
            if n.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape) * 0.1)
    model.save_pretrained(folder, max_shard_size="9KB" if name.startswith("qwen3") else "5GB")
    for extra in ("generation_config.json",):
        if os.path.exists(os.path.join(folder, extra)):
            os.remove(os.path.join(folder, extra))
    make_logits.make(folder)
