/* holders: groups of random records against pairs of them compared one by one: order, replicas, ties, sets. */
#include "ckpt/holders.h"
#include "comm/base/mem.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { RECORDS = 200, TENSORS = 5, RANKS = 9, CASES = 300 };

struct record {
    uint32_t tag;
    struct piece piece;
    int32_t rank;
};

struct world {
    struct record record[RECORDS];
    uint32_t tensor[RECORDS];
    uint64_t count;
    struct shape shape;
    bool tags;
};

/* Few places, so that corners tie with other lengths and runs, and pieces repeat; dimensions of 2^40 wrap corners. */
static void draw_world(struct world *w, uint32_t number)
{
    struct draw d = draw_from(77, number);
    uint64_t step = draw_below(&d, 3) ? 1 : (uint64_t)1 << 40;
    bool ascending = draw_below(&d, 4) == 0;
    memset(w, 0, sizeof *w);
    w->shape = (struct shape){ .ndim = (int)draw_below(&d, 4) };
    for (int k = 0; k < w->shape.ndim; k++)
        w->shape.dim[k] = 4 * step;
    w->count = draw_below(&d, RECORDS + 1);
    w->tags = draw_below(&d, 2);
    for (uint64_t i = 0; i < w->count; i++) {
        struct record *r = &w->record[i];
        for (int k = 0; k < w->shape.ndim; k++) {
            r->piece.box.off[k] = (ascending && !k ? i * 4 / w->count : draw_below(&d, 3)) * step;
            r->piece.box.len[k] = draw_below(&d, 2) + 1;
        }
        r->piece.begin = draw_below(&d, 2);
        r->piece.end = r->piece.begin + draw_below(&d, 2);
        r->rank = (int32_t)(ascending ? i * RANKS / w->count : draw_below(&d, RANKS));
        r->tag = (uint32_t)draw_below(&d, 3);
        w->tensor[i] = (uint32_t)draw_below(&d, TENSORS);
    }
}

static uint32_t tag_of(const struct world *w, uint64_t i)
{
    return w->tags ? w->record[i].tag : (uint32_t)i;
}

/* How many records of a tensor have that piece and, if rank is not negative, come from that rank with that tag. */
static uint64_t count_equal(const struct world *w, uint32_t tensor, const struct piece *p, int rank, uint32_t tag)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < w->count; i++)
        n += w->tensor[i] == tensor && piece_equal(&w->record[i].piece, p) &&
             (rank < 0 || (w->record[i].rank == rank && tag_of(w, i) == tag));
    return n;
}

/* Whether that rank has the piece with a tag below that one. */
static bool holds(const struct world *w, uint32_t tensor, const struct piece *p, int rank, uint32_t below)
{
    for (uint64_t i = 0; i < w->count; i++)
        if (w->tensor[i] == tensor && piece_equal(&w->record[i].piece, p) && w->record[i].rank == rank &&
            tag_of(w, i) < below)
            return true;
    return false;
}

static void check_group(const struct world *w, const struct holders *h, uint32_t tensor, const struct holder_group *g,
                        bool once)
{
    const struct holder *x = &h->holder[g->first];
    uint64_t ranks = 0;
    assert_int_equal(g->set == HOLDER_LONE, g->count == 1);
    for (uint32_t i = 0; i < g->count; i++) {
        uint64_t n = count_equal(w, tensor, g->piece, x[i].rank, x[i].tag), same = 0;
        assert_true(n > 0);
        if (i)
            assert_true(x[i].rank > x[i - 1].rank || (!once && x[i].rank == x[i - 1].rank && x[i].tag >= x[i - 1].tag));
        for (uint32_t k = 0; k < g->count; k++)
            same += x[k].rank == x[i].rank && x[k].tag == x[i].tag;
        assert_int_equal(same, once ? 1 : n);
        if (once)
            assert_false(holds(w, tensor, g->piece, x[i].rank, x[i].tag));
    }
    for (int r = 0; r < RANKS; r++)
        ranks += holds(w, tensor, g->piece, r, RECORDS);
    assert_int_equal(g->count, once ? ranks : count_equal(w, tensor, g->piece, -1, 0));
}

/* Two groups have one set exactly if they have the same ranks. */
static void check_sets(const struct holders *h, const struct holder_group *g, uint64_t n)
{
    for (uint64_t a = 0; a < n; a++)
        for (uint64_t b = 0; b < a; b++) {
            bool same = g[a].count > 1 && g[a].count == g[b].count;
            for (uint32_t i = 0; same && i < g[a].count; i++)
                same = h->holder[g[a].first + i].rank == h->holder[g[b].first + i].rank;
            assert_int_equal(same, g[a].count > 1 && g[a].set == g[b].set);
        }
}

static void test_random(void **state)
{
    (void)state;
    static struct world w;
    static struct holder_group all[RECORDS];
    for (uint32_t number = 0; number < CASES; number++) {
        draw_world(&w, number);
        struct holders h;
        const struct holder_records of = { .piece = &w.record->piece,
                                           .rank = &w.record->rank,
                                           .tag = w.tags ? &w.record->tag : NULL,
                                           .stride = sizeof *w.record,
                                           .count = w.count,
                                           .tensor = w.tensor };
        bool once = number % 2;
        uint64_t n = 0, records = 0;
        assert_null(holders_open(&h, &of, TENSORS));
        for (uint32_t t = TENSORS; t-- > 0;) { /* in any order */
            assert_null(holders_tensor(&h, t, &w.shape, once));
            for (uint64_t i = 0; i < h.groups; i++) {
                if (i)
                    assert_true(piece_compare(h.group[i - 1].piece, h.group[i].piece) < 0);
                check_group(&w, &h, t, &h.group[i], once);
                records += count_equal(&w, t, h.group[i].piece, -1, 0);
                all[n++] = h.group[i];
            }
        }
        assert_int_equal(records, w.count);
        for (uint64_t i = 0, next = 0; i < n; next += all[i++].count)
            assert_int_equal(all[i].first, next);
        check_sets(&h, all, n);
        holders_free(&h);
    }
}

/* The least loaded by bytes, then by bytes of the node, then by rank, while loads grow. */
static void test_least(void **state)
{
    (void)state;
    struct record r[RANKS] = { 0 };
    uint32_t tensor[RANKS] = { 0 }, at;
    uint64_t bytes[RANKS] = { 0 }, node_bytes[RANKS] = { 0 };
    int32_t node_of[RANKS];
    struct shape scalar = { .ndim = 0 };
    struct holders h;
    struct draw d = draw_from(78, 0);
    for (int i = 0; i < RANKS; i++) {
        r[i] = (struct record){ .piece = piece_whole(&scalar), .rank = RANKS - 1 - i };
        node_of[i] = i % 4;
    }
    const struct holder_records of = {
        .piece = &r->piece, .rank = &r->rank, .tag = &r->tag, .stride = sizeof *r, .count = RANKS, .tensor = tensor
    };
    const struct holder_load load = { .bytes = bytes, .node_of = node_of, .node_bytes = node_bytes };
    assert_null(holders_open(&h, &of, 1));
    assert_null(holders_tensor(&h, 0, &scalar, true));
    assert_int_equal(h.groups, 1);
    for (int turn = 0; turn < 500; turn++) {
        int best = 0;
        for (int i = 1; i < RANKS; i++)
            if (bytes[i] < bytes[best] ||
                (bytes[i] == bytes[best] && node_bytes[node_of[i]] < node_bytes[node_of[best]]))
                best = i;
        assert_null(holders_least(&h, h.group->set, &load, &at));
        assert_int_equal(h.holder[h.group->first + at].rank, best);
        uint64_t more = draw_below(&d, 3);
        bytes[best] += more;
        node_bytes[node_of[best]] += more;
    }
    holders_free(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_random), cmocka_unit_test(test_least) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
