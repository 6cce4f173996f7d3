/* cuda_cases: how the files of kernel families say a case, and run it; for test_cuda_kernels only. A file's tests are
 * in the lists at the end of this header. */
#ifndef TESSERA_TESTS_TRAINER_CUDA_CASES_H
#define TESSERA_TESTS_TRAINER_CUDA_CASES_H

#include "trainer/ops/kernels.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST = 16, OWN = 0, LIBRARY = 1 };

/* READ and INTS must not change; CLOSE: f32, near the CPU's; CLOSE_LOW: bf16, a rounding or two from the CPU's; EXACT:
 * the CPU's bits; JUNK: scratch. */
enum kind { READ, INTS, CLOSE, CLOSE_LOW, EXACT, JUNK };

struct buffer {
    enum kind kind;
    size_t bytes;
    void *value;      /* before */
    double tolerance; /* of CLOSE; 0: the run's */
};

struct run {
    const char *what;
    void (*call)(const struct kernels *k, struct workers *w, void **p, const void *arg);
    const void *arg;
    struct buffer b[MOST];
    int count;
    double tolerance;
    int gemm; /* OWN or LIBRARY: whose products */
};

float draw(void); /* in [-2, 2) */
int32_t draw_below(int32_t n);

/* Another buffer of the case: zeros, drawn floats, zeros. */
void *add_buffer(struct run *r, enum kind kind, size_t bytes);
float *floats(struct run *r, enum kind kind, int64_t n);
int32_t *ints(struct run *r, int64_t n);
uint16_t *halves(struct run *r, enum kind kind, int64_t n); /* drawn bf16 */
/* floats, or halves if low; kind READ or CLOSE. */
void array_buffer(struct run *r, enum kind kind, bool low, int64_t n);
/* For a case's call: a buffer as the kernels `k` take it. The CPU's know neither bf16 nor fresh arrays: they get a copy
 * in f32, or zeros, and array_done puts the bf16 of it back. */
struct array array_begin(const struct kernels *k, void *p, bool low, bool fresh, int64_t n);
void array_done(const struct kernels *k, void *p, bool low, struct array a, int64_t n);

/* Run the case everywhere, and forget its buffers. */
void check_one(struct run *r, bool skewed);

/* clang-format off */
#define CUDA_CASES(X) \
    X(elements) X(elements_low) X(norms_low) X(ropes_low) X(gemm_low) X(adamw) X(adamw_of_many) X(norm_sums) X(losses) X(norms) X(sums) X(firsts) X(rounds) X(rounds_by_draws) X(rows_move) X(embeddings) X(ropes) \
    X(columns) X(gemm) X(grouped) X(logprob) X(attention) X(attention_of_ranks) X(attention_with_cache) X(attention_in_bf16) X(attention_of_arrays) \
    X(attention_of_arrays_of_ranks) X(attention_of_arrays_with_cache) X(routes) X(sorts) X(loads) X(mixes)
/* clang-format on */
#define CUDA_CASE_DECLARED(name) void test_##name(void **state);
CUDA_CASES(CUDA_CASE_DECLARED)
#undef CUDA_CASE_DECLARED

#endif
