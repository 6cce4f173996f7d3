/* llama_config: section model of kind llama (model_llama.c): its keys, and what is refused of them. */
#ifndef TESSERA_TRAINER_MODEL_LLAMA_CONFIG_H
#define TESSERA_TRAINER_MODEL_LLAMA_CONFIG_H

#include "comm/base/options.h"
#include "comm/base/status.h"

#include <stdbool.h>
#include <stdint.h>

struct llama_config {
    int kind;
    int64_t layers, hidden, heads, kv_heads, head_dim, ffn, max_positions, vocab;
    double rope_theta, norm_eps, init_std;
    bool tied, qk_norm, qkv_bias;
    int64_t window, window_from;
    int rope_scaling;
    double rope_factor, rope_original, rope_low, rope_high, rope_fast, rope_slow, rope_amplitude;
    int64_t experts, experts_per_token, expert_ffn, shared_experts, first_dense, sparse_step, groups, top_groups;
    int router;
    bool router_norm, router_bias;
    double router_scale, balance_loss, balance_rate;
    char *dense_layers;
    int64_t q_rank, kv_rank, nope_dim, rope_dim, v_dim; /* kv_rank 0: no latent attention */
    double rope_mscale;
};
enum { ROUTER_SOFTMAX, ROUTER_SIGMOID };

extern const struct option_table llama_options;

/* Zeros replaced by what they stand for. With latent attention head_dim is the size of heads as attention takes them:
 * queries and keys, or values, are padded with zeros to the larger of both. */
struct llama_config llama_resolved(const struct llama_config *config);
/* Has a layer experts? */
bool llama_has_experts(const struct llama_config *c, int64_t layer);
/* Of queries and keys, as the config has it. */
int64_t llama_qk_dim(const struct llama_config *c);
status *llama_check(const void *config) WARN_UNUSED;

#endif
