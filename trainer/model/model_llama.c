/* llama: decoder-only transformers with RMSNorm, rotary embedding, SwiGLU and grouped-query attention. Llama, Qwen2
 * (qkv_bias), Qwen3 (qk_norm), Mistral (sliding_window) and SmolLM2 are configs of it, and with routed experts
 * Qwen3-MoE and DeepSeekMoE, with latent attention DeepSeek-V2 and V3; names and shapes are those of their Hugging Face
 * checkpoints, but for the experts' matrices, which are one tensor of three dimensions each.
 *
 *   x = embed[token]
 *   layer:  x += o_proj(attention(rope(norm(q)), rope(norm(k)), v)),  q, k, v = projections of rmsnorm(x)
 *           x += down_proj(silu(gate) * up),                          gate, up = projections of rmsnorm(x)
 *       or  x += op_moe(rmsnorm(x)) + the same of the shared experts, which are one block of all their widths
 *   with latent attention (kv_lora_rank; arXiv:2405.04434, 2.1), for each head
 *           q = (a, rope(b)),  (a, b) of q_b_proj(rmsnorm(q_a_proj(x))), or of q_proj(x)
 *           k = (c, rope(r)), v,  (c, v) of kv_b_proj(rmsnorm(l)),  (l, r) = kv_a_proj_with_mqa(x): r is of all heads
 *   hidden = rmsnorm(x);  the head (logits = hidden head^T) is op_logprob's business
 *
 * `declare` writes each tensor once; parameters of a layer are kept by index, since the list moves while it grows. */
#include "trainer/model/model.h"

#include "comm/base/mem.h"
#include "trainer/model/llama_config.h"
#include "trainer/ops/moe.h"
#include "trainer/ops/routes.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ffn {
    int gate, up, down;
};

/* Parameters by index into params.p; -1 where the config has none. */
struct llama_layer {
    int input_norm, q, k, v, q_bias, k_bias, v_bias, q_norm, k_norm, o, post_norm;
    int q_a, q_a_norm, kv_a, kv_a_norm, kv_b; /* of latent attention, where q is q_b_proj if there is q_a */
    struct ffn all, routed;                   /* what all tokens go through, and what experts are */
    int router, bias;
};

struct llama {
    struct llama_config c; /* zeros replaced by what they stand for; dense_layers is not looked at later */
    struct rope rope;
    float score_scale; /* of latent attention: what queries are multiplied by */
    struct router how;
    int embed, norm, head;
    struct llama_layer layer[];
};

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

/* One whose heads have another size than the model's. */
static int add_heads(struct declaring *d, int64_t layer, const char *name, int64_t rows, int64_t cols, double std,
                     enum cut cut, int64_t head)
{
    int index = add_in_layer(d, layer, name, rows, cols, INIT_NORMAL, std, cut);
    if (index >= 0)
        d->ps->p[index].rule.unit = (uint64_t)head;
    return index;
}

/* Latents and the key that all heads have are the same on all tensor-parallel ranks; what is made of them is cut. */
static void declare_latent(struct declaring *d, const struct llama_config *c, int64_t i, double out_std,
                           struct llama_layer *l)
{
    int64_t qk = llama_qk_dim(c), kv = c->nope_dim + c->v_dim;
    double std = c->init_std;
    if (c->q_rank) {
        l->q_a = add_in_layer(d, i, "self_attn.q_a_proj.weight", c->q_rank, c->hidden, INIT_NORMAL, std, WHOLE);
        l->q_a_norm = add_in_layer(d, i, "self_attn.q_a_layernorm.weight", 0, c->q_rank, INIT_ONE, 0, WHOLE);
    }
    l->q = add_heads(d, i, c->q_rank ? "self_attn.q_b_proj.weight" : "self_attn.q_proj.weight", c->heads * qk,
                     c->q_rank ? c->q_rank : c->hidden, std, INTO_HEADS, qk);
    l->kv_a = add_in_layer(d, i, "self_attn.kv_a_proj_with_mqa.weight", c->kv_rank + c->rope_dim, c->hidden,
                           INIT_NORMAL, std, WHOLE);
    l->kv_a_norm = add_in_layer(d, i, "self_attn.kv_a_layernorm.weight", 0, c->kv_rank, INIT_ONE, 0, WHOLE);
    l->kv_b = add_heads(d, i, "self_attn.kv_b_proj.weight", c->heads * kv, c->kv_rank, std, INTO_HEADS, kv);
    l->o = add_heads(d, i, "self_attn.o_proj.weight", c->hidden, c->heads * c->v_dim, out_std, FROM_HEADS, c->v_dim);
}

static void declare_heads(struct declaring *d, const struct llama_config *c, int64_t i, double out_std,
                          struct llama_layer *l)
{
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    double std = c->init_std;
    bool bias = c->qkv_bias, norm = c->qk_norm;
    l->q = add_in_layer(d, i, "self_attn.q_proj.weight", q, c->hidden, INIT_NORMAL, std, INTO_HEADS);
    l->k = add_in_layer(d, i, "self_attn.k_proj.weight", kv, c->hidden, INIT_NORMAL, std, INTO_KV_HEADS);
    l->v = add_in_layer(d, i, "self_attn.v_proj.weight", kv, c->hidden, INIT_NORMAL, std, INTO_KV_HEADS);
    l->q_bias = bias ? add_in_layer(d, i, "self_attn.q_proj.bias", 0, q, INIT_ZERO, 0, INTO_HEADS) : -1;
    l->k_bias = bias ? add_in_layer(d, i, "self_attn.k_proj.bias", 0, kv, INIT_ZERO, 0, INTO_KV_HEADS) : -1;
    l->v_bias = bias ? add_in_layer(d, i, "self_attn.v_proj.bias", 0, kv, INIT_ZERO, 0, INTO_KV_HEADS) : -1;
    l->q_norm = norm ? add_in_layer(d, i, "self_attn.q_norm.weight", 0, c->head_dim, INIT_ONE, 0, WHOLE_ON_HEADS) : -1;
    l->k_norm = norm ? add_in_layer(d, i, "self_attn.k_norm.weight", 0, c->head_dim, INIT_ONE, 0, WHOLE_ON_HEADS) : -1;
    l->o = add_in_layer(d, i, "self_attn.o_proj.weight", c->hidden, q, INIT_NORMAL, out_std, FROM_HEADS);
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
    double out_std = c->init_std / sqrt(2.0 * (double)c->layers);
    memset(l, -1, sizeof *l); /* every index */
    l->input_norm = add_in_layer(d, i, "input_layernorm.weight", 0, c->hidden, INIT_ONE, 0, WHOLE);
    if (c->kv_rank)
        declare_latent(d, c, i, out_std, l);
    else
        declare_heads(d, c, i, out_std, l);
    l->post_norm = add_in_layer(d, i, "post_attention_layernorm.weight", 0, c->hidden, INIT_ONE, 0, WHOLE);
    if (llama_has_experts(c, i))
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

/* What makes of attention's 1 / sqrt(head_dim) the root of the true size, times the square of yarn's factor (as in
 * transformers' models of DeepSeek-V2 and V3). */
static float score_scale_of(const struct llama_config *c)
{
    double m = c->rope_scaling != ROPE_NONE && c->rope_mscale > 0 && c->rope_factor > 1
                   ? 0.1 * c->rope_mscale * log(c->rope_factor) + 1
                   : 1;
    return (float)(m * m * sqrt((double)c->head_dim / (double)llama_qk_dim(c)));
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
    struct llama_config c = llama_resolved(m->config);
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
    l->score_scale = score_scale_of(&c);
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

/* Attention's inputs, [N, heads, D] each, of as many heads as are here. */
struct attended {
    struct tensor *q, *k, *v;
};

static struct attended plain_heads(const struct pass *p, const struct llama_layer *l, struct tensor *h)
{
    struct tensor *q = turned(p, heads(p, h, l->q, l->q_bias), l->q_norm);
    struct tensor *k = turned(p, heads(p, h, l->k, l->k_bias), l->k_norm);
    return (struct attended){ q, k, heads(p, h, l->v, l->v_bias) };
}

/* rope of the columns from `first` on of `count` heads. Weights have the two halves of what turns in turn (0, D/2, 1,
 * D/2 + 1, ...); scores do not see an order that queries and keys share, so they are parted here. */
static struct tensor *turned_part(const struct pass *p, struct tensor *x, int64_t count, int64_t first)
{
    int64_t half = p->l->c.rope_dim / 2;
    const struct join_part parts[] = { { x, first, 2, half }, { x, first + 1, 2, half } };
    return op_rope(p->t, op_join(p->t, count, parts, 2), p->in->seg.position, &p->l->rope);
}

/* Columns [first, first + count) of x [N, K]. */
static struct tensor *columns(const struct pass *p, struct tensor *x, int64_t first, int64_t count)
{
    return op_view(p->t, op_join(p->t, 1, &(struct join_part){ x, first, 1, count }, 1), 2, (int64_t[]){ -1, count });
}

/* Queries and keys, or values, are padded with zeros to one size, which changes scores by nothing but the root that
 * attention divides them by. */
static struct attended latent_heads(const struct pass *p, const struct llama_layer *l, struct tensor *h)
{
    const struct llama_config *c = &p->l->c;
    struct tape *t = p->t;
    int64_t n = p->in->tokens, nope = c->nope_dim, rope = c->rope_dim, qk = nope + rope, value = c->v_dim,
            here = param(p, l->q)->dim[0] / qk, pad_qk = c->head_dim - qk, pad_v = c->head_dim - value;
    struct tensor *latent = h;
    if (l->q_a >= 0)
        latent = op_rmsnorm(t, model_linear(p->m, t, h, l->q_a, -1), param(p, l->q_a_norm), (float)c->norm_eps);
    struct tensor *q = op_view(t, model_linear(p->m, t, latent, l->q, -1), 3, (int64_t[]){ n, here, qk });
    struct tensor *turn = turned_part(p, q, here, nope);
    q = op_join(t, here, (struct join_part[]){ { q, 0, 1, nope }, { turn, 0, 1, rope }, { NULL, 0, 0, pad_qk } },
                pad_qk ? 3 : 2);
    if (p->l->score_scale > 1 || p->l->score_scale < 1)
        q = op_scale(t, q, p->l->score_scale);
    struct tensor *both = model_linear(p->m, t, h, l->kv_a, -1);
    latent = op_rmsnorm(t, columns(p, both, 0, c->kv_rank), param(p, l->kv_a_norm), (float)c->norm_eps);
    struct tensor *kv = op_view(t, model_linear(p->m, t, latent, l->kv_b, -1), 3, (int64_t[]){ n, here, nope + value });
    turn = turned_part(p, op_enter(t, columns(p, both, c->kv_rank, rope), param(p, l->kv_b)), 1, 0);
    struct tensor *k =
        op_join(t, here, (struct join_part[]){ { kv, 0, 1, nope }, { turn, 0, 1, rope }, { NULL, 0, 0, pad_qk } },
                pad_qk ? 3 : 2);
    struct tensor *v =
        op_join(t, here, (struct join_part[]){ { kv, nope, 1, value }, { NULL, 0, 0, pad_v } }, pad_v ? 2 : 1);
    return (struct attended){ q, k, v };
}

static struct tensor *attention_block(struct tape *t, const void *arg, int64_t i, struct tensor *x)
{
    const struct pass *p = arg;
    (void)t;
    const struct llama_config *c = &p->l->c;
    const struct llama_layer *l = &p->l->layer[i];
    struct tensor *h = op_rmsnorm(p->t, x, param(p, l->input_norm), (float)c->norm_eps);
    struct attended a = c->kv_rank ? latent_heads(p, l, h) : plain_heads(p, l, h);
    int64_t window = i >= c->window_from ? c->window : 0;
    struct tensor *o = op_attention(p->t, a.q, a.k, a.v, &p->in->seg, window, p->in->cache ? &p->in->cache[i] : NULL);
    if (c->kv_rank && c->v_dim < c->head_dim)
        o = op_join(p->t, param(p, l->o)->dim[1] / c->v_dim, &(struct join_part){ o, 0, 1, c->v_dim }, 1);
    o = op_view(p->t, o, 2, (int64_t[]){ p->in->tokens, param(p, l->o)->dim[1] });
    return model_linear_add(p->m, p->t, x, o, l->o, -1);
}

/* x + the ffn of h. */
static struct tensor *ffn(const struct pass *p, struct tensor *x, struct tensor *h, const struct ffn *f)
{
    struct tensor *gate = model_linear(p->m, p->t, h, f->gate, -1), *up = model_linear(p->m, p->t, h, f->up, -1);
    return model_linear_add(p->m, p->t, x, op_swiglu(p->t, gate, up), f->down, -1);
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
    return l->all.gate >= 0 ? ffn(p, x, h, &l->all) : x;
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
    op_rope_angles(t, in->seg.position, in->tokens, l->c.kv_rank ? l->c.rope_dim : l->c.head_dim, &l->rope);
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
    double q = (double)(c->heads * llama_qk_dim(c)), hidden = (double)c->hidden,
           v = (double)(c->heads * (c->kv_rank ? c->v_dim : c->head_dim)), projections;
    if (c->kv_rank)
        projections = (c->q_rank ? (double)c->q_rank * (hidden + q) : hidden * q) +
                      hidden * (double)(c->kv_rank + c->rope_dim) +
                      (double)(c->kv_rank * c->heads * (c->nope_dim + c->v_dim)) + v * hidden;
    else
        projections = hidden * (2 * q + 2 * (double)(c->kv_heads * c->head_dim));
    double taken = (double)(c->experts_per_token + c->shared_experts) * (double)c->expert_ffn,
           sparse = (double)m->moe.layers, blocks = 0, context = 0;
    blocks += sparse * hidden * (3 * taken + (double)c->experts);
    blocks += ((double)c->layers - sparse) * 3 * hidden * (double)c->ffn;
    for (int64_t i = 0; i < c->layers; i++)
        context += c->window && i >= c->window_from ? fmin(mean_context, (double)c->window) : mean_context;
    blocks += (double)c->layers * projections;
    return 2 * (blocks + (q + v) * context + hidden * (double)c->vocab);
}

static struct kv_shape llama_kv_shape(const struct model *m)
{
    const struct llama *l = m->impl;
    int64_t rows = 0, each = l->c.kv_rank ? l->c.nope_dim + l->c.v_dim : l->c.head_dim; /* in any layer that is here */
    for (int64_t i = 0; i < l->c.layers && !rows; i++)
        rows = m->params.p[l->c.kv_rank ? l->layer[i].kv_b : l->layer[i].k].value.dim[0];
    return (struct kv_shape){ (int32_t)l->c.layers, (int32_t)(rows / each), (int32_t)l->c.head_dim,
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
