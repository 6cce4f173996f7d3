/* save: the steps of one save on one rank. ckpt.c decides when each is taken.
 *
 * save_begin (optimistic capture) -> save_settle (the cached plan stands, or replan) -> pipeline -> save_poll (vote,
 * commit)
 *                                                                                   \-> save_undo (any failure)
 *
 * Errors that one rank alone has seen stay in t->save.error or in the pipeline until the tick's reduction has told all.
 */
#include "ckpt/handle.h"
#include "ckpt/stage.h"
#include "ckpt/together.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

static void local_error(tessera *t, status *st)
{
    t->save.error = status_first(t->save.error, st);
}

/* ---- capture */

/* The addresses that `elems` elements from `first` of a piece's run are read from. Strided: those of the whole box. */
static void set_extent(struct share_source *src, int ndim, size_t elem_bytes, uint64_t first, uint64_t elems)
{
    uintptr_t base = (uintptr_t)src->base;
    if (!elems) {
        src->begin = src->end = base;
        return;
    }
    if (!src->strided) {
        src->begin = base + first * elem_bytes;
        src->end = src->begin + elems * elem_bytes;
        return;
    }
    int64_t lo = 0, hi = 0;
    for (int d = 0; d < ndim; d++) {
        int64_t reach = src->stride[d] * (int64_t)(src->piece.box.len[d] - 1);
        lo += reach < 0 ? reach : 0;
        hi += reach > 0 ? reach : 0;
    }
    src->begin = base + (uintptr_t)(lo * (int64_t)elem_bytes);
    src->end = base + (uintptr_t)((hi + 1) * (int64_t)elem_bytes);
}

static void set_sources(struct share *sh, const tessera_state *s)
{
    for (uint64_t i = 0; i < sh->pieces; i++) {
        const struct share_piece *p = &sh->piece[i];
        const struct state_piece *from = &s->piece[p->local];
        struct share_source *src = &sh->source[i];
        *src = (struct share_source){ .piece = from->piece, .strided = from->strided, .base = from->data };
        memcpy(src->stride, from->stride, sizeof src->stride);
        set_extent(src, p->ndim, p->elem_bytes, p->local_offset, p->bytes / p->elem_bytes);
    }
}

static void start_capture(tessera *t, const tessera_state *s)
{
    set_sources(t->cache.share, s);
    pipeline_start(t->pipe, t->cache.share, t->save.step);
}

bool save_begin(tessera *t, tessera_state *s)
{
    status *st = t->keeper ? keeper_lost(t->keeper) : NULL;
    if (!st)
        st = state_describe(s);
    if (!st)
        st = state_pack_blobs(s, t->x->rank, &t->blobs);
    local_error(t, st);
    const struct hash128 *a = &s->fingerprint, *b = &t->cache.fingerprint;
    bool same = t->cache.plan && s->described && a->a == b->a && a->b == b->b && !t->cache.stale && !frozen_due(t);
    if (same && !t->save.error)
        start_capture(t, s);
    return same;
}

/* ---- planning */

void save_drop_plan(tessera *t)
{
    share_free(t->cache.share);
    roster_free(&t->cache.roster);
    refs_free(&t->cache.refs);
    plan_free(t->cache.plan);
    t->cache = (struct cached_plan){ .made = t->cache.made };
}

/* The largest chunk that leaves room for two in the staging cap, beside what pipeline_prepare takes first. */
static uint64_t chunk_bytes_for(const struct tessera_options *o)
{
    uint64_t chunk = o->chunk_bytes, bounce = (uint64_t)o->writers * BOUNCE_BYTES;
    uint64_t room = o->staging_bytes > bounce ? o->staging_bytes - bounce : 0;
    if (o->staging_bytes && room / 2 < chunk)
        chunk = room / 2;
    chunk = chunk / META_BLOCK_BYTES * META_BLOCK_BYTES;
    return chunk ? chunk : META_BLOCK_BYTES;
}

/* This rank's part of a new plan, into the cache. Local. */
static status *adopt(tessera *t, const tessera_state *s)
{
    struct cached_plan *c = &t->cache;
    uint64_t chunk = chunk_bytes_for(&t->o);
    TRY(roster_make(c->plan, &c->roster));
    TRY(share_make(c->plan, &c->roster, t->x->rank, chunk, &c->share));
    TRY(pipeline_prepare(t->pipe, c->share, t->o.staging_bytes ? t->o.staging_bytes : UINT64_MAX));
    c->fingerprint = s->fingerprint;
    return NULL;
}

struct planning {
    tessera *t;
    struct frozen frozen;
};

static status *before_plan(void *arg, struct plan_desc *desc, uint64_t count, char **text, size_t *text_bytes)
{
    struct planning *p = arg;
    return frozen_refer(&p->frozen, desc, count, text, text_bytes);
}

static status *after_plan(void *arg, const struct plan *plan)
{
    struct planning *p = arg;
    return refs_find(p->t->store, p->t->save.step, plan, &p->t->cache.refs);
}

/* The cached plan does not serve every rank: drop it, and what was captured by it, and make another. */
static status *replan(tessera *t)
{
    int compared = frozen_due(t) ? t->cache.compared : 0; /* else it is another state */
    pipeline_end(t->pipe, PIPELINE_REMOVE);
    save_drop_plan(t);
    t->cache.made++;
    t->cache.compared = compared;
    struct planning p = { .t = t };
    const struct plan_hooks hooks = { .before = before_plan, .after = after_plan, .arg = &p };
    TRY(frozen_compare(t, t->save.state, &p.frozen));
    status *st = plan_together(&t->nodes, t->save.state, t->save.error ? status_copy(t->save.error) : NULL, &hooks,
                               &t->cache.plan);
    frozen_free(&p.frozen);
    if (st)
        return st;
    st = comm_agree(t->x, adopt(t, t->save.state));
    uint8_t flags[2] = { 0 };
    if (!st && t->x->rank == 0)
        frozen_note_plan(t->cache.plan, flags);
    if (!st)
        st = comm_bcast(t->x, flags, sizeof flags, 0, NULL);
    if (st)
        save_drop_plan(t);
    t->cache.refers = flags[0];
    t->cache.frozen_written = flags[1];
    return st;
}

status *save_adopt_step(tessera *t, tessera_state *s)
{
    if (t->cache.plan)
        return NULL;
    struct plan *plan = NULL;
    uint64_t none = !s || memcmp(&t->mesh, &t->meta->mesh, sizeof t->mesh) != 0;
    status *st = none ? NULL : state_describe(s);
    if (!st && !none)
        st = plan_of_step(t->meta, s, t->x->rank, t->x->size, &plan);
    t->cache.plan = plan;
    if (!st && plan)
        st = adopt(t, s);
    none = st || !plan;
    status_free(st); /* no harm done: the next save plans */
    st = comm_allreduce(t->x, &none, 1, COMM_U64, COMM_MAX, NULL);
    if (st || none)
        save_drop_plan(t);
    for (uint64_t i = 0; t->cache.plan && i < t->meta->tensor_count; i++)
        if (!t->meta->tensor[i].trainable && t->meta->tensor[i].piece_count)
            t->cache.frozen_written = true;
    return st;
}

/* ---- what tessera_save was given, on all ranks */

status *save_reduce(tessera *t, bool same, bool refused)
{
    struct saving *v = &t->save;
    v->reduce_in[SETTLE_CHANGED] = !same;
    v->reduce_in[SETTLE_STEP] = v->step;
    v->reduce_in[SETTLE_STEP_NOT] = ~v->step;
    v->reduce_in[SETTLE_BLOBS] = t->x->rank && !refused ? t->blobs.bytes : 0;
    v->reduce_in[SETTLE_BEGUN] = !refused;
    v->reduce_in[SETTLE_REFUSED] = refused;
    v->unsettled = true;
    return comm_iallreduce(t->x, v->reduce_in, v->reduce_out, SETTLE_SLOTS, COMM_U64, COMM_MAX, &v->reduce);
}

/* Of the completed reduction: INVALID, the same on all ranks, if they were given different steps or one of them no
 * state. */
static status *given_alike(const struct saving *v)
{
    uint64_t high = v->reduce_out[SETTLE_STEP], low = ~v->reduce_out[SETTLE_STEP_NOT];
    if (low != high)
        return ERR(INVALID, "ranks save different steps: %llu to %llu", (unsigned long long)low,
                   (unsigned long long)high);
    if (v->reduce_out[SETTLE_REFUSED])
        return ERR(INVALID, "a rank gave no state");
    return NULL;
}

/* Nothing that this rank may have written stays, and from here on all ranks speak of one step: one that some rank
 * began, since what begins is above what is refused. */
static void drop_misgiven(tessera *t)
{
    uint64_t high = t->save.reduce_out[SETTLE_STEP], low = ~t->save.reduce_out[SETTLE_STEP_NOT];
    pipeline_end(t->pipe, PIPELINE_REMOVE);
    t->save.step = high == UINT64_MAX ? low : high;
}

status *save_unsettle(tessera *t)
{
    struct saving *v = &t->save;
    if (!v->unsettled)
        return NULL;
    TRY(comm_wait(&v->reduce));
    v->unsettled = false;
    v->verdict = given_alike(v);
    if (v->verdict)
        drop_misgiven(t);
    return NULL;
}

status *save_refuse(tessera *t, uint64_t step, status *st)
{
    struct saving *v = &t->save;
    v->step = step;
    status *transport = save_reduce(t, true, true);
    if (!transport)
        transport = save_unsettle(t);
    if (transport)
        return status_first(transport, st);
    if (v->reduce_out[SETTLE_BEGUN]) {
        status_free(st);
        return NULL;
    }
    if (v->reduce_out[SETTLE_STEP] != ~v->reduce_out[SETTLE_STEP_NOT]) {
        status_free(st);
        st = v->verdict;
        v->verdict = NULL;
    }
    save_forget(t, false);
    return st;
}

status *save_settle(tessera *t)
{
    struct saving *v = &t->save;
    if (!v->unsettled)
        return NULL;
    TRY(save_unsettle(t));
    status *st = v->verdict;
    if (!st && v->reduce_out[SETTLE_CHANGED]) {
        st = replan(t);
        if (!st)
            start_capture(t, v->state);
    }
    v->state = NULL;
    if (!st)
        local_error(t, vote_prepare(&t->vote, t->x, t->cache.plan, &t->cache.roster, v->reduce_out[SETTLE_BLOBS]));
    /* A transport failure shows again at the next collective; for the save it is a reason like any other. */
    v->verdict = st;
    return NULL;
}

/* ---- vote and commit */

void save_report(tessera *t, int64_t in[TICK_SLOTS])
{
    struct saving *v = &t->save;
    struct pipeline_view view;
    pipeline_look(t->pipe, &view);
    if (t->keeper && v->commit == COMMIT_NONE && !v->error)
        local_error(t, keeper_lost(t->keeper)); /* once the commit is handed over, its outcome alone counts */
    in[TICK_NOT_CAPTURED] = !view.captured;
    in[TICK_NOT_DRAINED] = !view.drained;
    in[TICK_FAILED] = view.failed || v->error ? t->x->size - t->x->rank : 0;
    in[TICK_COMMIT] = v->commit;
}

status *save_vote(tessera *t)
{
    struct saving *v = &t->save;
    struct report_rank cost = { 0 };
    pipeline_report(t->pipe, &cost);
    v->vote_ns = clock_ns();
    cost.total_ns = (cost.total_ns > v->start_ns ? cost.total_ns : v->start_ns);
    report_add(&cost.stage[REPORT_VOTE], cost.total_ns, v->vote_ns, v->vote_ns - cost.total_ns, 0);
    cost.total_ns -= v->start_ns;
    cost.begin_ns = v->start_wall_ns;
    cost.stall_ns = t->progress.call_ns + t->progress.fence_wait_ns;
    report_relative(&cost, v->start_ns);
    return vote_start(&t->vote, t->x, t->cache.share, &t->blobs, &cost);
}

/* What the save cost all ranks, as far as their votes know. */
static struct report *make_report(tessera *t)
{
    const struct saving *v = &t->save;
    struct report *r = NULL;
    status *st = report_new(t->x->size, &r);
    if (st) { /* a report is worth no save */
        handle_warn(t, st);
        return NULL;
    }
    r->step = v->step;
    r->attempt = t->attempt;
    r->time_ns = v->start_wall_ns;
    r->start_ns = v->start_ns;
    r->interval_ns = t->saved_ns ? v->start_ns - t->saved_ns : 0;
    r->mesh = t->mesh;
    vote_costs(&t->vote, r);
    report_align(r);
    report_add(&r->rank[0].stage[REPORT_VOTE], v->vote_ns - v->start_ns, clock_ns() - v->start_ns, 0, 0);
    return r;
}

static status *hand_over(tessera *t)
{
    struct vote_facts f = { .run_id = t->run_id,
                            .attempt = t->attempt,
                            .parent_attempt = t->parent,
                            .step = t->save.step,
                            .mesh = t->mesh,
                            .build = t->o.build ? t->o.build : "" };
    TRY(vote_metadata(&t->vote, t->x, &f, &t->blobs, &t->cache.refs, &t->save.metadata));
    keeper_commit(t->keeper, t->save.metadata, make_report(t));
    t->save.commit = COMMIT_RUNNING;
    return NULL;
}

status *save_poll(tessera *t)
{
    struct saving *v = &t->save;
    bool done = false;
    if (v->phase != TESSERA_VOTE && v->phase != TESSERA_COMMIT)
        return NULL;
    TRY(comm_test(&t->vote.req, &done));
    if (!t->keeper || !done || v->error)
        return NULL;
    if (v->commit == COMMIT_NONE)
        local_error(t, hand_over(t));
    status *outcome = NULL;
    if (v->commit == COMMIT_RUNNING && keeper_outcome(t->keeper, false, &outcome)) {
        local_error(t, outcome);
        v->commit = outcome ? COMMIT_RUNNING : COMMIT_DONE;
    }
    return NULL;
}

/* ---- the end */

void save_forget(tessera *t, bool keep)
{
    struct saving *v = &t->save;
    pipeline_end(t->pipe, keep ? PIPELINE_KEEP : PIPELINE_STOP);
    vote_metadata_free(v->metadata);
    status_free(v->error);
    status_free(v->verdict);
    uint64_t epoch = v->epoch + 1, committed = v->committed;
    *v = (struct saving){ .phase = TESSERA_IDLE, .epoch = epoch, .committed = committed };
}

/* Nobody writes any more, so rank 0 removes for all: metadata.pb first, should it have got there, then the files. */
static status *discard(tessera *t, uint64_t step)
{
    TRY(comm_barrier(t->x));
    if (t->keeper)
        handle_warn(t, status_wrap(commit_discard(t->store, step, t->attempt),
                                   "what the failed save of step %llu wrote could not all be removed",
                                   (unsigned long long)step)); /* leftovers never count */
    return comm_barrier(t->x);
}

status *save_undo(tessera *t, status **outcome)
{
    struct saving *v = &t->save;
    status *late = NULL;
    if (t->keeper && keeper_outcome(t->keeper, true, &late))
        status_free(late);
    pipeline_end(t->pipe, PIPELINE_STOP);
    status *st = v->verdict;
    if (!st) {
        status *mine = status_first(v->error, pipeline_take_error(t->pipe)); /* stopped, so the first error is final */
        v->error = NULL;
        st = comm_agree(t->x, mine);
    }
    v->verdict = NULL;
    uint64_t step = v->step;
    status *transport = comm_wait(&t->vote.req);
    save_forget(t, false);
    t->cache.stale = t->cache.refers; /* what it refers to may be the reason */
    if (!transport)
        transport = discard(t, step);
    if (transport)
        return status_first(transport, st);
    *outcome = st;
    return NULL;
}
