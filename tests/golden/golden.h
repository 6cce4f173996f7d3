/* golden: kinds of cases of vector files. A kind computes, by the functions that training uses, what a case expects,
 * and golden.c compares; nothing here knows a formula. */
#ifndef TESSERA_TESTS_GOLDEN_GOLDEN_H
#define TESSERA_TESTS_GOLDEN_GOLDEN_H

#include "comm/base/status.h"

#include <jansson.h>

struct golden_case {
    const char *name;
    json_t *inputs, *expected; /* the same object in files that keep both together */
};

struct golden_kind {
    const char *name;          /* found in the case's name between word borders; the longest of all kinds wins */
    const char *inputs;        /* keys that inputs must have, separated by blanks */
    const char *only;          /* a key of inputs or expected that tells the kind when no name does; NULL: none */
    double relative, absolute; /* tolerance */
    /* What our code makes of the inputs: an object with keys like expected's (more are fine). */
    status *(*run)(const struct golden_kind *k, const struct golden_case *c, json_t **got);
    const char *settings;    /* of run: options "loss=hinge beta=1" */
    const char *tau, *alpha; /* of run: options that inputs.tau and inputs.alpha are for */
};

extern const struct golden_kind golden_rl[], golden_diffusion[]; /* each ends with a nameless row */

/* Tolerances: f64 against 12 digits; f32 kernels. */
#define GOLDEN_F64 1e-10, 1e-14
#define GOLDEN_F32 2e-5, 2e-7

#endif
