/* algo: look-up by name, what optional hooks default to, and the logistic function in forms that neither overflow nor
 * cancel. */
#include "trainer/algo/algo.h"

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

bool algo_needs_reference(const struct algo_ops *a, const void *config)
{
    return a->needs_reference && !(a->reference_free && a->reference_free(config));
}

int algo_statistics(const struct algo_ops *a, const void *config)
{
    return a->statistics ? a->statistics(config) : 0;
}

void algo_sums(const struct algo_ops *a, const void *config, const struct pack *p, const float *logp, double *sums)
{
    if (a->sums)
        a->sums(config, p, logp, sums);
    else
        pack_sequence_sums(p, logp, sums, NULL);
}

double algo_neg_log_sigmoid(double z)
{
    return (z < 0 ? -z : 0) + log1p(exp(-fabs(z)));
}

double algo_sigmoid(double z)
{
    double e = exp(-fabs(z));
    return (z < 0 ? e : 1) / (1 + e);
}
