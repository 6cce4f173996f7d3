/* logps: see logps.h. A pack's values lie one behind the other without gaps, so that one copy takes them all. */
#include "trainer/logps.h"

#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"
#include "trainer/trainer.h"

#include <string.h>

enum { READ = 5 };

/* Of `about`: offsets, and three of each segment, and targets. */
static size_t about_count(const struct logps_room *r)
{
    return 4 * ((size_t)r->segments + 1) + (size_t)r->most;
}

static size_t kept_bytes(const struct logps_room *r)
{
    return (size_t)r->slots * (size_t)r->segments * sizeof(struct sequence_sums);
}

static status *open_kept(struct trainer *t, struct kept_sums *k)
{
    const struct logps_room *r = &t->logps;
    void *there = NULL;
    k->micro_batch = mem_calloc(r->slots, sizeof *k->micro_batch);
    k->seen = mem_calloc(kept_bytes(r), 1);
    status *st = k->micro_batch && k->seen ? compute_alloc(t->compute, kept_bytes(r), &there)
                                           : ERR(NO_MEMORY, "%u passes", r->slots);
    k->there = there;
    return status_wrap(st, "sums of the %u micro-batches of a step", r->slots);
}

static status *open_losses(struct trainer *t)
{
    struct logps_room *r = &t->logps;
    void *about = NULL, *ref = NULL;
    r->slots = zero_most_passes(t->zero, (uint32_t)(t->cfg->train.global_batch / t->cfg->train.micro_batch));
    r->segments = 2 * (int32_t)t->cfg->train.micro_batch;
    TRY(open_kept(t, &r->step));
    if (t->cfg->algo.reference != REFERENCE_PRECOMPUTED)
        TRY(open_kept(t, &r->live));
    r->about_host = mem_calloc(about_count(r), sizeof *r->about_host);
    if (!r->about_host)
        return ERR(NO_MEMORY, "what losses read of %lld tokens", (long long)r->most);
    TRY(compute_alloc(t->compute, about_count(r) * sizeof *r->about, &about));
    r->about = about;
    TRY(compute_alloc(t->compute, (size_t)r->segments * sizeof *r->ref, &ref));
    r->ref = ref;
    return NULL;
}

status *logps_open(struct trainer *t)
{
    struct logps_room *r = &t->logps;
    if (compute_host(t->compute))
        return NULL;
    r->most = t->heldout ? t->heldout_pack.cap_tokens : 0;
    for (int i = 0; i < t->phases; i++)
        r->most = t->phase[i].pack.cap_tokens > r->most ? t->phase[i].pack.cap_tokens : r->most;
    r->host = mem_calloc((size_t)((READ + 1) * r->most), sizeof *r->host);
    if (!r->host)
        return ERR(NO_MEMORY, "log-probabilities of %lld tokens", (long long)r->most);
    return t->zero && pipe_last(t->pipe) ? open_losses(t) : NULL;
}

static void close_kept(struct trainer *t, struct kept_sums *k)
{
    compute_free(t->compute, k->there, kept_bytes(&t->logps));
    mem_free(k->micro_batch);
    mem_free(k->seen);
}

void logps_close(struct trainer *t)
{
    struct logps_room *r = &t->logps;
    close_kept(t, &r->step);
    close_kept(t, &r->live);
    compute_free(t->compute, r->about, about_count(r) * sizeof *r->about);
    compute_free(t->compute, r->ref, (size_t)r->segments * sizeof *r->ref);
    mem_free(r->about_host);
    mem_free(r->host);
}

static struct logps of_block(float *x, int64_t n, bool tok)
{
    struct logps y = { .logp = x };
    if (tok)
        y.tok = (struct logprob_stats){ x + n, x + 2 * n, x + 3 * n, x + 4 * n };
    return y;
}

/* How many of them there are. */
static int arrays_of(const struct tensor *logp, const struct logprob_stats *tok, const float *x[READ])
{
    x[0] = logp->data;
    if (!tok)
        return 1;
    x[1] = tok->entropy;
    x[2] = tok->logit;
    x[3] = tok->log_square;
    x[4] = tok->top;
    return READ;
}

static int64_t tokens_of(const struct trainer *t, const struct tensor *logp)
{
    int64_t n = tensor_elems(logp);
    CHECK(n <= t->logps.most, "%lld log-probabilities where %lld are the most", (long long)n, (long long)t->logps.most);
    return n;
}

status *logps_get(struct trainer *t, const struct tensor *logp, const struct logprob_stats *tok, struct logps *out)
{
    const float *x[READ];
    if (compute_host(t->compute)) {
        *out = (struct logps){ logp->data, tok ? *tok : (struct logprob_stats){ 0 } };
        return NULL;
    }
    int64_t n = tokens_of(t, logp);
    for (int i = 0, count = arrays_of(logp, tok, x); i < count; i++)
        TRY(compute_get(t->compute, t->logps.host + i * n, x[i], (size_t)n * sizeof(float)));
    *out = of_block(t->logps.host, n, tok);
    return NULL;
}

float *logps_dlogp(struct trainer *t, const struct tensor *logp)
{
    return compute_host(t->compute) ? logp->grad : t->logps.host + READ * t->logps.most;
}

status *logps_put(struct trainer *t, struct tensor *logp)
{
    if (compute_host(t->compute))
        return NULL;
    return compute_put(t->compute, logp->grad, logps_dlogp(t, logp), (size_t)tensor_elems(logp) * sizeof(float));
}

bool logps_stay(const struct trainer *t)
{
    return t->logps.slots > 0;
}

/* Where scored tokens of segment s weigh less from on: those by which it is longer than the other of its pair. */
static int32_t shared_end(const struct pack *p, int32_t s)
{
    const struct sequence *pair = p->data->seq + 2 * p->row[s / 2];
    uint32_t shared = pair[0].scored < pair[1].scored ? pair[0].scored : pair[1].scored, seen = 0;
    int32_t i = p->offset[s];
    while (i < p->offset[s + 1] && (p->target[i] < 0 || seen++ < shared))
        i++;
    return i;
}

/* What kernels read of a pack, put there behind what still reads the one before. */
static status *about_pack(struct trainer *t, const struct pack *p, struct loss_work *l)
{
    struct logps_room *r = &t->logps;
    int32_t n = p->in.seg.count, cap = r->segments + 1, *to = r->about_host;
    CHECK(n < cap && p->in.tokens <= r->most, "a pack of %d sequences where %d are the most", n, cap - 1);
    for (int32_t s = 0; s <= n; s++)
        to[s] = p->offset[s];
    for (int32_t s = 0; s < n; s++) {
        uint64_t row = p->row[s / p->sides], side = (uint64_t)(s % p->sides + p->first_side);
        bool pair = p->data->kind == DATASET_PREFS;
        to[cap + s] = pair ? shared_end(p, s) : p->offset[s + 1];
        to[2 * cap + s] = (int32_t)p->data->seq[row * (uint64_t)p->data->sequences + side].scored;
        to[3 * cap + s] = p->data->desirable && p->data->desirable[row];
    }
    memcpy(to + 4 * cap, p->target, (size_t)p->in.tokens * sizeof *to);
    *l = (struct loss_work){ .segments = n,
                             .offset = r->about,
                             .shared = r->about + cap,
                             .scored = r->about + 2 * cap,
                             .good = r->about + 3 * cap,
                             .target = r->about + 4 * cap,
                             .alpha = 1 };
    return compute_put(t->compute, r->about, to, (4 * (size_t)cap + (size_t)p->in.tokens) * sizeof *to);
}

/* The next slot, for micro-batch k. */
static struct sequence_sums *slot_of(const struct trainer *t, struct kept_sums *s, uint32_t k)
{
    CHECK(s->used < t->logps.slots, "a pass more than the %u of a step", t->logps.slots);
    s->micro_batch[s->used] = k;
    return s->there + (size_t)s->used++ * (size_t)t->logps.segments;
}

/* The live reference's of micro-batch k, there. */
static const struct sequence_sums *live_of(const struct trainer *t, uint32_t k)
{
    uint32_t i = 0;
    while (i < t->logps.live.used && t->logps.live.micro_batch[i] != k)
        i++;
    CHECK(i < t->logps.live.used, "the reference has not run micro-batch %u", k);
    return t->logps.live.there + (size_t)i * (size_t)t->logps.segments;
}

status *logps_loss(struct trainer *t, struct phase *p, uint32_t k, const struct batch_counts *counts,
                   struct tensor *logp, const struct logprob_stats *tok, const double *ref, bool live)
{
    struct logps_room *r = &t->logps;
    struct loss_work l;
    (void)tokens_of(t, logp);
    TRY(about_pack(t, &p->pack, &l));
    if (ref)
        TRY(compute_put(t->compute, r->ref, ref, (size_t)l.segments * sizeof *ref));
    l.ref = ref ? r->ref : NULL;
    l.ref_step = 1;
    if (!ref && live) {
        l.ref = &live_of(t, k)->weighted;
        l.ref_step = sizeof(struct sequence_sums) / sizeof(double);
    }
    l.logp = logp->data;
    l.stats = *tok;
    l.dlogp = logp->grad;
    l.sums = slot_of(t, &r->step, k);
    p->algo->slopes(p->algo_config, counts, t->compute->kernels, t->compute->workers, &l);
    return NULL;
}

status *logps_live(struct trainer *t, struct phase *p, uint32_t k, const struct tensor *logp)
{
    struct loss_work l;
    (void)tokens_of(t, logp);
    TRY(about_pack(t, &p->pack, &l));
    l.alpha = algo_alpha(p->algo, p->algo_config);
    l.logp = logp->data;
    l.sums = slot_of(t, &t->logps.live, k);
    t->compute->kernels->sequence_sums(t->compute->workers, &l);
    return NULL;
}

status *logps_fetch(struct trainer *t)
{
    struct kept_sums *all[] = { &t->logps.step, &t->logps.live };
    for (int i = 0; i < 2; i++)
        TRY(compute_fetch(t->compute, all[i]->seen, all[i]->there,
                          all[i]->used * (size_t)t->logps.segments * sizeof *all[i]->seen));
    return NULL;
}
