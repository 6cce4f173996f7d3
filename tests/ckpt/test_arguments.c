/* Arguments that differ between ranks, and structs of other sizes: one error everywhere, never a hang, and nothing
 * written behind what the caller has. */
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static status *open_root(struct comm *world, struct store *s, bool read_only, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.read_only = read_only;
    return ckpt_open(&o, world, NULL, s, out);
}

static status *one_vector(int rank, float *data, tessera_state **out)
{
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model", a.name = "v", a.dtype = TESSERA_F32, a.ndim = 1, a.shape[0] = 4, a.length[0] = rank ? 0 : 4;
    a.data = data;
    TRY(tessera_state_new(NULL, out));
    return tessera_state_add_tensor(*out, &a);
}

static status *save(tessera *t, tessera_state *s, uint64_t step)
{
    uint64_t committed;
    TRY(tessera_save(t, s, step));
    TRY(tessera_wait(t, &committed));
    EXPECT(committed == step);
    return NULL;
}

/* All ranks get the same words: the code, the text, and its hash. */
static status *same_error(struct comm *world, status *st, enum status_code code, const char *text)
{
    char words[1024] = "", first[1024];
    snprintf(words, sizeof words, "%s", status_message(st));
    memcpy(first, words, sizeof first);
    TRY(expect_error(st, code, text, __FILE__, __LINE__));
    TRY(comm_bcast(world, first, sizeof first, 0, NULL));
    EXPECT(!strcmp(first, words));
    return NULL;
}

/* How the save that was given different steps is ended. */
enum way { WAIT, FENCE, FIND, CANCEL, CLOSE, WAYS };

static status *end_by(struct comm *world, tessera *t, enum way way)
{
    uint64_t step;
    if (way == FENCE)
        TRY(tessera_fence(t, NULL, 0, NULL));
    if (way == FIND) {
        TRY(tessera_find(t, TESSERA_NEWEST, &step));
        EXPECT(step == 4);
    }
    if (way == CANCEL)
        return tessera_cancel(t);
    return same_error(world, way == CLOSE ? tessera_close(t) : tessera_wait(t, NULL), ST_INVALID,
                      "ranks save different");
}

static status *save_steps_job(struct comm *world, void *arg)
{
    float data[4] = { 1, 2, 3, 4 };
    tessera *t;
    tessera_state *s;
    int me = world->rank;
    TRY(one_vector(me, data, &s));
    /* rank 1's step against the others' 9: above; committed; below; none */
    const uint64_t other[] = { 10, 4, 2, UINT64_MAX };
    for (int way = 0; way < WAYS; way++) {
        for (int odd = 0; odd < 2; odd++)
            for (int k = 0; k < 4; k++) {
                TRY(open_root(world, arg, false, &t));
                TRY(tessera_rewind(t, TESSERA_NEWEST));
                TRY(save(t, s, 4));
                TRY(tessera_save(t, s, me == odd ? other[k] : 9));
                TRY(end_by(world, t, (enum way)way));
                if (way == CLOSE)
                    continue;
                TRY(save(t, s, 11)); /* and the handle goes on */
                TRY(tessera_close(t));
            }
    }
    TRY(open_root(world, arg, false, &t));
    TRY(tessera_rewind(t, TESSERA_NEWEST));
    TRY(save(t, s, 4));
    /* all refuse: at once, whether alike or not */
    TRY(same_error(world, tessera_save(t, s, 4), ST_EXISTS, "step 4"));
    TRY(same_error(world, tessera_save(t, s, 3), ST_INVALID, "step 4 is committed and newer"));
    TRY(same_error(world, tessera_save(t, s, UINT64_MAX), ST_INVALID, "no such step"));
    TRY(same_error(world, tessera_save(t, s, me ? 4 : 3), ST_INVALID, "different steps: 3 to 4"));
    TRY(same_error(world, tessera_save(t, NULL, 5), ST_INVALID, "no state"));
    /* one has no state */
    TRY(tessera_save(t, me == 1 ? NULL : s, 5));
    TRY(same_error(world, tessera_wait(t, NULL), ST_INVALID, "no state"));
    TRY(save(t, s, 5));
    tessera_state_free(s);
    return tessera_close(t);
}

static void test_save_steps(void **state)
{
    (void)state;
    for (int size = 2; size <= 3; size++) {
        struct root r = root_open(size == 2);
        assert_ok(comm_threads_run(size, save_steps_job, r.store));
        root_close(&r);
    }
}

static status *load_steps_job(struct comm *world, void *arg)
{
    float data[4] = { 1, 2, 3, 4 };
    uint64_t step;
    tessera *t, *reader;
    tessera_state *s;
    bool odd = world->rank == world->size - 1;
    TRY(one_vector(world->rank, data, &s));
    TRY(open_root(world, arg, false, &t));
    for (uint64_t n = 1; n <= 3; n++)
        TRY(save(t, s, n));
    TRY(open_root(world, arg, true, &reader));
    for (int k = 0; k < 2; k++) { /* before and after a step is settled on */
        TRY(same_error(world, tessera_load(reader, s, odd ? 2 : 3), ST_INVALID, "different values: 2 to 3"));
        TRY(same_error(world, tessera_load(t, s, odd ? 3 : 1), ST_INVALID, "different values: 1 to 3"));
        TRY(same_error(world, tessera_find(t, odd ? TESSERA_NEWEST : 2, &step), ST_INVALID, "find: step"));
        TRY(same_error(world, tessera_rewind(t, odd ? 1 : 2), ST_INVALID, "rewind: step"));
        TRY(same_error(world, tessera_load(t, odd ? NULL : s, 3), ST_INVALID, "no state"));
        TRY(tessera_load(t, s, 3));
        TRY(tessera_load(reader, s, 3));
    }
    TRY(tessera_find(t, TESSERA_NEWEST, &step));
    EXPECT(step == 3); /* no rewind happened */
    TRY(tessera_close(reader));
    TRY(same_error(world, open_root(world, arg, odd, &reader), ST_INVALID, "read_only"));
    tessera_state_free(s);
    return tessera_close(t);
}

static void test_load_steps(void **state)
{
    (void)state;
    for (int size = 2; size <= 4; size += 2) {
        struct root r = root_open(false);
        assert_ok(comm_threads_run(size, load_steps_job, r.store));
        root_close(&r);
    }
}

/* ---- sizes of structs */

/* A struct in memory that is longer than what its size says, or than the library knows. */
union roomy {
    struct tessera_tick tick;
    struct tessera_progress progress;
    struct tessera_load_report report;
    struct tessera_options options;
    struct tessera_tensor tensor;
    size_t size;
    unsigned char bytes[1024];
};

static status *untouched(const union roomy *r, size_t from)
{
    for (size_t i = from; i < sizeof r->bytes; i++)
        EXPECT(r->bytes[i] == 0xee);
    return NULL;
}

static status *sizes_job(struct comm *world, void *arg)
{
    union roomy r;
    float data[4] = { 1, 2, 3, 4 };
    tessera *t;
    tessera_state *s;
    size_t first = offsetof(struct tessera_options, warn_arg) + sizeof(void *);
    r.options = (struct tessera_options)TESSERA_OPTIONS;
    r.size = first; /* a program built with the first header: what lies behind is not its options */
    memset(r.bytes + first, 0xee, sizeof r - first);
    TRY(ckpt_open(&r.options, world, NULL, arg, &t));
    TRY(tessera_close(t));
    memset(&r, 0xee, sizeof r);
    r.options = (struct tessera_options)TESSERA_OPTIONS;
    r.size = sizeof r; /* a program built with a later header */
    TRY(ckpt_open(&r.options, world, NULL, arg, &t));
    r.size = first - 1;
    tessera *none;
    EXPECT_ERROR(ckpt_open(&r.options, world, NULL, arg, &none), INVALID, "TESSERA_OPTIONS");
    memset(&r, 0xee, sizeof r);
    r.tensor = (struct tessera_tensor)TESSERA_TENSOR;
    r.tensor.part = "model", r.tensor.name = "v", r.tensor.dtype = TESSERA_F32, r.tensor.ndim = 1;
    r.tensor.shape[0] = r.tensor.length[0] = 4, r.tensor.data = data;
    TRY(tessera_state_new(t, &s));
    r.size = sizeof r;
    TRY(tessera_state_add_tensor(s, &r.tensor));
    r.size = offsetof(struct tessera_tensor, reference) - 1; /* less than the first release's */
    EXPECT_ERROR(tessera_state_add_tensor(s, &r.tensor), INVALID, "TESSERA_TENSOR");
    TRY(save(t, s, 1));
    TRY(tessera_load(t, s, 1));
    EXPECT_ERROR(tessera_stored(t, "model", "v", &r.tensor), INVALID, "TESSERA_TENSOR");

    memset(&r, 0xee, sizeof r);
    r.size = sizeof(size_t) + 4; /* room for no whole field */
    TRY(tessera_tick(t, &r.tick));
    TRY(untouched(&r, sizeof(size_t)));
    memset(&r, 0xee, sizeof r);
    r.tick = (struct tessera_tick)TESSERA_TICK;
    r.size = sizeof r;
    TRY(tessera_tick(t, &r.tick));
    EXPECT(r.size == sizeof r && r.tick.phase == TESSERA_IDLE && r.tick.committed == UINT64_MAX);
    TRY(untouched(&r, sizeof r.tick));

    for (size_t room = 0; room <= sizeof r.progress; room += 4) {
        memset(&r, 0xee, sizeof r);
        r.size = room;
        tessera_get_progress(t, &r.progress);
        EXPECT(r.size == room);
        TRY(untouched(&r, room > sizeof(size_t) ? room : sizeof(size_t)));
        EXPECT(room < sizeof r.progress || r.progress.saves == 1);
        memset(&r, 0xee, sizeof r);
        r.size = room;
        tessera_get_load_report(t, &r.report);
        size_t most = room < sizeof r.report ? room : sizeof r.report;
        TRY(untouched(&r, most > sizeof(size_t) ? most : sizeof(size_t)));
        EXPECT(room < sizeof r.report || r.report.unique_bytes == 16);
    }
    tessera_state_free(s);
    return tessera_close(t);
}

static void test_sizes(void **state)
{
    (void)state;
    struct root r = root_open(false);
    assert_ok(comm_threads_run(1, sizes_job, r.store));
    root_close(&r);
}

/* ---- the words of an error when nobody listens to warnings */

static status *damaged_job(struct comm *world, void *arg)
{
    float data[4] = { 1, 2, 3, 4 };
    uint64_t step;
    tessera *t;
    tessera_state *s;
    struct store *store = arg;
    TRY(one_vector(world->rank, data, &s));
    TRY(open_root(world, store, false, &t));
    TRY(save(t, s, 1));
    TRY(save(t, s, 2));
    for (uint64_t n = 1; world->rank == 0 && n <= 2; n++) {
        char dir[64], key[STORE_KEY_BYTES];
        struct store_list l;
        snprintf(dir, sizeof dir, "step-%012d", (int)n);
        TRY(store_list(store, dir, &l));
        for (size_t i = 0; i < l.count; i++) {
            uint64_t bytes = l.entry[i].info.bytes;
            if (!strstr(l.entry[i].name, ".h5"))
                continue;
            unsigned char *whole = mem_alloc(bytes);
            snprintf(key, sizeof key, "%s/%s", dir, l.entry[i].name);
            TRY(store_get(store, key, 0, whole, bytes));
            for (uint64_t at = 4096; at < bytes; at++)
                whole[at] ^= 1;
            TRY(store_put(store, key, whole, bytes, STORE_REPLACE));
            mem_free(whole);
        }
        store_list_free(&l);
    }
    TRY(comm_barrier(world));
    status *st = tessera_load_newest(t, s, &step);
    EXPECT(strstr(status_message(st), "2 are damaged") && strstr(status_message(st), "step 2: file model-00000."));
    EXPECT(strstr(status_message(st), "tensor model/v: block at offset 4096"));
    TRY(same_error(world, st, ST_CORRUPT, "crc32c"));
    TRY(tessera_rewind(t, TESSERA_NEWEST));
    EXPECT_ERROR(tessera_find(t, TESSERA_NEWEST, &step), NOT_FOUND, "no committed step");
    tessera_state_free(s);
    return tessera_close(t);
}

static void test_damage_without_warn(void **state)
{
    (void)state;
    for (int size = 1; size <= 2; size++) {
        struct root r = root_open(false);
        assert_ok(comm_threads_run(size, damaged_job, r.store));
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_save_steps),
        cmocka_unit_test(test_load_steps),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_damage_without_warn),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
