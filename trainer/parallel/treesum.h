/* treesum: sums whose bits depend on no cut. n leaves stand at places 0..n-1 of a dyadic tree; node (level, index)
 * covers places [index 2^level, (index + 1) 2^level) and is the sum of its two children; children wholly past the end
 * are skipped, never added as zero.
 *
 * A run [begin, end) of places splits into O(log n) aligned nodes. Any set of neighbouring runs, each cut into its
 * nodes where it lies, finishes to the same bits as one pass over all leaves: nodes are pushed in order of place, and
 * two neighbours that are children of one node become that node. tree_sum (trainer/ops/kernels.h) is that one pass.
 *
 * Which numbers are added follows from the places alone. So the additions are listed once, in a plan, and every step
 * makes them again where the numbers are, on the host or on a device. */
#ifndef TESSERA_TRAINER_PARALLEL_TREESUM_H
#define TESSERA_TRAINER_PARALLEL_TREESUM_H

#include "comm/base/status.h"
#include "comm/base/thread.h"

#include <stdbool.h>
#include <stdint.h>

struct add; /* trainer/ops/kernels.h */
struct compute;

/* Level of the largest aligned node that starts at `begin` and ends at or before `end`; begin < end. */
unsigned tree_level(uint64_t begin, uint64_t end);
/* Into how many aligned nodes [begin, end) splits. */
uint64_t tree_node_count(uint64_t begin, uint64_t end);
/* Are (level, left) and (level, right) the two children of one node, in that order? */
bool tree_siblings(unsigned left_level, uint64_t left, unsigned right_level, uint64_t right);

/* Additions of the numbers v[slot], in phases that are run one by one; what a phase reads may come from elsewhere. {0}
 * is empty. Slot 0 is 0, and nobody writes it. */
enum { PLAN_PHASES = 4 };
struct sum_plan {
    double *v; /* [slots], in the memory of compute */
    uint32_t slots;
    /* of treesum.c */
    struct compute *compute;
    struct workers *workers;
    struct add *add, *add_there; /* [adds] in order of rounds; the same where v is */
    uint32_t *round;             /* [adds] while they are listed: what each is in */
    uint32_t *known;             /* [slots] while they are listed: the round behind the one that writes it */
    uint32_t adds, adds_cap, known_cap;
    uint32_t *begin, *begin_there; /* [rounds + 1]: the first addition of each */
    uint32_t rounds, phase_round[PLAN_PHASES + 1];
    int phases;
    bool wide[PLAN_PHASES]; /* it has sums of more than two */
    bool failed;            /* out of memory */
};
/* The first of n more slots, one behind the other. */
uint32_t plan_slots(struct sum_plan *p, uint64_t n);
/* v[to] = v[left] + v[right], or v[left]; a slot is written once. */
void plan_add(struct sum_plan *p, uint32_t to, uint32_t left, uint32_t right);
void plan_copy(struct sum_plan *p, uint32_t to, uint32_t from);
/* v[to] = the node over 2^level slots in a row, in a phase of its own kind: with nothing else. */
void plan_node(struct sum_plan *p, uint32_t to, uint32_t from, unsigned level);
/* What was listed since the last one is a phase: its number. */
int plan_phase(struct sum_plan *p);
/* Takes the memory for it; nothing is listed any more. c (NULL: the host) and w are borrowed. */
status *plan_ready(struct sum_plan *p, struct compute *c, struct workers *w) WARN_UNUSED;
void plan_run(const struct sum_plan *p, int phase); /* queued, as all work on a device */
void plan_close(struct sum_plan *p);

/* Nodes pushed so far, in order, siblings already combined: the slots of their sums. {0} is empty. */
enum { TREE_NODES = 2 * 64 };
struct tree {
    int n;
    struct tree_node {
        uint64_t index;
        unsigned level;
        uint32_t slot;
    } node[TREE_NODES];
};
/* Append the node that starts where the last one ended. */
void tree_push(struct sum_plan *p, struct tree *t, unsigned level, uint64_t index, uint32_t slot);
/* The sum of a tree whose first node starts at place 0; slot 0 if empty. */
uint32_t tree_total(struct sum_plan *p, const struct tree *t);

#endif
