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

static bool gathers(const tessera *t)
{
    return t->o.irregular == TESSERA_GATHER;
}

/* Give the save in flight up; nothing that it sends or receives is under way. */
static void stop_writing(tessera *t, enum pipeline_end how)
{
    pipeline_give_up(t->pipe);
    if (t->merge)
        merge_end(t->merge);
    pipeline_end(t->pipe, how);
}

static void local_error(tessera *t, status *st)
{
    t->save.error = status_first(t->save.error, st);
}

/* ---- capture */

static void set_sources(struct share *sh, const tessera_state *s)
{
    for (uint64_t i = 0; i < sh->own_pieces; i++) {
        const struct share_piece *p = &sh->piece[i];
        state_source(&s->piece[p->local], p->local_offset, p->bytes / p->elem_bytes, &sh->source[i]);
    }
}

static void start_capture(tessera *t, const tessera_state *s)
{
    set_sources(t->cache.share, s);
    if (t->merge && !t->dev->host) /* its copies are ordered by the host */
        local_error(t, t->dev->ops->stream_sync(t->dev, t->stream));
    if (t->merge)
        merge_start(t->merge, s);
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
    if (same && !t->save.error && !gathers(t))
        start_capture(t, s);
    return same;
}

/* ---- planning */

void save_drop_plan(tessera *t)
{
    if (t->merge)
        merge_forget(t->merge);
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
    uint64_t staging = t->o.staging_bytes ? t->o.staging_bytes : UINT64_MAX;
    if (t->merge) {
        struct merge_view v;
        TRY(merge_prepare(t->merge, c->plan, c->share));
        merge_look(t->merge, &v);
        staging -= v.memory_bytes < staging ? v.memory_bytes : staging;
    }
    TRY(pipeline_prepare(t->pipe, c->share, staging));
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
    stop_writing(t, PIPELINE_REMOVE);
    save_drop_plan(t);
    t->cache.made++;
    t->cache.compared = compared;
    struct planning p = { .t = t };
    const struct plan_hooks hooks = { .before = before_plan, .after = after_plan, .arg = &p };
    TRY(frozen_compare(t, t->save.state, &p.frozen));
    uint64_t begin = clock_ns();
    status *st = plan_together(&t->nodes, t->save.state, t->save.error ? status_copy(t->save.error) : NULL,
                               t->o.irregular, &hooks, &t->cache.plan);
    t->progress.plan_ns = clock_ns() - begin;
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
    uint64_t none = !s || t->o.irregular || memcmp(&t->mesh, &t->meta->mesh, sizeof t->mesh) != 0;
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
    stop_writing(t, PIPELINE_REMOVE);
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
    bool planned = !st && v->reduce_out[SETTLE_CHANGED];
    if (planned)
        st = replan(t);
    if (!st && gathers(t)) {
        status *mine = NULL;
        TRY(merge_gather(t->merge, v->state, &mine));
        local_error(t, mine);
    }
    if (!st && !v->error && (planned || gathers(t)))
        start_capture(t, v->state);
    if (!st && t->merge)
        merge_arm(t->merge);
    if (!st)
        local_error(t, vote_prepare(&t->vote, t->x, t->cache.plan, &t->cache.roster, v->reduce_out[SETTLE_BLOBS]));
    /* A transport failure shows again at the next collective; for the save it is a reason like any other. */
    v->verdict = st;
    return NULL;
}

/* ---- the fence */

/* The last piece of the state in this memory; -1: none. It need not be one that this rank writes. */
static int64_t find_piece(const tessera_state *s, const void *addr, size_t bytes)
{
    uintptr_t begin = (uintptr_t)addr, end = begin + bytes;
    for (size_t i = s->count; i-- > 0;) {
        const struct state_piece *p = &s->piece[i];
        struct share_source src;
        state_source(p, 0, piece_elems(&p->piece), &src);
        if (src.begin < end && begin < src.end)
            return (int64_t)i;
    }
    return -1;
}

/* This rank writes a piece that lies in this memory. */
static bool is_written(const struct share *sh, const void *addr, size_t bytes)
{
    uintptr_t begin = (uintptr_t)addr, end = begin + bytes;
    for (uint64_t i = 0; i < sh->own_pieces; i++)
        if (sh->source[i].begin < end && begin < sh->source[i].end)
            return true;
    return false;
}

uint64_t save_fence(tessera *t, const void *addr, size_t bytes, struct stream *s)
{
    const struct share *sh = t->cache.share;
    if (!addr || !sh || !t->save.state)
        return (t->merge ? merge_fence(t->merge, UINT32_MAX) : 0) + pipeline_fence(t->pipe, NULL, 0, s);
    if (!t->merge && is_written(sh, addr, bytes))
        return pipeline_fence(t->pipe, addr, bytes, s);
    int64_t last = find_piece(t->save.state, addr, bytes);
    if (last < 0)
        return 0;
    uint64_t waited = t->merge ? merge_fence(t->merge, (uint32_t)last) : 0;
    for (uint64_t i = sh->own_pieces; i-- > 0;) {
        const struct share_source *src = &sh->source[i];
        if (sh->piece[i].local <= last && src->begin < src->end)
            return waited + pipeline_fence(t->pipe, (const void *)src->begin, src->end - src->begin, s);
    }
    return waited;
}

/* ---- vote and commit */

void save_report(tessera *t, int64_t in[TICK_SLOTS])
{
    struct saving *v = &t->save;
    struct pipeline_view view;
    pipeline_look(t->pipe, &view);
    if (t->keeper && v->commit == COMMIT_NONE && !v->error)
        local_error(t, keeper_lost(t->keeper)); /* once the commit is handed over, its outcome alone counts */
    struct merge_view merge = { .captured = true, .drained = true };
    if (t->merge)
        merge_look(t->merge, &merge);
    in[TICK_NOT_CAPTURED] = !view.captured || !merge.captured;
    in[TICK_NOT_DRAINED] = !view.drained || !merge.drained;
    in[TICK_FAILED] = view.failed || v->error ? t->x->size - t->x->rank : 0;
    in[TICK_COMMIT] = v->commit;
}

status *save_vote(tessera *t)
{
    struct saving *v = &t->save;
    struct report_rank cost = { 0 };
    struct merge_view merge = { 0 };
    pipeline_report(t->pipe, &cost);
    if (t->merge)
        merge_look(t->merge, &merge);
    report_merge(&cost.stage[REPORT_CAPTURE], &merge.copies);
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
    if (t->merge)
        TRY(merge_poll(t->merge));
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
    if (!keep)
        stop_writing(t, PIPELINE_STOP);
    else if (t->merge)
        merge_end(t->merge);
    pipeline_end(t->pipe, PIPELINE_KEEP);
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
    pipeline_give_up(t->pipe);
    if (t->merge)
        TRY(merge_drain(t->merge, t->x));
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
