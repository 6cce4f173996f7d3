/* sanitized: what tests do less of where each access is watched, and takes ten times as long: a share of the drawn
 * cases, and of the pairs of two lists those that have every element of each. */
#ifndef TESSERA_TESTS_SUPPORT_SANITIZED_H
#define TESSERA_TESTS_SUPPORT_SANITIZED_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __SANITIZE_THREAD__
enum { UNDER_TSAN = 1 };
#else
enum { UNDER_TSAN = 0 };
#endif

#ifdef __SANITIZE_ADDRESS__
enum { UNDER_ASAN = 1 };
#else
enum { UNDER_ASAN = 0 };
#endif

/* Whether the mesh-th mesh is run with the kind-th of `kinds` models: under tsan each mesh with one of them. */
static inline bool runs_kind(size_t mesh, size_t kind, size_t kinds)
{
    return !UNDER_TSAN || mesh % kinds == kind;
}

#endif
