/* rank_device: which device a rank computes on, beside the other ranks of its host.
 *
 * device: cuda: ranks of a host take its GPUs in turn, in their order; a launcher that shows each rank GPUs of its own
 * (CUDA_VISIBLE_DEVICES) is followed. Ranks that share a GPU are refused, but where NCCL is told to allow it. */
#ifndef TESSERA_TRAINER_RANK_DEVICE_H
#define TESSERA_TRAINER_RANK_DEVICE_H

#include "comm/device/device.h"
#include "trainer/config.h"
#include "trainer/placement.h"

/* Collective; alike on all ranks. Errors: INVALID: comm: mpi cannot move what several GPUs hold; ranks share a GPU; of
 * device_open. *out may be open on error. */
status *rank_device_open(const struct top_config *top, struct comm *world, const struct placement *place,
                         struct device **out) WARN_UNUSED;

#endif
