/* shards: see shards.h.
 *
 * Unit u > 0 has window 1 + (u - 1) % 2. holds[w] is the unit whose parameters are in window w, or -1; flying[w]: they
 * are on their way. All shards of a replica do the same in the same order, so these agree without a message. */
#include "trainer/parallel/shards.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "trainer/ops/flat.h"
#include "trainer/ops/kernels.h"

#include <string.h>

enum { WINDOWS = 3 };

struct window {
    uint64_t elems, grad_elems; /* of values: those that train, then frozen ones */
    void *data;                 /* NULL: not cut, or resident */
    float *grad;                /* NULL: not cut */
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
    uint16_t *low;        /* [k.own_elems] of them in bf16; NULL: f32 is gathered, or they are in `resident` */
    struct zero_run *run; /* what lies in it */
    uint64_t runs;
};

struct shards {
    struct shards_options o;
    struct params *p; /* borrowed */
    struct comm *comm;
    struct kind kind[KINDS]; /* values whole: the first only */
    struct window window[WINDOWS];
    void *resident; /* [all elements], or NULL */
    void *held;     /* [all elements] between hold and release, of this dtype */
    enum dtype held_dtype;
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

/* Where windows and shards are. */
static struct compute *where(const struct shards *s)
{
    return s->p->compute;
}

static struct stream *stream_of(const struct shards *s)
{
    return compute_stream(where(s));
}

static uint64_t elems_of_all(const struct shards *s)
{
    return s->p->total + s->p->frozen;
}

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
        if (s->o.data) {
            enum dtype dtype = s->held ? s->held_dtype : s->o.dtype;
            char *whole = s->held ? s->held : s->resident;
            p->value.dtype = dtype;
            p->value.data = whole ? whole + p->offset * dtype_bytes(dtype) : (char *)w->data + at * dtype_bytes(dtype);
        }
        if (grads && !p->frozen)
            p->value.grad = w->grad + at;
        p->value.cut = p->part.total ? &p->part : NULL;
        if (!s->p->whole)
            continue;
        struct param *shown = &s->p->whole->p[i];
        shown->value.dtype = p->value.dtype;
        shown->value.data = p->value.data;
        if (grads) /* later those of a tied weight are elsewhere (tied.h) */
            shown->value.grad = p->value.grad;
        shown->value.cut = shown->part.total ? &shown->part : NULL;
    }
}

static status *open_window(struct shards *s, struct window *w)
{
    size_t bytes = w->elems * dtype_bytes(s->o.dtype), peers = (size_t)s->kind[TRAINED].k.shards - 1;
    if (s->o.data && !s->o.resident)
        TRY(status_wrap(compute_alloc(where(s), bytes, &w->data), "a window for parameters"));
    if (s->o.grad)
        TRY(flat_alloc(where(s), w->grad_elems, "a window for gradients", &w->grad));
    w->xfer = mem_array(NULL, 2 * peers * (s->kind[TRAINED].k.n + s->kind[FROZEN].k.n) + 1, sizeof *w->xfer);
    w->holds = -1;
    return w->xfer ? NULL : ERR(NO_MEMORY, "messages of a window");
}

static status *open_kind(struct shards *s, int kind, const struct comm *dp)
{
    struct kind *k = &s->kind[kind];
    TRY(buckets_open(s->p, s->o.bucket_elems, true, kind == FROZEN, dp->size, s->o.shards, dp->rank, &k->k));
    if (!s->o.data)
        return NULL;
    TRY(flat_alloc(where(s), k->k.own_elems, "parameters of a shard", &k->own));
    void *low = NULL;
    if (s->o.dtype == DTYPE_BF16 && !s->o.resident)
        TRY(status_wrap(compute_alloc(where(s), k->k.own_elems * sizeof *k->low, &low), "parameters of a shard"));
    k->low = low;
    k->run = mem_array(NULL, k->k.n + 1, sizeof *k->run);
    if (!k->run)
        return ERR(NO_MEMORY, "runs of %llu parameters of a shard", (unsigned long long)k->k.own_elems);
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
    size_t bytes = s->o.resident ? elems_of_all(s) * dtype_bytes(s->o.dtype) : 0;
    return bytes ? status_wrap(compute_alloc(where(s), bytes, &s->resident), "parameters") : NULL;
}

static status *enter(void *arg, int64_t block, bool backward);
static status *leave(void *arg, int64_t block, bool backward);

status *shards_open(const struct shards_options *o, struct params *p, struct comm *dp, struct shards **out)
{
    struct shards *s = mem_calloc(1, sizeof *s);
    status *st = s ? NULL : ERR(NO_MEMORY, "shards of parameters");
    if (s) {
        s->o = *o;
        s->o.dtype = o->dtype == DTYPE_NONE ? DTYPE_F32 : o->dtype;
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
        compute_free(where(s), w->data, w->elems * dtype_bytes(s->o.dtype));
        flat_free(where(s), w->grad, w->grad_elems);
        mem_free(w->xfer);
    }
    for (int k = 0; k < KINDS; k++) {
        flat_free(where(s), s->kind[k].own, s->kind[k].k.own_elems);
        compute_free(where(s), s->kind[k].low, s->kind[k].k.own_elems * sizeof *s->kind[k].low);
        mem_free(s->kind[k].run);
        buckets_fini(&s->kind[k].k);
    }
    compute_free(where(s), s->resident, elems_of_all(s) * dtype_bytes(s->o.dtype));
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
        n += (s->window[w].data ? s->window[w].elems * dtype_bytes(s->o.dtype) : 0) +
             (s->o.grad ? s->window[w].grad_elems * sizeof(float) : 0);
    return n;
}

uint64_t shards_value_bytes(const struct shards *s)
{
    uint64_t n = s->resident ? elems_of_all(s) * dtype_bytes(s->o.dtype) : 0;
    for (int k = 0; k < KINDS; k++)
        n += (s->kind[k].own ? s->kind[k].k.own_elems : 0) * (sizeof(float) + (s->kind[k].low ? sizeof(uint16_t) : 0));
    return n;
}

void shards_collect(struct shards *s, status *(*collect)(void *arg, int unit), void *arg)
{
    s->collect = collect;
    s->arg = arg;
}

/* ---- parameters ---- */

/* Bucket b of all shards into `to`, where its first element is, of what is gathered or (exact) of the parameters
 * themselves; this shard's run is copied now, or is there. The messages are x[*n] and on. */
static status *gather_messages(const struct shards *s, const struct kind *kind, uint64_t b, bool exact, void *to,
                               struct comm_xfer *x, size_t *n)
{
    const struct bucket *k = &kind->k.b[b];
    struct zero_run mine = bucket_run(&kind->k, b, kind->k.shard);
    bool bf16 = !exact && s->o.dtype == DTYPE_BF16;
    size_t each = bf16 ? sizeof *kind->low : sizeof *kind->own, bytes = run_elems(mine) * each;
    char *all = to, *place = all + (mine.begin - k->begin) * each;
    if (kind->low && bf16)
        TRY(compute_copy(where(s), place, kind->low + k->own, bytes));
    else if (!bf16)
        TRY(compute_copy(where(s), place, kind->own + k->own, bytes));
    for (int r = 0; r < kind->k.shards; r++) {
        struct zero_run theirs = bucket_run(&kind->k, b, r);
        if (r == kind->k.shard)
            continue;
        x[(*n)++] = (struct comm_xfer){ r, 0, true, place, bytes };
        x[(*n)++] = (struct comm_xfer){ r, 0, false, all + (theirs.begin - k->begin) * each, run_elems(theirs) * each };
    }
    return NULL;
}

/* Where bucket b begins in its unit's window. */
static char *window_place(struct shards *s, int kind, uint64_t b)
{
    char *data = window_of(s, s->kind[kind].k.b[b].unit)->data;
    return data + place_of_bucket(s, kind, b) * dtype_bytes(s->o.dtype);
}

static status *start_gather(struct shards *s, int unit)
{
    struct window *w = window_of(s, unit);
    size_t n = 0;
    if (!s->o.data || s->held || s->resident || w->holds == unit)
        return NULL;
    CHECK(!w->flying, "unit %d is on its way where unit %d is wanted", w->holds, unit);
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++)
            if (s->kind[kind].k.b[b].unit == unit)
                TRY(gather_messages(s, &s->kind[kind], b, false, window_place(s, kind, b), w->xfer, &n));
    w->holds = unit;
    w->flying = true;
    return comm_iexchange(s->comm, w->xfer, n, stream_of(s), &w->req);
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

/* ---- bf16 ---- */

/* What rounds element `begin` of p's part and those behind it. */
static struct rounding rounding_of(const struct shards *s, const struct param *p, uint64_t step, uint64_t begin)
{
    struct rounding r = { .at = { s->o.seed, (uint32_t)hash64(p->name, strlen(p->name)), (uint32_t)step, RNG_ROUND },
                          .ndim = p->shape.ndim,
                          .first = begin };
    for (int i = 0; i < r.ndim; i++) {
        r.dim[i] = p->shape.dim[i];
        r.off[i] = p->box.off[i];
        r.len[i] = p->box.len[i];
    }
    return r;
}

/* Elements [begin, end) of the flat block, of parameter p; paddings stay as they are in y. */
static void round_stochastically(const struct shards *s, const struct param *p, uint64_t step, uint64_t begin,
                                 uint64_t end, const float *x, uint16_t *y)
{
    uint64_t held = box_volume(p->shape.ndim, &p->box);
    uint64_t e = begin - p->offset, stop = end - p->offset < held ? end - p->offset : held;
    struct rounding how = rounding_of(s, p, step, e);
    if (e < stop)
        compute_kernels(where(s))->narrow_drawn(compute_workers(where(s), NULL), y, x, (int64_t)(stop - e), &how);
}

/* The parameters of a run that train, of which x and y have the elements. */
static void round_run(const struct shards *s, struct zero_run run, uint64_t step, const float *x, uint16_t *y)
{
    for (int i = 0; i < s->p->count; i++) {
        const struct param *p = &s->p->p[i];
        uint64_t begin = p->offset, end = p->offset + param_elems(p);
        begin = begin > run.begin ? begin : run.begin;
        end = end < run.end ? end : run.end;
        if (p->alias < 0 && !p->away && !p->frozen && begin < end)
            round_stochastically(s, p, step, begin, end, x + (begin - run.begin), y + (begin - run.begin));
    }
}

static void round_kind(struct shards *s, int kind, uint64_t step)
{
    struct kind *k = &s->kind[kind];
    uint64_t at = 0;
    for (uint64_t r = 0; r < k->runs; at += run_elems(k->run[r]), r++) {
        uint16_t *y = s->resident ? (uint16_t *)s->resident + k->run[r].begin : k->low + at;
        flat_narrow(where(s), y, k->own + at, run_elems(k->run[r]));
        if (s->o.stochastic && kind == TRAINED)
            round_run(s, k->run[r], step, k->own + at, y);
    }
}

static status *gather_all(struct shards *s, bool exact, bool frozen_too, void *block);

status *shards_refresh(struct shards *s, uint64_t step, bool all)
{
    shards_changed(s);
    for (int kind = 0; kind < (all ? KINDS : 1); kind++)
        if (s->o.dtype == DTYPE_BF16)
            round_kind(s, kind, step);
    return s->resident ? gather_all(s, false, all, s->resident) : NULL;
}

/* ---- a pass ---- */

static void clear_grad(const struct shards *s, const struct window *w)
{
    if (w->grad)
        flat_zero(where(s), w->grad, w->grad_elems);
}

static status *enter(void *arg, int64_t block, bool backward)
{
    struct shards *s = arg;
    int unit = (int)block + 1, next = backward ? unit - 1 : unit + 1;
    if (is_here(s, unit))
        TRY(gather(s, unit));
    if (is_here(s, unit) && backward)
        clear_grad(s, window_of(s, unit));
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
    clear_grad(s, &s->window[0]);
}

status *shards_begin(struct shards *s, bool training)
{
    TRY(gather(s, 0));
    if (training)
        clear_grad(s, &s->window[0]);
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

/* Initial values of a unit, drawn where its window is, or in `room`, the host's. */
static status *init_unit(struct shards *s, int unit, float *room, uint64_t seed)
{
    for (int i = 0; i < s->p->count; i++) {
        const struct param *p = &s->p->p[i];
        if (p->alias < 0 && !p->away && p->block + 1 == unit)
            param_init(p, seed, room + place_of(s, p));
    }
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++) {
            const struct kind *k = &s->kind[kind];
            struct zero_run mine = bucket_run(&k->k, b, k->k.shard);
            if (k->k.b[b].unit == unit)
                TRY(compute_put(where(s), k->own + k->k.b[b].own,
                                room + place_of_bucket(s, kind, b) + (mine.begin - k->k.b[b].begin),
                                run_elems(mine) * sizeof(float)));
        }
    return NULL;
}

status *shards_init(struct shards *s, uint64_t seed)
{
    bool in_place = s->o.dtype == DTYPE_F32 && !s->resident && compute_host(where(s));
    status *st = NULL;
    uint64_t most = 1;
    for (int w = 0; w < WINDOWS; w++)
        most = s->window[w].elems > most ? s->window[w].elems : most;
    float *room = in_place ? NULL : mem_array(NULL, most, sizeof *room);
    if (!room && !in_place)
        return ERR(NO_MEMORY, "initial values of %llu elements", (unsigned long long)most);
    for (int unit = 0; unit < units(s) && !st; unit++) {
        struct window *w = window_of(s, unit);
        float *values = in_place ? w->data : room;
        memset(values, 0, w->elems * sizeof(float)); /* paddings */
        st = init_unit(s, unit, values, seed);
    }
    mem_free(room);
    shards_changed(s);
    return st;
}

static status *gather_bucket(struct shards *s, const struct kind *k, uint64_t b, bool exact, void *to)
{
    struct comm_xfer *x = s->window[0].xfer;
    size_t n = 0;
    TRY(gather_messages(s, k, b, exact, to, x, &n));
    return comm_exchange(s->comm, x, n, stream_of(s));
}

static status *finish_gathers(struct shards *s)
{
    for (int w = 0; w < WINDOWS; w++)
        TRY(finish_gather(&s->window[w]));
    return NULL;
}

/* All buckets into a block of all elements. */
static status *gather_all(struct shards *s, bool exact, bool frozen_too, void *block)
{
    for (int kind = 0; kind < (frozen_too ? KINDS : 1); kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++) {
            uint64_t at = s->kind[kind].k.b[b].begin * (exact ? sizeof(float) : dtype_bytes(s->o.dtype));
            TRY(gather_bucket(s, &s->kind[kind], b, exact, (char *)block + at));
        }
    return NULL;
}

status *shards_crc(struct shards *s, uint32_t *crc)
{
    uint64_t most = 1;
    *crc = 0;
    TRY(finish_gathers(s));
    for (int kind = 0; kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++) {
            uint64_t n = s->kind[kind].k.b[b].end - s->kind[kind].k.b[b].begin;
            most = n > most ? n : most;
        }
    float *room = NULL;
    status *st = comm_agree(s->comm, flat_alloc(where(s), most, "a bucket of parameters", &room));
    for (int kind = 0; !st && kind < KINDS; kind++)
        for (uint64_t b = 0; !st && b < s->kind[kind].k.n; b++) {
            const struct bucket *k = &s->kind[kind].k.b[b];
            st = gather_bucket(s, &s->kind[kind], b, true, room);
            if (!st)
                st = flat_crc(where(s), room, (k->end - k->begin) * sizeof *room, crc);
        }
    flat_free(where(s), room, most);
    return st;
}

status *shards_hold(struct shards *s, bool exact)
{
    if (!s->o.data || (!exact && s->resident))
        return NULL;
    TRY(finish_gathers(s));
    s->held_dtype = exact ? DTYPE_F32 : s->o.dtype;
    size_t bytes = elems_of_all(s) * dtype_bytes(s->held_dtype);
    void *block = NULL;
    TRY(comm_agree(s->comm, status_wrap(compute_alloc(where(s), bytes, &block), "all parameters at once")));
    s->held = block;
    TRY(gather_all(s, exact, true, s->held));
    point(s, false); /* those of a tied weight may lie elsewhere (tied.h) */
    return NULL;
}

void shards_release(struct shards *s, bool keep)
{
    if (!s->held)
        return;
    for (int kind = 0; keep && kind < KINDS; kind++)
        for (uint64_t b = 0; b < s->kind[kind].k.n; b++) {
            const struct kind *k = &s->kind[kind];
            struct zero_run mine = bucket_run(&k->k, b, k->k.shard);
            flat_copy(where(s), k->own + k->k.b[b].own, (const float *)s->held + mine.begin, run_elems(mine));
        }
    compute_free(where(s), s->held, elems_of_all(s) * dtype_bytes(s->held_dtype));
    s->held = NULL;
    point(s, false);
    if (keep)
        shards_changed(s);
}
