/* cli_tidy: `tessera ckpt mark|rm|gc`: the verbs that change a root.
 *
 * rm holds the root's lease while it removes, so it is refused while a job is live, and a job that starts in that
 * moment is. gc holds it too where it is free; beside a live job it spares that job's attempt. mark needs none
 * (retain.c). */
#include "ckpt/cli.h"
#include "ckpt/pin.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- mark */

status *cli_mark(const struct request *r)
{
    const char *eq = r->arguments ? strchr(r->argument[r->arguments - 1], '=') : NULL;
    uint64_t step = r->step;
    if (r->arguments != 2 - (int)r->has_step || !eq)
        return ERR(INVALID, "ckpt mark: it takes URL STEP NAME=VALUE");
    if (!r->has_step)
        TRY(cli_step(r->argument[0], &step));
    char name[MARK_NAME_BYTES + 1], *end;
    const char *text = r->argument[r->arguments - 1];
    snprintf(name, sizeof name, "%.*s", (int)(eq - text < MARK_NAME_BYTES ? eq - text : MARK_NAME_BYTES), text);
    double value = strtod(eq + 1, &end);
    if (!eq[1] || *end)
        return ERR(INVALID, "ckpt mark: \"%s\" is not a number", eq + 1);
    return commit_mark(r->store, step, name, value);
}

/* ---- rm */

static bool is_asked(const uint64_t *asked, int count, uint64_t step)
{
    for (int i = 0; i < count; i++)
        if (asked[i] == step)
            return true;
    return false;
}

/* The newest step that is whole. */
static status *newest_valid(struct store *s, const struct step_list *l, uint64_t *step, bool *any)
{
    *any = false;
    for (size_t i = l->count; i-- > 0 && !*any;) {
        struct metadata *m = NULL;
        status *st = commit_read(s, l->step[i], &m);
        metadata_free(m);
        if (status_code(st) == ST_CORRUPT || status_code(st) == ST_UNSUPPORTED || status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            continue;
        }
        if (st)
            return st;
        *step = l->step[i];
        *any = true;
    }
    return NULL;
}

/* Refuse what a step that stays has bytes in, always, and what somebody reads just now, without --force. */
static status *check_needed(const struct request *r, const struct step_list *l, const uint64_t *asked, int count)
{
    struct step_list pins;
    status *st = NULL;
    for (size_t i = 0; i < l->count && !st; i++) {
        struct metadata *m = NULL;
        if (is_asked(asked, count, l->step[i]))
            continue;
        st = commit_read_owners(r->store, l->step[i], &m);
        for (uint64_t k = 0; m && k < m->owner_count && !st; k++)
            if (!m->owner[k].url && is_asked(asked, count, m->owner[k].step))
                st = ERR(INVALID,
                         "step %" PRIu64 " owns bytes of step %" PRIu64
                         ": remove that one, too, or neither; nothing was removed",
                         m->owner[k].step, l->step[i]);
        metadata_free(m);
    }
    TRY(st);
    TRY(pins_read(r->store, false, &pins));
    for (int i = 0; i < count && !st && !r->force; i++)
        if (pins_hold(&pins, asked[i]))
            st = ERR(INVALID, "step %" PRIu64 " is being read: --force removes it all the same; nothing was removed",
                     asked[i]);
    step_list_free(&pins);
    return st;
}

/* Refuse before anything is removed. */
static status *check_rm(const struct request *r, const uint64_t *asked, int count)
{
    struct step_list l;
    uint64_t newest = 0;
    bool any = false;
    for (int i = 0; i < count; i++) {
        bool yes = false;
        TRY(commit_is_committed(r->store, asked[i], &yes));
        if (!yes)
            return ERR(NOT_FOUND, "step %" PRIu64 " is not committed; nothing was removed", asked[i]);
    }
    TRY(commit_list(r->store, &l));
    status *st = newest_valid(r->store, &l, &newest, &any);
    if (!st)
        st = check_needed(r, &l, asked, count);
    step_list_free(&l);
    if (!st && any && !r->force && is_asked(asked, count, newest))
        st = ERR(INVALID, "step %" PRIu64 " is the newest valid one: --force removes it, too; nothing was removed",
                 newest);
    return st;
}

static int newest_first(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x > y ? -1 : x < y;
}

/* The newest first: a step goes before what owns bytes of it. */
static status *remove_steps(const struct request *r, uint64_t *asked, int count)
{
    TRY(check_rm(r, asked, count));
    qsort(asked, (size_t)count, sizeof *asked, newest_first);
    for (int i = 0; i < count; i++) {
        TRY(commit_remove(r->store, asked[i]));
        printf("removed step %" PRIu64 "\n", asked[i]);
    }
    return commit_point_latest(r->store);
}

status *cli_rm(const struct request *r)
{
    uint64_t asked[CLI_ARGUMENTS + 1];
    int count = 0;
    if (r->has_step)
        asked[count++] = r->step;
    for (int i = 0; i < r->arguments; i++)
        TRY(cli_step(r->argument[i], &asked[count++]));
    if (count == 0)
        return ERR(INVALID, "ckpt rm: which steps? It takes URL STEP... [--force]");
    struct lease l;
    char note[NOTE_BYTES];
    TRY(lease_take(r->store, 0, &l, note));
    status *st = remove_steps(r, asked, count);
    return status_first(st, lease_give_back(&l));
}

/* ---- gc */

static void print_found(void *arg, const char *key, uint64_t bytes)
{
    const struct request *r = arg;
    char size[16];
    cli_size(bytes, size);
    printf("%s ", r->dry_run ? "would remove" : "removed");
    cli_print(key);
    printf("  %s\n", size);
}

/* Whether a job is live, and which; else the lease is ours in *l. */
static status *take_or_look(const struct request *r, struct gc_options *o, struct lease *l, bool *ours)
{
    char note[NOTE_BYTES];
    *ours = false;
    TRY(lease_holder(r->store, &o->live, &o->has_live));
    if (o->dry_run || o->has_live)
        return NULL;
    status *st = lease_take(r->store, 0, l, note);
    *ours = !st;
    if (status_code(st) != ST_EXISTS)
        return st;
    status_free(st); /* a job began just now */
    return lease_holder(r->store, &o->live, &o->has_live);
}

status *cli_gc(const struct request *r)
{
    struct gc_options o = { .age_seconds = r->age_seconds, .dry_run = r->dry_run };
    struct gc_result sum = { 0 };
    struct lease l;
    bool ours = false;
    if (r->has_step)
        return ERR(INVALID, "ckpt gc: the URL of a root, not of a step");
    TRY(take_or_look(r, &o, &l, &ours));
    status *st = commit_gc(r->store, &o, print_found, (void *)(uintptr_t)r, &sum);
    if (ours)
        st = status_first(st, lease_give_back(&l));
    if (st)
        return st;
    char size[16];
    cli_size(sum.bytes, size);
    printf("%s %" PRIu64 " object%s, %s%s\n", r->dry_run ? "would remove" : "removed", sum.objects,
           sum.objects == 1 ? "" : "s", size, o.has_live ? "; a job may be live: its attempt was left alone" : "");
    return NULL;
}
