/* llama: decoder-only transformers with RMSNorm, rotary embedding, SwiGLU and grouped-query attention. Llama, Qwen2
 * (qkv_bias), Qwen3 (qk_norm), Mistral (sliding_window) and SmolLM2 are configs of it, and with routed experts
 * Qwen3-MoE and DeepSeekMoE; names and shapes are those of their Hugging Face checkpoints, but for the experts'
 * matrices, which are one tensor of three dimensions each.
 *
 *   x = embed[token]
 *   layer:  x += o_proj(attention(rope(norm(q)), rope(norm(k)), v)),  q, k, v = projections of rmsnorm(x)
 *           x += down_proj(silu(gate) * up),                          gate, up = projections of rmsnorm(x)
 *       or  x += op_moe(rmsnorm(x)) + the same of the shared experts, which are one block of all their widths
 *   hidden = rmsnorm(x);  the head (logits = hidden head^T) is op_logprob's business
 *
 * `declare` writes each tensor once; parameters of a layer are kept by index, since the list moves while it grows. */
#include "trainer/model/model.h"

#include "comm/base/mem.h"
#include "trainer/ops/moe.h"
#include "trainer/ops/routes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
};
enum { ROUTER_SOFTMAX, ROUTER_SIGMOID };

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
    { "sliding_window", OPT_INT, "0", 0, 1e9, NULL, "tokens",
      "a token sees itself and those before it, so many in all (sliding_window); 0: all", AT(window) },
    { "window_from", OPT_INT, "0", 0, 1024, NULL, "layers",
      "the layers before this one have no window (max_window_layers)", AT(window_from) },
    { "norm_eps", OPT_FLOAT, "1e-5", 1e-12, 1, NULL, "", "epsilon of RMSNorm (rms_norm_eps)", AT(norm_eps) },
    { "tied", OPT_BOOL, "false", 0, 0, NULL, "", "output matrix is the embedding (tie_word_embeddings)", AT(tied) },
    { "qk_norm", OPT_BOOL, "false", 0, 0, NULL, "", "RMSNorm on each query and key head, as in Qwen3", AT(qk_norm) },
    { "qkv_bias", OPT_BOOL, "false", 0, 0, NULL, "", "biases on q, k, v, as in Qwen2 (attention_bias)", AT(qkv_bias) },
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
static const struct option_table llama_options = { "model", llama_rows, sizeof llama_rows / sizeof *llama_rows };

struct ffn {
    int gate, up, down;
};

/* Parameters by index into params.p; -1 where the config has none. */
struct llama_layer {
    int input_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, o, post_norm;
    struct ffn all, routed; /* what all tokens go through, and what experts are */
    int router, bias;
};

struct llama {
    struct llama_config c; /* zeros replaced by what they stand for; dense_layers is not looked at later */
    struct rope rope;
    struct router how;
    int embed, norm, head;
    struct llama_layer layer[];
};

static struct llama_config resolved(const struct llama_config *config)
{
    struct llama_config c = *config;
    c.kv_heads = c.kv_heads ? c.kv_heads : c.heads;
    c.head_dim = c.head_dim ? c.head_dim : c.hidden / c.heads;
    return c;
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

static bool has_experts(const struct llama_config *c, int64_t layer)
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

static status *llama_check(const void *config)
{
    const struct llama_config *given = config;
    if (given->heads < 1 || given->layers < 1 || given->hidden < 1 || given->ffn < 1)
        return ERR(INVALID, "model: layers, hidden, heads and ffn must be at least 1");
    struct llama_config c = resolved(given);
    if (c.heads % c.kv_heads)
        return ERR(INVALID, "model.heads: %lld is not a multiple of model.kv_heads: %lld", (long long)c.heads,
                   (long long)c.kv_heads);
    if (!given->head_dim && c.hidden % c.heads)
        return ERR(INVALID, "model.hidden: %lld is not a multiple of model.heads: %lld; set model.head_dim",
                   (long long)c.hidden, (long long)c.heads);
    if (c.head_dim < 2 || c.head_dim % 2 || c.head_dim > 256)
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

/* ---- declare ---- */

/* A list being declared: the first failure sticks. */
struct declaring {
    struct params *ps;
    const struct llama_config *c;
    bool failed;
};

/* What tensor parallelism makes of a tensor; "into": its rows are cut, "from": its columns. */
enum cut {
    WHOLE,
    WHOLE_ON_HEADS,
    INTO_HEADS,
    INTO_KV_HEADS,
    FROM_HEADS,
    INTO_FFN,
    FROM_FFN,
    INTO_VOCAB,
    INTO_EXPERT,
    FROM_EXPERT
};

static void set_cut(struct param *p, enum cut cut, const struct llama_config *c)
{
    uint64_t head = (uint64_t)c->head_dim;
    const struct param_cut rules[] = {
        [WHOLE] = { 0 },
        [WHOLE_ON_HEADS] = { 0 },
        [INTO_HEADS] = { head, CUT_EVEN, "model.heads" },
        [INTO_KV_HEADS] = { head, CUT_SHARED, "model.kv_heads" },
        [FROM_HEADS] = { head, CUT_EVEN, "model.heads" },
        [INTO_FFN] = { 1, CUT_EVEN, "model.ffn" },
        [FROM_FFN] = { 1, CUT_EVEN, "model.ffn" },
        [INTO_VOCAB] = { 1, CUT_UNEVEN, "model.vocab" },
        [INTO_EXPERT] = { 1, CUT_EVEN, "model.expert_ffn" },
        [FROM_EXPERT] = { 1, CUT_EVEN, "model.expert_ffn" },
    };
    int dim = p->shape.ndim - 1; /* columns */
    p->rule = rules[cut];
    p->on_heads = cut == WHOLE_ON_HEADS;
    p->linear = p->shape.ndim > 1 && cut != INTO_VOCAB;
    if (cut != WHOLE && cut != WHOLE_ON_HEADS)
        p->cut[cut == FROM_HEADS || cut == FROM_FFN || cut == FROM_EXPERT || !dim ? dim : dim - 1] = MESH_TP;
}

static int add(struct declaring *d, const char *name, int64_t rows, int64_t cols, enum param_init init, double std,
               enum cut cut)
{
    bool matrix = rows > 0;
    struct param *p =
        d->failed ? NULL : params_add(d->ps, name, (uint64_t)rows, (uint64_t)cols, init, (float)std, matrix);
    if (!p) {
        d->failed = true;
        return -1;
    }
    set_cut(p, cut, d->c);
    return d->ps->count - 1;
}

static int add_in_layer(struct declaring *d, int64_t layer, const char *name, int64_t rows, int64_t cols,
                        enum param_init init, double std, enum cut cut)
{
    char full[PARAM_NAME_BYTES];
    snprintf(full, sizeof full, "model.layers.%lld.%s", (long long)layer, name);
    int index = add(d, full, rows, cols, init, std, cut);
    if (index >= 0)
        d->ps->p[index].block = (int)layer;
    return index;
}

/* Of `count` experts one behind the other. */
static int add_experts(struct declaring *d, int64_t layer, const char *name, int64_t rows, int64_t cols, double std,
                       enum cut cut)
{
    struct shape shape = { 3, { (uint64_t)d->c->experts, (uint64_t)rows, (uint64_t)cols } };
    char full[PARAM_NAME_BYTES];
    snprintf(full, sizeof full, "model.layers.%lld.mlp.experts.%s.weight", (long long)layer, name);
    struct param *p = d->failed ? NULL : params_add_shape(d->ps, full, &shape, INIT_NORMAL, (float)std, true);
    if (!p) {
        d->failed = true;
        return -1;
    }
    set_cut(p, cut, d->c);
    p->block = (int)layer;
    p->experts = true;
    return d->ps->count - 1;
}

static void declare_ffn(struct declaring *d, int64_t i, const char *folder, int64_t width, enum cut into, enum cut from,
                        double out_std, struct ffn *f)
{
    char name[40];
    int64_t hidden = d->c->hidden;
    double std = d->c->init_std;
    snprintf(name, sizeof name, "mlp.%sgate_proj.weight", folder);
    f->gate = add_in_layer(d, i, name, width, hidden, INIT_NORMAL, std, into);
    snprintf(name, sizeof name, "mlp.%sup_proj.weight", folder);
    f->up = add_in_layer(d, i, name, width, hidden, INIT_NORMAL, std, into);
    snprintf(name, sizeof name, "mlp.%sdown_proj.weight", folder);
    f->down = add_in_layer(d, i, name, hidden, width, INIT_NORMAL, out_std, from);
}

static void declare_experts(struct declaring *d, const struct llama_config *c, int64_t i, double out_std,
                            struct llama_layer *l)
{
    l->router = add_in_layer(d, i, "mlp.gate.weight", c->experts, c->hidden, INIT_NORMAL, c->init_std, WHOLE_ON_HEADS);
    if (!d->failed)
        d->ps->p[l->router].linear = false;
    if (c->router_bias)
        l->bias = add_in_layer(d, i, "mlp.gate.e_score_correction_bias", 0, c->experts, INIT_ZERO, 0, WHOLE);
    if (!d->failed && c->router_bias)
        d->ps->p[l->bias].frozen = d->ps->p[l->bias].buffer = true;
    l->routed.gate = add_experts(d, i, "gate_proj", c->expert_ffn, c->hidden, c->init_std, INTO_EXPERT);
    l->routed.up = add_experts(d, i, "up_proj", c->expert_ffn, c->hidden, c->init_std, INTO_EXPERT);
    l->routed.down = add_experts(d, i, "down_proj", c->hidden, c->expert_ffn, out_std, FROM_EXPERT);
    if (c->shared_experts)
        declare_ffn(d, i, "shared_experts.", c->shared_experts * c->expert_ffn, INTO_EXPERT, FROM_EXPERT, out_std,
                    &l->all);
}

/* Projections back into the residual stream start smaller, by the number of additions to it (Radford et al. 2019,
 * GPT-2, section 2.3). */
static void declare_layer(struct declaring *d, const struct llama_config *c, int64_t i, struct llama_layer *l)
{
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    double std = c->init_std, out_std = std / sqrt(2.0 * (double)c->layers);
    bool bias = c->qkv_bias, norm = c->qk_norm;
    l->input_norm = add_in_layer(d, i, "input_layernorm.weight", 0, c->hidden, INIT_ONE, 0, WHOLE);
    l->q = add_in_layer(d, i, "self_attn.q_proj.weight", q, c->hidden, INIT_NORMAL, std, INTO_HEADS);
    l->k = add_in_layer(d, i, "self_attn.k_proj.weight", kv, c->hidden, INIT_NORMAL, std, INTO_KV_HEADS);
    l->v = add_in_layer(d, i, "self_attn.v_proj.weight", kv, c->hidden, INIT_NORMAL, std, INTO_KV_HEADS);
    l->q_bias = bias ? add_in_layer(d, i, "self_attn.q_proj.bias", 0, q, INIT_ZERO, 0, INTO_HEADS) : -1;
    l->k_bias = bias ? add_in_layer(d, i, "self_attn.k_proj.bias", 0, kv, INIT_ZERO, 0, INTO_KV_HEADS) : -1;
    l->v_bias = bias ? add_in_layer(d, i, "self_attn.v_proj.bias", 0, kv, INIT_ZERO, 0, INTO_KV_HEADS) : -1;
    l->q_norm = norm ? add_in_layer(d, i, "self_attn.q_norm.weight", 0, c->head_dim, INIT_ONE, 0, WHOLE_ON_HEADS) : -1;
    l->k_norm = norm ? add_in_layer(d, i, "self_attn.k_norm.weight", 0, c->head_dim, INIT_ONE, 0, WHOLE_ON_HEADS) : -1;
    l->o = add_in_layer(d, i, "self_attn.o_proj.weight", c->hidden, q, INIT_NORMAL, out_std, FROM_HEADS);
    l->post_norm = add_in_layer(d, i, "post_attention_layernorm.weight", 0, c->hidden, INIT_ONE, 0, WHOLE);
    l->all = l->routed = (struct ffn){ -1, -1, -1 };
    l->router = l->bias = -1;
    if (has_experts(c, i))
        declare_experts(d, c, i, out_std, l);
    else
        declare_ffn(d, i, "", c->ffn, INTO_FFN, FROM_FFN, out_std, &l->all);
}

static struct rope rope_of(const struct llama_config *c)
{
    return (struct rope){ .theta = (double)(float)c->rope_theta,
                          .scaling = (enum rope_scaling)c->rope_scaling,
                          .factor = c->rope_factor,
                          .original = c->rope_original,
                          .low = c->rope_low,
                          .high = c->rope_high,
                          .beta_fast = c->rope_fast,
                          .beta_slow = c->rope_slow,
                          .amplitude = c->rope_amplitude };
}

static struct router router_of(const struct llama_config *c)
{
    return (struct router){ .experts = c->experts,
                            .top = c->experts_per_token,
                            .groups = c->groups,
                            .top_groups = c->top_groups,
                            .sigmoid = c->router == ROUTER_SIGMOID,
                            .normalise = c->router_norm,
                            .scale = (float)c->router_scale };
}

static status *llama_declare(struct model *m)
{
    struct llama_config c = resolved(m->config);
    if (!c.vocab)
        c.vocab = m->vocab;
    if (c.vocab < m->vocab || c.vocab < 1)
        return ERR(INVALID, "model.vocab: %lld is smaller than the tokenizer's %lld", (long long)c.vocab,
                   (long long)m->vocab);
    struct llama *l = mem_calloc(1, sizeof *l + (size_t)c.layers * sizeof *l->layer);
    if (!l)
        return ERR(NO_MEMORY, "a model of %lld layers", (long long)c.layers);
    m->impl = l;
    m->vocab = c.vocab;
    m->width = c.hidden;
    l->c = c;
    l->rope = rope_of(&c);
    l->how = router_of(&c);
    struct declaring d = { &m->params, &c, false };
    l->embed = add(&d, "model.embed_tokens.weight", c.vocab, c.hidden, INIT_NORMAL, c.init_std, INTO_VOCAB);
    for (int64_t i = 0; i < c.layers; i++) {
        d.ps->unit++;
        declare_layer(&d, &c, i, &l->layer[i]);
        m->moe.layers += l->layer[i].router >= 0;
    }
    if (m->moe.layers) {
        m->moe.experts = c.experts;
        m->moe.balance = c.balance_loss;
        m->moe.rate = c.balance_rate;
    }
    d.ps->unit++;
    l->norm = add(&d, "model.norm.weight", 0, c.hidden, INIT_ONE, 0, WHOLE);
    if (!c.tied)
        l->head = add(&d, "lm_head.weight", c.vocab, c.hidden, INIT_NORMAL, c.init_std, INTO_VOCAB);
    else if (!d.failed && params_alias(d.ps, "lm_head.weight", &d.ps->p[l->embed]))
        l->head = d.ps->count - 1;
    else
        d.failed = true;
    return d.failed ? ERR(NO_MEMORY, "the parameter list of %lld layers", (long long)c.layers) : NULL;
}

/* ---- forward ---- */

struct pass {
    struct model *m;
    struct tape *t;
    const struct llama *l;
    const struct model_input *in;
};

static struct tensor *param(const struct pass *p, int index)
{
    return index < 0 ? NULL : &p->m->params.p[index].value;
}

/* A projection of x seen as heads, as many as are here: [N, heads, D]. */
static struct tensor *heads(const struct pass *p, struct tensor *x, int w, int b)
{
    int64_t here = param(p, w)->dim[0] / p->l->c.head_dim;
    return op_view(p->t, model_linear(p->m, p->t, x, w, b), 3, (int64_t[]){ p->in->tokens, here, p->l->c.head_dim });
}

/* Queries and keys: normalised if the model does so, then turned. */
static struct tensor *turned(const struct pass *p, struct tensor *x, int norm)
{
    if (norm >= 0)
        x = op_rmsnorm(p->t, x, param(p, norm), (float)p->l->c.norm_eps);
    return op_rope(p->t, x, p->in->seg.position, &p->l->rope);
}

static struct tensor *attention_block(struct tape *t, const void *arg, int64_t i, struct tensor *x)
{
    const struct pass *p = arg;
    (void)t;
    const struct llama_config *c = &p->l->c;
    const struct llama_layer *l = &p->l->layer[i];
    struct tensor *h = op_rmsnorm(p->t, x, param(p, l->input_norm), (float)c->norm_eps);
    struct tensor *q = turned(p, heads(p, h, l->q, l->q_bias), l->q_norm);
    struct tensor *k = turned(p, heads(p, h, l->k, l->k_bias), l->k_norm);
    struct tensor *v = heads(p, h, l->v, l->v_bias);
    int64_t window = i >= c->window_from ? c->window : 0;
    struct tensor *o = op_attention(p->t, q, k, v, &p->in->seg, window, p->in->cache ? &p->in->cache[i] : NULL);
    o = op_view(p->t, o, 2, (int64_t[]){ p->in->tokens, param(p, l->o)->dim[1] });
    return op_add(p->t, x, model_linear(p->m, p->t, o, l->o, -1));
}

static struct tensor *ffn(const struct pass *p, struct tensor *h, const struct ffn *f)
{
    struct tensor *gate = model_linear(p->m, p->t, h, f->gate, -1), *up = model_linear(p->m, p->t, h, f->up, -1);
    return model_linear(p->m, p->t, op_swiglu(p->t, gate, up), f->down, -1);
}

static struct tensor *routed(const struct pass *p, struct tensor *h, int64_t i)
{
    const struct llama_layer *l = &p->l->layer[i];
    const struct expert_weights w = { param(p, l->router),
                                      param(p, l->bias),
                                      param(p, l->routed.gate),
                                      param(p, l->routed.up),
                                      param(p, l->routed.down),
                                      { model_adapter(p->m, l->routed.gate), model_adapter(p->m, l->routed.up),
                                        model_adapter(p->m, l->routed.down) } };
    const struct expert_load *load = p->in->tokens ? p->m->load : NULL;
    struct route_watch watch = { .padding = p->in->padding };
    if (load) {
        int64_t slot = p->in->micro_batch * load->layers + i;
        watch.count = load->count + slot * load->experts;
        watch.balance = load->balance + slot;
        watch.balance_weight = load->balance_weight;
    }
    if (p->m->routes && p->t->mode != TAPE_DRY && !p->in->cache) {
        watch.routes = p->m->routes;
        watch.key = routes_key(p->m->routes, 2 * p->m->role + p->m->adapters_off, i, p->in->content);
    }
    return op_moe(p->t, h, &w, &p->l->how, &watch);
}

static struct tensor *ffn_block(const struct pass *p, struct tensor *x, int64_t i)
{
    const struct llama_layer *l = &p->l->layer[i];
    struct tensor *h = op_rmsnorm(p->t, x, param(p, l->post_norm), (float)p->l->c.norm_eps);
    if (l->router >= 0)
        x = op_add(p->t, x, routed(p, h, i));
    return l->all.gate >= 0 ? op_add(p->t, x, ffn(p, h, &l->all)) : x;
}

static struct tensor *layer(struct tape *t, const void *arg, int64_t i, struct tensor *x)
{
    const struct pass *p = arg;
    return ffn_block(p, op_block_attention(t, attention_block, p, sizeof *p, i, x), i);
}

/* Whether this pass runs a unit. */
static bool has(const struct pass *p, int64_t unit)
{
    return params_hold(&p->m->params, p->in->chunk, unit);
}

static struct tensor *llama_forward(struct model *m, struct tape *t, const struct model_input *in)
{
    const struct llama *l = m->impl;
    struct pass p = { m, t, l, in };
    struct tensor *x = in->x;
    for (int64_t i = 0; t->mode != TAPE_DRY && i < in->tokens; i++)
        if (in->seg.position[i] < 0 || in->seg.position[i] >= l->c.max_positions)
            return tape_fail(t, ERR(INVALID, "token %lld is at position %d, model.max_positions is %lld", (long long)i,
                                    in->seg.position[i], (long long)l->c.max_positions));
    if (has(&p, 0))
        x = op_embedding(t, param(&p, l->embed), in->token, in->tokens);
    op_segments(t, &in->seg, in->tokens);
    op_rope_angles(t, in->seg.position, in->tokens, l->c.head_dim, &l->rope);
    for (int64_t i = 0; i < l->c.layers; i++)
        if (has(&p, i + 1))
            x = op_block(t, layer, &p, sizeof p, i, x);
    return has(&p, l->c.layers + 1) ? op_rmsnorm(t, x, param(&p, l->norm), (float)l->c.norm_eps) : x;
}

static struct tensor *llama_head(struct model *m)
{
    return &m->params.p[((const struct llama *)m->impl)->head].value;
}

static double llama_flops(const struct model *m, double mean_context)
{
    const struct llama_config *c = &((const struct llama *)m->impl)->c;
    double q = (double)(c->heads * c->head_dim), kv = (double)(c->kv_heads * c->head_dim), hidden = (double)c->hidden;
    double taken = (double)(c->experts_per_token + c->shared_experts) * (double)c->expert_ffn,
           sparse = (double)m->moe.layers, blocks = 0, context = 0;
    blocks += sparse * hidden * (3 * taken + (double)c->experts);
    blocks += ((double)c->layers - sparse) * 3 * hidden * (double)c->ffn;
    for (int64_t i = 0; i < c->layers; i++)
        context += c->window && i >= c->window_from ? fmin(mean_context, (double)c->window) : mean_context;
    blocks += (double)c->layers * hidden * (2 * q + 2 * kv);
    return 2 * (blocks + 2 * q * context + hidden * (double)c->vocab);
}

static struct kv_shape llama_kv_shape(const struct model *m)
{
    const struct llama *l = m->impl;
    int64_t rows = 0; /* of k_proj, in any layer that is here */
    for (int64_t i = 0; i < l->c.layers && !rows; i++)
        rows = m->params.p[l->layer[i].k].value.dim[0];
    return (struct kv_shape){ (int32_t)l->c.layers, (int32_t)(rows / l->c.head_dim), (int32_t)l->c.head_dim,
                              l->c.max_positions };
}

static int llama_layers(const struct model *m)
{
    return (int)((const struct llama *)m->impl)->c.layers;
}

static void llama_close(struct model *m)
{
    mem_free(m->impl);
}

const struct model_ops model_llama_ops = {
    .name = "llama",
    .options = &llama_options,
    .config_bytes = sizeof(struct llama_config),
    .check = llama_check,
    .declare = llama_declare,
    .forward = llama_forward,
    .head = llama_head,
    .flops_per_token = llama_flops,
    .kv_shape = llama_kv_shape,
    .layers = llama_layers,
    .close = llama_close,
};
