/* exec: the stream that kernels are queued on, its scratch memory and first error; the table; the plugin's door. */
#include "trainer/ops/cuda/gpu.h"

extern "C" {
#include "comm/base/mem.h"
}

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

bool gpu_ok(struct workers *w, cudaError_t rc, const char *what)
{
    if (rc == cudaSuccess)
        return !w->error;
    (void)cudaGetLastError(); /* do not report it a second time */
    status *st = rc == cudaErrorMemoryAllocation ? ERR(NO_MEMORY, "cuda: %.40s: %s", what, cudaGetErrorString(rc))
                                                 : ERR(DEVICE, "cuda: %.40s: %s", what, cudaGetErrorString(rc));
    w->error = status_first(w->error, st);
    return false;
}

void *gpu_scratch(struct workers *w, enum scratch area, size_t bytes)
{
    if (w->error)
        return NULL;
    if (bytes > w->scratch[area].bytes) {
        (void)gpu_ok(w, cudaStreamSynchronize(w->stream), "scratch");
        if (w->scratch[area].p)
            (void)gpu_ok(w, cudaFree(w->scratch[area].p), "scratch");
        w->scratch[area].p = NULL;
        w->scratch[area].bytes = 0;
        if (!gpu_ok(w, cudaMalloc(&w->scratch[area].p, bytes), "scratch"))
            return NULL;
        w->scratch[area].bytes = bytes;
    }
#ifdef CUDA_EMULATED
    (void)cudaMemsetAsync(w->scratch[area].p, 0xff, w->scratch[area].bytes, w->stream); /* nobody reads older calls' */
#endif
    return w->scratch[area].p;
}

static void close_workers(struct workers *w)
{
    if (!w)
        return;
    (void)cudaSetDevice(w->index);
    (void)cudaStreamSynchronize(w->stream);
    lt_close(w->lt);
    for (int i = 0; i < SCRATCHES; i++)
        if (w->scratch[i].p)
            (void)cudaFree(w->scratch[i].p);
    status_free(w->error);
    mem_free(w);
}

static status *open_workers(const struct ops_options *o, struct workers **out)
{
    int count = 0;
    cudaError_t rc = cudaGetDeviceCount(&count);
    if (rc == cudaSuccess && o->index < count)
        rc = cudaSetDevice(o->index);
    if (rc != cudaSuccess || o->index < 0 || o->index >= count)
        return ERR(DEVICE, "cuda: GPU %d of %d cannot be used: %s", o->index, count,
                   rc == cudaSuccess ? "there is no such GPU" : cudaGetErrorString(rc));
    struct workers *w = static_cast<struct workers *>(mem_calloc(1, sizeof *w));
    if (!w)
        return ERR(NO_MEMORY, "cuda: handle of a stream");
    w->index = o->index;
    w->stream = static_cast<cudaStream_t>(o->stream);
    w->deterministic = o->deterministic;
    status *st = o->own_gemm ? NULL : lt_open(w, &w->lt);
    if (st) {
        close_workers(w);
        return st;
    }
    *out = w;
    return NULL;
}

static status *check(struct workers *w, bool wait)
{
    if (wait)
        (void)gpu_ok(w, cudaStreamSynchronize(w->stream), "work that was queued");
    status *st = w->error;
    w->error = NULL;
    return st;
}

#define ROW(name) .name = gpu_##name,
static const struct kernels kernels_cuda = { .name = "cuda", GPU_KERNELS(ROW) };

static const struct ops_plugin plugin = {
    OPS_ABI, TESSERA_BUILD_ID, &kernels_cuda, open_workers, close_workers, check
};

extern "C" __attribute__((visibility("default"))) const struct ops_plugin *ops_plugin(void)
{
    return &plugin;
}
