/* plan, as a whole: the same as a plain planner gives, within what largest-first promises, in parts, and at scale. */
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

/* ---- against a plain planner: all holders looked at for every piece, all items sorted as they are */

enum { MOST_ITEMS = 4096 };

static bool holds(const struct list *l, const struct plan_desc *d, const struct plan_tensor *t,
                  const struct plan_piece *q)
{
    return !strcmp(l->text + d->name, t->name) && !strcmp(l->text + d->part, t->part) &&
           !memcmp(&d->piece.box, &q->piece.box, sizeof d->piece.box) && d->piece.begin <= q->piece.begin &&
           q->piece.end <= d->piece.end && q->local_offset == q->piece.begin - d->piece.begin;
}

/* One item more, largest first, to the holder with the least; shared: only those that more than one rank holds. */
static void plain_pass(const struct plan *p, const struct list *l, const struct plan_options *o, bool shared,
                       uint64_t *load, uint64_t *node)
{
    static bool done[MOST_ITEMS];
    memset(done, 0, sizeof done);
    for (;;) {
        uint64_t best = UINT64_MAX, most = 0;
        for (uint64_t k = 0; k < p->piece_count; k++) {
            const struct plan_tensor *t = &p->tensor[p->piece[k].tensor];
            uint64_t bytes = piece_elems(&p->piece[k].piece) * dtype_bytes(t->dtype), ranks = 0;
            bool has[16] = { false };
            for (uint64_t i = 0; i < l->count; i++)
                has[l->desc[i].rank] = has[l->desc[i].rank] || holds(l, &l->desc[i], t, &p->piece[k]);
            for (int r = 0; r < p->ranks; r++)
                ranks += has[r];
            if (!done[k] && (ranks > 1) == shared && bytes > most) {
                most = bytes;
                best = k;
            }
        }
        if (best == UINT64_MAX)
            return;
        done[best] = true;
        int to = -1;
        for (int r = 0; r < p->ranks; r++) {
            bool has = false;
            for (uint64_t i = 0; i < l->count; i++)
                has = has || (l->desc[i].rank == r &&
                              holds(l, &l->desc[i], &p->tensor[p->piece[best].tensor], &p->piece[best]));
            if (has &&
                (to < 0 || load[r] < load[to] || (load[r] == load[to] && node[o->node_of[r]] < node[o->node_of[to]])))
                to = r;
        }
        assert_int_equal(p->piece[best].writer, to);
        load[to] += most;
        node[o->node_of[to]] += most;
    }
}

/* A few tensors, each cut by axes of a mesh or by runs, or whole everywhere. */
static void random_list(struct draw *d, struct list *l, const struct mesh *m)
{
    static const enum dtype types[] = { DTYPE_U8, DTYPE_BF16, DTYPE_F32, DTYPE_F64 };
    text(l, "model");
    for (uint64_t n = draw_between(d, 1, 6), i = 0; i < n; i++) {
        char name[32];
        snprintf(name, sizeof name, "t%llu", (unsigned long long)draw_below(d, 1000) * 8 + (unsigned long long)i);
        uint64_t at = text(l, name);
        struct layout lay = { .shape = { .ndim = (int)draw_below(d, 4) }, .cut = { -1, -1, -1 }, .stage = -1 };
        for (int k = 0; k < lay.shape.ndim; k++) {
            lay.shape.dim[k] = draw_between(d, draw_below(d, 9) ? 1 : 0, 41);
            if (draw_below(d, 2) == 0)
                lay.cut[k] = k == 0 ? MESH_TP : k == 1 ? MESH_EP : -1;
        }
        lay.run_axes = draw_below(d, 2) ? 1u << MESH_DP : 0;
        enum dtype type = types[draw_below(d, 4)];
        for (int r = 0; r < mesh_world(m); r++)
            add(l, r, at, type, lay.shape, layout_piece(&lay, m, r));
    }
}

static void test_plain(void **state)
{
    (void)state;
    uint64_t split = 0;
    for (uint32_t number = 0; number < 150; number++) {
        struct draw d = draw_from(31, number);
        struct mesh m = { .size = { 1, (int)draw_between(&d, 1, 3), (int)draw_between(&d, 1, 2), 1,
                                    (int)draw_between(&d, 1, 2) } };
        int ranks = mesh_world(&m);
        int32_t node_of[16];
        uint64_t extra[16], load[16] = { 0 }, node[16] = { 0 };
        for (int r = 0; r < ranks; r++) {
            node_of[r] = (int32_t)draw_below(&d, (uint64_t)ranks);
            load[r] = extra[r] = draw_below(&d, 3) ? 0 : draw_below(&d, 9000);
            node[node_of[r]] += extra[r];
        }
        const struct plan_options o = { .node_of = node_of, .extra_bytes = extra, .split_bytes = 4096 };
        struct list l;
        struct plan *p, *again;
        list_open(&l, 256);
        random_list(&d, &l, &m);
        expect_plan(&l, ranks, &o, &p);
        check_plan(p, &l);
        plain_pass(p, &l, &o, false, load, node);
        plain_pass(p, &l, &o, true, load, node);
        for (int r = 0; r < ranks; r++)
            assert_int_equal(load[r], p->rank_bytes[r] + extra[r]);
        for (uint64_t k = 0; k < p->piece_count; k++) {
            const struct plan_piece *q = &p->piece[k];
            assert_int_equal(q->number, k - p->tensor[q->tensor].first_piece);
            assert_int_equal(q->local_offset * dtype_bytes(p->tensor[q->tensor].dtype) % 4096, 0);
            split += q->local_offset != 0;
        }
        struct plan_desc *shuffled = mem_calloc(l.count, sizeof *shuffled), *old = l.desc;
        for (uint64_t i = 0; i < l.count; i++)
            shuffled[i] = old[rng_permute(6, number, i, l.count)];
        l.desc = shuffled;
        expect_plan(&l, ranks, &o, &again);
        l.desc = old;
        assert_true(same_plan(p, again));
        mem_free(shuffled);
        plan_free(again);
        plan_free(p);
        list_close(&l);
    }
    assert_true(split > 20);
}

/* What everybody holds is spread as Graham's bound for any list has it: the mean, and at most (1 - 1/m) of one item. */
static void test_bound(void **state)
{
    (void)state;
    for (uint32_t number = 0; number < 200; number++) {
        struct draw d = draw_from(32, number);
        int ranks = (int)draw_between(&d, 1, 9);
        uint64_t sum = 0, largest = 0;
        struct list l;
        struct plan *p;
        list_open(&l, 512);
        text(&l, "model");
        for (uint64_t n = draw_between(&d, 1, 30), i = 0; i < n; i++) {
            char name[32];
            snprintf(name, sizeof name, "t%llu", (unsigned long long)i);
            uint64_t at = text(&l, name);
            struct shape s = { .ndim = 1, .dim = { draw_between(&d, 1, 5000) } };
            sum += s.dim[0];
            largest = s.dim[0] > largest ? s.dim[0] : largest;
            for (int r = 0; r < ranks; r++)
                add(&l, r, at, DTYPE_U8, s, piece_whole(&s));
        }
        expect_plan(&l, ranks, NULL, &p);
        assert_true((double)most_bytes(p) <= (double)sum / ranks + (double)largest * (1.0 - 1.0 / ranks) + 1e-6);
        plan_free(p);
        list_close(&l);
    }
}

/* Parts: what a rank writes, with its tensors and numbers, and nothing else. */
static void test_parts(void **state)
{
    (void)state;
    struct list l;
    struct plan *p, *q;
    list_open(&l, 1 << 12);
    model_list(&l, 3, 2, 2, 100);
    expect_plan(&l, 6, &(struct plan_options){ .split_bytes = 8192 }, &p);
    for (int r = -1; r < 6; r++) { /* -1: nothing */
        uint32_t list[MOST_ITEMS];
        uint64_t n = 0, at = 0;
        void *buf;
        size_t bytes;
        for (uint64_t k = 0; k < p->piece_count; k++)
            if (p->piece[k].writer == r)
                list[n++] = (uint32_t)k;
        assert_null(plan_pack_part(p, list, n, NULL, 0, &buf, &bytes));
        assert_null(plan_unpack(buf, bytes, &q));
        mem_free(buf);
        assert_int_equal(q->piece_count, n);
        assert_null(q->rank_bytes);
        assert_int_equal(q->ranks, 6);
        for (uint64_t t = 0; t < q->tensor_count; t++) {
            assert_true(q->tensor[t].piece_count > 0);
            assert_int_equal(q->tensor[t].first_piece, at);
            for (uint64_t k = 0; k < q->tensor[t].piece_count; k++, at++) {
                const struct plan_piece *a = &p->piece[list[at]], *b = &q->piece[at];
                assert_string_equal(p->tensor[a->tensor].name, q->tensor[t].name);
                assert_string_equal(p->tensor[a->tensor].part, q->tensor[t].part);
                assert_int_equal(b->tensor, t);
                assert_true(piece_equal(&a->piece, &b->piece) && a->number == b->number && a->local == b->local &&
                            a->local_offset == b->local_offset && b->writer == r);
            }
        }
        assert_int_equal(at, n);
        plan_free(q);
    }
    plan_free(p);
    list_close(&l);
}

/* 1,024 tensors of 1,024 shards each. All pairs would be 5e8 intersections (minutes); the sweep is about a second. */
static void test_scale(void **state)
{
    (void)state;
    struct list l;
    list_open(&l, 1 << 20);
    text(&l, "model");
    for (int i = 0; i < 1024; i++) {
        char name[32];
        snprintf(name, sizeof name, "layers.%d.weight", i);
        uint64_t at = text(&l, name);
        struct shape s = { .ndim = 2, .dim = { 4096, 4096 + (uint64_t)i % 3 } };
        for (int r = 0; r < 1024; r++) {
            struct layout lay = { .shape = s,
                                  .cut = { i % 2 ? -1 : MESH_TP, i % 2 ? MESH_TP : -1 },
                                  .stage = -1,
                                  .run_axes = 1u << MESH_DP };
            struct mesh m = { .size = { 1, 128, 1, 1, 8 } };
            add(&l, r, at, DTYPE_F32, s, layout_piece(&lay, &m, r));
        }
    }
    uint64_t t0 = clock_thread_cpu_ns();
    struct plan *p;
    expect_plan(&l, 1024, NULL, &p);
    double seconds = ns_to_s(clock_thread_cpu_ns() - t0);
    printf("scale: %llu pieces planned in %.2f s\n", (unsigned long long)p->piece_count, seconds);
    assert_int_equal(p->piece_count, 1 << 20);
    assert_true(seconds < 40); /* a sanitizer build on a busy machine included */
    plan_free(p);
    list_close(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_bound),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_scale),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
