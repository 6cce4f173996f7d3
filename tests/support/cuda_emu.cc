/* cuda_emu: blocks one after another, their threads as fibers (ucontext) of the calling thread; see cuda_emu.h. */
#include "tests/support/cuda_emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

__thread struct emu_place emu_here;

namespace
{
enum { THREADS = 1024, WARP = 32, STACK = 256 << 10, SHARED = 227 << 10, ITEM = 32 };
enum state { READY, AT_BLOCK, AT_WARP, DONE };

struct fiber {
    ucontext_t context;
    enum state state;
    struct emu_triple thread;
    void *stack, *fake;
#ifdef __SANITIZE_THREAD__
    void *tsan;
#endif
};

struct warp {
    unsigned turn;                     /* exchanges so far */
    unsigned char item[2][WARP][ITEM]; /* of this exchange and the one before, which may still be read */
    size_t bytes;
};

struct machine {
    ucontext_t scheduler;
    struct fiber fiber[THREADS];
    struct warp warp[THREADS / WARP];
    unsigned current, opened;
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
__thread bool descending;

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

/* From a fiber to the scheduler; `last`: it never comes back. */
void leave(struct fiber *f, bool last)
{
    (void)last;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &f->fake, machine->bottom, machine->size);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(machine->tsan, 0);
#endif
    swapcontext(&f->context, &machine->scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(f->fake, &machine->bottom, &machine->size);
#endif
}

void enter(struct fiber *f)
{
    emu_here.thread = f->thread;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&machine->fake, f->stack, STACK);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(f->tsan, 0);
#endif
    swapcontext(&machine->scheduler, &f->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(machine->fake, nullptr, nullptr);
#endif
}

/* A fiber lives as long as its machine and runs one thread of a block after another. */
void run_fiber(void)
{
    struct fiber *f = &machine->fiber[machine->current];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine->bottom, &machine->size);
#endif
    for (;;) {
        machine->body(machine->arg);
        f->state = DONE;
        leave(f, false);
    }
}

void open_fiber(struct fiber *f)
{
    f->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED || getcontext(&f->context))
        give_up("no stack");
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
#ifdef __SANITIZE_THREAD__
    f->tsan = __tsan_create_fiber(0);
#endif
    makecontext(&f->context, run_fiber, 0);
}

struct machine *open_machine(unsigned threads)
{
    if (!machine) {
        machine = static_cast<struct machine *>(aligned_alloc(256, (sizeof *machine + 255) / 256 * 256));
        if (!machine)
            give_up("no memory");
        memset(static_cast<void *>(machine), 0, sizeof *machine);
    }
#ifdef __SANITIZE_THREAD__
    machine->tsan = __tsan_get_current_fiber();
#endif
    for (; machine->opened < threads; machine->opened++)
        open_fiber(&machine->fiber[machine->opened]);
    return machine;
}

unsigned count(const struct fiber *f, unsigned n, enum state s)
{
    unsigned sum = 0;
    for (unsigned i = 0; i < n; i++)
        sum += f[i].state == s;
    return sum;
}

void release(struct fiber *f, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        f[i].state = READY;
}

/* Those whose barrier is full go on; whether there are any. */
bool release_full(struct machine *m, unsigned threads)
{
    bool any = false;
    for (unsigned i = 0; i < threads; i += WARP) {
        if (count(m->fiber + i, WARP, AT_WARP) < WARP)
            continue;
        m->warp[i / WARP].turn++;
        release(m->fiber + i, WARP);
        any = true;
    }
    if (!any && count(m->fiber, threads, AT_BLOCK) == threads) {
        release(m->fiber, threads);
        any = true;
    }
    return any;
}

void run_block(struct machine *m, dim3 block)
{
    unsigned threads = block.x * block.y * block.z;
    memset(m->shared, 0xff, m->shared_bytes);
    memset(m->warp, 0, sizeof m->warp);
    for (unsigned i = 0; i < threads; i++) {
        m->fiber[i].state = READY;
        m->fiber[i].thread = { i % block.x, i / block.x % block.y, i / block.x / block.y };
    }
    do {
        for (unsigned i = 0; i < threads; i++) {
            m->current = descending ? threads - 1 - i : i;
            if (m->fiber[m->current].state == READY)
                enter(&m->fiber[m->current]);
        }
    } while (release_full(m, threads));
    if (count(m->fiber, threads, DONE) < threads)
        give_up("threads wait where others of their block or warp do not: %u of %u are done, %u at __syncthreads",
                count(m->fiber, threads, DONE), threads, count(m->fiber, threads, AT_BLOCK));
}
} // namespace

void emu_order(bool down)
{
    descending = down;
}

void emu_run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void *), void *arg)
{
    size_t threads = (size_t)block.x * block.y * block.z, blocks = (size_t)grid.x * grid.y * grid.z;
    if (!threads || threads > THREADS || threads % WARP || !blocks || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535 || shared_bytes > SHARED)
        give_up("a grid of %u x %u x %u blocks of %zu threads with %zu bytes of shared memory cannot be launched",
                grid.x, grid.y, grid.z, threads, shared_bytes);
    struct machine *m = open_machine((unsigned)threads);
    m->body = body;
    m->arg = arg;
    m->shared_bytes = shared_bytes;
    emu_here.block_dim = { block.x, block.y, block.z };
    emu_here.grid_dim = { grid.x, grid.y, grid.z };
    for (size_t i = 0; i < blocks; i++) {
        size_t b = descending ? blocks - 1 - i : i;
        emu_here.block = { (unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y) };
        run_block(m, block);
    }
}

void *emu_shared(size_t bytes)
{
    if (bytes > machine->shared_bytes)
        give_up("%zu bytes of shared memory, of which %zu were asked for at launch", bytes, machine->shared_bytes);
    return machine->shared;
}

void __syncthreads(void)
{
    struct fiber *f = &machine->fiber[machine->current];
    f->state = AT_BLOCK;
    leave(f, false);
}

const unsigned char *emu_exchange(unsigned mask, const void *mine, size_t bytes, size_t *stride)
{
    unsigned i = machine->current;
    struct fiber *f = &machine->fiber[i];
    struct warp *w = &machine->warp[i / WARP];
    unsigned turn = w->turn;
    if (mask != 0xffffffffu || bytes > ITEM)
        give_up("an exchange of %zu bytes among the threads %08x of a warp", bytes, mask);
    memcpy(w->item[turn % 2][i % WARP], mine, bytes);
    f->state = AT_WARP;
    leave(f, false);
    *stride = ITEM;
    return w->item[turn % 2][0];
}
