/* ckpt: the handle behind tessera.h, for the trainer, the command line and tests. */
#ifndef TESSERA_CKPT_CKPT_H
#define TESSERA_CKPT_CKPT_H

#include "ckpt/tessera.h"
#include "comm/comm.h"
#include "comm/device/device.h"
#include "storage/store.h"

/* tessera_open with what the program has already: world is duplicated, dev borrowed (NULL: the CPU), s borrowed if not
 * NULL (rank 0's and every other rank's may be one object: tests wrap it), else opened from o->url. Collective. */
status *ckpt_open(const struct tessera_options *o, struct comm *world, struct device *dev, struct store *s,
                  tessera **out) WARN_UNUSED;
/* Say which node this rank is on, in place of the host's name. Without a save in flight. Collective. */
status *ckpt_set_node(tessera *t, const char *host) WARN_UNUSED;
/* The stream of the handle's device that writes the tensors: what a save stores is what they are after everything that
 * the stream was given before tessera_save, without a wait of the host. Without a save in flight; NULL: the default
 * one. */
void ckpt_set_stream(tessera *t, struct stream *s);
uint64_t ckpt_attempt(const tessera *t);
/* Plans this handle has made so far: a save that finds its plan in the cache makes none. */
uint64_t ckpt_plans_made(const tessera *t);

/* The committed step with the best value of `metric` (tessera_mark), the later one of equal ones. Steps without it do
 * not count. Collective. NOT_FOUND: no step has it. */
status *ckpt_best(tessera *t, const char *metric, bool lowest, uint64_t *step) WARN_UNUSED;

/* `tessera ckpt VERB ...`: argv[0] is the verb. Prints results to stdout; returns the error for main to
 * print. Not collective. */
status *ckpt_cli(int argc, char **argv) WARN_UNUSED;
/* The same for `verify`, on all ranks of c (NULL: this process alone): they share the work, rank 0 prints. Collective.
 */
status *ckpt_cli_ranks(struct comm *c, int argc, char **argv) WARN_UNUSED;

#endif
