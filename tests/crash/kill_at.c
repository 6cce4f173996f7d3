/* kill_at: a library to preload into the ranks of a job, which counts their calls by pipeline stage and, at the n-th
 * call of one stage, ends its process by SIGKILL.
 *
 * A stage is THREAD/CALL/OBJECT. THREAD: main, capture, merge, write, keeper, load, or none of them. CALL: what is
 * about to happen ("fsync", "pwrite", ...); "untemp" removes a file that still has its temporary name. OBJECT: what the
 * file is in the checkpoint root: shard, metadata, latest, lease, mark, clock, step (a step's directory), root. Of no
 * file:
 *
 *   lock     pthread_mutex_lock by a thread of a save or load: between its chunks and its states
 *   crc      a checksum
 *   reduce   MPI_Iallreduce, on the communicator that so reduced first, or second: the ticks', the plans'
 *   vote     MPI_Isend or MPI_Irecv on one of those two
 *
 * Environment: KILL_ROOT is the checkpoint root; files elsewhere do not count. KILL_AT is "RANK STAGE N"; without it
 * nobody dies. To the file KILL_LOG a rank adds, when it exits, a line "RANK STAGE COUNT" for each stage, and when it
 * dies "killed RANK STAGE N".
 *
 * The process dies before the call, but in the middle of a pwrite or write: half of its bytes are handed over. */
#include <dlfcn.h>
#include <fcntl.h>
#include <mpi.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define THREADS(x) x(main) x(capture) x(merge) x(write) x(keeper) x(load) x(none)
#define CALLS(x)                                                                                                       \
    x(create) x(mkdir) x(ftruncate) x(write) x(pwrite) x(pread) x(fsync) x(rename) x(link) x(untemp) x(unlink)         \
        x(rmdir) x(lock) x(crc) x(reduce) x(vote)
#define OBJECTS(x)                                                                                                     \
    x(shard) x(metadata) x(latest) x(lease) x(mark) x(clock) x(step) x(root) x(other) x(first) x(second) x(none)

#define T_ENUM(n) T_##n,
#define C_ENUM(n) C_##n,
#define O_ENUM(n) O_##n,
#define NAME(n)   #n,
enum thread { THREADS(T_ENUM) THREAD_COUNT };
enum call { CALLS(C_ENUM) CALL_COUNT };
enum object { OBJECTS(O_ENUM) OBJECT_COUNT };
static const char *const thread_name[] = { THREADS(NAME) };
static const char *const call_name[] = { CALLS(NAME) };
static const char *const object_name[] = { OBJECTS(NAME) };

static struct {
    atomic_uint count[THREAD_COUNT][CALL_COUNT][OBJECT_COUNT];
    bool on, armed;
    char root[2048], stage[100];
    const char *log;
    int rank;
    unsigned at;
    enum thread thread; /* of the death, with call and object */
    enum call call;
    enum object object;
    MPI_Comm reducing[2];
} k;

/* ---- The end of it */

static void note(const char *text, size_t n)
{
    int fd = open(k.log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0 || write(fd, text, n) != (ssize_t)n)
        abort();
    close(fd);
}

static void die(void)
{
    char line[160];
    k.on = false;
    int len = snprintf(line, sizeof line, "killed %d %s %u\n", k.rank, k.stage, k.at);
    note(line, (size_t)len);
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Count one call; true: this is the one to die at. */
static bool counted(enum thread t, enum call c, enum object o)
{
    unsigned n = atomic_fetch_add(&k.count[t][c][o], 1) + 1;
    return k.armed && n == k.at && t == k.thread && c == k.call && o == k.object;
}

static void stage(enum thread t, enum call c, enum object o)
{
    if (counted(t, c, o))
        die();
}

/* ---- Where it happens */

static enum thread this_thread(void)
{
    char name[16] = "";
    if (gettid() == getpid())
        return T_main;
    prctl(PR_GET_NAME, name);
    return !strncmp(name, "tsr-write", 9)  ? T_write
           : !strncmp(name, "tsr-load", 8) ? T_load
           : !strcmp(name, "tsr-capture")  ? T_capture
           : !strcmp(name, "tsr-merge")    ? T_merge
           : !strcmp(name, "tsr-keeper")   ? T_keeper
                                           : T_none;
}

static enum object object_of(const char *path)
{
    static const struct {
        const char *part;
        enum object object;
    } known[] = { { ".h5", O_shard },     { "metadata.pb", O_metadata }, { "mark.", O_mark },
                  { "LATEST", O_latest }, { "LEASE", O_lease },          { "-now", O_clock } };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strstr(path, known[i].part))
            return known[i].object;
    return !strcmp(path, "/") || !*path  ? O_root
           : strchr(path + 1, '/')       ? O_other
           : !strncmp(path, "/step-", 6) ? O_step
                                         : O_other;
}

/* The path below the root of what fd (and, if not NULL, a path from there) names; NULL: elsewhere. Sets *o. */
static bool below(int fd, const char *path, enum object *o)
{
    char link[64], full[4096];
    size_t root = strlen(k.root);
    if (!k.on)
        return false;
    if (path && *path == '/') {
        snprintf(full, sizeof full, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, full, sizeof full - 1);
        if (n < 0)
            return false;
        snprintf(full + n, sizeof full - (size_t)n, "%s%s", path && strcmp(path, ".") ? "/" : "",
                 path && strcmp(path, ".") ? path : "");
    }
    if (strncmp(full, k.root, root) != 0 || (full[root] && full[root] != '/'))
        return false;
    *o = object_of(full + root);
    return true;
}

static void file_stage(enum call c, int fd, const char *path)
{
    enum object o;
    if (below(fd, path, &o))
        stage(this_thread(), c, o);
}

/* ---- Start and end */

static int find(const char *const *names, int count, const char *name, size_t n)
{
    for (int i = 0; i < count; i++)
        if (strlen(names[i]) == n && !strncmp(names[i], name, n))
            return i;
    fprintf(stderr, "kill_at: no such stage: %s\n", name);
    abort();
}

static void aim(const char *text)
{
    int rank;
    if (sscanf(text, "%d %99s %u", &rank, k.stage, &k.at) != 3)
        abort();
    const char *call = strchr(k.stage, '/'), *object = call ? strchr(call + 1, '/') : NULL;
    if (!object)
        abort();
    k.thread = (enum thread)find(thread_name, THREAD_COUNT, k.stage, (size_t)(call - k.stage));
    k.call = (enum call)find(call_name, CALL_COUNT, call + 1, (size_t)(object - call - 1));
    k.object = (enum object)find(object_name, OBJECT_COUNT, object + 1, strlen(object + 1));
    k.armed = rank == k.rank;
}

__attribute__((constructor)) static void start(void)
{
    const char *root = getenv("KILL_ROOT"), *rank = getenv("OMPI_COMM_WORLD_RANK"), *at = getenv("KILL_AT");
    k.log = getenv("KILL_LOG");
    if (!root || !rank || !k.log || strlen(root) >= sizeof k.root)
        return;
    snprintf(k.root, sizeof k.root, "%s", root);
    k.rank = (int)strtol(rank, NULL, 10);
    if (at)
        aim(at);
    k.on = true;
}

__attribute__((destructor)) static void end(void)
{
    char text[16384];
    size_t n = 0;
    if (!k.on)
        return;
    k.on = false;
    for (int t = 0; t < THREAD_COUNT; t++)
        for (int c = 0; c < CALL_COUNT; c++)
            for (int o = 0; o < OBJECT_COUNT; o++)
                if (k.count[t][c][o] && n < sizeof text - 100)
                    n += (size_t)snprintf(text + n, 100, "%d %s/%s/%s %u\n", k.rank, thread_name[t], call_name[c],
                                          object_name[o], k.count[t][c][o]);
    note(text, n);
}

/* ---- The calls */

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int openat(int fd, const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    if (flags & O_CREAT)
        file_stage(C_create, fd, path);
    return NEXT(openat)(fd, path, flags, mode);
}

int mkdirat(int fd, const char *path, mode_t mode)
{
    file_stage(C_mkdir, fd, path);
    return NEXT(mkdirat)(fd, path, mode);
}

int ftruncate(int fd, off_t bytes)
{
    file_stage(C_ftruncate, fd, NULL);
    return NEXT(ftruncate)(fd, bytes);
}

int fsync(int fd)
{
    file_stage(C_fsync, fd, NULL);
    return NEXT(fsync)(fd);
}

int fdatasync(int fd)
{
    file_stage(C_fsync, fd, NULL);
    return NEXT(fdatasync)(fd);
}

ssize_t pread(int fd, void *buf, size_t n, off_t at)
{
    file_stage(C_pread, fd, NULL);
    return NEXT(pread)(fd, buf, n, at);
}

ssize_t pwrite(int fd, const void *buf, size_t n, off_t at)
{
    static __typeof__(&pwrite) next;
    enum object o;
    next = next ? next : NEXT(pwrite);
    if (below(fd, NULL, &o) && counted(this_thread(), C_pwrite, o)) {
        ssize_t half = next(fd, buf, n > 8192 ? n / 2 / 4096 * 4096 : n / 2, at); /* still what O_DIRECT takes */
        (void)half;
        die();
    }
    return next(fd, buf, n, at);
}

ssize_t write(int fd, const void *buf, size_t n)
{
    static __typeof__(&write) next;
    enum object o;
    next = next ? next : NEXT(write);
    if (below(fd, NULL, &o) && counted(this_thread(), C_write, o)) {
        ssize_t half = next(fd, buf, n / 2);
        (void)half;
        die();
    }
    return next(fd, buf, n);
}

int linkat(int fd, const char *path, int to_fd, const char *to, int flags)
{
    file_stage(C_link, to_fd, to);
    return NEXT(linkat)(fd, path, to_fd, to, flags);
}

int renameat(int fd, const char *path, int to_fd, const char *to)
{
    file_stage(C_rename, to_fd, to);
    return NEXT(renameat)(fd, path, to_fd, to);
}

int unlinkat(int fd, const char *path, int flags)
{
    struct stat sb;
    bool dir = flags & AT_REMOVEDIR,
         tried = !dir && k.on && fstatat(fd, path, &sb, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(sb.st_mode);
    if (!tried) /* unlink of a directory fails: the caller looks so what it is */
        file_stage(dir ? C_rmdir : strstr(path, ".tmp-") ? C_untemp : C_unlink, fd, path);
    return NEXT(unlinkat)(fd, path, flags);
}

int pthread_mutex_lock(pthread_mutex_t *m)
{
    static __typeof__(&pthread_mutex_lock) next;
    next = next ? next : NEXT(pthread_mutex_lock);
    if (k.on && gettid() != getpid()) {
        enum thread t = this_thread();
        if (t != T_none)
            stage(t, C_lock, O_none);
    }
    return next(m);
}

unsigned crc32_iscsi(unsigned char *buf, int n, unsigned init);
unsigned crc32_iscsi(unsigned char *buf, int n, unsigned init)
{
    static __typeof__(&crc32_iscsi) next;
    next = next ? next : NEXT(crc32_iscsi);
    enum thread t = k.on ? this_thread() : T_none;
    if (t != T_none)
        stage(t, C_crc, O_none);
    return next(buf, n, init);
}

/* ---- MPI */

/* Which of the communicators that reduce without blocking: the checkpoint's; nothing else does so. */
static enum object reducing(MPI_Comm c, bool add)
{
    for (int i = 0; i < 2; i++) {
        if (add && !k.reducing[i])
            k.reducing[i] = c;
        if (k.reducing[i] == c)
            return i ? O_second : O_first;
    }
    return O_none;
}

int MPI_Iallreduce(const void *in, void *out, int n, MPI_Datatype type, MPI_Op op, MPI_Comm c, MPI_Request *req)
{
    if (k.on)
        stage(T_main, C_reduce, reducing(c, true));
    return PMPI_Iallreduce(in, out, n, type, op, c, req);
}

int MPI_Isend(const void *buf, int n, MPI_Datatype type, int peer, int tag, MPI_Comm c, MPI_Request *req)
{
    enum object o = k.on ? reducing(c, false) : O_none;
    if (o != O_none)
        stage(T_main, C_vote, o);
    return PMPI_Isend(buf, n, type, peer, tag, c, req);
}

int MPI_Irecv(void *buf, int n, MPI_Datatype type, int peer, int tag, MPI_Comm c, MPI_Request *req)
{
    enum object o = k.on ? reducing(c, false) : O_none;
    if (o != O_none)
        stage(T_main, C_vote, o);
    return PMPI_Irecv(buf, n, type, peer, tag, c, req);
}
