/* window: memory that ranks of one host share, whichever backend their messages take. */
#ifndef TESSERA_COMM_WINDOW_H
#define TESSERA_COMM_WINDOW_H

#include "comm/comm.h"

/* Zeroed is closed. */
struct comm_window {
    unsigned char **part; /* [size] each rank's, aligned (below), zeroed when opened; NULL: there is no window */
    unsigned char *base;
    size_t bytes;
    int rank;
    bool own; /* the mapping is this rank's alone */
};

enum { WINDOW_HUGE_BYTES = 2 << 20 };

/* `bytes` of this rank's own (0 is fine), and those of all others of c. Where they cannot have it (another host, or
 * namespaces that hide one rank's files from another, or all gave 0) nobody has: out->part is NULL, which is no error.
 * The memory has no name anywhere and goes with the last process that uses it. Synchronise with objects of
 * PTHREAD_PROCESS_SHARED. Collective; the error is agreed. */
status *comm_window_open(struct comm *c, size_t bytes, struct comm_window *out) WARN_UNUSED;
/* Ask for huge pages behind [at, at + bytes) of this rank's own part, both multiples of WINDOW_HUGE_BYTES; such parts
 * are aligned to it. False: the kernel gave none (Linux before 6.1, other systems); then the memory is as it was.
 * Direct reads into shared pages of 4 KiB take more than twice as long as into these. Best before anybody uses the
 * memory. Local. */
bool comm_window_huge(const struct comm_window *w, size_t at, size_t bytes);
/* Local: others keep theirs. */
void comm_window_close(struct comm_window *w);

#endif
