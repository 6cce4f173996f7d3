/* device_kernels: see device_kernels.h. */
#include "trainer/ops/device_kernels.h"

#include "comm/device/plugin.h"

#include <string.h>

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

status *device_kernels(const char *device, const struct ops_plugin **out)
{
    if (strcmp(device, "cuda"))
        return ERR(UNSUPPORTED, "device %s: no plugin has kernels for it", device);
    struct plugin p;
    TRY(plugin_open("cuda", "tessera_ops_cuda.so", "ops_plugin", &p));
    ops_plugin_fn *entry;
    memcpy(&entry, &p.symbol, sizeof entry);
    const struct ops_plugin *ops = entry();
    status *st = plugin_check(&p, ops->abi, OPS_ABI, ops->build_id, TESSERA_BUILD_ID);
    if (st) {
        plugin_close(&p);
        return st;
    }
    *out = ops;
    return NULL;
}
