/* cli_view: `tessera ckpt view`: write view.h5 of a committed step, whatever its size. No lease: like a mark it lies
 * beside what counts, and replacing it is one put. */
#include "ckpt/cli.h"
#include "ckpt/view.h"

#include <inttypes.h>
#include <stdio.h>

status *cli_view(const struct request *r)
{
    uint64_t step = 0;
    struct metadata *m = NULL;
    char dir[STEP_DIR_BYTES];
    TRY(view_check(r->store));
    TRY(cli_one_step(r, &step));
    TRY(commit_read(r->store, step, &m));
    status *st = view_write(r->store, m);
    commit_step_dir(step, dir);
    if (!st)
        printf("wrote %s/%s: %" PRIu64 " tensors of %" PRIu64 " pieces\n", dir, COMMIT_VIEW, m->tensor_count,
               m->piece_count);
    metadata_free(m);
    return st;
}
