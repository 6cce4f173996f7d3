/* Direct writes of store_posix.c, by its system calls (ld --wrap, see tests/CMakeLists.txt): what goes which way, that
 * a file is the same whatever goes wrong with them, and that an error which is final is told. On a file system without
 * O_DIRECT the wrappers play one that has it. */
#include "comm/base/mem.h"
#include "storage/store.h"
#include "tests/ckpt/draw.h"
#include "tests/support/test_root.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { PAGE = 4096, FDS = 1024, MOST = 9 << 20, PAGES = MOST / PAGE + 1, PIECE = 4 << 20 };

enum trouble {
    NONE,
    NO_OPEN,     /* O_DIRECT is refused by open */
    NO_WRITE,    /* by a direct write */
    INTERRUPTED, /* every third write */
    SHORT,       /* writes write a part */
    FAIL_EIO,    /* a direct write does */
    FAIL_ENOSPC,
    FAIL_ENOTSUP, /* as NO_WRITE */
    TROUBLES
};

/* The functions --wrap asks for have no argument for a handle. */
static struct {
    pthread_mutex_t lock;
    enum trouble trouble;
    uint64_t at; /* the direct write, or any write, that it befalls */
    uint64_t writes, direct_writes, misaligned, both_ways, too_long;
    bool direct[FDS];
    unsigned char way[PAGES]; /* 1: buffered, 2: direct */
} sys = { .lock = PTHREAD_MUTEX_INITIALIZER };

int __real_openat(int dirfd, const char *name, int flags, ...);
ssize_t __real_pwrite(int fd, const void *buf, size_t n, off_t offset);
int __wrap_openat(int dirfd, const char *name, int flags, ...);
ssize_t __wrap_pwrite(int fd, const void *buf, size_t n, off_t offset);

int __wrap_openat(int dirfd, const char *name, int flags, ...)
{
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list ap;
        va_start(ap, flags);
        mode = va_arg(ap, mode_t);
        va_end(ap);
    }
    if ((flags & O_DIRECT) && sys.trouble == NO_OPEN) {
        errno = EINVAL;
        return -1;
    }
    int fd = __real_openat(dirfd, name, flags, mode);
    if (fd < 0 && (flags & O_DIRECT) && errno == EINVAL)
        fd = __real_openat(dirfd, name, flags & ~O_DIRECT, mode);
    if (fd >= 0 && fd < FDS)
        sys.direct[fd] = flags & O_DIRECT;
    return fd;
}

/* errno of this write, or 0. */
static int trouble_of(bool direct)
{
    bool now = direct && sys.direct_writes == sys.at;
    switch (sys.trouble) {
    case NO_WRITE:
        return direct ? EINVAL : 0;
    case FAIL_ENOTSUP:
        return now ? EOPNOTSUPP : 0;
    case INTERRUPTED:
        return sys.writes % 3 == 0 ? EINTR : 0;
    case FAIL_EIO:
        return now ? EIO : 0;
    case FAIL_ENOSPC:
        return now ? ENOSPC : 0;
    default:
        return 0;
    }
}

ssize_t __wrap_pwrite(int fd, const void *buf, size_t n, off_t offset)
{
    pthread_mutex_lock(&sys.lock);
    bool direct = fd < FDS && sys.direct[fd];
    int e = trouble_of(direct);
    sys.writes++;
    sys.direct_writes += direct;
    if (sys.trouble == SHORT && n > 1)
        n = direct ? (n / 512 + 1) / 2 * 512 : (n + 1) / 2;
    if (direct) {
        sys.misaligned += (uint64_t)offset % 512 || n % 512 || (uintptr_t)buf % 512;
        sys.too_long += n > PIECE;
    }
    for (size_t p = (size_t)offset / PAGE; !e && n && p <= ((size_t)offset + n - 1) / PAGE; p++) {
        sys.way[p] |= direct ? 2 : 1;
        sys.both_ways += sys.way[p] == 3;
    }
    pthread_mutex_unlock(&sys.lock);
    if (!e)
        return __real_pwrite(fd, buf, n, offset);
    errno = e;
    return -1;
}

static void trouble(enum trouble t, uint64_t at)
{
    sys.trouble = t;
    sys.at = at;
    sys.writes = sys.direct_writes = sys.misaligned = sys.both_ways = sys.too_long = 0;
    memset(sys.way, 0, sizeof sys.way);
}

/* ---- a file in parts */

struct part {
    uint64_t begin, end;
    unsigned char *memory; /* the part's bytes, at some alignment */
};
enum { PARTS = 12 };
struct cut {
    uint64_t bytes;
    struct part part[PARTS];
    int parts, next;
    unsigned char *want, *blocks;
    struct store_writer *w;
    pthread_mutex_t lock;
    status *error;
};

/* Parts lie anywhere or at pages; some are left out and read back as zero. */
static void draw_cut(struct draw *d, struct cut *c)
{
    memset(c, 0, sizeof *c);
    c->bytes = draw_below(d, 3) ? draw_below(d, 300000) : draw_below(d, MOST);
    c->want = mem_calloc(c->bytes + 1, 1);
    c->blocks = mem_block(MOST + PARTS * 4 * PAGE, PAGE);
    unsigned char *at = c->blocks;
    bool pages = draw_below(d, 2);
    for (uint64_t begin = 0; begin < c->bytes && c->parts < PARTS;) {
        uint64_t end = begin + 1 + draw_below(d, c->bytes - begin);
        end = pages && end / PAGE * PAGE > begin ? end / PAGE * PAGE : end;
        end = c->parts == PARTS - 1 || draw_below(d, 6) == 0 ? c->bytes : end;
        static const uint64_t off[] = { 0, 0, 0, 512, 1, 16 };
        unsigned char *p = at + off[draw_below(d, 6)];
        /* often the memory lies in its page as the bytes do in theirs */
        p += draw_below(d, 2) ? begin % PAGE : 0;
        at += (end - begin + 3 * PAGE) / PAGE * PAGE;
        if (draw_below(d, 8)) {
            for (uint64_t i = 0; i < end - begin; i++)
                c->want[begin + i] = p[i] = (unsigned char)(1 + (begin + i) * 31 + ((begin + i) >> 12));
            c->part[c->parts++] = (struct part){ begin, end, p };
        }
        begin = end;
    }
    for (int i = c->parts - 1; i > 0; i--) {
        int k = (int)draw_below(d, (uint64_t)i + 1);
        struct part x = c->part[i];
        c->part[i] = c->part[k];
        c->part[k] = x;
    }
    pthread_mutex_init(&c->lock, NULL);
}

static void close_cut(struct cut *c)
{
    mem_free(c->want);
    mem_block_free(c->blocks, MOST + PARTS * 4 * PAGE);
    pthread_mutex_destroy(&c->lock);
}

static void *write_parts(void *arg)
{
    struct cut *c = arg;
    for (;;) {
        pthread_mutex_lock(&c->lock);
        const struct part *p = c->error || c->next == c->parts ? NULL : &c->part[c->next++];
        pthread_mutex_unlock(&c->lock);
        if (!p)
            return NULL;
        status *st = store_write(c->w, p->begin, p->memory, p->end - p->begin);
        pthread_mutex_lock(&c->lock);
        c->error = status_first(c->error, st);
        pthread_mutex_unlock(&c->lock);
    }
}

static status *write_cut(struct store *s, struct cut *c, int threads)
{
    pthread_t thread[4];
    assert_ok(store_writer_open(s, "step/object", c->bytes, &c->w));
    for (int i = 0; i < threads; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, write_parts, c), 0);
    for (int i = 0; i < threads; i++)
        pthread_join(thread[i], NULL);
    return c->error;
}

static void expect_object(struct store *s, const struct cut *c)
{
    void *buf;
    size_t n;
    assert_ok(store_get_all(s, "step/object", MOST, &buf, &n));
    assert_int_equal(n, c->bytes);
    assert_memory_equal(buf, c->want, n);
    mem_free(buf);
}

static void expect_nothing(struct store *s, const struct root *r)
{
    char command[128];
    struct store_list l;
    assert_ok(store_list(s, "step", &l));
    assert_int_equal(l.count, 0);
    store_list_free(&l);
    assert_true((size_t)snprintf(command, sizeof command, "test -z \"$(find %s -type f)\"", r->path) < sizeof command);
    assert_int_equal(system(command), 0);
}

static void one_case(enum trouble t, uint32_t n, uint64_t *direct_writes)
{
    struct draw d = draw_from(5 + (uint64_t)t, n);
    struct root r = root_open(true);
    struct cut c;
    draw_cut(&d, &c);
    trouble(t, draw_below(&d, 4));
    status *st = write_cut(r.store, &c, (int)draw_between(&d, 1, 4));
    *direct_writes += sys.direct_writes;
    assert_int_equal(sys.misaligned, 0);
    assert_int_equal(sys.too_long, 0);
    bool final = (t == FAIL_EIO || t == FAIL_ENOSPC) && sys.direct_writes > sys.at;
    if (t == NONE || t == INTERRUPTED || t == FAIL_EIO || t == FAIL_ENOSPC)
        assert_int_equal(sys.both_ways, 0);
    if (t == NO_OPEN || (t == NO_WRITE && sys.direct_writes))
        assert_int_equal(store_writer_direct(c.w).offset, 0);
    else if (t != FAIL_ENOTSUP)
        assert_true(store_writer_direct(c.w).offset >= PAGE && store_writer_direct(c.w).memory > 0);
    assert_int_equal(status_code(st), !final ? ST_OK : t == FAIL_EIO ? ST_IO : ST_NO_SPACE);
    if (st) {
        assert_non_null(strstr(status_message(st), "step/object"));
        status_free(st);
        store_writer_abort(c.w);
        expect_nothing(r.store, &r);
    } else {
        trouble(NONE, 0);
        assert_ok(store_writer_finish(c.w));
        expect_object(r.store, &c);
    }
    close_cut(&c);
    root_close(&r);
}

static void test_troubles(void **state)
{
    (void)state;
    for (enum trouble t = NONE; t < TROUBLES; t++) {
        uint64_t direct_writes = 0;
        for (uint32_t n = 0; n < 25; n++)
            one_case(t, n, &direct_writes);
        assert_true(t == NO_OPEN ? direct_writes == 0 : direct_writes > 8);
    }
}

/* Exactly the whole pages of aligned memory go by O_DIRECT, in pieces of at most 4 MiB. */
static void test_ways(void **state)
{
    (void)state;
    static const struct {
        uint64_t offset, memory, bytes;
        uint64_t first, pages; /* that go direct */
        uint64_t writes;
    } cases[] = {
        { 0, 0, 3 * PAGE, 0, 3, 1 },
        { 0, 0, PAGE - 1, 0, 0, 1 },
        { 0, 0, PAGE, 0, 1, 1 },
        { 0, 0, PAGE + 1, 0, 1, 2 },
        { 0, 1, 3 * PAGE, 0, 0, 1 },
        { PAGE, 0, 2 * PAGE + 5, 1, 2, 2 },
        { 100, 100, 3 * PAGE, 1, 2, 3 }, /* head, body, tail */
        { 100, 0, 3 * PAGE, 0, 0, 1 },   /* no part of it is aligned in memory */
        { 100, 100, PAGE, 0, 0, 1 },     /* no whole page */
        { PAGE - 1, PAGE - 1, PAGE + 1, 1, 1, 2 },
        { 0, 0, PIECE + PAGE, 0, 1025, 2 },
        { 0, 0, 2 * PIECE + 1, 0, 2048, 3 },
    };
    struct root r = root_open(true);
    unsigned char *block = mem_block(MOST + PAGE, PAGE);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct store_writer *w;
        assert_ok(store_writer_open(r.store, "x", MOST, &w));
        struct store_direct a = store_writer_direct(w);
        trouble(NONE, 0);
        if (a.offset == PAGE && a.memory <= PAGE) {
            assert_ok(store_write(w, cases[i].offset, block + cases[i].memory, cases[i].bytes));
            for (uint64_t p = 0; p < PAGES; p++)
                assert_int_equal((sys.way[p] & 2) != 0, p >= cases[i].first && p < cases[i].first + cases[i].pages);
            assert_int_equal(sys.writes, cases[i].writes);
            assert_int_equal(sys.both_ways, 0);
        }
        store_writer_abort(w);
    }
    mem_block_free(block, MOST + PAGE);
    root_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_ways), cmocka_unit_test(test_troubles) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
