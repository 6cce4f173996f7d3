/* agree: one verdict for all ranks. */
#ifndef TESSERA_COMM_AGREE_H
#define TESSERA_COMM_AGREE_H

#include "comm/comm.h"

/* Take this rank's outcome and return the same outcome on every rank: NULL if all are NULL, else on every rank an error
 * with the code and words of the lowest failing rank, marked with that rank. Collective. Between two collectives nobody
 * returns early: keep the status, join the collective through this, then leave. */
status *comm_agree(struct comm *c, status *st) WARN_UNUSED;

#endif
