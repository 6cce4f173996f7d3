/* Pipelines (trainer/parallel/pipe.c) over comm_nccl, a NCCL and devices that are none: calls of a communicator run in
 * the order in which they were started, each until its peer has joined it, so a schedule whose messages wait for each
 * other in a circle ends here with the time limit. Stages multiply by a number; all that they compute is queued on
 * streams of device_fake. */
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/device_fake.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/cuda/plugin.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/pipe.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

extern const struct comm_ops comm_nccl_ops;

static const double LIMIT_S = 30;
enum { TOKENS = 5, WIDTH = 3, ELEMS = TOKENS * WIDTH, MOST = 7, HALF_BYTES = 1 << 20 };

/* ---- kernels that are played on a stream */

struct played {
    float *y;
    const float *x;
    float s;
    int64_t n;
};

static void play(struct workers *w, void (*fn)(void *), float *y, const float *x, float s, int64_t n)
{
    struct played *p = mem_alloc(sizeof *p);
    CHECK(p, "out of memory in a test");
    *p = (struct played){ device_fake_memory(y), x ? device_fake_memory(x) : NULL, s, n };
    device_fake_queue((struct stream *)(void *)w, fn, p);
}

static void play_zero(void *arg)
{
    struct played *p = arg;
    for (int64_t i = 0; i < p->n; i++)
        p->y[i] = 0;
    mem_free(p);
}

static void play_scale(void *arg)
{
    struct played *p = arg;
    for (int64_t i = 0; i < p->n; i++)
        p->y[i] = p->s * p->x[i];
    mem_free(p);
}

static void play_axpy(void *arg)
{
    struct played *p = arg;
    for (int64_t i = 0; i < p->n; i++)
        p->y[i] += p->s * p->x[i];
    mem_free(p);
}

static void zero(struct workers *w, float *y, int64_t n)
{
    play(w, play_zero, y, NULL, 0, n);
}

static void scale(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    play(w, play_scale, y, x, s, n);
}

static void axpy(struct workers *w, float *y, const float *x, float s, int64_t n)
{
    play(w, play_axpy, y, x, s, n);
}

static status *check(struct workers *w, bool wait)
{
    (void)w;
    (void)wait;
    return NULL;
}

static const struct kernels kernels = { .name = "played", .zero = zero, .scale = scale, .axpy = axpy };
static const struct ops_plugin plugin = { .kernels = &kernels, .check = check };

static void open_compute(struct device *d, struct compute *c)
{
    struct stream *s;
    assert_null(d->ops->stream_open(d, &s));
    *c = (struct compute){ .device = d, .kernels = &kernels, .stream = s, .plugin = &plugin };
    c->workers = (struct workers *)(void *)s;
    for (int i = 0; i < 2; i++) {
        void *p;
        assert_null(d->ops->alloc_pinned(d, HALF_BYTES, &p));
        assert_null(d->ops->event_open(d, &c->half[i].free));
        c->half[i].bytes = p;
    }
}

static void close_compute(struct compute *c)
{
    struct device *d = c->device;
    for (int i = 0; i < 2; i++) {
        d->ops->event_close(d, c->half[i].free);
        d->ops->free_pinned(d, c->half[i].bytes, HALF_BYTES);
    }
    d->ops->stream_close(d, c->stream);
}

/* ---- stages */

struct schedule_case {
    int ranks, how, chunks;
    uint32_t n;
};

struct stage {
    const struct schedule_case *of;
    struct compute *c;
    int rank;
    struct tensor *first[MOST]; /* the first stage's input, of each micro-batch */
    int results, added;
};

static float factor(int stage)
{
    return 1 + 0.5f * (float)(stage % 3);
}

static float product(const struct schedule_case *c)
{
    float p = 1;
    for (int v = 0; v < c->ranks * c->chunks; v++)
        p *= factor(v);
    return p;
}

static float input(uint32_t k, int i)
{
    return (float)(k + 1) + 0.125f * (float)i;
}

static float slope(uint32_t k, int i)
{
    return (float)(2 * k + 3) - 0.25f * (float)i;
}

static int64_t prepare(void *arg, uint32_t k)
{
    (void)arg;
    (void)k;
    return TOKENS;
}

static struct tensor *forward(void *arg, struct tape *t, int chunk, struct tensor *x)
{
    struct stage *s = arg;
    struct tensor *from = x ? x : op_boundary(t, TOKENS, WIDTH);
    if (!x && from && t->mode != TAPE_DRY) {
        float host[ELEMS];
        uint32_t k = (uint32_t)s->added; /* of the passes so far */
        for (int i = 0; i < ELEMS; i++)
            host[i] = input(k, i);
        assert_null(compute_put(s->c, from->data, host, sizeof host));
        s->first[k] = from;
        s->added++;
    }
    return op_scale(t, from, factor(chunk * s->of->ranks + s->rank));
}

static void expect(const struct stage *s, const float *there, float (*of)(uint32_t, int), uint32_t k)
{
    float host[ELEMS], by = product(s->of);
    assert_null(compute_get(s->c, host, there, sizeof host));
    for (int i = 0; i < ELEMS; i++)
        if (host[i] != by * of(k, i))
            fail_msg("micro-batch %u, element %d: %g, not %g", k, i, (double)host[i], (double)(by * of(k, i)));
}

static status *result(void *arg, uint32_t k, struct tensor *y)
{
    struct stage *s = arg;
    float host[ELEMS];
    expect(s, y->data, input, k);
    for (int i = 0; i < ELEMS; i++)
        host[i] = slope(k, i);
    s->results++;
    return y->grad ? compute_put(s->c, y->grad, host, sizeof host) : NULL;
}

static status *added(void *arg, uint32_t k, int chunk)
{
    struct stage *s = arg;
    if (s->rank == 0 && chunk == 0)
        expect(s, s->first[k]->grad, slope, k);
    return NULL;
}

static status *run_stage(struct comm *pp, struct device *d, const struct schedule_case *c)
{
    struct compute compute;
    struct pipe *p = NULL;
    open_compute(d, &compute);
    struct stage s = { .of = c, .c = &compute, .rank = pp->rank };
    struct pipe_work w = { .prepare = prepare, .forward = forward, .result = result, .added = added, .arg = &s };
    TRY(pipe_open(pp, (enum pipe_schedule)c->how, c->chunks, MOST, WIDTH, NULL, &compute, 0, &p));
    TRY(pipe_dry(p, TOKENS, &w));
    for (int step = 0; step < 2; step++) {
        s.added = 0;
        TRY(pipe_train(p, 0, c->n, &w));
        s.added = 0;
        TRY(pipe_forward(p, 0, c->n, &w));
    }
    int results = pipe_last(p) ? 4 * (int)c->n : 0;
    if (s.results != results)
        return ERR(INTERNAL, "%d results, not %d", s.results, results);
    TRY(d->ops->stream_sync(d, compute.stream));
    pipe_close(p);
    close_compute(&compute);
    return NULL;
}

static status *rank_main(struct comm *world, void *arg)
{
    struct device *d = device_fake_open(&comm_nccl_ops);
    struct comm *c = NULL;
    status *st = comm_over(world, d, LIMIT_S, &c);
    if (!st)
        st = run_stage(c, d, arg);
    if (st) /* others may wait for this one: there is no orderly end */
        return st;
    comm_close(c);
    device_fake_close(d);
    return NULL;
}

static void expect_runs(int how, int chunks)
{
    for (int ranks = 2; ranks <= 4; ranks++)
        for (uint32_t n = 1; n <= MOST; n += 3) {
            struct schedule_case c = { ranks, how, chunks, n };
            status *st = comm_threads_run(ranks, rank_main, &c);
            if (st)
                fail_msg("%d ranks, %u micro-batches: %s", ranks, n, status_message(st));
        }
}

static void test_1f1b(void **state)
{
    (void)state;
    expect_runs(PIPE_1F1B, 1);
}

static void test_zero_bubble(void **state)
{
    (void)state;
    expect_runs(PIPE_ZERO_BUBBLE, 1);
}

static void test_interleaved(void **state)
{
    (void)state;
    expect_runs(PIPE_INTERLEAVED, 2);
    expect_runs(PIPE_INTERLEAVED, 3);
}

int main(void)
{
    setenv("TESSERA_NCCL", "./libfake_nccl.so", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_1f1b),
        cmocka_unit_test(test_zero_bubble),
        cmocka_unit_test(test_interleaved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
