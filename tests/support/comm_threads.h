/* comm_threads: a job whose ranks are threads of this process, so that a thread sanitizer sees all of it and a test can
 * start six ranks in a millisecond. A full backend: collectives, dup, split, reductions that return before the peers
 * arrive, and exchanges. */
#ifndef TESSERA_TESTS_SUPPORT_COMM_THREADS_H
#define TESSERA_TESTS_SUPPORT_COMM_THREADS_H

#include "comm/comm.h"

/* Run fn(world, arg) on `size` ranks and wait for all. A rank that returns an error breaks the job: its peers' calls
 * return PEER from then on. Returns the error that came first, marked with its rank. */
status *comm_threads_run(int size, status *(*fn)(struct comm *world, void *arg), void *arg) WARN_UNUSED;

#endif
