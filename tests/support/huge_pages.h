/* madvise that says no while no_huge is set, as kernels do that have no huge pages to give. For tests that are linked
 * with -Wl,--wrap=madvise (tests/CMakeLists.txt). */
#ifndef TESSERA_TESTS_SUPPORT_HUGE_PAGES_H
#define TESSERA_TESTS_SUPPORT_HUGE_PAGES_H

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

static atomic_bool no_huge;

int __real_madvise(void *p, size_t n, int advice);
int __wrap_madvise(void *p, size_t n, int advice);
int __wrap_madvise(void *p, size_t n, int advice)
{
    if (no_huge) {
        errno = EINVAL;
        return -1;
    }
    return __real_madvise(p, n, advice);
}

#endif
