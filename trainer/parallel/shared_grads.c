/* shared_grads: see shared_grads.h. Parameters that equally many ranks share are summed together, from one buffer. */
#include "trainer/parallel/shared_grads.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/rank_sums.h"

/* Parameters that `share` neighbouring ranks hold. */
struct sharers {
    struct comm *comm;    /* these ranks */
    struct zero_run *run; /* where in the gradients */
    uint64_t runs, elems;
    float *buffer, *room; /* [elems]; of ordered_allreduce */
};

struct shared_grads {
    struct compute *compute; /* where gradients are */
    int groups;
    struct sharers group[ORDERED_RANKS];
};

/* The parts of `run` that are gradients shared by `share` ranks; with out, listed. Returns how many. */
static uint64_t find_runs(const struct params *p, int share, const struct zero_run *run, uint64_t runs,
                          const uint64_t *at, struct zero_run *out)
{
    uint64_t n = 0;
    for (uint64_t r = 0; r < runs; r++)
        for (int i = 0; i < p->count; i++) {
            const struct param *q = &p->p[i];
            uint64_t begin = q->offset, end = q->offset + param_elems(q);
            if (!q->partial || q->share != share || q->alias >= 0 || q->away || begin >= run[r].end ||
                end <= run[r].begin)
                continue;
            begin = begin > run[r].begin ? begin : run[r].begin;
            end = end < run[r].end ? end : run[r].end;
            if (out)
                out[n] = (struct zero_run){ at[r] + (begin - run[r].begin), at[r] + (end - run[r].begin) };
            n++;
        }
    return n;
}

static bool any_shared(const struct params *p, int share)
{
    for (int i = 0; i < p->count; i++)
        if (p->p[i].partial && p->p[i].share == share && p->p[i].alias < 0)
            return true;
    return false;
}

static uint64_t room_elems(const struct sharers *g)
{
    return ordered_room(g->comm, ordered_slice(g->comm, g->elems)) + 1;
}

static status *take(struct compute *c, uint64_t elems, float **out)
{
    void *p;
    TRY(status_wrap(compute_alloc(c, elems * sizeof **out, &p), "sums of shared gradients"));
    *out = p;
    return NULL;
}

static status *open_group(struct sharers *g, const struct params *p, int share, const struct zero_run *run,
                          const uint64_t *at, uint64_t runs, struct comm *tp)
{
    TRY(comm_split(tp, tp->rank / share, tp->rank, &g->comm));
    g->runs = find_runs(p, share, run, runs, at, NULL);
    g->run = mem_array(NULL, g->runs + 1, sizeof *g->run);
    if (!g->run)
        return ERR(NO_MEMORY, "%llu runs of shared gradients", (unsigned long long)g->runs);
    find_runs(p, share, run, runs, at, g->run);
    for (uint64_t i = 0; i < g->runs; i++)
        g->elems += g->run[i].end - g->run[i].begin;
    TRY(take(p->compute, g->elems + 1, &g->buffer));
    return take(p->compute, room_elems(g), &g->room);
}

status *shared_grads_open(const struct params *p, const struct zero_run *run, const uint64_t *at, uint64_t runs,
                          struct comm *tp, struct shared_grads **out)
{
    struct shared_grads *s = mem_calloc(1, sizeof *s);
    if (!tp || tp->size == 1) {
        *out = s;
        return s ? NULL : ERR(NO_MEMORY, "shared gradients");
    }
    status *st = comm_agree(tp, s ? NULL : ERR(NO_MEMORY, "shared gradients"));
    if (!st)
        s->compute = p->compute;
    for (int share = 2; !st && share <= tp->size && s->groups < ORDERED_RANKS; share++)
        if (any_shared(p, share))
            st = comm_agree(tp, open_group(&s->group[s->groups++], p, share, run, at, runs, tp));
    if (st) {
        shared_grads_close(s);
        return st;
    }
    *out = s;
    return NULL;
}

void shared_grads_close(struct shared_grads *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->groups; i++) {
        struct sharers *g = &s->group[i];
        compute_free(s->compute, g->buffer, (g->elems + 1) * sizeof *g->buffer);
        if (g->room)
            compute_free(s->compute, g->room, room_elems(g) * sizeof *g->room);
        comm_close(g->comm);
        mem_free(g->run);
    }
    mem_free(s);
}

/* Between the gradients and the buffer, run by run. */
static status *copy(struct shared_grads *s, float *grads, const struct sharers *g, bool to_buffer)
{
    float *at = g->buffer;
    for (uint64_t i = 0; i < g->runs; i++) {
        float *grad = grads + g->run[i].begin;
        size_t n = g->run[i].end - g->run[i].begin;
        TRY(compute_copy(s->compute, to_buffer ? at : grad, to_buffer ? grad : at, n * sizeof *at));
        at += n;
    }
    return NULL;
}

status *shared_grads_sum(struct shared_grads *s, float *grads)
{
    const struct ordered_at at = rank_sums_at(s->compute);
    for (int i = 0; i < s->groups; i++) {
        struct sharers *g = &s->group[i];
        TRY(copy(s, grads, g, true));
        TRY(ordered_allreduce(g->comm, g->buffer, g->elems, g->room, &at));
        TRY(copy(s, grads, g, false));
    }
    return NULL;
}
