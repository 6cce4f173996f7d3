/* golden FILE.json...: run every case of vector files that this project has code for, and compare.
 *
 * A file has `cases`: a list of {name, inputs, expected}, or an object name -> values that hold inputs and results
 * together. Prints a line a case, then `N passed, N failed, N skipped`; exits 1 if a case failed, 2 if a file could not
 * be read. What a case expects but no code computes is named in its line. */
#include "tests/golden/golden.h"

#include <ctype.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct golden_kind *const families[] = { golden_rl, golden_diffusion };
enum { FAMILIES = sizeof families / sizeof families[0], SHOWN = 8, PATH = 256 };

struct tally {
    int passed, failed, skipped;
};

/* ---- which kind ---- */

static bool word_border(char c)
{
    return !isalnum((unsigned char)c);
}

static bool name_has(const char *name, const char *word)
{
    size_t n = strlen(word);
    for (const char *at = name; (at = strstr(at, word)); at++)
        if ((at == name || word_border(at[-1])) && word_border(at[n]))
            return true;
    return false;
}

static bool inputs_fit(const struct golden_kind *k, const struct golden_case *c)
{
    char key[64];
    int n;
    for (const char *at = k->inputs; sscanf(at, "%63s%n", key, &n) == 1; at += n)
        if (!json_object_get(c->inputs, key))
            return false;
    return true;
}

static bool has_key(const struct golden_case *c, const char *key)
{
    return key && (json_object_get(c->inputs, key) || json_object_get(c->expected, key));
}

static const struct golden_kind *kind_of(const struct golden_case *c)
{
    const struct golden_kind *best = NULL, *by_key = NULL;
    for (int f = 0; f < FAMILIES; f++)
        for (const struct golden_kind *k = families[f]; k->name; k++) {
            if (!inputs_fit(k, c))
                continue;
            if (name_has(c->name, k->name) && (!best || strlen(k->name) > strlen(best->name)))
                best = k;
            if (!by_key && has_key(c, k->only))
                by_key = k;
        }
    return best ? best : by_key;
}

/* ---- comparison ---- */

struct check {
    const struct golden_kind *kind;
    char where[PATH]; /* file: case */
    int differences, compared;
};

static void differ(struct check *k, const char *path, json_t *got, json_t *want)
{
    if (++k->differences > SHOWN)
        return;
    const json_t *of[2] = { got, want };
    char text[2][64];
    for (int i = 0; i < 2; i++) {
        if (json_is_real(of[i])) {
            snprintf(text[i], sizeof text[i], "%.15g", json_real_value(of[i]));
            continue;
        }
        char *dump = of[i] ? json_dumps(of[i], JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
        snprintf(text[i], sizeof text[i], "%s", dump ? dump : "nothing");
        free(dump); /* jansson's own */
    }
    printf("FAIL %s: %s: got %s, expected %s\n", k->where, path, text[0], text[1]);
}

static void compare(struct check *k, const char *path, json_t *got, json_t *want);

static void compare_arrays(struct check *k, const char *path, json_t *got, json_t *want)
{
    if (json_array_size(got) != json_array_size(want)) {
        differ(k, path, got, want);
        return;
    }
    char inner[PATH];
    for (size_t i = 0; i < json_array_size(want); i++) {
        snprintf(inner, sizeof inner, "%.200s[%zu]", path, i);
        compare(k, inner, json_array_get(got, i), json_array_get(want, i));
    }
}

/* A number stands for a list of one. Booleans, texts and integers (words of a generator) are compared exactly. */
static void compare(struct check *k, const char *path, json_t *got, json_t *want)
{
    if (json_is_number(want) && json_is_array(got) && json_array_size(got) == 1)
        got = json_array_get(got, 0);
    if (json_is_array(want) && json_is_array(got)) {
        compare_arrays(k, path, got, want);
    } else if (json_is_object(want) && json_is_object(got)) {
        char inner[PATH];
        for (void *i = json_object_iter(want); i; i = json_object_iter_next(want, i)) {
            const char *key = json_object_iter_key(i);
            snprintf(inner, sizeof inner, "%.150s.%.100s", path, key);
            compare(k, inner, json_object_get(got, key), json_object_iter_value(i));
        }
    } else if (json_is_number(want) && json_is_number(got) && !(json_is_integer(want) && json_is_integer(got))) {
        double a = json_number_value(got), b = json_number_value(want);
        k->compared++;
        if (!(fabs(a - b) <= k->kind->relative * fabs(b) + k->kind->absolute))
            differ(k, path, got, want);
    } else {
        k->compared++;
        if (!json_equal(got, want))
            differ(k, path, got, want);
    }
}

/* ---- cases and files ---- */

static void run_case(const char *file, const struct golden_case *c, struct tally *t)
{
    struct check k = { .kind = kind_of(c) };
    snprintf(k.where, sizeof k.where, "%.120s: %.120s", file, c->name);
    if (!k.kind) {
        printf("skip %s\n", k.where);
        t->skipped++;
        return;
    }
    json_t *got = NULL;
    char without[PATH] = "";
    status *st = k.kind->run(k.kind, c, &got);
    if (st) {
        printf("FAIL %s: %s\n", k.where, status_message(st));
        status_free(st);
        t->failed++;
        return;
    }
    for (void *i = json_object_iter(c->expected); i; i = json_object_iter_next(c->expected, i)) {
        const char *key = json_object_iter_key(i);
        json_t *ours = json_object_get(got, key);
        size_t n = strlen(without);
        if (ours)
            compare(&k, key, ours, json_object_iter_value(i));
        else
            snprintf(without + n, sizeof without - n, "%s%s", n ? ", " : " (not computed: ", key);
    }
    json_decref(got);
    if (k.differences > SHOWN)
        printf("FAIL %s: %d more\n", k.where, k.differences - SHOWN);
    if (!k.compared)
        printf("FAIL %s: nothing to compare\n", k.where);
    bool failed = k.differences || !k.compared;
    if (!failed)
        printf("pass %s: %d values%s%s\n", k.where, k.compared, without, *without ? ")" : "");
    *(failed ? &t->failed : &t->passed) += 1;
}

static void run_value(const char *file, const char *name, json_t *value, struct tally *t)
{
    json_t *inputs = json_object_get(value, "inputs"), *expected = json_object_get(value, "expected");
    bool apart = json_is_object(inputs) && json_is_object(expected);
    run_case(file, &(struct golden_case){ name, apart ? inputs : value, apart ? expected : value }, t);
}

static bool run_file(const char *path, struct tally *t)
{
    json_error_t error;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &error), *cases = json_object_get(root, "cases");
    const char *file = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    if (!root)
        fprintf(stderr, "%s:%d: %s\n", path, error.line, error.text);
    else if (!json_is_array(cases) && !json_is_object(cases))
        fprintf(stderr, "%s: no `cases`\n", path);
    bool readable = json_is_array(cases) || json_is_object(cases);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        json_t *value = json_array_get(cases, i);
        const char *name = json_string_value(json_object_get(value, "name"));
        run_value(file, name ? name : "(no name)", value, t);
    }
    for (void *i = json_object_iter(cases); i; i = json_object_iter_next(cases, i))
        run_value(file, json_object_iter_key(i), json_object_iter_value(i), t);
    json_decref(root);
    return readable;
}

int main(int argc, char **argv)
{
    struct tally t = { 0 };
    bool readable = argc > 1;
    if (argc < 2)
        fprintf(stderr, "usage: golden FILE.json...\n");
    for (int i = 1; i < argc; i++)
        readable &= run_file(argv[i], &t);
    printf("%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped);
    return t.failed ? 1 : readable ? 0 : 2;
}
