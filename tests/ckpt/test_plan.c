/* plan: tilings that are wrong are refused, right ones stored once, evenly, whatever order the descriptors come in. */
#include "ckpt/plan.h"
#include "ckpt/tiling.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/ckpt/plan_list.h"

/* Refused as INVALID, with `says` in the message. */
static void expect_refused(struct list *l, int ranks, const char *says)
{
    struct plan *p = NULL;
    status *st = make(l, ranks, NULL, &p);
    assert_int_equal(status_code(st), ST_INVALID);
    assert_null(p);
    if (!strstr(status_message(st), says))
        fail_msg("'%s' does not say '%s'", status_message(st), says);
    status_free(st);
}

/* ---- tilings ---- */

static void test_tiling_errors(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    uint64_t w = text(&l, "w");
    struct shape s = { .ndim = 1, .dim = { 10 } };
    struct {
        uint64_t a, b, c, d;
        const char *says;
    } one[] = {
        { 0, 5, 6, 10, "(5)" }, { 1, 5, 5, 10, "(0)" }, { 0, 5, 5, 9, "(9)" },   { 0, 6, 5, 10, "(5)" },
        { 0, 10, 3, 4, "(3)" }, { 0, 10, 0, 9, "(0)" }, { 0, 10, 9, 10, "(9)" },
    };
    for (size_t i = 0; i < sizeof one / sizeof *one; i++) {
        l.count = 0;
        add(&l, 0, w, DTYPE_F32, s, run1(one[i].a, one[i].b));
        add(&l, 1, w, DTYPE_F32, s, run1(one[i].c, one[i].d));
        expect_refused(&l, 2, one[i].says);
        expect_refused(&l, 2, "model/w");
    }
    /* runs of one box that overlap or leave a hole, where no box boundary shows it */
    struct shape s2 = { .ndim = 2, .dim = { 4, 5 } };
    for (uint64_t second = 6; second <= 8; second++) {
        l.count = 0;
        struct piece a = box2(0, 0, 4, 5), b = a;
        a.end = 7;
        b.begin = second;
        add(&l, 0, w, DTYPE_BF16, s2, a);
        add(&l, 1, w, DTYPE_BF16, s2, b);
        if (second == 7) {
            struct plan *p;
            expect_plan(&l, 2, NULL, &p);
            plan_free(p);
        } else {
            expect_refused(&l, 2, second == 6 ? "(1, 1)" : "(1, 2)");
        }
    }
    /* the same volume as the tensor, but one element twice and one never */
    l.count = 0;
    add(&l, 0, w, DTYPE_F32, s2, box2(0, 0, 2, 5));
    add(&l, 1, w, DTYPE_F32, s2, box2(2, 0, 2, 4));
    add(&l, 2, w, DTYPE_F32, s2, box2(0, 4, 1, 1));
    add(&l, 3, w, DTYPE_F32, s2, box2(3, 4, 1, 1));
    expect_refused(&l, 4, "element (");
    l.count = 0; /* nothing of it is held */
    struct piece none = { .begin = 0 };
    add(&l, 0, w, DTYPE_F32, s2, none);
    expect_refused(&l, 1, "(0, 0)");
    list_close(&l);
}

/* A pinwheel cannot be divided by planes; moving or dropping one vane must be seen. */
static void test_pinwheel(void **state)
{
    (void)state;
    struct shape s = { .ndim = 2, .dim = { 3, 3 } };
    const struct box good[] = { { { 0, 0 }, { 1, 2 } },
                                { { 0, 2 }, { 2, 1 } },
                                { { 2, 1 }, { 1, 2 } },
                                { { 1, 0 }, { 2, 1 } },
                                { { 1, 1 }, { 1, 1 } } };
    struct box b[5];
    memcpy(b, good, sizeof b);
    assert_null(tiling_check(&s, b, 5));
    for (int drop = 0; drop < 5; drop++) {
        memcpy(b, good, sizeof b);
        b[drop] = b[4];
        status *st = tiling_check(&s, b, 4);
        if (drop == 4)
            assert_non_null(strstr(status_message(st), "(1, 1)"));
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
    memcpy(b, good, sizeof b);
    b[4] = (struct box){ { 1, 0 }, { 1, 1 } };
    status *st = tiling_check(&s, b, 5);
    assert_non_null(strstr(status_message(st), "(1, 0)"));
    status_free(st);
}

/* Random boxes against counting every element. */
static void test_tiling_random(void **state)
{
    (void)state;
    int right = 0, wrong = 0;
    for (uint32_t number = 0; number < 6000; number++) {
        struct draw d = draw_from(21, number);
        struct shape s = { .ndim = (int)draw_between(&d, 1, 3) };
        for (int k = 0; k < s.ndim; k++)
            s.dim[k] = draw_between(&d, 1, 5);
        struct box b[64] = { piece_whole(&s).box };
        size_t n = 1;
        for (uint64_t cuts = draw_below(&d, 12); cuts > 0; cuts--) { /* divide a box, at random */
            size_t i = (size_t)draw_below(&d, n);
            int k = (int)draw_below(&d, (uint64_t)s.ndim);
            if (b[i].len[k] < 2)
                continue;
            uint64_t at = draw_between(&d, 1, b[i].len[k] - 1);
            b[n] = b[i];
            b[n].off[k] += at;
            b[n++].len[k] -= at;
            b[i].len[k] = at;
        }
        uint64_t spoil = draw_below(&d, 4);
        size_t i = (size_t)draw_below(&d, n);
        int k = (int)draw_below(&d, (uint64_t)s.ndim);
        if (spoil == 1 && n > 1)
            b[i] = b[--n];
        else if (spoil == 2 && b[i].off[k])
            b[i].off[k]--;
        else if (spoil == 3 && b[i].off[k]) {
            b[i].off[k]--;
            b[i].len[k]++;
        }
        unsigned char mark[125] = { 0 };
        for (size_t j = 0; j < n; j++)
            for (uint64_t e = 0; e < box_volume(s.ndim, &b[j]); e++)
                mark[box_global(&s, &b[j], e)]++;
        bool exact = true, ok;
        for (uint64_t e = 0; e < shape_volume(&s, &ok); e++)
            exact = exact && mark[e] == 1;
        status *st = tiling_check(&s, b, n);
        if (exact != !st)
            fail_msg("case %u: %s", number, status_message(st));
        if (st) { /* the coordinates it names must be wrong ones */
            uint64_t c[3] = { 0 }, g = 0;
            const char *at = strchr(status_message(st), '(');
            assert_non_null(at);
            for (int j = 0; j < s.ndim; j++) {
                char *end;
                c[j] = strtoull(at + 1, &end, 10);
                at = end;
                g = g * s.dim[j] + c[j];
            }
            assert_true(mark[g] != 1);
            assert_int_equal(mark[g] == 0, strstr(status_message(st), "no piece") != NULL);
        }
        status_free(st);
        right += exact;
        wrong += !exact;
    }
    assert_true(right > 1000 && wrong > 1000);
}

static void test_disagree(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    uint64_t w = text(&l, "w"), v = text(&l, "v"), u = text(&l, "u");
    struct shape s = { .ndim = 1, .dim = { 10 } }, t = { .ndim = 1, .dim = { 11 } },
                 flat = { .ndim = 2, .dim = { 10, 1 } };
    struct {
        enum dtype dtype;
        struct shape *s;
        uint64_t alias;
        uint32_t trainable;
        const char *says;
    } bad[] = {
        { DTYPE_BF16, &s, UINT64_MAX, 1, "dtype" },    { DTYPE_F32, &t, UINT64_MAX, 1, "shape" },
        { DTYPE_F32, &flat, UINT64_MAX, 1, "shape" },  { DTYPE_F32, &s, v, 1, "alias" },
        { DTYPE_F32, &s, UINT64_MAX, 0, "trainable" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        l.count = 0;
        add(&l, 0, v, DTYPE_F32, s, piece_whole(&s));
        add(&l, 0, w, DTYPE_F32, s, piece_whole(&s));
        struct plan_desc *d = add(&l, 1, w, bad[i].dtype, *bad[i].s, piece_whole(bad[i].s));
        d->alias = bad[i].alias;
        d->trainable = bad[i].trainable;
        expect_refused(&l, 2, bad[i].says);
    }
    l.count = 0;
    add(&l, 2, w, DTYPE_F32, s, piece_whole(&s));
    expect_refused(&l, 2, "rank 2 of 2");
    l.desc[0].rank = -1;
    expect_refused(&l, 2, "rank -1");
    l.desc[0].rank = 0;
    l.desc[0].piece.end = 11;
    expect_refused(&l, 2, "model/w");
    l.desc[0].piece.end = 10;
    l.desc[0].dtype = DTYPE_NONE;
    expect_refused(&l, 2, "dtype");
    l.desc[0].dtype = DTYPE_F32;
    l.desc[0].name = l.text_bytes;
    expect_refused(&l, 2, "outside the text");
    l.count = 0; /* bytes overflow though elements do not */
    struct shape big = { .ndim = 1, .dim = { (uint64_t)1 << 62 } };
    add(&l, 0, w, DTYPE_F32, big, piece_whole(&big));
    expect_refused(&l, 1, "bytes");

    l.count = 0; /* aliases: of nothing, of itself, of an alias, of another shape */
    add(&l, 0, v, DTYPE_F32, s, piece_whole(&s));
    add(&l, 0, w, DTYPE_F32, s, piece_whole(&s))->alias = u;
    expect_refused(&l, 1, "which this part does not have");
    l.count = 0;
    add(&l, 0, w, DTYPE_F32, s, piece_whole(&s))->alias = w;
    expect_refused(&l, 1, "itself an alias");
    l.count = 0;
    add(&l, 0, u, DTYPE_F32, s, piece_whole(&s))->alias = v;
    add(&l, 0, v, DTYPE_F32, s, piece_whole(&s));
    add(&l, 0, w, DTYPE_F32, s, piece_whole(&s))->alias = u;
    expect_refused(&l, 1, "itself an alias");
    l.count = 0;
    add(&l, 0, u, DTYPE_F32, t, piece_whole(&t))->alias = v;
    add(&l, 0, v, DTYPE_F32, s, piece_whole(&s));
    expect_refused(&l, 1, "differs");
    list_close(&l);
}

/* ---- writers ---- */

static void test_balance(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 1 << 14);
    model_list(&l, 4, 2, 12, 768);
    const struct plan_options o = { .split_bytes = 1 << 20 };
    struct plan *p;
    expect_plan(&l, 8, &o, &p);
    check_plan(p, &l);
    uint64_t sum = 0;
    for (int r = 0; r < p->ranks; r++)
        sum += p->rank_bytes[r];
    double ratio = (double)most_bytes(p) * p->ranks / (double)sum;
    printf("balance: most / mean = %.4f over %d ranks, %llu pieces\n", ratio, p->ranks,
           (unsigned long long)p->piece_count);
    assert_true(ratio < 1.03);
    plan_free(p);
    list_close(&l);
}

/* One rank has much that nobody else has: what can be written elsewhere is. */
static void test_unique_first(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    struct shape s = { .ndim = 1, .dim = { 1000 } };
    uint64_t w = text(&l, "loader"), names[3] = { text(&l, "a"), text(&l, "b"), text(&l, "c") };
    add(&l, 1, w, DTYPE_F32, s, piece_whole(&s));
    s.dim[0] = 1200;
    for (int i = 0; i < 3; i++)
        for (int r = 0; r < 4; r++)
            add(&l, r, names[i], DTYPE_F32, s, piece_whole(&s));
    struct plan *p;
    expect_plan(&l, 4, NULL, &p);
    check_plan(p, &l);
    assert_int_equal(p->rank_bytes[1], 4000);
    assert_int_equal(most_bytes(p), 4800);
    plan_free(p);
    list_close(&l);
}

static void test_nodes(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    struct shape s = { .ndim = 1, .dim = { 1000 } };
    uint64_t names[2] = { text(&l, "a"), text(&l, "b") };
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < 4; r++)
            add(&l, r, names[i], DTYPE_F32, s, piece_whole(&s));
    const int32_t node_of[] = { 0, 0, 1, 1 };
    struct plan *p;
    expect_plan(&l, 4, &(struct plan_options){ .node_of = node_of }, &p);
    assert_int_equal(p->piece[0].writer, 0);
    assert_int_equal(p->piece[1].writer, 2); /* not rank 1: its node has written already */
    plan_free(p);
    expect_plan(&l, 4, NULL, &p);
    assert_int_equal(p->piece[1].writer, 1);
    plan_free(p);
    list_close(&l);
}

static void test_split(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    uint64_t w = text(&l, "w");
    struct shape s = { .ndim = 2, .dim = { 101, 1033 } }; /* 104,333 x 2 bytes: 51 units of 4 KiB */
    for (int r = 0; r < 3; r++)
        add(&l, r, w, DTYPE_BF16, s, piece_whole(&s));
    struct plan *p;
    expect_plan(&l, 3, &(struct plan_options){ .split_bytes = 70000 }, &p);
    check_plan(p, &l);
    assert_int_equal(p->piece_count, 3);
    bool wrote[3] = { false };
    for (int i = 0; i < 3; i++) {
        assert_int_equal(p->piece[i].piece.begin * 2 % 4096, 0);
        assert_int_equal(p->piece[i].local_offset, p->piece[i].piece.begin);
        wrote[p->piece[i].writer] = true;
    }
    assert_true(wrote[0] && wrote[1] && wrote[2]);
    assert_int_equal(p->piece[1].piece.begin, 17 * 2048);
    plan_free(p);
    expect_plan(&l, 3, &(struct plan_options){ .split_bytes = 208666 }, &p); /* just fits */
    assert_int_equal(p->piece_count, 1);
    plan_free(p);
    expect_plan(&l, 3, &(struct plan_options){ .split_bytes = 208665 }, &p);
    assert_int_equal(p->piece_count, 2);
    plan_free(p);
    l.count = 0; /* a small piece and a tiny limit: parts at 4 KiB, none of them empty */
    s = (struct shape){ .ndim = 1, .dim = { 1500 } };
    for (int r = 0; r < 8; r++)
        add(&l, r, w, DTYPE_F32, s, piece_whole(&s));
    expect_plan(&l, 8, &(struct plan_options){ .split_bytes = 1 }, &p);
    check_plan(p, &l);
    assert_int_equal(p->piece_count, 2);
    assert_int_equal(p->piece[1].piece.begin, 1024);
    plan_free(p);
    l.count = 0; /* one holder: never split, though it lists the piece twice */
    add(&l, 3, w, DTYPE_F32, s, piece_whole(&s));
    add(&l, 3, w, DTYPE_F32, s, piece_whole(&s));
    expect_plan(&l, 8, &(struct plan_options){ .split_bytes = 1 }, &p);
    assert_int_equal(p->piece_count, 1);
    assert_int_equal(p->piece[0].local, 0);
    plan_free(p);
    list_close(&l);
}

/* Scalars, empty tensors, tensors of some ranks, aliases, parts of equal names, nothing at all. */
static void test_ordinary(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 64);
    text(&l, "model");
    uint64_t optim = text(&l, "optim"), a = text(&l, "a"), b = text(&l, "b"), c = text(&l, "c"), e = text(&l, "e");
    struct shape scalar = { 0 }, empty = { .ndim = 2, .dim = { 0, 7 } }, s = { .ndim = 1, .dim = { 9 } };
    struct plan *p;
    expect_plan(&l, 3, NULL, &p);
    assert_true(!p->tensor_count && !p->piece_count && !p->rank_bytes[2]);
    plan_free(p);
    for (int r = 0; r < 3; r++) {
        add(&l, r, b, DTYPE_F64, scalar, piece_whole(&scalar));
        add(&l, r, e, DTYPE_F32, empty, piece_whole(&empty));
    }
    add(&l, 2, a, DTYPE_F32, s, run1(0, 9));
    add(&l, 1, a, DTYPE_F32, s, (struct piece){ .begin = 0 });
    add(&l, 1, a, DTYPE_F32, s, run1(4, 4)); /* another empty one */
    add(&l, 0, c, DTYPE_F32, s, run1(2, 3))->alias = a;
    add(&l, 0, a, DTYPE_U8, s, run1(0, 9))->part = optim;
    expect_plan(&l, 3, NULL, &p);
    check_plan(p, &l);
    assert_int_equal(p->tensor_count, 5);
    assert_int_equal(p->piece_count, 3);
    assert_string_equal(p->tensor[0].name, "a");
    assert_int_equal(p->piece[p->tensor[0].first_piece].writer, 2);
    assert_string_equal(p->tensor[2].alias_of, "a");
    assert_int_equal(p->tensor[2].piece_count, 0);
    assert_int_equal(p->tensor[3].piece_count, 0);
    assert_string_equal(p->tensor[4].part, "optim");
    plan_free(p);
    list_close(&l);
}

static void test_order(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 1 << 12);
    model_list(&l, 3, 2, 2, 100);
    const struct plan_options o = { .split_bytes = 8192 };
    struct plan *first, *again;
    expect_plan(&l, 6, &o, &first);
    for (uint32_t epoch = 0; epoch < 10; epoch++) {
        struct plan_desc *shuffled = mem_calloc(l.count, sizeof *shuffled), *old = l.desc;
        for (uint64_t i = 0; i < l.count; i++)
            shuffled[i] = l.desc[rng_permute(5, epoch, i, l.count)];
        l.desc = shuffled;
        expect_plan(&l, 6, &o, &again);
        l.desc = old;
        assert_true(same_plan(first, again));
        mem_free(shuffled);
        plan_free(again);
    }
    plan_free(first);
    list_close(&l);
}

static void test_fingerprint(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 8);
    text(&l, "model");
    uint64_t w = text(&l, "w"), v = text(&l, "v");
    struct shape s = { .ndim = 2, .dim = { 6, 4 } };
    struct plan_desc *d = add(&l, 0, w, DTYPE_F32, s, piece_whole(&s)), good = *d;
    struct hash128 h = plan_fingerprint(d, 1, l.text), same = plan_fingerprint(d, 1, l.text);
    assert_true(h.a == same.a && h.b == same.b);
    for (int change = 0; change < 10; change++) {
        *d = good;
        switch (change) {
        case 0:
            d->name = v;
            break;
        case 1:
            d->part = v;
            break;
        case 2:
            d->alias = v;
            break;
        case 3:
            d->dtype = DTYPE_I32;
            break;
        case 4:
            d->trainable = 0;
            break;
        case 5:
            d->shape.dim[1] = 5;
            break;
        case 6:
            d->piece.box.len[0] = 5;
            break;
        case 7:
            d->piece.begin = 1;
            break;
        case 8:
            d->piece.end = 23;
            break;
        case 9:
            d->rank = 1;
            break;
        }
        struct hash128 other = plan_fingerprint(d, 1, l.text);
        assert_true(h.a != other.a && h.b != other.b);
    }
    list_close(&l);
}

static void test_pack(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 1 << 12);
    model_list(&l, 2, 2, 2, 60);
    struct shape scalar = { 0 };
    uint64_t z = text(&l, "zz"), y = text(&l, "yy");
    add(&l, 1, z, DTYPE_F64, scalar, piece_whole(&scalar));
    add(&l, 1, y, DTYPE_F64, scalar, piece_whole(&scalar))->alias = z;
    struct plan *p, *q = NULL;
    expect_plan(&l, 4, &(struct plan_options){ .split_bytes = 4096 }, &p);
    void *buf;
    size_t n;
    assert_null(plan_pack(p, &buf, &n));
    assert_null(plan_unpack(buf, n, &q));
    check_plan(q, &l);
    assert_true(same_plan(p, q));
    plan_free(q);
    for (size_t cut = 0; cut < n; cut++) { /* exact copies, so that reading past the end is seen */
        unsigned char *part = mem_alloc(cut);
        memcpy(part, buf, cut);
        status *st = plan_unpack(part, cut, &q);
        assert_non_null(st);
        status_free(st);
        mem_free(part);
    }
    for (size_t i = 0; i < n; i++)
        for (int bit = 0; bit < 8; bit += 7) { /* no checksum here: it may be taken, but must not crash */
            ((unsigned char *)buf)[i] ^= (unsigned char)(1 << bit);
            status *st = plan_unpack(buf, n, &q);
            if (!st)
                plan_free(q);
            status_free(st);
            ((unsigned char *)buf)[i] ^= (unsigned char)(1 << bit);
        }
    mem_free(buf);
    plan_free(p);
    list_close(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiling_errors), cmocka_unit_test(test_pinwheel),    cmocka_unit_test(test_tiling_random),
        cmocka_unit_test(test_disagree),      cmocka_unit_test(test_balance),     cmocka_unit_test(test_unique_first),
        cmocka_unit_test(test_nodes),         cmocka_unit_test(test_split),       cmocka_unit_test(test_ordinary),
        cmocka_unit_test(test_order),         cmocka_unit_test(test_fingerprint), cmocka_unit_test(test_pack),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
