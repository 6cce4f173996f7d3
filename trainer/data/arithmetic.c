/* arithmetic: small sums, differences and products with worked solutions, right and wrong.
 *
 *   prompt     12*7+5=?\n
 *   solution   12*7=84\n84+5=89\nA: 89
 *
 * A problem is a op1 b op2 c, op1 one of + - *, op2 one of + -; a, b and c have up to `digits` digits, the factor b of
 * a product one (2 to 9); no intermediate result is negative. Problems take turns among the three op1, and those of one
 * op1 are a keyed permutation of all there are: none comes twice, and the held-out ones, which come first, do not
 * depend on `rows`. A wrong solution has one of its two results off by 1 to 9 or by 10 to 90, and goes on from there
 * without another mistake. */
#include "comm/base/mem.h"
#include "comm/base/rng.h"
#include "trainer/data/outfile.h"
#include "trainer/data/sources.h"

#include <stddef.h>
#include <string.h>

struct arithmetic {
    int64_t rows, heldout, digits, seed;
};

#define AT(field) offsetof(struct arithmetic, field)
static const struct option rows[] = {
    { "rows", OPT_INT, "4000", 1, 1e7, NULL, "", "problems of sft.jsonl and of prefs_train.jsonl (the same)",
      AT(rows) },
    { "heldout", OPT_INT, "400", 0, 1e6, NULL, "", "further problems, of prefs_heldout.jsonl", AT(heldout) },
    { "digits", OPT_INT, "2", 1, 6, NULL, "", "most digits of a number in a problem", AT(digits) },
    { "seed", OPT_INT, "0", 0, 0, NULL, "", "another seed gives other problems", AT(seed) },
};
const struct option_table arithmetic_options = { "", rows, sizeof rows / sizeof *rows };

struct problem {
    char op[2];
    int64_t number[3];
    int64_t result[2];
};

enum { KINDS = 3, SOLUTION_BYTES = 128 };
static const char kind_op[KINDS] = { '+', '-', '*' };

static int64_t apply(char op, int64_t a, int64_t b)
{
    return op == '+' ? a + b : op == '-' ? a - b : a * b;
}

/* Problems of a kind, negative results counted in; n numbers have at most `digits` digits. */
static uint64_t kind_size(int kind, uint64_t n)
{
    return n * (kind_op[kind] == '*' ? 8 : n) * 2 * n;
}

static struct problem decode(int kind, uint64_t n, uint64_t index)
{
    bool product = kind_op[kind] == '*';
    struct problem p = { .op = { kind_op[kind] } };
    p.number[2] = (int64_t)(index % n + 1);
    index /= n;
    p.op[1] = index % 2 ? '-' : '+';
    index /= 2;
    p.number[1] = product ? (int64_t)(index % 8 + 2) : (int64_t)(index % n + 1);
    index /= product ? 8 : n;
    p.number[0] = (int64_t)(index + 1);
    p.result[0] = apply(p.op[0], p.number[0], p.number[1]);
    p.result[1] = apply(p.op[1], p.result[0], p.number[2]);
    return p;
}

/* The problems in their order. */
struct problems {
    uint64_t seed, n;     /* n: 10^digits - 1 */
    uint64_t next[KINDS]; /* positions in each kind's permutation */
    uint64_t count;       /* handed out so far */
};

static bool next_problem(struct problems *s, struct problem *out)
{
    int kind = (int)(s->count % KINDS);
    uint64_t size = kind_size(kind, s->n);
    while (s->next[kind] < size) {
        struct problem p = decode(kind, s->n, rng_permute(s->seed, (uint32_t)kind, s->next[kind]++, size));
        if (p.result[0] < 0 || p.result[1] < 0)
            continue;
        s->count++;
        *out = p;
        return true;
    }
    return false;
}

/* The same problem with one result wrong. Draws belong to the problem's number. */
static struct problem spoil(struct problem p, uint64_t seed, uint64_t number)
{
    struct rng_at at = { .seed = seed, .sample = (uint32_t)number, .stream = RNG_DATA };
    uint64_t step = rng_below(at, 0, 2);
    int64_t off = (int64_t)(rng_below(at, 1, 9) + 1) * (rng_below(at, 2, 3) == 0 ? 10 : 1);
    if (rng_below(at, 3, 2) && p.result[0] >= off && p.result[1] >= off) /* the later result moves along */
        off = -off;
    if (step == 0)
        p.result[0] += off;
    p.result[1] += off;
    return p;
}

static struct text write_prompt(const struct problem *p, char text[SOLUTION_BYTES])
{
    int n = snprintf(text, SOLUTION_BYTES, "%lld%c%lld%c%lld=?\n", (long long)p->number[0], p->op[0],
                     (long long)p->number[1], p->op[1], (long long)p->number[2]);
    return (struct text){ text, (size_t)n };
}

static struct text write_solution(const struct problem *p, char text[SOLUTION_BYTES])
{
    int n = snprintf(text, SOLUTION_BYTES, "%lld%c%lld=%lld\n%lld%c%lld=%lld\nA: %lld", (long long)p->number[0],
                     p->op[0], (long long)p->number[1], (long long)p->result[0], (long long)p->result[0], p->op[1],
                     (long long)p->number[2], (long long)p->result[1], (long long)p->result[1]);
    return (struct text){ text, (size_t)n };
}

static status *write_problems(struct outset *out, const struct arithmetic *a)
{
    struct problems s = { .seed = (uint64_t)a->seed, .n = 1 };
    for (int64_t i = 0; i < a->digits; i++)
        s.n *= 10;
    s.n--;
    for (int64_t i = 0; i < a->heldout + a->rows; i++) {
        char prompt[SOLUTION_BYTES], chosen[SOLUTION_BYTES], rejected[SOLUTION_BYTES];
        struct problem right;
        if (!next_problem(&s, &right))
            return ERR(INVALID,
                       "data prepare arithmetic: there are no %lld different problems of %lld digits, only %llu "
                       "(take fewer rows or more digits)",
                       (long long)(a->heldout + a->rows), (long long)a->digits, (unsigned long long)s.count);
        struct problem wrong = spoil(right, s.seed, (uint64_t)i);
        struct text p = write_prompt(&right, prompt), c = write_solution(&right, chosen);
        if (i >= a->heldout)
            TRY(outset_sft(out, p, c));
        TRY(outset_pair(out, i < a->heldout, p, c, write_solution(&wrong, rejected), i));
    }
    return outset_commit(out);
}

status *prepare_arithmetic(const char *out, int argc, char **argv)
{
    struct arithmetic a;
    struct outset files;
    TRY(parse_words(&arithmetic_options, &a, argc, argv, "data prepare arithmetic"));
    status *st = outset_open(&files, out);
    if (!st)
        st = write_problems(&files, &a);
    if (!st)
        outset_summary(&files);
    outset_close(&files);
    return st;
}
