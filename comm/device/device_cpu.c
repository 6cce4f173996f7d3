/* device_cpu: tensors in host memory. Every call has finished when it returns, so streams and events are NULL and done.
 */
#include "comm/base/mem.h"
#include "comm/device/device.h"

#include <string.h>

static status *cpu_open(struct device *d, int index)
{
    (void)index; /* one memory, whatever a rank calls it */
    d->host = true;
    return NULL;
}

static void cpu_close(struct device *d)
{
    (void)d;
}

static status *cpu_alloc(struct device *d, size_t bytes, void **out)
{
    (void)d;
    void *p = mem_block(bytes, 4096);
    if (!p)
        return ERR(NO_MEMORY, "device cpu: %zu bytes", bytes);
    *out = p;
    return NULL;
}

/* The host copies from all memory alike: it need not be there before somebody writes to it. */
static status *cpu_alloc_pinned(struct device *d, size_t bytes, void **out)
{
    (void)d;
    *out = mem_block_untouched(bytes, 4096);
    return *out ? NULL : ERR(NO_MEMORY, "device cpu: %zu bytes", bytes);
}

static void cpu_free(struct device *d, void *p, size_t bytes)
{
    (void)d;
    mem_block_free(p, bytes);
}

static status *cpu_stream_open(struct device *d, struct stream **out)
{
    (void)d;
    *out = NULL;
    return NULL;
}

static void cpu_stream_close(struct device *d, struct stream *s)
{
    (void)d;
    (void)s;
}

static status *cpu_stream_sync(struct device *d, struct stream *s)
{
    (void)d;
    (void)s;
    return NULL;
}

static status *cpu_event_open(struct device *d, struct event **out)
{
    (void)d;
    *out = NULL;
    return NULL;
}

static void cpu_event_close(struct device *d, struct event *e)
{
    (void)d;
    (void)e;
}

static status *cpu_event_record(struct device *d, struct event *e, struct stream *s)
{
    (void)d;
    (void)e;
    (void)s;
    return NULL;
}

static status *cpu_event_query(struct device *d, struct event *e, bool *done)
{
    (void)d;
    (void)e;
    *done = true;
    return NULL;
}

static status *cpu_event_sync(struct device *d, struct event *e)
{
    (void)d;
    (void)e;
    return NULL;
}

static status *cpu_stream_wait(struct device *d, struct stream *s, struct event *e)
{
    (void)d;
    (void)s;
    (void)e;
    return NULL;
}

static status *cpu_copy(struct device *d, void *dst, const void *src, size_t bytes, struct stream *s)
{
    (void)d;
    (void)s;
    if (bytes)
        memcpy(dst, src, bytes);
    return NULL;
}

const struct device_ops device_cpu_ops = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .alloc_pinned = cpu_alloc_pinned,
    .free_pinned = cpu_free,
    .stream_open = cpu_stream_open,
    .stream_open_low = cpu_stream_open,
    .stream_close = cpu_stream_close,
    .stream_sync = cpu_stream_sync,
    .event_open = cpu_event_open,
    .event_close = cpu_event_close,
    .event_record = cpu_event_record,
    .event_query = cpu_event_query,
    .event_sync = cpu_event_sync,
    .stream_wait = cpu_stream_wait,
    .copy = cpu_copy,
};
