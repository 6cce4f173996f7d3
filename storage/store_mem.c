/* store_mem: objects in this handle's memory, for tests: the semantics of a store with nothing behind it.
 *
 * A table of (key, bytes) under one lock; directories are what keys imply. A writer fills a buffer of its own without
 * the lock (writes are disjoint) and finish swaps it into the table. Nothing survives store_close. */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "storage/store.h"

#include <pthread.h>
#include <string.h>

struct object {
    char *key;
    unsigned char *data;
    uint64_t bytes, mtime_ns;
};

struct mem_store {
    struct {
        pthread_mutex_t lock;
        struct object *object; /* [cap], in no order */
        size_t count, cap;
    } synced;
};

static void mem_lock(struct mem_store *m)
{
    pthread_mutex_lock(&m->synced.lock);
}

static void mem_unlock(struct mem_store *m)
{
    pthread_mutex_unlock(&m->synced.lock);
}

static struct object *find_locked(struct mem_store *m, const char *key)
{
    for (size_t i = 0; i < m->synced.count; i++)
        if (strcmp(m->synced.object[i].key, key) == 0)
            return &m->synced.object[i];
    return NULL;
}

/* Whether key lies below dir; *rest is then what follows "dir/". dir "" is the root. */
static bool is_below(const char *key, const char *dir, const char **rest)
{
    size_t n = strlen(dir);
    if (n && (strncmp(key, dir, n) != 0 || key[n] != '/'))
        return false;
    *rest = n ? key + n + 1 : key;
    return true;
}

static bool has_children_locked(struct mem_store *m, const char *dir)
{
    const char *rest;
    for (size_t i = 0; i < m->synced.count; i++)
        if (is_below(m->synced.object[i].key, dir, &rest))
            return true;
    return false;
}

static void drop_locked(struct mem_store *m, size_t i)
{
    mem_free(m->synced.object[i].key);
    mem_free(m->synced.object[i].data);
    m->synced.object[i] = m->synced.object[--m->synced.count];
}

/* Put `data` (taken on success) under key. */
static status *place_locked(struct mem_store *m, const char *key, unsigned char *data, uint64_t bytes,
                            enum store_put_mode mode)
{
    struct object *o = find_locked(m, key);
    if (o && mode == STORE_EXCLUSIVE)
        return ERR(EXISTS, "mem:%s is there already", key);
    if (o) {
        mem_free(o->data);
        o->data = data;
        o->bytes = bytes;
        o->mtime_ns = clock_wall_ns();
        return NULL;
    }
    if (m->synced.count == m->synced.cap) {
        size_t cap = m->synced.cap ? 2 * m->synced.cap : 16;
        struct object *grown = mem_array(m->synced.object, cap, sizeof *grown);
        if (!grown)
            return ERR(NO_MEMORY, "mem:%s", key);
        m->synced.object = grown;
        m->synced.cap = cap;
    }
    char *copy = mem_strdup(key);
    if (!copy)
        return ERR(NO_MEMORY, "mem:%s", key);
    m->synced.object[m->synced.count++] = (struct object){ copy, data, bytes, clock_wall_ns() };
    return NULL;
}

static status *mem_open(struct store *s, const char *path, bool create)
{
    (void)create;
    if (*path)
        return ERR(INVALID, "mem:%s: a memory store has no path", path);
    struct mem_store *m = mem_calloc(1, sizeof *m);
    if (!m)
        return ERR(NO_MEMORY, "memory store");
    pthread_mutex_init(&m->synced.lock, NULL);
    s->impl = m;
    return NULL;
}

static void mem_close(struct store *s)
{
    struct mem_store *m = s->impl;
    while (m->synced.count)
        drop_locked(m, m->synced.count - 1);
    mem_free(m->synced.object);
    pthread_mutex_destroy(&m->synced.lock);
    mem_free(m);
}

static status *mem_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    struct mem_store *m = s->impl;
    unsigned char *data = mem_alloc(n);
    if (!data)
        return ERR(NO_MEMORY, "mem:%s: %zu bytes", key, n);
    if (n)
        memcpy(data, buf, n);
    mem_lock(m);
    status *st = place_locked(m, key, data, n, mode);
    mem_unlock(m);
    if (st)
        mem_free(data);
    return st;
}

static status *mem_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    struct mem_store *m = s->impl;
    status *st = NULL;
    mem_lock(m);
    const struct object *o = find_locked(m, key);
    if (!o) {
        st = ERR(NOT_FOUND, "mem:%s", key);
    } else {
        uint64_t left = offset < o->bytes ? o->bytes - offset : 0;
        *got = left < n ? (size_t)left : n;
        if (*got)
            memcpy(buf, o->data + offset, *got);
    }
    mem_unlock(m);
    return st;
}

static status *mem_stat(struct store *s, const char *key, struct store_info *out)
{
    struct mem_store *m = s->impl;
    status *st = NULL;
    mem_lock(m);
    const struct object *o = find_locked(m, key);
    if (o)
        *out = (struct store_info){ .bytes = o->bytes, .mtime_ns = o->mtime_ns };
    else if (has_children_locked(m, key))
        *out = (struct store_info){ .is_dir = true };
    else
        st = ERR(NOT_FOUND, "mem:%s", key);
    mem_unlock(m);
    return st;
}

static bool is_listed(const struct store_list *l, const char *name)
{
    for (size_t i = 0; i < l->count; i++)
        if (strcmp(l->entry[i].name, name) == 0)
            return true;
    return false;
}

static status *mem_list(struct store *s, const char *dir, struct store_list *out)
{
    struct mem_store *m = s->impl;
    status *st = NULL;
    mem_lock(m);
    for (size_t i = 0; i < m->synced.count && !st; i++) {
        const struct object *o = &m->synced.object[i];
        const char *rest;
        if (!is_below(o->key, dir, &rest))
            continue;
        char name[STORE_KEY_BYTES];
        size_t n = strcspn(rest, "/");
        memcpy(name, rest, n);
        name[n] = 0;
        struct store_info info = { .bytes = o->bytes, .mtime_ns = o->mtime_ns };
        if (rest[n])
            info = (struct store_info){ .is_dir = true };
        if (!is_listed(out, name))
            st = store_list_add(out, name, &info);
    }
    mem_unlock(m);
    return st;
}

static status *mem_remove(struct store *s, const char *key)
{
    struct mem_store *m = s->impl;
    status *st = NULL;
    mem_lock(m);
    struct object *o = find_locked(m, key);
    if (o)
        drop_locked(m, (size_t)(o - m->synced.object));
    else if (has_children_locked(m, key))
        st = ERR(EXISTS, "mem:%s is a directory and not empty", key);
    mem_unlock(m);
    return st;
}

static status *mem_remove_tree(struct store *s, const char *dir)
{
    struct mem_store *m = s->impl;
    const char *rest;
    mem_lock(m);
    for (size_t i = m->synced.count; i-- > 0;)
        if (is_below(m->synced.object[i].key, dir, &rest) || strcmp(m->synced.object[i].key, dir) == 0)
            drop_locked(m, i);
    mem_unlock(m);
    return NULL;
}

/* New names for everything below `from`, made before anything is changed, so that an error leaves all as it was. */
static status *rename_locked(struct mem_store *m, const char *from, const char *to)
{
    status *st = NULL;
    size_t n = m->synced.count;
    char **fresh = mem_calloc(n, sizeof *fresh);
    if (!fresh)
        return ERR(NO_MEMORY, "mem:%s", from);
    for (size_t i = 0; i < n && !st; i++) {
        const char *rest;
        if (!is_below(m->synced.object[i].key, from, &rest))
            continue;
        size_t head = strlen(to), bytes = head + 1 + strlen(rest) + 1;
        fresh[i] = bytes <= STORE_KEY_BYTES ? mem_alloc(bytes) : NULL;
        if (!fresh[i]) {
            st = ERR(INVALID, "mem:%s/%s: the key is too long, or memory is out", to, rest);
            break;
        }
        memcpy(fresh[i], to, head);
        fresh[i][head] = '/';
        memcpy(fresh[i] + head + 1, rest, bytes - head - 1);
    }
    for (size_t i = 0; i < n; i++) {
        if (st || !fresh[i]) {
            mem_free(fresh[i]);
            continue;
        }
        mem_free(m->synced.object[i].key);
        m->synced.object[i].key = fresh[i];
    }
    mem_free(fresh);
    return st;
}

static status *mem_rename_tree(struct store *s, const char *from, const char *to)
{
    struct mem_store *m = s->impl;
    status *st;
    mem_lock(m);
    if (find_locked(m, to) || has_children_locked(m, to))
        st = ERR(EXISTS, "mem:%s is there already", to);
    else if (!has_children_locked(m, from))
        st = ERR(NOT_FOUND, "mem:%s: no such directory", from);
    else
        st = rename_locked(m, from, to);
    mem_unlock(m);
    return st;
}

static status *mem_now(struct store *s, uint64_t *ns)
{
    (void)s;
    *ns = clock_wall_ns();
    return NULL;
}

static status *mem_writer_open(struct store_writer *w)
{
    w->impl = w->bytes <= SIZE_MAX ? mem_calloc(1, (size_t)w->bytes) : NULL;
    return w->impl ? NULL : ERR(NO_MEMORY, "mem:%s: %llu bytes", w->key, (unsigned long long)w->bytes);
}

static status *mem_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    memcpy((unsigned char *)w->impl + offset, buf, n);
    *put = n;
    return NULL;
}

static status *mem_finish(struct store_writer *w)
{
    struct mem_store *m = w->store->impl;
    mem_lock(m);
    status *st = place_locked(m, w->key, w->impl, w->bytes, STORE_REPLACE);
    mem_unlock(m);
    if (st)
        mem_free(w->impl);
    return st;
}

static void mem_abort(struct store_writer *w)
{
    mem_free(w->impl);
}

extern const struct store_ops store_mem_ops;
const struct store_ops store_mem_ops = {
    .name = "mem",
    .scheme = "mem",
    .open = mem_open,
    .close = mem_close,
    .put = mem_put,
    .get = mem_get,
    .stat = mem_stat,
    .list = mem_list,
    .remove = mem_remove,
    .remove_tree = mem_remove_tree,
    .rename_tree = mem_rename_tree,
    .now = mem_now,
    .writer_open = mem_writer_open,
    .write = mem_write,
    .finish = mem_finish,
    .abort = mem_abort,
};
