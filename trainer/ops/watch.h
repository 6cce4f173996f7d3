/* watch: debug: nan: looks for the first element that is not finite, in whatever memory the kernels work on, and says
 * of which op it is. Every look waits for the work queued, so a step takes longer. */
#ifndef TESSERA_TRAINER_OPS_WATCH_H
#define TESSERA_TRAINER_OPS_WATCH_H

#include "trainer/ops/tape.h"

struct compute;
struct watch;
struct array; /* trainer/ops/kernels.h */

/* What messages call a weight; NULL: it has no name. */
typedef const char *watch_name(const void *arg, const struct tensor *weight);

/* c: where the arrays are; NULL: the host. name may be NULL. All is borrowed. NO_MEMORY. */
status *watch_open(struct compute *c, watch_name *name, const void *arg, struct watch **out) WARN_UNUSED;
void watch_close(struct watch *w); /* NULL is fine */

/* The first of n elements that is not finite, and its value; n: all are. Errors: those of the device. */
status *watch_find(struct watch *w, struct array x, int64_t n, int64_t *first, float *value) WARN_UNUSED;
/* "nan", "inf" or "-inf". */
const char *watch_word(float value);

/* For tape.c and ops: set the tape's error if the output of `op` is not finite; weight: what it was made with, or NULL.
 */
void watch_output(struct tape *t, const char *op, const struct tensor *y, const struct tensor *weight);
/* The same of the gradients that r's backward has just added to; of the gradient that backward begins with. */
void watch_record(struct tape *t, const struct tape_record *r, unsigned halves);
void watch_root(struct tape *t, const struct tensor *root);

#endif
