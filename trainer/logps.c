/* logps: see logps.h. A pack's values lie one behind the other without gaps, so that one copy takes them all. */
#include "trainer/logps.h"

#include "comm/base/mem.h"
#include "trainer/trainer.h"

enum { READ = 5, VALUES = READ + 1 };

static bool any_fixed_gradient(const struct trainer *t)
{
    for (int i = 0; i < t->phases; i++)
        if (t->phase[i].algo->fixed_gradient)
            return true;
    return false;
}

status *logps_open(struct trainer *t)
{
    struct logps_room *r = &t->logps;
    if (compute_host(t->compute))
        return NULL;
    r->most = t->heldout ? t->heldout_pack.cap_tokens : 0;
    for (int i = 0; i < t->phases; i++)
        r->most = t->phase[i].pack.cap_tokens > r->most ? t->phase[i].pack.cap_tokens : r->most;
    r->host = mem_calloc((size_t)(VALUES * r->most), sizeof *r->host);
    if (!r->host)
        return ERR(NO_MEMORY, "log-probabilities of %lld tokens", (long long)r->most);
    if (!t->zero || !any_fixed_gradient(t) || !pipe_last(t->pipe))
        return NULL;
    r->slots = zero_most_passes(t->zero, (uint32_t)(t->cfg->train.global_batch / t->cfg->train.micro_batch));
    r->micro_batch = mem_calloc(r->slots, sizeof *r->micro_batch);
    void *kept = NULL;
    status *st = r->micro_batch ? compute_alloc(t->compute, r->slots * (size_t)(READ * r->most) * sizeof(float), &kept)
                                : ERR(NO_MEMORY, "a list of %u passes", r->slots);
    r->kept = kept;
    return status_wrap(st, "log-probabilities of the %u micro-batches of a step", r->slots);
}

void logps_close(struct trainer *t)
{
    struct logps_room *r = &t->logps;
    compute_free(t->compute, r->kept, r->slots * (size_t)(READ * r->most) * sizeof(float));
    mem_free(r->micro_batch);
    mem_free(r->host);
}

static struct logps of_block(float *x, int64_t n, bool tok)
{
    struct logps y = { .logp = x, .dlogp = x + READ * n };
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
        *out = (struct logps){ logp->data, tok ? *tok : (struct logprob_stats){ 0 }, logp->grad };
        return NULL;
    }
    int64_t n = tokens_of(t, logp);
    for (int i = 0, count = arrays_of(logp, tok, x); i < count; i++)
        TRY(compute_get(t->compute, t->logps.host + i * n, x[i], (size_t)n * sizeof(float)));
    *out = of_block(t->logps.host, n, tok);
    return NULL;
}

status *logps_put(struct trainer *t, const struct logps *x, struct tensor *logp)
{
    if (compute_host(t->compute))
        return NULL;
    return compute_put(t->compute, logp->grad, x->dlogp, (size_t)tensor_elems(logp) * sizeof(float));
}

status *logps_keep(struct trainer *t, uint32_t slot, uint32_t k, const struct tensor *logp,
                   const struct logprob_stats *tok)
{
    const float *x[READ];
    int64_t n = tokens_of(t, logp);
    CHECK(slot < t->logps.slots, "a pass more than the %u of a step", t->logps.slots);
    t->logps.micro_batch[slot] = k;
    for (int i = 0, count = arrays_of(logp, tok, x); i < count; i++)
        TRY(compute_copy(t->compute, t->logps.kept + (int64_t)slot * READ * t->logps.most + i * n, x[i],
                         (size_t)n * sizeof(float)));
    return NULL;
}

struct logps logps_unread(const struct trainer *t, const struct tensor *logp)
{
    return of_block(t->logps.host, tokens_of(t, logp), false);
}

uint32_t logps_kept_of(const struct trainer *t, uint32_t slot)
{
    return t->logps.micro_batch[slot];
}

status *logps_get_kept(struct trainer *t, uint32_t slot, int64_t n, struct logps *out)
{
    TRY(compute_get(t->compute, t->logps.host, t->logps.kept + (int64_t)slot * READ * t->logps.most,
                    (size_t)(READ * n) * sizeof(float)));
    *out = of_block(t->logps.host, n, true);
    return NULL;
}
