/* bench_train: training steps of a model, beside the same steps in PyTorch and beside the step's products and updates
 * alone, in turns in one run.
 *
 *   rounds:  {steps of ours, as many of the peer, the ceiling as often}; again; ...
 *   a step:  forward, cross entropy, backward, norm and clip, AdamW, as `tessera train` does them for algo.kind: sft
 *
 * (1) What each of them needs is there and touched before the first round, by a step that is not counted. (2) Every
 * token of a pack of `sequences` x `tokens` is scored. (3) A figure is the median over rounds. (4) A GPU has no room
 * for ours and the peer: there all rounds of ours come first, then ours gives its memory back. Times end when the GPU
 * has done what was queued. */
#include "trainer/bench/bench.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/bench/ceiling.h"
#include "trainer/bench/measure.h"
#include "trainer/bench/peer.h"
#include "trainer/bench/site.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/pipe.h"
#include "trainer/parallel/zero.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ROUNDS = 64 };

struct train_options {
    int64_t threads, sequences, tokens, steps, repeats, matmul;
    int device, model, dtype;
    char *peer;
    bool compile;
};

#define AT(field) offsetof(struct train_options, field)
static const struct option rows[] = {
    { "device", OPT_ENUM, "cpu", 0, 0, "cpu|cuda", "", "", AT(device) },
    { "model", OPT_ENUM, "all", 0, 0, "all|124m|135m|350m|1.5b|tiny", "",
      "124m: 12 layers of 768, vocabulary 50,257; 135m: SmolLM2, 30 layers of 576; 350m: 24 of 1,024; 1.5b: 28 of "
      "2,048; all: 124m and 135m, on a GPU 124m, 350m and 1.5b",
      AT(model) },
    { "dtype", OPT_ENUM, "all", 0, 0, "all|f32|bf16", "", "of the matrix products; all: both, on a GPU bf16",
      AT(dtype) },
    { "sequences", OPT_INT, "0", 0, 1e4, NULL, "",
      "in a step; 0: 4, on a GPU as many as make 16,384 tokens of 124m and 135m, 8,192 of 350m and 4,096 of 1.5b",
      AT(sequences) },
    { "tokens", OPT_INT, "0", 0, 1e5, NULL, "tokens",
      "of a sequence; 0: 64, and then 256; on a GPU 1024, and then 2048", AT(tokens) },
    { "threads", OPT_INT, "2", 1, 1024, NULL, "", "of ours and of the peer", AT(threads) },
    { "steps", OPT_INT, "0", 0, 1e4, NULL, "", "of each in a round; 0: 1, on a GPU 10", AT(steps) },
    { "repeats", OPT_INT, "5", 1, ROUNDS, NULL, "", "rounds", AT(repeats) },
    { "peer", OPT_STRING, "", 0, 0, NULL, "", "a Python with PyTorch; empty: python3, if it has PyTorch; none: no peer",
      AT(peer) },
    { "matmul", OPT_INT, "0", 0, 1 << 15, NULL, "",
      "side of the square products that tell what the machine's products can do; 0: 1024, on a GPU 8192", AT(matmul) },
    { "compile", OPT_BOOL, "true", 0, 0, NULL, "", "let the peer use torch.compile where that is faster", AT(compile) },
};
static const char *const quick[][2] = {
    { "model", "tiny" }, { "tokens", "16" }, { "sequences", "4" }, { "steps", "1" },
    { "repeats", "2" },  { "peer", "none" }, { "matmul", "256" },  { NULL, NULL },
};

struct sizes {
    const char *name;
    int layers, hidden, heads, kv_heads, ffn, vocab;
    int64_t gpu_tokens; /* of a step on a GPU */
    bool usual[2];      /* part of `all`: on the CPU, on a GPU */
};
static const struct sizes shapes[] = {
    { "all", 0, 0, 0, 0, 0, 0, 0, { false, false } },
    { "124M", 12, 768, 12, 12, 2048, 50257, 16384, { true, true } },
    { "135M", 30, 576, 9, 3, 1536, 49152, 16384, { true, false } },
    { "350M", 24, 1024, 16, 16, 2816, 50257, 8192, { false, true } },
    { "1.5B", 28, 2048, 16, 16, 5504, 50257, 4096, { false, true } },
    { "tiny", 2, 64, 4, 2, 96, 521, 64, { false, false } },
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static const char *const dtypes[] = { "all", "f32", "bf16" };
enum { DTYPES = sizeof dtypes / sizeof *dtypes };
static const char *const devices[] = { "cpu", "cuda" };

/* One model at work. */
struct train_bench {
    struct bench *b;
    const struct train_options *o;
    const struct sizes *shape;
    const char *dtype;
    struct model *m;
    struct site *site;
    struct pipe *pipe;
    struct zero *zero;
    struct clipped *clipped;
    struct peer *peer;
    struct ceiling ceiling;
    struct model_input in;
    int64_t sequences, steps;
    int32_t *token, *target, *position, *offset; /* [N] each, offset [sequences + 1] */
    float *slope, *logp;                         /* [N]: of the loss by log-probabilities; of the last pass, there */
    struct logprob_stats stats;
    uint64_t step;
    double params, matmul;                              /* elements; operations a second */
    double ours[ROUNDS], theirs[ROUNDS], bound[ROUNDS]; /* seconds of a step */
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

/* The mean over tokens; its value is looked at when the clock stands still. */
static status *loss(void *arg, uint32_t k, struct tensor *logp)
{
    struct train_bench *t = arg;
    (void)k;
    t->logp = logp->data;
    return compute_put(t->site->compute, logp->grad, t->slope, (size_t)t->in.tokens * sizeof *t->slope);
}

static status *check_loss(struct train_bench *t)
{
    size_t n = (size_t)t->in.tokens;
    double sum = 0;
    float *x = mem_array(NULL, n, sizeof *x);
    status *st = x ? compute_get(t->site->compute, x, t->logp, n * sizeof *x) : ERR(NO_MEMORY, "%zu values", n);
    for (size_t i = 0; !st && i < n; i++)
        sum -= (double)x[i] / (double)n;
    mem_free(x);
    if (!st && !isfinite(sum))
        st = ERR(CORRUPT, "step %llu: loss %g", (unsigned long long)t->step, sum);
    return st;
}

static status *added(void *arg, uint32_t k, int chunk)
{
    return zero_added_chunk(((struct train_bench *)arg)->zero, k, chunk);
}

static struct pipe_work work_of(struct train_bench *t)
{
    return (struct pipe_work){ .prepare = prepare, .forward = forward, .result = loss, .added = added, .arg = t };
}

/* As the trainer's: the host waits once, for the norm, when all else is queued. */
static status *train_step(struct train_bench *t)
{
    struct pipe_work w = work_of(t);
    struct compute *c = t->site->compute;
    const double *squares;
    struct clipped seen;
    zero_begin(t->zero, 1);
    TRY(pipe_train(t->pipe, 0, 1, &w));
    TRY(zero_reduce(t->zero, NULL));
    TRY(zero_squares(t->zero, &squares));
    compute_kernels(c)->clip(compute_workers(c, t->site->workers), t->clipped, squares, 1);
    TRY(compute_fetch(c, &seen, t->clipped, sizeof seen));
    const struct adamw a = { 1e-4, 0.9, 0.95, 1e-8, 0.1, 1, ++t->step, &t->clipped->scale };
    status *st = zero_update(t->zero, &a, NULL, NULL);
    TRY(status_first(st, compute_fetched(c)));
    return isfinite(seen.norm) ? NULL : ERR(CORRUPT, "step %llu: norm %g", (unsigned long long)t->step, seen.norm);
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
    TRY(st);
    t->m->params.compute = t->m->tied.compute = t->site->compute;
    t->params = (double)params_unique_elems(&t->m->params);
    TRY(model_alloc(t->m, true));
    return params_init(&t->m->params, 1);
}

/* Sequences of any tokens; the target of each is the next one. */
static status *open_tokens(struct train_bench *t, int64_t length)
{
    int64_t n = t->sequences * length;
    t->token = mem_array(NULL, (size_t)(4 * n + 2), sizeof *t->token);
    t->slope = mem_array(NULL, (size_t)n, sizeof *t->slope);
    if (!t->token || !t->slope)
        return ERR(NO_MEMORY, "%lld tokens", (long long)n);
    for (int64_t i = 0; i < n; i++)
        t->slope[i] = -1.0f / (float)n;
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
    for (int64_t s = 0; s <= t->sequences; s++)
        t->offset[s] = (int32_t)(s * length);
    t->in = (struct model_input){ .tokens = n,
                                  .token = t->token,
                                  .seg = { (int32_t)t->sequences, t->offset, t->position } };
    return NULL;
}

static status *open_ours(struct train_bench *t, int64_t length)
{
    struct pipe_work work = work_of(t);
    bool bf16 = !strcmp(t->dtype, "bf16");
    struct workers *w = t->site->workers;
    const struct zero_options zero = { .micro_batches = 1, .workers = w };
    TRY(open_model(t));
    TRY(open_tokens(t, length));
    TRY(pipe_open(NULL, PIPE_1F1B, 1, 1, t->m->width, w, t->site->compute, 0, &t->pipe));
    tape_bf16(pipe_tape(t->pipe, 0), bf16);
    tape_low(pipe_tape(t->pipe, 0), bf16);
    void *clipped;
    TRY(zero_open(&zero, &t->m->params, t->b->world, &t->zero));
    TRY(compute_alloc(t->site->compute, sizeof *t->clipped, &clipped));
    t->clipped = clipped;
    TRY(pipe_dry(t->pipe, t->in.tokens, &work));
    struct zero_moments z = zero_moments(t->zero);
    t->ceiling = (struct ceiling){ t->m, t->site->compute, t->in.tokens, bf16, .moment = z.m, .v = z.v };
    return ceiling_open(&t->ceiling);
}

static status *open_peer(struct train_bench *t, int64_t length)
{
    const struct sizes *s = t->shape;
    char sizes[500];
    if (!strcmp(t->o->peer, "none"))
        return NULL;
    snprintf(sizes, sizeof sizes,
             "{\"layers\": %d, \"hidden\": %d, \"heads\": %d, \"kv_heads\": %d, \"ffn\": %d, \"vocab\": %d, "
             "\"sequences\": %lld, \"tokens\": %lld, \"threads\": %lld, \"dtype\": \"%s\", \"compile\": %s, "
             "\"eps\": 1e-5, \"theta\": 10000.0, \"device\": \"%s\"}",
             s->layers, s->hidden, s->heads, s->kv_heads, s->ffn, s->vocab, (long long)t->sequences, (long long)length,
             (long long)t->o->threads, t->dtype, t->o->compile ? "true" : "false", devices[t->o->device]);
    return peer_open(t->o->peer, sizes, &t->peer);
}

static void close_ours(struct train_bench *t)
{
    ceiling_close(&t->ceiling);
    compute_free(t->site->compute, t->clipped, sizeof *t->clipped);
    t->clipped = NULL;
    zero_close(t->zero);
    t->zero = NULL;
    pipe_close(t->pipe);
    t->pipe = NULL;
    model_close(t->m);
    t->m = NULL;
    mem_free(t->token);
    mem_free(t->slope);
    t->token = NULL;
    t->slope = NULL;
}

/* ---- rounds */

static status *our_round(struct train_bench *t, int64_t round, int64_t steps)
{
    struct compute *c = t->site->compute;
    uint64_t t0 = clock_ns();
    for (int64_t i = 0; i < steps; i++)
        TRY(train_step(t));
    TRY(compute_check(c, true));
    t->ours[round] = ns_to_s(clock_ns() - t0) / (double)steps;
    TRY(check_loss(t));
    t0 = clock_ns();
    for (int64_t i = 0; i < steps; i++)
        ceiling_run(&t->ceiling);
    TRY(compute_check(c, true));
    t->bound[round] = ns_to_s(clock_ns() - t0) / (double)steps;
    return NULL;
}

static status *peer_round(struct train_bench *t, int64_t round, int64_t steps)
{
    if (!t->peer)
        return NULL;
    TRY(peer_run(t->peer, (int)steps, &t->theirs[round]));
    t->theirs[round] /= (double)steps;
    return NULL;
}

/* The first one of each is not counted: it touches all memory. */
static status *rounds(struct train_bench *t, bool ours, bool peer)
{
    for (int64_t r = -1; r < t->o->repeats; r++) {
        int64_t steps = r < 0 ? 1 : t->steps;
        if (ours)
            TRY(our_round(t, r < 0 ? 0 : r, steps));
        if (peer)
            TRY(peer_round(t, r < 0 ? 0 : r, steps));
    }
    return NULL;
}

static status *measure(struct train_bench *t, int64_t length)
{
    bool turns = t->site->compute->host;
    TRY(open_ours(t, length));
    if (turns)
        TRY(open_peer(t, length));
    TRY(rounds(t, true, turns));
    if (turns)
        return NULL;
    close_ours(t);
    TRY(open_peer(t, length));
    return rounds(t, false, true);
}

static status *measure_matmul(struct train_bench *t)
{
    struct gemms g = { 0 };
    int64_t side = t->o->matmul ? t->o->matmul : t->site->compute->host ? 1024 : 8192;
    status *st = gemms_open(t->site->compute, side, !strcmp(t->dtype, "bf16"), &g);
    if (!st)
        st = gemms_rate(&g, &t->matmul);
    gemms_close(&g);
    return st;
}

/* ---- results */

/* Of a token: 6 N + 12 L d T (Chowdhery et al. 2022, arXiv:2204.02311, appendix B; d: hidden, L: layers), as if
 * attention were not causal. */
static double operations(const struct train_bench *t, int64_t length)
{
    return 6 * t->params + 12.0 * t->shape->layers * t->shape->hidden * (double)length;
}

static void report(struct train_bench *t, int64_t length)
{
    size_t n = (size_t)t->o->repeats;
    char model[64];
    snprintf(model, sizeof model, "%s %lldx%lld", t->shape->name, (long long)t->sequences, (long long)length);
    double tokens = (double)(t->sequences * length), ours = tokens / median_of(t->ours, n);
    double theirs = t->peer ? tokens / median_of(t->theirs, n) : NAN, bound = tokens / median_of(t->bound, n);
    double each = operations(t, length), peak = strcmp(t->dtype, "bf16") ? NAN : t->site->peak;
    const struct figure f[] = {
        { "device", 0, t->site->name, 0, "" },
        { "model", 0, model, 0, "sequences x tokens of a step" },
        { "params", t->params, NULL, 0, "" },
        { "dtype", 0, t->dtype, 0, "of the matrix products; weights and moments are f32" },
        { "threads", t->site->workers ? (double)t->o->threads : NAN, NULL, 0, "of the CPU" },
        { "tokens_per_s", ours, NULL, 2, "forward, loss, backward, clip, AdamW; median over rounds" },
        { "peer", NAN, t->peer ? peer_name(t->peer) : NULL, 0, "" },
        { "peer_tokens_per_s", theirs, NULL, 2, "its steps" },
        { "ratio", ours / theirs, NULL, 3, "ours to the peer's" },
        { "ceiling_tokens_per_s", bound, NULL, 2, "the step's matrix products and AdamW alone" },
        { "ceiling_share", ours / bound, NULL, 3, "ours to that" },
        { "flops_per_token", each, NULL, 0, "6 N + 12 L d T" },
        { "peak_tflops", peak * 1e-12, NULL, 0, "of the chip, by its data sheet" },
        { "mfu", each * ours / peak, NULL, 4, "operations of the formula to that" },
        { "peer_mfu", each * theirs / peak, NULL, 4, "the peer's" },
        { "matmul_tflops", t->matmul * 1e-12, NULL, 3, "large square products, measured" },
        { "mfu_matmul", each * ours / t->matmul, NULL, 4, "operations of the formula to those" },
    };
    bench_print(t->b, f, sizeof f / sizeof *f);
}

static status *run_case(struct bench *b, const struct train_options *o, struct site *site, int shape, int dtype,
                        int64_t length)
{
    bool cpu = site->compute->host;
    struct train_bench *t = mem_calloc(1, sizeof *t);
    if (!t)
        return ERR(NO_MEMORY, "samples");
    *t = (struct train_bench){ .b = b, .o = o, .site = site, .shape = &shapes[shape], .dtype = dtypes[dtype] };
    int64_t fit = cpu ? 4 : t->shape->gpu_tokens / length;
    t->sequences = o->sequences ? o->sequences : fit < 1 ? 1 : fit;
    t->steps = o->steps ? o->steps : cpu ? 1 : 10;
    status *st = measure(t, length);
    close_ours(t);
    if (!st)
        st = measure_matmul(t);
    if (!st)
        report(t, length);
    peer_close(t->peer);
    mem_free(t);
    return st;
}

static status *run_cases(struct bench *b, const struct train_options *o, struct site *site)
{
    bool gpu = !site->compute->host;
    const int64_t first = gpu ? 1024 : 64, length[] = { o->tokens ? o->tokens : first, gpu ? 2048 : 256 };
    for (int s = 1; s < SHAPES; s++)
        for (int d = 1; d < DTYPES; d++)
            for (int l = 0; l < (o->tokens ? 1 : 2); l++)
                if ((o->model ? o->model == s : shapes[s].usual[gpu]) &&
                    (o->dtype ? o->dtype == d : !gpu || !strcmp(dtypes[d], "bf16")))
                    TRY(run_case(b, o, site, s, d, length[l]));
    return NULL;
}

static status *run(struct bench *b, const void *options)
{
    const struct train_options *o = options;
    struct site site = { 0 };
    if (b->world->size > 1)
        return ERR(INVALID, "bench train measures one rank and its threads, not %d ranks", b->world->size);
    status *st = site_open(devices[o->device], 0, o->device ? 0 : (int)o->threads, &site);
    if (!st)
        st = run_cases(b, o, &site);
    site_close(&site);
    return st;
}

const struct bench_verb bench_train = {
    "train",
    "training steps beside PyTorch's, and beside the step's matrix products alone; one rank",
    { "", rows, sizeof rows / sizeof *rows },
    sizeof(struct train_options),
    BENCH_NO_URL,
    false,
    quick,
    run,
};
