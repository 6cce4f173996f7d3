/* attention_mma: attention on tensor cores, for heads of at most 128 elements (attention.h says what is computed), of
 * arrays in f32 or bf16.
 *
 * Factors are bf16 (f32 queries, keys, values and output gradients are rounded as they enter shared memory; weights and
 * score gradients as they leave registers), sums are f32. A block is four warps and a tile of queries (or keys), 16 M
 * rows a warp, against tiles of TILE of the other side, N of them at a time; DC is how many steps of 16 a head has.
 * Results of two neighbouring products are, packed, the first factor of the next one (mma.h), so weights never leave
 * registers. ldmatrix makes factors of rows in shared memory, and of their transpose. Rows are 16 bytes longer than
 * needed, so that the 16 bytes of eight of them are in 32 banks.
 *
 * The other side's tiles have two places in shared memory: while one is worked on, the next arrives in the other, bf16
 * by cp.async. One barrier a tile says both that it is there and that the one before has been read. Scores become
 * exponents of two. Tiles that all of a warp's rows see are not masked, and those that none sees are passed over.
 * Blocks with the most tiles of a segment begin first, heads of a group beside each other. */
#include "trainer/ops/cuda/attention.h"
#include "trainer/ops/cuda/mma.h"

#include <limits.h>

namespace
{
enum { TILE = 64, STEP = 16, ACROSS = 8, PIECE = 8, MMA_WARPS = 4, MMA_BLOCK = MMA_WARPS * WARP };

#define LOG2E 1.44269504f

/* Rows of up to DC steps of bf16 elements. */
template <int DC, int ROWS> struct half_rows {
    uint16_t at[ROWS][DC * STEP + PIECE];
};

/* This thread's copies have arrived; behind a barrier those of all. */
__device__ inline void wait_copies(void)
{
    copy_commit();
    copy_wait<0>();
}

__device__ inline float power_of_two(float x)
{
#ifdef CUDA_EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

struct lane {
    int row, g, t, l; /* the warp's first row; see above */
};

template <int M> __device__ inline struct lane this_lane(void)
{
    struct lane l;
    l.row = (int)threadIdx.x / WARP * STEP * M;
    l.l = (int)threadIdx.x % WARP;
    l.g = l.l / 4;
    l.t = l.l % 4;
    return l;
}

/* ---- to shared memory ---- */

/* A piece, of which so many elements are there. */
template <class E> __device__ inline void bring_elements(uint16_t *to, const E *from, int there)
{
    unsigned v[4];
    UNROLL
    for (int k = 0; k < 4; k++)
        v[k] = narrow_two(2 * k < there ? value(from[2 * k]) : 0.0f, 2 * k + 1 < there ? value(from[2 * k + 1]) : 0.0f);
    *reinterpret_cast<uint4 *>(to) = { v[0], v[1], v[2], v[3] };
}

__device__ inline void bring(uint16_t *to, const float *from, int there, bool wide)
{
    float x[4] = {}, y[4] = {};
    if (!wide) {
        bring_elements(to, from, there);
        return;
    }
    if (there > 0) {
        load<4>(x, from);
        load<4>(y, from + 4);
    }
    *reinterpret_cast<uint4 *>(to) = { narrow_two(x[0], x[1]), narrow_two(x[2], x[3]), narrow_two(y[0], y[1]),
                                       narrow_two(y[2], y[3]) };
}

__device__ inline void bring(uint16_t *to, const uint16_t *from, int there, bool wide)
{
    if (wide)
        copy_async(to, from, there > 0 ? 16 : 0);
    else
        bring_elements(to, from, there);
}

/* Rows [0, count) of src, `ld` apart; zeros behind them and behind their d columns. A thread takes the same piece of
 * each of its rows. */
template <int DC, int ROWS, class E>
__device__ inline void take(struct half_rows<DC, ROWS> &to, const E *src, int64_t ld, int count, int d, bool wide)
{
    enum { PIECES = DC * STEP / PIECE, APART = MMA_BLOCK / PIECES };
    int first = (int)threadIdx.x / PIECES, j = (int)threadIdx.x % PIECES * PIECE, rows = least(ROWS, count);
    src += first * ld + j;
    UNROLL
    for (int i = 0; i < ROWS; i += APART, src += APART * ld)
        bring(&to.at[first + i][j], src, first + i < rows ? d - j : 0, wide);
}

/* ---- products ---- */

/* First factors of the warp's rows: KEPT in registers, or read each time. */
template <bool KEPT, int M, int DC, int ROWS> struct own_rows {
    const struct half_rows<DC, ROWS> *rows;
    struct first_factor kept[KEPT ? M : 1][KEPT ? DC : 1];
};

template <int M, int DC, int ROWS>
__device__ inline struct first_factor factor_of(const struct half_rows<DC, ROWS> &rows, int m, int k)
{
    struct first_factor x;
    struct lane l = this_lane<M>();
    load_matrices<false>(x.v, &rows.at[l.row + m * STEP + l.l % STEP][k * STEP + l.l / STEP * PIECE]);
    return x;
}

template <bool KEPT, int M, int DC, int ROWS>
__device__ inline struct own_rows<KEPT, M, DC, ROWS> own_rows_of(const struct half_rows<DC, ROWS> &rows) {
    struct own_rows<KEPT, M, DC, ROWS> a;
    a.rows = &rows;
    UNROLL
    for (int m = 0; KEPT && m < M; m++)
        UNROLL
    for (int k = 0; k < DC; k++)
        a.kept[KEPT ? m : 0][KEPT ? k : 0] = factor_of<M>(rows, m, k);
    return a;
}

/* score = the warp's rows a times rows [first, first + N) of b. */
template <int M, int N, int DC, int ROWS, bool KEPT>
__device__ inline void products(float (&score)[M][N / ACROSS][4], const struct own_rows<KEPT, M, DC, ROWS> &a,
                                const struct half_rows<DC, TILE> &b, int first)
{
    int l = (int)threadIdx.x % WARP;
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int n = 0; n < N / ACROSS; n++)
        UNROLL
    for (int k = 0; k < 4; k++)
        score[m][n][k] = 0;
    UNROLL
    for (int k = 0; k < DC; k++) {
        struct first_factor x[M];
        UNROLL
        for (int m = 0; m < M; m++)
            x[m] = KEPT ? a.kept[KEPT ? m : 0][KEPT ? k : 0] : factor_of<M>(*a.rows, m, k);
        UNROLL
        for (int n = 0; n < N; n += STEP) {
            unsigned y[4];
            load_matrices<false>(y, &b.at[first + n + l / STEP * 8 + l % 8][k * STEP + l / 8 % 2 * PIECE]);
            UNROLL
            for (int m = 0; m < M; m++) {
                mma(score[m][n / ACROSS], x[m], y[0], y[1]);
                mma(score[m][n / ACROSS + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* out += w times rows [first, first + N) of b: w the warp's rows against these. */
template <int M, int N, int DC>
__device__ inline void accumulate(float (&out)[M][DC * 2][4], const float (&w)[M][N / ACROSS][4],
                                  const struct half_rows<DC, TILE> &b, int first)
{
    int l = (int)threadIdx.x % WARP;
    UNROLL
    for (int k = 0; k < N / STEP; k++) {
        struct first_factor x[M];
        UNROLL
        for (int m = 0; m < M; m++) {
            x[m].v[0] = narrow_two(w[m][2 * k][0], w[m][2 * k][1]);
            x[m].v[1] = narrow_two(w[m][2 * k][2], w[m][2 * k][3]);
            x[m].v[2] = narrow_two(w[m][2 * k + 1][0], w[m][2 * k + 1][1]);
            x[m].v[3] = narrow_two(w[m][2 * k + 1][2], w[m][2 * k + 1][3]);
        }
        UNROLL
        for (int n = 0; n < DC; n++) {
            unsigned y[4];
            load_matrices<true>(y, &b.at[first + k * STEP + l % STEP][n * STEP + l / STEP * PIECE]);
            UNROLL
            for (int m = 0; m < M; m++) {
                mma(out[m][2 * n], x[m], y[0], y[1]);
                mma(out[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

/* ---- who sees whom ---- */

/* Of the other side, [from, to) that some of the warp's rows see, and that all of them do: what a row sees ascends with
 * the row. */
struct warp_sees {
    int any_from, any_to, all_from, all_to;
};

template <bool KEYS, int M>
__device__ inline struct warp_sees what_is_seen(const struct att_job &t, const struct span &p, int first, int count)
{
    struct lane l = this_lane<M>();
    struct warp_sees s = {};
    if (l.row >= count)
        return s;
    int top = first + l.row, bottom = first + least(l.row + M * STEP, count) - 1;
    struct range of_top = KEYS ? queries_that_see(t, p, top) : keys_seen_by(t, p, top);
    struct range of_bottom = KEYS ? queries_that_see(t, p, bottom) : keys_seen_by(t, p, bottom);
    s.any_from = of_top.from;
    s.any_to = of_bottom.to;
    s.all_from = of_bottom.from;
    s.all_to = of_top.to;
    return s;
}

/* Scores that are not seen become -inf: of the lane's rows, which begin with the tile's row 0, number `first`, and of
 * columns `start` on; rows are keys and columns queries, or the other way round. A query sees a key that is less than
 * `window` before its own. */
template <bool KEYS, int M, int N>
__device__ inline void hide(float (&score)[M][N / ACROSS][4], const struct warp_sees &s, const struct att_job &t,
                            const struct span &p, int first, int start)
{
    if (start >= s.all_from && start + N <= s.all_to)
        return;
    struct lane l = this_lane<M>();
    unsigned window = t.window ? (unsigned)min_of(t.window, INT_MAX) : INT_MAX;
    int row = first + l.row + l.g, column = start + 2 * l.t, step = p.step, past = p.past;
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int n = 0; n < N / ACROSS; n++)
        UNROLL
    for (int k = 0; k < 4; k++) {
        int i = row + m * STEP + k / 2 * 8, j = column + n * ACROSS + k % 2;
        int before = past + (KEYS ? j : i) * step - (KEYS ? i : j);
        if ((unsigned)before >= window)
            score[m][n][k] = -INFINITY;
    }
}

/* ---- from registers to memory ---- */

/* The warp's rows of out, narrowed, to its rows of `room`, and from there in whole pieces to rows [0, count) of `to`.
 */
template <int M, int DC, int ROWS>
__device__ inline void put_pieces(uint16_t *to, int64_t ld, int count, int d, const float (&out)[M][DC * 2][4],
                                  struct half_rows<DC, ROWS> &room)
{
    struct lane l = this_lane<M>();
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int n = 0; n < DC * 2; n++)
        UNROLL
    for (int r = 0; r < 2; r++)
        reinterpret_cast<unsigned *>(room.at[l.row + m * STEP + 8 * r + l.g])[n * ACROSS / 2 + l.t] =
            narrow_two(out[m][n][2 * r], out[m][n][2 * r + 1]);
    __syncwarp();
    for (int e = l.l; e < M * STEP * DC * STEP / PIECE; e += WARP) {
        int i = l.row + e / (DC * STEP / PIECE), j = e % (DC * STEP / PIECE) * PIECE;
        if (i < count && j < d)
            *reinterpret_cast<uint4 *>(to + i * ld + j) = *reinterpret_cast<const uint4 *>(room.at[i] + j);
    }
}

template <int M, int DC, int ROWS>
__device__ inline void put_pieces(float *, int64_t, int, int, const float (&)[M][DC * 2][4],
                                  struct half_rows<DC, ROWS> &)
{
}

/* The warp's rows of out go to rows [0, count) of `to`, or are added to them. room: the block's own rows, that no one
 * reads any more. */
template <int M, int DC, int ROWS, class E>
__device__ inline void put_rows(E *to, int64_t ld, int count, const struct att_job &t, const float (&out)[M][DC * 2][4],
                                bool fresh, struct half_rows<DC, ROWS> &room)
{
    struct lane l = this_lane<M>();
    if (sizeof(E) == sizeof(uint16_t) && fresh && t.wide) {
        put_pieces<M>(to, ld, count, t.d, out, room);
        return;
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int r = 0; r < 2; r++) {
        int i = l.row + m * STEP + 8 * r + l.g;
        E *row = to + i * ld + 2 * l.t;
        UNROLL
        for (int n = 0; n < DC * 2; n++)
            UNROLL
        for (int c = 0; c < 2; c++)
            if (i < count && n * ACROSS + 2 * l.t + c < t.d)
                put(row + n * ACROSS + c, out[m][n][2 * r + c], fresh);
    }
}

/* ---- forward ---- */

/* Of the four lanes that share a row. */
__device__ inline float row_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float row_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* Scores become weights; the maxima of the lane's rows, its own part of their sums, and the output are brought up to
 * date. scale: of scores, as powers of two. */
template <int M, int N, int DC>
__device__ inline void softmax_tile(float scale, float (&score)[M][N / ACROSS][4], float (&top)[M][2],
                                    float (&sum)[M][2], float (&out)[M][DC * 2][4])
{
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int r = 0; r < 2; r++) {
        float most = top[m][r], all = 0;
        UNROLL
        for (int n = 0; n < N / ACROSS; n++)
            most = fmaxf(most, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
        most = row_max(most);
        float base = most == -INFINITY ? 0.0f : most * scale; /* the row has seen nothing yet */
        float shrink = power_of_two(fmaf(top[m][r], scale, -base));
        UNROLL
        for (int n = 0; n < N / ACROSS; n++)
            UNROLL
        for (int c = 2 * r; c < 2 * r + 2; c++) {
            score[m][n][c] = power_of_two(fmaf(score[m][n][c], scale, -base));
            all += score[m][n][c];
        }
        sum[m][r] = fmaf(sum[m][r], shrink, all);
        top[m][r] = most;
        if (!__ballot_sync(0xffffffffu, shrink < 1))
            continue; /* no row of the warp's has a new maximum */
        UNROLL
        for (int n = 0; n < DC * 2; n++) {
            out[m][n][2 * r] *= shrink;
            out[m][n][2 * r + 1] *= shrink;
        }
    }
}

/* out / sum, and log(sum of exponentials). */
template <int M, int DC>
__device__ inline void finish_rows(const struct att_job &t, const struct query_tile &a, const float (&top)[M][2],
                                   const float (&sum)[M][2], float (&out)[M][DC * 2][4])
{
    struct lane l = this_lane<M>();
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int r = 0; r < 2; r++) {
        int i = l.row + m * STEP + 8 * r + l.g;
        float all = row_sum(sum[m][r]), shrink = 1 / all;
        UNROLL
        for (int n = 0; n < DC * 2; n++) {
            out[m][n][2 * r] *= shrink;
            out[m][n][2 * r + 1] *= shrink;
        }
        if (t.lse && l.t == 0 && i < a.count)
            t.lse[(int64_t)(a.p.first + a.q0 + i) * t.heads + a.head] = fmaf(top[m][r], t.scale, logf(all));
    }
}

/* A block's tile of queries and head. Later queries see more. */
__device__ inline bool own_queries(const struct att_job &t, int tile, struct query_tile *a)
{
    int index = (int)blockIdx.x, tiles = (int)gridDim.x / t.heads;
    return find_query_tile(t, tiles - 1 - index / t.heads, index % t.heads, tile, a);
}

/* Heads of 64 leave room in registers for queries, and for more scores. */
template <int DC> struct forward_shape {
    enum { M = 2, N = DC <= 4 ? 64 : 32, ROWS = MMA_WARPS * M * STEP, KEPT = DC <= 4 };
};

template <int DC> struct forward_room {
    struct half_rows<DC, forward_shape<DC>::ROWS> q;
    struct half_rows<DC, TILE> k[2], v[2];
};

/* A tile of keys and of values from key k0 on. */
template <class E, int DC>
__device__ inline void take_keys(struct half_rows<DC, TILE> &k, struct half_rows<DC, TILE> &v, const struct att_job &t,
                                 const struct query_tile &a, int k0)
{
    int64_t at = a.key + k0 * a.kv_ld;
    take(k, static_cast<const E *>(t.k) + at, a.kv_ld, a.end - k0, t.d, t.wide);
    take(v, static_cast<const E *>(t.v) + at, a.kv_ld, a.end - k0, t.d, t.wide);
}

template <class E, int DC> __global__ void __launch_bounds__(MMA_BLOCK) forward(struct att_job t)
{
    typedef forward_shape<DC> shape;
    enum { M = shape::M, N = shape::N, ROWS = shape::ROWS, KEPT = shape::KEPT };
    typedef forward_room<DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!own_queries(t, ROWS, &a))
        return;
    float out[M][DC * 2][4] = {}, top[M][2], sum[M][2] = {}, score[M][N / ACROSS][4];
    struct warp_sees sees = what_is_seen<false, M>(t, a.p, a.q0, a.count);
    UNROLL
    for (int i = 0; i < 2 * M; i++)
        top[i / 2][i % 2] = -INFINITY;
    take(s.q, static_cast<const E *>(t.q) + a.query, a.q_ld, a.count, t.d, t.wide);
    take_keys<E>(s.k[0], s.v[0], t, a, a.begin);
    wait_copies();
    __syncthreads();
    struct own_rows<KEPT, M, DC, ROWS> q = own_rows_of<KEPT, M>(s.q);
    for (int k0 = a.begin, at = 0; k0 < a.end; k0 += TILE, at = !at) {
        if (k0 + TILE < a.end)
            take_keys<E>(s.k[!at], s.v[!at], t, a, k0 + TILE);
        for (int j = 0; j < TILE; j += N) {
            if (k0 + j >= sees.any_to || k0 + j + N <= sees.any_from)
                continue;
            products<M, N>(score, q, s.k[at], j);
            hide<false, M, N>(score, sees, t, a.p, a.q0, k0 + j);
            softmax_tile<M, N, DC>(t.scale * LOG2E, score, top, sum, out);
            accumulate<M, N>(out, score, s.v[at], j);
        }
        wait_copies();
        __syncthreads();
    }
    finish_rows<M, DC>(t, a, top, sum, out);
    put_rows<M>(static_cast<E *>(t.o) + a.query, a.q_ld, a.count, t, out, true, s.q);
}

/* ---- backward ---- */

/* A weight from its score, and the score's gradient, but for `scale`, from the weight's. lse: as a power of two. */
__device__ inline void score_gradient(float &score, float &dp, float scale, float lse, float delta)
{
    score = power_of_two(fmaf(score, scale, -lse));
    dp = score * (dp - delta);
}

template <int M, int COLUMNS> __device__ inline void multiply(float (&out)[M][COLUMNS][4], float by)
{
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int n = 0; n < COLUMNS; n++)
        UNROLL
    for (int k = 0; k < 4; k++)
        out[m][n][k] *= by;
}

/* Of either kernel: N so that sums, scores and what is kept fit into registers. */
template <int DC> struct backward_shape {
    enum { M = DC <= 4 ? 2 : 1, N = DC <= 4 ? 32 : 64, ROWS = MMA_WARPS * M * STEP };
};

template <int DC> struct query_side {
    struct half_rows<DC, backward_shape<DC>::ROWS> q, d_o;
    struct half_rows<DC, TILE> k[2], v[2];
};

/* lse as a power of two, and delta, of the lane's rows. */
template <int M>
__device__ inline void take_sums(float (&lse)[M][2], float (&delta)[M][2], const struct att_job &t,
                                 const struct query_tile &a)
{
    struct lane l = this_lane<M>();
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
    for (int r = 0; r < 2; r++) {
        int i = l.row + m * STEP + 8 * r + l.g;
        int64_t at = (int64_t)(a.p.first + a.q0 + i) * t.heads + a.head;
        lse[m][r] = i < a.count ? t.lse[at] * LOG2E : 0.0f;
        delta[m][r] = i < a.count ? t.delta[at] : 0.0f;
    }
}

template <class E, int DC> __global__ void __launch_bounds__(MMA_BLOCK) query_gradients(struct att_job t)
{
    enum { M = backward_shape<DC>::M, N = backward_shape<DC>::N, ROWS = backward_shape<DC>::ROWS };
    typedef query_side<DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!own_queries(t, ROWS, &a)) {
        clear_queries<E>(t, a, ROWS);
        return;
    }
    float dq[M][DC * 2][4] = {}, score[M][N / ACROSS][4], dp[M][N / ACROSS][4], lse[M][2], delta[M][2];
    struct warp_sees sees = what_is_seen<false, M>(t, a.p, a.q0, a.count);
    take_sums<M>(lse, delta, t, a);
    take(s.q, static_cast<const E *>(t.q) + a.query, a.q_ld, a.count, t.d, t.wide);
    take(s.d_o, static_cast<const E *>(t.d_o) + a.query, a.q_ld, a.count, t.d, t.wide);
    take_keys<E>(s.k[0], s.v[0], t, a, a.begin);
    wait_copies();
    __syncthreads();
    struct own_rows<true, M, DC, ROWS> q = own_rows_of<true, M>(s.q);
    struct own_rows<M == 1, M, DC, ROWS> d_o = own_rows_of<M == 1, M>(s.d_o);
    for (int k0 = a.begin, at = 0; k0 < a.end; k0 += TILE, at = !at) {
        if (k0 + TILE < a.end)
            take_keys<E>(s.k[!at], s.v[!at], t, a, k0 + TILE);
        for (int j = 0; j < TILE; j += N) {
            if (k0 + j >= sees.any_to || k0 + j + N <= sees.any_from)
                continue;
            products<M, N>(score, q, s.k[at], j);
            products<M, N>(dp, d_o, s.v[at], j);
            hide<false, M, N>(score, sees, t, a.p, a.q0, k0 + j);
            UNROLL
            for (int m = 0; m < M; m++)
                UNROLL
            for (int n = 0; n < N / ACROSS; n++)
                UNROLL
            for (int k = 0; k < 4; k++)
                score_gradient(score[m][n][k], dp[m][n][k], t.scale * LOG2E, lse[m][k / 2], delta[m][k / 2]);
            accumulate<M, N>(dq, dp, s.k[at], j);
        }
        wait_copies();
        __syncthreads();
    }
    multiply(dq, t.scale);
    put_rows<M>(static_cast<E *>(t.dq) + a.query, a.q_ld, a.count, t, dq, t.fresh, s.q);
}

template <int DC> struct key_side {
    struct half_rows<DC, backward_shape<DC>::ROWS> k, v;
    struct half_rows<DC, TILE> q[2], d_o[2];
    float lse[2][TILE], delta[2][TILE];
};

/* A tile of queries of a head, with what backward needs of them besides their rows; zeros where there is none. */
template <class E, int DC>
__device__ inline void take_queries(struct key_side<DC> &s, int to, const struct att_job &t, const struct key_tile &a,
                                    int head, int q0)
{
    int64_t first = a.p.first + q0, at = first * a.q_ld + head * t.d;
    int rows = a.p.count - q0;
    take(s.q[to], static_cast<const E *>(t.q) + at, a.q_ld, rows, t.d, t.wide);
    take(s.d_o[to], static_cast<const E *>(t.d_o) + at, a.q_ld, rows, t.d, t.wide);
    int i = (int)threadIdx.x % TILE;
    int64_t from = (first + i) * t.heads + head;
    if (threadIdx.x < TILE)
        copy_async<4>(&s.lse[to][i], t.lse + from, i < rows ? 4 : 0);
    else
        copy_async<4>(&s.delta[to][i], t.delta + from, i < rows ? 4 : 0);
}

template <class E, int DC> __global__ void __launch_bounds__(MMA_BLOCK) key_gradients(struct att_job t)
{
    enum { M = backward_shape<DC>::M, ROWS = backward_shape<DC>::ROWS };
    enum {
        N = sizeof(E) == sizeof(uint16_t) ? backward_shape<DC>::N : backward_shape<DC>::N / 2
    }; /* f32 passes registers */
    static_assert((int)MMA_BLOCK == 2 * TILE, "take_queries: a thread for each lse and delta");
    typedef key_side<DC> room;
    SHARED(room, s);
    struct key_tile a;
    int g = (int)blockIdx.x % t.kv_heads, group = t.heads / t.kv_heads;
    if (!find_key_tile(t, (int)blockIdx.x / t.kv_heads, g, ROWS, &a)) { /* earlier keys are seen by more */
        clear_keys<E>(t, a, g, ROWS);
        return;
    }
    float dk[M][DC * 2][4] = {}, dv[M][DC * 2][4] = {}, score[M][N / ACROSS][4], dp[M][N / ACROSS][4];
    struct warp_sees sees = what_is_seen<true, M>(t, a.p, a.k0, a.count);
    int begin = a.seen.from, end = a.seen.to, head = g * group, q0 = begin;
    take(s.k, static_cast<const E *>(t.k) + a.key, a.kv_ld, a.count, t.d, t.wide);
    take(s.v, static_cast<const E *>(t.v) + a.key, a.kv_ld, a.count, t.d, t.wide);
    if (begin < end)
        take_queries<E>(s, 0, t, a, head, begin);
    wait_copies();
    __syncthreads();
    struct own_rows<false, M, DC, ROWS> keys = own_rows_of<false, M>(s.k), values = own_rows_of<false, M>(s.v);
    for (int at = 0; begin < end && head < (g + 1) * group; at = !at) {
        int next_q0 = q0 + TILE < end ? q0 + TILE : begin, next_head = next_q0 == begin ? head + 1 : head;
        if (next_head < (g + 1) * group)
            take_queries<E>(s, !at, t, a, next_head, next_q0);
        for (int j = 0; j < TILE; j += N) {
            if (q0 + j >= sees.any_to || q0 + j + N <= sees.any_from)
                continue;
            products<M, N>(score, keys, s.q[at], j);
            products<M, N>(dp, values, s.d_o[at], j);
            hide<true, M, N>(score, sees, t, a.p, a.k0, q0 + j);
            UNROLL
            for (int n = 0; n < N / ACROSS; n++)
                UNROLL
            for (int k = 0; k < 4; k++) {
                int of = j + n * ACROSS + 2 * ((int)threadIdx.x % 4) + k % 2;
                UNROLL
                for (int m = 0; m < M; m++)
                    score_gradient(score[m][n][k], dp[m][n][k], t.scale * LOG2E, s.lse[at][of] * LOG2E,
                                   s.delta[at][of]);
            }
            accumulate<M, N>(dv, score, s.d_o[at], j);
            accumulate<M, N>(dk, dp, s.q[at], j);
        }
        wait_copies();
        __syncthreads();
        q0 = next_q0;
        head = next_head;
    }
    multiply(dk, t.scale);
    if (t.dk)
        put_rows<M>(static_cast<E *>(t.dk) + a.key, a.kv_ld, a.count, t, dk, t.fresh, s.k);
    if (t.dv)
        put_rows<M>(static_cast<E *>(t.dv) + a.key, a.kv_ld, a.count, t, dv, t.fresh, s.v);
}

/* ---- launches ---- */

struct att_job job_of(const struct attention *a, const float *delta)
{
    struct att_job t = att_job_of(a);
    t.wide = whole_pieces(a, PIECE);
    t.delta = delta;
    return t;
}

template <class E, int DC> void run_forward(struct workers *w, const struct attention *a)
{
    struct att_job t = job_of(a, NULL);
    launch(w, "attention", forward<E, DC>,
           dim3(most_tiles(a->n, forward_shape<DC>::ROWS, t.segments) * (unsigned)t.heads), MMA_BLOCK,
           sizeof(forward_room<DC>), t);
}

template <class E, int DC> void run_backward(struct workers *w, const struct attention *a, const float *delta)
{
    enum { ROWS = backward_shape<DC>::ROWS };
    struct att_job t = job_of(a, delta);
    if (t.dq)
        launch(w, "attention_bwd", query_gradients<E, DC>, dim3(most_tiles(a->n, ROWS, t.segments) * (unsigned)t.heads),
               MMA_BLOCK, sizeof(query_side<DC>), t);
    if (t.dk || t.dv)
        launch(w, "attention_bwd", key_gradients<E, DC>,
               dim3(most_tiles(att_tokens(a), ROWS, t.segments) * (unsigned)t.kv_heads), MMA_BLOCK,
               sizeof(key_side<DC>), t);
}
} // namespace

void mma_attention(struct workers *w, const struct attention *a)
{
    if (a->low)
        a->head_dim <= 64 ? run_forward<uint16_t, 4>(w, a) : run_forward<uint16_t, 8>(w, a);
    else
        a->head_dim <= 64 ? run_forward<float, 4>(w, a) : run_forward<float, 8>(w, a);
}

void mma_attention_bwd(struct workers *w, const struct attention *a, const float *delta)
{
    if (a->low)
        a->head_dim <= 64 ? run_backward<uint16_t, 4>(w, a, delta) : run_backward<uint16_t, 8>(w, a, delta);
    else
        a->head_dim <= 64 ? run_backward<float, 4>(w, a, delta) : run_backward<float, 8>(w, a, delta);
}
