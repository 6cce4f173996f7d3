/* gsm8k: the public GSM8K files (Cobbe et al. 2021, arXiv:2110.14168) as SFT and preference rows.
 *
 *   prompt      Question: <question>\nAnswer:\n
 *   solution    its lines as they are, without calculator annotations <<...>> (annotations=keep: with them); a last
 * line "#### 18" becomes "A: 18", the form of the model solutions, so that both stages teach one
 *
 * train.jsonl gives the SFT rows. example_model_solutions.jsonl has a row a problem, with model solutions as objects
 * {"is_correct": bool, "solution": text} under keys of any name: each pair of a right and a wrong one of the same
 * problem is a preference row. They belong to problems of GSM8K's test split, so no GSM8K score may be reported after
 * training on them.
 *
 * A problem with pairs is held out if the hash of its question, keyed by the seed, is among the round(heldout x n)
 * smallest of the n such problems; equal questions are always on one side. If a problem has
 * more pairs than `pairs`, those with the smallest keyed hashes are taken.
 *
 * folds=K cuts all those problems, sorted by the same hash, into K parts of (nearly) as many problems: part k is fold
 * k's test file, part k + 1 (mod K) its validation file, the others its training file. */
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "trainer/data/outfile.h"
#include "trainer/data/sources.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

struct gsm8k {
    double heldout;
    int64_t pairs, folds, seed;
    int annotations; /* 0: strip, 1: keep */
};

#define AT(field) offsetof(struct gsm8k, field)
static const struct option rows[] = {
    { "heldout", OPT_FLOAT, "0.2", 0, 1, NULL, "", "share of the problems that go to prefs_heldout.jsonl",
      AT(heldout) },
    { "pairs", OPT_INT, "4", 1, 1e6, NULL, "", "most pairs of one problem", AT(pairs) },
    { "folds", OPT_INT, "0", 0, MAX_FOLDS, NULL, "",
      "also foldK_train, _validation and _test.jsonl of so many folds by problem, at least 3; 0: none", AT(folds) },
    { "seed", OPT_INT, "0", 0, 0, NULL, "", "another seed holds out other problems", AT(seed) },
    { "annotations", OPT_ENUM, "strip", 0, 0, "strip|keep", "", "what becomes of <<48/2=24>>", AT(annotations) },
};
const struct option_table gsm8k_options = { "", rows, sizeof rows / sizeof *rows };

struct solution {
    char *text;
    bool correct;
    bool disputed; /* marked correct and wrong at once: of no use */
};

struct problem {
    char *prompt;
    uint64_t key; /* keyed hash of the question */
    int64_t row;  /* in its file, from 0 */
    struct solution *solution;
    size_t solutions, correct, wrong;
};

struct problems {
    struct problem *p;
    size_t count, cap;
};

static const char legal_train[] = "{\"question\": text, \"answer\": text}";
static const char legal_models[] = "{\"question\": text, <model>: {\"is_correct\": bool, \"solution\": text}, ...}";

static struct text text_of(const char *s)
{
    return (struct text){ s, strlen(s) };
}

/* ---- texts ---- */

static status *make_prompt(struct text question, char **out)
{
    static const char form[] = "Question: %.*s\nAnswer:\n";
    size_t bytes = question.n + sizeof form;
    char *p = mem_alloc(bytes);
    if (!p)
        return ERR(NO_MEMORY, "a prompt of %zu bytes", bytes);
    snprintf(p, bytes, form, (int)question.n, question.p);
    *out = p;
    return NULL;
}

/* Copy without <<...>>; one that is cut off ends with its line. Returns the bytes copied. */
static size_t copy_plain(char *to, struct text from)
{
    size_t n = 0;
    for (size_t i = 0; i < from.n; i++) {
        if (from.n - i < 2 || from.p[i] != '<' || from.p[i + 1] != '<') {
            to[n++] = from.p[i];
            continue;
        }
        while (i < from.n && from.p[i] != '\n' && !(from.n - i >= 2 && from.p[i] == '>' && from.p[i + 1] == '>'))
            i++;
        if (i < from.n && from.p[i] == '\n')
            to[n++] = '\n';
        else
            i++; /* onto the second '>' */
    }
    return n;
}

/* The text as it is trained on: see the head of this file. */
static status *tidy(struct text from, bool keep, char **out)
{
    char *s = mem_alloc(from.n + 1);
    if (!s)
        return ERR(NO_MEMORY, "a solution of %zu bytes", from.n);
    size_t n = from.n;
    if (keep)
        memcpy(s, from.p, n);
    else
        n = copy_plain(s, from);
    while (n && strchr(" \n\r\t", s[n - 1]))
        n--;
    s[n] = 0;
    char *last = strrchr(s, '\n');
    last = last ? last + 1 : s;
    if (!strncmp(last, "#### ", 5)) { /* "A: " is two bytes shorter */
        memcpy(last, "A: ", 3);
        memmove(last + 3, last + 5, strlen(last + 5) + 1);
    }
    *out = s;
    return NULL;
}

static uint64_t keyed_hash(int64_t seed, const char *use, const char *text)
{
    struct hash128 h = hash_init((uint64_t)seed);
    hash_update(&h, use, strlen(use));
    hash_update(&h, text, strlen(text));
    return hash_final(h).a;
}

/* ---- train.jsonl ---- */

static status *train_line(const struct lines *l, const json_t *o, const struct gsm8k *g, struct outset *out)
{
    struct text question, answer;
    char *prompt = NULL, *solution = NULL;
    TRY(row_string(l, o, "question", legal_train, &question));
    TRY(row_string(l, o, "answer", legal_train, &answer));
    status *st = make_prompt(question, &prompt);
    if (!st)
        st = tidy(answer, g->annotations, &solution);
    if (!st)
        st = outset_sft(out, text_of(prompt), text_of(solution));
    mem_free(prompt);
    mem_free(solution);
    return st;
}

/* ---- example_model_solutions.jsonl ---- */

/* Add a solution to the problem; a text it has already is not added again. Takes `text`. */
static status *add_solution(struct problem *p, char *text, bool correct)
{
    for (size_t i = 0; i < p->solutions; i++) {
        struct solution *s = &p->solution[i];
        if (strcmp(s->text, text))
            continue;
        if (s->correct != correct && !s->disputed) {
            s->disputed = true;
            p->correct -= s->correct;
            p->wrong -= !s->correct;
        }
        mem_free(text);
        return NULL;
    }
    struct solution *more = mem_array(p->solution, p->solutions + 1, sizeof *more);
    if (!more) {
        mem_free(text);
        return ERR(NO_MEMORY, "%zu solutions", p->solutions + 1);
    }
    p->solution = more;
    p->solution[p->solutions++] = (struct solution){ .text = text, .correct = correct };
    p->correct += correct;
    p->wrong += !correct;
    return NULL;
}

static status *read_solutions(const struct lines *l, json_t *o, const struct gsm8k *g, struct problem *p)
{
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v)
    {
        const json_t *mark = json_object_get(v, "is_correct");
        struct text text;
        char *plain;
        if (!mark || !json_object_get(v, "solution"))
            continue;
        if (!json_is_boolean(mark))
            return ERR(INVALID, "%s:%llu: key \"is_correct\" of \"%.40s\" must be true or false (legal form: %s)",
                       l->path, (unsigned long long)l->number, key, legal_models);
        TRY(row_string(l, v, "solution", legal_models, &text));
        TRY(tidy(text, g->annotations, &plain));
        TRY(add_solution(p, plain, json_is_true(mark)));
    }
    return NULL;
}

static status *models_line(const struct lines *l, json_t *o, const struct gsm8k *g, struct problems *all)
{
    struct text question;
    TRY(row_string(l, o, "question", legal_models, &question));
    if (all->count == all->cap) {
        size_t cap = 2 * all->cap + 64;
        struct problem *p = mem_array(all->p, cap, sizeof *p);
        if (!p)
            return ERR(NO_MEMORY, "%s: %zu problems", l->path, cap);
        all->p = p;
        all->cap = cap;
    }
    struct problem *p = &all->p[all->count];
    *p = (struct problem){ .row = (int64_t)all->count };
    all->count++; /* from here on problems_free has it */
    TRY(make_prompt(question, &p->prompt));
    p->key = keyed_hash(g->seed, "heldout", p->prompt);
    return read_solutions(l, o, g, p);
}

static void problems_free(struct problems *all)
{
    for (size_t i = 0; i < all->count; i++) {
        for (size_t s = 0; s < all->p[i].solutions; s++)
            mem_free(all->p[i].solution[s].text);
        mem_free(all->p[i].solution);
        mem_free(all->p[i].prompt);
    }
    mem_free(all->p);
}

/* ---- pairs ---- */

struct pair {
    uint64_t key;
    const char *chosen, *rejected;
};

static int by_key(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;
    return (x->key > y->key) - (x->key < y->key);
}

/* Which problems go where: those with a key below heldout are held out; part k of the folds ends at fold[k]. */
struct cuts {
    uint64_t heldout, fold[MAX_FOLDS];
};

/* A pair of a problem in part `part`, to each fold's file that wants it. */
static status *put_in_folds(const struct problem *p, const struct pair *pair, const struct gsm8k *g, int part,
                            struct outset *out)
{
    int folds = (int)g->folds;
    for (int k = 0; k < folds; k++) {
        enum fold_part to = part == k ? FOLD_TEST : part == (k + 1) % folds ? FOLD_VALIDATION : FOLD_TRAIN;
        TRY(outset_fold_pair(out, k, to, text_of(p->prompt), text_of(pair->chosen), text_of(pair->rejected), p->row));
    }
    return NULL;
}

static status *write_pairs(const struct problem *p, const struct gsm8k *g, const struct cuts *cuts, struct outset *out)
{
    size_t n = 0, most = (size_t)g->pairs;
    struct pair *pair = mem_calloc(p->correct * p->wrong, sizeof *pair);
    if (!pair)
        return ERR(NO_MEMORY, "%zu pairs", p->correct * p->wrong);
    for (size_t c = 0; c < p->solutions; c++) {
        for (size_t w = 0; w < p->solutions; w++) {
            const struct solution *right = &p->solution[c], *wrong = &p->solution[w];
            if (!right->correct || wrong->correct || right->disputed || wrong->disputed)
                continue;
            uint64_t key = keyed_hash(g->seed, right->text, wrong->text);
            pair[n++] = (struct pair){ key, right->text, wrong->text };
        }
    }
    qsort(pair, n, sizeof *pair, by_key);
    status *st = NULL;
    int part = 0;
    while (part + 1 < g->folds && p->key >= cuts->fold[part])
        part++;
    for (size_t i = 0; !st && i < n && i < most; i++) {
        st = outset_pair(out, p->key < cuts->heldout, text_of(p->prompt), text_of(pair[i].chosen),
                         text_of(pair[i].rejected), p->row);
        if (!st)
            st = put_in_folds(p, &pair[i], g, part, out);
    }
    mem_free(pair);
    return st;
}

static int ascending(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

/* The key of the problem at place `at` of n in their order: those before it have smaller ones. Equal questions have
 * equal keys, so they stay together. */
static uint64_t key_at(const uint64_t *key, size_t n, size_t at)
{
    return at < n ? key[at] : UINT64_MAX;
}

static status *split(const struct problems *all, const struct gsm8k *g, struct cuts *out)
{
    size_t n = 0;
    uint64_t *key = mem_calloc(all->count, sizeof *key);
    if (!key)
        return ERR(NO_MEMORY, "the keys of %zu problems", all->count);
    for (size_t i = 0; i < all->count; i++)
        if (all->p[i].correct && all->p[i].wrong)
            key[n++] = all->p[i].key;
    qsort(key, n, sizeof *key, ascending);
    out->heldout = key_at(key, n, (size_t)lround(g->heldout * (double)n));
    for (size_t k = 0; k < (size_t)g->folds; k++)
        out->fold[k] = key_at(key, n, (k + 1) * n / (size_t)g->folds);
    mem_free(key);
    return NULL;
}

static status *write_preferences(const struct problems *all, const struct gsm8k *g, struct outset *out)
{
    struct cuts cuts = { 0 };
    TRY(split(all, g, &cuts));
    for (size_t i = 0; i < all->count; i++) {
        const struct problem *p = &all->p[i];
        if (p->correct && p->wrong)
            TRY(write_pairs(p, g, &cuts, out));
    }
    return NULL;
}

/* ---- files ---- */

/* Call line(l, object) for each row of source/name: the one place that opens, reads and closes. */
static status *read_file(const char *source, const char *name, const struct gsm8k *g, struct outset *out,
                         struct problems *all)
{
    char path[4096];
    struct lines l;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", source, name) >= sizeof path)
        return ERR(INVALID, "%s/%s: the path is too long", source, name);
    status *st = lines_open(&l, path);
    for (bool more = true; !st && more;) {
        json_t *o;
        st = lines_next(&l, &more);
        if (st || !more)
            break;
        st = row_json(&l, &o);
        if (st)
            break;
        st = all ? models_line(&l, o, g, all) : train_line(&l, o, g, out);
        json_decref(o);
    }
    lines_close(&l);
    return st;
}

static status *convert(const char *source, const struct gsm8k *g, struct outset *out)
{
    struct problems all = { 0 };
    TRY(read_file(source, "train.jsonl", g, out, NULL));
    status *st = read_file(source, "example_model_solutions.jsonl", g, out, &all);
    if (!st)
        st = write_preferences(&all, g, out);
    problems_free(&all);
    TRY(st);
    return outset_commit(out);
}

status *prepare_gsm8k(const char *source, const char *out, int argc, char **argv)
{
    struct gsm8k g;
    struct outset files;
    TRY(parse_words(&gsm8k_options, &g, argc, argv, "data prepare gsm8k"));
    if (g.folds == 1 || g.folds == 2)
        return ERR(INVALID,
                   "data prepare gsm8k: folds: %d leave no room for training, validation and test (legal: 0, "
                   "3 to %d)",
                   (int)g.folds, (int)MAX_FOLDS);
    status *st = outset_open(&files, out);
    if (!st)
        st = outset_open_folds(&files, out, (int)g.folds);
    if (!st)
        st = convert(source, &g, &files);
    if (!st) {
        outset_summary(&files);
        printf("The preference pairs are solutions to problems of GSM8K's test split: after training on them no GSM8K "
               "score may be reported.\n");
    }
    outset_close(&files);
    return st;
}
