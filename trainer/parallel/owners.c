/* owners: see owners.h. Every rank walks the same list (matrix by matrix, rank by rank, run by run), so messages of a
 * pair are in the same order on both sides. A matrix at its owner is first in parts, as the tensor-parallel ranks hold
 * them, one after another, each row-major. */
#include "trainer/parallel/owners.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <string.h>

/* A run of this rank, and where its momentum, gradients and weights begin. */
struct held {
    struct zero_run run;
    float *m, *g, *w;
};

struct owners {
    struct params *p;
    struct zero *z;
    struct comm *dp, *all;
    struct workers *workers;
    int tp, tp_rank, shards; /* shards: of a replica; stage 0: 1, everybody has all */
    int *owner, *turn;       /* [params.count] a rank of all, or -1: not Muon's; in which round it is this one's */
    int turns;
    struct box *box;      /* [tp][params.count] */
    struct zero_run *run; /* [dp][runs]; empty ones at the end */
    uint64_t runs;
    struct held *held; /* [own runs] */
    uint64_t own_runs;
    struct comm_xfer *xfer;
    float *parts, *whole, *room; /* whole: NULL where there is one part */
    uint64_t room_bytes;
};

/* Multiplications of a step of Newton and Schulz, but for a factor. */
static uint64_t work_of(const struct param *p)
{
    uint64_t m = p->shape.dim[0], k = p->shape.dim[1], less = m < k ? m : k;
    return less * less * (m + k);
}

static void choose_owners(struct owners *o, uint64_t *load, int *count)
{
    for (int i = 0; i < o->p->count; i++)
        o->owner[i] = -1;
    for (;;) {
        int next = -1, least = 0;
        for (int i = 0; i < o->p->count; i++) {
            const struct param *p = &o->p->p[i];
            if (p->muon && !p->away && o->owner[i] < 0 && (next < 0 || work_of(p) > work_of(&o->p->p[next])))
                next = i;
        }
        if (next < 0)
            return;
        for (int r = 1; r < o->all->size; r++)
            least = load[r] < load[least] ? r : least;
        o->owner[next] = least;
        o->turn[next] = count[least]++;
        o->turns = count[least] > o->turns ? count[least] : o->turns;
        load[least] += work_of(&o->p->p[next]);
    }
}

/* What of a run is p's part. */
static struct zero_run meet(struct zero_run r, const struct param *p)
{
    uint64_t begin = p->offset, end = begin + param_elems(p);
    r.begin = r.begin > begin ? r.begin : begin;
    r.end = r.end < end ? r.end : end;
    return r.begin < r.end ? r : (struct zero_run){ 0, 0 };
}

/* Where this rank's gradients of a part of its runs are. */
static float *grad_at(const struct owners *o, struct zero_run part)
{
    for (uint64_t k = 0; k < o->own_runs; k++)
        if (part.begin >= o->held[k].run.begin && part.end <= o->held[k].run.end)
            return o->held[k].g + (part.begin - o->held[k].run.begin);
    CHECK(false, "a part of a matrix is not held here");
}

/* ---- messages ---- */

/* Does the rank of dp and tp give its runs of matrix i to the owner, or get them back? */
static bool takes_part(const struct owners *o, int i, int dp, int tp, bool back)
{
    return back || (dp / o->shards == o->owner[i] / o->tp / o->shards && tp % o->p->p[i].share == 0);
}

/* Messages of matrix i to its owner, or back, with x NULL counted; what the owner itself holds is copied. */
static size_t messages_of(const struct owners *o, int i, bool back, struct comm_xfer *x)
{
    const struct param *p = &o->p->p[i];
    int me = o->all->rank, owner = o->owner[i];
    size_t n = 0;
    for (int r = 0; r < o->all->size; r++) {
        int dp = r / o->tp, tp = r % o->tp;
        if ((owner != me && r != me) || !takes_part(o, i, dp, tp, back))
            continue;
        for (uint64_t k = 0; k < o->runs; k++) {
            struct zero_run part = meet(o->run[(uint64_t)dp * o->runs + k], p);
            size_t bytes = run_elems(part) * sizeof(float);
            if (!bytes)
                continue;
            n++;
            if (!x)
                continue;
            float *here = r == me ? grad_at(o, part) : NULL, *at_owner = NULL;
            if (owner == me)
                at_owner = o->parts + (uint64_t)(tp / p->share) * param_elems(p) + (part.begin - p->offset);
            if (r == owner)
                memcpy(back ? here : at_owner, back ? at_owner : here, bytes), n--;
            else
                x[n - 1] = (struct comm_xfer){ owner == me ? r : owner, 0, (owner == me) == back,
                                               owner == me ? at_owner : here, bytes };
        }
    }
    return n;
}

/* Of all matrices of a turn. */
static size_t messages(const struct owners *o, int turn, bool back, struct comm_xfer *x)
{
    size_t n = 0;
    for (int i = 0; i < o->p->count; i++)
        if (o->owner[i] >= 0 && o->turn[i] == turn)
            n += messages_of(o, i, back, x ? x + n : NULL);
    return n;
}

/* ---- open ---- */

static status *gather_runs(struct owners *o, const struct zero_moments *z)
{
    uint64_t most = z->run_count;
    TRY(comm_allreduce(o->dp, &most, 1, COMM_U64, COMM_MAX, NULL));
    o->runs = most;
    o->run = mem_calloc((size_t)o->dp->size * most + 1, sizeof *o->run);
    TRY(comm_agree(o->dp, o->run ? NULL : ERR(NO_MEMORY, "runs of %d ranks", o->dp->size)));
    struct zero_run *mine = o->run + (uint64_t)o->dp->rank * most;
    memcpy(mine, z->run, z->run_count * sizeof *mine);
    return comm_allgather(o->dp, mine, o->run, most * sizeof *mine, NULL);
}

/* The parts of the tensor-parallel ranks. */
static status *gather_boxes(struct owners *o, struct comm *tp)
{
    size_t n = (size_t)o->p->count;
    o->box = mem_calloc((size_t)o->tp * n + 1, sizeof *o->box);
    status *st = o->box ? NULL : ERR(NO_MEMORY, "parts of %d ranks", o->tp);
    for (size_t i = 0; !st && i < n; i++)
        o->box[(size_t)o->tp_rank * n + i] = o->p->p[i].box;
    if (!tp)
        return st;
    TRY(comm_agree(tp, st));
    return comm_allgather(tp, o->box + (size_t)o->tp_rank * n, o->box, n * sizeof *o->box, NULL);
}

static status *list_held(struct owners *o, const struct zero_moments *z)
{
    o->held = mem_calloc(z->run_count + 1, sizeof *o->held);
    if (!o->held)
        return ERR(NO_MEMORY, "%llu runs", (unsigned long long)z->run_count);
    for (uint64_t k = 0, at = 0; k < z->run_count; at += run_elems(z->run[k]), k++)
        o->held[o->own_runs++] = (struct held){ .run = z->run[k],
                                                .m = z->m + at,
                                                .g = zero_sums(o->z, z->run[k], at),
                                                .w = z->w ? z->w + at : o->p->data + z->run[k].begin };
    return NULL;
}

static status *take_memory(struct owners *o)
{
    size_t room = 0, matrix = 0, most = 0;
    uint64_t *load = mem_calloc((size_t)o->all->size, sizeof *load);
    int *count = mem_calloc((size_t)o->all->size, sizeof *count);
    o->owner = mem_calloc((size_t)o->p->count + 1, sizeof *o->owner);
    o->turn = mem_calloc((size_t)o->p->count + 1, sizeof *o->turn);
    bool any = load && count && o->owner && o->turn;
    if (any)
        choose_owners(o, load, count);
    mem_free(load);
    mem_free(count);
    for (int i = 0; any && i < o->p->count; i++) {
        const struct shape *s = &o->p->p[i].shape;
        if (o->owner[i] != o->all->rank)
            continue;
        room = muon_room(s->dim[0], s->dim[1]) > room ? muon_room(s->dim[0], s->dim[1]) : room;
        matrix = s->dim[0] * s->dim[1] > matrix ? s->dim[0] * s->dim[1] : matrix;
    }
    for (int turn = 0; any && turn < o->turns; turn++)
        for (int back = 0; back < 2; back++) {
            size_t n = messages(o, turn, back, NULL);
            most = n > most ? n : most;
        }
    o->room = mem_array(NULL, room + 2, sizeof *o->room);
    o->parts = mem_array(NULL, matrix + 1, sizeof *o->parts);
    o->whole = o->tp > 1 ? mem_array(NULL, matrix + 1, sizeof *o->whole) : NULL;
    o->xfer = any ? mem_array(NULL, most + 1, sizeof *o->xfer) : NULL;
    o->room_bytes = (room + (o->tp > 1 ? 2 : 1) * matrix) * sizeof(float);
    return o->room && o->parts && o->xfer && (o->whole || o->tp == 1)
               ? NULL
               : ERR(NO_MEMORY, "Muon's matrices: %zu floats", room);
}

status *owners_open(struct params *p, struct zero *z, struct comm *dp, struct comm *tp, struct comm *all,
                    struct workers *w, struct owners **out)
{
    struct zero_moments m = zero_moments(z);
    struct owners *o = mem_calloc(1, sizeof *o);
    TRY(comm_agree(all, o ? NULL : ERR(NO_MEMORY, "Muon")));
    *o = (struct owners){ .p = p, .z = z, .dp = dp, .all = all, .workers = w, .tp = tp ? tp->size : 1 };
    o->tp_rank = tp ? tp->rank : 0;
    o->shards = zero_holders(z);
    status *st = gather_runs(o, &m);
    if (!st)
        st = gather_boxes(o, tp);
    if (!st)
        st = list_held(o, &m);
    if (!st)
        st = take_memory(o);
    st = comm_agree(all, st);
    if (st) {
        owners_close(o);
        return st;
    }
    *out = o;
    return NULL;
}

void owners_close(struct owners *o)
{
    if (!o)
        return;
    mem_free(o->owner);
    mem_free(o->turn);
    mem_free(o->box);
    mem_free(o->run);
    mem_free(o->held);
    mem_free(o->xfer);
    mem_free(o->parts);
    mem_free(o->whole);
    mem_free(o->room);
    mem_free(o);
}

uint64_t owners_bytes(const struct owners *o)
{
    return o ? o->room_bytes : 0;
}

/* ---- the step ---- */

/* Between the parts and the whole of matrix i. */
static void put_together(struct owners *o, int i, bool apart)
{
    const struct param *p = &o->p->p[i];
    for (int t = 0; t < o->tp; t += p->share) {
        const struct box *b = &o->box[t * o->p->count + i];
        float *part = o->parts + (uint64_t)(t / p->share) * param_elems(p);
        for (uint64_t row = 0; row < b->len[0]; row++) {
            float *to = o->whole + (b->off[0] + row) * p->shape.dim[1] + b->off[1], *from = part + row * b->len[1];
            memcpy(apart ? from : to, apart ? to : from, b->len[1] * sizeof *to);
        }
    }
}

static void orthogonalise(struct owners *o, int i)
{
    const struct param *p = &o->p->p[i];
    bool cut = p->share < o->tp;
    if (cut)
        put_together(o, i, false);
    muon_orthogonalise(o->workers, cut ? o->whole : o->parts, p->shape.dim[0], p->shape.dim[1], o->room);
    if (cut)
        put_together(o, i, true);
}

typedef status *fence_fn(void *arg, const void *addr, size_t bytes);

/* What of a matrix is overwritten: weights (where they are whole, all of it, by the gathers that follow) and momentum.
 */
static status *announce(const struct owners *o, const struct param *p, fence_fn *fence, void *arg)
{
    bool whole = !zero_moments(o->z).w;
    if (whole)
        TRY(fence(arg, o->p->data + p->offset, param_elems(p) * sizeof(float)));
    for (uint64_t k = 0; k < o->own_runs; k++) {
        struct zero_run part = meet(o->held[k].run, p);
        uint64_t at = part.begin - o->held[k].run.begin;
        if (run_elems(part) && !whole)
            TRY(fence(arg, o->held[k].w + at, run_elems(part) * sizeof(float)));
        if (run_elems(part))
            TRY(fence(arg, o->held[k].m + at, run_elems(part) * sizeof(float)));
    }
    return NULL;
}

/* Each part of this rank's runs that is Muon's: its momentum, or its weights. */
static void own_parts(struct owners *o, const struct param *p, const struct muon *muon, bool apply)
{
    for (uint64_t k = 0; k < o->own_runs; k++) {
        const struct held *h = &o->held[k];
        struct zero_run part = meet(h->run, p);
        uint64_t at = part.begin - h->run.begin, n = run_elems(part);
        if (n && apply)
            muon_apply(muon, h->w + at, h->g + at, n, p->shape.dim[0], p->shape.dim[1]);
        else if (n)
            muon_momentum(muon, h->g + at, h->m + at, n);
    }
}

status *owners_step(struct owners *o, const struct muon *muon, fence_fn *fence, void *arg)
{
    TRY(zero_spread_sums(o->z));
    status *failed =
        fence ? fence(arg, zero_moments(o->z).m, 0) : NULL; /* every rank: the first call may be collective */
    for (int i = 0; !failed && i < o->p->count; i++) {
        if (o->owner[i] < 0)
            continue;
        failed = fence ? announce(o, &o->p->p[i], fence, arg) : NULL;
        if (!failed)
            own_parts(o, &o->p->p[i], muon, false);
    }
    for (int turn = 0; turn < o->turns; turn++) {
        TRY(comm_exchange(o->all, o->xfer, messages(o, turn, false, o->xfer), NULL));
        for (int i = 0; i < o->p->count; i++)
            if (o->owner[i] == o->all->rank && o->turn[i] == turn)
                orthogonalise(o, i);
        TRY(comm_exchange(o->all, o->xfer, messages(o, turn, true, o->xfer), NULL));
    }
    for (int i = 0; !failed && i < o->p->count; i++)
        if (o->owner[i] >= 0)
            own_parts(o, &o->p->p[i], muon, true);
    return failed;
}
