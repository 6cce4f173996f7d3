/* order: see order.h. Radix sort by bytes, the lowest first: each pass keeps the order of the one before. */
#include "ckpt/order.h"

#include <stdbool.h>
#include <string.h>

enum { BYTE_VALUES = 256 };

/* to: from by one byte of the key. */
static void sort_pass(const struct order_key *from, struct order_key *to, uint64_t n, int shift)
{
    uint64_t at[BYTE_VALUES + 1] = { 0 };
    for (uint64_t i = 0; i < n; i++)
        at[(from[i].key >> shift & 0xff) + 1]++;
    for (int v = 0; v < BYTE_VALUES; v++)
        at[v + 1] += at[v];
    for (uint64_t i = 0; i < n; i++)
        to[at[from[i].key >> shift & 0xff]++] = from[i];
}

void order_sort(struct order_key *k, struct order_key *other, uint64_t n)
{
    uint64_t differ = 0;
    int passes = 0;
    bool sorted = true;
    for (uint64_t i = 1; i < n; i++) {
        differ |= k[i].key ^ k[i - 1].key;
        sorted = sorted && k[i - 1].key <= k[i].key;
    }
    for (int shift = 0; !sorted && shift < 64; shift += 8)
        if (differ >> shift & 0xff) {
            sort_pass(passes % 2 ? other : k, passes % 2 ? k : other, n, shift);
            passes++;
        }
    if (passes % 2)
        memcpy(k, other, n * sizeof *k);
}
