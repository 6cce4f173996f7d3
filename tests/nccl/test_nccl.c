/* comm_nccl over a NCCL that is none (fake_nccl.c) and devices that are none (device_fake): the conformance suite on
 * device memory and on host memory, who waits for whom, and what becomes of a job whose peer is gone. `test_nccl true
 * LIBRARY` says what opening it over the true library does on a machine without a GPU. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/device/device.h"
#include "tests/support/comm_on_device.h"
#include "tests/support/comm_suite.h"
#include "tests/support/comm_threads.h"
#include "tests/support/device_fake.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

extern const struct comm_ops comm_nccl_ops;

static const char FAKE[] = "./libfake_nccl.so";
static const double SOON_S = 0.3, LIMIT_S = 60;

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

static void expect_error(status *st, enum status_code code, const char *words)
{
    assert_non_null(st);
    if (status_code(st) != code || !strstr(status_message(st), words))
        fail_msg("%s: %s", status_code_name(status_code(st)), status_message(st));
    status_free(st);
}

/* What the fake offers to tests. */
static void *fake(const char *name)
{
    void *lib = dlopen(FAKE, RTLD_NOW | RTLD_LOCAL);
    assert_non_null(lib);
    void *symbol = dlsym(lib, name);
    assert_non_null(symbol);
    dlclose(lib); /* comm_nccl keeps it */
    return symbol;
}

static int fake_end(void)
{
    int (*end)(void);
    void *symbol = fake("fake_nccl_end");
    memcpy(&end, &symbol, sizeof end);
    return end();
}

static void fake_fail(int rank)
{
    void (*fail_rank)(int);
    void *symbol = fake("fake_nccl_fail");
    memcpy(&fail_rank, &symbol, sizeof fail_rank);
    fail_rank(rank);
}

/* Run fn on `size` ranks, each with a device of its own. */
struct job {
    status *(*fn)(struct comm *nccl, struct device *d);
    double timeout_s;
};

static status *rank_main(struct comm *world, void *arg)
{
    const struct job *job = arg;
    struct device *d = device_fake_open(&comm_nccl_ops);
    struct comm *c = NULL;
    status *st = comm_over(world, d, job->timeout_s, &c);
    if (!st)
        st = job->fn(c, d);
    comm_close(c);
    device_fake_close(d);
    return st;
}

static status *run_job(int size, double timeout_s, status *(*fn)(struct comm *, struct device *))
{
    struct job job = { fn, timeout_s };
    return comm_threads_run(size, rank_main, &job);
}

/* ---- the suite */

static void test_device_memory(void **state)
{
    (void)state;
    for (int size = 1; size <= 4; size++)
        assert_ok(run_job(size, LIMIT_S, comm_suite_on_device));
    assert_int_equal(fake_end(), 0);
}

static status *on_host(struct comm *nccl, struct device *d)
{
    (void)d;
    return comm_suite_run_in_order(nccl);
}

/* All of it is the parent's to do. */
static void test_host_memory(void **state)
{
    (void)state;
    assert_ok(run_job(1, LIMIT_S, on_host));
    assert_ok(run_job(3, LIMIT_S, on_host));
    assert_int_equal(fake_end(), 0);
}

/* One exchange with messages of both kinds, listed in another order by each side but for the order within a tag. */
static status *both_kinds(struct comm *c, struct device *d)
{
    enum { N = 1000 };
    void *out, *in, *back;
    struct comm_req req;
    TRY(d->ops->alloc(d, 3 * N, &out));
    TRY(d->ops->alloc(d, 3 * N, &in));
    TRY(d->ops->alloc_pinned(d, 3 * N, &back));
    for (int i = 0; i < 3 * N; i++)
        ((unsigned char *)back)[i] = (unsigned char)(100 * c->rank + i / N);
    TRY(d->ops->copy(d, out, back, 3 * N, NULL));
    int peer = 1 - c->rank, sent = 7 + c->rank, got = -1;
    char *o = out, *i = in;
    struct comm_xfer x[] = {
        { peer, 5, true, o, N },          { peer, 2, true, o + N, N },
        { peer, 2, true, o + 2 * N, N },  { peer, 9, true, &sent, sizeof sent },
        { peer, 2, false, i + N, N },     { peer, 9, false, &got, sizeof got },
        { peer, 2, false, i + 2 * N, N }, { peer, 5, false, i, N },
    };
    TRY(comm_iexchange(c, x, sizeof x / sizeof *x, NULL, &req));
    TRY(comm_wait(&req));
    TRY(d->ops->copy(d, back, in, 3 * N, NULL));
    TRY(d->ops->stream_sync(d, NULL));
    for (int k = 0; k < 3 * N; k++)
        if (((unsigned char *)back)[k] != 100 * peer + k / N)
            return ERR(INTERNAL, "byte %d is %d", k, ((unsigned char *)back)[k]);
    d->ops->free_pinned(d, back, 3 * N);
    d->ops->free(d, in, 3 * N);
    d->ops->free(d, out, 3 * N);
    return got == 7 + peer ? NULL : ERR(INTERNAL, "the host's message is %d", got);
}

static void test_both_kinds(void **state)
{
    (void)state;
    assert_ok(run_job(2, LIMIT_S, both_kinds));
    assert_int_equal(fake_end(), 0);
}

/* ---- who waits for whom */

/* The reduction's input is made on a stream that stands still: the calls return all the same, nothing is reduced before
 * the input is there, and what the stream is given afterwards sees the result. */
static status *ordered(struct comm *c, struct device *d)
{
    enum { N = 5000 };
    const size_t bytes = N * sizeof(float);
    void *x, *host, *gathered;
    struct stream *s;
    TRY(d->ops->alloc(d, bytes, &x));
    TRY(d->ops->alloc(d, bytes * (size_t)c->size, &gathered));
    TRY(d->ops->alloc_pinned(d, 2 * bytes, &host));
    TRY(d->ops->stream_open(d, &s));
    TRY(comm_keep(c, x, bytes));
    float *in = host, *out = in + N;
    unsigned long syncs = device_fake_syncs(d);
    device_fake_hold(d, s);
    TRY(d->ops->copy(d, x, in, bytes, s));
    TRY(comm_allreduce(c, x, N, COMM_F32, COMM_SUM, s));
    TRY(comm_bcast(c, x, bytes, c->size - 1, s));
    TRY(comm_allgather(c, x, gathered, bytes, s));
    struct comm_xfer ring[] = { { (c->rank + 1) % c->size, 0, true, gathered, bytes },
                                { (c->rank + c->size - 1) % c->size, 0, false, x, bytes } };
    TRY(comm_exchange(c, ring, 2, s));
    TRY(d->ops->copy(d, out, x, bytes, s));
    if (device_fake_syncs(d) != syncs)
        return ERR(INTERNAL, "the host waited for a stream");
    for (int i = 0; i < N; i++)
        in[i] = (float)(c->rank + i); /* not read before the stream goes on */
    device_fake_let_go(d, s);
    TRY(d->ops->stream_sync(d, s));
    for (int i = 0; i < N; i++) {
        float want = (float)(c->size * (c->size - 1) / 2 + c->size * i);
        if (out[i] < want || out[i] > want)
            return ERR(INTERNAL, "element %d is %g, not %g", i, (double)out[i], (double)want);
    }
    d->ops->stream_close(d, s);
    d->ops->free_pinned(d, host, 2 * bytes);
    d->ops->free(d, gathered, bytes * (size_t)c->size);
    d->ops->free(d, x, bytes);
    return NULL;
}

static void test_order(void **state)
{
    (void)state;
    for (int round = 0; round < 20; round++)
        assert_ok(run_job(2 + round % 2, LIMIT_S, ordered));
    assert_int_equal(fake_end(), 0);
}

/* ---- a peer is gone */

/* Calls until one says that the communicator is lost. */
static status *until_lost(struct comm *c, struct device *d)
{
    void *x;
    TRY(d->ops->alloc(d, 64, &x));
    status *st = NULL;
    uint64_t begin = clock_ns();
    while (!st && ns_to_s(clock_ns() - begin) < LIMIT_S) {
        st = comm_allreduce(c, x, 16, COMM_F32, COMM_SUM, NULL);
        st = status_first(st, d->ops->stream_sync(d, NULL));
    }
    d->ops->free(d, x, 64);
    if (status_code(st) != ST_PEER)
        return status_first(st, ERR(INTERNAL, "rank %d of %d has noticed nothing", c->rank, c->size));
    if (!strstr(status_message(st), "comm nccl: rank ") || strstr(status_message(st), "\n")) {
        status *other = ERR(INTERNAL, "it says: %s", status_message(st));
        status_free(st);
        return other;
    }
    status_free(st);
    st = comm_bcast(c, &(int){ 0 }, 0, 0, NULL); /* nothing to move: nothing to say */
    return st;
}

/* The last rank calls nothing; the others are on the device and on the host (comm_test). */
static status *one_stays_away(struct comm *c, struct device *d)
{
    if (c->rank == c->size - 1)
        return NULL;
    void *x;
    struct comm_req req;
    bool done = false;
    status *st = NULL;
    TRY(d->ops->alloc(d, 64, &x));
    struct comm_xfer from_it = { c->size - 1, 0, false, x, 64 };
    st = comm_iexchange(c, &from_it, 1, NULL, &req);
    while (!st && !done)
        st = comm_test(&req, &done);
    TRY(d->ops->stream_sync(d, NULL));
    d->ops->free(d, x, 64);
    if (status_code(st) != ST_PEER || !strstr(status_message(st), "a peer has died"))
        return status_first(st, ERR(INTERNAL, "a message came from a rank that sent none"));
    status_free(st);
    return until_lost(c, d);
}

static void test_absent_peer(void **state)
{
    (void)state;
    assert_ok(run_job(3, SOON_S, one_stays_away));
    assert_true(fake_end() >= 2);
}

/* NCCL finds by itself that a peer is gone, on one rank only; that rank leaves, so the others hear nothing more. */
static status *error_found(struct comm *c, struct device *d)
{
    if (c->rank == 0)
        fake_fail(0);
    return until_lost(c, d);
}

static void test_async_error(void **state)
{
    (void)state;
    assert_ok(run_job(3, SOON_S, error_found));
    assert_int_equal(fake_end(), 3);
}

/* ---- no library, an old one */

static status *open_fails(struct comm *world, void *arg)
{
    const char *const *words = arg;
    struct device *d = device_fake_open(&comm_nccl_ops);
    struct comm *c = NULL;
    status *st = comm_over(world, d, 1, &c);
    device_fake_close(d);
    if (status_code(st) != ST_UNSUPPORTED || !strstr(status_message(st), words[0]) ||
        !strstr(status_message(st), words[1]) || c)
        return status_first(st, ERR(INTERNAL, "opened without its library"));
    status_free(st);
    return NULL;
}

static void test_no_library(void **state)
{
    (void)state;
    const char *missing[] = { "/nowhere/libnccl.so.2", "$TESSERA_NCCL" },
               *other[] = { "libm.so.6", "or later is needed" };
    assert_int_equal(setenv("TESSERA_NCCL", missing[0], 1), 0);
    assert_ok(comm_threads_run(2, open_fails, missing));
    assert_int_equal(setenv("TESSERA_NCCL", other[0], 1), 0);
    assert_ok(comm_threads_run(2, open_fails, other));
    assert_int_equal(setenv("TESSERA_NCCL", FAKE, 1), 0);
}

static void test_no_backend(void **state)
{
    (void)state;
    struct comm *self, *c = NULL;
    struct device *none = device_fake_open(NULL), *cpu;
    assert_ok(comm_open("self", NULL, NULL, &self));
    expect_error(comm_over(self, none, 1, &c), ST_UNSUPPORTED, "device fake cannot move its memory between ranks");
    assert_null(c);
    assert_ok(device_open("cpu", 0, &cpu));
    assert_ok(comm_over(self, cpu, 1, &c)); /* host memory: a duplicate */
    assert_string_equal(c->ops->name, "self");
    assert_ok(comm_keep(c, &c, sizeof c));
    comm_close(c);
    device_close(cpu);
    device_fake_close(none);
    comm_close(self);
}

/* ---- the true library, on a machine without a GPU */

static int over_true_library(const char *library)
{
    struct comm *self, *c = NULL;
    struct device *d = device_fake_open(&comm_nccl_ops);
    setenv("TESSERA_NCCL", library, 1);
    status *st = comm_open("self", NULL, NULL, &self);
    if (!st)
        st = comm_over(self, d, 20, &c);
    printf("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    int code = status_exit_code(st);
    status_free(st);
    comm_close(c);
    comm_close(self);
    device_fake_close(d);
    return code;
}

int main(int argc, char **argv)
{
    if (argc > 2 && !strcmp(argv[1], "true"))
        return over_true_library(argv[2]);
    setenv("TESSERA_NCCL", FAKE, 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_library),  cmocka_unit_test(test_no_backend),  cmocka_unit_test(test_device_memory),
        cmocka_unit_test(test_host_memory), cmocka_unit_test(test_both_kinds),  cmocka_unit_test(test_order),
        cmocka_unit_test(test_absent_peer), cmocka_unit_test(test_async_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
