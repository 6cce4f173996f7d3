/* experts: see experts.h. */
#include "trainer/parallel/experts.h"

#include "comm/agree.h"
#include "comm/base/mem.h"

#include <math.h>
#include <string.h>

/* The parameters of one part, the others frozen behind it. */
static status *view(const struct params *p, bool experts, struct params *out)
{
    uint64_t begin = experts ? p->total - p->experts : 0;
    *out = *p;
    out->p = mem_array(NULL, (size_t)p->count + 1, sizeof *out->p);
    if (!out->p)
        return ERR(NO_MEMORY, "a list of %d parameters", p->count);
    memcpy(out->p, p->p, (size_t)p->count * sizeof *out->p);
    out->cap = p->count;
    out->total = experts ? p->experts : p->total - p->experts;
    out->frozen = experts ? 0 : p->frozen;
    if (experts) {
        out->chunks = 0;
        memset(out->chunk, 0, sizeof out->chunk);
    }
    out->data = p->data + begin;
    out->grad = p->grad ? p->grad + begin : NULL;
    for (int i = 0; i < p->count; i++) {
        struct param *q = &out->p[i];
        if (!q->frozen && q->experts == experts) {
            q->offset -= begin;
            continue;
        }
        q->frozen = true;
        q->partial = q->muon = false;
        q->offset = out->total;
    }
    return NULL;
}

status *experts_open(const struct zero_options *o, struct params *p, struct comm *dp, struct comm *ep,
                     struct experts **out)
{
    struct experts *e = mem_calloc(1, sizeof *e);
    status *st = e ? NULL : ERR(NO_MEMORY, "expert parallelism");
    if (e) {
        size_t most = (size_t)(o->pp && o->pp->size > ep->size ? o->pp->size : ep->size);
        *e = (struct experts){ .dp = dp, .ep = ep, .pp = o->pp };
        e->norm = mem_calloc(most, sizeof *e->norm);
        st = e->norm ? view(p, false, &e->dense) : ERR(NO_MEMORY, "norms of %zu ranks", most);
        if (!st)
            st = view(p, true, &e->own);
    }
    st = comm_agree(ep, st);
    struct zero_options own = *o;
    own.deterministic = false; /* ep is not among what leaves bits as they are */
    own.micro_batches = 0;
    own.pp = NULL;
    own.shards = o->shards && o->shards % ep->size == 0 ? o->shards / ep->size : o->shards ? 1 : 0;
    if (!st && e->own.total)
        st = zero_open(&own, &e->own, dp, &e->zero);
    if (st) {
        experts_close(e);
        return st;
    }
    *out = e;
    return NULL;
}

void experts_close(struct experts *e)
{
    if (!e)
        return;
    zero_close(e->zero);
    mem_free(e->dense.p);
    mem_free(e->own.p);
    mem_free(e->norm);
    mem_free(e);
}

void experts_begin(struct experts *e, uint32_t passes)
{
    if (!e || !e->zero)
        return;
    e->passes = passes;
    zero_begin(e->zero, (uint32_t)e->dp->size * passes);
}

/* The sum of every rank's *square, in order of ranks. */
static status *add_up(struct experts *e, struct comm *c, double *square)
{
    double mine = *square;
    TRY(comm_allgather(c, &mine, e->norm, sizeof mine, NULL));
    *square = 0;
    for (int r = 0; r < c->size; r++)
        *square += e->norm[r];
    return NULL;
}

status *experts_reduce(struct experts *e, double *norm)
{
    double own = 0;
    if (!e)
        return NULL;
    for (uint32_t i = 0; e->zero && i < e->passes; i++) /* all in one place, and there by now */
        TRY(zero_added(e->zero, (uint32_t)e->dp->rank * e->passes + i));
    if (e->zero)
        TRY(zero_reduce(e->zero, &own));
    own *= own;
    TRY(add_up(e, e->ep, &own));
    if (e->pp)
        TRY(add_up(e, e->pp, &own));
    *norm = sqrt(*norm * *norm + own);
    return NULL;
}

status *experts_update(struct experts *e, const struct adamw *a,
                       status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    return e && e->zero ? zero_update(e->zero, a, fence, arg) : NULL;
}

struct zero *experts_zero(const struct experts *e, struct zero *zero, const struct params *ps, const struct param **p)
{
    if (!e || !e->zero || !(*p)->experts || (*p)->frozen)
        return zero;
    *p = &e->own.p[*p - ps->p];
    return e->zero;
}
