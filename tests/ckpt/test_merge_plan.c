/* Plans that store boxes: what is merged covers the box once from pieces that ranks hold, by one of those ranks; what
 * is a box already is left where it is; and each rank is told what it has to know. */
#include "ckpt/merge_plan.h"
#include "comm/base/mem.h"
#include "comm/base/status.h"
#include "tests/ckpt/draw.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 512, TEXT = 1024 };

/* What all ranks hold. */
struct held {
    struct plan_desc desc[MOST];
    uint64_t count;
    uint32_t locals[32]; /* [rank] */
    char text[TEXT];
    size_t text_bytes;
};

static uint64_t name_of(struct held *h, const char *name)
{
    size_t at = h->text_bytes, n = strlen(name) + 1;
    assert_true(at + n <= TEXT);
    memcpy(h->text + at, name, n);
    h->text_bytes += n;
    return at;
}

static void hold(struct held *h, int rank, uint64_t name, enum dtype dtype, const struct shape *s, struct piece p)
{
    assert_true(h->count < MOST);
    h->desc[h->count++] = (struct plan_desc){ .part = 0,
                                              .name = name,
                                              .alias = UINT64_MAX,
                                              .dtype = dtype,
                                              .shape = *s,
                                              .piece = p,
                                              .rank = rank,
                                              .local = h->locals[rank]++ };
}

static struct held empty(void)
{
    struct held h = { .count = 0 };
    name_of(&h, "optim");
    return h;
}

static struct plan *plan_of(const struct held *h, int ranks, struct plan_options o)
{
    struct plan *p = NULL;
    OK(plan_make(h->desc, h->count, h->text, h->text_bytes, ranks, &o, &p));
    return p;
}

static const struct plan_desc *desc_of(const struct held *h, int rank, uint32_t local)
{
    for (uint64_t i = 0; i < h->count; i++)
        if (h->desc[i].rank == rank && h->desc[i].local == local)
            return &h->desc[i];
    fail_msg("rank %d has no piece %u", rank, local);
    return NULL;
}

/* ---- drawn models */

struct model {
    struct held held;
    struct mesh mesh;
};

static void draw_model(struct draw *d, struct model *m)
{
    m->held = empty();
    m->mesh = (struct mesh){ .size = { 1, 1, 1, 1, 1 } };
    m->mesh.size[MESH_PP] = (int)draw_between(d, 1, 2);
    m->mesh.size[MESH_DP] = (int)draw_between(d, 1, 4);
    m->mesh.size[MESH_TP] = (int)draw_between(d, 1, 3);
    static const enum dtype dtypes[] = { DTYPE_F32, DTYPE_BF16, DTYPE_U8, DTYPE_F64 };
    for (uint64_t n = draw_between(d, 1, 8), i = 0; i < n; i++) {
        struct layout l = { .shape = { .ndim = (int)draw_below(d, 4) }, .stage = -1 };
        enum dtype dtype = dtypes[draw_below(d, 4)];
        char name[16];
        for (int k = 0; k < LAYOUT_DIMS; k++)
            l.cut[k] = -1;
        for (int k = 0; k < l.shape.ndim; k++)
            l.shape.dim[k] = draw_between(d, draw_below(d, 9) ? 1 : 0, 40);
        if (l.shape.ndim && draw_below(d, 2))
            l.cut[draw_below(d, (uint64_t)l.shape.ndim)] = MESH_TP;
        if (draw_below(d, 4))
            l.run_axes = 1u << MESH_DP;
        l.run_align = draw_below(d, 2) ? 1 : 7;
        if (draw_below(d, 2))
            l.stage = (int)draw_below(d, (uint64_t)m->mesh.size[MESH_PP]);
        snprintf(name, sizeof name, "w%d", (int)(n - i));
        uint64_t at = name_of(&m->held, name);
        for (int r = 0; r < mesh_world(&m->mesh); r++)
            hold(&m->held, r, at, dtype, &l.shape, layout_piece(&l, &m->mesh, r));
    }
}

/* Sources [*at, ...) are those of piece k: they tile it, from what their ranks hold. */
static void check_merged(const struct held *h, const struct plan *p, uint64_t k, uint64_t *at)
{
    const struct plan_piece *q = &p->piece[k];
    const struct plan_tensor *t = &p->tensor[q->tensor];
    uint64_t begin = 0, irregular = 0, first = *at;
    bool writer_gives = false;
    for (; *at < p->source_count && p->source[*at].order == k; ++*at) {
        const struct plan_source *s = &p->source[*at];
        const struct plan_desc *d = desc_of(h, s->rank, s->local);
        assert_string_equal(h->text + d->name, t->name);
        assert_memory_equal(&d->piece.box, &q->piece.box, sizeof d->piece.box);
        assert_int_equal(s->at, begin);
        assert_int_equal(d->piece.begin + s->local_offset, s->at);
        assert_true(s->elems > 0 && s->at + s->elems <= d->piece.end);
        assert_int_equal(s->elem_bytes, dtype_bytes(t->dtype));
        assert_int_equal(s->writer, q->writer);
        writer_gives = writer_gives || s->rank == q->writer;
        begin += s->elems;
        struct piece run = { .box = d->piece.box, .begin = s->at, .end = begin };
        struct piece_box box[LAYOUT_BOXES];
        irregular += piece_boxes(t->shape.ndim, &run, box) != 1;
    }
    assert_true(writer_gives && irregular > 0 && *at - first > 1);
    assert_int_equal(begin, piece_elems(&q->piece));
}

/* What is not merged is a piece that its writer holds, or a part of one, as a box. */
static void check_given(const struct held *h, const struct plan *p, const struct plan_piece *q)
{
    const struct plan_desc *d = desc_of(h, q->writer, q->local);
    struct piece_box box[LAYOUT_BOXES];
    struct piece run = d->piece;
    run.begin += q->local_offset;
    run.end = run.begin + piece_elems(&q->piece);
    assert_true(run.end <= d->piece.end);
    assert_int_equal(piece_boxes(d->shape.ndim, &run, box), 1);
    assert_memory_equal(&box[0].box, &q->piece.box, sizeof box[0].box);
    assert_string_equal(h->text + d->name, p->tensor[q->tensor].name);
}

static void check_plan(const struct held *h, const struct plan *p)
{
    uint64_t at = 0, sum[32] = { 0 };
    for (uint64_t t = 0; t < p->tensor_count; t++) {
        const struct plan_tensor *x = &p->tensor[t];
        uint64_t volume = 0;
        bool ok;
        for (uint64_t k = x->first_piece; k < x->first_piece + x->piece_count; k++) {
            const struct plan_piece *q = &p->piece[k];
            assert_int_equal(q->tensor, t);
            assert_int_equal(q->number, k - x->first_piece);
            assert_true(piece_is_box(x->shape.ndim, &q->piece));
            assert_true(k == x->first_piece || piece_compare(&p->piece[k - 1].piece, &q->piece) < 0);
            volume += piece_elems(&q->piece);
            sum[q->writer] += piece_elems(&q->piece) * dtype_bytes(x->dtype);
            if (q->local == PLAN_MERGED)
                check_merged(h, p, k, &at);
            else
                check_given(h, p, q);
        }
        assert_int_equal(volume, shape_volume(&x->shape, &ok));
    }
    assert_int_equal(at, p->source_count);
    for (int r = 0; r < p->ranks; r++)
        assert_int_equal(p->rank_bytes[r], sum[r]);
}

static bool gives(const struct plan *p, int rank, uint64_t order)
{
    for (uint64_t i = 0; i < p->source_count; i++)
        if (p->source[i].order == order && p->source[i].rank == rank)
            return true;
    return false;
}

/* Every rank is told exactly what concerns it, in the order of the plan, and it travels with its part. */
static void check_told(const struct plan *p, bool gather)
{
    struct plan_source *list;
    uint64_t *first;
    OK(plan_sources_by_rank(p, gather, &list, &first));
    for (int r = 0; r < p->ranks; r++) {
        uint64_t at = first[r];
        for (uint64_t i = 0; i < p->source_count; i++) {
            const struct plan_source *s = &p->source[i];
            if (gather ? gives(p, r, s->order) : s->rank == r || s->writer == r) {
                assert_true(at < first[r + 1]);
                assert_memory_equal(&list[at], s, sizeof *s);
                at++;
            }
        }
        assert_int_equal(at, first[r + 1]);
        struct plan *q;
        void *buf;
        size_t bytes;
        OK(plan_pack_part(p, NULL, 0, list + first[r], at - first[r], &buf, &bytes));
        OK(plan_unpack(buf, bytes, &q));
        assert_int_equal(q->source_count, at - first[r]);
        assert_memory_equal(q->source, list + first[r], q->source_count * sizeof *list);
        plan_free(q);
        FAILS(ST_CORRUPT, "", plan_unpack(buf, bytes - 8, &q));
        if (at > first[r]) { /* a rank that is none */
            put_u64((unsigned char *)buf + bytes - 5 * 8, (uint64_t)p->ranks);
            FAILS(ST_CORRUPT, "gives to rank", plan_unpack(buf, bytes, &q));
        }
        mem_free(buf);
    }
    mem_free(list);
    mem_free(first);
}

static void test_drawn(void **state)
{
    (void)state;
    uint64_t merged = 0;
    for (uint32_t i = 0; i < 400; i++) {
        struct draw d = draw_from(31, i);
        static struct model m;
        draw_model(&d, &m);
        int ranks = mesh_world(&m.mesh);
        struct plan_options o = { .irregular = PLAN_MERGE, .split_bytes = draw_below(&d, 2) ? 512 : 0 };
        struct plan *p = plan_of(&m.held, ranks, o), *q;
        check_plan(&m.held, p);
        check_told(p, false);
        check_told(p, true);
        merged += p->source_count;
        o.irregular = PLAN_GATHER;
        q = plan_of(&m.held, ranks, o);
        assert_int_equal(p->piece_count, q->piece_count);
        assert_int_equal(p->source_count, q->source_count);
        assert_memory_equal(p->source, q->source, p->source_count * sizeof *p->source);
        plan_free(p);
        plan_free(q);
    }
    printf("%llu runs merged\n", (unsigned long long)merged);
    assert_true(merged > 1000);
}

/* ---- by hand */

static const struct shape wide = { .ndim = 2, .dim = { 3, 5 } };

static struct piece run_of(uint64_t begin, uint64_t end)
{
    struct piece p = piece_whole(&wide);
    p.begin = begin;
    p.end = end;
    return p;
}

static const struct plan_piece *piece_of(const struct plan *p, const char *tensor)
{
    for (uint64_t t = 0; t < p->tensor_count; t++)
        if (!strcmp(p->tensor[t].name, tensor))
            return &p->piece[p->tensor[t].first_piece];
    fail_msg("no tensor %s", tensor);
    return NULL;
}

/* Largest first, to the one with the fewest bytes of those who give to it; nodes, then ranks, break ties. */
static void test_writers(void **state)
{
    (void)state;
    struct held h = empty();
    static const struct {
        const char *name;
        enum dtype dtype;
        int from; /* ranks from, from + 1 */
    } tensors[] = { { "a", DTYPE_U8, 0 }, { "b", DTYPE_F64, 0 }, { "c", DTYPE_F32, 0 }, { "d", DTYPE_U8, 2 } };
    for (int i = 0; i < 4; i++) {
        uint64_t name = name_of(&h, tensors[i].name);
        hold(&h, tensors[i].from, name, tensors[i].dtype, &wide, run_of(0, 8));
        hold(&h, tensors[i].from + 1, name, tensors[i].dtype, &wide, run_of(8, 15));
    }
    struct plan *p = plan_of(&h, 4, (struct plan_options){ .irregular = PLAN_MERGE });
    check_plan(&h, p);
    assert_int_equal(piece_of(p, "b")->writer, 0); /* 120 bytes, first */
    assert_int_equal(piece_of(p, "c")->writer, 1); /* 60 */
    assert_int_equal(piece_of(p, "a")->writer, 1); /* 15: 60 is less than 120 */
    assert_int_equal(piece_of(p, "d")->writer, 2);
    plan_free(p);
    const uint64_t extra[] = { 1000, 0, 0, 0 };
    p = plan_of(&h, 4, (struct plan_options){ .irregular = PLAN_MERGE, .extra_bytes = extra });
    for (int i = 0; i < 3; i++)
        assert_int_equal(piece_of(p, tensors[i].name)->writer, 1);
    plan_free(p);
    /* ranks 0 and 2 share a node, which has b, c and a: d goes to the other one */
    const int32_t node[] = { 0, 0, 0, 1 };
    p = plan_of(&h, 4, (struct plan_options){ .irregular = PLAN_MERGE, .node_of = node });
    assert_int_equal(piece_of(p, "d")->writer, 3);
    plan_free(p);
}

/* The rest of the box belongs to other boxes: the run stays a run. */
static void test_part_of_a_box(void **state)
{
    (void)state;
    struct held h = empty();
    uint64_t name = name_of(&h, "w");
    struct piece row = { .box = { .off = { 1, 2 }, .len = { 1, 3 } }, .end = 3 };
    struct piece last = { .box = { .off = { 2, 0 }, .len = { 1, 5 } }, .end = 5 };
    hold(&h, 0, name, DTYPE_F32, &wide, run_of(0, 3));
    hold(&h, 1, name, DTYPE_F32, &wide, run_of(3, 7));
    hold(&h, 1, name, DTYPE_F32, &wide, row);
    hold(&h, 2, name, DTYPE_F32, &wide, last);
    struct plan *p = plan_of(&h, 3, (struct plan_options){ .irregular = PLAN_MERGE });
    assert_int_equal(p->source_count, 0);
    assert_int_equal(p->piece_count, 4);
    uint64_t runs = 0;
    for (uint64_t i = 0; i < 4; i++)
        runs += !piece_is_box(2, &p->piece[i].piece);
    assert_int_equal(runs, 1); /* [0, 3) is a part of a row, and now a box; [3, 7) is two */
    plan_free(p);
}

/* A box that several ranks hold is split at whole rows, and nothing of it is sent; nor is a vector's run. */
static void test_boxes_stay(void **state)
{
    (void)state;
    struct held h = empty();
    struct shape big = { .ndim = 3, .dim = { 1, 1000, 3000 } }, vector = { .ndim = 1, .dim = { 10 } };
    uint64_t name = name_of(&h, "big"), v = name_of(&h, "v");
    for (int r = 0; r < 4; r++) {
        struct piece p = piece_whole(&vector);
        layout_cut(10, 4, (uint64_t)r, &p.begin, &p.end);
        hold(&h, r, name, DTYPE_F32, &big, piece_whole(&big));
        hold(&h, r, v, DTYPE_F32, &vector, p);
    }
    struct plan *p = plan_of(&h, 4, (struct plan_options){ .irregular = PLAN_MERGE });
    check_plan(&h, p);
    assert_int_equal(p->source_count, 0);
    assert_int_equal(p->tensor[0].piece_count, 3); /* 12 MB in parts of 4 MiB */
    assert_int_equal(p->tensor[1].piece_count, 4);
    for (uint64_t k = 0; k < 3; k++)
        assert_int_equal(p->piece[k].piece.box.len[2], 3000);
    plan_free(p);
    struct piece some = piece_whole(&big);
    assert_int_equal(merge_row_elems(3, &some), 3000);
    some.begin = 1;
    assert_int_equal(merge_row_elems(3, &some), 0);
    some.end = 3000;
    assert_int_equal(merge_row_elems(3, &some), 1);
    assert_int_equal(merge_row_elems(0, &(struct piece){ .end = 1 }), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_drawn),
        cmocka_unit_test(test_writers),
        cmocka_unit_test(test_part_of_a_box),
        cmocka_unit_test(test_boxes_stay),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
