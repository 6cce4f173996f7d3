/* mesh_plan: which mesh to run a model on (parallel: auto). Every mesh of the world's size that the model can be cut
 * over is a candidate, with each ZeRO stage and each kind of recomputation; each has a need of memory, bytes to send
 * and time to wait by the formulas of docs/parallelism.md. Of those that fit in the memory of a rank the one that costs
 * least is taken. Pure but for memory: the same on all ranks, and nothing is sent.
 *
 * Cost is in floating-point operations of a rank: those of its share of a step, with waits and what is run again, and
 * PLAN_BYTE for each byte sent. Activations are those of a dry pass of PLAN_TOKENS tokens through each kind of unit,
 * scaled to a micro-batch of the longest rows. */
#ifndef TESSERA_TRAINER_MESH_PLAN_H
#define TESSERA_TRAINER_MESH_PLAN_H

#include "trainer/config.h"

enum { PLAN_BYTE = 100, PLAN_TOKENS = 256 };

struct mesh_plan_row {
    int pp, dp, tp, zero, recompute;
    uint64_t parameters, gradients, moments, other, activations; /* bytes of the rank that needs most */
    double sent;                                                 /* bytes a step */
    double waits; /* share of a step in which a rank waits for others, or runs something again */
    double cost;
};

struct mesh_plan; /* opaque */

/* memory: bytes of a rank. Keys of section parallel that the config sets (parallel.fixed) stay as they are. INVALID: no
 * mesh of `world` ranks is legal. A plan in which nothing fits is no error here. Not collective. */
status *mesh_plan_make(const struct config *c, int world, uint64_t memory, struct mesh_plan **out) WARN_UNUSED;
void mesh_plan_free(struct mesh_plan *p);                              /* NULL is fine */
uint64_t mesh_plan_need(const struct mesh_plan_row *r);                /* all its bytes */
const struct mesh_plan_row *mesh_plan_best(const struct mesh_plan *p); /* the cheapest that fits, NULL: none does */
/* A line of text after another: of each pp and tp the cheapest candidate that fits, or the smallest. */
void mesh_plan_print(const struct mesh_plan *p, void (*say)(void *arg, const char *line), void *arg);
/* Set the config's keys. NO_MEMORY if nothing fits: what is missing, and of which mesh. */
status *mesh_plan_take(const struct mesh_plan *p, struct config *c) WARN_UNUSED;
/* Physical memory of this machine over `ranks` of it, or memory.rank. */
uint64_t mesh_plan_memory(const struct config *c, int ranks);
/* `tessera plan CONFIG [ranks=N] [key=value ...]`: the table on stdout, nothing is run. */
status *mesh_plan_cli(int argc, char **argv) WARN_UNUSED;

#endif
