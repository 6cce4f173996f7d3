/* columns: parts of rows are put side by side, with the heads of a token, and taken apart again: a thread an element.
 */
#include "trainer/ops/cuda/gpu.h"

namespace
{
__global__ void move(struct column_copy c)
{
    int64_t rows = c.y_head ? c.heads : 1, sums = c.y_head ? 1 : c.heads, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t e = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; e < c.n * rows * c.count; e += step) {
        int64_t j = e % c.count, h = e / c.count % rows, i = e / c.count / rows;
        const float *x = c.x + i * c.x_token + h * c.x_head + j * c.x_step;
        float *y = c.y + i * c.y_token + h * c.y_head + j * c.y_step, sum = 0;
        for (int64_t k = 0; c.x && k < sums; k++)
            sum += x[k * c.x_head];
        *y = c.add ? *y + sum : sum;
    }
}
} // namespace

void gpu_columns(struct workers *w, const struct column_copy *c)
{
    int64_t blocks = (c->n * (c->y_head ? c->heads : 1) * c->count + BLOCK - 1) / BLOCK;
    launch(w, "columns", move, (unsigned)(blocks < (1 << 20) ? blocks : (1 << 20)), BLOCK, 0, *c);
}
