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
    uint64_t elems;
    float *data, *grad; /* NULL: not cut */
    int holds;
    bool flying;
    struct comm_req req;
    struct comm_xfer *xfer;
};

struct shards {
    struct shards_options o;
    struct params *p; /* borrowed */
    struct comm *comm;
    struct buckets k;
    struct window window[WINDOWS];
    float *own;  /* [k.own_elems] */
    float *held; /* [p->total] between hold and release */
    struct tape_blocks hooks;
    status *(*collect)(void *arg, int unit);
    void *arg;
};

static struct window *window_of(struct shards *s, int unit)
{
    return &s->window[unit ? 1 + (unit - 1) % 2 : 0];
}

/* ---- open ---- */

/* Where the element of the flat block that parameter p starts at lies in a copy of its unit. */
static uint64_t place_of(const struct shards *s, const struct param *p)
{
    for (uint64_t b = 0; b < s->k.n; b++)
        if (p->offset < s->k.b[b].end)
            return s->k.b[b].at + (p->offset - s->k.b[b].begin);
    CHECK(false, "parameter %s lies in no bucket", p->name);
}

static void point(struct shards *s, bool grads)
{
    for (int i = 0; i < s->p->count; i++) {
        struct param *p = &s->p->p[i];
        struct window *w = window_of(s, p->block + 1);
        if (p->frozen)
            continue;
        uint64_t at = place_of(s, p);
        if (s->o.data)
            p->value.data = s->held ? s->held + p->offset : w->data + at;
        if (grads)
            p->value.grad = w->grad + at;
        p->value.cut = p->part.total ? &p->part : NULL;
    }
}

static status *open_window(struct shards *s, struct window *w)
{
    size_t bytes = w->elems * sizeof(float), peers = (size_t)s->k.shards - 1;
    if (s->o.data)
        w->data = mem_block(bytes, 4096);
    if (s->o.grad)
        w->grad = mem_block(bytes, 4096);
    w->xfer = mem_array(NULL, 2 * peers * s->k.n + 1, sizeof *w->xfer);
    w->holds = -1;
    return w->xfer && (w->data || !s->o.data) && (w->grad || !s->o.grad)
               ? NULL
               : ERR(NO_MEMORY, "a window of %zu bytes for parameters or gradients", bytes);
}

static status *open_all(struct shards *s, const struct comm *dp)
{
    TRY(buckets_open(s->p, s->o.bucket_elems, true, dp->size, s->o.shards, dp->rank, &s->k));
    for (int u = 0; u < s->k.units; u++) {
        struct window *w = window_of(s, u);
        w->elems = s->k.unit_elems[u] > w->elems ? s->k.unit_elems[u] : w->elems;
    }
    for (int w = 0; w < WINDOWS; w++)
        TRY(open_window(s, &s->window[w]));
    s->own = s->o.data ? mem_block(s->k.own_elems * sizeof(float), 4096) : NULL;
    return s->own || !s->o.data ? NULL
                                : ERR(NO_MEMORY, "%llu parameters of a shard", (unsigned long long)s->k.own_elems);
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
        mem_block_free(w->grad, w->elems * sizeof(float));
        mem_free(w->xfer);
    }
    mem_block_free(s->own, s->k.own_elems * sizeof(float));
    comm_close(s->comm);
    buckets_fini(&s->k);
    mem_free(s);
}

const struct buckets *shards_buckets(const struct shards *s)
{
    return &s->k;
}

struct comm *shards_comm(const struct shards *s)
{
    return s->comm;
}

float *shards_own(const struct shards *s)
{
    return s->own;
}

float *shards_grad(const struct shards *s, uint64_t b)
{
    int unit = s->k.b[b].unit;
    return s->window[unit ? 1 + (unit - 1) % 2 : 0].grad + s->k.b[b].at;
}

uint64_t shards_window_bytes(const struct shards *s)
{
    uint64_t n = 0;
    for (int w = 0; w < WINDOWS; w++)
        n += s->window[w].elems * sizeof(float);
    return n * (uint64_t)(s->o.data + s->o.grad);
}

void shards_collect(struct shards *s, status *(*collect)(void *arg, int unit), void *arg)
{
    s->collect = collect;
    s->arg = arg;
}

/* ---- parameters ---- */

/* Bucket b of all shards into `to`, where its first element is; this shard's run is copied now. */
static size_t gather_messages(struct shards *s, uint64_t b, float *to, struct comm_xfer *x)
{
    const struct bucket *k = &s->k.b[b];
    struct zero_run mine = bucket_run(&s->k, b, s->k.shard);
    size_t n = 0;
    memcpy(to + (mine.begin - k->begin), s->own + k->own, run_elems(mine) * sizeof(float));
    for (int r = 0; r < s->k.shards; r++) {
        struct zero_run theirs = bucket_run(&s->k, b, r);
        if (r == s->k.shard)
            continue;
        x[n++] = (struct comm_xfer){ r, 0, true, s->own + k->own, run_elems(mine) * sizeof(float) };
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
    for (uint64_t b = 0; b < s->k.n; b++)
        if (s->k.b[b].unit == unit)
            n += gather_messages(s, b, w->data + s->k.b[b].at, w->xfer + n);
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
        memset(w->grad, 0, w->elems * sizeof(float));
}

static status *enter(void *arg, int64_t block, bool backward)
{
    struct shards *s = arg;
    int unit = (int)block + 1, next = backward ? unit - 1 : unit + 1;
    TRY(gather(s, unit));
    if (backward)
        clear_grad(window_of(s, unit));
    return next > 0 && next < s->k.units ? start_gather(s, next) : NULL;
}

static status *leave(void *arg, int64_t block, bool backward)
{
    struct shards *s = arg;
    return backward && s->o.grad && s->collect ? s->collect(s->arg, (int)block + 1) : NULL;
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

status *shards_end(struct shards *s)
{
    return s->o.grad && s->collect ? s->collect(s->arg, 0) : NULL;
}

status *shards_idle(struct shards *s, bool training)
{
    int blocks = s->k.units - 1;
    TRY(shards_begin(s, training));
    for (int i = 0; i < blocks; i++) {
        TRY(enter(s, i, false));
        TRY(leave(s, i, false));
    }
    for (int i = blocks; training && i-- > 0;) {
        TRY(enter(s, i, true));
        TRY(leave(s, i, true));
    }
    return training ? shards_end(s) : NULL;
}

/* ---- all at once, or one after another ---- */

/* What this shard keeps of bucket b, from a place where the bucket is whole. */
static void keep_own(struct shards *s, uint64_t b, const float *from)
{
    struct zero_run mine = bucket_run(&s->k, b, s->k.shard);
    memcpy(s->own + s->k.b[b].own, from + (mine.begin - s->k.b[b].begin), run_elems(mine) * sizeof(float));
}

void shards_init(struct shards *s, uint64_t seed)
{
    for (int unit = 0; unit < s->k.units; unit++) {
        struct window *w = window_of(s, unit);
        memset(w->data, 0, w->elems * sizeof(float)); /* paddings */
        for (int i = 0; i < s->p->count; i++)
            if (s->p->p[i].alias < 0 && s->p->p[i].block + 1 == unit)
                param_init(&s->p->p[i], seed);
        for (uint64_t b = 0; b < s->k.n; b++)
            if (s->k.b[b].unit == unit)
                keep_own(s, b, w->data + s->k.b[b].at);
    }
    shards_changed(s);
}

static status *gather_bucket(struct shards *s, uint64_t b, float *to)
{
    struct comm_xfer *x = s->window[0].xfer;
    return comm_exchange(s->comm, x, gather_messages(s, b, to, x), NULL);
}

status *shards_crc(struct shards *s, uint32_t *crc)
{
    *crc = 0;
    for (int w = 0; w < WINDOWS; w++)
        TRY(finish_gather(&s->window[w]));
    shards_changed(s); /* the windows' contents are overwritten */
    for (uint64_t b = 0; b < s->k.n; b++) {
        const struct bucket *k = &s->k.b[b];
        float *to = window_of(s, k->unit)->data + k->at;
        TRY(gather_bucket(s, b, to));
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
    s->held = mem_block(s->p->total * sizeof(float), 4096);
    TRY(comm_agree(s->comm, s->held ? NULL
                                    : ERR(NO_MEMORY, "%llu bytes for all parameters at once",
                                          (unsigned long long)(s->p->total * sizeof(float)))));
    for (uint64_t b = 0; b < s->k.n; b++)
        TRY(gather_bucket(s, b, s->held + s->k.b[b].begin));
    point(s, false); /* those of a tied weight may lie elsewhere (tied.h) */
    return NULL;
}

void shards_release(struct shards *s, bool keep)
{
    if (!s->held)
        return;
    for (uint64_t b = 0; keep && b < s->k.n; b++)
        keep_own(s, b, s->held + s->k.b[b].begin);
    mem_block_free(s->held, s->p->total * sizeof(float));
    s->held = NULL;
    point(s, false);
    if (keep)
        shards_changed(s);
}
