/* cuda_elements: cases of elements, rows, sums, tables and angles; see test_cuda_kernels.c. */
#include "tests/trainer/cuda_cases.h"

/* ---- elements ---- */

static void call_elements(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    int64_t n = *(const int64_t *)arg;
    k->swiglu(w, array_of(p[0]), array_of(p[1]), array_of(p[2]), n);
    k->swiglu_bwd(w, array_of(p[3]), array_of(p[4]), array_of(p[5]), array_of(p[1]), array_of(p[2]), n);
    k->swiglu_bwd(w, array_of(NULL), array_of(p[4]), array_of(p[5]), array_of(p[1]), array_of(p[2]), n);
    k->swiglu_bwd(w, array_of(p[3]), array_of(NULL), array_of(p[5]), array_of(p[1]), array_of(p[2]), n);
    k->add(w, p[6], p[1], p[2], n);
    k->scale(w, p[7], p[1], -1.7f, n);
    k->axpy(w, p[8], p[1], 0.3f, n);
    k->add_scalar(w, p[9], p[1], n);
    k->zero(w, p[10], n);
    k->widen(w, p[11], p[12], n);
    k->scale(w, p[13], p[13], 3.0f, n); /* in place */
}

void test_elements(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 1, 3, 4, 1025, 4099 };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            int64_t n = sizes[i];
            struct run r = { .what = "elements", .call = call_elements, .arg = &n, .tolerance = 1e-6 };
            for (int b = 0; b < 12; b++) {
                float *x = floats(&r, b == 1 || b == 2 || b == 5 ? READ : CLOSE, n);
                for (int64_t j = 0; b == 1 && j < n; j++)
                    x[j] *= j % 7 == 3 ? 60 : 4;
            }
            uint16_t *half = add_buffer(&r, READ, (size_t)n * sizeof *half);
            for (int64_t j = 0; j < n; j++)
                half[j] = bf16_from_f32(draw());
            floats(&r, CLOSE, n);
            check_one(&r, skew);
        }
}

/* What of a case is bf16 (a bit each) and whether gradients are fresh; numbers of buffers are the bits'. */
struct low {
    unsigned low;
    bool fresh;
    int64_t n, rows, c;
};

static bool is_low(const struct low *l, int b)
{
    return l->low >> b & 1;
}

static struct array at_begin(const struct kernels *k, void **p, const struct low *l, int b, bool gradient, int64_t n)
{
    return array_begin(k, p[b], is_low(l, b), gradient && l->fresh, n);
}

static void all_done(const struct kernels *k, void **p, const struct low *l, struct array *a, int count, int64_t n)
{
    for (int b = 0; b < count; b++)
        array_done(k, p[b], is_low(l, b), a[b], n);
}

static void call_elements_low(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct low *l = arg;
    struct array a[7];
    for (int b = 0; b < 7; b++)
        a[b] = at_begin(k, p, l, b, b > 3, l->n);
    k->swiglu(w, a[0], a[1], a[2], l->n);
    k->swiglu_bwd(w, a[4], a[5], a[3], a[1], a[2], l->n);
    a[5].fresh = false; /* it has been written */
    k->swiglu_bwd(w, array_of(NULL), a[5], a[3], a[1], a[2], l->n);
    if (k->convert)
        k->convert(w, a[6], a[3], l->n);
    else
        k->axpy(w, a[6].at, a[3].at, 1.0f, l->n);
    all_done(k, p, l, a, 7, l->n);
}

void test_elements_low(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 1, 3, 4, 1025, 4099 };
    for (unsigned how = 0; how < 80; how++) {
        static const unsigned masks[] = { 127, 0, 1, 6, 8, 48, 64, 72 };
        struct low l = { masks[how / 2 % 8], how & 1, sizes[how / 16], 0, 0 };
        struct run r = { .what = "elements of both types", .call = call_elements_low, .arg = &l, .tolerance = 1e-6 };
        for (int b = 0; b < 7; b++)
            array_buffer(&r, b >= 1 && b <= 3 ? READ : CLOSE, is_low(&l, b), l.n);
        r.tolerance = is_low(&l, 5) ? 0.1 : 1e-6; /* added to twice, rounded in between */
        check_one(&r, how % 3 == 0);
    }
}

static void call_norms_low(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct low *l = arg;
    struct array a[4];
    for (int b = 0; b < 4; b++)
        a[b] = at_begin(k, p, l, b, b == 3, l->rows * l->c);
    k->rmsnorm(w, a[0], p[4], a[1], p[5], l->rows, l->c, 1e-5f);
    k->rmsnorm_bwd(w, a[3], a[2], a[1], p[5], p[4], l->rows, l->c);
    k->rmsnorm_bwd_weight(w, p[6], a[2], a[1], p[4], l->rows, l->c);
    k->bias_bwd(w, p[7], a[2], l->rows, l->c);
    all_done(k, p, l, a, 4, l->rows * l->c);
}

void test_norms_low(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = { { 5, 7 }, { 9, 64 }, { 17, 300 }, { 3, 1028 }, { 256, 33 }, { 700, 36 } };
    for (unsigned how = 0; how < 6 * 32; how++) {
        struct low l = { how % 16, how & 16, 0, shapes[how / 32][0], shapes[how / 32][1] };
        struct run r = { .what = "norm of both types", .call = call_norms_low, .arg = &l, .tolerance = 1e-4 };
        for (int b = 0; b < 4; b++)
            array_buffer(&r, b == 0 || b == 3 ? CLOSE : READ, is_low(&l, b), l.rows * l.c);
        floats(&r, CLOSE, l.rows);
        floats(&r, READ, l.c);
        floats(&r, CLOSE, l.c);
        floats(&r, CLOSE, l.c);
        check_one(&r, how % 3 == 0);
    }
}

enum { ADAMW_RUNS = 5 };

/* The run cut into uneven ones, some of them empty; then the whole of it, whose factor is in memory. */
static void call_adamw(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    size_t n = (size_t) * (const int64_t *)arg, at = 0;
    float *x[4] = { p[0], p[1], p[2], p[3] };
    struct adamw_run run[ADAMW_RUNS], all = { x[0], x[1], x[2], x[3], n, 0 };
    for (size_t i = 0; i < ADAMW_RUNS; at += run[i].n, i++)
        run[i] = (struct adamw_run){
            x[0] + at, x[1] + at, x[2] + at, x[3] + at, i + 1 == ADAMW_RUNS ? n - at : n * i / 11, 0.1 * (double)i
        };
    k->adamw(w, run, ADAMW_RUNS, &(struct adamw_how){ 1e-2, 0.9, 0.95, 1e-8, 1, 0.5, NULL });
    k->adamw(w, &all, 1, &(struct adamw_how){ 3e-2, 0.8, 0.99, 0.2, 7, 100, p[4] });
    k->adamw(w, &all, 1, &(struct adamw_how){ 3e-2, 0.8, 0.99, 1e-6, 7, 100, (double *)p[4] + 1 }); /* NaN: nothing */
    k->adamw(w, &all, 1, &(struct adamw_how){ 3e-2, 0.8, 0.99, 1e-6, 7, NAN, NULL });
}

void test_adamw(void **state)
{
    (void)state;
    for (int64_t n = 1; n < 20000; n = n * 7 + 2) {
        struct run r = { .what = "adamw", .call = call_adamw, .arg = &n, .tolerance = 2e-6 };
        floats(&r, CLOSE, n);
        floats(&r, READ, n);
        floats(&r, CLOSE, n);
        float *v = floats(&r, CLOSE, n);
        for (int64_t i = 0; i < n; i++)
            v[i] = fabsf(v[i]);
        double *scale = add_buffer(&r, READ, 2 * sizeof *scale);
        scale[0] = 0.3;
        scale[1] = NAN;
        check_one(&r, n % 2);
    }
}

/* More runs than a launch takes. */
enum { MANY = 200, LONG = 37 };

static void call_many(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    float *x[4] = { p[0], p[1], p[2], p[3] };
    struct adamw_run run[MANY];
    (void)arg;
    for (size_t i = 0; i < MANY; i++)
        run[i] =
            (struct adamw_run){ x[0] + i * LONG, x[1] + i * LONG, x[2] + i * LONG, x[3] + i * LONG, i % LONG, 0.1 };
    k->adamw(w, run, MANY, &(struct adamw_how){ 1e-2, 0.9, 0.95, 1e-8, 3, 0.5, NULL });
}

void test_adamw_of_many(void **state)
{
    (void)state;
    struct run r = { .what = "adamw of many", .call = call_many, .tolerance = 2e-6 };
    for (int i = 0; i < 4; i++) {
        float *x = floats(&r, i == 1 ? READ : CLOSE, MANY * LONG);
        for (int64_t j = 0; i == 3 && j < MANY * LONG; j++)
            x[j] = fabsf(x[j]);
    }
    check_one(&r, 0);
}

/* ---- sums of f64 numbers, and the norm ---- */

enum { NUMBERS = 9000, SUMS = 6, PAIRS = 5 };

/* v: numbers, sums of some, then sums and copies of these in rounds. */
static void call_adds(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    double *v = p[0];
    (void)arg;
    k->adds(w, v, p[1], SUMS);
    k->add_rounds(w, v, p[2], p[3], 3);
    k->clip(w, p[4], v + NUMBERS + SUMS + PAIRS - 1, 1.5);
    k->clip(w, p[5], v + NUMBERS, 0);
    k->clip(w, p[6], p[7], 2);
    k->clip(w, p[8], p[9], 2);
}

void test_norm_sums(void **state)
{
    (void)state;
    static const struct add adds[SUMS] = { { NUMBERS, 0, 1, 1024 },
                                           { NUMBERS + 1, 1024, 7, 1000 },
                                           { NUMBERS + 2, 8999, UINT32_MAX, 513 },
                                           { NUMBERS + 3, 5, 1, 1 },
                                           { NUMBERS + 4, 6, 0, 3 },
                                           { NUMBERS + 5, 8500, 2, 2 } },
                            rounds[PAIRS] = { { NUMBERS + 6, NUMBERS, 1, 2 },
                                              { NUMBERS + 7, NUMBERS + 3, UINT32_MAX, 2 },
                                              { NUMBERS + 8, NUMBERS + 6, 1, 2 },
                                              { NUMBERS + 9, NUMBERS + 6, 1, 1 },
                                              { NUMBERS + 10, NUMBERS + 8, 1, 2 } };
    static const uint32_t begin[4] = { 0, 2, 4, 5 };
    struct run r = { .what = "sums of a norm", .call = call_adds };
    double *v = add_buffer(&r, EXACT, (NUMBERS + SUMS + PAIRS) * sizeof *v);
    for (int i = 0; i < NUMBERS; i++)
        v[i] = fabs((double)draw()) * 1e3 + 1e-9 * (double)i;
    memcpy(add_buffer(&r, READ, sizeof adds), adds, sizeof adds);
    memcpy(add_buffer(&r, READ, sizeof rounds), rounds, sizeof rounds);
    memcpy(add_buffer(&r, READ, sizeof begin), begin, sizeof begin);
    add_buffer(&r, EXACT, sizeof(struct clipped));
    add_buffer(&r, EXACT, sizeof(struct clipped));
    add_buffer(&r, EXACT, sizeof(struct clipped));
    *(double *)add_buffer(&r, READ, sizeof(double)) = INFINITY;
    add_buffer(&r, EXACT, sizeof(struct clipped));
    *(double *)add_buffer(&r, READ, sizeof(double)) = NAN;
    check_one(&r, 0);
}

/* ---- losses of sequences ---- */

enum { SEQUENCES = 8, LOSS_TOKENS = 1500 };

/* Sums and gradients of each loss, then of KTO's rows, then the same for all tokens; sums of log-probabilities alone.
 */
static void call_losses(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct pref_step *step = arg;
    const int32_t *about = p[0];
    struct loss_work l = { .segments = SEQUENCES,
                           .offset = about,
                           .shared = about + SEQUENCES + 1,
                           .scored = about + 2 * SEQUENCES + 1,
                           .good = about + 3 * SEQUENCES + 1,
                           .target = about + 4 * SEQUENCES + 1,
                           .logp = p[1],
                           .stats = { (float *)p[2], (float *)p[2] + LOSS_TOKENS, (float *)p[2] + 2 * LOSS_TOKENS,
                                      (float *)p[2] + 3 * LOSS_TOKENS },
                           .alpha = step->c.ld_alpha,
                           .ref = p[3],
                           .ref_step = 1,
                           .sums = p[4],
                           .dlogp = p[5] };
    k->sequence_sums(w, &l);
    k->pair_slopes(w, &l, step);
    l.dlogp += LOSS_TOKENS;
    l.ref = NULL;
    k->pair_slopes(w, &l, step);
    l.dlogp += LOSS_TOKENS;
    l.ref = &l.sums->weighted;
    l.ref_step = sizeof *l.sums / sizeof(double);
    k->kto_slopes(w, &l, &(struct kto_step){ 0.1, 0.3, { 0.5, 2 }, 16 });
    l.dlogp += LOSS_TOKENS;
    k->even_slopes(w, &l, -0.25);
    l.sums += SEQUENCES;
    l.stats = (struct logprob_stats){ 0 };
    k->sequence_sums(w, &l);
}

void test_losses(void **state)
{
    (void)state;
    static const int32_t offset[SEQUENCES + 1] = { 0, 3, 260, 261, 700, 1100, 1101, 1499, LOSS_TOKENS };
    for (int kind = 0; kind < PREF_KINDS; kind++) {
        struct pref_step step = { .c = { .loss = kind,
                                         .more = { kind % 3 ? 0 : 1 + (kind + 7) % PREF_KINDS, 0 },
                                         .weight = { 1, 0.5, 1 },
                                         .beta = 0.1,
                                         .label_smoothing = 0.1,
                                         .f_divergence = kind % 4,
                                         .f_alpha = 0.5,
                                         .ld_alpha = kind % 2 ? 1 : 0.5,
                                         .simpo_gamma = 0.5,
                                         .discopop_tau = 0.05,
                                         .alphapo_alpha = 0.25,
                                         .nll_norm = kind % 2,
                                         .wpo = kind % 3 == 1 },
                                  .weight = 0.25,
                                  .nll_alpha = kind % 2,
                                  .mean_length = 30,
                                  .kl = { 0.2, 0.4 } };
        struct run r = { .what = "losses", .call = call_losses, .arg = &step, .tolerance = 1e-5 };
        int32_t *about = add_buffer(&r, READ, (4 * SEQUENCES + 1 + LOSS_TOKENS) * sizeof *about);
        memcpy(about, offset, sizeof offset);
        for (int i = 0; i < LOSS_TOKENS; i++)
            about[4 * SEQUENCES + 1 + i] = i % 9 ? i : -1;
        float *logp = floats(&r, READ, LOSS_TOKENS), *stats = floats(&r, READ, (int64_t)4 * LOSS_TOKENS);
        for (int i = 0; i < LOSS_TOKENS; i++) {
            logp[i] = i % 9 ? -0.01f - fabsf(logp[i]) / 64 : 0;
            for (int j = 0; j < 4; j++)
                stats[j * LOSS_TOKENS + i] = i % 9 ? stats[j * LOSS_TOKENS + i] / 64 : 0;
        }
        double *ref = add_buffer(&r, READ, SEQUENCES * sizeof *ref);
        for (int s = 0; s < SEQUENCES; s++) {
            ref[s] = -0.4 * (offset[s + 1] - offset[s]);
            about[SEQUENCES + 1 + s] = (offset[s] + offset[s + 1] + 1) / 2;
            about[3 * SEQUENCES + 1 + s] = s % 3 == 0;
            about[2 * SEQUENCES + 1 + s] = 0;
            for (int i = offset[s]; i < offset[s + 1]; i++)
                about[2 * SEQUENCES + 1 + s] += i % 9 != 0;
        }
        add_buffer(&r, JUNK, (size_t)2 * SEQUENCES * sizeof(struct sequence_sums));
        floats(&r, CLOSE, (int64_t)4 * LOSS_TOKENS);
        check_one(&r, kind % 2);
    }
}

/* ---- rows and columns ---- */

struct shape {
    int64_t rows, c;
};

static void call_norm(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct shape *s = arg;
    k->rmsnorm(w, array_of(p[0]), p[1], array_of(p[2]), p[3], s->rows, s->c, 1e-5f);
    k->rmsnorm_bwd(w, array_of(p[4]), array_of(p[5]), array_of(p[2]), p[3], p[1], s->rows, s->c);
    k->rmsnorm_bwd_weight(w, p[6], array_of(p[5]), array_of(p[2]), p[1], s->rows, s->c);
    k->bias_bwd(w, p[7], array_of(p[5]), s->rows, s->c);
}

void test_norms(void **state)
{
    (void)state;
    static const struct shape shapes[] = { { 1, 1 },   { 5, 7 },    { 9, 64 },   { 17, 300 }, { 3, 1028 },
                                           { 255, 3 }, { 256, 33 }, { 700, 36 }, { 2, 130 },  { 0, 8 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            const struct shape *s = &shapes[i];
            struct run r = {
                .what = "norm", .call = call_norm, .arg = s, .tolerance = s->rows > 100 ? 1e-4 : 1e-5 /* sums of rows */
            };
            floats(&r, CLOSE, s->rows * s->c);
            floats(&r, CLOSE, s->rows);
            floats(&r, READ, s->rows * s->c);
            floats(&r, READ, s->c);
            floats(&r, CLOSE, s->rows * s->c);
            floats(&r, READ, s->rows * s->c);
            floats(&r, CLOSE, s->c);
            floats(&r, CLOSE, s->c);
            check_one(&r, skew);
        }
}

static void call_sum(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    int64_t n = *(const int64_t *)arg;
    k->sum(w, p[0], p[1], n, p[2]);
    k->block_sums(w, p[1], n, false, p[3]);
    k->block_sums(w, p[1], n, true, p[4]);
}

void test_sums(void **state)
{
    (void)state;
    static const int64_t sizes[] = {
        0, 1, 17, 1023, 1024, 1025, 5000, 1024 * 7, 1024 * 530 + 5
    }; /* the last one: rounds of a level */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct run r = { .what = "sum", .call = call_sum, .arg = &sizes[i] };
        size_t blocks = (size_t)((sizes[i] + SUM_BLOCK - 1) / SUM_BLOCK) * sizeof(double);
        floats(&r, EXACT, 1);
        floats(&r, READ, sizes[i]);
        add_buffer(&r, JUNK, blocks);
        add_buffer(&r, EXACT, blocks);
        add_buffer(&r, EXACT, blocks);
        check_one(&r, i % 2);
    }
}

static void call_find(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    k->find_nonfinite(w, p[0], array_of(p[1]), *(const int64_t *)arg);
}

/* No bad element, one at the ends, several. */
void test_firsts(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 0, 1, 255, 257, 1030, 128 * 256 + 700 };
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int where = 0; where < 4; where++) {
            if (where != 2 && i + 1 == sizeof sizes / sizeof *sizes)
                continue; /* it takes its time; the last element is one that a thread looks at second */
            int64_t n = sizes[i], at = where == 1 ? 0 : where == 2 ? n - 1 : n / 2;
            struct run r = { .what = "find_nonfinite", .call = call_find, .arg = &n };
            int64_t *first = add_buffer(&r, EXACT, sizeof *first);
            float *x = floats(&r, READ, n);
            for (int64_t j = at; where && n && j < n; j += where == 3 ? 1 + n / 5 : n)
                x[j] = bad[j % 3];
            if (n > 1)
                x[at ? 0 : 1] = 3e38f;
            int64_t got = -1;
            kernels_cpu.find_nonfinite(NULL, &got, array_of(x), n);
            assert_int_equal(got, where && n ? at : n);
            check_one(&r, where % 2);
        }
}

/* ---- rounding, and rows that move ---- */

static void call_round(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    int64_t n = *(const int64_t *)arg;
    k->narrow(w, p[0], p[1], n);
    k->round_low(w, p[2], n);
    k->widen(w, p[3], p[4], n);
}

/* Numbers, ties, subnormals, infinities and what is none. */
static void fill_bits(float *x, int64_t n)
{
    static const uint32_t bits[] = { 0x3f808000u, 0x3f818000u, 0x7f7fffffu, 0x7f800000u, 0xff800000u,
                                     0x7f800001u, 0xffc01234u, 0x00000001u, 0x80007fffu, 0x00018000u };
    for (int64_t i = 0; i < n; i++)
        memcpy(&x[i], &bits[(i / 3) % 10], i % 3 ? 0 : sizeof *x);
}

void test_rounds(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 0, 1, 1027, 132 * 16 * 256 + 77 }; /* the last one: threads take several */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        struct run r = { .what = "round", .call = call_round, .arg = &sizes[i] };
        add_buffer(&r, EXACT, (size_t)sizes[i] * sizeof(uint16_t));
        fill_bits(floats(&r, READ, sizes[i]), sizes[i]);
        fill_bits(floats(&r, EXACT, sizes[i]), sizes[i]);
        floats(&r, EXACT, sizes[i]);
        halves(&r, READ, sizes[i]);
        check_one(&r, i % 2);
    }
}

struct drawing {
    int64_t n;
    struct rounding how;
};

static void call_drawn(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct drawing *d = arg;
    k->narrow_drawn(w, p[0], p[1], d->n, &d->how);
}

void test_rounds_by_draws(void **state)
{
    (void)state;
    static const struct rng_at at = { .seed = 0x123456789abcdefu, .sample = 77, .step = 5, .stream = RNG_ROUND };
    static const struct drawing cases[] = {
        { 1000, { at, 1, { 5000 }, { 0 }, { 5000 }, 3 } },
        { 4097, { at, 2, { 100, 60 }, { 10, 0 }, { 80, 60 }, 61 } },      /* rows of a tensor */
        { 1234, { at, 2, { 100, 60 }, { 0, 13 }, { 100, 17 }, 29 } },     /* columns */
        { 700, { at, 3, { 9, 10, 31 }, { 2, 3, 5 }, { 5, 6, 24 }, 17 } }, /* of each a part */
        { 900, { at, 3, { 9, 10, 31 }, { 2, 3, 0 }, { 5, 6, 31 }, 25 } },
        { 40, { at, 2, { 1 << 20, 1 << 15 }, { (1 << 19) + 1, 0 }, { 10, 1 << 15 }, 5 } }, /* words beyond 2^34 */
        { 0, { at, 1, { 4 }, { 0 }, { 4 }, 0 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct run r = { .what = "rounding by draws", .call = call_drawn, .arg = &cases[i] };
        add_buffer(&r, EXACT, (size_t)cases[i].n * sizeof(uint16_t));
        fill_bits(floats(&r, READ, cases[i].n), cases[i].n);
        check_one(&r, i % 2);
    }
}

struct moving {
    int64_t n, c, ldy, ldx;
};

static void call_rows(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct moving *m = arg;
    k->copy_rows(w, p[0], m->ldy, p[2], m->ldx, m->n, m->c, false);
    k->copy_rows(w, p[1], m->ldy, p[2], m->ldx, m->n, m->c, true);
}

void test_rows_move(void **state)
{
    (void)state;
    static const struct moving shapes[] = { { 1, 1, 1, 1 },       { 40, 1, 3, 1 },    { 7, 12, 12, 36 },
                                            { 33, 16, 20, 16 },   { 33, 16, 18, 16 }, { 9, 16, 20, 18 },
                                            { 5, 300, 301, 304 }, { 0, 4, 4, 4 },     { 2000, 400, 400, 404 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            const struct moving *m = &shapes[i];
            struct run r = { .what = "rows", .call = call_rows, .arg = m };
            floats(&r, EXACT, m->n * m->ldy);
            floats(&r, EXACT, m->n * m->ldy);
            floats(&r, READ, m->n * m->ldx);
            check_one(&r, skew);
        }
}

/* ---- tables and angles ---- */

struct lookup {
    int64_t n, c, rows;
    bool half;
};

static void call_embedding(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct lookup *l = arg;
    k->embedding(w, p[0], p[1], l->half ? DTYPE_BF16 : DTYPE_F32, p[2], l->n, l->c);
    k->embedding_bwd(w, p[3], p[4], p[2], l->n, l->c);
}

void test_embeddings(void **state)
{
    (void)state;
    static const struct lookup lookups[] = { { 1, 1, 1, false },      { 31, 5, 4, true },    { 33, 64, 50, false },
                                             { 100, 130, 900, true }, { 70, 700, 3, false }, { 40, 516, 40, false } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof lookups / sizeof *lookups; i++) {
            const struct lookup *l = &lookups[i];
            struct run r = { .what = "embedding", .call = call_embedding, .arg = l, .tolerance = 3e-6 };
            floats(&r, CLOSE, l->n * l->c);
            uint16_t *table = add_buffer(&r, READ, (size_t)(l->rows * l->c) * (l->half ? 2 : 4));
            for (int64_t j = 0; j < l->rows * l->c; j++)
                if (l->half)
                    table[j] = bf16_from_f32(draw());
                else
                    ((float *)(void *)table)[j] = draw();
            int32_t *id = ints(&r, l->n);
            for (int64_t j = 0; j < l->n; j++)
                id[j] = j % 5 == 4 ? -1 : j % 3 == 2 ? 0 : draw_below((int32_t)l->rows);
            floats(&r, CLOSE, l->rows * l->c);
            floats(&r, READ, l->n * l->c);
            check_one(&r, skew);
        }
}

struct angles {
    int64_t n, h, d;
    double frequency[200], amplitude;
};

static void call_rope(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct angles *a = arg;
    k->rope_table(w, p[0], p[1], a->n, a->d, a->frequency, a->amplitude);
    k->rope(w, array_of(p[2]), array_of(p[3]), p[0], a->n, a->h, a->d);
    k->rope_bwd(w, array_of(p[4]), array_of(p[5]), p[0], a->n, a->h, a->d);
}

void test_ropes(void **state)
{
    (void)state;
    static const int64_t heads[][3] = { { 1, 1, 2 }, { 7, 3, 6 }, { 20, 2, 64 }, { 5, 4, 260 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < 4; i++) {
            struct angles a = { .n = heads[i][0], .h = heads[i][1], .d = heads[i][2], .amplitude = 1.25 };
            for (int64_t j = 0; j < a.d / 2; j++)
                a.frequency[j] = pow(10000.0, -2.0 * (double)j / (double)a.d);
            struct run r = { .what = "rope", .call = call_rope, .arg = &a, .tolerance = 1e-6 };
            floats(&r, CLOSE, a.n * a.d);
            int32_t *position = ints(&r, a.n);
            for (int64_t j = 0; j < a.n; j++)
                position[j] = draw_below(3000);
            for (int b = 0; b < 4; b++)
                floats(&r, b % 2 ? READ : CLOSE, a.n * a.h * a.d);
            check_one(&r, skew);
        }
}

/* Into heads from heads and from what they share, from heads into what they share, zeros. */
static void call_columns(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const int64_t *a = arg, n = a[0], heads = a[1], count = a[2];
    struct column_copy c = { .n = n, .heads = heads, .count = count, .x = p[0], .y = p[1], .x_step = 2, .y_step = 1 };
    c.x_token = heads * (c.x_head = 2 * count + 1);
    c.y_token = heads * (c.y_head = count + 3);
    k->columns(w, &c);
    c.y = p[2];
    c.add = true;
    k->columns(w, &c);
    struct column_copy shared = c;
    shared.y = p[3];
    shared.x_head = 0;
    shared.x_step = 1;
    k->columns(w, &shared);
    struct column_copy sum = c;
    sum.y = p[4];
    sum.y_token = 3 * count;
    sum.y_step = 3;
    sum.y_head = 0;
    k->columns(w, &sum);
    c.x = NULL;
    c.y = p[5];
    c.add = false;
    k->columns(w, &c);
}

void test_columns(void **state)
{
    (void)state;
    static const int64_t sizes[][3] = { { 1, 1, 1 }, { 7, 3, 5 }, { 20, 2, 64 }, { 0, 2, 3 }, { 9, 16, 32 } };
    for (int skew = 0; skew < 2; skew++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            const int64_t *a = sizes[i], rows = a[0] * a[1];
            struct run r = { .what = "columns", .call = call_columns, .arg = a, .tolerance = 1e-6 };
            floats(&r, READ, rows * (2 * a[2] + 1));
            for (int b = 1; b < 6; b++)
                floats(&r, CLOSE, b == 4 ? a[0] * 3 * a[2] : rows * (a[2] + 3));
            check_one(&r, skew);
        }
}

static void call_ropes_low(const struct kernels *k, struct workers *w, void **p, const void *arg)
{
    const struct low *l = arg;
    int64_t h = l->n, all = l->rows * h * l->c;
    static const double frequency[] = { 1, 0.3, 0.07, 0.01, 0.004, 0.001, 0.0003 };
    struct array a[4];
    for (int b = 0; b < 4; b++)
        a[b] = at_begin(k, p, l, b, b == 3, all);
    k->rope_table(w, p[4], p[5], l->rows, l->c, frequency, 1.0);
    k->rope(w, a[0], a[1], p[4], l->rows, h, l->c);
    k->rope_bwd(w, a[3], a[2], p[4], l->rows, h, l->c);
    all_done(k, p, l, a, 4, all);
}

void test_ropes_low(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = { { 1, 1, 2 }, { 5, 3, 14 }, { 33, 2, 8 } };
    for (unsigned how = 0; how < 3 * 32; how++) {
        const int64_t *shape = shapes[how / 32];
        struct low l = { how % 16, how & 16, shape[1], shape[0], shape[2] };
        struct run r = { .what = "rope of both types", .call = call_ropes_low, .arg = &l, .tolerance = 1e-5 };
        for (int b = 0; b < 4; b++)
            array_buffer(&r, b == 0 || b == 3 ? CLOSE : READ, is_low(&l, b), shape[0] * shape[1] * shape[2]);
        floats(&r, CLOSE, shape[0] * shape[2]);
        int32_t *position = ints(&r, shape[0]);
        for (int64_t i = 0; i < shape[0]; i++)
            position[i] = (int32_t)(i * 3);
        check_one(&r, how % 3 == 0);
    }
}
