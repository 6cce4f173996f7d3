/* window: see window.h. Rank 0 makes a memfd and maps it; the others open it through /proc, and look whether it is the
 * file that rank 0 means: a process id says nothing in another namespace. Ranks that are threads of rank 0's process
 * use its mapping, so that a sanitizer sees one memory; its head counts them. */
#include "comm/window.h"

#include "comm/agree.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME "tessera-window"
enum { PAGE = 4096, HEAD = PAGE, COLLAPSE = 25 /* MADV_COLLAPSE, which older headers lack */ };

/* What rank 0 tells of its file; u64 alone, so that it travels as it is. */
struct offer {
    uint64_t pid, fd, device, inode, address; /* address 0: there is none */
};

static atomic_int *users(const struct comm_window *w)
{
    return (atomic_int *)(void *)w->base;
}

static size_t up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* At an address where its huge pages can be mapped whole: one more is set aside, and given back what is too much. */
static unsigned char *map(int fd, size_t bytes)
{
    size_t room = bytes + WINDOW_HUGE_BYTES;
    void *p = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    size_t before = -(uintptr_t)p % WINDOW_HUGE_BYTES;
    unsigned char *at = (unsigned char *)p + before;
    if (before)
        munmap(p, before);
    munmap(at + bytes, WINDOW_HUGE_BYTES - before);
    if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED)
        return at;
    munmap(at, bytes);
    return NULL;
}

/* Rank 0. Returns the file, to be closed when all have opened it; -1: none. */
static int make(size_t bytes, struct offer *o, struct comm_window *w)
{
    struct stat s;
    int fd = memfd_create(NAME, MFD_CLOEXEC);
    if (fd < 0)
        return -1;
    if (ftruncate(fd, (off_t)bytes) == 0 && fstat(fd, &s) == 0)
        w->base = map(fd, bytes);
    if (!w->base) {
        close(fd);
        return -1;
    }
    atomic_init(users(w), 1);
    *o = (struct offer){ (uint64_t)getpid(), (uint64_t)fd, s.st_dev, s.st_ino, (uintptr_t)w->base };
    return fd;
}

/* Rank 0's file; -1: it cannot be seen from here. */
static int find(const struct offer *o)
{
    char path[64], target[64] = "";
    struct stat s;
    snprintf(path, sizeof path, "/proc/%llu/fd/%llu", (unsigned long long)o->pid, (unsigned long long)o->fd);
    if (readlink(path, target, sizeof target - 1) < 0 || strncmp(target, "/memfd:" NAME, strlen("/memfd:" NAME)) != 0)
        return -1;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &s) != 0 || s.st_dev != o->device || s.st_ino != o->inode)) {
        close(fd);
        return -1;
    }
    return fd;
}

static void join(const struct offer *o, size_t bytes, struct comm_window *w)
{
    if (o->pid == (uint64_t)getpid()) {
        w->base = (unsigned char *)(uintptr_t)o->address;
        atomic_fetch_add(users(w), 1);
        return;
    }
    int fd = find(o);
    if (fd < 0)
        return;
    w->base = map(fd, bytes);
    w->own = true;
    close(fd);
}

/* Collective; *all: every rank has it. */
static status *share(struct comm *c, struct comm_window *w, uint8_t *all)
{
    struct offer o = { 0 };
    int fd = c->rank == 0 ? make(w->bytes, &o, w) : -1;
    status *st = comm_bcast(c, &o, sizeof o, 0, NULL);
    if (!st && c->rank != 0 && o.address)
        join(&o, w->bytes, w);
    *all = w->base != NULL;
    if (!st)
        st = comm_allreduce(c, all, 1, COMM_U8, COMM_MIN, NULL);
    if (fd >= 0)
        close(fd);
    return st;
}

status *comm_window_open(struct comm *c, size_t bytes, struct comm_window *out)
{
    struct comm_window w = { .bytes = HEAD, .rank = c->rank };
    uint64_t mine = up(bytes, PAGE), *each = mem_array(NULL, (size_t)c->size, sizeof *each);
    uint64_t *begin = mem_array(NULL, (size_t)c->size, sizeof *begin);
    uint8_t all = 0;
    *out = w;
    w.part = mem_array(NULL, (size_t)c->size, sizeof *w.part);
    status *st = comm_agree(c, each && begin && w.part ? NULL : ERR(NO_MEMORY, "window of %d ranks", c->size));
    if (!st)
        st = comm_allgather(c, &mine, each, sizeof mine, NULL);
    /* what is skipped is never touched, and no memory */
    for (int r = 0; !st && r < c->size; w.bytes += each[r++]) {
        w.bytes = up(w.bytes, each[r] < WINDOW_HUGE_BYTES ? PAGE : WINDOW_HUGE_BYTES);
        begin[r] = w.bytes;
    }
    if (!st && w.bytes > HEAD)
        st = share(c, &w, &all);
    for (int r = 0; !st && all && r < c->size; r++)
        w.part[r] = w.base + begin[r];
    mem_free(each);
    mem_free(begin);
    if (st || !all)
        comm_window_close(&w);
    *out = w;
    return st;
}

bool comm_window_huge(const struct comm_window *w, size_t at, size_t bytes)
{
    unsigned char *p = w->part[w->rank] + at;
    for (size_t i = 0; i < bytes; i += WINDOW_HUGE_BYTES)
        *(volatile unsigned char *)(p + i) = p[i]; /* only what is there can be made huge */
    return madvise(p, bytes, COLLAPSE) == 0;
}

void comm_window_close(struct comm_window *w)
{
    if (w->base && (w->own || atomic_fetch_sub(users(w), 1) == 1))
        munmap(w->base, w->bytes);
    mem_free(w->part);
    *w = (struct comm_window){ 0 };
}
