/* model_llama against a plain double-precision transformer written here from the papers' formulas: log-probabilities,
 * and gradients of every tensor by differences of that transformer. Then packing, threads, decoding, names, initial
 * values, and what is refused. */
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/test_root.h"
#include "trainer/model/model.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_TOKENS = 160, VOCAB = 37 };

/* Options as text, so that the rows are tested too; values are also kept as numbers for the plain transformer. */
struct variant {
    const char *name;
    int layers, hidden, heads, kv_heads, head_dim, ffn; /* kv_heads and head_dim as resolved */
    bool tied, qk_norm, qkv_bias;
    const char *extra; /* "key=value,key=value" */
    int window, window_from;
    double stretch; /* of positions; 0: 1 */
    int latent[5];  /* q_lora_rank, kv_lora_rank, sizes of unturned and turned parts, of values; 0: it is not */
    double sharp;   /* with it, what scores are multiplied by */
};
enum { Q_RANK, KV_RANK, NOPE, ROPE, VALUE };

static const struct variant variants[] = {
    { "untied", 2, 24, 4, 4, 6, 40, false, false, false, "", 0, 0, 0, { 0 }, 0 },
    { "tied, grouped", 2, 24, 4, 2, 6, 33, true, false, false, "kv_heads=2,tied=true", 0, 0, 0, { 0 }, 0 },
    { "qwen2", 1, 20, 2, 1, 10, 24, true, false, true, "kv_heads=1,tied=true,qkv_bias=true", 0, 0, 0, { 0 }, 0 },
    { "qwen3", 2, 18, 3, 1, 8, 24, false, true, false, "kv_heads=1,head_dim=8,qk_norm=true", 0, 0, 0, { 0 }, 0 },
    { "all",
      1,
      16,
      4,
      2,
      8,
      20,
      true,
      true,
      true,
      "kv_heads=2,head_dim=8,qk_norm=true,qkv_bias=true,tied=true",
      0,
      0,
      0,
      { 0 },
      0 },
    { "in a window, but for its first layer",
      2,
      16,
      2,
      1,
      8,
      20,
      true,
      false,
      false,
      "kv_heads=1,tied=true,sliding_window=3,window_from=1",
      3,
      1,
      0,
      { 0 },
      0 },
    { "in a window, stretched",
      2,
      16,
      2,
      2,
      8,
      20,
      false,
      false,
      false,
      "sliding_window=5,rope_scaling=linear,rope_factor=4",
      5,
      0,
      4,
      { 0 },
      0 },
    { "latent",
      2,
      20,
      3,
      3,
      10,
      24,
      true,
      false,
      false,
      "tied=true,kv_lora_rank=8,q_lora_rank=7,qk_nope_head_dim=4,qk_rope_head_dim=6,v_head_dim=5",
      0,
      0,
      0,
      { 7, 8, 4, 6, 5 },
      1 },
    { "latent, of larger values, stretched",
      1,
      18,
      2,
      2,
      9,
      20,
      false,
      false,
      false,
      "kv_lora_rank=6,qk_nope_head_dim=3,qk_rope_head_dim=2,v_head_dim=9,rope_scaling=linear,rope_factor=4,"
      "rope_mscale_all_dim=2,sliding_window=6",
      6,
      0,
      4,
      { 0, 6, 3, 2, 9 },
      1.6313902 },
};
enum { VARIANTS = sizeof variants / sizeof *variants };

static const struct model_ops *llama(void)
{
    const struct model_ops *ops = NULL;
    assert_null(model_lookup("llama", &ops));
    return ops;
}

static void set(void *config, const char *key, const char *value)
{
    status *st = options_set(llama()->options, key, value, config, "test");
    if (st)
        fail_msg("%s", status_message(st));
}

static void set_int(void *config, const char *key, int value)
{
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    set(config, key, text);
}

static void set_all(void *config, const struct variant *v)
{
    char text[256];
    assert_null(options_defaults(llama()->options, config));
    set_int(config, "layers", v->layers);
    set_int(config, "hidden", v->hidden);
    set_int(config, "heads", v->heads);
    set_int(config, "ffn", v->ffn);
    set(config, "rope_theta", "100");
    set(config, "norm_eps", "1e-3");
    snprintf(text, sizeof text, "%s", v->extra);
    for (char *save = NULL, *pair = strtok_r(text, ",", &save); pair; pair = strtok_r(NULL, ",", &save)) {
        char *equal = strchr(pair, '=');
        *equal = 0;
        set(config, pair, equal + 1);
    }
}

static struct model *open_variant(const struct variant *v, bool with_grad)
{
    struct model *m;
    void *config = mem_calloc(1, llama()->config_bytes);
    set_all(config, v);
    assert_null(model_open(llama(), config, VOCAB, &m));
    options_fini(llama()->options, config);
    mem_free(config);
    assert_null(params_alloc(&m->params, with_grad));
    assert_null(params_init(&m->params, 42));
    return m;
}

/* Larger and irregular weights, so that no term of a gradient is lost in small numbers. */
static void stir(struct model *m)
{
    for (int i = 0; i < m->params.count; i++) {
        struct param *p = &m->params.p[i];
        float *x = p->value.data, z;
        for (int64_t e = 0; p->alias < 0 && e < tensor_elems(&p->value); e++) {
            rng_normals((struct rng_at){ .seed = 9, .sample = (uint32_t)i, .stream = RNG_DATA }, (uint64_t)e, 1, &z);
            x[e] = p->init == INIT_NORMAL ? 0.3f * z : p->init == INIT_ONE ? 1 + 0.3f * z : 0.5f * z;
        }
    }
}

/* ---- the plain transformer ---- */

struct plain {
    const struct variant *v;
    struct model *m;
    int changed; /* parameter with one element moved, as finite differences want; -1: none */
    int64_t element;
    double by;
};

static int index_of(const struct plain *p, const char *name)
{
    const struct param *found = params_find(&p->m->params, name);
    assert_non_null(found);
    return found->alias >= 0 ? found->alias : (int)(found - p->m->params.p);
}

static double at(const struct plain *p, int param, int64_t e)
{
    return (double)((float *)p->m->params.p[param].value.data)[e] +
           (param == p->changed && e == p->element ? p->by : 0);
}

static int layer_param(const struct plain *p, int layer, const char *name)
{
    char full[PARAM_NAME_BYTES];
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
    return index_of(p, full);
}

static void plain_norm(const struct plain *p, double *y, const double *x, int n, int weight)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += x[i] * x[i];
    double r = 1 / sqrt(sum / n + (double)1e-3f);
    for (int i = 0; i < n; i++)
        y[i] = x[i] * r * at(p, weight, i);
}

static void plain_linear(const struct plain *p, double *y, const double *x, int rows, int cols, int weight, int bias)
{
    for (int i = 0; i < rows; i++) {
        y[i] = bias < 0 ? 0 : at(p, bias, i);
        for (int j = 0; j < cols; j++)
            y[i] += at(p, weight, (int64_t)i * cols + j) * x[j];
    }
}

static void plain_rope(double *x, int d, double position)
{
    for (int i = 0; i < d / 2; i++) {
        double a = position * pow(100.0, -2.0 * i / d), u = x[i], w = x[i + d / 2];
        x[i] = u * cos(a) - w * sin(a);
        x[i + d / 2] = w * cos(a) + u * sin(a);
    }
}

/* q, k or v of one token, all heads. */
static void plain_heads(const struct plain *p, double *y, const double *x, int layer, char which, int count,
                        int position)
{
    char name[40];
    snprintf(name, sizeof name, "self_attn.%c_proj.weight", which);
    int weight = layer_param(p, layer, name), bias = -1;
    if (p->v->qkv_bias) {
        snprintf(name, sizeof name, "self_attn.%c_proj.bias", which);
        bias = layer_param(p, layer, name);
    }
    plain_linear(p, y, x, count * p->v->head_dim, p->v->hidden, weight, bias);
    for (int h = 0; h < count && which != 'v'; h++) {
        double *head = y + h * p->v->head_dim, copy[64];
        if (p->v->qk_norm) {
            snprintf(name, sizeof name, "self_attn.%c_norm.weight", which);
            memcpy(copy, head, (size_t)p->v->head_dim * sizeof *copy);
            plain_norm(p, head, copy, p->v->head_dim, layer_param(p, layer, name));
        }
        plain_rope(head, p->v->head_dim, p->v->stretch > 0 ? position / p->v->stretch : position);
    }
}

/* Pairs of neighbours turn; where they then lie does not matter to scores. */
static void plain_turn_pairs(const struct plain *p, double *y, const double *x, int d, int position)
{
    double at_ = p->v->stretch > 0 ? position / p->v->stretch : position;
    for (int i = 0; i < d; i += 2) {
        double a = at_ * pow(100.0, -(double)i / d);
        y[i] = x[i] * cos(a) - x[i + 1] * sin(a);
        y[i + 1] = x[i + 1] * cos(a) + x[i] * sin(a);
    }
}

/* q, k and v of one token by latents, h [hidden]. */
static void plain_latent(const struct plain *p, const double *h, int layer, int position, double *q, double *k,
                         double *v)
{
    const int *n = p->v->latent;
    int hidden = p->v->hidden, qk = n[NOPE] + n[ROPE], each = n[NOPE] + n[VALUE];
    double down[64], latent[64], made[64], key[64];
    if (n[Q_RANK]) {
        plain_linear(p, down, h, n[Q_RANK], hidden, layer_param(p, layer, "self_attn.q_a_proj.weight"), -1);
        plain_norm(p, latent, down, n[Q_RANK], layer_param(p, layer, "self_attn.q_a_layernorm.weight"));
        plain_linear(p, made, latent, p->v->heads * qk, n[Q_RANK], layer_param(p, layer, "self_attn.q_b_proj.weight"),
                     -1);
    } else {
        plain_linear(p, made, h, p->v->heads * qk, hidden, layer_param(p, layer, "self_attn.q_proj.weight"), -1);
    }
    for (int i = 0; i < p->v->heads; i++) {
        memcpy(q + i * qk, made + i * qk, (size_t)n[NOPE] * sizeof *q);
        plain_turn_pairs(p, q + i * qk + n[NOPE], made + i * qk + n[NOPE], n[ROPE], position);
    }
    plain_linear(p, down, h, n[KV_RANK] + n[ROPE], hidden, layer_param(p, layer, "self_attn.kv_a_proj_with_mqa.weight"),
                 -1);
    plain_norm(p, latent, down, n[KV_RANK], layer_param(p, layer, "self_attn.kv_a_layernorm.weight"));
    plain_turn_pairs(p, key, down + n[KV_RANK], n[ROPE], position);
    plain_linear(p, made, latent, p->v->heads * each, n[KV_RANK], layer_param(p, layer, "self_attn.kv_b_proj.weight"),
                 -1);
    for (int i = 0; i < p->v->heads; i++) {
        memcpy(k + i * qk, made + i * each, (size_t)n[NOPE] * sizeof *k);
        memcpy(k + i * qk + n[NOPE], key, (size_t)n[ROPE] * sizeof *k);
        memcpy(v + i * n[VALUE], made + i * each + n[NOPE], (size_t)n[VALUE] * sizeof *v);
    }
}

/* Position i's attention output, given q of this token and k, v of all up to it. */
static void plain_attend(const struct plain *p, double *o, const double *q, double k[][64], double v[][64], int i,
                         int layer)
{
    const int *n = p->v->latent;
    int d = n[KV_RANK] ? n[NOPE] + n[ROPE] : p->v->head_dim, dv = n[KV_RANK] ? n[VALUE] : d,
        window = layer < p->v->window_from ? 0 : p->v->window;
    for (int h = 0; h < p->v->heads; h++) {
        int g = h / (p->v->heads / p->v->kv_heads);
        double total = 0;
        memset(o + h * dv, 0, (size_t)dv * sizeof *o);
        for (int j = window && i >= window ? i - window + 1 : 0; j <= i; j++) {
            double score = 0;
            for (int e = 0; e < d; e++)
                score += q[h * d + e] * k[j][g * d + e];
            score = exp(score * (n[KV_RANK] ? p->v->sharp : 1) / sqrt((double)d));
            total += score;
            for (int e = 0; e < dv; e++)
                o[h * dv + e] += score * v[j][g * dv + e];
        }
        for (int e = 0; e < dv; e++)
            o[h * dv + e] /= total;
    }
}

/* sum over tokens of weight[i] * log p(target[i]) of one sequence at positions 0..n-1; logp may be NULL. */
static double plain_run(const struct plain *p, const int32_t *token, const int32_t *target, const float *weight, int n,
                        double *logp)
{
    static double x[MOST_TOKENS][64], k[MOST_TOKENS][64], v[MOST_TOKENS][64], h[64], q[64], o[64], y[64], gate[64],
        up[64];
    int c = p->v->hidden, f = p->v->ffn, embed = index_of(p, "model.embed_tokens.weight"),
        head = index_of(p, "lm_head.weight");
    for (int i = 0; i < n; i++)
        for (int j = 0; j < c; j++)
            x[i][j] = at(p, embed, (int64_t)token[i] * c + j);
    for (int l = 0; l < p->v->layers; l++) {
        for (int i = 0; i < n; i++) {
            plain_norm(p, h, x[i], c, layer_param(p, l, "input_layernorm.weight"));
            if (p->v->latent[KV_RANK])
                plain_latent(p, h, l, i, q, k[i], v[i]);
            for (int j = 0; j < 3 && !p->v->latent[KV_RANK]; j++)
                plain_heads(p, j == 0 ? q : j == 1 ? k[i] : v[i], h, l, "qkv"[j], j ? p->v->kv_heads : p->v->heads, i);
            plain_attend(p, o, q, k, v, i, l);
            int width = p->v->heads * (p->v->latent[KV_RANK] ? p->v->latent[VALUE] : p->v->head_dim);
            plain_linear(p, y, o, c, width, layer_param(p, l, "self_attn.o_proj.weight"), -1);
            for (int j = 0; j < c; j++)
                x[i][j] += y[j];
            plain_norm(p, h, x[i], c, layer_param(p, l, "post_attention_layernorm.weight"));
            plain_linear(p, gate, h, f, c, layer_param(p, l, "mlp.gate_proj.weight"), -1);
            plain_linear(p, up, h, f, c, layer_param(p, l, "mlp.up_proj.weight"), -1);
            for (int j = 0; j < f; j++)
                gate[j] = gate[j] / (1 + exp(-gate[j])) * up[j];
            plain_linear(p, y, gate, c, f, layer_param(p, l, "mlp.down_proj.weight"), -1);
            for (int j = 0; j < c; j++)
                x[i][j] += y[j];
        }
    }
    double sum = 0;
    for (int i = 0; i < n; i++) {
        double logit[VOCAB], total = 0;
        if (target[i] < 0)
            continue;
        plain_norm(p, h, x[i], c, index_of(p, "model.norm.weight"));
        plain_linear(p, logit, h, VOCAB, c, head, -1);
        for (int j = 0; j < VOCAB; j++)
            total += exp(logit[j]);
        sum += (double)weight[i] * (logit[target[i]] - log(total));
        if (logp)
            logp[i] = logit[target[i]] - log(total);
    }
    return sum;
}

/* ---- a pack of three sequences ---- */

enum { SEQUENCES = 3 };
static const int32_t offsets[SEQUENCES + 1] = { 0, 7, 8, 19 };

struct batch {
    int32_t token[MOST_TOKENS], target[MOST_TOKENS], position[MOST_TOKENS], offset[SEQUENCES + 1];
    float weight[MOST_TOKENS];
    struct model_input in;
};

/* Sequences [first, last) of the pack. */
static struct batch *batch_of(struct batch *b, int first, int last, const int32_t *offset)
{
    *b = (struct batch){ 0 };
    int n = 0;
    for (int s = first; s < last; s++) {
        for (int i = offset[s]; i < offset[s + 1]; i++, n++) {
            b->token[n] = (i * 11 + 3) % VOCAB;
            b->target[n] = i % 4 == 1 ? -1 : (i * 7 + 5) % VOCAB;
            b->position[n] = i - offset[s];
            b->weight[n] = 0.3f * (float)(i % 7) - 0.8f;
        }
        b->offset[s - first + 1] = n;
    }
    b->in = (struct model_input){ .tokens = n, .token = b->token, .seg = { last - first, b->offset, b->position } };
    return b;
}

static status *run_model(struct model *m, struct tape *t, const struct batch *b, enum tape_mode mode,
                         struct tensor **hidden, struct tensor **logp)
{
    tape_begin(t, mode);
    *hidden = m->ops->forward(m, t, &b->in);
    *logp = op_logprob(t, *hidden, m->ops->head(m), b->target, 1.0f);
    TRY(tape_end(t));
    return mode == TAPE_TRAIN ? tape_backward(t, *logp, b->weight, TAPE_BACKWARD_ALL) : NULL;
}

static double plain_batch(const struct plain *p, const struct batch *b, double *logp)
{
    double sum = 0;
    for (int s = 0; s < b->in.seg.count; s++) {
        int from = b->offset[s];
        sum += plain_run(p, b->token + from, b->target + from, b->weight + from, b->offset[s + 1] - from,
                         logp ? logp + from : NULL);
    }
    return sum;
}

static void check_gradient(struct plain *p, const struct batch *b, int param, int64_t e)
{
    double h = 1e-5;
    p->changed = param;
    p->element = e;
    p->by = h;
    double high = plain_batch(p, b, NULL);
    p->by = -h;
    double low = plain_batch(p, b, NULL), want = (high - low) / (2 * h),
           got = (double)((float *)p->m->params.p[param].value.grad)[e] - 0.5;
    p->changed = -1;
    if (!(fabs(got - want) <= 2e-5 * (1 + fabs(want))))
        fail_msg("%s: gradient of %s at %lld is %.8g, not %.8g", p->v->name, p->m->params.p[param].name, (long long)e,
                 got, want);
}

static void against_plain(void **state)
{
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        struct plain p = { .v = &variants[i], .m = open_variant(&variants[i], true), .changed = -1 };
        struct batch b;
        struct tape *t;
        struct tensor *hidden, *logp;
        double want[MOST_TOKENS] = { 0 };
        stir(p.m);
        batch_of(&b, 0, SEQUENCES, offsets);
        assert_null(tape_open(NULL, NULL, 0, &t));
        for (uint64_t e = 0; e < p.m->params.total; e++)
            p.m->params.grad[e] = 0.5f;
        assert_null(run_model(p.m, t, &b, TAPE_TRAIN, &hidden, &logp));
        plain_batch(&p, &b, want);
        for (int n = 0; n < b.in.tokens; n++)
            if (!(fabs((double)((float *)logp->data)[n] - want[n]) < 1e-5))
                fail_msg("%s: logp %d is %.8g, not %.8g", p.v->name, n, (double)((float *)logp->data)[n], want[n]);
        for (int param = 0; param < p.m->params.count; param++) {
            int64_t n = tensor_elems(&p.m->params.p[param].value);
            for (int64_t e = 0; p.m->params.p[param].alias < 0 && e<n; e += n> 12 ? n / 7 - 1 : 1)
                check_gradient(&p, &b, param, e);
        }
        tape_close(t);
        model_close(p.m);
    }
}

/* What lies between parameters in the block is never touched. */
static void paddings_stay_zero(void **state)
{
    (void)state;
    struct model *m = open_variant(&variants[4], true);
    struct batch b;
    struct tape *t;
    struct tensor *hidden, *logp;
    batch_of(&b, 0, SEQUENCES, offsets);
    assert_null(tape_open(NULL, NULL, 0, &t));
    assert_null(run_model(m, t, &b, TAPE_TRAIN, &hidden, &logp));
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        for (int64_t e = tensor_elems(&p->value); e % PARAM_ALIGN; e++)
            assert_true(((float *)p->value.data)[e] == 0 && ((float *)p->value.grad)[e] == 0);
    }
    tape_close(t);
    model_close(m);
}

/* ---- bits ---- */

static const int32_t long_offsets[SEQUENCES + 1] = { 0, 70, 71, 150 };

static void packing_changes_no_bit(void **state)
{
    (void)state;
    static struct batch all, alone;
    for (int i = 0; i < VARIANTS; i++) {
        struct model *m = open_variant(&variants[i], false);
        struct tape *t, *u;
        struct tensor *h[2], *logp[2];
        stir(m);
        assert_null(tape_open(NULL, NULL, 0, &t));
        assert_null(tape_open(NULL, NULL, 0, &u));
        batch_of(&all, 0, SEQUENCES, long_offsets);
        assert_null(run_model(m, t, &all, TAPE_FORWARD, &h[0], &logp[0]));
        for (int s = 0; s < SEQUENCES; s++) {
            batch_of(&alone, s, s + 1, long_offsets);
            int64_t n = alone.in.tokens, from = long_offsets[s], c = variants[i].hidden;
            assert_null(run_model(m, u, &alone, TAPE_FORWARD, &h[1], &logp[1]));
            assert_memory_equal(h[1]->data, (float *)h[0]->data + from * c, (size_t)(n * c) * sizeof(float));
            assert_memory_equal(logp[1]->data, (float *)logp[0]->data + from, (size_t)n * sizeof(float));
        }
        tape_close(t);
        tape_close(u);
        model_close(m);
    }
}

static void threads_and_dry_runs(void **state)
{
    (void)state;
    static struct batch b;
    static float grad[1 << 17];
    struct model *m = open_variant(&variants[1], true);
    struct tensor *h, *logp;
    stir(m);
    batch_of(&b, 0, SEQUENCES, long_offsets);
    assert_true(m->params.total < 1 << 17);
    for (int threads = 1; threads <= 3; threads++) {
        struct workers *w;
        struct tape *t;
        assert_null(workers_open(threads, &w));
        assert_null(tape_open(w, NULL, 0, &t));
        struct batch dry = b; /* a dry run reads no ids, positions or offsets */
        dry.in.token = dry.in.seg.position = dry.in.seg.offset = NULL;
        assert_null(run_model(m, t, &dry, TAPE_DRY, &h, &logp));
        uint64_t before = mem_count();
        for (int pass = 0; pass < 3; pass++) {
            memset(m->params.grad, 0, m->params.total * sizeof(float));
            assert_null(run_model(m, t, &b, TAPE_TRAIN, &h, &logp));
            if (threads == 1 && pass == 0)
                memcpy(grad, m->params.grad, m->params.total * sizeof(float));
            assert_memory_equal(grad, m->params.grad, m->params.total * sizeof(float));
        }
        assert_int_equal(mem_count(), before);
        tape_close(t);
        workers_close(w);
    }
    model_close(m);
}

/* A prompt, then token by token against one cache a layer: the hidden states of the full pass. */
static void decode(const struct variant *v)
{
    static struct batch all;
    struct model *m = open_variant(v, false);
    struct kv_cache cache[2];
    int32_t len[2] = { 0 };
    struct tape *t, *u;
    struct tensor *h, *logp;
    stir(m);
    assert_int_equal(m->ops->layers(m), 2);
    size_t floats = (size_t)(80 * v->kv_heads * v->head_dim);
    for (int l = 0; l < 2; l++)
        cache[l] =
            (struct kv_cache){ 1, 80, v->kv_heads, v->head_dim, mem_alloc(floats * 4), mem_alloc(floats * 4), &len[l] };
    assert_null(tape_open(NULL, NULL, 0, &t));
    assert_null(tape_open(NULL, NULL, 0, &u));
    batch_of(&all, 0, 1, long_offsets);
    assert_null(run_model(m, t, &all, TAPE_FORWARD, &h, &logp));
    for (int32_t from = 0, to = 20; from < 70; from = to++) {
        int32_t offset[2] = { 0, to - from };
        struct model_input in = {
            .tokens = to - from, .token = all.token + from, .seg = { 1, offset, all.position + from }, .cache = cache
        };
        tape_begin(u, TAPE_FORWARD);
        struct tensor *y = m->ops->forward(m, u, &in);
        assert_null(tape_end(u));
        assert_memory_equal(y->data, (float *)h->data + from * v->hidden,
                            (size_t)((to - from) * v->hidden) * sizeof(float));
    }
    for (int l = 0; l < 2; l++) {
        mem_free(cache[l].k);
        mem_free(cache[l].v);
    }
    tape_close(t);
    tape_close(u);
    model_close(m);
}

static void decoding_equals_full_pass(void **state)
{
    (void)state;
    decode(&variants[3]);
    decode(&variants[VARIANTS - 2]);
}

/* ---- declaration ---- */

static void names_and_shapes(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        int ndim;
        uint64_t dim[2];
        bool decay;
        int cut; /* dimension cut by tensor parallelism, or -1 */
    } want[] = {
        { "model.embed_tokens.weight", 2, { VOCAB, 16 }, true, 0 },
        { "model.layers.0.input_layernorm.weight", 1, { 16 }, false, -1 },
        { "model.layers.0.self_attn.q_proj.weight", 2, { 32, 16 }, true, 0 },
        { "model.layers.0.self_attn.k_proj.weight", 2, { 16, 16 }, true, 0 },
        { "model.layers.0.self_attn.v_proj.weight", 2, { 16, 16 }, true, 0 },
        { "model.layers.0.self_attn.q_proj.bias", 1, { 32 }, false, 0 },
        { "model.layers.0.self_attn.k_proj.bias", 1, { 16 }, false, 0 },
        { "model.layers.0.self_attn.v_proj.bias", 1, { 16 }, false, 0 },
        { "model.layers.0.self_attn.q_norm.weight", 1, { 8 }, false, -1 },
        { "model.layers.0.self_attn.k_norm.weight", 1, { 8 }, false, -1 },
        { "model.layers.0.self_attn.o_proj.weight", 2, { 16, 32 }, true, 1 },
        { "model.layers.0.post_attention_layernorm.weight", 1, { 16 }, false, -1 },
        { "model.layers.0.mlp.gate_proj.weight", 2, { 20, 16 }, true, 0 },
        { "model.layers.0.mlp.up_proj.weight", 2, { 20, 16 }, true, 0 },
        { "model.layers.0.mlp.down_proj.weight", 2, { 16, 20 }, true, 1 },
        { "model.norm.weight", 1, { 16 }, false, -1 },
        { "lm_head.weight", 2, { VOCAB, 16 }, true, 0 },
    };
    enum { COUNT = sizeof want / sizeof *want };
    struct model *m = open_variant(&variants[4], true);
    assert_int_equal(m->params.count, COUNT);
    uint64_t unique = 0, next = 0;
    for (int i = 0; i < COUNT; i++) {
        const struct param *p = &m->params.p[i];
        assert_string_equal(p->name, want[i].name);
        assert_ptr_equal(params_find(&m->params, want[i].name), p);
        assert_int_equal(p->shape.ndim, want[i].ndim);
        assert_int_equal(p->value.ndim, want[i].ndim);
        for (int d = 0; d < want[i].ndim; d++) {
            assert_int_equal(p->shape.dim[d], want[i].dim[d]);
            assert_int_equal(p->value.dim[d], want[i].dim[d]);
        }
        for (int d = 0; d < LAYOUT_DIMS; d++)
            assert_int_equal(p->cut[d], d == want[i].cut ? MESH_TP : -1);
        assert_int_equal(p->decay, want[i].decay);
        assert_int_equal(p->alias, i == COUNT - 1 ? 0 : -1);
        assert_ptr_equal(p->value.data, m->params.data + p->offset);
        assert_ptr_equal(p->value.grad, m->params.grad + p->offset);
        if (p->alias >= 0) {
            assert_int_equal(p->offset, 0);
            continue;
        }
        uint64_t n = want[i].dim[0] * (want[i].ndim == 2 ? want[i].dim[1] : 1);
        assert_int_equal(p->offset, next);
        next += (n + 1023) / 1024 * 1024;
        unique += n;
    }
    assert_int_equal(m->params.total, next);
    assert_int_equal(params_unique_elems(&m->params), unique);
    assert_null(params_find(&m->params, "model.layers.1.mlp.up_proj.weight"));
    assert_ptr_equal(m->ops->head(m), &m->params.p[COUNT - 1].value);
    /* one token: 2 flops a weight of each matrix (the embedding only as head), and 4 H D a visible key */
    double matrices = (double)(unique - (uint64_t)(16 + 32 + 16 + 16 + 8 + 8 + 16 + 16));
    assert_true(fabs(m->ops->flops_per_token(m, 10) - (2 * matrices + 4 * 32 * 10.0)) < 1e-6);
    model_close(m);
}

/* The same of latent attention, by its matrices' shapes: queries and values have sizes of their own. */
static void flops_of_latents(void **state)
{
    (void)state;
    const struct variant *v = &variants[VARIANTS - 2];
    struct model *m = open_variant(v, false);
    double matrices = 0, score = v->latent[NOPE] + v->latent[ROPE] + v->latent[VALUE];
    for (int i = 0; i < m->params.count; i++)
        if (m->params.p[i].shape.ndim == 2 && m->params.p[i].alias < 0)
            matrices += (double)(m->params.p[i].shape.dim[0] * m->params.p[i].shape.dim[1]);
    double want = 2 * matrices + 2 * v->layers * v->heads * score * 10;
    assert_true(fabs(m->ops->flops_per_token(m, 10) - want) < 1e-6);
    struct kv_shape kv = m->ops->kv_shape(m);
    assert_true(kv.layers == v->layers && kv.kv_heads == v->heads && kv.head_dim == v->head_dim);
    model_close(m);
}

static void initial_values(void **state)
{
    (void)state;
    struct model *a = open_variant(&variants[0], true), *b = open_variant(&variants[1], false);
    /* the same tensor in models of other shape and order: equal element by element, as far as both go */
    const char *shared[] = { "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight",
                             "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight" };
    for (int i = 0; i < 4; i++) {
        const struct param *p = params_find(&a->params, shared[i]), *q = params_find(&b->params, shared[i]);
        int64_t n =
            tensor_elems(&p->value) < tensor_elems(&q->value) ? tensor_elems(&p->value) : tensor_elems(&q->value);
        assert_memory_equal(p->value.data, q->value.data, (size_t)n * sizeof(float));
        for (int64_t e = 0; e < n; e += 5) { /* the address is the name and the element */
            float z;
            uint64_t hash = hash64(p->name, strlen(p->name));
            rng_normals((struct rng_at){ 42, (uint32_t)hash, 0, RNG_INIT }, (uint64_t)e, 1, &z);
            double std = i == 3 ? 0.02 / sqrt(2.0 * 2) : 0.02;
            assert_true(fabs((double)((float *)p->value.data)[e] - std * (double)z) < 1e-8);
        }
    }
    float *q = params_find(&a->params, "model.layers.0.self_attn.q_proj.weight")->value.data;
    float *k = params_find(&a->params, "model.layers.0.self_attn.k_proj.weight")->value.data;
    assert_true(q[0] != k[0]);
    float first = q[0], *norm = params_find(&a->params, "model.norm.weight")->value.data;
    assert_true(norm[0] == 1 && norm[23] == 1);
    assert_null(params_init(&a->params, 43));
    assert_true(q[0] != first);
    assert_null(params_init(&a->params, 42));
    assert_true(q[0] == first);
    assert_null(b->params.grad);
    assert_null(b->params.p[0].value.grad);
    model_close(a);
    model_close(b);
}

/* ---- refusals ---- */

static void refusals(void **state)
{
    (void)state;
    const struct model_ops *ops;
    FAILS(ST_INVALID, "llama", model_lookup("lama", &ops));
    static const struct {
        const char *key, *value, *words;
    } bad[] = {
        { "kv_heads", "3", "model.kv_heads" },
        { "hidden", "26", "model.hidden" },
        { "head_dim", "7", "model.head_dim" },
        { "vocab", "36", "model.vocab" },
        { "hidden", "20", "model.head_dim" },
        { "v_head_dim", "4", "model.v_head_dim: 4 needs model.kv_lora_rank" },
        { "rope_mscale_all_dim", "1", "needs model.kv_lora_rank" },
        { "kv_lora_rank", "4", "model.qk_nope_head_dim: model.kv_lora_rank needs" },
    };
    void *config = mem_calloc(1, llama()->config_bytes);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct model *m;
        set_all(config, &variants[0]);
        set(config, bad[i].key, bad[i].value);
        FAILS(ST_INVALID, bad[i].words, model_open(llama(), config, VOCAB, &m));
        options_fini(llama()->options, config);
    }
    set_all(config, &variants[0]);
    set(config, "vocab", "64");
    set(config, "max_positions", "7");
    struct model *m;
    assert_null(model_open(llama(), config, VOCAB, &m));
    assert_int_equal(m->vocab, 64);
    assert_int_equal(params_find(&m->params, "lm_head.weight")->shape.dim[0], 64);
    assert_null(params_alloc(&m->params, false));
    struct batch b;
    struct tape *t;
    struct tensor *h, *logp;
    assert_null(tape_open(NULL, NULL, 0, &t));
    assert_null(run_model(m, t, batch_of(&b, 0, 2, offsets), TAPE_FORWARD, &h, &logp));
    FAILS(ST_INVALID, "position 7", run_model(m, t, batch_of(&b, 0, 3, offsets), TAPE_FORWARD, &h, &logp));
    b.token[4] = 64;
    b.in.tokens = 7;
    b.in.seg.count = 1;
    FAILS(ST_INVALID, "token 4 has id 64", run_model(m, t, &b, TAPE_FORWARD, &h, &logp));
    tape_close(t);
    model_close(m);
    model_close(NULL);
    options_fini(llama()->options, config);
    mem_free(config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_plain),
        cmocka_unit_test(paddings_stay_zero),
        cmocka_unit_test(packing_changes_no_bit),
        cmocka_unit_test(threads_and_dry_runs),
        cmocka_unit_test(decoding_equals_full_pass),
        cmocka_unit_test(names_and_shapes),
        cmocka_unit_test(flops_of_latents),
        cmocka_unit_test(initial_values),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
