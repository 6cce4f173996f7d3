/* algo: look-up by name, what optional hooks default to, and sums of sequences. */
#include "trainer/algo/algo.h"

#include "trainer/algo/pref_losses.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

status *algo_lookup(const char *name, const struct algo_ops **out)
{
    char names[512] = "";
    for (size_t i = 0, used = 0; algo_registry[i]; i++) {
        if (!strcmp(algo_registry[i]->name, name)) {
            *out = algo_registry[i];
            return NULL;
        }
        if (used < sizeof names)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", algo_registry[i]->name);
    }
    return ERR(INVALID, "no algorithm is called \"%s\" (this build has: %s)", name, names);
}

struct batch_counts algo_count(const struct dataset *d, const uint64_t *row, uint64_t rows)
{
    uint64_t n = (uint64_t)d->sequences;
    struct batch_counts c = { .rows = rows, .sequences = rows * n };
    for (uint64_t i = 0; i < rows; i++) {
        c.first_tokens += d->seq[row[i] * n].scored;
        for (uint64_t s = 0; s < n; s++)
            c.scored_tokens += d->seq[row[i] * n + s].scored;
        if (d->desirable && d->desirable[row[i]]) {
            c.desirable++;
            c.desirable_tokens += d->seq[row[i] * n].scored;
        }
    }
    return c;
}

double algo_divisor(const struct batch_counts *c, enum metric_per per)
{
    switch (per) {
    case PER_ROW:
        return (double)c->rows;
    case PER_TOKEN:
        return (double)c->scored_tokens;
    case PER_FIRST_TOKEN:
        return (double)c->first_tokens;
    case PER_OTHER_TOKEN:
        return (double)(c->scored_tokens - c->first_tokens);
    case PER_DESIRABLE:
        return (double)c->desirable;
    case PER_UNDESIRABLE:
        return (double)(c->rows - c->desirable);
    case PER_DESIRABLE_TOKEN:
        return (double)c->desirable_tokens;
    case PER_UNDESIRABLE_TOKEN:
        return (double)(c->first_tokens - c->desirable_tokens);
    case PER_STEP:
        break;
    }
    return 1;
}

double algo_segment_sum(const struct pack *p, uint32_t s, const float *v)
{
    double sum = 0;
    for (int32_t i = p->offset[s]; v && i < p->offset[s + 1]; i++)
        sum += (double)v[i];
    return sum;
}

struct sequence_sums algo_sequence_sums(const struct pack *p, uint32_t s, const float *logp,
                                        const struct logprob_stats *tok, uint32_t shared, double alpha)
{
    int32_t at = p->offset[s], n = p->offset[s + 1] - at;
    struct sequence_sums y = { .plain = pref_ld_sum(logp + at, p->target + at, n, UINT32_MAX, 1),
                               .weighted = pref_ld_sum(logp + at, p->target + at, n, shared, alpha),
                               .log_weight = tok && tok->log_square ? 0 : NAN };
    for (int32_t i = at; tok && tok->log_square && i < at + n; i++)
        if (p->target[i] >= 0)
            y.log_weight += (double)logp[i] - (double)tok->log_square[i];
    if (tok) {
        y.logit = algo_segment_sum(p, s, tok->logit);
        y.entropy = algo_segment_sum(p, s, tok->entropy);
        y.top = algo_segment_sum(p, s, tok->top);
    }
    return y;
}

bool algo_needs_reference(const struct algo_ops *a, const void *config)
{
    return a->needs_reference && !(a->reference_free && a->reference_free(config));
}

int algo_statistics(const struct algo_ops *a, const void *config)
{
    return a->statistics ? a->statistics(config) : 0;
}

double algo_alpha(const struct algo_ops *a, const void *config)
{
    return a->alpha ? a->alpha(config) : 1;
}

void algo_sums(const struct algo_ops *a, const void *config, const struct pack *p, const float *logp, double *sums)
{
    if (a->sums)
        a->sums(config, p, logp, sums);
    else
        pack_sequence_sums(p, logp, sums, NULL);
}
