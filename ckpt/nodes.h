/* nodes: the ranks of a job by the host they run on, and what goes up and down that tree: from the ranks of a node to
 * its leader, from the leaders to rank 0, and back. So rank 0 talks with a leader a node, not with every rank, and each
 * rank gets its own bytes alone. */
#ifndef TESSERA_CKPT_NODES_H
#define TESSERA_CKPT_NODES_H

#include "comm/comm.h"

struct nodes {
    struct comm *all;     /* borrowed */
    struct comm *node;    /* the ranks of this host; its rank 0, the lowest of them, is the leader */
    struct comm *leaders; /* NULL on other ranks; ordered by rank, so rank 0 of `all` is rank 0 here */
    int32_t *node_of;     /* rank 0: [ranks] nodes are numbered by their leaders' ranks */
    int32_t count;        /* rank 0 */
};
/* Ranks that give the same text are one node. Collective; the error is agreed. */
status *nodes_open(struct comm *c, const char *host, struct nodes *out) WARN_UNUSED;
/* Zeroed is fine. Collective. */
void nodes_close(struct nodes *n);

/* How many requests at once a rank has: up to `most`, as far as there are half as many for each core of this host (with
 * more than the cores keep going all get slower), and at least `least`. */
int nodes_share(const struct nodes *n, int most, int least);

struct nodes_message {
    const unsigned char *data;
    size_t bytes;
};
/* Rank 0: *message [ranks], which point into *buf (both mem_free); a zero byte follows the end of *buf, *buf_bytes with
 * it. Collective; the error is agreed. */
status *nodes_gather(const struct nodes *n, const void *mine, size_t bytes, struct nodes_message **message, void **buf,
                     size_t *buf_bytes) WARN_UNUSED;
/* Rank 0 gives message [ranks]; every rank gets its own in *mine (mem_free). Collective; the error is agreed. */
status *nodes_scatter(const struct nodes *n, const struct nodes_message *message, void **mine,
                      size_t *bytes) WARN_UNUSED;

#endif
