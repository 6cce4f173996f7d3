/* flat: see flat.h. */
#include "trainer/ops/flat.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "trainer/ops/kernels.h"

#include <string.h>

status *flat_alloc(struct compute *c, uint64_t n, const char *what, float **out)
{
    void *p = NULL;
    size_t bytes;
    if (__builtin_mul_overflow(n, sizeof **out, &bytes))
        return ERR(NO_MEMORY, "%s: %llu elements", what, (unsigned long long)n);
    TRY(status_wrap(compute_alloc(c, bytes, &p), "%s", what));
    *out = p;
    return NULL;
}

void flat_free(struct compute *c, float *p, uint64_t n)
{
    compute_free(c, p, n * sizeof *p);
}

void flat_zero(struct compute *c, float *y, uint64_t n)
{
    if (!compute_host(c))
        c->kernels->zero(c->workers, y, (int64_t)n);
    else if (n)
        memset(y, 0, n * sizeof *y);
}

void flat_copy(struct compute *c, float *y, const float *x, uint64_t n)
{
    if (!compute_host(c))
        c->kernels->scale(c->workers, y, x, 1, (int64_t)n);
    else if (n)
        memcpy(y, x, n * sizeof *y);
}

void flat_add(struct compute *c, float *y, const float *x, uint64_t n)
{
    if (!compute_host(c)) {
        c->kernels->add(c->workers, y, y, x, (int64_t)n);
        return;
    }
    for (uint64_t i = 0; i < n; i++)
        y[i] += x[i];
}

void flat_round(struct compute *c, float *x, uint64_t n)
{
    compute_kernels(c)->round_low(compute_host(c) ? NULL : c->workers, x, (int64_t)n);
}

void flat_narrow(struct compute *c, uint16_t *y, const float *x, uint64_t n)
{
    compute_kernels(c)->narrow(compute_host(c) ? NULL : c->workers, y, x, (int64_t)n);
}

void flat_widen(struct compute *c, float *y, const uint16_t *x, uint64_t n)
{
    compute_kernels(c)->widen(compute_host(c) ? NULL : c->workers, y, x, (int64_t)n);
}

enum { SEEN_BYTES = 1 << 20 };

status *flat_read(struct compute *c, const void *block, size_t bytes,
                  status *(*see)(void *arg, const void *bytes, size_t at, size_t n), void *arg)
{
    if (compute_host(c))
        return see(arg, block, 0, bytes);
    char *room = mem_alloc(SEEN_BYTES);
    status *st = room ? NULL : ERR(NO_MEMORY, "%d bytes of a device's", (int)SEEN_BYTES);
    for (size_t at = 0, n; at < bytes && !st; at += n) {
        n = bytes - at < SEEN_BYTES ? bytes - at : SEEN_BYTES;
        st = compute_get(c, room, (const char *)block + at, n);
        if (!st)
            st = see(arg, room, at, n);
    }
    mem_free(room);
    return st;
}

static status *add_crc(void *arg, const void *bytes, size_t at, size_t n)
{
    uint32_t *crc = arg;
    (void)at;
    *crc = crc32c(*crc, bytes, n);
    return NULL;
}

status *flat_crc(struct compute *c, const void *block, size_t bytes, uint32_t *crc)
{
    return flat_read(c, block, bytes, add_crc, crc);
}
