/* Direct reads of store_posix.c, by its system calls (ld --wrap, see tests/CMakeLists.txt): what goes which way, and
 * that the bytes are the file's whatever the alignment of offset, end and memory, and whatever goes wrong: reads that
 * are short, interrupted or refused, a file that ends before. On a file system without O_DIRECT the wrappers play one
 * that has it. */
#include "comm/base/mem.h"
#include "storage/store.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { PAGE = 4096, PIECE = 4 << 20, BIG = (9 << 20) + 777, SMALL = 3 * PAGE + 100, GUARD = 64 };

enum trouble { NONE, NO_SETFL, NO_READ, INTERRUPTED, SHORT, FAIL_EIO, TROUBLES };

/* The functions --wrap asks for have no argument for a handle. */
static struct {
    enum trouble trouble;
    bool direct; /* O_DIRECT is set */
    uint64_t reads, direct_reads, direct_bytes, misaligned, too_long;
} sys;

int __wrap_fcntl(int fd, int cmd, ...);
ssize_t __wrap_pread(int fd, void *buf, size_t n, off_t offset);
int __real_fcntl(int fd, int cmd, ...);
ssize_t __real_pread(int fd, void *buf, size_t n, off_t offset);

int __real_openat(int dirfd, const char *name, int flags, ...);
int __wrap_openat(int dirfd, const char *name, int flags, ...);

int __wrap_openat(int dirfd, const char *name, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & O_CREAT ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    sys.direct = false;
    return __real_openat(dirfd, name, flags, mode);
}

int __wrap_fcntl(int fd, int cmd, ...)
{
    va_list ap;
    va_start(ap, cmd);
    long arg = cmd == F_SETFL ? va_arg(ap, int) : cmd == F_GETFL ? 0 : va_arg(ap, long);
    va_end(ap);
    if (cmd != F_SETFL)
        return __real_fcntl(fd, cmd, arg);
    bool direct = arg & O_DIRECT;
    if (direct && sys.trouble == NO_SETFL) {
        errno = EINVAL;
        return -1;
    }
    int rc = __real_fcntl(fd, cmd, (int)arg);
    if (rc && direct && errno == EINVAL)
        rc = 0;
    sys.direct = direct;
    return rc;
}

ssize_t __wrap_pread(int fd, void *buf, size_t n, off_t offset)
{
    bool direct = sys.direct;
    sys.reads++;
    if (direct) {
        sys.direct_reads++;
        sys.misaligned += (uint64_t)offset % PAGE || n % PAGE;
        sys.too_long += n > PIECE;
    }
    int e = sys.trouble == NO_READ && direct                   ? EINVAL
            : sys.trouble == INTERRUPTED && sys.reads % 3 == 1 ? EINTR
            : sys.trouble == FAIL_EIO && direct                ? EIO
                                                               : 0;
    if (e) {
        errno = e;
        return -1;
    }
    if (sys.trouble == SHORT && n > 1) /* as a device may stop anywhere, also between pages */
        n = direct ? (n / 512 + 1) / 2 * 512 : (n + 1) / 2;
    ssize_t k = __real_pread(fd, buf, n, offset);
    if (direct && k > 0)
        sys.direct_bytes += (uint64_t)k;
    return k;
}

static void trouble(enum trouble t)
{
    memset(&sys, 0, sizeof sys);
    sys.trouble = t;
}

static unsigned char byte_at(uint64_t i)
{
    uint64_t x = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    return (unsigned char)(x >> 40);
}

static void put(struct root *r, const char *key, size_t n)
{
    unsigned char *b = mem_alloc(n);
    for (size_t i = 0; i < n; i++)
        b[i] = byte_at(i);
    assert_ok(store_put(r->store, key, b, n, STORE_REPLACE));
    mem_free(b);
}

static unsigned char *memory(void)
{
    static unsigned char *block; /* 10 MiB, once */
    if (!block)
        block = mem_block((size_t)BIG + 4 * PAGE, PAGE);
    assert_non_null(block);
    return block;
}

/* The bytes, and none around them. */
static void read_is(struct root *r, const char *key, uint64_t offset, size_t n, size_t shift)
{
    unsigned char *to = memory() + PAGE + shift;
    memset(to - GUARD, 0xee, n + 2 * GUARD);
    assert_ok(store_get_direct(r->store, key, offset, to, n));
    for (size_t i = 0; i < n; i++)
        if (to[i] != byte_at(offset + i))
            fail_msg("trouble %d: byte %zu of [%llu, + %zu), memory at %zu", (int)sys.trouble, i,
                     (unsigned long long)offset, n, shift);
    for (size_t i = 0; i < GUARD; i++)
        assert_true(to[n + i] == 0xee && to[-(ptrdiff_t)i - 1] == 0xee);
}

static void test_bytes(void **state)
{
    (void)state;
    static const uint64_t offsets[] = { 0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 512, 2 * PAGE + 3 };
    static const size_t lengths[] = { 0, 1, 511, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 90 };
    struct root r = root_open(true);
    put(&r, "a", SMALL);
    for (enum trouble t = NONE; t < TROUBLES; t++)
        for (size_t o = 0; o < sizeof offsets / sizeof *offsets; o++)
            for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
                for (size_t shift = 0; shift < 2; shift++) {
                    if (t == FAIL_EIO || offsets[o] + lengths[l] > SMALL)
                        continue;
                    trouble(t);
                    read_is(&r, "a", offsets[o], lengths[l], (size_t)offsets[o] % PAGE + shift);
                    read_is(&r, "a", SMALL - lengths[l], lengths[l], shift * 8); /* to the file's end */
                    assert_int_equal(sys.misaligned + sys.too_long, 0);
                }
    root_close(&r);
}

/* All whole pages of a large read go direct, in pieces, and the rest does not. */
static void test_ways(void **state)
{
    (void)state;
    struct root r = root_open(true);
    put(&r, "a", BIG);
    trouble(NONE);
    read_is(&r, "a", 0, BIG, 0);
    if (sys.direct_reads) { /* else this file system says it takes none */
        assert_int_equal(sys.direct_bytes, BIG / PAGE * PAGE);
        assert_int_equal(sys.direct_reads, (BIG + PIECE - 1) / PIECE);
        trouble(NONE);
        read_is(&r, "a", 100, BIG - 100, 100);
        assert_int_equal(sys.direct_bytes, BIG / PAGE * PAGE - PAGE);
        trouble(NONE);
        read_is(&r, "a", 0, BIG, 1); /* memory that no disk takes */
        assert_int_equal(sys.direct_reads, 0);
        trouble(FAIL_EIO);
        status *st = store_get_direct(r.store, "a", 0, memory(), BIG);
        assert_int_equal(status_code(st), ST_IO);
        status_free(st);
    }
    trouble(NONE);
    assert_ok(store_get(r.store, "a", 0, memory(), BIG));
    assert_int_equal(sys.direct_reads, 0);
    root_close(&r);
}

static void test_ends(void **state)
{
    (void)state;
    struct root r = root_open(true);
    put(&r, "a", SMALL);
    put(&r, "empty", 0);
    for (enum trouble t = NONE; t < FAIL_EIO; t++)
        for (int k = 0; k < 4; k++) {
            static const uint64_t offset[] = { 0, PAGE, SMALL - 1, SMALL + PAGE };
            trouble(t);
            status *st = store_get_direct(r.store, "a", offset[k], memory(), 4 * PAGE);
            assert_int_equal(status_code(st), ST_CORRUPT);
            assert_non_null(strstr(status_message(st), "12388 bytes")); /* what it has */
            status_free(st);
        }
    trouble(NONE);
    read_is(&r, "empty", 0, 0, 0);
    status *st = store_get_direct(r.store, "empty", 0, memory(), PAGE);
    assert_int_equal(status_code(st), ST_CORRUPT);
    status_free(st);
    st = store_get_direct(r.store, "none", 0, memory(), PAGE);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    status_free(st);
    root_close(&r);
}

/* Stores without a way of their own take the common one. */
static void test_memory_store(void **state)
{
    (void)state;
    struct root r = root_open(false);
    put(&r, "a", SMALL);
    read_is(&r, "a", 5, SMALL - 5, 3);
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_bytes), cmocka_unit_test(test_ways),
                                        cmocka_unit_test(test_ends), cmocka_unit_test(test_memory_store) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
