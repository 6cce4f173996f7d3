/* llama_config: see llama_config.h. */
#include "trainer/model/llama_config.h"

#include "trainer/ops/moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(struct llama_config, field)
static const struct option llama_rows[] = {
    { "kind", OPT_ENUM, "llama", 0, 0, "llama", "", "model family", AT(kind) },
    { "layers", OPT_INT, NULL, 1, 1024, NULL, "", "transformer blocks (num_hidden_layers)", AT(layers) },
    { "hidden", OPT_INT, NULL, 1, 1e6, NULL, "", "width of the residual stream (hidden_size)", AT(hidden) },
    { "heads", OPT_INT, NULL, 1, 1024, NULL, "", "query heads (num_attention_heads)", AT(heads) },
    { "kv_heads", OPT_INT, "0", 0, 1024, NULL, "", "key/value heads (num_key_value_heads); 0: as many as heads",
      AT(kv_heads) },
    { "head_dim", OPT_INT, "0", 0, 256, NULL, "", "size of a head, even; 0: hidden / heads", AT(head_dim) },
    { "ffn", OPT_INT, NULL, 1, 1e7, NULL, "", "width of the feed-forward block (intermediate_size)", AT(ffn) },
    { "rope_theta", OPT_FLOAT, "10000", 1, 1e9, NULL, "", "base of the rotary angles", AT(rope_theta) },
    { "rope_scaling", OPT_ENUM, "none", 0, 0, "none|linear|llama3|yarn", "",
      "how the angles were stretched to longer texts (rope_type)", AT(rope_scaling) },
    { "rope_factor", OPT_FLOAT, "1", 1, 1e6, NULL, "", "with rope_scaling: by how much (factor)", AT(rope_factor) },
    { "rope_original", OPT_FLOAT, "0", 0, 1e8, NULL, "tokens",
      "with llama3 and yarn: longest sequence before (original_max_position_embeddings)", AT(rope_original) },
    { "rope_low", OPT_FLOAT, "1", 1e-3, 1e6, NULL, "", "with llama3: low_freq_factor", AT(rope_low) },
    { "rope_high", OPT_FLOAT, "4", 1e-3, 1e6, NULL, "", "with llama3: high_freq_factor", AT(rope_high) },
    { "rope_beta_fast", OPT_FLOAT, "32", 1e-3, 1e6, NULL, "", "with yarn: beta_fast", AT(rope_fast) },
    { "rope_beta_slow", OPT_FLOAT, "1", 1e-3, 1e6, NULL, "", "with yarn: beta_slow", AT(rope_slow) },
    { "rope_amplitude", OPT_FLOAT, "0", 0, 100, NULL, "",
      "with yarn: factor of cosines and sines (attention_factor); 0: 0.1 ln(rope_factor) + 1", AT(rope_amplitude) },
    { "rope_mscale_all_dim", OPT_FLOAT, "0", 0, 100, NULL, "",
      "with latent attention and rope_scaling: scores are times (0.1 m ln(rope_factor) + 1)^2; 0: they are not",
      AT(rope_mscale) },
    { "sliding_window", OPT_INT, "0", 0, 1e9, NULL, "tokens",
      "a token sees itself and those before it, so many in all (sliding_window); 0: all", AT(window) },
    { "window_from", OPT_INT, "0", 0, 1024, NULL, "layers",
      "the layers before this one have no window (max_window_layers)", AT(window_from) },
    { "norm_eps", OPT_FLOAT, "1e-5", 1e-12, 1, NULL, "", "epsilon of RMSNorm (rms_norm_eps)", AT(norm_eps) },
    { "tied", OPT_BOOL, "false", 0, 0, NULL, "", "output matrix is the embedding (tie_word_embeddings)", AT(tied) },
    { "qk_norm", OPT_BOOL, "false", 0, 0, NULL, "", "RMSNorm on each query and key head, as in Qwen3", AT(qk_norm) },
    { "qkv_bias", OPT_BOOL, "false", 0, 0, NULL, "", "biases on q, k, v, as in Qwen2 (attention_bias)", AT(qkv_bias) },
    { "kv_lora_rank", OPT_INT, "0", 0, 1e6, NULL, "",
      "latent attention, as in DeepSeek-V2 and V3: keys and values are made of so many numbers a token; 0: it is not "
      "latent",
      AT(kv_rank) },
    { "q_lora_rank", OPT_INT, "0", 0, 1e6, NULL, "", "with kv_lora_rank: queries too, of so many; 0: of all channels",
      AT(q_rank) },
    { "qk_nope_head_dim", OPT_INT, "0", 0, 256, NULL, "",
      "with kv_lora_rank: size of a query's and key's unturned part", AT(nope_dim) },
    { "qk_rope_head_dim", OPT_INT, "0", 0, 256, NULL, "",
      "with kv_lora_rank: size of its turned part; of keys all heads have the same", AT(rope_dim) },
    { "v_head_dim", OPT_INT, "0", 0, 256, NULL, "", "with kv_lora_rank: size of a value", AT(v_dim) },
    { "init_std", OPT_FLOAT, "0.02", 0, 10, NULL, "", "standard deviation of initial weights (initializer_range)",
      AT(init_std) },
    { "max_positions", OPT_INT, "2048", 1, 1e8, NULL, "tokens", "longest sequence (max_position_embeddings)",
      AT(max_positions) },
    { "vocab", OPT_INT, "0", 0, 1e8, NULL, "tokens", "rows of the embedding (vocab_size); 0: the tokenizer's",
      AT(vocab) },
    { "experts", OPT_INT, "0", 0, EXPERTS_MAX, NULL, "",
      "routed experts of a layer (num_experts, n_routed_experts); 0: none, one feed-forward block", AT(experts) },
    { "experts_per_token", OPT_INT, "0", 0, TOP_MAX, NULL, "",
      "with experts: how many of them a token takes (num_experts_per_tok)", AT(experts_per_token) },
    { "expert_ffn", OPT_INT, "0", 0, 1e7, NULL, "", "with experts: width of one (moe_intermediate_size)",
      AT(expert_ffn) },
    { "shared_experts", OPT_INT, "0", 0, 1024, NULL, "",
      "with experts: so many more that all tokens take (n_shared_experts)", AT(shared_experts) },
    { "dense_layers", OPT_LIST, "", 0, 0, NULL, "layers",
      "layers without experts, [0, 5] (mlp_only_layers); they have one block of width ffn", AT(dense_layers) },
    { "first_dense", OPT_INT, "0", 0, 1024, NULL, "layers", "so many first layers too (first_k_dense_replace)",
      AT(first_dense) },
    { "sparse_step", OPT_INT, "1", 1, 1024, NULL, "layers",
      "of the others the layers i have experts where this divides i + 1 (decoder_sparse_step)", AT(sparse_step) },
    { "router", OPT_ENUM, "softmax", 0, 0, "softmax|sigmoid", "", "what makes scores of logits (scoring_func)",
      AT(router) },
    { "router_norm", OPT_BOOL, "true", 0, 0, NULL, "",
      "scores of a token's experts are divided by their sum (norm_topk_prob)", AT(router_norm) },
    { "router_scale", OPT_FLOAT, "1", 1e-6, 1e6, NULL, "", "then multiplied by this (routed_scaling_factor)",
      AT(router_scale) },
    { "router_bias", OPT_BOOL, "false", 0, 0, NULL, "",
      "scores are compared with a bias added, which weighs nothing (e_score_correction_bias)", AT(router_bias) },
    { "router_groups", OPT_INT, "1", 1, EXPERTS_MAX, NULL, "",
      "a token's experts are of router_top_groups groups of so many (n_group)", AT(groups) },
    { "router_top_groups", OPT_INT, "1", 1, EXPERTS_MAX, NULL, "", "(topk_group)", AT(top_groups) },
    { "balance_loss", OPT_FLOAT, "0", 0, 1e3, NULL, "",
      "coefficient of the loss that keeps experts' loads equal (router_aux_loss_coef); 0: none", AT(balance_loss) },
    { "balance_rate", OPT_FLOAT, "0", 0, 1, NULL, "",
      "with router_bias: after a step the bias of experts with too few tokens grows by this, of those with too many it "
      "shrinks; 0: it stays",
      AT(balance_rate) },
};
const struct option_table llama_options = { "model", llama_rows, sizeof llama_rows / sizeof *llama_rows };

struct llama_config llama_resolved(const struct llama_config *config)
{
    struct llama_config c = *config;
    c.kv_heads = c.kv_heads ? c.kv_heads : c.heads;
    c.head_dim = c.head_dim ? c.head_dim : c.hidden / c.heads;
    if (c.kv_rank)
        c.head_dim = llama_qk_dim(&c) > c.v_dim ? llama_qk_dim(&c) : c.v_dim;
    return c;
}

int64_t llama_qk_dim(const struct llama_config *c)
{
    return c->kv_rank ? c->nope_dim + c->rope_dim : c->head_dim;
}

/* Does a list of numbers with commas between name this one? *other: the first that is none of [0, most). */
static bool in_list(const char *list, int64_t number, int64_t most, char other[16])
{
    bool found = false;
    for (const char *at = list ? list : ""; *at; at += strcspn(at, ","), at += *at == ',') {
        char *end;
        long long n = strtoll(at, &end, 10);
        if (end == at || (*end && *end != ',') || n < 0 || n >= most)
            snprintf(other, 16, "%.*s", (int)strcspn(at, ","), at);
        found = found || n == number;
    }
    return found;
}

bool llama_has_experts(const struct llama_config *c, int64_t layer)
{
    char none[16];
    return c->experts && layer >= c->first_dense && (layer + 1) % c->sparse_step == 0 &&
           !in_list(c->dense_layers, layer, c->layers, none);
}

static status *check_experts(const struct llama_config *c)
{
    char other[16] = "";
    if (c->experts_per_token < 1 || c->experts_per_token > c->experts)
        return ERR(INVALID, "model.experts_per_token: %lld is not one of 1 to model.experts: %lld",
                   (long long)c->experts_per_token, (long long)c->experts);
    if (c->expert_ffn < 1)
        return ERR(INVALID, "model.expert_ffn: %lld is no width of an expert", (long long)c->expert_ffn);
    (void)in_list(c->dense_layers, 0, c->layers, other);
    if (*other)
        return ERR(INVALID, "model.dense_layers: \"%s\" is not one of the layers 0 to %lld", other,
                   (long long)c->layers - 1);
    if (c->experts % c->groups)
        return ERR(INVALID, "model.router_groups: %lld does not divide model.experts: %lld", (long long)c->groups,
                   (long long)c->experts);
    if (c->top_groups > c->groups || c->top_groups * (c->experts / c->groups) < c->experts_per_token)
        return ERR(INVALID,
                   "model.router_top_groups: %lld of %lld groups of %lld experts are too many, or too few to take "
                   "model.experts_per_token: %lld of them",
                   (long long)c->top_groups, (long long)c->groups, (long long)(c->experts / c->groups),
                   (long long)c->experts_per_token);
    if (c->balance_rate > 0 && !c->router_bias)
        return ERR(INVALID, "model.balance_rate: %g needs model.router_bias: true", c->balance_rate);
    return NULL;
}

static status *check_latent(const struct llama_config *given, const struct llama_config *c)
{
    const struct {
        const char *key;
        int64_t value;
    } of_latent[] = { { "q_lora_rank", c->q_rank },
                      { "qk_nope_head_dim", c->nope_dim },
                      { "qk_rope_head_dim", c->rope_dim },
                      { "v_head_dim", c->v_dim } };
    for (int i = 0; i < 4; i++) {
        if (!c->kv_rank && of_latent[i].value)
            return ERR(INVALID, "model.%s: %lld needs model.kv_lora_rank", of_latent[i].key,
                       (long long)of_latent[i].value);
        if (c->kv_rank && i && of_latent[i].value < 1)
            return ERR(INVALID, "model.%s: model.kv_lora_rank needs a size of at least 1", of_latent[i].key);
    }
    if (!c->kv_rank)
        return c->rope_mscale > 0
                   ? ERR(INVALID, "model.rope_mscale_all_dim: %g needs model.kv_lora_rank", c->rope_mscale)
                   : NULL;
    if (c->rope_dim % 2)
        return ERR(INVALID, "model.qk_rope_head_dim: %lld is not even", (long long)c->rope_dim);
    if (c->head_dim > 256)
        return ERR(INVALID, "model.qk_nope_head_dim: heads of %lld elements are larger than 256",
                   (long long)c->head_dim);
    if (c->kv_heads != c->heads)
        return ERR(INVALID, "model.kv_heads: %lld, but with model.kv_lora_rank there are as many as model.heads: %lld",
                   (long long)c->kv_heads, (long long)c->heads);
    if (given->head_dim || c->qk_norm || c->qkv_bias)
        return ERR(INVALID, "model.%s does not go with model.kv_lora_rank",
                   given->head_dim ? "head_dim"
                   : c->qk_norm    ? "qk_norm"
                                   : "qkv_bias");
    return NULL;
}

status *llama_check(const void *config)
{
    const struct llama_config *given = config;
    if (given->heads < 1 || given->layers < 1 || given->hidden < 1 || given->ffn < 1)
        return ERR(INVALID, "model: layers, hidden, heads and ffn must be at least 1");
    struct llama_config c = llama_resolved(given);
    if (c.heads % c.kv_heads)
        return ERR(INVALID, "model.heads: %lld is not a multiple of model.kv_heads: %lld", (long long)c.heads,
                   (long long)c.kv_heads);
    TRY(check_latent(given, &c));
    if (!given->head_dim && !c.kv_rank && c.hidden % c.heads)
        return ERR(INVALID, "model.hidden: %lld is not a multiple of model.heads: %lld; set model.head_dim",
                   (long long)c.hidden, (long long)c.heads);
    if (!c.kv_rank && (c.head_dim < 2 || c.head_dim % 2 || c.head_dim > 256))
        return ERR(INVALID, "model.head_dim: %lld is not an even number from 2 to 256", (long long)c.head_dim);
    if (c.experts)
        TRY(check_experts(&c));
    bool bands = c.rope_scaling == ROPE_LLAMA3 || c.rope_scaling == ROPE_YARN;
    if (bands && c.rope_original < 1)
        return ERR(INVALID, "model.rope_original: rope_scaling %s needs the longest sequence before scaling",
                   c.rope_scaling == ROPE_YARN ? "yarn" : "llama3");
    if (c.rope_scaling == ROPE_LLAMA3 && c.rope_low >= c.rope_high)
        return ERR(INVALID, "model.rope_low: %g is not below model.rope_high: %g", c.rope_low, c.rope_high);
    if (c.rope_scaling == ROPE_YARN && (c.rope_slow >= c.rope_fast || c.rope_theta <= 1))
        return ERR(INVALID, "model.rope_beta_slow: %g is not below model.rope_beta_fast: %g, or rope_theta is 1",
                   c.rope_slow, c.rope_fast);
    return NULL;
}
