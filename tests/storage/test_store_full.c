/* A file system that is full: a 1 MiB tmpfs in a mount namespace of this process. Every way to run out must say
 * NO_SPACE with the name, leave no temporary file, and leave what was there before as it was. Then: one that cannot be
 * written. */
#include "comm/base/mem.h"
#include "storage/store.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cmocka.h>

enum { DISK = 1 << 20, OBJECT = 100 << 10, BIG = 2 << 20 };

static char mount_point[] = "/tmp/tessera-full-XXXXXX";

/* The tmpfs is seen by this process only and goes with it. */
static int mount_small(void **state)
{
    (void)state;
    assert_non_null(mkdtemp(mount_point));
    if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 &&
        errno != EINVAL) /* a chroot's root is no mount point */
        fail_msg("mount --make-rprivate /: %s", strerror(errno));
    if (mount("tmpfs", mount_point, "tmpfs", 0, "size=1m") != 0)
        fail_msg("mount -t tmpfs -o size=1m %s: %s", mount_point, strerror(errno));
    return 0;
}

static int unmount_small(void **state)
{
    (void)state;
    assert_int_equal(umount(mount_point), 0); /* EBUSY if a file were still open */
    assert_int_equal(rmdir(mount_point), 0);
    return 0;
}

static struct store *open_small(void)
{
    struct store *s;
    char uri[64];
    snprintf(uri, sizeof uri, "file:%s", mount_point);
    OK(store_open(uri, true, &s));
    return s;
}

static uint64_t free_bytes(void)
{
    struct statvfs v;
    assert_int_equal(statvfs(mount_point, &v), 0);
    return (uint64_t)v.f_bavail * v.f_bsize;
}

static void expect_full(status *st, const char *name)
{
    assert_int_equal(status_code(st), ST_NO_SPACE);
    assert_non_null(strstr(status_message(st), name));
    assert_non_null(strstr(status_message(st), mount_point));
    assert_non_null(strstr(status_message(st), strerror(ENOSPC)));
    status_free(st);
}

static void expect_same(struct store *s, const char *key, const unsigned char *data)
{
    void *buf;
    size_t n;
    OK(store_get_all(s, key, DISK, &buf, &n));
    assert_int_equal(n, OBJECT);
    assert_memory_equal(buf, data, n);
    mem_free(buf);
}

static void test_put_when_full(void **state)
{
    (void)state;
    struct store *s = open_small();
    unsigned char *big = mem_alloc(BIG);
    memset(big, 7, BIG);
    OK(store_put(s, "step/kept", big, OBJECT, STORE_REPLACE));
    uint64_t before = free_bytes();
    for (int mode = STORE_REPLACE; mode <= STORE_EXCLUSIVE; mode++) {
        expect_full(store_put(s, mode == STORE_REPLACE ? "step/kept" : "step/new", big, BIG, (enum store_put_mode)mode),
                    mode == STORE_REPLACE ? "step/kept" : "step/new");
        assert_int_equal(free_bytes(), before); /* nothing is left of it */
    }
    expect_same(s, "step/kept", big);
    struct store_list l;
    OK(store_list(s, "step", &l));
    assert_int_equal(l.count, 1);
    store_list_free(&l);
    OK(store_put(s, "step/new", big, OBJECT, STORE_EXCLUSIVE)); /* there is room for what fits */
    OK(store_remove_tree(s, "step"));
    mem_free(big);
    store_close(s);
}

static void test_writer_when_full(void **state)
{
    (void)state;
    struct store *s = open_small();
    unsigned char *data = mem_alloc(OBJECT);
    memset(data, 9, OBJECT);
    OK(store_put(s, "step/kept", data, OBJECT, STORE_REPLACE));
    uint64_t before = free_bytes();
    struct store_writer *w;
    OK(store_writer_open(s, "step/kept", BIG, &w)); /* a length is only a promise on tmpfs */
    status *st = NULL;
    uint64_t at = 0;
    for (; at + OBJECT <= BIG && !st; at += OBJECT)
        st = store_write(w, at, data, OBJECT);
    assert_true(at > OBJECT && at < DISK + OBJECT);
    expect_full(st, "step/kept");
    store_writer_abort(w);
    assert_int_equal(free_bytes(), before);
    expect_same(s, "step/kept", data);
    OK(store_remove_tree(s, "step"));
    mem_free(data);
    store_close(s);
}

/* No inode is left: the temporary file cannot be made. */
static void test_no_inodes(void **state)
{
    (void)state;
    assert_int_equal(mount("tmpfs", mount_point, "tmpfs", MS_REMOUNT, "size=1m,nr_inodes=4"), 0);
    struct store *s = open_small();
    OK(store_put(s, "step/a", "a", 1, STORE_REPLACE)); /* root, step, a */
    OK(store_put(s, "step/b", "b", 1, STORE_REPLACE));
    struct store_writer *w;
    uint64_t ns;
    expect_full(store_put(s, "step/a", "c", 1, STORE_REPLACE), "step/");
    expect_full(store_put(s, "other/a", "c", 1, STORE_REPLACE), "other");
    expect_full(store_writer_open(s, "step/c", 1, &w), "step/");
    expect_full(store_now(s, &ns), "/");
    OK(store_remove(s, "step/b"));
    OK(store_put(s, "step/a", "d", 1, STORE_REPLACE));
    OK(store_remove_tree(s, "step"));
    store_close(s);
    assert_int_equal(mount("tmpfs", mount_point, "tmpfs", MS_REMOUNT, "size=1m,nr_inodes=0"), 0);
}

static void test_read_only(void **state)
{
    (void)state;
    struct store *s = open_small();
    OK(store_put(s, "a", "a", 1, STORE_REPLACE));
    assert_int_equal(mount("tmpfs", mount_point, "tmpfs", MS_REMOUNT | MS_RDONLY, "size=1m"), 0);
    struct store *again = open_small(); /* what is there can be opened */
    store_close(again);
    struct store_writer *w;
    uint64_t ns;
    status *st[] = { store_put(s, "a", "b", 1, STORE_REPLACE),
                     store_put(s, "x/y", "b", 1, STORE_EXCLUSIVE),
                     store_writer_open(s, "x/y", 1, &w),
                     store_remove(s, "a"),
                     store_remove_tree(s, "a"),
                     store_now(s, &ns) };
    for (size_t i = 0; i < sizeof st / sizeof *st; i++) {
        assert_int_equal(status_code(st[i]), ST_IO);
        assert_non_null(strstr(status_message(st[i]), mount_point));
        assert_non_null(strstr(status_message(st[i]), strerror(EROFS)));
        status_free(st[i]);
    }
    char uri[80];
    snprintf(uri, sizeof uri, "file:%s/new/root", mount_point);
    status *no = store_open(uri, true, &again);
    assert_non_null(strstr(status_message(no), "new"));
    assert_non_null(strstr(status_message(no), strerror(EROFS)));
    status_free(no);
    char byte;
    OK(store_get(s, "a", 0, &byte, 1));
    assert_int_equal(byte, 'a');
    assert_int_equal(mount("tmpfs", mount_point, "tmpfs", MS_REMOUNT, "size=1m"), 0);
    OK(store_remove(s, "a"));
    store_close(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_put_when_full),
        cmocka_unit_test(test_writer_when_full),
        cmocka_unit_test(test_no_inodes),
        cmocka_unit_test(test_read_only),
    };
    if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) {
        fprintf(stderr, "skipped: no mount namespace (root, or user namespaces): %s\n", strerror(errno));
        return 77; /* ctest counts it as skipped, not as passed */
    }
    return cmocka_run_group_tests(tests, mount_small, unmount_small);
}
