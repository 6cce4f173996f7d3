/* zero: what a rank holds, the update, scalars; gradients are in zero_sum.c. See zero_impl.h. */

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "comm/ordered.h"
#include "trainer/ops/kernels.h"
#include "trainer/parallel/shared_grads.h"
#include "trainer/parallel/treesum.h"
#include "trainer/parallel/zero_impl.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

enum { BUCKET_ELEMS = 4 << 20 };

/* ---- micro-batches ---- */

static uint32_t passes_of(const struct zero *z, uint32_t k, int group)
{
    uint32_t first, end, width = group_width(z);
    group_micro_batches(z, k, group, &first, &end);
    return (end - first + width - 1) / width;
}

uint32_t zero_passes(const struct zero *z, uint32_t k)
{
    return passes_of(z, k, z->group->rank);
}

uint32_t zero_most_passes(const struct zero *z, uint32_t k)
{
    uint32_t most = 0;
    for (int g = 0; g < z->group->size; g++)
        most = passes_of(z, k, g) > most ? passes_of(z, k, g) : most;
    return most;
}

uint32_t zero_micro_batches_end(const struct zero *z, uint32_t k)
{
    uint32_t first, end;
    group_micro_batches(z, k, z->group->rank, &first, &end);
    return end;
}

bool zero_micro_batch(const struct zero *z, uint32_t k, uint32_t pass, uint32_t *micro_batch)
{
    return micro_batch_at(z, k, pass, is_cut(z) ? z->k->shard : 0, micro_batch);
}

/* ---- open ---- */

static status *no_shards(int shards, int dp)
{
    char legal[256] = "";
    size_t used = 0;
    for (int n = 1; n <= dp; n++)
        if (dp % n == 0 && used < sizeof legal)
            used += (size_t)snprintf(legal + used, sizeof legal - used, "%s%d", used ? ", " : "", n);
    return ERR(INVALID, "parallel.dp_shard: %d does not divide %d data-parallel ranks (legal: %s; 0: all)", shards, dp,
               legal);
}

static status *check_options(const struct zero_options *o, const struct params *p, const struct comm *dp)
{
    if (o->stage < 0 || o->stage > 3)
        return ERR(UNSUPPORTED, "ZeRO stage %d is not supported (there are stages 0, 1, 2 and 3)", o->stage);
    if (o->shards < 0 || (o->shards && dp->size % o->shards))
        return no_shards(o->shards, dp->size);
    bool power = o->lanes >= 1 && o->lanes <= LANES_MAX && (o->lanes & (o->lanes - 1)) == 0;
    int groups = o->stage < 2 ? dp->size : o->shards ? dp->size / o->shards : 1;
    if (o->deterministic && !power)
        return ERR(INVALID, "%d lanes: a power of two from 1 to %d is needed", o->lanes, LANES_MAX);
    if (o->deterministic && o->lanes < groups)
        return ERR(INVALID, "%d lanes cannot feed dp = %d %s: use at least as many lanes as %s", o->lanes, groups,
                   o->stage < 2 ? "ranks" : "replicas", o->stage < 2 ? "ranks" : "replicas");
    if (o->bucket_elems % PARAM_ALIGN)
        return ERR(INVALID, "buckets of %llu elements are no multiple of %d", (unsigned long long)o->bucket_elems,
                   PARAM_ALIGN);
    bool own_values = o->stage == 3 || o->param_dtype == DTYPE_BF16 || o->sums_only;
    if ((!own_values && !p->data) || (o->stage < 2 && !p->grad))
        return ERR(INVALID, "parameters have no %s", p->data ? "gradients" : "memory");
    return NULL;
}

/* What of `run` is a matrix of Muon's, and its padding. */
static struct zero_run muon_part(const struct param *p, struct zero_run run)
{
    uint64_t begin = p->offset, end = begin + (param_elems(p) + PARAM_ALIGN - 1) / PARAM_ALIGN * PARAM_ALIGN;
    begin = begin > run.begin ? begin : run.begin;
    end = end < run.end ? end : run.end;
    return p->muon && p->alias < 0 && !p->away && begin < end ? (struct zero_run){ begin, end }
                                                              : (struct zero_run){ 0 };
}

/* Runs of all that is not Muon's: it has no second moments. */
static status *list_second_moments(struct zero *z)
{
    struct zero_moments *m = &z->moments;
    z->v_run = mem_array(NULL, m->run_count + (uint64_t)z->p->count + 1, sizeof *z->v_run);
    if (!z->v_run)
        return ERR(NO_MEMORY, "runs of %llu buckets", (unsigned long long)z->k->n);
    for (uint64_t r = 0; r < m->run_count; r++) {
        struct zero_run left = z->run[r];
        for (int i = 0; i < z->p->count; i++) {
            struct zero_run out = muon_part(&z->p->p[i], left);
            if (!run_elems(out))
                continue;
            if (out.begin > left.begin)
                z->v_run[m->v_run_count++] = (struct zero_run){ left.begin, out.begin };
            left.begin = out.end;
        }
        if (run_elems(left))
            z->v_run[m->v_run_count++] = left;
    }
    for (uint64_t r = 0; r < m->v_run_count; r++)
        m->v_elems += run_elems(z->v_run[r]);
    m->v_run = z->v_run;
    return NULL;
}

static status *open_moments(struct zero *z)
{
    struct zero_moments *m = &z->moments;
    if (z->o.sums_only)
        return NULL;
    z->run = mem_array(NULL, z->k->n + 1, sizeof *z->run);
    if (!z->run)
        return ERR(NO_MEMORY, "runs of %llu buckets", (unsigned long long)z->k->n);
    if (z->o.stage == 0) {
        z->run[m->run_count++] = (struct zero_run){ 0, z->p->total };
    } else {
        for (uint64_t b = 0; b < z->k->n; b++) {
            struct zero_run run = own_run(z, b);
            if (run_elems(run))
                z->run[m->run_count++] = run;
        }
    }
    for (uint64_t i = 0; i < m->run_count; i++)
        m->elems += run_elems(z->run[i]);
    m->run = z->run;
    TRY(list_second_moments(z));
    m->w = z->shards ? shards_own(z->shards, false).value : NULL;
    TRY(flat_alloc(where(z), m->elems, "AdamW's moments", &m->m));
    return flat_alloc(where(z), m->v_elems, "AdamW's moments", &m->v);
}

/* Cut every group's lanes into aligned nodes. */
static status *open_parts(struct zero *z)
{
    z->part = mem_array(NULL, z->lanes, sizeof *z->part); /* a node has a lane at least */
    if (!z->part)
        return ERR(NO_MEMORY, "nodes of %u lanes", z->lanes);
    for (int g = 0; g < z->group->size; g++) {
        uint32_t at = lane_of_group(z, g), end = lane_of_group(z, g + 1);
        for (int tag = 0; at < end; tag++) {
            unsigned level = tree_level(at, end);
            z->part[z->parts++] = (struct part){ g, tag, level, at, at + (1u << level) };
            z->own_parts += g == z->group->rank;
            at += 1u << level;
        }
    }
    return NULL;
}

/* The most sums that are kept at a time. A field of a rank's own needs none for what came last (it stays in
 * params.grad), nor in place for a lane that is a plain sum; empty lanes only make them fewer. */
static uint64_t most_sums(const struct zero *z)
{
    uint32_t first = lane_of_group(z, z->group->rank), end = lane_of_group(z, z->group->rank + 1);
    bool chains = !z->o.micro_batches || z->o.micro_batches > z->lanes;
    uint64_t most = 0;
    if (!z->o.deterministic)
        return is_cut(z) ? 1 : 0;
    for (uint32_t lane = first; lane < end; lane++) {
        uint64_t open = chains ? tree_node_count(first, lane) + 1 : 0;
        uint64_t closed = is_cut(z) || lane + 1 < end ? tree_node_count(first, lane + 1) : 0;
        most = open > most ? open : most;
        most = closed > most ? closed : most;
    }
    return is_cut(z) && !most ? 1 : most;
}

static status *open_buffers(struct zero *z)
{
    uint64_t most = most_sums(z);
    for (; (uint64_t)z->buffers < most; z->buffers++)
        TRY(status_wrap(flat_alloc(where(z), z->field_elems + 1, "gradients of lanes", &z->buffer[z->buffers]),
                        "buffer %d of %llu", z->buffers + 1, (unsigned long long)most));
    return NULL;
}

/* The chunk and the unit that backward leaves last, of what has elements in bucket b. */
static struct due due_of(const struct zero *z, uint64_t b)
{
    struct due d = { b, params_chunks(z->p) - 1, INT_MAX };
    uint64_t begin, end;
    params_chunk_elems(z->p, d.chunk, &begin, &end);
    while (d.chunk && begin > z->k->b[b].begin)
        params_chunk_elems(z->p, --d.chunk, &begin, &end);
    end = z->k->b[b].end < end ? z->k->b[b].end : end;
    for (int i = 0; i < z->p->count; i++) {
        const struct param *p = &z->p->p[i];
        bool here =
            p->alias < 0 && !p->frozen && !p->away && p->offset < end && p->offset + param_elems(p) > z->k->b[b].begin;
        if (here && p->unit < d.unit)
            d.unit = p->unit;
    }
    return d;
}

static bool is_later(struct due a, struct due b)
{
    return a.chunk != b.chunk ? a.chunk < b.chunk : a.unit != b.unit ? a.unit < b.unit : a.bucket < b.bucket;
}

/* In the order in which backward is done with them. */
static status *open_due(struct zero *z)
{
    z->due = mem_array(NULL, z->k->n + 1, sizeof *z->due);
    if (!z->due)
        return ERR(NO_MEMORY, "order of %llu buckets", (unsigned long long)z->k->n);
    for (uint64_t n = 0; n < z->k->n; n++) {
        struct due d = due_of(z, z->k->n - 1 - n); /* nearly in order */
        uint64_t at = n;
        for (; at && is_later(z->due[at - 1], d); at--)
            z->due[at] = z->due[at - 1];
        z->due[at] = d;
    }
    return NULL;
}

static status *open_low(const struct zero *z, struct low_room *r, uint64_t elems, size_t messages)
{
    void *low;
    r->elems = elems;
    TRY(status_wrap(compute_alloc(where(z), elems * sizeof *r->low, &low), "gradients in bf16"));
    r->low = low;
    r->wide = mem_array(NULL, messages + 1, sizeof *r->wide);
    return r->wide ? NULL : ERR(NO_MEMORY, "%zu messages of gradients", messages);
}

static size_t low_bytes(const struct zero *z)
{
    size_t n = 0;
    for (int i = 0; i <= FLIGHTS; i++)
        n += z->low[i].elems * sizeof *z->low[i].low;
    return n;
}

static status *open_messages(struct zero *z)
{
    size_t peers = (size_t)z->dp->size - 1, others = (size_t)(z->parts - z->own_parts);
    size_t reduce = (size_t)z->own_parts * peers + others, gather = 2 * peers;
    uint64_t longest = 0;
    for (uint64_t b = 0; b < z->k->n; b++)
        longest = run_elems(own_part(z, b)) > longest ? run_elems(own_part(z, b)) : longest;
    size_t nodes, leaves = is_cut(z) ? (size_t)(z->k->shards - 1) * z->k->largest * sizeof(float) : 0;
    bool over = __builtin_mul_overflow(others * sizeof(float), longest, &nodes);
    z->recv_bytes = nodes > leaves ? nodes : leaves;
    z->recv_bytes = (z->recv_bytes + 4095) / 4096 * 4096;
    if (over)
        return ERR(NO_MEMORY, "buffers to receive gradients of %zu nodes", others);
    TRY(flat_alloc(where(z), FLIGHTS * z->recv_bytes / sizeof *z->recv, "buffers to receive gradients", &z->recv));
    z->xfer = mem_array(NULL, (reduce > gather ? reduce : gather) + 1, sizeof *z->xfer);
    for (int i = 0; z->recv && i < FLIGHTS; i++) {
        z->flight[i].recv = z->recv + (size_t)i * z->recv_bytes / sizeof *z->recv;
        z->flight[i].xfer = mem_array(NULL, reduce + 1, sizeof *z->flight[i].xfer);
        if (!z->flight[i].xfer)
            return ERR(NO_MEMORY, "%zu messages of gradients", reduce);
    }
    if (z->o.cp) {
        z->cp_elems = ordered_room(z->o.cp, ordered_slice(z->o.cp, longest)) + 1;
        TRY(flat_alloc(where(z), z->cp_elems, "sums of gradients over parallel.cp", &z->cp_room));
    }
    if (is_low(z)) {
        uint64_t bucket = 0;
        for (uint64_t b = 0; b < z->k->n; b++)
            bucket = z->k->b[b].end - z->k->b[b].begin > bucket ? z->k->b[b].end - z->k->b[b].begin : bucket;
        for (int i = 0; i < FLIGHTS; i++)
            TRY(open_low(z, &z->low[i], nodes / sizeof(float) + (uint64_t)z->own_parts * bucket + 1, reduce));
        TRY(open_low(z, &z->low[FLIGHTS], leaves / sizeof(float) + bucket + 1, gather));
    }
    return z->xfer ? NULL : ERR(NO_MEMORY, "messages of gradients");
}

static status *warm_flight(const struct zero *z, struct flight *f, float *room)
{
    size_t n = 0;
    for (int i = 0; i < z->parts; i++) {
        const struct part *t = &z->part[i];
        bool own = t->group == z->group->rank;
        for (int g = 0; g < z->group->size; g++)
            if (own ? g != t->group : g == t->group) {
                f->xfer[n] = (struct comm_xfer){ g, t->tag, own, room + n, sizeof *room };
                n++;
            }
    }
    return comm_iexchange(z->sums, f->xfer, n, NULL, &f->req);
}

/* How many exchanges are in flight at once differs from step to step: the backend shall take its memory for as many as
 * there can be now. Collective over dp. */
static status *warm_up(struct zero *z)
{
    size_t each = (size_t)z->own_parts * (size_t)(z->dp->size - 1) + (size_t)(z->parts - z->own_parts);
    float *room = mem_calloc(FLIGHTS * each + 1, sizeof *room);
    status *st = comm_agree(z->dp, room ? NULL : ERR(NO_MEMORY, "%zu messages of gradients", each));
    for (int i = 0; !st && i < FLIGHTS; i++)
        st = warm_flight(z, &z->flight[i], room + (size_t)i * each);
    for (int i = 0; !st && i < FLIGHTS; i++)
        st = comm_wait(&z->flight[i].req);
    mem_free(room);
    return st;
}

/* What tensor parallelism adds: sums over its ranks of this rank's parts. */
static status *open_tp(struct zero *z)
{
    struct comm *tp = z->o.tp;
    struct zero_run *run = mem_array(NULL, z->k->n + 1, sizeof *run);
    uint64_t *at = mem_array(NULL, z->k->n + 1, sizeof *at);
    status *st = run && at ? NULL : ERR(NO_MEMORY, "runs of %llu buckets", (unsigned long long)z->k->n);
    if (tp)
        st = comm_agree(tp, st);
    for (uint64_t b = 0; !st && b < z->k->n; b++) {
        run[b] = own_part(z, b);
        at[b] = run_elems(run[b]) ? field_at(z, b, run[b].begin) : 0;
    }
    if (!st)
        st = shared_grads_open(z->p, run, at, z->k->n, tp, &z->shared);
    mem_free(run);
    mem_free(at);
    return st;
}

/* Communicators and buckets. Collective over dp. */
static status *open_cut(struct zero *z)
{
    uint64_t elems = z->o.bucket_elems ? z->o.bucket_elems : BUCKET_ELEMS;
    int shards = z->o.stage && z->o.shards ? z->o.shards : z->dp->size;
    TRY(comm_split(z->dp, z->dp->rank / shards, z->dp->rank, &z->shard));
    TRY(comm_split(z->dp, z->dp->rank % shards, z->dp->rank, &z->rep));
    z->group = is_cut(z) ? z->rep : z->dp;
    bool bf16 = z->o.param_dtype == DTYPE_BF16;
    struct shards_options o = { .data = z->o.stage == 3 || bf16,
                                .grad = is_cut(z),
                                .bucket_elems = elems,
                                .shards = z->o.stage ? shards : 1,
                                .dtype = z->o.param_dtype,
                                .resident = bf16 && z->o.stage < 3,
                                .stochastic = z->o.stochastic,
                                .seed = z->o.seed };
    if (is_cut(z) || bf16)
        TRY(shards_open(&o, z->p, z->dp, &z->shards));
    if (is_cut(z))
        shards_collect(z->shards, collect_unit, z);
    z->k = &z->own_k;
    if (z->shards && z->o.stage)
        z->k = shards_buckets(z->shards);
    else
        return comm_agree(z->dp, buckets_open(z->p, elems, false, false, z->dp->size, shards, z->dp->rank, &z->own_k));
    return NULL;
}

static status *open_all(struct zero *z)
{
    z->lanes = z->o.deterministic ? (uint32_t)z->o.lanes : (uint32_t)z->group->size;
    z->field_elems = is_cut(z) ? z->k->own_elems : z->p->total;
    size_t chunks = (size_t)params_chunks(z->p);
    z->chunk = mem_calloc(chunks, sizeof *z->chunk);
    z->update = mem_array(NULL, (size_t)z->p->count + 1, sizeof *z->update);
    if (!z->chunk || !z->update)
        return ERR(NO_MEMORY, "sums of %zu chunks of stages", chunks);
    TRY(open_moments(z));
    TRY(open_parts(z));
    TRY(open_buffers(z));
    TRY(open_due(z));
    return open_messages(z);
}

/* All of the model's ranks. */
static status *agree_all(const struct zero_options *o, struct comm *dp, status *st)
{
    st = comm_agree(dp, st);
    if (o->cp)
        st = comm_agree(o->cp, st);
    if (o->tp)
        st = comm_agree(o->tp, st);
    return o->pp ? comm_agree(o->pp, st) : st;
}

status *zero_open(const struct zero_options *o, struct params *p, struct comm *dp, struct zero **out)
{
    struct zero *z = mem_calloc(1, sizeof *z);
    status *st = z ? check_options(o, p, dp) : ERR(NO_MEMORY, "ZeRO handle");
    st = comm_agree(dp, st);
    if (!st) {
        z->o = *o;
        z->p = p;
        z->dp = dp;
        st = open_cut(z);
    }
    if (!st)
        st = comm_dup(z->group, &z->sums);
    if (!st)
        st = comm_agree(dp, open_all(z));
    if (!st)
        st = comm_agree(dp, warm_up(z));
    if (o->tp)
        st = comm_agree(o->tp, st);
    if (!st)
        st = comm_agree(dp, open_tp(z));
    st = agree_all(o, dp, st);
    if (!st && !o->sums_only)
        st = agree_all(o, dp, open_norm(z));
    if (st) {
        zero_close(z);
        return st;
    }
    *out = z;
    return NULL;
}

/* What is where the parameters are. */
static void close_blocks(struct zero *z)
{
    if (!z->p)
        return;
    flat_free(where(z), z->recv, FLIGHTS * z->recv_bytes / sizeof *z->recv);
    while (z->buffers)
        flat_free(where(z), z->buffer[--z->buffers], z->field_elems + 1);
    flat_free(where(z), z->moments.v, z->moments.v_elems);
    flat_free(where(z), z->moments.m, z->moments.elems);
    flat_free(where(z), z->cp_room, z->cp_elems);
    for (int i = 0; i <= FLIGHTS; i++)
        compute_free(where(z), z->low[i].low, z->low[i].elems * sizeof *z->low[i].low);
}

void zero_close(struct zero *z)
{
    if (!z)
        return;
    comm_close(z->sums); /* after an error something may be under way, and be added up */
    shared_grads_close(z->shared);
    close_norm(z);
    mem_free(z->update);
    mem_free(z->chunk);
    mem_free(z->scalar);
    mem_free(z->due);
    for (int i = 0; i < FLIGHTS; i++)
        mem_free(z->flight[i].xfer);
    for (int i = 0; i <= FLIGHTS; i++)
        mem_free(z->low[i].wide);
    mem_free(z->xfer);
    close_blocks(z);
    mem_free(z->part);
    mem_free(z->run);
    mem_free(z->v_run);
    shards_close(z->shards);
    buckets_fini(&z->own_k);
    comm_close(z->rep);
    comm_close(z->shard);
    mem_free(z);
}

struct shards *zero_shards(const struct zero *z)
{
    return z->shards;
}

uint64_t zero_sent_bytes(const struct zero *z)
{
    return z->dp->sent_bytes + z->shard->sent_bytes + z->rep->sent_bytes + z->sums->sent_bytes +
           (z->shards ? shards_comm(z->shards)->sent_bytes : 0);
}

void zero_times(const struct zero *z, uint64_t *flight_ns, uint64_t *wait_ns)
{
    const struct comm *c[] = { z->dp, z->shard, z->rep, z->sums, z->shards ? shards_comm(z->shards) : NULL };
    for (size_t i = 0; i < sizeof c / sizeof *c; i++)
        if (c[i]) {
            *flight_ns += c[i]->flight_ns;
            *wait_ns += c[i]->wait_ns;
        }
}

struct zero_memory zero_memory(const struct zero *z)
{
    uint64_t whole = z->p->total * sizeof(float);
    return (struct zero_memory){
        .parameters = z->moments.w ? shards_value_bytes(z->shards) : params_bytes(z->p),
        .gradients = (is_cut(z) ? 0 : whole) + (uint64_t)z->buffers * z->field_elems * sizeof(float),
        .moments = (z->moments.elems + z->moments.v_elems) * sizeof(float),
        .windows = z->shards ? shards_window_bytes(z->shards) : 0,
        .messages = FLIGHTS * z->recv_bytes + low_bytes(z),
    };
}

struct zero_moments zero_moments(struct zero *z)
{
    return z->moments;
}

void zero_reset_moments(struct zero *z)
{
    flat_zero(where(z), z->moments.m, z->moments.elems);
    flat_zero(where(z), z->moments.v, z->moments.v_elems);
}

/* ---- the update ---- */

/* What a rank of dp sums. */
static struct zero_run run_of_rank(const struct zero *z, uint64_t bucket, int rank)
{
    return bucket_part(z->k, bucket, rank % z->k->shards, rank / z->k->shards);
}

static struct zero_run run_of_shard(const struct zero *z, uint64_t bucket, int shard)
{
    return bucket_run(z->k, bucket, shard);
}

status *zero_gather(struct zero *z)
{
    for (uint64_t b = 0; b < z->k->n; b++)
        TRY(spread_bucket(z, z->dp, b, z->p->grad, 0, true, run_of_rank));
    z->gathered = true;
    return NULL;
}

status *zero_spread_sums(struct zero *z)
{
    return z->o.stage == 0 ? zero_gather(z) : NULL;
}

float *zero_sums(const struct zero *z, struct zero_run run, uint64_t before)
{
    return field(z) + (is_cut(z) ? before : run.begin);
}

int zero_holders(const struct zero *z)
{
    return z->o.stage == 0 ? 1 : z->k->shards;
}

/* AdamW on `run`, whose parameters, gradients and moments start at w, g, m, v; v has nothing of Muon's matrices.
 * Paddings between parameters stay as they are; a shared parameter is updated under the name that owns its memory. */
static void update_run(const struct zero *z, const struct adamw *a, struct zero_run run, float *w, const float *g,
                       float *m, float *v)
{
    const struct adamw_how how = { a->lr, a->beta1, a->beta2, a->eps, a->step, a->grad_scale, a->scale };
    size_t runs = 0;
    uint64_t skipped = 0; /* of the run so far: parameters lie in the order of the list */
    for (int i = 0; i < z->p->count; i++) {
        const struct param *p = &z->p->p[i];
        uint64_t begin = p->offset, end = p->offset + param_elems(p);
        skipped += run_elems(muon_part(p, run));
        if (p->alias >= 0 || p->muon || p->frozen)
            continue;
        begin = begin > run.begin ? begin : run.begin;
        end = end < run.end ? end : run.end;
        uint64_t at = begin - run.begin;
        if (begin < end)
            z->update[runs++] = (struct adamw_run){ w + at,      g + at,
                                                    m + at,      v + (at - skipped),
                                                    end - begin, p->decay ? a->weight_decay : 0 };
    }
    compute_kernels(where(z))->adamw(compute_workers(where(z), z->o.workers), z->update, runs, &how);
}

typedef status *fence_fn(void *arg, const void *addr, size_t bytes);

/* What of bucket b this rank overwrites: parameters, gradients to do so with, moments. */
struct updated {
    struct zero_run run, changes; /* of AdamW; of the parameters here */
    float *w, *changed, *m, *v;   /* w, m, v: at run; changed: at `changes` */
    const float *g;
    uint64_t v_elems;
};

/* What of the run is AdamW's: v_elems; v_before: of the runs before. */
static struct updated updated_by(const struct zero *z, uint64_t b, uint64_t moments, uint64_t v_before)
{
    struct zero_run all = { z->k->b[b].begin, z->k->b[b].end };
    struct updated u = { .m = z->moments.m + moments, .v = z->moments.v + v_before };
    u.run = z->o.stage == 0 ? all : own_run(z, b);
    u.v_elems = run_elems(u.run);
    for (int i = 0; i < z->p->count; i++)
        u.v_elems -= run_elems(muon_part(&z->p->p[i], u.run));
    u.changes = z->moments.w ? u.run : all;
    u.changed = z->moments.w ? z->moments.w + moments : z->p->data + all.begin;
    u.w = z->moments.w ? u.changed : z->p->data + u.run.begin;
    u.g = field(z) + (is_cut(z) ? moments : u.run.begin);
    return u;
}

/* Announce what a bucket will overwrite. Every rank makes the first call, even with nothing to overwrite in that
 * bucket: it may be collective. */
static status *announce(uint64_t b, const struct updated *u, fence_fn *fence, void *arg)
{
    if (!fence)
        return NULL;
    if (run_elems(u->changes) || b == 0)
        TRY(fence(arg, u->changed, run_elems(u->changes) * sizeof(float)));
    if (!run_elems(u->run))
        return NULL;
    TRY(fence(arg, u->m, run_elems(u->run) * sizeof(float)));
    return u->v_elems ? fence(arg, u->v, u->v_elems * sizeof(float)) : NULL;
}

status *zero_update(struct zero *z, const struct adamw *a, fence_fn *fence, void *arg)
{
    status *failed = NULL; /* of a fence: this rank updates no more, but joins the exchanges that its peers wait in */
    uint64_t at = 0, v_at = 0; /* moments before this bucket's */
    for (uint64_t b = 0; b < z->k->n; b++) {
        struct updated u = updated_by(z, b, at, v_at);
        status *st = NULL;
        at += run_elems(u.run);
        v_at += u.v_elems;
        if (!failed)
            failed = announce(b, &u, fence, arg);
        if (z->o.stage == 0 && !z->gathered)
            st = spread_bucket(z, z->dp, b, z->p->grad, 0, true, run_of_shard);
        if (!failed && !st)
            update_run(z, a, u.run, u.w, u.g, u.m, u.v);
        if (!st && !z->moments.w && z->o.stage)
            st = spread_bucket(z, z->shard, b, z->p->data, 0, false, run_of_shard);
        if (st)
            return status_first(failed, st);
    }
    if (z->shards)
        shards_changed(z->shards);
    return status_first(failed, compute_check(where(z), false));
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
    uint32_t first, end, i, most = zero_most_passes(z, k), ranks = group_width(z);
    size_t cap = (size_t)most * width; /* of a rank's message */
    TRY(scalar_room(z, cap));
    double *mine = z->scalar + (size_t)z->dp->rank * cap;
    memset(mine, 0, cap * sizeof *mine);
    for (uint32_t pass = 0; pass < most && zero_micro_batch(z, k, pass, &i); pass++)
        memcpy(mine + (size_t)pass * width, value + (size_t)i * width, width * sizeof *mine);
    TRY(comm_allgather(z->dp, mine, z->scalar, cap * sizeof *mine, NULL));
    for (uint32_t j = 0; j < width; j++)
        out[j] = 0;
    for (int g = 0; g < z->group->size; g++) { /* groups hold ascending micro-batches */
        group_micro_batches(z, k, g, &first, &end);
        for (i = 0; i < end - first; i++) {
            const double *theirs = z->scalar + ((size_t)g * ranks + i % ranks) * cap + (size_t)(i / ranks) * width;
            for (uint32_t j = 0; j < width; j++)
                out[j] += theirs[j];
        }
    }
    return NULL;
}
