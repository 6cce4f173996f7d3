/* comm_on_device: a communicator for host memory that copies every buffer to a device, calls another communicator with
 * the copy, and copies the result back: so what is written for host memory, the conformance suite above all, tests
 * communicators for device memory, on a GPU or on device_fake. */
#ifndef TESSERA_TESTS_SUPPORT_COMM_ON_DEVICE_H
#define TESSERA_TESTS_SUPPORT_COMM_ON_DEVICE_H

#include "comm/comm.h"
#include "comm/device/device.h"

/* Takes inner, which moves memory of dev. */
status *comm_on_device(struct comm *inner, struct device *dev, struct comm **out) WARN_UNUSED;
/* The conformance suite over a duplicate of inner, as far as it goes with calls that run in order. Collective. */
status *comm_suite_on_device(struct comm *inner, struct device *dev) WARN_UNUSED;

#endif
