/* bench_train: training steps of a model on the CPU, beside the same steps in PyTorch and beside the step's products
 * and updates alone, in turns in one run.
 *
 *   rounds:  {steps of ours, as many of the peer, the ceiling as often}; again; ...
 *   a step:  forward, cross entropy, backward, norm and clip, AdamW, as `tessera train` does them for algo.kind: sft
 *
 * (1) What each of them needs is there and touched before the first round, by a step that is not counted. (2) Every
 * token of a pack of `sequences` x `tokens` is scored. (3) A figure is the median over rounds. */
#include "trainer/bench/bench.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/bench/ceiling.h"
#include "trainer/bench/measure.h"
#include "trainer/bench/peer.h"
#include "trainer/optim/optim.h"
#include "trainer/parallel/pipe.h"
#include "trainer/parallel/zero.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ROUNDS = 64 };

struct train_options {
    int64_t threads, sequences, tokens, steps, repeats;
    int model, dtype;
    char *peer;
    bool compile;
};

#define AT(field) offsetof(struct train_options, field)
static const struct option rows[] = {
    { "model", OPT_ENUM, "all", 0, 0, "all|124m|135m|tiny", "",
      "124m: 12 layers of 768, vocabulary 50,257; 135m: SmolLM2, 30 layers of 576; all: both", AT(model) },
    { "dtype", OPT_ENUM, "all", 0, 0, "all|f32|bf16", "", "of the matrix products", AT(dtype) },
    { "sequences", OPT_INT, "4", 1, 1e4, NULL, "", "in a step", AT(sequences) },
    { "tokens", OPT_INT, "0", 0, 1e5, NULL, "tokens", "of a sequence; 0: 64, and then 256", AT(tokens) },
    { "threads", OPT_INT, "2", 1, 1024, NULL, "", "of ours and of the peer", AT(threads) },
    { "steps", OPT_INT, "1", 1, 1e4, NULL, "", "of each in a round", AT(steps) },
    { "repeats", OPT_INT, "5", 1, ROUNDS, NULL, "", "rounds", AT(repeats) },
    { "peer", OPT_STRING, "", 0, 0, NULL, "", "a Python with PyTorch; empty: python3, if it has PyTorch; none: no peer",
      AT(peer) },
    { "compile", OPT_BOOL, "true", 0, 0, NULL, "", "let the peer use torch.compile where that is faster", AT(compile) },
};
static const char *const quick[][2] = {
    { "model", "tiny" }, { "tokens", "16" }, { "repeats", "2" }, { "peer", "none" }, { NULL, NULL },
};

struct sizes {
    const char *name;
    int layers, hidden, heads, kv_heads, ffn, vocab;
};
static const struct sizes shapes[] = {
    { "all", 0, 0, 0, 0, 0, 0 },
    { "124M", 12, 768, 12, 12, 2048, 50257 },
    { "135M", 30, 576, 9, 3, 1536, 49152 },
    { "tiny", 2, 64, 4, 2, 96, 521 },
};
enum { SHAPES = sizeof shapes / sizeof *shapes, TINY = SHAPES - 1 };

static const char *const dtypes[] = { "all", "f32", "bf16" };
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

/* One model at work. */
struct train_bench {
    struct bench *b;
    const struct train_options *o;
    const struct sizes *shape;
    const char *dtype;
    struct model *m;
    struct workers *workers;
    struct pipe *pipe;
    struct zero *zero;
    struct peer *peer;
    struct ceiling ceiling;
    struct model_input in;
    int32_t *token, *target, *position, *offset; /* [N] each, offset [sequences + 1] */
    struct logprob_stats stats;
    uint64_t step;
    double loss, ours[ROUNDS], theirs[ROUNDS], bound[ROUNDS]; /* seconds of a step */
};

/* ---- a step */

static int64_t prepare(void *arg, uint32_t k)
{
    (void)k;
    return ((struct train_bench *)arg)->in.tokens;
}

static struct tensor *forward(void *arg, struct tape *tape, int chunk, struct tensor *x)
{
    struct train_bench *t = arg;
    (void)chunk;
    t->in.x = x;
    struct tensor *h = t->m->ops->forward(t->m, tape, &t->in);
    return op_logprob_stats(tape, h, t->m->ops->head(t->m), t->target, 1.0f, &t->stats);
}

static void loss(void *arg, uint32_t k, struct tensor *logp)
{
    struct train_bench *t = arg;
    const float *x = logp->data;
    (void)k;
    t->loss = 0;
    for (int64_t i = 0; i < t->in.tokens; i++) {
        t->loss -= (double)x[i] / (double)t->in.tokens;
        logp->grad[i] = -1.0f / (float)t->in.tokens;
    }
}

static status *added(void *arg, uint32_t k, int chunk)
{
    return zero_added_chunk(((struct train_bench *)arg)->zero, k, chunk);
}

static struct pipe_work work_of(struct train_bench *t)
{
    return (struct pipe_work){ .prepare = prepare, .forward = forward, .result = loss, .added = added, .arg = t };
}

static status *train_step(struct train_bench *t)
{
    struct pipe_work w = work_of(t);
    double norm;
    zero_begin(t->zero, 1);
    TRY(pipe_train(t->pipe, 0, 1, &w));
    TRY(zero_reduce(t->zero, &norm));
    const struct adamw a = { 1e-4, 0.9, 0.95, 1e-8, 0.1, clip_scale(1, norm), ++t->step };
    TRY(zero_update(t->zero, &a, NULL, NULL));
    return isfinite(t->loss) && isfinite(norm)
               ? NULL
               : ERR(CORRUPT, "step %llu: loss %g, norm %g", (unsigned long long)t->step, t->loss, norm);
}

/* ---- open */

static status *set_int(void *config, const char *key, int value)
{
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    const struct model_ops *ops;
    TRY(model_lookup("llama", &ops));
    return options_set(ops->options, key, text, config, "bench train");
}

static status *configure(const struct sizes *s, void *config)
{
    const struct {
        const char *key;
        int value;
    } sizes[] = { { "layers", s->layers },     { "hidden", s->hidden }, { "heads", s->heads },
                  { "kv_heads", s->kv_heads }, { "ffn", s->ffn },       { "vocab", s->vocab },
                  { "max_positions", 1 << 20 } };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        TRY(set_int(config, sizes[i].key, sizes[i].value));
    return NULL;
}

static status *open_model(struct train_bench *t)
{
    const struct model_ops *ops;
    TRY(model_lookup("llama", &ops));
    void *config = mem_calloc(1, ops->config_bytes);
    if (!config)
        return ERR(NO_MEMORY, "a config");
    status *st = options_defaults(ops->options, config);
    if (!st)
        st = configure(t->shape, config);
    if (!st)
        st = options_set(ops->options, "tied", "true", config, "bench train");
    if (!st)
        st = model_open(ops, config, t->shape->vocab, &t->m);
    options_fini(ops->options, config);
    mem_free(config);
    if (!st)
        st = model_alloc(t->m, true);
    if (!st)
        params_init(&t->m->params, 1);
    return st;
}

/* Sequences of any tokens; the target of each is the next one. */
static status *open_tokens(struct train_bench *t, int64_t length)
{
    int64_t n = t->o->sequences * length;
    t->token = mem_array(NULL, (size_t)(4 * n + 2), sizeof *t->token);
    if (!t->token)
        return ERR(NO_MEMORY, "%lld tokens", (long long)n);
    t->target = t->token + 1;
    t->position = t->token + n + 1;
    t->offset = t->position + n;
    uint32_t x = 1;
    for (int64_t i = 0; i <= n; i++) {
        x = x * 1664525u + 1013904223u; /* Knuth's quick and dirty one, as in Numerical Recipes, 7.1 */
        t->token[i] = (int32_t)((x >> 8) % (uint32_t)t->shape->vocab);
    }
    for (int64_t i = 0; i < n; i++)
        t->position[i] = (int32_t)(i % length);
    for (int64_t s = 0; s <= t->o->sequences; s++)
        t->offset[s] = (int32_t)(s * length);
    t->in = (struct model_input){ .tokens = n,
                                  .token = t->token,
                                  .seg = { (int32_t)t->o->sequences, t->offset, t->position } };
    return NULL;
}

static status *open_ours(struct train_bench *t, int64_t length)
{
    struct pipe_work w = work_of(t);
    bool bf16 = !strcmp(t->dtype, "bf16");
    TRY(workers_open((int)t->o->threads, &t->workers));
    const struct zero_options zero = { .micro_batches = 1, .workers = t->workers };
    TRY(open_model(t));
    TRY(open_tokens(t, length));
    TRY(pipe_open(NULL, PIPE_1F1B, 1, 1, t->m->width, t->workers, NULL, 0, &t->pipe));
    tape_bf16(pipe_tape(t->pipe, 0), bf16);
    TRY(zero_open(&zero, &t->m->params, t->b->world, &t->zero));
    TRY(pipe_dry(t->pipe, t->in.tokens, &w));
    struct zero_moments z = zero_moments(t->zero);
    t->ceiling = (struct ceiling){ t->m, t->workers, t->in.tokens, bf16, .moment = z.m, .v = z.v };
    return ceiling_open(&t->ceiling);
}

static status *open_peer(struct train_bench *t, int64_t length)
{
    const struct sizes *s = t->shape;
    char sizes[400];
    if (!strcmp(t->o->peer, "none"))
        return NULL;
    snprintf(sizes, sizeof sizes,
             "{\"layers\": %d, \"hidden\": %d, \"heads\": %d, \"kv_heads\": %d, \"ffn\": %d, \"vocab\": %d, "
             "\"sequences\": %lld, \"tokens\": %lld, \"threads\": %lld, \"dtype\": \"%s\", \"compile\": %s, "
             "\"eps\": 1e-5, \"theta\": 10000.0}",
             s->layers, s->hidden, s->heads, s->kv_heads, s->ffn, s->vocab, (long long)t->o->sequences,
             (long long)length, (long long)t->o->threads, t->dtype, t->o->compile ? "true" : "false");
    return peer_open(t->o->peer, sizes, &t->peer);
}

static void close_all(struct train_bench *t)
{
    peer_close(t->peer);
    ceiling_close(&t->ceiling);
    zero_close(t->zero);
    pipe_close(t->pipe);
    mem_free(t->token);
    model_close(t->m);
    workers_close(t->workers);
}

/* ---- rounds */

static status *run_round(struct train_bench *t, int64_t round, int64_t steps)
{
    uint64_t t0 = clock_ns();
    for (int64_t i = 0; i < steps; i++)
        TRY(train_step(t));
    t->ours[round] = ns_to_s(clock_ns() - t0) / (double)steps;
    if (t->peer) {
        TRY(peer_run(t->peer, (int)steps, &t->theirs[round]));
        t->theirs[round] /= (double)steps;
    }
    t0 = clock_ns();
    for (int64_t i = 0; i < steps; i++)
        ceiling_run(&t->ceiling);
    t->bound[round] = ns_to_s(clock_ns() - t0) / (double)steps;
    return NULL;
}

static void report(struct train_bench *t, int64_t length)
{
    size_t n = (size_t)t->o->repeats;
    char model[64];
    snprintf(model, sizeof model, "%s %lldx%lld", t->shape->name, (long long)t->o->sequences, (long long)length);
    double tokens = (double)t->in.tokens, ours = tokens / median_of(t->ours, n);
    double theirs = t->peer ? tokens / median_of(t->theirs, n) : NAN, bound = tokens / median_of(t->bound, n);
    const struct figure f[] = {
        { "model", 0, model, 0, "sequences x tokens of a step" },
        { "params", (double)params_unique_elems(&t->m->params), NULL, 0, "" },
        { "dtype", 0, t->dtype, 0, "of the matrix products; weights and moments are f32" },
        { "threads", (double)t->o->threads, NULL, 0, "" },
        { "tokens_per_s", ours, NULL, 2, "forward, loss, backward, clip, AdamW; median over rounds" },
        { "peer", NAN, t->peer ? peer_name(t->peer) : NULL, 0, "" },
        { "peer_tokens_per_s", theirs, NULL, 2, "its steps, in turns with ours" },
        { "ratio", ours / theirs, NULL, 3, "ours to the peer's" },
        { "ceiling_tokens_per_s", bound, NULL, 2, "the step's matrix products and AdamW alone" },
        { "ceiling_share", ours / bound, NULL, 3, "ours to that" },
    };
    bench_print(t->b, f, sizeof f / sizeof *f);
}

static status *run_case(struct bench *b, const struct train_options *o, int shape, int dtype, int64_t length)
{
    struct train_bench *t = mem_calloc(1, sizeof *t);
    if (!t)
        return ERR(NO_MEMORY, "samples");
    t->b = b;
    t->o = o;
    t->shape = &shapes[shape];
    t->dtype = dtypes[dtype];
    status *st = open_ours(t, length);
    if (!st)
        st = open_peer(t, length);
    if (!st)
        st = run_round(t, 0, 1); /* not counted: it touches all memory */
    for (int64_t r = 0; !st && r < o->repeats; r++)
        st = run_round(t, r, o->steps);
    if (!st)
        report(t, length);
    close_all(t);
    mem_free(t);
    return st;
}

static status *run(struct bench *b, const void *options)
{
    const struct train_options *o = options;
    const int64_t length[] = { o->tokens ? o->tokens : 64, 256 };
    if (b->world->size > 1)
        return ERR(INVALID, "bench train measures one rank and its threads, not %d ranks", b->world->size);
    for (int s = 1; s < SHAPES; s++)
        for (int d = 1; d < DTYPES; d++)
            for (int l = 0; l < (o->tokens ? 1 : 2); l++)
                if ((o->model ? o->model == s : s != TINY) && (!o->dtype || o->dtype == d))
                    TRY(run_case(b, o, s, d, length[l]));
    return NULL;
}

const struct bench_verb bench_train = {
    "train",
    "training steps on the CPU beside PyTorch's, and beside the step's matrix products alone; one rank",
    { "", rows, sizeof rows / sizeof *rows },
    sizeof(struct train_options),
    BENCH_NO_URL,
    false,
    quick,
    run,
};
