/* zero_sum: gradients of micro-batches become sums over all ranks, and their norm. See zero_impl.h. */
#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/rank_sums.h"
#include "trainer/parallel/shared_grads.h"
#include "trainer/parallel/treesum.h"
#include "trainer/parallel/zero_impl.h"

#include <math.h>
#include <string.h>

/* ---- messages of gradients ---- */

/* To what bf16 can hold, where gradients travel in it. */
static void round_low(const struct zero *z, float *x, uint64_t n)
{
    if (is_low(z))
        flat_round(where(z), x, n);
}

/* Let n messages of floats be of bf16. */
static void narrow(const struct zero *z, struct low_room *r, struct comm_xfer *xfer, size_t n)
{
    uint16_t *at = r->low, *sent = NULL;
    const float *last = NULL; /* what is sent to several is narrowed once */
    r->narrowed = is_low(z) ? n : 0;
    for (size_t i = 0; i < r->narrowed; i++) {
        struct comm_xfer *x = &xfer[i];
        uint64_t elems = x->bytes / sizeof(float);
        const float *from = x->buf;
        bool again = x->send && from == last && elems;
        r->wide[i] = *x;
        x->buf = again ? sent : at;
        x->bytes = elems * sizeof *at;
        if (again)
            continue;
        if (x->send && elems) {
            flat_narrow(where(z), at, from, elems);
            last = from;
            sent = at;
        }
        at += elems;
        CHECK((size_t)(at - r->low) <= r->elems, "messages of more than %zu elements", r->elems);
    }
}

/* They have come. */
static void widen(const struct zero *z, struct low_room *r, const struct comm_xfer *xfer)
{
    for (size_t i = 0; i < r->narrowed; i++)
        if (!r->wide[i].send)
            flat_widen(where(z), r->wide[i].buf, xfer[i].buf, r->wide[i].bytes / sizeof(float));
    r->narrowed = 0;
}

/* The first n of z->xfer. */
static status *exchange(struct zero *z, struct comm *c, size_t n)
{
    narrow(z, &z->low[FLIGHTS], z->xfer, n);
    TRY(comm_exchange(c, z->xfer, n, stream_of(z)));
    widen(z, &z->low[FLIGHTS], z->xfer);
    return NULL;
}

/* ---- a group's own lanes ---- */

/* Append a node, of which elements [at, at + elems) are looked at, and combine it with the siblings before it, in the
 * memory of the first. deterministic off: everything is combined, one after another. */
static void push(const struct zero *z, struct grad_stack *s, struct grad_node n, uint64_t at, uint64_t elems)
{
    while (s->n) {
        struct grad_node *left = &s->node[s->n - 1];
        if (z->o.deterministic && !tree_siblings(left->level, left->index, n.level, n.index))
            break;
        if (left->value && n.value) {
            flat_add(where(z), left->value + at, n.value + at, elems);
            if (z->o.deterministic)
                round_low(z, left->value + at, elems);
        }
        if (left->value)
            n.value = left->value;
        n.level++;
        n.index /= 2;
        s->n--;
    }
    CHECK(s->n < STACK_MAX, "more tree nodes than %d", STACK_MAX);
    s->node[s->n++] = n;
}

/* A buffer that no sum lies in. */
static float *free_buffer(const struct zero *z, const struct lane_sum *s)
{
    for (int i = 0; i < z->buffers; i++) {
        bool used = s->open == z->buffer[i];
        for (int n = 0; n < s->stack.n; n++)
            used = used || s->stack.node[n].value == z->buffer[i];
        if (!used)
            return z->buffer[i];
    }
    CHECK(false, "%d gradient buffers are too few", z->buffers);
}

/* Close the lanes that have no micro-batch. */
static void close_empty(const struct zero *z, struct lane_sum *s, uint64_t at, uint64_t n)
{
    uint32_t end = lane_of_group(z, z->group->rank + 1);
    while (s->lane < end && first_of_lane(z, z->kk, s->lane) == first_of_lane(z, z->kk, s->lane + 1))
        push(z, &s->stack, (struct grad_node){ 0, s->lane++, NULL }, at, n);
}

/* Add elements [at, at + n) of the field of micro-batch k's gradient, which is the next one of its group, from leaf on.
 * keep: leaf lies in a whole field, and stays as it is until the sum is done. */
static void add_leaf(const struct zero *z, struct lane_sum *s, uint32_t k, float *leaf, bool keep, uint64_t at,
                     uint64_t n)
{
    float *sum = s->open; /* NULL: the leaf is all */
    if (sum)
        flat_add(where(z), sum + at, leaf, n);
    s->open = NULL;
    bool closed = k + 1 == first_of_lane(z, z->kk, s->lane + 1);
    if (closed)
        round_low(z, sum ? sum + at : leaf, n);
    struct grad_node node = { 0, s->lane, NULL };
    while (closed && s->stack.n) {
        struct grad_node *left = &s->stack.node[s->stack.n - 1];
        if (!tree_siblings(left->level, left->index, node.level, node.index))
            break;
        s->stack.n--;
        if (left->value) {
            flat_add(where(z), left->value + at, sum ? sum + at : leaf, n);
            sum = left->value;
            round_low(z, sum + at, n);
        }
        node.level++;
        node.index /= 2;
    }
    if (!sum && keep) {
        sum = leaf - at;
    } else if (!sum) {
        sum = free_buffer(z, s);
        flat_copy(where(z), sum + at, leaf, n);
    }
    if (!closed) {
        s->open = sum;
        return;
    }
    node.value = sum;
    CHECK(s->stack.n < STACK_MAX, "more tree nodes than %d", STACK_MAX);
    s->stack.node[s->stack.n++] = node;
    s->lane++;
    close_empty(z, s, at, n);
}

void zero_begin(struct zero *z, uint32_t k)
{
    CHECK(!z->o.micro_batches || k <= z->o.micro_batches, "%u micro-batches in a step of at most %u", k,
          z->o.micro_batches);
    z->kk = k;
    z->pass = 0;
    z->gathered = false;
    z->added = z->begun = z->ended = 0;
    z->sum = (struct lane_sum){ .lane = lane_of_group(z, z->group->rank) };
    close_empty(z, &z->sum, 0, 0);
    for (int c = 0; c < params_chunks(z->p); c++)
        z->chunk[c] = (struct chunk_sum){ 0, z->sum, z->sum };
    if (!is_cut(z))
        compute_kernels(where(z))->zero(compute_workers(where(z), z->o.workers), z->p->grad, (int64_t)z->p->total);
}

/* ---- leaves come to their shards ---- */

/* Messages of bucket b: slices of this rank's gradient to their shards, everybody's slices of this shard's run here. */
static size_t leaf_messages(struct zero *z, uint64_t b)
{
    struct zero_run mine = own_run(z, b);
    uint32_t k, pass = z->chunk[chunk_of(z, b)].pass;
    bool working = micro_batch_at(z, z->kk, pass, z->k->shard, &k);
    float *grad = shards_grad(z->shards, b), *to = z->recv;
    size_t n = 0;
    for (int r = 0; r < z->k->shards; r++) {
        struct zero_run theirs = bucket_run(z->k, b, r);
        if (r == z->k->shard)
            continue;
        if (working)
            z->xfer[n++] = (struct comm_xfer){ r, 1, true, grad + (theirs.begin - z->k->b[b].begin),
                                               run_elems(theirs) * sizeof(float) };
        if (micro_batch_at(z, z->kk, pass, r, &k)) {
            z->xfer[n++] = (struct comm_xfer){ r, 1, false, to, run_elems(mine) * sizeof(float) };
            to += run_elems(mine);
        }
    }
    return n;
}

/* Add the leaves of the bucket that is on its way. */
static status *finish_collecting(struct zero *z)
{
    if (!z->flying)
        return NULL;
    z->flying = false;
    TRY(comm_wait(&z->req));
    widen(z, &z->low[FLIGHTS], z->xfer);
    const struct bucket *b = &z->k->b[z->collected];
    struct zero_run mine = own_run(z, z->collected);
    struct chunk_sum *c = &z->chunk[chunk_of(z, z->collected)];
    struct lane_sum s = c->sum;
    float *from = z->recv;
    uint32_t k;
    for (int r = 0; r < z->k->shards && micro_batch_at(z, z->kk, c->pass, r, &k); r++) {
        bool me = r == z->k->shard;
        float *leaf = me ? shards_grad(z->shards, z->collected) + (mine.begin - b->begin) : from;
        round_low(z, leaf, run_elems(mine));
        add_leaf(z, &s, k, leaf, false, b->own, run_elems(mine));
        from += me ? 0 : run_elems(mine);
    }
    c->after = s;
    return NULL;
}

/* A unit's gradients are in its window: send them, bucket after bucket; the last one's travel while backward goes on.
 */
status *collect_unit(void *arg, int unit)
{
    struct zero *z = arg;
    TRY(finish_collecting(z)); /* if nothing of this unit trains, too: its window's neighbour may be cleared next */
    for (uint64_t b = 0; b < z->k->n; b++) {
        if (z->k->b[b].unit != unit)
            continue;
        TRY(finish_collecting(z));
        size_t n = leaf_messages(z, b);
        narrow(z, &z->low[FLIGHTS], z->xfer, n);
        TRY(comm_iexchange(z->shard, z->xfer, n, stream_of(z), &z->req));
        z->flying = true;
        z->collected = b;
    }
    return NULL;
}

/* A pass is done: its leaves count. A chunk where nothing trains has no bucket, but the same nodes. Where other
 * replicas have more passes, all ranks of this one have been without leaves: that is none. */
static status *count_pass(struct zero *z, int chunk)
{
    struct chunk_sum *c = &z->chunk[chunk];
    uint64_t begin, end;
    uint32_t k;
    TRY(finish_collecting(z));
    params_chunk_elems(z->p, chunk, &begin, &end);
    for (int r = 0; begin == end && r < z->k->shards && micro_batch_at(z, z->kk, c->pass, r, &k); r++)
        add_leaf(z, &c->after, k, z->buffer[0], false, 0, 0);
    c->sum = c->after;
    c->pass += c->pass < zero_passes(z, z->kk);
    z->sum = z->chunk[0].sum;
    z->pass = z->chunk[0].pass;
    return NULL;
}

static status *end_pass(struct zero *z, int chunk)
{
    TRY(shards_end(z->shards, chunk));
    return count_pass(z, chunk);
}

status *zero_added_none(struct zero *z, int chunk)
{
    uint32_t k;
    if (!is_cut(z))
        return NULL;
    CHECK(!zero_micro_batch(z, z->kk, z->chunk[chunk].pass, &k), "micro-batch %u is missing", k);
    return end_pass(z, chunk);
}

status *zero_idle(struct zero *z, int chunk)
{
    uint32_t k;
    CHECK(is_cut(z) && !zero_micro_batch(z, z->kk, z->chunk[chunk].pass, &k), "there is a micro-batch to run");
    TRY(shards_idle_backward(z->shards, chunk, true)); /* ends the pass */
    return count_pass(z, chunk);
}

status *zero_added(struct zero *z, uint32_t micro_batch)
{
    for (int c = 0; c < params_chunks(z->p); c++)
        TRY(zero_added_chunk(z, micro_batch, c));
    return NULL;
}

/* A bucket's part of this chunk in the last pass: its last leaf. */
static void add_last(struct zero *z, uint64_t bucket, int chunk, uint32_t micro_batch)
{
    struct zero_run run = { z->k->b[bucket].begin, z->k->b[bucket].end }, here;
    params_chunk_elems(z->p, chunk, &here.begin, &here.end);
    run.begin = run.begin > here.begin ? run.begin : here.begin;
    run.end = run.end < here.end ? run.end : here.end;
    if (run.begin >= run.end)
        return;
    z->sum = z->chunk[chunk].sum;
    if (z->o.deterministic)
        round_low(z, z->p->grad + run.begin, run_elems(run));
    add_leaf(z, &z->sum, micro_batch, z->p->grad + run.begin, true, run.begin, run_elems(run));
}

static status *move_on(struct zero *z, bool all);

status *zero_left(struct zero *z, int unit)
{
    int chunk = 0;
    uint32_t k;
    while (!params_hold(z->p, chunk, unit) && chunk + 1 < params_chunks(z->p))
        chunk++;
    if (is_cut(z) || z->chunk[chunk].pass + 1 != zero_passes(z, z->kk) ||
        !zero_micro_batch(z, z->kk, z->chunk[chunk].pass, &k))
        return NULL;
    for (; z->added < z->k->n; z->added++) {
        const struct due *d = &z->due[z->added];
        if (d->chunk != chunk || d->unit < unit)
            break;
        add_last(z, d->bucket, chunk, k);
    }
    return move_on(z, false);
}

/* The rest of a chunk's elements in its last pass. Those that a bucket has in common with another chunk come with each
 * of them. */
static void end_chunk(struct zero *z, int chunk, uint32_t micro_batch)
{
    for (uint64_t i = z->added; i < z->k->n; i++)
        add_last(z, z->due[i].bucket, chunk, micro_batch);
    while (z->added < z->k->n && z->chunk[z->due[z->added].chunk].pass == z->chunk[chunk].pass)
        z->added++;
}

/* All chunks' sums lie in the same buffers, each in its own part of them, for they take the same way. */
status *zero_added_chunk(struct zero *z, uint32_t micro_batch, int chunk)
{
    uint32_t due = 0;
    struct chunk_sum *s = &z->chunk[chunk];
    CHECK(zero_micro_batch(z, z->kk, s->pass, &due) && due == micro_batch, "micro-batch %u came where %u was due",
          micro_batch, due);
    if (is_cut(z))
        return end_pass(z, chunk);
    uint64_t begin, end;
    params_chunk_elems(z->p, chunk, &begin, &end);
    bool last = ++s->pass == zero_passes(z, z->kk);
    if (z->o.deterministic && !last)
        round_low(z, z->p->grad + begin, end - begin);
    if (last)
        end_chunk(z, chunk, micro_batch);
    if (z->o.deterministic || last)
        add_leaf(z, &s->sum, micro_batch, z->p->grad + begin, last, begin, last ? 0 : end - begin);
    if (z->o.deterministic && !last)
        flat_zero(where(z), z->p->grad + begin, end - begin);
    z->pass = z->chunk[0].pass;
    z->sum = last ? s->sum : z->sum;
    return last ? move_on(z, false) : NULL;
}

/* ---- the sum over groups ---- */

/* Start of a part's slice of `run`: own ones lie in the stack's memory, others in the receive buffer. */
static float *own_slice(const struct flight *f, const struct part *t, struct zero_run run)
{
    float *value = f->own[t->tag];
    return value && run_elems(run) ? value + field_at(f->of, f->bucket, run.begin) : value;
}

/* Messages of one bucket: my nodes' slices to their owners, everybody's slices of my part to me. */
static size_t reduce_messages(const struct zero *z, struct flight *f)
{
    int me = z->group->rank;
    uint64_t bucket = f->bucket;
    struct zero_run mine = own_part(z, bucket);
    float *to = f->recv;
    size_t n = 0;
    for (int i = 0; i < z->parts; i++) {
        const struct part *t = &z->part[i];
        if (part_empty(z, t))
            continue;
        if (t->group != me) {
            f->xfer[n++] = (struct comm_xfer){ t->group, t->tag, false, to, run_elems(mine) * sizeof(float) };
            to += run_elems(mine);
            continue;
        }
        for (int g = 0; g < z->group->size; g++) {
            struct zero_run theirs = group_part(z, bucket, g);
            if (g != me)
                f->xfer[n++] =
                    (struct comm_xfer){ g, t->tag, true, own_slice(f, t, theirs), run_elems(theirs) * sizeof(float) };
        }
    }
    return n;
}

/* Finish the tree in this rank's part of a bucket that has come. */
static void finish_bucket(void *arg)
{
    const struct flight *f = arg;
    struct zero *z = f->of;
    uint64_t bucket = f->bucket;
    widen(z, &z->low[f - z->flight], f->xfer);
    struct zero_run run = own_part(z, bucket);
    if (!run_elems(run))
        return;
    struct grad_stack s = { 0 };
    float *from = f->recv;
    for (int i = 0; i < z->parts; i++) {
        const struct part *t = &z->part[i];
        struct grad_node n = { t->level, t->begin >> t->level, NULL };
        if (t->group == z->group->rank) {
            n.value = own_slice(f, t, run);
        } else if (!part_empty(z, t)) {
            n.value = from;
            from += run_elems(run);
        }
        push(z, &s, n, 0, run_elems(run));
    }
    CHECK(s.n == 1, "the lanes of all groups are no whole tree");
    float *sum = s.node[0].value, *to = field(z) + field_at(z, bucket, run.begin);
    if (sum && sum != to)
        flat_copy(where(z), to, sum, run_elems(run));
    if (!sum)
        flat_zero(where(z), to, run_elems(run)); /* a step without micro-batches */
}

static status *begin_bucket(struct zero *z, struct flight *f, uint64_t bucket)
{
    f->of = z;
    f->bucket = bucket;
    for (int i = 0; i < z->own_parts; i++)
        f->own[i] = z->sum.stack.node[i].value;
    size_t n = reduce_messages(z, f);
    narrow(z, &z->low[f - z->flight], f->xfer, n);
    return comm_iexchange_then(z->sums, f->xfer, n, stream_of(z), finish_bucket, f, &f->req);
}

/* Begin the exchanges of buckets whose sums are complete here, as many as there is room for, and finish those that have
 * come; all: wait for them. */
static status *move_on(struct zero *z, bool all)
{
    while (z->ended < z->added) {
        if (z->begun < z->added && z->begun - z->ended < FLIGHTS) {
            TRY(begin_bucket(z, &z->flight[z->begun % FLIGHTS], z->due[z->begun].bucket));
            z->begun++;
            continue;
        }
        struct flight *f = &z->flight[z->ended % FLIGHTS];
        bool come = true;
        TRY(all ? comm_wait(&f->req) : comm_test(&f->req, &come));
        if (!come)
            return NULL;
        z->ended++;
    }
    return NULL;
}

status *spread_bucket(struct zero *z, struct comm *c, uint64_t bucket, float *block, uint64_t origin, bool gradients,
                      struct zero_run (*run_of)(const struct zero *, uint64_t, int))
{
    struct zero_run mine = run_of(z, bucket, c->rank);
    size_t n = 0;
    for (int r = 0; r < c->size; r++) {
        struct zero_run theirs = run_of(z, bucket, r);
        if (r == c->rank)
            continue;
        z->xfer[n++] = (struct comm_xfer){ r, 0, true, block + (mine.begin - origin), run_elems(mine) * sizeof(float) };
        z->xfer[n++] =
            (struct comm_xfer){ r, 0, false, block + (theirs.begin - origin), run_elems(theirs) * sizeof(float) };
    }
    return gradients ? exchange(z, c, n) : comm_exchange(c, z->xfer, n, stream_of(z));
}

static struct zero_run part_of_replica(const struct zero *z, uint64_t bucket, int rep)
{
    return bucket_part(z->k, bucket, z->k->shard, rep);
}

/* Every replica needs the sums of its shard's runs. */
static status *spread_over_replicas(struct zero *z)
{
    for (uint64_t b = 0; z->o.stage && z->rep->size > 1 && b < z->k->n; b++) {
        struct zero_run run = own_run(z, b);
        if (run_elems(run))
            TRY(spread_bucket(z, z->rep, b, field(z) + field_at(z, b, run.begin), run.begin, true, part_of_replica));
    }
    return NULL;
}

/* What this rank has finished the sum of, or (whole) what it has the sum of. */
static void round_sums(struct zero *z, bool whole)
{
    for (uint64_t b = 0; is_low(z) && b < z->k->n; b++) {
        struct zero_run run = whole ? own_run(z, b) : own_part(z, b);
        if (run_elems(run))
            round_low(z, field(z) + field_at(z, b, run.begin), run_elems(run));
    }
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

/* Of this rank's runs, bucket by bucket: squares, of which blocks that another rank counts stay 0, and their nodes. */
static status *list_own(struct zero *z)
{
    struct norm *n = &z->norm;
    int param = 0, chunk = 0;
    uint64_t at = 0;
    uint32_t node = n->nodes + (uint32_t)z->dp->rank * n->node_cap;
    for (uint64_t b = 0; b < z->k->n; b++)
        for (struct zero_run run = own_part(z, b), piece; run.begin < run.end; run.begin = piece.end) {
            uint64_t block, first = at;
            piece = norm_piece(z, run, &chunk, &block);
            for (uint64_t e = piece.begin; e < piece.end; e += PARAM_ALIGN, at++) {
                if (counts(z, e, &param))
                    continue;
                struct uncounted *last = n->gaps ? &n->uncounted[n->gaps - 1] : NULL;
                if (last && last->first + last->n == at) {
                    last->n++;
                    continue;
                }
                struct uncounted *more = mem_array(n->uncounted, n->gaps + 1, sizeof *more);
                if (!more)
                    return ERR(NO_MEMORY, "norms of shared parameters");
                n->uncounted = more;
                n->uncounted[n->gaps++] = (struct uncounted){ at, 1 };
            }
            for (uint64_t end = block + (at - first); block < end;) {
                unsigned level = tree_level(block, end);
                plan_node(&n->plan, node++, n->squares + (uint32_t)first, level);
                first += (uint64_t)1 << level;
                block += (uint64_t)1 << level;
            }
        }
    n->own = plan_phase(&n->plan);
    return NULL;
}

/* The nodes of all ranks, in order of place: bucket by bucket, shard by shard, each its replicas' parts. plan false:
 * they are counted. */
static void list_nodes(struct zero *z, uint32_t *cursor, struct tree *nodes, bool plan)
{
    struct norm *n = &z->norm;
    int chunk = 0;
    for (uint64_t b = 0; b < z->k->n; b++)
        for (int i = 0; i < z->dp->size; i++) {
            int shard = i / z->k->reps, rep = i % z->k->reps, r = rep * z->k->shards + shard;
            for (struct zero_run run = bucket_part(z->k, b, shard, rep), piece; run.begin < run.end;
                 run.begin = piece.end) {
                uint64_t at, end;
                piece = norm_piece(z, run, &chunk, &at);
                end = at + run_elems(piece) / PARAM_ALIGN;
                for (unsigned level; at < end; at += (uint64_t)1 << level, cursor[r]++) {
                    level = tree_level(at, end);
                    if (plan)
                        tree_push(&n->plan, &nodes[chunk], level, at >> level,
                                  n->nodes + (uint32_t)r * n->node_cap + cursor[r]);
                }
            }
        }
}

static status *list_over_dp(struct zero *z, uint32_t *cursor, struct tree *nodes)
{
    struct norm *n = &z->norm;
    uint64_t blocks = 0;
    for (uint64_t b = 0; b < z->k->n; b++)
        blocks += run_elems(own_part(z, b)) / PARAM_ALIGN;
    list_nodes(z, cursor, nodes, false);
    for (int r = 0; r < z->dp->size; r++) {
        n->node_cap = cursor[r] > n->node_cap ? cursor[r] : n->node_cap;
        cursor[r] = 0;
    }
    n->squares = plan_slots(&n->plan, blocks);
    n->nodes = plan_slots(&n->plan, (uint64_t)z->dp->size * n->node_cap);
    TRY(list_own(z));
    list_nodes(z, cursor, nodes, true);
    return NULL;
}

/* Of all stages, whose chunks' nodes are at `all`. */
static void list_over_pp(struct zero *z, const struct tree *all)
{
    struct norm *n = &z->norm;
    struct tree t = { 0 };
    uint32_t chunks = (uint32_t)params_chunks(z->p), stages = z->o.pp ? (uint32_t)z->o.pp->size : 1;
    for (uint32_t c = 0; c < chunks; c++)
        for (uint32_t s = 0; s < stages; s++) {
            const struct tree *part = &all[s * chunks + c];
            uint32_t from = n->stages + (s * chunks + c) * TREE_NODES;
            for (int i = 0; i < part->n; i++)
                tree_push(&n->plan, &t, part->node[i].level, part->node[i].index,
                          z->o.pp ? from + (uint32_t)i : part->node[i].slot);
        }
    n->total = tree_total(&n->plan, &t);
}

/* What follows the exchanges over pp and tp; nodes: of this stage's chunks, all: room for those of all stages. */
static status *list_rest(struct zero *z, const struct tree *nodes, struct tree *all)
{
    struct norm *n = &z->norm;
    uint32_t chunks = (uint32_t)params_chunks(z->p);
    if (z->o.pp) {
        n->stages = plan_slots(&n->plan, (uint64_t)z->o.pp->size * chunks * TREE_NODES);
        uint32_t mine = n->stages + (uint32_t)z->o.pp->rank * chunks * TREE_NODES;
        for (uint32_t c = 0; c < chunks; c++)
            for (int i = 0; i < nodes[c].n; i++)
                plan_copy(&n->plan, mine + c * TREE_NODES + (uint32_t)i, nodes[c].node[i].slot);
        n->over_dp = plan_phase(&n->plan);
        TRY(comm_allgather(z->o.pp, nodes, all, chunks * sizeof *nodes, NULL));
    }
    list_over_pp(z, z->o.pp ? all : nodes);
    if (z->o.tp) {
        n->tp = plan_slots(&n->plan, (uint64_t)z->o.tp->size);
        plan_copy(&n->plan, n->tp + (uint32_t)z->o.tp->rank, n->total);
        n->over_pp = plan_phase(&n->plan);
        n->total = n->tp;
        for (uint32_t r = 1; r < (uint32_t)z->o.tp->size; r++) {
            uint32_t sum = plan_slots(&n->plan, 1);
            plan_add(&n->plan, sum, n->total, n->tp + r);
            n->total = sum;
        }
    }
    n->sum = plan_phase(&n->plan);
    return plan_ready(&n->plan, where(z), z->o.workers);
}

status *open_norm(struct zero *z)
{
    size_t chunks = (size_t)params_chunks(z->p), stages = z->o.pp ? (size_t)z->o.pp->size : 0;
    uint32_t *cursor = mem_calloc((size_t)z->dp->size, sizeof *cursor);
    struct tree *nodes = mem_calloc(chunks, sizeof *nodes), *all = mem_calloc(chunks * stages + 1, sizeof *all);
    status *st = cursor && nodes && all ? NULL : ERR(NO_MEMORY, "norms of %zu chunks of stages", chunks);
    if (!st)
        st = list_over_dp(z, cursor, nodes);
    if (z->o.pp)
        st = comm_agree(z->o.pp, st);
    if (!st)
        st = list_rest(z, nodes, all);
    mem_free(cursor);
    mem_free(nodes);
    mem_free(all);
    return st;
}

void close_norm(struct zero *z)
{
    plan_close(&z->norm.plan);
    mem_free(z->norm.uncounted);
}

/* Sums of squares of this rank's blocks. */
static void own_squares(struct zero *z)
{
    const struct kernels *k = compute_kernels(where(z));
    struct workers *w = compute_workers(where(z), z->o.workers);
    double *to = z->norm.plan.v + z->norm.squares;
    for (uint64_t b = 0; b < z->k->n; b++) {
        struct zero_run run = own_part(z, b);
        if (!run_elems(run))
            continue;
        k->block_sums(w, field(z) + field_at(z, b, run.begin), (int64_t)run_elems(run), true, to);
        to += run_elems(run) / PARAM_ALIGN;
    }
    to = z->norm.plan.v + z->norm.squares;
    for (uint64_t i = 0; i < z->norm.gaps; i++) /* a double of zeros is two floats of zeros */
        k->zero(w, (float *)(void *)(to + z->norm.uncounted[i].first), 2 * (int64_t)z->norm.uncounted[i].n);
}

/* `each` numbers of every rank of c, which begin at `at`. */
static status *gather(const struct zero *z, struct comm *c, uint32_t at, size_t each)
{
    double *v = z->norm.plan.v + at;
    if (!c || c->size == 1 || !each)
        return NULL;
    return comm_allgather(c, v + (size_t)c->rank * each, v, each * sizeof *v, stream_of(z));
}

status *zero_squares(struct zero *z, const double **squares)
{
    const struct norm *n = &z->norm;
    round_sums(z, z->o.stage > 0);
    own_squares(z);
    plan_run(&n->plan, n->own);
    TRY(gather(z, z->dp, n->nodes, n->node_cap));
    if (z->o.pp)
        plan_run(&n->plan, n->over_dp);
    TRY(gather(z, z->o.pp, n->stages, (size_t)params_chunks(z->p) * TREE_NODES));
    if (z->o.tp)
        plan_run(&n->plan, n->over_pp);
    TRY(gather(z, z->o.tp, n->tp, 1));
    plan_run(&n->plan, n->sum);
    *squares = n->plan.v + n->total;
    return NULL;
}

/* The host waits for it. */
static status *see_norm(struct zero *z, double *norm)
{
    const double *squares;
    TRY(zero_squares(z, &squares));
    TRY(compute_get(where(z), norm, squares, sizeof *norm));
    *norm = sqrt(*norm);
    return NULL;
}

status *zero_reduce(struct zero *z, double *norm)
{
    CHECK(z->pass == zero_passes(z, z->kk), "%u of %u passes were run", z->pass, zero_passes(z, z->kk));
    for (int c = 0; c < params_chunks(z->p); c++)
        CHECK(z->chunk[c].pass == z->pass, "chunk %d has run %u passes of %u", c, z->chunk[c].pass, z->pass);
    CHECK(z->sum.stack.n == z->own_parts, "%d nodes where %d are due", z->sum.stack.n, z->own_parts);
    z->added = z->k->n; /* with no pass at all, too */
    TRY(move_on(z, true));
    const struct ordered_at at = rank_sums_at(where(z));
    for (uint64_t b = 0; z->o.cp && b < z->k->n; b++) {
        struct zero_run run = own_part(z, b);
        if (run_elems(run))
            TRY(ordered_allreduce(z->o.cp, field(z) + field_at(z, b, run.begin), run_elems(run), z->cp_room, &at));
    }
    TRY(shared_grads_sum(z->shared, field(z)));
    round_sums(z, false);
    TRY(spread_over_replicas(z));
    return norm ? see_norm(z, norm) : NULL;
}

float *zero_own_sums(const struct zero *z, uint64_t offset, uint64_t elems, uint64_t *n)
{
    float *sums = NULL;
    *n = 0;
    for (uint64_t b = 0; b < z->k->n; b++) {
        if (z->k->b[b].begin < offset || z->k->b[b].begin >= offset + elems)
            continue;
        sums = sums ? sums : field(z) + z->k->b[b].own;
        *n += run_elems(own_run(z, b));
    }
    return sums;
}
