/* limits: see limits.h. */
#include "trainer/bench/limits.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"
#include "storage/store.h"
#include "trainer/bench/curl.h"
#include "trainer/bench/measure.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CURL_PIECE_BYTES = 16 << 20 }; /* an object put, a range got: as a save's parts are */

static const struct method {
    const char *name;
    int threads; /* or commands */
    bool direct, remote;
} methods[LIMIT_METHODS] = {
    { "1 thread, buffered", 1, false, false },
    { "2 threads, buffered", 2, false, false },
    { "4 threads, buffered", 4, false, false },
    { "1 thread, O_DIRECT", 1, true, false },
    { "2 threads, O_DIRECT", 2, true, false },
    { "4 threads, O_DIRECT", 4, true, false },
    { "curl x1", 1, false, true },
    { "curl x2", 2, false, true },
    { "curl x4", 4, false, true },
    { "curl x8", 8, false, true },
};

const char *limit_method(size_t i)
{
    return methods[i].name;
}

static bool counts(const struct limits *l, size_t i)
{
    return methods[i].remote == l->remote && !l->missing[i];
}

double limits_median(struct limits *l, size_t *best)
{
    double least = 0;
    *best = 0;
    for (size_t i = 0; i < LIMIT_METHODS; i++) {
        if (!counts(l, i))
            continue;
        double copy[LIMIT_REPEATS];
        memcpy(copy, l->seconds[i], sizeof copy);
        double s = median_of(copy, l->repeats);
        if (least <= 0 || s < least) {
            least = s;
            *best = i;
        }
    }
    return least;
}

double limits_least(const struct limits *l)
{
    double least = 0;
    for (size_t i = 0; i < LIMIT_METHODS; i++)
        for (size_t r = 0; counts(l, i) && r < l->repeats; r++)
            if (least <= 0 || l->seconds[i][r] < least)
                least = l->seconds[i][r];
    return least;
}

/* ---- one thread's share */

struct job {
    const struct method *method;
    unsigned char *memory;         /* this thread's; used again and again */
    size_t memory_bytes;           /* whole pieces */
    uint64_t begin, end;           /* bytes of the stretch, over all files */
    char path[1024];               /* writing: this thread's file */
    const struct file_list *files; /* reading */
    struct thread thread;
};

static size_t least_of(uint64_t a, uint64_t b)
{
    return (size_t)(a < b ? a : b);
}

static status *write_share(void *arg)
{
    struct job *j = arg;
    int fd = open(j->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | (j->method->direct ? O_DIRECT : 0), 0666);
    if (fd < 0)
        return errno == EINVAL ? ERR(UNSUPPORTED, "open %s: O_DIRECT is refused", j->path)
                               : ERR_SYS(errno, "open %s", j->path);
    status *st = NULL;
    uint64_t at = 0, bytes = j->end - j->begin;
    while (!st && at < bytes) {
        size_t from = (size_t)(at % j->memory_bytes);
        size_t n = least_of(bytes - at, least_of(LIMIT_PIECE_BYTES, j->memory_bytes - from));
        ssize_t put = pwrite(fd, j->memory + from, n, (off_t)at);
        if (put > 0)
            at += (uint64_t)put;
        else if (put == 0 || errno != EINTR)
            st = errno == EINVAL ? ERR(UNSUPPORTED, "write %s: O_DIRECT is refused", j->path)
                                 : ERR_SYS(errno, "write %zu bytes to %s", n, j->path);
    }
    if (!st && fdatasync(fd))
        st = ERR_SYS(errno, "fdatasync %s", j->path);
    close(fd);
    return st;
}

/* Bytes [begin, end) of one file; *used: bytes read so far, which say where in the memory the next ones go. */
static status *read_range(struct job *j, const char *path, uint64_t begin, uint64_t end, uint64_t *used)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | (j->method->direct ? O_DIRECT : 0));
    if (fd < 0)
        return errno == EINVAL ? ERR(UNSUPPORTED, "open %s: O_DIRECT is refused", path)
                               : ERR_SYS(errno, "open %s", path);
    status *st = NULL;
    while (!st && begin < end) {
        size_t to = (size_t)(*used % j->memory_bytes) & ~(size_t)(LIMIT_PIECE_BYTES - 1);
        size_t n = least_of(end - begin, LIMIT_PIECE_BYTES);
        /* a direct read asks for whole blocks; past the end of the file it comes back short */
        ssize_t got = pread(fd, j->memory + to, (n + 4095) & ~(size_t)4095, (off_t)begin);
        if (got > 0) {
            begin += least_of((uint64_t)got, n);
            *used += LIMIT_PIECE_BYTES;
        } else if (got == 0) {
            st = ERR(IO, "read %s: it ends before byte %llu", path, (unsigned long long)end);
        } else if (errno != EINTR) {
            st = ERR_SYS(errno, "read %s at %llu", path, (unsigned long long)begin);
        }
    }
    close(fd);
    return st;
}

/* Files follow each other from multiples of 4 KiB, so that every share begins at one in its file. */
static uint64_t padded(uint64_t bytes)
{
    return (bytes + 4095) / 4096 * 4096;
}

static status *read_share(void *arg)
{
    struct job *j = arg;
    uint64_t start = 0, used = 0;
    for (size_t i = 0; i < j->files->count; start += padded(j->files->bytes[i++])) {
        uint64_t begin = j->begin > start ? j->begin - start : 0;
        uint64_t end = j->end > start ? least_of(j->end - start, j->files->bytes[i]) : 0;
        if (begin < end)
            TRY(read_range(j, j->files->path[i], begin, end, &used));
    }
    return NULL;
}

/* ---- all of a method's threads */

/* Shares are whole blocks of 4 KiB, but for the last one's end. */
static void share_out(struct job *job, const struct method *m, unsigned char *memory, size_t memory_bytes,
                      uint64_t bytes)
{
    uint64_t blocks = (bytes + 4095) / 4096, n = (uint64_t)m->threads;
    size_t pieces = memory_bytes / LIMIT_PIECE_BYTES, each = pieces / (size_t)m->threads;
    for (uint64_t i = 0; i < n; i++) {
        job[i] = (struct job){ .method = m, .begin = blocks * i / n * 4096 };
        job[i].end = least_of(blocks * (i + 1) / n * 4096, bytes);
        job[i].memory = memory + (each ? i * each * LIMIT_PIECE_BYTES : 0);
        job[i].memory_bytes = (each ? each : 1) * LIMIT_PIECE_BYTES;
    }
}

static status *run_jobs(struct job *job, int threads, status *(*fn)(void *), double *seconds)
{
    uint64_t t0 = clock_ns();
    status *st = NULL;
    int started = 0;
    while (!st && started < threads) {
        st = thread_start(&job[started].thread, "plain-io", fn, &job[started]);
        started += !st;
    }
    for (int i = 0; i < started; i++)
        st = status_first(st, thread_join(&job[i].thread));
    *seconds = ns_to_s(clock_ns() - t0);
    return st;
}

/* Keep what a method took; one that the file system cannot do is left out. */
static status *record(struct limits *l, size_t i, double seconds, status *st)
{
    l->seconds[i][l->repeats] = seconds;
    if (status_code(st) == ST_UNSUPPORTED && methods[i].direct) {
        l->missing[i] = true;
        status_free(st);
        return NULL;
    }
    return st;
}

/* ---- object storage */

/* Each method of curl's once; `at`: where to remove what it has put, or NULL. */
static status *run_curl(struct limits *l, const struct curl_moves *m, struct store *at)
{
    for (size_t i = 0; i < LIMIT_METHODS; i++) {
        if (!counts(l, i))
            continue;
        TRY(curl_run(m, methods[i].threads, &l->seconds[i][l->repeats]));
        if (at)
            TRY(store_remove_tree(at, "plain"));
    }
    l->repeats++;
    return NULL;
}

/* A file in memory of `bytes` bytes; its name is good for other processes of this user. */
static status *memory_file(const unsigned char *from, size_t from_bytes, uint64_t bytes, int *fd, char name[64])
{
    *fd = memfd_create("plain", MFD_CLOEXEC);
    if (*fd < 0)
        return ERR_SYS(errno, "memory to upload from");
    for (uint64_t at = 0; at < bytes;) {
        ssize_t put = write(*fd, from + at % from_bytes, least_of(bytes - at, from_bytes - at % from_bytes));
        if (put < 0)
            return ERR_SYS(errno, "memory to upload from");
        at += (uint64_t)put;
    }
    snprintf(name, 64, "/proc/%d/fd/%d", (int)getpid(), *fd);
    return NULL;
}

static status *upload_from(struct limits *l, const char *url, const char *file, uint64_t piece, size_t count)
{
    struct curl_move *move = mem_calloc(count, sizeof *move);
    char(*key)[32] = mem_calloc(count, sizeof *key);
    struct store *at = NULL;
    status *st = move && key ? store_open(url, true, &at) : ERR(NO_MEMORY, "%zu uploads", count);
    for (size_t i = 0; !st && i < count; i++) {
        snprintf(key[i], sizeof key[i], "plain/%08zu", i);
        move[i] = (struct curl_move){ key[i], 0, piece };
    }
    const struct curl_moves m = { .url = url, .upload = file, .move = move, .count = count };
    if (!st)
        st = run_curl(l, &m, at);
    store_close(at);
    mem_free(key);
    mem_free(move);
    return st;
}

static status *upload(struct limits *l, const char *url, const void *from, size_t from_bytes, uint64_t bytes)
{
    size_t count = (size_t)((bytes + CURL_PIECE_BYTES - 1) / CURL_PIECE_BYTES);
    int fd;
    char file[64];
    status *st = memory_file(from, from_bytes, bytes / count, &fd, file);
    if (!st)
        st = upload_from(l, url, file, bytes / count, count);
    if (fd >= 0)
        close(fd);
    return st;
}

static status *download(struct limits *l, const struct file_list *f)
{
    struct curl_move *move = mem_array(NULL, (size_t)(f->total / CURL_PIECE_BYTES) + f->count + 1, sizeof *move);
    size_t n = 0;
    if (!move)
        return ERR(NO_MEMORY, "ranges of %zu objects", f->count);
    for (size_t i = 0; i < f->count; i++)
        for (uint64_t at = 0; at < f->bytes[i]; at += CURL_PIECE_BYTES)
            move[n++] = (struct curl_move){ f->path[i], at, least_of(f->bytes[i] - at, CURL_PIECE_BYTES) };
    const struct curl_moves m = { .url = f->root, .move = move, .count = n };
    status *st = run_curl(l, &m, NULL);
    mem_free(move);
    return st;
}

/* ---- all methods */

status *limits_write(struct limits *l, const char *dir, const void *from, size_t from_bytes, uint64_t bytes)
{
    CHECK(from_bytes >= LIMIT_PIECE_BYTES && l->repeats < LIMIT_REPEATS);
    if (l->remote)
        return upload(l, dir, from, from_bytes, bytes);
    for (size_t i = 0; i < LIMIT_METHODS; i++) {
        struct job job[LIMIT_THREADS];
        double seconds;
        if (!counts(l, i))
            continue;
        /* direct writes take whole blocks; so that all methods write the same, all do */
        share_out(job, &methods[i], (unsigned char *)(uintptr_t)from, from_bytes, bytes & ~(uint64_t)4095);
        for (int k = 0; k < methods[i].threads; k++)
            snprintf(job[k].path, sizeof job[k].path, "%s/plain-%d", dir, k);
        status *st = run_jobs(job, methods[i].threads, write_share, &seconds);
        for (int k = 0; k < methods[i].threads; k++)
            unlink(job[k].path);
        TRY(record(l, i, seconds, st));
    }
    l->repeats++;
    return NULL;
}

status *limits_read(struct limits *l, const struct file_list *f, void *to, size_t to_bytes)
{
    CHECK(to_bytes >= (size_t)LIMIT_THREADS * LIMIT_PIECE_BYTES && l->repeats < LIMIT_REPEATS);
    if (l->remote)
        return download(l, f);
    uint64_t bytes = 0;
    for (size_t i = 0; i < f->count; i++)
        bytes += padded(f->bytes[i]);
    for (size_t i = 0; i < LIMIT_METHODS; i++) {
        struct job job[LIMIT_THREADS];
        double seconds;
        if (!counts(l, i))
            continue;
        TRY(files_drop(f));
        share_out(job, &methods[i], to, to_bytes, bytes);
        for (int k = 0; k < methods[i].threads; k++)
            job[k].files = f;
        status *st = run_jobs(job, methods[i].threads, read_share, &seconds);
        TRY(record(l, i, seconds, st));
    }
    l->repeats++;
    return NULL;
}

/* ---- lists of files */

static status *add_file(struct file_list *l, const char *path, uint64_t bytes)
{
    void *paths = mem_array(l->path, l->count + 1, sizeof *l->path);
    if (paths)
        l->path = paths;
    void *lengths = paths ? mem_array(l->bytes, l->count + 1, sizeof *l->bytes) : NULL;
    if (!lengths)
        return ERR(NO_MEMORY, "list of files");
    l->bytes = lengths;
    snprintf(l->path[l->count], sizeof *l->path, "%s", path);
    l->bytes[l->count++] = bytes;
    l->total += bytes;
    return NULL;
}

static status *walk(const char *dir, const char *suffix, struct file_list *l)
{
    DIR *d = opendir(dir);
    if (!d)
        return ERR_SYS(errno, "list %s", dir);
    status *st = NULL;
    for (struct dirent *e; !st && (e = readdir(d));) {
        char path[sizeof *l->path];
        struct stat s;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, ".."))
            continue;
        size_t n = (size_t)snprintf(path, sizeof path, "%s/%s", dir, e->d_name), tail = strlen(suffix);
        if (n >= sizeof path)
            st = ERR(INVALID, "%s: the path of a file in it is too long", dir);
        else if (lstat(path, &s))
            st = ERR_SYS(errno, "look at %s", path);
        else if (S_ISDIR(s.st_mode))
            st = walk(path, suffix, l);
        else if (S_ISREG(s.st_mode) && n >= tail && !strcmp(path + n - tail, suffix))
            st = add_file(l, path, (uint64_t)s.st_size);
    }
    closedir(d);
    return st;
}

static status *walk_store(struct store *s, const char *dir, const char *suffix, struct file_list *l)
{
    struct store_list list = { 0 };
    TRY(store_list(s, dir, &list));
    status *st = NULL;
    for (size_t i = 0; !st && i < list.count; i++) {
        char key[STORE_KEY_BYTES];
        const struct store_entry *e = &list.entry[i];
        size_t n = (size_t)snprintf(key, sizeof key, "%s%s%s", dir, *dir ? "/" : "", e->name), tail = strlen(suffix);
        if (n >= sizeof key)
            st = ERR(INVALID, "%s: the key of an object below it is too long", dir);
        else if (e->info.is_dir)
            st = walk_store(s, key, suffix, l);
        else if (n >= tail && !strcmp(key + n - tail, suffix))
            st = add_file(l, key, e->info.bytes);
    }
    store_list_free(&list);
    return st;
}

static status *objects_below(const char *url, const char *suffix, struct file_list *l)
{
    struct store *s;
    TRY(store_open(url, false, &s));
    snprintf(l->root, sizeof l->root, "%s", url);
    status *st = walk_store(s, "", suffix, l);
    store_close(s);
    return st;
}

status *files_below(const char *dir, const char *suffix, struct file_list *out)
{
    struct file_list l = { 0 };
    status *st = strstr(dir, "://") ? objects_below(dir, suffix, &l) : walk(dir, suffix, &l);
    if (st)
        files_free(&l);
    else
        *out = l;
    return st;
}

void files_free(struct file_list *l)
{
    mem_free(l->path);
    mem_free(l->bytes);
    *l = (struct file_list){ 0 };
}

status *files_drop(const struct file_list *l)
{
    for (size_t i = 0; i < l->count; i++) {
        int fd = open(l->path[i], O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return ERR_SYS(errno, "open %s", l->path[i]);
        int rc = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
        if (rc)
            return ERR_SYS(rc, "drop %s from the page cache", l->path[i]);
    }
    return NULL;
}

static status *count_cached(const char *path, uint64_t bytes, uint64_t *cached, uint64_t *pages)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (size_t)(bytes + page - 1) / page;
    if (!n)
        return NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return ERR_SYS(errno, "open %s", path);
    void *map = mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd, 0);
    status *st = map == MAP_FAILED ? ERR_SYS(errno, "map %s", path) : NULL;
    close(fd);
    if (st)
        return st;
    unsigned char *in = mem_alloc(n);
    if (!in)
        st = ERR(NO_MEMORY, "%zu pages of %s", n, path);
    else if (mincore(map, (size_t)bytes, in))
        st = ERR_SYS(errno, "look for %s in the page cache", path);
    for (size_t i = 0; !st && i < n; i++)
        *cached += in[i] & 1;
    *pages += n;
    mem_free(in);
    munmap(map, (size_t)bytes);
    return st;
}

status *files_cached(const struct file_list *l, double *share)
{
    uint64_t cached = 0, pages = 0;
    for (size_t i = 0; i < l->count; i++)
        TRY(count_cached(l->path[i], l->bytes[i], &cached, &pages));
    *share = pages ? (double)cached / (double)pages : 0;
    return NULL;
}
