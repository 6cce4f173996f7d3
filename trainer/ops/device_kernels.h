/* device_kernels: the kernels of a device that is no plain host memory, opened from its plugin at run time. */
#ifndef TESSERA_TRAINER_OPS_DEVICE_KERNELS_H
#define TESSERA_TRAINER_OPS_DEVICE_KERNELS_H

#include "trainer/ops/cuda/plugin.h"

/* Find tessera_ops_cuda.so (where device.h looks for plugins; it stays loaded) and the table in it.
 * Errors: UNSUPPORTED: built without it, or another build's plugin. */
status *device_kernels(const char *device, const struct ops_plugin **out) WARN_UNUSED;

#endif
