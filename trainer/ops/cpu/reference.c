/* reference: what the fast kernels are compared with. One thread, formulas as written, sums in f64 (but gemm_ref: the
 * chain itself). */
#include "trainer/ops/kernels.h"

#include <math.h>

static float weight_at(const void *w, enum dtype t, int64_t i)
{
    return t == DTYPE_BF16 ? bf16_to_f32(((const uint16_t *)w)[i]) : ((const float *)w)[i];
}

static float as_bf16(float x)
{
    return fabsf(x) < 0x1p-126f ? copysignf(0, x) : bf16_to_f32(bf16_from_f32(x));
}

void gemm_ref(const struct gemm *g)
{
    for (int64_t i = 0; i < g->m; i++) {
        for (int64_t j = 0; j < g->n; j++) {
            float sum = 0;
            for (int64_t at = 0; at < g->k + (g->bf16 && g->k % 2); at++) {
                int64_t k = g->bf16 ? at ^ 1 : at;
                float a = k < g->k ? ((const float *)g->a)[g->a_trans ? k * g->lda + i : i * g->lda + k] : 0;
                float b = k < g->k ? weight_at(g->b, g->b_dtype, g->b_trans ? j * g->ldb + k : k * g->ldb + j) : 0;
                sum = g->bf16 ? fmaf(as_bf16(a), as_bf16(b), sum) : fmaf(a, b, sum);
            }
            float *c = (float *)g->c + i * g->ldc + j;
            *c = g->add ? *c + sum : g->bias ? sum + g->bias[j] : sum;
        }
    }
}

/* One query row against keys [0, n) at k: its score against key j, scaled. */
static double att_score(const struct attention *a, const float *q, const float *k, int64_t j)
{
    double s = 0;
    for (int e = 0; e < a->head_dim; e++)
        s += (double)q[e] * (double)k[j * a->kv_heads * a->head_dim + e];
    return s / sqrt((double)a->head_dim);
}

static double att_lse(const struct attention *a, const float *q, const float *k, int64_t n)
{
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++)
        most = fmax(most, att_score(a, q, k, j));
    for (int64_t j = 0; j < n; j++)
        sum += exp(att_score(a, q, k, j) - most);
    return most + log(sum);
}

/* What a row of attention works on: its query, the keys it sees, its place in o. */
struct att_row {
    int64_t q, k, n; /* element offsets of the query row and of the first key row; keys seen */
};

static struct att_row att_row(const struct attention *a, int64_t s, int64_t i, int64_t h)
{
    int64_t first = a->seg->offset[s], from = a->past ? s * a->cap : first, g = h / (a->heads / a->kv_heads);
    int64_t n = (a->past ? a->past[s] : 0) + i + 1, gone = a->window && n > a->window ? n - a->window : 0;
    return (struct att_row){ ((first + i) * a->heads + h) * a->head_dim,
                             ((from + gone) * a->kv_heads + g) * a->head_dim, n - gone };
}

static void att_row_ref(const struct attention *a, struct att_row r, int64_t lse_at)
{
    const float *q = (const float *)a->q + r.q, *k = (const float *)a->k + r.k, *v = (const float *)a->v + r.k;
    float *o = (float *)a->o + r.q;
    int d = a->head_dim;
    double lse = att_lse(a, q, k, r.n), sum[ATTENTION_HEAD_MAX] = { 0 };
    for (int64_t j = 0; j < r.n; j++) {
        double p = exp(att_score(a, q, k, j) - lse);
        for (int e = 0; e < d; e++)
            sum[e] += p * (double)v[j * a->kv_heads * d + e];
    }
    for (int e = 0; e < d; e++)
        o[e] = (float)sum[e];
    if (a->lse)
        a->lse[lse_at] = (float)lse;
}

static void att_row_bwd_ref(const struct attention *a, struct att_row r)
{
    const float *q = (const float *)a->q + r.q, *k = (const float *)a->k + r.k, *v = (const float *)a->v + r.k,
                *d_o = (const float *)a->d_o + r.q;
    float *dq = (float *)a->dq + r.q, *dk = (float *)a->dk + r.k, *dv = (float *)a->dv + r.k;
    int d = a->head_dim;
    int64_t ld = (int64_t)a->kv_heads * d;
    double lse = att_lse(a, q, k, r.n), delta = 0, scale = 1 / sqrt((double)d);
    for (int pass = 0; pass < 2; pass++) { /* the first makes delta = sum_j P_j dP_j */
        for (int64_t j = 0; j < r.n; j++) {
            double p = exp(att_score(a, q, k, j) - lse), dp = 0;
            for (int e = 0; e < d; e++)
                dp += (double)d_o[e] * (double)v[j * ld + e];
            if (pass == 0)
                delta += p * dp;
            for (int e = 0; pass == 1 && e < d; e++) {
                double ds = p * (dp - delta) * scale;
                dq[e] += (float)(ds * (double)k[j * ld + e]);
                dk[j * ld + e] += (float)(ds * (double)q[e]);
                dv[j * ld + e] += (float)(p * (double)d_o[e]);
            }
        }
    }
}

void attention_ref(const struct attention *a)
{
    for (int32_t s = 0; s < a->seg->count; s++)
        for (int64_t i = 0; i < a->seg->offset[s + 1] - a->seg->offset[s]; i++)
            for (int h = 0; h < a->heads; h++)
                att_row_ref(a, att_row(a, s, i, h), (a->seg->offset[s] + i) * a->heads + h);
}

void attention_bwd_ref(const struct attention *a)
{
    for (int32_t s = 0; s < a->seg->count; s++)
        for (int64_t i = 0; i < a->seg->offset[s + 1] - a->seg->offset[s]; i++)
            for (int h = 0; h < a->heads; h++)
                att_row_bwd_ref(a, att_row(a, s, i, h));
}

static double rrms_of(const float *x, int64_t c, float eps)
{
    double sum = 0;
    for (int64_t j = 0; j < c; j++)
        sum += (double)x[j] * (double)x[j];
    return 1 / sqrt(sum / (double)c + (double)eps);
}

void rmsnorm_ref(float *y, float *rrms, const float *x, const float *weight, int64_t rows, int64_t c, float eps)
{
    for (int64_t i = 0; i < rows; i++) {
        double r = rrms_of(x + i * c, c, eps);
        rrms[i] = (float)r;
        for (int64_t j = 0; j < c; j++)
            y[i * c + j] = (float)((double)x[i * c + j] * r * (double)weight[j]);
    }
}

void rmsnorm_bwd_ref(float *dx, float *dweight, const float *dy, const float *x, const float *weight, int64_t rows,
                     int64_t c, float eps)
{
    for (int64_t i = 0; i < rows; i++) {
        double r = rrms_of(x + i * c, c, eps), mean = 0;
        for (int64_t j = i * c; j < (i + 1) * c; j++)
            mean += (double)dy[j] * (double)weight[j - i * c] * (double)x[j] * r / (double)c;
        for (int64_t j = i * c; j < (i + 1) * c; j++) {
            double xh = (double)x[j] * r;
            dx[j] += (float)(r * ((double)dy[j] * (double)weight[j - i * c] - xh * mean));
            dweight[j - i * c] += (float)((double)dy[j] * xh);
        }
    }
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

void swiglu_ref(float *y, const float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)((double)gate[i] * sigmoid((double)gate[i]) * (double)up[i]);
}

void swiglu_bwd_ref(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double x = (double)gate[i], s = sigmoid(x), d = (double)dy[i];
        dup[i] += (float)(d * x * s);
        dgate[i] += (float)(d * (double)up[i] * s * (1 + x * (1 - s)));
    }
}

static double logit_ref(const struct logprob *p, int64_t n, int64_t v)
{
    double sum = 0;
    for (int64_t j = 0; j < p->c; j++)
        sum += (double)((const float *)p->x)[n * p->c + j] * (double)weight_at(p->w, p->w_dtype, v * p->c + j);
    return sum / (double)p->temperature;
}

static double lse_ref(const struct logprob *p, int64_t n)
{
    double most = -INFINITY, sum = 0;
    for (int64_t v = 0; v < p->v; v++)
        most = fmax(most, logit_ref(p, n, v));
    for (int64_t v = 0; v < p->v; v++)
        sum += exp(logit_ref(p, n, v) - most);
    return most + log(sum);
}

void logprob_ref(const struct logprob *p)
{
    for (int64_t n = 0; n < p->n; n++) {
        double lse = p->target[n] < 0 ? 0 : lse_ref(p, n);
        p->lse[n] = (float)lse;
        p->logp[n] = p->target[n] < 0 ? 0 : (float)(logit_ref(p, n, p->target[n]) - lse);
    }
}

void logprob_stats_ref(const struct logprob *p)
{
    for (int64_t n = 0; n < p->n; n++) {
        double lse = lse_ref(p, n), entropy = 0, sum = 0, squares = 0;
        int64_t top = 0;
        for (int64_t v = 0; v < p->v; v++) {
            double z = logit_ref(p, n, v), log_p = z - lse;
            entropy -= exp(log_p) * log_p;
            sum += z;
            squares += exp(2 * log_p);
            top = z > logit_ref(p, n, top) ? v : top;
        }
        bool scored = p->target[n] >= 0;
        p->stats.entropy[n] = scored ? (float)entropy : 0;
        p->stats.logit[n] = scored ? (float)(sum / (double)p->v) : 0;
        p->stats.log_square[n] = scored ? (float)log(squares) : 0;
        p->stats.top[n] = scored && top == p->target[n];
    }
}

void logprob_bwd_ref(const struct logprob *p)
{
    for (int64_t n = 0; n < p->n; n++) {
        if (p->target[n] < 0)
            continue;
        double lse = lse_ref(p, n);
        for (int64_t v = 0; v < p->v; v++) {
            double d =
                (double)p->dlogp[n] * ((v == p->target[n]) - exp(logit_ref(p, n, v) - lse)) / (double)p->temperature;
            for (int64_t j = 0; j < p->c; j++) {
                p->dx[n * p->c + j] += (float)(d * (double)weight_at(p->w, p->w_dtype, v * p->c + j));
                p->dw[v * p->c + j] += (float)(d * (double)((const float *)p->x)[n * p->c + j]);
            }
        }
    }
}

void adamw_ref(float *p, const float *g, float *m, float *v, size_t n, double lr, double beta1, double beta2,
               double eps, double weight_decay, uint64_t step, double grad_scale)
{
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g[i] * grad_scale, mi = beta1 * (double)m[i] + (1 - beta1) * gi,
               vi = beta2 * (double)v[i] + (1 - beta2) * gi * gi;
        double update = mi / (1 - pow(beta1, (double)step)) / (sqrt(vi / (1 - pow(beta2, (double)step))) + eps);
        m[i] = (float)mi;
        v[i] = (float)vi;
        p[i] = (float)((double)p[i] - lr * (update + weight_decay * (double)p[i]));
    }
}
