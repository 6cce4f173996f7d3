/* Saves from live memory: a file holds what the tensors held at the start, although each of them is overwritten as soon
 * as its fence has returned, on a slow store, from one to four writers, with staging from the least up. */
#include "ckpt/commit.h"
#include "ckpt/live.h"
#include "ckpt/pipeline.h"
#include "ckpt/stage.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/ckpt/draw.h"
#include "tests/support/sanitized.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { ATTEMPT = 77, STEP = 3, MOST = 7, MIB = 1 << 20, MEMORY = 40 * MIB, MUCH = UNDER_TSAN ? 0 : 4 * MIB };

struct tensor {
    unsigned char *data; /* first element */
    unsigned char *begin, *end;
    uint64_t rows, cols;
    int64_t stride[2]; /* elements */
    bool strided;
    size_t elem;
    unsigned char *want; /* rows x cols elements, as at the start */
};

struct fixture {
    struct root root;
    struct store *store;
    struct device *dev;
    struct plan *plan;
    struct roster roster;
    struct share *share;
    struct pipeline *pipe;
    unsigned char *memory;
    struct tensor tensor[MOST];
    int tensors;
    bool odd; /* some tensor lies where direct writes cannot take it from */
    int writers;
};

/* Place a tensor behind *at, at an address of this kind. */
static struct tensor draw_tensor(struct draw *d, unsigned char **at, enum dtype dtype)
{
    struct tensor t = { .elem = dtype_bytes(dtype) };
    static const uint64_t sizes[] = { 0, 1, 5000, 300 << 10, MIB + 20000, 3 * MIB };
    uint64_t bytes = sizes[draw_below(d, 6)];
    bytes = draw_below(d, 3) ? draw_below(d, bytes + 1) : bytes;
    t.cols = draw_between(d, 1, 3000);
    t.rows = bytes / t.elem / t.cols;
    unsigned char *p = *at + (4096 - (uintptr_t)*at % 4096);
    static const uint64_t off[] = { 0, 0, 0, 512, 8, 4088 };
    p += off[draw_below(d, 6)];
    t.strided = draw_below(d, 4) == 0;
    t.stride[1] = 1;
    t.stride[0] = (int64_t)t.cols + (t.strided ? (int64_t)draw_below(d, 5) : 0);
    uint64_t extent = t.rows ? ((t.rows - 1) * (uint64_t)t.stride[0] + t.cols) * t.elem : 0;
    t.begin = t.data = p;
    t.end = p + extent;
    if (t.strided && draw_below(d, 2) && t.rows) { /* rows from the last to the first */
        t.data += (t.rows - 1) * (uint64_t)t.stride[0] * t.elem;
        t.stride[0] = -t.stride[0];
    }
    *at = t.end;
    return t;
}

static void draw_state(struct fixture *f, struct draw *d, struct plan_desc desc[MOST], char text[64])
{
    static const enum dtype dtypes[] = { DTYPE_U8, DTYPE_BF16, DTYPE_F32, DTYPE_F64 };
    unsigned char *at = f->memory;
    memcpy(text, "model\0optim\0", 12);
    f->tensors = (int)draw_between(d, 1, MOST);
    for (int i = 0; i < f->tensors; i++) {
        enum dtype dtype = dtypes[draw_below(d, 4)];
        struct tensor *t = &f->tensor[i];
        *t = draw_tensor(d, &at, dtype);
        assert_true(at < f->memory + MEMORY);
        t->want = mem_alloc(t->rows * t->cols * t->elem);
        f->odd = f->odd || t->strided || (uintptr_t)t->data % 512;
        text[12 + 2 * i] = (char)('a' + i);
        text[13 + 2 * i] = 0;
        desc[i] = (struct plan_desc){ .part = draw_below(d, 3) ? 0 : 6, .name = 12 + 2 * (uint64_t)i };
        desc[i].alias = UINT64_MAX;
        desc[i].dtype = dtype;
        desc[i].shape = (struct shape){ .ndim = 2, .dim = { t->rows, t->cols } };
        desc[i].piece = piece_whole(&desc[i].shape);
        desc[i].local = (uint32_t)i;
    }
}

static void open_fixture(struct fixture *f, struct draw *d, bool posix)
{
    struct plan_desc desc[MOST];
    char text[64] = "";
    memset(f, 0, sizeof *f);
    f->memory = mem_block(MEMORY, 4096);
    draw_state(f, d, desc, text);
    f->root = root_open(posix);
    assert_ok(store_fault_open(f->root.store, &f->store));
    assert_ok(device_open("cpu", 0, &f->dev));
    assert_ok(plan_make(desc, (uint64_t)f->tensors, text, sizeof text, 1, NULL, &f->plan));
    assert_ok(roster_make(f->plan, &f->roster));
    assert_ok(share_make(f->plan, &f->roster, 0, draw_between(d, 1, 3) * MIB, &f->share));
    f->writers = (int)draw_between(d, 1, 4);
    struct pipeline_options o = { .dev = f->dev, .store = f->store, .writers = f->writers, .attempt = ATTEMPT };
    o.node_ranks = (int)draw_between(d, 1, 20);
    assert_ok(pipeline_open(&o, &f->pipe));
    assert_ok(pipeline_prepare(f->pipe, f->share, draw_below(d, 2) ? draw_below(d, 20) * MIB : 0));
    for (uint64_t i = 0; i < f->share->pieces; i++) {
        const struct tensor *t = &f->tensor[f->share->piece[i].local];
        struct share_source *src = &f->share->source[i];
        const struct shape shape = { .ndim = 2, .dim = { t->rows, t->cols } };
        *src = (struct share_source){ .piece = piece_whole(&shape), .base = t->data };
        src->strided = t->strided;
        memcpy(src->stride, t->stride, sizeof t->stride);
        src->begin = (uintptr_t)t->begin;
        src->end = (uintptr_t)t->end;
    }
}

static void close_fixture(struct fixture *f)
{
    pipeline_close(f->pipe);
    share_free(f->share);
    roster_free(&f->roster);
    plan_free(f->plan);
    device_close(f->dev);
    store_fault_close(f->store);
    root_close(&f->root);
    for (int i = 0; i < f->tensors; i++)
        mem_free(f->tensor[i].want);
    mem_block_free(f->memory, MEMORY);
}

/* New values, and what the file has to hold. */
static void fill(struct fixture *f, uint64_t seed)
{
    for (int i = 0; i < f->tensors; i++) {
        struct tensor *t = &f->tensor[i];
        uint64_t x = seed * 1000 + (uint64_t)i;
        for (unsigned char *p = t->begin; p < t->end; p++)
            *p = (unsigned char)((x = x * 6364136223846793005u + 1442695040888963407u) >> 56);
        for (uint64_t r = 0; r < t->rows; r++)
            for (uint64_t c = 0; c < t->cols; c++)
                memcpy(t->want + (r * t->cols + c) * t->elem,
                       t->data + ((int64_t)r * t->stride[0] + (int64_t)c) * (int64_t)t->elem, t->elem);
    }
}

static struct pipeline_view until_drained(struct fixture *f)
{
    struct pipeline_view v;
    for (pipeline_look(f->pipe, &v); !v.drained; pipeline_look(f->pipe, &v))
        clock_sleep_us(100);
    return v;
}

static void check_files(struct fixture *f)
{
    for (uint64_t k = 0; k < f->share->files; k++) {
        const struct share_file *file = &f->share->file[k];
        char key[STORE_KEY_BYTES];
        void *buf;
        size_t n;
        commit_shard_key(STEP, file->part, 0, ATTEMPT, key);
        assert_ok(store_get_all(f->root.store, key, 1 << 28, &buf, &n));
        assert_int_equal(n, file->image.file_bytes);
        unsigned char *want = mem_calloc(n, 1);
        memcpy(want, file->image.header, file->image.header_bytes);
        for (uint64_t i = 0; i < f->share->pieces; i++) {
            const struct share_piece *p = &f->share->piece[i];
            const struct tensor *t = &f->tensor[p->local];
            if (p->file == k)
                memcpy(want + p->offset, t->want, p->bytes);
            for (uint64_t at = 0; at < p->bytes; at += META_BLOCK_BYTES) {
                uint64_t left = p->bytes - at;
                assert_int_equal(f->share->crc[p->first_crc + at / META_BLOCK_BYTES],
                                 crc32c(0, t->want + at, left < META_BLOCK_BYTES ? left : META_BLOCK_BYTES));
            }
        }
        assert_memory_equal(buf, want, n);
        mem_free(buf);
        mem_free(want);
    }
}

/* Fence and overwrite each tensor, in the order of the state or from any on, at any time. */
static void overwrite(struct fixture *f, struct draw *d)
{
    clock_sleep_us((uint32_t)draw_below(d, 4000));
    if (draw_below(d, 5) == 0)
        pipeline_fence(f->pipe, NULL, 0, NULL);
    bool back = draw_below(d, 5) == 0;
    for (int k = 0; k < f->tensors; k++) {
        const struct tensor *t = &f->tensor[back ? f->tensors - 1 - k : k];
        if (t->begin == t->end)
            continue;
        pipeline_fence(f->pipe, t->begin + draw_below(d, (uint64_t)(t->end - t->begin)), 1, NULL);
        memset(t->begin, 0xee, (size_t)(t->end - t->begin));
        if (draw_below(d, 3) == 0)
            clock_sleep_us((uint32_t)draw_below(d, 1000));
    }
}

static struct store_direct draw_direct(struct draw *d)
{
    static const struct store_direct any[] = {
        { 512, 4096 }, { 512, 4096 }, { 4096, 4096 }, { 1, 4096 }, { 512, 65536 }
    };
    return any[draw_below(d, 5)];
}

static void test_overwritten_after_fences(void **state)
{
    (void)state;
    uint64_t live = 0, staged = 0;
    for (uint32_t n = 0; n < (UNDER_TSAN ? 20 : 60); n++) {
        struct draw d = draw_from(11, n);
        struct fixture f;
        open_fixture(&f, &d, n % 8 == 7);
        store_fault_slow(f.store, (uint32_t)draw_below(&d, 3) * 700, n);
        for (int again = 0; again < 2; again++) {
            fill(&f, n * 2 + (uint64_t)again);
            memset(f.share->crc, 0xff, f.share->crcs * sizeof *f.share->crc);
            store_fault_direct(f.store, draw_direct(&d), draw_below(&d, 4) ? 1000000 : draw_below(&d, 40));
            pipeline_start(f.pipe, f.share, STEP);
            overwrite(&f, &d);
            struct pipeline_view v = until_drained(&f);
            assert_true(!v.failed && v.captured);
            assert_int_equal(v.captured_bytes, f.share->payload_bytes);
            assert_int_equal(v.written_bytes, f.share->payload_bytes);
            assert_true(v.live_bytes <= v.written_bytes && v.staging_peak_bytes <= v.staging_cap_bytes);
            live += v.live_bytes;
            staged += v.written_bytes - v.live_bytes;
            check_files(&f);
            pipeline_end(f.pipe, PIPELINE_KEEP);
        }
        close_fixture(&f);
    }
    assert_true(live > MUCH && staged > MUCH); /* both ways were tried; how often is up to the machine */
}

/* Without a fence nothing is staged, unless the share is so small that all of it is; and what can go straight does. */
static void test_without_fence(void **state)
{
    (void)state;
    uint64_t live = 0;
    for (uint32_t n = 0; n < (UNDER_TSAN ? 10 : 20); n++) {
        struct draw d = draw_from(12, n);
        struct fixture f;
        uint64_t large = 0;
        open_fixture(&f, &d, false);
        fill(&f, n);
        store_fault_direct(f.store, (struct store_direct){ 512, 4096 }, 1000000);
        pipeline_start(f.pipe, f.share, STEP);
        struct pipeline_view v = until_drained(&f);
        for (int i = 0; i < f.tensors; i++) {
            const struct tensor *t = &f.tensor[i];
            uint64_t bytes = t->rows * t->cols * t->elem, lost = 2 * BOUNCE_BYTES * (1 + bytes / MIB);
            if (!t->strided && (uintptr_t)t->data % 512 == 0 && bytes > lost)
                large += bytes - lost;
        }
        bool at_once = v.live_bytes == 0 && f.share->payload_bytes <= f.share->chunk_bytes;
        assert_true(v.live_bytes >= large || at_once);
        assert_true(v.staging_peak_bytes <= (uint64_t)f.writers * BOUNCE_BYTES || at_once);
        live += v.live_bytes;
        check_files(&f);
        pipeline_end(f.pipe, PIPELINE_KEEP);
        close_fixture(&f);
    }
    assert_true(live > MUCH);
}

/* Says "copy the rest" when asked for the n-th time. */
struct asked {
    uint64_t n;
    unsigned char *block;
};

static void *block_at_last(void *arg)
{
    struct asked *a = arg;
    return a->n-- ? NULL : a->block;
}

static void write_live(struct fixture *f, const struct share_chunk *c, struct store_writer *w, unsigned char *memory,
                       struct draw *d, uint64_t *copied, uint64_t *straight)
{
    struct report_clock clock[REPORT_STAGES] = { 0 };
    unsigned char *block = memory + BOUNCE_BYTES;
    struct asked asked = { draw_below(d, 6), block };
    struct live l = { .s = f->share, .c = c, .w = w, .clock = clock, .block = block_at_last, .arg = &asked };
    l.bounce = memory;
    l.bounce_bytes = BOUNCE_BYTES;
    l.piece_bytes = draw_between(d, 1, 32) * 65536;
    memset(block, 0xdd, f->share->block_bytes);
    assert_ok(live_write(&l));
    *straight += l.straight;
    for (uint64_t i = 0; i < c->segments; i++) { /* from here on the tensors are training's */
        const struct tensor *t = &f->tensor[f->share->piece[f->share->segment[c->first_segment + i].piece].local];
        memset(t->begin, 0xee, (size_t)(t->end - t->begin));
    }
    if (!l.given)
        return;
    *copied += c->bytes - l.rest;
    assert_ptr_equal(l.given, block);
    assert_ok(live_write_rest(&l));
}

/* A chunk whose rest is copied at any point of it: what is in the file is what the tensors held, although they are
 * overwritten as soon as live_write has returned. One chunk of each save: its tensors are in others, too. */
static void test_copied_rest(void **state)
{
    (void)state;
    uint64_t copied = 0, straight = 0;
    for (uint32_t n = 0; n < (UNDER_TSAN ? 16 : 50); n++) {
        struct draw d = draw_from(14, n);
        struct fixture f;
        open_fixture(&f, &d, false);
        store_fault_direct(f.store, draw_direct(&d), draw_below(&d, 4) ? 1000000 : draw_below(&d, 40));
        unsigned char *memory = mem_block(BOUNCE_BYTES + f.share->block_bytes, 4096);
        for (uint64_t i = 0; i < f.share->chunks; i++) {
            const struct share_chunk *c = &f.share->chunk[i];
            struct store_writer *w;
            void *got;
            size_t bytes;
            if (!c->segments)
                continue;
            fill(&f, n * 100 + i);
            memset(f.share->crc, 0xff, f.share->crcs * sizeof *f.share->crc);
            unsigned char *want = mem_calloc(c->bytes, 1);
            for (uint64_t k = c->first_segment; k < c->first_segment + c->segments; k++) {
                const struct share_segment *seg = &f.share->segment[k];
                memcpy(want + seg->at, f.tensor[f.share->piece[seg->piece].local].want + seg->lo, seg->hi - seg->lo);
            }
            assert_ok(store_writer_open(f.store, "chunk", c->offset + c->bytes, &w));
            write_live(&f, c, w, memory, &d, &copied, &straight);
            assert_ok(store_writer_finish(w));
            assert_ok(store_get_all(f.root.store, "chunk", 1 << 28, &got, &bytes));
            assert_memory_equal((unsigned char *)got + c->offset, want, c->bytes);
            for (uint64_t k = c->first_segment; k < c->first_segment + c->segments; k++) {
                const struct share_segment *seg = &f.share->segment[k];
                const uint32_t *crc = f.share->crc + f.share->piece[seg->piece].first_crc + seg->lo / META_BLOCK_BYTES;
                for (uint64_t at = 0, left = seg->hi - seg->lo; at < seg->hi - seg->lo; at += META_BLOCK_BYTES, crc++) {
                    left = seg->hi - seg->lo - at;
                    assert_int_equal(*crc,
                                     crc32c(0, want + seg->at + at, left < META_BLOCK_BYTES ? left : META_BLOCK_BYTES));
                }
            }
            mem_free(want);
            mem_free(got);
        }
        mem_block_free(memory, BOUNCE_BYTES + f.share->block_bytes);
        close_fixture(&f);
    }
    assert_true(copied > MUCH && straight > MUCH); /* both ways were tried */
}

/* A failure anywhere: every fence returns, nothing stays, and the next save is good. */
static void test_failures(void **state)
{
    (void)state;
    int failed = 0;
    for (uint32_t n = 0; n < (UNDER_TSAN ? 12 : 40); n++) {
        struct draw d = draw_from(13, n);
        struct fixture f;
        struct store_list l;
        open_fixture(&f, &d, false);
        fill(&f, n);
        store_fault_slow(f.store, 300, n);
        store_fault_direct(f.store, (struct store_direct){ 512, 4096 }, 1000000);
        store_fault_arm(f.store, draw_below(&d, 12), draw_below(&d, 2) ? FAULT_BEFORE : FAULT_AFTER);
        pipeline_start(f.pipe, f.share, STEP);
        if (draw_below(&d, 4)) {
            overwrite(&f, &d);
            until_drained(&f);
        }
        pipeline_end(f.pipe, PIPELINE_REMOVE);
        const char *where = store_fault_disarm(f.store);
        bool happened = where && strcmp(where, "remove") != 0; /* that one only tidied up */
        status *st = pipeline_take_error(f.pipe);
        assert_int_equal(status_code(st), happened ? ST_IO : ST_OK);
        status_free(st);
        failed += happened;
        assert_ok(store_list(f.root.store, "step-000000000003", &l));
        assert_true(l.count <= (where ? 1 : 0)); /* a finish that went well and said otherwise leaves its file */
        store_list_free(&l);
        fill(&f, n + 1000);
        pipeline_start(f.pipe, f.share, STEP);
        overwrite(&f, &d);
        assert_false(until_drained(&f).failed);
        check_files(&f);
        pipeline_end(f.pipe, PIPELINE_KEEP);
        close_fixture(&f);
    }
    assert_true(failed > (UNDER_TSAN ? 2 : 10));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_overwritten_after_fences),
        cmocka_unit_test(test_without_fence),
        cmocka_unit_test(test_copied_rest),
        cmocka_unit_test(test_failures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
