/* experts: see experts.h. */
#include "trainer/parallel/experts.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/compute.h"

#include <string.h>

static uint64_t padded(const struct param *p)
{
    return (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
}

/* Where the model's chunks are among the experts that train here. Of the blocks before them in the whole model nothing
 * is known: sums over these are not promised to have the same bits on other meshes. */
static void place_chunks(struct params *own)
{
    for (int c = 0; c < own->chunks; c++) {
        uint64_t begin = 0;
        for (int i = 0; i < own->count; i++) {
            const struct param *p = &own->p[i];
            begin += p->experts && !p->frozen && !p->away && p->unit < own->chunk[c].unit_begin ? padded(p) : 0;
        }
        own->chunk[c].begin = own->chunk[c].before = begin;
    }
}

/* The parameters of one part, of those that train and of frozen ones, the others away. */
static status *view(struct params *p, bool experts, struct params *out)
{
    uint64_t begin = experts ? p->total - p->experts : 0;
    *out = *p;
    out->p = mem_array(NULL, (size_t)p->count + 1, sizeof *out->p);
    if (!out->p)
        return ERR(NO_MEMORY, "a list of %d parameters", p->count);
    memcpy(out->p, p->p, (size_t)p->count * sizeof *out->p);
    out->cap = p->count;
    out->total = experts ? p->experts : p->total - p->experts;
    out->frozen = 0;
    out->whole = p;
    out->data = p->data ? p->data + begin : NULL;
    out->grad = p->grad ? p->grad + begin : NULL;
    for (int i = 0; i < p->count; i++) {
        struct param *q = &out->p[i];
        if (q->experts != experts) {
            q->frozen = q->away = true;
            q->partial = q->muon = false;
        }
        if (q->alias >= 0)
            q->offset = out->p[q->alias].offset;
        else if (!q->frozen)
            q->offset -= begin;
        else
            q->offset = out->total + out->frozen;
        if (q->alias < 0 && q->frozen && !q->away)
            out->frozen += padded(q);
    }
    if (experts)
        place_chunks(out);
    return NULL;
}

/* The sum of n slots from `from` on, in order. */
static uint32_t in_order(struct sum_plan *p, uint32_t from, int n)
{
    uint32_t sum = from;
    for (uint32_t i = 1; i < (uint32_t)n; i++) {
        uint32_t more = plan_slots(p, 1);
        plan_add(p, more, sum, from + i);
        sum = more;
    }
    return sum;
}

static status *list_norm(struct experts *e, struct workers *w)
{
    struct sum_plan *p = &e->plan;
    e->norm_dense = plan_slots(p, 1);
    e->norm_ep = plan_slots(p, (uint64_t)e->ep->size);
    uint32_t own = in_order(p, e->norm_ep, e->ep->size);
    if (e->pp) {
        e->norm_pp = plan_slots(p, (uint64_t)e->pp->size);
        plan_copy(p, e->norm_pp + (uint32_t)e->pp->rank, own);
    }
    e->over_ep = plan_phase(p);
    own = e->pp ? in_order(p, e->norm_pp, e->pp->size) : own;
    e->norm_all = plan_slots(p, 1);
    plan_add(p, e->norm_all, e->norm_dense, own);
    e->over_pp = plan_phase(p);
    return plan_ready(p, e->own.compute, w);
}

status *experts_open(const struct zero_options *o, struct params *p, struct comm *dp, struct comm *ep,
                     struct experts **out)
{
    struct experts *e = mem_calloc(1, sizeof *e);
    status *st = e ? NULL : ERR(NO_MEMORY, "expert parallelism");
    if (e) {
        *e = (struct experts){ .dp = dp, .ep = ep, .pp = o->pp, .cut = o->stage >= 2 };
        st = view(p, false, &e->dense);
        if (!st)
            st = view(p, true, &e->own);
        if (!st)
            st = list_norm(e, o->workers);
    }
    st = comm_agree(ep, st);
    struct zero_options own = *o;
    own.deterministic = false; /* ep is not among what leaves bits as they are */
    own.micro_batches = 0;
    own.pp = NULL;
    own.shards = o->shards && o->shards % ep->size == 0 ? o->shards / ep->size : o->shards ? 1 : 0;
    bool moved = o->stage == 3 || o->param_dtype == DTYPE_BF16; /* frozen ones are not where they were */
    if (!st && (e->own.total || (moved && e->own.frozen)))
        st = zero_open(&own, &e->own, dp, &e->zero);
    if (st) {
        experts_close(e);
        return st;
    }
    *out = e;
    return NULL;
}

status *experts_open_reference(struct experts *e, const struct shards_options *o, struct params *ref)
{
    struct shards_options own = *o;
    own.shards = e->zero ? zero_holders(e->zero) : 1;
    status *st = view(ref, false, &e->ref_dense);
    if (!st)
        st = view(ref, true, &e->ref_own);
    TRY(comm_agree(e->ep, st));
    return e->zero ? shards_open(&own, &e->ref_own, e->dp, &e->ref_shards) : NULL;
}

status *experts_open_muon(struct experts *e, struct comm *tp, struct comm *all, struct workers *w)
{
    bool any = false;
    for (int i = 0; e->zero && i < e->own.count; i++)
        any = any || e->own.p[i].muon;
    return any ? owners_open(&e->own, e->zero, e->dp, tp, all, w, &e->owners) : NULL;
}

void experts_close(struct experts *e)
{
    if (!e)
        return;
    owners_close(e->owners);
    shards_close(e->ref_shards);
    mem_free(e->ref_dense.p);
    mem_free(e->ref_own.p);
    zero_close(e->zero);
    mem_free(e->dense.p);
    mem_free(e->own.p);
    plan_close(&e->plan);
    mem_free(e);
}

void experts_begin(struct experts *e, uint32_t passes)
{
    if (!e || !e->zero)
        return;
    e->passes = passes;
    memset(e->pass, 0, sizeof e->pass);
    zero_begin(e->zero, (uint32_t)e->dp->size * passes);
}

status *experts_added(struct experts *e, int chunk)
{
    uint32_t k;
    if (!e || !e->zero || !e->cut)
        return NULL;
    CHECK(zero_micro_batch(e->zero, (uint32_t)e->dp->size * e->passes, e->pass[chunk], &k), "pass %u of %u",
          e->pass[chunk], e->passes);
    e->pass[chunk]++;
    return zero_added_chunk(e->zero, k, chunk);
}

/* Every rank's number of c, which lie at `at`. */
static status *gather(const struct experts *e, struct comm *c, uint32_t at)
{
    double *v = e->plan.v + at;
    return c && c->size > 1 ? comm_allgather(c, v + c->rank, v, sizeof *v, compute_stream(e->own.compute)) : NULL;
}

status *experts_reduce(struct experts *e, const double **squares)
{
    const double *own;
    if (!e)
        return NULL;
    struct compute *c = e->own.compute;
    for (uint32_t i = 0; e->zero && !e->cut && i < e->passes; i++) /* all in one place, and there by now */
        TRY(zero_added(e->zero, (uint32_t)e->dp->rank * e->passes + i));
    if (e->zero) {
        TRY(zero_reduce(e->zero, NULL));
        TRY(zero_squares(e->zero, &own));
        TRY(compute_copy(c, e->plan.v + e->norm_ep + e->ep->rank, own, sizeof *own));
    }
    TRY(compute_copy(c, e->plan.v + e->norm_dense, *squares, sizeof **squares));
    TRY(gather(e, e->ep, e->norm_ep));
    plan_run(&e->plan, e->over_ep);
    TRY(gather(e, e->pp, e->norm_pp));
    plan_run(&e->plan, e->over_pp);
    *squares = e->plan.v + e->norm_all;
    return NULL;
}

status *experts_update(struct experts *e, const struct adamw *a, const struct muon *muon,
                       status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    if (!e || !e->zero)
        return NULL;
    status *st = e->owners ? owners_step(e->owners, muon, fence, arg) : NULL;
    return status_first(st, zero_update(e->zero, a, fence, arg));
}

struct zero *experts_zero(const struct experts *e, struct zero *zero, const struct params *ps, const struct param **p)
{
    if (!e)
        return zero;
    bool theirs = (*p)->experts && e->zero;
    *p = &(theirs ? &e->own : &e->dense)->p[*p - ps->p];
    return theirs ? e->zero : zero;
}

struct shards *experts_ref_shards(const struct experts *e, struct shards *dense, const struct params *ps,
                                  const struct param **p)
{
    if (!e || !e->ref_dense.p)
        return dense;
    bool theirs = (*p)->experts;
    *p = &(theirs ? &e->ref_own : &e->ref_dense)->p[*p - ps->p];
    return theirs ? e->ref_shards : dense;
}
