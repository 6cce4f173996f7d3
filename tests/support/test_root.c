/* test_root: the directory is removed with all that a killed writer may have left, hidden files too. */
#include "tests/support/test_root.h"

#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

void assert_ok(status *st)
{
    if (st)
        print_error("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    bool good = st == NULL;
    status_free(st);
    assert_true(good);
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *where)
{
    (void)st;
    (void)type;
    (void)where;
    return remove(path);
}

void folder_make(char dir[FOLDER_BYTES])
{
    snprintf(dir, FOLDER_BYTES, "/tmp/tessera-test-XXXXXX");
    assert_non_null(mkdtemp(dir));
}

void folder_remove(const char *dir)
{
    assert_int_equal(nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS), 0);
}

bool store_is_tested(const struct store_ops *ops)
{
    return (strcmp(ops->scheme, "s3") == 0) == (getenv("TESSERA_TEST_S3") != NULL);
}

void store_test_uri(const struct store_ops *ops, const char *dir, char uri[TEST_URI_BYTES])
{
    if (strcmp(ops->scheme, "s3") == 0)
        snprintf(uri, TEST_URI_BYTES, "%s%s/%d", getenv("TESSERA_TEST_S3"), dir, getpid());
    else
        snprintf(uri, TEST_URI_BYTES, "%s:%s", ops->scheme, strcmp(ops->scheme, "file") == 0 ? dir : "");
}

struct root root_open(bool posix)
{
    struct root r = { .path = "" };
    char uri[64] = "mem:";
    if (posix) {
        snprintf(r.path, sizeof r.path, "root-XXXXXX");
        assert_non_null(mkdtemp(r.path));
        snprintf(uri, sizeof uri, "file:%s", r.path);
    }
    assert_ok(store_open(uri, true, &r.store));
    return r;
}

void root_close(struct root *r)
{
    store_close(r->store);
    if (r->path[0])
        folder_remove(r->path);
}
