/* report_read: a report from its JSON, and what can be asked of it.
 *
 * The reader takes any JSON that has the fields of report.c in any order of members, "world" before the columns, and
 * passes over members it does not know. What it reads may come from anyone: `world` is bounded by the bytes that are
 * there, and columns must be as long as it says. */
#include "ckpt/report.h"

#include "comm/base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_BYTES = 32, DEPTH = 16, RANK_TEXT_BYTES = 40, MAX_REPORT_BYTES = 256 << 20 };

struct json {
    const char *begin, *p; /* ends with a NUL */
    const char *fault;     /* the first thing that was wrong, before p */
};

static void wrong(struct json *j, const char *what)
{
    j->fault = j->fault ? j->fault : what;
}

static void space(struct json *j)
{
    j->p += strspn(j->p, " \t\r\n");
}

/* Whether c comes next; it is passed over then. */
static bool next(struct json *j, char c)
{
    space(j);
    if (j->fault || *j->p != c)
        return false;
    j->p++;
    return true;
}

static void need(struct json *j, char c, const char *what)
{
    if (!next(j, c))
        wrong(j, what);
}

/* A string; what does not fit in out is cut. */
static void string(struct json *j, char *out, size_t room)
{
    size_t n = 0;
    need(j, '"', "a string was to come");
    for (; !j->fault && *j->p != '"'; j->p++) {
        if ((unsigned char)*j->p < 0x20)
            wrong(j, "a string does not end");
        else if (*j->p == '\\' && !*++j->p)
            wrong(j, "a string does not end");
        else if (n + 1 < room)
            out[n++] = *j->p;
    }
    out[n] = 0;
    if (!j->fault)
        j->p++;
}

static double number(struct json *j)
{
    char *end;
    space(j);
    bool begins = *j->p == '-' || (*j->p >= '0' && *j->p <= '9');
    double v = begins ? strtod(j->p, &end) : 0;
    if (!begins || !isfinite(v) || v < 0) {
        wrong(j, "a number from 0 on was to come");
        return 0;
    }
    j->p = end;
    return v;
}

static uint64_t integer(struct json *j)
{
    char *end;
    space(j);
    if (*j->p < '0' || *j->p > '9') {
        wrong(j, "an integer from 0 on was to come");
        return 0;
    }
    uint64_t v = strtoull(j->p, &end, 10);
    j->p = end;
    return v;
}

static uint64_t seconds(struct json *j)
{
    double s = number(j);
    if (s > 1e9)
        wrong(j, "a time of more than 30 years");
    return s > 1e9 ? 0 : (uint64_t)(s * 1e9 + 0.5);
}

/* Members of an object, one by one: the next one's key, its value coming next; false at the end. */
static bool member(struct json *j, bool *first, char key[KEY_BYTES])
{
    if (next(j, '}'))
        return false;
    if (!*first)
        need(j, ',', "a comma was to come");
    *first = false;
    string(j, key, KEY_BYTES);
    need(j, ':', "a colon was to come");
    return !j->fault;
}

/* Any value. */
static void skip(struct json *j, int depth)
{
    char text[2], key[KEY_BYTES];
    bool first = true;
    space(j);
    if (depth > DEPTH) {
        wrong(j, "it is nested too deeply");
    } else if (*j->p == '"') {
        string(j, text, sizeof text);
    } else if (next(j, '{')) {
        while (member(j, &first, key))
            skip(j, depth + 1);
    } else if (next(j, '[')) {
        for (; !j->fault && !next(j, ']'); first = false) {
            if (!first)
                need(j, ',', "a comma was to come");
            skip(j, depth + 1);
        }
    } else {
        size_t n = strcspn(j->p, ",]} \t\r\n");
        j->p += n;
        if (!n)
            wrong(j, "a value was to come");
    }
}

/* [world] numbers into the u64 at `offset` of each rank. */
static void column(struct json *j, struct report *r, size_t offset, bool is_seconds)
{
    need(j, '[', "a column was to come");
    for (int i = 0; i < r->world && !j->fault; i++) {
        if (i)
            need(j, ',', "a column is shorter than the world");
        uint64_t v = is_seconds ? seconds(j) : integer(j);
        memcpy((char *)&r->rank[i] + offset, &v, sizeof v);
    }
    need(j, ']', "a column is longer than the world");
}

struct field {
    const char *key;
    size_t offset;
    bool seconds;
};

static void columns(struct json *j, struct report *r, const struct field *f, size_t fields, size_t base)
{
    char key[KEY_BYTES];
    bool first = true;
    need(j, '{', "an object was to come");
    while (!j->fault && member(j, &first, key)) {
        size_t i = 0;
        while (i < fields && strcmp(f[i].key, key) != 0)
            i++;
        if (i < fields)
            column(j, r, base + f[i].offset, f[i].seconds);
        else
            skip(j, 0);
    }
}

static void ranks(struct json *j, struct report *r)
{
    static const struct field f[] = { { "begin_s", offsetof(struct report_rank, begin_ns), true },
                                      { "s", offsetof(struct report_rank, total_ns), true },
                                      { "stall_s", offsetof(struct report_rank, stall_ns), true },
                                      { "bytes", offsetof(struct report_rank, bytes), false } };
    columns(j, r, f, sizeof f / sizeof *f, 0);
}

static void stages(struct json *j, struct report *r)
{
    static const struct field f[] = { { "bytes", offsetof(struct report_clock, bytes), false },
                                      { "s", offsetof(struct report_clock, busy_ns), true },
                                      { "wait_s", offsetof(struct report_clock, wait_ns), true },
                                      { "retries", offsetof(struct report_clock, retries), false },
                                      { "begin_s", offsetof(struct report_clock, first_ns), true },
                                      { "end_s", offsetof(struct report_clock, last_ns), true } };
    char key[KEY_BYTES];
    bool first = true;
    need(j, '{', "an object was to come");
    while (!j->fault && member(j, &first, key)) {
        size_t i = 0;
        while (i < REPORT_STAGES && strcmp(report_stage_names[i], key) != 0)
            i++;
        if (i < REPORT_STAGES)
            columns(j, r, f, sizeof f / sizeof *f,
                    offsetof(struct report_rank, stage) + i * sizeof(struct report_clock));
        else
            skip(j, 0);
    }
}

static void mesh(struct json *j, struct mesh *m)
{
    char key[KEY_BYTES];
    bool first = true;
    need(j, '{', "an object was to come");
    while (!j->fault && member(j, &first, key)) {
        int a = 0;
        while (a < MESH_AXES && strcmp(mesh_axis_names[a], key) != 0)
            a++;
        if (a == MESH_AXES) {
            skip(j, 0);
            continue;
        }
        uint64_t n = integer(j);
        if (n < 1 || n > INT32_MAX)
            wrong(j, "an axis of no size");
        m->size[a] = n < 1 || n > INT32_MAX ? 1 : (int)n;
    }
}

/* What stands before the columns, into `head`. */
static void head_member(struct json *j, const char *key, struct report *head)
{
    char text[KEY_BYTES];
    if (strcmp(key, "version") == 0) {
        if (integer(j) != 1)
            wrong(j, "its version is not 1");
    } else if (strcmp(key, "kind") == 0) {
        string(j, text, sizeof text);
        head->load = strcmp(text, "load") == 0;
        if (!head->load && strcmp(text, "save") != 0)
            wrong(j, "it is neither of a save nor of a load");
    } else if (strcmp(key, "attempt") == 0) {
        string(j, text, sizeof text);
        head->attempt = strtoull(text, NULL, 16);
    } else if (strcmp(key, "step") == 0) {
        head->step = integer(j);
    } else if (strcmp(key, "time_ns") == 0) {
        head->time_ns = integer(j);
    } else if (strcmp(key, "s") == 0) {
        head->span_ns = seconds(j);
    } else if (strcmp(key, "interval_s") == 0) {
        head->interval_ns = seconds(j);
    } else if (strcmp(key, "storage_bytes") == 0) {
        head->storage_bytes = integer(j);
    } else if (strcmp(key, "unique_bytes") == 0) {
        head->unique_bytes = integer(j);
    } else {
        skip(j, 0);
    }
}

static void world(struct json *j, size_t bytes, struct report **out)
{
    uint64_t n = integer(j);
    if (*out || n < 1 || n > bytes / RANK_TEXT_BYTES) {
        wrong(j, "its world is not what it carries");
        return;
    }
    status *st = report_new((int)n, out);
    if (st)
        wrong(j, "memory ran out");
    status_free(st);
}

static void report(struct json *j, size_t bytes, struct report **out)
{
    struct report head = { 0 };
    char key[KEY_BYTES];
    bool first = true;
    for (int a = 0; a < MESH_AXES; a++)
        head.mesh.size[a] = 1;
    need(j, '{', "an object was to come");
    while (!j->fault && member(j, &first, key)) {
        bool of_ranks = strcmp(key, "ranks") == 0, of_stages = strcmp(key, "stages") == 0;
        if (strcmp(key, "world") == 0)
            world(j, bytes, out);
        else if (strcmp(key, "mesh") == 0)
            mesh(j, &head.mesh);
        else if (!of_ranks && !of_stages)
            head_member(j, key, &head);
        else if (!*out)
            wrong(j, "columns stand before the world");
        else if (of_ranks)
            ranks(j, *out);
        else
            stages(j, *out);
    }
    space(j);
    if (*j->p)
        wrong(j, "something follows the report");
    if (!*out) {
        wrong(j, "it has no world");
        return;
    }
    head.world = (*out)->world;
    uint64_t product = 1;
    for (int a = 0; a < MESH_AXES && product <= INT32_MAX; a++)
        product *= (uint64_t)head.mesh.size[a];
    if (product != (uint64_t)head.world)
        wrong(j, "its mesh is not of its world");
    **out = head;
}

status *report_parse(const char *text, size_t bytes, struct report **out)
{
    struct json j = { .begin = text, .p = text };
    struct report *r = NULL;
    report(&j, bytes, &r);
    if (j.fault) {
        mem_free(r);
        return ERR(CORRUPT, "byte %zu: %s", (size_t)(j.p - j.begin), j.fault);
    }
    *out = r;
    return NULL;
}

/* ---- on the root */

/* The key of the report of *step, or of the one last written. */
static status *choose(struct store *s, bool load, const uint64_t *step, char key[STORE_KEY_BYTES])
{
    const char *kind = load ? "load" : "save";
    struct store_list l;
    TRY(store_list(s, "reports", &l));
    bool folder = l.count == 0; /* then the store is the folder itself, if it is anything */
    if (folder)
        TRY(store_list(s, "", &l));
    const struct store_entry *best = NULL;
    for (size_t i = 0; i < l.count; i++) {
        const struct store_entry *e = &l.entry[i];
        bool is_load;
        uint64_t n;
        if (!report_parse_name(e->name, &is_load, &n) || is_load != load || (step && n != *step))
            continue;
        best = !best || e->info.mtime_ns >= best->info.mtime_ns ? e : best; /* of equal ones the later step */
    }
    if (best)
        snprintf(key, STORE_KEY_BYTES, "%s%s", folder ? "" : "reports/", best->name);
    status *st = best   ? NULL
                 : step ? ERR(NOT_FOUND, "%s: no report of a %s of step %" PRIu64, s->uri, kind, *step)
                        : ERR(NOT_FOUND, "%s: no report of a %s", s->uri, kind);
    store_list_free(&l);
    return st;
}

status *report_read(struct store *s, bool load, const uint64_t *step, struct report **out)
{
    char key[STORE_KEY_BYTES];
    void *text = NULL;
    size_t bytes = 0;
    TRY(choose(s, load, step, key));
    TRY(store_get_all(s, key, MAX_REPORT_BYTES, &text, &bytes));
    status *st = report_parse(text, bytes, out);
    mem_free(text);
    return status_wrap(st, "%s", key);
}

/* ---- what can be asked */

uint64_t report_ns(const struct report *r, int rank, enum report_stage stage)
{
    return stage == REPORT_TOTAL ? r->rank[rank].total_ns : r->rank[rank].stage[stage].busy_ns;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

status *report_median(const struct report *r, enum report_stage stage, uint64_t *ns)
{
    uint64_t *v = mem_array(NULL, (size_t)r->world, sizeof *v);
    if (!v)
        return ERR(NO_MEMORY, "a median of %d ranks", r->world);
    for (int i = 0; i < r->world; i++)
        v[i] = report_ns(r, i, stage);
    qsort(v, (size_t)r->world, sizeof *v, by_value);
    *ns = v[(r->world - 1) / 2];
    mem_free(v);
    return NULL;
}
