/* Context parallelism: ranks (threads of this process) that share the tokens of a pack. Attention against a plain
 * softmax in double over all tokens, its gradients against finite differences of that; a model against the same model
 * on one rank: log-probabilities and what goes with them, gradients of every tensor; bytes that ranks exchange; memory
 * of a dry pass. Sequences of one token, windows, token counts that ranks do not divide, more ranks than tokens. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "trainer/model/model.h"

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

static void must(status *st)
{
    if (st)
        fail_msg("%s (rank %d, %s:%d)", status_message(st), status_rank(st), status_file(st), status_line(st));
}

static float number(uint32_t what, uint64_t i)
{
    float z;
    rng_normals((struct rng_at){ .seed = 4, .sample = what, .stream = RNG_DATA }, i, 1, &z);
    return z;
}

/* Which token of the pack row j of this rank is. */
static int64_t token_of(const struct comm *c, int64_t j)
{
    return j * c->size + c->rank;
}

static int64_t rows_of(const struct comm *c, int64_t tokens)
{
    return (tokens + c->size - 1) / c->size;
}

/* ---- attention ---- */

enum { SEGMENTS = 6, MOST = 400, DIM_MAX = 20 };
struct shape_case {
    int heads, kv_heads, dim;
    int64_t window;
    int32_t length[SEGMENTS + 1]; /* ended by -1 */
};
static const struct shape_case shapes[] = {
    { 2, 1, 6, 0, { 1, -1 } },           { 2, 2, 4, 0, { 1, 1, 1, -1 } },       { 4, 2, 8, 0, { 5, 1, 0, 17, 2, -1 } },
    { 2, 1, 20, 0, { 131, 3, 70, -1 } }, { 3, 1, 10, 5, { 64, 1, 9, 33, -1 } }, { 2, 1, 8, 70, { 211, 66, -1 } },
    { 1, 1, 7, 1, { 13, 2, -1 } },       { 2, 2, 16, 0, { 257, -1 } },          { 2, 1, 8, 0, { 0, 9, 0, 0, -1 } },
};
enum { Q, K, V, DO, INPUTS };

struct plain {
    const struct shape_case *s;
    int32_t segments, offset[SEGMENTS + 1];
    int32_t position[MOST];
    int64_t n;
    double x[INPUTS][MOST * 4 * DIM_MAX];
};

static int heads_of(const struct shape_case *s, int what)
{
    return what == K || what == V ? s->kv_heads : s->heads;
}

static void fill_plain(struct plain *p, const struct shape_case *s)
{
    *p = (struct plain){ .s = s };
    for (; s->length[p->segments] >= 0; p->segments++) {
        for (int32_t i = 0; i < s->length[p->segments]; i++)
            p->position[p->n + i] = i;
        p->n += s->length[p->segments];
        p->offset[p->segments + 1] = (int32_t)p->n;
    }
    for (int what = 0; what < INPUTS; what++)
        for (int64_t i = 0; i < p->n * heads_of(s, what) * s->dim; i++)
            p->x[what][i] = (double)number((uint32_t)what, (uint64_t)i);
}

/* o of token i, head h: a whole row of scores, as the formula has it. */
static void plain_row(const struct plain *p, int64_t i, int h, double *o)
{
    const struct shape_case *s = p->s;
    double p_of[MOST], most = -INFINITY, sum = 0;
    int d = s->dim, g = h / (s->heads / s->kv_heads);
    for (int64_t j = i - p->position[i]; j <= i; j++) {
        p_of[j] = 0;
        for (int e = 0; e < d; e++)
            p_of[j] += p->x[Q][(i * s->heads + h) * d + e] * p->x[K][(j * s->kv_heads + g) * d + e] / sqrt(d);
        if (s->window && j <= i - s->window)
            p_of[j] = -INFINITY;
        most = fmax(most, p_of[j]);
    }
    memset(o, 0, (size_t)d * sizeof *o);
    for (int64_t j = i - p->position[i]; j <= i; j++)
        sum += p_of[j] = exp(p_of[j] - most);
    for (int64_t j = i - p->position[i]; j <= i; j++)
        for (int e = 0; e < d; e++)
            o[e] += p_of[j] / sum * p->x[V][(j * s->kv_heads + g) * d + e];
}

/* sum of dO o over the tokens of i's sequence: what an element of token i's q, k or v may change. */
static double plain_loss(const struct plain *p, int64_t i)
{
    double sum = 0, o[DIM_MAX];
    for (int64_t j = i - p->position[i]; j < p->n && (j <= i || p->position[j]); j++)
        for (int h = 0; h < p->s->heads; h++) {
            plain_row(p, j, h, o);
            for (int e = 0; e < p->s->dim; e++)
                sum += o[e] * p->x[DO][(j * p->s->heads + h) * p->s->dim + e];
        }
    return sum;
}

static double difference(struct plain *p, int what, int64_t i, int64_t at)
{
    const double step = 1e-5, was = p->x[what][at];
    p->x[what][at] = was + step;
    double up = plain_loss(p, i);
    p->x[what][at] = was - step;
    double down = plain_loss(p, i);
    p->x[what][at] = was;
    return (up - down) / (2 * step);
}

static bool near(double got, double want, double tolerance)
{
    return fabs(got - want) <= tolerance * (1 + fabs(want));
}

static struct tensor part_of(const struct plain *p, const struct comm *c, int what, float *data, float *grad)
{
    int64_t rows = rows_of(c, p->n), row = (int64_t)heads_of(p->s, what) * p->s->dim;
    for (int64_t j = 0; j < rows; j++)
        for (int64_t e = 0; e < row; e++) /* what lies in rows of no token must not matter */
            data[j * row + e] = token_of(c, j) < p->n ? (float)p->x[what][token_of(c, j) * row + e] : 7.0f;
    return (struct tensor){
        .dtype = DTYPE_F32, .ndim = 3, .dim = { rows, heads_of(p->s, what), p->s->dim }, .data = data, .grad = grad
    };
}

static status *check_attention(struct plain *p, const struct comm *c, const struct tensor *o, struct tensor *x)
{
    static const char *const names[] = { "dq", "dk", "dv" };
    int d = p->s->dim;
    int64_t every = p->n > 100 ? 11 : p->n > 30 ? 5 : 1; /* so that each rank has some */
    for (int64_t j = 0; j < o->dim[0]; j++) {
        int64_t i = token_of(c, j);
        const float *row = (const float *)o->data + j * p->s->heads * d;
        double want[DIM_MAX];
        for (int h = 0; h < p->s->heads; h++) {
            memset(want, 0, sizeof want);
            if (i < p->n)
                plain_row(p, i, h, want);
            for (int e = 0; e < d; e++)
                EXPECT(near((double)row[h * d + e], want[e], 3e-6), "o of token %lld is %.9g, not %.9g", (long long)i,
                       (double)row[h * d + e], want[e]);
        }
        /* an element of each input of this token, another one a token; of long packs not of all tokens */
        for (int what = Q; i < p->n && i % every == 0 && what <= V; what++) {
            int64_t width = (int64_t)heads_of(p->s, what) * d, at = i * width + i * 5 % width;
            double got = (double)((float *)x[what].grad)[j * width + i * 5 % width],
                   want_it = difference(p, what, i, at);
            EXPECT(near(got, want_it, 2e-5), "%s of token %lld is %.9g, not %.9g", names[what], (long long)i, got,
                   want_it);
        }
    }
    return NULL;
}

/* All gathers and sums of an attention: keys and values forward, and again in backward, and their gradients' sums. */
static status *check_sent(const struct plain *p, struct comm *c)
{
    uint64_t own = (uint64_t)(rows_of(c, p->n) * p->s->kv_heads * p->s->dim) * sizeof(float),
             want = c->size > 1 ? 6 * (uint64_t)(c->size - 1) * own : 0;
    EXPECT(c->sent_bytes == want, "%llu bytes were sent, not %llu", (unsigned long long)c->sent_bytes,
           (unsigned long long)want);
    return NULL;
}

static status *attention_rank(struct comm *world, void *arg)
{
    const struct shape_case *s = arg;
    struct plain *p = mem_alloc(sizeof *p);
    struct tape *t = NULL;
    struct comm *c = NULL;
    struct tensor x[INPUTS];
    float *data[INPUTS], *grad[INPUTS];
    int32_t position[MOST];
    fill_plain(p, s);
    for (int what = 0; what < INPUTS; what++) {
        size_t elems = (size_t)(rows_of(world, p->n) * s->heads * s->dim);
        data[what] = mem_alloc(elems * sizeof(float));
        grad[what] = mem_calloc(elems, sizeof(float));
        x[what] = part_of(p, world, what, data[what], grad[what]);
    }
    for (int64_t j = 0; j < x[Q].dim[0]; j++)
        position[j] = token_of(world, j) < p->n ? p->position[token_of(world, j)] : 0;
    for (int64_t e = 0, n = tensor_elems(&x[DO]), row = n / x[DO].dim[0]; e < n; e++)
        if (token_of(world, e / row) >= p->n)
            data[DO][e] = 0;
    struct segments seg = { p->segments, p->offset, position };
    TRY(comm_dup(world, &c));
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_context(t, c);
    tape_begin(t, TAPE_DRY);
    (void)op_attention(t, &x[Q], &x[K], &x[V], &seg, s->window, NULL);
    TRY(tape_end(t));
    uint64_t grown = t->arena.grown;
    tape_begin(t, TAPE_TRAIN);
    struct tensor *o = op_attention(t, &x[Q], &x[K], &x[V], &seg, s->window, NULL);
    TRY(tape_end(t));
    TRY(tape_backward(t, o, data[DO], TAPE_BACKWARD_ALL));
    EXPECT(t->arena.grown == grown, "a real pass takes more than a dry one");
    status *st = check_attention(p, world, o, x);
    if (!st)
        st = check_sent(p, c);
    tape_close(t);
    comm_close(c);
    for (int what = 0; what < INPUTS; what++) {
        mem_free(data[what]);
        mem_free(grad[what]);
    }
    mem_free(p);
    return st;
}

static void attention_against_differences(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int ranks = 1; ranks <= 7; ranks += ranks < 3 ? 1 : 4) {
            struct shape_case s = shapes[i];
            must(status_wrap(comm_threads_run(ranks, attention_rank, &s), "shape %zu on %d ranks", i, ranks));
        }
}

/* What cannot be: offsets of another pack, positions that do not ascend, a cache. */
static status *refused_rank(struct comm *c, void *arg)
{
    (void)arg;
    float data[8] = { 0 };
    int32_t good[] = { 0, 3 }, bad[] = { 0, 5 }, position[] = { c->rank, c->rank + 2 }, same[] = { 1, 1 };
    int32_t len = 0;
    struct kv_cache cache = { 1, 8, 1, 2, data, data, &len };
    struct tensor x = { .dtype = DTYPE_F32, .ndim = 3, .dim = { 2, 1, 2 }, .data = data };
    const struct {
        struct segments seg;
        struct kv_cache *cache;
        const char *words;
    } cases[] = { { { 1, bad, position }, NULL, "5" },
                  { { 1, good, same }, NULL, c->rank ? "" : "does not ascend" },
                  { { 1, good, position }, &cache, "cache" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tape *t;
        if (!*cases[i].words)
            continue;
        TRY(tape_open(NULL, NULL, 0, &t));
        tape_context(t, c);
        tape_begin(t, TAPE_FORWARD);
        (void)op_attention(t, &x, &x, &x, &cases[i].seg, 0, cases[i].cache);
        status *st = tape_end(t);
        bool right = status_code(st) == ST_INVALID && strstr(status_message(st), cases[i].words);
        status_free(st);
        tape_close(t);
        EXPECT(right, "case %zu", i);
    }
    return NULL;
}

static void attention_refuses(void **state)
{
    (void)state;
    must(comm_threads_run(2, refused_rank, NULL));
}

/* ---- a model ---- */

enum { VOCAB = 37, TOKENS = 51, SEQUENCES = 4, LAYERS = 2, VALUES = 5 };
static const int32_t offsets[SEQUENCES + 1] = { 0, 23, 24, 50, TOKENS };

static const char *const models[] = {
    "heads=4,kv_heads=2,hidden=24,ffn=40,tied=true",
    "heads=8,kv_heads=2,head_dim=6,hidden=20,ffn=24,qk_norm=true,sliding_window=7,window_from=1",
    "heads=4,kv_heads=1,hidden=24,ffn=40,qkv_bias=true",
};

static status *open_model(const char *options, struct model **out)
{
    char text[256];
    const struct model_ops *ops = NULL;
    TRY(model_lookup("llama", &ops));
    void *config = mem_calloc(1, ops->config_bytes);
    TRY(options_defaults(ops->options, config));
    snprintf(text, sizeof text, "layers=%d,rope_theta=100,%s", LAYERS, options);
    for (char *save = NULL, *pair = strtok_r(text, ",", &save); pair; pair = strtok_r(NULL, ",", &save)) {
        char *equal = strchr(pair, '=');
        *equal = 0;
        TRY(options_set(ops->options, pair, equal + 1, config, "test"));
    }
    status *st = model_open(ops, config, VOCAB, out);
    options_fini(ops->options, config);
    mem_free(config);
    TRY(st);
    TRY(model_alloc(*out, true));
    for (int i = 0; i < (*out)->params.count; i++) {
        const struct param *p = &(*out)->params.p[i];
        for (int64_t e = 0; p->alias < 0 && e < tensor_elems(&p->value); e++) {
            float z = number(100 + (uint32_t)i, (uint64_t)e);
            ((float *)p->value.data)[e] = p->init == INIT_NORMAL ? 0.25f * z : p->init == INIT_ONE ? 1 + 0.3f * z : z;
        }
    }
    return NULL;
}

struct batch {
    int64_t tokens; /* of all ranks */
    int32_t token[TOKENS], target[TOKENS], position[TOKENS], offset[SEQUENCES + 1];
    float weight[TOKENS]; /* of all tokens */
    struct model_input in;
};

/* The first n tokens; this rank's are what the model gets. */
static void fill(struct batch *b, const struct comm *c, int64_t n)
{
    int32_t segments = 0;
    b->tokens = n;
    b->offset[0] = 0;
    for (; b->offset[segments] < n; segments++)
        b->offset[segments + 1] = offsets[segments + 1] < n ? offsets[segments + 1] : (int32_t)n;
    for (int64_t j = 0; j < rows_of(c, n); j++) {
        int64_t i = token_of(c, j);
        int32_t s = 0;
        while (i < n && offsets[s + 1] <= i)
            s++;
        b->token[j] = i < n ? (int32_t)(i * 11 + 3) % VOCAB : 0;
        b->target[j] = i >= n || i % 4 == 1 ? -1 : (int32_t)(i * 7 + 5) % VOCAB;
        b->position[j] = i < n ? (int32_t)i - offsets[s] : 0;
    }
    for (int i = 0; i < n; i++)
        b->weight[i] = 0.3f * (float)(i % 7) - 0.8f;
    b->in =
        (struct model_input){ .tokens = rows_of(c, n), .token = b->token, .seg = { segments, b->offset, b->position } };
}

static struct tensor *forward(struct model *m, struct tape *t, const struct batch *b, enum tape_mode mode,
                              struct logprob_stats *stats)
{
    tape_begin(t, mode);
    struct tensor *h = m->ops->forward(m, t, &b->in);
    return op_all_tokens(t, op_logprob_stats(t, h, m->ops->head(m), b->target, 0.8f, stats), b->tokens, stats);
}

struct outcome {
    float value[VALUES][TOKENS]; /* logp, entropy, logit, log_square, top */
    float *grad;
};

static status *run_model(struct model *m, struct tape *t, const struct batch *b, bool halves, struct outcome *o)
{
    struct logprob_stats s;
    memset(m->params.grad, 0, m->params.total * sizeof(float));
    struct tensor *logp = forward(m, t, b, TAPE_TRAIN, &s);
    TRY(tape_end(t));
    const float *const from[VALUES] = { logp->data, s.entropy, s.logit, s.log_square, s.top };
    for (int v = 0; v < VALUES; v++)
        memcpy(o->value[v], from[v], (size_t)b->tokens * sizeof(float));
    if (!halves)
        return tape_backward(t, logp, b->weight, TAPE_BACKWARD_ALL);
    TRY(tape_backward(t, logp, b->weight, TAPE_BACKWARD_INPUT));
    return tape_backward(t, logp, NULL, TAPE_BACKWARD_WEIGHT);
}

struct model_case {
    const char *options;
    int64_t tokens;
    struct outcome whole;
};

static status *whole_model(struct comm *self, void *arg)
{
    struct model_case *w = arg;
    struct model *m;
    struct tape *t;
    struct batch b;
    fill(&b, self, w->tokens);
    TRY(open_model(w->options, &m));
    TRY(tape_open(NULL, NULL, 0, &t));
    TRY(run_model(m, t, &b, false, &w->whole));
    w->whole.grad = mem_alloc(m->params.total * sizeof(float));
    memcpy(w->whole.grad, m->params.grad, m->params.total * sizeof(float));
    tape_close(t);
    model_close(m);
    return NULL;
}

/* ||g - g'|| / ||g|| of every tensor, the ranks' gradients added up. */
static status *check_gradients(struct comm *c, const struct model *m, const float *want)
{
    float *sum = mem_alloc(m->params.total * sizeof *sum);
    memcpy(sum, m->params.grad, m->params.total * sizeof *sum);
    TRY(comm_allreduce(c, sum, m->params.total, COMM_F32, COMM_SUM, NULL));
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        double off = 0, all = 0;
        for (uint64_t e = p->offset; p->alias < 0 && e < p->offset + param_elems(p); e++) {
            double d = (double)sum[e] - (double)want[e];
            off += d * d;
            all += (double)want[e] * (double)want[e];
        }
        EXPECT(p->alias >= 0 || (isfinite(off) && sqrt(off) <= 1e-5 * sqrt(all)), "gradient of %s: off by %.3g of %.3g",
               p->name, sqrt(off), sqrt(all));
    }
    mem_free(sum);
    return NULL;
}

/* A dry pass takes what a real one takes. */
static status *check_memory(struct model *m, struct tape *t, const struct batch *b)
{
    struct logprob_stats s;
    (void)forward(m, t, b, TAPE_DRY, &s);
    TRY(tape_end(t));
    uint64_t grown = t->arena.grown;
    struct outcome o;
    TRY(run_model(m, t, b, false, &o));
    (void)forward(m, t, b, TAPE_FORWARD, &s);
    TRY(tape_end(t));
    EXPECT(t->arena.grown == grown, "a real pass takes more than a dry one");
    return NULL;
}

static status *model_rank(struct comm *world, void *arg)
{
    const struct model_case *w = arg;
    struct model *m;
    struct tape *t;
    struct batch b;
    struct outcome o;
    struct comm *c;
    fill(&b, world, w->tokens);
    TRY(comm_dup(world, &c));
    TRY(open_model(w->options, &m));
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_context(t, c);
    for (int round = 0; round < 6; round++) {
        tape_recompute(t, (enum tape_recompute)(round % 3));
        TRY(check_memory(m, t, &b));
        TRY(run_model(m, t, &b, round > 2, &o));
        for (int v = 0; v < VALUES; v++)
            for (int i = 0; i < b.tokens; i++)
                EXPECT(near((double)o.value[v][i], (double)w->whole.value[v][i], 1e-5),
                       "value %d of token %d is %.9g, not %.9g", v, i, (double)o.value[v][i],
                       (double)w->whole.value[v][i]);
        TRY(check_gradients(world, m, w->whole.grad));
    }
    tape_close(t);
    comm_close(c);
    model_close(m);
    return NULL;
}

static void models_as_on_one_rank(void **state)
{
    (void)state;
    static const int64_t lengths[] = { TOKENS, 50, 24, 3 };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) {
            struct model_case w = { models[i], lengths[n], { .grad = NULL } };
            must(comm_threads_run(1, whole_model, &w));
            for (int ranks = 2; ranks <= 5; ranks += 1 + (int)(n % 2))
                must(status_wrap(comm_threads_run(ranks, model_rank, &w), "%s, %lld tokens, %d ranks", models[i],
                                 (long long)lengths[n], ranks));
            mem_free(w.whole.grad);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_against_differences),
        cmocka_unit_test(attention_refuses),
        cmocka_unit_test(models_as_on_one_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
