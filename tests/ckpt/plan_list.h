/* plan_list: descriptors for the planner, written one after another. For files that include cmocka.h. */
#ifndef TESSERA_TESTS_CKPT_PLAN_LIST_H
#define TESSERA_TESTS_CKPT_PLAN_LIST_H

#include "ckpt/plan.h"
#include "comm/base/mem.h"

#include <stdio.h>
#include <string.h>

enum { TEXT = 1 << 20 };

/* A list of descriptors under construction. */
struct list {
    struct plan_desc *desc;
    uint64_t count;
    char *text;
    size_t text_bytes;
    uint32_t local[1024]; /* each rank's next index */
};

static inline void list_open(struct list *l, uint64_t descs)
{
    *l = (struct list){ .desc = mem_calloc(descs, sizeof *l->desc), .text = mem_calloc(TEXT, 1) };
}

static inline void list_close(struct list *l)
{
    mem_free(l->desc);
    mem_free(l->text);
}

static inline uint64_t text(struct list *l, const char *s)
{
    uint64_t at = l->text_bytes;
    l->text_bytes += (size_t)snprintf(l->text + at, TEXT - at, "%s", s) + 1;
    return at;
}

static inline struct plan_desc *add(struct list *l, int rank, uint64_t name, enum dtype dtype, struct shape s,
                                    struct piece p)
{
    if (!l->count)
        memset(l->local, 0, sizeof l->local);
    struct plan_desc *d = &l->desc[l->count++];
    *d = (struct plan_desc){ .part = 0,
                             .name = name,
                             .alias = UINT64_MAX,
                             .dtype = dtype,
                             .trainable = 1,
                             .shape = s,
                             .piece = p,
                             .rank = rank,
                             .local = l->local[rank]++ };
    return d;
}

static inline struct piece run1(uint64_t begin, uint64_t end)
{
    return (struct piece){ .box = { .off = { begin }, .len = { end - begin } }, .begin = 0, .end = end - begin };
}

static inline struct piece box2(uint64_t r, uint64_t c, uint64_t rows, uint64_t cols)
{
    return (struct piece){ .box = { .off = { r, c }, .len = { rows, cols } }, .begin = 0, .end = rows * cols };
}

static inline status *make(struct list *l, int ranks, const struct plan_options *o, struct plan **out)
{
    return plan_make(l->desc, l->count, l->text, l->text_bytes, ranks, o, out);
}

static inline void expect_plan(struct list *l, int ranks, const struct plan_options *o, struct plan **out)
{
    status *st = make(l, ranks, o, out);
    if (st)
        fail_msg("%s", status_message(st));
}

static inline uint64_t most_bytes(const struct plan *p)
{
    uint64_t most = 0;
    for (int r = 0; r < p->ranks; r++)
        most = p->rank_bytes[r] > most ? p->rank_bytes[r] : most;
    return most;
}

/* Every element of every tensor has one writer, who holds it where the plan says. desc: as given, not sorted. */
static inline void check_plan(const struct plan *p, const struct list *l)
{
    uint64_t total = 0, sum = 0, next = 0;
    uint64_t *bytes = mem_calloc((size_t)p->ranks, sizeof *bytes);
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        bool ok;
        uint64_t volume = 0;
        if (i)
            assert_true(strcmp(t->part, t[-1].part) > 0 ||
                        (!strcmp(t->part, t[-1].part) && strcmp(t->name, t[-1].name) > 0));
        assert_int_equal(t->first_piece, next);
        next += t->piece_count;
        for (uint64_t k = t->first_piece; k < next; k++) {
            const struct plan_piece *q = &p->piece[k];
            assert_int_equal(q->tensor, i);
            assert_true(piece_elems(&q->piece) > 0);
            if (k > t->first_piece)
                assert_true(piece_compare(&q[-1].piece, &q->piece) < 0);
            bool found = false;
            for (uint64_t j = 0; j < l->count && !found; j++) {
                const struct plan_desc *d = &l->desc[j];
                found = d->rank == q->writer && d->local == q->local && !strcmp(l->text + d->name, t->name) &&
                        !memcmp(&d->piece.box, &q->piece.box, sizeof d->piece.box) &&
                        d->piece.begin + q->local_offset == q->piece.begin && q->piece.end <= d->piece.end;
            }
            assert_true(found);
            bytes[q->writer] += piece_elems(&q->piece) * dtype_bytes(t->dtype);
            volume += piece_elems(&q->piece);
        }
        assert_int_equal(volume, t->alias_of ? 0 : shape_volume(&t->shape, &ok));
        total += volume * dtype_bytes(t->dtype);
    }
    assert_int_equal(next, p->piece_count);
    for (int r = 0; r < p->ranks; r++) {
        assert_int_equal(bytes[r], p->rank_bytes[r]);
        sum += bytes[r];
    }
    assert_int_equal(sum, total);
    mem_free(bytes);
}

static inline bool same_plan(const struct plan *a, const struct plan *b)
{
    void *pa, *pb;
    size_t na, nb;
    assert_null(plan_pack(a, &pa, &na));
    assert_null(plan_pack(b, &pb, &nb));
    bool same = na == nb && !memcmp(pa, pb, na);
    mem_free(pa);
    mem_free(pb);
    return same;
}

/* A model on dp x tp: replicated norms, TP-cut matrices replicated over dp, optimiser states as ZeRO runs, odd sizes.
 */
static inline void model_list(struct list *l, int dp, int tp, int layers, uint64_t width)
{
    text(l, "model");
    struct mesh m = { .size = { 1, dp, 1, 1, tp } };
    for (int layer = 0; layer < layers; layer++) {
        const uint64_t shapes[][2] = { { width, width }, { 3 * width + 1, width }, { width, 0 }, { 17, width } };
        for (int kind = 0; kind < 4; kind++)
            for (int zero = 0; zero < 2; zero++) {
                char name[64];
                snprintf(name, sizeof name, "layers.%d.%d.%s", layer, kind, zero ? "exp_avg" : "weight");
                uint64_t at = text(l, name);
                struct layout lay = { .shape = { .ndim = kind == 2 ? 1 : 2,
                                                 .dim = { shapes[kind][0], shapes[kind][1] } },
                                      .cut = { kind == 2 ? -1 : MESH_TP, -1 },
                                      .stage = -1,
                                      .run_axes = zero ? 1u << MESH_DP : 0,
                                      .run_align = 1024 };
                for (int r = 0; r < dp * tp; r++)
                    add(l, r, at, zero ? DTYPE_F32 : DTYPE_BF16, lay.shape, layout_piece(&lay, &m, r));
            }
    }
}

#endif
