/* device_fake: a device for tests that behaves as a GPU does and needs none. Each stream is a thread that runs what it
 * was given in order, some time later; events order streams; a copy reads its source when its turn comes. Addresses of
 * device memory are no addresses of the host: to read one there ends the test with a signal. */
#ifndef TESSERA_TESTS_SUPPORT_DEVICE_FAKE_H
#define TESSERA_TESTS_SUPPORT_DEVICE_FAKE_H

#include "comm/device/device.h"

struct comm_ops;

/* One device with `comm` as what moves its memory between ranks (may be NULL). */
struct device *device_fake_open(const struct comm_ops *comm);
void device_fake_close(struct device *d); /* all its memory, streams and events must be closed */

/* Queue fn(arg) on a stream. */
void device_fake_launch(struct device *d, struct stream *s, void (*fn)(void *arg), void *arg);
/* The same for what has only the stream, which is not NULL. */
void device_fake_queue(struct stream *s, void (*fn)(void *arg), void *arg);
/* Where the host finds what a device address names; for code that plays a kernel. */
void *device_fake_memory(const void *device_address);

/* A stream that does nothing more until it is let go: what a test needs to see who waits for whom. */
void device_fake_hold(struct device *d, struct stream *s);
void device_fake_let_go(struct device *d, struct stream *s);
/* The same for all streams of low priority (stream_open_low), those opened later included. */
void device_fake_hold_low(struct device *d);
void device_fake_let_go_low(struct device *d);
/* Times the host has waited for a stream (stream_sync) so far. */
unsigned long device_fake_syncs(const struct device *d);

#endif
