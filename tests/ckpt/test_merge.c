/* Runs that are merged, or gathered, while they are saved: many saves in a row, small memory, fences piece by piece,
 * states that change, writes that fail and saves that are cancelled at any moment. Ranks are threads.
 * That every byte comes back whatever the cuts are is the grid's to show (test_grid.c). */
#include "ckpt/state.h"
#include "comm/base/mem.h"
#include "tests/ckpt/draw.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

struct job {
    struct store *store;
    int irregular, writers;
    uint64_t staging, chunk;
    uint64_t fault_at, saved;
    bool faulted, small;
};

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SHRINK = 4, SMALL_SHRINK = 8, FAULTS = 10, ROUNDS = 9 }; /* these look for wrong code, not for every moment */
#else
enum { SHRINK = 1, SMALL_SHRINK = 2, FAULTS = 30, ROUNDS = 18 };
#endif
static const struct fake_cut save_cut = { .size = 6, .tp = 2, .zero = true, .shrink = SHRINK };
static const struct fake_cut load_cut = { .size = 3, .tp = 1, .shrink = SHRINK };
/* The same with fewer bytes: for many saves. */
static const struct fake_cut small_save_cut = { .size = 6, .tp = 2, .zero = true, .shrink = SMALL_SHRINK };
static const struct fake_cut small_load_cut = { .size = 3, .tp = 1, .shrink = SMALL_SHRINK };

static status *open_job(struct comm *world, const struct job *j, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    o.irregular = j->irregular;
    o.staging_bytes = j->staging;
    o.chunk_bytes = j->chunk;
    o.writers = j->writers;
    return ckpt_open(&o, world, NULL, j->store, out);
}

/* Version v, gone from memory as soon as the fence lets it. */
static status *start_save(tessera *t, struct fake *f, uint64_t step)
{
    fake_fill(f, step);
    TRY(tessera_save(t, f->state, step));
    TRY(tessera_fence(t, NULL, 0, NULL));
    fake_spoil(f);
    return NULL;
}

static status *save_one(tessera *t, struct fake *f, uint64_t step)
{
    uint64_t committed;
    TRY(start_save(t, f, step));
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == step);
    return NULL;
}

static status *load_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    tessera *t;
    struct fake f;
    uint64_t step;
    TRY(open_job(world, j, true, &t));
    TRY(fake_open(j->small ? &small_load_cut : &load_cut, world->rank, &f));
    fake_spoil(&f);
    TRY(tessera_load_newest(t, f.state, &step));
    EXPECT(step == j->saved);
    TRY(fake_check(&f, step));
    fake_close(&f);
    return tessera_close(t);
}

static void run_and_load(status *(*save)(struct comm *, void *), struct job *j)
{
    OK(comm_threads_run(save_cut.size, save, j));
    OK(comm_threads_run(load_cut.size, load_job, j));
}

/* ---- steady */

static status *steady_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    uint64_t count = 0, wire;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&save_cut, world->rank, &f));
    for (uint64_t step = 1; step <= 6; step++) {
        TRY(save_one(t, &f, step));
        if (step == 2)
            count = mem_count();
    }
    EXPECT(mem_count() - count <= 4 * 100 * (uint64_t)world->size); /* a commit's, which do not grow with the state */
    EXPECT(ckpt_plans_made(t) == 1);
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t, &p);
    EXPECT(p.captured_bytes == p.total_bytes && p.written_bytes == p.total_bytes);
    EXPECT(p.staging_peak_bytes <= p.staging_cap_bytes);
    wire = p.wire_bytes;
    TRY(comm_allreduce(world, &wire, 1, COMM_U64, COMM_SUM, NULL));
    if (!world->rank)
        j->saved = wire; /* given to the test, which knows what it should be */
    fake_close(&f);
    return tessera_close(t);
}

static uint64_t wire_of(int irregular, uint64_t staging, uint64_t chunk, int writers)
{
    struct root r = root_open(false);
    struct job j = { .store = r.store, .irregular = irregular, .staging = staging, .chunk = chunk, .writers = writers };
    OK(comm_threads_run(save_cut.size, steady_job, &j));
    uint64_t wire = j.saved;
    j.saved = 6;
    OK(comm_threads_run(load_cut.size, load_job, &j));
    root_close(&r);
    return wire;
}

static void test_steady(void **state)
{
    (void)state;
    assert_int_equal(wire_of(TESSERA_AS_GIVEN, 0, 0, 1), 0);
    uint64_t merge = wire_of(TESSERA_MERGE, 0, 0, 1), gather = wire_of(TESSERA_GATHER, 0, 0, 1);
    /* each run goes to the 2 others that share its box; merged, of 3 equal runs 2 go, once */
    assert_true(merge > 0 && gather > 0);
    double ratio = (double)gather / (double)merge;
    if (ratio < 2.9 || ratio > 3.1)
        fail_msg("gathered %llu bytes, merged %llu", (unsigned long long)gather, (unsigned long long)merge);
    assert_int_equal(wire_of(TESSERA_MERGE, 1, 4096, 3), merge);
    assert_int_equal(wire_of(TESSERA_GATHER, 1, 4096, 3), gather);
}

/* ---- fences */

/* Each piece may be overwritten as soon as its own fence returns, and all before it. */
static status *fence_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct draw d = draw_from(5, (uint32_t)world->rank);
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&save_cut, world->rank, &f));
    for (uint64_t step = 1; step <= 8; step++) {
        uint64_t committed;
        fake_fill(&f, step);
        TRY(tessera_save(t, f.state, step));
        size_t from = 0;
        for (size_t i = 0; i < f.count; i++) {
            bool saved = f.state->piece[i].data && piece_elems(&f.piece[i].piece); /* an alias's memory is not */
            if (!saved || (i + 1 < f.count && draw_below(&d, 3)))
                continue;
            TRY(tessera_fence(t, f.piece[i].memory, f.piece[i].memory_bytes, NULL));
            for (; from <= i; from++)
                memset(f.piece[from].memory, 0x5a, f.piece[from].memory_bytes);
        }
        TRY(tessera_wait(t, &committed));
        EXPECT(committed == step);
    }
    fake_close(&f);
    return tessera_close(t);
}

static void test_fences(void **state)
{
    (void)state;
    for (int irregular = TESSERA_AS_GIVEN; irregular <= TESSERA_GATHER; irregular++) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .irregular = irregular, .saved = 8, .chunk = 1 << 20, .staging = 1 };
        run_and_load(fence_job, &j);
        root_close(&r);
    }
}

/* ---- states that change */

static status *changing_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f, other;
    struct fake_cut wide = save_cut;
    wide.tp = 1; /* other boxes, other runs */
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&save_cut, world->rank, &f));
    TRY(fake_open(&wide, world->rank, &other));
    for (uint64_t step = 1; step <= 7; step++)
        TRY(save_one(t, step % 3 ? &f : &other, step));
    fake_close(&f);
    fake_close(&other);
    return tessera_close(t);
}

static void test_changing_states(void **state)
{
    (void)state;
    for (int irregular = TESSERA_MERGE; irregular <= TESSERA_GATHER; irregular++) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .irregular = irregular, .saved = 7 };
        run_and_load(changing_job, &j);
        root_close(&r);
    }
}

/* ---- failures */

/* One operation of the store fails on some rank; the save fails everywhere, and the next one is whole. */
static status *fault_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&small_save_cut, world->rank, &f));
    TRY(save_one(t, &f, 1));
    TRY(comm_barrier(world));
    if (!world->rank)
        store_fault_arm(j->store, j->fault_at, FAULT_BEFORE);
    TRY(comm_barrier(world));
    TRY(start_save(t, &f, 2));
    uint64_t committed;
    status *st = tessera_wait(t, &committed);
    EXPECT(!st == (committed == 2));
    EXPECT(!st || status_code(st) == ST_IO);
    bool failed = st != NULL;
    status_free(st);
    if (!failed)
        EXPECT(committed == 2);
    TRY(comm_barrier(world));
    if (!world->rank)
        j->faulted = store_fault_disarm(j->store) != NULL;
    TRY(comm_barrier(world));
    TRY(save_one(t, &f, 3));
    TRY(save_one(t, &f, 4));
    fake_close(&f);
    return tessera_close(t);
}

static void test_failed_writes(void **state)
{
    (void)state;
    int failures = 0;
    for (uint64_t at = 0; at < FAULTS; at++) {
        struct root r = root_open(false);
        struct store *s;
        OK(store_fault_open(r.store, &s));
        struct job j = { .store = s,
                         .small = true,
                         .irregular = TESSERA_MERGE + (at % 5 == 4),
                         .saved = 4,
                         .fault_at = at,
                         .chunk = 1 << 20 };
        run_and_load(fault_job, &j);
        failures += j.faulted;
        store_fault_close(s);
        root_close(&r);
    }
    assert_true(failures >= FAULTS / 2);
}

/* ---- cancels */

/* After any number of ticks, with some ranks slower than others; then a save that counts. */
static status *cancel_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct draw d = draw_from(9, 0), own = draw_from(10, (uint32_t)world->rank);
    tessera *t;
    struct fake f;
    uint64_t step = 1;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&small_save_cut, world->rank, &f));
    for (int round = 0; round < ROUNDS; round++, step++) {
        fake_fill(&f, step);
        TRY(tessera_save(t, f.state, step));
        uint64_t ticks = draw_below(&d, 7);
        struct tessera_tick k = TESSERA_TICK;
        for (uint64_t i = 0; i < ticks && k.committed == UINT64_MAX; i++) {
            if (draw_below(&own, 2))
                TRY(tessera_fence(t, NULL, 0, NULL));
            TRY(tessera_tick(t, &k));
        }
        if (round % 3 == 2)
            TRY(tessera_wait(t, NULL));
        else
            TRY(tessera_cancel(t));
    }
    TRY(save_one(t, &f, j->saved));
    fake_close(&f);
    return tessera_close(t);
}

static void test_cancels(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct root r = root_open(false);
        struct store *s;
        OK(store_fault_open(r.store, &s));
        if (i % 2)
            store_fault_slow(s, 300, 4);
        struct job j = { .store = s,
                         .small = true,
                         .irregular = i == 3 ? TESSERA_GATHER : TESSERA_MERGE,
                         .saved = 100,
                         .chunk = 1 << 20,
                         .staging = i == 2 ? 1 : 0 };
        run_and_load(cancel_job, &j);
        store_fault_close(s);
        root_close(&r);
    }
}

/* ---- options */

static status *option_job(struct comm *world, void *arg)
{
    struct job j = *(struct job *)arg;
    tessera *t;
    if (j.irregular == TESSERA_MERGE && world->rank) /* not alike */
        j.irregular = TESSERA_GATHER;
    TRY(open_job(world, &j, false, &t));
    return tessera_close(t);
}

static void test_options(void **state)
{
    (void)state;
    struct root r = root_open(false);
    struct job j = { .store = r.store, .irregular = 3 };
    FAILS(ST_INVALID, "TESSERA_MERGE and TESSERA_GATHER", comm_threads_run(2, option_job, &j));
    j.irregular = TESSERA_MERGE;
    FAILS(ST_INVALID, "options: irregular", comm_threads_run(2, option_job, &j));
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steady),        cmocka_unit_test(test_fences),  cmocka_unit_test(test_changing_states),
        cmocka_unit_test(test_failed_writes), cmocka_unit_test(test_cancels), cmocka_unit_test(test_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
