/* treesum: see treesum.h. The stack of a tree is a binary counter: pushing leaf i combines as often as i + 1 has
 * trailing zeros, so n leaves cost n - 1 additions and the stack never holds more than 2 log2 n nodes.
 *
 * An addition is in the round behind those that write what it reads. The nodes over many slots are one kind of phase,
 * whose rounds are a kernel each; all others go round by round in one. */
#include "trainer/parallel/treesum.h"

#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"

#include <string.h>

unsigned tree_level(uint64_t begin, uint64_t end)
{
    unsigned fits = 63 - (unsigned)__builtin_clzll(end - begin);
    unsigned aligned = begin ? (unsigned)__builtin_ctzll(begin) : 63;
    return fits < aligned ? fits : aligned;
}

uint64_t tree_node_count(uint64_t begin, uint64_t end)
{
    uint64_t n = 0;
    for (; begin < end; n++)
        begin += (uint64_t)1 << tree_level(begin, end);
    return n;
}

bool tree_siblings(unsigned left_level, uint64_t left, unsigned right_level, uint64_t right)
{
    return left_level == right_level && right == left + 1 && left % 2 == 0;
}

/* ---- the list ---- */

/* An array with room for one more than n, or the plan has failed. */
static void *grown(struct sum_plan *p, void *array, uint64_t n, uint32_t *cap, size_t bytes)
{
    if (p->failed || n < *cap)
        return array;
    uint64_t most = n + n / 2 + 64;
    void *more = most <= UINT32_MAX ? mem_array(array, most, bytes) : NULL;
    p->failed = !more;
    if (more)
        *cap = (uint32_t)most;
    return more ? more : array;
}

uint32_t plan_slots(struct sum_plan *p, uint64_t n)
{
    uint32_t first = p->slots ? p->slots : 1, old = p->slots;
    p->known = grown(p, p->known, first + n, &p->known_cap, sizeof *p->known);
    if (p->failed)
        return 0;
    p->slots = first + (uint32_t)n;
    memset(p->known + old, 0, (p->slots - old) * sizeof *p->known);
    return first;
}

static void list(struct sum_plan *p, struct add a)
{
    uint32_t round = p->rounds, cap = p->adds_cap;
    p->add = grown(p, p->add, p->adds, &cap, sizeof *p->add);
    p->round = grown(p, p->round, p->adds, &p->adds_cap, sizeof *p->round);
    if (p->failed)
        return;
    for (uint32_t i = 0; i < a.count; i++) {
        uint32_t from = a.from + i * a.step;
        CHECK(from < p->slots, "slot %u of %u", from, p->slots);
        round = p->known[from] > round ? p->known[from] : round;
    }
    CHECK(a.to && a.to < p->slots && !p->known[a.to], "slot %u of %u is written twice", a.to, p->slots);
    p->known[a.to] = round + 1;
    p->round[p->adds] = round;
    p->add[p->adds++] = a;
}

void plan_add(struct sum_plan *p, uint32_t to, uint32_t left, uint32_t right)
{
    list(p, (struct add){ to, left, right - left, 2 });
}

void plan_copy(struct sum_plan *p, uint32_t to, uint32_t from)
{
    list(p, (struct add){ to, from, 1, 1 });
}

void plan_node(struct sum_plan *p, uint32_t to, uint32_t from, unsigned level)
{
    uint64_t n = (uint64_t)1 << level;
    while (n > ADD_MOST) {
        uint32_t parts = plan_slots(p, n / ADD_MOST);
        for (uint32_t i = 0; i < n / ADD_MOST; i++)
            list(p, (struct add){ parts + i, from + i * ADD_MOST, 1, ADD_MOST });
        from = parts;
        n /= ADD_MOST;
    }
    list(p, (struct add){ to, from, 1, (uint32_t)n });
}

/* In order of rounds, of which this phase's begin behind those before it. */
int plan_phase(struct sum_plan *p)
{
    CHECK(p->phases < PLAN_PHASES, "more than %d phases", PLAN_PHASES);
    uint32_t first = p->phases && !p->failed ? p->begin[p->rounds] : 0, n = p->failed ? 0 : p->adds - first,
             end = p->rounds;
    p->wide[p->phases] = false;
    for (uint32_t i = first; i < first + n; i++) {
        end = p->round[i] >= end ? p->round[i] + 1 : end;
        p->wide[p->phases] = p->wide[p->phases] || p->add[i].count > 2;
    }
    uint32_t *begin = mem_array(p->begin, (size_t)end + 2, sizeof *begin);
    struct add *sorted = mem_array(NULL, (size_t)n + 1, sizeof *sorted);
    p->failed = p->failed || !begin || !sorted;
    p->begin = begin ? begin : p->begin;
    if (!p->failed) {
        memset(begin + p->rounds, 0, (end - p->rounds + 2) * sizeof *begin);
        for (uint32_t i = first; i < first + n; i++)
            begin[p->round[i] + 1]++;
        begin[p->rounds] = first;
        for (uint32_t r = p->rounds; r < end; r++)
            begin[r + 1] += begin[r];
        for (uint32_t i = first; i < first + n; i++)
            sorted[begin[p->round[i]]++ - first] = p->add[i];
        if (n)
            memcpy(p->add + first, sorted, n * sizeof *sorted);
        for (uint32_t r = end; r > p->rounds; r--)
            begin[r] = begin[r - 1];
        begin[p->rounds] = first;
        p->rounds = end;
    }
    mem_free(sorted);
    p->phase_round[p->phases + 1] = p->rounds;
    return p->phases++;
}

/* ---- where the numbers are ---- */

/* What the kernels read of the list lies where v is. */
static status *settle(struct sum_plan *p, void *list, size_t bytes, void **out)
{
    *out = list;
    if (compute_host(p->compute))
        return NULL;
    *out = NULL;
    TRY(compute_alloc(p->compute, bytes, out));
    return compute_put(p->compute, *out, list, bytes);
}

status *plan_ready(struct sum_plan *p, struct compute *c, struct workers *w)
{
    void *v = NULL, *there = NULL;
    if (p->failed)
        return ERR(NO_MEMORY, "the sums of a norm: %u numbers, %u additions", p->slots, p->adds);
    mem_free(p->known);
    mem_free(p->round);
    p->known = p->round = NULL;
    p->compute = c;
    p->workers = w;
    TRY(status_wrap(compute_alloc(c, p->slots * sizeof *p->v, &v), "norms of gradients"));
    p->v = v;
    TRY(settle(p, p->add, p->adds * sizeof *p->add, &there));
    p->add_there = there;
    TRY(settle(p, p->begin, ((size_t)p->rounds + 1) * sizeof *p->begin, &there));
    p->begin_there = there;
    return NULL;
}

void plan_run(const struct sum_plan *p, int phase)
{
    const struct kernels *k = compute_kernels(p->compute);
    struct workers *w = compute_workers(p->compute, p->workers);
    uint32_t first = p->phase_round[phase], end = p->phase_round[phase + 1];
    if (!p->wide[phase])
        k->add_rounds(w, p->v, p->add_there, p->begin_there + first, end - first);
    for (uint32_t r = first; p->wide[phase] && r < end; r++)
        k->adds(w, p->v, p->add_there + p->begin[r], p->begin[r + 1] - p->begin[r]);
}

void plan_close(struct sum_plan *p)
{
    if (!compute_host(p->compute)) {
        compute_free(p->compute, p->add_there, p->adds * sizeof *p->add);
        compute_free(p->compute, p->begin_there, ((size_t)p->rounds + 1) * sizeof *p->begin);
    }
    compute_free(p->compute, p->v, p->slots * sizeof *p->v);
    mem_free(p->known);
    mem_free(p->round);
    mem_free(p->begin);
    mem_free(p->add);
    *p = (struct sum_plan){ 0 };
}

/* ---- trees ---- */

void tree_push(struct sum_plan *p, struct tree *t, unsigned level, uint64_t index, uint32_t slot)
{
    while (t->n && tree_siblings(t->node[t->n - 1].level, t->node[t->n - 1].index, level, index)) {
        uint32_t sum = plan_slots(p, 1);
        plan_add(p, sum, t->node[--t->n].slot, slot);
        slot = sum;
        level++;
        index /= 2;
    }
    CHECK(t->n < TREE_NODES, "nodes were pushed out of order");
    t->node[t->n++] = (struct tree_node){ .index = index, .level = level, .slot = slot };
}

uint32_t tree_total(struct sum_plan *p, const struct tree *t)
{
    uint32_t sum =
        t->n ? t->node[t->n - 1].slot : 0; /* what misses siblings moves up alone: the right edge, from below */
    for (int i = t->n - 2; i >= 0; i--) {
        uint32_t more = plan_slots(p, 1);
        plan_add(p, more, t->node[i].slot, sum);
        sum = more;
    }
    return sum;
}
