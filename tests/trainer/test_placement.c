/* test_placement: how many compute threads ranks start: on whole hosts, bound to cores of their own or to shared ones,
 * under a quota; and that a rank sees the cores that it was bound to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/support/comm_threads.h"
#include "trainer/placement.h"

#include <sched.h>
#include <string.h>

/* A rank of `host` on cores [first, end). */
static struct placement_rank rank_on(uint64_t host, int first, int end, double quota)
{
    struct placement_rank r = { .host = host, .quota = quota };
    for (int c = first; c < end; c++)
        r.core[c / 64] |= (uint64_t)1 << (c % 64);
    return r;
}

static void is(const struct placement_rank *all, int n, int me, int ranks_here, int rank_here, int threads)
{
    struct placement p = placement_of(all, n, me);
    assert_int_equal(p.ranks_here, ranks_here);
    assert_int_equal(p.rank_here, rank_here);
    assert_int_equal(p.threads, threads);
}

static void unbound_ranks_share_the_host(void **state)
{
    (void)state;
    struct placement_rank r[5];
    for (int i = 0; i < 5; i++)
        r[i] = rank_on(7, 0, 64, 0);
    is(r, 1, 0, 1, 0, 64);
    is(r, 4, 3, 4, 3, 16);
    is(r, 5, 1, 5, 1, 12); /* 12.8 */
    for (int i = 0; i < 5; i++)
        r[i] = rank_on(7, 0, 2, 0);
    is(r, 5, 4, 5, 4, 1); /* never none */
    r[0] = rank_on(7, 0, PLACEMENT_CORES, 0);
    is(r, 1, 0, 1, 0, PLACEMENT_CORES);
}

/* What is left of it beside whole threads, for messages (parallel.progress). */
static void shares_are_fractions_too(void **state)
{
    (void)state;
    struct placement_rank r[4];
    for (int i = 0; i < 4; i++)
        r[i] = rank_on(7, 0, 3, 0);
    assert_float_equal(placement_of(r, 2, 1).share, 1.5, 1e-12);
    assert_float_equal(placement_of(r, 4, 0).share, 0.75, 1e-12);
    is(r, 2, 1, 2, 1, 1);
    is(r, 4, 0, 4, 0, 1);
    for (int i = 0; i < 4; i++)
        r[i] = rank_on(7, 4 * i, 4 * i + 4, 10);
    assert_float_equal(placement_of(r, 4, 2).share, 2.5, 1e-12);
    is(r, 4, 2, 4, 2, 2);
}

static void hosts_are_told_apart(void **state)
{
    (void)state;
    const struct placement_rank r[] = { rank_on(1, 0, 8, 0), rank_on(2, 0, 32, 0), rank_on(1, 0, 8, 0),
                                        rank_on(2, 0, 32, 0), rank_on(2, 0, 32, 0) };
    is(r, 5, 0, 2, 0, 4);
    is(r, 5, 2, 2, 1, 4);
    is(r, 5, 1, 3, 0, 10);
    is(r, 5, 4, 3, 2, 10);
}

static void bound_ranks_use_what_they_have(void **state)
{
    (void)state;
    const struct placement_rank own[] = { rank_on(1, 0, 4, 0), rank_on(1, 4, 64, 0), rank_on(1, 126, 130, 0) };
    is(own, 3, 0, 3, 0, 4);
    is(own, 3, 1, 3, 1, 60);
    is(own, 3, 2, 3, 2, 4);
    /* Two sockets of 8, two ranks on each of them; and a rank of both sockets beside. */
    const struct placement_rank socket[] = { rank_on(1, 0, 8, 0), rank_on(1, 8, 16, 0), rank_on(1, 0, 8, 0),
                                             rank_on(1, 8, 16, 0), rank_on(1, 0, 16, 0) };
    is(socket, 4, 2, 4, 2, 4);
    is(socket, 5, 0, 5, 0, 2); /* 8 / 3 */
    is(socket, 5, 4, 5, 4, 5); /* 16 / 3 */
}

static void a_quota_is_shared(void **state)
{
    (void)state;
    const struct placement_rank r[] = { rank_on(1, 0, 64, 6), rank_on(1, 0, 64, 6), rank_on(2, 0, 64, .5) };
    is(r, 1, 0, 1, 0, 6);
    is(r, 2, 1, 2, 1, 3);
    is(r, 3, 2, 1, 0, 1);
    const struct placement_rank wide[] = { rank_on(1, 0, 4, 16) };
    is(wide, 1, 0, 1, 0, 4);
}

static status *bound_here(struct comm *world, void *arg)
{
    (void)arg;
    cpu_set_t set, one;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return ERR(IO, "no affinity");
    int core = 0;
    while (!CPU_ISSET((unsigned)core, &set))
        core++;
    struct placement p = { 0 };
    TRY(placement_read(world, &p));
    int most = CPU_COUNT(&set) > 3 ? CPU_COUNT(&set) / 3 : 1;
    if (p.ranks_here != 3 || p.rank_here != world->rank || p.threads < 1 || p.threads > most)
        return ERR(INTERNAL, "unbound: %d ranks here, place %d, %d threads of %d cores", p.ranks_here, p.rank_here,
                   p.threads, CPU_COUNT(&set));
    CPU_ZERO(&one);
    CPU_SET((unsigned)core, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0)
        return ERR(IO, "no affinity");
    TRY(placement_read(world, &p));
    return p.threads == 1 ? NULL : ERR(INTERNAL, "bound to one core: %d threads", p.threads);
}

static void ranks_see_their_cores(void **state)
{
    (void)state;
    status *st = comm_threads_run(3, bound_here, NULL);
    if (st)
        fail_msg("%s", status_message(st));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unbound_ranks_share_the_host),
        cmocka_unit_test(shares_are_fractions_too),
        cmocka_unit_test(hosts_are_told_apart),
        cmocka_unit_test(bound_ranks_use_what_they_have),
        cmocka_unit_test(a_quota_is_shared),
        cmocka_unit_test(ranks_see_their_cores),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
