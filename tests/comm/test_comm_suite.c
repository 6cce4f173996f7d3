/* The conformance suite over `self` and ranks as threads; `test_comm_suite mpi` runs it as one rank of an MPI job
 * (test_comm_mpi.sh starts that), `test_comm_suite mpi progress` beside a thread that drives what is under way, and
 * `test_comm_suite mpi cores` prints how many cores such a rank may use. On a GPU (tests/gpu/run starts these): `nccl`,
 * as one rank, the suite over memory of its GPU; `nccl-dies`, the last rank kills itself and the others say what they
 * are told; `nccl-version`. */
#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "comm/base/mem.h"
#include "comm/device/device.h"
#include "comm/progress.h"
#include "tests/support/comm_on_device.h"
#include "tests/support/comm_suite.h"
#include "tests/support/comm_threads.h"

#include <dlfcn.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void assert_ok(status *st)
{
    if (st)
        print_error("%s\n", status_message(st));
    assert_null(st);
}

static void test_self(void **state)
{
    (void)state;
    struct comm *c;
    assert_ok(comm_open("self", NULL, NULL, &c));
    assert_int_equal(c->size, 1);
    assert_ok(comm_suite_run(c));
    comm_close(c);
    comm_close(NULL);
}

static status *suite_rank(struct comm *world, void *arg)
{
    (void)arg;
    return comm_suite_run(world);
}

static void test_threads(void **state)
{
    (void)state;
    for (int size = 1; size <= 6; size++)
        assert_ok(comm_threads_run(size, suite_rank, NULL));
}

static void test_self_mismatch(void **state)
{
    (void)state;
    struct comm *c;
    char a[4] = "abc", b[4];
    assert_ok(comm_open("self", NULL, NULL, &c));
    struct comm_xfer lost[] = { { 0, 1, true, a, 4 } }, other_size[] = { { 0, 1, true, a, 4 }, { 0, 1, false, b, 3 } };
    struct comm_xfer other_tag[] = { { 0, 1, true, a, 4 }, { 0, 2, false, b, 4 } },
                     unsent[] = { { 0, 1, false, b, 4 } };
    status *st[] = { comm_exchange(c, lost, 1, NULL), comm_exchange(c, other_size, 2, NULL),
                     comm_exchange(c, other_tag, 2, NULL), comm_exchange(c, unsent, 1, NULL) };
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(status_code(st[i]), ST_INVALID);
        status_free(st[i]);
    }
    comm_close(c);
}

static void test_unknown_backend(void **state)
{
    (void)state;
    struct comm *c = NULL;
    status *st = comm_open("carrier-pigeon", NULL, NULL, &c);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_non_null(strstr(status_message(st), "carrier-pigeon"));
    assert_non_null(strstr(status_message(st), "self"));
    assert_non_null(strstr(status_message(st), "mpi"));
    assert_null(c);
    status_free(st);
}

/* ---- a rank that fails breaks a job of threads, and its own error comes back ---- */

static status *one_fails(struct comm *world, void *arg)
{
    const int *how = arg;
    unsigned char a[8] = { 0 }, b[8];
    struct comm_req req;
    if (world->rank == 2)
        return ERR(IO, "rank 2 has had enough");
    if (*how == 0)
        return comm_barrier(world);
    if (*how == 1) {
        TRY(comm_iallreduce(world, a, b, 8, COMM_U8, COMM_SUM, &req));
        return comm_wait(&req);
    }
    struct comm_xfer x = { 2, 0, false, b, 8 };
    TRY(comm_iexchange(world, &x, 1, NULL, &req));
    return comm_wait(&req);
}

static void test_broken_job(void **state)
{
    (void)state;
    for (int how = 0; how < 3; how++) {
        status *st = comm_threads_run(4, one_fails, &how);
        assert_int_equal(status_code(st), ST_IO);
        assert_int_equal(status_rank(st), 2);
        status_free(st);
    }
}

static status *sizes_differ(struct comm *world, void *arg)
{
    (void)arg;
    unsigned char b[8] = { 0 };
    struct comm_xfer x = { 1 - world->rank, 0, world->rank == 0, b, world->rank == 0 ? 4 : 8 };
    status *st = comm_exchange(world, &x, 1, NULL);
    if (!st)
        return ERR(CORRUPT, "a message of 4 bytes filled a receive of 8");
    status_free(st);
    return NULL;
}

static void test_size_mismatch(void **state)
{
    (void)state;
    assert_ok(comm_threads_run(2, sizes_differ, NULL));
}

/* ---- as one rank of an MPI job ---- */

static int run_mpi(int argc, char **argv)
{
    struct comm *c = NULL;
    struct log log = { LOG_INFO, -1 };
    status *st = comm_open("mpi", &argc, &argv, &c);
    if (!st && argc > 2 && !strcmp(argv[2], "cores")) {
        cpu_set_t set;
        if (c->rank == 0 && sched_getaffinity(0, sizeof set, &set) == 0)
            printf("cores: %d\n", CPU_COUNT(&set));
        comm_close(c);
        return 0;
    }
    struct progress *p = NULL;
    struct comm *world = c;
    if (!st)
        st = comm_dup(world, &c);
    if (!st && argc > 2 && !strcmp(argv[2], "progress"))
        st = progress_open(&p);
    if (!st)
        st = progress_drive(p, &c);
    if (!st)
        st = comm_suite_run(c);
    if (!st && c->size > 1 && c->rank < 2) /* the receiver sees that sizes differ; the sender cannot */
        st = c->rank == 1 ? sizes_differ(c, NULL)
                          : comm_exchange(c, &(struct comm_xfer){ 1, 0, true, (char[]){ "abc" }, 4 }, 1, NULL);
    log_status(&log, LOG_ERROR, st);
    if (st && c)
        comm_abort(c, status_exit_code(st));
    int code = status_exit_code(st);
    if (!st && c->rank == 0)
        printf("comm suite over %s: %d ranks passed\n", c->ops->name, c->size);
    status_free(st);
    comm_close(c);
    progress_close(p);
    comm_close(world);
    return code;
}

/* ---- as one rank of an MPI job on GPUs */

/* The GPU of this rank's place on its host, or the first where there are fewer. */
static status *own_gpu(struct device **out)
{
    const char *place = getenv("OMPI_COMM_WORLD_LOCAL_RANK");
    int index = place ? atoi(place) : 0;
    status *st = device_open("cuda", index, out);
    if (!st || index == 0)
        return st;
    status_free(st);
    return device_open("cuda", 0, out);
}

static status *one_dies(struct comm *nccl, struct device *d)
{
    void *x;
    status *st = NULL;
    TRY(d->ops->alloc(d, 64, &x));
    TRY(comm_allreduce(nccl, x, 16, COMM_F32, COMM_SUM, NULL));
    TRY(d->ops->stream_sync(d, NULL));
    if (nccl->rank == nccl->size - 1)
        raise(SIGKILL);
    uint64_t begin = clock_ns();
    while (!st && ns_to_s(clock_ns() - begin) < 30) {
        st = comm_allreduce(nccl, x, 16, COMM_F32, COMM_SUM, NULL);
        st = status_first(st, d->ops->stream_sync(d, NULL));
    }
    printf("survivor: %s %s\n", status_code_name(status_code(st)), status_message(st));
    fflush(stdout);
    _Exit(status_code(st) == ST_PEER ? 0 : 1); /* MPI cannot end in order any more */
}

static int run_nccl(int argc, char **argv)
{
    bool dies = !strcmp(argv[1], "nccl-dies");
    struct log log = { LOG_INFO, -1 };
    struct comm *world = NULL, *nccl = NULL;
    struct device *d = NULL;
    status *st = comm_open("mpi", &argc, &argv, &world);
    if (!st)
        st = own_gpu(&d);
    if (!st)
        st = comm_over(world, d, dies ? 5 : 60, &nccl);
    if (!st)
        st = dies ? one_dies(nccl, d) : comm_suite_on_device(nccl, d);
    int code = status_exit_code(st);
    log_status(&log, LOG_ERROR, st);
    if (st && world)
        comm_abort(world, code);
    if (!st && world->rank == 0)
        printf("comm suite over nccl: %d ranks passed\n", world->size);
    comm_close(nccl);
    device_close(d);
    comm_close(world);
    status_free(st);
    return code;
}

static int nccl_version(void)
{
    const char *own = getenv("TESSERA_NCCL");
    void *lib = dlopen(own && *own ? own : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    void *symbol = lib ? dlsym(lib, "ncclGetVersion") : NULL;
    int (*get)(int *), version = 0;
    memcpy(&get, &symbol, sizeof get);
    if (!symbol || get(&version) != 0) {
        printf("%s\n", lib ? "no ncclGetVersion" : dlerror());
        return 1;
    }
    printf("%d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "mpi"))
        return run_mpi(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "nccl-version"))
        return nccl_version();
    if (argc > 1 && !strncmp(argv[1], "nccl", 4))
        return run_nccl(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_self),       cmocka_unit_test(test_self_mismatch), cmocka_unit_test(test_threads),
        cmocka_unit_test(test_broken_job), cmocka_unit_test(test_size_mismatch), cmocka_unit_test(test_unknown_backend),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
