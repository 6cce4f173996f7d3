/* gc: leftovers of dead jobs, found by what is there and not by what was: whatever the crash, an object that no
 * committed step names is of no use to anyone but the attempt in its name.
 *
 * Order matters: a directory is listed before its metadata.pb is read, so a file that a commit in between has made
 * count is known to it; and what is young stays, so a job that begins meanwhile is safe, too. Marks (commit_is_mark)
 * and the view belong to a committed step. What was set aside (.bad, .retired) of a step that a reader has pinned stays
 * until the pin has expired; expired pins go. Of reports the last REPORT_KEEP of a kind stay. */
#include "ckpt/commit.h"
#include "ckpt/pin.h"
#include "ckpt/report.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char metadata_name[] = "metadata.pb";

struct gc {
    struct store *store;
    const struct gc_options *o;
    void (*found)(void *arg, const char *key, uint64_t bytes);
    void *arg;
    uint64_t now_ns;
    struct step_list pins;
    struct gc_result r;
};

static bool is_old(const struct gc *g, uint64_t mtime_ns)
{
    return g->now_ns >= mtime_ns && (g->now_ns - mtime_ns) / 1000000000u >= g->o->age_seconds;
}

static bool is_live(const struct gc *g, const char *name)
{
    char mark[17];
    snprintf(mark, sizeof mark, "%016" PRIx64, g->o->live);
    return g->o->has_live && strstr(name, mark);
}

static void tell(struct gc *g, const char *key, uint64_t bytes)
{
    g->r.objects++;
    g->r.bytes += bytes;
    if (g->found)
        g->found(g->arg, key, bytes);
}

static bool is_named(const struct metadata *m, const char *name)
{
    if (!m)
        return false;
    if (strcmp(name, metadata_name) == 0 || strcmp(name, COMMIT_VIEW) == 0 || commit_is_mark(name))
        return true;
    for (uint64_t i = 0; i < m->file_count; i++)
        if (!m->file[i].owner && strcmp(m->file[i].name, name) == 0)
            return true;
    return false;
}

static status *collect_file(struct gc *g, uint64_t step, const struct store_entry *e)
{
    char key[STORE_KEY_BYTES];
    TRY(commit_file_key(step, e->name, key));
    tell(g, key, e->info.bytes);
    return g->o->dry_run ? NULL : store_remove(g->store, key);
}

/* Temporary files have no place in a list, so no age: only without a live job are they surely dead. */
static status *sweep(struct gc *g, const char *dir)
{
    static const char *const marks[] = { ".h5", "metadata", "mark" };
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        TRY(store_sweep(g->store, dir, marks[i]));
    return NULL;
}

static status *remove_empty(struct gc *g, const struct store_entry *dir)
{
    tell(g, dir->name, 0);
    status *st = g->o->dry_run ? NULL : store_remove(g->store, dir->name);
    if (status_code(st) != ST_EXISTS)
        return st;
    status_free(st); /* someone has put something into it */
    return NULL;
}

static status *collect_step(struct gc *g, uint64_t step, const struct store_entry *dir)
{
    struct store_list l;
    struct metadata *m = NULL;
    TRY(store_list(g->store, dir->name, &l));
    status *st = commit_read_metadata(g->store, step, &m);
    bool damaged = status_code(st) == ST_CORRUPT || status_code(st) == ST_UNSUPPORTED;
    if (damaged || status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        st = NULL;
    }
    size_t left = 0;
    for (size_t i = 0; i < l.count && !st && !damaged; i++) {
        const struct store_entry *e = &l.entry[i];
        if (e->info.is_dir || is_named(m, e->name) || is_live(g, e->name) || !is_old(g, e->info.mtime_ns))
            left++;
        else
            st = collect_file(g, step, e);
    }
    if (!st && !damaged && !g->o->has_live) {
        if (!g->o->dry_run)
            st = sweep(g, dir->name);
        if (!st && !m && left == 0 && is_old(g, dir->info.mtime_ns))
            st = remove_empty(g, dir);
    }
    metadata_free(m);
    store_list_free(&l);
    return st;
}

/* A directory that was set aside is as old as what is newest in it. */
static status *collect_aside(struct gc *g, const struct store_entry *dir)
{
    struct store_list l;
    uint64_t bytes = 0;
    TRY(store_list(g->store, dir->name, &l));
    bool old = is_old(g, dir->info.mtime_ns);
    for (size_t i = 0; i < l.count; i++) {
        old = old && is_old(g, l.entry[i].info.mtime_ns);
        bytes += l.entry[i].info.bytes;
    }
    store_list_free(&l);
    if (!old)
        return NULL;
    tell(g, dir->name, bytes);
    return g->o->dry_run ? NULL : store_remove_tree(g->store, dir->name);
}

/* "step-000000000100.bad-..." */
static bool is_aside(const char *name, uint64_t *step)
{
    char head[STEP_DIR_BYTES];
    const char *dot = strchr(name, '.');
    if (!dot || (size_t)(dot - name) >= sizeof head ||
        (strncmp(dot, ".bad-", 5) != 0 && strncmp(dot, ".retired-", 9) != 0))
        return false;
    snprintf(head, sizeof head, "%.*s", (int)(dot - name), name);
    return commit_parse_dir(head, step);
}

static void found_report(void *arg, const char *key, uint64_t bytes)
{
    tell(arg, key, bytes);
}

static status *collect_reports(struct gc *g)
{
    for (int load = 0; load < 2; load++)
        TRY(report_prune(g->store, load, g->o->dry_run, found_report, g));
    return g->o->has_live || g->o->dry_run ? NULL : store_sweep(g->store, "reports", ".json");
}

status *commit_gc(struct store *s, const struct gc_options *o,
                  void (*found)(void *arg, const char *key, uint64_t bytes), void *arg, struct gc_result *out)
{
    struct gc g = { .store = s, .o = o, .found = found, .arg = arg };
    struct store_list l;
    TRY(store_now(s, &g.now_ns));
    TRY(store_list(s, "", &l));
    status *st = pins_read(s, !o->dry_run, &g.pins);
    for (size_t i = 0; i < l.count && !st; i++) {
        uint64_t step;
        if (!l.entry[i].info.is_dir)
            continue;
        if (commit_parse_dir(l.entry[i].name, &step))
            st = collect_step(&g, step, &l.entry[i]);
        else if (is_aside(l.entry[i].name, &step) && !pins_hold(&g.pins, step))
            st = collect_aside(&g, &l.entry[i]);
    }
    if (!st)
        st = collect_reports(&g);
    store_list_free(&l);
    step_list_free(&g.pins);
    if (!st)
        *out = g.r;
    return st;
}
