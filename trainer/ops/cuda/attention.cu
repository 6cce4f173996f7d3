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
template <int T, int DC, class E>
__device__ void take(struct rows<T, DC> &to, const E *src, int64_t ld, int64_t count, int d, bool wide)
{
    for (int e = (int)threadIdx.x; e < T * SIDE * DC / 4; e += BLOCK) {
        int i = e / (SIDE * DC / 4), j = e % (SIDE * DC / 4) * 4;
        float v[4] = {};
        if (i < count && wide && j < d)
            load<4>(v, reinterpret_cast<const float *>(src) + i * ld + j);
        for (int k = 0; k < 4 && !wide && i < count; k++)
            if (j + k < d)
                v[k] = value(src[i * ld + j + k]);
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

/* out to `to`, or added to it, where there is such a row and column. */
template <int R, int DC, class E>
__device__ void put_rows(E *to, int64_t ld, int64_t count, int d, const float (&out)[R][DC], bool fresh)
{
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < DC; c++)
            if (ty + SIDE * r < count && tx + SIDE * c < d)
                put(&to[(ty + SIDE * r) * ld + tx + SIDE * c], out[r][c], fresh);
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
__device__ void softmax_tile(const struct att_job &t, const struct span &p, int q0, int k0,
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

template <class E, int T, int DC> __global__ void __launch_bounds__(BLOCK) forward(struct att_job t)
{
    typedef forward_room<T, DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, (int)blockIdx.x, (int)blockIdx.y, T, &a))
        return;
    const E *q = static_cast<const E *>(t.q), *k = static_cast<const E *>(t.k), *v = static_cast<const E *>(t.v);
    E *o = static_cast<E *>(t.o);
    float out[T / SIDE][DC] = {}, top[T / SIDE], sum[T / SIDE] = {}, score[T / SIDE][T / SIDE];
    for (int r = 0; r < T / SIDE; r++)
        top[r] = -INFINITY;
    take(s.q, q + a.query, a.q_ld, a.count, t.d, t.wide);
    for (int k0 = a.begin; k0 < a.end; k0 += T) {
        take(s.kv, k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        __syncthreads();
        products<T, DC>(score, s.q, s.kv, t.d);
        __syncthreads();
        take(s.kv, v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        softmax_tile<T, DC>(t, a.p, a.q0, k0, score, top, sum, out, s.p);
        __syncthreads();
        accumulate<false, T, DC>(out, s.p, s.kv);
        __syncthreads();
    }
    int tx = (int)threadIdx.x % SIDE, ty = (int)threadIdx.x / SIDE;
    for (int r = 0; r < T / SIDE; r++) {
        int i = ty + SIDE * r;
        if (i >= a.count)
            continue;
        for (int c = 0; c < DC; c++)
            if (tx + SIDE * c < t.d)
                put(&o[a.query + i * a.q_ld + tx + SIDE * c], out[r][c] / sum[r], true);
        if (t.lse && tx == 0)
            t.lse[(int64_t)(a.p.first + a.q0 + i) * t.heads + a.head] = (float)((double)top[r] + log((double)sum[r]));
    }
}

enum { LANES = 8 };

/* delta[n, h] = dO . O. Eight lanes have a row, W elements at a time. */
template <class E, int W> __global__ void deltas(float *delta, const E *d_o, const E *o, int64_t count, int d)
{
    int64_t row = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) / LANES, at = (row < count ? row : 0) * d;
    float sum = 0, x[W], y[W];
    for (int j = (int)threadIdx.x % LANES * W; j < d; j += LANES * W) {
        piece(x, d_o + at + j);
        piece(y, o + at + j);
        UNROLL
        for (int k = 0; k < W; k++)
            sum += x[k] * y[k];
    }
    for (int step = LANES / 2; step; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (row < count && threadIdx.x % LANES == 0)
        delta[row] = sum;
}

/* Scores become weights P, and dP = dO V^T the scores' gradients dS; both 0 where nothing is seen. `at` is row 0's
 * place in lse and delta. */
template <int T>
__device__ void score_gradients(const struct att_job &t, const struct span &p, int q0, int k0, int64_t at,
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

template <class E, int T, int DC> __global__ void __launch_bounds__(BLOCK) query_gradients(struct att_job t)
{
    typedef backward_room<T, DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, (int)blockIdx.x, (int)blockIdx.y, T, &a)) {
        clear_queries<E>(t, a, T);
        return;
    }
    const E *q = static_cast<const E *>(t.q), *k = static_cast<const E *>(t.k), *v = static_cast<const E *>(t.v);
    float dq[T / SIDE][DC] = {}, score[T / SIDE][T / SIDE], dp[T / SIDE][T / SIDE];
    take(s.q, q + a.query, a.q_ld, a.count, t.d, t.wide);
    take(s.d_o, static_cast<const E *>(t.d_o) + a.query, a.q_ld, a.count, t.d, t.wide);
    for (int k0 = a.begin; k0 < a.end; k0 += T) {
        take(s.k, k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        take(s.v, v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(T, a.end - k0), t.d, t.wide);
        __syncthreads();
        products<T, DC>(score, s.q, s.k, t.d);
        products<T, DC>(dp, s.d_o, s.v, t.d);
        score_gradients<T>(t, a.p, a.q0, k0, (int64_t)(a.p.first + a.q0) * t.heads + a.head, score, dp);
        put<T>(s.ds, dp);
        __syncthreads();
        accumulate<false, T, DC>(dq, s.ds, s.k);
        __syncthreads();
    }
    put_rows(static_cast<E *>(t.dq) + a.query, a.q_ld, a.count, t.d, dq, t.fresh);
}

template <class E, int T, int DC> __global__ void __launch_bounds__(BLOCK) key_gradients(struct att_job t)
{
    typedef backward_room<T, DC> room;
    SHARED(room, s);
    struct key_tile a;
    int g = (int)blockIdx.y, group = t.heads / t.kv_heads;
    if (!find_key_tile(t, (int)blockIdx.x, g, T, &a)) {
        clear_keys<E>(t, a, g, T);
        return;
    }
    const E *q = static_cast<const E *>(t.q), *d_o = static_cast<const E *>(t.d_o);
    float dk[T / SIDE][DC] = {}, dv[T / SIDE][DC] = {}, score[T / SIDE][T / SIDE], dp[T / SIDE][T / SIDE];
    take(s.k, static_cast<const E *>(t.k) + a.key, a.kv_ld, a.count, t.d, t.wide);
    take(s.v, static_cast<const E *>(t.v) + a.key, a.kv_ld, a.count, t.d, t.wide);
    for (int64_t head = g * group; head < (g + 1) * group; head++)
        for (int q0 = a.seen.from; q0 < a.seen.to; q0 += T) {
            int64_t first = a.p.first + q0, query = first * a.q_ld + head * t.d, rows = min_of(T, a.p.count - q0);
            __syncthreads(); /* the tile before has been read */
            take(s.q, q + query, a.q_ld, rows, t.d, t.wide);
            take(s.d_o, d_o + query, a.q_ld, rows, t.d, t.wide);
            __syncthreads();
            products<T, DC>(score, s.q, s.k, t.d);
            products<T, DC>(dp, s.d_o, s.v, t.d);
            score_gradients<T>(t, a.p, q0, a.k0, first * t.heads + head, score, dp);
            put<T>(s.p, score);
            put<T>(s.ds, dp);
            __syncthreads();
            accumulate<true, T, DC>(dv, s.p, s.d_o);
            accumulate<true, T, DC>(dk, s.ds, s.q);
        }
    if (t.dk)
        put_rows(static_cast<E *>(t.dk) + a.key, a.kv_ld, a.count, t.d, dk, t.fresh);
    if (t.dv)
        put_rows(static_cast<E *>(t.dv) + a.key, a.kv_ld, a.count, t.d, dv, t.fresh);
}

template <class E> struct att_job job_of(const struct attention *a)
{
    struct att_job t = att_job_of(a);
    t.wide = sizeof(E) == sizeof(float) && whole_pieces(a, 4);
    return t;
}

template <class E, int T, int DC> void run_forward(struct workers *w, const struct attention *a)
{
    struct att_job t = job_of<E>(a);
    launch(w, "attention", forward<E, T, DC>, dim3(most_tiles(a->n, T, t.segments), (unsigned)t.heads), BLOCK,
           sizeof(forward_room<T, DC>), t);
}

template <class E, int T, int DC> void run_backward(struct workers *w, const struct attention *a, const float *delta)
{
    struct att_job t = job_of<E>(a);
    size_t room = sizeof(backward_room<T, DC>);
    t.delta = delta;
    if (t.dq)
        launch(w, "attention_bwd", query_gradients<E, T, DC>, dim3(most_tiles(a->n, T, t.segments), (unsigned)t.heads),
               BLOCK, room, t);
    if (t.dk || t.dv)
        launch(w, "attention_bwd", key_gradients<E, T, DC>,
               dim3(most_tiles(att_tokens(a), T, t.segments), (unsigned)t.kv_heads), BLOCK, room, t);
}

/* PIECE elements are 16 bytes. */
template <class E, int PIECE> void run_deltas(struct workers *w, const struct attention *a, float *delta, int64_t rows)
{
    launch(w, "attention_bwd", whole_pieces(a, PIECE) ? deltas<E, PIECE> : deltas<E, 1>,
           gpu_blocks(rows, BLOCK / LANES), BLOCK, 0, delta, static_cast<const E *>(a->d_o),
           static_cast<const E *>(a->o), rows, a->head_dim);
}
} // namespace

void gpu_attention(struct workers *w, const struct attention *a)
{
    if ((a->bf16 || a->low) && a->head_dim <= MMA_HEAD_MAX)
        mma_attention(w, a);
    else if (a->head_dim <= 64)
        run_forward<float, 64, 4>(w, a);
    else if (a->head_dim <= 128)
        run_forward<float, 64, 8>(w, a);
    else if (!a->low)
        run_forward<float, 32, 16>(w, a);
    else
        run_forward<uint16_t, 32, 16>(w, a);
}

void gpu_attention_bwd(struct workers *w, const struct attention *a)
{
    int64_t rows = a->n * a->heads;
    float *delta = static_cast<float *>(gpu_scratch(w, SCRATCH_CALL, (size_t)rows * sizeof *delta));
    if (a->low)
        run_deltas<uint16_t, 8>(w, a, delta, rows);
    else
        run_deltas<float, 4>(w, a, delta, rows);
    if ((a->bf16 || a->low) && a->head_dim <= MMA_HEAD_MAX)
        mma_attention_bwd(w, a, delta);
    else if (a->head_dim <= 64)
        run_backward<float, 64, 4>(w, a, delta);
    else if (a->head_dim <= 128)
        run_backward<float, 64, 8>(w, a, delta);
    else if (!a->low)
        run_backward<float, 32, 16>(w, a, delta);
    else
        run_backward<uint16_t, 32, 16>(w, a, delta);
}
