/* What the files of ops/cpu share: cutting loops into tasks. The table itself is kernels.h. */
#ifndef TESSERA_TRAINER_OPS_CPU_CPU_H
#define TESSERA_TRAINER_OPS_CPU_CPU_H

#include "trainer/ops/cpu/isa.h"
#include "trainer/ops/kernels.h"

#include <string.h>

/* Elements that make a task worth handing out. */
enum { TASK_ELEMS = 8192 };

static inline int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of c elements that make a task. */
static inline int64_t task_rows(int64_t c)
{
    return c >= TASK_ELEMS ? 1 : TASK_ELEMS / (c > 0 ? c : 1);
}

/* Tasks of `each` that cover n. */
static inline size_t task_count(int64_t n, int64_t each)
{
    return (size_t)((n + each - 1) / each);
}

/* A panel whose source has k outermost: dst[p][r] = src[p][r], p < k, r < count; zeros up to width (PANEL_M or
 * PANEL_N). Whole panels copy a constant size, which the compiler turns into a few moves. */
static inline void copy_panel(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k)
{
    if (count == PANEL_M && width == PANEL_M) {
        for (int64_t p = 0; p < k; p++)
            memcpy(dst + p * PANEL_M, src + p * ld, PANEL_M * sizeof(float));
    } else if (count == PANEL_N && width == PANEL_N) {
        for (int64_t p = 0; p < k; p++)
            memcpy(dst + p * PANEL_N, src + p * ld, PANEL_N * sizeof(float));
    } else {
        for (int64_t p = 0; p < k; p++) {
            memcpy(dst + p * width, src + p * ld, (size_t)count * sizeof(float));
            memset(dst + p * width + count, 0, (size_t)(width - count) * sizeof(float));
        }
    }
}

/* cpu/<family>.c, named into kernels_cpu by cpu/kernels_cpu.c */
void cpu_gemm(struct workers *w, const struct gemm *g);
void cpu_grouped(struct workers *w, const struct grouped_gemm *p);
void cpu_route(struct workers *w, const struct route *r);
void cpu_route_bwd(struct workers *w, const struct route *r);
void cpu_sort_experts(struct workers *w, const struct expert_sort *s);
void cpu_load_sums(struct workers *w, const struct route_load *l);
void cpu_load_shares(struct workers *w, const struct route_load *l);
void cpu_mix(struct workers *w, const struct mix *m);
void cpu_mix_bwd(struct workers *w, const struct mix *m);
void cpu_bias_bwd(struct workers *w, float *db, struct array dy, int64_t n, int64_t m);
void cpu_embedding(struct workers *w, float *y, const void *table, enum dtype t, const int32_t *id, int64_t n,
                   int64_t c);
void cpu_embedding_bwd(struct workers *w, float *dtable, const float *dy, const int32_t *id, int64_t n, int64_t c);
void cpu_rmsnorm(struct workers *w, struct array y, float *rrms, struct array x, const float *weight, int64_t rows,
                 int64_t c, float eps);
void cpu_rmsnorm_bwd(struct workers *w, struct array dx, struct array dy, struct array x, const float *weight,
                     const float *rrms, int64_t rows, int64_t c);
void cpu_rmsnorm_bwd_weight(struct workers *w, float *dweight, struct array dy, struct array x, const float *rrms,
                            int64_t rows, int64_t c);
void cpu_rope_table(struct workers *w, float *table, const int32_t *position, int64_t n, int64_t d,
                    const double *frequency, double amplitude);
void cpu_rope(struct workers *w, struct array y, struct array x, const float *table, int64_t n, int64_t h, int64_t d);
void cpu_rope_bwd(struct workers *w, struct array dx, struct array dy, const float *table, int64_t n, int64_t h,
                  int64_t d);
void cpu_columns(struct workers *w, const struct column_copy *c);
void cpu_attention(struct workers *w, const struct attention *a);
void cpu_attention_bwd(struct workers *w, const struct attention *a);
void cpu_swiglu(struct workers *w, struct array y, struct array gate, struct array up, int64_t n);
void cpu_swiglu_bwd(struct workers *w, struct array dgate, struct array dup, struct array dy, struct array gate,
                    struct array up, int64_t n);
void cpu_add(struct workers *w, float *y, const float *a, const float *b, int64_t n);
void cpu_scale(struct workers *w, float *y, const float *x, float s, int64_t n);
void cpu_axpy(struct workers *w, float *y, const float *x, float s, int64_t n);
void cpu_add_scalar(struct workers *w, float *y, const float *s, int64_t n);
void cpu_zero(struct workers *w, float *y, int64_t n);
void cpu_widen(struct workers *w, float *y, const uint16_t *x, int64_t n);
void cpu_narrow(struct workers *w, uint16_t *y, const float *x, int64_t n);
void cpu_round_low(struct workers *w, float *x, int64_t n);
void cpu_narrow_drawn(struct workers *w, uint16_t *y, const float *x, int64_t n, const struct rounding *how);
void cpu_copy_rows(struct workers *w, float *y, int64_t ldy, const float *x, int64_t ldx, int64_t n, int64_t c,
                   bool add);
void cpu_adds(struct workers *w, double *v, const struct add *a, uint32_t n);
void cpu_add_rounds(struct workers *w, double *v, const struct add *a, const uint32_t *begin, uint32_t rounds);
void cpu_clip(struct workers *w, struct clipped *c, const double *squares, double clip);
void cpu_adamw(struct workers *w, const struct adamw_run *run, size_t runs, const struct adamw_how *how);
void cpu_sequence_sums(struct workers *w, const struct loss_work *l);
void cpu_pair_slopes(struct workers *w, const struct loss_work *l, const struct pref_step *s);
void cpu_kto_slopes(struct workers *w, const struct loss_work *l, const struct kto_step *s);
void cpu_even_slopes(struct workers *w, const struct loss_work *l, double slope);
void cpu_sum(struct workers *w, float *y, const float *x, int64_t n, double *partial);
void cpu_find_nonfinite(struct workers *w, int64_t *first, struct array array, int64_t n);
void cpu_logprob(struct workers *w, const struct logprob *p);
void cpu_logprob_merge(struct workers *w, const struct logprob *p);
void cpu_logprob_bwd(struct workers *w, const struct logprob *p);

#endif
