/* cuda_emu: blocks one after another, their threads as fibers of the calling thread; see cuda_emu.h.
 *
 * A fiber whose thread has ended takes the next one that has not begun, so a kernel without barriers needs one fiber
 * and no change. Invariant: fibers go from one thread of the process to another between blocks, so what their outermost
 * functions use is in the machine, never thread-local. */
#include "tests/support/cuda_emu.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

__thread struct emu_place emu_here;

namespace
{
enum { THREADS = 1024, WARP = 32, STACK = 256 << 10, SHARED = 227 << 10, ITEM = 32, UNDER_WAY = 128 };
enum state : unsigned char { READY, AT_BLOCK, AT_WARP, DONE };

/* Where a fiber, or the thread that runs them, goes on. */
#ifdef __x86_64__
typedef void *place;
#else
typedef ucontext_t place;
#endif

struct fiber {
    place at;
    struct machine *machine;
    unsigned thread; /* of the block */
    void *stack, *fake;
#ifdef __SANITIZE_THREAD__
    void *tsan;
#endif
};

struct warp {
    unsigned turn;                     /* exchanges so far */
    unsigned char item[2][WARP][ITEM]; /* of this exchange and the one before, which may still be read */
};

/* Copies that a thread has begun and not waited for, oldest first. */
struct copies {
    struct {
        void *to;
        const void *from;
        unsigned size, bytes, group;
    } of[UNDER_WAY];
    unsigned count, groups; /* groups: that have ended */
};

struct machine {
    struct machine *next; /* idle ones */
    place scheduler;
    struct fiber fiber[THREADS];
    struct fiber *fiber_of[THREADS]; /* of threads that have begun */
    enum state state[THREADS];
    struct warp warp[THREADS / WARP];
    struct copies copies[THREADS];
    struct fiber *current;
    unsigned opened; /* fibers that have a stack */
    dim3 block;
    unsigned threads, begun;
    bool descending;
    alignas(256) unsigned char shared[SHARED];
    size_t shared_bytes;
    void (*body)(void *);
    void *arg;
    void *fake;
    const void *bottom;
    size_t size;
#ifdef __SANITIZE_THREAD__
    void *tsan;
#endif
};

__thread struct machine *machine;
__thread bool descending_launches;

pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
struct machine *idle;

[[noreturn]] void give_up(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "cuda_emu: block (%u, %u, %u), thread %u: ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    abort();
}

#ifdef __x86_64__
/* Saves what a function must keep, and goes on at another place. */
extern "C" void emu_change(place *from, place to);
asm(".text\n"
    ".type emu_change, @function\n"
    "emu_change:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size emu_change, . - emu_change\n");
#else
void emu_change(place *from, const place &to)
{
    swapcontext(from, &to);
}
#endif

/* From a fiber to the scheduler. */
void leave(struct fiber *f)
{
    struct machine *m = f->machine;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&f->fake, m->bottom, m->size);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(m->tsan, 0);
#endif
    emu_change(&f->at, m->scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f->fake, &m->bottom, &m->size);
#endif
}

/* threadIdx of the fiber's thread; a function of its own, since its caller may have begun on another thread. */
__attribute__((noinline)) void take_place(const struct fiber *f)
{
    const dim3 &block = f->machine->block;
    unsigned i = f->thread;
    emu_here.thread = { i % block.x, i / block.x % block.y, i / block.x / block.y };
}

void enter(struct fiber *f)
{
    struct machine *m = f->machine;
    m->current = f;
    take_place(f);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&m->fake, f->stack, STACK);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(f->tsan, 0);
#endif
    emu_change(&m->scheduler, f->at);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(m->fake, nullptr, nullptr);
#endif
}

/* The next thread of the block that has not begun; false: all have. */
bool begin_next(struct machine *m, struct fiber *f)
{
    if (m->begun == m->threads)
        return false;
    f->thread = m->descending ? m->threads - 1 - m->begun : m->begun;
    m->begun++;
    m->copies[f->thread].count = m->copies[f->thread].groups = 0;
    m->fiber_of[f->thread] = f;
    m->state[f->thread] = READY;
    take_place(f);
    return true;
}

/* A fiber lives as long as its machine and runs threads of one block after another. */
void run_fiber(void)
{
    struct fiber *f = machine->current;
    struct machine *m = f->machine;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &m->bottom, &m->size);
#endif
    for (;;) {
        do {
            m->body(m->arg);
            if (m->copies[f->thread].count)
                give_up("ends before %u copies that it began have arrived", m->copies[f->thread].count);
            m->state[f->thread] = DONE;
        } while (begin_next(m, f));
        leave(f);
    }
}

void open_fiber(struct machine *m, struct fiber *f)
{
    f->machine = m;
    f->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED)
        give_up("no stack");
#ifdef __x86_64__
    void **top = reinterpret_cast<void **>(static_cast<char *>(f->stack) + STACK) - 8; /* six registers, two returns */
    top[6] = reinterpret_cast<void *>(run_fiber);
    f->at = top;
#else
    if (getcontext(&f->at))
        give_up("no context");
    f->at.uc_stack.ss_sp = f->stack;
    f->at.uc_stack.ss_size = STACK;
    f->at.uc_link = nullptr;
    makecontext(&f->at, run_fiber, 0);
#endif
#ifdef __SANITIZE_THREAD__
    f->tsan = __tsan_create_fiber(0);
#endif
}

/* Machines outlive threads, which are many in some tests. */
struct machine *take_machine(void)
{
    pthread_mutex_lock(&idle_lock);
    struct machine *m = idle;
    if (m)
        idle = m->next;
    pthread_mutex_unlock(&idle_lock);
    if (!m) {
        m = static_cast<struct machine *>(aligned_alloc(256, (sizeof *m + 255) / 256 * 256));
        if (!m)
            give_up("no memory");
        memset(static_cast<void *>(m), 0, sizeof *m);
    }
#ifdef __SANITIZE_THREAD__
    m->tsan = __tsan_get_current_fiber();
#endif
    return m;
}

void give_machine(struct machine *m)
{
    pthread_mutex_lock(&idle_lock);
    m->next = idle;
    idle = m;
    pthread_mutex_unlock(&idle_lock);
}

unsigned count(const enum state *s, unsigned n, enum state which)
{
    unsigned sum = 0;
    for (unsigned i = 0; i < n; i++)
        sum += s[i] == which;
    return sum;
}

/* Those whose barrier is full go on; whether there are any. */
bool release_full(struct machine *m)
{
    bool any = false;
    for (unsigned i = 0; i < m->threads; i += WARP) {
        if (count(m->state + i, WARP, AT_WARP) < WARP)
            continue;
        m->warp[i / WARP].turn++;
        memset(m->state + i, READY, WARP);
        any = true;
    }
    if (!any && count(m->state, m->threads, AT_BLOCK) == m->threads) {
        memset(m->state, READY, m->threads);
        any = true;
    }
    return any;
}

void run_block(struct machine *m)
{
    memset(m->shared, 0xff, m->shared_bytes);
    m->begun = 0;
    for (unsigned used = 0; m->begun < m->threads; used++) {
        struct fiber *f = &m->fiber[used];
        if (used == m->opened) {
            open_fiber(m, f);
            m->opened++;
        }
        (void)begin_next(m, f);
        enter(f);
    }
    while (release_full(m)) {
        for (unsigned i = 0; i < m->threads; i++) {
            unsigned t = m->descending ? m->threads - 1 - i : i;
            if (m->state[t] == READY)
                enter(m->fiber_of[t]);
        }
    }
    if (count(m->state, m->threads, DONE) < m->threads)
        give_up("threads wait where others of their block or warp do not: %u of %u are done, %u at __syncthreads",
                count(m->state, m->threads, DONE), m->threads, count(m->state, m->threads, AT_BLOCK));
}
} // namespace

void emu_order(bool descending)
{
    descending_launches = descending;
}

bool emu_descending(void)
{
    return descending_launches;
}

void emu_check(dim3 grid, dim3 block, size_t shared_bytes)
{
    size_t threads = (size_t)block.x * block.y * block.z, blocks = (size_t)grid.x * grid.y * grid.z;
    if (!threads || threads > THREADS || threads % WARP || !blocks || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > SHARED)
        give_up("a grid of %u x %u x %u blocks of %zu threads with %zu bytes of shared memory cannot be launched",
                grid.x, grid.y, grid.z, threads, shared_bytes);
}

void emu_run(dim3 grid, dim3 block, size_t shared_bytes, bool descending, void (*body)(void *), void *arg)
{
    size_t blocks = (size_t)grid.x * grid.y * grid.z;
    struct machine *m = take_machine();
    machine = m;
    m->block = block;
    m->threads = block.x * block.y * block.z;
    m->descending = descending;
    m->body = body;
    m->arg = arg;
    m->shared_bytes = shared_bytes;
    emu_here.block_dim = { block.x, block.y, block.z };
    emu_here.grid_dim = { grid.x, grid.y, grid.z };
    for (size_t i = 0; i < blocks; i++) {
        size_t b = descending ? blocks - 1 - i : i;
        emu_here.block = { (unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y) };
        run_block(m);
    }
    machine = nullptr;
    give_machine(m);
}

void *emu_shared(size_t bytes)
{
    if (bytes > machine->shared_bytes)
        give_up("%zu bytes of shared memory, of which %zu were asked for at launch", bytes, machine->shared_bytes);
    return machine->shared;
}

void __syncthreads(void)
{
    struct fiber *f = machine->current;
    machine->state[f->thread] = AT_BLOCK;
    leave(f);
}

void emu_aligned(const void *p, unsigned size)
{
    if ((uintptr_t)p % size)
        give_up("%p is no multiple of %u bytes", p, size);
}

void emu_copy_async(void *to, const void *from, unsigned size, unsigned bytes)
{
    struct copies *c = &machine->copies[machine->current->thread];
    ptrdiff_t at = static_cast<unsigned char *>(to) - machine->shared;
    emu_aligned(to, size);
    emu_aligned(from, size);
    if (c->count == UNDER_WAY || (size != 4 && size != 8 && size != 16) || bytes > size || at < 0 ||
        (size_t)at + size > machine->shared_bytes)
        give_up("a copy of %u of %u bytes to %td of %zu in shared memory, beside %u others", bytes, size, at,
                machine->shared_bytes, c->count);
    memset(to, 0xff, size);
    c->of[c->count++] = { to, from, size, bytes, c->groups };
}

void emu_copy_commit(void)
{
    machine->copies[machine->current->thread].groups++;
}

void emu_copy_wait(unsigned left)
{
    struct copies *c = &machine->copies[machine->current->thread];
    unsigned done = 0;
    for (; done < c->count && c->of[done].group + left < c->groups; done++) {
        memset(c->of[done].to, 0, c->of[done].size);
        if (c->of[done].bytes)
            memcpy(c->of[done].to, c->of[done].from, c->of[done].bytes);
    }
    c->count -= done;
    memmove(c->of, c->of + done, c->count * sizeof *c->of);
}

const unsigned char *emu_exchange(unsigned mask, const void *mine, size_t bytes, size_t *stride)
{
    struct fiber *f = machine->current;
    unsigned i = f->thread;
    struct warp *w = &machine->warp[i / WARP];
    unsigned turn = w->turn;
    if (mask != 0xffffffffu || bytes > ITEM)
        give_up("an exchange of %zu bytes among the threads %08x of a warp", bytes, mask);
    memcpy(w->item[turn % 2][i % WARP], mine, bytes);
    machine->state[i] = AT_WARP;
    leave(f);
    *stride = ITEM;
    return w->item[turn % 2][0];
}
