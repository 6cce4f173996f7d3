/* attention_mma: attention on tensor cores, for heads of at most 128 elements (attention.h says what is computed).
 *
 * Factors are rounded to bf16 (queries, keys, values, output gradients as they enter shared memory; weights and score
 * gradients as they leave registers), sums are f32. A block is four warps and a tile of 64 queries (or keys), 16 rows a
 * warp, against tiles of 64 of the other side; one instruction multiplies 16 x 16 by 16 x 8. Its lane l = 4 g + t holds
 * of a first factor rows g and g + 8, columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; of a second factor column g and these as
 * rows; of a result rows g and g + 8, columns 2 t and 2 t + 1 (PTX ISA, mma.m16n8k16). So results of two neighbouring
 * products are, packed, the first factor of the next one: weights never leave registers. A second factor is read from
 * its transpose, two values at a time: what is multiplied both ways is in shared memory both ways. Rows are 8 elements
 * longer than needed, so that the lanes of a warp read 32 banks. */
#include "trainer/ops/cuda/attention.h"
#include "trainer/ops/cuda/mma.h"

namespace
{
enum { TILE = 64, STEP = 16, ACROSS = 8, MMA_WARPS = TILE / STEP, MMA_BLOCK = MMA_WARPS * WARP, PAD = 8 };
enum { PIECES = TILE / ACROSS }; /* results of a warp's rows against a tile */

/* TILE rows of up to DC steps of elements, two to a word; and the same, transposed. */
template <int DC> struct half_rows {
    unsigned at[TILE][(DC * STEP + PAD) / 2];
};
template <int DC> struct half_columns {
    unsigned at[DC * STEP][(TILE + PAD) / 2];
};

struct lane {
    int row, g, t; /* the warp's first row; see above */
};

__device__ inline struct lane this_lane(void)
{
    struct lane l;
    l.row = (int)threadIdx.x / WARP * STEP;
    l.g = (int)threadIdx.x % WARP / 4;
    l.t = (int)threadIdx.x % 4;
    return l;
}

/* Rows [0, count) of src, `ld` apart, to rows, and transposed to columns (either may be NULL); zeros behind them and
 * behind their d columns. A thread takes two elements of two rows. */
template <int DC>
__device__ void take(struct half_rows<DC> *rows, struct half_columns<DC> *columns, const float *src, int64_t ld,
                     int64_t count, int d)
{
    for (int e = (int)threadIdx.x; e < TILE / 2 * DC * STEP / 2; e += MMA_BLOCK) {
        int i = e / (DC * STEP / 2) * 2, j = e % (DC * STEP / 2) * 2;
        float v[2][2];
        UNROLL
        for (int r = 0; r < 2; r++)
            UNROLL
        for (int c = 0; c < 2; c++)
            v[r][c] = i + r < count && j + c < d ? src[(i + r) * ld + j + c] : 0.0f;
        if (rows) {
            rows->at[i][j / 2] = narrow_two(v[0][0], v[0][1]);
            rows->at[i + 1][j / 2] = narrow_two(v[1][0], v[1][1]);
        }
        if (columns) {
            columns->at[j][i / 2] = narrow_two(v[0][0], v[1][0]);
            columns->at[j + 1][i / 2] = narrow_two(v[0][1], v[1][1]);
        }
    }
}

/* score = the warp's rows of a times all rows of b. */
template <int DC>
__device__ void products(float (&score)[PIECES][4], const struct half_rows<DC> &a, const struct half_rows<DC> &b)
{
    struct lane l = this_lane();
    UNROLL
    for (int n = 0; n < PIECES; n++)
        UNROLL
    for (int k = 0; k < 4; k++)
        score[n][k] = 0;
    UNROLL
    for (int k = 0; k < DC * STEP; k += STEP) {
        struct first_factor x;
        int j = k / 2 + l.t;
        x.v[0] = a.at[l.row + l.g][j];
        x.v[1] = a.at[l.row + l.g + 8][j];
        x.v[2] = a.at[l.row + l.g][j + 4];
        x.v[3] = a.at[l.row + l.g + 8][j + 4];
        UNROLL
        for (int n = 0; n < PIECES; n++)
            mma(score[n], x, b.at[n * ACROSS + l.g][j], b.at[n * ACROSS + l.g][j + 4]);
    }
}

/* out += w b: w the warp's rows against a tile, b the tile's rows, given transposed. */
template <int DC>
__device__ void accumulate(float (&out)[DC * 2][4], const float (&w)[PIECES][4], const struct half_columns<DC> &b)
{
    struct lane l = this_lane();
    UNROLL
    for (int k = 0; k < PIECES / 2; k++) {
        struct first_factor x;
        int j = k * STEP / 2 + l.t;
        x.v[0] = narrow_two(w[2 * k][0], w[2 * k][1]);
        x.v[1] = narrow_two(w[2 * k][2], w[2 * k][3]);
        x.v[2] = narrow_two(w[2 * k + 1][0], w[2 * k + 1][1]);
        x.v[3] = narrow_two(w[2 * k + 1][2], w[2 * k + 1][3]);
        UNROLL
        for (int n = 0; n < DC * 2; n++)
            mma(out[n], x, b.at[n * ACROSS + l.g][j], b.at[n * ACROSS + l.g][j + 4]);
    }
}

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

template <int DC> struct forward_room {
    struct half_rows<DC> q, k;
    struct half_columns<DC> v;
};

/* One tile of scores becomes weights; the running maximum, sum and output of the lane's two rows are brought up to
 * date. */
template <int DC>
__device__ void softmax_tile(const struct att_job &t, const struct span &p, int64_t q0, int64_t k0,
                             float (&score)[PIECES][4], float (&top)[2], float (&sum)[2], float (&out)[DC * 2][4])
{
    struct lane l = this_lane();
    UNROLL
    for (int r = 0; r < 2; r++) {
        int64_t query = q0 + l.row + l.g + 8 * r;
        float most = -INFINITY, all = 0;
        UNROLL
        for (int n = 0; n < PIECES; n++)
            UNROLL
        for (int c = 0; c < 2; c++) {
            score[n][2 * r + c] *= t.scale;
            if (sees(t, p, query, k0 + n * ACROSS + 2 * l.t + c))
                most = fmaxf(most, score[n][2 * r + c]);
        }
        most = fmaxf(row_max(most), top[r]);
        float shrink = most == -INFINITY ? 1.0f : expf(top[r] - most); /* 0 from -inf */
        UNROLL
        for (int n = 0; n < PIECES; n++)
            UNROLL
        for (int c = 0; c < 2; c++) {
            bool seen = sees(t, p, query, k0 + n * ACROSS + 2 * l.t + c);
            score[n][2 * r + c] = seen ? expf(score[n][2 * r + c] - most) : 0.0f;
            all += score[n][2 * r + c];
        }
        sum[r] = sum[r] * shrink + row_sum(all);
        top[r] = most;
        UNROLL
        for (int n = 0; n < DC * 2; n++) {
            out[n][2 * r] *= shrink;
            out[n][2 * r + 1] *= shrink;
        }
    }
}

template <int DC> __global__ void __launch_bounds__(MMA_BLOCK) forward(struct att_job t)
{
    typedef forward_room<DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, TILE, &a))
        return;
    float out[DC * 2][4] = {}, top[2] = { -INFINITY, -INFINITY }, sum[2] = {}, score[PIECES][4];
    take<DC>(&s.q, NULL, t.q + a.query, a.q_ld, a.count, t.d);
    for (int64_t k0 = a.begin; k0 < a.end; k0 += TILE) {
        take<DC>(&s.k, NULL, t.k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(TILE, a.end - k0), t.d);
        take<DC>(NULL, &s.v, t.v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(TILE, a.end - k0), t.d);
        __syncthreads();
        products<DC>(score, s.q, s.k);
        softmax_tile<DC>(t, a.p, a.q0, k0, score, top, sum, out);
        accumulate<DC>(out, score, s.v);
        __syncthreads();
    }
    struct lane l = this_lane();
    for (int r = 0; r < 2; r++) {
        int64_t i = l.row + l.g + 8 * r;
        if (i >= a.count)
            continue;
        for (int n = 0; n < DC * 2; n++)
            for (int c = 0; c < 2; c++)
                if (n * ACROSS + 2 * l.t + c < t.d)
                    t.o[a.query + i * a.q_ld + n * ACROSS + 2 * l.t + c] = out[n][2 * r + c] / sum[r];
        if (t.lse && l.t == 0)
            t.lse[(a.p.first + a.q0 + i) * t.heads + a.head] = (float)((double)top[r] + log((double)sum[r]));
    }
}

/* to[row][column] += out, where there is such a row and column. */
template <int DC> __device__ void add_rows(float *to, int64_t ld, int64_t count, int d, const float (&out)[DC * 2][4])
{
    struct lane l = this_lane();
    for (int n = 0; n < DC * 2; n++)
        for (int k = 0; k < 4; k++) {
            int i = l.row + l.g + 8 * (k / 2), j = n * ACROSS + 2 * l.t + k % 2;
            if (i < count && j < d)
                to[i * ld + j] += out[n][k];
        }
}

/* What backward needs of a query besides its rows: 0 where there is none. */
struct query_room {
    float lse[TILE], delta[TILE];
};

__device__ void take_queries(struct query_room &to, const struct att_job &t, const struct span &p, int64_t q0,
                             int64_t head)
{
    for (int i = (int)threadIdx.x; i < TILE; i += MMA_BLOCK) {
        bool there = q0 + i < p.count;
        int64_t at = (p.first + q0 + i) * t.heads + head;
        to.lse[i] = there ? t.lse[at] : 0.0f;
        to.delta[i] = there ? t.delta[at] : 0.0f;
    }
}

/* Scores become weights, and dP the scores' gradients; 0 where nothing is seen. keys: the warp's rows are keys and the
 * tile's are queries, else the other way round. */
template <bool KEYS>
__device__ void score_gradients(const struct att_job &t, const struct span &p, int64_t q0, int64_t k0,
                                const struct query_room &of, float (&score)[PIECES][4], float (&dp)[PIECES][4])
{
    struct lane l = this_lane();
    UNROLL
    for (int n = 0; n < PIECES; n++)
        UNROLL
    for (int k = 0; k < 4; k++) {
        int row = l.row + l.g + 8 * (k / 2), col = n * ACROSS + 2 * l.t + k % 2, query = KEYS ? col : row;
        bool seen = sees(t, p, q0 + query, k0 + (KEYS ? row : col));
        score[n][k] = seen ? expf(score[n][k] * t.scale - of.lse[query]) : 0.0f;
        dp[n][k] = seen ? score[n][k] * (dp[n][k] - of.delta[query]) * t.scale : 0.0f;
    }
}

template <int DC> struct query_side {
    struct half_rows<DC> q, d_o, k, v;
    struct half_columns<DC> across;
    struct query_room of;
};

template <int DC> __global__ void __launch_bounds__(MMA_BLOCK) query_gradients(struct att_job t)
{
    typedef query_side<DC> room;
    SHARED(room, s);
    struct query_tile a;
    if (!find_query_tile(t, TILE, &a))
        return;
    float dq[DC * 2][4] = {}, score[PIECES][4], dp[PIECES][4];
    take<DC>(&s.q, NULL, t.q + a.query, a.q_ld, a.count, t.d);
    take<DC>(&s.d_o, NULL, t.d_o + a.query, a.q_ld, a.count, t.d);
    take_queries(s.of, t, a.p, a.q0, a.head);
    for (int64_t k0 = a.begin; k0 < a.end; k0 += TILE) {
        take<DC>(&s.k, &s.across, t.k + a.key + k0 * a.kv_ld, a.kv_ld, min_of(TILE, a.end - k0), t.d);
        take<DC>(&s.v, NULL, t.v + a.key + k0 * a.kv_ld, a.kv_ld, min_of(TILE, a.end - k0), t.d);
        __syncthreads();
        products<DC>(score, s.q, s.k);
        products<DC>(dp, s.d_o, s.v);
        score_gradients<false>(t, a.p, a.q0, k0, s.of, score, dp);
        accumulate<DC>(dq, dp, s.across);
        __syncthreads();
    }
    add_rows<DC>(t.dq + a.query, a.q_ld, a.count, t.d, dq);
}

template <int DC> struct key_side {
    struct half_rows<DC> k, v, q, d_o;
    struct half_columns<DC> q_across, d_o_across;
    struct query_room of;
};

template <int DC> __global__ void __launch_bounds__(MMA_BLOCK) key_gradients(struct att_job t)
{
    typedef key_side<DC> room;
    SHARED(room, s);
    struct span p;
    int64_t k0, g = blockIdx.y, d = t.d, group = t.heads / t.kv_heads;
    if (!find_tile(t, blockIdx.x, TILE, true, &p, &k0))
        return;
    int64_t q_ld = t.heads * d, kv_ld = t.kv_heads * d, count = min_of(TILE, p.keys - k0);
    int64_t key = (p.from + k0) * kv_ld + g * d;
    float dk[DC * 2][4] = {}, dv[DC * 2][4] = {}, score[PIECES][4], dp[PIECES][4];
    take<DC>(&s.k, NULL, t.k + key, kv_ld, count, t.d);
    take<DC>(&s.v, NULL, t.v + key, kv_ld, count, t.d);
    int64_t begin, last = queries_of(t, p, k0, count, TILE, &begin);
    for (int64_t head = g * group; head < (g + 1) * group; head++)
        for (int64_t q0 = begin; q0 < last; q0 += TILE) {
            int64_t query = (p.first + q0) * q_ld + head * d, rows = min_of(TILE, p.count - q0);
            __syncthreads(); /* the tile before has been read */
            take<DC>(&s.q, &s.q_across, t.q + query, q_ld, rows, t.d);
            take<DC>(&s.d_o, &s.d_o_across, t.d_o + query, q_ld, rows, t.d);
            take_queries(s.of, t, p, q0, head);
            __syncthreads();
            products<DC>(score, s.k, s.q);
            products<DC>(dp, s.v, s.d_o);
            score_gradients<true>(t, p, q0, k0, s.of, score, dp);
            accumulate<DC>(dv, score, s.d_o_across);
            accumulate<DC>(dk, dp, s.q_across);
        }
    if (t.dk)
        add_rows<DC>(t.dk + key, kv_ld, count, t.d, dk);
    if (t.dv)
        add_rows<DC>(t.dv + key, kv_ld, count, t.d, dv);
}

template <int DC> void run_forward(struct workers *w, const struct attention *a)
{
    struct att_job t = att_job_of(a);
    launch(w, "attention", forward<DC>, dim3(most_tiles(a->n, TILE, t.segments), (unsigned)t.heads), MMA_BLOCK,
           sizeof(forward_room<DC>), t);
}

template <int DC> void run_backward(struct workers *w, const struct attention *a, const float *delta)
{
    struct att_job t = att_job_of(a);
    t.delta = delta;
    if (t.dq)
        launch(w, "attention_bwd", query_gradients<DC>, dim3(most_tiles(a->n, TILE, t.segments), (unsigned)t.heads),
               MMA_BLOCK, sizeof(query_side<DC>), t);
    if (t.dk || t.dv)
        launch(w, "attention_bwd", key_gradients<DC>,
               dim3(most_tiles(att_tokens(a), TILE, t.segments), (unsigned)t.kv_heads), MMA_BLOCK, sizeof(key_side<DC>),
               t);
}
} // namespace

void mma_attention(struct workers *w, const struct attention *a)
{
    if (a->head_dim <= 64)
        run_forward<4>(w, a);
    else
        run_forward<8>(w, a);
}

void mma_attention_bwd(struct workers *w, const struct attention *a, const float *delta)
{
    if (a->head_dim <= 64)
        run_backward<4>(w, a, delta);
    else
        run_backward<8>(w, a, delta);
}
