/* mesh: named axes over ranks. world = pp x dp x ep x cp x tp with tp fastest:
 *   rank = (((pp_i * dp + dp_i) * ep + ep_i) * cp + cp_i) * tp + tp_i. Pure, but for mesh_comm. */
#ifndef TESSERA_COMM_MESH_H
#define TESSERA_COMM_MESH_H

#include "comm/comm.h"

enum mesh_axis { MESH_PP, MESH_DP, MESH_EP, MESH_CP, MESH_TP, MESH_AXES };

struct mesh {
    int size[MESH_AXES]; /* each at least 1 */
};

extern const char *const mesh_axis_names[MESH_AXES]; /* "pp", "dp", "ep", "cp", "tp" */

/* The number of ranks; a rank's place on each axis; the rank at a place. */
int mesh_world(const struct mesh *m);
void mesh_coords(const struct mesh *m, int rank, int coord[MESH_AXES]);
int mesh_rank(const struct mesh *m, const int coord[MESH_AXES]);
/* Check sizes against a world; a dp of 0 is set to what remains. INVALID names the sizes. */
status *mesh_init(struct mesh *m, int world) WARN_UNUSED;
/* The communicator of the ranks that differ from this one only along the axes in `mask` (1 << MESH_DP | ...), ordered
 * by rank. Collective. */
status *mesh_comm(const struct mesh *m, struct comm *world, unsigned mask, struct comm **out) WARN_UNUSED;
/* "pp=1,dp=4,ep=1,cp=1,tp=1" */
void mesh_text(const struct mesh *m, char *text, size_t bytes);

#endif
