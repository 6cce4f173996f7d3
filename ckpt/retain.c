/* retain: which committed steps stay, and the metrics that decide it.
 *
 * A metric of a step is an object of its own beside the step's files, "mark.NAME" (a '/' of NAME is '.' there), holding
 * "VALUE NAME\n": it can be set at any time after the commit, by anyone, without touching metadata.pb, and two writers
 * of different metrics do not meet. It goes when the step goes, and when the step's number is committed anew
 * (commit_put).
 *
 * A step stays, too, while a reader has it pinned (pin.h) or a step that stays has bytes in it (refs.h).
 *
 * What is not surely to go stays: a mark that cannot be read stops retention before it has removed anything. */
#include "ckpt/commit.h"
#include "ckpt/pin.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char mark_prefix[] = "mark.";
enum { PREFIX = sizeof mark_prefix - 1, MARK_BYTES = MARK_NAME_BYTES + 64 };

static status *mark_key(uint64_t step, const char *metric, char key[STORE_KEY_BYTES])
{
    char name[PREFIX + MARK_NAME_BYTES];
    size_t n = strlen(metric);
    if (n == 0 || n >= MARK_NAME_BYTES)
        return ERR(INVALID, "a metric's name has 1 to %d characters, not %zu", MARK_NAME_BYTES - 1, n);
    snprintf(name, sizeof name, "%s%s", mark_prefix, metric);
    for (char *p = name + PREFIX; *p; p++)
        if (*p == '/')
            *p = '.';
    status *st = commit_file_key(step, name, key);
    if (!st)
        return NULL;
    status_free(st);
    return ERR(INVALID, "\"%.60s\" is no metric's name: letters, digits and ._-/", metric);
}

status *commit_mark(struct store *s, uint64_t step, const char *metric, double value)
{
    char key[STORE_KEY_BYTES], text[MARK_BYTES];
    TRY(mark_key(step, metric, key));
    if (!isfinite(value))
        return ERR(INVALID, "metric %s of step %" PRIu64 " is %g: only finite numbers can be compared", metric, step,
                   value);
    bool yes = false;
    TRY(commit_is_committed(s, step, &yes));
    if (!yes)
        return ERR(NOT_FOUND, "step %" PRIu64 " is not committed", step);
    int n = snprintf(text, sizeof text, "%.17g %s\n", value, metric);
    return store_put(s, key, text, (size_t)n, STORE_REPLACE);
}

static status *read_mark(struct store *s, const char *key, struct mark *out)
{
    void *text;
    size_t n;
    TRY(store_get_all(s, key, MARK_BYTES, &text, &n));
    char *t = text, *end;
    struct mark m = { .value = strtod(t, &end) };
    size_t name = *end == ' ' ? strcspn(end + 1, "\n") : 0;
    bool ok = end != t && isfinite(m.value) && name > 0 && name < sizeof m.name && end + name + 2 == t + n &&
              end[name + 1] == '\n';
    if (ok)
        snprintf(m.name, sizeof m.name, "%.*s", (int)name, end + 1);
    mem_free(text);
    if (!ok)
        return ERR(CORRUPT, "%s is not a metric's value and name", key);
    *out = m;
    return NULL;
}

static status *append_mark(struct store *s, const char *key, struct mark_list *l)
{
    struct mark *more = mem_array(l->mark, l->count + 1, sizeof *more);
    if (!more)
        return ERR(NO_MEMORY, "a list of %zu metrics", l->count);
    l->mark = more;
    TRY(read_mark(s, key, &more[l->count]));
    l->count++;
    return NULL;
}

status *commit_marks(struct store *s, uint64_t step, struct mark_list *out)
{
    char dir[STEP_DIR_BYTES], key[STORE_KEY_BYTES];
    struct mark_list l = { 0 };
    struct store_list names;
    commit_step_dir(step, dir);
    TRY(store_list(s, dir, &names));
    status *st = NULL;
    for (size_t i = 0; i < names.count && !st; i++) {
        if (!commit_is_mark(names.entry[i].name))
            continue;
        st = commit_file_key(step, names.entry[i].name, key);
        if (!st)
            st = append_mark(s, key, &l);
    }
    store_list_free(&names);
    if (st) {
        mark_list_free(&l);
        return st;
    }
    *out = l;
    return NULL;
}

void mark_list_free(struct mark_list *l)
{
    mem_free(l->mark);
    *l = (struct mark_list){ 0 };
}

status *commit_drop_marks(struct store *s, uint64_t step)
{
    char dir[STEP_DIR_BYTES], key[STORE_KEY_BYTES];
    struct store_list l;
    commit_step_dir(step, dir);
    TRY(store_list(s, dir, &l));
    status *st = NULL;
    for (size_t i = 0; i < l.count && !st; i++) {
        if (!commit_is_mark(l.entry[i].name) && strcmp(l.entry[i].name, COMMIT_VIEW) != 0)
            continue;
        st = commit_file_key(step, l.entry[i].name, key);
        if (!st)
            st = store_remove(s, key);
    }
    store_list_free(&l);
    return st;
}

bool commit_is_mark(const char *name)
{
    return strncmp(name, mark_prefix, PREFIX) == 0;
}

/* ---- Retention */

struct candidate {
    uint64_t step;
    double value;
    bool marked, keep;
};

static status *read_values(struct store *s, const struct keep_rules *k, struct candidate *c, size_t count)
{
    for (size_t i = 0; i < count && k->best > 0; i++) {
        char key[STORE_KEY_BYTES];
        struct mark m;
        TRY(mark_key(c[i].step, k->metric ? k->metric : "", key));
        status *st = read_mark(s, key, &m);
        if (status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            continue;
        }
        TRY(st);
        c[i].marked = true;
        c[i].value = k->lowest ? -m.value : m.value;
    }
    return NULL;
}

/* The `best` largest values; of equal ones the later step. */
static void keep_best(struct candidate *c, size_t count, int best)
{
    for (int n = 0; n < best; n++) {
        struct candidate *top = NULL;
        for (size_t i = 0; i < count; i++)
            if (c[i].marked && (!top || c[i].value >= top->value))
                top = &c[i];
        if (!top)
            return;
        top->keep = true;
        top->marked = false;
    }
}

/* The steps of this root that own bytes of m are kept, too. */
static void keep_owners_of(const struct metadata *m, struct candidate *c, size_t count)
{
    for (uint64_t i = 0; i < m->owner_count; i++)
        for (size_t k = 0; !m->owner[i].url && k < count; k++)
            c[k].keep = c[k].keep || c[k].step == m->owner[i].step;
}

/* Owners come before the steps that they own bytes of, so one pass from the newest down finds them all, and theirs. A
 * step whose metadata is damaged or gone cannot be read whatever stays. */
static status *keep_owners(struct store *s, struct candidate *c, size_t count)
{
    bool any = false;
    for (size_t i = 0; i < count; i++)
        any = any || !c[i].keep;
    for (size_t i = count; any && i-- > 0;) {
        struct metadata *m = NULL;
        if (!c[i].keep)
            continue;
        TRY(commit_read_owners(s, c[i].step, &m));
        if (m)
            keep_owners_of(m, c, i);
        metadata_free(m);
    }
    return NULL;
}

/* What somebody reads just now. */
static status *keep_pinned(struct store *s, struct candidate *c, size_t count)
{
    struct step_list pins;
    TRY(pins_read(s, true, &pins));
    for (size_t i = 0; i < count; i++)
        c[i].keep = c[i].keep || pins_hold(&pins, c[i].step);
    step_list_free(&pins);
    return NULL;
}

/* c: all committed steps, ascending; those before `end` are not above the newest. Removed from the newest down: a step
 * goes before what owns bytes of it, so that one that is listed is whole whenever this ends. */
static status *remove_others(struct store *s, const struct keep_rules *k, struct candidate *c, size_t end, size_t count)
{
    for (size_t i = 0; i < count; i++)
        c[i].keep = i + (size_t)k->last >= end || (k->every && c[i].step % k->every == 0);
    TRY(read_values(s, k, c, end));
    keep_best(c, end, k->best);
    TRY(keep_pinned(s, c, count));
    TRY(keep_owners(s, c, count));
    for (size_t i = count; i-- > 0;)
        if (!c[i].keep)
            TRY(commit_remove(s, c[i].step));
    return NULL;
}

status *commit_retain(struct store *s, uint64_t newest, const struct keep_rules *k)
{
    if (k->last <= 0)
        return NULL;
    struct step_list l;
    TRY(commit_list(s, &l));
    struct candidate *c = mem_calloc(l.count + 1, sizeof *c);
    status *st = c ? NULL : ERR(NO_MEMORY, "a list of %zu steps", l.count);
    size_t end = 0;
    bool there = false;
    for (size_t i = 0; i < l.count && !st; i++) {
        c[i].step = l.step[i];
        end += l.step[i] <= newest;
        there = there || l.step[i] == newest;
    }
    if (!st && there)
        st = remove_others(s, k, c, end, l.count);
    step_list_free(&l);
    mem_free(c);
    return status_wrap(st, "removing steps before the last %d", k->last);
}
