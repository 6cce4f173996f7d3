/* store_fault: every operation asks `hit` and hands on to the inner store's table. */
#include "tests/support/store_fault.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/rng.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

struct fault {
    struct store *inner;
    uint32_t slow_us, slow_op_us;
    const char *slow_op;
    uint64_t slow_seed;
    struct store_direct direct;
    _Atomic uint64_t direct_left;
    struct {
        pthread_mutex_t lock;
        bool armed;
        uint64_t left;
        enum fault_mode mode;
        const char *happened;
    } synced;
};

static struct fault *fault_of(struct store *s)
{
    return s->impl;
}

static struct store *inner_of(struct store *s)
{
    return fault_of(s)->inner;
}

/* Count an operation; true if it is the one to fail, in *mode. */
static bool hit(struct store *s, const char *what, enum fault_mode *mode)
{
    struct fault *f = fault_of(s);
    pthread_mutex_lock(&f->synced.lock);
    bool yes = f->synced.armed && f->synced.left-- == 0;
    if (yes) {
        f->synced.armed = false;
        f->synced.happened = what;
        *mode = f->synced.mode;
    }
    pthread_mutex_unlock(&f->synced.lock);
    return yes;
}

static void drag(struct store *s, const char *what)
{
    const struct fault *f = fault_of(s);
    if (f->slow_op && strcmp(f->slow_op, what) == 0)
        clock_sleep_us(f->slow_op_us);
}

static status *injected(const char *what)
{
    return ERR(IO, "injected fault in %s", what);
}

/* The operation, or the fault before or after it. */
#define PASS(what, expr)                                                                                               \
    do {                                                                                                               \
        enum fault_mode mode_;                                                                                         \
        drag(s, what);                                                                                                 \
        if (!hit(s, what, &mode_))                                                                                     \
            return expr;                                                                                               \
        if (mode_ == FAULT_AFTER)                                                                                      \
            status_free(expr);                                                                                         \
        return injected(what);                                                                                         \
    } while (0)

static status *fault_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode)
{
    PASS("put", inner_of(s)->ops->put(inner_of(s), key, buf, n, mode));
}

static status *fault_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got)
{
    PASS("get", inner_of(s)->ops->get(inner_of(s), key, offset, buf, n, got));
}

static status *fault_stat(struct store *s, const char *key, struct store_info *out)
{
    PASS("stat", inner_of(s)->ops->stat(inner_of(s), key, out));
}

static status *fault_list(struct store *s, const char *dir, struct store_list *out)
{
    PASS("list", inner_of(s)->ops->list(inner_of(s), dir, out));
}

static status *fault_remove(struct store *s, const char *key)
{
    PASS("remove", inner_of(s)->ops->remove(inner_of(s), key));
}

static status *fault_remove_tree(struct store *s, const char *dir)
{
    PASS("remove_tree", inner_of(s)->ops->remove_tree(inner_of(s), dir));
}

static status *fault_rename_tree(struct store *s, const char *from, const char *to)
{
    PASS("rename_tree", store_rename_tree(inner_of(s), from, to));
}

static status *fault_sweep(struct store *s, const char *dir, const char *mark)
{
    PASS("sweep", store_sweep(inner_of(s), dir, mark));
}

static status *fault_now(struct store *s, uint64_t *ns)
{
    PASS("now", inner_of(s)->ops->now(inner_of(s), ns));
}

static status *open_inner(struct store_writer *w)
{
    struct store_writer *in;
    TRY(store_writer_open(inner_of(w->store), w->key, w->bytes, &in));
    w->impl = in;
    return NULL;
}

static status *fault_writer_open(struct store_writer *w)
{
    struct store *s = w->store;
    enum fault_mode mode;
    return hit(s, "writer_open", &mode) ? injected("writer_open") : open_inner(w);
}

static status *write_inner(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    const struct fault *f = fault_of(w->store);
    const size_t half = f->slow_us ? n / 2 : n;
    if (f->slow_us)
        clock_sleep_us((uint32_t)rng_below((struct rng_at){ f->slow_seed, 0, 1, 7 }, offset, f->slow_us));
    TRY(store_write(w->impl, offset, buf, half));
    if (f->slow_us)
        clock_sleep_us((uint32_t)rng_below((struct rng_at){ f->slow_seed, 0, 2, 7 }, offset, f->slow_us));
    TRY(store_write(w->impl, offset + half, (const char *)buf + half, n - half));
    *put = n;
    return NULL;
}

static status *fault_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put)
{
    struct store *s = w->store;
    uint64_t left = atomic_load(&fault_of(s)->direct_left);
    while (left && !atomic_compare_exchange_weak(&fault_of(s)->direct_left, &left, left - 1))
        ;
    PASS("write", write_inner(w, offset, buf, n, put));
}

static struct store_direct fault_direct(struct store_writer *w)
{
    struct fault *f = fault_of(w->store);
    return atomic_load(&f->direct_left) ? f->direct : store_writer_direct(w->impl);
}

static status *fault_finish(struct store_writer *w)
{
    enum fault_mode mode;
    drag(w->store, "finish");
    if (!hit(w->store, "finish", &mode))
        return store_writer_finish(w->impl);
    if (mode == FAULT_AFTER)
        status_free(store_writer_finish(w->impl));
    else
        store_writer_abort(w->impl);
    return injected("finish");
}

static void fault_abort(struct store_writer *w)
{
    store_writer_abort(w->impl);
}

static const struct store_ops fault_ops = {
    .name = "fault",
    .scheme = "fault",
    .put = fault_put,
    .get = fault_get,
    .stat = fault_stat,
    .list = fault_list,
    .remove = fault_remove,
    .remove_tree = fault_remove_tree,
    .rename_tree = fault_rename_tree,
    .sweep = fault_sweep,
    .now = fault_now,
    .writer_open = fault_writer_open,
    .write = fault_write,
    .finish = fault_finish,
    .abort = fault_abort,
    .direct = fault_direct,
};

status *store_fault_open(struct store *inner, struct store **out)
{
    struct store *s = mem_calloc(1, sizeof *s);
    struct fault *f = mem_calloc(1, sizeof *f);
    if (!s || !f) {
        mem_free(s);
        mem_free(f);
        return ERR(NO_MEMORY, "store_fault");
    }
    f->inner = inner;
    pthread_mutex_init(&f->synced.lock, NULL);
    *s = (struct store){ .ops = &fault_ops, .uri = inner->uri, .impl = f };
    *out = s;
    return NULL;
}

void store_fault_close(struct store *s)
{
    pthread_mutex_destroy(&fault_of(s)->synced.lock);
    mem_free(s->impl);
    mem_free(s);
}

void store_fault_arm(struct store *s, uint64_t n, enum fault_mode mode)
{
    struct fault *f = fault_of(s);
    pthread_mutex_lock(&f->synced.lock);
    f->synced.armed = true;
    f->synced.left = n;
    f->synced.mode = mode;
    f->synced.happened = NULL;
    pthread_mutex_unlock(&f->synced.lock);
}

const char *store_fault_disarm(struct store *s)
{
    struct fault *f = fault_of(s);
    pthread_mutex_lock(&f->synced.lock);
    f->synced.armed = false;
    const char *happened = f->synced.happened;
    pthread_mutex_unlock(&f->synced.lock);
    return happened;
}

void store_fault_slow_op(struct store *s, const char *op, uint32_t us)
{
    fault_of(s)->slow_op = op;
    fault_of(s)->slow_op_us = us;
}

void store_fault_slow(struct store *s, uint32_t most_us, uint64_t seed)
{
    fault_of(s)->slow_us = most_us;
    fault_of(s)->slow_seed = seed;
}

void store_fault_direct(struct store *s, struct store_direct align, uint64_t writes)
{
    fault_of(s)->direct = align;
    atomic_store(&fault_of(s)->direct_left, writes);
}
