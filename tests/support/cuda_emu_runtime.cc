/* cuda_emu_runtime: the emulated GPU's memory, streams and events; see cuda_emu.h.
 *
 * Memory is one reserved region; blocks begin at multiples of 4 KiB, a gap behind each. Everything up to the end of the
 * last block is opened while work runs and closed behind it, both in one call on huge pages, which takes some 10 us.
 *
 * Late: a stream is a queue of closures. One lock guards all queues, and is held while work runs, so that a closure may
 * run another stream up to an event that it waits for. Work never waits for another rank: nothing can block it. */
#include "tests/support/cuda_emu.h"

#include <atomic>
#include <deque>
#include <execinfo.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n)   ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace
{
const size_t PAGE = 4096, HUGE_PAGE = (size_t)2 << 20, MOST_BYTES = (size_t)16 << 30;
enum { GPUS = 8, FRAMES = 24 };

struct task {
    void (*run)(void *);
    void *arg;
};

/* Shared by an event and by the work that names it. */
struct mark {
    uint64_t recorded = 0, reached = 0;
    struct emu_stream *stream = nullptr; /* of the last record */
    bool asked = false;
};
} // namespace

struct emu_stream {
    std::deque<task> queue;
};

struct emu_event {
    std::shared_ptr<mark> m = std::make_shared<mark>();
};

namespace
{
[[noreturn]] void give_up(const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "cuda_emu: ");
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    abort();
}

size_t number(const char *name, size_t otherwise)
{
    const char *s = getenv(name);
    return s && *s ? (size_t)strtoull(s, nullptr, 10) : otherwise;
}

/* ---- memory */

std::atomic<unsigned long> waits;

struct memory {
    std::mutex lock;
    char *base = nullptr;
    size_t end = 0, limit = 0, used = 0; /* `end`: of the last block, whole huge pages */
    int open = 0;
    std::map<size_t, size_t> blocks; /* offset to bytes */
    struct sigaction before;
};

/* Never destroyed: threads may outlive the functions that run at exit. */
struct memory &memory_of_all(void)
{
    static struct memory *m = new memory;
    return *m;
}

size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

bool inside(const struct memory &m, const void *p)
{
    return m.base && (uintptr_t)p - (uintptr_t)m.base < MOST_BYTES;
}

void protect(struct memory &m, int how)
{
    if (m.end && mprotect(m.base, m.end, how))
        give_up("mprotect of %zu bytes failed", m.end);
}

/* Says what was touched and lets it happen again under whoever was there before. */
void caught(int sig, siginfo_t *info, void *context)
{
    struct memory &m = memory_of_all();
    if (inside(m, info->si_addr)) {
        const char *how = "touched";
        char line[160];
        void *frame[FRAMES];
#ifdef __x86_64__
        how = static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "wrote" : "read";
#else
        (void)context;
#endif
        int n = snprintf(line, sizeof line, "cuda_emu: the host %s device memory at %p; called from:\n", how,
                         info->si_addr);
        if (write(STDERR_FILENO, line, (size_t)n) > 0)
            backtrace_symbols_fd(frame, backtrace(frame, FRAMES), STDERR_FILENO);
    }
    sigaction(sig, &m.before, nullptr);
}

void reserve(struct memory &m)
{
    char *p = static_cast<char *>(
        mmap(nullptr, MOST_BYTES + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED)
        give_up("no room for device memory");
    m.limit = number("TESSERA_EMU_BYTES", MOST_BYTES);
    m.base = reinterpret_cast<char *>(round_up(reinterpret_cast<size_t>(p), HUGE_PAGE));
    (void)madvise(m.base, MOST_BYTES, MADV_HUGEPAGE);
    void *frame[1];
    (void)backtrace(frame, 1); /* loads what it needs now, not in a handler */
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = caught;
    act.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &act, &m.before);
}

/* The first gap for `bytes` and one page behind them; false: there is none. */
bool find_gap(const struct memory &m, size_t bytes, size_t *at)
{
    size_t from = 0;
    for (const auto &b : m.blocks) {
        if (b.first - from >= bytes + PAGE)
            break;
        from = b.first + round_up(b.second, PAGE) + PAGE;
    }
    *at = from;
    return bytes <= MOST_BYTES - PAGE && from <= MOST_BYTES - PAGE - bytes;
}

void open_memory(void)
{
    struct memory &m = memory_of_all();
    std::lock_guard<std::mutex> hold(m.lock);
    if (m.open++ == 0)
        protect(m, PROT_READ | PROT_WRITE);
}

void shut_memory(void)
{
    struct memory &m = memory_of_all();
    std::lock_guard<std::mutex> hold(m.lock);
    if (--m.open == 0)
        protect(m, PROT_NONE);
}

/* All of it is in one block, if any is device memory. */
void check_range(const void *p, size_t bytes, const char *what)
{
    struct memory &m = memory_of_all();
    std::lock_guard<std::mutex> hold(m.lock);
    if (!inside(m, p) || !bytes)
        return;
    size_t at = (size_t)(static_cast<const char *>(p) - m.base);
    auto b = m.blocks.upper_bound(at);
    if (b == m.blocks.begin() || at + bytes > std::prev(b)->first + std::prev(b)->second)
        give_up("%s of %zu bytes at %p, which are not in one block of device memory", what, bytes, p);
}

/* ---- streams */

struct streams {
    std::recursive_mutex lock;
    emu_stream null;
    std::set<emu_stream *> all;
};

struct streams &streams_of_all(void)
{
    static struct streams *s = new streams;
    return *s;
}

emu_stream *stream_of(cudaStream_t s)
{
    return s ? s : &streams_of_all().null;
}

/* With the lock held, as the next two. */
void run_first(emu_stream *s)
{
    task t = s->queue.front();
    s->queue.pop_front();
    t.run(t.arg);
}

void run_all(emu_stream *s)
{
    if (s->queue.empty())
        return;
    open_memory();
    while (!s->queue.empty())
        run_first(s);
    shut_memory();
}

void run_until(emu_stream *s, const mark &m, uint64_t record)
{
    open_memory();
    while (m.reached < record) {
        if (s->queue.empty())
            give_up("an event was recorded on a stream that is gone");
        run_first(s);
    }
    shut_memory();
}

void run_everything(void)
{
    waits++;
    struct streams &all = streams_of_all();
    std::lock_guard<std::recursive_mutex> hold(all.lock);
    run_all(&all.null);
    for (emu_stream *s : all.all)
        run_all(s);
}
} // namespace

unsigned long emu_waits(void)
{
    return waits;
}

bool emu_late(void)
{
    static const bool late = number("TESSERA_EMU_LATE", 0) != 0;
    return late;
}

void emu_now(void (*run)(void *), void *arg)
{
    open_memory();
    run(arg);
    shut_memory();
}

void emu_push(cudaStream_t s, void (*run)(void *), void *arg)
{
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    stream_of(s)->queue.push_back({ run, arg });
}

/* ---- the runtime */

const char *cudaGetErrorString(cudaError_t rc)
{
    switch (rc) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorNotReady:
        return "device not ready";
    default:
        return "invalid argument";
    }
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = (int)number("TESSERA_EMU_GPUS", GPUS);
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int index)
{
    int count;
    (void)cudaGetDeviceCount(&count);
    return index >= 0 && index < count ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index)
{
    snprintf(p->name, sizeof p->name, "emulated");
    memset(p->uuid.bytes, index + 1, sizeof p->uuid.bytes / 2);
    memset(p->uuid.bytes + sizeof p->uuid.bytes / 2, 0, sizeof p->uuid.bytes / 2);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    run_everything();
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, int, int)
{
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    struct memory &m = memory_of_all();
    std::lock_guard<std::mutex> hold(m.lock);
    if (!m.base)
        reserve(m);
    size_t at;
    if (bytes > m.limit || m.used > m.limit - bytes || !find_gap(m, bytes, &at))
        return cudaErrorMemoryAllocation;
    m.blocks[at] = bytes;
    m.used += bytes;
    size_t end = round_up(at + bytes + PAGE, HUGE_PAGE);
    m.end = end > m.end ? end : m.end;
    if (m.open++ == 0 || m.end == end)
        protect(m, PROT_READ | PROT_WRITE);
    ASAN_UNPOISON_MEMORY_REGION(m.base + at, bytes);
    memset(m.base + at, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(m.base + at + bytes, round_up(bytes, PAGE) + PAGE - bytes);
    if (--m.open == 0)
        protect(m, PROT_NONE);
    *p = m.base + at;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    run_everything();
    if (!p)
        return cudaSuccess;
    struct memory &m = memory_of_all();
    open_memory();
    {
        std::lock_guard<std::mutex> hold(m.lock);
        auto b = inside(m, p) ? m.blocks.find((size_t)(static_cast<char *>(p) - m.base)) : m.blocks.end();
        if (b == m.blocks.end())
            give_up("cudaFree of %p, which is no block of device memory", p);
        memset(p, 0xff, b->second);
        ASAN_POISON_MEMORY_REGION(p, b->second);
        m.used -= b->second;
        m.blocks.erase(b);
    }
    shut_memory();
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned)
{
    *p = aligned_alloc(PAGE, round_up(bytes ? bytes : 1, PAGE));
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p)
{
    struct memory &m = memory_of_all();
    std::lock_guard<std::mutex> hold(m.lock);
    a->type = inside(m, p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    (void)cudaMemsetAsync(p, value, bytes, nullptr);
    return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s)
{
    check_range(p, bytes, "a fill");
    emu_queue(s, [=] { memset(p, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, int, cudaStream_t s)
{
    check_range(dst, bytes, "a copy to");
    check_range(src, bytes, "a copy from");
    emu_queue(s, [=] { memcpy(dst, src, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    struct streams &all = streams_of_all();
    std::lock_guard<std::recursive_mutex> hold(all.lock);
    *s = new emu_stream;
    all.all.insert(*s);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int)
{
    return cudaStreamCreateWithFlags(s, flags);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    struct streams &all = streams_of_all();
    std::lock_guard<std::recursive_mutex> hold(all.lock);
    run_all(s);
    if (!all.all.erase(s))
        give_up("cudaStreamDestroy of what is no stream");
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    waits++;
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    run_all(stream_of(s));
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned)
{
    *e = new emu_event;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    if (!emu_late())
        return cudaSuccess;
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    std::shared_ptr<mark> m = e->m;
    uint64_t record = ++m->recorded;
    m->stream = stream_of(s);
    m->asked = false;
    emu_queue(s, [=] { m->reached = m->reached < record ? record : m->reached; });
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t e)
{
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    mark &m = *e->m;
    if (m.reached < m.recorded && !m.asked) {
        m.asked = true;
        return cudaErrorNotReady;
    }
    run_until(m.stream, m, m.recorded);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    waits++;
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    mark &m = *e->m;
    if (m.reached < m.recorded)
        run_until(m.stream, m, m.recorded);
    return cudaSuccess;
}

/* Of the last record before this call, which a later one does not change. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    std::lock_guard<std::recursive_mutex> hold(streams_of_all().lock);
    std::shared_ptr<mark> m = e->m;
    uint64_t record = m->recorded;
    emu_stream *on = m->stream;
    if (m->reached < record)
        emu_queue(s, [=] { run_until(on, *m, record); });
    return cudaSuccess;
}
