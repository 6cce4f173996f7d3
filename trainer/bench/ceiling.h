/* ceiling: what a training step cannot do without, timed alone: the products of every linear layer and of the output
 * matrix (forward, and the two of backward), with the step's kernel, weights and shapes; and AdamW on all parameters.
 */
#ifndef TESSERA_TRAINER_BENCH_CEILING_H
#define TESSERA_TRAINER_BENCH_CEILING_H

#include "trainer/model/model.h"

struct ceiling {
    struct model *m;         /* borrowed, with gradients; what is computed in them has no meaning afterwards */
    struct compute *compute; /* borrowed, where m is */
    int64_t tokens;
    bool bf16;
    float *x, *y, *dx; /* [tokens, widest input or output] */
    size_t bytes;      /* of each */
    float *v, *moment; /* borrowed: AdamW's, [params.total] */
};

/* Memory of c, whose first four fields and AdamW's are set. */
status *ceiling_open(struct ceiling *c) WARN_UNUSED;
void ceiling_close(struct ceiling *c);
/* All of it once; on a GPU it is queued. The parameters stay as they are, but for paddings: the update's learning rate
 * is 0. */
void ceiling_run(struct ceiling *c);

#endif
