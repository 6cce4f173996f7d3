/* reshard: every byte comes back, whatever mesh wrote it and whatever mesh wants it.
 *
 * A case is a global array of bytes, a stored cut of it and a wanted cut of it, all drawn from (seed, case). Buffers of
 * both cuts are filled element by element from the global array; the library moves stored to wanted; memcmp judges.
 * Blocks are exact copies on the heap, so that a sanitizer sees a read outside [lo, hi). */
#include "ckpt/reshard.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { SEED = 41, CASES = 3000, PIECES = 512, VOLUME = 30000 };

struct pieces {
    struct piece p[PIECES];
    unsigned char *bytes[PIECES]; /* exact size */
    uint32_t count;
};

struct world {
    struct draw d;
    uint32_t number;
    struct shape shape;
    size_t elem;
    unsigned char *global;
    struct pieces stored, wanted;
    struct reshard_list list;
};

static void draw_shape(struct world *w)
{
    const uint64_t sizes[] = { 0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 64, 101 };
    const size_t elems[] = { 1, 2, 4, 8 };
    bool ok;
    w->elem = elems[draw_below(&w->d, 4)];
    w->shape = (struct shape){ .ndim = (int)draw_below(&w->d, 6) };
    for (int k = 0; k < w->shape.ndim; k++) {
        w->shape.dim[k] = sizes[draw_between(&w->d, draw_below(&w->d, 8) != 0, 13)];
        if (shape_volume(&w->shape, &ok) > VOLUME)
            w->shape.dim[k] = 1; /* the dimensions after it are still 0 */
        for (int j = k + 1; j < w->shape.ndim; j++)
            w->shape.dim[j] = 1;
        while (shape_volume(&w->shape, &ok) > VOLUME)
            w->shape.dim[k] /= 2;
    }
    uint64_t bytes = shape_volume(&w->shape, &ok) * w->elem;
    w->global = mem_alloc(bytes);
    for (uint64_t i = 0; i < bytes; i++)
        w->global[i] = (unsigned char)(rng_u32(w->d.at, 1000000 + i / 4) >> 8 * (i % 4));
}

static void add_piece(struct pieces *to, struct piece p, bool distinct)
{
    for (uint32_t i = 0; distinct && i < to->count; i++)
        if (piece_equal(&to->p[i], &p))
            return;
    assert_true(to->count < PIECES);
    to->p[to->count++] = p;
}

/* The pieces of a random layout on a random mesh: TP-like cuts of any dimensions, flat runs over other axes, replicas.
 * Distinct: what a plan keeps of them, sometimes split as a plan does; else every rank's. */
static void draw_pieces(struct world *w, struct pieces *to, bool distinct)
{
    struct mesh m;
    struct layout l = { .shape = w->shape,
                        .stage = -1,
                        .run_align = (uint64_t[]){ 1, 2, 3, 16, 64 }[draw_below(&w->d, 5)] };
    unsigned used = 0;
    for (int a = 0; a < MESH_AXES; a++)
        m.size[a] = (int)draw_between(&w->d, 1, a == MESH_PP ? 1 : 3);
    for (int k = 0; k < w->shape.ndim; k++) {
        int axis = (int)draw_between(&w->d, MESH_DP, MESH_TP);
        l.cut[k] = draw_below(&w->d, 2) && !(used >> axis & 1) ? axis : -1;
        used |= l.cut[k] >= 0 ? 1u << axis : 0;
    }
    for (int a = MESH_DP; a < MESH_AXES; a++)
        if (!(used >> a & 1) && draw_below(&w->d, 2))
            l.run_axes |= 1u << a;
    for (int r = 0; r < mesh_world(&m); r++) {
        struct piece p = layout_piece(&l, &m, r);
        uint64_t parts = distinct && draw_below(&w->d, 4) == 0 ? 3 : 1;
        bool again = false; /* a replica may not be split in another way */
        for (uint32_t i = 0; distinct && i < to->count; i++)
            again = again || (piece_elems(&to->p[i]) && !memcmp(&to->p[i].box, &p.box, sizeof p.box) &&
                              to->p[i].begin >= p.begin && to->p[i].end <= p.end);
        for (uint64_t i = 0; i < parts && !again; i++) {
            uint64_t a, b;
            struct piece q = p;
            layout_cut(piece_elems(&p), parts, i, &a, &b);
            q.begin = p.begin + a;
            q.end = p.begin + b;
            add_piece(to, q, distinct);
        }
    }
    if (!distinct && draw_below(&w->d, 2)) /* any piece at all, not of a mesh */
        add_piece(to, draw_piece(&w->d, &w->shape), false);
}

/* Fill a buffer for each piece from the global array, element by element; `real` false: with a wrong byte. */
static void cut_pieces(const struct world *w, struct pieces *c, bool real)
{
    for (uint32_t i = 0; i < c->count; i++) {
        uint64_t n = piece_elems(&c->p[i]);
        c->bytes[i] = mem_alloc(n * w->elem);
        memset(c->bytes[i], 0xa5, n * w->elem);
        for (uint64_t k = 0; real && k < n; k++)
            memcpy(c->bytes[i] + k * w->elem,
                   w->global + box_global(&w->shape, &c->p[i].box, c->p[i].begin + k) * w->elem, w->elem);
    }
}

static struct world *open_world(uint32_t number)
{
    struct world *w = mem_calloc(1, sizeof *w);
    w->number = number;
    w->d = draw_from(SEED, number);
    draw_shape(w);
    draw_pieces(w, &w->stored, true);
    draw_pieces(w, &w->wanted, false);
    cut_pieces(w, &w->stored, true);
    cut_pieces(w, &w->wanted, false);
    return w;
}

static void close_world(struct world *w)
{
    for (uint32_t i = 0; i < w->stored.count; i++)
        mem_free(w->stored.bytes[i]);
    for (uint32_t i = 0; i < w->wanted.count; i++)
        mem_free(w->wanted.bytes[i]);
    mem_free(w->global);
    reshard_list_free(&w->list);
    mem_free(w);
}

/* Positions in the stored run of a copy's elements, one by one: what span and count say. */
static void check_positions(struct world *w, const struct reshard_copy *c)
{
    uint64_t n = 1, begin, end, lo = draw_below(&w->d, 3), hi, in = 0, first = UINT64_MAX, last = 0, before = 0;
    for (int d = 0; d < c->ndim; d++)
        n *= c->len[d];
    reshard_span(c, &begin, &end);
    lo = draw_below(&w->d, end + 2);
    hi = draw_below(&w->d, end + 3);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t rest = i, at = c->src;
        for (int d = c->ndim - 1; d >= 0; d--) {
            at += rest % c->len[d] * c->src_stride[d];
            rest /= c->len[d];
        }
        assert_true(i == 0 || at > before);
        before = at;
        first = at < first ? at : first;
        last = at > last ? at : last;
        in += at >= lo && at < hi;
    }
    assert_int_equal(begin, first);
    assert_int_equal(end, last + 1);
    assert_true(end <= piece_elems(&w->stored.p[c->stored]));
    assert_int_equal(reshard_count(c, lo, hi), in);
    assert_int_equal(reshard_count(c, 0, end), n);
}

/* Bring one block [lo, hi) of a stored run to everyone who wants of it; returns the elements moved. */
static uint64_t move_block(struct world *w, uint32_t stored, uint64_t lo, uint64_t hi)
{
    uint64_t moved = 0;
    unsigned char *block = mem_alloc((hi - lo) * w->elem);
    memcpy(block, w->stored.bytes[stored] + lo * w->elem, (hi - lo) * w->elem);
    for (size_t i = 0; i < w->list.count; i++) {
        const struct reshard_copy *c = &w->list.copy[i];
        if (c->stored != stored)
            continue;
        uint64_t n = reshard_count(c, lo, hi);
        moved += n;
        if (draw_below(&w->d, 2)) {
            reshard_apply(c, w->elem, block, lo, hi, w->wanted.bytes[c->wanted]);
            continue;
        }
        unsigned char *message = mem_alloc(n * w->elem);
        assert_int_equal(reshard_pack(c, w->elem, block, lo, hi, message), n * w->elem);
        assert_int_equal(reshard_unpack(c, w->elem, message, lo, hi, w->wanted.bytes[c->wanted]), n * w->elem);
        mem_free(message);
    }
    mem_free(block);
    return moved;
}

static void run_case(uint32_t number)
{
    struct world *w = open_world(number);
    uint64_t moved = 0, asked = 0;
    status *st = reshard_tensor(&w->shape, w->stored.p, w->stored.count, w->wanted.p, w->wanted.count, &w->list);
    if (st)
        fail_msg("seed %d case %u: %s", SEED, number, status_message(st));
    for (size_t i = 0; i < w->list.count; i++) {
        const struct reshard_copy *c = &w->list.copy[i];
        if (i && (c->stored < c[-1].stored || (c->stored == c[-1].stored && c->src < c[-1].src)))
            fail_msg("seed %d case %u: copy %zu is out of order", SEED, number, i);
        assert_true(c->ndim >= 1);
        check_positions(w, c);
    }
    for (uint32_t s = 0; s < w->stored.count; s++) {
        uint64_t n = piece_elems(&w->stored.p[s]), lo = 0, hi;
        for (; lo < n; lo = hi) {
            hi = draw_below(&w->d, 3) ? draw_between(&w->d, lo, n) : n;
            moved += move_block(w, s, lo, hi);
        }
    }
    for (uint32_t i = 0; i < w->wanted.count; i++) {
        const struct piece *p = &w->wanted.p[i];
        asked += piece_elems(p);
        for (uint64_t k = 0; k < piece_elems(p); k++)
            if (memcmp(w->wanted.bytes[i] + k * w->elem,
                       w->global + box_global(&w->shape, &p->box, p->begin + k) * w->elem, w->elem))
                fail_msg("seed %d case %u: wanted piece %u, element %llu differs", SEED, number, i,
                         (unsigned long long)k);
    }
    if (moved != asked)
        fail_msg("seed %d case %u: %llu elements moved, %llu wanted", SEED, number, (unsigned long long)moved,
                 (unsigned long long)asked);
    close_world(w);
}

static void test_grid(void **state)
{
    (void)state;
    for (uint32_t number = 0; number < CASES; number++)
        run_case(number);
    printf("reshard: %d cases, every byte came back (seed %d)\n", CASES, SEED);
}

/* With one stored piece gone, the first missing element of the first piece that lacks one, and how many. */
static void test_missing(void **state)
{
    (void)state;
    int told = 0;
    for (uint32_t number = 0; number < 800; number++) {
        struct world *w = open_world(number);
        if (!w->stored.count) {
            close_world(w);
            continue;
        }
        uint32_t gone = (uint32_t)draw_below(&w->d, w->stored.count);
        struct piece lost = w->stored.p[gone];
        bool ok;
        unsigned char *hole = mem_calloc(shape_volume(&w->shape, &ok), 1);
        for (uint64_t k = lost.begin; k < lost.end; k++)
            hole[box_global(&w->shape, &lost.box, k)] = 1;
        char says[256] = "";
        for (uint32_t i = 0; i < w->wanted.count && !*says; i++) {
            const struct piece *p = &w->wanted.p[i];
            uint64_t lacks = 0, coord[LAYOUT_DIMS] = { 0 };
            for (uint64_t k = p->end; k-- > p->begin;) {
                uint64_t g = box_global(&w->shape, &p->box, k);
                if (!hole[g])
                    continue;
                lacks++;
                for (int d = w->shape.ndim - 1; d >= 0; g /= w->shape.dim[d--])
                    coord[d] = g % w->shape.dim[d];
            }
            char at[128];
            dims_text(w->shape.ndim, coord, at, sizeof at);
            if (lacks)
                snprintf(says, sizeof says, "element %s is stored nowhere, and %llu of", at, (unsigned long long)lacks);
        }
        struct piece *last = &w->stored.p[w->stored.count - 1], kept = w->stored.p[gone];
        w->stored.p[gone] = *last;
        *last = kept;
        status *st =
            reshard_tensor(&w->shape, w->stored.p, w->stored.count - 1, w->wanted.p, w->wanted.count, &w->list);
        assert_int_equal(status_code(st), *says ? ST_NOT_FOUND : ST_OK);
        if (*says && !strstr(status_message(st), says))
            fail_msg("case %u: '%s' does not say '%s'", number, status_message(st), says);
        if (st)
            assert_int_equal(w->list.count, 0);
        told += *says != 0;
        status_free(st);
        mem_free(hole);
        unsigned char *bytes = w->stored.bytes[gone]; /* buffers go with their pieces */
        w->stored.bytes[gone] = w->stored.bytes[w->stored.count - 1];
        w->stored.bytes[w->stored.count - 1] = bytes;
        close_world(w);
    }
    assert_true(told > 300);
}

static void test_errors(void **state)
{
    (void)state;
    struct shape s = { .ndim = 2, .dim = { 4, 6 } };
    struct piece whole = piece_whole(&s), bad = whole, two[2] = { whole, whole };
    struct reshard_list l = { .copy = NULL };
    bad.end++;
    status *st = reshard_tensor(&s, &bad, 1, &whole, 1, &l);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    st = reshard_tensor(&s, &whole, 1, &bad, 1, &l);
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    st = reshard_tensor(&s, two, 2, &whole, 1, &l); /* stored twice */
    assert_int_equal(status_code(st), ST_INVALID);
    status_free(st);
    st = reshard_tensor(&s, NULL, 0, &whole, 1, &l);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    status_free(st);
    assert_null(reshard_tensor(&s, &whole, 1, NULL, 0, &l));
    assert_null(reshard_tensor(&s, NULL, 0, NULL, 0, &l));
    assert_int_equal(l.count, 0);
    reshard_list_free(&l);
}

/* What is contiguous on both sides is one row: equal pieces, equal runs that start and end inside rows, flat parts of a
 * box. */
static void test_fused(void **state)
{
    (void)state;
    struct shape s = { .ndim = 4, .dim = { 5, 4, 3, 7 } };
    struct piece whole = piece_whole(&s), run = whole, box = whole;
    struct reshard_list l = { .copy = NULL };
    assert_null(reshard_tensor(&s, &whole, 1, &whole, 1, &l));
    assert_int_equal(l.count, 1);
    assert_true(l.copy[0].ndim == 1 && l.copy[0].len[0] == 420 && l.copy[0].src_stride[0] == 1);
    l.count = 0;
    run.begin = 10;
    run.end = 400;
    assert_null(reshard_tensor(&s, &run, 1, &run, 1, &l));
    assert_int_equal(l.count, 1);
    assert_true(l.copy[0].len[0] == 390 && l.copy[0].src == 0 && l.copy[0].dst == 0);
    l.count = 0;
    assert_null(reshard_tensor(&s, &whole, 1, &run, 1, &l));
    assert_int_equal(l.count, 1);
    assert_true(l.copy[0].len[0] == 390 && l.copy[0].src == 10 && l.copy[0].dst == 0);
    l.count = 0;
    box.box.off[1] = 1; /* rows 1 and 2 of dimension 1: five stretches of 2 x 3 x 7 */
    box.box.len[1] = 2;
    box.end = 210;
    assert_null(reshard_tensor(&s, &whole, 1, &box, 1, &l));
    assert_int_equal(l.count, 1);
    assert_int_equal(l.copy[0].ndim, 2);
    assert_true(l.copy[0].len[0] == 5 && l.copy[0].len[1] == 42 && l.copy[0].src_stride[0] == 84 &&
                l.copy[0].src == 21);
    reshard_list_free(&l);
}

/* Sizes near 2^63: positions must not overflow. */
static void test_huge(void **state)
{
    (void)state;
    struct shape s = { .ndim = 3, .dim = { (uint64_t)1 << 31, (uint64_t)1 << 16, (1 << 16) - 1 } };
    struct piece whole = piece_whole(&s), stored[2] = { whole, whole }, last = whole;
    struct reshard_list l = { .copy = NULL };
    stored[0].end = stored[1].begin = whole.end / 3 + 1;
    last.box.off[0] = s.dim[0] - 1;
    last.box.off[1] = s.dim[1] - 2;
    last.box.len[0] = 1;
    last.box.len[1] = 2;
    last.end = 2 * s.dim[2];
    assert_null(reshard_tensor(&s, stored, 2, &last, 1, &l));
    assert_int_equal(l.count, 1);
    assert_int_equal(l.copy[0].stored, 1);
    assert_int_equal(l.copy[0].src, whole.end - 2 * s.dim[2] - stored[1].begin);
    l.count = 0;
    assert_null(reshard_tensor(&s, stored, 2, &whole, 1, &l));
    uint64_t n = 0;
    for (size_t i = 0; i < l.count; i++)
        n += reshard_count(&l.copy[i], 0, UINT64_MAX);
    assert_int_equal(n, whole.end);
    l.count = 0;
    status *st = reshard_tensor(&s, stored, 1, &whole, 1, &l);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    char says[64];
    snprintf(says, sizeof says, "%llu of the piece", (unsigned long long)(whole.end - stored[0].end));
    assert_non_null(strstr(status_message(st), says));
    status_free(st);
    reshard_list_free(&l);
}

/* A block far inside a copy of many rows: the rows before it are not walked. */
static void test_clip_is_direct(void **state)
{
    (void)state;
    const struct reshard_copy c = {
        .ndim = 2, .len = { (uint64_t)1 << 40, 2 }, .src = 5, .dst = 0, .src_stride = { 4, 1 }, .dst_stride = { 2, 1 }
    };
    uint64_t lo = ((uint64_t)1 << 41) + 5; /* row 2^39 */
    unsigned char block[8] = { 1, 2, 3, 4, 5, 6, 7, 8 }, message[8] = { 0 };
    assert_int_equal(reshard_count(&c, lo, lo + 8), 4);
    assert_int_equal(reshard_pack(&c, 1, block, lo, lo + 8, message), 4);
    assert_memory_equal(message, ((unsigned char[]){ 1, 2, 5, 6 }), 4);
    assert_int_equal(reshard_pack(&c, 1, block + 1, lo + 1, lo + 5, message), 2);
    assert_memory_equal(message, ((unsigned char[]){ 2, 5 }), 2);
    assert_int_equal(reshard_count(&c, lo + 2, lo + 4), 0);
}

/* Thousands of pieces that meet only their neighbours: all pairs would be 4e8 boxes. */
static void test_scale(void **state)
{
    (void)state;
    enum { N = 20000 };
    struct shape s = { .ndim = 2, .dim = { N * 3, 64 } };
    struct piece *a = mem_array(NULL, N, sizeof *a), *b = mem_array(NULL, N, sizeof *b), whole = piece_whole(&s);
    for (uint64_t i = 0; i < N; i++) {
        a[i] = b[i] = whole;
        layout_cut(whole.end, N, i, &a[i].begin, &a[i].end);
        layout_cut_aligned(whole.end, 128, N, i, &b[i].begin, &b[i].end);
    }
    struct reshard_list l = { .copy = NULL };
    uint64_t t0 = clock_thread_cpu_ns();
    assert_null(reshard_tensor(&s, a, N, b, N, &l));
    double seconds = ns_to_s(clock_thread_cpu_ns() - t0);
    printf("scale: %d x %d pieces, %zu copies, %.3f s\n", N, N, l.count, seconds);
    assert_true(l.count < 3 * N && seconds < 10);
    reshard_list_free(&l);
    mem_free(a);
    mem_free(b);
}

/* ---- strided memory ---- */

static void test_strided(void **state)
{
    (void)state;
    for (uint32_t number = 0; number < 2000; number++) {
        struct draw d = draw_from(42, number);
        struct shape s = { .ndim = (int)draw_below(&d, 5) };
        size_t elem = (size_t)1 << draw_below(&d, 4);
        for (int k = 0; k < s.ndim; k++)
            s.dim[k] = draw_below(&d, 7);
        struct piece p = draw_piece(&d, &s);
        uint64_t volume = box_volume(s.ndim, &p.box), n = piece_elems(&p);
        int64_t strides[LAYOUT_DIMS] = { 0 }, span = 1, origin = 0;
        bool used[LAYOUT_DIMS] = { false };
        for (int placed = 0; placed < s.ndim;
             placed++) { /* dimensions in any order in memory, padded, some backwards */
            int k = (int)draw_below(&d, (uint64_t)s.ndim);
            while (used[k])
                k = (k + 1) % s.ndim;
            used[k] = true;
            strides[k] = span + (int64_t)draw_below(&d, 3) / 2;
            int64_t reach = strides[k] * (p.box.len[k] ? (int64_t)p.box.len[k] : 1);
            if (draw_below(&d, 4) == 0 && p.box.len[k]) {
                origin += strides[k] * (int64_t)(p.box.len[k] - 1);
                strides[k] = -strides[k];
            }
            span = reach;
        }
        size_t bytes = (size_t)(span > origin ? span : origin + 1) * elem;
        unsigned char *memory = mem_alloc(bytes), *copy = mem_calloc(bytes, 1);
        for (size_t i = 0; i < bytes; i++)
            memory[i] = (unsigned char)draw_below(&d, 256);
        uint64_t lo = draw_below(&d, n + 1), hi = draw_between(&d, lo, n);
        unsigned char *out = mem_alloc((hi - lo) * elem);
        unsigned char *base = memory + origin * (int64_t)elem;
        piece_gather(s.ndim, &p, elem, base, strides, lo, hi, out);
        piece_scatter(s.ndim, &p, elem, copy + origin * (int64_t)elem, strides, lo, hi, out);
        assert_true(n <= volume);
        for (uint64_t i = 0; i < volume; i++) { /* element i of the box: where it lies, and whether it moved */
            uint64_t rest = i;
            int64_t at = origin;
            for (int k = s.ndim - 1; k >= 0; k--) {
                at += (int64_t)(rest % p.box.len[k]) * strides[k];
                rest /= p.box.len[k];
            }
            bool in = i >= p.begin + lo && i < p.begin + hi;
            const unsigned char *m = memory + at * (int64_t)elem, *c = copy + at * (int64_t)elem, zero[8] = { 0 };
            if (in && memcmp(out + (i - p.begin - lo) * elem, m, elem))
                fail_msg("case %u: gathered element %llu differs", number, (unsigned long long)i);
            if (memcmp(c, in ? m : zero, elem))
                fail_msg("case %u: scattered element %llu differs", number, (unsigned long long)i);
        }
        mem_free(memory);
        mem_free(copy);
        mem_free(out);
    }
}

static void test_contiguous(void **state)
{
    (void)state;
    const uint16_t run[6] = { 10, 11, 12, 13, 14, 15 };
    uint16_t out[3] = { 0 }, back[6] = { 0 };
    struct piece p = { .box = { .len = { 3, 4 } }, .begin = 5, .end = 11 };
    piece_gather(2, &p, 2, run, NULL, 2, 5, out); /* memory begins at element p.begin */
    assert_memory_equal(out, ((uint16_t[]){ 12, 13, 14 }), 6);
    piece_scatter(2, &p, 2, back, NULL, 2, 5, out);
    assert_memory_equal(back, ((uint16_t[]){ 0, 0, 12, 13, 14, 0 }), 12);
    piece_gather(2, &p, 2, NULL, NULL, 3, 3, NULL);
    piece_scatter(2, &p, 2, NULL, NULL, 3, 3, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grid),  cmocka_unit_test(test_missing), cmocka_unit_test(test_errors),
        cmocka_unit_test(test_fused), cmocka_unit_test(test_huge),    cmocka_unit_test(test_clip_is_direct),
        cmocka_unit_test(test_scale), cmocka_unit_test(test_strided), cmocka_unit_test(test_contiguous),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
