/* options: text to fields and back, driven by the rows of a table.
 *
 * One parser per type sits in `parsers`, in the order of enum option_type; each writes the field only on success and
 * says nothing about where the text came from. options_set adds place, key and the legal values, so that every
 * complaint reads
 *
 *     configs/a.yaml:12: train.steps: "abc" is not an integer (legal: 1 to 1e9)
 */
#include "comm/base/options.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { KEY_CAP = 64, LEGAL_BYTES = 640 };

/* Why a text was refused: wrong form, or right form and outside [min, max], or no memory. */
enum verdict { FINE, WRONG, OUTSIDE, NO_MEMORY };

/* ---- numbers as people write them ---- */

/* The shortest decimal that reads back as v, without what exponents do not need: 100, 0.5, 1e9, 3e-4. */
static void number_text(double v, char *text, size_t bytes)
{
    if (v == floor(v) && fabs(v) < 1e6) {
        snprintf(text, bytes, "%.0f", v == 0 ? 0.0 : v);
        return;
    }
    char full[40];
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(full, sizeof full, "%.*g", digits, v);
        if (strtod(full, NULL) == v)
            break;
    }
    char *e = strchr(full, 'e');
    if (e) { /* e+09 -> e9, e-04 -> e-4 */
        char *from = e + 1, *to = e + 1;
        if (*from == '-')
            to++;
        from++;
        while (*from == '0' && from[1])
            from++;
        memmove(to, from, strlen(from) + 1);
    }
    snprintf(text, bytes, "%s", full);
}

/* The largest unit that leaves a whole number: 65536 -> 64KiB. */
static void size_text(uint64_t v, char *text, size_t bytes)
{
    static const char *const units[] = { "", "KiB", "MiB", "GiB", "TiB" };
    size_t u = 0;
    while (v && v % 1024 == 0 && u + 1 < sizeof units / sizeof *units) {
        v /= 1024;
        u++;
    }
    snprintf(text, bytes, "%" PRIu64 "%s", v, units[u]);
}

static bool has_range(const struct option *o)
{
    return o->min != 0 || o->max != 0;
}

static bool in_range(const struct option *o, double v)
{
    return !has_range(o) || (v >= o->min && v <= o->max);
}

/* ---- one parser per type: text -> *(type *)field ---- */

static enum verdict parse_bool(const struct option *o, const char *text, void *field)
{
    static const char *const words[] = { "false", "true", "off", "on", "no", "yes" };
    (void)o;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!strcmp(text, words[i])) {
            *(bool *)field = i % 2;
            return FINE;
        }
    }
    return WRONG;
}

static enum verdict parse_int(const struct option *o, const char *text, void *field)
{
    const char *digits = text + (*text == '-' || *text == '+');
    if (!*digits || digits[strspn(digits, "0123456789")])
        return WRONG;
    errno = 0;
    long long v = strtoll(text, NULL, 10);
    if (errno == ERANGE || !in_range(o, (double)v))
        return OUTSIDE;
    *(int64_t *)field = v;
    return FINE;
}

static enum verdict parse_float(const struct option *o, const char *text, void *field)
{
    char *end;
    if (!*text || text[strspn(text, "0123456789+-.eE")]) /* neither hex, nor inf, nor nan, nor blanks */
        return WRONG;
    double v = strtod(text, &end);
    if (end == text || *end)
        return WRONG;
    if (!isfinite(v) || !in_range(o, v))
        return OUTSIDE;
    *(double *)field = v;
    return FINE;
}

static enum verdict parse_string(const struct option *o, const char *text, void *field)
{
    (void)o;
    char *copy = mem_strdup(text);
    if (!copy)
        return NO_MEMORY;
    mem_free(*(char **)field);
    *(char **)field = copy;
    return FINE;
}

/* The end of the list whose '[' is at text, or NULL: patterns have brackets, too. */
static const char *closing(const char *text)
{
    int depth = 0;
    for (const char *p = text; *p; p++) {
        depth += (*p == '[') - (*p == ']');
        if (depth == 0)
            return p;
    }
    return NULL;
}

/* Words with commas between, also as YAML writes a list: [a, "b"]. */
static enum verdict parse_list(const struct option *o, const char *text, void *field)
{
    size_t n = strlen(text), used = 0;
    char *copy = mem_alloc(n + 1);
    (void)o;
    if (!copy)
        return NO_MEMORY;
    bool inner = n > 1 && *text == '[' && closing(text) == text + n - 1;
    const char *word = text + inner, *end = text + n - inner, *stop;
    for (;; word = stop + 1) {
        stop = memchr(word, ',', (size_t)(end - word));
        const char *first = word, *last = stop ? stop : end;
        while (first < last && *first == ' ')
            first++;
        while (last > first && last[-1] == ' ')
            last--;
        if (inner && last - first > 1 && (*first == '"' || *first == '\'') && last[-1] == *first)
            first++, last--;
        memcpy(copy + used, first, (size_t)(last - first));
        used += (size_t)(last - first);
        if (!stop)
            break;
        copy[used++] = ',';
    }
    copy[used] = 0;
    mem_free(*(char **)field);
    *(char **)field = copy;
    return FINE;
}

/* The `index`th of "a|b|c": its start, and its length in *n; NULL after the last. */
static const char *choice(const char *choices, int index, size_t *n)
{
    for (const char *p = choices;; p += *n + 1) {
        *n = strcspn(p, "|");
        if (index-- == 0)
            return p;
        if (!p[*n])
            return NULL;
    }
}

static enum verdict parse_enum(const struct option *o, const char *text, void *field)
{
    size_t n, length = strlen(text);
    const char *c;
    for (int i = 0; (c = choice(o->choices, i, &n)); i++) {
        if (n == length && !memcmp(c, text, n)) {
            *(int *)field = i;
            return FINE;
        }
    }
    return WRONG;
}

static enum verdict parse_size(const struct option *o, const char *text, void *field)
{
    static const char letters[] = "KMGT";
    size_t digits = strspn(text, "0123456789");
    if (!digits)
        return WRONG;
    const char *unit = text + digits;
    int shift = 0;
    const char *letter = *unit ? strchr(letters, *unit & ~0x20) : NULL;
    if (letter) {
        shift = 10 * (int)(letter - letters + 1);
        unit++;
        if (strcmp(unit, "") && strcasecmp(unit, "B") && strcasecmp(unit, "iB"))
            return WRONG;
    } else if (*unit && strcasecmp(unit, "B")) {
        return WRONG;
    }
    errno = 0;
    unsigned long long v = strtoull(text, NULL, 10);
    if (errno == ERANGE || v > UINT64_MAX >> shift || !in_range(o, (double)(v << shift)))
        return OUTSIDE;
    *(uint64_t *)field = (uint64_t)v << shift;
    return FINE;
}

static const struct {
    const char *name, *noun; /* of the help; of a complaint */
    enum verdict (*parse)(const struct option *o, const char *text, void *field);
    size_t bytes;
} types[] = {
    [OPT_BOOL] = { "bool", "a boolean", parse_bool, sizeof(bool) },
    [OPT_INT] = { "int", "an integer", parse_int, sizeof(int64_t) },
    [OPT_FLOAT] = { "float", "a number", parse_float, sizeof(double) },
    [OPT_STRING] = { "string", "a string", parse_string, sizeof(char *) },
    [OPT_ENUM] = { "choice", "one of its choices", parse_enum, sizeof(int) },
    [OPT_SIZE] = { "size", "a size", parse_size, sizeof(uint64_t) },
    [OPT_LIST] = { "list", "a list", parse_list, sizeof(char *) },
};

/* ---- complaints ---- */

/* What the row accepts: "1 to 1e9", "sigmoid, hinge, ipo". */
static void legal_text(const struct option *o, char *text, size_t bytes)
{
    char low[40], high[40];
    number_text(o->min, low, sizeof low);
    number_text(o->max, high, sizeof high);
    switch (o->type) {
    case OPT_BOOL:
        snprintf(text, bytes, "true, false, on, off, yes, no");
        break;
    case OPT_INT:
    case OPT_FLOAT:
        if (has_range(o))
            snprintf(text, bytes, "%s to %s", low, high);
        else
            snprintf(text, bytes, o->type == OPT_INT ? "any 64-bit integer" : "any finite number");
        break;
    case OPT_STRING:
    case OPT_LIST:
        snprintf(text, bytes, "any text");
        break;
    case OPT_ENUM: {
        size_t used = 0, n;
        const char *c;
        text[0] = 0;
        for (int i = 0; used < bytes && (c = choice(o->choices, i, &n)); i++)
            used += (size_t)snprintf(text + used, bytes - used, "%s%.*s", i ? ", " : "", (int)n, c);
        break;
    }
    case OPT_SIZE:
        if (has_range(o)) {
            size_text((uint64_t)o->min, low, sizeof low);
            size_text((uint64_t)o->max, high, sizeof high);
            snprintf(text, bytes, "%s to %s, written like 4096, 64K, 16MiB", low, high);
        } else {
            snprintf(text, bytes, "bytes, written like 4096, 64K, 16MiB, 2GiB");
        }
        break;
    }
}

/* Edits (insert, delete, replace, swap of neighbours) that make a into b; both shorter than KEY_CAP. Optimal string
 * alignment, three rows of the table at a time. */
static size_t edit_distance(const char *a, size_t na, const char *b, size_t nb)
{
    size_t rows[3][KEY_CAP + 1];
    for (size_t j = 0; j <= nb; j++)
        rows[0][j] = j;
    for (size_t i = 1; i <= na; i++) {
        size_t *now = rows[i % 3], *up = rows[(i + 2) % 3], *up2 = rows[(i + 1) % 3];
        now[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = up[j - 1] + (a[i - 1] != b[j - 1]);
            if (up[j] + 1 < best)
                best = up[j] + 1;
            if (now[j - 1] + 1 < best)
                best = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < best)
                best = up2[j - 2] + 1;
            now[j] = best;
        }
    }
    return rows[na % 3][nb];
}

/* Whether `candidate` is nearer to `text` than *best, and near enough to be what was meant; lowers *best. */
static bool nearer(const char *text, const char *candidate, size_t n, size_t *best)
{
    size_t length = strlen(text);
    if (length >= KEY_CAP || n >= KEY_CAP)
        return false;
    size_t d = edit_distance(text, length, candidate, n), most = (length > n ? length : n) / 3;
    if (d > (most ? most : 1) || d >= *best)
        return false;
    *best = d;
    return true;
}

static status *unknown_key(const struct option_table *t, const char *key, const char *prefix, const char *dot)
{
    char legal[LEGAL_BYTES] = "", hint[KEY_CAP + 24] = "";
    size_t best = SIZE_MAX, used = 0;
    for (size_t i = 0; i < t->count; i++) {
        const char *k = t->rows[i].key;
        if (nearer(key, k, strlen(k), &best))
            snprintf(hint, sizeof hint, "; did you mean \"%s\"?", k);
        if (used < sizeof legal - KEY_CAP - 8)
            used += (size_t)snprintf(legal + used, sizeof legal - used, "%s%s", i ? ", " : "", k);
        else if (i == t->count - 1)
            snprintf(legal + used, sizeof legal - used, ", ...");
    }
    return ERR(INVALID, "%s%s%s%.100s: unknown key%s (legal%s%s: %s)", prefix, t->section, dot, key, hint,
               *t->section ? " in " : "", t->section, t->count ? legal : "none");
}

static status *complaint(const struct option *o, enum verdict v, const char *text, const char *full_key,
                         const char *prefix)
{
    if (v == NO_MEMORY)
        return ERR(NO_MEMORY, "%s%s: a text of %zu bytes", prefix, full_key, strlen(text));
    char legal[LEGAL_BYTES], hint[KEY_CAP + 24] = "";
    legal_text(o, legal, sizeof legal);
    if (o->type == OPT_ENUM) {
        size_t best = SIZE_MAX, n;
        const char *c;
        for (int i = 0; (c = choice(o->choices, i, &n)); i++)
            if (nearer(text, c, n, &best))
                snprintf(hint, sizeof hint, "; did you mean \"%.*s\"?", (int)n, c);
    }
    return ERR(INVALID, "%s%s: \"%.100s\" %s %s%s (legal: %s)", prefix, full_key, text, v == WRONG ? "is not" : "is",
               v == WRONG ? types[o->type].noun : "out of range", hint, legal);
}

/* ---- the interface ---- */

const struct option *options_find(const struct option_table *t, const char *key)
{
    for (size_t i = 0; i < t->count; i++)
        if (!strcmp(t->rows[i].key, key))
            return &t->rows[i];
    return NULL;
}

status *options_set(const struct option_table *t, const char *key, const char *text, void *base, const char *where)
{
    char prefix[300] = "", full_key[2 * KEY_CAP];
    const char *dot = *t->section ? "." : "";
    if (where && *where)
        snprintf(prefix, sizeof prefix, "%s: ", where);
    const struct option *o = options_find(t, key);
    if (!o)
        return unknown_key(t, key, prefix, dot);
    enum verdict v = types[o->type].parse(o, text, (char *)base + o->offset);
    if (v == FINE)
        return NULL;
    snprintf(full_key, sizeof full_key, "%s%s%s", t->section, dot, key);
    return complaint(o, v, text, full_key, prefix);
}

status *options_defaults(const struct option_table *t, void *base)
{
    for (size_t i = 0; i < t->count; i++)
        memset((char *)base + t->rows[i].offset, 0, types[t->rows[i].type].bytes);
    for (size_t i = 0; i < t->count; i++) {
        const struct option *o = &t->rows[i];
        status *st = o->def ? options_set(t, o->key, o->def, base, "built-in default") : NULL;
        if (st) {
            options_fini(t, base);
            return st;
        }
    }
    return NULL;
}

void options_fini(const struct option_table *t, void *base)
{
    for (size_t i = 0; i < t->count; i++) {
        if (t->rows[i].type != OPT_STRING && t->rows[i].type != OPT_LIST)
            continue;
        char **field = (char **)(void *)((char *)base + t->rows[i].offset);
        mem_free(*field);
        *field = NULL;
    }
}

void options_get(const struct option_table *t, const char *key, const void *base, char *text, size_t bytes)
{
    const struct option *o = options_find(t, key);
    snprintf(text, bytes, "%s", "");
    if (!o)
        return;
    const void *field = (const char *)base + o->offset;
    size_t n;
    const char *c;
    switch (o->type) {
    case OPT_BOOL:
        snprintf(text, bytes, "%s", *(const bool *)field ? "true" : "false");
        break;
    case OPT_INT:
        snprintf(text, bytes, "%" PRId64, *(const int64_t *)field);
        break;
    case OPT_FLOAT:
        number_text(*(const double *)field, text, bytes);
        break;
    case OPT_STRING:
    case OPT_LIST:
        c = *(const char *const *)field;
        snprintf(text, bytes, "%s", c ? c : "");
        break;
    case OPT_ENUM:
        c = *(const int *)field < 0 ? NULL : choice(o->choices, *(const int *)field, &n);
        if (c)
            snprintf(text, bytes, "%.*s", (int)n, c);
        break;
    case OPT_SIZE:
        size_text(*(const uint64_t *)field, text, bytes);
        break;
    }
}

void options_help(const struct option_table *t, FILE *to)
{
    for (size_t i = 0; i < t->count; i++) {
        const struct option *o = &t->rows[i];
        char key[2 * KEY_CAP], legal[LEGAL_BYTES];
        snprintf(key, sizeof key, "%s%s%s", t->section, *t->section ? "." : "", o->key);
        legal_text(o, legal, sizeof legal);
        fprintf(to, "%-28s %-6s %s%s; %s%s%s: %s\n", key, types[o->type].name, o->def ? "default " : "required",
                o->def ? (*o->def ? o->def : "\"\"") : "", legal, o->unit && *o->unit ? "; in " : "",
                o->unit ? o->unit : "", o->help);
    }
}
