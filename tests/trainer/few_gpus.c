/* few_gpus: a plugin tessera_cuda.so for test_rank_device: a host with $TEST_GPUS GPUs that can be opened, told apart
 * and closed, and nothing else. */
#include "comm/base/mem.h"
#include "comm/device/device.h"

#include <stdlib.h>

static status *count(int *out)
{
    const char *text = getenv("TEST_GPUS");
    *out = text ? atoi(text) : 0;
    return *out ? NULL : ERR(DEVICE, "no usable GPU");
}

static status *open_one(struct device *d, int index)
{
    int n = 0;
    TRY(count(&n));
    CHECK(index < n, "GPU %d of %d", index, n);
    d->host = false;
    return NULL;
}

static void close_one(struct device *d)
{
    (void)d;
}

static uint64_t identity(struct device *d)
{
    return 1000 + (uint64_t)d->index;
}

static const struct device_ops ops = {
    .name = "cuda", .open = open_one, .close = close_one, .count = count, .identity = identity
};
static const struct device_plugin plugin = { DEVICE_ABI, TESSERA_BUILD_ID, &ops };

const struct device_plugin *device_plugin(void);
const struct device_plugin *device_plugin(void)
{
    return &plugin;
}
