/* bench_comm: a sum of gradients over all ranks: by the trainer (zero.h) and by the backend's all-reduce, in turns; and
 * what is left of an exchange when a rank has computed beside it for as long as it takes alone.
 *
 * (1) Both ways sum the same memory. (2) What is timed goes from the end of a backward pass to the sums, in each
 * rank's part (`sum`) and then everywhere (`all`): nothing runs beside it. (3) Times are the slowest rank's. */
#include "trainer/bench/bench.h"
#include "trainer/bench/limits.h"
#include "trainer/bench/measure.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/progress.h"
#include "trainer/parallel/zero.h"

#include <math.h>

struct comm_options {
    uint64_t bytes, bucket;
    int64_t repeats;
    int progress;
};

#define AT(field) offsetof(struct comm_options, field)
static const struct option rows[] = {
    { "bytes", OPT_SIZE, "0", 0, 0, NULL, "bytes", "of a rank's gradients, f32; 0: 1 MiB, 64 MiB and 500 MiB in turn",
      AT(bytes) },
    { "bucket", OPT_SIZE, "16MiB", 0, 0, NULL, "bytes", "as parallel.bucket", AT(bucket) },
    { "repeats", OPT_INT, "7", 1, LIMIT_REPEATS, NULL, "", "rounds", AT(repeats) },
    { "progress", OPT_ENUM, "calls", 0, 0, "calls|thread", "", "as parallel.progress", AT(progress) },
};
static const char *const quick[][2] = { { "bytes", "4MiB" }, { "repeats", "2" }, { NULL, NULL } };

enum { TRAINER, BACKEND, WAYS };

/* Seconds of the slowest rank. */
struct times {
    double sum[WAYS][LIMIT_REPEATS], all[WAYS][LIMIT_REPEATS];
    double exchange[LIMIT_REPEATS], left[LIMIT_REPEATS];
};

struct comm_bench {
    struct comm *world;
    const struct comm_options *o;
    struct params params; /* one, without values */
    uint64_t elems;
    struct zero *zero;
    struct times t;
};

static status *slowest(struct comm *c, double seconds[2])
{
    return comm_allreduce(c, seconds, 2, COMM_F64, COMM_MAX, NULL);
}

static void fill(struct comm_bench *cb)
{
    for (uint64_t i = 0; i < cb->elems; i++)
        cb->params.grad[i] = (float)((i + (uint64_t)cb->world->rank) % 64);
}

/* Is every element the sum of what the ranks filled in? Sums of small whole numbers are exact in any order. */
static status *check(const struct comm_bench *cb)
{
    for (uint64_t i = 0; i < cb->elems; i++) {
        float want = 0;
        for (int r = 0; r < cb->world->size; r++)
            want += (float)((i + (uint64_t)r) % 64);
        if (cb->params.grad[i] != want)
            return ERR(INTERNAL, "element %llu is %g, not %g", (unsigned long long)i, (double)cb->params.grad[i],
                       (double)want);
    }
    return NULL;
}

static status *one(struct comm_bench *cb, int way, int64_t round)
{
    struct zero *z = way == BACKEND ? NULL : cb->zero;
    double took[2];
    if (z)
        zero_begin(z, (uint32_t)cb->world->size);
    fill(cb);
    TRY(comm_barrier(cb->world));
    uint64_t began = clock_ns();
    if (z) {
        TRY(zero_added(z, (uint32_t)cb->world->rank));
        TRY(zero_reduce(z, NULL));
        took[0] = ns_to_s(clock_ns() - began);
        TRY(zero_gather(z));
    } else {
        TRY(comm_allreduce(cb->world, cb->params.grad, cb->elems, COMM_F32, COMM_SUM, NULL));
        took[0] = ns_to_s(clock_ns() - began);
    }
    took[1] = ns_to_s(clock_ns() - began);
    TRY(slowest(cb->world, took));
    if (round >= 0) { /* the first one takes memory */
        cb->t.sum[way][round] = took[0];
        cb->t.all[way][round] = took[1];
    }
    return comm_agree(cb->world, check(cb));
}

static void compute_for(double seconds)
{
    volatile double x = 1;
    for (uint64_t began = clock_ns(); ns_to_s(clock_ns() - began) < seconds;)
        for (int i = 0; i < 1000; i++)
            x = x * 0.999 + 1;
}

/* Half of the memory to the next rank, the other half from the one before; *took: what is waited for it in the end, if
 * the rank computes for so long first. */
static status *exchange(struct comm_bench *cb, double beside, double *took)
{
    struct comm *c = cb->world;
    size_t half = cb->elems / 2;
    struct comm_xfer x[] = {
        { (c->rank + 1) % c->size, 0, true, cb->params.grad, half * sizeof(float) },
        { (c->rank + c->size - 1) % c->size, 0, false, cb->params.grad + half, half * sizeof(float) },
    };
    struct comm_req req;
    TRY(comm_barrier(c));
    uint64_t began = clock_ns();
    TRY(comm_iexchange(c, x, 2, NULL, &req));
    if (beside > 0) {
        compute_for(beside);
        began = clock_ns();
    }
    TRY(comm_wait(&req));
    *took = ns_to_s(clock_ns() - began);
    return NULL;
}

static status *beside(struct comm_bench *cb, int64_t round)
{
    double took[2];
    TRY(exchange(cb, 0, &took[0]));
    TRY(comm_allreduce(cb->world, took, 1, COMM_F64, COMM_MAX, NULL));
    TRY(exchange(cb, took[0], &took[1]));
    TRY(slowest(cb->world, took));
    if (round >= 0) {
        cb->t.exchange[round] = took[0];
        cb->t.left[round] = took[1];
    }
    return NULL;
}

static status *run_rounds(struct comm_bench *cb)
{
    for (int64_t round = -1; round < cb->o->repeats; round++) {
        for (int i = 0; i < WAYS; i++)
            TRY(one(cb, (int)((i + round + 1) % WAYS), round));
        TRY(beside(cb, round));
    }
    return NULL;
}

static void print(struct bench *b, struct comm_bench *cb)
{
    double sum[WAYS], all[WAYS];
    for (int w = 0; w < WAYS; w++) {
        sum[w] = 1e3 * median_of(cb->t.sum[w], (size_t)cb->o->repeats);
        all[w] = 1e3 * median_of(cb->t.all[w], (size_t)cb->o->repeats);
    }
    double alone = 1e3 * median_of(cb->t.exchange, (size_t)cb->o->repeats);
    double left = 1e3 * median_of(cb->t.left, (size_t)cb->o->repeats);
    const struct figure f[] = {
        { "ranks", cb->world->size, NULL, 0, "" },
        { "bytes", (double)cb->elems * sizeof(float), NULL, 0, "of a rank's gradients" },
        { "sum_ms", sum[TRAINER], NULL, 2, "until each rank has the sum of its part" },
        { "all_ms", all[TRAINER], NULL, 2, "until all ranks have all of it" },
        { "allreduce_ms", all[BACKEND], NULL, 2, "the same, by the backend's all-reduce" },
        { "allreduce_ratio", all[BACKEND] / all[TRAINER], NULL, 3, "allreduce_ms / all_ms" },
        { "exchange_ms", alone, NULL, 2, "half as many bytes to the next rank, and as many from the one before" },
        { "left_ms", left, NULL, 2, "what is waited for that after computing for exchange_ms beside it" },
        { "hidden", left < alone ? 1 - left / alone : 0, NULL, 3, "1 - left_ms / exchange_ms, or 0" },
    };
    bench_print(b, f, sizeof f / sizeof *f);
}

static status *run_case(struct bench *b, const struct comm_options *o, struct comm *c, uint64_t bytes)
{
    struct comm_bench cb = { .world = c, .o = o, .elems = bytes / sizeof(float) };
    struct zero_options z = { .bucket_elems = o->bucket / sizeof(float) / PARAM_ALIGN * PARAM_ALIGN,
                              .sums_only = true };
    struct param *p = params_add(&cb.params, "gradients", 0, cb.elems, INIT_ZERO, 0, false);
    size_t held = cb.params.total * sizeof(float);
    cb.params.grad = p ? mem_block(held, 4096) : NULL;
    status *st = comm_agree(c, cb.params.grad ? NULL : ERR(NO_MEMORY, "%zu bytes of gradients", held));
    if (!st)
        st = zero_open(&z, &cb.params, c, &cb.zero);
    if (!st)
        st = run_rounds(&cb);
    if (!st)
        print(b, &cb);
    zero_close(cb.zero);
    mem_block_free(cb.params.grad, held);
    mem_free(cb.params.p);
    return st;
}

static status *run(struct bench *b, const void *options)
{
    const struct comm_options *o = options;
    const uint64_t cases[] = { 1 << 20, 64 << 20, 500 << 20 };
    struct progress *p = NULL;
    struct comm *c;
    TRY(comm_dup(b->world, &c));
    status *st = o->progress && c->size > 1 ? progress_open(&p) : NULL;
    if (!st)
        st = progress_drive(p, &c);
    st = comm_agree(b->world, st);
    if (!st && o->bytes)
        st = run_case(b, o, c, o->bytes);
    for (size_t i = 0; !st && !o->bytes && i < sizeof cases / sizeof *cases; i++)
        st = run_case(b, o, c, cases[i]);
    comm_close(c);
    progress_close(p);
    return st;
}

const struct bench_verb bench_comm = { .name = "comm",
                                       .help = "what a sum of gradients over all ranks takes, beside the backend's "
                                               "all-reduce",
                                       .options = { "bench comm", rows, sizeof rows / sizeof *rows },
                                       .options_bytes = sizeof(struct comm_options),
                                       .url_offset = BENCH_NO_URL,
                                       .quick = quick,
                                       .run = run };
