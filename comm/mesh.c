/* mesh: rank <-> coordinates in mixed radix, pp slowest and tp fastest. Pure, but for mesh_comm. */
#include "comm/mesh.h"

#include <stdio.h>

const char *const mesh_axis_names[MESH_AXES] = { "pp", "dp", "ep", "cp", "tp" };

int mesh_world(const struct mesh *m)
{
    int n = 1;
    for (int a = 0; a < MESH_AXES; a++)
        n *= m->size[a];
    return n;
}

void mesh_coords(const struct mesh *m, int rank, int coord[MESH_AXES])
{
    for (int a = MESH_AXES - 1; a >= 0; a--) {
        coord[a] = rank % m->size[a];
        rank /= m->size[a];
    }
}

int mesh_rank(const struct mesh *m, const int coord[MESH_AXES])
{
    int rank = 0;
    for (int a = 0; a < MESH_AXES; a++)
        rank = rank * m->size[a] + coord[a];
    return rank;
}

/* "1, 2, 4": what divides n, as far as there is room. */
static void divisors(int n, char *text, size_t bytes)
{
    size_t used = 0;
    text[0] = 0;
    for (int d = 1; d <= n && used + 16 < bytes; d++)
        if (n % d == 0)
            used += (size_t)snprintf(text + used, bytes - used, "%s%d", d > 1 ? ", " : "", d);
}

status *mesh_init(struct mesh *m, int world)
{
    char text[128];
    mesh_text(m, text, sizeof text);
    int64_t fixed = 1; /* the product without a dp that is to be found */
    for (int a = 0; a < MESH_AXES; a++) {
        int n = m->size[a];
        if (n < 0 || (n == 0 && a != MESH_DP))
            return ERR(INVALID, "mesh %s: %s must be at least 1", text, mesh_axis_names[a]);
        if (n > 0 && fixed <= world)
            fixed *= n;
    }
    bool find = m->size[MESH_DP] == 0;
    if (world < 1 || fixed > world || world % fixed || (!find && fixed != world)) {
        char legal[128];
        divisors(world, legal, sizeof legal);
        return ERR(INVALID,
                   find ? "mesh %s does not fit %d ranks: dp=0 takes what remains, so the other sizes must multiply to "
                          "one of %s"
                        : "mesh %s does not fit %d ranks: the sizes must multiply to that; each is one of %s, and dp=0 "
                          "takes what remains",
                   text, world, legal);
    }
    if (find)
        m->size[MESH_DP] = (int)(world / fixed);
    return NULL;
}

status *mesh_comm(const struct mesh *m, struct comm *world, unsigned mask, struct comm **out)
{
    int coord[MESH_AXES];
    if (mesh_world(m) != world->size)
        return ERR(INVALID, "mesh of %d ranks on a world of %d", mesh_world(m), world->size);
    mesh_coords(m, world->rank, coord);
    for (int a = 0; a < MESH_AXES; a++)
        if (mask >> a & 1)
            coord[a] = 0;
    return comm_split(world, mesh_rank(m, coord), world->rank, out); /* the first rank of each group names it */
}

void mesh_text(const struct mesh *m, char *text, size_t bytes)
{
    snprintf(text, bytes, "pp=%d,dp=%d,ep=%d,cp=%d,tp=%d", m->size[MESH_PP], m->size[MESH_DP], m->size[MESH_EP],
             m->size[MESH_CP], m->size[MESH_TP]);
}
