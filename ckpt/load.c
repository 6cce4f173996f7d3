/* load: which step, which tensors, and what happens to the steps passed over. loadpipe.c moves the bytes.
 *
 * Rank 0 looks at storage and decides; the others get its decision and the metadata by broadcast. A step found damaged
 * is passed over from then on (`bad`, rank 0), and retired once a writing handle has loaded an older one. */
#include "ckpt/handle.h"
#include "ckpt/loadpipe.h"
#include "ckpt/reshard.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <stdio.h>

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

/* Rank 0: the newest committed step of [0, below] that is not known to be damaged. */
static status *newest_listed(tessera *t, uint64_t at_most, struct choice *c)
{
    struct step_list l;
    TRY(commit_list(t->store, &l));
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

/* Rank 0: the newest step at or below at_most whose metadata and file lengths check out. `seen` counts damaged ones. */
static status *find_valid(tessera *t, uint64_t at_most, struct choice *c, struct metadata **m)
{
    for (;;) {
        *c = (struct choice){ 0 };
        TRY(newest_listed(t, at_most, c));
        if (!c->found)
            return NULL;
        status *st = commit_read(t->store, c->step, m);
        if (status_code(st) == ST_NOT_FOUND) { /* retention took it meanwhile: list again */
            status_free(st);
            continue;
        }
        if (status_code(st) != ST_CORRUPT)
            return st;
        TRY(mark_bad(t, c->step, st));
    }
}

/* Rank 0 has m (NULL elsewhere, and on rank 0 when st is set); afterwards every rank has it in t->meta. Takes both. */
static status *spread_metadata(tessera *t, struct metadata *m, status *st)
{
    void *buf = NULL;
    size_t bytes = 0;
    if (!st && t->x->rank == 0)
        st = metadata_encode(m, &buf, &bytes);
    st = comm_agree(t->x, st);
    if (!st)
        st = comm_bcast_bytes(t->x, &buf, &bytes, 0);
    if (!st && t->x->rank != 0)
        st = metadata_decode(buf, bytes, &m);
    mem_free(buf);
    if (t->x->size > 1) /* a transport error fails here again */
        st = comm_agree(t->x, st);
    if (st) {
        metadata_free(m);
        return st;
    }
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
    status *st = t->x->rank == 0 ? commit_read(t->store, step, &m) : NULL;
    if (status_code(st) == ST_CORRUPT) {
        st = status_first(st, step_set_add(&t->bad, step, st));
    }
    return spread_metadata(t, m, st);
}

status *tessera_blob(tessera *t, const char *part, const char *name, int rank, const void **data, size_t *bytes)
{
    if (!t->meta)
        return ERR(NOT_FOUND, "blob %s/%s: no step was found or loaded yet", part, name);
    const struct meta_blob *b = metadata_blob(t->meta, part, name, rank);
    if (!b)
        return ERR(NOT_FOUND, "step %llu: no blob %s/%s of rank %d", (unsigned long long)t->meta->step, part, name,
                   rank);
    *data = b->data;
    *bytes = b->bytes;
    return NULL;
}

status *tessera_stored(tessera *t, const char *part, const char *name, struct tessera_tensor *d)
{
    if (d->size < STATE_TENSOR_BYTES)
        return ERR(INVALID, "stored tensor: struct of %zu bytes; set it with TESSERA_TENSOR", d->size);
    int64_t i = t->meta ? metadata_find(t->meta, part, name) : -1;
    if (i < 0)
        return ERR(NOT_FOUND, "%s/%s: not stored", part, name);
    const struct meta_tensor *m = &t->meta->tensor[i];
    d->dtype = (int)m->dtype;
    d->ndim = m->shape.ndim;
    memcpy(d->shape, m->shape.dim, sizeof d->shape);
    return NULL;
}

/* ---- matching a state with a step */

static void shape_text(const struct shape *s, char *text, size_t bytes)
{
    dims_text(s->ndim, s->dim, text, bytes);
}

/* The stored tensor that holds p's bytes: itself, or what it is an alias of. */
static status *match(const struct metadata *m, const struct state_piece *p, int64_t found, uint32_t *out)
{
    const struct meta_tensor *t = &m->tensor[found];
    unsigned long long step = m->step;
    char have[256], want[256];
    if (t->dtype != p->dtype)
        return ERR(INVALID, "step %llu: %s/%s is stored as %s and wanted as %s", step, p->part, p->name,
                   dtype_name(t->dtype), dtype_name(p->dtype));
    if (t->shape.ndim != p->shape.ndim ||
        memcmp(t->shape.dim, p->shape.dim, (size_t)p->shape.ndim * sizeof p->shape.dim[0]) != 0) {
        shape_text(&t->shape, have, sizeof have);
        shape_text(&p->shape, want, sizeof want);
        return ERR(INVALID, "step %llu: %s/%s has shape %s and is wanted as %s", step, p->part, p->name, have, want);
    }
    if (t->alias_of)
        found = metadata_find(m, t->part, t->alias_of);
    if (found < 0)
        return ERR(CORRUPT, "step %llu: %s/%s is an alias of %s, which is not there", step, p->part, p->name,
                   t->alias_of);
    *out = (uint32_t)found;
    return NULL;
}

/* Say which tensors are missing, as many names as fit. */
static status *missing_names(const struct metadata *m, const tessera_state *s)
{
    char names[700] = "";
    size_t used = 0, count = 0;
    for (size_t i = 0; i < s->count; i++) {
        const struct state_piece *p = &s->piece[i];
        bool again = i && !strcmp(p->name, p[-1].name) && !strcmp(p->part, p[-1].part);
        if (p->alias_of || again || metadata_find(m, p->part, p->name) >= 0)
            continue;
        count++;
        size_t need = strlen(p->part) + strlen(p->name) + 3;
        if (used + need < sizeof names)
            used += (size_t)snprintf(names + used, sizeof names - used, " %s/%s", p->part, p->name);
    }
    return ERR(NOT_FOUND, "step %llu does not store %zu of the wanted tensors:%s", (unsigned long long)m->step, count,
               names);
}

/* What a load fills: one want a piece with elements. Pieces in strided or device memory are loaded into `bounce` first.
 */
struct fill {
    struct load_want *want;
    void **bounce; /* [state's pieces] or NULL entries */
    uint64_t count;
};

static void free_fill(struct fill *f, size_t pieces)
{
    for (size_t i = 0; f->bounce && i < pieces; i++)
        mem_free(f->bounce[i]);
    mem_free(f->bounce);
    mem_free(f->want);
}

static status *want_piece(tessera *t, const struct state_piece *p, int64_t found, size_t i, struct fill *f)
{
    struct load_want *w = &f->want[f->count];
    TRY(match(t->meta, p, found, &w->tensor));
    uint64_t elems = piece_elems(&p->piece);
    if (!elems)
        return NULL;
    w->piece = p->piece;
    w->dst = p->data;
    if (p->strided || !t->dev->host) {
        if (p->strided && !t->dev->host)
            return ERR(UNSUPPORTED, "%s/%s: strided memory on device %s", p->part, p->name, t->dev->ops->name);
        w->dst = f->bounce[i] = mem_alloc(elems * dtype_bytes(p->dtype));
        if (!w->dst)
            return ERR(NO_MEMORY, "%s/%s: %llu elements", p->part, p->name, (unsigned long long)elems);
    }
    f->count++;
    return NULL;
}

/* Local. */
static status *match_state(tessera *t, const tessera_state *s, struct fill *f)
{
    bool missing = false;
    if (!s)
        return ERR(INVALID, "load of step %llu: no state", (unsigned long long)t->meta->step);
    f->want = mem_calloc(s->count + 1, sizeof *f->want);
    f->bounce = mem_calloc(s->count + 1, sizeof *f->bounce);
    if (!f->want || !f->bounce)
        return ERR(NO_MEMORY, "a load of %zu pieces", s->count);
    for (size_t i = 0; i < s->count; i++) {
        const struct state_piece *p = &s->piece[i];
        if (p->alias_of) /* its bytes are its target's */
            continue;
        int64_t found = metadata_find(t->meta, p->part, p->name);
        missing = missing || found < 0;
        if (found >= 0)
            TRY(want_piece(t, p, found, i, f));
    }
    return missing ? missing_names(t->meta, s) : NULL;
}

/* From the bounce buffers to where the pieces live. Local. */
static status *place(tessera *t, const tessera_state *s, const struct fill *f)
{
    for (size_t i = 0; i < s->count; i++) {
        const struct state_piece *p = &s->piece[i];
        uint64_t elems = piece_elems(&p->piece);
        if (!f->bounce[i])
            continue;
        if (t->dev->host)
            piece_scatter(p->shape.ndim, &p->piece, dtype_bytes(p->dtype), p->data, p->stride, 0, elems, f->bounce[i]);
        else
            TRY(t->dev->ops->copy(t->dev, p->data, f->bounce[i], elems * dtype_bytes(p->dtype), NULL));
    }
    return t->dev->host ? NULL : t->dev->ops->stream_sync(t->dev, NULL);
}

/* Fill the state from t->meta. Collective. */
static status *load_state(tessera *t, const tessera_state *s, struct load_totals *totals)
{
    struct fill f = { 0 };
    status *st = comm_agree(t->x, match_state(t, s, &f));
    if (!st)
        st = loadpipe_run(t->x, t->store, t->meta, f.want, f.count, totals);
    if (!st)
        st = comm_agree(t->x, place(t, s, &f));
    free_fill(&f, s ? s->count : 0);
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
    TRY(commit_list(t->store, &l));
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
    t->parent = t->meta->attempt;
    return NULL;
}

status *tessera_load(tessera *t, tessera_state *s, uint64_t step)
{
    uint64_t start = clock_ns();
    struct load_totals totals = { 0 };
    bool writing = !t->o.read_only;
    if (writing)
        TRY(check_idle(t, "load"));
    TRY(handle_same(t, "load: step", step));
    TRY(select_step(t, step));
    if (writing)
        TRY(comm_agree(t->x, t->x->rank == 0 ? refuse_newer(t, step) : NULL));
    status *st = load_state(t, s, &totals);
    if (status_code(st) == ST_CORRUPT && t->x->rank == 0)
        st = status_first(st, step_set_add(&t->bad, step, st));
    if (!st && writing)
        st = continue_from(t, step);
    if (st) {
        if (status_code(st) == ST_CORRUPT) { /* do not trust it again without another look */
            metadata_free(t->meta);
            t->meta = NULL;
        }
        return st;
    }
    t->report.storage_bytes = totals.storage_bytes;
    t->report.unique_bytes = totals.unique_bytes;
    t->report.ns = clock_ns() - start;
    return NULL;
}

status *tessera_load_newest(tessera *t, tessera_state *s, uint64_t *step)
{
    for (;;) {
        uint64_t found;
        TRY(tessera_find(t, TESSERA_NEWEST, &found));
        status *st = tessera_load(t, s, found);
        if (!st)
            *step = found;
        if (status_code(st) != ST_CORRUPT)
            return st;
        handle_warn(t, status_wrap(st, "falling back past step %llu", (unsigned long long)found));
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
    return load_set_newest(t);
}

void tessera_get_load_report(tessera *t, struct tessera_load_report *out)
{
    struct tessera_load_report r = t->report;
    handle_give(out, &r, sizeof r);
}
