/* state_hash: checkpoint.state_hash: hashes of weights and moments that depend on no cut: the sum over all elements of
 * whole tensors of a hash of (tensor, element, bits). */
#include "trainer/trainer.h"

#include "comm/base/bytes.h"

#include <string.h>

/* Steele, Lea, Flood 2014: the finaliser of SplitMix64. */
static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Elements [begin, end) of p's part, which lie at x; padding does not count. */
static uint64_t hash_run(const struct param *p, uint64_t salt, uint64_t begin, uint64_t end, const float *x)
{
    uint64_t name = mix(hash64(p->name, strlen(p->name)) + salt), held = box_volume(p->shape.ndim, &p->box), sum = 0,
             cols = p->box.len[p->shape.ndim - 1], row = 0;
    for (uint64_t e = begin; e < end && e < held; e++) {
        uint32_t bits;
        memcpy(&bits, x + (e - begin), sizeof bits);
        if (e == begin || e % cols == 0)
            row = box_element(&p->shape, &p->box, e - e % cols);
        sum += mix(mix(name + row + e % cols) ^ bits);
    }
    return sum;
}

/* Of those that hold a part, one adds it. */
static bool first_of_sharers(const struct trainer *t, const struct param *p)
{
    return p->alias < 0 && (!t->tp || t->tp->rank % p->share == 0);
}

/* Parameter p's elements in the runs that ZeRO leaves this rank, of `block`. */
static uint64_t hash_runs(const struct param *p, uint64_t salt, const struct zero_run *run, uint64_t runs,
                          const float *block)
{
    uint64_t sum = 0, begin = p->offset, end = begin + param_elems(p);
    for (uint64_t r = 0; r < runs; r++) {
        uint64_t lo = run[r].begin > begin ? run[r].begin : begin, hi = run[r].end < end ? run[r].end : end;
        if (lo < hi)
            sum += hash_run(p, salt, lo - begin, hi - begin, block + (lo - run[r].begin));
        block += run_elems(run[r]);
    }
    return sum;
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

static uint64_t own_weights(const struct trainer *t, const struct model *m)
{
    uint64_t sum = 0;
    for (int i = 0; i < m->params.count; i++) {
        const struct param *p = &m->params.p[i];
        const struct shards *s = trainer_shards_of(t, m, &p);
        bool cut = s && shards_cut_values(s);
        struct shard_runs own = cut ? shards_own(s, p->frozen) : (struct shard_runs){ 0 };
        if (first_replica(t, p, cut && t->cfg->parallel.zero) && first_of_sharers(t, p))
            sum +=
                cut ? hash_runs(p, 0, own.run, own.runs, own.value) : hash_run(p, 0, 0, param_elems(p), p->value.data);
    }
    return sum;
}

static uint64_t own_moments(const struct trainer *t, const struct params *ps)
{
    uint64_t sum = 0;
    for (int i = 0; i < ps->count; i++) {
        const struct param *p = &ps->p[i];
        if (p->frozen || !first_replica(t, p, t->cfg->parallel.zero) || !first_of_sharers(t, p))
            continue;
        struct zero_moments z = zero_moments(experts_zero(t->experts, t->zero, ps, &p));
        sum += hash_runs(p, 1, z.run, z.run_count, z.m) + hash_runs(p, 2, z.v_run, z.v_run_count, z.v);
    }
    return sum;
}

status *state_hashes(struct trainer *t, struct state_hashes *out)
{
    const struct params *ps = &t->model->params;
    uint64_t hash[3] = { own_weights(t, t->model), own_moments(t, ps),
                         t->ref_live && t->ref_model ? own_weights(t, t->ref_model) : 0 };
    TRY(comm_allreduce(t->world, hash, 3, COMM_U64, COMM_SUM, NULL));
    *out = (struct state_hashes){ hash[0], hash[1], hash[2] };
    return NULL;
}
