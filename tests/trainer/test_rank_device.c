/* test_rank_device: which GPU each rank of a host takes, when ranks may share one, and what is refused in one line.
 * Ranks are threads of this process; GPUs are those of few_gpus.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/support/comm_threads.h"
#include "trainer/rank_device.h"

#include <stdlib.h>
#include <string.h>

enum { RANKS = 6 };

struct job {
    struct top_config top;
    int host[RANKS];  /* of each rank */
    int taken[RANKS]; /* its device */
};

static status *run_rank(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct placement place = { .host = (uint64_t)j->host[world->rank] };
    for (int r = 0; r < world->rank; r++)
        place.rank_here += j->host[r] == j->host[world->rank];
    struct device *d = NULL;
    status *st = rank_device_open(&j->top, world, &place, &d);
    if (!st)
        j->taken[world->rank] = d->index;
    device_close(d);
    return st;
}

static void gpus(const char *count, const char *shared)
{
    setenv("TEST_GPUS", count, 1);
    unsetenv("NCCL_MULTI_RANK_GPU_ENABLE");
    if (shared)
        setenv("NCCL_MULTI_RANK_GPU_ENABLE", shared, 1);
}

/* hosts, taken: a digit for each rank. */
static void takes(int comm, const char *hosts, const char *taken)
{
    struct job j = { .top = { .device = DEVICE_CUDA, .comm = comm } };
    int n = (int)strlen(hosts);
    for (int r = 0; r < n; r++)
        j.host[r] = hosts[r];
    status *st = comm_threads_run(n, run_rank, &j);
    if (st)
        fail_msg("%s", status_message(st));
    for (int r = 0; r < n; r++)
        assert_int_equal(j.taken[r], taken[r] - '0');
}

static void refused(int comm, const char *hosts, enum status_code code, const char *words)
{
    struct job j = { .top = { .device = DEVICE_CUDA, .comm = comm } };
    int n = (int)strlen(hosts);
    for (int r = 0; r < n; r++)
        j.host[r] = hosts[r];
    status *st = comm_threads_run(n, run_rank, &j);
    assert_non_null(st);
    assert_int_equal(status_code(st), code);
    if (!strstr(status_message(st), words))
        fail_msg("\"%s\" is not in \"%s\"", words, status_message(st));
    status_free(st);
}

static void test_in_turn(void **state)
{
    (void)state;
    gpus("3", NULL);
    takes(TRANSPORT_AUTO, "aaa", "012");
    takes(TRANSPORT_NCCL, "aabbb", "01012");
    takes(TRANSPORT_NCCL, "abab", "0011");
    takes(TRANSPORT_MPI, "a", "0"); /* alone it has nobody to send to */
}

static void test_shared(void **state)
{
    (void)state;
    gpus("2", NULL);
    refused(TRANSPORT_AUTO, "aaa", ST_INVALID, "2 ranks would share a GPU");
    refused(TRANSPORT_NCCL, "aaaab", ST_INVALID, "NCCL_MULTI_RANK_GPU_ENABLE=1");
    gpus("2", "0");
    refused(TRANSPORT_AUTO, "baaa", ST_INVALID, "2 ranks would share a GPU");
    gpus("2", "1");
    takes(TRANSPORT_AUTO, "aaaab", "01010");
    gpus("1", "1");
    takes(TRANSPORT_AUTO, "aa", "00");
}

static void test_refused(void **state)
{
    (void)state;
    gpus("4", NULL);
    refused(TRANSPORT_MPI, "aa", ST_INVALID, "comm: mpi does not move the memory of GPUs between 2 ranks");
    gpus("0", NULL);
    refused(TRANSPORT_AUTO, "aa", ST_DEVICE, "no usable GPU");
}

static void test_host(void **state)
{
    (void)state;
    struct job j = { .top = { .device = DEVICE_CPU, .comm = TRANSPORT_MPI }, .host = { 1, 1, 2 } };
    assert_null(comm_threads_run(3, run_rank, &j));
}

int main(void)
{
    setenv("TESSERA_PLUGINS", "few_gpus", 1); /* beside the test */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_turn),
        cmocka_unit_test(test_shared),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_host),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
