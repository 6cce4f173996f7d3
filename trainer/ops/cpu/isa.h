/* isa: what is written once per instruction set: the GEMM micro-kernel, a transposing copy, and loops over one row.
 *
 * One table each for AVX-512 with BF16 and without, AVX2 and portable C; isa_best picks at run time. ALL GIVE THE SAME
 * BITS:
 *  - the micro-kernel makes each output one chain of fused multiply-adds over k ascending, whatever the vector width;
 *    that of bf16 takes two k at a time, the second one first, as VDPBF16PS does (which takes subnormals as 0);
 *  - row loops (rows_body.h, compiled once per set) use + - * / on 16 fixed lanes, never fused (-ffp-contract=off,
 * which -std=c11 implies), lane l taking elements l, l + 16, ...; sums over lanes go up one fixed tree (8, 4, 2, 1
 * apart). Panels: A is [k][PANEL_M], B is [k][PANEL_N], zero-padded where a matrix ends. */
#ifndef TESSERA_TRAINER_OPS_CPU_ISA_H
#define TESSERA_TRAINER_OPS_CPU_ISA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PANEL_M = 8, PANEL_N = 32, LANES = 16 };

/* AdamW's scalars in f32, powers already taken. */
struct adamw_scalars {
    float lr, beta1, beta1_rest, beta2, beta2_rest, eps, decay, fix1, fix2, grad_scale;
};

/* Of micro-kernels: what they are given is on the stack of the thread that runs them, so that tsan has nothing to find
 * there, and would take most of its time for it. What goes in and out is packed and added by others. */
#define OF_ONE_THREAD __attribute__((no_sanitize("thread")))

struct isa {
    const char *name;
    /* c[i][j] (+)= sum_k a[k][i] b[k][j], i < rows <= PANEL_M, j < PANEL_N; load: the chain goes on from c, else from
     * 0. c needs room for PANEL_N columns. */
    void (*micro)(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load);
    /* The same for k pairs: an element of a panel is two values of bf16, of an even k in its low half and of the k
     * after it in its high half. */
    void (*micro_bf16)(int64_t k, int rows, const float *a, const float *b, float *c, int64_t ldc, bool load);
    /* dst[p * width + r] = src[r * ld + p] for p < k; 0 for r in [count, width). width is PANEL_M or PANEL_N. */
    void (*transpose)(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k);

    /* Pairs of bf16 (gemm.bf16); what is not there is 0. Of x[2 i] and x[2 i + 1] for i < (n + 1) / 2. The same of
     * `count` rows of k values, transposed like above; NULL: make it of the two. Of columns: dst[p * width + j] of
     * src[2 p * ld + j] and src[(2 p + 1) * ld + j], j < count, p < (k + 1) / 2; elsewhere dst stays. */
    void (*pairs)(float *dst, const float *x, int64_t n);
    void (*transpose_pairs)(float *dst, int width, const float *src, int64_t ld, int64_t count, int64_t k);
    void (*pairs_across)(float *dst, int64_t width, const float *src, int64_t ld, int64_t count, int64_t k);

    /* Rows of n elements. No aliasing but in place where only one pointer is written. */
    float (*dot)(const float *a, const float *b, int64_t n);
    float (*dot3)(const float *a, const float *b, const float *c, int64_t n); /* sum (a b) c */
    float (*max)(const float *x, int64_t n);                                  /* -inf for n = 0; skips NaN */
    void (*exp)(float *y, const float *x, int64_t n);                         /* below 2 ulp; y may be x */
    float (*exp_sum)(float *x, float scale, float shift, int64_t n);          /* x = e^(scale x - shift); their sum */
    double (*exp_sum_wide)(const float *x, float scale, float shift,
                           int64_t n); /* the sum alone, f64 over blocks of 1,024 */
    /* With u = scale x - shift: sum[0] = sum e^u with exp_sum_wide's bits, sum[1] = sum e^u u, sum[2] = sum e^2u. */
    void (*exp_sums_wide)(const float *x, float scale, float shift, int64_t n, double *sum);
    void (*exp_scaled)(float *x, float scale, float shift, float times, int64_t n); /* x = times e^(scale x - shift) */
    void (*softmax_bwd)(float *dp, const float *p, float delta, float scale, int64_t n); /* dp = p (dp - delta) scale */
    void (*scale)(float *y, const float *x, float s, int64_t n);
    void (*axpy)(float *y, const float *x, float s, int64_t n);
    void (*add)(float *y, const float *a, const float *b, int64_t n); /* y may be a */
    void (*add_rows)(float *y, int64_t y_ld, const float *a, int64_t a_ld, const float *b, int64_t b_ld, int64_t rows,
                     int64_t n);                                                      /* y may be a */
    void (*mul_scaled)(float *y, const float *x, const float *w, float s, int64_t n); /* y = (x s) w */
    void (*mul_add)(float *y, const float *a, const float *b, float s, int64_t n);    /* y += (b s) a */
    void (*rmsnorm_bwd)(float *dx, const float *dy, const float *w, const float *x, float r, float s,
                        int64_t n); /* += r dy w - s x */
    void (*rotate)(float *y, const float *x, const float *cs, float sign, bool add, int64_t half);
    void (*swiglu)(float *y, const float *gate, const float *up, int64_t n);
    void (*swiglu_bwd)(float *dgate, float *dup, const float *dy, const float *gate, const float *up, int64_t n);
    double (*sum)(const float *x, bool squared, int64_t n); /* f64, 16 lanes */
    void (*adamw)(float *p, const float *g, float *m, float *v, const struct adamw_scalars *h, int64_t n);
};

/* The best table that this machine can run. */
const struct isa *isa_best(void);
/* The i-th table that this machine can run, best first; NULL after the last. For tests. */
const struct isa *isa_at(int i);

struct gemm;
struct workers;
/* cpu_gemm with a given table. For tests: all tables give the same bits. */
void gemm_with(const struct isa *isa, struct workers *w, const struct gemm *g);

#endif
