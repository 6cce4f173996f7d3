/* load: which step, which tensors, and what happens to the steps passed over. loadpipe.c moves the bytes.
 *
 * Rank 0 looks at storage and decides; the others get its decision and the metadata by broadcast. A step found damaged
 * is passed over from then on (`bad`, rank 0), and retired once a writing handle has loaded an older one. A read-only
 * handle pins what it reads (pin.h); a step that is removed all the same while it is read is not damaged but gone, and
 * tessera_load_newest takes a newer one. */
#include "ckpt/handle.h"
#include "ckpt/loadpipe.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* ---- sets of steps */

static bool step_set_has(const struct step_set *s, uint64_t step)
{
    for (size_t i = 0; i < s->count; i++)
        if (s->step[i] == step)
            return true;
    return false;
}

void step_set_remove(struct step_set *s, uint64_t step)
{
    size_t kept = 0;
    for (size_t i = 0; i < s->count; i++)
        if (s->step[i] != step)
            s->step[kept++] = s->step[i];
    s->count = kept;
    if (!kept) {
        status_free(s->first);
        s->first = NULL;
    }
}

void step_set_free(struct step_set *s)
{
    status_free(s->first);
    mem_free(s->step);
}

/* why: what is wrong with it; stays the caller's. */
static status *step_set_add(struct step_set *s, uint64_t step, const status *why)
{
    if (step_set_has(s, step))
        return NULL;
    if (s->count == s->cap) {
        size_t cap = s->cap ? s->cap * 2 : 8;
        uint64_t *more = mem_array(s->step, cap, sizeof *more);
        if (!more)
            return ERR(NO_MEMORY, "a list of %zu damaged steps", cap);
        s->step = more;
        s->cap = cap;
    }
    s->step[s->count++] = step;
    if (!s->first)
        s->first = status_copy(why);
    return NULL;
}

/* Rank 0: step is damaged, for the reason st (taken): pass it over, say so. */
static status *mark_bad(tessera *t, uint64_t step, status *st)
{
    status *added = step_set_add(&t->bad, step, st);
    handle_warn(t, status_wrap(st, "step %llu is damaged and passed over", (unsigned long long)step));
    return added;
}

/* ---- choosing a step */

struct choice {
    uint64_t step;
    uint8_t found;
};

/* Collective end of a rank 0 decision. */
static status *share_choice(tessera *t, status *st, struct choice *c)
{
    TRY(comm_agree(t->x, st));
    return comm_bcast(t->x, c, sizeof *c, 0, NULL);
}

/* Rank 0: the committed steps, without those that retention is just removing. */
static status *list_kept(tessera *t, struct step_list *l)
{
    keeper_rest(t->keeper);
    return commit_list(t->store, l);
}

/* Rank 0: the newest committed step of [0, below] that is not known to be damaged. */
static status *newest_listed(tessera *t, uint64_t at_most, struct choice *c)
{
    struct step_list l;
    TRY(list_kept(t, &l));
    for (size_t i = l.count; i-- > 0 && !c->found;)
        if (l.step[i] <= at_most && !step_set_has(&t->bad, l.step[i]))
            *c = (struct choice){ .step = l.step[i], .found = 1 };
    step_list_free(&l);
    return NULL;
}

status *load_set_newest(tessera *t)
{
    struct choice c = { 0 };
    TRY(share_choice(t, t->x->rank == 0 ? newest_listed(t, UINT64_MAX, &c) : NULL, &c));
    t->has_newest = c.found;
    t->newest = c.step;
    t->newest_is_ours = false;
    return NULL;
}

/* Rank 0 of a read-only handle: hold on to a step. */
static status *pin_for(tessera *t, uint64_t step)
{
    if (!t->o.read_only || (t->pin && pin_step(t->pin) == step))
        return NULL;
    pin_close(t->pin);
    t->pin = NULL;
    return pin_open(t->store, step, 0, &t->pin);
}

/* Rank 0: st (taken) if it is not damage, or the step is still committed; NOT_FOUND if it was removed meanwhile. */
static status *damaged_or_gone(tessera *t, uint64_t step, status *st)
{
    bool committed = true;
    if (status_code(st) != ST_CORRUPT)
        return st;
    status *look = commit_is_committed(t->store, step, &committed);
    if (look || committed) {
        status_free(look);
        return st;
    }
    status_free(st);
    return ERR(NOT_FOUND, "step %llu was removed while it was read", (unsigned long long)step);
}

/* Rank 0: the newest step at or below at_most whose metadata and file lengths check out. `seen` counts damaged ones. */
static status *find_valid(tessera *t, uint64_t at_most, struct choice *c, struct metadata **m)
{
    for (;;) {
        *c = (struct choice){ 0 };
        TRY(newest_listed(t, at_most, c));
        if (!c->found)
            return NULL;
        TRY(pin_for(t, c->step));
        status *st = damaged_or_gone(t, c->step, commit_read(t->store, c->step, m));
        if (status_code(st) == ST_NOT_FOUND) { /* retention took it meanwhile: list again */
            status_free(st);
            continue;
        }
        if (status_code(st) != ST_CORRUPT)
            return st;
        TRY(mark_bad(t, c->step, st));
    }
}

status *load_share_metadata(tessera *t, struct metadata **m, status *st)
{
    void *buf = NULL;
    size_t bytes = 0;
    if (!st && t->x->rank == 0 && *m)
        st = metadata_encode(*m, &buf, &bytes);
    st = comm_agree(t->x, st);
    if (!st)
        st = comm_bcast_bytes(t->x, &buf, &bytes, 0);
    if (!st && t->x->rank != 0 && bytes)
        st = metadata_decode(buf, bytes, m);
    mem_free(buf);
    if (t->x->size > 1) /* a transport error fails here again */
        st = comm_agree(t->x, st);
    if (st) {
        metadata_free(*m);
        *m = NULL;
    }
    return st;
}

/* Rank 0 has m (NULL elsewhere, and on rank 0 when st is set); afterwards every rank has it in t->meta. Takes both. */
static status *spread_metadata(tessera *t, struct metadata *m, status *st)
{
    TRY(load_share_metadata(t, &m, st));
    metadata_free(t->meta);
    t->meta = m;
    t->meta_stale = false;
    return NULL;
}

status *tessera_find(tessera *t, uint64_t at_most, uint64_t *step)
{
    struct choice c = { 0 };
    struct metadata *m = NULL;
    TRY(save_settle(t));
    TRY(handle_same(t, "find: step", at_most));
    status *st = t->x->rank == 0 ? find_valid(t, at_most, &c, &m) : NULL;
    if (!st && t->x->rank == 0 && !c.found && t->bad.count)
        st = ERR(CORRUPT, "no committed step is whole; %zu are damaged; the first found: %s", t->bad.count,
                 status_message(t->bad.first));
    else if (!st && t->x->rank == 0 && !c.found)
        st = ERR(NOT_FOUND, "no committed step");
    TRY(spread_metadata(t, m, st));
    *step = t->meta->step;
    return NULL;
}

/* Make t->meta the metadata of `step`. Collective. */
static status *select_step(tessera *t, uint64_t step)
{
    if (t->meta && t->meta->step == step && !t->meta_stale)
        return NULL;
    struct metadata *m = NULL;
    keeper_rest(t->keeper);
    status *st = t->x->rank == 0 ? pin_for(t, step) : NULL;
    if (!st && t->x->rank == 0)
        st = damaged_or_gone(t, step, commit_read(t->store, step, &m));
    if (status_code(st) == ST_CORRUPT)
        st = status_first(st, step_set_add(&t->bad, step, st));
    return spread_metadata(t, m, st);
}

/* What arrived in buffers goes to where it is wanted. Collective. */
static status *place_rest(tessera *t, const tessera_state *s, struct match_fill *f, struct report_sum *cost)
{
    uint64_t begin = clock_ns();
    status *st = match_place(t->dev, s, f);
    report_note(cost, REPORT_PLACE, begin, 0, 0);
    return comm_agree(t->x, st);
}

/* Fill the state from t->meta. Collective. */
static status *load_state(tessera *t, const tessera_state *s, const struct tessera_load_options *o,
                          struct load_totals *totals, struct report_sum *cost)
{
    struct match_fill f = { 0 };
    status *st = match_state(t->x, t->dev, t->meta, s, o, &f, &t->lists);
    if (!st)
        st = loadpipe_run(&t->nodes, t->store, t->meta, f.want, f.count, totals, cost);
    if (!st)
        st = place_rest(t, s, &f, cost);
    match_fill_free(&f, s ? s->count : 0);
    return st;
}

/* ---- the steps above the one that is loaded */

/* Rank 0: INVALID if a whole step above `step` would be lost without the caller's word for it. */
static status *refuse_newer(tessera *t, uint64_t step)
{
    while (!t->o.rewind) {
        struct choice c = { 0 };
        struct metadata *m = NULL;
        TRY(newest_listed(t, UINT64_MAX, &c));
        if (!c.found || c.step <= step)
            return NULL;
        status *st = commit_read(t->store, c.step, &m);
        metadata_free(m);
        if (!st)
            return ERR(INVALID, "load of step %llu: step %llu is newer and whole; rewind retires it",
                       (unsigned long long)step, (unsigned long long)c.step);
        if (status_code(st) == ST_CORRUPT)
            TRY(mark_bad(t, c.step, st));
        else if (status_code(st) != ST_NOT_FOUND)
            return st;
        else
            status_free(st);
    }
    return NULL;
}

/* Rank 0: retire every committed step above `step` (all: every one). */
static status *retire_above(tessera *t, uint64_t step, bool all)
{
    struct step_list l;
    TRY(list_kept(t, &l));
    status *st = NULL;
    for (size_t i = l.count; !st && i-- > 0 && (all || l.step[i] > step);) {
        bool bad = step_set_has(&t->bad, l.step[i]);
        st = commit_retire(t->store, l.step[i], bad ? "bad" : "retired", t->attempt);
        if (!st)
            step_set_remove(&t->bad, l.step[i]);
    }
    step_list_free(&l);
    return st;
}

static status *check_idle(const tessera *t, const char *what)
{
    if (t->save.phase != TESSERA_IDLE)
        return ERR(UNAVAILABLE, "%s: the save of step %llu is in flight", what, (unsigned long long)t->save.step);
    return NULL;
}

/* A writing handle now goes on from `step`: what is above it has to go, and lineage begins here. Collective. */
static status *continue_from(tessera *t, uint64_t step)
{
    TRY(comm_agree(t->x, t->x->rank == 0 ? retire_above(t, step, false) : NULL));
    t->has_newest = true;
    t->newest = step;
    t->newest_is_ours = t->meta->attempt == t->attempt;
    t->cache.stale = t->cache.refers;
    t->parent = t->meta->attempt;
    return NULL;
}

/* All ranks have st, of a load that failed: was the step removed meanwhile? Sets t->lost. Collective. */
static status *tell_lost(tessera *t, uint64_t step, status *st)
{
    uint8_t gone = 0;
    if (status_code(st) != ST_CORRUPT || !t->o.read_only)
        return st;
    if (t->x->rank == 0) {
        status *look = damaged_or_gone(t, step, status_copy(st));
        gone = status_code(look) == ST_NOT_FOUND;
        status_free(look);
    }
    status *transport = comm_bcast(t->x, &gone, sizeof gone, 0, NULL);
    if (transport)
        return status_first(transport, st);
    if (!gone)
        return st;
    t->lost = true;
    status_free(st);
    return ERR(NOT_FOUND, "step %llu was removed while it was read", (unsigned long long)step);
}

struct load_cost {
    uint64_t start_ns, start_wall_ns, retries; /* retries: of the store, before */
    struct load_totals totals;
    struct report_sum sum;
};

/* The load went well everywhere: its report goes to the keeper. Collective; the error is agreed. */
static status *report_load(tessera *t, uint64_t step, const struct load_cost *c)
{
    struct report_rank mine = { .begin_ns = c->start_wall_ns, .stall_ns = clock_ns() - c->start_ns };
    struct report *r = NULL;
    size_t *counts = NULL;
    void *all = NULL;
    memcpy(mine.stage, c->sum.stage, sizeof mine.stage);
    mine.bytes = mine.stage[REPORT_READ].bytes;
    mine.stage[REPORT_READ].retries = atomic_load(&t->store->retries) - c->retries;
    report_relative(&mine, c->start_ns);
    for (int i = 0; i < REPORT_STAGES; i++)
        mine.total_ns = mine.stage[i].last_ns > mine.total_ns ? mine.stage[i].last_ns : mine.total_ns;
    status *st = comm_gather_bytes(t->x, &mine, sizeof mine, 0, &all, &counts);
    mem_free(counts);
    if (!st && t->keeper)
        st = report_new(t->x->size, &r);
    st = comm_agree(t->x, st);
    if (!st && r) {
        memcpy(r->rank, all, (size_t)r->world * sizeof *r->rank);
        r->load = true;
        r->step = step;
        r->attempt = t->attempt;
        r->time_ns = c->start_wall_ns;
        r->span_ns = clock_ns() - c->start_ns;
        r->storage_bytes = c->totals.storage_bytes;
        r->unique_bytes = c->totals.unique_bytes;
        r->mesh = t->mesh;
        report_align(r);
        keeper_report(t->keeper, r);
        r = NULL;
    }
    mem_free(r);
    mem_free(all);
    return st;
}

/* As load_checked, which keeps its books. */
static status *load_counted(tessera *t, tessera_state *s, uint64_t step, const struct tessera_load_options *o,
                            struct load_cost *cost)
{
    bool writing = !t->o.read_only;
    t->lost = false;
    TRY(handle_same(t, "load: step", step));
    TRY(select_step(t, step));
    if (writing)
        TRY(comm_agree(t->x, t->x->rank == 0 ? refuse_newer(t, step) : NULL));
    status *st = tell_lost(t, step, load_state(t, s, o, &cost->totals, &cost->sum));
    pin_close(t->pin);
    t->pin = NULL;
    if (status_code(st) == ST_CORRUPT && t->x->rank == 0)
        st = status_first(st, step_set_add(&t->bad, step, st));
    if (!st && writing)
        st = continue_from(t, step);
    if (!st && writing)
        st = save_adopt_step(t, s);
    if (st) {
        if (status_code(st) == ST_CORRUPT || t->lost) { /* do not trust it again without another look */
            metadata_free(t->meta);
            t->meta = NULL;
        }
        return st;
    }
    if (writing)
        TRY(report_load(t, step, cost));
    t->report.storage_bytes = cost->totals.storage_bytes;
    t->report.unique_bytes = cost->totals.unique_bytes;
    t->report.wire_bytes = cost->totals.wire_bytes;
    t->report.ns = clock_ns() - cost->start_ns;
    return NULL;
}

static status *load_checked(tessera *t, tessera_state *s, uint64_t step, const struct tessera_load_options *o)
{
    struct load_cost cost = { .start_ns = clock_ns(), .start_wall_ns = clock_wall_ns() };
    cost.retries = atomic_load(&t->store->retries);
    report_sum_init(&cost.sum);
    status *st = load_counted(t, s, step, o, &cost);
    report_sum_fini(&cost.sum);
    return st;
}

status *tessera_load_parts(tessera *t, tessera_state *s, uint64_t step, const struct tessera_load_options *o)
{
    struct tessera_load_options checked;
    if (!t->o.read_only)
        TRY(check_idle(t, "load"));
    match_lists_free(&t->lists);
    TRY(comm_agree(t->x, match_options(o, &checked)));
    return load_checked(t, s, step, &checked);
}

status *tessera_load(tessera *t, tessera_state *s, uint64_t step)
{
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    o.allow = TESSERA_ALLOW_UNEXPECTED; /* what is stored and not asked for stays unread */
    if (!t->o.read_only)
        TRY(check_idle(t, "load"));
    match_lists_free(&t->lists);
    return load_checked(t, s, step, &o);
}

status *tessera_load_newest(tessera *t, tessera_state *s, uint64_t *step)
{
    for (;;) {
        uint64_t found;
        TRY(tessera_find(t, TESSERA_NEWEST, &found));
        status *st = tessera_load(t, s, found);
        if (!st)
            *step = found;
        if (status_code(st) != ST_CORRUPT && !t->lost)
            return st;
        const char *what = t->lost ? "looking for a newer one than" : "falling back past";
        handle_warn(t, status_wrap(st, "%s step %llu", what, (unsigned long long)found));
    }
}

status *tessera_rewind(tessera *t, uint64_t step)
{
    if (t->o.read_only)
        return ERR(INVALID, "rewind: the handle is read-only");
    TRY(check_idle(t, "rewind"));
    TRY(handle_same(t, "rewind: step", step));
    TRY(comm_agree(t->x, t->x->rank == 0 ? retire_above(t, step, step == TESSERA_NEWEST) : NULL));
    metadata_free(t->meta);
    t->meta = NULL;
    t->cache.stale = t->cache.refers;
    return load_set_newest(t);
}

status *tessera_list_steps(tessera *t, uint64_t *step, size_t room, size_t *count)
{
    void *buf = NULL;
    size_t bytes = 0;
    struct step_list l = { 0 };
    TRY(save_settle(t));
    TRY(comm_agree(t->x, t->x->rank == 0 ? list_kept(t, &l) : NULL));
    if (t->x->rank == 0) {
        buf = l.step;
        bytes = l.count * sizeof *l.step;
    }
    status *st = comm_bcast_bytes(t->x, &buf, &bytes, 0);
    if (!st) {
        *count = bytes / sizeof *step;
        size_t given = room < *count ? room : *count;
        if (given)
            memcpy(step, buf, given * sizeof *step);
    }
    if (t->x->rank == 0)
        step_list_free(&l);
    else if (!st)
        mem_free(buf);
    return st;
}

/* Keep (step, value) if the step's metric is the best so far. */
static status *best_of_step(struct store *s, uint64_t step, const char *metric, bool lowest, bool *any,
                            uint64_t *best_step, double *best)
{
    struct mark_list l = { 0 };
    TRY(commit_marks(s, step, &l));
    for (size_t i = 0; i < l.count; i++) {
        double v = l.mark[i].value;
        if (strcmp(l.mark[i].name, metric) != 0 || (*any && (lowest ? v > *best : v < *best)))
            continue;
        *any = true;
        *best = v;
        *best_step = step;
    }
    mark_list_free(&l);
    return NULL;
}

static status *find_best(struct store *s, const char *metric, bool lowest, uint64_t *step)
{
    struct step_list l = { 0 };
    bool any = false;
    double best = 0;
    TRY(commit_list(s, &l));
    status *st = NULL;
    for (size_t i = 0; !st && i < l.count; i++) /* ascending */
        st = best_of_step(s, l.step[i], metric, lowest, &any, step, &best);
    if (!st && !any)
        st = ERR(NOT_FOUND, "none of the %zu committed steps has the metric %s", l.count, metric);
    step_list_free(&l);
    return st;
}

status *ckpt_best(tessera *t, const char *metric, bool lowest, uint64_t *step)
{
    uint64_t found = 0;
    TRY(save_settle(t));
    keeper_rest(t->keeper);
    TRY(comm_agree(t->x, t->x->rank == 0 ? find_best(t->store, metric, lowest, &found) : NULL));
    TRY(comm_bcast(t->x, &found, sizeof found, 0, NULL));
    *step = found;
    return NULL;
}
