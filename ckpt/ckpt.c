/* ckpt: the handle and its state machine: when a save moves on, and when it counts.
 *
 *   IDLE --tessera_save--> CAPTURE --tessera_tick: all ranks copied out--> WRITE --tessera_tick: all ranks' files
 * finished--> VOTE VOTE --tessera_tick: rank 0 has every vote, its keeper writes metadata.pb--> COMMIT --tessera_tick:
 * it is durable--> IDLE any  --tessera_tick: a rank failed, or tessera_cancel--> save_undo: stopped, agreed, removed-->
 * IDLE
 *
 * Invariants:
 * (1) Every arrow is taken by all ranks at the same call. A rank acts on agreed facts only: the result of a reduction,
 * a verdict that was agreed, or what follows from the order of calls. What it alone has seen (an error, an end) waits
 * in `save` or in the pipeline until the next reduction carries it. (2) A tick completes the reduction of the tick
 * before and starts the next, so it waits for no rank that is at most a step behind. A result counts only for the save
 * that was in flight when its reduction was started (`epoch`). (3) metadata.pb is put after every rank's files are
 * durable and its vote has arrived, by rank 0, while it holds the lease. (4) A failed save has removed its files, on
 * all ranks, before any rank can start another. (5) Only the training thread calls MPI, on two communicators of the
 * handle's own: `ticks` for the ticks' reductions, `x` for the rest.
 *
 * A save's path: ckpt.c -> save.c (plan, vote) -> stage.c (copy-out) -> pipeline.c (write) -> keeper.c (commit). A
 * load's: load.c -> loadpipe.c. */
#include "ckpt/handle.h"
#include "ckpt/view.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <string.h>
#include <unistd.h>

/* Structs of the public API as first released: no caller has smaller ones. */
enum {
    OPTIONS_BYTES = offsetof(struct tessera_options, warn_arg) + sizeof(void *),
    TICK_BYTES = offsetof(struct tessera_tick, committed) + sizeof(uint64_t)
};
enum { DEFAULT_CHUNK = 16 << 20, DEFAULT_WRITERS = 2, DEFAULT_LEASE_SECONDS = 30, MAX_WRITERS = 64 };

/* ---- errors of the public API are statuses */

int tessera_status_code(const tessera_status *st)
{
    return (int)status_code(st);
}

const char *tessera_status_message(const tessera_status *st)
{
    return status_message(st);
}

int tessera_status_rank(const tessera_status *st)
{
    return status_rank(st);
}

void tessera_status_free(tessera_status *st)
{
    status_free(st);
}

status *handle_same(tessera *t, const char *what, uint64_t value)
{
    uint64_t most[2] = { value, ~value };
    TRY(comm_allreduce(t->x, most, 2, COMM_U64, COMM_MAX, NULL));
    if (most[0] != ~most[1])
        return ERR(INVALID, "%s: ranks give different values: %llu to %llu", what, (unsigned long long)~most[1],
                   (unsigned long long)most[0]);
    return NULL;
}

void handle_give(void *to, const void *from, size_t bytes)
{
    size_t room = *(const size_t *)to, head = sizeof room;
    bytes = room < bytes ? room : bytes;
    if (bytes > head)
        memcpy((char *)to + head, (const char *)from + head, bytes - head);
}

void handle_warn(tessera *t, status *st)
{
    if (st && t->o.warn && t->x->rank == 0)
        t->o.warn(t->o.warn_arg, status_message(st));
    status_free(st);
}

/* ---- open and close */

/* A copy with defaults; later fields of an older caller's struct stay zero. */
static status *read_options(const struct tessera_options *in, bool has_store, struct tessera_options *o)
{
    if (in->size < OPTIONS_BYTES || in->size > 4096)
        return ERR(INVALID, "options: a struct of %zu bytes; set it with TESSERA_OPTIONS", in->size);
    memcpy(o, in, in->size < sizeof *o ? in->size : sizeof *o);
    if (!o->url && !has_store)
        return ERR(INVALID, "options: no url");
    if (o->keep_last < 0 || o->writers < 0 || o->writers > MAX_WRITERS)
        return ERR(INVALID, "options: keep_last %d, writers %d (0 to %d)", o->keep_last, o->writers, MAX_WRITERS);
    if (o->keep_best < 0 || (o->keep_best && (!o->keep_metric || !*o->keep_metric)))
        return ERR(INVALID, "options: keep_best %d needs a keep_metric", o->keep_best);
    if (o->chunk_bytes % 4096)
        return ERR(INVALID, "options: chunk_bytes %llu is not a multiple of 4096", (unsigned long long)o->chunk_bytes);
    if (o->irregular < TESSERA_AS_GIVEN || o->irregular > TESSERA_GATHER)
        return ERR(INVALID, "options: irregular %d; legal are TESSERA_AS_GIVEN, TESSERA_MERGE and TESSERA_GATHER",
                   o->irregular);
    o->chunk_bytes = o->chunk_bytes ? o->chunk_bytes : DEFAULT_CHUNK;
    o->lease_seconds = o->lease_seconds ? o->lease_seconds : DEFAULT_LEASE_SECONDS;
    return NULL;
}

/* Axes left at 0 are 1; a mesh that is not given at all is `world` data-parallel ranks. */
static status *read_mesh(const int size[MESH_AXES], int world, struct mesh *m)
{
    bool given = false;
    for (int a = 0; a < MESH_AXES; a++) {
        given = given || size[a];
        m->size[a] = size[a] ? size[a] : 1;
    }
    if (!given)
        m->size[MESH_DP] = world;
    return mesh_init(m, world);
}

static status *own_texts(tessera *t)
{
    const char *url = t->o.url, *build = t->o.build, *metric = t->o.keep_metric;
    t->o.url = url ? mem_strdup(url) : NULL;
    t->o.build = build ? mem_strdup(build) : NULL;
    t->o.keep_metric = metric ? mem_strdup(metric) : NULL;
    return (url && !t->o.url) || (build && !t->o.build) || (metric && !t->o.keep_metric) ? ERR(NO_MEMORY, "options")
                                                                                         : NULL;
}

/* Local: everything that needs no other rank. */
static status *open_parts(tessera *t, const struct tessera_options *o, struct device *dev, struct store *s)
{
    TRY(read_options(o, s != NULL, &t->o));
    TRY(own_texts(t));
    TRY(read_mesh(t->o.mesh, t->x->size, &t->mesh));
    t->own_dev = !dev;
    t->dev = dev;
    if (!dev)
        TRY(device_open("cpu", 0, &t->dev));
    t->own_store = !s;
    t->store = s;
    if (!s)
        TRY(store_open(t->o.url, !t->o.read_only, &t->store));
    return NULL;
}

/* Rank 0 takes the lease; its keeper renews it from then on. */
static status *take_lease(tessera *t, uint64_t ids[3])
{
    struct lease l;
    char note[NOTE_BYTES] = "";
    TRY(lease_take(t->store, t->o.lease_seconds, &l, note));
    struct keep_rules keep = { .last = t->o.keep_last,
                               .every = t->o.keep_every,
                               .best = t->o.keep_best,
                               .metric = t->o.keep_metric,
                               .lowest = t->o.keep_lowest != 0 };
    status *st = keeper_open(t->store, &l, &keep, t->o.view < 0 ? 0 : t->o.view ? UINT64_MAX : VIEW_PIECES, &t->keeper);
    if (st)
        return status_first(st, lease_give_back(&l));
    if (note[0] && t->o.warn)
        t->o.warn(t->o.warn_arg, note);
    ids[0] = l.attempt;
    ids[1] = l.run_id;
    ids[2] = l.parent;
    return NULL;
}

static status *find_nodes(tessera *t)
{
    char host[256] = "";
    if (gethostname(host, sizeof host - 1) != 0)
        host[0] = 0; /* then all such ranks count as one node */
    return nodes_open(t->x, host, &t->nodes);
}

static status *open_writing(tessera *t)
{
    uint64_t ids[3] = { 0 };
    if (!t->o.writers)
        t->o.writers = nodes_share(&t->nodes, t->store->ops->streams, DEFAULT_WRITERS);
    TRY(comm_agree(t->x, t->x->rank == 0 ? take_lease(t, ids) : NULL));
    TRY(comm_bcast(t->x, ids, sizeof ids, 0, NULL));
    t->attempt = ids[0];
    t->run_id = ids[1];
    t->parent = ids[2];
    if (t->o.irregular)
        TRY(merge_open(t->x, t->dev, t->o.irregular, &t->merge));
    struct pipeline_options p = {
        .dev = t->dev,
        .store = t->store,
        .writers = t->o.writers,
        .rank = t->x->rank,
        .node_ranks = t->nodes.node->size,
        .attempt = t->attempt,
        .hand = merge_hand,
        .hand_arg = t->merge,
    };
    TRY(comm_agree(t->x, pipeline_open(&p, &t->pipe)));
    if (t->merge)
        merge_bind(t->merge, t->pipe);
    return NULL;
}

static status *free_handle(tessera *t)
{
    pin_close(t->pin);
    if (t->merge && t->pipe) { /* a save whose transport failed */
        pipeline_give_up(t->pipe);
        merge_end(t->merge);
    }
    pipeline_close(t->pipe);
    status *st = keeper_close(t->keeper);
    vote_metadata_free(t->save.metadata);
    status_free(t->save.error);
    status_free(t->save.verdict);
    save_drop_plan(t);
    merge_close(t->merge);
    vote_fini(&t->vote);
    metadata_free(t->meta);
    step_set_free(&t->bad);
    match_lists_free(&t->lists);
    mem_free(t->blobs.data);
    if (t->own_store)
        store_close(t->store);
    if (t->own_dev)
        device_close(t->dev);
    mem_free((char *)(uintptr_t)t->o.url);
    mem_free((char *)(uintptr_t)t->o.build);
    mem_free((char *)(uintptr_t)t->o.keep_metric);
    nodes_close(&t->nodes);
    comm_close(t->ticks);
    comm_close(t->x);
    mem_free(t);
    return st;
}

void ckpt_set_stream(tessera *t, struct stream *s)
{
    t->stream = s;
    if (t->pipe)
        pipeline_set_stream(t->pipe, s);
}

status *ckpt_set_node(tessera *t, const char *host)
{
    nodes_close(&t->nodes);
    return nodes_open(t->x, host, &t->nodes);
}

status *ckpt_open(const struct tessera_options *o, struct comm *world, struct device *dev, struct store *s,
                  tessera **out)
{
    tessera *t = mem_calloc(1, sizeof *t);
    TRY(comm_agree(world, t ? NULL : ERR(NO_MEMORY, "a checkpoint handle")));
    t->save.committed = UINT64_MAX;
    t->progress.size = sizeof t->progress;
    t->report.size = sizeof t->report;
    status *st = comm_dup(world, &t->x);
    if (!st)
        st = comm_dup(world, &t->ticks);
    if (st) {
        comm_close(t->x);
        mem_free(t);
        return st;
    }
    st = comm_agree(t->x, open_parts(t, o, dev, s));
    if (!st)
        st = handle_same(t, "options: read_only", (uint64_t)t->o.read_only);
    if (!st)
        st = handle_same(t, "options: irregular", (uint64_t)t->o.irregular);
    if (!st)
        st = find_nodes(t);
    if (!st && !t->o.read_only)
        st = open_writing(t);
    if (!st)
        st = load_set_newest(t);
    if (st)
        return status_first(st, free_handle(t));
    *out = t;
    return NULL;
}

status *tessera_open(const struct tessera_options *o, tessera **out)
{
    struct comm *world;
    if (o->mpi_comm == -1)
        TRY(comm_open("self", NULL, NULL, &world));
    else
        TRY(comm_from_mpi(o->mpi_comm, &world));
    status *st = ckpt_open(o, world, NULL, NULL, out);
    comm_close(world);
    return st;
}

uint64_t ckpt_attempt(const tessera *t)
{
    return t->attempt;
}

status *tessera_mark(tessera *t, uint64_t step, const char *metric, double value)
{
    if (!metric || t->o.read_only)
        return ERR(INVALID, "mark of step %llu: %s", (unsigned long long)step,
                   metric ? "the handle is read-only" : "no metric");
    return t->keeper ? keeper_mark(t->keeper, step, metric, value) : NULL;
}

uint64_t ckpt_plans_made(const tessera *t)
{
    return t->cache.made;
}

static status *end_tick(tessera *t);

status *tessera_close(tessera *t)
{
    if (!t)
        return NULL;
    status *st = tessera_wait(t, NULL);
    st = status_first(st, end_tick(t));
    return status_first(st, free_handle(t));
}

/* ---- saving */

/* What follows from the calls before, alike on all ranks. */
static status *check_ready(const tessera *t, uint64_t step)
{
    unsigned long long n = step;
    if (t->o.read_only)
        return ERR(INVALID, "save of step %llu: the handle is read-only", n);
    if (t->save.phase != TESSERA_IDLE)
        return ERR(UNAVAILABLE, "save of step %llu: the save of step %llu is still in flight", n,
                   (unsigned long long)t->save.step);
    return NULL;
}

/* What this rank was given. The step first: where it is refused, all ranks that were given it refuse it alike. */
static status *check_given(const tessera *t, const tessera_state *s, uint64_t step)
{
    unsigned long long n = step, newest = t->newest;
    if (step == UINT64_MAX)
        return ERR(INVALID, "save of step %llu: no such step", n);
    if (t->has_newest && step == t->newest && t->newest_is_ours)
        return ERR(EXISTS, "save of step %llu: it is committed already", n);
    if (t->has_newest && step < t->newest)
        return ERR(INVALID, "save of step %llu: step %llu is committed and newer; tessera_rewind retires it", n,
                   newest);
    if (!s)
        return ERR(INVALID, "save of step %llu: no state", n);
    return NULL;
}

status *tessera_save(tessera *t, tessera_state *s, uint64_t step)
{
    uint64_t start = clock_ns();
    TRY(check_ready(t, step));
    status *refused = check_given(t, s, step);
    struct saving *v = &t->save;
    v->phase = TESSERA_CAPTURE;
    v->epoch++;
    v->step = step;
    v->start_ns = start;
    v->start_wall_ns = clock_wall_ns();
    t->progress.fence_wait_ns = 0;
    if (refused)
        return save_refuse(t, step, refused);
    v->state = s;
    bool same = save_begin(t, s);
    status *st = save_reduce(t, same, false);
    if (!st && t->o.irregular == TESSERA_GATHER)
        st = save_settle(t); /* before anything may change */
    t->progress.call_ns = clock_ns() - start;
    return st;
}

status *tessera_fence(tessera *t, const void *addr, size_t bytes, void *stream)
{
    if (t->save.phase == TESSERA_IDLE)
        return NULL;
    uint64_t start = clock_ns();
    bool settling = t->save.unsettled;
    TRY(save_settle(t));
    uint64_t waited = save_fence(t, addr, bytes, stream);
    t->progress.fence_wait_ns += settling ? clock_ns() - start : waited;
    return t->merge ? merge_poll(t->merge) : NULL;
}

/* The save in flight is committed, everywhere at once. */
static void finish(tessera *t)
{
    struct saving *v = &t->save;
    t->has_newest = t->newest_is_ours = true;
    t->newest = v->step;
    t->parent = t->attempt;
    t->meta_stale = t->meta_stale || (t->meta && t->meta->step == v->step);
    step_set_remove(&t->bad, v->step);
    t->progress.saves++;
    t->progress.save_ns = clock_ns() - v->start_ns;
    t->saved_ns = v->start_ns;
    v->committed = v->step;
    save_forget(t, true);
}

static status *undo(tessera *t)
{
    status *outcome = NULL;
    unsigned long long step = t->save.step;
    TRY(save_undo(t, &outcome));
    t->progress.failures++;
    if (!outcome)
        outcome = ERR(INTERNAL, "a rank reported a failure that no rank knows");
    return status_wrap(outcome, "save of step %llu", step);
}

/* One tick's result, the same on every rank. */
static status *advance(tessera *t, const int64_t r[TICK_SLOTS])
{
    struct saving *v = &t->save;
    if (r[TICK_FAILED])
        return undo(t);
    if (v->phase == TESSERA_CAPTURE && !r[TICK_NOT_CAPTURED])
        v->phase = TESSERA_WRITE;
    if (v->phase == TESSERA_WRITE && !r[TICK_NOT_DRAINED]) {
        v->phase = TESSERA_VOTE;
        TRY(save_vote(t));
    }
    if (v->phase == TESSERA_VOTE && r[TICK_COMMIT] != COMMIT_NONE)
        v->phase = TESSERA_COMMIT;
    if (v->phase == TESSERA_COMMIT && r[TICK_COMMIT] == COMMIT_DONE) {
        TRY(comm_wait(&t->vote.req)); /* rank 0 has it: done */
        finish(t);
    }
    return NULL;
}

static status *end_tick(tessera *t)
{
    if (!t->tick.started)
        return NULL;
    t->tick.started = false;
    return comm_wait(&t->tick.req);
}

static status *start_tick(tessera *t, const int32_t flag[4])
{
    struct ticking *k = &t->tick;
    memset(k->in, 0, sizeof k->in);
    if (t->save.phase != TESSERA_IDLE)
        save_report(t, k->in);
    for (int i = 0; i < 4; i++)
        k->in[TICK_FLAG + i] = flag[i];
    k->epoch = t->save.epoch;
    TRY(comm_iallreduce(t->ticks, k->in, k->out, TICK_SLOTS, COMM_I64, COMM_MAX, &k->req));
    k->started = true;
    return NULL;
}

/* Flags received are kept until a tick of the caller's asks for them. */
static void hold_flags(struct ticking *k)
{
    for (int i = 0; i < 4; i++)
        if (!k->held || k->out[TICK_FLAG + i] > k->flag[i])
            k->flag[i] = k->out[TICK_FLAG + i];
    k->held = true;
}

static status *tick(tessera *t, const int32_t flag[4])
{
    struct ticking *k = &t->tick;
    struct saving *v = &t->save;
    TRY(save_settle(t));
    bool done = k->started;
    TRY(end_tick(t));
    if (done)
        hold_flags(k);
    status *st = NULL;
    if (v->verdict)
        st = undo(t);
    else if (done && v->phase != TESSERA_IDLE && k->epoch == v->epoch)
        st = advance(t, k->out);
    st = status_first(st, save_poll(t));
    if (t->keeper) {
        status *note = keeper_note(t->keeper);
        handle_warn(t, note);
    }
    return status_first(st, start_tick(t, flag));
}

static uint64_t take_committed(tessera *t)
{
    uint64_t step = t->save.committed;
    t->save.committed = UINT64_MAX;
    return step;
}

status *tessera_tick(tessera *t, struct tessera_tick *io)
{
    struct tessera_tick out = { 0 };
    struct ticking *k = &t->tick;
    bool room = io && io->size >= TICK_BYTES; /* anything smaller was not set by TESSERA_TICK: not read, not written */
    status *st = tick(t, room ? io->flag : out.flag);
    if (!room)
        return st;
    for (int i = 0; i < 4; i++)
        out.flag[i] = k->held ? (int32_t)k->flag[i] : 0;
    k->held = false;
    out.phase = t->save.phase;
    out.committed = take_committed(t);
    handle_give(io, &out, sizeof out);
    return st;
}

status *tessera_wait(tessera *t, uint64_t *committed)
{
    static const int32_t none[4];
    struct backoff pause = { .max_us = 500 };
    status *st = NULL;
    while (!st && t->save.phase != TESSERA_IDLE) {
        st = tick(t, none);
        if (t->save.phase == TESSERA_VOTE || t->save.phase == TESSERA_COMMIT)
            pause.max_us = 100; /* a few milliseconds, of several ticks */
        if (!st && t->save.phase != TESSERA_IDLE)
            backoff_wait(&pause);
    }
    uint64_t step = st || !committed ? UINT64_MAX : take_committed(t);
    if (committed)
        *committed = step;
    return st;
}

/* Whether rank 0's commit got through before the cancel; agreed. */
static status *committed_anyway(tessera *t, uint8_t *yes)
{
    struct saving *v = &t->save;
    *yes = 0;
    if (v->phase != TESSERA_VOTE && v->phase != TESSERA_COMMIT)
        return NULL;
    status *outcome = NULL;
    if (t->keeper && v->commit == COMMIT_RUNNING && keeper_outcome(t->keeper, true, &outcome)) {
        v->commit = outcome ? COMMIT_RUNNING : COMMIT_DONE;
        status_free(outcome);
    }
    *yes = v->commit == COMMIT_DONE;
    return comm_bcast(t->x, yes, 1, 0, NULL);
}

status *tessera_cancel(tessera *t)
{
    struct saving *v = &t->save;
    if (v->phase == TESSERA_IDLE)
        return NULL;
    TRY(save_unsettle(t));
    uint8_t yes;
    TRY(committed_anyway(t, &yes));
    if (yes) {
        TRY(comm_wait(&t->vote.req));
        finish(t);
        return NULL;
    }
    status *outcome = NULL;
    TRY(save_undo(t, &outcome));
    status_free(outcome); /* a save that nobody wants any more has no error to report */
    return NULL;
}

void tessera_get_progress(tessera *t, struct tessera_progress *out)
{
    struct tessera_progress p = t->progress;
    p.phase = t->save.phase;
    p.step = t->save.phase == TESSERA_IDLE && t->has_newest ? t->newest : t->save.step;
    if (t->pipe) {
        struct pipeline_view v;
        pipeline_look(t->pipe, &v);
        p.total_bytes = t->cache.share ? t->cache.share->payload_bytes : 0;
        p.captured_bytes = v.captured_bytes;
        p.written_bytes = v.written_bytes;
        p.live_bytes = v.live_bytes;
        p.staging_cap_bytes = v.staging_cap_bytes;
        p.staging_peak_bytes = v.staging_peak_bytes;
        if (t->merge) {
            struct merge_view m;
            merge_look(t->merge, &m);
            p.staging_cap_bytes += m.memory_bytes;
            p.staging_peak_bytes += m.memory_bytes;
            p.wire_bytes = m.wire_bytes;
        }
    }
    handle_give(out, &p, sizeof p);
}
