/* placement: the cores a rank may run on, beside the other ranks of its host.
 *
 * Binding ranks to cores is mpirun's or srun's business (--bind-to, --cpus-per-task, cpusets). Here is only read what
 * came of it, so that a rank starts as many compute threads as it has cores of its own. */
#ifndef TESSERA_TRAINER_PLACEMENT_H
#define TESSERA_TRAINER_PLACEMENT_H

#include "comm/comm.h"

enum { PLACEMENT_CORES = 1024 };

struct placement_rank {
    uint64_t host;                       /* of its name */
    uint64_t core[PLACEMENT_CORES / 64]; /* bit i of word w: it may run on core 64 w + i */
    double quota;                        /* cores' worth of time that its control group may use; 0: no limit */
};

struct placement {
    uint64_t host;  /* of this rank: placement_rank.host */
    int ranks_here; /* ranks of this host */
    int rank_here;  /* this one's place among them */
    double share;   /* of its cores, beside the other ranks; it may be less than 1 */
    int threads;    /* compute threads: whole ones of it, at least 1 */
};

/* Of rank `me` among `n`. A core that several ranks of a host may run on counts for each of them as a fraction; a quota
 * is taken to be one for all ranks of the host. Pure. */
struct placement placement_of(const struct placement_rank *all, int n, int me);
/* Collective. Errors: NO_MEMORY, alike on all ranks. */
status *placement_read(struct comm *world, struct placement *out) WARN_UNUSED;

#endif
