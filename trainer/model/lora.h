/* lora: which parameters of a model train: all, all but some (train.freeze), or only low-rank adapters of linear layers
 * (LoRA: Hu et al. 2021, arXiv:2106.09685).
 *
 * A linear layer W [M, K] that is adapted computes with W + s B A, A [rank, K], B [M, rank], s = alpha / rank, or
 * alpha / sqrt(rank) (rank-stabilised: Kalajdzievski 2023, arXiv:2312.03732). A begins uniform in +-1/sqrt(K) (peft's
 * kaiming_uniform_ with a = sqrt(5)), B zero, so that the first step computes what the model without adapters does, to
 * the last bit. The base is frozen. Patterns are globs of POSIX fnmatch, where `*` matches dots too. */
#ifndef TESSERA_TRAINER_MODEL_LORA_H
#define TESSERA_TRAINER_MODEL_LORA_H

#include "trainer/model/model.h"

struct lora_config { /* section "lora" */
    char *targets;   /* patterns of layers ("model.layers.0.self_attn.q_proj"), commas between; "": no adapters */
    int64_t rank;
    double alpha;
    bool rank_stabilised;
};
extern const struct option_table lora_options;

struct tuning {
    const struct lora_config *lora; /* borrowed */
    const char *freeze;             /* patterns of parameters ("model.embed_tokens.weight"); "": none */
    const char *muon;               /* patterns of layers whose matrices, if they train, are Muon's; "", NULL: none */
};

/* What B A is multiplied by. */
float lora_scale(const struct lora_config *c);
/* Add the adapters to a model whose parameters are declared, without memory yet, and freeze what is not to train.
 * Adapters are named LAYER.lora_A.weight and LAYER.lora_B.weight, behind all other parameters, cut over
 * tensor-parallel ranks as their layer is. Experts' layers, which are one tensor of all ("...mlp.experts.gate_proj"),
 * have an adapter each, which lies with its expert: [E, rank, K] and [E, M, rank]. A tied parameter is frozen by any of
 * its names. INVALID: a pattern fits nothing (with names that there are), both kinds are asked for, or nothing trains,
 * or nothing by Muon. */
status *model_tune(struct model *m, const struct tuning *how) WARN_UNUSED;
/* Section lora of a stored configuration (config_text); targets stays NULL. Fields that it lacks get their defaults. */
status *lora_stored(const char *text, struct lora_config *out) WARN_UNUSED;

/* w[first, first + n) of a row-major [M, K] += scale B A; each element's sum in f64, rounded once. a [rank, K],
 * b [M, rank]. */
void lora_merge(float *w, uint64_t first, uint64_t n, uint64_t k, const float *a, const float *b, uint64_t rank,
                float scale);

#endif
