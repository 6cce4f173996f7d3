/* report: clocks, the JSON text, and the objects on the root. */
#include "ckpt/report.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const report_stage_names[REPORT_STAGES + 1] = { "capture", "checksum", "write",    "fsync", "vote",
                                                            "commit",  "read",     "exchange", "place", "total" };

/* ---- clocks */

static void stretch(struct report_clock *c, uint64_t first_ns, uint64_t last_ns)
{
    c->first_ns = c->last_ns && c->first_ns < first_ns ? c->first_ns : first_ns;
    c->last_ns = c->last_ns > last_ns ? c->last_ns : last_ns;
}

void report_add(struct report_clock *c, uint64_t begin_ns, uint64_t end_ns, uint64_t waited_ns, uint64_t bytes)
{
    c->bytes += bytes;
    c->busy_ns += end_ns - begin_ns - waited_ns;
    c->wait_ns += waited_ns;
    stretch(c, begin_ns, end_ns);
}

void report_merge(struct report_clock *into, const struct report_clock *from)
{
    if (from->last_ns)
        stretch(into, from->first_ns, from->last_ns);
    into->bytes += from->bytes;
    into->busy_ns += from->busy_ns;
    into->wait_ns += from->wait_ns;
    into->retries += from->retries;
}

void report_sum_init(struct report_sum *s)
{
    *s = (struct report_sum){ 0 };
    pthread_mutex_init(&s->lock, NULL);
}

void report_sum_fini(struct report_sum *s)
{
    pthread_mutex_destroy(&s->lock);
}

void report_note_clock(struct report_sum *s, enum report_stage stage, const struct report_clock *c)
{
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    report_merge(&s->stage[stage], c);
    pthread_mutex_unlock(&s->lock);
}

void report_note(struct report_sum *s, enum report_stage stage, uint64_t begin_ns, uint64_t waited_ns, uint64_t bytes)
{
    struct report_clock c = { 0 };
    report_add(&c, begin_ns, clock_ns(), waited_ns, bytes);
    report_note_clock(s, stage, &c);
}

void report_relative(struct report_rank *r, uint64_t start_ns)
{
    for (int i = 0; i < REPORT_STAGES; i++) {
        struct report_clock *c = &r->stage[i];
        c->first_ns -= c->first_ns > start_ns ? start_ns : c->first_ns;
        c->last_ns -= c->last_ns > start_ns ? start_ns : c->last_ns;
    }
}

/* ---- a report */

status *report_new(int world, struct report **out)
{
    struct report *r = mem_calloc(1, sizeof *r + (size_t)world * sizeof r->rank[0]);
    if (!r)
        return ERR(NO_MEMORY, "a report of %d ranks", world);
    r->world = world;
    *out = r;
    return NULL;
}

void report_align(struct report *r)
{
    uint64_t first = UINT64_MAX;
    for (int i = 0; i < r->world; i++)
        first = r->rank[i].begin_ns < first ? r->rank[i].begin_ns : first;
    for (int i = 0; i < r->world; i++)
        r->rank[i].begin_ns -= first;
}

double report_ettr(double interval, double block, double save, double load, double mtbf)
{
    if (!(mtbf > 0) || !(interval > 0))
        return (double)NAN;
    double lost = load + save + interval / 2;
    double kept = 1 - lost / mtbf;
    return kept > 0 ? kept * interval / (interval + block) : 0;
}

/* ---- JSON */

struct text {
    char *p;
    size_t used, room;
    bool full; /* memory ran out */
};

static void put(struct text *t, const char *fmt, ...) PRINTF(2, 3);
static void put(struct text *t, const char *fmt, ...)
{
    for (;;) {
        size_t left = t->room - t->used;
        va_list ap;
        va_start(ap, fmt);
        int n = vsnprintf(t->p ? t->p + t->used : NULL, left, fmt, ap);
        va_end(ap);
        if (t->full || n < 0)
            return;
        if ((size_t)n < left) {
            t->used += (size_t)n;
            return;
        }
        size_t room = 2 * t->room + (size_t)n + 4096;
        char *more = mem_realloc(t->p, room);
        t->full = !more;
        t->p = more ? more : t->p;
        t->room = more ? room : t->room;
    }
}

/* Nanoseconds as seconds, exact. */
static void put_seconds(struct text *t, uint64_t ns)
{
    put(t, "%" PRIu64 ".%09" PRIu64, ns / 1000000000u, ns % 1000000000u);
}

/* A column: the u64 at `offset` of every rank. */
static void put_column(struct text *t, const struct report *r, const char *name, size_t offset, bool seconds)
{
    put(t, "\"%s\":[", name);
    for (int i = 0; i < r->world; i++) {
        uint64_t v;
        memcpy(&v, (const char *)&r->rank[i] + offset, sizeof v);
        put(t, i ? "," : "");
        if (seconds && v)
            put_seconds(t, v);
        else
            put(t, "%" PRIu64, v);
    }
    put(t, "]");
}

static void put_stage(struct text *t, const struct report *r, int stage)
{
    size_t at = offsetof(struct report_rank, stage) + (size_t)stage * sizeof(struct report_clock);
    put(t, "\"%s\":{", report_stage_names[stage]);
    put_column(t, r, "bytes", at + offsetof(struct report_clock, bytes), false);
    put(t, ",");
    put_column(t, r, "s", at + offsetof(struct report_clock, busy_ns), true);
    put(t, ",");
    put_column(t, r, "wait_s", at + offsetof(struct report_clock, wait_ns), true);
    put(t, ",");
    put_column(t, r, "retries", at + offsetof(struct report_clock, retries), false);
    put(t, ",");
    put_column(t, r, "begin_s", at + offsetof(struct report_clock, first_ns), true);
    put(t, ",");
    put_column(t, r, "end_s", at + offsetof(struct report_clock, last_ns), true);
    put(t, "}");
}

bool report_has_stage(bool load, enum report_stage stage)
{
    return stage == REPORT_CHECKSUM || stage == REPORT_TOTAL || (stage >= REPORT_READ) == load;
}

static void put_head(struct text *t, const struct report *r)
{
    put(t, "{\"version\":1,\"kind\":\"%s\",\"step\":%" PRIu64 ",\"attempt\":\"%016" PRIx64 "\",\"time_ns\":%" PRIu64,
        r->load ? "load" : "save", r->step, r->attempt, r->time_ns);
    put(t, ",\"world\":%d,\"mesh\":{", r->world);
    for (int a = 0; a < MESH_AXES; a++)
        put(t, "%s\"%s\":%d", a ? "," : "", mesh_axis_names[a], r->mesh.size[a]);
    put(t, "},\"s\":");
    put_seconds(t, r->span_ns);
    if (r->load) {
        put(t, ",\"storage_bytes\":%" PRIu64 ",\"unique_bytes\":%" PRIu64, r->storage_bytes, r->unique_bytes);
        return;
    }
    put(t, ",\"interval_s\":");
    put_seconds(t, r->interval_ns);
}

status *report_text(const struct report *r, char **out, size_t *bytes)
{
    struct text t = { 0 };
    put_head(&t, r);
    put(&t, ",\n\"ranks\":{");
    put_column(&t, r, "begin_s", offsetof(struct report_rank, begin_ns), true);
    put(&t, ",");
    put_column(&t, r, "s", offsetof(struct report_rank, total_ns), true);
    put(&t, ",");
    put_column(&t, r, "stall_s", offsetof(struct report_rank, stall_ns), true);
    put(&t, ",");
    put_column(&t, r, "bytes", offsetof(struct report_rank, bytes), false);
    put(&t, "},\n\"stages\":{");
    bool first = true;
    for (int i = 0; i < REPORT_STAGES; i++) {
        if (!report_has_stage(r->load, (enum report_stage)i))
            continue;
        put(&t, first ? "\n" : ",\n");
        put_stage(&t, r, i);
        first = false;
    }
    put(&t, "}}\n");
    if (t.full) {
        mem_free(t.p);
        return ERR(NO_MEMORY, "the text of a report of %d ranks", r->world);
    }
    *out = t.p;
    *bytes = t.used;
    return NULL;
}

/* ---- on the root */

void report_key(bool load, uint64_t step, char key[STORE_KEY_BYTES])
{
    snprintf(key, STORE_KEY_BYTES, "reports/%s-%012" PRIu64 ".json", load ? "load" : "save", step);
}

bool report_parse_name(const char *name, bool *load, uint64_t *step)
{
    char again[STORE_KEY_BYTES];
    bool is_load = strncmp(name, "load-", 5) == 0;
    if (!is_load && strncmp(name, "save-", 5) != 0)
        return false;
    uint64_t n = strtoull(name + 5, NULL, 10);
    report_key(is_load, n, again);
    if (strcmp(again + strlen("reports/"), name) != 0)
        return false;
    *load = is_load;
    *step = n;
    return true;
}

static int by_age(const void *a, const void *b)
{
    const struct store_entry *x = a, *y = b;
    return x->info.mtime_ns != y->info.mtime_ns
               ? (x->info.mtime_ns > y->info.mtime_ns) - (x->info.mtime_ns < y->info.mtime_ns)
               : strcmp(x->name, y->name);
}

status *report_prune(struct store *s, bool load, bool dry, void (*found)(void *arg, const char *key, uint64_t bytes),
                     void *arg)
{
    struct store_list l;
    TRY(store_list(s, "reports", &l));
    size_t left = 0;
    bool is_load;
    uint64_t step;
    if (l.count)
        qsort(l.entry, l.count, sizeof *l.entry, by_age);
    for (size_t i = 0; i < l.count; i++)
        left += report_parse_name(l.entry[i].name, &is_load, &step) && is_load == load;
    status *st = NULL;
    for (size_t i = 0; i < l.count && left > REPORT_KEEP && !st; i++) {
        char key[STORE_KEY_BYTES];
        if (!report_parse_name(l.entry[i].name, &is_load, &step) || is_load != load)
            continue;
        report_key(load, step, key);
        if (found)
            found(arg, key, l.entry[i].info.bytes);
        st = dry ? NULL : store_remove(s, key);
        left--;
    }
    store_list_free(&l);
    return st;
}

status *report_write(struct store *s, const struct report *r)
{
    char *text, key[STORE_KEY_BYTES];
    size_t bytes;
    TRY(report_text(r, &text, &bytes));
    report_key(r->load, r->step, key);
    status *st = store_put(s, key, text, bytes, STORE_REPLACE);
    mem_free(text);
    return st ? st : report_prune(s, r->load, false, NULL, NULL);
}
