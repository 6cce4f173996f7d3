/* shards: see shards.h.
 *
 * Unit u > 0 has window 1 + (u - 1) % 2. holds[w] is the unit whose parameters are in window w, or -1; flying[w]: they
 * are on their way. All shards of a replica do the same in the same order, so these agree without a message. */
#include "trainer/parallel/shards.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <string.h>

enum { WINDOWS = 3 };

struct window {
    uint64_t elems, grad_elems; /* of values: those that train, then frozen ones */
    float *data, *grad;         /* NULL: not cut */
    int holds;
    bool flying;
    struct comm_req req;
    struct comm_xfer *xfer;
};

/* Parameters that train, or frozen ones, which have no gradient. */
enum { TRAINED, FROZEN, KINDS };

struct kind {
    struct buckets k;
    float *own;           /* [k.own_elems]; NULL: they are whole */
    struct zero_run *run; /* what lies in it */
    uint64_t runs;
};

struct shards {
    struct shards_options o;
    struct params *p; /* borrowed */
    struct comm *comm;
    struct kind kind[KINDS]; /* values whole: the first only */
    struct window window[WINDOWS];
    float *held; /* [all elements] between hold and release */
    struct tape_blocks hooks;
    struct shards *other; /* shards_join */
    status *(*collect)(void *arg, int unit);
    void *arg;
};

static struct window *window_of(struct shards *s, int unit)
{
    return &s->window[unit ? 1 + (unit - 1) % 2 : 0];
}

/* ---- open ---- */

static uint64_t elems_of(const struct kind *k, int unit)
{
    return k->k.unit_elems ? k->k.unit_elems[unit] : 0;
}

static int units(const struct shards *s)
{
    return s->kind[TRAINED].k.units;
}

/* Does this stage hold any of it? */
static bool is_here(const struct shards *s, int unit)
{
    return elems_of(&s->kind[TRAINED], unit) + elems_of(&s->kind[FROZEN], unit) > 0;
}

/* Does a pass of this chunk run it? unit > 0 */
static bool is_in(const struct shards *s, int chunk, int unit)
{
    return is_here(s, unit) && params_hold(s->p, chunk, unit);
}

/* The chunk that unit 0 is used in: the first stage's, or the last one's, which are not on one rank. */
static int chunk_outside(const struct params *ps)
{
    for (int i = 0; i < ps->count; i++)
        for (int c = 0; ps->p[i].block < 0 && ps->p[i].alias < 0 && !ps->p[i].away && c < params_chunks(ps); c++)
            if (params_hold(ps, c, ps->p[i].unit))
                return c;
    return 0;
}

/* Where a bucket begins in its unit's window of values: frozen ones lie behind the others. */
static uint64_t place_of_bucket(const struct shards *s, int kind, uint64_t b)
{
    const struct bucket *k = &s->kind[kind].k.b[b];
    return (kind == FROZEN ? elems_of(&s->kind[TRAINED], k->unit) : 0) + k->at;
}

/* Where the element of the flat block that parameter p starts at lies in its unit's window of values. */
static uint64_t place_of(const struct shards *s, const struct param *p)
{
    const struct buckets *k = &s->kind[p->frozen ? FROZEN : TRAINED].k;
    for (uint64_t b = 0; b < k->n; b++)
        if (p->offset < k->b[b].end)
            return place_of_bucket(s, p->frozen ? FROZEN : TRAINED, b) + (p->offset - k->b[b].begin);
    CHECK(false, "parameter %s lies in no bucket", p->name);
}

static void point(struct shards *s, bool grads)
{
    for (int i = 0; i < s->p->count; i++) {
        struct param *p = &s->p->p[i];
        struct window *w = window_of(s, p->block + 1);
        if (p->away || (p->frozen && !s->o.data))
            continue;
        uint64_t at = place_of(s, p);
        if (s->o.data)
            p->value.data = s->held ? s->held + p->offset : w->data + at;
        if (grads && !p->frozen)
            p->value.grad = w->grad + at;
        p->value.cut = p->part.total ? &p->part : NULL;
        if (!s->p->whole)
            continue;
        struct param *shown = &s->p->whole->p[i];
        shown->value.data = p->value.data;
        if (grads) /* later those of a tied weight are elsewhere (tied.h) */
            shown->value.grad = p->value.grad;
        shown->value.cut = shown->part.total ? &shown->part : NULL;
    }
}

static status *open_window(struct shards *s, struct window *w)
{
    size_t bytes = w->elems * sizeof(float), peers = (size_t)s->kind[TRAINED].k.shards - 1;
    if (s->o.data)
        w->data = mem_block(bytes, 4096);
    if (s->o.grad)
        w->grad = mem_block(w->grad_elems * sizeof(float), 4096);
    w->xfer = mem_array(NULL, 2 * peers * (s->kind[TRAINED].k.n + s->kind[FROZEN].k.n) + 1, sizeof *w->xfer);
    w->holds = -1;
    return w->xfer && (w->data || !s->o.data) && (w->grad || !s->o.grad)
               ? NULL
               : ERR(NO_MEMORY, "a window of %zu bytes for parameters or gradients", bytes);
}

static status *open_kind(struct shards *s, int kind, const struct comm *dp)
{
    struct kind *k = &s->kind[kind];
    TRY(buckets_open(s->p, s->o.bucket_elems, true, kind == FROZEN, dp->size, s->o.shards, dp->rank, &k->k));
    if (!s->o.data)
        return NULL;
    k->own = mem_block(k->k.own_elems * sizeof(float), 4096);
    k->run = mem_array(NULL, k->k.n + 1, sizeof *k->run);
    if (!k->own || !k->run)
        return ERR(NO_MEMORY, "%llu parameters of a shard", (unsigned long long)k->k.own_elems);
    for (uint64_t b = 0; b < k->k.n; b++) {
        struct zero_run r = bucket_run(&k->k, b, k->k.shard);
        if (run_elems(r))
            k->run[k->runs++] = r;
    }
    return NULL;
}

static status *open_all(struct shards *s, const struct comm *dp)
{
    TRY(open_kind(s, TRAINED, dp));
    if (s->o.data)
        TRY(open_kind(s, FROZEN, dp));
    for (int u = 0; u < units(s); u++) {
        struct window *w = window_of(s, u);
        uint64_t trained = elems_of(&s->kind[TRAINED], u), all = trained + elems_of(&s->kind[FROZEN], u);
        w->grad_elems = trained > w->grad_elems ? trained : w->grad_elems;
        w->elems = all > w->elems ? all : w->elems;
    }
    for (int w = 0; w < WINDOWS; w++)
        TRY(open_window(s, &s->window[w]));
    return NULL;
}

static status *enter(void *arg, int64_t block, bool backward);
static status *leave(void *arg, int64_t block, bool backward);

status *shards_open(const struct shards_options *o, struct params *p, struct comm *dp, struct shards **out)
{
    struct shards *s = mem_calloc(1, sizeof *s);
    status *st = s ? NULL : ERR(NO_MEMORY, "shards of parameters");
    if (s) {
        s->o = *o;
        s->p = p;
        s->hooks = (struct tape_blocks){ s, enter, leave };
        st = open_all(s, dp);
    }
    st = comm_agree(dp, st);
    if (!st)
        st = comm_split(dp, dp->rank / o->shards, dp->rank, &s->comm);
    if (st) {
        shards_close(s);
        return st;
    }
    point(s, s->o.grad);
    *out = s;
    return NULL;
}

void shards_close(struct shards *s)
{
    if (!s)
        return;
    shards_release(s, false);
    for (int i = 0; i < WINDOWS; i++) {
        struct window *w = &s->window[i];
        mem_block_free(w->data, w->elems * sizeof(float));
        mem_block_free(w->grad, w->grad_elems * sizeof(float));
        mem_free(w->xfer);
    }
    for (int k = 0; k < KINDS; k++) {
        mem_block_free(s->kind[k].own, s->kind[k].k.own_elems * sizeof(float));
        mem_free(s->kind[k].run);
        buckets_fini(&s->kind[k].k);
    }
    comm_close(s->comm);
    mem_free(s);
}

const struct buckets *shards_buckets(const struct shards *s)
{
    return &s->kind[TRAINED].k;
}

struct comm *shards_comm(const struct shards *s)
{
    return s->comm;
}

struct shard_runs shards_own(const struct shards *s, bool frozen)
{
    const struct kind *k = &s->kind[frozen ? FROZEN : TRAINED];
    return (struct shard_runs){ k->own, k->own ? k->k.own_elems : 0, k->run, k->runs };
}

const struct params *shards_params(const struct shards *s)
{
    return s->p;
}

bool shards_cut_values(const struct shards *s)
{
    return s->o.data;
}

float *shards_grad(const struct shards *s, uint64_t b)
{
    const struct bucket *k = &s->kind[TRAINED].k.b[b];
    return s->window[k->unit ? 1 + (k->unit - 1) % 2 : 0].grad + k->at;
}

uint64_t shards_window_bytes(const struct shards *s)
{
    uint64_t n = 0;
    for (int w = 0; w < WINDOWS; w++)
        n += (s->o.data ? s->window[w].elems : 0) + (s->o.grad ? s->window[w].grad_elems : 0);
    return n * sizeof(float);
}

void shards_collect(struct shards *s, status *(*collect)(void *arg, int unit), void *arg)
{
    s->collect = collect;
    s->arg = arg;
}

/* ---- parameters ---- */

/* Bucket b of all shards into `to`, where its first element is; this shard's run is copied now. */
static size_t gather_messages(const struct kind *kind, uint64_t b, float *to, struct comm_xfer *x)
{
    const struct bucket *k = &kind->k.b[b];
    struct zero_run mine = bucket_run(&kind->k, b, kind->k.shard);
    size_t n = 0;
    memcpy(to + (mine.begin - k->begin), kind->own + k->own, run_elems(mine) * sizeof(float));
    for (int r = 0; r < kind->k.shards; r++) {
        struct zero_run theirs = bucket_run(&kind->k, b, r);
        if (r == kind->k.shard)
            continue;
        x[n++] = (struct comm_xfer){ r, 0, true, kind->own + k->own, run_elems(mine) * sizeof(float) };
        x[n++] = (struct comm_xfer){ r, 0, false, to + (theirs.begin - k->begin), run_elems(theirs) * sizeof(float) };
    }
    return n;
}

static status *start_gather(struct shards *s, int unit)
{
    struct window *w = window_of(s, unit);
    size_t n = 0;
    if (!s->o.data || s->held || w->holds == unit)
        return NULL;
    CHECK(!w->flying, "unit %d is on its way where unit %d is wanted", w->holds, unit);
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++)
            if (s->kind[kind].k.b[b].unit == unit)
                n += gather_messages(&s->kind[kind], b, w->data + place_of_bucket(s, kind, b), w->xfer + n);
    w->holds = unit;
    w->flying = true;
    return comm_iexchange(s->comm, w->xfer, n, NULL, &w->req);
}

static status *finish_gather(struct window *w)
{
    if (!w->flying)
        return NULL;
    w->flying = false;
    return comm_wait(&w->req);
}

static status *gather(struct shards *s, int unit)
{
    struct window *w = window_of(s, unit);
    if (w->holds != unit)
        TRY(finish_gather(w)); /* a prefetch that was not used */
    TRY(start_gather(s, unit));
    return finish_gather(w);
}

void shards_changed(struct shards *s)
{
    for (int w = 0; w < WINDOWS; w++) {
        CHECK(!s->window[w].flying, "parameters change while they are gathered");
        s->window[w].holds = -1;
    }
}

/* ---- a pass ---- */

static void clear_grad(struct window *w)
{
    if (w->grad)
        memset(w->grad, 0, w->grad_elems * sizeof(float));
}

static status *enter(void *arg, int64_t block, bool backward)
{
    struct shards *s = arg;
    int unit = (int)block + 1, next = backward ? unit - 1 : unit + 1;
    if (is_here(s, unit))
        TRY(gather(s, unit));
    if (is_here(s, unit) && backward)
        clear_grad(window_of(s, unit));
    if (next > 0 && next < units(s) && is_here(s, next))
        TRY(start_gather(s, next));
    return s->other ? enter(s->other, block, backward) : NULL;
}

static status *leave(void *arg, int64_t block, bool backward)
{
    struct shards *s = arg;
    if (backward && s->o.grad && s->collect)
        TRY(s->collect(s->arg, (int)block + 1));
    return s->other ? leave(s->other, block, backward) : NULL;
}

void shards_join(struct shards *s, struct shards *other)
{
    s->other = other;
}

void shards_clear(struct shards *s)
{
    clear_grad(&s->window[0]);
}

status *shards_begin(struct shards *s, bool training)
{
    TRY(gather(s, 0));
    if (training)
        clear_grad(&s->window[0]);
    return NULL;
}

const struct tape_blocks *shards_hooks(struct shards *s)
{
    return &s->hooks;
}

status *shards_end(struct shards *s, int chunk)
{
    return s->o.grad && s->collect && chunk == chunk_outside(s->p) ? s->collect(s->arg, 0) : NULL;
}

status *shards_idle(struct shards *s, int chunk)
{
    TRY(shards_begin(s, false));
    for (int unit = 1; unit < units(s); unit++)
        if (is_in(s, chunk, unit)) {
            TRY(enter(s, unit - 1, false));
            TRY(leave(s, unit - 1, false));
        }
    return NULL;
}

status *shards_idle_backward(struct shards *s, int chunk, bool weights)
{
    TRY(shards_begin(s, weights));
    for (int unit = units(s) - 1; unit > 0; unit--) {
        if (is_in(s, chunk, unit))
            TRY(enter(s, unit - 1, true));
        if (is_in(s, chunk, unit) && weights)
            TRY(leave(s, unit - 1, true));
    }
    return weights ? shards_end(s, chunk) : NULL;
}

/* ---- all at once, or one after another ---- */

/* What this shard keeps of bucket b, from a place where the bucket is whole. */
static void keep_own(const struct kind *k, uint64_t b, const float *from)
{
    struct zero_run mine = bucket_run(&k->k, b, k->k.shard);
    memcpy(k->own + k->k.b[b].own, from + (mine.begin - k->k.b[b].begin), run_elems(mine) * sizeof(float));
}

void shards_init(struct shards *s, uint64_t seed)
{
    for (int unit = 0; unit < units(s); unit++) {
        struct window *w = window_of(s, unit);
        memset(w->data, 0, w->elems * sizeof(float)); /* paddings */
        for (int i = 0; i < s->p->count; i++)
            if (s->p->p[i].alias < 0 && !s->p->p[i].away && s->p->p[i].block + 1 == unit)
                param_init(&s->p->p[i], seed);
        for (int kind = 0; kind < KINDS; kind++)
            for (uint64_t b = 0; b < s->kind[kind].k.n; b++)
                if (s->kind[kind].k.b[b].unit == unit)
                    keep_own(&s->kind[kind], b, w->data + place_of_bucket(s, kind, b));
    }
    shards_changed(s);
}

static status *gather_bucket(struct shards *s, const struct kind *k, uint64_t b, float *to)
{
    struct comm_xfer *x = s->window[0].xfer;
    return comm_exchange(s->comm, x, gather_messages(k, b, to, x), NULL);
}

status *shards_crc(struct shards *s, uint32_t *crc)
{
    *crc = 0;
    for (int w = 0; w < WINDOWS; w++)
        TRY(finish_gather(&s->window[w]));
    shards_changed(s); /* the windows' contents are overwritten */
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++) {
            const struct bucket *k = &s->kind[kind].k.b[b];
            float *to = window_of(s, k->unit)->data + place_of_bucket(s, kind, b);
            TRY(gather_bucket(s, &s->kind[kind], b, to));
            *crc = crc32c(*crc, to, (k->end - k->begin) * sizeof(float));
        }
    return NULL;
}

status *shards_hold(struct shards *s)
{
    if (!s->o.data)
        return NULL;
    for (int w = 0; w < WINDOWS; w++)
        TRY(finish_gather(&s->window[w]));
    s->held = mem_block(params_bytes(s->p), 4096);
    TRY(comm_agree(s->comm,
                   s->held ? NULL : ERR(NO_MEMORY, "%zu bytes for all parameters at once", params_bytes(s->p))));
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++)
            TRY(gather_bucket(s, &s->kind[kind], b, s->held + s->kind[kind].k.b[b].begin));
    point(s, false); /* those of a tied weight may lie elsewhere (tied.h) */
    return NULL;
}

void shards_release(struct shards *s, bool keep)
{
    if (!s->held)
        return;
    for (int kind = 0; keep && kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++)
            keep_own(&s->kind[kind], b, s->held + s->kind[kind].k.b[b].begin);
    mem_block_free(s->held, params_bytes(s->p));
    s->held = NULL;
    point(s, false);
    if (keep)
        shards_changed(s);
}
