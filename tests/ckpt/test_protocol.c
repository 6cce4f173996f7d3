/* What a checkpoint promises when things go wrong: one verdict for all ranks, the last good step stays, damage is seen,
 * only one job counts. */
#include "ckpt/commit.h"
#include "comm/base/bytes.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/sanitized.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

/* Names in the root that begin with `prefix`. */
static size_t count_names(struct store *s, const char *prefix)
{
    struct store_list l;
    size_t n = 0;
    status *st = store_list(s, "", &l);
    if (st) {
        status_free(st);
        return SIZE_MAX;
    }
    for (size_t i = 0; i < l.count; i++)
        n += !strncmp(l.entry[i].name, prefix, strlen(prefix));
    store_list_free(&l);
    return n;
}

struct lines {
    char text[4096];
};

static void collect(void *arg, const char *line)
{
    struct lines *l = arg;
    size_t n = strlen(l->text);
    snprintf(l->text + n, sizeof l->text - n, "%s\n", line);
}

struct job {
    struct store *store;
    struct fake_cut cut;
    struct lines *warned;
    int keep_last, rewind, fault_rank;
    enum fault_mode mode;
    uint64_t faults; /* out: operations that were made to fail */
};

static status *open_job(struct comm *world, const struct job *j, struct store *s, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    o.keep_last = j->keep_last;
    o.rewind = j->rewind;
    o.warn = j->warned ? collect : NULL;
    o.warn_arg = j->warned;
    return ckpt_open(&o, world, NULL, s, out);
}

static status *save(tessera *t, struct fake *f, uint64_t step)
{
    fake_fill(f, step);
    TRY(tessera_save(t, f->state, step));
    TRY(tessera_fence(t, NULL, 0, NULL));
    fake_spoil(f);
    uint64_t committed;
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == step);
    return NULL;
}

/* The newest step of the root is `step`, whole, with the contents of version `step`: as a reader sees it. */
static status *expect_newest(struct comm *world, const struct job *j, struct fake *f, uint64_t step)
{
    tessera *t;
    uint64_t found;
    TRY(open_job(world, j, j->store, true, &t));
    fake_spoil(f);
    TRY(tessera_load_newest(t, f->state, &found));
    EXPECT(found == step);
    TRY(fake_check(f, step));
    return tessera_close(t);
}

/* ---- one operation of one rank fails: for each operation of a save */

static status *expect_same(struct comm *world, const status *st)
{
    struct hash128 h = hash_init(1);
    hash_update(&h, status_message(st), strlen(status_message(st)));
    h = hash_final(h);
    uint64_t v[4] = { h.a, ~h.a, (uint64_t)status_code(st), ~(uint64_t)status_code(st) };
    TRY(comm_allreduce(world, v, 4, COMM_U64, COMM_MAX, NULL));
    EXPECT(v[0] == ~v[1] && v[2] == ~v[3]);
    return NULL;
}

static status *faulty_save(struct comm *world, struct job *j, tessera *t, struct fake *f, uint64_t step, uint64_t *good)
{
    char dir[STEP_DIR_BYTES];
    commit_step_dir(step, dir);
    fake_fill(f, step);
    TRY(tessera_save(t, f->state, step));
    TRY(tessera_fence(t, NULL, 0, NULL));
    fake_spoil(f);
    uint64_t committed;
    status *st = tessera_wait(t, &committed);
    TRY(expect_same(world, st));
    bool failed = st != NULL;
    if (failed)
        TRY(expect_error(st, ST_IO, "injected fault", __FILE__, __LINE__));
    EXPECT(failed || committed == step);
    *good = failed ? *good : step;
    TRY(expect_newest(world, j, f, *good));
    TRY(comm_barrier(world));
    if (failed && count_names(j->store, dir))
        return ERR(INTERNAL, "%s is left over: %s", dir, j->warned->text);
    return comm_barrier(world);
}

/* The same threads over a slower store, or one call later, show tsan nothing new. */
enum { EVERY = UNDER_TSAN ? 2 : 1, EACH = UNDER_TSAN ? 3 : 1 };

static status *fault_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct store *s;
    tessera *t;
    struct fake f;
    uint64_t good = 1, failures = 0, n = 0;
    TRY(store_fault_open(j->store, &s));
    TRY(open_job(world, j, s, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(save(t, &f, 1));
    for (uint64_t more = 1; more; n++) {
        uint64_t step = good + 1;
        if (world->rank == j->fault_rank)
            store_fault_arm(s, n * EACH, j->mode);
        TRY(faulty_save(world, j, t, &f, step, &good));
        const char *happened = store_fault_disarm(s);
        /* Retention comes last. A tree that it could not remove is no step any more, and gc's; each one adds an
         * operation to every later listing, so going on would never end. */
        more = happened && strcmp(happened, "remove_tree") != 0 && strcmp(happened, "remove") != 0;
        TRY(comm_allreduce(world, &more, 1, COMM_U64, COMM_MAX, NULL));
        failures += good != step;
        good = good == step || n % 2 ? step + 1 : step; /* after a failure: the same step again, or another */
        TRY(save(t, &f, good));
        TRY(expect_newest(world, j, &f, good));
    }
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t, &p);
    EXPECT(p.failures == failures);
    if (world->rank == 0)
        j->faults = failures;
    fake_close(&f);
    TRY(tessera_close(t));
    store_fault_close(s);
    return NULL;
}

static void test_every_fault(void **state)
{
    (void)state;
    for (int c = 0; c < 8; c += EVERY) { /* c & 1: on disk */
        struct root r = root_open(c & 1);
        int size = c & 4 ? 3 : 1;
        struct lines warned = { .text = "" };
        struct job j = { .store = r.store, .warned = &warned, .cut = { size, 1, true, false, 8 }, .keep_last = 2 };
        j.fault_rank = size - 1;
        j.mode = c & 2 ? FAULT_AFTER : FAULT_BEFORE;
        assert_ok(comm_threads_run(size, fault_job, &j));
        /* a writer of three files does at least an open, a write of the header, one of the data and a finish for each
         */
        assert_true(j.faults >= 12 / EACH);
        root_close(&r);
    }
    struct root r = root_open(false); /* the rank that commits, in a job of several */
    struct lines warned = { .text = "" };
    struct job j = {
        .store = r.store, .warned = &warned, .cut = { 3, 1, true, false, 8 }, .keep_last = 1, .fault_rank = 0
    };
    assert_ok(comm_threads_run(3, fault_job, &j));
    assert_true(j.faults >= 12 / EACH);
    root_close(&r);
}

/* ---- damage */

enum damage { FLIP, TRUNCATE, REMOVE, FLIP_METADATA };

static status *read_all(struct store *s, const char *key, unsigned char **buf, size_t *n)
{
    void *p;
    TRY(store_get_all(s, key, 1 << 28, &p, n));
    *buf = p;
    return NULL;
}

/* Damage the last byte of the largest piece of a step, or its file, or its metadata. *where: what the warning has to
 * name. */
static status *damage(struct store *s, uint64_t step, enum damage how, char where[3][300])
{
    struct metadata *m;
    char dir[STEP_DIR_BYTES], key[STORE_KEY_BYTES];
    unsigned char *buf;
    size_t n, at;
    TRY(commit_read(s, step, &m));
    commit_step_dir(step, dir);
    uint64_t big = 0, tensor = 0;
    for (uint64_t i = 1; i < m->piece_count; i++)
        big = m->piece[i].bytes > m->piece[big].bytes ? i : big;
    while (m->tensor[tensor].first_piece + m->tensor[tensor].piece_count <= big)
        tensor++;
    const struct meta_piece *p = &m->piece[big];
    snprintf(key, sizeof key, "%s/%s", dir, how == FLIP_METADATA ? "metadata.pb" : m->file[p->file].name);
    snprintf(where[0], 300, "%s", how == FLIP_METADATA ? "metadata.pb" : m->file[p->file].name);
    where[1][0] = where[2][0] = 0;
    if (how == FLIP) {
        uint64_t block = (meta_blocks(p->bytes) - 1) * META_BLOCK_BYTES;
        snprintf(where[1], 300, "%s/%s", m->tensor[tensor].part, m->tensor[tensor].name);
        snprintf(where[2], 300, "offset %llu", (unsigned long long)(p->offset + block));
    }
    at = p->offset + p->bytes - 1;
    TRY(read_all(s, key, &buf, &n));
    metadata_free(m);
    buf[how == FLIP ? at : n / 2] ^= 0x10;
    status *st =
        how == REMOVE ? store_remove(s, key) : store_put(s, key, buf, how == TRUNCATE ? n - 1 : n, STORE_REPLACE);
    mem_free(buf);
    return st;
}

static status *damage_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t, *again;
    struct fake f;
    TRY(open_job(world, j, j->store, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    for (uint64_t step = 1; step <= 3; step++)
        TRY(save(t, &f, step));
    char where[3][300];
    if (world->rank == 0)
        TRY(damage(j->store, 3, (enum damage)j->fault_rank, where));
    TRY(comm_barrier(world));
    /* a reader goes past it and leaves it alone */
    TRY(expect_newest(world, j, &f, 2));
    TRY(comm_barrier(world));
    EXPECT(count_names(j->store, "step-") == 3);
    for (int i = 0; world->rank == 0 && i < 3; i++)
        EXPECT(strstr(j->warned->text, where[i]));
    EXPECT(world->rank || strstr(j->warned->text, "step 3"));
    TRY(comm_barrier(world));
    /* a writer retires it */
    uint64_t step;
    fake_spoil(&f);
    TRY(tessera_load_newest(t, f.state, &step));
    EXPECT(step == 2);
    TRY(fake_check(&f, 2));
    EXPECT(count_names(j->store, "step-000000000003.bad-") == 1);
    TRY(comm_barrier(world));
    TRY(save(t, &f, 3));
    TRY(expect_newest(world, j, &f, 3));
    /* the only ones left are damaged: no fallback, said so; a new job can begin all over */
    TRY(tessera_rewind(t, 2));
    TRY(tessera_close(t));
    EXPECT(count_names(j->store, "step-000000000003.retired-") == 1);
    TRY(comm_barrier(world));
    for (uint64_t n = 1; world->rank == 0 && n <= 2; n++)
        TRY(damage(j->store, n, (enum damage)j->fault_rank, where));
    TRY(comm_barrier(world));
    TRY(open_job(world, j, j->store, false, &again));
    EXPECT_ERROR(tessera_load_newest(again, f.state, &step), CORRUPT, "2 are damaged");
    TRY(tessera_rewind(again, TESSERA_NEWEST));
    EXPECT_ERROR(tessera_load_newest(again, f.state, &step), NOT_FOUND, "no committed step");
    TRY(save(again, &f, 1));
    TRY(expect_newest(world, j, &f, 1));
    fake_close(&f);
    return tessera_close(again);
}

static void test_damage(void **state)
{
    (void)state;
    for (int how = FLIP; how <= FLIP_METADATA; how++)
        for (int size = 1; size <= 3; size += 2) {
            struct root r = root_open(true);
            struct lines warned = { .text = "" };
            struct job j = { .store = r.store,
                             .cut = { size, 1, true, false, UNDER_TSAN ? 8 : 1 },
                             .warned = &warned,
                             .fault_rank = how };
            assert_ok(comm_threads_run(size, damage_job, &j));
            root_close(&r);
        }
}

/* ---- two jobs on one root */

/* Another job, of one rank, in this process. */
static status *other_job(const struct job *j, tessera **t, struct fake *f)
{
    struct comm *self;
    struct fake_cut one = { 1, 1, false, false, j->cut.shrink };
    TRY(comm_open("self", NULL, NULL, &self));
    status *st = open_job(self, j, j->store, false, t);
    comm_close(self);
    return st ? st : fake_open(&one, 0, f);
}

static status *zombie_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t, *other = NULL;
    struct fake f, g;
    uint64_t committed;
    TRY(open_job(world, j, j->store, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(save(t, &f, 1));
    if (world->rank == 0)
        EXPECT_ERROR(other_job(j, &other, &g), EXISTS, "");
    TRY(comm_barrier(world));
    fake_fill(&f, 2);
    TRY(tessera_save(t, f.state, 2));
    TRY(tessera_fence(t, NULL, 0, NULL));
    if (world->rank == 0) { /* as if it had been stopped for longer than its lease */
        TRY(store_remove_tree(j->store, "LEASE"));
        TRY(other_job(j, &other, &g));
        EXPECT(ckpt_attempt(other) != ckpt_attempt(t));
        fake_fill(&g, 7); /* contents that tell who saved */
        TRY(tessera_save(other, g.state, 2));
        TRY(tessera_wait(other, &committed));
        EXPECT(committed == 2);
    }
    TRY(comm_barrier(world));
    for (uint64_t step = 2; step < 5; step++) {
        status *st = tessera_wait(t, &committed);
        TRY(expect_same(world, st));
        TRY(expect_error(st, ST_CANCELLED, "lease", __FILE__, __LINE__));
        TRY(tessera_save(t, f.state, step));
    }
    EXPECT_ERROR(tessera_close(t), CANCELLED, "lease");
    if (world->rank == 0) {
        uint64_t found;
        fake_spoil(&g);
        TRY(tessera_load_newest(other, g.state, &found));
        EXPECT(found == 2);
        TRY(fake_check(&g, 7));
        TRY(tessera_close(other));
        fake_close(&g);
    }
    fake_close(&f);
    return NULL;
}

static void test_zombie(void **state)
{
    (void)state;
    for (int size = 1; size <= 3; size += 2) {
        struct root r = root_open(size == 3);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 8 } };
        assert_ok(comm_threads_run(size, zombie_job, &j));
        root_close(&r);
    }
}

/* ---- cancel, rewind, lineage */

static status *cancel_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    uint64_t good = 1;
    TRY(open_job(world, j, j->store, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(tessera_cancel(t));
    TRY(save(t, &f, 1));
    for (int ticks = -1; ticks < 40; ticks++) {
        char dir[STEP_DIR_BYTES];
        struct tessera_tick k = TESSERA_TICK;
        uint64_t step = good + 1;
        commit_step_dir(step, dir);
        fake_fill(&f, step);
        TRY(tessera_save(t, f.state, step));
        if (ticks >= 0)
            TRY(tessera_fence(t, NULL, 0, NULL));
        for (int i = 0; i < ticks && k.committed == UINT64_MAX; i++) {
            TRY(tessera_tick(t, &k));
            clock_sleep_us(100);
        }
        TRY(tessera_cancel(t));
        bool committed = k.committed == step;
        TRY(tessera_tick(t, &k));
        EXPECT(k.phase == TESSERA_IDLE);
        good = committed || k.committed == step ? step : good;
        TRY(comm_barrier(world));
        EXPECT(count_names(j->store, dir) == (good == step));
        TRY(expect_newest(world, j, &f, good));
    }
    fake_close(&f);
    return tessera_close(t);
}

static void test_cancel(void **state)
{
    (void)state;
    for (int size = 1; size <= 3; size += 2) {
        struct root r = root_open(size == 3);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 4 } };
        assert_ok(comm_threads_run(size, cancel_job, &j));
        root_close(&r);
    }
}

static status *rewind_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    struct job asking = *j;
    struct metadata *one, *two;
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, j->store, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    for (uint64_t step = 1; step <= 4; step++)
        TRY(save(t, &f, step));
    EXPECT_ERROR(tessera_load(t, f.state, 3), INVALID, "step 4 is newer");
    TRY(tessera_rewind(t, 3));
    TRY(tessera_load(t, f.state, 3));
    TRY(fake_check(&f, 3));
    TRY(save(t, &f, 4));
    TRY(tessera_close(t));
    asking.rewind = 1;
    TRY(open_job(world, &asking, j->store, false, &t));
    EXPECT_ERROR(tessera_save(t, f.state, 3), INVALID, "step 4");
    TRY(tessera_load(t, f.state, 1));
    TRY(fake_check(&f, 1));
    EXPECT(count_names(j->store, "step-000000000001") == 1 && count_names(j->store, "step-") == 5);
    TRY(comm_barrier(world));
    TRY(save(t, &f, 2));
    TRY(expect_newest(world, j, &f, 2));
    TRY(commit_read(j->store, 1, &one));
    TRY(commit_read(j->store, 2, &two));
    EXPECT(one->run_id == two->run_id && two->parent_attempt == one->attempt && two->attempt == ckpt_attempt(t));
    EXPECT(two->attempt != one->attempt && two->world == (uint32_t)world->size);
    metadata_free(one);
    metadata_free(two);
    /* ranks that save different steps: nobody saves */
    if (world->size > 1) {
        TRY(tessera_save(t, f.state, 5 + (uint64_t)world->rank));
        EXPECT_ERROR(tessera_wait(t, NULL), INVALID, "different steps: 5 to");
        TRY(save(t, &f, 6));
    }
    fake_close(&f);
    return tessera_close(t);
}

static void test_rewind(void **state)
{
    (void)state;
    for (int size = 1; size <= 3; size++) {
        struct root r = root_open(size == 2);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 8 } };
        assert_ok(comm_threads_run(size, rewind_job, &j));
        root_close(&r);
    }
}

/* ---- kill -9 */

/* Save step after step until killed. */
static status *endless(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    uint64_t step = 0;
    TRY(open_job(world, j, j->store, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    status *st = tessera_load_newest(t, f.state, &step);
    if (st)
        TRY(expect_error(st, ST_NOT_FOUND, "no committed step", __FILE__, __LINE__));
    for (;;)
        TRY(save(t, &f, ++step));
}

/* The highest step that has a directory, committed or not. */
static uint64_t newest_name(struct store *s)
{
    struct store_list l;
    uint64_t step, newest = 0;
    assert_ok(store_list(s, "", &l));
    for (size_t i = 0; i < l.count; i++)
        if (commit_parse_dir(l.entry[i].name, &step) && step > newest)
            newest = step;
    store_list_free(&l);
    return newest;
}

static status *after_kill(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    uint64_t step = 0;
    TRY(open_job(world, j, j->store, true, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    status *st = tessera_load_newest(t, f.state, &step);
    if (st)
        TRY(expect_error(st, ST_NOT_FOUND, "no committed step", __FILE__, __LINE__));
    else
        TRY(fake_check(&f, step));
    if (world->rank == 0)
        j->faults = step;
    fake_close(&f);
    return tessera_close(t);
}

/* This program again, as a job that saves into `path` until it dies: exec, since a sanitizer's runtime does not survive
 * a fork of a program that had threads. */
static pid_t start_endless(const char *path)
{
    char *argv[] = { "test_protocol", "--endless", (char *)(uintptr_t)path, NULL };
    pid_t child = fork();
    if (child == 0) {
        execv("/proc/self/exe", argv);
        _exit(2);
    }
    return child;
}

static const struct fake_cut endless_cut = { 2, 1, true, false, 4 };

static int endless_main(const char *path)
{
    struct job j = { .cut = endless_cut, .keep_last = 2 };
    status *st = store_open(path, true, &j.store);
    if (!st)
        st = comm_threads_run(2, endless, &j);
    print_error("%s\n", status_message(st));
    return 1;
}

static void test_kill(void **state)
{
    (void)state;
    struct root r = root_open(true);
    uint64_t last = 0, before = 0;
    for (uint32_t round = 0; round < 12; round++) {
        pid_t child = start_endless(r.path);
        int how;
        assert_true(child >= 0);
        /* let it get as far as one step beyond the last (instrumented builds are slow), then anywhere in the next ones
         */
        for (int i = 0; i < 2000 && newest_name(r.store) <= before; i++)
            clock_sleep_us(5000);
        clock_sleep_us(round * 3919);
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_true(WIFSIGNALED(how));
        struct job k = { .store = r.store, .cut = { 3, 3, false, false, 4 } };
        assert_ok(comm_threads_run(3, after_kill, &k));
        assert_true(k.faults >= last); /* what was committed stays */
        last = k.faults;
        before = newest_name(r.store);
    }
    assert_true(last > 0);
    root_close(&r);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--endless"))
        return endless_main(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_fault), cmocka_unit_test(test_damage), cmocka_unit_test(test_zombie),
        cmocka_unit_test(test_cancel),      cmocka_unit_test(test_rewind), cmocka_unit_test(test_kill),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
