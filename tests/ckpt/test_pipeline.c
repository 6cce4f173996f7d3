/* The pipeline by itself: what a look at it may show while a save fails, and chunks that hold what the file has to. */
#include "ckpt/commit.h"
#include "ckpt/pipeline.h"
#include "ckpt/stage.h"
#include "comm/base/mem.h"
#include "tests/support/store_fault.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { ATTEMPT = 77, STEP = 3 };

struct fixture {
    struct store *inner, *store;
    struct device *dev;
    struct plan *plan;
    struct roster roster;
    struct share *share;
    struct pipeline *pipe;
    unsigned char *memory;
    size_t bytes;
    size_t at[8]; /* of each tensor in memory */
};

/* One rank, tensors of these lengths in bytes, in one part. */
static void open_fixture(struct fixture *f, const uint64_t *length, size_t count, uint64_t chunk, uint64_t staging)
{
    struct plan_desc desc[8] = { { 0 } };
    char text[64] = "model";
    memset(f, 0, sizeof *f);
    for (size_t i = 0; i < count; i++) {
        text[6 + 2 * i] = (char)('a' + (int)i);
        desc[i] = (struct plan_desc){ .part = 0, .name = 6 + 2 * i, .alias = UINT64_MAX, .dtype = DTYPE_U8 };
        desc[i].shape = (struct shape){ .ndim = 1, .dim = { length[i] } };
        desc[i].piece = piece_whole(&desc[i].shape);
        desc[i].local = (uint32_t)i;
        f->at[i] = f->bytes;
        f->bytes += length[i];
    }
    f->memory = mem_alloc(f->bytes);
    for (size_t i = 0; i < f->bytes; i++)
        f->memory[i] = (unsigned char)(i * 131 + (i >> 8) * 7 + (i >> 16) + 1);
    assert_ok(store_open("mem:", true, &f->inner));
    assert_ok(store_fault_open(f->inner, &f->store));
    assert_ok(device_open("cpu", 0, &f->dev));
    assert_ok(plan_make(desc, count, text, sizeof text, 1, NULL, &f->plan));
    assert_ok(roster_make(f->plan, &f->roster));
    assert_ok(share_make(f->plan, &f->roster, 0, chunk, &f->share));
    struct pipeline_options o = { .dev = f->dev, .store = f->store, .writers = 2, .node_ranks = 1, .attempt = ATTEMPT };
    assert_ok(pipeline_open(&o, &f->pipe));
    assert_ok(pipeline_prepare(f->pipe, f->share, staging));
    for (uint64_t i = 0; i < f->share->pieces; i++) { /* in the order of the state; empty ones may be left out */
        const struct share_piece *p = &f->share->piece[i];
        const unsigned char *base = f->memory + f->at[p->local];
        assert_true(!i || p->local > p[-1].local);
        assert_int_equal(p->bytes, length[p->local]);
        f->share->source[i] = (struct share_source){ .piece = piece_whole(&desc[p->local].shape), .base = base };
        f->share->source[i].begin = (uintptr_t)base;
        f->share->source[i].end = (uintptr_t)base + p->bytes;
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
    store_close(f->inner);
    mem_free(f->memory);
}

static struct pipeline_view until_drained(struct fixture *f)
{
    struct pipeline_view v;
    do {
        pipeline_look(f->pipe, &v);
    } while (!v.drained);
    return v;
}

/* A failed save never looks like one that went well, whenever one looks. */
static void test_failure_is_seen_first(void **state)
{
    (void)state;
    struct fixture f;
    uint64_t length[] = { 100, 5000 };
    open_fixture(&f, length, 2, 1 << 20, 0);
    pipeline_start(f.pipe, f.share, STEP); /* finds that this store has no direct writes: from here on all is staged */
    assert_false(until_drained(&f).failed);
    pipeline_end(f.pipe, PIPELINE_REMOVE);
    for (int i = 0; i < 4000; i++) {
        store_fault_arm(f.store, 3, FAULT_BEFORE); /* open, header, data, finish */
        pipeline_start(f.pipe, f.share, STEP);
        struct pipeline_view v = until_drained(&f);
        assert_true(v.failed && v.captured);
        assert_string_equal(store_fault_disarm(f.store), "finish");
        pipeline_end(f.pipe, PIPELINE_REMOVE);
        status *st = pipeline_take_error(f.pipe);
        assert_int_equal(status_code(st), ST_IO);
        status_free(st);
    }
    close_fixture(&f);
}

/* The file: header, every piece at its place, zeros elsewhere; the checksums are those of the bytes. */
static void check_file(struct fixture *f)
{
    const struct h5shard_image *image = &f->share->file[0].image; /* there is one part */
    char key[STORE_KEY_BYTES];
    void *buf;
    size_t n;
    if (!f->share->files) /* nothing but empty tensors */
        return;
    commit_shard_key(STEP, "model", 0, ATTEMPT, key);
    assert_ok(store_get_all(f->inner, key, 1 << 28, &buf, &n));
    assert_int_equal(n, image->file_bytes);
    unsigned char *want = mem_calloc(n, 1);
    memcpy(want, image->header, image->header_bytes);
    assert_int_equal(f->share->file[0].header_crc, crc32c(0, image->header, image->header_bytes));
    for (uint64_t i = 0; i < f->share->pieces; i++) {
        const struct share_piece *p = &f->share->piece[i];
        size_t at = f->at[p->local];
        memcpy(want + p->offset, f->memory + at, p->bytes);
        for (uint64_t b = 0; b < meta_blocks(p->bytes); b++) {
            uint64_t lo = b * META_BLOCK_BYTES,
                     size = p->bytes - lo < META_BLOCK_BYTES ? p->bytes - lo : META_BLOCK_BYTES;
            assert_int_equal(f->share->crc[p->first_crc + b], crc32c(0, f->memory + at + lo, size));
        }
    }
    assert_memory_equal(buf, want, n);
    mem_free(buf);
    mem_free(want);
}

static void check_chunks(const struct share *s, uint64_t chunk)
{
    uint64_t end = 0;
    for (uint64_t i = 0; i < s->chunks; i++) {
        const struct share_chunk *c = &s->chunk[i];
        if (!c->segments)
            continue;
        assert_true(c->bytes > 0 && c->bytes <= chunk && c->offset % 4096 == 0 && c->offset >= end);
        end = c->offset + c->bytes;
        assert_true(end <= s->file[0].image.file_bytes);
    }
}

/* Lengths around checksum blocks, chunks and pages; staging from the least to plenty. */
static void test_files(void **state)
{
    (void)state;
    enum { MIB = 1 << 20 };
    static const uint64_t length[][5] = {
        { 1, 2, 3, 4, 5 },
        { 0, 4096, 0, 4095, 4097 },
        { MIB, MIB, 1, MIB - 1, MIB + 1 },
        { 3 * MIB + 1, 10, 2 * MIB - 4096, 2 * MIB, 7 },
        { 5, 7 * MIB + 12345, 0, 0, 0 },
        { 0, 0, 0, 0, 0 },
    };
    for (size_t i = 0; i < sizeof length / sizeof *length; i++)
        for (uint64_t chunk = MIB; chunk <= 4 * MIB; chunk += MIB)
            for (uint64_t staging = 0; staging <= 16 * MIB; staging += 16 * MIB) {
                struct fixture f;
                open_fixture(&f, length[i], 5, chunk, staging);
                check_chunks(f.share, chunk);
                for (int again = 0; again < 2; again++) {
                    memset(f.share->crc, 0, f.share->crcs * sizeof *f.share->crc);
                    pipeline_start(f.pipe, f.share, STEP);
                    pipeline_fence(f.pipe, NULL, 0, NULL);
                    struct pipeline_view v = until_drained(&f);
                    assert_true(v.captured && !v.failed);
                    assert_int_equal(v.captured_bytes, f.bytes);
                    assert_true(v.staging_peak_bytes <= v.staging_cap_bytes);
                    assert_true(v.staging_cap_bytes <= (staging ? staging : 2 * chunk + 2 * BOUNCE_BYTES));
                    assert_int_equal(v.live_bytes, 0); /* memory is no storage to write to directly */
                    check_file(&f);
                    pipeline_end(f.pipe, PIPELINE_KEEP);
                }
                close_fixture(&f);
            }
}

/* A fence waits for what it names, and for nothing behind it. */
static void test_fence(void **state)
{
    (void)state;
    struct fixture f;
    uint64_t length[] = { 3 << 20, 1000, 9 << 20 };
    open_fixture(&f, length, 3, 1 << 20, 2 << 20);
    unsigned char *kept = mem_alloc(f.bytes);
    memcpy(kept, f.memory, f.bytes);
    for (int i = 0; i < 20; i++) {
        size_t at = 0;
        pipeline_start(f.pipe, f.share, STEP);
        assert_int_equal(pipeline_fence(f.pipe, f.memory + f.bytes, 100, NULL), 0); /* not of the save */
        assert_int_equal(pipeline_fence(f.pipe, f.memory - 1, 1, NULL), 0);
        for (size_t k = 0; k < 3; at += length[k++]) {
            /* a fence on one byte of a tensor, its first or its last, covers all of it */
            pipeline_fence(f.pipe, f.memory + at + (i % 2 ? length[k] - 1 : 0), 1, NULL);
            memset(f.memory + at, 0xee, length[k]);
        }
        assert_false(until_drained(&f).failed);
        memcpy(f.memory, kept, f.bytes);
        check_file(&f);
        pipeline_end(f.pipe, PIPELINE_KEEP);
        assert_int_equal(pipeline_fence(f.pipe, NULL, 0, NULL), 0);
    }
    mem_free(kept);
    close_fixture(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_failure_is_seen_first),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_fence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
