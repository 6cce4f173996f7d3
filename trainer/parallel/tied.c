/* tied: see tied.h. The head's gradient goes to the first stage a slice at a time, whole on every data-parallel rank.
 */
#include "trainer/parallel/tied.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/shards.h"

enum { TIED_TAG = 2, SLICE_ELEMS = 1 << 20 };

struct tied {
    struct comm *dp, *pp;     /* pp NULL: one stage */
    struct compute *compute;  /* where gradients are */
    struct zero *head;        /* the head's gradient; NULL: it is on another stage */
    float *from, *to, *slice; /* gradients of the head and of the embedding, NULL where they are not; room to receive */
    uint64_t room;            /* elements of the slice */
    uint64_t elems;
    uint64_t offset, all; /* of the embedding in the model's block, and its elements */
    bool cut;             /* ZeRO 2 and 3: a shard has its runs of both gradients, and adds these */
};

/* The alias that is the head's name, or NULL. */
static const struct param *tied_name(const struct model *m)
{
    const struct params *ps = &m->params;
    for (int i = 0; i < ps->count; i++)
        if (ps->p[i].alias >= 0)
            return &ps->p[i];
    return NULL;
}

static bool first_stage(const struct comm *pp)
{
    return !pp || pp->rank == 0;
}

static bool last_stage(const struct comm *pp)
{
    return !pp || pp->rank == pp->size - 1;
}

static status *open_part(struct tied *t, struct model *m, const struct param *target)
{
    t->offset = target->offset;
    t->all = t->elems = last_stage(t->pp) ? param_elems(m->tied.p) : param_elems(target);
    if (!t->cut) {
        t->from = last_stage(t->pp) ? m->tied.grad : NULL;
        t->to = first_stage(t->pp) ? target->value.grad : NULL;
    }
    if (last_stage(t->pp))
        return NULL;
    uint64_t most = t->elems + PARAM_ALIGN; /* a shard's runs have the padding, too */
    void *slice;
    t->room = most < SLICE_ELEMS ? most : SLICE_ELEMS;
    TRY(status_wrap(compute_alloc(t->compute, t->room * sizeof *t->slice, &slice), "a tied weight's gradient"));
    t->slice = slice;
    return NULL;
}

status *tied_open(const struct zero_options *o, struct model *m, struct comm *dp, struct comm *pp, struct tied **out)
{
    const struct param *name = tied_name(m);
    bool apart = name && !name->frozen && (pp || m->tied.count), part = apart && (first_stage(pp) || last_stage(pp));
    *out = NULL;
    struct tied *t = part ? mem_calloc(1, sizeof *t) : NULL;
    status *st = part && !t ? ERR(NO_MEMORY, "a tied weight") : NULL;
    if (t) {
        t->dp = dp;
        t->pp = pp;
        t->cut = o->stage >= 2;
        t->compute = m->params.compute;
        st = open_part(t, m, &m->params.p[name->alias]);
    }
    st = comm_agree(dp, st);
    if (!st && t && last_stage(pp)) {
        struct zero_options sums = *o;
        sums.stage = t->cut ? 2 : 0;
        sums.sums_only = true;
        sums.param_dtype = DTYPE_F32;
        sums.tp = sums.pp = NULL; /* no part of it is on two tensor-parallel ranks */
        st = zero_open(&sums, &m->tied, dp, &t->head);
    }
    if (!st && t && t->cut && t->head) /* it has its window now */
        m->params.p[name - m->params.p].value.grad = m->tied.p->value.grad;
    if (pp)
        st = comm_agree(pp, st);
    if (st) {
        tied_close(t);
        return st;
    }
    *out = t;
    return NULL;
}

void tied_close(struct tied *t)
{
    if (!t)
        return;
    zero_close(t->head);
    compute_free(t->compute, t->slice, t->room * sizeof *t->slice);
    mem_free(t);
}

void tied_begin(struct tied *t, uint32_t k)
{
    if (t && t->head)
        zero_begin(t->head, k);
}

void tied_begin_pass(struct tied *t)
{
    if (t && t->cut && t->head)
        shards_clear(zero_shards(t->head));
}

status *tied_left(struct tied *t)
{
    return t && t->head ? zero_left(t->head, 0) : NULL;
}

status *tied_added(struct tied *t, uint32_t micro_batch)
{
    return t && t->head ? zero_added(t->head, micro_batch) : NULL;
}

status *tied_idle(struct tied *t)
{
    return t && t->head ? zero_idle(t->head, 0) : NULL;
}

status *tied_added_none(struct tied *t)
{
    return t && t->head ? zero_added_none(t->head, 0) : NULL;
}

uint64_t tied_sent_bytes(const struct tied *t)
{
    return t && t->head ? zero_sent_bytes(t->head) - t->dp->sent_bytes : 0;
}

void tied_times(const struct tied *t, uint64_t *flight_ns, uint64_t *wait_ns)
{
    if (!t || !t->head)
        return;
    zero_times(t->head, flight_ns, wait_ns);
    *flight_ns -= t->dp->flight_ns;
    *wait_ns -= t->dp->wait_ns;
}

void tied_memory(const struct tied *t, struct zero_memory *m)
{
    if (!t || !t->head)
        return;
    struct zero_memory head = zero_memory(t->head);
    m->gradients += head.gradients;
    m->windows += head.windows;
    m->messages += head.messages;
}

static void add(const struct tied *t, float *to, const float *from, uint64_t n)
{
    if (!compute_host(t->compute))
        t->compute->kernels->axpy(t->compute->workers, to, from, 1.0f, (int64_t)n);
    else
        for (uint64_t i = 0; i < n; i++)
            to[i] += from[i];
}

status *tied_sum(struct tied *t, struct zero *z)
{
    if (!t)
        return NULL;
    if (t->head)
        TRY(zero_reduce(t->head, NULL));
    if (t->head && !t->cut)
        TRY(zero_gather(t->head));
    if (t->cut && t->head)
        t->from = zero_own_sums(t->head, 0, t->all, &t->elems);
    if (t->cut && first_stage(t->pp))
        t->to = zero_own_sums(z, t->offset, t->all, &t->elems);
    if (t->from && t->to) {
        add(t, t->to, t->from, t->elems);
        return NULL;
    }
    for (uint64_t at = 0; at < t->elems; at += SLICE_ELEMS) {
        uint64_t n = t->elems - at < SLICE_ELEMS ? t->elems - at : SLICE_ELEMS;
        struct comm_xfer x = { t->to ? t->pp->size - 1 : 0, TIED_TAG, !t->to, t->to ? t->slice : t->from + at,
                               n * sizeof(float) };
        TRY(comm_exchange(t->pp, &x, 1, compute_stream(t->compute)));
        if (t->to)
            add(t, t->to + at, t->slice, n);
    }
    return NULL;
}

status *tied_share(struct model *m, struct shards *s, struct comm *pp)
{
    const struct param *name = m ? tied_name(m) : NULL;
    if (!name || !pp || !(first_stage(pp) || last_stage(pp)))
        return NULL;
    if (s && first_stage(pp))
        TRY(shards_begin(s, false)); /* the embedding, too, which stays until the next pass */
    const struct param *p = last_stage(pp) ? m->tied.p : &m->params.p[name->alias];
    struct comm_xfer x = { last_stage(pp) ? 0 : pp->size - 1, TIED_TAG, !last_stage(pp), p->value.data,
                           param_elems(p) * dtype_bytes(p->value.dtype) };
    return comm_exchange(pp, &x, 1, compute_stream(m->params.compute));
}
