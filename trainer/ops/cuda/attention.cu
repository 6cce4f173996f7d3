/* attention: causal, per segment, grouped-query, perhaps in a window or against a cache, perhaps of every ranks-th
 * query only (cpu/attention.c says what that means); in f32, without tensor cores.
 *
 * Flash style: a block holds a tile of T queries (or keys) in shared memory and walks over the tiles of the other side;
 * no [N, N] matrix exists. Its 256 threads are 16 x 16; thread (ty, tx) makes the scores of rows ty, ty + 16, ... and
 * columns tx, tx + 16, ..., and the columns tx, tx + 16, ... of the outputs of its rows: a row's scores are in 16
 * neighbouring lanes. Backward is two kernels, so that each output has one owner: dQ by tiles of queries, dK and dV by
 * tiles of keys (all heads of the group, in order, inside). Tiles are counted from the segment's first token, so its
 * bits do not depend on what else is in the pack. The grid has room for the most tiles there can be; what is left over
 * returns at once. */
#include "trainer/ops/cuda/attention.h"

namespace
{
enum { SIDE = 16 };

/* T rows of up to 16 DC columns; 4 more so that threads a row apart read other banks. */
template <int T, int DC> struct rows {
    float at[T][SIDE * DC + 4];
};
template <int T> struct square {
    float at[T][T + 1];
};

/* Rows [0, count) of src, `ld` apart; zeros behind them and behind their d columns. */
template <int T, int DC>
__device__ void take(struct rows<T, DC> &to, const float *src, int64_t ld, int64_t count, int d, bool wide)
{
    for (int e = (int)threadIdx.x; e < T * SIDE * DC / 4; e += BLOCK) {
        int i = e / (SIDE * DC / 4), j = e % (SIDE * DC / 4) * 4;
        float v[4] = {};
        if (i < count && wide && j < d)
            load<4>(v, src + i * ld + j);
        for (int k = 0; k < 4 && !wide && i < count; k++)
            if (j + k < d)
                v[k] = src[i * ld + j + k];
        store<4>(&to.at[i][j], v);
    }
}

/* score[r][c] = row ty + 16 r of a times row tx + 16 c of b. */
template <int T, int DC>
__device__ void products(float (&score)[T / SIDE][T / SIDE], const struct rows<T, DC> &a, const struct rows<T, DC> &b,
                         int d)
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    UNROLL
    for (int r = 0; r < T / SIDE; r++)
        UNROLL
    for (int c = 0; c < T / SIDE; c++)
        score[r][c] = 0;
    for (int e = 0; e < d; e += 4) {
        float x[T / SIDE][4], y[T / SIDE][4];
        UNROLL
        for (int r = 0; r < T / SIDE; r++) {
            load<4>(x[r], &a.at[ty + SIDE * r][e]);
            load<4>(y[r], &b.at[tx + SIDE * r][e]);
        }
        UNROLL
        for (int k = 0; k < 4; k++)
            UNROLL
        for (int r = 0; r < T / SIDE; r++)
            UNROLL
        for (int c = 0; c < T / SIDE; c++)
            score[r][c] = fmaf(x[r][k], y[c][k], score[r][c]);
    }
}

/* out[r][c] += sum_j w(ty + 16 r, j) b[j][tx + 16 c], w(i, j) = w[i][j], or w[j][i] if ACROSS. */
template <bool ACROSS, int T, int DC>
__device__ void accumulate(float (&out)[T / SIDE][DC], const struct square<T> &w, const struct rows<T, DC> &b)
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int j = 0; j < T; j++) {
        float x[T / SIDE];
        UNROLL
        for (int r = 0; r < T / SIDE; r++)
            x[r] = ACROSS ? w.at[j][ty + SIDE * r] : w.at[ty + SIDE * r][j];
        UNROLL
        for (int c = 0; c < DC; c++) {
            float y = b.at[j][tx + SIDE * c];
            UNROLL
            for (int r = 0; r < T / SIDE; r++)
                out[r][c] = fmaf(x[r], y, out[r][c]);
        }
    }
}

/* to[row][column] += out, where there is such a row and column. */
template <int R, int DC>
__device__ void add_rows(float *to, int64_t ld, int64_t count, int d, const float (&out)[R][DC])
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < DC; c++)
            if (ty + SIDE * r < count && tx + SIDE * c < d)
                to[(ty + SIDE * r) * ld + tx + SIDE * c] += out[r][c];
}

/* Of the 16 lanes that share a row. */
__device__ float row_max(float x)
{
    for (int step = SIDE / 2; step; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

__device__ float row_sum(float x)
{
    for (int step = SIDE / 2; step; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <int T, int DC> struct forward_room {
    struct rows<T, DC> q, kv;
    struct square<T> p;
};

/* One tile of scores becomes weights; the running maximum, sum and output of the thread's rows are brought up to date.
 */
template <int T, int DC>
__device__ void softmax_tile(const struct att_job &t, const struct span &p, int64_t q0, int64_t k0,
                             float (&score)[T / SIDE][T / SIDE], float (&top)[T / SIDE], float (&sum)[T / SIDE],
                             float (&out)[T / SIDE][DC], struct square<T> &weights)
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    UNROLL
    for (int r = 0; r < T / SIDE; r++) {
        int i = ty + SIDE * r;
        float most = -INFINITY, all = 0;
        UNROLL
        for (int c = 0; c < T / SIDE; c++) {
            score[r][c] *= t.scale;
            if (sees(t, p, q0 + i, k0 + tx + SIDE * c))
                most = fmaxf(most, score[r][c]);
        }
        most = fmaxf(row_max(most), top[r]);
        float shrink = most == -INFINITY ? 1.0f : expf(top[r] - most); /* 0 from -inf */
        UNROLL
        for (int c = 0; c < T / SIDE; c++) {
            float x = sees(t, p, q0 + i, k0 + tx + SIDE * c) ? expf(score[r][c] - most) : 0.0f;
            weights.at[i][tx + SIDE * c] = x;
            all += x;
        }
        sum[r] = sum[r] * shrink + row_sum(all);
        top[r] = most;
        UNROLL
        for (int c = 0; c < DC; c++)
            out[r][c] *= shrink;
    }
}

template <int T, int DC> __global__ void __launch_bounds__(BLOCK) forward(struct att_job t)
{
    typedef forward_room<T, DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, T, &a))
        return;
    float out[T / SIDE][DC] = {}, top[T / SIDE], sum[T / SIDE] = {}, score[T / SIDE][T / SIDE];
    for (int r = 0; r < T / SIDE; r++)
        top[r] = -INFINITY;
    take(s.q, t.q + a.query, a.q_ld, a.count, t.d, t.wide);
    for (int64_t k0 = a.begin; k0 < a.end; k0 += T) {
        take(s.kv, t.k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        __syncthreads();
        products<T, DC>(score, s.q, s.kv, t.d);
        __syncthreads();
        take(s.kv, t.v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        softmax_tile<T, DC>(t, a.p, a.q0, k0, score, top, sum, out, s.p);
        __syncthreads();
        accumulate<false, T, DC>(out, s.p, s.kv);
        __syncthreads();
    }
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int r = 0; r < T / SIDE; r++) {
        int64_t i = ty + SIDE * r;
        if (i >= a.count)
            continue;
        for (int c = 0; c < DC; c++)
            if (tx + SIDE * c < t.d)
                t.o[a.query + i * a.q_ld + tx + SIDE * c] = out[r][c] / sum[r];
        if (t.lse && tx == 0)
            t.lse[(a.p.first + a.q0 + i) * t.heads + a.head] = (float)((double)top[r] + log((double)sum[r]));
    }
}

/* delta[n, h] = dO . O, a warp each. */
__global__ void deltas(float *delta, const float *d_o, const float *o, int64_t count, int d)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    float sum = 0;
    if (row >= count)
        return;
    for (int64_t j = threadIdx.x % WARP; j < d; j += WARP)
        sum += d_o[row * d + j] * o[row * d + j];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0)
        delta[row] = sum;
}

/* Scores become weights P, and dP = dO V^T the scores' gradients dS; both 0 where nothing is seen. `at` is row 0's
 * place in lse and delta. */
template <int T>
__device__ void score_gradients(const struct att_job &t, const struct span &p, int64_t q0, int64_t k0, int64_t at,
                                float (&score)[T / SIDE][T / SIDE], float (&dp)[T / SIDE][T / SIDE])
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    UNROLL
    for (int r = 0; r < T / SIDE; r++) {
        int i = ty + SIDE * r;
        bool there = q0 + i < p.count;
        float lse = there ? t.lse[at + (int64_t)i * t.heads] : 0,
              delta = there ? t.delta[at + (int64_t)i * t.heads] : 0;
        UNROLL
        for (int c = 0; c < T / SIDE; c++) {
            bool seen = sees(t, p, q0 + i, k0 + tx + SIDE * c);
            score[r][c] = seen ? expf(score[r][c] * t.scale - lse) : 0.0f;
            dp[r][c] = seen ? score[r][c] * (dp[r][c] - delta) * t.scale : 0.0f;
        }
    }
}

template <int T> __device__ void put(struct square<T> &to, const float (&x)[T / SIDE][T / SIDE])
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int r = 0; r < T / SIDE; r++)
        for (int c = 0; c < T / SIDE; c++)
            to.at[ty + SIDE * r][tx + SIDE * c] = x[r][c];
}

template <int T, int DC> struct backward_room {
    struct rows<T, DC> q, d_o, k, v;
    struct square<T> ds, p;
};

template <int T, int DC> __global__ void __launch_bounds__(BLOCK) query_gradients(struct att_job t)
{
    typedef backward_room<T, DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, T, &a))
        return;
    float dq[T / SIDE][DC] = {}, score[T / SIDE][T / SIDE], dp[T / SIDE][T / SIDE];
    take(s.q, t.q + a.query, a.q_ld, a.count, t.d, t.wide);
    take(s.d_o, t.d_o + a.query, a.q_ld, a.count, t.d, t.wide);
    for (int64_t k0 = a.begin; k0 < a.end; k0 += T) {
        take(s.k, t.k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        take(s.v, t.v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        __syncthreads();
        products<T, DC>(score, s.q, s.k, t.d);
        products<T, DC>(dp, s.d_o, s.v, t.d);
        score_gradients<T>(t, a.p, a.q0, k0, (a.p.first + a.q0) * t.heads + a.head, score, dp);
        put<T>(s.ds, dp);
        __syncthreads();
        accumulate<false, T, DC>(dq, s.ds, s.k);
        __syncthreads();
    }
    add_rows(t.dq + a.query, a.q_ld, a.count, t.d, dq);
}

template <int T, int DC> __global__ void __launch_bounds__(BLOCK) key_gradients(struct att_job t)
{
    typedef backward_room<T, DC> room;
    SHARED(room, s);
    struct span p;
    int64_t k0, g = blockIdx.y, d = t.d, group = t.heads / t.kv_heads;
    if (!find_tile(t, blockIdx.x, T, true, &p, &k0))
        return;
    int64_t q_ld = t.heads * d, kv_ld = t.kv_heads * d, count = min_of(T, p.keys - k0);
    int64_t key = (p.from + k0) * kv_ld + g * d;
    float dk[T / SIDE][DC] = {}, dv[T / SIDE][DC] = {}, score[T / SIDE][T / SIDE], dp[T / SIDE][T / SIDE];
    take(s.k, t.k + key, kv_ld, count, t.d, t.wide);
    take(s.v, t.v + key, kv_ld, count, t.d, t.wide);
    int64_t begin, last = queries_of(t, p, k0, count, T, &begin);
    for (int64_t head = g * group; head < (g + 1) * group; head++)
        for (int64_t q0 = begin; q0 < last; q0 += T) {
            int64_t query = (p.first + q0) * q_ld + head * d, rows = min_of(T, p.count - q0);
            __syncthreads(); /* the tile before has been read */
            take(s.q, t.q + query, q_ld, rows, t.d, t.wide);
            take(s.d_o, t.d_o + query, q_ld, rows, t.d, t.wide);
            __syncthreads();
            products<T, DC>(score, s.q, s.k, t.d);
            products<T, DC>(dp, s.d_o, s.v, t.d);
            score_gradients<T>(t, p, q0, k0, (p.first + q0) * t.heads + head, score, dp);
            put<T>(s.p, score);
            put<T>(s.ds, dp);
            __syncthreads();
            accumulate<true, T, DC>(dv, s.p, s.d_o);
            accumulate<true, T, DC>(dk, s.ds, s.q);
        }
    if (t.dk)
        add_rows(t.dk + key, kv_ld, count, t.d, dk);
    if (t.dv)
        add_rows(t.dv + key, kv_ld, count, t.d, dv);
}

template <int T, int DC> void run_forward(struct workers *w, const struct attention *a)
{
    struct att_job t = att_job_of(a);
    launch(w, "attention", forward<T, DC>, dim3(most_tiles(a->n, T, t.segments), (unsigned)t.heads), BLOCK,
           sizeof(forward_room<T, DC>), t);
}

template <int T, int DC> void run_backward(struct workers *w, const struct attention *a, const float *delta)
{
    struct att_job t = att_job_of(a);
    size_t room = sizeof(backward_room<T, DC>);
    t.delta = delta;
    if (t.dq)
        launch(w, "attention_bwd", query_gradients<T, DC>, dim3(most_tiles(a->n, T, t.segments), (unsigned)t.heads),
               BLOCK, room, t);
    if (t.dk || t.dv)
        launch(w, "attention_bwd", key_gradients<T, DC>,
               dim3(most_tiles(att_tokens(a), T, t.segments), (unsigned)t.kv_heads), BLOCK, room, t);
}
} // namespace

void gpu_attention(struct workers *w, const struct attention *a)
{
    if (a->bf16 && a->head_dim <= MMA_HEAD_MAX)
        mma_attention(w, a);
    else if (a->head_dim <= 64)
        run_forward<64, 4>(w, a);
    else if (a->head_dim <= 128)
        run_forward<64, 8>(w, a);
    else
        run_forward<32, 16>(w, a);
}

void gpu_attention_bwd(struct workers *w, const struct attention *a)
{
    int64_t rows = a->n * a->heads;
    float *delta = static_cast<float *>(gpu_scratch(w, SCRATCH_CALL, (size_t)rows * sizeof *delta));
    launch(w, "attention_bwd", deltas, gpu_blocks(rows, WARPS), BLOCK, 0, delta, static_cast<const float *>(a->d_o),
           static_cast<const float *>(a->o), rows, a->head_dim);
    if (a->bf16 && a->head_dim <= MMA_HEAD_MAX)
        mma_attention_bwd(w, a, delta);
    else if (a->head_dim <= 64)
        run_backward<64, 4>(w, a, delta);
    else if (a->head_dim <= 128)
        run_backward<64, 8>(w, a, delta);
    else
        run_backward<32, 16>(w, a, delta);
}
