/* owners: see owners.h. Every rank walks the same list (matrix by matrix, rank by rank, run by run), so messages of a
 * pair are in the same order on both sides. */
#include "trainer/parallel/owners.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <string.h>

struct owners {
    struct params *p;
    struct comm *dp;
    struct workers *workers;
    struct zero_moments z;
    int *owner;           /* [params.count] a rank, or -1: not Muon's */
    struct zero_run *run; /* [dp][runs]; empty ones at the end */
    uint64_t runs;
    struct comm_xfer *xfer;
    float *room;
};

/* Multiplications of a step of Newton and Schulz, but for a factor. */
static uint64_t work_of(const struct param *p)
{
    uint64_t m = p->shape.dim[0], k = p->shape.dim[1], less = m < k ? m : k;
    return less * less * (m + k);
}

static void choose_owners(struct owners *o, uint64_t *load)
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
        for (int r = 1; r < o->dp->size; r++)
            least = load[r] < load[least] ? r : least;
        o->owner[next] = least;
        load[least] += work_of(&o->p->p[next]);
    }
}

/* The part of a rank's i-th run that is p's. */
static struct zero_run part_of(const struct owners *o, const struct param *p, int rank, uint64_t i)
{
    struct zero_run r = o->run[(uint64_t)rank * o->runs + i];
    uint64_t begin = p->offset, end = begin + param_elems(p);
    r.begin = r.begin > begin ? r.begin : begin;
    r.end = r.end < end ? r.end : end;
    return r.begin < r.end ? r : (struct zero_run){ 0, 0 };
}

/* Messages to the owners, or back; with x NULL they are counted. */
static size_t messages(const struct owners *o, bool back, struct comm_xfer *x)
{
    size_t n = 0;
    int me = o->dp->rank;
    for (int i = 0; i < o->p->count; i++)
        for (int r = 0; o->owner[i] >= 0 && r < o->dp->size; r++) {
            bool mine = o->owner[i] == me;
            if (r == o->owner[i] || (!mine && r != me))
                continue;
            for (uint64_t k = 0; k < o->runs; k++) {
                struct zero_run part = part_of(o, &o->p->p[i], r, k);
                if (part.begin == part.end)
                    continue;
                if (x)
                    x[n] = (struct comm_xfer){ mine ? r : o->owner[i], 0, mine == back, o->p->grad + part.begin,
                                               (part.end - part.begin) * sizeof(float) };
                n++;
            }
        }
    return n;
}

static status *gather_runs(struct owners *o)
{
    uint64_t most = o->z.run_count;
    TRY(comm_allreduce(o->dp, &most, 1, COMM_U64, COMM_MAX, NULL));
    o->runs = most;
    o->run = mem_calloc((size_t)o->dp->size * most + 1, sizeof *o->run);
    TRY(comm_agree(o->dp, o->run ? NULL : ERR(NO_MEMORY, "runs of %d ranks", o->dp->size)));
    struct zero_run *mine = o->run + (uint64_t)o->dp->rank * most;
    memcpy(mine, o->z.run, o->z.run_count * sizeof *mine);
    return comm_allgather(o->dp, mine, o->run, most * sizeof *mine, NULL);
}

static status *take_memory(struct owners *o)
{
    size_t room = 0;
    uint64_t *load = mem_calloc((size_t)o->dp->size, sizeof *load);
    o->owner = mem_calloc((size_t)o->p->count + 1, sizeof *o->owner);
    if (load && o->owner)
        choose_owners(o, load);
    mem_free(load);
    for (int i = 0; o->owner && i < o->p->count; i++) {
        const struct shape *s = &o->p->p[i].shape;
        size_t wanted = o->owner[i] == o->dp->rank ? muon_room(s->dim[0], s->dim[1]) : 0;
        room = wanted > room ? wanted : room;
    }
    o->room = mem_array(NULL, room + 2, sizeof *o->room);
    o->xfer = o->owner ? mem_array(NULL, messages(o, false, NULL) + 1, sizeof *o->xfer) : NULL;
    return load && o->owner && o->room && o->xfer ? NULL : ERR(NO_MEMORY, "Muon's matrices: %zu floats", room);
}

status *owners_open(struct params *p, struct zero_moments z, struct comm *dp, struct workers *w, struct owners **out)
{
    struct owners *o = mem_calloc(1, sizeof *o);
    TRY(comm_agree(dp, o ? NULL : ERR(NO_MEMORY, "Muon")));
    *o = (struct owners){ .p = p, .dp = dp, .workers = w, .z = z };
    status *st = gather_runs(o);
    if (!st)
        st = comm_agree(dp, take_memory(o));
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
    mem_free(o->run);
    mem_free(o->xfer);
    mem_free(o->room);
    mem_free(o);
}

/* Each part of this rank's runs that is Muon's: its momentum, or its weights. */
static status *own_parts(struct owners *o, const struct muon *muon, bool apply,
                         status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    for (int i = 0; i < o->p->count; i++) {
        const struct param *p = &o->p->p[i];
        if (o->owner[i] < 0)
            continue;
        if (fence && !apply) /* every rank, for the same bytes: the first call may be collective */
            TRY(fence(arg, p->value.data, param_elems(p) * sizeof(float)));
        float *m = o->z.m;
        for (uint64_t k = 0; k < o->z.run_count; m += o->z.run[k].end - o->z.run[k].begin, k++) {
            struct zero_run part = part_of(o, p, o->dp->rank, k);
            size_t n = part.end - part.begin;
            float *g = o->p->grad + part.begin, *buffer = n ? m + (part.begin - o->z.run[k].begin) : NULL;
            if (n && apply) {
                muon_apply(muon, o->p->data + part.begin, g, n, p->shape.dim[0], p->shape.dim[1]);
            } else if (n) {
                if (fence)
                    TRY(fence(arg, buffer, n * sizeof *buffer));
                muon_momentum(muon, g, buffer, n);
            }
        }
    }
    return NULL;
}

status *owners_step(struct owners *o, const struct muon *muon,
                    status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    status *failed = own_parts(o, muon, false, fence, arg);
    status *st = comm_exchange(o->dp, o->xfer, messages(o, false, o->xfer), NULL);
    for (int i = 0; !st && i < o->p->count; i++)
        if (o->owner[i] == o->dp->rank)
            muon_orthogonalise(o->workers, o->p->p[i].value.grad, o->p->p[i].shape.dim[0], o->p->p[i].shape.dim[1],
                               o->room);
    if (!st)
        st = comm_exchange(o->dp, o->xfer, messages(o, true, o->xfer), NULL);
    if (!st && !failed)
        failed = own_parts(o, muon, true, NULL, NULL);
    return status_first(failed, st);
}
