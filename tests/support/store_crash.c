/* store_crash: recorder and replay.
 *
 * Recorder: each wrapped call is done and noted under one lock, with the paths that its descriptors have at that time,
 * so the trace is an order in which it may all have happened. Replay: (1) `resolve` walks the whole trace on the
 * namespace as the program saw it and finds the inodes and directories of each event; (2) `settle` decides for a crash
 * which of the events before it hold; (3) `apply` does these to an empty disk; (4) `produce` makes files of the disk.
 *
 * The functions --wrap asks for have no argument for a handle, so `recording` is a global. */
#include "tests/support/store_crash.h"

#include "comm/base/mem.h"
#include "comm/base/rng.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_EVENTS = 1 << 15, POOL_BYTES = 1 << 27, MAX_MARKS = 1024, ROOT = 0, NONE = -1, SECTOR = 512 };

enum kind { CREATE, MKDIR, WRITE, TRUNCATE, LINK, UNLINK, RENAME, SYNC };

struct event {
    enum kind kind;
    size_t path, to; /* in the pool: relative to the root, "" is the root itself */
    size_t data;     /* WRITE */
    uint64_t offset, bytes;
};

struct crash_trace {
    pthread_mutex_t lock;
    char root[PATH_MAX];
    size_t events, used, marks, direct_writes;
    bool full;
    struct event event[MAX_EVENTS];
    size_t marked_at[MAX_MARKS]; /* number of events before the mark */
    struct crash_mark mark[MAX_MARKS];
    char pool[POOL_BYTES];
};

static struct crash_trace *recording;

/* ---- Recorder */

status *crash_trace_new(struct crash_trace **out)
{
    struct crash_trace *t =
        mmap(NULL, sizeof *t, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (t == MAP_FAILED)
        return ERR_SYS(errno, "mmap of a trace");
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return NULL;
}

void crash_trace_free(struct crash_trace *t)
{
    if (t)
        munmap(t, sizeof *t);
}

void crash_record(struct crash_trace *t, const char *path)
{
    if (t)
        snprintf(t->root, sizeof t->root, "%s", path);
    recording = t;
}

void crash_mark(struct crash_trace *t, int what, uint64_t a, uint64_t b)
{
    pthread_mutex_lock(&t->lock);
    if (t->marks < MAX_MARKS) {
        t->marked_at[t->marks] = t->events;
        t->mark[t->marks++] = (struct crash_mark){ what, a, b };
    } else {
        t->full = true;
    }
    pthread_mutex_unlock(&t->lock);
}

static size_t pool_add(struct crash_trace *t, const void *p, size_t n)
{
    if (t->used + n > POOL_BYTES) {
        t->full = true;
        return 0;
    }
    memcpy(t->pool + t->used, p, n);
    t->used += n;
    return t->used - n;
}

/* The path below the root of `name` in the directory dirfd, or of dirfd itself (name NULL). False: it is elsewhere. */
static bool below(const struct crash_trace *t, int dirfd, const char *name, char path[PATH_MAX])
{
    char link[64], dir[PATH_MAX];
    if (dirfd < 0 || (name && name[0] == '/'))
        return false;
    snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    ssize_t n = readlink(link, dir, sizeof dir - 1);
    size_t root = strlen(t->root);
    if (n < (ssize_t)root || memcmp(dir, t->root, root) != 0)
        return false;
    dir[n] = 0;
    if ((dir[root] && dir[root] != '/') || strstr(dir, " (deleted)"))
        return false;
    const char *at = dir + root + (dir[root] == '/');
    if (!name || !strcmp(name, "."))
        snprintf(path, PATH_MAX, "%s", at);
    else
        snprintf(path, PATH_MAX, "%s%s%s", at, *at ? "/" : "", name);
    return true;
}

static void note(struct crash_trace *t, enum kind kind, const char *path, const char *to, uint64_t offset,
                 const void *data, uint64_t bytes)
{
    if (t->events == MAX_EVENTS) {
        t->full = true;
        return;
    }
    struct event *e = &t->event[t->events++];
    *e = (struct event){ .kind = kind, .offset = offset, .bytes = bytes };
    e->path = pool_add(t, path, strlen(path) + 1);
    if (to)
        e->to = pool_add(t, to, strlen(to) + 1);
    if (data)
        e->data = pool_add(t, data, bytes);
}

/* Where the call happens, if it is recorded; then the lock is held. */
static struct crash_trace *enter(int dirfd, const char *name, char path[PATH_MAX])
{
    struct crash_trace *t = recording;
    if (!t)
        return NULL;
    pthread_mutex_lock(&t->lock);
    if (below(t, dirfd, name, path))
        return t;
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

static void leave(struct crash_trace *t)
{
    int e = errno;
    pthread_mutex_unlock(&t->lock);
    errno = e;
}

/* Note it if it went well. */
#define WRAPPED(t, good, ...)                                                                                          \
    do {                                                                                                               \
        if (good)                                                                                                      \
            note(t, __VA_ARGS__);                                                                                      \
        leave(t);                                                                                                      \
    } while (0)

int __real_openat(int dirfd, const char *name, int flags, ...);
int __real_mkdirat(int dirfd, const char *name, mode_t mode);
int __real_ftruncate(int fd, off_t bytes);
ssize_t __real_write(int fd, const void *buf, size_t n);
ssize_t __real_pwrite(int fd, const void *buf, size_t n, off_t offset);
int __real_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags);
int __real_renameat(int from_fd, const char *from, int to_fd, const char *to);
int __real_unlinkat(int dirfd, const char *name, int flags);

int __wrap_openat(int dirfd, const char *name, int flags, ...);
int __wrap_mkdirat(int dirfd, const char *name, mode_t mode);
int __wrap_ftruncate(int fd, off_t bytes);
ssize_t __wrap_write(int fd, const void *buf, size_t n);
ssize_t __wrap_pwrite(int fd, const void *buf, size_t n, off_t offset);
int __wrap_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags);
int __wrap_renameat(int from_fd, const char *from, int to_fd, const char *to);
int __wrap_unlinkat(int dirfd, const char *name, int flags);
int __wrap_fsync(int fd);
int __wrap_fdatasync(int fd);

int __wrap_openat(int dirfd, const char *name, int flags, ...)
{
    char path[PATH_MAX];
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list ap;
        va_start(ap, flags);
        mode = va_arg(ap, mode_t);
        va_end(ap);
    }
    struct crash_trace *t = flags & O_CREAT ? enter(dirfd, name, path) : NULL;
    if (!t)
        return __real_openat(dirfd, name, flags, mode);
    int fd = __real_openat(dirfd, name, flags, mode);
    WRAPPED(t, fd >= 0, CREATE, path, NULL, 0, NULL, 0);
    return fd;
}

int __wrap_mkdirat(int dirfd, const char *name, mode_t mode)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(dirfd, name, path);
    int rc = __real_mkdirat(dirfd, name, mode);
    if (t)
        WRAPPED(t, rc == 0, MKDIR, path, NULL, 0, NULL, 0);
    return rc;
}

int __wrap_ftruncate(int fd, off_t bytes)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(fd, NULL, path);
    int rc = __real_ftruncate(fd, bytes);
    if (t)
        WRAPPED(t, rc == 0, TRUNCATE, path, NULL, (uint64_t)bytes, NULL, 0);
    return rc;
}

ssize_t __wrap_write(int fd, const void *buf, size_t n)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(fd, NULL, path);
    off_t at = t ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t k = __real_write(fd, buf, n);
    if (t)
        WRAPPED(t, k > 0, WRITE, path, NULL, (uint64_t)at, buf, (uint64_t)k);
    return k;
}

ssize_t __wrap_pwrite(int fd, const void *buf, size_t n, off_t offset)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(fd, NULL, path);
    ssize_t k = __real_pwrite(fd, buf, n, offset);
    if (t && k > 0)
        t->direct_writes += (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    if (t)
        WRAPPED(t, k > 0, WRITE, path, NULL, (uint64_t)offset, buf, (uint64_t)k);
    return k;
}

/* Both names are below one root: store_posix.c has no others. */
int __wrap_linkat(int from_fd, const char *from, int to_fd, const char *to, int flags)
{
    char path[PATH_MAX], path2[PATH_MAX];
    struct crash_trace *t = enter(from_fd, from, path);
    int rc = __real_linkat(from_fd, from, to_fd, to, flags);
    if (t)
        WRAPPED(t, rc == 0 && below(t, to_fd, to, path2), LINK, path, path2, 0, NULL, 0);
    return rc;
}

int __wrap_renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    char path[PATH_MAX], path2[PATH_MAX];
    struct crash_trace *t = enter(from_fd, from, path);
    int rc = __real_renameat(from_fd, from, to_fd, to);
    if (t)
        WRAPPED(t, rc == 0 && below(t, to_fd, to, path2), RENAME, path, path2, 0, NULL, 0);
    return rc;
}

int __wrap_unlinkat(int dirfd, const char *name, int flags)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(dirfd, name, path);
    int rc = __real_unlinkat(dirfd, name, flags);
    if (t)
        WRAPPED(t, rc == 0, UNLINK, path, NULL, 0, NULL, 0);
    return rc;
}

int __wrap_fsync(int fd)
{
    char path[PATH_MAX];
    struct crash_trace *t = enter(fd, NULL, path);
    if (t)
        WRAPPED(t, true, SYNC, path, NULL, 0, NULL, 0);
    return 0;
}

int __wrap_fdatasync(int fd)
{
    return __wrap_fsync(fd);
}

/* ---- A disk: inodes, and entries that name them */

struct inode {
    bool is_dir;
    unsigned char *data;
    uint64_t bytes;
};

struct entry {
    int dir, inode; /* dir NONE: removed */
    const char *name;
};

struct disk {
    struct inode *inode; /* [0] is the root */
    struct entry *entry;
    int inodes, entries;
};

/* An event whose paths are inodes. */
struct op {
    enum kind kind;
    int dir, dir2, inode; /* NONE where the kind has none */
    const char *name, *name2;
    const void *data;
    uint64_t offset, bytes;
};

static status *disk_open(size_t events, struct disk *d)
{
    *d = (struct disk){ .inode = mem_calloc(events + 1, sizeof *d->inode),
                        .entry = mem_calloc(events + 1, sizeof *d->entry),
                        .inodes = 1 };
    if (!d->inode || !d->entry)
        return ERR(NO_MEMORY, "a disk");
    d->inode[ROOT].is_dir = true;
    return NULL;
}

static void disk_close(struct disk *d)
{
    for (int i = 0; d->inode && i < d->inodes; i++)
        mem_free(d->inode[i].data);
    mem_free(d->inode);
    mem_free(d->entry);
}

static struct entry *find(const struct disk *d, int dir, const char *name, size_t n)
{
    for (int i = 0; i < d->entries; i++)
        if (d->entry[i].dir == dir && strlen(d->entry[i].name) == n && !memcmp(d->entry[i].name, name, n))
            return &d->entry[i];
    return NULL;
}

static void name_it(struct disk *d, int dir, const char *name, int inode)
{
    struct entry *e = find(d, dir, name, strlen(name));
    if (!e)
        e = &d->entry[d->entries++];
    *e = (struct entry){ dir, inode, name };
}

static void unname(struct disk *d, int dir, const char *name, int inode)
{
    struct entry *e = find(d, dir, name, strlen(name));
    if (e && e->inode == inode)
        e->dir = NONE;
}

static status *resize(struct inode *i, uint64_t bytes)
{
    unsigned char *data = mem_realloc(i->data, bytes + 1);
    if (!data)
        return ERR(NO_MEMORY, "%llu bytes", (unsigned long long)bytes);
    if (bytes > i->bytes)
        memset(data + i->bytes, 0, bytes - i->bytes);
    i->data = data;
    i->bytes = bytes;
    return NULL;
}

static status *write_part(struct disk *d, const struct op *o, uint64_t begin, uint64_t end)
{
    struct inode *i = &d->inode[o->inode];
    if (begin >= end)
        return NULL;
    if (o->offset + end > i->bytes)
        TRY(resize(i, o->offset + end));
    memcpy(i->data + o->offset + begin, (const unsigned char *)o->data + begin, end - begin);
    return NULL;
}

static status *apply(struct disk *d, const struct op *o)
{
    switch (o->kind) {
    case CREATE:
    case MKDIR:
        d->inode[o->inode].is_dir = o->kind == MKDIR;
        name_it(d, o->dir, o->name, o->inode);
        return NULL;
    case WRITE:
        return write_part(d, o, 0, o->bytes);
    case TRUNCATE:
        return resize(&d->inode[o->inode], o->offset);
    case LINK:
        name_it(d, o->dir2, o->name2, o->inode);
        return NULL;
    case UNLINK:
        unname(d, o->dir, o->name, o->inode);
        return NULL;
    case RENAME:
        name_it(d, o->dir2, o->name2, o->inode);
        unname(d, o->dir, o->name, o->inode);
        return NULL;
    case SYNC:
        return NULL;
    }
    return NULL;
}

/* ---- Resolving */

/* The directory that holds the last segment of path, and that segment. */
static int parent(const struct disk *d, const char *path, const char **name)
{
    int dir = ROOT;
    for (const char *slash; (slash = strchr(path, '/')) != NULL; path = slash + 1) {
        const struct entry *e = find(d, dir, path, (size_t)(slash - path));
        if (!e)
            return NONE;
        dir = e->inode;
    }
    *name = path;
    return dir;
}

static int lookup(const struct disk *d, const char *path)
{
    const char *name;
    if (!*path)
        return ROOT;
    int dir = parent(d, path, &name);
    const struct entry *e = dir == NONE ? NULL : find(d, dir, name, strlen(name));
    return e ? e->inode : NONE;
}

static status *resolve_one(const struct crash_trace *t, const struct event *e, struct disk *seen, struct op *o)
{
    const char *path = t->pool + e->path;
    *o = (struct op){ .kind = e->kind, .dir = NONE, .dir2 = NONE, .offset = e->offset, .bytes = e->bytes };
    o->data = t->pool + e->data;
    if (e->kind == CREATE || e->kind == MKDIR || e->kind == UNLINK || e->kind == RENAME)
        o->dir = parent(seen, path, &o->name);
    if (e->kind == LINK || e->kind == RENAME)
        o->dir2 = parent(seen, t->pool + e->to, &o->name2);
    o->inode = e->kind == CREATE || e->kind == MKDIR ? seen->inodes++ : lookup(seen, path);
    if (o->inode == NONE)
        return ERR(INTERNAL, "the trace has an event of kind %d on %s, which it has not made", (int)e->kind, path);
    return apply(seen, o);
}

static status *resolve(const struct crash_trace *t, size_t count, struct op *op)
{
    struct disk seen;
    status *st = t->full ? ERR(INTERNAL, "the trace is full") : disk_open(t->events, &seen);
    if (st)
        return st;
    for (size_t i = 0; i < count && !st; i++)
        st = resolve_one(t, &t->event[i], &seen, &op[i]);
    disk_close(&seen);
    return st;
}

/* ---- Crashing */

size_t crash_direct_writes(const struct crash_trace *t)
{
    return t->direct_writes;
}

size_t crash_syncs(const struct crash_trace *t)
{
    size_t n = 0;
    for (size_t i = 0; i < t->events; i++)
        n += t->event[i].kind == SYNC;
    return n;
}

/* Events before crash n. */
static size_t events_before(const struct crash_trace *t, size_t n)
{
    size_t i = 0;
    for (; i < t->events; i++)
        if (t->event[i].kind == SYNC && n-- == 0)
            break;
    return i;
}

const struct crash_mark *crash_marks(const struct crash_trace *t, size_t n, size_t i)
{
    return i < t->marks && t->marked_at[i] <= events_before(t, n) ? &t->mark[i] : NULL;
}

/* hold[i]: op i was made durable by one of the `count` first. */
static void settle(const struct op *op, size_t count, enum crash_broken broken, bool *hold, const struct disk *d)
{
    memset(hold, 0, count);
    for (size_t i = 0; i < count; i++) {
        if (op[i].kind != SYNC ||
            broken == (d->inode[op[i].inode].is_dir ? CRASH_DIRS_NOT_SYNCED : CRASH_FILES_NOT_SYNCED))
            continue;
        for (size_t k = 0; k < i; k++) {
            bool content = op[k].kind == WRITE || op[k].kind == TRUNCATE;
            hold[k] = hold[k] ||
                      (content ? op[k].inode == op[i].inode : op[k].dir == op[i].inode || op[k].dir2 == op[i].inode);
        }
    }
}

/* Some sectors of a write, or its beginning. */
static status *tear(struct disk *d, const struct op *o, struct rng_at at)
{
    if (rng_u32(at, 0) & 1)
        return write_part(d, o, 0, rng_below(at, 1, o->bytes + 1));
    for (uint64_t begin = 0, k = 0; begin < o->bytes; k++) {
        uint64_t end = begin + SECTOR - (o->offset + begin) % SECTOR;
        end = end < o->bytes ? end : o->bytes;
        if (rng_u32(at, 8 + k) & 1)
            TRY(write_part(d, o, begin, end));
        begin = end;
    }
    return NULL;
}

/* One that was not made durable. cut: of CRASH_ORDERED. */
static status *maybe(struct disk *d, const struct op *o, size_t i, enum crash_choice choice, size_t cut, uint64_t seed)
{
    struct rng_at at = { seed, (uint32_t)i, 1, 99 };
    uint64_t draw = rng_below(at, 2, 3);
    bool keep = choice == CRASH_KEEP || (choice == CRASH_ORDERED && i < cut) || (choice == CRASH_ANY && draw == 1);
    bool torn = (choice == CRASH_ORDERED && i == cut) || (choice == CRASH_ANY && draw == 2);
    if (keep)
        return apply(d, o);
    return torn && o->kind == WRITE ? tear(d, o, at) : NULL;
}

/* ---- Making files */

static status *produce_file(const struct inode *i, const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f)
        return ERR_SYS(errno, "create %s", path);
    size_t n = i->bytes ? fwrite(i->data, 1, i->bytes, f) : 0;
    if (fclose(f) != 0 || n != i->bytes)
        return ERR(IO, "write %s", path);
    return NULL;
}

static status *produce(const struct disk *d, int dir, const char *path)
{
    for (int i = 0; i < d->entries; i++) {
        char child[PATH_MAX];
        const struct entry *e = &d->entry[i];
        if (e->dir != dir)
            continue;
        if ((size_t)snprintf(child, sizeof child, "%s/%s", path, e->name) >= sizeof child)
            return ERR(INTERNAL, "%s/%s: too long", path, e->name);
        if (!d->inode[e->inode].is_dir) {
            TRY(produce_file(&d->inode[e->inode], child));
            continue;
        }
        if (mkdir(child, 0777) != 0)
            return ERR_SYS(errno, "mkdir %s", child);
        TRY(produce(d, e->inode, child));
    }
    return NULL;
}

/* `prefix`: the directory's key with its '/', or "". */
static status *produce_objects(const struct disk *d, int dir, const char *prefix, struct store *into)
{
    for (int i = 0; i < d->entries; i++) {
        char key[STORE_KEY_BYTES];
        const struct entry *e = &d->entry[i];
        const struct inode *node = &d->inode[e->inode];
        if (e->dir != dir || !strncmp(e->name, ".tmp-", 5))
            continue;
        if ((size_t)snprintf(key, sizeof key, "%s%s%s", prefix, e->name, node->is_dir ? "/" : "") >= sizeof key)
            return ERR(INTERNAL, "%s%s: too long", prefix, e->name);
        TRY(node->is_dir
                ? produce_objects(d, e->inode, key, into)
                : store_put(into, key, node->bytes ? (const void *)node->data : "", node->bytes, STORE_EXCLUSIVE));
    }
    return NULL;
}

static status *replay(const struct crash_trace *t, struct disk *d, struct op *op, bool *hold, size_t count,
                      enum crash_choice choice, uint64_t seed, enum crash_broken broken)
{
    TRY(resolve(t, count, op));
    for (size_t i = 0; i < count; i++)
        if (op[i].kind == CREATE || op[i].kind == MKDIR) {
            d->inode[op[i].inode].is_dir = op[i].kind == MKDIR;
            d->inodes = op[i].inode + 1;
        }
    settle(op, count, broken, hold, d);
    size_t cut = (size_t)rng_below((struct rng_at){ seed, 0, 2, 99 }, 0, count + 1);
    for (size_t i = 0; i < count; i++)
        TRY(hold[i] ? apply(d, &op[i]) : maybe(d, &op[i], i, choice, cut, seed));
    return NULL;
}

status *crash_replay(const struct crash_trace *t, size_t n, enum crash_choice choice, uint64_t seed,
                     enum crash_broken broken, const char *path, struct store *into)
{
    size_t count = events_before(t, n);
    struct disk d;
    struct op *op = mem_calloc(count + 1, sizeof *op);
    bool *hold = mem_calloc(count + 1, 1);
    status *st = disk_open(count, &d);
    if (!st)
        st = op && hold ? replay(t, &d, op, hold, count, choice, seed, broken) : ERR(NO_MEMORY, "a replay");
    if (!st)
        st = into ? produce_objects(&d, ROOT, "", into) : produce(&d, ROOT, path);
    disk_close(&d);
    mem_free(op);
    mem_free(hold);
    return st;
}
