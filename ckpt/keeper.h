/* keeper: rank 0's housekeeper thread. It keeps the root's lease alive and writes commits, so that the training thread
 * never waits for either. Nothing here calls MPI. */
#ifndef TESSERA_CKPT_KEEPER_H
#define TESSERA_CKPT_KEEPER_H

#include "ckpt/commit.h"
#include "ckpt/report.h"

struct keeper;

/* Take over the lease and start the thread. keep->metric is borrowed. Steps of up to view_pieces pieces get a view
 * (view.h) after their commit was told, unless the next commit comes first or the store can have none; 0: no views. On
 * error the lease stays the caller's. */
status *keeper_open(struct store *s, const struct lease *l, const struct keep_rules *keep, uint64_t view_pieces,
                    struct keeper **out) WARN_UNUSED;
/* Finish the commit in hand and the last step's view, stop, give the lease back. NULL is fine. */
status *keeper_close(struct keeper *k) WARN_UNUSED;

/* NULL while the lease is ours; else a copy of the reason, once it is lost for good. */
status *keeper_lost(struct keeper *k) WARN_UNUSED;
/* Commit m: check the lease, put metadata.pb and LATEST; after the outcome is there, remove what retention no longer
 * keeps. m is borrowed until the outcome was taken. One at a time. r (may be NULL) is taken:
 * when the outcome is there, rank 0's commit is entered and it is written, or freed if the commit failed. */
void keeper_commit(struct keeper *k, const struct metadata *m, struct report *r);
/* Write a report when there is nothing else to do, at the latest before the thread ends; what goes wrong is a note.
 * Takes r. */
void keeper_report(struct keeper *k, struct report *r);
/* Mark a committed step (commit_mark), before the next commit's retention and before the thread ends; what goes wrong
 * is a note. */
status *keeper_mark(struct keeper *k, uint64_t step, const char *metric, double value) WARN_UNUSED;
/* Whether the commit's outcome is there; takes it then. wait: wait for it. False too when none was handed over. */
bool keeper_outcome(struct keeper *k, bool wait, status **outcome);
/* Wait until nothing is being removed: before steps are listed, loaded or retired. NULL is fine. */
void keeper_rest(struct keeper *k);
/* A line for people since the last call (retention failed, the lease could not be renewed yet, a view could not be
 * written), or NULL. */
status *keeper_note(struct keeper *k) WARN_UNUSED;

#endif
