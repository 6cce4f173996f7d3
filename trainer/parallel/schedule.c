/* schedule: see schedule.h. */
#include "trainer/parallel/schedule.h"

#include "comm/base/status.h"

enum { FORWARD_TIME = 1, BACKWARD_TIME = 2 };

static uint32_t least(uint64_t a, uint64_t b)
{
    return (uint32_t)(a < b ? a : b);
}

static uint32_t delay_of(const struct pipe_shape *s)
{
    return s->how == PIPE_ZERO_BUBBLE ? (uint32_t)s->stage : 0;
}

/* Of stage `stage`, with any number of micro-batches. */
static uint64_t limit_of(const struct pipe_shape *s, int stage)
{
    uint64_t behind = (uint64_t)(s->stages - stage - 1);
    if (s->how == PIPE_INTERLEAVED)
        return (uint64_t)(s->chunks - 1) * (uint64_t)s->stages + 2 * behind + 1;
    return behind + 1 + (s->how == PIPE_ZERO_BUBBLE ? (uint64_t)stage : 0);
}

int schedule_in_flight(const struct pipe_shape *s, uint32_t n)
{
    return (int)least((uint64_t)n * (uint64_t)s->chunks, limit_of(s, s->stage));
}

size_t schedule_ops(const struct pipe_shape *s, uint32_t n)
{
    return (size_t)n * (size_t)s->chunks * (delay_of(s) ? 3 : 2);
}

size_t schedule_scratch(const struct pipe_shape *s, uint32_t n)
{
    size_t stages = (size_t)s->stages;
    return s->how == PIPE_INTERLEAVED ? (2 * (size_t)n * (size_t)s->chunks + 3) * stages : 0;
}

/* ---- one chunk a stage ---- */

static size_t make_plain(const struct pipe_shape *s, uint32_t n, struct pipe_op *op)
{
    uint32_t ahead = least(n, (uint64_t)(s->stages - s->stage - 1)), delay = delay_of(s);
    size_t ops = 0;
    for (uint32_t i = 0; i < n + ahead + delay; i++) {
        if (i < n)
            op[ops++] = (struct pipe_op){ i, 0, PIPE_PASS_FORWARD };
        if (i >= ahead && i - ahead < n)
            op[ops++] = (struct pipe_op){ i - ahead, 0, delay ? PIPE_PASS_INPUT : PIPE_PASS_BACKWARD };
        if (delay && i >= ahead + delay)
            op[ops++] = (struct pipe_op){ i - ahead - delay, 0, PIPE_PASS_WEIGHT };
    }
    return ops;
}

/* ---- several ---- */

/* Piece i of the order in which all stages go forward, or backward. */
struct piece {
    uint32_t k, group; /* micro-batch; micro-batches of its group */
    int chunk;
    size_t forward; /* the same piece's place in the order forward */
};

static struct piece piece_at(const struct pipe_shape *s, uint32_t n, size_t i, int backward)
{
    size_t v = (size_t)s->chunks, p = (size_t)s->stages, g = i / (p * v), at = i % (p * v);
    struct piece x = { .group = least(p, n - g * p) };
    size_t turn = at / x.group, chunk = backward ? v - 1 - turn : turn;
    x.chunk = (int)chunk;
    x.k = (uint32_t)(g * p + at % x.group);
    x.forward = g * p * v + chunk * x.group + at % x.group;
    return x;
}

/* A run with passes of these lengths; times are of the end of a pass, 0: it has not begun. */
struct simulation {
    const struct pipe_shape *s;
    uint32_t n;
    size_t pieces;
    uint64_t *forward, *backward;         /* [stages][pieces], in the order forward, and backward */
    uint64_t *idle_at, *ahead, *returned; /* [stages]: busy until, passes begun forward, backward */
};

static int came(uint64_t end, uint64_t now)
{
    return end && end <= now;
}

static int forward_ready(const struct simulation *m, size_t stage, uint64_t now)
{
    size_t i = m->ahead[stage], last = (size_t)m->s->stages - 1;
    if (i == m->pieces || i - m->returned[stage] >= limit_of(m->s, (int)stage))
        return 0;
    struct piece x = piece_at(m->s, m->n, i, 0);
    if (stage > 0)
        return came(m->forward[(stage - 1) * m->pieces + i], now);
    return x.chunk == 0 || came(m->forward[last * m->pieces + i - x.group], now);
}

static int backward_ready(const struct simulation *m, size_t stage, uint64_t now)
{
    size_t i = m->returned[stage], last = (size_t)m->s->stages - 1;
    if (i == m->pieces)
        return 0;
    struct piece x = piece_at(m->s, m->n, i, 1);
    if (!came(m->forward[stage * m->pieces + x.forward], now))
        return 0;
    if (stage < last)
        return came(m->backward[(stage + 1) * m->pieces + i], now);
    return x.chunk == m->s->chunks - 1 || came(m->backward[i - x.group], now);
}

/* Begin a pass on a stage that is idle; false: there is none to run. */
static int begin_pass(struct simulation *m, size_t stage, uint64_t now, struct pipe_op *op)
{
    int forward = forward_ready(m, stage, now);
    if (!forward && !backward_ready(m, stage, now))
        return 0;
    uint64_t *count = forward ? &m->ahead[stage] : &m->returned[stage];
    uint64_t *end = (forward ? m->forward : m->backward) + stage * m->pieces + *count;
    struct piece x = piece_at(m->s, m->n, *count, !forward);
    *op = (struct pipe_op){ x.k, x.chunk, forward ? PIPE_PASS_FORWARD : PIPE_PASS_BACKWARD };
    *end = m->idle_at[stage] = now + (forward ? FORWARD_TIME : BACKWARD_TIME);
    ++*count;
    return 1;
}

static size_t make_interleaved(const struct pipe_shape *s, uint32_t n, uint64_t *scratch, struct pipe_op *op)
{
    size_t stages = (size_t)s->stages, pieces = (size_t)n * (size_t)s->chunks, ops = 0;
    struct simulation m = { .s = s, .n = n, .pieces = pieces, .forward = scratch };
    for (size_t i = 0; i < schedule_scratch(s, n); i++)
        scratch[i] = 0;
    m.backward = m.forward + stages * pieces;
    m.idle_at = m.backward + stages * pieces;
    m.ahead = m.idle_at + stages;
    m.returned = m.ahead + stages;
    /* Never long without a pass: the earliest backward pass that some stage has not run needs pieces that are ahead of
     * it by less than the limit on every stage. */
    for (uint64_t now = 0; ops < 2 * pieces; now++) {
        CHECK(now <= (FORWARD_TIME + BACKWARD_TIME) * (pieces + 1) * stages, "an interleaved schedule does not end");
        for (size_t stage = 0; stage < stages; stage++) {
            struct pipe_op x;
            if (m.idle_at[stage] <= now && begin_pass(&m, stage, now, &x) && (int)stage == s->stage)
                op[ops++] = x;
        }
    }
    return ops;
}

size_t schedule_make(const struct pipe_shape *s, uint32_t n, uint64_t *scratch, struct pipe_op *op)
{
    return s->how == PIPE_INTERLEAVED ? make_interleaved(s, n, scratch, op) : make_plain(s, n, op);
}
