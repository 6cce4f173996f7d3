/* rank_device: see rank_device.h. */
#include "trainer/rank_device.h"

#include "comm/agree.h"
#include "comm/base/mem.h"

#include <stdlib.h>
#include <string.h>

static const char SHARE[] = "NCCL_MULTI_RANK_GPU_ENABLE";

struct seat {
    uint64_t host, device;
};

/* Ranks with the device that the most share. */
static int most_sharers(const struct seat *all, int n)
{
    int most = 0;
    for (int i = 0; i < n; i++) {
        int same = 0;
        for (int j = 0; j < n; j++)
            same += all[j].host == all[i].host && all[j].device == all[i].device;
        most = same > most ? same : most;
    }
    return most;
}

static status *check_shared(struct comm *world, const struct placement *place, struct device *d)
{
    struct seat own = { place->host, device_identity(d) }, *all = mem_array(NULL, (size_t)world->size, sizeof *all);
    status *st = comm_agree(world, all ? NULL : ERR(NO_MEMORY, "the devices of %d ranks", world->size));
    if (!st)
        st = comm_allgather(world, &own, all, sizeof own, NULL);
    int most = st ? 1 : most_sharers(all, world->size);
    const char *allowed = getenv(SHARE);
    mem_free(all);
    if (!st && most > 1 && (!allowed || !*allowed || !strcmp(allowed, "0")))
        st =
            ERR(INVALID,
                "device: cuda: %d ranks would share a GPU: start no more ranks on a host than it has GPUs, or allow it "
                "with %s=1 (NCCL 2.30 or later)",
                most, SHARE);
    return comm_agree(world, st);
}

status *rank_device_open(const struct top_config *top, struct comm *world, const struct placement *place,
                         struct device **out)
{
    static const char *const names[] = { [DEVICE_CPU] = "cpu", [DEVICE_CUDA] = "cuda" };
    if (top->device != DEVICE_CPU && top->comm == TRANSPORT_MPI && world->size > 1)
        return ERR(INVALID,
                   "comm: mpi does not move the memory of GPUs between %d ranks: with device: %s set comm: "
                   "nccl, or auto",
                   world->size, names[top->device]);
    TRY(comm_agree(world, device_open_nth(names[top->device], place->rank_here, out)));
    return (*out)->host || world->size == 1 ? NULL : check_shared(world, place, *out);
}
