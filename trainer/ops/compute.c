/* compute: see compute.h. Copies between pageable memory and a device go through two halves of pinned memory. */
#include "trainer/ops/compute.h"

#include "comm/base/mem.h"
#include "trainer/ops/device_kernels.h"
#include "trainer/ops/kernels.h"

#include <string.h>

enum { HALF_BYTES = 1 << 20, ALIGN = 64 };

static status *open_device(struct compute *c, bool deterministic)
{
    struct device *d = c->device;
    TRY(device_kernels(d->ops->name, &c->plugin));
    TRY(d->ops->stream_open(d, &c->stream));
    TRY(c->plugin->open(&(struct ops_options){ .index = d->index, .stream = c->stream, .deterministic = deterministic },
                        &c->workers));
    c->kernels = c->plugin->kernels;
    for (int i = 0; i < 2; i++) {
        void *p;
        TRY(d->ops->alloc_pinned(d, HALF_BYTES, &p));
        c->half[i].bytes = p;
        TRY(d->ops->event_open(d, &c->half[i].free));
    }
    void *p;
    TRY(d->ops->alloc_pinned(d, HALF_BYTES, &p));
    c->fetch.bytes = p;
    return d->ops->event_open(d, &c->fetch.done);
}

status *compute_open(struct device *d, struct workers *threads, bool deterministic, struct compute **out)
{
    struct compute *c = mem_calloc(1, sizeof *c);
    if (!c)
        return ERR(NO_MEMORY, "a device's state");
    *c = (struct compute){ .device = d, .host = d->host, .kernels = &kernels_cpu, .workers = threads };
    if (!d->host)
        c->workers = NULL;
    status *st = d->host ? NULL : open_device(c, deterministic);
    if (st)
        compute_close(c);
    else
        *out = c;
    return st;
}

void compute_close(struct compute *c)
{
    if (!c)
        return;
    struct device *d = c->device;
    if (!c->host) {
        if (c->workers)
            c->plugin->close(c->workers);
        for (int i = 0; i < 2; i++) {
            if (c->half[i].free)
                d->ops->event_close(d, c->half[i].free);
            if (c->half[i].bytes)
                d->ops->free_pinned(d, c->half[i].bytes, HALF_BYTES);
        }
        if (c->fetch.done)
            d->ops->event_close(d, c->fetch.done);
        if (c->fetch.bytes)
            d->ops->free_pinned(d, c->fetch.bytes, HALF_BYTES);
        if (c->stream)
            d->ops->stream_close(d, c->stream);
    }
    mem_free(c);
}

const struct kernels *compute_kernels(const struct compute *c)
{
    return c ? c->kernels : &kernels_cpu;
}

status *compute_alloc(struct compute *c, size_t bytes, void **out)
{
    if (!compute_host(c))
        return c->device->ops->alloc(c->device, bytes, out);
    *out = mem_block(bytes, 4096);
    return *out ? NULL : ERR(NO_MEMORY, "%zu bytes", bytes);
}

void compute_free(struct compute *c, void *p, size_t bytes)
{
    if (!p)
        return;
    if (compute_host(c))
        mem_block_free(p, bytes);
    else
        c->device->ops->free(c->device, p, bytes);
}

static status *wait_all(struct compute *c)
{
    TRY(c->device->ops->stream_sync(c->device, c->stream));
    c->half[0].used = c->half[1].used = 0;
    return NULL;
}

/* Room for `bytes` that no copy reads any more: what is small goes behind what the half has, so that nobody waits until
 * both are full of copies that have not been made yet. */
static status *take_room(struct compute *c, size_t bytes, char **out)
{
    struct compute_half *h = &c->half[c->now];
    if (h->used + bytes > HALF_BYTES) {
        bool done = true;
        c->now = !c->now;
        h = &c->half[c->now];
        if (h->used)
            TRY(c->device->ops->event_query(c->device, h->free, &done));
        if (!done)
            TRY(wait_all(c));
        h->used = 0;
    }
    *out = h->bytes + h->used;
    h->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return NULL;
}

/* To a device or from one, by way of the halves. */
static status *pass_through(struct compute *c, char *dst, const char *src, size_t bytes, bool to_device)
{
    if (compute_host(c)) {
        memcpy(dst, src, bytes);
        return NULL;
    }
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < HALF_BYTES ? bytes - at : HALF_BYTES;
        char *room;
        TRY(take_room(c, n, &room));
        if (to_device)
            memcpy(room, src + at, n);
        TRY(c->device->ops->copy(c->device, to_device ? dst + at : room, to_device ? room : src + at, n, c->stream));
        TRY(to_device ? c->device->ops->event_record(c->device, c->half[c->now].free, c->stream) : wait_all(c));
        if (!to_device)
            memcpy(dst + at, room, n);
    }
    return NULL;
}

status *compute_put(struct compute *c, void *dst, const void *src, size_t bytes)
{
    return pass_through(c, dst, src, bytes, true);
}

status *compute_get(struct compute *c, void *dst, const void *src, size_t bytes)
{
    return pass_through(c, dst, src, bytes, false);
}

status *compute_fetched(struct compute *c)
{
    if (compute_host(c) || !c->fetch.n)
        return NULL;
    TRY(c->device->ops->event_sync(c->device, c->fetch.done));
    for (int i = 0; i < c->fetch.n; i++)
        memcpy(c->fetch.to[i].dst, c->fetch.bytes + c->fetch.to[i].at, c->fetch.to[i].bytes);
    c->fetch.n = 0;
    c->fetch.used = 0;
    return NULL;
}

status *compute_fetch(struct compute *c, void *dst, const void *src, size_t bytes)
{
    if (compute_host(c)) {
        if (bytes) /* of none there may be no place */
            memcpy(dst, src, bytes);
        return NULL;
    }
    struct compute_fetches *f = &c->fetch;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < HALF_BYTES ? bytes - at : HALF_BYTES;
        if (f->n == (int)(sizeof f->to / sizeof f->to[0]) || n > HALF_BYTES - f->used)
            TRY(compute_fetched(c));
        TRY(c->device->ops->copy(c->device, f->bytes + f->used, (const char *)src + at, n, c->stream));
        TRY(c->device->ops->event_record(c->device, f->done, c->stream));
        f->to[f->n].dst = (char *)dst + at;
        f->to[f->n].at = f->used;
        f->to[f->n++].bytes = n;
        f->used += (n + ALIGN - 1) / ALIGN * ALIGN;
    }
    return NULL;
}

status *compute_copy(struct compute *c, void *dst, const void *src, size_t bytes)
{
    if (!compute_host(c))
        return c->device->ops->copy(c->device, dst, src, bytes, c->stream);
    memcpy(dst, src, bytes);
    return NULL;
}

status *compute_check(struct compute *c, bool wait)
{
    return compute_host(c) ? NULL : c->plugin->check(c->workers, wait);
}
