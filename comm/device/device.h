/* device: where tensors live. Memory, streams, events and asynchronous copies behind one table; CPU is one of them.
 *
 * A stream orders work; on the CPU every call has finished when it returns, so streams and events are no-ops. All
 * functions may be called from any thread. NULL is the CPU's only stream. A copy reads its source until an event
 * recorded after it is done. Implementations must not take locks of the caller and must not print. */
#ifndef TESSERA_COMM_DEVICE_DEVICE_H
#define TESSERA_COMM_DEVICE_DEVICE_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct device;
struct stream; /* opaque to callers */
struct event;
struct comm_ops;

enum { DEVICE_ABI = 5 };

struct device_ops {
    const char *name;
    status *(*open)(struct device *d, int index);
    void (*close)(struct device *d);
    status *(*alloc)(struct device *d, size_t bytes, void **out); /* device memory, 4 KiB aligned, zeroed */
    void (*free)(struct device *d, void *p, size_t bytes);
    status *(*alloc_pinned)(struct device *d, size_t bytes,
                            void **out); /* host memory the device copies fast, 4 KiB aligned */
    void (*free_pinned)(struct device *d, void *p, size_t bytes);
    status *(*stream_open)(struct device *d, struct stream **out);
    status *(*stream_open_low)(struct device *d, struct stream **out); /* one whose work yields to other streams' */
    void (*stream_close)(struct device *d, struct stream *s);
    status *(*stream_sync)(struct device *d, struct stream *s);
    status *(*event_open)(struct device *d, struct event **out);
    void (*event_close)(struct device *d, struct event *e);
    status *(*event_record)(struct device *d, struct event *e, struct stream *s);
    status *(*event_query)(struct device *d, struct event *e, bool *done);
    status *(*event_sync)(struct device *d, struct event *e); /* the host waits for its last record; none: not at all */
    status *(*stream_wait)(struct device *d, struct stream *s, struct event *e); /* s waits for e; the host does not */
    status *(*copy)(struct device *d, void *dst, const void *src, size_t bytes, struct stream *s); /* any direction */
    /* True: p points into memory of a device, as alloc gives, and the host must not read it. NULL: never. */
    bool (*on_device)(struct device *d, const void *p);
    const struct comm_ops *comm; /* moves its memory between ranks (comm_over), NULL: none is built in */
    status *(*count)(int *out);  /* how many this process may open; NULL: one. DEVICE: none */
    /* Which one it is: the same in every process of a host, another for each of its devices. NULL: the index. */
    uint64_t (*identity)(struct device *d);
    /* What it is called by who made it, "NVIDIA H100 80GB HBM3". NULL: the backend's name. */
    void (*model)(struct device *d, char *text, size_t bytes);
};

struct device {
    const struct device_ops *ops;
    int index;
    bool host; /* tensors are plain host memory */
    void *impl;
    void *plugin; /* dlopen handle, or NULL */
};

/* What a plugin's one exported function returns. */
struct device_plugin {
    int abi;              /* DEVICE_ABI */
    const char *build_id; /* compared with the program's */
    const struct device_ops *ops;
};
typedef const struct device_plugin *device_plugin_fn(void);

/* Open device `index` of backend `name` ("cpu", "cuda"). "cuda" is a plugin (tessera_cuda.so beside the program, in its
 * ../lib/tessera, or in $TESSERA_PLUGINS), opened only here.
 * Errors: INVALID lists the backends; UNSUPPORTED: built without it, or another build's plugin; DEVICE: no usable GPU.
 */
status *device_open(const char *name, int index, struct device **out) WARN_UNUSED;
/* The same, device n modulo how many there are: for ranks that count themselves on their host. */
status *device_open_nth(const char *name, int n, struct device **out) WARN_UNUSED;
uint64_t device_identity(struct device *d);                    /* device_ops.identity */
void device_model(struct device *d, char *text, size_t bytes); /* device_ops.model, cut off where it is too long */
void device_close(struct device *d);                           /* NULL is fine */

extern const struct device_ops *const device_registry[]; /* generated; ends with NULL */

#ifdef __cplusplus
}
#endif

#endif
