/* device_fake: a stream is a queue and a thread; an event counts how often it was recorded and how many of those
 * records its streams have reached. */
#include "tests/support/device_fake.h"

#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdatomic.h>
#include <string.h>

/* Set in the addresses of device memory: they are none of the host's. */
static const uint64_t AWAY = (uint64_t)1 << 60;

struct task {
    struct task *next;
    void (*fn)(void *arg);
    void *arg;
};

struct stream {
    struct thread thread;
    struct stream *next_low;
    bool low;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        struct task *first, **last;
        bool running, held, quit;
    } synced;
};

struct event {
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        uint64_t recorded, reached;
        int users; /* tasks that name it, and its owner */
    } synced;
};

struct fake {
    struct device device;
    struct device_ops ops;
    struct stream *null; /* what NULL names */
    atomic_ulong syncs;
    atomic_long blocks;
    struct {
        pthread_mutex_t lock;
        struct stream *low;
        bool held;
    } synced;
};

static struct fake *fake_of(struct device *d)
{
    return d->impl;
}

void *device_fake_memory(const void *p)
{
    CHECK((uint64_t)(uintptr_t)p & AWAY, "%p is no device memory", p);
    return (void *)(uintptr_t)((uint64_t)(uintptr_t)p & ~AWAY);
}

static bool fake_on_device(struct device *d, const void *p)
{
    (void)d;
    return (uint64_t)(uintptr_t)p & AWAY;
}

/* ---- streams */

static status *run_stream(void *arg)
{
    struct stream *s = arg;
    pthread_mutex_lock(&s->synced.lock);
    while (!s->synced.quit || s->synced.first) {
        struct task *t = s->synced.held ? NULL : s->synced.first;
        if (!t) {
            pthread_cond_wait(&s->synced.changed, &s->synced.lock);
            continue;
        }
        s->synced.first = t->next;
        if (!t->next)
            s->synced.last = &s->synced.first;
        s->synced.running = true;
        pthread_mutex_unlock(&s->synced.lock);
        t->fn(t->arg);
        mem_free(t);
        pthread_mutex_lock(&s->synced.lock);
        s->synced.running = false;
        pthread_cond_broadcast(&s->synced.changed);
    }
    pthread_mutex_unlock(&s->synced.lock);
    return NULL;
}

static status *fake_stream_open(struct device *d, struct stream **out)
{
    (void)d;
    struct stream *s = mem_calloc(1, sizeof *s);
    CHECK(s, "out of memory in a test");
    pthread_mutex_init(&s->synced.lock, NULL);
    pthread_cond_init(&s->synced.changed, NULL);
    s->synced.last = &s->synced.first;
    status *st = thread_start(&s->thread, "fake-stream", run_stream, s);
    CHECK(!st, "%s", status_message(st));
    *out = s;
    return NULL;
}

static status *fake_stream_open_low(struct device *d, struct stream **out)
{
    struct fake *f = fake_of(d);
    TRY(fake_stream_open(d, out));
    (*out)->low = true;
    pthread_mutex_lock(&f->synced.lock);
    (*out)->next_low = f->synced.low;
    f->synced.low = *out;
    pthread_mutex_lock(&(*out)->synced.lock);
    (*out)->synced.held = f->synced.held;
    pthread_mutex_unlock(&(*out)->synced.lock);
    pthread_mutex_unlock(&f->synced.lock);
    return NULL;
}

static void forget_low(struct fake *f, struct stream *s)
{
    pthread_mutex_lock(&f->synced.lock);
    struct stream **at = &f->synced.low;
    while (*at != s)
        at = &(*at)->next_low;
    *at = s->next_low;
    pthread_mutex_unlock(&f->synced.lock);
}

static void fake_stream_close(struct device *d, struct stream *s)
{
    if (!s)
        return;
    if (s->low)
        forget_low(fake_of(d), s);
    pthread_mutex_lock(&s->synced.lock);
    s->synced.quit = true;
    s->synced.held = false;
    pthread_cond_broadcast(&s->synced.changed);
    pthread_mutex_unlock(&s->synced.lock);
    status_free(thread_join(&s->thread));
    pthread_cond_destroy(&s->synced.changed);
    pthread_mutex_destroy(&s->synced.lock);
    mem_free(s);
}

static struct stream *stream_of(struct device *d, struct stream *s)
{
    return s ? s : fake_of(d)->null;
}

void device_fake_queue(struct stream *s, void (*fn)(void *), void *arg)
{
    struct task *t = mem_alloc(sizeof *t);
    CHECK(t, "out of memory in a test");
    *t = (struct task){ .fn = fn, .arg = arg };
    pthread_mutex_lock(&s->synced.lock);
    *s->synced.last = t;
    s->synced.last = &t->next;
    pthread_cond_broadcast(&s->synced.changed);
    pthread_mutex_unlock(&s->synced.lock);
}

void device_fake_launch(struct device *d, struct stream *s, void (*fn)(void *), void *arg)
{
    device_fake_queue(stream_of(d, s), fn, arg);
}

static status *fake_stream_sync(struct device *d, struct stream *given)
{
    struct stream *s = stream_of(d, given);
    atomic_fetch_add(&fake_of(d)->syncs, 1);
    pthread_mutex_lock(&s->synced.lock);
    while (s->synced.first || s->synced.running)
        pthread_cond_wait(&s->synced.changed, &s->synced.lock);
    pthread_mutex_unlock(&s->synced.lock);
    return NULL;
}

static void set_held(struct device *d, struct stream *given, bool held)
{
    struct stream *s = stream_of(d, given);
    pthread_mutex_lock(&s->synced.lock);
    s->synced.held = held;
    pthread_cond_broadcast(&s->synced.changed);
    pthread_mutex_unlock(&s->synced.lock);
}

void device_fake_hold(struct device *d, struct stream *s)
{
    set_held(d, s, true);
}

void device_fake_let_go(struct device *d, struct stream *s)
{
    set_held(d, s, false);
}

static void set_low_held(struct device *d, bool held)
{
    struct fake *f = fake_of(d);
    pthread_mutex_lock(&f->synced.lock);
    f->synced.held = held;
    for (struct stream *s = f->synced.low; s; s = s->next_low)
        set_held(d, s, held);
    pthread_mutex_unlock(&f->synced.lock);
}

void device_fake_hold_low(struct device *d)
{
    set_low_held(d, true);
}

void device_fake_let_go_low(struct device *d)
{
    set_low_held(d, false);
}

unsigned long device_fake_syncs(const struct device *d)
{
    return atomic_load(&((struct fake *)d->impl)->syncs);
}

/* ---- events */

static void release(struct event *e)
{
    pthread_mutex_lock(&e->synced.lock);
    int left = --e->synced.users;
    pthread_mutex_unlock(&e->synced.lock);
    if (left)
        return;
    pthread_cond_destroy(&e->synced.changed);
    pthread_mutex_destroy(&e->synced.lock);
    mem_free(e);
}

static status *fake_event_open(struct device *d, struct event **out)
{
    (void)d;
    struct event *e = mem_calloc(1, sizeof *e);
    CHECK(e, "out of memory in a test");
    pthread_mutex_init(&e->synced.lock, NULL);
    pthread_cond_init(&e->synced.changed, NULL);
    e->synced.users = 1;
    *out = e;
    return NULL;
}

static void fake_event_close(struct device *d, struct event *e)
{
    (void)d;
    if (e)
        release(e);
}

struct mark {
    struct event *event;
    uint64_t number; /* of the record */
};

static struct mark *new_mark(struct event *e, uint64_t number)
{
    struct mark *m = mem_alloc(sizeof *m);
    CHECK(m, "out of memory in a test");
    *m = (struct mark){ e, number };
    pthread_mutex_lock(&e->synced.lock);
    e->synced.users++;
    pthread_mutex_unlock(&e->synced.lock);
    return m;
}

static void reach(void *arg)
{
    struct mark *m = arg;
    struct event *e = m->event;
    pthread_mutex_lock(&e->synced.lock);
    if (e->synced.reached < m->number)
        e->synced.reached = m->number;
    pthread_cond_broadcast(&e->synced.changed);
    pthread_mutex_unlock(&e->synced.lock);
    release(e);
    mem_free(m);
}

static status *fake_event_record(struct device *d, struct event *e, struct stream *s)
{
    pthread_mutex_lock(&e->synced.lock);
    uint64_t number = ++e->synced.recorded;
    pthread_mutex_unlock(&e->synced.lock);
    device_fake_launch(d, s, reach, new_mark(e, number));
    return NULL;
}

static status *fake_event_query(struct device *d, struct event *e, bool *done)
{
    (void)d;
    pthread_mutex_lock(&e->synced.lock);
    *done = e->synced.reached >= e->synced.recorded;
    pthread_mutex_unlock(&e->synced.lock);
    return NULL;
}

static status *fake_event_sync(struct device *d, struct event *e)
{
    (void)d;
    pthread_mutex_lock(&e->synced.lock);
    while (e->synced.reached < e->synced.recorded)
        pthread_cond_wait(&e->synced.changed, &e->synced.lock);
    pthread_mutex_unlock(&e->synced.lock);
    return NULL;
}

static void await(void *arg)
{
    struct mark *m = arg;
    struct event *e = m->event;
    pthread_mutex_lock(&e->synced.lock);
    while (e->synced.reached < m->number)
        pthread_cond_wait(&e->synced.changed, &e->synced.lock);
    pthread_mutex_unlock(&e->synced.lock);
    release(e);
    mem_free(m);
}

/* As CUDA: of the last record before this call, which a later one does not change. */
static status *fake_stream_wait(struct device *d, struct stream *s, struct event *e)
{
    pthread_mutex_lock(&e->synced.lock);
    uint64_t number = e->synced.recorded;
    pthread_mutex_unlock(&e->synced.lock);
    device_fake_launch(d, s, await, new_mark(e, number));
    return NULL;
}

/* ---- memory */

static status *fake_alloc(struct device *d, size_t bytes, void **out)
{
    void *p = mem_block(bytes ? bytes : 1, 4096);
    if (!p)
        return ERR(NO_MEMORY, "device fake: %zu bytes", bytes);
    atomic_fetch_add(&fake_of(d)->blocks, 1);
    *out = (void *)(uintptr_t)((uint64_t)(uintptr_t)p | AWAY);
    return NULL;
}

static void fake_free(struct device *d, void *p, size_t bytes)
{
    if (!p)
        return;
    atomic_fetch_sub(&fake_of(d)->blocks, 1);
    mem_block_free(device_fake_memory(p), bytes ? bytes : 1);
}

static status *fake_alloc_pinned(struct device *d, size_t bytes, void **out)
{
    void *p;
    TRY(fake_alloc(d, bytes, &p));
    *out = device_fake_memory(p);
    return NULL;
}

static void fake_free_pinned(struct device *d, void *p, size_t bytes)
{
    if (!p)
        return;
    atomic_fetch_sub(&fake_of(d)->blocks, 1);
    mem_block_free(p, bytes ? bytes : 1);
}

struct move {
    void *to;
    const void *from;
    size_t bytes;
};

static void move_now(void *arg)
{
    struct move *m = arg;
    memcpy(m->to, m->from, m->bytes);
    mem_free(m);
}

static void *real(struct device *d, const void *p)
{
    return fake_on_device(d, p) ? device_fake_memory(p) : (void *)(uintptr_t)p;
}

static status *fake_copy(struct device *d, void *dst, const void *src, size_t bytes, struct stream *s)
{
    struct move *m = mem_alloc(sizeof *m);
    CHECK(m, "out of memory in a test");
    *m = (struct move){ real(d, dst), real(d, src), bytes };
    device_fake_launch(d, s, move_now, m);
    return NULL;
}

/* ---- the device */

static const struct device_ops fake_ops = {
    .name = "fake",
    .alloc = fake_alloc,
    .free = fake_free,
    .alloc_pinned = fake_alloc_pinned,
    .free_pinned = fake_free_pinned,
    .stream_open = fake_stream_open,
    .stream_open_low = fake_stream_open_low,
    .stream_close = fake_stream_close,
    .stream_sync = fake_stream_sync,
    .event_open = fake_event_open,
    .event_close = fake_event_close,
    .event_record = fake_event_record,
    .event_query = fake_event_query,
    .event_sync = fake_event_sync,
    .stream_wait = fake_stream_wait,
    .copy = fake_copy,
    .on_device = fake_on_device,
};

struct device *device_fake_open(const struct comm_ops *comm)
{
    struct fake *f = mem_calloc(1, sizeof *f);
    CHECK(f, "out of memory in a test");
    f->ops = fake_ops;
    f->ops.comm = comm;
    pthread_mutex_init(&f->synced.lock, NULL);
    f->device = (struct device){ .ops = &f->ops, .impl = f };
    status_free(fake_stream_open(&f->device, &f->null));
    return &f->device;
}

void device_fake_close(struct device *d)
{
    struct fake *f = fake_of(d);
    fake_stream_close(d, f->null);
    CHECK(atomic_load(&f->blocks) == 0, "%ld blocks were not freed", atomic_load(&f->blocks));
    pthread_mutex_destroy(&f->synced.lock);
    mem_free(f);
}
