/* test_root: a store for one test: memory, or a directory beside the test that is removed after it; a folder for one
 * test; and what every test says of a status. */
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

enum { FOLDER_BYTES = 64 };
/* A new folder under /tmp, and its removal with all that is in it. */
void folder_make(char dir[FOLDER_BYTES]);
void folder_remove(const char *dir);

enum { TEST_URI_BYTES = 256 };
/* Tests that run on every store: whether they do on this one here, and where. `dir`: a folder of folder_make. Without a
 * server all but s3, with one only that: it wants its bucket's URL in TESSERA_TEST_S3, keys and address in the
 * environment (tests/servers/with). */
bool store_is_tested(const struct store_ops *ops);
void store_test_uri(const struct store_ops *ops, const char *dir, char uri[TEST_URI_BYTES]);

/* assert that st is NULL; prints it otherwise. */
void assert_ok(status *st);

/* The same with the expression, for files that include cmocka.h. */
#define OK(expr)                                                                                                       \
    do {                                                                                                               \
        status *ok_ = (expr);                                                                                          \
        if (ok_)                                                                                                       \
            fail_msg("%s: %s: %s", #expr, status_code_name(status_code(ok_)), status_message(ok_));                    \
    } while (0)

/* It fails with the code, and the message holds `words` ("" for any). */
#define FAILS(want, words, expr)                                                                                       \
    do {                                                                                                               \
        status *st_ = (expr);                                                                                          \
        if (status_code(st_) != (want) || !strstr(status_message(st_), words))                                         \
            fail_msg("%s: %s: %s", #expr, status_code_name(status_code(st_)), status_message(st_));                    \
        status_free(st_);                                                                                              \
    } while (0)

#endif
