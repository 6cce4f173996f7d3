/* balance: see balance.h. Each micro-batch and layer has a slot of its own, so that a pass that runs twice (recomputed
 * blocks) counts once; the sums are of integers, or in order of micro-batches. On a device kernels fill the slots,
 * which are read once a step. */
#include "trainer/balance.h"

#include "comm/base/mem.h"
#include "trainer/ops/compute.h"
#include "trainer/ops/kernels.h"
#include "trainer/ops/moe.h"
#include "trainer/parallel/shards.h"

#include <string.h>

struct balance {
    struct model *m;
    struct expert_load load; /* balance, and behind it count, are one block */
    size_t slots, bytes;     /* micro-batches x layers; of the block */
    double *balance;         /* the host's copy of it; on the CPU the same */
    int32_t *taken;
    uint64_t *count; /* [layers][experts] */
    double *loss;    /* [layers] */
};

static status *take_slots(struct balance *b)
{
    void *block;
    TRY(compute_alloc(b->m->params.compute, b->bytes, &block));
    b->load.balance = block;
    b->load.count = (int32_t *)(b->load.balance + b->slots);
    b->balance = compute_host(b->m->params.compute) ? block : mem_calloc(1, b->bytes);
    b->taken = b->balance ? (int32_t *)(b->balance + b->slots) : NULL;
    return b->balance ? NULL : ERR(NO_MEMORY, "%zu bytes", b->bytes);
}

status *balance_open(struct model *m, int64_t layers, uint32_t most, struct balance **out)
{
    *out = NULL;
    if (!m->moe.layers)
        return NULL;
    struct balance *b = mem_calloc(1, sizeof *b);
    if (!b)
        return ERR(NO_MEMORY, "loads of experts");
    size_t experts = (size_t)m->moe.experts;
    b->m = m;
    b->slots = most * (size_t)layers;
    b->bytes = b->slots * (sizeof(double) + experts * sizeof(int32_t));
    b->load =
        (struct expert_load){ .layers = layers,
                              .experts = m->moe.experts,
                              .balance_weight = (float)(m->moe.balance / ((double)most * (double)m->moe.layers)) };
    b->count = mem_calloc((size_t)layers * experts, sizeof *b->count);
    b->loss = mem_calloc((size_t)layers, sizeof *b->loss);
    status *st = b->count && b->loss ? take_slots(b) : ERR(NO_MEMORY, "sums");
    if (st) {
        balance_close(b);
        return status_wrap(st, "loads of %zu experts in %lld layers and %u micro-batches", experts, (long long)layers,
                           most);
    }
    m->load = &b->load;
    *out = b;
    return NULL;
}

void balance_close(struct balance *b)
{
    if (!b)
        return;
    b->m->load = NULL;
    if (b->balance != b->load.balance)
        mem_free(b->balance);
    compute_free(b->m->params.compute, b->load.balance, b->bytes);
    mem_free(b->count);
    mem_free(b->loss);
    mem_free(b);
}

void balance_begin(struct balance *b)
{
    const struct compute *c = b ? b->m->params.compute : NULL;
    if (b)
        compute_kernels(c)->zero(compute_workers(c, NULL), (float *)b->load.balance,
                                 (int64_t)(b->bytes / sizeof(float)));
}

status *balance_fetch(struct balance *b)
{
    struct compute *c = b ? b->m->params.compute : NULL;
    return compute_host(c) ? NULL : compute_fetch(c, b->balance, b->load.balance, b->bytes);
}

/* Tokens of this rank's micro-batches, of all micro-batches, of all stages' layers. */
static status *sum_counts(struct balance *b, struct comm *data, struct comm *pp)
{
    size_t width = (size_t)(b->load.layers * b->load.experts);
    memset(b->count, 0, width * sizeof *b->count);
    for (size_t i = 0; i < b->slots * (size_t)b->load.experts; i++)
        b->count[i % width] += (uint64_t)b->taken[i];
    TRY(comm_allreduce(data, b->count, width, COMM_U64, COMM_SUM, NULL));
    return pp ? comm_allreduce(pp, b->count, width, COMM_U64, COMM_SUM, NULL) : NULL;
}

static uint64_t sum_of(const uint64_t *count, int64_t experts)
{
    uint64_t sum = 0;
    for (int64_t e = 0; e < experts; e++)
        sum += count[e];
    return sum;
}

static void measure(const struct balance *b, uint32_t k, struct load_metrics *out)
{
    *out = (struct load_metrics){ .least = (double)b->load.experts };
    for (int64_t i = 0; i < b->load.layers; i++) {
        const uint64_t *count = b->count + i * b->load.experts;
        uint64_t sum = sum_of(count, b->load.experts);
        out->loss += b->loss[i] / ((double)k * (double)b->m->moe.layers);
        for (int64_t e = 0; sum && e < b->load.experts; e++) {
            double load = (double)count[e] * (double)b->load.experts / (double)sum;
            out->most = load > out->most ? load : out->most;
            out->least = load < out->least ? load : out->least;
        }
    }
}

/* Experts [first, end) of a layer's biases, which lie at `bias`. */
static status *move_some(const struct balance *b, const uint64_t *count, uint64_t first, uint64_t end, float *bias,
                         status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    uint64_t sum = sum_of(count, b->load.experts), experts = (uint64_t)b->load.experts;
    float rate = (float)b->m->moe.rate, moved[EXPERTS_MAX];
    size_t bytes = (end - first) * sizeof *bias;
    TRY(fence(arg, bias, bytes));
    TRY(compute_get(b->m->params.compute, moved, bias, bytes)); /* waits for the step, once a layer */
    for (uint64_t e = first; e < end; e++)
        moved[e - first] += count[e] * experts < sum ? rate : count[e] * experts > sum ? -rate : 0;
    return compute_put(b->m->params.compute, bias, moved, bytes);
}

/* Of the layers that are here; where ZeRO cuts values (s, else NULL), what this shard has of them. */
static status *move_biases(const struct balance *b, const struct shards *s,
                           status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg)
{
    bool cut = s && shards_cut_values(s);
    const struct params *ps = cut ? shards_params(s) : &b->m->params;
    if (b->m->moe.rate > 0 && cut) /* who has no part of them: a first call may be collective */
        TRY(fence(arg, shards_own(s, true).value, 0));
    for (int i = 0; b->m->moe.rate > 0 && i < ps->count; i++) {
        const struct param *p = &ps->p[i];
        if (!p->buffer || p->away)
            continue;
        const uint64_t *count = b->count + p->block * b->load.experts;
        uint64_t end = p->offset + (uint64_t)b->load.experts;
        if (!cut) {
            TRY(move_some(b, count, 0, end - p->offset, p->value.data, fence, arg));
            continue;
        }
        struct shard_runs own = shards_own(s, true);
        float *value = own.value;
        for (uint64_t r = 0; r < own.runs; value += run_elems(own.run[r]), r++) {
            uint64_t lo = own.run[r].begin > p->offset ? own.run[r].begin : p->offset,
                     hi = own.run[r].end < end ? own.run[r].end : end;
            if (lo < hi)
                TRY(move_some(b, count, lo - p->offset, hi - p->offset, value + (lo - own.run[r].begin), fence, arg));
        }
    }
    return NULL;
}

status *balance_finish(struct balance *b, struct zero *z, uint32_t k, struct comm *data, struct comm *pp,
                       status *(*fence)(void *arg, const void *addr, size_t bytes), void *arg, struct load_metrics *out)
{
    if (!b)
        return NULL;
    TRY(compute_fetched(b->m->params.compute));
    TRY(sum_counts(b, data, pp));
    TRY(zero_sum_scalars(z, b->balance, k, (uint32_t)b->load.layers, b->loss));
    if (pp)
        TRY(comm_allreduce(pp, b->loss, (size_t)b->load.layers, COMM_F64, COMM_SUM, NULL));
    measure(b, k, out);
    return move_biases(b, zero_shards(z), fence, arg);
}
