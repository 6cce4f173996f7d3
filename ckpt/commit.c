/* commit: when a step counts, over any store. The invariants are those of commit.h; the lease is in lease.c, verify in
 * verify.c, what stays of committed steps in retain.c.
 *
 *   step-N/                    no metadata.pb: nothing is there yet, or never was
 *   step-N/ + metadata.pb      commit_put: committed
 *   step-N/                    commit_remove: metadata.pb removed first, then the tree, so a crash between leaves no
 * half step step-N.bad-ATTEMPT/        commit_retire: out of every list, kept for people
 *
 * What a step's directory holds besides its metadata.pb's files (orphans of dead attempts) belongs to nobody and is not
 * read. */
#include "ckpt/refs.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PART_KEEP = 160, RETIRE_TRIES = 100 };
static const char metadata_name[] = "metadata.pb", latest_key[] = "LATEST";

/* ---- Names */

void commit_step_dir(uint64_t step, char dir[STEP_DIR_BYTES])
{
    snprintf(dir, STEP_DIR_BYTES, "step-%012" PRIu64, step);
}

bool commit_parse_dir(const char *name, uint64_t *step)
{
    char again[STEP_DIR_BYTES];
    if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9')
        return false;
    uint64_t n = strtoull(name + 5, NULL, 10);
    commit_step_dir(n, again); /* one step has one name: "step-1", "step-000000000001x" and overflows are others */
    if (strcmp(name, again) != 0)
        return false;
    *step = n;
    return true;
}

void commit_shard_key(uint64_t step, const char *part, int writer, uint64_t attempt, char key[STORE_KEY_BYTES])
{
    char dir[STEP_DIR_BYTES], text[PART_KEEP + 20];
    commit_step_dir(step, dir);
    if (strlen(part) <= PART_KEEP)
        snprintf(text, sizeof text, "%s", part);
    else
        snprintf(text, sizeof text, "%.*s-%016" PRIx64, PART_KEEP, part, hash64(part, strlen(part)));
    for (char *p = text; *p; p++)
        if (*p == '/')
            *p = '.';
    snprintf(key, STORE_KEY_BYTES, "%s/%s-%05d.%016" PRIx64 ".h5", dir, text, writer, attempt);
}

bool commit_parse_writer(const char *name, int32_t *writer)
{
    const char *dash = strrchr(name, '-');
    int64_t n = 0;
    if (!dash || dash[1] < '0' || dash[1] > '9')
        return false;
    for (dash++; *dash >= '0' && *dash <= '9' && n <= INT32_MAX; dash++)
        n = n * 10 + (*dash - '0');
    if (*dash != '.' || n > INT32_MAX)
        return false;
    *writer = (int32_t)n;
    return true;
}

status *commit_file_key(uint64_t step, const char *name, char key[STORE_KEY_BYTES])
{
    char dir[STEP_DIR_BYTES];
    commit_step_dir(step, dir);
    int n = snprintf(key, STORE_KEY_BYTES, "%s/%s", dir, name);
    status *st = n > 0 && n < STORE_KEY_BYTES && !strchr(name, '/') ? store_check_key(key) : ERR(INVALID, "no name");
    if (!st)
        return NULL;
    status_free(st);
    return ERR(CORRUPT, "step %" PRIu64 ": no file can have the name \"%.60s\"", step, name);
}

/* ---- Committed steps */

status *commit_is_committed(struct store *s, uint64_t step, bool *yes)
{
    char key[STORE_KEY_BYTES];
    struct store_info info;
    TRY(commit_file_key(step, metadata_name, key));
    status *st = store_stat(s, key, &info);
    *yes = !st && !info.is_dir;
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

/* The step that LATEST names. A hint: unreadable is as good as missing. */
static bool read_latest(struct store *s, uint64_t *step)
{
    void *text;
    size_t n;
    status *st = store_get_all(s, latest_key, STEP_DIR_BYTES, &text, &n);
    if (st) {
        status_free(st);
        return false;
    }
    char *t = text;
    t[strcspn(t, "\n")] = 0;
    bool ok = commit_parse_dir(t, step);
    mem_free(text);
    return ok;
}

static int by_step(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

status *commit_list(struct store *s, struct step_list *out)
{
    struct store_list l;
    TRY(store_list(s, "", &l));
    uint64_t *step = mem_array(NULL, l.count + 1, sizeof *step);
    status *st = step ? NULL : ERR(NO_MEMORY, "a list of %zu steps", l.count);
    size_t named = 0, count = 0;
    for (size_t i = 0; i < l.count && !st; i++)
        if (l.entry[i].info.is_dir && commit_parse_dir(l.entry[i].name, &step[named]))
            named++;
    store_list_free(&l);
    if (st)
        return st;
    if (read_latest(s, &step[named]))
        named++;
    qsort(step, named, sizeof *step, by_step);
    for (size_t i = 0; i < named && !st; i++) {
        bool yes = false;
        if (count == 0 || step[count - 1] != step[i])
            st = commit_is_committed(s, step[i], &yes);
        if (yes)
            step[count++] = step[i];
    }
    if (st) {
        mem_free(step);
        return st;
    }
    *out = (struct step_list){ step, count };
    return NULL;
}

status *commit_newest(struct store *s, uint64_t *step)
{
    struct step_list l;
    TRY(commit_list(s, &l));
    status *st = l.count ? NULL : ERR(NOT_FOUND, "%s: no committed step", s->uri);
    if (!st)
        *step = l.step[l.count - 1];
    step_list_free(&l);
    return st;
}

void step_list_free(struct step_list *l)
{
    mem_free(l->step);
    *l = (struct step_list){ 0 };
}

status *commit_read_metadata(struct store *s, uint64_t step, struct metadata **out)
{
    char key[STORE_KEY_BYTES];
    void *buf;
    size_t n;
    TRY(commit_file_key(step, metadata_name, key));
    TRY(store_get_all(s, key, MAX_METADATA_BYTES, &buf, &n));
    struct metadata *m = NULL;
    status *st = metadata_decode(buf, n, &m);
    mem_free(buf);
    if (st)
        return status_wrap(st, "%s", key);
    if (m->step != step) {
        st = ERR(CORRUPT, "%s is of step %" PRIu64, key, m->step);
        metadata_free(m);
        return st;
    }
    *out = m;
    return NULL;
}

status *commit_read(struct store *s, uint64_t step, struct metadata **out)
{
    struct metadata *m;
    status *st = commit_read_metadata(s, step, &m);
    if (status_code(st) == ST_NOT_FOUND) {
        status_free(st);
        return ERR(NOT_FOUND, "step %" PRIu64 " is not committed", step);
    }
    if (st)
        return st;
    st = refs_check_files(s, m, false);
    if (st) {
        metadata_free(m);
        return st;
    }
    *out = m;
    return NULL;
}

status *commit_read_owners(struct store *s, uint64_t step, struct metadata **out)
{
    char key[STORE_KEY_BYTES];
    unsigned char head[META_HEAD_BYTES];
    struct metadata *m = NULL;
    TRY(commit_file_key(step, metadata_name, key));
    status *st = store_get(s, key, 0, head, sizeof head);
    if (!st && metadata_may_refer(head))
        st = commit_read_metadata(s, step, &m);
    if (status_code(st) == ST_NOT_FOUND || status_code(st) == ST_CORRUPT) {
        status_free(st);
        st = NULL;
    }
    if (!st)
        *out = m;
    return st;
}

/* ---- Committing */

/* Whose metadata.pb is there: NOT_FOUND, or its attempt (0 if it is damaged). */
static status *committed_by(struct store *s, uint64_t step, uint64_t *attempt)
{
    struct metadata *m;
    status *st = commit_read_metadata(s, step, &m);
    if (!st) {
        *attempt = m->attempt;
        metadata_free(m);
    } else if (status_code(st) == ST_CORRUPT || status_code(st) == ST_UNSUPPORTED) {
        status_free(st);
        st = NULL;
        *attempt = 0;
    }
    return st;
}

/* Move a zombie's metadata.pb to metadata.pb.ATTEMPT: a copy under that name first, so that nothing is lost in a crash
 * between. */
static status *set_aside(struct store *s, uint64_t step, const char *key, uint64_t attempt)
{
    char aside[STORE_KEY_BYTES], name[64];
    void *buf;
    size_t n;
    snprintf(name, sizeof name, "%s.%016" PRIx64, metadata_name, attempt);
    TRY(commit_file_key(step, name, aside));
    TRY(store_get_all(s, key, MAX_METADATA_BYTES, &buf, &n));
    status *st = store_put(s, aside, buf, n, STORE_REPLACE);
    mem_free(buf);
    return st ? st : store_remove(s, key);
}

/* After a put that failed, but may have become visible: take it back if it is ours. */
static status *take_back(struct store *s, const struct metadata *m, const char *key, status *st)
{
    uint64_t attempt;
    status *look = committed_by(s, m->step, &attempt);
    if (status_code(look) == ST_NOT_FOUND) {
        status_free(look);
        return st;
    }
    if (!look && attempt == m->attempt)
        look = store_remove(s, key);
    if (look)
        st = status_wrap(st, "%s could not be removed (%s) and may count", key, status_message(look));
    status_free(look);
    return st;
}

static status *put_metadata(struct store *s, const struct metadata *m, const char *key, const void *buf, size_t n)
{
    for (int tries = 0;; tries++) {
        status *st = store_put(s, key, buf, n, STORE_EXCLUSIVE);
        if (!st)
            return NULL;
        if (status_code(st) != ST_EXISTS || tries == 2)
            return status_code(st) == ST_EXISTS ? st : take_back(s, m, key, st);
        uint64_t attempt;
        status *look = committed_by(s, m->step, &attempt);
        if (!look && attempt == m->attempt)
            return status_wrap(st, "step %" PRIu64 " was committed by this attempt before", m->step);
        if (!look)
            look = set_aside(s, m->step, key, attempt);
        if (look && status_code(look) != ST_NOT_FOUND) { /* NOT_FOUND: it went away by itself */
            status_free(st);
            return look;
        }
        status_free(look);
        status_free(st);
    }
}

static status *put_latest(struct store *s, uint64_t step)
{
    char latest[STEP_DIR_BYTES + 1];
    commit_step_dir(step, latest);
    size_t len = strlen(latest);
    latest[len] = '\n';
    return store_put(s, latest_key, latest, len + 1, STORE_REPLACE);
}

status *commit_point_latest(struct store *s)
{
    struct step_list l;
    TRY(commit_list(s, &l));
    status *st = l.count ? put_latest(s, l.step[l.count - 1]) : store_remove(s, latest_key);
    step_list_free(&l);
    return st;
}

status *commit_put(struct store *s, const struct metadata *m)
{
    char key[STORE_KEY_BYTES];
    void *buf;
    size_t n;
    TRY(commit_file_key(m->step, metadata_name, key));
    TRY(metadata_encode(m, &buf, &n));
    status *st = n <= MAX_METADATA_BYTES ? commit_drop_marks(s, m->step) /* they speak of another attempt's */
                                         : ERR(INVALID, "%s of %zu bytes: more than %d", key, n, MAX_METADATA_BYTES);
    if (!st)
        st = put_metadata(s, m, key, buf, n);
    mem_free(buf);
    if (st)
        return st;
    status_free(put_latest(s, m->step)); /* a hint; the step counts without it */
    return NULL;
}

/* ---- Removing */

status *commit_remove(struct store *s, uint64_t step)
{
    char key[STORE_KEY_BYTES], dir[STEP_DIR_BYTES];
    TRY(commit_file_key(step, metadata_name, key));
    TRY(store_remove(s, key));
    commit_step_dir(step, dir);
    return store_remove_tree(s, dir);
}

status *commit_retire(struct store *s, uint64_t step, const char *why, uint64_t attempt)
{
    char dir[STEP_DIR_BYTES], to[STORE_KEY_BYTES], key[STORE_KEY_BYTES];
    commit_step_dir(step, dir);
    status *st = NULL;
    for (int i = 1; i <= RETIRE_TRIES; i++) { /* the name is taken if one attempt retires a step twice */
        int n = snprintf(to, sizeof to, "%s.%s-%016" PRIx64, dir, why, attempt);
        if (n > 0 && (size_t)n < sizeof to && i > 1)
            snprintf(to + n, sizeof to - (size_t)n, "-%d", i);
        st = store_rename_tree(s, dir, to);
        if (status_code(st) != ST_EXISTS)
            break;
        if (i < RETIRE_TRIES) {
            status_free(st);
            st = NULL;
        }
    }
    if (status_code(st) == ST_NOT_FOUND || status_code(st) == ST_UNSUPPORTED) {
        bool cannot = status_code(st) == ST_UNSUPPORTED;
        status_free(st);
        st = NULL;
        if (cannot) {
            TRY(commit_file_key(step, metadata_name, key));
            st = store_remove(s, key);
        }
    }
    return st;
}

status *commit_discard(struct store *s, uint64_t step, uint64_t attempt)
{
    char dir[STEP_DIR_BYTES], mark[17];
    uint64_t owner;
    status *st = committed_by(s, step, &owner);
    if (!st && owner == attempt)
        return ERR(EXISTS, "step %" PRIu64 " is committed by attempt %016" PRIx64 "; it is not discarded", step,
                   attempt);
    if (st && status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    commit_step_dir(step, dir);
    snprintf(mark, sizeof mark, "%016" PRIx64, attempt);
    struct store_list l;
    TRY(store_list(s, dir, &l));
    st = NULL;
    for (size_t i = 0; i < l.count && !st; i++) {
        char key[STORE_KEY_BYTES];
        if (!strstr(l.entry[i].name, mark))
            continue;
        st = commit_file_key(step, l.entry[i].name, key);
        if (!st)
            st = store_remove(s, key);
    }
    store_list_free(&l);
    if (!st)
        st = store_sweep(s, dir, mark);
    if (!st)
        st = store_remove(s, dir);
    if (status_code(st) == ST_EXISTS) { /* others' files are in it */
        status_free(st);
        st = NULL;
    }
    return st;
}
