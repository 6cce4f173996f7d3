/* state_hash: checkpoint.state_hash: hashes of weights and moments that depend on no cut: the sum over all elements of
 * whole tensors of a hash of (tensor, element, bits). */
#include "trainer/trainer.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "trainer/ops/flat.h"

#include <string.h>

/* Steele, Lea, Flood 2014: the finaliser of SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Elements of p's part, from `begin` on, and the sum of their hashes so far. */
struct hashed {
    const struct param *p;
    uint64_t salt, begin, sum;
};

/* Those that lie at x; padding does not count. */
static status *hash_seen(void *arg, const void *x, size_t at, size_t bytes)
{
    struct hashed *h = arg;
    const struct param *p = h->p;
    uint64_t begin = h->begin + at / sizeof(float), end = begin + bytes / sizeof(float);
    uint64_t name = mix(hash64(p->name, strlen(p->name)) + h->salt), held = box_volume(p->shape.ndim, &p->box),
             cols = p->box.len[p->shape.ndim - 1], row = 0, sum = 0;
    for (uint64_t e = begin; e < end && e < held; e++) {
        uint32_t bits;
        memcpy(&bits, (const float *)x + (e - begin), sizeof bits);
        if (e == begin || e % cols == 0)
            row = box_element(&p->shape, &p->box, e - e % cols);
        sum += mix(mix(name + row + e % cols) ^ bits);
    }
    h->sum += sum;
    return NULL;
}

/* Elements [begin, end) of p's part, which lie at x. */
static status *hash_run(const struct trainer *t, const struct param *p, uint64_t salt, uint64_t begin, uint64_t end,
                        const float *x, uint64_t *sum)
{
    struct hashed h = { p, salt, begin, *sum };
    TRY(flat_read(t->compute, x, (end - begin) * sizeof *x, hash_seen, &h));
    *sum = h.sum;
    return NULL;
}

/* Of those that hold a part, one adds it. */
static bool first_of_sharers(const struct trainer *t, const struct param *p)
{
    return p->alias < 0 && (!t->tp || t->tp->rank % p->share == 0);
}

/* Parameter p's elements in the runs that ZeRO leaves this rank, of `block`. */
static status *hash_runs(const struct trainer *t, const struct param *p, uint64_t salt, const struct zero_run *run,
                         uint64_t runs, const float *block, uint64_t *sum)
{
    uint64_t begin = p->offset, end = begin + param_elems(p);
    for (uint64_t r = 0; r < runs; r++) {
        uint64_t lo = run[r].begin > begin ? run[r].begin : begin, hi = run[r].end < end ? run[r].end : end;
        if (lo < hi)
            TRY(hash_run(t, p, salt, lo - begin, hi - begin, block + (lo - run[r].begin), sum));
        block += run_elems(run[r]);
    }
    return NULL;
}

/* Of the ranks that hold the same runs, one adds them. */
static bool first_replica(const struct trainer *t, const struct param *p, bool cut)
{
    if (t->cp && t->cp->rank > 0)
        return false;
    if (t->ep && p->experts)
        return t->ep_dp->rank < (cut && t->experts->zero ? zero_holders(t->experts->zero) : 1);
    int64_t shards = !cut ? 1 : t->cfg->parallel.dp_shard ? t->cfg->parallel.dp_shard : t->dp->size;
    return t->dp->rank < shards;
}

static status *own_weights(const struct trainer *t, const struct model *m, uint64_t *sum)
{
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        const struct shards *s = trainer_shards_of(t, m, &p);
        bool cut = s && shards_cut_values(s);
        struct shard_runs own = cut ? shards_own(s, p->frozen) : (struct shard_runs){ 0 };
        if (!first_replica(t, p, cut && t->cfg->parallel.zero) || !first_of_sharers(t, p))
            continue;
        if (cut)
            TRY(hash_runs(t, p, 0, own.run, own.runs, own.value, sum));
        else
            TRY(hash_run(t, p, 0, 0, param_elems(p), p->value.data, sum));
    }
    return NULL;
}

static status *own_moments(const struct trainer *t, const struct params *ps, uint64_t *sum)
{
    for (int i = 0; i < ps->count; i++) {
        const struct param *p = &ps->p[i];
        if (p->frozen || !first_replica(t, p, t->cfg->parallel.zero) || !first_of_sharers(t, p))
            continue;
        struct zero_moments z = zero_moments(experts_zero(t->experts, t->zero, ps, &p));
        TRY(hash_runs(t, p, 1, z.run, z.run_count, z.m, sum));
        TRY(hash_runs(t, p, 2, z.v_run, z.v_run_count, z.v, sum));
    }
    return NULL;
}

status *state_hashes(struct trainer *t, struct state_hashes *out)
{
    uint64_t hash[3] = { 0 };
    status *st = own_weights(t, t->model, &hash[0]);
    if (!st)
        st = own_moments(t, &t->model->params, &hash[1]);
    if (!st && t->ref_live && t->ref_model)
        st = own_weights(t, t->ref_model, &hash[2]);
    TRY(comm_agree(t->world, st));
    TRY(comm_allreduce(t->world, hash, 3, COMM_U64, COMM_SUM, NULL));
    *out = (struct state_hashes){ hash[0], hash[1], hash[2] };
    return NULL;
}
