/* store_posix: a directory of a POSIX file system.
 *
 * Invariants: (1) a key names a whole object or nothing: bytes go to a temporary file in the same directory, are
 * fsynced, and only then linked (exclusive) or renamed (replace) to the key; (2) after put, finish, remove and rename
 * have returned NULL, every directory from the object's up to the root has been fsynced, so a crash of the machine
 * forgets none of it, whoever made those directories; (3) an error leaves no temporary file behind; a killed process
 * does, and sweep removes it.
 *
 *   writer_open -> .tmp-RANDOM-NAME -write*-> -finish: fsync, close, rename, fsync dirs-> NAME
 *                                            -abort, or an error: unlink-> nothing
 *
 * A writer has two descriptors of its file. The pages that a write covers whole go by O_DIRECT where the file system
 * takes it and the caller's memory is aligned; the bytes before and after them, and everything else, go through the
 * page cache. So no page is ever written both ways at once (writes are disjoint, and a page that two of them share is
 * whole in neither), and what one way wrote the other sees, since the kernel drops cached pages below a direct write.
 * fsync makes both durable. The first direct write that is refused (EINVAL) ends them for that file.
 *
 * Files grow by ftruncate, never posix_fallocate: with buffered writes that was three times slower (ext4 on virtio, .35
 * GB/s). An fsync that fails is final: the kernel may have dropped the pages, so a second one proves nothing. Reads
 * open the file each time: what a key names may be replaced (the lease), and an open is cheap beside a checksum block.
 * A direct read goes by O_DIRECT for the pages it covers whole, by the same rule, on one descriptor.
 */
#include "comm/base/mem.h"
#include "storage/store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEMP_NAME_BYTES = 256, TEMP_PATH_BYTES = STORE_KEY_BYTES + TEMP_NAME_BYTES, TEMP_KEEP = 200, TRIES = 16 };
enum { PAGE = 4096, DIRECT_MOST = 1 << 16, DIRECT_PIECE = 4 << 20 };
static const char temp_prefix[] = ".tmp-";

struct posix_store {
    int fd; /* the root */
    char *root;
};

struct posix_writer {
    int fd;
    int direct_fd; /* -1: none */
    struct store_direct align;
    atomic_bool refused;        /* no direct write any more */
    char temp[TEMP_PATH_BYTES]; /* relative to the root */
};

/* ---- Directories */

/* Length of the directory part of key, without its '/'; 0: the root. */
static size_t dir_length(const char *key)
{
    const char *slash = strrchr(key, '/');
    return slash ? (size_t)(slash - key) : 0;
}

static status *sync_fd(int fd, const char *root, const char *what)
{
    while (fsync(fd) != 0)
        if (errno != EINTR)
            return ERR_SYS(errno, "fsync %s/%s", root, what);
    return NULL;
}

static status *sync_dir(const struct posix_store *p, const char *dir)
{
    int fd = openat(p->fd, *dir ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return ERR_SYS(errno, "open %s/%s", p->root, dir);
    status *st = sync_fd(fd, p->root, dir);
    close(fd);
    return st;
}

/* fsync the directories from key's up to the root. After a removal some of them may be gone, too. */
static status *sync_parents(const struct posix_store *p, const char *key, bool removed)
{
    char dir[TEMP_PATH_BYTES];
    size_t n = dir_length(key);
    memcpy(dir, key, n);
    for (;;) {
        dir[n] = 0;
        status *st = sync_dir(p, dir);
        if (removed && status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            st = NULL;
        }
        if (st || n == 0)
            return st;
        n = dir_length(dir);
    }
}

static status *make_parents(const struct posix_store *p, const char *key)
{
    char dir[STORE_KEY_BYTES];
    for (const char *slash = strchr(key, '/'); slash; slash = strchr(slash + 1, '/')) {
        size_t n = (size_t)(slash - key);
        memcpy(dir, key, n);
        dir[n] = 0;
        if (mkdirat(p->fd, dir, 0777) != 0 && errno != EEXIST)
            return ERR_SYS(errno, "mkdir %s/%s", p->root, dir);
    }
    return NULL;
}

/* mkdir -p of an ordinary path; each directory that was made is made durable in its parent. */
static status *make_path(char *path)
{
    for (char *end = path + 1;; end++) {
        end += strcspn(end, "/");
        char keep = *end;
        *end = 0;
        int made = mkdir(path, 0777) == 0, e = errno;
        if (!made && e != EEXIST) {
            struct stat sb; /* a read-only file system says EROFS of what is there, too */
            if (stat(path, &sb) != 0 || !S_ISDIR(sb.st_mode))
                return ERR_SYS(e, "mkdir %s", path);
        }
        if (made) {
            char *slash = strrchr(path, '/');
            char parent[4096];
            snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
            int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            status *st = fd < 0 ? ERR_SYS(errno, "open %s", parent) : sync_fd(fd, parent, "");
            if (fd >= 0)
                close(fd);
            if (st)
                return st;
        }
        *end = keep;
        if (!keep || !end[1])
            return NULL;
    }
}

static status *posix_open(struct store *s, const char *path, bool create)
{
    const char *at = strncmp(path, "//", 2) == 0 ? path + 2 : path;
    if (at != path && *at != '/')
        return ERR(INVALID, "%s: a file URL with a host; write file:///PATH or file:PATH", s->uri);
    if (!*at || strlen(at) >= 4096)
        return ERR(INVALID, "%s: the path is %s", s->uri, *at ? "too long" : "empty");
    struct posix_store *p = mem_calloc(1, sizeof *p);
    char *root = mem_strdup(at);
    status *st = p && root ? NULL : ERR(NO_MEMORY, "store %s", s->uri);
    int fd = -1;
    if (!st && create)
        st = make_path(root);
    if (!st && (fd = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        st = errno == ENOTDIR ? ERR(INVALID, "%s is not a directory", root) : ERR_SYS(errno, "open %s", root);
    if (st) {
        mem_free(root);
        mem_free(p);
        return st;
    }
    *p = (struct posix_store){ .fd = fd, .root = root };
    s->impl = p;
    return NULL;
}

static void posix_close(struct store *s)
{
    struct posix_store *p = s->impl;
    close(p->fd);
    mem_free(p->root);
    mem_free(p);
}

/* ---- Temporary files */

/* Make an empty temporary file beside key, and the directories above it. */
static status *temp_open(const struct posix_store *p, const char *key, char temp[TEMP_PATH_BYTES], int *fd)
{
    size_t dir = dir_length(key);
    const char *name = dir ? key + dir + 1 : key;
    for (int tries = 0; tries < TRIES; tries++) {
        uint64_t r;
        if (getrandom(&r, sizeof r, 0) != (ssize_t)sizeof r)
            return ERR_SYS(errno, "getrandom");
        snprintf(temp, TEMP_PATH_BYTES, "%.*s%s%s%016llx-%.*s", (int)dir, key, dir ? "/" : "", temp_prefix,
                 (unsigned long long)r, TEMP_KEEP, name);
        *fd = openat(p->fd, temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (*fd >= 0)
            return NULL;
        if (errno == ENOENT) /* also when another thread has just removed the empty directory */
            TRY(make_parents(p, key));
        else if (errno == ENOTDIR)
            return ERR(INVALID, "%s/%s: something above it is not a directory", p->root, key);
        else if (errno != EEXIST && errno != EINTR)
            return ERR_SYS(errno, "create %s/%s", p->root, temp);
    }
    return ERR(IO, "create %s/%s: its directory vanishes again and again", p->root, temp);
}

static status *close_fd(const struct posix_store *p, int fd, const char *key)
{
    if (close(fd) != 0 && errno != EINTR) /* after EINTR Linux has closed it */
        return ERR_SYS(errno, "close %s/%s", p->root, key);
    return NULL;
}

/* Give the fsynced temporary file its name; it is gone under its old one on success. */
static status *publish(const struct posix_store *p, const char *temp, const char *key, enum store_put_mode mode)
{
    int rc;
    if (mode == STORE_REPLACE) {
        do
            rc = renameat(p->fd, temp, p->fd, key);
        while (rc != 0 && errno == EINTR);
        return rc == 0 ? NULL : ERR_SYS(errno, "rename %s/%s to %s", p->root, temp, key);
    }
    do
        rc = linkat(p->fd, temp, p->fd, key, 0);
    while (rc != 0 && errno == EINTR);
    if (rc != 0) {
        int e = errno;
        struct stat sb; /* a repeated NFS request can say EEXIST of the link that it made itself */
        if (e != EEXIST || fstatat(p->fd, temp, &sb, 0) != 0 || sb.st_nlink != 2)
            return e == EEXIST ? ERR(EXISTS, "%s/%s is there already", p->root, key)
                               : ERR_SYS(e, "link %s/%s to %s", p->root, temp, key);
    }
    if (unlinkat(p->fd, temp, 0) != 0)
        return ERR_SYS(errno, "unlink %s/%s", p->root, temp);
    return NULL;
}

/* fsync, close, publish, fsync directories. Closes fd and, on error, removes the temporary file. */
static status *settle(const struct posix_store *p, int fd, const char *temp, const char *key, enum store_put_mode mode,
                      status *st)
{
    if (!st)
        st = sync_fd(fd, p->root, key);
    st = status_first(st, close_fd(p, fd, key));
    if (!st)
        st = publish(p, temp, key, mode);
    if (st) {
        unlinkat(p->fd, temp, 0);
        return st;
    }
    return sync_parents(p, key, false);
}

/* ---- Objects */

static status *posix_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    const struct posix_store *p = s->impl;
    char temp[TEMP_PATH_BYTES];
    int fd;
    TRY(temp_open(p, key, temp, &fd));
    status *st = NULL;
    for (size_t done = 0; done < n && !st;) {
        ssize_t k = write(fd, (const char *)buf + done, n - done);
        if (k >= 0)
            done += (size_t)k;
        else if (errno != EINTR)
            st = ERR_SYS(errno, "write %s/%s", p->root, key);
    }
    return settle(p, fd, temp, key, mode, st);
}

/* What direct I/O on this file wants. Without the kernel's word (before 6.1): a page, which every disk takes. */
static struct store_direct direct_alignment(int fd)
{
    struct store_direct a = { PAGE, PAGE };
#ifdef STATX_DIOALIGN
    struct statx sx;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN))
        a = (struct store_direct){ sx.stx_dio_mem_align, sx.stx_dio_offset_align };
#endif
    long page = sysconf(_SC_PAGESIZE);
    if (!a.memory || !a.offset || page <= 0 || page > DIRECT_MOST)
        return (struct store_direct){ 0, 0 };
    a.offset = a.offset < (uint32_t)page ? (uint32_t)page : a.offset; /* no page is written both ways */
    bool usable = !(a.offset & (a.offset - 1)) && a.offset <= DIRECT_MOST && a.memory <= DIRECT_MOST;
    return usable ? a : (struct store_direct){ 0, 0 };
}

/* How many bytes from the beginning of a transfer go one way, and whether that is the direct one. */
static size_t part_of(struct store_direct a, uint64_t offset, const void *buf, size_t n, bool *direct)
{
    *direct = false;
    if (!a.offset || n < a.offset)
        return n;
    size_t head = (size_t)(-offset & (a.offset - 1)), body = (n - head) & ~(size_t)(a.offset - 1);
    if (head >= n || !body || ((uintptr_t)buf + head) % a.memory)
        return n;
    if (head)
        return head;
    *direct = true;
    return body < DIRECT_PIECE ? body : DIRECT_PIECE;
}

/* An open file that is read from. */
struct reading {
    int fd;
    struct store_direct align; /* {0, 0}: all through the page cache */
    bool direct;               /* O_DIRECT is set on fd now */
};

/* The next bytes, whichever way they can go. -1: errno. */
static ssize_t read_part(struct reading *r, uint64_t offset, void *buf, size_t n)
{
    bool direct;
    n = part_of(r->align, offset, buf, n, &direct);
    if (direct != r->direct) {
        int flags = fcntl(r->fd, F_GETFL);
        if (flags < 0 || fcntl(r->fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT) != 0) {
            if (!direct || (errno != EINVAL && errno != EOPNOTSUPP))
                return -1;
            direct = false;
            r->align = (struct store_direct){ 0, 0 };
        }
        r->direct = direct;
    }
    ssize_t k = pread(r->fd, buf, n, (off_t)offset);
    if (k >= 0 || !direct || (errno != EINVAL && errno != EOPNOTSUPP))
        return k;
    r->align = (struct store_direct){ 0, 0 }; /* refused after all */
    return read_part(r, offset, buf, n);
}

/* Loops until n or the end, so that one call sees one file, however often the key is replaced meanwhile. */
static status *get_from(const struct posix_store *p, const char *key, bool direct, uint64_t offset, void *buf, size_t n,
                        size_t *got)
{
    if (offset > INT64_MAX - (uint64_t)n)
        return ERR(INVALID, "%s/%s: offset %llu", p->root, key, (unsigned long long)offset);
    struct reading r = { .fd = openat(p->fd, key, O_RDONLY | O_CLOEXEC) };
    if (r.fd < 0)
        return ERR_SYS(errno, "open %s/%s", p->root, key);
    if (direct) {
        r.align = direct_alignment(r.fd);
        (void)posix_fadvise(r.fd, 0, 0, POSIX_FADV_RANDOM); /* the rest of a page: nothing is to be read ahead */
    }
    status *st = NULL;
    size_t done = 0;
    while (done < n) {
        ssize_t k = read_part(&r, offset + done, (char *)buf + done, n - done);
        if (k == 0)
            break;
        if (k > 0) {
            done += (size_t)k;
        } else if (errno != EINTR) {
            st = errno == EISDIR
                     ? ERR(NOT_FOUND, "%s/%s: is a directory", p->root, key)
                     : ERR_SYS(errno, "read %s/%s at %llu", p->root, key, (unsigned long long)(offset + done));
            break;
        }
    }
    close(r.fd);
    if (!st)
        *got = done;
    return st;
}

static status *posix_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    return get_from(s->impl, key, false, offset, buf, n, got);
}

static status *posix_get_direct(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    return get_from(s->impl, key, n >= PAGE, offset, buf, n, got);
}

static struct store_info info_of(const struct stat *sb)
{
    return (struct store_info){ .bytes = S_ISDIR(sb->st_mode) ? 0 : (uint64_t)sb->st_size,
                                .mtime_ns = (uint64_t)sb->st_mtim.tv_sec * 1000000000u + (uint64_t)sb->st_mtim.tv_nsec,
                                .is_dir = S_ISDIR(sb->st_mode) };
}

static status *posix_stat(struct store *s, const char *key, struct store_info *out)
{
    const struct posix_store *p = s->impl;
    struct stat sb;
    if (fstatat(p->fd, key, &sb, 0) != 0)
        return ERR_SYS(errno, "stat %s/%s", p->root, key);
    *out = info_of(&sb);
    return NULL;
}

/* ---- Directories' contents */

static status *dir_open(const struct posix_store *p, int at, const char *name, DIR **out)
{
    int fd = openat(at, *name ? name : ".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        status *st = ERR_SYS(errno, "open directory %s/%s", p->root, name);
        if (fd >= 0)
            close(fd);
        return st;
    }
    *out = d;
    return NULL;
}

/* The next name that is not "." or ".."; NULL at the end (*st NULL) or after an error. */
static const char *dir_next(const struct posix_store *p, DIR *d, status **st)
{
    for (;;) {
        errno = 0;
        const struct dirent *e = readdir(d);
        if (!e) {
            if (errno)
                *st = ERR_SYS(errno, "read a directory of %s", p->root);
            return NULL;
        }
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            return e->d_name;
    }
}

/* What no key can name (temporary files, lost+found) is not listed. */
static bool is_key(const char *name)
{
    status *st = store_check_key(name);
    status_free(st);
    return !st;
}

static status *posix_list(struct store *s, const char *dir, struct store_list *out)
{
    const struct posix_store *p = s->impl;
    DIR *d = NULL;
    status *st = dir_open(p, p->fd, dir, &d);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return NULL;
    }
    if (st)
        return st;
    const char *name;
    while (!st && (name = dir_next(p, d, &st))) {
        struct stat sb;
        if (!is_key(name))
            continue;
        if (fstatat(dirfd(d), name, &sb, 0) == 0) {
            struct store_info info = info_of(&sb);
            st = store_list_add(out, name, &info);
        } else if (errno != ENOENT) { /* removed meanwhile */
            st = ERR_SYS(errno, "stat %s/%s/%s", p->root, dir, name);
        }
    }
    closedir(d);
    return st;
}

static status *posix_remove(struct store *s, const char *key)
{
    const struct posix_store *p = s->impl;
    int rc = unlinkat(p->fd, key, 0);
    if (rc != 0 && errno == EISDIR)
        rc = unlinkat(p->fd, key, AT_REMOVEDIR);
    if (rc != 0 && (errno == ENOENT || errno == ENOTDIR))
        return NULL;
    if (rc != 0 && (errno == ENOTEMPTY || errno == EEXIST))
        return ERR(EXISTS, "%s/%s is a directory and not empty", p->root, key);
    if (rc != 0)
        return ERR_SYS(errno, "remove %s/%s", p->root, key);
    return sync_parents(p, key, true);
}

/* Remove `name` in the directory at `at`, and what is below; links are removed, never followed. */
static status *remove_below(const struct posix_store *p, int at, const char *name)
{
    if (unlinkat(at, name, 0) == 0 || errno == ENOENT || errno == ENOTDIR)
        return NULL;
    if (errno != EISDIR)
        return ERR_SYS(errno, "remove %s in %s", name, p->root);
    DIR *d = NULL;
    TRY(dir_open(p, at, name, &d));
    status *st = NULL;
    const char *child;
    while (!st && (child = dir_next(p, d, &st)))
        st = remove_below(p, dirfd(d), child);
    closedir(d);
    if (!st && unlinkat(at, name, AT_REMOVEDIR) != 0 && errno != ENOENT)
        st = ERR_SYS(errno, "remove directory %s in %s", name, p->root);
    return st;
}

static status *posix_remove_tree(struct store *s, const char *dir)
{
    const struct posix_store *p = s->impl;
    struct stat sb;
    if (fstatat(p->fd, dir, &sb, AT_SYMLINK_NOFOLLOW) != 0)
        return errno == ENOENT || errno == ENOTDIR ? NULL : ERR_SYS(errno, "stat %s/%s", p->root, dir);
    TRY(remove_below(p, p->fd, dir));
    return sync_parents(p, dir, true);
}

static status *posix_rename_tree(struct store *s, const char *from, const char *to)
{
    const struct posix_store *p = s->impl;
    struct stat sb;
    if (fstatat(p->fd, from, &sb, 0) != 0 || !S_ISDIR(sb.st_mode))
        return ERR(NOT_FOUND, "%s/%s: no such directory", p->root, from);
    if (fstatat(p->fd, to, &sb, AT_SYMLINK_NOFOLLOW) == 0) /* rename would replace an empty directory */
        return ERR(EXISTS, "%s/%s is there already", p->root, to);
    TRY(make_parents(p, to));
    if (renameat(p->fd, from, p->fd, to) != 0) {
        if (errno == ENOTEMPTY || errno == EEXIST || errno == ENOTDIR)
            return ERR(EXISTS, "%s/%s is there already", p->root, to);
        return ERR_SYS(errno, "rename %s/%s to %s", p->root, from, to);
    }
    TRY(sync_parents(p, to, false));
    return sync_parents(p, from, true);
}

static status *posix_sweep(struct store *s, const char *dir, const char *mark)
{
    const struct posix_store *p = s->impl;
    DIR *d = NULL;
    status *st = dir_open(p, p->fd, dir, &d);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return NULL;
    }
    if (st)
        return st;
    const size_t head = sizeof temp_prefix - 1 + 16 + 1; /* ".tmp-", random digits, "-" */
    const char *name;
    while (!st && (name = dir_next(p, d, &st))) {
        if (strncmp(name, temp_prefix, sizeof temp_prefix - 1) != 0 || strlen(name) < head ||
            !strstr(name + head, mark))
            continue;
        if (unlinkat(dirfd(d), name, 0) != 0 && errno != ENOENT)
            st = ERR_SYS(errno, "remove %s/%s/%s", p->root, dir, name);
    }
    closedir(d);
    return st;
}

/* The time a file made now gets: of the server's clock on a network file system. */
static status *posix_now(struct store *s, uint64_t *ns)
{
    const struct posix_store *p = s->impl;
    char temp[TEMP_PATH_BYTES];
    int fd;
    struct stat sb;
    TRY(temp_open(p, "now", temp, &fd));
    status *st = fstat(fd, &sb) == 0 ? NULL : ERR_SYS(errno, "stat %s/%s", p->root, temp);
    close(fd);
    if (unlinkat(p->fd, temp, 0) != 0 && !st)
        st = ERR_SYS(errno, "unlink %s/%s", p->root, temp);
    if (!st)
        *ns = info_of(&sb).mtime_ns;
    return st;
}

/* ---- Writers */

/* The second descriptor, where the file system has such a thing; nothing is lost without it. */
static void open_direct(const struct posix_store *p, struct posix_writer *pw)
{
    atomic_init(&pw->refused, false);
    pw->direct_fd = -1;
    pw->align = direct_alignment(pw->fd);
    if (pw->align.offset)
        pw->direct_fd = openat(p->fd, pw->temp, O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (pw->direct_fd < 0)
        pw->align = (struct store_direct){ 0, 0 };
}

static status *close_direct(const struct posix_store *p, const struct posix_writer *pw, const char *key)
{
    return pw->direct_fd < 0 ? NULL : close_fd(p, pw->direct_fd, key);
}

static status *posix_writer_open(struct store_writer *w)
{
    const struct posix_store *p = w->store->impl;
    struct posix_writer *pw = mem_calloc(1, sizeof *pw);
    if (!pw)
        return ERR(NO_MEMORY, "writer of %s", w->key);
    status *st = temp_open(p, w->key, pw->temp, &pw->fd);
    if (!st && ftruncate(pw->fd, (off_t)w->bytes) != 0) {
        st = ERR_SYS(errno, "ftruncate %s/%s to %llu bytes", p->root, w->key, (unsigned long long)w->bytes);
        close(pw->fd);
        unlinkat(p->fd, pw->temp, 0);
    }
    if (st) {
        mem_free(pw);
        return st;
    }
    open_direct(p, pw);
    w->impl = pw;
    return NULL;
}

static struct store_direct posix_direct(struct store_writer *w)
{
    const struct posix_writer *pw = w->impl;
    return atomic_load(&pw->refused) ? (struct store_direct){ 0, 0 } : pw->align;
}

static status *posix_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    const struct posix_store *p = w->store->impl;
    struct posix_writer *pw = w->impl;
    bool direct;
    n = part_of(posix_direct(w), offset, buf, n, &direct);
    ssize_t k = pwrite(direct ? pw->direct_fd : pw->fd, buf, n, (off_t)offset);
    if (k < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {
        atomic_store(&pw->refused, true);
        k = pwrite(pw->fd, buf, n, (off_t)offset);
    }
    if (k < 0)
        return ERR_SYS(errno, "write %zu bytes of %s/%s at %llu", n, p->root, w->key, (unsigned long long)offset);
    if (k == 0 && n)
        return ERR(IO, "write %zu bytes of %s/%s at %llu: nothing was written", n, p->root, w->key,
                   (unsigned long long)offset);
    *put = (size_t)k;
    return NULL;
}

static status *posix_finish(struct store_writer *w)
{
    struct posix_writer *pw = w->impl;
    status *st = close_direct(w->store->impl, pw, w->key);
    st = settle(w->store->impl, pw->fd, pw->temp, w->key, STORE_REPLACE, st);
    mem_free(pw);
    return st;
}

static void posix_abort(struct store_writer *w)
{
    const struct posix_store *p = w->store->impl;
    struct posix_writer *pw = w->impl;
    status_free(close_direct(p, pw, w->key));
    close(pw->fd);
    unlinkat(p->fd, pw->temp, 0);
    mem_free(pw);
}

extern const struct store_ops store_posix_ops;
const struct store_ops store_posix_ops = {
    .name = "posix",
    .scheme = "file",
    .open = posix_open,
    .close = posix_close,
    .put = posix_put,
    .get = posix_get,
    .get_direct = posix_get_direct,
    .stat = posix_stat,
    .list = posix_list,
    .remove = posix_remove,
    .remove_tree = posix_remove_tree,
    .rename_tree = posix_rename_tree,
    .sweep = posix_sweep,
    .now = posix_now,
    .writer_open = posix_writer_open,
    .write = posix_write,
    .finish = posix_finish,
    .abort = posix_abort,
    .direct = posix_direct,
};
