/* Tensor parallelism: a model whose weights are cut over ranks (threads of this process) against the same model whole:
 * log-probabilities and what goes with them, gradients of every tensor, the norm, generated tokens; the bytes the ranks
 * exchange; memory of a dry pass; paddings; blocks run again in backward; what cannot be cut. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "tests/support/test_root.h"
#include "trainer/model/lora.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/zero.h"
#include "trainer/rollout/generate.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define EXPECT(condition, ...)                                                                                         \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return ERR(INTERNAL, "(" #condition ") " __VA_ARGS__);                                                     \
    } while (0)

enum { VOCAB = 37, TOKENS = 51, SEQUENCES = 3, LAYERS = 2 };

struct variant {
    const char *name, *options;
    int ranks[4]; /* ended by 0 */
};
static const struct variant variants[] = {
    { "grouped, tied", "heads=4,kv_heads=2,hidden=24,ffn=40,tied=true", { 2, 4 } },
    { "qwen2", "heads=4,kv_heads=1,hidden=24,ffn=40,tied=true,qkv_bias=true", { 2, 4 } },
    { "qwen3", "heads=8,kv_heads=2,head_dim=6,hidden=20,ffn=24,qk_norm=true", { 2, 4, 8 } },
    { "thirds", "heads=6,kv_heads=3,hidden=36,ffn=33,qk_norm=true,qkv_bias=true", { 3 } },
    { "all kv heads", "heads=4,kv_heads=4,hidden=16,ffn=20,vocab=64", { 2, 4 } },
    { "adapters",
      "heads=4,kv_heads=2,hidden=24,ffn=40,tied=true,qkv_bias=true,lora.targets=*,lora.rank=3,lora.alpha=0.9",
      { 2, 4 } },
};
enum { VARIANTS = sizeof variants / sizeof *variants };

static const struct model_ops *llama(void)
{
    const struct model_ops *ops = NULL;
    status *st = model_lookup("llama", &ops);
    CHECK(!st, "there is no llama");
    return ops;
}

static status *set(void *config, struct lora_config *lora, const char *pair)
{
    char text[64];
    snprintf(text, sizeof text, "%s", pair);
    char *equal = strchr(text, '=');
    *equal = 0;
    if (!strncmp(text, "lora.", 5))
        return options_set(&lora_options, text + 5, equal + 1, lora, "test");
    return options_set(llama()->options, text, equal + 1, config, "test");
}

static status *open_at(const char *options, const struct tp_place *at, struct model **out)
{
    char text[256];
    void *config = mem_calloc(1, llama()->config_bytes);
    struct lora_config lora;
    const struct tuning tuning = { &lora, "", NULL };
    snprintf(text, sizeof text, "layers=%d,rope_theta=100,%s", LAYERS, options);
    TRY(options_defaults(llama()->options, config));
    TRY(options_defaults(&lora_options, &lora));
    for (char *save = NULL, *pair = strtok_r(text, ",", &save); pair; pair = strtok_r(NULL, ",", &save))
        TRY(set(config, &lora, pair));
    status *st = model_open_tuned(llama(), config, VOCAB, at, &tuning, out);
    options_fini(llama()->options, config);
    options_fini(&lora_options, &lora);
    mem_free(config);
    return st ? st : params_alloc(&(*out)->params, true);
}

static void must(status *st)
{
    if (st)
        fail_msg("%s (rank %d, %s:%d)", status_message(st), status_rank(st), status_file(st), status_line(st));
}

/* Larger and irregular weights, so that no term of a gradient is lost in small numbers. */
static void stir(struct model *m)
{
    for (int i = 0; i < m->params.count; i++) {
        struct param *p = &m->params.p[i];
        float *x = p->value.data;
        for (int64_t e = 0; p->alias < 0 && e < tensor_elems(&p->value); e++) {
            float z;
            rng_normals((struct rng_at){ .seed = 9, .sample = (uint32_t)i, .stream = RNG_DATA }, (uint64_t)e, 1, &z);
            x[e] = p->init == INIT_NORMAL ? 0.25f * z : p->init == INIT_ONE ? 1 + 0.3f * z : 0.5f * z;
        }
    }
}

/* Where element e of a part lies in the whole tensor. */
static uint64_t whole_index(const struct param *p, uint64_t e)
{
    if (p->shape.ndim == 1)
        return p->box.off[0] + e;
    return (p->box.off[0] + e / p->box.len[1]) * p->shape.dim[1] + p->box.off[1] + e % p->box.len[1];
}

static void take_parts(struct model *m, const struct model *whole)
{
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        const float *from = whole->params.p[i].value.data;
        for (uint64_t e = 0; p->alias < 0 && e < box_volume(p->shape.ndim, &p->box); e++)
            ((float *)p->value.data)[e] = from[whole_index(p, e)];
    }
}

/* ---- a pack, and what a model makes of it ---- */

static const int32_t offsets[SEQUENCES + 1] = { 0, 23, 24, TOKENS };
struct batch {
    int32_t token[TOKENS], target[TOKENS], position[TOKENS];
    float weight[TOKENS];
    struct model_input in;
};

static void fill(struct batch *b, int64_t tokens)
{
    for (int s = 0; s < SEQUENCES; s++)
        for (int i = offsets[s]; i < offsets[s + 1]; i++) {
            b->token[i] = (i * 11 + 3) % VOCAB;
            b->target[i] = i % 4 == 1 ? -1 : (i * 7 + 5) % VOCAB;
            b->position[i] = i - offsets[s];
            b->weight[i] = 0.3f * (float)(i % 7) - 0.8f;
        }
    b->in = (struct model_input){ .tokens = tokens,
                                  .token = b->token,
                                  .seg = { tokens == TOKENS ? SEQUENCES : 1, offsets, b->position } };
}

static status *run_model(struct model *m, struct tape *t, const struct batch *b, enum tape_mode mode,
                         struct tensor **logp, struct logprob_stats *stats)
{
    tape_begin(t, mode);
    struct tensor *h = m->ops->forward(m, t, &b->in);
    *logp = op_logprob_stats(t, h, m->ops->head(m), b->target, 0.8f, stats);
    TRY(tape_end(t));
    return mode == TAPE_TRAIN ? tape_backward(t, *logp, b->weight, TAPE_BACKWARD_ALL) : NULL;
}

enum { VALUES = 5 };
struct results {
    float value[VALUES][TOKENS]; /* logp, entropy, logit, log_square, top */
    double norm;
};

static void keep(struct results *r, const struct tensor *logp, const struct logprob_stats *s)
{
    const float *const from[VALUES] = { logp->data, s->entropy, s->logit, s->log_square, s->top };
    for (int i = 0; i < VALUES; i++)
        memcpy(r->value[i], from[i], sizeof r->value[i]);
}

/* A step of one micro-batch up to the norm. */
static status *step(struct model *m, struct tape *t, const struct batch *b, struct zero *z, struct results *r)
{
    struct tensor *logp;
    struct logprob_stats stats;
    zero_begin(z, 1);
    TRY(run_model(m, t, b, TAPE_TRAIN, &logp, &stats));
    keep(r, logp, &stats);
    TRY(zero_added(z, 0));
    return zero_reduce(z, &r->norm);
}

struct whole {
    const struct variant *v;
    struct model *m;
    struct results r;
    bool sequence;
};

static status *compute_whole(struct comm *self, void *arg)
{
    struct whole *w = arg;
    struct batch b;
    struct tape *t = NULL;
    struct zero *z = NULL;
    fill(&b, TOKENS);
    TRY(open_at(w->v->options, &(struct tp_place){ .size = 1 }, &w->m));
    stir(w->m);
    TRY(zero_open(&(struct zero_options){ .stage = 1 }, &w->m->params, self, &z));
    TRY(tape_open(NULL, NULL, 0, &t));
    status *st = step(w->m, t, &b, z, &w->r);
    tape_close(t);
    zero_close(z);
    return st;
}

/* ---- the same on many ranks ---- */

static double rel(double got, double want)
{
    return fabs(got - want) / fmax(fabs(want), 0.1);
}

static status *check_values(const struct whole *w, const struct results *r)
{
    for (int k = 0; k < VALUES; k++)
        for (int i = 0; i < TOKENS; i++)
            EXPECT(rel((double)r->value[k][i], (double)w->r.value[k][i]) < 1e-5,
                   "value %d of token %d is %.9g, not %.9g", k, i, (double)r->value[k][i], (double)w->r.value[k][i]);
    EXPECT(rel(r->norm, w->r.norm) < 1e-6, "norm %.12g, not %.12g", r->norm, w->r.norm);
    return NULL;
}

/* ||g - g'|| / ||g|| of a rank's part, with g the whole tensor. */
static status *check_gradients(const struct whole *w, const struct model *m)
{
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        const float *want = w->m->params.p[i].value.grad;
        double off = 0, all = 0;
        EXPECT(!p->value.grad == p->frozen && !want == p->frozen, "%s", p->name);
        if (p->frozen)
            continue;
        for (uint64_t e = 0; e < param_elems(&w->m->params.p[i]); e++)
            all += (double)want[e] * (double)want[e];
        for (uint64_t e = 0; e < param_elems(p); e++) {
            bool padding = e >= box_volume(p->shape.ndim, &p->box);
            double d = (double)((float *)p->value.grad)[e] - (padding ? 0 : (double)want[whole_index(p, e)]);
            EXPECT(!padding || (d == 0 && ((float *)p->value.data)[e] == 0), "%s: padding was touched", p->name);
            off += d * d;
        }
        EXPECT(all > 0 && sqrt(off) <= 1e-5 * sqrt(all), "gradient of %s: off by %.3g of %.3g", p->name, sqrt(off),
               sqrt(all));
    }
    return NULL;
}

static status *same_on_all(struct comm *c, const void *data, size_t bytes, const char *what)
{
    unsigned char *all = mem_alloc(bytes * (size_t)c->size);
    TRY(comm_allgather(c, data, all, bytes, NULL));
    for (int r = 1; r < c->size; r++)
        EXPECT(!memcmp(all, all + (size_t)r * bytes, bytes), "%s: ranks 0 and %d differ", what, r);
    mem_free(all);
    return NULL;
}

/* What several ranks hold of a parameter has one gradient, to the last bit. */
static status *check_sharers(struct comm *c, const struct model *m)
{
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        struct comm *group;
        if (p->frozen)
            continue;
        TRY(comm_split(c, c->rank / p->share, c->rank, &group));
        status *st = same_on_all(group, p->value.grad, param_elems(p) * sizeof(float), p->name);
        comm_close(group);
        TRY(st);
    }
    return NULL;
}

/* Four sums of [N, C] a layer and two around the layers, each 2 (p - 1) N C floats over all ranks; the parts of the
 * log-probabilities. Adapters add none; what stands before the first of them has no gradient, which saves one. */
static status *check_traffic(struct comm *c, const struct model *m, uint64_t sent)
{
    uint64_t p = (uint64_t)c->size, width = m->params.p[0].shape.dim[1],
             sums = 4 * LAYERS + 2 - (m->params.frozen != 0),
             want = sums * 2 * (p - 1) * TOKENS * width * sizeof(float) +
                    p * (p - 1) * TOKENS * sizeof(struct logprob_part);
    TRY(comm_allreduce(c, &sent, 1, COMM_U64, COMM_SUM, NULL));
    EXPECT(sent == want, "%llu bytes were sent, not %llu", (unsigned long long)sent, (unsigned long long)want);
    return NULL;
}

static status *check_memory(struct model *m, struct tape *t, const struct batch *b)
{
    struct batch less;
    struct tensor *logp;
    struct logprob_stats stats;
    TRY(run_model(m, t, b, TAPE_DRY, &logp, &stats));
    uint64_t grown = t->arena.grown;
    TRY(run_model(m, t, b, TAPE_TRAIN, &logp, &stats));
    size_t used = t->arena.used_bytes;
    tape_begin(t, TAPE_DRY);
    struct tensor *h = m->ops->forward(m, t, &b->in);
    (void)op_logprob_stats(t, h, m->ops->head(m), b->target, 0.8f, &stats);
    EXPECT(t->arena.used_bytes == used, "a dry pass takes %zu bytes, a real one %zu", t->arena.used_bytes, used);
    TRY(tape_end(t));
    for (int n = offsets[1]; n > 0; n--) {
        fill(&less, n);
        int32_t one[] = { 0, n };
        less.in.seg.offset = one;
        TRY(run_model(m, t, &less, TAPE_TRAIN, &logp, &stats));
        EXPECT(t->arena.used_bytes <= used && t->arena.grown == grown, "%d tokens take more than %d", n, TOKENS);
    }
    return NULL;
}

/* Blocks, or their attention, that run again give the same bits, all at once and in halves. */
static status *check_recompute(struct model *m, struct tape *t, const struct batch *b)
{
    struct tensor *logp;
    struct results kept, again;
    struct logprob_stats stats;
    uint64_t bytes = m->params.total * sizeof(float);
    float *grad = mem_alloc(bytes);
    memset(m->params.grad, 0, bytes);
    TRY(run_model(m, t, b, TAPE_TRAIN, &logp, &stats));
    keep(&kept, logp, &stats);
    memcpy(grad, m->params.grad, bytes);
    for (int round = 0; round < 4; round++) {
        int halves = round % 2;
        tape_recompute(t, round < 2 ? TAPE_RECOMPUTE_ATTENTION : TAPE_RECOMPUTE_BLOCK);
        memset(m->params.grad, 0, bytes);
        tape_begin(t, TAPE_TRAIN);
        struct tensor *h = m->ops->forward(m, t, &b->in);
        logp = op_logprob_stats(t, h, m->ops->head(m), b->target, 0.8f, &stats);
        TRY(tape_end(t));
        keep(&again, logp, &stats);
        EXPECT(!memcmp(kept.value, again.value, sizeof kept.value), "forward with recompute");
        TRY(tape_backward(t, logp, b->weight, halves ? TAPE_BACKWARD_INPUT : TAPE_BACKWARD_ALL));
        if (halves)
            TRY(tape_backward(t, logp, b->weight, TAPE_BACKWARD_WEIGHT));
        EXPECT(!memcmp(grad, m->params.grad, bytes), "gradients with recompute, round %d", round);
    }
    tape_share(t, true);
    for (int recompute = 0; recompute < 3; recompute++) {
        tape_recompute(t, (enum tape_recompute)recompute);
        memset(m->params.grad, 0, bytes);
        TRY(run_model(m, t, b, TAPE_DRY, &logp, &stats));
        TRY(run_model(m, t, b, TAPE_TRAIN, &logp, &stats));
        EXPECT(!memcmp(grad, m->params.grad, bytes), "gradients in shared memory, recompute %d", recompute);
        EXPECT(recompute == TAPE_RECOMPUTE_BLOCK || t->grads.at, "gradients share no memory, recompute %d", recompute);
    }
    tape_share(t, false);
    mem_free(grad);
    return NULL;
}

static status *tp_rank(struct comm *c, void *arg)
{
    const struct whole *w = arg;
    struct batch b;
    struct results r = { .norm = 0 };
    struct model *m = NULL;
    struct tape *t = NULL;
    struct zero *z = NULL;
    struct comm *dp;
    fill(&b, TOKENS);
    TRY(open_at(w->v->options, &(struct tp_place){ .size = c->size, .rank = c->rank, .sequence = w->sequence }, &m));
    take_parts(m, w->m);
    TRY(comm_split(c, c->rank, 0, &dp));
    TRY(zero_open(&(struct zero_options){ .stage = 1, .bucket_elems = 4 * PARAM_ALIGN, .tp = c }, &m->params, dp, &z));
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_spread(t, c, w->sequence);
    struct tensor *logp;
    struct logprob_stats stats;
    uint64_t before = c->sent_bytes;
    TRY(run_model(m, t, &b, TAPE_TRAIN, &logp, &stats));
    TRY(check_traffic(c, m, c->sent_bytes - before));
    TRY(step(m, t, &b, z, &r));
    TRY(check_values(w, &r));
    TRY(same_on_all(c, &r, sizeof r, "values"));
    TRY(check_gradients(w, m));
    TRY(check_sharers(c, m));
    TRY(zero_update(z, &(struct adamw){ 0.1, 0.9, 0.95, 1e-8, 0.3, 1, 1, NULL }, NULL, NULL));
    for (int i = 0; i < m->params.count; i++)
        for (uint64_t e = box_volume(m->params.p[i].shape.ndim, &m->params.p[i].box); e < param_elems(&m->params.p[i]);
             e++)
            EXPECT(((float *)m->params.p[i].value.data)[e] == 0, "%s: an update reached padding", m->params.p[i].name);
    TRY(check_memory(m, t, &b));
    TRY(check_recompute(m, t, &b));
    TRY(check_memory(m, t, &b));
    tape_close(t);
    zero_close(z);
    comm_close(dp);
    model_close(m);
    return NULL;
}

static void against_whole(void **state)
{
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        struct whole w = { .v = &variants[i] };
        must(comm_threads_run(1, compute_whole, &w));
        for (const int *ranks = variants[i].ranks; *ranks; ranks++)
            for (int sequence = 0; sequence < 2; sequence++) {
                w.sequence = sequence;
                must(status_wrap(comm_threads_run(*ranks, tp_rank, &w), "%s, tp %d, sequence %d", variants[i].name,
                                 *ranks, sequence));
            }
        model_close(w.m);
    }
}

/* ---- each op, and its gradients, against formulas in double ---- */

enum { V = 7, C = 4, M = 6, N = 5, WEIGHTS = 4 };
static const int64_t sizes[WEIGHTS][2] = {
    { V, C }, { M, C }, { C, M }, { V, C }
}; /* embedding, rows, columns, head */
static const int cut_dims[WEIGHTS] = { 0, 0, 1, 0 };
static const int32_t op_ids[N] = { 6, 0, 3, 6, 2 }, op_targets[N] = { 1, 6, -1, 3, 0 };
static const float op_weights[N] = { 0.7f, -1.1f, 0.4f, 0.9f, -0.3f };

static void draw_weights(double w[WEIGHTS][V * M])
{
    for (int k = 0; k < WEIGHTS; k++)
        for (uint64_t e = 0; e < (uint64_t)(sizes[k][0] * sizes[k][1]); e++) {
            float z;
            rng_normals((struct rng_at){ .seed = 4, .sample = (uint32_t)k, .stream = RNG_DATA }, e, 1, &z);
            w[k][e] = (double)z;
        }
}

/* sum of weight * log softmax(head (columns (rows x)))[target], x = embedding[id]. */
static double in_double(double w[WEIGHTS][V * M])
{
    double sum = 0;
    for (int n = 0; n < N; n++) {
        double a[M] = { 0 }, y[C] = { 0 }, logit[V] = { 0 }, total = 0;
        for (int m = 0; m < M; m++)
            for (int c = 0; c < C; c++)
                a[m] += w[1][m * C + c] * w[0][op_ids[n] * C + c];
        for (int c = 0; c < C; c++)
            for (int m = 0; m < M; m++)
                y[c] += w[2][c * M + m] * a[m];
        for (int v = 0; v < V; v++) {
            for (int c = 0; c < C; c++)
                logit[v] += w[3][v * C + c] * y[c];
            total += exp(logit[v]);
        }
        sum += op_targets[n] < 0 ? 0 : (double)op_weights[n] * (logit[op_targets[n]] - log(total));
    }
    return sum;
}

/* A weight's part on this rank, as model.c would cut it. */
struct cut_weight {
    struct tensor x;
    struct tensor_cut cut;
    float data[V * M], grad[V * M];
};

static uint64_t index_in_whole(const struct cut_weight *w, int k, int64_t e)
{
    int64_t cols = w->x.dim[1], row = e / cols, col = e % cols;
    return (uint64_t)((row + (cut_dims[k] == 0 ? w->cut.first : 0)) * sizes[k][1] + col +
                      (cut_dims[k] == 1 ? w->cut.first : 0));
}

static int64_t held_elems(const struct cut_weight *w, int k)
{
    return cut_dims[k] == 0 ? w->cut.count * w->x.dim[1] : tensor_elems(&w->x);
}

static void cut_one(const struct comm *c, int k, const double *whole, struct cut_weight *w)
{
    uint64_t begin, end, n = (uint64_t)c->size, total = (uint64_t)sizes[k][cut_dims[k]];
    layout_cut(total, n, (uint64_t)c->rank, &begin, &end);
    *w = (struct cut_weight){ .cut = { cut_dims[k], (int64_t)begin, (int64_t)(end - begin), (int64_t)total } };
    w->x = (struct tensor){ .dtype = DTYPE_F32, .ndim = 2, .dim = { sizes[k][0], sizes[k][1] } };
    w->x.dim[cut_dims[k]] = (int64_t)((total + n - 1) / n);
    w->x.data = w->data;
    w->x.grad = w->grad;
    w->x.cut = &w->cut;
    for (int64_t e = 0; e < held_elems(w, k); e++)
        w->data[e] = (float)whole[index_in_whole(w, k, e)];
    for (int e = 0; e < V * M; e++)
        w->grad[e] = 0.5f;
}

static status *check_differences(double whole[WEIGHTS][V * M], int k, const struct cut_weight *w)
{
    const double h = 1e-5;
    for (int64_t e = 0; e < held_elems(w, k); e++) {
        double *at = &whole[k][index_in_whole(w, k, e)], was = *at;
        *at = was + h;
        double up = in_double(whole);
        *at = was - h;
        double want = (up - in_double(whole)) / (2 * h), got = (double)w->grad[e] - 0.5;
        *at = was;
        EXPECT(fabs(got - want) <= 1e-5 * (1 + fabs(want)), "weight %d, element %d: gradient %.9g, not %.9g", k, (int)e,
               got, want);
    }
    for (int64_t e = held_elems(w, k); e < V * M; e++)
        EXPECT(w->grad[e] == 0.5f, "weight %d: padding has a gradient", k);
    return NULL;
}

static status *ops_rank(struct comm *c, void *arg)
{
    struct cut_weight w[WEIGHTS];
    double whole[WEIGHTS][V * M], sum = 0;
    struct tape *t;
    draw_weights(whole);
    for (int k = 0; k < WEIGHTS; k++)
        cut_one(c, k, whole[k], &w[k]);
    for (int k = 0; k < WEIGHTS; k++) /* the double model has the values that f32 has */
        for (int e = 0; e < V * M; e++)
            whole[k][e] = (double)(float)whole[k][e];
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_spread(t, c, *(bool *)arg);
    tape_begin(t, TAPE_TRAIN);
    struct tensor *x = op_embedding(t, &w[0].x, op_ids, N);
    x = op_linear(t, op_linear(t, x, &w[1].x, NULL), &w[2].x, NULL);
    struct tensor *logp = op_logprob(t, x, &w[3].x, op_targets, 1);
    TRY(tape_end(t));
    for (int n = 0; n < N; n++)
        sum += (double)op_weights[n] * (double)((float *)logp->data)[n];
    EXPECT(rel(sum, in_double(whole)) < 1e-6, "sum %.9g, not %.9g", sum, in_double(whole));
    TRY(tape_backward(t, logp, op_weights, TAPE_BACKWARD_ALL));
    for (int k = 0; k < WEIGHTS; k++)
        TRY(check_differences(whole, k, &w[k]));
    tape_close(t);
    return NULL;
}

/* Ranks that divide neither the tokens nor the vocabulary. */
static void ops_against_formulas(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 6; ranks += ranks == 3 ? 3 : 1)
        for (int sequence = 0; sequence < 2; sequence++) {
            bool by_tokens = sequence;
            must(status_wrap(comm_threads_run(ranks, ops_rank, &by_tokens), "%d ranks, sequence %d", ranks, sequence));
        }
}

/* Floats that a layer's attention and its feed-forward part take in training, each with its gradient but for what norms
 * and attention keep (docs/parallelism.md). */
static size_t attention_floats(size_t c, size_t q, size_t k, size_t heads)
{
    return TOKENS * (2 * (2 * c + 3 * q + 3 * k) + 1 + heads);
}

static size_t ffn_floats(size_t c, size_t f)
{
    return TOKENS * (2 * (2 * c + 3 * f) + 1);
}

/* What a training pass of 24 layers holds: all activations; or of each layer its output and the angles' table, and one
 * layer's activations; or of each layer its feed-forward part and what goes into it, and one layer's attention; or all,
 * but the gradients of one layer only, and of each layer's output. */
static void recompute_holds_one_block(void **state)
{
    (void)state;
    enum { MANY = 24, WIDE = 96, KEYS = 48, FEED = 160 };
    struct model *m;
    struct tape *t;
    struct batch b;
    struct tensor *logp;
    struct logprob_stats stats;
    size_t bytes[4];
    fill(&b, TOKENS);
    must(open_at("heads=4,kv_heads=2,hidden=96,ffn=160,layers=24", &(struct tp_place){ .size = 1 }, &m));
    stir(m);
    for (int recompute = 0; recompute < 4; recompute++) {
        must(tape_open(NULL, NULL, 0, &t));
        tape_recompute(t, (enum tape_recompute)(recompute % 3));
        tape_share(t, recompute == 3);
        must(run_model(m, t, &b, TAPE_DRY, &logp, &stats));
        uint64_t grown = t->arena.grown;
        must(run_model(m, t, &b, TAPE_TRAIN, &logp, &stats));
        must(run_model(m, t, &b, TAPE_FORWARD, &logp, &stats));
        assert_int_equal(t->arena.grown, grown);
        bytes[recompute] = t->arena.peak_bytes;
        tape_share(t, false);
        must(check_recompute(m, t, &b));
        tape_close(t);
    }
    size_t outputs = (size_t)MANY * 2 * TOKENS * WIDE * sizeof(float);
    if (bytes[1] < outputs || bytes[1] > outputs + bytes[0] / 8)
        fail_msg("%zu bytes with recompute, %zu without, outputs %zu", bytes[1], bytes[0], outputs);
    size_t all = attention_floats(WIDE, WIDE, KEYS, 4), rest = ffn_floats(WIDE, FEED), own = (size_t)TOKENS * WIDE;
    double saved = (double)(bytes[0] - bytes[2]), want = (double)(MANY * (all - 2 * own) - (all + own)) * sizeof(float);
    if (fabs(saved - want) > 0.02 * want || (double)bytes[2] < (double)(MANY * (rest + 2 * own)) * sizeof(float))
        fail_msg("%zu bytes without attention's, %zu with: %.0f less, not %.0f", bytes[2], bytes[0], saved, want);
    size_t gradients = (all + rest - (size_t)TOKENS * (2 + 4)) / 2; /* norms' roots and attention's sums have none */
    saved = (double)(bytes[0] - bytes[3]);
    want = (double)(MANY * (gradients - own) - gradients) * sizeof(float);
    if (fabs(saved - want) > 0.02 * want)
        fail_msg("%zu bytes with shared gradients, %zu with all: %.0f less, not %.0f", bytes[3], bytes[0], saved, want);
    model_close(m);
}

/* ---- initial values: every element is what the whole model has ---- */

static void initial_values(void **state)
{
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        struct model *whole, *m;
        must(open_at(variants[i].options, &(struct tp_place){ .size = 1 }, &whole));
        must(params_init(&whole->params, 5));
        for (const int *ranks = variants[i].ranks; *ranks; ranks++)
            for (int r = 0; r < *ranks; r++) {
                must(open_at(variants[i].options, &(struct tp_place){ .size = *ranks, .rank = r }, &m));
                must(params_init(&m->params, 5));
                for (int k = 0; k < m->params.count; k++) {
                    const struct param *p = &m->params.p[k];
                    const float *x = p->value.data, *want = whole->params.p[k].value.data;
                    assert_int_equal(p->offset % PARAM_ALIGN, 0);
                    for (uint64_t e = 0; e < param_elems(p); e++)
                        assert_true(x[e] == (e < box_volume(p->shape.ndim, &p->box) ? want[whole_index(p, e)] : 0));
                }
                assert_int_equal(params_unique_elems(&m->params), params_unique_elems(&whole->params));
                model_close(m);
            }
        model_close(whole);
    }
}

/* Every element of every tensor is on as many ranks as `share` says; equal boxes are neighbours. */
static void parts_tile(void **state)
{
    (void)state;
    for (int i = 0; i < VARIANTS; i++)
        for (const int *ranks = variants[i].ranks; *ranks; ranks++) {
            struct model *m[8];
            for (int r = 0; r < *ranks; r++)
                must(open_at(variants[i].options, &(struct tp_place){ .size = *ranks, .rank = r }, &m[r]));
            for (int k = 0; k < m[0]->params.count; k++) {
                uint64_t held = 0, volume = 1;
                const struct param *first = &m[0]->params.p[k];
                for (int d = 0; d < first->shape.ndim; d++)
                    volume *= first->shape.dim[d];
                for (int r = 0; r < *ranks; r++) {
                    const struct param *p = &m[r]->params.p[k], *leader = &m[r / p->share * p->share]->params.p[k];
                    held += box_volume(p->shape.ndim, &p->box);
                    assert_memory_equal(&p->box, &leader->box, sizeof p->box);
                    assert_int_equal(p->offset, first->offset);
                    assert_int_equal(m[r]->params.total, m[0]->params.total);
                }
                assert_int_equal(held, volume * (uint64_t)first->share);
            }
            for (int r = 0; r < *ranks; r++)
                model_close(m[r]);
        }
}

/* ---- generation ---- */

enum { PROMPTS = 3, NEW = 9 };
static const int32_t prompt_tokens[] = { 4, 17, 2, 30, 9, 21, 36, 0, 5, 11 };
static const struct prompt prompts[PROMPTS] = { { prompt_tokens, 4, 0 },
                                                { prompt_tokens + 4, 1, 1 },
                                                { prompt_tokens + 5, 5, 2 } };

struct generated {
    const struct variant *v;
    struct model *whole;
    bool sequence;
    int32_t token[2][PROMPTS][NEW]; /* greedy, drawn */
    float logp[2][PROMPTS][NEW];
};

static status *generate_all(struct model *m, struct tape *t, struct generated *out)
{
    struct generator *g;
    struct completion c[PROMPTS];
    TRY(generator_open(m, t, NULL, PROMPTS, 5, NEW, &g));
    for (int drawn = 0; drawn < 2; drawn++) {
        struct generate_options o = { .eos = -1, .temperature = drawn ? 0.9f : 0, .seed = 8, .logps = true };
        TRY(generate(g, &o, prompts, PROMPTS, c));
        for (int p = 0; p < PROMPTS; p++) {
            memcpy(out->token[drawn][p], c[p].token, sizeof out->token[drawn][p]);
            memcpy(out->logp[drawn][p], c[p].logp, sizeof out->logp[drawn][p]);
        }
    }
    generator_close(g);
    return NULL;
}

static status *generate_rank(struct comm *c, void *arg)
{
    const struct generated *want = arg;
    struct generated got = { .v = NULL };
    struct model *m;
    struct tape *t;
    TRY(open_at(want->v->options, &(struct tp_place){ .size = c->size, .rank = c->rank, .sequence = want->sequence },
                &m));
    take_parts(m, want->whole);
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_spread(t, c, want->sequence);
    TRY(generate_all(m, t, &got));
    EXPECT(!memcmp(got.token, want->token, sizeof got.token), "other tokens");
    for (size_t i = 0; i < sizeof got.logp / sizeof(float); i++) {
        double a = (double)((float *)got.logp)[i], b = (double)((const float *)want->logp)[i];
        EXPECT(rel(a, b) < 1e-5, "logp %zu is %g, not %g", i, a, b);
    }
    TRY(same_on_all(c, got.logp, sizeof got.logp, "log-probabilities"));
    tape_close(t);
    model_close(m);
    return NULL;
}

static void generation(void **state)
{
    (void)state;
    for (int i = 0; i < VARIANTS; i++) {
        struct generated w = { .v = &variants[i] };
        struct tape *t;
        must(open_at(w.v->options, &(struct tp_place){ .size = 1 }, &w.whole));
        stir(w.whole);
        must(tape_open(NULL, NULL, 0, &t));
        must(generate_all(w.whole, t, &w));
        tape_close(t);
        for (const int *ranks = variants[i].ranks; *ranks; ranks++) {
            w.sequence = !w.sequence;
            must(status_wrap(comm_threads_run(*ranks, generate_rank, &w), "%s, tp %d", variants[i].name, *ranks));
        }
        model_close(w.whole);
    }
}

/* ---- what cannot be ---- */

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *options;
        int ranks;
        const char *words;
    } bad[] = {
        { "heads=6,kv_heads=3,hidden=24,ffn=24", 4,
          "parallel.tp: 4 does not fit model.heads: 6 (this model can be cut over 1, 3, 6 ranks)" },
        { "heads=8,kv_heads=8,hidden=24,ffn=24,head_dim=4", 3, "model.heads: 8" },
        { "heads=12,kv_heads=6,hidden=24,ffn=24", 4,
          "model.kv_heads: 6 (this model can be cut over 1, 2, 3, 6 ranks)" },
        { "heads=4,kv_heads=4,hidden=24,ffn=30", 4, "model.ffn: 30 (this model can be cut over 1, 2 ranks)" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct model *m = NULL;
        FAILS(ST_INVALID, bad[i].words, open_at(bad[i].options, &(struct tp_place){ .size = bad[i].ranks }, &m));
    }
    struct model *m;
    struct tape *t;
    struct batch b;
    struct tensor *logp;
    fill(&b, TOKENS);
    must(open_at(variants[0].options, &(struct tp_place){ .size = 2 }, &m));
    must(tape_open(NULL, NULL, 0, &t));
    FAILS(ST_INVALID, "the tape is not spread", run_model(m, t, &b, TAPE_FORWARD, &logp, NULL));
    tape_close(t);
    model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parts_tile),
        cmocka_unit_test(initial_values),
        cmocka_unit_test(ops_against_formulas),
        cmocka_unit_test(against_whole),
        cmocka_unit_test(recompute_holds_one_block),
        cmocka_unit_test(generation),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
