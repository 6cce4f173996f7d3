/* tessera_reshard where the grid (test_grid.c) does not go: strided memory on both sides, casts, replicas, tensors of
 * several checksum blocks and rounds, selection, and what is refused; on one node that shares memory, or cannot, and on
 * several. Ranks are threads. */
#include "ckpt/cast.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { ROWS = 37 };
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { FEW = 1 };
#else
enum { FEW = 0 };
#endif
enum placing { ONE_NODE, ONE_NODE_NO_WINDOW, PAIRS, ALTERNATE, ALONE, PLACINGS };

static atomic_bool no_windows;
static atomic_int windows; /* made */

int __real_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags)
{
    if (no_windows) {
        errno = ENOSYS;
        return -1;
    }
    windows++;
    return __real_memfd_create(name, flags);
}

struct job {
    struct store *store;
    uint64_t cols;
    int step;              /* elements between neighbours in a row, of both sides */
    bool columns, replica; /* how `to` is cut; `from` lies whole on every rank */
    int from_type, to_type;
    enum placing placing;
};

static status *place(tessera *t, const struct comm *world, enum placing how)
{
    char host[16];
    snprintf(host, sizeof host, "h%d",
             how == PAIRS       ? world->rank / 2
             : how == ALTERNATE ? world->rank % 2
             : how == ALONE     ? world->rank
                                : 0);
    return ckpt_set_node(t, host);
}

struct half {
    tessera_state *state;
    uint64_t first[2], len[2];
    int64_t stride[2];
    int type;
    unsigned char *data;
    size_t bytes;
};

static double value(uint64_t row, uint64_t col, uint64_t cols)
{
    return (double)((row * cols + col) % 2048); /* exact in every type used */
}

static status *half_open(const struct job *j, int type, int rank, int ranks, bool columns, bool whole, struct half *h)
{
    uint64_t r = (uint64_t)rank, n = (uint64_t)ranks, size[2] = { ROWS, j->cols };
    struct tessera_tensor a = TESSERA_TENSOR;
    *h = (struct half){ .type = type, .len = { ROWS, j->cols } };
    if (!whole) {
        uint64_t d = columns;
        h->first[d] = size[d] * r / n;
        h->len[d] = size[d] * (r + 1) / n - h->first[d];
    }
    h->stride[1] = j->step;
    h->stride[0] = (int64_t)h->len[1] * j->step + (j->step > 1 ? 5 : 0);
    h->bytes = (size_t)(ROWS + 1) * ((size_t)h->stride[0] + 1) * dtype_bytes((enum dtype)type);
    h->data = mem_alloc(h->bytes);
    memset(h->data, 0xee, h->bytes);
    TRY(tessera_state_new(NULL, &h->state));
    a.part = "model", a.name = "w", a.dtype = type, a.ndim = 2, a.data = h->data;
    for (int d = 0; d < 2; d++) {
        a.shape[d] = size[d];
        a.offset[d] = h->first[d];
        a.length[d] = h->len[d];
    }
    a.stride = j->step > 1 ? h->stride : NULL;
    return tessera_state_add_tensor(h->state, &a);
}

static void half_close(struct half *h)
{
    tessera_state_free(h->state);
    mem_free(h->data);
}

/* Fill it, or compare; false: an element differs, or a byte between them was written. */
static bool half_is(const struct job *j, struct half *h, bool fill)
{
    size_t size = dtype_bytes((enum dtype)h->type);
    unsigned char *copy = mem_alloc(h->bytes);
    memset(copy, 0xee, h->bytes);
    for (uint64_t r = 0; r < h->len[0]; r++)
        for (uint64_t c = 0; c < h->len[1]; c++) {
            double x = value(h->first[0] + r, h->first[1] + c, j->cols);
            int64_t at = (int64_t)r * h->stride[0] + (int64_t)c * h->stride[1];
            cast_elems(DTYPE_F64, (enum dtype)h->type, &x, copy + (size_t)at * size, 1);
        }
    if (fill)
        memcpy(h->data, copy, h->bytes);
    bool same = memcmp(h->data, copy, h->bytes) == 0;
    mem_free(copy);
    return same;
}

static status *move_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct tessera_load_options lo = TESSERA_LOAD_OPTIONS;
    struct half from, to;
    tessera *t;
    TRY(ckpt_open(&o, world, NULL, j->store, &t));
    TRY(place(t, world, j->placing));
    TRY(half_open(j, j->from_type, world->rank, world->size, false, j->replica, &from));
    TRY(half_open(j, j->to_type, world->rank, world->size, j->columns, false, &to));
    half_is(j, &from, true);
    lo.allow = j->from_type == j->to_type ? 0 : TESSERA_ALLOW_CAST;
    TRY(tessera_reshard(t, from.state, to.state, &lo));
    EXPECT(half_is(j, &to, false));
    EXPECT(half_is(j, &from, false)); /* the source stays */
    if (j->from_type != j->to_type) {
        TRY(expect_error(tessera_reshard(t, from.state, to.state, NULL), ST_INVALID, "ALLOW_CAST", __FILE__, __LINE__));
        EXPECT(strcmp(tessera_load_name(t, TESSERA_MISSHAPEN, 0), "model/w") == 0);
    }
    half_close(&from);
    half_close(&to);
    return tessera_close(t);
}

static void test_moves(void **state)
{
    (void)state;
    int number = 0;
    static const uint64_t cols[] = { 1, 3, 64, 1001, 90001 }; /* 90001: 13 MiB of f32, several rounds a rank */
    for (int ranks = 1; ranks <= 4; ranks++)
        for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
            for (int kind = 0; kind < 12; kind++) {
                if (cols[i] > 2000 && (ranks == 1 || ranks == 4 || kind % 5))
                    continue; /* seconds under a sanitizer */
                struct root r = root_open(true);
                struct job j = { .store = r.store, .cols = cols[i], .step = kind % 3 == 2 ? 2 : 1 };
                j.columns = kind & 1;
                j.replica = kind % 4 >= 2;
                j.from_type = TESSERA_F32;
                j.to_type = kind >= 9 ? TESSERA_F64 : TESSERA_F32;
                j.placing = (enum placing)(number++ % PLACINGS);
                no_windows = j.placing == ONE_NODE_NO_WINDOW;
                int before = windows;
                assert_ok(comm_threads_run(ranks, move_job, &j));
                if (ranks == 1 || j.placing == ONE_NODE_NO_WINDOW || j.placing == ALONE)
                    assert_int_equal(windows, before);
                else if (j.placing == ONE_NODE && j.columns && !j.replica && cols[i] > 3)
                    assert_int_equal(windows, before + 1);
                no_windows = false;
                root_close(&r);
            }
}

/* Many rounds and slots, every way. */
static void test_placings(void **state)
{
    (void)state;
    for (int placing = 0; placing < PLACINGS; placing++)
        for (int columns = FEW; columns < 2; columns++) {
            struct root r = root_open(true);
            struct job j = { .store = r.store, .cols = 60001, .step = 1, .columns = columns };
            j.from_type = j.to_type = TESSERA_F32;
            j.placing = (enum placing)placing;
            no_windows = j.placing == ONE_NODE_NO_WINDOW;
            assert_ok(comm_threads_run(4, move_job, &j));
            no_windows = false;
            root_close(&r);
        }
}

/* What `from` lacks, and what is not whole. */
static status *refused_job(struct comm *world, void *arg)
{
    const struct job *j = arg;
    struct tessera_options o = TESSERA_OPTIONS;
    struct tessera_load_options lo = TESSERA_LOAD_OPTIONS;
    struct half from, to;
    tessera_state *none;
    tessera *t;
    TRY(ckpt_open(&o, world, NULL, j->store, &t));
    TRY(tessera_state_new(NULL, &none));
    TRY(half_open(j, TESSERA_F32, world->rank, world->size + 1, false, false, &from)); /* the last rows are nowhere */
    TRY(half_open(j, TESSERA_F32, world->rank, world->size, false, false, &to));
    TRY(expect_error(tessera_reshard(t, from.state, to.state, NULL), ST_INVALID, "model/w", __FILE__, __LINE__));
    TRY(expect_error(tessera_reshard(t, none, to.state, NULL), ST_NOT_FOUND, "model/w", __FILE__, __LINE__));
    EXPECT(strcmp(tessera_load_name(t, TESSERA_MISSING, 0), "model/w") == 0);
    TRY(expect_error(tessera_reshard(t, world->rank ? none : NULL, to.state, NULL), ST_INVALID, "no state", __FILE__,
                     __LINE__));
    TRY(expect_error(tessera_reshard(t, none, world->rank ? none : NULL, NULL), ST_INVALID, "no state", __FILE__,
                     __LINE__));
    TRY(tessera_reshard(t, none, none, NULL));
    lo.allow = TESSERA_ALLOW_MISSING;
    TRY(tessera_reshard(t, none, to.state, &lo));
    for (size_t i = 0; i < to.bytes; i++)
        EXPECT(to.data[i] == 0xee);    /* an error and a tensor that is missing touch nothing */
    TRY(tessera_save(t, to.state, 1)); /* the handle is as it was */
    TRY(tessera_wait(t, NULL));
    half_close(&from);
    half_close(&to);
    tessera_state_free(none);
    return tessera_close(t);
}

static void test_refused(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct root r = root_open(true);
        struct job j = { .store = r.store, .cols = 9, .step = 1 };
        assert_ok(comm_threads_run(ranks, refused_job, &j));
        root_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_moves), cmocka_unit_test(test_placings),
                                        cmocka_unit_test(test_refused) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
