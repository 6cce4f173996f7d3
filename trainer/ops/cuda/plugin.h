/* plugin: what tessera_ops_cuda.so holds: the kernels of trainer/ops/kernels.h on a GPU. It exports one function,
 * ops_plugin, of the type below. trainer/ops/device_kernels.h opens it. */
#ifndef TESSERA_TRAINER_OPS_CUDA_PLUGIN_H
#define TESSERA_TRAINER_OPS_CUDA_PLUGIN_H

#include "comm/base/status.h"

#include <stdbool.h>

enum { OPS_ABI = 1 };

struct kernels;
struct workers;

struct ops_options {
    int index;          /* of the GPU */
    void *stream;       /* of device.h; all work is queued on it; NULL: the default stream */
    bool deterministic; /* libraries may choose only algorithms that add in one order */
    bool own_gemm;      /* products by our own kernel even where cuBLASLt is there */
};

struct ops_plugin {
    int abi;              /* OPS_ABI */
    const char *build_id; /* compared with the program's */
    const struct kernels *kernels;
    /* What the kernels take as workers. One thread at a time uses it; the stream must outlive it. Errors: DEVICE;
     * UNSUPPORTED: no cuBLASLt on this machine. */
    status *(*open)(const struct ops_options *o, struct workers **out);
    void (*close)(struct workers *w);
    /* The first error since the last check; wait: of all work queued, after it is done. */
    status *(*check)(struct workers *w, bool wait);
};
typedef const struct ops_plugin *ops_plugin_fn(void);

#endif
