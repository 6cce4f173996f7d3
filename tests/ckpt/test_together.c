/* Planning together over ranks that are threads: messages up and down the tree of nodes, a plan that a restart takes
 * from its step, and states that change on one rank alone. */
#include "ckpt/nodes.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

/* ---- the tree */

enum { PLACINGS = 4 };

/* The node that rank r of n is put on. */
static int place(int placing, int r, int n)
{
    switch (placing) {
    case 0:
        return 0;
    case 1:
        return r;
    case 2:
        return (n - r) % 2;
    default:
        return (n - 1 - r) / 3;
    }
}

static size_t length(int r, int round)
{
    static const size_t lengths[] = { 0, 1, 7, 8, 4096, 100001 };
    return lengths[(r * 5 + round * 3) % 6];
}

static unsigned char byte_at(int r, int round, size_t i)
{
    return (unsigned char)(r * 37 + round * 11 + (int)(i % 251));
}

static status *check_bytes(const unsigned char *p, size_t bytes, int r, int round)
{
    EXPECT(bytes == length(r, round));
    for (size_t i = 0; i < bytes; i++)
        EXPECT(p[i] == byte_at(r, round, i));
    return NULL;
}

static status *up(const struct nodes *n, int round)
{
    struct nodes_message *m = NULL;
    void *buf = NULL;
    size_t bytes = length(n->all->rank, round), all = 0, sum = 0;
    unsigned char *mine = mem_alloc(bytes);
    for (size_t i = 0; i < bytes; i++)
        mine[i] = byte_at(n->all->rank, round, i);
    TRY(nodes_gather(n, mine, bytes, &m, &buf, &all));
    mem_free(mine);
    if (n->all->rank != 0)
        return NULL;
    for (int r = 0; r < n->all->size; r++) {
        TRY(check_bytes(m[r].data, m[r].bytes, r, round));
        sum += m[r].bytes + 16; /* a rank's bytes come once */
    }
    EXPECT(all == sum + 1 && ((unsigned char *)buf)[all - 1] == 0);
    mem_free(m);
    mem_free(buf);
    return NULL;
}

static status *down(const struct nodes *n, int round)
{
    struct nodes_message m[16] = { { 0 } };
    for (int r = 0; n->all->rank == 0 && r < n->all->size; r++) {
        unsigned char *b = mem_alloc(length(r, round));
        for (size_t i = 0; i < length(r, round); i++)
            b[i] = byte_at(r, round, i);
        m[r] = (struct nodes_message){ b, length(r, round) };
    }
    void *mine = NULL;
    size_t bytes = 0;
    TRY(nodes_scatter(n, n->all->rank ? NULL : m, &mine, &bytes));
    for (int r = 0; n->all->rank == 0 && r < n->all->size; r++)
        mem_free((void *)(uintptr_t)m[r].data);
    status *st = check_bytes(mine, bytes, n->all->rank, round);
    mem_free(mine);
    return st;
}

static status *tree_job(struct comm *world, void *arg)
{
    int placing = *(const int *)arg, mine = place(placing, world->rank, world->size), leaders = 0;
    struct nodes n;
    char host[16];
    snprintf(host, sizeof host, "host%d", mine);
    TRY(nodes_open(world, host, &n));
    int lowest = world->rank;
    for (int r = world->size - 1; r >= 0; r--)
        lowest = place(placing, r, world->size) == mine ? r : lowest;
    EXPECT((n.leaders != NULL) == (lowest == world->rank));
    for (int r = 0; world->rank == 0 && r < world->size; r++) {
        int first = r;
        for (int q = r; q >= 0; q--)
            first = place(placing, q, world->size) == place(placing, r, world->size) ? q : first;
        EXPECT(n.node_of[r] == (first == r ? leaders : n.node_of[first]));
        leaders += first == r;
    }
    EXPECT(world->rank != 0 || (n.count == leaders && n.leaders->size == leaders && n.leaders->rank == 0));
    for (int round = 0; round < 4; round++) {
        TRY(up(&n, round));
        TRY(down(&n, round));
    }
    nodes_close(&n);
    return NULL;
}

static void test_tree(void **state)
{
    (void)state;
    for (int size = 1; size <= 9; size++)
        for (int placing = 0; placing < PLACINGS; placing++)
            assert_ok(comm_threads_run(size, tree_job, &placing));
}

/* ---- a restart */

struct job {
    struct store *store;
    struct fake_cut cut;
    int mesh_tp;        /* 0: the default mesh */
    uint64_t step;      /* to save */
    uint64_t plans;     /* that this handle must make for it */
    int odd_rank;       /* adds a tensor of its own after the load; -1: none */
    bool load, restate; /* restate: the state that is saved is not the one that was loaded into, but alike */
};

static status *open_on_nodes(struct comm *world, const struct job *j, tessera **t)
{
    struct tessera_options o = TESSERA_OPTIONS;
    char host[16];
    if (j->mesh_tp) {
        o.mesh[4] = j->mesh_tp;
        o.mesh[1] = world->size / j->mesh_tp;
    }
    TRY(ckpt_open(&o, world, NULL, j->store, t));
    snprintf(host, sizeof host, "h%d", world->rank / 2);
    return ckpt_set_node(*t, host);
}

static status *add_odd(struct fake *f, int number, double *memory)
{
    struct tessera_tensor a = TESSERA_TENSOR;
    char name[16];
    snprintf(name, sizeof name, "odd.%d", number);
    a.part = "extra";
    a.name = name;
    a.dtype = TESSERA_F64;
    a.ndim = 1;
    a.shape[0] = a.length[0] = 4;
    a.data = memory;
    return tessera_state_add_tensor(f->state, &a);
}

static status *save_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    tessera *t;
    struct fake f;
    double odd[4] = { 1, 2, 3, 4 };
    uint64_t step, committed;
    TRY(open_on_nodes(world, j, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    if (j->load) {
        fake_spoil(&f);
        TRY(tessera_load_newest(t, f.state, &step));
        EXPECT(step == j->step - 1);
        TRY(fake_check(&f, step));
    }
    if (j->restate) {
        fake_close(&f);
        TRY(fake_open(&j->cut, world->rank, &f));
    }
    if (world->rank == j->odd_rank)
        TRY(add_odd(&f, 0, odd));
    for (uint64_t s = j->step; s < j->step + 2; s++) { /* the second from the cache in any case */
        fake_fill(&f, s);
        TRY(tessera_save(t, f.state, s));
        TRY(tessera_wait(t, &committed));
        EXPECT(committed == s);
        EXPECT(ckpt_plans_made(t) == j->plans);
    }
    fake_spoil(&f);
    TRY(tessera_load(t, f.state, j->step + 1));
    TRY(fake_check(&f, j->step + 1));
    fake_close(&f);
    return tessera_close(t);
}

static void test_restart(void **state)
{
    (void)state;
    static const struct fake_cut cuts[] = {
        { 1, 1, false, false, 8 }, { 4, 2, true, false, 8 }, { 5, 1, false, true, 8 }, { 6, 3, true, true, 8 }
    };
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .cut = cuts[i], .step = 1, .plans = 1, .odd_rank = -1 };
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.load = true;
        j.step = 3;
        j.plans = 0; /* the step has the plan */
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.step = 5; /* and hands it on */
        j.restate = true;
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.step = 7;
        j.plans = 1; /* one rank's state is another one */
        j.odd_rank = j.cut.size / 2;
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.step = 9;
        j.odd_rank = -1; /* the step holds one tensor more than the state */
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.step = 11;
        j.cut.size = 3; /* another world, and another cut */
        j.cut.tp = 1;
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        j.step = 13;
        j.mesh_tp = 3; /* another mesh, the same pieces */
        assert_ok(comm_threads_run(j.cut.size, save_job, &j));
        root_close(&r);
    }
}

/* ---- states that change on one rank */

static status *change_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    enum { STEPS = 9 };
    tessera *t;
    struct fake f;
    double odd[STEPS][4];
    uint64_t committed, plans = 0;
    bool ours[STEPS] = { false };
    TRY(open_on_nodes(world, j, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    for (int s = 0; s < STEPS; s++) {
        struct rng_at at = { .seed = 77, .stream = RNG_DATA };
        int who = (int)rng_below(at, (uint64_t)s, (uint64_t)world->size); /* the same on all ranks */
        bool changes = rng_below(at, 100 + (uint64_t)s, 3) != 0;
        for (int k = 0; k < 4; k++)
            odd[s][k] = s * 10 + k;
        if (changes && who == world->rank) {
            TRY(add_odd(&f, s, odd[s]));
            ours[s] = true;
        }
        plans += changes || s == 0;
        fake_fill(&f, (uint64_t)s);
        TRY(tessera_save(t, f.state, (uint64_t)s + 1));
        if (s % 3)
            TRY(tessera_fence(t, NULL, 0, NULL));
        if (s % 4 == 1) { /* give some up, planned or not */
            TRY(tessera_cancel(t));
            plans = ckpt_plans_made(t);
            continue;
        }
        TRY(tessera_wait(t, &committed));
        EXPECT(committed == (uint64_t)s + 1);
        EXPECT(ckpt_plans_made(t) >= plans && ckpt_plans_made(t) <= plans + 1);
        plans = ckpt_plans_made(t);
        fake_spoil(&f);
        memset(odd, 0, sizeof odd);
        TRY(tessera_load(t, f.state, committed));
        TRY(fake_check(&f, (uint64_t)s));
        for (int i = 0; i <= s; i++)
            for (int k = 0; k < 4; k++) {
                EXPECT(!ours[i] || odd[i][k] == i * 10 + k);
                odd[i][k] = i * 10 + k;
            }
    }
    fake_close(&f);
    return tessera_close(t);
}

static void test_changes(void **state)
{
    (void)state;
    for (int size = 1; size <= 4; size += 3) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 8 } };
        assert_ok(comm_threads_run(size, change_job, &j));
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_tree), cmocka_unit_test(test_restart),
                                        cmocka_unit_test(test_changes) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
