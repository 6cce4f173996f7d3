/* The slots that ranks of a node hand one another: what is taken is what was given, each gift reaches whom it was for
 * and nobody else, no slot is filled again before all have taken their parts, whoever gave it among them, and a reader
 * that waits can be sent home; with huge pages and without. Ranks are threads, with two readers each. */
#include "ckpt/loadring.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "tests/support/comm_threads.h"
#include "tests/support/fake_state.h"
#include "tests/support/huge_pages.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

enum { GIFTS = 60, READERS = 2, BYTES = (2 << 20) + 4096 };

/* Whether rank `to` of `ranks` gets gift g of `from`; at least one does. */
static bool gets(int from, int to, int ranks, uint64_t g)
{
    return to != from &&
           (to == (from + 1 + (int)(g % (uint64_t)(ranks - 1))) % ranks || (g * 7 + (uint64_t)to) % 3 == 0);
}

static unsigned char value(int from, uint64_t g, size_t i)
{
    return (unsigned char)(from * 31 + (int)g * 5 + (int)i);
}

struct giver {
    struct load_ring *ring;
    atomic_ullong *next;
    struct thread thread;
};

static status *give(void *arg)
{
    struct giver *me = arg;
    struct load_ring *r = me->ring;
    uint8_t to[16];
    for (uint64_t g; (g = atomic_fetch_add(me->next, 1)) < GIFTS;) {
        struct ring_mail m = { .first = g * 10, .blocks = (uint32_t)(g % 4), .offset = g << 33, .bad = g % 9 == 8 };
        EXPECT(ring_take(r, &m.slot));
        bool huge = ring_is_huge(r, m.slot);
        EXPECT(ring_is_huge(r, m.slot) == huge && !(huge && no_huge));
        for (size_t i = 0; i < BYTES; i += i < 5000 ? 1 : 4099)
            ring_slot(r, r->rank, m.slot)[i] = value(r->rank, g, i);
        for (int k = 0; k < r->ranks; k++)
            to[k] = gets(r->rank, k, r->ranks, g);
        to[r->rank] = g % 4 == 1; /* it is not done with it yet */
        m.from = r->rank;
        ring_give(r, &m, to);
        for (size_t i = 0; to[r->rank] && i < BYTES; i += i < 5000 ? 1 : 4099)
            EXPECT(ring_slot(r, r->rank, m.slot)[i] == value(r->rank, g, i));
        if (to[r->rank])
            ring_done(r, &m);
    }
    ring_bell(r);
    return NULL;
}

static status *take(struct load_ring *r)
{
    uint64_t want = 0, got[16] = { 0 };
    for (int from = 0; from < r->ranks; from++)
        for (uint64_t g = 0; g < GIFTS; g++)
            want += gets(from, r->rank, r->ranks, g);
    while (want) {
        struct ring_mail m;
        uint64_t seen = ring_bells(r), g;
        if (!ring_next(r, &m)) {
            ring_wait(r, seen, want % 2 ? 0 : 1000);
            continue;
        }
        g = m.first / 10;
        EXPECT(m.from != r->rank && gets(m.from, r->rank, r->ranks, g) && !(got[m.from] >> g & 1));
        EXPECT(m.first == g * 10 && m.blocks == g % 4 && m.offset == g << 33 && m.bad == (g % 9 == 8));
        got[m.from] |= UINT64_C(1) << g;
        for (size_t i = 0; i < BYTES; i += i < 5000 ? 1 : 4099)
            EXPECT(ring_slot(r, m.from, m.slot)[i] == value(m.from, g, i));
        ring_done(r, &m);
        want--;
    }
    return NULL;
}

static status *ring_job(struct comm *c, void *arg)
{
    struct load_ring r;
    struct giver giver[READERS];
    atomic_ullong next = 0;
    uint32_t slot;
    (void)arg;
    TRY(ring_open(c, true, BYTES, &r));
    EXPECT(ring_shared(&r));
    for (int i = 0; i < READERS; i++) {
        giver[i] = (struct giver){ .ring = &r, .next = &next };
        TRY(thread_start(&giver[i].thread, "giver", give, &giver[i]));
    }
    status *st = take(&r);
    if (st)
        return st;
    for (int i = 0; i < READERS; i++)
        TRY(thread_join(&giver[i].thread));
    TRY(comm_barrier(c));
    for (int i = 0; i < RING_SLOTS; i++)
        EXPECT(ring_take(&r, &slot)); /* all have come back */
    ring_quit(&r);
    EXPECT(!ring_take(&r, &slot));
    TRY(comm_barrier(c));
    ring_close(&r);
    return NULL;
}

static void test_gifts(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 6; ranks++) {
        no_huge = ranks % 2;
        assert_ok(comm_threads_run(ranks, ring_job, NULL));
    }
}

static status *bell_after_a_while(void *arg)
{
    struct load_ring *r = arg;
    ring_bell(r);
    ring_bell(r);
    return NULL;
}

/* Nobody gives: only the bell is there. */
static status *bell_job(struct comm *c, void *arg)
{
    struct load_ring r;
    struct ring_mail m;
    struct thread t = { 0 };
    (void)arg;
    TRY(ring_open(c, false, BYTES, &r));
    EXPECT(!ring_shared(&r) && !ring_next(&r, &m));
    EXPECT(ring_bells(&r) == 0);
    ring_wait(&r, 0, 1000); /* comes back by the clock */
    TRY(thread_start(&t, "bell", bell_after_a_while, &r));
    ring_wait(&r, 0, 0);
    ring_wait(&r, 1, 0);
    TRY(thread_join(&t));
    EXPECT(ring_bells(&r) == 2);
    ring_quit(&r);
    ring_close(&r);
    ring_close(&r);
    return NULL;
}

static void test_bell(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++)
        assert_ok(comm_threads_run(ranks, bell_job, NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_gifts), cmocka_unit_test(test_bell) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
