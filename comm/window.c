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
enum { PAGE = 4096, HEAD = PAGE };

/* What rank 0 tells of its file; u64 alone, so that it travels as it is. */
struct offer {
    uint64_t pid, fd, device, inode, address; /* address 0: there is none */
};

static atomic_int *users(const struct comm_window *w)
{
    return (atomic_int *)(void *)w->base;
}

static size_t whole_pages(size_t n)
{
    return (n + PAGE - 1) / PAGE * PAGE;
}

static unsigned char *map(int fd, size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return p == MAP_FAILED ? NULL : p;
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
    struct comm_window w = { .bytes = HEAD };
    uint64_t mine = whole_pages(bytes), total = 0, *each = mem_array(NULL, (size_t)c->size, sizeof *each);
    uint8_t all = 0;
    *out = w;
    w.part = mem_array(NULL, (size_t)c->size, sizeof *w.part);
    status *st = comm_agree(c, each && w.part ? NULL : ERR(NO_MEMORY, "window of %d ranks", c->size));
    if (!st)
        st = comm_allgather(c, &mine, each, sizeof mine, NULL);
    for (int r = 0; !st && r < c->size; r++)
        total += each[r];
    w.bytes += total;
    if (!st && total)
        st = share(c, &w, &all);
    size_t at = HEAD;
    for (int r = 0; !st && all && r < c->size; at += each[r++])
        w.part[r] = w.base + at;
    mem_free(each);
    if (st || !all)
        comm_window_close(&w);
    *out = w;
    return st;
}

void comm_window_close(struct comm_window *w)
{
    if (w->base && (w->own || atomic_fetch_sub(users(w), 1) == 1))
        munmap(w->base, w->bytes);
    mem_free(w->part);
    *w = (struct comm_window){ 0 };
}
