/* verify_step on any number of ranks and threads: every damage once, in the order of files and offsets, and the same
 * lines and sums as one thread of one rank gives. What must be found is put together here, from where bytes were
 * flipped. */
#include "ckpt/verify.h"
#include "tests/ckpt/fake_step.h"
#include "tests/support/comm_threads.h"
#include "tests/support/test_root.h"

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

enum {
    STEP = 9,
    BIG = (33 << 20) + 5,
    BIG_AT = 4096,
    TAIL_AT = BIG_AT + BIG,
    FILE_BYTES = TAIL_AT + 3000,
    LINES = 400
};

static const char big_name[] = "model-00000.00000000000000aa.h5";

struct found {
    char line[LINES][160];
    int count;
    struct verify_result r;
};

struct job {
    struct store *store;
    int threads;
    struct found *out;
    struct verify_result other; /* of the last rank */
    uint64_t progress[16];      /* sum of a rank's reports, and its share */
    uint64_t share[16];
};

struct rank_progress {
    struct job *job;
    int rank;
};

static void collect(void *arg, const char *line)
{
    struct found *f = arg;
    if (f->count < LINES)
        snprintf(f->line[f->count], sizeof f->line[0], "%s", line);
    f->count++;
}

static void count_bytes(void *arg, uint64_t bytes, uint64_t share)
{
    struct rank_progress *p = arg;
    p->job->progress[p->rank] += bytes;
    p->job->share[p->rank] = share;
}

static status *verify_rank(struct comm *world, void *arg)
{
    struct job *job = arg;
    struct verify_result r = { 0 };
    struct rank_progress p = { job, world->rank };
    struct verify_options o = { .threads = job->threads,
                                .comm = world->size > 1 ? world : NULL,
                                .found = collect,
                                .arg = job->out,
                                .progress = count_bytes,
                                .progress_arg = &p };
    TRY(verify_step(job->store, STEP, &o, &r));
    if (world->rank == 0)
        job->out->r = r;
    if (world->rank == world->size - 1)
        job->other = r;
    return NULL;
}

static void verify(struct store *s, int ranks, int threads, struct found *out)
{
    struct job job = { .store = s, .threads = threads, .out = out };
    uint64_t read = 0;
    *out = (struct found){ .count = 0 };
    assert_ok(comm_threads_run(ranks, verify_rank, &job));
    assert_memory_equal(&job.other, &out->r, sizeof out->r);
    assert_int_equal(out->r.damages, out->count);
    for (int r = 0; r < ranks; r++) {
        assert_true(job.progress[r] <= job.share[r]);
        read += job.progress[r];
    }
    assert_true(read <= out->r.bytes);
}

static void expect(struct store *s, const struct found *want, uint64_t bytes)
{
    static const int ranks[] = { 1, 1, 1, 2, 3, 7 }, threads[] = { 1, 2, 5, 1, 3, 2 };
    struct found *got = mem_alloc(sizeof *got);
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
        verify(s, ranks[i], threads[i], got);
        assert_int_equal(got->count, want->count);
        for (int k = 0; k < want->count; k++)
            if (strcmp(got->line[k], want->line[k]) != 0)
                fail_msg("%d ranks of %d threads, line %d: \"%s\", not \"%s\"", ranks[i], threads[i], k, got->line[k],
                         want->line[k]);
        if (bytes)
            assert_int_equal(got->r.bytes, bytes);
    }
    mem_free(got);
}

/* One tensor of 34 blocks and one of 8 bytes behind it, in one file. */
struct big {
    struct metadata m;
    struct meta_file file;
    struct meta_tensor tensor[2];
    struct meta_piece piece[2];
    uint32_t crc[40];
    unsigned char *data;
    char key[STORE_KEY_BYTES];
};

static void big_make(struct big *b)
{
    const uint64_t tail = (TAIL_AT + 4095) / 4096 * 4096;
    *b = (struct big){ .file = { .name = (char *)(size_t)big_name, .bytes = tail + 8 + 100, .header_bytes = 1000 } };
    b->data = mem_calloc(1, b->file.bytes);
    assert_non_null(b->data);
    for (uint64_t i = 0; i < 1000; i++)
        b->data[i] = (unsigned char)(i + 1);
    for (uint64_t i = 0; i < BIG; i++)
        b->data[BIG_AT + i] = (unsigned char)((i * 2654435761u) >> 13);
    memset(b->data + tail, 7, 8);
    b->tensor[0] = (struct meta_tensor){ .part = (char *)(size_t) "model",
                                         .name = (char *)(size_t) "big",
                                         .dtype = DTYPE_U8,
                                         .shape = { 1, { BIG } },
                                         .piece_count = 1 };
    b->tensor[1] = b->tensor[0];
    b->tensor[1].name = (char *)(size_t) "tail";
    b->tensor[1].shape = (struct shape){ 1, { 8 } };
    b->tensor[1].first_piece = 1;
    b->piece[0] = (struct meta_piece){ piece_whole(&b->tensor[0].shape), 0, BIG_AT, BIG, 0 };
    b->piece[1] = (struct meta_piece){ piece_whole(&b->tensor[1].shape), 0, tail, 8, 34 };
    for (uint64_t at = 0; at < BIG; at += META_BLOCK_BYTES)
        b->crc[at / META_BLOCK_BYTES] =
            crc32c(0, b->data + BIG_AT + at, BIG - at < META_BLOCK_BYTES ? BIG - at : META_BLOCK_BYTES);
    b->crc[34] = crc32c(0, b->data + tail, 8);
    b->file.header_crc = crc32c(0, b->data, 1000);
    b->m = (struct metadata){ .attempt = 0xaa,
                              .step = STEP,
                              .mesh = { { 1, 1, 1, 1, 1 } },
                              .world = 1,
                              .file = &b->file,
                              .tensor = b->tensor,
                              .piece = b->piece,
                              .crc = b->crc,
                              .file_count = 1,
                              .tensor_count = 2,
                              .piece_count = 2,
                              .crc_count = 35 };
    assert_ok(commit_file_key(STEP, big_name, b->key));
}

static void say(struct found *f, const char *fmt, ...) PRINTF(2, 3);
static void say(struct found *f, const char *fmt, ...)
{
    int n = snprintf(f->line[f->count], sizeof f->line[0], "step %d: %s: ", STEP, big_name);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->line[f->count++] + n, sizeof f->line[0] - (size_t)n, fmt, ap);
    va_end(ap);
}

/* Flip the last byte of some blocks of the large piece: masks of block numbers, a bit each. */
static void flip_blocks(struct big *b, uint64_t blocks, struct found *want)
{
    for (uint64_t i = 0; i < 34; i++) {
        uint64_t at = i * META_BLOCK_BYTES, n = BIG - at < META_BLOCK_BYTES ? BIG - at : META_BLOCK_BYTES;
        if (!(blocks >> i & 1))
            continue;
        unsigned char *p = b->data + BIG_AT + at;
        p[n - 1] ^= 0x40;
        say(want,
            "tensor model/big: checksum of %" PRIu64 " bytes at offset %" PRIu64 " is %08" PRIx32 ", not %08" PRIx32, n,
            BIG_AT + at, crc32c(0, p, n), b->crc[i]);
    }
}

static void put(struct root *r, const struct big *b, uint64_t bytes)
{
    assert_ok(store_put(r->store, b->key, b->data, bytes, STORE_REPLACE));
}

static void test_blocks(void **state)
{
    (void)state;
    static const uint64_t masks[] = { 0, 1, (uint64_t)1 << 33, (uint64_t)3 << 15, ((uint64_t)1 << 34) - 1 };
    struct root r = root_open(true);
    struct big b;
    struct found *want = mem_alloc(sizeof *want);
    big_make(&b);
    put(&r, &b, b.file.bytes);
    assert_ok(commit_put(r.store, &b.m));
    for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
        struct store_info info;
        want->count = 0;
        flip_blocks(&b, masks[i], want);
        put(&r, &b, b.file.bytes);
        assert_ok(store_stat(r.store, "step-000000000009/metadata.pb", &info));
        expect(r.store, want, info.bytes + b.file.bytes); /* every byte once */
        flip_blocks(&b, masks[i], &(struct found){ .count = 0 });
    }
    mem_free(want);
    mem_free(b.data);
    root_close(&r);
}

/* Header, gap, payload, gap, payload, tail, and a file cut short in the middle of a unit. */
static void test_order(void **state)
{
    (void)state;
    struct root r = root_open(true);
    struct big b;
    struct found *want = mem_calloc(1, sizeof *want);
    big_make(&b);
    const uint64_t tail = b.piece[1].offset;
    assert_ok(commit_put(r.store, &b.m));
    b.data[0] ^= 1;
    say(want, "header: checksum of bytes 0 to 1000 is %08" PRIx32 ", not %08" PRIx32, crc32c(0, b.data, 1000),
        b.file.header_crc);
    b.data[1000] = 5;
    b.data[1001] = 6; /* one gap, one line */
    say(want, "padding: byte at offset 1000 is 0x05, not 0");
    flip_blocks(&b, 1 << 20, want);
    b.data[TAIL_AT] = 0xff;
    say(want, "padding: byte at offset %d is 0xff, not 0", TAIL_AT);
    b.data[tail] ^= 1;
    say(want, "tensor model/tail: checksum of 8 bytes at offset %" PRIu64 " is %08" PRIx32 ", not %08" PRIx32, tail,
        crc32c(0, b.data + tail, 8), b.crc[34]);
    b.data[b.file.bytes - 1] = 1;
    say(want, "padding: byte at offset %" PRIu64 " is 0x01, not 0", b.file.bytes - 1);
    put(&r, &b, b.file.bytes);
    expect(r.store, want, 0);

    uint64_t keep = BIG_AT + 17 * META_BLOCK_BYTES + 9; /* the second unit's second block */
    mem_free(b.data);
    big_make(&b);
    put(&r, &b, keep);
    want->count = 0;
    say(want, "%" PRIu64 " bytes, not %" PRIu64 "; differs from offset %" PRIu64, keep, b.file.bytes, keep);
    say(want, "tensor model/big: bytes at offset %d are not there", BIG_AT + 17 * META_BLOCK_BYTES);
    say(want, "tensor model/tail: bytes at offset %" PRIu64 " are not there", tail);
    expect(r.store, want, 0);
    assert_ok(store_remove(r.store, b.key));
    want->count = 0;
    say(want, "the file is missing");
    expect(r.store, want, 0);
    mem_free(want);
    mem_free(b.data);
    root_close(&r);
}

static void expect_code(struct store *s, enum status_code code, const char *words)
{
    for (int ranks = 1; ranks <= 3; ranks++) {
        struct found found = { .count = 0 };
        struct job job = { .store = s, .threads = 2, .out = &found };
        status *st = comm_threads_run(ranks, verify_rank, &job);
        assert_int_equal(status_code(st), code);
        assert_non_null(strstr(status_message(st), words));
        status_free(st);
    }
}

static void test_metadata(void **state)
{
    (void)state;
    struct root r = root_open(false);
    expect_code(r.store, ST_NOT_FOUND, "step 9 is not committed");
    assert_ok(store_put(r.store, "step-000000000009/metadata.pb", "TESSERA", 7, STORE_REPLACE));
    struct found *got = mem_alloc(sizeof *got);
    for (int ranks = 1; ranks <= 3; ranks++) {
        verify(r.store, ranks, 2, got);
        assert_int_equal(got->count, 1);
        assert_non_null(strstr(got->line[0], "step 9: metadata.pb: "));
        assert_int_equal(got->r.bytes, 7);
        assert_int_equal(got->r.files, 0);
    }
    mem_free(got);
    assert_ok(store_remove(r.store, "step-000000000009/metadata.pb"));
    assert_ok(fake_step_commit(r.store, STEP, 0xaa));
    got = mem_calloc(1, sizeof *got);
    expect(r.store, got, 0);
    mem_free(got);
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_blocks), cmocka_unit_test(test_order),
                                        cmocka_unit_test(test_metadata) };
    return cmocka_run_group_tests_name("verify", tests, NULL, NULL);
}
