/* device_cuda: one NVIDIA GPU. Built into tessera_cuda.so, which exports device_plugin and nothing else.
 *
 * Every function first makes the GPU current for its thread. Streams and events are CUDA's own handles behind our
 * opaque types; the NULL stream is CUDA's default stream. Device blocks are cut to 4 KiB inside somewhat larger
 * allocations, whose bases are kept in a list. Copies go through unified addressing, so one call serves all directions.
 */
#include "comm/base/mem.h"
#include "comm/device/device.h"

#include <cuda_runtime.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

struct block {
    struct block *next;
    void *base, *p; /* of cudaMalloc; p is aligned inside it */
};

struct gpu { /* device.impl */
    struct {
        pthread_mutex_t lock;
        struct block *blocks;
    } synced;
};

static const size_t ALIGN = 4096;

static struct gpu *gpu_of(struct device *d)
{
    return (struct gpu *)d->impl;
}

static status *cuda_error(int line, cudaError_t rc, const char *call)
{
    (void)cudaGetLastError(); /* do not report it a second time */
    return status_new(__FILE__, line, rc == cudaErrorMemoryAllocation ? ST_NO_MEMORY : ST_DEVICE,
                      "device cuda: %.40s: %s", call, cudaGetErrorString(rc));
}

#define CUDA_TRY(call)                                                                                                 \
    do {                                                                                                               \
        cudaError_t cuda_rc_ = (call);                                                                                 \
        if (cuda_rc_ != cudaSuccess)                                                                                   \
            return cuda_error(__LINE__, cuda_rc_, #call);                                                              \
    } while (0)

static status *gpu_count(int *out)
{
    cudaError_t rc = cudaGetDeviceCount(out);
    if (rc != cudaSuccess || *out == 0)
        return ERR(DEVICE, "device: cuda was asked for, but this machine has no usable GPU: %s",
                   rc == cudaSuccess ? "none was found" : cudaGetErrorString(rc));
    return NULL;
}

static status *gpu_open(struct device *d, int index)
{
    int count = 0;
    TRY(gpu_count(&count));
    if (index >= count)
        return ERR(DEVICE, "device: cuda was asked for, but GPU %d does not exist: this machine has %d", index, count);
    CUDA_TRY(cudaSetDevice(index));
    CUDA_TRY(cudaFree(NULL)); /* makes the context now, not inside the first step */
    struct gpu *g = (struct gpu *)mem_calloc(1, sizeof *g);
    if (!g)
        return ERR(NO_MEMORY, "device cuda: handle");
    pthread_mutex_init(&g->synced.lock, NULL);
    d->host = false;
    d->impl = g;
    return NULL;
}

static void gpu_close(struct device *d)
{
    struct gpu *g = gpu_of(d);
    (void)cudaSetDevice(d->index);
    (void)cudaDeviceSynchronize();
    for (struct block *b = g->synced.blocks, *next; b; b = next) {
        next = b->next;
        (void)cudaFree(b->base);
        mem_free(b);
    }
    pthread_mutex_destroy(&g->synced.lock);
    mem_free(g);
}

static status *zeroed(void *base, size_t bytes)
{
    CUDA_TRY(cudaMemset(base, 0, bytes));
    CUDA_TRY(cudaDeviceSynchronize());
    return NULL;
}

static status *gpu_alloc(struct device *d, size_t bytes, void **out)
{
    struct gpu *g = gpu_of(d);
    if (bytes > SIZE_MAX - 2 * ALIGN)
        return ERR(NO_MEMORY, "device cuda: %zu bytes", bytes);
    struct block *b = (struct block *)mem_calloc(1, sizeof *b);
    if (!b)
        return ERR(NO_MEMORY, "device cuda: handle of a block");
    cudaError_t rc = cudaSetDevice(d->index);
    if (rc == cudaSuccess)
        rc = cudaMalloc(&b->base, bytes + ALIGN);
    if (rc != cudaSuccess) {
        mem_free(b);
        return status_wrap(cuda_error(__LINE__, rc, "cudaMalloc"), "%zu bytes", bytes);
    }
    status *st = zeroed(b->base, bytes + ALIGN);
    if (st) {
        (void)cudaFree(b->base);
        mem_free(b);
        return st;
    }
    b->p = (void *)(((size_t)b->base + ALIGN - 1) / ALIGN * ALIGN);
    pthread_mutex_lock(&g->synced.lock);
    b->next = g->synced.blocks;
    g->synced.blocks = b;
    pthread_mutex_unlock(&g->synced.lock);
    *out = b->p;
    return NULL;
}

static void gpu_free(struct device *d, void *p, size_t bytes)
{
    struct gpu *g = gpu_of(d);
    (void)bytes;
    if (!p)
        return;
    pthread_mutex_lock(&g->synced.lock);
    struct block **at = &g->synced.blocks;
    while (*at && (*at)->p != p)
        at = &(*at)->next;
    struct block *b = *at;
    if (b)
        *at = b->next;
    pthread_mutex_unlock(&g->synced.lock);
    CHECK(b, "%p is no block of this GPU", p);
    (void)cudaSetDevice(d->index);
    (void)cudaFree(b->base);
    mem_free(b);
}

static status *gpu_alloc_pinned(struct device *d, size_t bytes, void **out)
{
    void *p = NULL;
    size_t size = bytes ? bytes : 1;
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaHostAlloc(&p, size, cudaHostAllocPortable));
    *out = memset(p, 0, size);
    return NULL;
}

static void gpu_free_pinned(struct device *d, void *p, size_t bytes)
{
    (void)bytes;
    (void)cudaSetDevice(d->index);
    if (p)
        (void)cudaFreeHost(p);
}

static status *gpu_stream_open(struct device *d, struct stream **out)
{
    cudaStream_t s;
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    *out = (struct stream *)s;
    return NULL;
}

static status *gpu_stream_open_low(struct device *d, struct stream **out)
{
    cudaStream_t s;
    int least = 0, greatest = 0;
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_TRY(cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, least));
    *out = (struct stream *)s;
    return NULL;
}

static void gpu_stream_close(struct device *d, struct stream *s)
{
    (void)cudaSetDevice(d->index);
    if (s)
        (void)cudaStreamDestroy((cudaStream_t)s);
}

static status *gpu_stream_sync(struct device *d, struct stream *s)
{
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaStreamSynchronize((cudaStream_t)s));
    return NULL;
}

static status *gpu_event_open(struct device *d, struct event **out)
{
    cudaEvent_t e;
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    *out = (struct event *)e;
    return NULL;
}

static void gpu_event_close(struct device *d, struct event *e)
{
    (void)cudaSetDevice(d->index);
    if (e)
        (void)cudaEventDestroy((cudaEvent_t)e);
}

static status *gpu_event_record(struct device *d, struct event *e, struct stream *s)
{
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaEventRecord((cudaEvent_t)e, (cudaStream_t)s));
    return NULL;
}

static status *gpu_event_query(struct device *d, struct event *e, bool *done)
{
    CUDA_TRY(cudaSetDevice(d->index));
    cudaError_t rc = cudaEventQuery((cudaEvent_t)e);
    if (rc != cudaSuccess && rc != cudaErrorNotReady)
        return cuda_error(__LINE__, rc, "cudaEventQuery");
    if (rc == cudaErrorNotReady)
        (void)cudaGetLastError();
    *done = rc == cudaSuccess;
    return NULL;
}

static status *gpu_event_sync(struct device *d, struct event *e)
{
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaEventSynchronize((cudaEvent_t)e));
    return NULL;
}

static status *gpu_stream_wait(struct device *d, struct stream *s, struct event *e)
{
    CUDA_TRY(cudaSetDevice(d->index));
    CUDA_TRY(cudaStreamWaitEvent((cudaStream_t)s, (cudaEvent_t)e, 0));
    return NULL;
}

static status *gpu_copy(struct device *d, void *dst, const void *src, size_t bytes, struct stream *s)
{
    CUDA_TRY(cudaSetDevice(d->index));
    if (bytes)
        CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, (cudaStream_t)s));
    return NULL;
}

static bool gpu_on_device(struct device *d, const void *p)
{
    struct cudaPointerAttributes a;
    (void)cudaSetDevice(d->index);
    if (cudaPointerGetAttributes(&a, p) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return a.type == cudaMemoryTypeDevice || a.type == cudaMemoryTypeManaged;
}

static uint64_t gpu_identity(struct device *d)
{
    struct cudaDeviceProp p;
    uint64_t half[2] = { (uint64_t)d->index, 0 };
    if (cudaGetDeviceProperties(&p, d->index) == cudaSuccess)
        memcpy(half, &p.uuid, sizeof half);
    else
        (void)cudaGetLastError();
    return half[0] ^ half[1];
}

static void gpu_model(struct device *d, char *text, size_t bytes)
{
    struct cudaDeviceProp p;
    bool known = cudaGetDeviceProperties(&p, d->index) == cudaSuccess;
    (void)cudaGetLastError();
    snprintf(text, bytes, "%s", known ? p.name : "cuda");
}

/* Where the build found no nccl.h, nothing defines it. */
extern "C" const struct comm_ops comm_nccl_ops __attribute__((weak));

static const struct device_ops cuda_ops = {
    .name = "cuda",
    .open = gpu_open,
    .close = gpu_close,
    .alloc = gpu_alloc,
    .free = gpu_free,
    .alloc_pinned = gpu_alloc_pinned,
    .free_pinned = gpu_free_pinned,
    .stream_open = gpu_stream_open,
    .stream_open_low = gpu_stream_open_low,
    .stream_close = gpu_stream_close,
    .stream_sync = gpu_stream_sync,
    .event_open = gpu_event_open,
    .event_close = gpu_event_close,
    .event_record = gpu_event_record,
    .event_query = gpu_event_query,
    .event_sync = gpu_event_sync,
    .stream_wait = gpu_stream_wait,
    .copy = gpu_copy,
    .on_device = gpu_on_device,
    .comm = &comm_nccl_ops,
    .count = gpu_count,
    .identity = gpu_identity,
    .model = gpu_model,
};

static const struct device_plugin plugin = { DEVICE_ABI, TESSERA_BUILD_ID, &cuda_ops };

extern "C" __attribute__((visibility("default"))) const struct device_plugin *device_plugin(void)
{
    return &plugin;
}
