/* test_root: a store for one test: memory, or a directory beside the test that is removed after it. */
#ifndef TESSERA_TESTS_SUPPORT_TEST_ROOT_H
#define TESSERA_TESTS_SUPPORT_TEST_ROOT_H

#include "storage/store.h"

struct root {
    struct store *store;
    char path[32]; /* "" in memory */
};

/* Fails the test on error. Only on the test's own thread. */
struct root root_open(bool posix);
void root_close(struct root *r);

/* assert that st is NULL; prints it otherwise. */
void assert_ok(status *st);

#endif
