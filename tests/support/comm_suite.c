/* comm_suite: expected values are computed from ranks by closed forms, never by another communicator call. A check that
 * does not hold returns at once; the job is then broken, which is what a failed test is. */
#include "tests/support/comm_suite.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "comm/mesh.h"
#include "comm/ordered.h"
#include "comm/window.h"

#include <stdio.h>
#include <string.h>

#define EXPECT(cond, ...)                                                                                              \
    do {                                                                                                               \
        if (!(cond))                                                                                                   \
            return status_wrap(ERR(INTERNAL, "does not hold: %s", #cond), "check " __VA_ARGS__);                       \
    } while (0)

/* The byte that rank `r` keeps at place i of message `m`. */
static unsigned char pattern(int r, int m, size_t i)
{
    return (unsigned char)((unsigned)r * 131 + (unsigned)m * 31 + i * 7 + (i >> 8) + 1);
}

static unsigned char *new_bytes(size_t n, int fill)
{
    unsigned char *p = mem_alloc(n);
    CHECK(p, "out of memory in a test");
    return memset(p, fill, n ? n : 1);
}

/* ---- reductions ---- */

/* Element i of rank r, small enough that sums over 16 ranks are exact in every type. Not monotone in r. */
static int element(int r, size_t i)
{
    return (int)((i * 5 + (size_t)r * 3 + (size_t)(r * r)) % 13) + (r == 1 ? 1 : 0);
}

static int expected(int size, size_t i, enum comm_op op)
{
    int v = element(0, i);
    for (int r = 1; r < size; r++) {
        int e = element(r, i);
        v = op == COMM_SUM ? v + e : op == COMM_MIN ? (e < v ? e : v) : (e > v ? e : v);
    }
    return v;
}

/* Signed types also see negative values: sign is -1 for them on odd elements, which swaps MIN and MAX. */
static double value_of(const void *p, size_t i, enum comm_type t)
{
    switch (t) {
    case COMM_U8:
        return ((const uint8_t *)p)[i];
    case COMM_I32:
        return ((const int32_t *)p)[i];
    case COMM_I64:
        return (double)((const int64_t *)p)[i];
    case COMM_U64:
        return (double)((const uint64_t *)p)[i];
    case COMM_F32:
        return (double)((const float *)p)[i];
    case COMM_F64:
        return ((const double *)p)[i];
    }
    return -1;
}

static void set_value(void *p, size_t i, enum comm_type t, int v)
{
    switch (t) {
    case COMM_U8:
        ((uint8_t *)p)[i] = (uint8_t)v;
        break;
    case COMM_I32:
        ((int32_t *)p)[i] = v;
        break;
    case COMM_I64:
        ((int64_t *)p)[i] = v;
        break;
    case COMM_U64:
        ((uint64_t *)p)[i] = (uint64_t)v;
        break;
    case COMM_F32:
        ((float *)p)[i] = (float)v;
        break;
    case COMM_F64:
        ((double *)p)[i] = v;
        break;
    }
}

static bool is_signed(enum comm_type t)
{
    return t != COMM_U8 && t != COMM_U64;
}

static void fill(void *p, size_t n, int rank, enum comm_type t)
{
    for (size_t i = 0; i < n; i++)
        set_value(p, i, t, is_signed(t) && i % 2 ? -element(rank, i) : element(rank, i));
}

static status *check_sums(const void *p, size_t n, int size, enum comm_type t, enum comm_op op, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        bool negative = is_signed(t) && i % 2;
        enum comm_op of = !negative || op == COMM_SUM ? op : op == COMM_MIN ? COMM_MAX : COMM_MIN;
        int want = negative ? -expected(size, i, of) : expected(size, i, of);
        double got = value_of(p, i, t);
        if (got < want || got > want)
            return ERR(INTERNAL, "%s: type %d, operation %d, element %zu of %zu is %g, not %d", what, (int)t, (int)op,
                       i, n, got, want);
    }
    return NULL;
}

static status *check_reductions(struct comm *c)
{
    static const size_t counts[] = { 0, 1, 2, 7, 1000, 70001 };
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        size_t n = counts[k];
        for (int t = COMM_U8; t <= COMM_F64; t++) {
            for (int op = COMM_SUM; op <= COMM_MAX; op++) {
                size_t bytes = (n + 1) * comm_type_bytes((enum comm_type)t);
                unsigned char *in = new_bytes(bytes, 0x5a), *out = new_bytes(bytes, 0x5a),
                              *inout = new_bytes(bytes, 0x5a);
                unsigned char guard[8];
                memset(guard, 0x5a, sizeof guard);
                fill(in, n, c->rank, (enum comm_type)t);
                fill(inout, n, c->rank, (enum comm_type)t);
                struct comm_req req;
                TRY(comm_iallreduce(c, in, out, n, (enum comm_type)t, (enum comm_op)op, &req));
                TRY(comm_allreduce(c, inout, n, (enum comm_type)t, (enum comm_op)op, NULL));
                TRY(comm_wait(&req));
                EXPECT(!comm_pending(&req));
                TRY(check_sums(inout, n, c->size, (enum comm_type)t, (enum comm_op)op, "allreduce"));
                TRY(check_sums(out, n, c->size, (enum comm_type)t, (enum comm_op)op, "iallreduce"));
                size_t one = comm_type_bytes((enum comm_type)t), end = n * one;
                EXPECT(!memcmp(inout + end, guard, one) && !memcmp(out + end, guard, one), "(wrote past the end)");
                mem_free(in);
                mem_free(out);
                mem_free(inout);
            }
        }
    }
    return NULL;
}

/* Values that an int or a float on the way would damage. */
static status *check_wide_values(struct comm *c)
{
    int64_t i = -(((int64_t)1 << 40) + c->rank);
    uint64_t u = ((uint64_t)1 << 63) + (uint64_t)c->rank;
    double d = 1.0 + c->rank * 0x1p-50;
    TRY(comm_allreduce(c, &i, 1, COMM_I64, COMM_MIN, NULL));
    TRY(comm_allreduce(c, &u, 1, COMM_U64, COMM_MAX, NULL));
    TRY(comm_allreduce(c, &d, 1, COMM_F64, COMM_MAX, NULL));
    EXPECT(i == -(((int64_t)1 << 40) + c->size - 1));
    EXPECT(u == ((uint64_t)1 << 63) + (uint64_t)c->size - 1);
    double want = 1.0 + (c->size - 1) * 0x1p-50;
    EXPECT(!memcmp(&d, &want, sizeof d));
    int32_t bad = 0;
    status *st = comm_allreduce(c, &bad, 1, (enum comm_type)99, COMM_SUM, NULL);
    EXPECT(status_code(st) == ST_INVALID);
    status_free(st);
    return NULL;
}

/* ---- moving bytes ---- */

static status *check_bcast(struct comm *c)
{
    static const size_t sizes[] = { 0, 1, 3, 4096, 300001 };
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        for (int root = 0; root < c->size; root++) {
            size_t n = sizes[k];
            unsigned char *b = new_bytes(n + 1, 0xee);
            for (size_t i = 0; c->rank == root && i < n; i++)
                b[i] = pattern(root, (int)k, i);
            TRY(comm_bcast(c, b, n, root, NULL));
            for (size_t i = 0; i < n; i++)
                EXPECT(b[i] == pattern(root, (int)k, i), "at %zu of %zu, root %d", i, n, root);
            EXPECT(b[n] == 0xee);
            mem_free(b);
        }
    }
    status *st = comm_bcast(c, NULL, 0, c->size, NULL);
    EXPECT(status_code(st) == ST_INVALID);
    status_free(st);
    st = comm_bcast(c, NULL, 0, -1, NULL);
    EXPECT(status_code(st) == ST_INVALID);
    status_free(st);
    return NULL;
}

static status *check_allgather(struct comm *c)
{
    static const size_t sizes[] = { 0, 1, 5, 64, 65537 };
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        for (int in_place = 0; in_place < 2; in_place++) {
            size_t n = sizes[k], all = n * (size_t)c->size;
            unsigned char *in = new_bytes(n, 0), *out = new_bytes(all + 1, 0xee);
            unsigned char *from = in_place ? out + (size_t)c->rank * n : in;
            for (size_t i = 0; i < n; i++)
                from[i] = pattern(c->rank, (int)k, i);
            TRY(comm_allgather(c, from, out, n, NULL));
            for (size_t i = 0; i < all; i++)
                EXPECT(out[i] == pattern((int)(i / n), (int)k, i % n), "at %zu of %zu", i, all);
            EXPECT(out[all] == 0xee);
            mem_free(in);
            mem_free(out);
        }
    }
    return NULL;
}

/* Bytes of rank r in round k: some ranks have none. */
static size_t share(int r, int k)
{
    static const size_t base[] = { 0, 1, 17, 40000 };
    return (r + k) % 3 == 0 ? 0 : base[k % 4] * (size_t)(r + 1);
}

static status *check_gather_scatter(struct comm *c)
{
    for (int k = 0; k < 4; k++) {
        for (int root = 0; root < c->size; root++) {
            bool mine = c->rank == root;
            size_t n = share(c->rank, k), total = 0, counts[64];
            for (int r = 0; r < c->size; r++)
                total += counts[r] = share(r, k);
            unsigned char *part = new_bytes(n + 1, 0xee), *back = new_bytes(n + 1, 0xee),
                          *all = new_bytes(total + 1, 0xee);
            for (size_t i = 0; i < n; i++)
                part[i] = pattern(c->rank, k, i);
            TRY(comm_gatherv(c, part, n, mine ? all : NULL, mine ? counts : NULL, root));
            for (size_t r = 0, at = 0; mine && r < (size_t)c->size; at += counts[r++])
                for (size_t i = 0; i < counts[r]; i++)
                    EXPECT(all[at + i] == pattern((int)r, k, i), "rank %zu byte %zu, root %d", r, i, root);
            EXPECT(all[total] == 0xee);
            TRY(comm_scatterv(c, mine ? all : NULL, mine ? counts : NULL, back, n, root));
            EXPECT(!memcmp(part, back, n + 1), "(scatterv, root %d, round %d)", root, k);
            mem_free(part);
            mem_free(back);
            mem_free(all);
        }
    }
    return NULL;
}

static status *check_byte_strings(struct comm *c)
{
    for (int root = 0; root < c->size; root++) {
        bool mine = c->rank == root;
        char text[64];
        int n = c->rank == 1 ? 0 : snprintf(text, sizeof text, "%*d", c->rank + 1, c->rank);
        void *all = NULL;
        size_t *counts = NULL, at = 0;
        TRY(comm_gather_bytes(c, text, (size_t)n, root, &all, &counts));
        EXPECT(mine == (all != NULL) && mine == (counts != NULL));
        for (int r = 0; mine && r < c->size; at += counts[r++]) {
            EXPECT(counts[r] == (r == 1 ? 0u : (size_t)r + 1), "at rank %d", r);
            if (counts[r])
                EXPECT(((char *)all)[at + counts[r] - 1] == '0' + r % 10);
        }
        mem_free(all);
        mem_free(counts);
        for (size_t length = 0; length < 70000; length = length * 3 + 1) {
            unsigned char *sent = mine ? new_bytes(length, 0) : NULL;
            for (size_t i = 0; mine && i < length; i++)
                sent[i] = pattern(root, 9, i);
            void *got = sent;
            size_t bytes = mine ? length : 12345;
            TRY(comm_bcast_bytes(c, &got, &bytes, root));
            EXPECT(bytes == length && got && (!mine || got == sent));
            for (size_t i = 0; i < length; i++)
                EXPECT(((unsigned char *)got)[i] == pattern(root, 9, i));
            EXPECT(mine || ((char *)got)[length] == 0);
            mem_free(got);
        }
    }
    return NULL;
}

/* ---- exchanges ---- */

enum { MESSAGES = 5 };

static size_t message_bytes(uint32_t round, int src, int dst, int m)
{
    struct rng_at at = { .seed = 11, .sample = round, .step = (uint32_t)(src * 64 + dst), .stream = RNG_DATA };
    static const size_t most[] = { 1, 40, 5000, 200000 };
    size_t kind = (size_t)rng_below(at, (uint64_t)m * 2, 5);
    return kind == 4 ? 0 : (size_t)rng_below(at, (uint64_t)m * 2 + 1, most[kind]) + 1;
}

/* Messages 0 and 1 share a tag, so that order between them counts. */
static int message_tag(int m)
{
    return m < 2 ? 0 : m == 2 ? COMM_TAG_MAX : m * 100;
}

struct traffic {
    struct comm_xfer x[2 * 64 * MESSAGES];
    size_t n;
};

/* Every pair, oneself included, exchanges MESSAGES messages of random sizes. Receives are listed backwards by peer. */
static void plan_traffic(struct comm *c, uint32_t round, struct traffic *t)
{
    t->n = 0;
    for (int p = 0; p < c->size; p++) {
        for (int m = 0; m < MESSAGES; m++) {
            int from = c->size - 1 - p;
            size_t in = message_bytes(round, from, c->rank, m), out = message_bytes(round, c->rank, p, m);
            unsigned char *send = new_bytes(out, 0);
            for (size_t i = 0; i < out; i++)
                send[i] = pattern(c->rank, p * MESSAGES + m, i);
            t->x[t->n++] = (struct comm_xfer){ from, message_tag(m), false, new_bytes(in + 1, 0xee), in };
            t->x[t->n++] = (struct comm_xfer){ p, message_tag(m), true, send, out };
        }
    }
}

static status *check_traffic(struct comm *c, struct traffic *t)
{
    for (size_t i = 0; i < t->n; i++) {
        const struct comm_xfer *x = &t->x[i];
        const unsigned char *b = x->buf;
        int m = (int)(i / 2 % MESSAGES);
        for (size_t k = 0; !x->send && k < x->bytes; k++)
            EXPECT(b[k] == pattern(x->peer, c->rank * MESSAGES + m, k), "from %d message %d byte %zu of %zu", x->peer,
                   m, k, x->bytes);
        EXPECT(x->send || b[x->bytes] == 0xee, "(wrote past message %d from %d)", m, x->peer);
        mem_free(x->buf);
    }
    return NULL;
}

static status *check_exchanges(struct comm *c)
{
    struct traffic *t = mem_array(NULL, 3, sizeof *t);
    CHECK(t, "out of memory in a test");
    for (uint32_t round = 0; round < 6; round++) {
        plan_traffic(c, round, &t[0]);
        TRY(comm_exchange(c, t[0].x, t[0].n, NULL));
        TRY(check_traffic(c, &t[0]));
    }
    struct comm_req req[3]; /* several in flight, finished in another order, a collective between */
    for (uint32_t k = 0; k < 3; k++) {
        plan_traffic(c, 100 + k, &t[k]);
        TRY(comm_iexchange(c, t[k].x, t[k].n, NULL, &req[k]));
    }
    TRY(comm_barrier(c));
    for (int k = 2; k >= 0; k--) {
        for (bool done = false; !done;)
            TRY(comm_test(&req[k], &done));
        EXPECT(!comm_pending(&req[k]));
        TRY(check_traffic(c, &t[k]));
    }
    mem_free(t);
    return NULL;
}

/* What follows an exchange. */
struct follower {
    const int *got;
    int seen, calls;
};

static void follow(void *arg)
{
    struct follower *f = arg;
    f->seen = *f->got;
    f->calls++;
}

/* It follows once, when what it looks at has come and before anybody is told; never if the exchange was refused. */
static status *check_followers(struct comm *c)
{
    int to = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size, got, mine;
    struct comm_xfer x[] = { { to, 2, true, &mine, sizeof mine }, { from, 2, false, &got, sizeof got } };
    struct comm_req req;
    for (int round = 0; round < 20; round++) {
        struct follower f = { .got = &got };
        mine = 100 * round + c->rank;
        got = -1;
        TRY(comm_iexchange_then(c, x, 2, NULL, follow, &f, &req));
        for (bool done = round % 2; !done;)
            TRY(comm_test(&req, &done));
        TRY(comm_wait(&req));
        EXPECT(f.calls == 1 && f.seen == 100 * round + from, "round %d: %d calls, saw %d", round, f.calls, f.seen);
        TRY(comm_wait(&req));
        EXPECT(f.calls == 1);
    }
    struct follower f = { .got = &got };
    TRY(comm_iexchange_then(c, NULL, 0, NULL, follow, &f, &req));
    EXPECT(f.calls == 1 && !comm_pending(&req));
    TRY(comm_wait(&req));
    struct comm_xfer bad = { c->size, 0, true, &got, 1 };
    status *st = comm_iexchange_then(c, &bad, 1, NULL, follow, &f, &req);
    EXPECT(status_code(st) == ST_INVALID);
    status_free(st);
    TRY(comm_wait(&req));
    EXPECT(f.calls == 1);
    return NULL;
}

static status *check_empty_requests(struct comm *c)
{
    struct comm_req req = { 0 };
    bool done = false;
    EXPECT(!comm_pending(&req));
    TRY(comm_test(&req, &done));
    EXPECT(done);
    TRY(comm_wait(&req));
    TRY(comm_exchange(c, NULL, 0, NULL));
    struct comm_xfer nothing = { (c->rank + 1) % c->size, 3, true, NULL, 0 };
    TRY(comm_iexchange(c, &nothing, 1, NULL, &req));
    TRY(comm_wait(&req));
    struct comm_xfer bad[] = { { c->size, 0, true, NULL, 1 },
                               { -1, 0, true, NULL, 1 },
                               { 0, -1, true, NULL, 1 },
                               { 0, COMM_TAG_MAX + 1, true, NULL, 1 } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        status *st = comm_iexchange(c, &bad[i], 1, NULL, &req);
        EXPECT(status_code(st) == ST_INVALID && !comm_pending(&req));
        status_free(st);
    }
    return NULL;
}

/* Reductions return before the peers arrive: each rank starts all of them before anyone may go on to wait. */
static status *check_outstanding(struct comm *c)
{
    enum { MANY = 40 };
    struct comm_req req[MANY];
    int64_t in[MANY], out[MANY];
    bool done = false;
    if (c->size > 1 && c->rank == 0) { /* the last rank starts only after it hears from rank 0 */
        in[0] = 5;
        TRY(comm_iallreduce(c, &in[0], &out[0], 1, COMM_I64, COMM_SUM, &req[0]));
        TRY(comm_test(&req[0], &done));
        EXPECT(!done, "(a reduction was done before the last rank had started it)");
        struct comm_xfer go = { c->size - 1, 1, true, &in[0], sizeof in[0] };
        TRY(comm_exchange(c, &go, 1, NULL));
        TRY(comm_wait(&req[0]));
    } else if (c->size > 1) {
        struct comm_xfer go = { 0, 1, false, &in[1], sizeof in[1] };
        if (c->rank == c->size - 1)
            TRY(comm_exchange(c, &go, 1, NULL));
        in[0] = 5;
        TRY(comm_iallreduce(c, &in[0], &out[0], 1, COMM_I64, COMM_SUM, &req[0]));
        TRY(comm_wait(&req[0]));
    }
    EXPECT(c->size == 1 || out[0] == 5 * c->size);
    for (int i = 0; i < MANY; i++) {
        in[i] = i * 1000 + c->rank;
        TRY(comm_iallreduce(c, &in[i], &out[i], 1, COMM_I64, i % 2 ? COMM_SUM : COMM_MAX, &req[i]));
    }
    for (int k = 0; k < MANY; k++) {
        int i = (k * 7 + c->rank) % MANY; /* each rank in another order */
        TRY(comm_wait(&req[i]));
        int64_t n = c->size, want = i % 2 ? n * i * 1000 + n * (n - 1) / 2 : i * 1000 + n - 1;
        EXPECT(out[i] == want, "request %d", i);
    }
    return NULL;
}

/* Once the same sizes have been in flight, more rounds allocate nothing. */
static status *check_no_allocation(struct comm *c)
{
    unsigned char out[64][40], in[64][40];
    struct comm_xfer x[128];
    uint64_t before = 0;
    float a[100] = { 1 }, b[100];
    for (int round = 0; round < 6; round++) {
        TRY(comm_barrier(c)); /* ranks that are threads share the count */
        if (round == 3)
            before = mem_count();
        TRY(comm_barrier(c));
        struct comm_req r1, r2;
        for (int p = 0; p < c->size; p++) {
            memset(out[p], c->rank + round, sizeof out[p]);
            x[2 * p] = (struct comm_xfer){ p, 5, false, in[p], sizeof in[p] };
            x[2 * p + 1] = (struct comm_xfer){ p, 5, true, out[p], sizeof out[p] };
        }
        TRY(comm_iallreduce(c, a, b, 100, COMM_F32, COMM_SUM, &r1));
        TRY(comm_iexchange(c, x, (size_t)c->size * 2, NULL, &r2));
        TRY(comm_allreduce(c, a, 100, COMM_F32, COMM_MAX, NULL));
        TRY(comm_bcast(c, a, sizeof a, 0, NULL));
        TRY(comm_wait(&r2));
        TRY(comm_wait(&r1));
        for (int p = 0; p < c->size; p++)
            EXPECT(in[p][39] == p + round);
    }
    TRY(comm_barrier(c));
    uint64_t after = mem_count();
    EXPECT(after == before, "%llu allocations", (unsigned long long)(after - before));
    return comm_barrier(c);
}

/* ---- communicators ---- */

static status *check_dup(struct comm *c)
{
    struct comm *d = NULL;
    TRY(comm_dup(c, &d));
    EXPECT(d && d->rank == c->rank && d->size == c->size);
    /* the same tag and peer on two communicators: the messages keep apart, whatever their order */
    int peer = (c->rank + 1) % c->size, from = (c->rank + c->size - 1) % c->size;
    int a = c->rank, b = 100 + c->rank, got_a = -1, got_b = -1;
    struct comm_xfer xa[] = { { peer, 1, true, &a, sizeof a }, { from, 1, false, &got_a, sizeof got_a } };
    struct comm_xfer xb[] = { { peer, 1, true, &b, sizeof b }, { from, 1, false, &got_b, sizeof got_b } };
    struct comm_req ra, rb;
    struct comm_xfer *first = c->rank % 2 ? xa : xb, *second = c->rank % 2 ? xb : xa;
    TRY(comm_iexchange(c->rank % 2 ? c : d, first, 2, NULL, &ra));
    TRY(comm_iexchange(c->rank % 2 ? d : c, second, 2, NULL, &rb));
    TRY(comm_wait(&ra));
    TRY(comm_wait(&rb));
    EXPECT(got_a == from && got_b == 100 + from, "got %d and %d", got_a, got_b);
    comm_close(d);
    return NULL;
}

static status *check_split(struct comm *c)
{
    struct comm *s = NULL;
    TRY(comm_split(c, c->rank % 2, -c->rank, &s)); /* reversed by key */
    int members = (c->size - c->rank % 2 + 1) / 2;
    EXPECT(s->size == members && s->rank == members - 1 - c->rank / 2, "rank %d of %d", s->rank, s->size);
    int64_t sum = c->rank, want = 0;
    for (int r = c->rank % 2; r < c->size; r += 2)
        want += r;
    TRY(comm_allreduce(s, &sum, 1, COMM_I64, COMM_SUM, NULL));
    EXPECT(sum == want);
    struct comm *t = s;
    TRY(comm_split(s, s->rank == 0 ? -1 : 7, 0, &t)); /* one leaves; equal keys keep the order */
    EXPECT(s->rank == 0 ? t == NULL : t && t->size == s->size - 1 && t->rank == s->rank - 1);
    if (t)
        TRY(comm_barrier(t));
    comm_close(t);
    comm_close(s);
    s = c;
    TRY(comm_split(c, -5, 0, &s));
    EXPECT(s == NULL);
    return NULL;
}

static status *check_mesh(struct comm *c)
{
    for (int tp = 1; tp <= c->size; tp++) {
        struct mesh m = { { 1, 0, 1, 1, tp } };
        status *st = mesh_init(&m, c->size);
        EXPECT((st == NULL) == (c->size % tp == 0));
        status_free(st);
        if (c->size % tp)
            continue;
        struct comm *rows, *columns, *all, *alone;
        TRY(mesh_comm(&m, c, 1u << MESH_TP, &rows));
        TRY(mesh_comm(&m, c, 1u << MESH_DP, &columns));
        TRY(mesh_comm(&m, c, 1u << MESH_DP | 1u << MESH_TP, &all));
        TRY(mesh_comm(&m, c, 0, &alone));
        EXPECT(rows->size == tp && rows->rank == c->rank % tp);
        EXPECT(columns->size == c->size / tp && columns->rank == c->rank / tp);
        EXPECT(all->size == c->size && all->rank == c->rank && alone->size == 1);
        int32_t r = c->rank, want = c->rank / tp * tp;
        TRY(comm_allreduce(rows, &r, 1, COMM_I32, COMM_MIN, NULL));
        EXPECT(r == want);
        comm_close(alone);
        comm_close(all);
        comm_close(columns);
        comm_close(rows);
    }
    return NULL;
}

/* ---- sums in order of ranks ---- */

/* Values whose float sum depends on the order: only ranks ascending give `want`. */
static float uneven(int rank, size_t i)
{
    static const float scale[] = { 1e8f, 1.0f, -1e8f, 3.0f, 1e-3f };
    return scale[((size_t)rank + i) % 5] * (float)(1 + i % 7);
}

static status *check_ordered(struct comm *c)
{
    static const size_t counts[] = { 0, 1, 2, 7, 1000, 20011 };
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        size_t n = counts[k], slice = ordered_slice(c, n), mine = (size_t)c->rank * slice, ranks = (size_t)c->size;
        EXPECT(slice * ranks >= n && (slice == 0 || (slice - 1) * ranks < n));
        float *x = mem_calloc(n + 1, sizeof *x), *part = mem_calloc(slice + 1, sizeof *part),
              *want = mem_calloc(n + 1, sizeof *want), *room = mem_calloc(ordered_room(c, slice) + 1, sizeof *room);
        size_t own = mine >= n ? 0 : n - mine < slice ? n - mine : slice;
        for (size_t i = 0; i < n; i++) {
            x[i] = uneven(c->rank, i);
            want[i] = uneven(0, i);
            for (int r = 1; r < c->size; r++)
                want[i] += uneven(r, i);
        }
        part[own] = room[ordered_room(c, slice)] = x[n] = 7;
        uint64_t before = c->sent_bytes, most = 2 * (ranks - 1) * slice * sizeof *x;
        TRY(ordered_reduce_scatter(c, x, n, slice, part, room, NULL));
        EXPECT(own == 0 || !memcmp(part, want + mine, own * sizeof *x), "reduce-scatter of %zu", n);
        EXPECT(n == 0 || x[0] == uneven(c->rank, 0), "a reduce-scatter wrote its input");
        TRY(ordered_allreduce(c, x, n, room, NULL));
        EXPECT(!memcmp(x, want, n * sizeof *x), "allreduce of %zu", n);
        uint64_t sent = c->sent_bytes - before, all = sent;
        EXPECT(sent <= 2 * most, "%zu elements: rank %d sent %llu bytes", n, c->rank, (unsigned long long)sent);
        TRY(comm_allreduce(c, &all, 1, COMM_U64, COMM_SUM, NULL));
        EXPECT(all == 3 * (ranks - 1) * n * sizeof *x, "%zu elements: %llu bytes were sent", n,
               (unsigned long long)all);
        memset(x, 0, n * sizeof *x);
        TRY(ordered_allgather(c, part, n, slice, x, NULL));
        EXPECT(!memcmp(x, want, n * sizeof *x), "allgather of %zu", n);
        EXPECT(part[own] == 7 && room[ordered_room(c, slice)] == 7 && x[n] == 7, "wrote past the end");
        mem_free(x);
        mem_free(part);
        mem_free(want);
        mem_free(room);
    }
    status *st = ordered_allgather(c, NULL, (size_t)c->size + 1, 1, NULL, NULL);
    EXPECT(status_code(st) == ST_INVALID);
    status_free(st);
    return NULL;
}

static status *check_sent_bytes(struct comm *c)
{
    float x[6] = { 0 };
    uint64_t ranks = (uint64_t)c->size, before = c->sent_bytes, all[ORDERED_RANKS] = { 0 };
    TRY(comm_allreduce(c, x, 6, COMM_F32, COMM_SUM, NULL));
    EXPECT(c->sent_bytes - before == 2 * (ranks - 1) * sizeof x / ranks);
    before = c->sent_bytes;
    TRY(comm_allgather(c, x, all, 8, NULL));
    EXPECT(c->sent_bytes - before == (ranks - 1) * 8);
    before = c->sent_bytes;
    char to_self[2] = { 1, 2 }, from_self[2];
    struct comm_xfer own[] = { { c->rank, 0, true, to_self, 2 }, { c->rank, 0, false, from_self, 2 } };
    TRY(comm_exchange(c, own, 2, NULL));
    EXPECT(c->sent_bytes == before, "a message to oneself is none");
    return NULL;
}

/* ---- shared memory (the ranks of this job run on one host) ---- */

static size_t window_bytes(int round, int r)
{
    return round == 0 || (round == 1 && r != 1) ? 0 : (size_t)(r * 5000 + round * 777 + 1);
}

static status *check_window_round(struct comm *c, int round, const struct comm_window *w)
{
    size_t mine = window_bytes(round, c->rank);
    for (size_t i = 0; i < mine; i++) {
        EXPECT(w->part[c->rank][i] == 0, "byte %zu", i);
        w->part[c->rank][i] = pattern(c->rank, round, i);
    }
    TRY(comm_barrier(c));
    for (int r = 0; r < c->size; r++)
        for (size_t i = 0; i < window_bytes(round, r); i++)
            EXPECT(w->part[r][i] == pattern(r, round, i), "byte %zu of rank %d", i, r);
    TRY(comm_barrier(c));
    int next = (c->rank + 1) % c->size;
    if (window_bytes(round, next))
        w->part[next][0] = (unsigned char)(c->rank + 100);
    TRY(comm_barrier(c));
    EXPECT(!mine || w->part[c->rank][0] == (c->rank + c->size - 1) % c->size + 100);
    return NULL;
}

static status *check_window(struct comm *c)
{
    for (int round = 0; round < 4; round++) {
        struct comm_window w;
        bool any = round > 1 || (round == 1 && c->size > 1);
        TRY(comm_window_open(c, window_bytes(round, c->rank), &w));
        EXPECT((w.part != NULL) == any, "round %d", round);
        status *st = any ? check_window_round(c, round, &w) : NULL;
        if (!st && any && c->rank != 0) /* rank 0, who made it, may leave first */
            st = comm_barrier(c);
        if (!st && any && c->rank != 0 && window_bytes(round, c->rank))
            w.part[c->rank][0] = 1;
        comm_window_close(&w);
        if (!st && any && c->rank == 0)
            st = comm_barrier(c);
        TRY(st);
        comm_window_close(&w); /* closed and zeroed */
    }
    return NULL;
}

/* ---- one verdict ---- */

static status *check_agree(struct comm *c)
{
    EXPECT(comm_agree(c, NULL) == NULL);
    for (unsigned failing = 1; failing < 1u << c->size && failing < 64; failing++) {
        int lowest = __builtin_ctz(failing);
        bool mine = failing >> c->rank & 1;
        status *own = mine ? ERR(NO_SPACE, "disk %d is full", c->rank) : NULL;
        if (mine && c->rank != lowest) {
            status_free(own);
            own = ERR(CORRUPT, "other words of %d", c->rank);
        }
        status *st = comm_agree(c, own);
        char want[64];
        snprintf(want, sizeof want, "disk %d is full", lowest);
        EXPECT(status_code(st) == ST_NO_SPACE && status_rank(st) == lowest && !strcmp(status_message(st), want),
               "set %x: %s, rank %d, \"%s\"", failing, status_code_name(status_code(st)), status_rank(st),
               status_message(st));
        status_free(st);
    }
    return NULL;
}

static status *run(struct comm *world, bool in_order)
{
    static const struct {
        const char *name;
        status *(*fn)(struct comm *);
    } checks[] = {
        { "reductions", check_reductions },
        { "wide values", check_wide_values },
        { "barrier", comm_barrier },
        { "bcast", check_bcast },
        { "allgather", check_allgather },
        { "gatherv and scatterv", check_gather_scatter },
        { "byte strings", check_byte_strings },
        { "exchanges", check_exchanges },
        { "followers", check_followers },
        { "empty requests", check_empty_requests },
        { "outstanding reductions", check_outstanding },
        { "no allocation in a steady state", check_no_allocation },
        { "dup", check_dup },
        { "split", check_split },
        { "mesh", check_mesh },
        { "window", check_window },
        { "sums in order", check_ordered },
        { "bytes sent", check_sent_bytes },
        { "agree", check_agree },
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
        if (in_order && (checks[i].fn == check_outstanding || checks[i].fn == check_no_allocation))
            continue;
        status *st = checks[i].fn(world);
        if (st)
            return status_wrap(status_at_rank(st, world->rank), "%s over %s, rank %d of %d (%s:%d)", checks[i].name,
                               world->ops->name, world->rank, world->size, status_file(st), status_line(st));
    }
    return NULL;
}

status *comm_suite_run(struct comm *world)
{
    return run(world, false);
}

status *comm_suite_run_in_order(struct comm *world)
{
    return run(world, true);
}
