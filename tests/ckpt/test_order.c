/* order: against qsort, with ties, keys in order or not, and keys that differ in any of their bytes. */
#include "ckpt/order.h"
#include "tests/ckpt/draw.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 700, CASES = 600 };

static int compare(const void *va, const void *vb)
{
    const struct order_key *a = va, *b = vb;
    if (a->key != b->key)
        return a->key < b->key ? -1 : 1;
    return a->item < b->item ? -1 : a->item > b->item;
}

static void test_random(void **state)
{
    (void)state;
    static struct order_key k[MOST + 1], other[MOST + 1], right[MOST + 1];
    const struct order_key guard = { 77, 78 };
    for (uint32_t number = 0; number < CASES; number++) {
        struct draw d = draw_from(31, number);
        uint64_t n = draw_below(&d, number % 3 ? MOST + 1 : 5), values = 1 + draw_below(&d, 1000);
        int shift = (int)draw_below(&d, 57);
        uint64_t base = draw_below(&d, UINT64_MAX);
        for (uint64_t i = 0; i < n; i++) /* items ascend, so that a tie out of order is seen */
            k[i] = (struct order_key){ .key = base ^ draw_below(&d, values) << shift, .item = i };
        if (number % 4 == 1) { /* all bytes */
            for (uint64_t i = 0; i < n; i++)
                k[i].key = draw_below(&d, UINT64_MAX);
        } else if (number % 4 == 2) { /* in order, but for the last */
            for (uint64_t i = 0; i < n; i++)
                k[i].key = i / 3 + 1;
            if (n && draw_below(&d, 2))
                k[n - 1].key = draw_below(&d, n);
        }
        k[n] = other[n] = guard;
        memcpy(right, k, n * sizeof *k);
        qsort(right, n, sizeof *right, compare);
        order_sort(k, other, n);
        assert_memory_equal(k, right, n * sizeof *k);
        assert_memory_equal(&k[n], &guard, sizeof guard);
        assert_memory_equal(&other[n], &guard, sizeof guard);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_random) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
