/* sort: digits to put in order, right answers and answers with one digit wrong.
 *
 *   prompt     52819=
 *   chosen     12589
 *   rejected   12789     one digit replaced by another one, anywhere
 *
 * A prompt is any string of `digits` digits, leading zeros included. It belongs to the held-out files if a hash of its
 * text says so (one in ten does), and to the training files if not: the split is a property of the prompt, so files of
 * any two calls are disjoint, whatever their seeds and sizes. Prompts come in the order of a keyed permutation of all
 * there are: none comes twice, and longer files of a seed begin with the shorter ones. */
#include "comm/base/bytes.h"
#include "comm/base/rng.h"
#include "trainer/data/outfile.h"
#include "trainer/data/sources.h"

#include <stddef.h>
#include <string.h>

struct sort {
    int64_t rows, heldout, digits, seed;
};

#define AT(field) offsetof(struct sort, field)
static const struct option rows[] = {
    { "rows", OPT_INT, "20000", 1, 1e7, NULL, "", "prompts of sft.jsonl and of prefs_train.jsonl (the same)",
      AT(rows) },
    { "heldout", OPT_INT, "500", 0, 1e6, NULL, "", "other prompts, of prefs_heldout.jsonl and tasks.jsonl (the same)",
      AT(heldout) },
    { "digits", OPT_INT, "5", 1, 9, NULL, "", "digits of a prompt", AT(digits) },
    { "seed", OPT_INT, "0", 0, 0, NULL, "", "another seed gives other prompts, and other wrong answers", AT(seed) },
};
const struct option_table sort_options = { "", rows, sizeof rows / sizeof *rows };

enum { MOST_DIGITS = 9, HELDOUT_ONE_IN = 10 };

struct problem {
    char prompt[MOST_DIGITS + 1], right[MOST_DIGITS], wrong[MOST_DIGITS];
};

static bool is_heldout(const char *prompt, size_t n)
{
    return hash64(prompt, n) % HELDOUT_ONE_IN == 0;
}

/* Draws belong to the number that is the prompt, so a prompt has one wrong answer a seed. */
static struct problem make_problem(uint64_t number, size_t digits, uint64_t seed)
{
    struct problem p;
    int count[10] = { 0 };
    uint64_t left = number;
    for (size_t i = digits; i-- > 0; left /= 10) {
        p.prompt[i] = (char)('0' + left % 10);
        count[left % 10]++;
    }
    p.prompt[digits] = '=';
    for (size_t i = 0, d = 0; i < digits; d++)
        for (int n = 0; n < count[d]; n++)
            p.right[i++] = (char)('0' + d);
    memcpy(p.wrong, p.right, digits);
    struct rng_at at = { .seed = seed, .sample = (uint32_t)number, .stream = RNG_DATA };
    size_t where = (size_t)rng_below(at, 0, digits);
    p.wrong[where] = (char)('0' + ((uint64_t)(p.right[where] - '0') + 1 + rng_below(at, 1, 9)) % 10);
    return p;
}

static status *exhausted(const struct sort *s, const int64_t made[2])
{
    return ERR(INVALID,
               "data prepare sort: %lld digits make no %lld prompts for training and %lld to hold out, only %lld and "
               "%lld (take fewer or more digits)",
               (long long)s->digits, (long long)s->rows, (long long)s->heldout, (long long)made[0], (long long)made[1]);
}

static status *put(struct outset *out, const struct problem *p, size_t digits, bool heldout, int64_t number)
{
    struct text prompt = { p->prompt, digits + 1 }, right = { p->right, digits }, wrong = { p->wrong, digits };
    TRY(heldout ? outset_task(out, prompt, right) : outset_sft(out, prompt, right));
    return outset_pair(out, heldout, prompt, right, wrong, number);
}

static status *write_problems(struct outset *out, const struct sort *s)
{
    uint64_t all = 1;
    for (int64_t i = 0; i < s->digits; i++)
        all *= 10;
    int64_t made[2] = { 0 }; /* for training, held out */
    for (uint64_t i = 0; made[0] < s->rows || made[1] < s->heldout; i++) {
        if (i == all)
            return exhausted(s, made);
        uint64_t number = rng_permute((uint64_t)s->seed, 0, i, all);
        struct problem p = make_problem(number, (size_t)s->digits, (uint64_t)s->seed);
        bool heldout = is_heldout(p.prompt, (size_t)s->digits + 1);
        if (made[heldout] == (heldout ? s->heldout : s->rows))
            continue;
        made[heldout]++;
        TRY(put(out, &p, (size_t)s->digits, heldout, (int64_t)number));
    }
    return outset_commit(out);
}

status *prepare_sort(const char *out, int argc, char **argv)
{
    struct sort s;
    struct outset files;
    TRY(parse_words(&sort_options, &s, argc, argv, "data prepare sort"));
    status *st = outset_open(&files, out);
    if (!st)
        st = outset_open_tasks(&files, out);
    if (!st)
        st = write_problems(&files, &s);
    if (!st)
        outset_summary(&files);
    outset_close(&files);
    return st;
}
