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
    bool matrix = p->shape.ndim == 2;
    uint64_t name = mix(hash64(p->name, strlen(p->name)) + salt), held = box_volume(p->shape.ndim, &p->box), sum = 0,
             cols = matrix ? p->box.len[1] : 1, stride = matrix ? p->shape.dim[1] : 1,
             left = matrix ? p->box.off[1] : 0;
    for (uint64_t e = begin; e < end && e < held; e++) {
        uint32_t bits;
        memcpy(&bits, x + (e - begin), sizeof bits);
        uint64_t place = (p->box.off[0] + e / cols) * stride + left + e % cols;
        sum += mix(mix(name + place) ^ bits);
    }
    return sum;
}

/* Of those that hold a part, one adds it. */
static bool first_of_sharers(const struct trainer *t, const struct param *p)
{
    return p->alias < 0 && (!t->tp || t->tp->rank % p->share == 0);
}

static uint64_t own_weights(const struct trainer *t, const struct params *ps)
{
    uint64_t sum = 0;
    for (int i = 0; t->dp->rank == 0 && i < ps->count; i++)
        if (first_of_sharers(t, &ps->p[i]))
            sum += hash_run(&ps->p[i], 0, 0, param_elems(&ps->p[i]), ps->p[i].value.data);
    return sum;
}

static uint64_t own_moments(const struct trainer *t, const struct param *p)
{
    struct zero_moments z = zero_moments(t->zero);
    uint64_t sum = 0, begin = p->offset, end = begin + param_elems(p);
    const float *m = z.m, *v = z.v;
    for (uint64_t r = 0; r < z.run_count; r++) {
        uint64_t lo = z.run[r].begin > begin ? z.run[r].begin : begin, hi = z.run[r].end < end ? z.run[r].end : end;
        if (lo < hi)
            sum += hash_run(p, 1, lo - begin, hi - begin, m + (lo - z.run[r].begin)) +
                   hash_run(p, 2, lo - begin, hi - begin, v + (lo - z.run[r].begin));
        m += z.run[r].end - z.run[r].begin;
        v += z.run[r].end - z.run[r].begin;
    }
    return sum;
}

status *state_hashes(struct trainer *t, struct state_hashes *out)
{
    const struct params *ps = &t->model->params;
    uint64_t hash[3] = { own_weights(t, ps), 0,
                         t->ref_live && t->ref_model ? own_weights(t, &t->ref_model->params) : 0 };
    for (int i = 0; i < ps->count && (t->cfg->parallel.zero || t->dp->rank == 0); i++)
        if (first_of_sharers(t, &ps->p[i]))
            hash[1] += own_moments(t, &ps->p[i]);
    TRY(comm_allreduce(t->world, hash, 3, COMM_U64, COMM_SUM, NULL));
    *out = (struct state_hashes){ hash[0], hash[1], hash[2] };
    return NULL;
}
