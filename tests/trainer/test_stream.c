/* stream and pack against naive versions of the rules in stream.h, on datasets made up here. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/data/stream.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096 };

static uint64_t draw(uint64_t *at, uint64_t n)
{
    return rng_below((struct rng_at){ .seed = 99, .stream = RNG_DATA }, (*at)++, n);
}

/* A dataset of given lengths: length[rows * sequences]. Token ids count up through the file, the first half of a
 * sequence (at least one token, at most all but one) is not scored. */
static struct dataset *make(const uint32_t *length, uint64_t rows, int sequences)
{
    uint64_t n = rows * (uint64_t)sequences, tokens = 0;
    struct dataset *d = test_calloc(1, sizeof *d);
    *d = (struct dataset){ .sequences = sequences, .rows = rows, .seq = test_calloc(n, sizeof *d->seq) };
    for (uint64_t i = 0; i < n; i++) {
        d->seq[i] = (struct sequence){ .begin = tokens, .length = length[i], .scored = length[i] - length[i] / 2 };
        tokens += length[i];
        d->longest = length[i] > d->longest ? length[i] : d->longest;
    }
    d->tokens = tokens;
    d->token = test_calloc(tokens, sizeof *d->token);
    d->score = test_calloc(tokens, 1);
    for (uint64_t i = 0; i < n; i++) {
        for (uint32_t t = 0; t < length[i]; t++) {
            uint64_t at = d->seq[i].begin + t;
            d->token[at] = (int32_t)(at % 1000);
            d->score[at] = t >= length[i] / 2;
        }
    }
    return d;
}

static struct dataset *make_random(uint64_t rows, int sequences, uint32_t most, uint64_t *at)
{
    uint32_t *length = test_calloc(rows * (uint64_t)sequences, sizeof *length);
    for (uint64_t i = 0; i < rows * (uint64_t)sequences; i++)
        length[i] = 2 + (uint32_t)draw(at, most - 1);
    struct dataset *d = make(length, rows, sequences);
    test_free(length);
    return d;
}

static void unmake(struct dataset *d)
{
    test_free(d->seq);
    test_free(d->token);
    test_free(d->score);
    test_free(d);
}

/* ---- the order of samples ---- */

static void test_epochs(void **state)
{
    (void)state;
    static const uint64_t sizes[] = { 1, 2, 3, 7, 64, 65, 1000 };
    uint64_t at = 0;
    for (size_t c = 0; c < sizeof sizes / sizeof *sizes; c++) {
        uint64_t rows = sizes[c], moved = 0, other = 0;
        struct dataset *d = make_random(rows, 1, 5, &at);
        struct stream s, seed2, plain;
        assert_null(stream_init(&s, d, 11, 1, 1, true));
        assert_null(stream_init(&seed2, d, 12, 4, 2, true));
        assert_null(stream_init(&plain, d, 11, 1, 1, false));
        for (uint64_t epoch = 0; epoch < 4; epoch++) {
            char seen[1000] = { 0 };
            for (uint64_t i = 0; i < rows; i++) {
                uint64_t sample = epoch * rows + i, row = stream_row(&s, sample);
                assert_true(row < rows && !seen[row]);
                seen[row] = 1;
                assert_int_equal(row, rng_permute(11, (uint32_t)epoch, i, rows));
                assert_int_equal(stream_row(&plain, sample), i);
                moved += row != stream_row(&s, i);
                other += row != stream_row(&seed2, sample);
            }
        }
        if (rows >= 64) /* epochs and seeds have orders of their own */
            assert_true(moved > 2 * rows && other > 3 * rows);
        stream_fini(&s);
        stream_fini(&seed2);
        stream_fini(&plain);
        unmake(d);
    }
}

/* ---- dealing ---- */

/* The rule of stream.h, word by word: out[pack * micro + i]. */
static void deal_naively(const struct stream *s, uint64_t first, uint64_t *out)
{
    uint32_t batch = s->global_batch, micro = s->micro_batch, packs = batch / micro;
    uint64_t length[MOST], tokens[MOST] = { 0 };
    uint32_t pack_of[MOST], filled[MOST] = { 0 };
    for (uint32_t j = 0; j < batch; j++) {
        uint64_t row = stream_row(s, first + j);
        length[j] = 0;
        for (int side = 0; side < s->data->sequences; side++)
            length[j] += s->data->seq[row * (uint64_t)s->data->sequences + (uint64_t)side].length;
        pack_of[j] = UINT32_MAX;
    }
    for (uint32_t turn = 0; turn < batch; turn++) {
        uint32_t pick = UINT32_MAX, to = UINT32_MAX;
        for (uint32_t j = 0; j < batch; j++)
            if (pack_of[j] == UINT32_MAX && (pick == UINT32_MAX || length[j] > length[pick]))
                pick = j;
        for (uint32_t k = 0; k < packs; k++)
            if (filled[k] < micro && (to == UINT32_MAX || tokens[k] < tokens[to]))
                to = k;
        pack_of[pick] = to;
        tokens[to] += length[pick];
        filled[to]++;
    }
    uint32_t n = 0;
    for (uint32_t k = 0; k < packs; k++)
        for (uint32_t j = 0; j < batch; j++)
            if (pack_of[j] == k)
                out[n++] = stream_row(s, first + j);
    assert_int_equal(n, batch);
}

static void test_deal_grid(void **state)
{
    (void)state;
    static const struct {
        uint64_t rows;
        uint32_t batch, micro;
        int sequences;
        uint32_t most;
    } cases[] = {
        { 1, 1, 1, 1, 9 },  { 1, 6, 2, 2, 9 },      { 5, 1, 1, 2, 9 },      { 5, 5, 5, 1, 9 },
        { 5, 12, 3, 2, 9 }, { 10, 8, 1, 1, 3 },     { 10, 8, 2, 1, 3 },     { 10, 8, 4, 1, 3 },
        { 10, 8, 8, 1, 3 }, { 37, 32, 4, 2, 100 },  { 100, 64, 8, 2, 300 }, { 1000, 96, 6, 1, 2000 },
        { 7, 63, 7, 1, 2 }, { 300, 255, 5, 2, 60 }, { 50, 250, 1, 1, 40 },
    };
    uint64_t at = 0, want[MOST];
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct dataset *d = make_random(cases[c].rows, cases[c].sequences, cases[c].most, &at);
        for (int shuffle = 0; shuffle < 2; shuffle++) {
            struct stream s;
            assert_null(stream_init(&s, d, 5 + c, cases[c].batch, cases[c].micro, shuffle));
            for (uint64_t step = 0; step < 7; step++) {
                uint64_t first = step * cases[c].batch;
                uint64_t calls = mem_count();
                stream_deal(&s, first);
                assert_int_equal(mem_count(), calls);
                deal_naively(&s, first, want);
                assert_memory_equal(s.row, want, cases[c].batch * sizeof *want);
            }
            /* a pure function of the counter: back to an earlier step, from a stream that never saw the others */
            struct stream fresh;
            assert_null(stream_init(&fresh, d, 5 + c, cases[c].batch, cases[c].micro, shuffle));
            stream_deal(&s, 3 * cases[c].batch);
            stream_deal(&fresh, 3 * cases[c].batch);
            assert_memory_equal(s.row, fresh.row, cases[c].batch * sizeof *want);
            stream_fini(&fresh);
            stream_fini(&s);
        }
        unmake(d);
    }
}

/* Over whole epochs every row is dealt equally often, whatever the batch. */
static void test_no_row_lost(void **state)
{
    (void)state;
    enum { ROWS = 30, BATCH = 12, STEPS = 25 /* ten epochs */ };
    uint64_t at = 7;
    struct dataset *d = make_random(ROWS, 2, 50, &at);
    struct stream s;
    int seen[ROWS] = { 0 };
    assert_null(stream_init(&s, d, 3, BATCH, 4, true));
    for (uint64_t step = 0; step < STEPS; step++) {
        stream_deal(&s, step * BATCH);
        for (int i = 0; i < BATCH; i++)
            seen[s.row[i]]++;
    }
    for (int i = 0; i < ROWS; i++)
        assert_int_equal(seen[i], STEPS * BATCH / ROWS);
    stream_fini(&s);
    unmake(d);
}

static void test_deal_by_hand(void **state)
{
    (void)state;
    /* Two packs of three. Row 1 (20 tokens) goes to pack 0; rows 0, 4, 5 (9, 9, 7) to pack 1, which has 9 and then 18
     * when it is asked; now it is full, so rows 2 and 3 go to pack 0. */
    static const uint32_t one[] = { 9, 20, 3, 2, 9, 7 };
    static const uint64_t want_one[] = { 1, 2, 3, 0, 4, 5 };
    struct dataset *d = make(one, 6, 1);
    struct stream s;
    assert_null(stream_init(&s, d, 0, 6, 3, false));
    stream_deal(&s, 0);
    assert_memory_equal(s.row, want_one, sizeof want_one);
    /* samples 4..9 are rows 4 5 0 1 2 3 in that order: the tie of the nines now goes to row 4 first, packs stay in
     * sample order */
    static const uint64_t want_later[] = { 1, 2, 3, 4, 5, 0 };
    stream_deal(&s, 4);
    assert_memory_equal(s.row, want_later, sizeof want_later);
    stream_fini(&s);
    unmake(d);
    /* both sequences of a row count: 2 + 9, 5 + 5, 8 + 2, 2 + 2. 11 -> 0; 10 -> 1; 10 -> 1 (10 < 11); 4 -> 0 */
    static const uint32_t two[] = { 2, 9, 5, 5, 8, 2, 2, 2 };
    static const uint64_t want_two[] = { 0, 3, 1, 2 };
    d = make(two, 4, 2);
    assert_null(stream_init(&s, d, 0, 4, 2, false));
    stream_deal(&s, 0);
    assert_memory_equal(s.row, want_two, sizeof want_two);
    stream_fini(&s);
    unmake(d);
    /* all equal, three packs of two: samples 0 1 2 to packs 0 1 2, then 3 4 5 */
    static const uint32_t same[] = { 4, 4, 4, 4, 4, 4 };
    static const uint64_t want_same[] = { 0, 3, 1, 4, 2, 5 };
    d = make(same, 6, 1);
    assert_null(stream_init(&s, d, 0, 6, 2, false));
    stream_deal(&s, 0);
    assert_memory_equal(s.row, want_same, sizeof want_same);
    stream_fini(&s);
    unmake(d);
}

static void test_bad_batches(void **state)
{
    (void)state;
    static const uint32_t length[] = { 2 };
    static const uint32_t bad[][2] = { { 0, 1 }, { 1, 0 }, { 4, 3 }, { 2, 4 }, { 0, 0 } };
    struct dataset *d = make(length, 1, 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct stream s;
        status *st = stream_init(&s, d, 0, bad[i][0], bad[i][1], true);
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
    unmake(d);
}

/* ---- packs ---- */

static void expect_pack(const struct pack *p, const uint64_t *row, uint32_t n)
{
    const struct dataset *d = p->data;
    int64_t at = 0;
    uint64_t scored = 0;
    int32_t segment = 0;
    assert_int_equal(p->rows, n);
    assert_ptr_equal(p->in.token, p->token);
    assert_ptr_equal(p->in.seg.offset, p->offset);
    assert_ptr_equal(p->in.seg.position, p->position);
    assert_null(p->in.cache);
    for (uint32_t r = 0; r < n; r++) {
        assert_int_equal(p->row[r], row[r]);
        for (int side = 0; side < d->sequences; side++) {
            struct sequence q = d->seq[row[r] * (uint64_t)d->sequences + (uint64_t)side];
            assert_int_equal(p->offset[segment++], at);
            for (uint32_t t = 0; t < q.length; t++, at++) {
                assert_int_equal(p->token[at], d->token[q.begin + t]);
                assert_int_equal(p->position[at], t);
                if (t + 1 == q.length || !d->score[q.begin + t + 1]) {
                    assert_int_equal(p->target[at], -1);
                } else {
                    assert_int_equal(p->target[at], d->token[q.begin + t + 1]);
                    scored++;
                }
            }
        }
    }
    assert_int_equal(p->offset[segment], at);
    assert_int_equal(p->in.seg.count, segment);
    assert_int_equal(p->in.tokens, at);
    assert_int_equal(p->scored, scored);
}

static void test_pack(void **state)
{
    (void)state;
    uint64_t at = 40;
    for (int sequences = 1; sequences <= 2; sequences++) {
        struct dataset *d = make_random(17, sequences, 30, &at);
        uint64_t longest = 0, row[6];
        for (uint64_t r = 0; r < d->rows; r++) {
            uint64_t n = 0;
            for (int side = 0; side < sequences; side++)
                n += d->seq[r * (uint64_t)sequences + (uint64_t)side].length;
            if (n > longest) {
                longest = n;
                row[0] = r;
            }
        }
        struct pack p;
        assert_null(pack_init(&p, d, 6));
        assert_int_equal(p.cap_rows, 6);
        assert_true(p.cap_tokens >= (int64_t)(6 * longest));
        uint64_t calls = mem_count();
        for (int i = 1; i < 6; i++) /* the fullest pack there can be: the longest row again and again */
            row[i] = row[0];
        pack_build(&p, row, 6);
        expect_pack(&p, row, 6);
        for (uint32_t n = 0; n <= 6; n++) { /* then smaller ones in the same buffers, and an empty one */
            for (uint32_t i = 0; i < n; i++)
                row[i] = draw(&at, d->rows);
            pack_build(&p, row, n);
            expect_pack(&p, row, n);
        }
        pack_build(&p, row, 0);
        expect_pack(&p, row, 0);
        assert_int_equal(mem_count(), calls);
        pack_fini(&p);
        unmake(d);
    }
}

static void test_pack_too_big(void **state)
{
    (void)state;
    static const uint32_t length[] = { 1000, 1000 };
    struct dataset *d = make(length, 1, 2);
    struct pack p;
    static const uint32_t rows[] = { 0, UINT32_MAX, 1073742 /* x 2000 is just over 2^31 - 1 */ };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        status *st = pack_init(&p, d, rows[i]);
        assert_int_equal(status_code(st), ST_INVALID);
        status_free(st);
    }
    unmake(d);
}

static void test_sums(void **state)
{
    (void)state;
    /* Sequences of 8, 2, 5 and 3 tokens; scored are targets 3..6, 0, 1..3, 0..1 of each (half the length is not
     * scored). */
    static const uint32_t length[] = { 8, 2, 5, 3 };
    /* clang-format off */
    static const float logp[] = {
        -9, -9, -9, 1e8f, 1, -1e8f, 0.5f, -9, /* f64 keeps the 1 that f32 loses */
        -0.25f, -9,
        -9, 1e30f, -1e30f, 1, -9,             /* 1 in this order, 0 in the other one */
        -0x1p-30f, -3, -9,
    };
    /* clang-format on */
    struct dataset *d = make(length, 2, 2);
    struct pack p;
    static const uint64_t row[] = { 0, 1 };
    double sums[5] = { [4] = 77 };
    uint32_t lengths[5] = { [4] = 77 };
    assert_null(pack_init(&p, d, 2));
    pack_build(&p, row, 2);
    pack_sequence_sums(&p, logp, sums, lengths);
    static const double want[] = { 1.5, -0.25, 1, -3 - 0x1p-30 };
    static const uint32_t counts[] = { 4, 1, 3, 2 };
    for (int i = 0; i < 4; i++) {
        assert_true(sums[i] == want[i]);
        assert_int_equal(lengths[i], counts[i]);
    }
    assert_true(sums[4] == 77 && lengths[4] == 77);
    sums[0] = 0;
    pack_sequence_sums(&p, logp, sums, NULL);
    assert_true(sums[0] == 1.5);
    pack_fini(&p);
    unmake(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_epochs),       cmocka_unit_test(test_deal_grid),   cmocka_unit_test(test_no_row_lost),
        cmocka_unit_test(test_deal_by_hand), cmocka_unit_test(test_bad_batches), cmocka_unit_test(test_pack),
        cmocka_unit_test(test_pack_too_big), cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
