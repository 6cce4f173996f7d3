/* The emulated GPU (tests/support/cuda_emu.h) as the program meets it: plugins in a folder, opened by name. Run twice,
 * once with TESSERA_EMU_LATE=1. */
#include "comm/base/mem.h"
#include "tests/support/comm_on_device.h"
#include "tests/support/comm_threads.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static bool late(void)
{
    const char *s = getenv("TESSERA_EMU_LATE");
    return s && *s == '1';
}

static void assert_ok(status *st)
{
    if (st)
        print_error("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    assert_null(st);
}

struct open {
    struct device *d;
    struct compute *c;
};

static struct open open_gpu(void)
{
    struct open o = { 0 };
    assert_ok(device_open("cuda", 0, &o.d));
    assert_false(o.d->host);
    assert_ok(compute_open(o.d, NULL, true, &o.c));
    assert_false(compute_host(o.c));
    return o;
}

static void shut(struct open o)
{
    compute_close(o.c);
    device_close(o.d);
}

static void *take(struct open o, size_t bytes)
{
    void *p;
    assert_ok(compute_alloc(o.c, bytes, &p));
    assert_int_equal((uintptr_t)p % 4096, 0);
    assert_true(o.d->ops->on_device(o.d, p));
    assert_true(o.d->ops->on_device(o.d, (char *)p + bytes - 1));
    return p;
}

/* ---- memory */

static void bytes_come_back(void **state)
{
    (void)state;
    static const size_t sizes[] = { 1, 4096, 100001, (size_t)5 << 20 };
    struct open o = open_gpu();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n = sizes[i];
        unsigned char *host = mem_alloc(n), *back = mem_calloc(1, n), *a = take(o, n), *b = take(o, n);
        for (size_t j = 0; j < n; j++)
            host[j] = (unsigned char)(j * 7 + j / 251 + i);
        assert_ok(compute_get(o.c, back, b, n));
        for (size_t j = 0; j < n; j++)
            assert_int_equal(back[j], 0);
        assert_ok(compute_put(o.c, a, host, n));
        assert_ok(compute_copy(o.c, b, a, n));
        assert_ok(compute_get(o.c, back, b, n));
        assert_memory_equal(back, host, n);
        compute_free(o.c, a, n);
        compute_free(o.c, b, n);
        a = take(o, n); /* in the place of one of those */
        assert_ok(compute_get(o.c, back, a, n));
        for (size_t j = 0; j < n; j++)
            assert_int_equal(back[j], 0);
        compute_free(o.c, a, n);
        assert_false(o.d->ops->on_device(o.d, host));
        mem_free(host);
        mem_free(back);
    }
    shut(o);
}

static void no_more_memory(void **state)
{
    (void)state;
    struct open o = open_gpu();
    void *p = NULL, *all = take(o, (size_t)200 << 20);
    status *st = compute_alloc(o.c, (size_t)100 << 20, &p);
    assert_int_equal(status_code(st), ST_NO_MEMORY);
    assert_null(p);
    status_free(st);
    compute_free(o.c, all, (size_t)200 << 20);
    compute_free(o.c, take(o, (size_t)100 << 20), (size_t)100 << 20);
    shut(o);
}

static void no_such_gpu(void **state)
{
    (void)state;
    struct device *d = NULL;
    status *st = device_open("cuda", 8, &d);
    assert_int_equal(status_code(st), ST_DEVICE);
    assert_non_null(strstr(status_message(st), "GPU 8 does not exist: this machine has 8"));
    assert_null(d);
    status_free(st);
}

/* ---- what ends the process */

enum crime { READS, WRITES, READS_AFTER_KERNEL, COPIES_BEYOND, COPIES_FREED, FREES_TWICE };

static void commit(enum crime crime, struct open o, volatile float *p)
{
    float host[8];
    switch (crime) {
    case READS:
        fprintf(stderr, "%g\n", (double)p[3]);
        break;
    case WRITES:
        p[3] = 1;
        break;
    case READS_AFTER_KERNEL:
        o.c->kernels->zero(o.c->workers, (float *)(uintptr_t)p, 8);
        o.c->kernels->scale(o.c->workers, (float *)(uintptr_t)p, (float *)(uintptr_t)p, 2, 8);
        status_free(compute_check(o.c, true));
        fprintf(stderr, "%g\n", (double)p[3]);
        break;
    case COPIES_BEYOND:
        status_free(o.d->ops->copy(o.d, host, (char *)(uintptr_t)p + (1 << 20), sizeof host, o.c->stream));
        break;
    case COPIES_FREED:
        compute_free(o.c, (void *)(uintptr_t)p, 32);
        status_free(compute_get(o.c, host, (const void *)(uintptr_t)p, 32));
        break;
    case FREES_TWICE:
        o.d->ops->free(o.d, (void *)(uintptr_t)p, 32);
        o.d->ops->free(o.d, (void *)(uintptr_t)p, 32);
    }
    fprintf(stderr, "nothing happened\n");
    _exit(0);
}

/* Committed by a child, which must die of it and say so. Before any GPU is opened: whoever was told of SIGSEGV then,
 * cmocka here, is told again after the emulator. */
static void is_caught(enum crime crime, const char *words)
{
    int ends[2];
    char said[16384] = "";
    size_t used = 0;
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        if (dup2(ends[1], STDERR_FILENO) < 0 || signal(SIGSEGV, SIG_DFL) == SIG_ERR)
            _exit(0);
        struct open o = open_gpu();
        commit(crime, o, take(o, 32));
    }
    close(ends[1]);
    for (ssize_t n; used < sizeof said - 1 && (n = read(ends[0], said + used, sizeof said - 1 - used)) > 0;)
        used += (size_t)n;
    close(ends[0]);
    int how = 0;
    assert_int_equal(waitpid(pid, &how, 0), pid);
    if (!WIFSIGNALED(how) || !strstr(said, words))
        fail_msg("crime %d: status %x, and it said \"%s\", not \"%s\"", (int)crime, (unsigned)how, said, words);
}

static void the_host_keeps_out(void **state)
{
    (void)state;
    is_caught(READS, "the host read device memory at 0x");
    is_caught(WRITES, "the host wrote device memory at 0x");
    is_caught(READS_AFTER_KERNEL, "the host read device memory at 0x");
    is_caught(COPIES_BEYOND, "not in one block of device memory");
    is_caught(COPIES_FREED, "not in one block of device memory");
    is_caught(FREES_TWICE, "is no block of this GPU");
}

/* ---- kernels */

enum { M = 33, K = 20, N = 40 };

static void close_to(const float *got, const float *want, size_t n, double tolerance)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)want[i]) <= tolerance * (1 + fabs((double)want[i]))))
            fail_msg("element %zu is %g, the CPU's %g", i, (double)got[i], (double)want[i]);
}

static void run_kernels(const struct kernels *k, struct workers *w, float *a, float *b, float *y, float *rrms)
{
    struct gemm g = { .m = M,
                      .n = N,
                      .k = K,
                      .a = a,
                      .lda = K,
                      .b = b,
                      .b_dtype = DTYPE_F32,
                      .ldb = K,
                      .b_trans = true,
                      .c = y,
                      .ldc = N };
    k->gemm(w, &g);
    g.add = true;
    k->gemm(w, &g);
    k->rmsnorm(w, array_of(y), rrms, array_of(y), b, M, N, 1e-5f);
    k->axpy(w, y, y, 0.5f, M * N);
}

static void kernels_compute(void **state)
{
    (void)state;
    struct open o = open_gpu();
    float a[M * K], b[N * K], y[M * N] = { 0 }, rrms[M], got[M * N];
    for (int i = 0; i < M * K; i++)
        a[i] = (float)(i % 17) - 8;
    for (int i = 0; i < N * K; i++)
        b[i] = (float)(i % 13) * 0.25f - 1;
    float *da = take(o, sizeof a), *db = take(o, sizeof b), *dy = take(o, sizeof y), *drrms = take(o, sizeof rrms);
    assert_ok(compute_put(o.c, da, a, sizeof a));
    assert_ok(compute_put(o.c, db, b, sizeof b));
    run_kernels(&kernels_cpu, NULL, a, b, y, rrms);
    run_kernels(o.c->kernels, o.c->workers, da, db, dy, drrms);
    assert_ok(compute_get(o.c, got, dy, sizeof got));
    close_to(got, y, M * N, 1e-5);
    assert_ok(compute_get(o.c, got, drrms, sizeof rrms));
    close_to(got, rrms, M, 1e-5);
    assert_ok(compute_check(o.c, true));
    compute_free(o.c, da, sizeof a);
    compute_free(o.c, db, sizeof b);
    compute_free(o.c, dy, sizeof y);
    compute_free(o.c, drrms, sizeof rrms);
    shut(o);
}

/* ---- streams */

/* What a copy reads, and when an event is reached, tell whether work was queued. */
static void order_of_streams(void **state)
{
    (void)state;
    struct open o = open_gpu();
    const struct device_ops *ops = o.d->ops;
    struct stream *first, *second;
    struct event *e;
    void *pinned, *p = take(o, 16);
    bool done = false;
    assert_ok(ops->alloc_pinned(o.d, 3 * 16, &pinned));
    assert_ok(ops->stream_open(o.d, &first));
    assert_ok(ops->stream_open_low(o.d, &second));
    assert_ok(ops->event_open(o.d, &e));
    assert_ok(ops->event_query(o.d, e, &done)); /* never recorded */
    assert_true(done);
    char *from = pinned, *to = from + 16, *early = from + 32;
    memcpy(from, "before", 7);
    assert_ok(ops->copy(o.d, p, from, 16, first));
    assert_ok(ops->event_record(o.d, e, first));
    assert_ok(ops->copy(o.d, early, p, 16, second)); /* does not wait */
    assert_ok(ops->stream_sync(o.d, second));
    assert_ok(ops->stream_wait(o.d, second, e));
    assert_ok(ops->copy(o.d, to, p, 16, second));
    assert_ok(ops->event_query(o.d, e, &done));
    assert_int_equal(done, !late());
    memcpy(from, "behind", 7);
    assert_ok(ops->stream_sync(o.d, second));
    assert_string_equal(to, late() ? "behind" : "before");
    assert_string_equal(early, late() ? "" : "before");
    assert_ok(ops->event_query(o.d, e, &done));
    assert_true(done);
    assert_ok(ops->event_record(o.d, e, second));
    assert_ok(ops->event_query(o.d, e, &done));
    assert_int_equal(done, !late());
    assert_ok(ops->event_query(o.d, e, &done)); /* who asks again has waited long enough */
    assert_true(done);
    ops->event_close(o.d, e);
    ops->stream_close(o.d, first);
    ops->stream_close(o.d, second);
    ops->free_pinned(o.d, pinned, 3 * 16);
    compute_free(o.c, p, 16);
    shut(o);
}

/* ---- ranks */

static status *rank_main(struct comm *world, void *arg)
{
    (void)arg;
    struct device *d = NULL;
    struct comm *c = NULL;
    TRY(device_open("cuda", world->rank, &d));
    status *st = comm_over(world, d, 0, &c);
    if (!st)
        st = comm_suite_on_device(c, d);
    comm_close(c);
    device_close(d);
    return st;
}

static void ranks_exchange(void **state)
{
    (void)state;
    for (int size = 1; size <= 3; size++)
        assert_ok(comm_threads_run(size, rank_main, NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_host_keeps_out), cmocka_unit_test(bytes_come_back), cmocka_unit_test(no_more_memory),
        cmocka_unit_test(no_such_gpu),        cmocka_unit_test(kernels_compute), cmocka_unit_test(order_of_streams),
        cmocka_unit_test(ranks_exchange),
    };
    if (setenv("TESSERA_PLUGINS", "emu", 1) || setenv("TESSERA_EMU_BYTES", "268435456", 1) ||
        unsetenv("TESSERA_EMU_GPUS"))
        return 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
