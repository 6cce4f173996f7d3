/* routes: see routes.h. A hash table of where each micro-batch's experts begin in one long list. */
#include "trainer/ops/routes.h"

#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct route_entry {
    uint64_t key, at, n; /* n 0: free */
};

enum { MAGIC_BYTES = 8, HEAD_BYTES = 16, FIRST_CAP = 1024 };
static const char magic[] = "TSRROUT1";

static struct route_entry *slot_of(const struct routes *r, uint64_t key)
{
    uint64_t i = key & (r->cap - 1);
    while (r->entry[i].n && r->entry[i].key != key)
        i = (i + 1) & (r->cap - 1);
    return &r->entry[i];
}

static status *grow(struct routes *r)
{
    struct routes old = *r;
    uint64_t cap = old.cap ? 2 * old.cap : FIRST_CAP;
    struct route_entry *entry = mem_calloc(cap, sizeof *entry);
    if (!entry)
        return ERR(NO_MEMORY, "routes of %llu micro-batches", (unsigned long long)cap);
    r->entry = entry;
    r->cap = cap;
    for (uint64_t i = 0; i < old.cap; i++)
        if (old.entry[i].n)
            *slot_of(r, old.entry[i].key) = old.entry[i];
    mem_free(old.entry);
    return NULL;
}

/* Room for n more experts under a new key. */
static status *add(struct routes *r, uint64_t key, uint64_t n, uint16_t **to)
{
    if (2 * r->count >= r->cap)
        TRY(grow(r));
    if (r->room - r->used < n) {
        uint64_t room = 2 * (r->used + n);
        uint16_t *expert = mem_array(r->expert, room, sizeof *expert);
        if (!expert)
            return ERR(NO_MEMORY, "routes of %llu tokens", (unsigned long long)room);
        r->expert = expert;
        r->room = room;
    }
    *slot_of(r, key) = (struct route_entry){ key, r->used, n };
    *to = r->expert + r->used;
    r->used += n;
    r->count++;
    return NULL;
}

uint64_t routes_key(const struct routes *r, uint32_t role, int64_t layer, uint64_t content)
{
    uint64_t part[] = { r->step, role, (uint64_t)layer, content };
    return hash64(part, sizeof part);
}

status *routes_get(const struct routes *r, uint64_t key, int32_t *expert, int64_t n, int64_t k, int rank, int ranks)
{
    const struct route_entry *e = r->cap ? slot_of(r, key) : NULL;
    int64_t tokens = e ? (int64_t)e->n / k : 0;
    if (!tokens || (tokens + ranks - 1) / ranks != n)
        return ERR(NOT_FOUND,
                   "train.routes: step %llu has a micro-batch of %lld tokens whose routes were not recorded: another "
                   "run, or other data, batches or weights to start from",
                   (unsigned long long)r->step, (long long)n);
    for (int64_t i = 0; i < n * k; i++) {
        int64_t token = i / k * ranks + rank;
        expert[i] = token < tokens ? r->expert[e->at + (uint64_t)(token * k + i % k)] : (int32_t)(i % k);
    }
    return NULL;
}

status *routes_put(struct routes *r, uint64_t key, const int32_t *expert, int64_t n)
{
    uint16_t *to;
    if (!n || (r->cap && slot_of(r, key)->n))
        return NULL;
    TRY(add(r, key, (uint64_t)n, &to));
    for (int64_t i = 0; i < n; i++)
        to[i] = (uint16_t)expert[i];
    return NULL;
}

/* ---- the file ---- */

static status *bad_file(const char *path)
{
    return ERR(INVALID, "train.routes: %s is no whole file of routes", path);
}

static status *read_entries(struct routes *r, FILE *f, const char *path)
{
    unsigned char head[HEAD_BYTES];
    size_t got;
    if (fread(head, 1, MAGIC_BYTES, f) != MAGIC_BYTES || memcmp(head, magic, MAGIC_BYTES) != 0)
        return bad_file(path);
    while ((got = fread(head, 1, sizeof head, f)) == sizeof head) {
        uint64_t key = get_u64(head), n = get_u64(head + 8);
        uint16_t *to;
        if (!n || n > UINT32_MAX || (r->cap && slot_of(r, key)->n))
            return bad_file(path);
        TRY(add(r, key, n, &to));
        for (uint64_t i = 0; i < n; i++) {
            if (fread(head, 1, 2, f) != 2)
                return bad_file(path);
            to[i] = (uint16_t)(head[0] | head[1] << 8);
        }
    }
    return got ? bad_file(path) : NULL;
}

static status *read_file(struct routes *r, const char *path)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return ERR_SYS(errno, "train.routes: open %s", path);
    status *st = read_entries(r, f, path);
    fclose(f);
    return st;
}

static bool write_entries(const struct routes *r, FILE *f)
{
    unsigned char head[HEAD_BYTES];
    bool good = fwrite(magic, 1, MAGIC_BYTES, f) == MAGIC_BYTES;
    for (uint64_t i = 0; i < r->cap && good; i++) {
        const struct route_entry *e = &r->entry[i];
        put_u64(head, e->key);
        put_u64(head + 8, e->n);
        good = !e->n || fwrite(head, 1, sizeof head, f) == sizeof head;
        for (uint64_t k = 0; k < e->n && good; k++) {
            uint16_t expert = r->expert[e->at + k];
            head[0] = (unsigned char)(expert & 255);
            head[1] = (unsigned char)(expert >> 8);
            good = fwrite(head, 1, 2, f) == 2;
        }
    }
    return good;
}

static status *write_file(const struct routes *r)
{
    FILE *f = fopen(r->path, "we");
    if (!f)
        return ERR_SYS(errno, "train.routes: open %s", r->path);
    bool good = write_entries(r, f);
    good = fclose(f) == 0 && good;
    return good ? NULL : ERR_SYS(errno, "train.routes: write %s", r->path);
}

/* ---- */

static void discard(struct routes *r)
{
    mem_free(r->entry);
    mem_free(r->expert);
    mem_free(r->path);
    mem_free(r);
}

status *routes_open(const char *how, struct routes **out)
{
    bool replay = !strncmp(how, "replay:", 7);
    *out = NULL;
    if (!*how)
        return NULL;
    if ((!replay && strncmp(how, "record:", 7) != 0) || !how[7])
        return ERR(INVALID, "train.routes: \"%.100s\" is none of record:PATH, replay:PATH", how);
    struct routes *r = mem_calloc(1, sizeof *r);
    if (!r)
        return ERR(NO_MEMORY, "routes");
    r->replay = replay;
    r->path = mem_strdup(how + 7);
    status *st = r->path ? NULL : ERR(NO_MEMORY, "routes");
    if (!st && replay)
        st = read_file(r, r->path);
    if (st) {
        discard(r);
        return st;
    }
    *out = r;
    return NULL;
}

status *routes_close(struct routes *r)
{
    if (!r)
        return NULL;
    status *st = r->replay ? NULL : write_file(r);
    discard(r);
    return st;
}
