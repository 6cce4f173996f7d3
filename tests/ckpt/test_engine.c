/* The engine over ranks that are threads: every byte comes back, at any other number of ranks and cuts. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

struct job {
    struct store *store;
    struct fake_cut cut;
    uint64_t step, version;
    uint64_t staging, chunk;
    int writers, keep_last;
};

static status *open_job(struct comm *world, const struct job *j, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    o.staging_bytes = j->staging;
    o.chunk_bytes = j->chunk;
    o.writers = j->writers;
    o.keep_last = j->keep_last;
    return ckpt_open(&o, world, NULL, j->store, out);
}

static status *save_and_wait(tessera *t, struct fake *f, uint64_t step, uint64_t version)
{
    uint64_t committed;
    fake_fill(f, version);
    TRY(tessera_save(t, f->state, step));
    TRY(tessera_fence(t, NULL, 0, NULL));
    fake_spoil(f);
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == step);
    return NULL;
}

static status *save_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(tessera_state_add_blob(f.state, "extra", "config", 0, "same", 4));
    uint32_t mine = (uint32_t)world->rank * 7 + 1;
    TRY(tessera_state_add_blob(f.state, "rng", "state", 1, &mine, world->rank % 2 ? 4 : 3));
    TRY(save_and_wait(t, &f, j->step, j->version));
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t, &p);
    EXPECT(p.saves == 1 && p.failures == 0 && p.phase == TESSERA_IDLE && p.captured_bytes == p.total_bytes);
    EXPECT(p.staging_peak_bytes <= p.staging_cap_bytes && p.written_bytes >= p.total_bytes);
    uint64_t least = 2 * 1048576;
    EXPECT(!j->staging || p.staging_cap_bytes <= (j->staging > least ? j->staging : least));
    fake_close(&f);
    return tessera_close(t);
}

static status *check_blobs(tessera *t, int saved_ranks)
{
    const void *data;
    size_t bytes;
    TRY(tessera_blob(t, "extra", "config", -1, &data, &bytes));
    EXPECT(bytes == 4 && !memcmp(data, "same", 4));
    for (int r = 0; r < saved_ranks; r++) {
        uint32_t theirs = (uint32_t)r * 7 + 1;
        TRY(tessera_blob(t, "rng", "state", r, &data, &bytes));
        EXPECT(bytes == (r % 2 ? 4 : 3) && !memcmp(data, &theirs, bytes));
    }
    EXPECT_ERROR(tessera_blob(t, "rng", "state", saved_ranks, &data, &bytes), NOT_FOUND, "rng/state");
    return NULL;
}

struct load_job {
    struct job j;
    int saved_ranks;
    bool read_only;
};

static status *load_job(struct comm *world, void *arg)
{
    const struct load_job *l = arg;
    tessera *t;
    struct fake f;
    uint64_t step = 0;
    TRY(open_job(world, &l->j, l->read_only, &t));
    TRY(fake_open(&l->j.cut, world->rank, &f));
    fake_spoil(&f);
    TRY(tessera_load_newest(t, f.state, &step));
    EXPECT(step == l->j.step);
    TRY(fake_check(&f, l->j.version));
    TRY(check_blobs(t, l->saved_ranks));
    struct tessera_load_report r = TESSERA_LOAD_REPORT;
    tessera_get_load_report(t, &r);
    EXPECT(r.unique_bytes == fake_bytes(&l->j.cut));
    EXPECT(r.storage_bytes == r.unique_bytes); /* everything is wanted, and nothing is read twice */
    fake_close(&f);
    return tessera_close(t);
}

static const struct fake_cut cuts[] = {
    { 1, 1, false, false, 0 }, { 1, 1, false, true, 0 },  { 2, 2, false, false, 0 }, { 2, 1, true, true, 0 },
    { 3, 1, false, false, 0 }, { 4, 2, true, false, 0 },  { 4, 4, false, true, 0 },  { 5, 1, true, false, 0 },
    { 6, 3, true, true, 0 },   { 6, 2, false, false, 0 },
};
enum { CUTS = sizeof cuts / sizeof *cuts };

static void reshard_case(int from, int to, bool posix, uint64_t staging, uint64_t chunk)
{
    struct root r = root_open(posix);
    struct job j = { .store = r.store, .cut = cuts[from], .step = 7, .version = 3, .staging = staging, .chunk = chunk };
    j.writers = 1 + from % 3;
    j.cut.shrink = (from + to) % 3 ? 8 : 1;
    assert_ok(comm_threads_run(j.cut.size, save_job, &j));
    struct load_job l = { .j = j, .saved_ranks = j.cut.size, .read_only = to % 2 };
    l.j.cut = cuts[to];
    l.j.cut.shrink = j.cut.shrink;
    assert_ok(comm_threads_run(l.j.cut.size, load_job, &l));
    root_close(&r);
}

#ifdef __SANITIZE_THREAD__
enum { EVERY = 3 }; /* all cuts save and all load; that sanitizer looks at threads, not at cuts */
#else
enum { EVERY = 1 };
#endif

static void test_reshard_grid(void **state)
{
    (void)state;
    for (int from = 0; from < CUTS; from++)
        for (int to = 0; to < CUTS; to++)
            if (((from + to) % 3 || (from + to) % 6 == 0) && (from + 2 * to) % EVERY == 0)
                reshard_case(from, to, (from + to) % 4 == 0, 0, 0);
}

/* Staging smaller than the state, and chunks at the edges of checksum blocks. */
static void test_small_staging(void **state)
{
    (void)state;
    static const uint64_t staging[] = { 1, 3 << 20, 5 << 20 }, chunk[] = { 4096, 1 << 20, (1 << 20) + 4096, 3 << 20 };
    for (int s = 0; s < 3; s++)
        for (int c = 0; c < 4; c++)
            reshard_case(s, s == 1 ? 2 : 8, c % 2, staging[s], chunk[c]);
}

/* ---- many saves of one handle */

static status *steady_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    uint64_t first_count = 0;
    for (uint64_t step = 1; step <= 8; step++) {
        if (step == 4)
            first_count = mem_count();
        TRY(save_and_wait(t, &f, step, step * 11));
    }
    EXPECT(ckpt_plans_made(t) == 1);
    /* All ranks' threads count together: a save is some store and metadata calls, not one a piece or a chunk. */
    EXPECT(mem_count() - first_count <= 5 * 100 * (uint64_t)world->size);
    fake_spoil(&f);
    EXPECT_ERROR(tessera_save(t, f.state, 8), EXISTS, "step 8");
    EXPECT_ERROR(tessera_save(t, f.state, 5), INVALID, "step 8");
    TRY(tessera_load(t, f.state, 8));
    TRY(fake_check(&f, 88));
    EXPECT_ERROR(tessera_load(t, f.state, 7), INVALID, "rewind");
    EXPECT_ERROR(tessera_load(t, f.state, 5), NOT_FOUND, "step 5");
    fake_close(&f);
    return tessera_close(t);
}

static void test_steady(void **state)
{
    (void)state;
    for (int size = 1; size <= 4; size += 3) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 8 }, .keep_last = 2 };
        assert_ok(comm_threads_run(size, steady_job, &j));
        struct store_list l;
        size_t steps = 0;
        assert_ok(store_list(r.store, "", &l));
        for (size_t i = 0; i < l.count; i++)
            steps += !strncmp(l.entry[i].name, "step-", 5);
        store_list_free(&l);
        assert_int_equal(steps, 2);
        root_close(&r);
    }
}

/* A rank alone adds a tensor: all plan again, nobody hangs, old and new are there. */
static status *changing_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    double extra[4] = { 1, 2, 3, 4 }, back[4] = { 0 };
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(save_and_wait(t, &f, 1, 1));
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "extra";
    a.name = "late";
    a.dtype = TESSERA_F64;
    a.ndim = 1;
    a.shape[0] = a.length[0] = 4;
    a.data = extra;
    bool mine = world->rank == world->size - 1;
    if (mine)
        TRY(tessera_state_add_tensor(f.state, &a));
    TRY(save_and_wait(t, &f, 2, 2));
    EXPECT(ckpt_plans_made(t) == 2);
    TRY(save_and_wait(t, &f, 3, 3));
    EXPECT(ckpt_plans_made(t) == 2);
    fake_close(&f);
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(tessera_load(t, f.state, 3));
    TRY(fake_check(&f, 3));
    tessera_state *s;
    TRY(tessera_state_new(t, &s));
    a.data = back;
    TRY(tessera_state_add_tensor(s, &a));
    TRY(tessera_load(t, s, 3));
    EXPECT(!memcmp(extra, back, sizeof back));
    TRY(tessera_stored(t, "extra", "late", &a));
    EXPECT(a.dtype == TESSERA_F64 && a.ndim == 1 && a.shape[0] == 4);
    EXPECT_ERROR(tessera_stored(t, "extra", "later", &a), NOT_FOUND, "later");
    tessera_state_free(s);
    /* without the tensor again, with ticks only */
    TRY(tessera_save(t, f.state, 4));
    uint64_t committed;
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == 4 && ckpt_plans_made(t) == 3);
    fake_close(&f);
    return tessera_close(t);
}

static void test_changing_state(void **state)
{
    (void)state;
    for (int size = 1; size <= 5; size += 2) {
        struct root r = root_open(true);
        struct job j = { .store = r.store, .cut = { size, 1, true, false, 8 } };
        assert_ok(comm_threads_run(size, changing_job, &j));
        root_close(&r);
    }
}

/* ---- flags, phases, fences of single tensors */

static status *ticking_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    int last = TESSERA_IDLE;
    uint64_t committed = UINT64_MAX;
    for (int n = 0; n < 50000 && committed == UINT64_MAX; n++) {
        struct tessera_tick k = TESSERA_TICK;
        k.flag[0] = n * 10 + world->rank;
        k.flag[1] = -5 - world->rank;
        TRY(tessera_tick(t, &k));
        int want = n ? (n - 1) * 10 + world->size - 1 : 0;
        EXPECT(k.flag[0] == want && k.flag[1] == (n ? -5 : 0));
        EXPECT(k.phase >= last || (last != TESSERA_IDLE && k.phase == TESSERA_IDLE));
        last = k.phase;
        committed = k.committed;
        clock_sleep_us(50); /* a step of computing */
        if (n != 3)
            continue;
        fake_fill(&f, 9);
        TRY(tessera_save(t, f.state, 21));
        EXPECT_ERROR(tessera_save(t, f.state, 22), UNAVAILABLE, "step 21");
        for (size_t i = 0; i < f.count; i++) { /* in both directions, each overwritten at once */
            const struct fake_piece *p = &f.piece[world->size % 2 ? f.count - 1 - i : i];
            TRY(tessera_fence(t, p->memory, p->memory_bytes + 1, NULL));
            memset(p->memory, 0xa5, p->memory_bytes);
        }
    }
    EXPECT(committed == 21 && last == TESSERA_IDLE);
    TRY(tessera_load(t, f.state, 21));
    TRY(fake_check(&f, 9));
    fake_close(&f);
    return tessera_close(t);
}

static void test_ticking(void **state)
{
    (void)state;
    for (int size = 1; size <= 4; size++) {
        struct root r = root_open(size == 2);
        struct job j = { .store = r.store, .cut = { size, 1, false, size == 3, 4 }, .staging = 2 << 20 };
        assert_ok(comm_threads_run(size, ticking_job, &j));
        root_close(&r);
    }
}

/* ---- what a load refuses */

static status *one_tensor(const char *name, int dtype, uint64_t n, void *data, tessera_state **out)
{
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model";
    a.name = name;
    a.dtype = dtype;
    a.ndim = 1;
    a.shape[0] = a.length[0] = n;
    a.data = data;
    TRY(tessera_state_new(NULL, out));
    return tessera_state_add_tensor(*out, &a);
}

static status *refusing_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    float data[8] = { 0 };
    tessera_state *s;
    uint64_t step;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    EXPECT_ERROR(tessera_find(t, TESSERA_NEWEST, &step), NOT_FOUND, "no committed step");
    EXPECT_ERROR(tessera_load_newest(t, f.state, &step), NOT_FOUND, "no committed step");
    TRY(save_and_wait(t, &f, 1, 1));
    /* rank 0 alone asks for what is not there: everyone gets its error */
    TRY(one_tensor(world->rank ? "norm" : "norma", TESSERA_F32, 5, data, &s));
    EXPECT_ERROR(tessera_load(t, s, 1), NOT_FOUND, "model/norma");
    tessera_state_free(s);
    TRY(one_tensor("norm", TESSERA_I32, 5, data, &s));
    EXPECT_ERROR(tessera_load(t, s, 1), INVALID, "stored as f32 and wanted as i32");
    tessera_state_free(s);
    TRY(one_tensor("norm", TESSERA_F32, 6, data, &s));
    EXPECT_ERROR(tessera_load(t, s, 1), INVALID, "model/norm");
    tessera_state_free(s);
    /* a hole: half of a tensor that nobody completes; the handle stays usable */
    TRY(one_tensor("half", TESSERA_F32, 5, data, &s));
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model", a.name = "hole", a.dtype = TESSERA_F32, a.ndim = 1, a.shape[0] = 8, a.length[0] = 4,
    a.data = data;
    TRY(tessera_state_add_tensor(s, &a));
    TRY(tessera_save(t, s, 2));
    EXPECT_ERROR(tessera_wait(t, NULL), INVALID, "hole");
    tessera_state_free(s);
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    EXPECT(step == 1);
    TRY(save_and_wait(t, &f, 2, 5));
    TRY(tessera_load_newest(t, f.state, &step));
    EXPECT(step == 2);
    TRY(fake_check(&f, 5));
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(t, &p);
    EXPECT(p.failures == 1 && p.saves == 2);
    fake_close(&f);
    return tessera_close(t);
}

static void test_refusals(void **state)
{
    (void)state;
    for (int size = 1; size <= 3; size += 2) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .cut = { size, 1, false, false, 8 } };
        assert_ok(comm_threads_run(size, refusing_job, &j));
        root_close(&r);
    }
}

/* The stored alias can be asked for as a tensor of its own; a state of blobs alone can be saved. */
static status *alias_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t;
    struct fake f;
    float whole[67][16], tied[67][16];
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(save_and_wait(t, &f, 1, 1));
    for (int k = 0; k < 2; k++) {
        struct tessera_tensor a = TESSERA_TENSOR;
        tessera_state *s;
        a.part = "model", a.name = k ? "head.weight" : "embed.weight", a.dtype = TESSERA_F32, a.ndim = 2;
        a.shape[0] = a.length[0] = 67;
        a.shape[1] = a.length[1] = 16;
        a.data = k ? tied : whole;
        TRY(tessera_state_new(t, &s));
        TRY(tessera_state_add_tensor(s, &a));
        TRY(tessera_load(t, s, 1));
        tessera_state_free(s);
    }
    EXPECT(!memcmp(whole, tied, sizeof whole));
    tessera_state *s;
    const void *data;
    size_t bytes;
    uint64_t step;
    TRY(tessera_state_new(t, &s));
    TRY(tessera_state_add_blob(s, "extra", "note", 0, "first", 5));
    TRY(tessera_state_add_blob(s, "extra", "note", 0, "", 0));
    TRY(tessera_save(t, s, 2));
    TRY(tessera_wait(t, NULL));
    tessera_state_free(s);
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    EXPECT(step == 2);
    TRY(tessera_blob(t, "extra", "note", -1, &data, &bytes));
    EXPECT(bytes == 0);
    TRY(tessera_find(t, 1, &step));
    EXPECT(step == 1);
    fake_close(&f);
    return tessera_close(t);
}

static void test_aliases_and_blobs(void **state)
{
    (void)state;
    for (int size = 1; size <= 2; size++) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .cut = { size, size, false, false, 8 } };
        assert_ok(comm_threads_run(size, alias_job, &j));
        root_close(&r);
    }
}

/* A reader loads what is committed while a writer saves and retention removes. */
static status *reader_job(struct comm *world, void *arg)
{
    struct job *j = arg;
    tessera *t, *reader;
    struct fake f, g;
    TRY(open_job(world, j, false, &t));
    TRY(fake_open(&j->cut, world->rank, &f));
    TRY(fake_open(&j->cut, world->rank, &g));
    TRY(save_and_wait(t, &f, 1, 1));
    TRY(open_job(world, j, true, &reader));
    for (uint64_t step = 2; step < 6; step++) {
        uint64_t found;
        fake_fill(&f, step);
        TRY(tessera_save(t, f.state, step));
        TRY(tessera_load_newest(reader, g.state, &found));
        EXPECT(found == step - 1 || found == step);
        TRY(fake_check(&g, found));
        TRY(tessera_wait(t, NULL));
    }
    EXPECT_ERROR(tessera_save(reader, g.state, 9), INVALID, "read-only");
    EXPECT_ERROR(tessera_rewind(reader, 1), INVALID, "read-only");
    TRY(tessera_close(reader));
    fake_close(&f);
    fake_close(&g);
    return tessera_close(t);
}

static void test_reader(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct job j = { .store = r.store, .cut = { 2, 1, true, false, 4 }, .keep_last = 1 };
    assert_ok(comm_threads_run(2, reader_job, &j));
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reshard_grid),      cmocka_unit_test(test_small_staging), cmocka_unit_test(test_steady),
        cmocka_unit_test(test_changing_state),    cmocka_unit_test(test_ticking),       cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_aliases_and_blobs), cmocka_unit_test(test_reader),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
