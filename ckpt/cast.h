/* cast: elements of one float type as elements of another, for loads that ask for it.
 *
 * Among f64, f32, f16 and bf16. Every value is rounded once, to nearest, ties to even; what is too large becomes
 * infinite, what is small enough subnormal or zero of its sign; infinities stay and NaN stays NaN (quiet, with the
 * upper bits of its payload). All other types are what they are: no cast. */
#ifndef TESSERA_CKPT_CAST_H
#define TESSERA_CKPT_CAST_H

#include "comm/base/dtype.h"

#include <stdbool.h>

/* Whether elements of `from` can become elements of `to`; true when the types are equal. */
bool cast_possible(enum dtype from, enum dtype to);
/* Convert n elements; the arrays do not overlap and need not be aligned. cast_possible(from, to). */
void cast_elems(enum dtype from, enum dtype to, const void *in, void *out, size_t n);

#endif
