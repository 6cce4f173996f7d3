/* treesum: see treesum.h. The stack of a tree is a binary counter: pushing leaf i combines as often as i + 1 has
 * trailing zeros, so n leaves cost n - 1 additions and the stack never holds more than 2 log2 n nodes. */
#include "trainer/parallel/treesum.h"

#include "comm/base/status.h"

unsigned tree_level(uint64_t begin, uint64_t end)
{
    unsigned fits = 63 - (unsigned)__builtin_clzll(end - begin);
    unsigned aligned = begin ? (unsigned)__builtin_ctzll(begin) : 63;
    return fits < aligned ? fits : aligned;
}

uint64_t tree_node_count(uint64_t begin, uint64_t end)
{
    uint64_t n = 0;
    for (; begin < end; n++)
        begin += (uint64_t)1 << tree_level(begin, end);
    return n;
}

bool tree_siblings(unsigned left_level, uint64_t left, unsigned right_level, uint64_t right)
{
    return left_level == right_level && right == left + 1 && left % 2 == 0;
}

void tree_push(struct tree *t, unsigned level, uint64_t index, double value)
{
    while (t->n && tree_siblings(t->node[t->n - 1].level, t->node[t->n - 1].index, level, index)) {
        value = t->node[--t->n].value + value;
        level++;
        index /= 2;
    }
    CHECK(t->n < (int)(sizeof t->node / sizeof *t->node), "nodes were pushed out of order");
    t->node[t->n++] = (struct tree_node){ .value = value, .index = index, .level = level };
}

double tree_total(const struct tree *t)
{
    if (!t->n)
        return 0;
    double sum = t->node[t->n - 1].value; /* what misses siblings moves up alone: the right edge, from below */
    for (int i = t->n - 2; i >= 0; i--)
        sum = t->node[i].value + sum;
    return sum;
}
