/* test_schedule: orders of passes of pipeline stages, run by a clock of the test's own: every pass comes once, after
 * what it needs, no stage waits in a circle though messages are taken only where they are received, gradients of a
 * chunk come in order of micro-batches, and waits and activations are what the documentation says. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "trainer/parallel/schedule.h"

enum { STAGES = 6, CHUNKS = 4, MOST = 14, CELLS = STAGES * CHUNKS * MOST };

/* A run of all stages. Times: of a chunk's pass. */
struct clock {
    enum pipe_schedule how;
    int stages, chunks;
    uint32_t n;
    struct pipe_op *op[STAGES];
    size_t ops[STAGES];
    int f, b, w; /* forward, gradients of activations, of weights */

    int begun[4][CELLS], end[4][CELLS]; /* by pass, [virtual stage][micro-batch]; -1: not yet */
    int now[STAGES];
    size_t at[STAGES];
    int sent[STAGES][CELLS], sends[STAGES]; /* backward messages: cells that receive them */
    int live[STAGES], peak[STAGES];
};

static int cell(const struct clock *c, int stage, uint32_t k)
{
    return stage * (int)c->n + (int)k;
}

static enum pipe_pass back_pass(const struct clock *c, int rank)
{
    return c->how == PIPE_ZERO_BUBBLE && rank > 0 ? PIPE_PASS_INPUT : PIPE_PASS_BACKWARD;
}

/* When what op needs is there; -1: not yet. */
static int ready(const struct clock *c, int rank, const struct pipe_op *op)
{
    int stage = op->chunk * c->stages + rank, last = c->stages * c->chunks - 1;
    if (op->pass == PIPE_PASS_FORWARD)
        return stage ? c->end[PIPE_PASS_FORWARD][cell(c, stage - 1, op->k)] : 0;
    int own = c->end[op->pass == PIPE_PASS_WEIGHT ? PIPE_PASS_INPUT : PIPE_PASS_FORWARD][cell(c, stage, op->k)];
    if (op->pass == PIPE_PASS_WEIGHT || stage == last || own < 0)
        return own;
    int from = c->end[back_pass(c, (stage + 1) % c->stages)][cell(c, stage + 1, op->k)];
    return from < own && from >= 0 ? own : from;
}

/* A rank has one copy of a gradient on its way, the first one of several chunks a group of them. */
static int may_send(const struct clock *c, int rank, const struct pipe_op *op)
{
    int stage = op->chunk * c->stages + rank, copies = c->chunks > 1 && rank == 0 ? c->stages : 1;
    if (op->pass == PIPE_PASS_FORWARD || op->pass == PIPE_PASS_WEIGHT || stage == 0 || c->sends[rank] < copies)
        return 1;
    int before = (rank + c->stages - 1) % c->stages;
    return c->begun[back_pass(c, before)][c->sent[rank][c->sends[rank] - copies]] >= 0;
}

static int run_one(struct clock *c, int rank)
{
    const struct pipe_op *op = &c->op[rank][c->at[rank]];
    int stage = op->chunk * c->stages + rank, from = ready(c, rank, op);
    if (from < 0 || !may_send(c, rank, op))
        return 0;
    int cost = op->pass == PIPE_PASS_FORWARD    ? c->f
               : op->pass == PIPE_PASS_BACKWARD ? c->b + c->w
               : op->pass == PIPE_PASS_INPUT    ? c->b
                                                : c->w;
    int *end = &c->end[op->pass][cell(c, stage, op->k)];
    assert_int_equal(*end, -1); /* once */
    c->begun[op->pass][cell(c, stage, op->k)] = from > c->now[rank] ? from : c->now[rank];
    *end = c->now[rank] = (from > c->now[rank] ? from : c->now[rank]) + cost;
    if (op->pass == PIPE_PASS_FORWARD && ++c->live[rank] > c->peak[rank])
        c->peak[rank] = c->live[rank];
    c->live[rank] -= op->pass == PIPE_PASS_BACKWARD || op->pass == PIPE_PASS_WEIGHT;
    if (op->pass != PIPE_PASS_FORWARD && op->pass != PIPE_PASS_WEIGHT && stage)
        c->sent[rank][c->sends[rank]++] = cell(c, stage - 1, op->k);
    c->at[rank]++;
    return 1;
}

/* Gradients of weights of each chunk, in order of micro-batches, all of them. */
static void check_order(const struct clock *c, int rank)
{
    uint32_t due[CHUNKS] = { 0 };
    for (size_t i = 0; i < c->ops[rank]; i++) {
        const struct pipe_op *op = &c->op[rank][i];
        assert_true(op->chunk >= 0 && op->chunk < c->chunks);
        if (op->pass == PIPE_PASS_BACKWARD || op->pass == PIPE_PASS_WEIGHT)
            assert_int_equal(op->k, due[op->chunk]++);
    }
    for (int chunk = 0; chunk < c->chunks; chunk++)
        assert_int_equal(due[chunk], c->n);
}

/* Returns the time of the whole. */
static int run(struct clock *c, enum pipe_schedule how, int stages, int chunks, uint32_t n)
{
    memset(c->end, -1, sizeof c->end);
    memset(c->begun, -1, sizeof c->begun);
    c->how = how;
    c->stages = stages;
    c->chunks = chunks;
    c->n = n;
    for (int r = 0; r < stages; r++) {
        struct pipe_shape s = { how, stages, r, chunks };
        uint64_t *scratch = malloc((schedule_scratch(&s, n) + 1) * sizeof *scratch);
        c->op[r] = malloc((schedule_ops(&s, n) + 1) * sizeof *c->op[r]);
        assert_true(scratch && c->op[r]);
        c->ops[r] = schedule_make(&s, n, scratch, c->op[r]);
        assert_true(c->ops[r] <= schedule_ops(&s, n));
        free(scratch);
        check_order(c, r);
        c->now[r] = c->live[r] = c->peak[r] = c->sends[r] = 0;
        c->at[r] = 0;
    }
    for (int moved = 1; moved;) {
        moved = 0;
        for (int r = 0; r < stages; r++)
            while (c->at[r] < c->ops[r] && run_one(c, r))
                moved = 1;
    }
    int time = 0;
    for (int r = 0; r < stages; r++) {
        struct pipe_shape s = { how, stages, r, chunks };
        if (c->at[r] != c->ops[r])
            fail_msg("schedule %d, %d stages of %d chunks, %u micro-batches: stage %d stands at %zu of %zu", (int)how,
                     stages, chunks, n, r, c->at[r], c->ops[r]);
        assert_int_equal(c->live[r], 0);
        assert_true(c->peak[r] <= schedule_in_flight(&s, n));
        time = c->now[r] > time ? c->now[r] : time;
        free(c->op[r]);
    }
    return time;
}

static void one_chunk(void **state)
{
    (void)state;
    static struct clock c = { .f = 3, .b = 2, .w = 2 };
    for (int p = 1; p <= STAGES; p++)
        for (uint32_t n = 0; n <= MOST; n++) {
            int whole = (int)n * (c.f + c.b + c.w), all = run(&c, PIPE_1F1B, p, 1, n);
            if (n)
                assert_int_equal(all, whole + (p - 1) * (c.f + c.b + c.w));
            for (int r = 0; r < p; r++)
                assert_int_equal(c.peak[r], (int)n < p - r ? (int)n : p - r);
            all = run(&c, PIPE_ZERO_BUBBLE, p, 1, n);
            if (n >= (uint32_t)p)
                assert_true(all <= whole + (p - 1) * (c.f + c.b + c.w));
            for (int r = 0; r < p; r++)
                assert_int_equal(c.peak[r], (int)n < p ? (int)n : p);
        }
}

static void several_chunks(void **state)
{
    (void)state;
    static struct clock c = { .f = 1, .b = 1, .w = 1 };
    for (int p = 2; p <= STAGES; p++)
        for (int v = 1; v <= CHUNKS; v++)
            for (uint32_t n = 1; n <= MOST; n++) {
                int all = run(&c, PIPE_INTERLEAVED, p, v, n), pass = c.f + c.b + c.w, whole = (int)n * v * pass;
                assert_true(all >= whole + (p - 1) * pass);
                if (n % (uint32_t)p == 0) /* the paper's: (P - 1) (F + B + W) / V of a stage's times */
                    assert_int_equal(all, whole + (p - 1) * pass);
                else /* never worse than 1F1B */
                    assert_true(all <= whole + (p - 1) * pass * v);
                for (int r = 0; r < p && n % (uint32_t)p == 0; r++) {
                    int most = (v - 1) * p + 2 * (p - r - 1) + 1, pieces = (int)n * v;
                    assert_int_equal(c.peak[r], pieces < most ? pieces : most);
                }
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_chunk),
        cmocka_unit_test(several_chunks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
