/* Windows where the conformance suite does not come: ranks that map the memory for themselves, and all that can keep
 * them from having one. Ranks are threads; getpid is wrapped, so that they look like processes: a thread's id leads to
 * its process's files, too. */
#include "comm/window.h"
#include "tests/support/comm_threads.h"
#include "tests/support/huge_pages.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

#include <cmocka.h>

enum mode { OWN_MAPPINGS, HIDDEN, ANOTHER_FILE, NO_MEMFD, MODES };
enum { BYTES = 9000 };

static _Atomic enum mode mode;
static atomic_int made;

pid_t __wrap_getpid(void);
int __real_memfd_create(const char *name, unsigned flags);
int __wrap_memfd_create(const char *name, unsigned flags);

static _Thread_local bool maker;
pid_t __wrap_getpid(void)
{
    if (!maker || mode == OWN_MAPPINGS)
        return gettid();
    return mode == HIDDEN ? 0x3fffffff : gettid();
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
    if (mode == NO_MEMFD) {
        errno = ENOSYS;
        return -1;
    }
    maker = true;
    made++;
    if (mode != ANOTHER_FILE)
        return __real_memfd_create(name, flags);
    return __real_memfd_create("tessera-windo", flags); /* another program's, by the look of it */
}

static status *rank_main(struct comm *c, void *arg)
{
    struct comm_window w;
    (void)arg;
    maker = false;
    TRY(comm_window_open(c, BYTES, &w));
    bool wanted = c->size == 1 ? mode != NO_MEMFD : mode == OWN_MAPPINGS;
    if ((w.part != NULL) != wanted)
        return ERR(INTERNAL, "mode %d, rank %d of %d: window %d", (int)mode, c->rank, c->size, w.part != NULL);
    for (int i = 0; w.part && i < BYTES; i++)
        w.part[c->rank][i] = (unsigned char)(c->rank * 7 + i);
    TRY(comm_barrier(c));
    for (int r = 0; w.part && r < c->size; r++)
        for (int i = 0; i < BYTES; i++)
            if (w.part[r][i] != (unsigned char)(r * 7 + i))
                return ERR(INTERNAL, "rank %d sees another byte %d of rank %d", c->rank, i, r);
    if (w.part && c->rank && w.own != true)
        return ERR(INTERNAL, "rank %d has no mapping of its own", c->rank);
    comm_window_close(&w);
    return comm_barrier(c);
}

static void test_modes(void **state)
{
    (void)state;
    for (int m = 0; m < MODES; m++)
        for (int size = 1; size <= 4; size++) {
            mode = (enum mode)m;
            int before = made;
            status *st = comm_threads_run(size, rank_main, NULL);
            if (st)
                print_error("%s\n", status_message(st));
            assert_null(st);
            assert_int_equal(made, before + (m != NO_MEMFD));
        }
}

static size_t huge_bytes(int rank)
{
    return rank % 3 == 1 ? 5000 : (size_t)(rank % 2 + 2) * WINDOW_HUGE_BYTES + 77;
}

/* Large parts are where huge pages can be; with them or not, bytes stay and are seen by all. */
static status *huge_main(struct comm *c, void *arg)
{
    struct comm_window w;
    size_t mine = huge_bytes(c->rank);
    (void)arg;
    maker = false;
    TRY(comm_window_open(c, mine, &w));
    if (!w.part)
        return ERR(INTERNAL, "rank %d has no window", c->rank);
    for (int r = 0; r < c->size; r++)
        if ((uintptr_t)w.part[r] % (huge_bytes(r) < WINDOW_HUGE_BYTES ? 4096 : WINDOW_HUGE_BYTES))
            return ERR(INTERNAL, "rank %d's part is at %p", r, (void *)w.part[r]);
    for (size_t i = 0; i < mine; i += 511)
        w.part[c->rank][i] = (unsigned char)((size_t)c->rank + i / 7);
    if (mine > WINDOW_HUGE_BYTES) {
        bool first = comm_window_huge(&w, 0, WINDOW_HUGE_BYTES);
        bool second = comm_window_huge(&w, WINDOW_HUGE_BYTES, WINDOW_HUGE_BYTES);
        if (first != second || (no_huge && first))
            return ERR(INTERNAL, "rank %d: huge pages %d, %d", c->rank, first, second);
    }
    TRY(comm_barrier(c));
    for (int r = 0; r < c->size; r++)
        for (size_t i = 0; i < huge_bytes(r); i++)
            if (w.part[r][i] != (i % 511 ? 0 : (unsigned char)((size_t)r + i / 7)))
                return ERR(INTERNAL, "rank %d sees another byte %zu of rank %d", c->rank, i, r);
    TRY(comm_barrier(c));
    comm_window_close(&w);
    return NULL;
}

static void test_huge(void **state)
{
    (void)state;
    mode = OWN_MAPPINGS;
    for (int size = 1; size <= 5; size++)
        for (int without = 0; without < 2; without++) {
            no_huge = without;
            status *st = comm_threads_run(size, huge_main, NULL);
            if (st)
                print_error("%s\n", status_message(st));
            assert_null(st);
        }
    no_huge = false;
}

/* No file stays open, whatever came of it. */
static void test_files(void **state)
{
    (void)state;
    int before = dup(0), after;
    assert_true(before >= 0);
    close(before);
    test_modes(state);
    after = dup(0);
    assert_int_equal(after, before);
    close(after);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_modes), cmocka_unit_test(test_huge),
                                        cmocka_unit_test(test_files) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
