/* treesum: sums whose bits depend on no cut. n leaves stand at places 0..n-1 of a dyadic tree; node (level, index)
 * covers places [index 2^level, (index + 1) 2^level) and is the sum of its two children; children wholly past the end
 * are skipped, never added as zero.
 *
 * A run [begin, end) of places splits into O(log n) aligned nodes. Any set of neighbouring runs, each cut into its
 * nodes where it lies, finishes to the same bits as one pass over all leaves: nodes are pushed in order of place, and
 * two neighbours that are children of one node become that node. tree_sum (trainer/ops/kernels.h) is that one pass. */
#ifndef TESSERA_TRAINER_PARALLEL_TREESUM_H
#define TESSERA_TRAINER_PARALLEL_TREESUM_H

#include <stdbool.h>
#include <stdint.h>

/* Level of the largest aligned node that starts at `begin` and ends at or before `end`; begin < end. */
unsigned tree_level(uint64_t begin, uint64_t end);
/* Into how many aligned nodes [begin, end) splits. */
uint64_t tree_node_count(uint64_t begin, uint64_t end);
/* Are (level, left) and (level, right) the two children of one node, in that order? */
bool tree_siblings(unsigned left_level, uint64_t left, unsigned right_level, uint64_t right);

/* Nodes pushed so far, in order, siblings already combined. {0} is empty. */
struct tree {
    int n;
    struct tree_node {
        double value;
        uint64_t index;
        unsigned level;
    } node[2 * 64];
};
/* Append the node that starts where the last one ended. */
void tree_push(struct tree *t, unsigned level, uint64_t index, double value);
/* The sum of a tree whose first node starts at place 0; 0 if empty. */
double tree_total(const struct tree *t);

#endif
