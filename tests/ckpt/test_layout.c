/* layout against brute force: every element is marked one by one, and marks are counted. */
#include "ckpt/layout.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <string.h>

static void expect_code(status *st, enum status_code code)
{
    assert_int_equal(status_code(st), code);
    status_free(st);
}

static void test_volumes(void **state)
{
    (void)state;
    bool ok;
    struct shape scalar = { 0 };
    assert_int_equal(shape_volume(&scalar, &ok), 1);
    assert_true(ok);
    struct shape s = { .ndim = 3, .dim = { 3, 5, 7 } };
    assert_int_equal(shape_volume(&s, &ok), 105);
    assert_true(ok);
    s.dim[1] = 0;
    assert_int_equal(shape_volume(&s, &ok), 0);
    assert_true(ok);
    struct shape edge = { .ndim = 2, .dim = { INT64_MAX, 1 } };
    assert_int_equal(shape_volume(&edge, &ok), INT64_MAX);
    assert_true(ok);
    struct shape over[] = { { .ndim = 1, .dim = { (uint64_t)INT64_MAX + 1 } },
                            { .ndim = 2, .dim = { (uint64_t)1 << 32, (uint64_t)1 << 32 } },
                            { .ndim = 2, .dim = { (uint64_t)1 << 32, (uint64_t)1 << 31 } },
                            { .ndim = LAYOUT_DIMS + 1 },
                            { .ndim = -1 } };
    for (size_t i = 0; i < sizeof over / sizeof *over; i++) {
        shape_volume(&over[i], &ok);
        assert_false(ok);
        struct piece none = { .begin = 0 };
        expect_code(piece_check(&over[i], &none), ST_INVALID);
    }
    struct piece w = piece_whole(&scalar);
    assert_int_equal(piece_elems(&w), 1);
    assert_true(piece_is_box(0, &w));
}

static void test_text(void **state)
{
    (void)state;
    char text[16];
    const uint64_t v[] = { 3, 50, 7 };
    dims_text(0, v, text, sizeof text);
    assert_string_equal(text, "()");
    dims_text(1, v, text, sizeof text);
    assert_string_equal(text, "(3)");
    dims_text(3, v, text, sizeof text);
    assert_string_equal(text, "(3, 50, 7)");
    for (size_t bytes = 5; bytes <= 10; bytes++) { /* one short of what it needs, and less */
        memset(text, 'x', sizeof text);
        dims_text(3, v, text, bytes);
        assert_int_equal(strlen(text), bytes - 1);
        assert_string_equal(text + bytes - 4, "...");
    }
}

static void test_check(void **state)
{
    (void)state;
    struct shape s = { .ndim = 2, .dim = { 4, 6 } };
    struct piece good = { .box = { .off = { 1, 2 }, .len = { 3, 4 } }, .begin = 0, .end = 12 };
    expect_code(piece_check(&s, &good), ST_OK);
    assert_true(piece_is_box(2, &good));
    struct piece p = good;
    p.end = 13;
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.begin = 12;
    expect_code(piece_check(&s, &p), ST_OK); /* an empty run at the end */
    assert_false(piece_is_box(2, &p));
    p.begin = 13;
    p.end = 13;
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.begin = 2;
    p.end = 1;
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.box.off[1] = 3; /* 3 + 4 > 6 */
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.box.off[0] = UINT64_MAX; /* off + len wraps to 2 */
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.box.len[2] = 1;
    expect_code(piece_check(&s, &p), ST_INVALID);
    p = good;
    p.box.off[LAYOUT_DIMS - 1] = 1;
    expect_code(piece_check(&s, &p), ST_INVALID);
    struct shape scalar = { 0 };
    struct piece one = { .begin = 0, .end = 1 }, none = { .begin = 0, .end = 0 }, two = { .begin = 0, .end = 2 };
    expect_code(piece_check(&scalar, &one), ST_OK);
    expect_code(piece_check(&scalar, &none), ST_OK);
    expect_code(piece_check(&scalar, &two), ST_INVALID);
}

static void test_order(void **state)
{
    (void)state;
    struct piece a = { .box = { .off = { 1, 2 }, .len = { 3, 4 } }, .begin = 5, .end = 6 };
    struct piece same = a;
    assert_true(piece_equal(&a, &same));
    uint64_t *field[] = { &same.box.off[0], &same.box.off[LAYOUT_DIMS - 1],
                          &same.box.len[0], &same.box.len[LAYOUT_DIMS - 1],
                          &same.begin,      &same.end };
    for (size_t i = 0; i < sizeof field / sizeof *field; i++) {
        ++*field[i];
        assert_false(piece_equal(&a, &same));
        assert_true(piece_compare(&a, &same) < 0);
        assert_true(piece_compare(&same, &a) > 0);
        --*field[i];
    }
    struct piece off = a, len = a;
    off.box.off[1] = 9;
    len.box.len[0] = 9;
    assert_true(piece_compare(&len, &off) < 0); /* offsets weigh more than lengths */
    len = a;
    len.box.len[1] = 9;
    same.end = 9;
    same.begin = 9;
    assert_true(piece_compare(&same, &len) < 0);
}

/* Boxes must name the run's elements, each once, in run order, within the bound on their number. */
static void check_boxes(const struct shape *s, const struct piece *p)
{
    struct piece_box boxes[LAYOUT_BOXES];
    int n = piece_boxes(s->ndim, p, boxes);
    assert_true(n <= (s->ndim ? 2 * s->ndim - 1 : 1));
    uint64_t at = 0;
    for (int i = 0; i < n; i++) {
        assert_int_equal(boxes[i].start, at);
        uint64_t volume = box_volume(s->ndim, &boxes[i].box);
        assert_true(volume > 0);
        for (uint64_t k = 0; k < volume; k++, at++)
            assert_int_equal(box_global(s, &boxes[i].box, k), box_global(s, &p->box, p->begin + at));
        for (int d = s->ndim; d < LAYOUT_DIMS; d++)
            assert_true(!boxes[i].box.off[d] && !boxes[i].box.len[d]);
    }
    assert_int_equal(at, piece_elems(p));
    if (piece_elems(p) && piece_is_box(s->ndim, p))
        assert_int_equal(n, 1);
}

static void test_boxes_random(void **state)
{
    (void)state;
    const uint64_t sizes[] = { 0, 1, 1, 2, 3, 4, 5, 7 };
    for (uint32_t number = 0; number < 4000; number++) {
        struct draw d = draw_from(11, number);
        struct shape s = { .ndim = (int)draw_below(&d, 6) };
        for (int k = 0; k < s.ndim; k++)
            s.dim[k] = sizes[draw_below(&d, 8)];
        struct piece p = draw_piece(&d, &s);
        expect_code(piece_check(&s, &p), ST_OK);
        check_boxes(&s, &p);
    }
}

/* Every run of some small boxes; the widest needs all 2n - 1 boxes. */
static void test_boxes_all_runs(void **state)
{
    (void)state;
    struct shape shapes[] = { { .ndim = 0 },
                              { .ndim = 1, .dim = { 6 } },
                              { .ndim = 2, .dim = { 4, 3 } },
                              { .ndim = 3, .dim = { 3, 3, 3 } },
                              { .ndim = 3, .dim = { 3, 1, 4 } },
                              { .ndim = 4, .dim = { 1, 3, 2, 2 } } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct piece whole = piece_whole(&shapes[i]), p = whole;
        for (p.begin = 0; p.begin <= whole.end; p.begin++)
            for (p.end = p.begin; p.end <= whole.end; p.end++)
                check_boxes(&shapes[i], &p);
    }
    struct shape cube = { .ndim = 3, .dim = { 3, 3, 3 } };
    struct piece p = { .box = { .len = { 3, 3, 3 } }, .begin = 1, .end = 26 };
    struct piece_box boxes[LAYOUT_BOXES];
    assert_int_equal(piece_boxes(3, &p, boxes), 5);
    check_boxes(&cube, &p);
}

static void test_cut(void **state)
{
    (void)state;
    const uint64_t totals[] = { 0, 1, 2, 7, 1023, 1024, 1025, 4096, 10007, INT64_MAX };
    const uint64_t aligns[] = { 1, 2, 3, 1024, 4096 };
    for (size_t t = 0; t < sizeof totals / sizeof *totals; t++)
        for (uint64_t n = 1; n <= 17; n++) {
            uint64_t at = 0, begin, end, least = UINT64_MAX, most = 0;
            for (uint64_t i = 0; i < n; i++) {
                layout_cut(totals[t], n, i, &begin, &end);
                assert_int_equal(begin, at);
                assert_true(end >= begin);
                least = end - begin < least ? end - begin : least;
                most = end - begin > most ? end - begin : most;
                at = end;
            }
            assert_int_equal(at, totals[t]);
            assert_true(most - least <= 1);
            for (size_t a = 0; a < sizeof aligns / sizeof *aligns; a++) {
                at = 0;
                least = UINT64_MAX;
                most = 0;
                for (uint64_t i = 0; i < n; i++) {
                    layout_cut_aligned(totals[t], aligns[a], n, i, &begin, &end);
                    assert_int_equal(begin, at);
                    assert_true(end >= begin);
                    assert_true(end == totals[t] || end % aligns[a] == 0);
                    most = end - begin > most ? end - begin : most;
                    at = end;
                }
                assert_int_equal(at, totals[t]);
                uint64_t units = totals[t] / aligns[a] + (totals[t] % aligns[a] != 0);
                assert_true(most <= (units / n + (units % n != 0)) * aligns[a] || most > INT64_MAX - aligns[a]);
            }
        }
    uint64_t begin, end;
    layout_cut(10, 4, 1, &begin, &end); /* [10/4, 20/4) */
    assert_true(begin == 2 && end == 5);
}

/* Count, element by element, how often the pieces of the ranks named by coordinates (those that are no replicas of one
 * another) cover a tensor. */
static void check_layout(const struct layout *l, const struct mesh *m, unsigned used_axes)
{
    bool ok;
    uint64_t volume = shape_volume(&l->shape, &ok);
    unsigned char *mark = mem_calloc(volume + 1, 1);
    int world = 1;
    for (int a = 0; a < MESH_AXES; a++)
        world *= m->size[a];
    for (int r = 0; r < world; r++) {
        struct piece p = layout_piece(l, m, r);
        expect_code(piece_check(&l->shape, &p), ST_OK);
        if (!piece_elems(&p))
            assert_int_equal(p.begin, 0); /* so that empty pieces of a box are equal */
        int coord[MESH_AXES];
        mesh_coords(m, r, coord);
        if (l->stage >= 0 && coord[MESH_PP] != l->stage) {
            assert_int_equal(piece_elems(&p), 0);
            continue;
        }
        bool first = true;
        int base[MESH_AXES];
        for (int a = 0; a < MESH_AXES; a++) {
            bool used = (used_axes >> a & 1) || (a == MESH_PP && l->stage >= 0);
            base[a] = used ? coord[a] : 0;
            first = first && base[a] == coord[a];
        }
        struct piece twin = layout_piece(l, m, mesh_rank(m, base));
        assert_true(piece_equal(&p, &twin)); /* a replica */
        for (uint64_t i = p.begin; first && i < p.end; i++)
            mark[box_global(&l->shape, &p.box, i)]++;
    }
    for (uint64_t i = 0; i < volume; i++)
        assert_int_equal(mark[i], 1);
    mem_free(mark);
}

static void test_layout_tiles(void **state)
{
    (void)state;
    for (uint32_t number = 0; number < 1500; number++) {
        struct draw d = draw_from(12, number);
        struct mesh m;
        struct layout l = { .stage = -1 };
        unsigned used = 0;
        for (int a = 0; a < MESH_AXES; a++)
            m.size[a] = (int)draw_between(&d, 1, 3);
        l.shape.ndim = (int)draw_below(&d, 5);
        for (int k = 0; k < LAYOUT_DIMS; k++)
            l.cut[k] = -1;
        for (int k = 0; k < l.shape.ndim; k++) {
            l.shape.dim[k] = draw_below(&d, 8);
            int axis = (int)draw_between(&d, MESH_DP, MESH_TP);
            if (draw_below(&d, 2) && !(used >> axis & 1)) {
                l.cut[k] = axis;
                used |= 1u << axis;
            }
        }
        if (draw_below(&d, 2))
            l.stage = (int)draw_below(&d, (uint64_t)m.size[MESH_PP]);
        l.run_align = draw_below(&d, 5);
        for (int a = MESH_DP; a < MESH_AXES; a++)
            if (!(used >> a & 1) && draw_below(&d, 2))
                l.run_axes |= 1u << a;
        if (draw_below(&d, 2)) { /* somewhere in a bucket that other tensors share */
            bool ok;
            l.bucket_begin = draw_below(&d, 100);
            l.bucket_total = l.bucket_begin + shape_volume(&l.shape, &ok) + draw_below(&d, 100);
        }
        check_layout(&l, &m, used | l.run_axes);
    }
}

/* Known numbers: TP cuts rows, ZeRO cuts the flat local box at multiples of 4. */
static void test_layout_known(void **state)
{
    (void)state;
    struct mesh m = { .size = { 1, 3, 1, 1, 2 } };
    struct layout l = { .shape = { .ndim = 2, .dim = { 6, 5 } },
                        .cut = { MESH_TP, -1 },
                        .stage = -1,
                        .run_axes = 1u << MESH_DP,
                        .bucket_total = 15,
                        .run_align = 4 };
    /* local box 3 x 5 = 15 elements = 4 units of 4: parts [0, 4), [4, 8), [8, 15) */
    const uint64_t begin[] = { 0, 4, 8 }, end[] = { 4, 8, 15 };
    for (int dp = 0; dp < 3; dp++)
        for (int tp = 0; tp < 2; tp++) {
            struct piece p = layout_piece(&l, &m, dp * 2 + tp);
            assert_int_equal(p.box.off[0], 3 * tp);
            assert_int_equal(p.box.len[0], 3);
            assert_int_equal(p.box.off[1], 0);
            assert_int_equal(p.box.len[1], 5);
            assert_int_equal(p.begin, begin[dp]);
            assert_int_equal(p.end, end[dp]);
        }
    l.bucket_begin = 6; /* the bucket's cuts at 0, 8, 16 of 30 units lie at -6, 2, 10 of the tensor */
    l.bucket_total = 24;
    struct piece p = layout_piece(&l, &m, 2);
    assert_int_equal(p.begin, 2);
    assert_int_equal(p.end, 10);
    /* over several axes, runs follow the order of ranks: dp, then ep */
    m = (struct mesh){ .size = { 1, 2, 3, 1, 1 } };
    l = (struct layout){
        .shape = { .ndim = 1, .dim = { 60 } }, .cut = { -1 }, .stage = -1, .run_axes = 1u << MESH_DP | 1u << MESH_EP
    };
    for (int r = 0; r < 6; r++)
        assert_int_equal(layout_piece(&l, &m, r).begin, 10 * r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_volumes), cmocka_unit_test(test_text),         cmocka_unit_test(test_check),
        cmocka_unit_test(test_order),   cmocka_unit_test(test_boxes_random), cmocka_unit_test(test_boxes_all_runs),
        cmocka_unit_test(test_cut),     cmocka_unit_test(test_layout_tiles), cmocka_unit_test(test_layout_known),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
