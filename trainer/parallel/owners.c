/* owners: see owners.h. Every rank walks the same list (matrix by matrix, rank by rank, run by run), so messages of a
 * pair are in the same order on both sides. A matrix at its owner is first in parts, as the tensor-parallel ranks hold
 * them, one after another, each row-major. Of a tensor of experts every expert's matrix is one of the list. */
#include "trainer/parallel/owners.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/flat.h"
#include "trainer/ops/kernels.h"

#include <stdlib.h>
#include <string.h>

/* A run of this rank, and where its momentum, gradients and weights begin. */
struct held {
    struct zero_run run;
    float *m, *g, *w;
};

/* One of the list: rows x cols elements, of which this rank's part is [begin, end) of the flat block. */
struct matrix {
    int param, owner, turn; /* owner: a rank of all; turn: in which round it is this one's */
    uint64_t rows, cols, begin, end;
};

struct owners {
    struct params *p;
    struct zero *z;
    struct comm *dp, *all;
    struct workers *workers;
    int tp, tp_rank, shards;        /* shards: of a replica; stage 0: 1, everybody has all */
    struct matrix *matrix, **round; /* in order of the block; of turns, turn t's from round_begin[t] on */
    int matrices, turns, *round_begin;
    struct box *box;      /* [tp][params.count] */
    struct zero_run *run; /* [dp][runs]; empty ones at the end */
    uint64_t runs;
    struct held *held; /* [own runs] */
    struct comm_xfer *xfer;
    float *parts, *whole, *room;       /* whole: NULL where there is one part */
    uint64_t matrix_elems, room_elems; /* of parts and whole, of room */
};

static struct compute *where(const struct owners *o)
{
    return o->p->compute;
}

/* Multiplications of a step of Newton and Schulz, but for a factor. */
static uint64_t work_of(const struct matrix *m)
{
    uint64_t less = m->rows < m->cols ? m->rows : m->cols;
    return less * less * (m->rows + m->cols);
}

/* Matrices of a tensor of this rank, and the first of its two dimensions. */
static uint64_t matrices_of(const struct param *p, int *dim)
{
    *dim = p->shape.ndim - 2;
    return !p->muon || p->away ? 0 : *dim ? p->box.len[0] : 1;
}

static status *list_matrices(struct owners *o)
{
    uint64_t n = 0;
    int dim;
    for (int i = 0; i < o->p->count; i++)
        n += matrices_of(&o->p->p[i], &dim);
    o->matrix = mem_calloc(n + 1, sizeof *o->matrix);
    if (!o->matrix)
        return ERR(NO_MEMORY, "a list of %llu matrices", (unsigned long long)n);
    for (int i = 0; i < o->p->count; i++) {
        const struct param *p = &o->p->p[i];
        uint64_t each = matrices_of(p, &dim), elems = each ? param_elems(p) / each : 0;
        for (uint64_t e = 0; e < each; e++)
            o->matrix[o->matrices++] = (struct matrix){ .param = i,
                                                        .owner = -1,
                                                        .rows = p->shape.dim[dim],
                                                        .cols = p->shape.dim[dim + 1],
                                                        .begin = p->offset + e * elems,
                                                        .end = p->offset + (e + 1) * elems };
    }
    return NULL;
}

static int heavier_first(const void *a, const void *b)
{
    const struct matrix *const *x = a, *const *y = b;
    uint64_t one = work_of(*x), other = work_of(*y);
    return one != other ? (one < other ? 1 : -1) : *x < *y ? -1 : 1;
}

static int earlier_first(const void *a, const void *b)
{
    const struct matrix *const *x = a, *const *y = b;
    return (*x)->turn != (*y)->turn ? ((*x)->turn < (*y)->turn ? -1 : 1) : *x < *y ? -1 : 1;
}

/* load, count: [all], zero. */
static void choose_owners(struct owners *o, uint64_t *load, int *count)
{
    struct matrix **by = o->round;
    for (int i = 0; i < o->matrices; i++)
        by[i] = &o->matrix[i];
    qsort(by, (size_t)o->matrices, sizeof(struct matrix *), heavier_first);
    for (int i = 0; i < o->matrices; i++) {
        int least = 0;
        for (int r = 1; r < o->all->size; r++)
            least = load[r] < load[least] ? r : least;
        by[i]->owner = least;
        by[i]->turn = count[least]++;
        o->turns = count[least] > o->turns ? count[least] : o->turns;
        load[least] += work_of(by[i]);
    }
    qsort(by, (size_t)o->matrices, sizeof(struct matrix *), earlier_first);
    for (int i = 0, turn = -1; i < o->matrices; i++)
        while (turn < by[i]->turn)
            o->round_begin[++turn] = i;
    o->round_begin[o->turns] = o->matrices;
}

/* What of a run is this rank's part of a matrix. */
static struct zero_run meet(struct zero_run r, const struct matrix *m)
{
    r.begin = r.begin > m->begin ? r.begin : m->begin;
    r.end = r.end < m->end ? r.end : m->end;
    return r.begin < r.end ? r : (struct zero_run){ 0, 0 };
}

/* Of a rank of dp, the first run that ends behind m's beginning; *end: its runs up to m's end. */
static uint64_t runs_of(const struct owners *o, int dp, const struct matrix *m, uint64_t *end)
{
    const struct zero_run *run = o->run + (uint64_t)dp * o->runs;
    uint64_t low = 0, high = o->runs;
    while (low < high) {
        uint64_t k = low + (high - low) / 2;
        if (run_elems(run[k]) && run[k].end <= m->begin)
            low = k + 1;
        else
            high = k;
    }
    for (*end = low; *end < o->runs && run_elems(run[*end]) && run[*end].begin < m->end;)
        ++*end;
    return low;
}

/* Where this rank's gradients of a part of its run are. */
static float *grad_at(const struct held *h, struct zero_run part)
{
    CHECK(part.begin >= h->run.begin && part.end <= h->run.end, "a part of a matrix is not held here");
    return h->g + (part.begin - h->run.begin);
}

/* ---- messages ---- */

/* Does the rank of dp and tp give its runs of a matrix to the owner, or get them back? */
static bool takes_part(const struct owners *o, const struct matrix *m, int dp, int tp, bool back)
{
    return back || (dp / o->shards == m->owner / o->tp / o->shards && tp % o->p->p[m->param].share == 0);
}

/* Messages of a matrix to its owner, or back, with x NULL counted; what the owner itself holds is copied. */
static size_t messages_of(const struct owners *o, const struct matrix *m, bool back, struct comm_xfer *x)
{
    const struct param *p = &o->p->p[m->param];
    int me = o->all->rank, owner = m->owner;
    size_t n = 0;
    for (int r = 0; r < o->all->size; r++) {
        int dp = r / o->tp, tp = r % o->tp;
        if ((owner != me && r != me) || !takes_part(o, m, dp, tp, back))
            continue;
        uint64_t end;
        for (uint64_t k = runs_of(o, dp, m, &end); k < end; k++) {
            struct zero_run part = meet(o->run[(uint64_t)dp * o->runs + k], m);
            size_t bytes = run_elems(part) * sizeof(float);
            if (!bytes)
                continue;
            n++;
            if (!x)
                continue;
            float *here = r == me ? grad_at(&o->held[k], part) : NULL, *at_owner = NULL;
            if (owner == me)
                at_owner = o->parts + (uint64_t)(tp / p->share) * (m->end - m->begin) + (part.begin - m->begin);
            if (r == owner)
                flat_copy(where(o), back ? here : at_owner, back ? at_owner : here, run_elems(part)), n--;
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
    for (int i = o->round_begin[turn]; i < o->round_begin[turn + 1]; i++)
        n += messages_of(o, o->round[i], back, x ? x + n : NULL);
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
        o->held[k] = (struct held){ .run = z->run[k],
                                    .m = z->m + at,
                                    .g = zero_sums(o->z, z->run[k], at),
                                    .w = z->w ? z->w + at : o->p->data + z->run[k].begin };
    return NULL;
}

static status *deal(struct owners *o)
{
    uint64_t *load = mem_calloc((size_t)o->all->size, sizeof *load);
    int *count = mem_calloc((size_t)o->all->size, sizeof *count);
    o->round = mem_array(NULL, (size_t)o->matrices + 1, sizeof(struct matrix *));
    o->round_begin = mem_calloc((size_t)o->matrices + 1, sizeof *o->round_begin);
    status *st = load && count && o->round && o->round_begin ? NULL : ERR(NO_MEMORY, "%d matrices", o->matrices);
    if (!st)
        choose_owners(o, load, count);
    mem_free(load);
    mem_free(count);
    return st;
}

static status *take_memory(struct owners *o)
{
    size_t room = 0, matrix = 0, most = 0;
    for (int i = 0; i < o->matrices; i++) {
        const struct matrix *m = &o->matrix[i];
        if (m->owner != o->all->rank)
            continue;
        room = muon_room(m->rows, m->cols) > room ? muon_room(m->rows, m->cols) : room;
        matrix = m->rows * m->cols > matrix ? m->rows * m->cols : matrix;
    }
    for (int turn = 0; turn < o->turns; turn++)
        for (int back = 0; back < 2; back++) {
            size_t n = messages(o, turn, back, NULL);
            most = n > most ? n : most;
        }
    o->room_elems = room + 2;
    o->matrix_elems = matrix + 1;
    TRY(flat_alloc(where(o), o->room_elems, "Muon's matrices", &o->room));
    TRY(flat_alloc(where(o), o->matrix_elems, "Muon's matrices", &o->parts));
    if (o->tp > 1)
        TRY(flat_alloc(where(o), o->matrix_elems, "Muon's matrices", &o->whole));
    o->xfer = mem_array(NULL, most + 1, sizeof *o->xfer);
    return o->xfer ? NULL : ERR(NO_MEMORY, "%zu messages of Muon's matrices", most);
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
        st = list_matrices(o);
    if (!st)
        st = deal(o);
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
    mem_free(o->matrix);
    mem_free(o->round);
    mem_free(o->round_begin);
    mem_free(o->box);
    mem_free(o->run);
    mem_free(o->held);
    mem_free(o->xfer);
    flat_free(where(o), o->parts, o->matrix_elems);
    flat_free(where(o), o->whole, o->matrix_elems);
    flat_free(where(o), o->room, o->room_elems);
    mem_free(o);
}

uint64_t owners_bytes(const struct owners *o)
{
    return o ? (o->room_elems + (o->tp > 1 ? 2 : 1) * o->matrix_elems) * sizeof(float) : 0;
}

/* ---- the step ---- */

/* Between the parts and the whole of a matrix. */
static void put_together(struct owners *o, const struct matrix *m, bool apart)
{
    const struct param *p = &o->p->p[m->param];
    int dim = p->shape.ndim - 2;
    for (int t = 0; t < o->tp; t += p->share) {
        const struct box *b = &o->box[t * o->p->count + m->param];
        int64_t rows = (int64_t)b->len[dim], cols = (int64_t)b->len[dim + 1], all = (int64_t)m->cols;
        float *part = o->parts + (uint64_t)(t / p->share) * (m->end - m->begin),
              *whole = o->whole + b->off[dim] * m->cols + b->off[dim + 1];
        compute_kernels(where(o))->copy_rows(compute_workers(where(o), o->workers), apart ? part : whole,
                                             apart ? cols : all, apart ? whole : part, apart ? all : cols, rows, cols,
                                             false);
    }
}

static status *orthogonalise(struct owners *o, const struct matrix *m)
{
    bool cut = o->p->p[m->param].share < o->tp;
    if (cut)
        put_together(o, m, false);
    TRY(muon_orthogonalise(where(o), o->workers, cut ? o->whole : o->parts, m->rows, m->cols, o->room));
    if (cut)
        put_together(o, m, true);
    return NULL;
}

typedef status *fence_fn(void *arg, const void *addr, size_t bytes);

/* What of a matrix is overwritten: weights (where they are whole, all of it, by the gathers that follow) and momentum.
 */
static status *announce(const struct owners *o, const struct matrix *m, fence_fn *fence, void *arg)
{
    bool whole = !zero_moments(o->z).w;
    if (whole)
        TRY(fence(arg, o->p->data + m->begin, (m->end - m->begin) * sizeof(float)));
    uint64_t end;
    for (uint64_t k = runs_of(o, o->dp->rank, m, &end); k < end; k++) {
        struct zero_run part = meet(o->held[k].run, m);
        uint64_t at = part.begin - o->held[k].run.begin;
        if (run_elems(part) && !whole)
            TRY(fence(arg, o->held[k].w + at, run_elems(part) * sizeof(float)));
        if (run_elems(part))
            TRY(fence(arg, o->held[k].m + at, run_elems(part) * sizeof(float)));
    }
    return NULL;
}

/* Each part of this rank's runs that is Muon's: its momentum, or its weights. */
static void own_parts(struct owners *o, const struct matrix *m, const struct muon *muon, bool apply)
{
    uint64_t end;
    for (uint64_t k = runs_of(o, o->dp->rank, m, &end); k < end; k++) {
        const struct held *h = &o->held[k];
        struct zero_run part = meet(h->run, m);
        uint64_t at = part.begin - h->run.begin, n = run_elems(part);
        if (n && apply)
            muon_apply(muon, where(o), h->w + at, h->g + at, n, m->rows, m->cols);
        else if (n)
            muon_momentum(muon, where(o), h->g + at, h->m + at, n);
    }
}

status *owners_step(struct owners *o, const struct muon *muon, fence_fn *fence, void *arg)
{
    TRY(zero_spread_sums(o->z));
    status *failed =
        fence ? fence(arg, zero_moments(o->z).m, 0) : NULL; /* every rank: the first call may be collective */
    for (int i = 0; !failed && i < o->matrices; i++) {
        failed = fence ? announce(o, &o->matrix[i], fence, arg) : NULL;
        if (!failed)
            own_parts(o, &o->matrix[i], muon, false);
    }
    for (int turn = 0; turn < o->turns; turn++) {
        TRY(comm_exchange(o->all, o->xfer, messages(o, turn, false, o->xfer), compute_stream(where(o))));
        for (int i = o->round_begin[turn]; i < o->round_begin[turn + 1]; i++)
            if (o->round[i]->owner == o->all->rank)
                failed = status_first(failed, orthogonalise(o, o->round[i]));
        TRY(comm_exchange(o->all, o->xfer, messages(o, turn, true, o->xfer), compute_stream(where(o))));
    }
    for (int i = 0; !failed && i < o->matrices; i++)
        own_parts(o, &o->matrix[i], muon, true);
    return failed;
}
