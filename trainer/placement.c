/* placement: read placement_of. */
#include "trainer/placement.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static bool may_use(const struct placement_rank *r, int core)
{
    return r->core[core / 64] >> (core % 64) & 1;
}

struct placement placement_of(const struct placement_rank *all, int n, int me)
{
    struct placement p = { .host = all[me].host };
    for (int i = 0; i < n; i++) {
        bool here = all[i].host == all[me].host;
        p.ranks_here += here;
        p.rank_here += here && i < me;
    }
    for (int c = 0; c < PLACEMENT_CORES; c++) {
        int users = 0;
        for (int i = 0; i < n && may_use(&all[me], c); i++)
            users += all[i].host == all[me].host && may_use(&all[i], c);
        p.share += users ? 1.0 / users : 0;
    }
    if (all[me].quota > 0 && all[me].quota / p.ranks_here < p.share)
        p.share = all[me].quota / p.ranks_here;
    p.threads = p.share > 1 ? (int)(p.share + 1e-6) : 1;
    return p;
}

/* cpu.max of control groups, version 2: "microseconds period", or "max period". */
static double quota(void)
{
    double most = 0, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f)
        return 0;
    int got = fscanf(f, "%lf %lf", &most, &period);
    fclose(f);
    return got == 2 && period > 0 ? most / period : 0;
}

static struct placement_rank read_own(void)
{
    struct placement_rank r = { .quota = quota() };
    char host[256] = "";
    (void)gethostname(host, sizeof host - 1);
    r.host = hash64(host, strlen(host));
    cpu_set_t set;
    bool known = sched_getaffinity(0, sizeof set, &set) == 0; /* not where there are more than CPU_SETSIZE */
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    for (int c = 0; c < PLACEMENT_CORES && c < CPU_SETSIZE; c++)
        if (known ? CPU_ISSET((unsigned)c, &set) : c < cores)
            r.core[c / 64] |= (uint64_t)1 << (c % 64);
    return r;
}

status *placement_read(struct comm *world, struct placement *out)
{
    struct placement_rank mine = read_own(), *all = mem_array(NULL, (size_t)world->size, sizeof *all);
    status *st = comm_agree(world, all ? NULL : ERR(NO_MEMORY, "the cores of %d ranks", world->size));
    if (!st)
        st = comm_allgather(world, &mine, all, sizeof mine, NULL);
    if (!st)
        *out = placement_of(all, world->size, world->rank);
    mem_free(all);
    return st;
}
