/* metadata: what is encoded comes back; what is damaged, forged or nonsense is refused and never crashes (run it under
 * asan). */
#include "ckpt/metadata.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#include "metadata.pb-c.h"

enum { FILES = 3, HEADER = 24 };

static char *format(const char *fmt, ...) PRINTF(1, 2);
static char *format(const char *fmt, ...)
{
    char text[128];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return mem_strdup(text);
}

static void expect_code(status *st, enum status_code code)
{
    if (status_code(st) != code)
        fail_msg("%s %s", status_code_name(status_code(st)), status_message(st));
    status_free(st);
}

/* ---- a random metadata that is sane ---- */

/* Cut a tensor into pieces: rows of dimension 0, each as runs. Payloads follow one another in a random file. */
static void make_pieces(struct draw *d, struct metadata *m, struct meta_tensor *t)
{
    uint64_t rows = t->shape.ndim ? t->shape.dim[0] : 1, cuts = draw_between(d, 1, 3);
    t->first_piece = m->piece_count;
    for (uint64_t c = 0; c < cuts; c++) {
        struct box b = piece_whole(&t->shape).box;
        uint64_t begin, end;
        layout_cut(rows, cuts, c, &begin, &end);
        if (t->shape.ndim) {
            b.off[0] = begin;
            b.len[0] = end - begin;
        } else if (c) {
            break;
        }
        uint64_t volume = box_volume(t->shape.ndim, &b), runs = draw_between(d, 1, 3);
        for (uint64_t r = 0; r < runs; r++) {
            struct meta_piece *p = &m->piece[m->piece_count++];
            *p = (struct meta_piece){ .piece = { .box = b }, .file = (uint32_t)draw_below(d, FILES) };
            layout_cut(volume, runs, r, &p->piece.begin, &p->piece.end);
            p->bytes = piece_elems(&p->piece) * dtype_bytes(t->dtype);
            struct meta_file *f = &m->file[p->file];
            if (p->bytes) {
                p->offset = (f->bytes + 4095) / 4096 * 4096 + 4096 * draw_below(d, 3);
                f->bytes = p->offset + p->bytes;
            }
            p->first_crc = m->crc_count;
            for (uint64_t k = meta_blocks(p->bytes); k > 0; k--)
                m->crc[m->crc_count++] = rng_u32(d->at, d->used++);
        }
    }
    t->piece_count = m->piece_count - t->first_piece;
}

static struct metadata *make(uint64_t seed, uint32_t number, uint64_t tensors, bool large)
{
    struct draw d = draw_from(seed, number);
    struct metadata *m = mem_calloc(1, sizeof *m);
    m->run_id = 0x8123456789abcdef;
    m->attempt = (uint64_t)rng_u32(d.at, 1) << 32 | 7;
    m->parent_attempt = number;
    m->step = draw_below(&d, 1u << 30);
    m->time_ns = 1700000000000000000u + number;
    m->mesh = (struct mesh){ { 1, 2, 1, 1, 3 } };
    m->world = 6;
    m->build = format("build-%u", number);
    m->file = mem_calloc(FILES, sizeof *m->file);
    for (int i = 0; i < FILES; i++)
        m->file[m->file_count++] = (struct meta_file){ .name = format("model-%05d.a1b2c3d4e5f60718.h5", i),
                                                       .bytes = 8192,
                                                       .header_bytes = 8192,
                                                       .header_crc = rng_u32(d.at, 90 + (uint64_t)i) };
    m->tensor = mem_calloc(tensors, sizeof *m->tensor);
    m->piece = mem_calloc(tensors * 9, sizeof *m->piece);
    m->crc = mem_calloc(tensors * 90, sizeof *m->crc);
    for (uint64_t i = 0; i < tensors; i++) {
        struct meta_tensor *t = &m->tensor[m->tensor_count];
        t->part = format("%s", i < tensors / 2 ? "model" : "optim");
        t->name = format("layers.%04d.w", (int)i);
        t->dtype = (enum dtype)draw_between(&d, 1, DTYPE_COUNT - 1);
        t->trainable = draw_below(&d, 2);
        t->shape.ndim = (int)draw_below(&d, 5);
        for (int k = 0; k < t->shape.ndim; k++)
            t->shape.dim[k] = draw_below(&d, large && k < 2 ? 500 : 9);
        if (i && i != tensors / 2 && !t[-1].alias_of && draw_below(&d, 5) == 0) {
            t->shape = t[-1].shape;
            t->dtype = t[-1].dtype;
            t->alias_of = mem_strdup(t[-1].name);
            t->first_piece = m->piece_count;
        } else {
            make_pieces(&d, m, t);
        }
        m->tensor_count++;
    }
    m->blob = mem_calloc(4, sizeof *m->blob);
    for (uint64_t i = draw_below(&d, 5); i > 0; i--) {
        struct meta_blob *b = &m->blob[m->blob_count++];
        *b = (struct meta_blob){
            .part = format("loader"), .name = format("state"), .rank = (int32_t)i - 2, .bytes = draw_below(&d, 40)
        };
        b->data = mem_calloc(b->bytes, 1);
        for (uint64_t k = 0; k < b->bytes; k++)
            ((unsigned char *)b->data)[k] = (unsigned char)draw_below(&d, 256);
    }
    return m;
}

static void assert_same(const struct metadata *a, const struct metadata *b)
{
    assert_true(a->run_id == b->run_id && a->attempt == b->attempt && a->parent_attempt == b->parent_attempt);
    assert_true(a->step == b->step && a->time_ns == b->time_ns && a->world == b->world);
    assert_memory_equal(&a->mesh, &b->mesh, sizeof a->mesh);
    assert_string_equal(a->build, b->build);
    assert_true(a->file_count == b->file_count && a->tensor_count == b->tensor_count);
    assert_true(a->piece_count == b->piece_count && a->crc_count == b->crc_count && a->blob_count == b->blob_count);
    for (uint64_t i = 0; i < a->file_count; i++) {
        assert_string_equal(a->file[i].name, b->file[i].name);
        assert_true(a->file[i].bytes == b->file[i].bytes && a->file[i].header_bytes == b->file[i].header_bytes &&
                    a->file[i].header_crc == b->file[i].header_crc);
    }
    for (uint64_t i = 0; i < a->tensor_count; i++) {
        const struct meta_tensor *s = &a->tensor[i], *t = &b->tensor[i];
        assert_string_equal(s->part, t->part);
        assert_string_equal(s->name, t->name);
        assert_true(!s->alias_of == !t->alias_of);
        if (s->alias_of)
            assert_string_equal(s->alias_of, t->alias_of);
        assert_true(s->dtype == t->dtype && s->trainable == t->trainable && s->first_piece == t->first_piece &&
                    s->piece_count == t->piece_count);
        assert_memory_equal(&s->shape, &t->shape, sizeof s->shape);
    }
    for (uint64_t i = 0; i < a->piece_count; i++) {
        const struct meta_piece *p = &a->piece[i], *q = &b->piece[i];
        assert_true(piece_equal(&p->piece, &q->piece));
        assert_true(p->file == q->file && p->offset == q->offset && p->bytes == q->bytes);
        if (p->bytes)
            assert_memory_equal(a->crc + p->first_crc, b->crc + q->first_crc, meta_blocks(p->bytes) * 4);
    }
    for (uint64_t i = 0; i < a->blob_count; i++) {
        assert_string_equal(a->blob[i].part, b->blob[i].part);
        assert_string_equal(a->blob[i].name, b->blob[i].name);
        assert_true(a->blob[i].rank == b->blob[i].rank && a->blob[i].bytes == b->blob[i].bytes);
        assert_memory_equal(a->blob[i].data, b->blob[i].data, a->blob[i].bytes);
    }
}

static void test_round_trip(void **state)
{
    (void)state;
    for (uint32_t number = 0; number < 300; number++) {
        struct metadata *m = make(31, number, number % 40, number % 3 == 0), *back = NULL;
        void *buf, *again;
        size_t n, n_again;
        expect_code(metadata_encode(m, &buf, &n), ST_OK);
        expect_code(metadata_decode(buf, n, &back), ST_OK);
        assert_same(m, back);
        expect_code(metadata_encode(back, &again, &n_again), ST_OK);
        assert_int_equal(n, n_again);
        assert_memory_equal(buf, again, n);
        for (uint64_t i = 0; i < m->tensor_count; i++) {
            assert_int_equal(metadata_find(back, m->tensor[i].part, m->tensor[i].name), i);
            assert_int_equal(metadata_find(back, "optin", m->tensor[i].name), -1);
        }
        assert_int_equal(metadata_find(back, "model", "zzz"), -1);
        for (uint64_t i = 0; i < m->blob_count; i++)
            assert_ptr_equal(metadata_blob(back, "loader", "state", m->blob[i].rank), &back->blob[i]);
        assert_null(metadata_blob(back, "loader", "state", 5));
        assert_null(metadata_blob(back, "loader", "stat", -1));
        mem_free(buf);
        mem_free(again);
        metadata_free(m);
        metadata_free(back);
    }
}

/* The header's layout is a promise: other programs read it. */
static void test_header(void **state)
{
    (void)state;
    struct metadata *m = make(32, 0, 3, false);
    void *buf;
    size_t n;
    expect_code(metadata_encode(m, &buf, &n), ST_OK);
    const unsigned char *b = buf;
    assert_memory_equal(b, "TESSERA\x89", 8);
    assert_int_equal(get_u32(b + 8), 1);
    assert_int_equal(get_u64(b + 12), n - HEADER);
    assert_int_equal(get_u32(b + 20), crc32c(0, b + HEADER, n - HEADER));
    struct metadata *back;
    for (unsigned version = 0; version < 3; version += 2) { /* the body knows better */
        put_u32((unsigned char *)buf + 8, version);
        expect_code(metadata_decode(buf, n, &back), ST_CORRUPT);
    }
    mem_free(buf);
    metadata_free(m);
}

/* A checksum order of the writer's own choice is kept by meaning: piece by piece. */
static void test_crc_order(void **state)
{
    (void)state;
    struct metadata *m = make(33, 4, 12, false), *back;
    assert_true(m->crc_count > 2);
    for (uint64_t i = 0; i < m->crc_count / 2; i++) {
        uint32_t c = m->crc[i];
        m->crc[i] = m->crc[m->crc_count - 1 - i];
        m->crc[m->crc_count - 1 - i] = c;
    }
    for (uint64_t i = 0; i < m->piece_count; i++) /* all are of one block or none */
        if (m->piece[i].bytes)
            m->piece[i].first_crc = m->crc_count - 1 - m->piece[i].first_crc;
    void *buf;
    size_t n;
    expect_code(metadata_encode(m, &buf, &n), ST_OK);
    expect_code(metadata_decode(buf, n, &back), ST_OK);
    assert_same(m, back);
    mem_free(buf);
    metadata_free(m);
    metadata_free(back);
}

static void test_damage(void **state)
{
    (void)state;
    struct metadata *m = make(34, 1, 8, false), *back = NULL;
    void *buf;
    size_t n;
    expect_code(metadata_encode(m, &buf, &n), ST_OK);
    for (size_t i = 0; i < n; i++)
        for (unsigned flip = 1; flip < 256; flip += flip < 128 ? flip : 127) { /* every bit, and all of them */
            ((unsigned char *)buf)[i] ^= (unsigned char)flip;
            status *st = metadata_decode(buf, n, &back);
            assert_int_equal(status_code(st), ST_CORRUPT);
            assert_null(back);
            status_free(st);
            ((unsigned char *)buf)[i] ^= (unsigned char)flip;
        }
    for (size_t cut = 0; cut < n; cut++) {
        unsigned char *part = mem_alloc(cut);
        memcpy(part, buf, cut);
        expect_code(metadata_decode(part, cut, &back), ST_CORRUPT);
        mem_free(part);
    }
    unsigned char *longer = mem_calloc(n + 1, 1);
    memcpy(longer, buf, n);
    expect_code(metadata_decode(longer, n + 1, &back), ST_CORRUPT);
    mem_free(longer);
    mem_free(buf);
    metadata_free(m);
}

/* ---- forgeries: the checksum is right, the content is not ---- */

static void seal(unsigned char *file, size_t n)
{
    put_u64(file + 12, n - HEADER);
    put_u32(file + 20, crc32c(0, file + HEADER, n - HEADER));
}

/* Every byte of the body changed, with the checksum made right: it is refused, or what comes out is sane and can be
 * encoded. */
static void test_fuzz(void **state)
{
    (void)state;
    int taken = 0, refused = 0;
    for (uint32_t number = 0; number < 3; number++) {
        struct metadata *m = make(35, number, 5, false), *back = NULL;
        void *buf, *again;
        size_t n, n_again;
        expect_code(metadata_encode(m, &buf, &n), ST_OK);
        unsigned char *b = buf;
        for (size_t i = HEADER; i < n; i++)
            for (unsigned flip = 1; flip < 256; flip += flip < 128 ? flip : 127) {
                b[i] ^= (unsigned char)flip;
                seal(b, n);
                status *st = metadata_decode(b, n, &back);
                if (!st) {
                    expect_code(metadata_encode(back, &again, &n_again), ST_OK);
                    mem_free(again);
                    metadata_free(back);
                    taken++;
                } else {
                    assert_int_equal(status_code(st), ST_CORRUPT);
                    status_free(st);
                    refused++;
                }
                b[i] ^= (unsigned char)flip;
            }
        for (size_t cut = HEADER; cut < n; cut++) {
            unsigned char *part = mem_alloc(cut);
            memcpy(part, buf, cut);
            seal(part, cut);
            status *st = metadata_decode(part, cut, &back);
            if (!st)
                metadata_free(back);
            status_free(st);
            mem_free(part);
        }
        mem_free(buf);
        metadata_free(m);
    }
    assert_true(taken > 100 && refused > 1000);
}

/* A fixed, small metadata: tensors model/a (two pieces, both runs), model/b (alias of a), model/c. */
struct small {
    struct metadata m;
    char text[8][8];
    struct meta_file file[2];
    struct meta_tensor tensor[3];
    struct meta_piece piece[4];
    uint32_t crc[4];
    struct meta_blob blob[2];
};

static void small_init(struct small *s)
{
    *s = (struct small){
        .m = { .step = 5,
               .world = 2,
               .mesh = { { 1, 2, 1, 1, 1 } },
               .file_count = 2,
               .tensor_count = 3,
               .piece_count = 3,
               .crc_count = 3,
               .blob_count = 2 },
        .text = { "x.h5", "y.h5", "model", "a", "b", "c", "seed", "abc" },
        .piece = { { { { { 0 }, { 3, 5 } }, 0, 7 }, 0, 4096, 28, 0 },
                   { { { { 0 }, { 3, 5 } }, 7, 15 }, 0, 8192, 32, 1 },
                   { { { { 0 }, { 4096 } }, 0, 4096 }, 1, 4096, 4096, 2 } },
        .crc = { 10, 11, 12, 13 },
    };
    char *model = s->text[2], *a = s->text[3];
    s->file[0] = (struct meta_file){ s->text[0], 4096 * 5, 4096, 1, 0 };
    s->file[1] = (struct meta_file){ s->text[1], 8192, 4096, 2, 0 };
    s->tensor[0] = (struct meta_tensor){ model, a, DTYPE_F32, { 2, { 3, 5 } }, true, NULL, 0, 2, NULL, NULL };
    s->tensor[1] = (struct meta_tensor){ model, s->text[4], DTYPE_F32, { 2, { 3, 5 } }, true, a, 2, 0, NULL, NULL };
    s->tensor[2] = (struct meta_tensor){ model, s->text[5], DTYPE_U8, { 1, { 4096 } }, false, NULL, 2, 1, NULL, NULL };
    s->blob[0] = (struct meta_blob){ model, s->text[6], -1, s->text[7], 3 };
    s->blob[1] = (struct meta_blob){ model, s->text[6], 1, s->text[7], 2 };
    s->m.file = s->file;
    s->m.tensor = s->tensor;
    s->m.piece = s->piece;
    s->m.crc = s->crc;
    s->m.blob = s->blob;
}

static Tessera__Metadata *open_message(void)
{
    struct small s;
    void *buf;
    size_t n;
    small_init(&s);
    expect_code(metadata_encode(&s.m, &buf, &n), ST_OK);
    Tessera__Metadata *msg = tessera__metadata__unpack(NULL, n - HEADER, (unsigned char *)buf + HEADER);
    mem_free(buf);
    assert_non_null(msg);
    return msg;
}

/* Pack the message, seal it, decode it, expect that, free the message. */
static void expect_message(Tessera__Metadata *msg, enum status_code code, const char *what)
{
    size_t n = tessera__metadata__get_packed_size(msg);
    unsigned char *file = mem_calloc(HEADER + n, 1);
    struct metadata *back = NULL;
    memcpy(file, "TESSERA\x89\1", 9);
    tessera__metadata__pack(msg, file + HEADER);
    seal(file, HEADER + n);
    status *st = metadata_decode(file, HEADER + n, &back);
    if (status_code(st) != code)
        fail_msg("%s: %s %s", what, status_code_name(status_code(st)), status_message(st));
    status_free(st);
    metadata_free(back);
    mem_free(file);
    tessera__metadata__free_unpacked(msg, NULL);
}

static void rename_to(char **s, const char *to)
{
    size_t n = strlen(to) + 1;
    char *p = mem_realloc(*s, n);
    memcpy(p, to, n);
    *s = p;
}

#define FORGE(code, statement)                                                                                         \
    do {                                                                                                               \
        Tessera__Metadata *msg = open_message();                                                                       \
        statement;                                                                                                     \
        expect_message(msg, code, #statement);                                                                         \
    } while (0)

static void test_forged_names(void **state)
{
    (void)state;
    const char *bad[] = { "../x", "x/y", "/etc/passwd", "..",   ".",           "",
                          "a b",  "x\n", "\xc3\xa9",    "a\\b", "metadata.pb", "y.h5" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        FORGE(ST_CORRUPT, rename_to(&msg->file[0]->name, bad[i]));
    const char *good[] = { "...", "-", "A_z.09" };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        FORGE(ST_OK, rename_to(&msg->file[0]->name, good[i]));
    char longest[257];
    memset(longest, 'x', sizeof longest);
    longest[255] = 0;
    FORGE(ST_OK, rename_to(&msg->file[0]->name, longest));
    longest[255] = 'x';
    longest[256] = 0;
    FORGE(ST_CORRUPT, rename_to(&msg->file[0]->name, longest));
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[0]->name, "b"));
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[0]->name, "d"));
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[2]->name, "b")); /* twice */
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[0]->name, ""));
    FORGE(ST_CORRUPT, rename_to(&msg->part[0], ""));
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[1]->alias_of, "b"));
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[1]->alias_of, "c")); /* another shape */
    FORGE(ST_CORRUPT, rename_to(&msg->tensor[1]->alias_of, "d"));
    FORGE(ST_CORRUPT, rename_to(&msg->blob[0]->name, ""));
}

static void test_forged_numbers(void **state)
{
    (void)state;
    const uint64_t huge = UINT64_MAX;
    FORGE(ST_OK, (void)msg);
    FORGE(ST_CORRUPT, msg->piece_page[0] = 0); /* in the header */
    FORGE(ST_CORRUPT, msg->piece_page[0] = 5);
    FORGE(ST_OK, msg->piece_page[0] = 3);
    FORGE(ST_CORRUPT, msg->piece_page[0] = 2); /* another piece's */
    FORGE(ST_CORRUPT, msg->piece_page[0] = huge);
    FORGE(ST_CORRUPT, msg->piece_page[0] = huge / 4096);
    FORGE(ST_CORRUPT, msg->piece_page[2] = 2); /* the file ends there */
    FORGE(ST_CORRUPT, msg->piece_file[0] = 2);
    FORGE(ST_CORRUPT, msg->piece_file[0] = UINT32_MAX);
    FORGE(ST_CORRUPT, msg->file[1]->bytes = 8191);
    FORGE(ST_CORRUPT, msg->file[0]->header_bytes = 4097);
    FORGE(ST_CORRUPT, msg->file[0]->header_bytes = huge);
    FORGE(ST_CORRUPT, msg->file[0]->bytes = 0);
    FORGE(ST_CORRUPT, msg->tensor[0]->dim[0] = 4); /* a hole */
    FORGE(ST_CORRUPT, msg->tensor[0]->dim[0] = 2);
    FORGE(ST_CORRUPT, msg->tensor[0]->dim[0] = huge);
    FORGE(ST_CORRUPT, msg->tensor[0]->dim[0] = (uint64_t)1 << 61);
    FORGE(ST_CORRUPT, msg->tensor[2]->dim[0] = (uint64_t)1 << 63);
    FORGE(ST_CORRUPT, msg->tensor[0]->n_dim = 1);
    FORGE(ST_CORRUPT, msg->tensor[0]->n_dim = 0);
    FORGE(ST_CORRUPT, msg->tensor[0]->dtype = 0);
    FORGE(ST_CORRUPT, msg->tensor[0]->dtype = DTYPE_COUNT);
    FORGE(ST_CORRUPT, msg->tensor[0]->dtype = UINT32_MAX);
    FORGE(ST_CORRUPT, msg->tensor[0]->dtype = DTYPE_BF16); /* its alias is f32 */
    FORGE(ST_CORRUPT, msg->tensor[0]->part = 1);
    FORGE(ST_CORRUPT, msg->tensor[0]->pieces = huge);
    FORGE(ST_CORRUPT, msg->tensor[0]->pieces = 1);
    FORGE(ST_CORRUPT, msg->tensor[0]->pieces = 3);
    FORGE(ST_CORRUPT, msg->tensor[1]->pieces = 1);
    FORGE(ST_CORRUPT, msg->tensor[2]->pieces = huge - 1); /* the sum wraps to 0 */
    FORGE(ST_CORRUPT, msg->box_off[0] = 1);
    FORGE(ST_CORRUPT, msg->box_off[0] = huge);
    FORGE(ST_OK, msg->box_len[0] = 2); /* rows 0 and 1 hold the run as well */
    FORGE(ST_CORRUPT, msg->box_len[0] = 1);
    FORGE(ST_CORRUPT, msg->box_len[0] = huge);
    FORGE(ST_CORRUPT, msg->run_begin[0] = 1);
    FORGE(ST_CORRUPT, msg->run_begin[1] = huge);
    FORGE(ST_CORRUPT, msg->run_begin[1] = 8);
    FORGE(ST_CORRUPT, msg->run_length[0] = 8); /* more elements than there are */
    FORGE(ST_CORRUPT, msg->run_length[0] = 6);
    FORGE(ST_CORRUPT, msg->run_length[0] = huge);
    FORGE(ST_CORRUPT, msg->run_gap[0] = 1);
    FORGE(ST_CORRUPT, msg->run_gap[1] = huge);
    FORGE(ST_CORRUPT, msg->world = 3);
    FORGE(ST_CORRUPT, msg->world = 0);
    FORGE(ST_CORRUPT, msg->mesh[0] = 0);
    FORGE(ST_CORRUPT, msg->mesh[0] = UINT32_MAX);
    FORGE(ST_CORRUPT, msg->mesh[1] = 4);
    FORGE(ST_CORRUPT, msg->blob[0]->rank = -2);
    FORGE(ST_CORRUPT, msg->blob[0]->rank = 2);
    FORGE(ST_CORRUPT, msg->blob[0]->rank = 1); /* there already */
    FORGE(ST_OK, msg->blob[0]->rank = 0);
    FORGE(ST_CORRUPT, msg->blob[0]->part = 7);
}

static void test_forged_counts(void **state)
{
    (void)state;
    FORGE(ST_CORRUPT, msg->n_crc--);
    FORGE(ST_CORRUPT, msg->n_box_off--);
    FORGE(ST_CORRUPT, msg->n_box_len--);
    FORGE(ST_CORRUPT, msg->n_run_gap--);
    FORGE(ST_CORRUPT, msg->n_run_begin--);
    FORGE(ST_CORRUPT, msg->n_run_length--);
    FORGE(ST_CORRUPT, msg->n_piece_file--);
    FORGE(ST_CORRUPT, msg->n_piece_page--);
    FORGE(ST_CORRUPT, msg->n_mesh--);
    /* an entry too many: the last of each list once more */
    FORGE(ST_CORRUPT, msg->crc = mem_array(msg->crc, ++msg->n_crc, 4); msg->crc[3] = 0);
    FORGE(ST_CORRUPT, msg->run_gap = mem_array(msg->run_gap, ++msg->n_run_gap, 8);
          msg->run_begin = mem_array(msg->run_begin, ++msg->n_run_begin, 8);
          msg->run_length = mem_array(msg->run_length, ++msg->n_run_length, 8); msg->run_gap[2] = 1;
          msg->run_begin[2] = msg->run_length[2] = 0);
    FORGE(ST_CORRUPT, msg->tensor[0]->dim = mem_array(msg->tensor[0]->dim, 9, 8); msg->tensor[0]->n_dim = 9;
          memset(msg->tensor[0]->dim + 2, 0, 7 * 8));
}

/* Fields of a later version are skipped. */
static void test_unknown_fields(void **state)
{
    (void)state;
    Tessera__Metadata *msg = open_message();
    size_t n = tessera__metadata__get_packed_size(msg);
    const unsigned char extra[] = {
        0xfa, 0x3e, 2, 'h', 'i', 0xe0, 0x3e, 5
    }; /* fields 1007 (bytes) and 1004 (varint) */
    unsigned char *file = mem_calloc(HEADER + n + sizeof extra, 1);
    struct metadata *back = NULL;
    memcpy(file, "TESSERA\x89\1", 9);
    tessera__metadata__pack(msg, file + HEADER);
    memcpy(file + HEADER + n, extra, sizeof extra);
    seal(file, HEADER + n + sizeof extra);
    expect_code(metadata_decode(file, HEADER + n + sizeof extra, &back), ST_OK);
    assert_int_equal(back->step, 5);
    metadata_free(back);
    tessera__metadata__free_unpacked(msg, NULL);
    mem_free(file);
}

/* A newer version is told from damage: it says so in its body, or has a body of another kind; its frame is whole. */
static void test_newer_version(void **state)
{
    (void)state;
    static const unsigned char says[] = { 0xa8, 1, 3 }, other[] = { 0x08, 7 }; /* field 21: 3; no message of ours */
    for (int k = 0; k < 3; k++) {
        Tessera__Metadata *msg = open_message();
        size_t body = k == 2 ? 0 : tessera__metadata__get_packed_size(msg);
        const unsigned char *end = k == 2 ? other : says;
        size_t more = k == 2 ? sizeof other : sizeof says, n = HEADER + body + more;
        unsigned char *file = mem_calloc(n, 1);
        struct metadata *back = NULL;
        memcpy(file, "TESSERA\x89", 8);
        file[8] = k == 1 ? 1 : 3;
        if (body)
            tessera__metadata__pack(msg, file + HEADER);
        memcpy(file + HEADER + body, end, more);
        seal(file, n);
        expect_code(metadata_decode(file, n, &back), k == 1 ? ST_CORRUPT : ST_UNSUPPORTED);
        file[n - 1] ^= 1; /* damaged, whatever version it is of */
        expect_code(metadata_decode(file, n, &back), ST_CORRUPT);
        assert_null(back);
        tessera__metadata__free_unpacked(msg, NULL);
        mem_free(file);
    }
}

/* Calls of mem.h fail when it is their turn: the linker sends them here (tests/CMakeLists.txt). */
static int calls_left = -1;

static bool fails(void)
{
    return calls_left >= 0 && calls_left-- == 0;
}

void *__real_mem_alloc(size_t bytes);
void *__real_mem_calloc(size_t count, size_t bytes);
void *__real_mem_array(void *p, size_t count, size_t bytes);
char *__real_mem_strdup(const char *text);

void *__wrap_mem_alloc(size_t bytes)
{
    return fails() ? NULL : __real_mem_alloc(bytes);
}

void *__wrap_mem_calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __real_mem_calloc(count, bytes);
}

void *__wrap_mem_array(void *p, size_t count, size_t bytes)
{
    return fails() ? NULL : __real_mem_array(p, count, bytes);
}

char *__wrap_mem_strdup(const char *text)
{
    return fails() ? NULL : __real_mem_strdup(text);
}

/* Memory that runs out is never taken for damage, whichever call it is that fails, and nothing is lost. */
static void test_no_memory(void **state)
{
    (void)state;
    struct metadata *m = make(36, 7, 12, false), *back = NULL;
    void *buf = NULL, *again = NULL;
    size_t n, bytes;
    expect_code(metadata_encode(m, &buf, &n), ST_OK);
    for (int encode = 0; encode < 2; encode++) {
        int turn = 0;
        for (bool done = false; !done; turn++) {
            calls_left = turn;
            status *st = encode ? metadata_encode(m, &again, &bytes) : metadata_decode(buf, n, &back);
            done = calls_left >= 0; /* it was not this call's turn */
            calls_left = -1;
            if (status_code(st) != (done ? ST_OK : ST_NO_MEMORY))
                fail_msg("call %d: %s", turn, status_message(st));
            assert_true((encode ? again : back) == NULL || done);
            status_free(st);
        }
        assert_true(turn > 20);
    }
    assert_true(bytes == n && !memcmp(buf, again, n));
    metadata_free(back);
    mem_free(again);
    mem_free(buf);
    metadata_free(m);
}

/* encode refuses what decode would. */
static void test_encode_checks(void **state)
{
    (void)state;
    void *buf = NULL;
    size_t n;
    for (int spoil = 0; spoil < 13; spoil++) {
        struct metadata *m = make(36, 7, 12, false);
        uint64_t k = 0;
        while (!m->piece[k].bytes)
            k++;
        switch (spoil) {
        case 0:
            m->piece[k].bytes++;
            break;
        case 1:
            m->piece[k].offset += 8;
            break;
        case 2:
            m->crc_count--;
            break;
        case 3:
            m->piece[k].file = FILES;
            break;
        case 4:
            m->tensor[0].first_piece++;
            break;
        case 5:
            m->piece_count--;
            break;
        case 6:
            m->file[1].name[0] = '/';
            break;
        case 7:
            m->tensor[1].name[0] = 'a';
            break;
        case 8:
            m->world++;
            break;
        case 9:
            m->tensor[0].dtype = DTYPE_NONE;
            break;
        case 10:
            m->tensor[0].shape.ndim = LAYOUT_DIMS + 1;
            break;
        case 11:
            m->piece[k].first_crc = UINT64_MAX;
            break;
        case 12:
            m->crc_count++;
            break;
        }
        expect_code(metadata_encode(m, &buf, &n), ST_INTERNAL);
        assert_null(buf);
        if (spoil == 4)
            m->tensor[0].first_piece--;
        metadata_free(m);
    }
}

/* Payloads may touch at a page; one byte more is an overlap. An alias has no pieces of its own, even right ones. */
static void test_edges(void **state)
{
    (void)state;
    struct small s;
    void *buf;
    size_t n;
    for (uint64_t bytes = 4095; bytes <= 4097; bytes++) {
        small_init(&s); /* c moves between the header of x.h5 and the second piece of a */
        s.piece[0].file = 1;
        s.piece[2].file = 0;
        s.tensor[2].shape.dim[0] = s.piece[2].piece.box.len[0] = s.piece[2].piece.end = s.piece[2].bytes = bytes;
        status *st = metadata_encode(&s.m, &buf, &n);
        assert_int_equal(status_code(st), bytes <= 4096 ? ST_OK : ST_INTERNAL);
        if (!st)
            mem_free(buf);
        status_free(st);
    }
    small_init(&s);
    s.piece[3] = s.piece[2]; /* b gets a sound piece that holds it whole */
    s.piece[2] = (struct meta_piece){ { { { 0 }, { 3, 5 } }, 0, 15 }, 0, 12288, 60, 3 };
    s.tensor[1].piece_count = 1;
    s.tensor[2].first_piece = 3;
    s.m.piece_count = s.m.crc_count = 4;
    expect_code(metadata_encode(&s.m, &buf, &n), ST_INTERNAL);
    s.tensor[1].alias_of = NULL;
    expect_code(metadata_encode(&s.m, &buf, &n), ST_OK);
    mem_free(buf);
}

/* 200,000 pieces of a large model: 2-D boxes and ZeRO runs. */
static void test_size(void **state)
{
    (void)state;
    const uint64_t tensors = 400, shards = 512;
    struct metadata *m = make(37, 0, 0, false), *back;
    mem_free(m->tensor);
    mem_free(m->piece);
    mem_free(m->crc);
    m->tensor = mem_calloc(tensors, sizeof *m->tensor);
    m->piece = mem_calloc(tensors * shards, sizeof *m->piece);
    m->crc = mem_calloc(tensors * shards, sizeof *m->crc);
    for (uint64_t i = 0; i < tensors; i++) {
        struct meta_tensor *t = &m->tensor[m->tensor_count++];
        *t = (struct meta_tensor){ .part = format("optim"),
                                   .name = format("model.layers.%03d.mlp.up_proj.weight", (int)i),
                                   .dtype = DTYPE_F32,
                                   .shape = { 2, { 8192, 11008 } },
                                   .first_piece = m->piece_count,
                                   .piece_count = shards };
        for (uint64_t k = 0; k < shards; k++) {
            struct meta_piece *p = &m->piece[m->piece_count++];
            *p = (struct meta_piece){ .piece = { .box = { { k / 64 * 1024, 0 }, { 1024, 11008 } } },
                                      .file = (uint32_t)(k % FILES) };
            layout_cut_aligned(1024 * 11008, 1024, 64, k % 64, &p->piece.begin, &p->piece.end);
            struct meta_file *f = &m->file[p->file];
            p->bytes = piece_elems(&p->piece) * 4;
            p->offset = (f->bytes + 4095) / 4096 * 4096;
            p->first_crc = m->crc_count;
            f->bytes = p->offset + p->bytes;
            m->crc_count += meta_blocks(p->bytes);
        }
    }
    void *buf;
    size_t n;
    expect_code(metadata_encode(m, &buf, &n), ST_OK);
    double each = (double)(n - m->crc_count * 4) / (double)m->piece_count;
    printf("size: %.1f bytes a piece beside checksums\n", each);
    assert_true(each <= 32);
    expect_code(metadata_decode(buf, n, &back), ST_OK);
    assert_same(m, back);
    mem_free(buf);
    metadata_free(m);
    metadata_free(back);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_newer_version),  cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_round_trip),     cmocka_unit_test(test_header),
        cmocka_unit_test(test_crc_order),      cmocka_unit_test(test_damage),
        cmocka_unit_test(test_fuzz),           cmocka_unit_test(test_forged_names),
        cmocka_unit_test(test_forged_numbers), cmocka_unit_test(test_forged_counts),
        cmocka_unit_test(test_unknown_fields), cmocka_unit_test(test_encode_checks),
        cmocka_unit_test(test_edges),          cmocka_unit_test(test_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
