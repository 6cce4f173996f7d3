#include "comm/base/mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* A statistic of the process, like its resident set; nothing reads it to decide anything. */
static atomic_uint_fast64_t calls;

static void count_call(void)
{
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
}

void *mem_alloc(size_t bytes)
{
    count_call();
    return malloc(bytes ? bytes : 1);
}

void *mem_calloc(size_t count, size_t bytes)
{
    count_call();
    return calloc(count ? count : 1, bytes ? bytes : 1);
}

void *mem_realloc(void *p, size_t bytes)
{
    count_call();
    return realloc(p, bytes ? bytes : 1);
}

void *mem_array(void *p, size_t count, size_t bytes)
{
    size_t total;
    if (__builtin_mul_overflow(count, bytes, &total))
        return NULL;
    return mem_realloc(p, total);
}

char *mem_strdup(const char *s)
{
    size_t n = strlen(s) + 1;
    char *d = mem_alloc(n);
    return d ? memcpy(d, s, n) : NULL;
}

void mem_free(void *p)
{
    free(p);
}

enum { HUGE_PAGE = 2 << 20 };

static void *take_block(size_t bytes, size_t align, size_t *size)
{
    count_call();
    size_t a = align < 4096 ? 4096 : align;
    if (bytes >= HUGE_PAGE && a < HUGE_PAGE)
        a = HUGE_PAGE;
    *size = (bytes + a - 1) / a * a;
    if (*size < bytes)
        return NULL;
    *size = *size ? *size : a;
    void *p = aligned_alloc(a, *size);
    if (p && bytes >= HUGE_PAGE)
        (void)madvise(p, *size, MADV_HUGEPAGE);
    return p;
}

void *mem_block(size_t bytes, size_t align)
{
    size_t size;
    void *p = take_block(bytes, align, &size);
    if (p)
        memset(p, 0, size);
    return p;
}

void *mem_block_untouched(size_t bytes, size_t align)
{
    size_t size;
    return take_block(bytes, align, &size);
}

void mem_block_free(void *p, size_t bytes)
{
    (void)bytes;
    free(p);
}

uint64_t mem_count(void)
{
    return atomic_load_explicit(&calls, memory_order_relaxed);
}

uint64_t mem_peak_rss_bytes(void)
{
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) == 0 ? (uint64_t)u.ru_maxrss * 1024 : 0;
}
