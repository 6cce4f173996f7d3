/* progress: a thread that drives what communicators have under way, so that it moves beside what their caller computes.
 *
 *     progress_open(&p);  progress_drive(p, &dp);
 *     comm_iexchange(dp, x, n, NULL, &req);  compute();  comm_wait(&req);
 *     comm_close(dp);  progress_close(p);
 *
 * MPI moves large messages inside its calls only: what a rank has started and then computes beside stands still until
 * its next call. Here another thread makes that call, comm_test of each request under way in turn, yielding and then
 * sleeping up to 200 us between rounds in which nothing came; with nothing under way it sleeps until something is. It
 * needs a core that computes nothing else. One a process is enough.
 *
 * Which thread finds a request done changes nothing but the time: comm_test looks whether the thread has found it,
 * comm_wait takes the request back and drives it where it is called, and errors come from these two as ever. What is to
 * follow an exchange (comm_iexchange_then) runs on the thread that finds it done. */
#ifndef TESSERA_COMM_PROGRESS_H
#define TESSERA_COMM_PROGRESS_H

#include "comm/comm.h"

struct progress;

/* Starts the thread, "comm". Local. */
status *progress_open(struct progress **out) WARN_UNUSED;
/* NULL is fine. All that it drives must be closed. Local. */
void progress_close(struct progress *p);
/* *c becomes one whose exchanges and reductions in flight p drives, and so those of its duplicates and parts; the old
 * one is part of it and is closed with it. Collective calls are made where they are called. Nothing changes with p or
 * *c NULL or a *c of one rank. Local: of the ranks of *c some may have such a thread and others not. UNSUPPORTED: the
 * backend lets one thread at a time call it (comm_ops.thread_multiple), or moves memory of a device, which needs no
 * such thread. */
status *progress_drive(struct progress *p, struct comm **c) WARN_UNUSED;

#endif
