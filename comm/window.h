/* window: memory that ranks of one host share, whichever backend their messages take. */
#ifndef TESSERA_COMM_WINDOW_H
#define TESSERA_COMM_WINDOW_H

#include "comm/comm.h"

/* Zeroed is closed. */
struct comm_window {
    unsigned char **part; /* [size] each rank's, page-aligned, zeroed when opened; NULL: there is no window */
    unsigned char *base;
    size_t bytes;
    bool own; /* the mapping is this rank's alone */
};

/* `bytes` of this rank's own (0 is fine), and those of all others of c. Where they cannot have it (another host, or
 * namespaces that hide one rank's files from another, or all gave 0) nobody has: out->part is NULL, which is no error.
 * The memory has no name anywhere and goes with the last process that uses it. Synchronise with objects of
 * PTHREAD_PROCESS_SHARED. Collective; the error is agreed. */
status *comm_window_open(struct comm *c, size_t bytes, struct comm_window *out) WARN_UNUSED;
/* Local: others keep theirs. */
void comm_window_close(struct comm_window *w);

#endif
