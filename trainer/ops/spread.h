/* spread: tensor parallelism as ops: how activations enter and leave what cut weights compute (Shoeybi et al. 2019,
 * arXiv:1909.08053; by tokens: Korthikanti et al. 2022, arXiv:2205.05198). For op files only: ops look at the
 * tape and at tensor.cut, models at neither.
 *
 *   a weight cut by rows makes a part of y's columns from all of x;   backward: dx is the sum of the ranks' parts
 *   a weight cut by columns makes a summand of y from a part of x's columns;   forward: y is the sum
 *
 * Sums are in order of ranks (comm/ordered.h), so what is the same on all ranks has the same bits. */
#ifndef TESSERA_TRAINER_OPS_SPREAD_H
#define TESSERA_TRAINER_OPS_SPREAD_H

#include "trainer/ops/tape.h"

/* Is w cut along dimension dim? */
bool cut_along(const struct tensor *w, int dim);
bool same_cut(const struct tensor_cut *a, const struct tensor_cut *b); /* NULL: whole */
/* Why the tape cannot use w in an op that knows cuts along `dims` (a mask), or NULL. */
const char *cut_misfit(const struct tape *t, const struct tensor *w, unsigned dims);

/* x as weights cut by rows see it: with all rows, and a gradient of its own, which backward sums over the ranks into
 * x's. Weights that are applied to the same x one after another share it, and so one sum. */
struct tensor *tp_enter(struct tape *t, struct tensor *x);
/* y [N, C], of which every rank has a summand: the sum, in place; or, cut by tokens, this rank's rows of it. */
struct tensor *tp_leave(struct tape *t, struct tensor *y);

#endif
