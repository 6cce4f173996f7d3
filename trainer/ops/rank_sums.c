/* rank_sums: see rank_sums.h. */
#include "trainer/ops/rank_sums.h"

#include "trainer/ops/kernels.h"

/* In the room of the first rank's part, or where that is this rank's own, in the result. */
static status *add_up(void *arg, const float *const *from, int ranks, int own, size_t n, float *out)
{
    struct compute *c = arg;
    float *sum = own == 0 ? out : (float *)(size_t)from[0];
    if (sum != from[0])
        TRY(compute_copy(c, sum, from[0], n * sizeof *sum));
    for (int r = 1; r < ranks; r++)
        c->kernels->axpy(c->workers, sum, from[r], 1.0f, (int64_t)n);
    return sum == out ? NULL : compute_copy(c, out, sum, n * sizeof *sum);
}

static status *copy(void *arg, void *out, const void *in, size_t bytes)
{
    return compute_copy(arg, out, in, bytes);
}

struct ordered_at rank_sums_at(struct compute *c)
{
    return compute_host(c) ? (struct ordered_at){ 0 } : (struct ordered_at){ c->stream, c, add_up, copy };
}
