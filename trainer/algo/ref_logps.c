/* ref_logps: the table of reference log-probabilities, and whether it belongs to a dataset. See algo.h. */
#include "comm/base/mem.h"
#include "trainer/algo/algo.h"

#include <string.h>

status *ref_logps_init(struct ref_logps *r, const struct dataset *d)
{
    struct ref_logps n = { .rows = d->rows, .sequences = d->sequences };
    size_t values;
    if (__builtin_mul_overflow(d->rows, (uint64_t)d->sequences, &values))
        return ERR(INVALID, "%llu rows are too many", (unsigned long long)d->rows);
    n.row = mem_array(NULL, d->rows, sizeof *n.row);
    n.hash = mem_array(NULL, d->rows, sizeof *n.hash);
    n.logp = mem_calloc(values, sizeof *n.logp);
    if (!n.row || !n.hash || !n.logp) {
        ref_logps_fini(&n);
        return ERR(NO_MEMORY, "reference log-probabilities of %llu rows", (unsigned long long)d->rows);
    }
    for (uint64_t i = 0; i < d->rows; i++) {
        n.row[i] = i;
        n.hash[i] = d->hash[i];
    }
    *r = n;
    return NULL;
}

void ref_logps_fini(struct ref_logps *r)
{
    mem_free(r->logp);
    mem_free(r->hash);
    mem_free(r->row);
    *r = (struct ref_logps){ 0 };
}

status *ref_logps_check(const struct ref_logps *r, const struct dataset *d)
{
    if (r->rows != d->rows || r->sequences != d->sequences)
        return ERR(INVALID,
                   "reference log-probabilities are of %llu rows with %d sequences each, the data of %llu with %d",
                   (unsigned long long)r->rows, r->sequences, (unsigned long long)d->rows, d->sequences);
    for (uint64_t i = 0; i < r->rows; i++) {
        if (r->row[i] != i)
            return ERR(INVALID, "reference log-probabilities: row %llu stands where row %llu belongs",
                       (unsigned long long)r->row[i], (unsigned long long)i);
        if (r->hash[i] != d->hash[i])
            return ERR(INVALID,
                       "reference log-probabilities of row %llu are stale: its tokens are not the ones they were "
                       "computed from (hash %016llx, data %016llx)",
                       (unsigned long long)i, (unsigned long long)r->hash[i], (unsigned long long)d->hash[i]);
    }
    return NULL;
}
