/* zero: see zero.h.
 *
 * Invariants:
 * - Everything that decides who sends what (lane of a micro-batch, owner of a run, which tree nodes are empty) is
 *   a pure function of the options, dp, K and params.total, so ranks agree on it without a message.
 * - While a lane is open its sum is in params.grad, which was zero before the lane's first micro-batch. A closed
 *   lane is a node on `stack`; closed sibling nodes are combined at once. One node at most still lies in
 *   params.grad; it is moved to a spare buffer if this rank has another micro-batch to run.
 * - A node is a value or empty (NULL); a parent is left + right if both have values, else the one that has.
 * - After zero_reduce params.grad holds the global sum in this rank's runs, and partial sums elsewhere.
 *
 * Read lanes_close (a rank's own part of the tree), then reduce_bucket (the rest of it), then zero_update. */
#include "trainer/parallel/zero.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/shared_grads.h"
#include "trainer/parallel/treesum.h"

#include <math.h>
#include <string.h>

enum {
    LANES_MAX = 64,
    STACK_MAX = 2 * 6 + 1, /* nodes of a run of LANES_MAX lanes, and the one being pushed */
    BUCKET_ELEMS = 4 << 20,
};

/* A gradient summed over the lanes of tree node (level, index). */
struct grad_node {
    unsigned level;
    uint32_t index;
    float *value; /* NULL: none of its lanes has a micro-batch */
};

struct grad_stack {
    int n;
    struct grad_node node[STACK_MAX];
};

/* An aligned node of one rank's run of lanes: what that rank sends. In order of lanes over all ranks. */
struct part {
    int rank, tag; /* tag: its number among the rank's parts */
    unsigned level;
    uint32_t begin, end; /* lanes */
};

struct zero {
    struct zero_options o;
    struct params *p; /* borrowed */
    struct comm *dp;  /* borrowed */
    uint32_t lanes;
    uint64_t bucket_elems, buckets;
    struct zero_moments moments;
    struct zero_run *run;
    uint64_t run_elems_max; /* this rank's largest run */

    struct part *part;
    int parts, own_parts;
    float *spare[STACK_MAX]; /* [params.total] each: closed nodes that had to leave params.grad */
    int spares;
    float *recv; /* [parts - own_parts][run_elems_max]: other ranks' nodes in the run being reduced */
    struct comm_xfer *xfer;

    double *norm;         /* [dp][norm_cap]: sums of squares of each rank's norm nodes */
    uint64_t norm_cap;    /* most norm nodes of a rank */
    uint64_t *cursor;     /* [dp] */
    double *tp_norm;      /* [tp]: sums of squares of each tensor-parallel rank; NULL: there is one */
    struct tree *pp_norm; /* [pp]: norm nodes of each stage, combined as far as they go; NULL: there is one */
    uint64_t first_block; /* of the norm's blocks, the number of this stage's first */
    struct shared_grads *shared;
    double *scalar; /* [dp][scalar_cap] of zero_sum_scalars */
    size_t scalar_cap;

    uint32_t k, next, end, lane; /* of the step: micro-batches, next own one, end of the own ones, first open lane */
    struct grad_stack stack;
};

/* ---- who has what: pure ---- */

static uint32_t part_of(uint64_t total, uint64_t n, uint64_t i)
{
    return (uint32_t)(total * i / n);
}

static uint32_t lane_of_rank(const struct zero *z, int rank)
{
    return part_of(z->lanes, (uint64_t)z->dp->size, (uint64_t)rank);
}

static uint32_t first_of_lane(const struct zero *z, uint32_t k, uint32_t lane)
{
    return part_of(k, z->lanes, lane);
}

static void micro_batches_of(const struct zero *z, uint32_t k, int rank, uint32_t *first, uint32_t *end)
{
    *first = first_of_lane(z, k, lane_of_rank(z, rank));
    *end = first_of_lane(z, k, lane_of_rank(z, rank + 1));
}

void zero_micro_batches(const struct zero *z, uint32_t k, uint32_t *first, uint32_t *end)
{
    micro_batches_of(z, k, z->dp->rank, first, end);
}

static bool part_empty(const struct zero *z, const struct part *t)
{
    return first_of_lane(z, z->k, t->begin) == first_of_lane(z, z->k, t->end);
}

static struct zero_run bucket_at(const struct zero *z, uint64_t bucket)
{
    uint64_t begin = bucket * z->bucket_elems, left = z->p->total - begin;
    return (struct zero_run){ begin, begin + (left < z->bucket_elems ? left : z->bucket_elems) };
}

static struct zero_run run_at(const struct zero *z, uint64_t bucket, int rank)
{
    struct zero_run all = bucket_at(z, bucket), run;
    layout_cut_aligned(all.end - all.begin, PARAM_ALIGN, (uint64_t)z->dp->size, (uint64_t)rank, &run.begin, &run.end);
    return (struct zero_run){ all.begin + run.begin, all.begin + run.end };
}

static uint64_t run_elems(struct zero_run r)
{
    return r.end - r.begin;
}

/* ---- open ---- */

static status *check_options(const struct zero_options *o, const struct params *p, const struct comm *dp)
{
    if (o->stage != 0 && o->stage != 1)
        return ERR(UNSUPPORTED, "ZeRO stage %d is not supported (this build has stages 0 and 1)", o->stage);
    bool power = o->lanes >= 1 && o->lanes <= LANES_MAX && (o->lanes & (o->lanes - 1)) == 0;
    if (o->deterministic && !power)
        return ERR(INVALID, "%d lanes: a power of two from 1 to %d is needed", o->lanes, LANES_MAX);
    if (o->deterministic && o->lanes < dp->size)
        return ERR(INVALID, "%d lanes cannot feed dp = %d ranks: use at least as many lanes as ranks", o->lanes,
                   dp->size);
    if (o->bucket_elems % PARAM_ALIGN)
        return ERR(INVALID, "buckets of %llu elements are no multiple of %d", (unsigned long long)o->bucket_elems,
                   PARAM_ALIGN);
    if ((!p->data && !o->sums_only) || !p->grad)
        return ERR(INVALID, "parameters have no %s", p->data ? "gradients" : "memory");
    return NULL;
}

static void count_runs(struct zero *z)
{
    for (int r = 0; r < z->dp->size; r++) {
        uint64_t nodes = 0;
        for (uint64_t b = 0; b < z->buckets; b++) {
            struct zero_run run = run_at(z, b, r);
            nodes += tree_node_count(z->first_block + run.begin / PARAM_ALIGN, z->first_block + run.end / PARAM_ALIGN);
            if (r == z->dp->rank && run_elems(run) > z->run_elems_max)
                z->run_elems_max = run_elems(run);
        }
        if (nodes > z->norm_cap)
            z->norm_cap = nodes;
    }
}

static status *open_moments(struct zero *z)
{
    struct zero_moments *m = &z->moments;
    if (z->o.sums_only)
        return NULL;
    z->run = mem_array(NULL, z->buckets + 1, sizeof *z->run);
    if (!z->run)
        return ERR(NO_MEMORY, "runs of %llu buckets", (unsigned long long)z->buckets);
    if (z->o.stage == 0) {
        z->run[m->run_count++] = (struct zero_run){ 0, z->p->total };
    } else {
        for (uint64_t b = 0; b < z->buckets; b++) {
            struct zero_run run = run_at(z, b, z->dp->rank);
            if (run_elems(run))
                z->run[m->run_count++] = run;
        }
    }
    for (uint64_t i = 0; i < m->run_count; i++)
        m->elems += run_elems(z->run[i]);
    m->run = z->run;
    m->m = mem_block(m->elems * sizeof(float), 4096);
    m->v = mem_block(m->elems * sizeof(float), 4096);
    return m->m && m->v ? NULL : ERR(NO_MEMORY, "AdamW's moments of %llu elements", (unsigned long long)m->elems);
}

/* Cut every rank's lanes into aligned nodes. */
static status *open_parts(struct zero *z)
{
    z->part = mem_array(NULL, z->lanes, sizeof *z->part); /* a node has a lane at least */
    if (!z->part)
        return ERR(NO_MEMORY, "nodes of %u lanes", z->lanes);
    for (int r = 0; r < z->dp->size; r++) {
        uint32_t at = lane_of_rank(z, r), end = lane_of_rank(z, r + 1);
        for (int tag = 0; at < end; tag++) {
            unsigned level = tree_level(at, end);
            z->part[z->parts++] = (struct part){ r, tag, level, at, at + (1u << level) };
            z->own_parts += r == z->dp->rank;
            at += 1u << level;
        }
    }
    return NULL;
}

/* Spare buffers: the most nodes that can wait while another own lane is open. Empty lanes only make them fewer. */
static status *open_spares(struct zero *z)
{
    uint32_t first = lane_of_rank(z, z->dp->rank), end = lane_of_rank(z, z->dp->rank + 1);
    uint64_t most = 0;
    for (uint32_t closed = first; closed + 1 < end; closed++) {
        uint64_t n = tree_node_count(first, closed + 1);
        most = n > most ? n : most;
    }
    for (; (uint64_t)z->spares < most; z->spares++) {
        z->spare[z->spares] = mem_block(z->p->total * sizeof(float), 4096);
        if (!z->spare[z->spares])
            return ERR(NO_MEMORY, "gradient buffer %d of %llu for the lanes of a rank, %llu elements", z->spares + 1,
                       (unsigned long long)most, (unsigned long long)z->p->total);
    }
    return NULL;
}

static status *open_messages(struct zero *z)
{
    size_t peers = (size_t)z->dp->size - 1, others = (size_t)(z->parts - z->own_parts);
    size_t reduce = (size_t)z->own_parts * peers + others, gather = 2 * peers;
    size_t recv;
    bool over = __builtin_mul_overflow(others * sizeof(float), z->run_elems_max, &recv);
    z->recv = over ? NULL : mem_block(recv, 4096);
    z->xfer = mem_array(NULL, reduce > gather ? reduce : gather, sizeof *z->xfer);
    z->norm = mem_calloc((size_t)z->dp->size * z->norm_cap, sizeof *z->norm);
    z->cursor = mem_calloc((size_t)z->dp->size, sizeof *z->cursor);
    if (!z->recv || !z->xfer || !z->norm || !z->cursor)
        return ERR(NO_MEMORY, "buffers to receive %zu runs of %llu elements", others,
                   (unsigned long long)z->run_elems_max);
    return NULL;
}

/* What tensor parallelism adds: sums over its ranks of this rank's runs. */
static status *open_tp(struct zero *z)
{
    struct comm *tp = z->o.tp;
    struct zero_run *run = mem_array(NULL, z->buckets + 1, sizeof *run);
    z->tp_norm = tp ? mem_calloc((size_t)tp->size, sizeof *z->tp_norm) : NULL;
    status *st =
        run && (!tp || z->tp_norm) ? NULL : ERR(NO_MEMORY, "runs of %llu buckets", (unsigned long long)z->buckets);
    if (tp)
        st = comm_agree(tp, st);
    for (uint64_t b = 0; !st && b < z->buckets; b++)
        run[b] = run_at(z, b, z->dp->rank);
    if (!st)
        st = shared_grads_open(z->p, run, z->buckets, tp, &z->shared);
    mem_free(run);
    return st;
}

static status *open_all(struct zero *z)
{
    uint64_t total = z->p->total, wanted = z->o.bucket_elems ? z->o.bucket_elems : BUCKET_ELEMS;
    z->lanes = z->o.deterministic ? (uint32_t)z->o.lanes : (uint32_t)z->dp->size;
    z->bucket_elems = wanted < total ? wanted : total;
    z->buckets = total ? (total - 1) / z->bucket_elems + 1 : 0;
    z->first_block = z->p->before / PARAM_ALIGN;
    z->pp_norm = z->o.pp ? mem_calloc((size_t)z->o.pp->size, sizeof *z->pp_norm) : NULL;
    if (z->o.pp && !z->pp_norm)
        return ERR(NO_MEMORY, "norms of %d stages", z->o.pp->size);
    count_runs(z);
    TRY(open_moments(z));
    TRY(open_parts(z));
    TRY(open_spares(z));
    return open_messages(z);
}

status *zero_open(const struct zero_options *o, struct params *p, struct comm *dp, struct zero **out)
{
    struct zero *z = mem_calloc(1, sizeof *z);
    status *st = z ? check_options(o, p, dp) : ERR(NO_MEMORY, "ZeRO handle");
    if (!st) {
        z->o = *o;
        z->p = p;
        z->dp = dp;
        st = open_all(z);
    }
    st = comm_agree(dp, st);
    if (o->tp)
        st = comm_agree(o->tp, st);
    if (!st)
        st = comm_agree(dp, open_tp(z));
    if (o->pp)
        st = comm_agree(o->pp, st);
    if (st) {
        zero_close(z);
        return st;
    }
    *out = z;
    return NULL;
}

void zero_close(struct zero *z)
{
    if (!z)
        return;
    shared_grads_close(z->shared);
    mem_free(z->pp_norm);
    mem_free(z->tp_norm);
    mem_free(z->scalar);
    mem_free(z->cursor);
    mem_free(z->norm);
    mem_free(z->xfer);
    mem_block_free(z->recv, (size_t)(z->parts - z->own_parts) * z->run_elems_max * sizeof(float));
    while (z->spares)
        mem_block_free(z->spare[--z->spares], z->p->total * sizeof(float));
    mem_free(z->part);
    mem_block_free(z->moments.v, z->moments.elems * sizeof(float));
    mem_block_free(z->moments.m, z->moments.elems * sizeof(float));
    mem_free(z->run);
    mem_free(z);
}

struct zero_moments zero_moments(struct zero *z)
{
    return z->moments;
}

void zero_reset_moments(struct zero *z)
{
    memset(z->moments.m, 0, z->moments.elems * sizeof(float));
    memset(z->moments.v, 0, z->moments.elems * sizeof(float));
}

/* ---- a rank's own lanes ---- */

/* Append a node (elems long) and combine it with the siblings before it, into the later one's memory. deterministic
 * off: everything is combined, one after another. */
static void push(const struct zero *z, struct grad_stack *s, struct grad_node n, uint64_t elems)
{
    while (s->n) {
        struct grad_node *left = &s->node[s->n - 1];
        if (z->o.deterministic && !tree_siblings(left->level, left->index, n.level, n.index))
            break;
        if (left->value && n.value)
            for (uint64_t i = 0; i < elems; i++)
                n.value[i] = left->value[i] + n.value[i];
        else if (left->value)
            n.value = left->value;
        n.level++;
        n.index /= 2;
        s->n--;
    }
    CHECK(s->n < STACK_MAX, "more tree nodes than %d", STACK_MAX);
    s->node[s->n++] = n;
}

/* A spare buffer that no node lies in. */
static float *free_spare(const struct zero *z)
{
    for (int i = 0; i < z->spares; i++) {
        bool used = false;
        for (int n = 0; n < z->stack.n; n++)
            used = used || z->stack.node[n].value == z->spare[i];
        if (!used)
            return z->spare[i];
    }
    CHECK(false, "%d spare gradient buffers are too few", z->spares);
}

/* Close the own lanes that wait for no further micro-batch, empty ones too; then make params.grad free for the next. */
static void lanes_close(struct zero *z)
{
    uint32_t end = lane_of_rank(z, z->dp->rank + 1);
    for (; z->lane < end && first_of_lane(z, z->k, z->lane + 1) <= z->next; z->lane++) {
        bool empty = first_of_lane(z, z->k, z->lane) == first_of_lane(z, z->k, z->lane + 1);
        push(z, &z->stack, (struct grad_node){ 0, z->lane, empty ? NULL : z->p->grad }, z->p->total);
    }
    struct grad_node *held = NULL; /* not always the top: empty nodes may follow */
    for (int i = 0; i < z->stack.n; i++)
        if (z->stack.node[i].value == z->p->grad)
            held = &z->stack.node[i];
    if (!held || z->next == z->end)
        return;
    held->value = free_spare(z);
    memcpy(held->value, z->p->grad, z->p->total * sizeof(float));
    memset(z->p->grad, 0, z->p->total * sizeof(float));
}

void zero_begin(struct zero *z, uint32_t k)
{
    z->k = k;
    z->lane = lane_of_rank(z, z->dp->rank);
    zero_micro_batches(z, k, &z->next, &z->end);
    z->stack.n = 0;
    memset(z->p->grad, 0, z->p->total * sizeof(float));
    lanes_close(z);
}

void zero_added(struct zero *z, uint32_t micro_batch)
{
    CHECK(micro_batch == z->next && micro_batch < z->end, "micro-batch %u came where %u of [.., %u) was due",
          micro_batch, z->next, z->end);
    z->next++;
    lanes_close(z);
}

/* ---- the sum over ranks ---- */

/* Start of a part's slice of `run`: own ones lie in the stack's memory, others in the receive buffer. */
static float *own_slice(const struct zero *z, const struct part *t, struct zero_run run)
{
    float *value = z->stack.node[t->tag].value;
    return value ? value + run.begin : NULL;
}

/* Messages of one bucket: my nodes' slices to the runs' owners, everybody's slices of my run to me. */
static size_t reduce_messages(struct zero *z, uint64_t bucket)
{
    int me = z->dp->rank;
    struct zero_run mine = run_at(z, bucket, me);
    float *to = z->recv;
    size_t n = 0;
    for (int i = 0; i < z->parts; i++) {
        const struct part *t = &z->part[i];
        if (part_empty(z, t))
            continue;
        if (t->rank != me) {
            z->xfer[n++] = (struct comm_xfer){ t->rank, t->tag, false, to, run_elems(mine) * sizeof(float) };
            to += run_elems(mine);
            continue;
        }
        for (int r = 0; r < z->dp->size; r++) {
            struct zero_run theirs = run_at(z, bucket, r);
            if (r != me)
                z->xfer[n++] =
                    (struct comm_xfer){ r, t->tag, true, own_slice(z, t, theirs), run_elems(theirs) * sizeof(float) };
        }
    }
    return n;
}

/* Exchange one bucket and finish the tree in this rank's run of it. */
static status *reduce_bucket(struct zero *z, uint64_t bucket)
{
    struct zero_run run = run_at(z, bucket, z->dp->rank);
    TRY(comm_exchange(z->dp, z->xfer, reduce_messages(z, bucket), NULL));
    struct grad_stack s = { 0 };
    float *from = z->recv;
    for (int i = 0; i < z->parts; i++) {
        const struct part *t = &z->part[i];
        struct grad_node n = { t->level, t->begin >> t->level, NULL };
        if (t->rank == z->dp->rank) {
            n.value = own_slice(z, t, run);
        } else if (!part_empty(z, t)) {
            n.value = from;
            from += run_elems(run);
        }
        push(z, &s, n, run_elems(run));
    }
    CHECK(s.n == 1, "the lanes of all ranks are no whole tree");
    float *sum = s.node[0].value, *to = z->p->grad + run.begin;
    if (sum && sum != to)
        memcpy(to, sum, run_elems(run) * sizeof(float));
    return NULL;
}

/* ---- the norm ---- */

_Static_assert((int)PARAM_ALIGN == (int)SUM_BLOCK, "a run of the norm's blocks is a run of the flat block");

/* Does this rank count the parameter that lies at `at`? Of those that share it, the first one does. *i: of an earlier
 * place, or 0. */
static bool counts(const struct zero *z, uint64_t at, int *i)
{
    const struct param *p = z->p->p;
    while (*i + 1 < z->p->count && (p[*i + 1].alias >= 0 || p[*i + 1].frozen || p[*i + 1].offset <= at))
        ++*i;
    int owner = *i;
    while (owner > 0 && (p[owner].alias >= 0 || p[owner].frozen))
        owner--;
    return !z->o.tp || p[owner].share <= 1 || z->o.tp->rank % p[owner].share == 0;
}

/* Sums of squares of the aligned nodes of this rank's runs, bucket by bucket. */
static void norm_nodes(const struct zero *z, double *out)
{
    int param = 0;
    for (uint64_t b = 0; b < z->buckets; b++) {
        struct zero_run run = run_at(z, b, z->dp->rank);
        struct tree t = { 0 };
        for (uint64_t at = run.begin; at < run.end; at += PARAM_ALIGN) {
            double squares = 0;
            if (counts(z, at, &param))
                block_sums(NULL, z->p->grad + at, PARAM_ALIGN, true, &squares);
            tree_push(&t, 0, z->first_block + at / PARAM_ALIGN, squares);
        }
        for (int i = 0; i < t.n; i++)
            *out++ = t.node[i].value;
    }
}

/* From the sum of this rank's part to the norm of the whole. */
static status *tp_norm(struct zero *z, double squares, double *norm)
{
    if (z->o.tp) {
        double mine = squares;
        TRY(comm_allgather(z->o.tp, &mine, z->tp_norm, sizeof mine, NULL));
        squares = 0;
        for (int r = 0; r < z->o.tp->size; r++)
            squares += z->tp_norm[r];
    }
    *norm = sqrt(squares);
    return NULL;
}

/* Let *t, this stage's nodes, become those of all stages. */
static status *pp_nodes(struct zero *z, struct tree *t)
{
    if (!z->o.pp)
        return NULL;
    struct tree mine = *t;
    TRY(comm_allgather(z->o.pp, &mine, z->pp_norm, sizeof mine, NULL));
    t->n = 0;
    for (int s = 0; s < z->o.pp->size; s++)
        for (int i = 0; i < z->pp_norm[s].n; i++) {
            const struct tree_node *n = &z->pp_norm[s].node[i];
            tree_push(t, n->level, n->index, n->value);
        }
    return NULL;
}

status *zero_norm(struct zero *z, double *norm)
{
    norm_nodes(z, z->norm + (uint64_t)z->dp->rank * z->norm_cap);
    TRY(comm_allgather(z->dp, z->norm + (uint64_t)z->dp->rank * z->norm_cap, z->norm, z->norm_cap * sizeof(double),
                       NULL));
    struct tree t = { 0 };
    memset(z->cursor, 0, (size_t)z->dp->size * sizeof *z->cursor);
    for (uint64_t b = 0; b < z->buckets; b++)
        for (int r = 0; r < z->dp->size; r++) {
            struct zero_run run = run_at(z, b, r);
            uint64_t at = z->first_block + run.begin / PARAM_ALIGN, end = z->first_block + run.end / PARAM_ALIGN;
            while (at < end) {
                unsigned level = tree_level(at, end);
                tree_push(&t, level, at >> level, z->norm[(uint64_t)r * z->norm_cap + z->cursor[r]++]);
                at += (uint64_t)1 << level;
            }
        }
    TRY(pp_nodes(z, &t));
    return tp_norm(z, tree_total(&t), norm);
}

status *zero_reduce(struct zero *z, double *norm)
{
    CHECK(z->next == z->end, "micro-batches [%u, %u) of this rank were not run", z->next, z->end);
    CHECK(z->stack.n == z->own_parts, "%d nodes where %d are due", z->stack.n, z->own_parts);
    for (uint64_t b = 0; b < z->buckets; b++)
        TRY(reduce_bucket(z, b));
    TRY(shared_grads_sum(z->shared));
    return norm ? zero_norm(z, norm) : NULL;
}

/* ---- the update ---- */

/* Every rank's run of this bucket to every rank, in place in `block`. */
static status *gather_bucket(struct zero *z, float *block, uint64_t bucket)
{
    struct zero_run mine = run_at(z, bucket, z->dp->rank);
    size_t n = 0;
    for (int r = 0; r < z->dp->size; r++) {
        struct zero_run theirs = run_at(z, bucket, r);
        if (r == z->dp->rank)
            continue;
        z->xfer[n++] = (struct comm_xfer){ r, 0, true, block + mine.begin, run_elems(mine) * sizeof(float) };
        z->xfer[n++] = (struct comm_xfer){ r, 0, false, block + theirs.begin, run_elems(theirs) * sizeof(float) };
    }
    return comm_exchange(z->dp, z->xfer, n, NULL);
}

status *zero_gather(struct zero *z)
{
    for (uint64_t b = 0; b < z->buckets; b++)
        TRY(gather_bucket(z, z->p->grad, b));
    return NULL;
}

/* AdamW on `run`, whose moments start at m, v. Paddings between parameters stay as they are; a shared parameter is
 * updated under the name that owns its memory. */
static void update_run(const struct zero *z, const struct adamw *a, struct zero_run run, float *m, float *v)
{
    for (int i = 0; i < z->p->count; i++) {
        const struct param *p = &z->p->p[i];
        uint64_t begin = p->offset, end = p->offset + param_elems(p);
        if (p->alias >= 0)
            continue;
        begin = begin > run.begin ? begin : run.begin;
        end = end < run.end ? end : run.end;
        if (begin < end)
            adamw_update(NULL, z->p->data + begin, z->p->grad + begin, m + (begin - run.begin), v + (begin - run.begin),
                         end - begin, a->lr, a->beta1, a->beta2, a->eps, p->decay ? a->weight_decay : 0, a->step,
                         a->grad_scale);
    }
}

typedef status *fence_fn(void *arg, const void *addr, size_t bytes);

/* Announce what this bucket will overwrite. Every rank announces every bucket's parameters, even with no run in it: the
 * first call may be collective. */
static status *announce(fence_fn *fence, void *arg, const float *data, struct zero_run all, const float *m,
                        const float *v, uint64_t moments)
{
    if (!fence)
        return NULL;
    TRY(fence(arg, data + all.begin, run_elems(all) * sizeof(float)));
    if (!moments)
        return NULL;
    TRY(fence(arg, m, moments * sizeof(float)));
    return fence(arg, v, moments * sizeof(float));
}

status *zero_update(struct zero *z, const struct adamw *a, fence_fn *fence, void *arg)
{
    status *failed = NULL; /* of a fence: this rank updates no more, but joins the exchanges that its peers wait in */
    uint64_t at = 0;       /* moments before this bucket's */
    for (uint64_t b = 0; b < z->buckets; b++) {
        struct zero_run all = bucket_at(z, b), run = z->o.stage == 0 ? all : run_at(z, b, z->dp->rank);
        float *m = z->moments.m + at, *v = z->moments.v + at;
        at += run_elems(run);
        if (!failed)
            failed = announce(fence, arg, z->p->data, all, m, v, run_elems(run));
        if (z->o.stage == 0) {
            status *st = gather_bucket(z, z->p->grad, b);
            if (st)
                return status_first(failed, st);
        }
        if (!failed)
            update_run(z, a, run, m, v);
        if (z->o.stage == 1) {
            status *st = gather_bucket(z, z->p->data, b);
            if (st)
                return status_first(failed, st);
        }
    }
    return failed;
}

/* ---- scalars ---- */

static status *scalar_room(struct zero *z, size_t cap)
{
    if (z->scalar && cap <= z->scalar_cap)
        return NULL;
    double *p = mem_array(z->scalar, (size_t)z->dp->size * cap, sizeof *p);
    status *st = comm_agree(z->dp, p ? NULL : ERR(NO_MEMORY, "%zu scalars of %d ranks", cap, z->dp->size));
    if (p)
        z->scalar = p;
    if (!st)
        z->scalar_cap = cap;
    return st;
}

status *zero_sum_scalars(struct zero *z, const double *value, uint32_t k, uint32_t width, double *out)
{
    uint32_t first, end, most = 0;
    for (int r = 0; r < z->dp->size; r++) {
        micro_batches_of(z, k, r, &first, &end);
        most = end - first > most ? end - first : most;
    }
    size_t cap = (size_t)most * width; /* of a rank's message */
    TRY(scalar_room(z, cap));
    zero_micro_batches(z, k, &first, &end);
    double *mine = z->scalar + (size_t)z->dp->rank * cap;
    memset(mine, 0, cap * sizeof *mine);
    if (end > first)
        memcpy(mine, value + (size_t)first * width, (size_t)(end - first) * width * sizeof *mine);
    TRY(comm_allgather(z->dp, mine, z->scalar, cap * sizeof *mine, NULL));
    for (uint32_t j = 0; j < width; j++)
        out[j] = 0;
    for (int r = 0; r < z->dp->size; r++) { /* ranks hold ascending micro-batches */
        const double *theirs = z->scalar + (size_t)r * cap;
        micro_batches_of(z, k, r, &first, &end);
        for (size_t i = 0; i < (size_t)(end - first) * width; i++)
            out[i % width] += theirs[i];
    }
    return NULL;
}
