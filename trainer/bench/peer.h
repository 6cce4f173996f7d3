/* peer: the same training step in PyTorch, as a child process that runs steps when it is told to. */
#ifndef TESSERA_TRAINER_BENCH_PEER_H
#define TESSERA_TRAINER_BENCH_PEER_H

#include "comm/base/status.h"

struct peer; /* opaque */

/* Start `python` with the script (torch_train.py) and its argument, and wait until it has warmed up. python "": python3
 * of PATH, and *out NULL where that has no PyTorch; else INVALID says what the one named lacks. */
status *peer_open(const char *python, const char *sizes, struct peer **out) WARN_UNUSED;
/* "torch 2.9.1 compiled" */
const char *peer_name(const struct peer *p);
/* Seconds that `steps` steps take, which nothing else here runs beside. */
status *peer_run(struct peer *p, int steps, double *seconds) WARN_UNUSED;
void peer_close(struct peer *p); /* NULL is fine */

#endif
