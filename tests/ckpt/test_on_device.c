/* Saves from and loads into the memory of a device that is not the host's. `test_on_device`: on device_fake, with who
 * waits for whom; `test_on_device cuda [MIB]`: the same bytes on a GPU, and the rates of its copies (tests/gpu/run). */
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "tests/support/comm_threads.h"
#include "tests/support/device_fake.h"
#include "tests/support/fake_state.h"
#include "tests/support/test_root.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { TENSORS = 5 };

/* Tensors cut by rows over the ranks, in device memory; `next` is where the host makes what is copied there. */
struct state {
    struct device *dev;
    struct stream *stream; /* that writes them */
    tessera_state *list;
    size_t bytes[TENSORS];
    void *data[TENSORS];
    uint32_t *next[TENSORS];
};

static uint32_t word_of(uint64_t version, int rank, int tensor, size_t i)
{
    return (uint32_t)(version * 1000003 + (uint64_t)rank * 10007 + (uint64_t)tensor * 101 + i * 7);
}

static status *state_open_on(tessera *t, struct comm *world, struct device *dev, size_t scale, struct state *s)
{
    *s = (struct state){ .dev = dev };
    TRY(tessera_state_new(t, &s->list));
    TRY(dev->ops->stream_open(dev, &s->stream));
    for (int i = 0; i < TENSORS; i++) {
        struct tessera_tensor d = TESSERA_TENSOR;
        char name[16];
        size_t rows = (size_t)(i + 1) * scale + 1;
        snprintf(name, sizeof name, "tensor.%d", i);
        s->bytes[i] = rows * 7 * 4;
        void *pinned;
        TRY(dev->ops->alloc(dev, s->bytes[i], &s->data[i]));
        TRY(dev->ops->alloc_pinned(dev, s->bytes[i], &pinned));
        s->next[i] = pinned;
        d.part = "model";
        d.name = name;
        d.dtype = TESSERA_F32;
        d.ndim = 2;
        d.shape[0] = rows * (size_t)world->size;
        d.offset[0] = rows * (size_t)world->rank;
        d.length[0] = rows;
        d.shape[1] = d.length[1] = 7;
        d.data = s->data[i];
        TRY(tessera_state_add_tensor(s->list, &d));
    }
    return NULL;
}

static void state_close_on(struct state *s)
{
    struct device *d = s->dev;
    status_free(d->ops->stream_sync(d, s->stream));
    for (int i = 0; i < TENSORS; i++) {
        d->ops->free(d, s->data[i], s->bytes[i]);
        d->ops->free_pinned(d, s->next[i], s->bytes[i]);
    }
    d->ops->stream_close(d, s->stream);
    tessera_state_free(s->list);
}

/* What a version has in each tensor, on the host; copy_out queues it. */
static void make(struct state *s, int rank, uint64_t version)
{
    for (int t = 0; t < TENSORS; t++)
        for (size_t i = 0; i < s->bytes[t] / 4; i++)
            s->next[t][i] = word_of(version, rank, t, i);
}

static status *write_tensor(struct state *s, int t)
{
    return s->dev->ops->copy(s->dev, s->data[t], s->next[t], s->bytes[t], s->stream);
}

static status *write_all(struct state *s, int rank, uint64_t version)
{
    make(s, rank, version);
    for (int t = 0; t < TENSORS; t++)
        TRY(write_tensor(s, t));
    return NULL;
}

static status *check(struct state *s, int rank, uint64_t version)
{
    struct device *d = s->dev;
    TRY(d->ops->stream_sync(d, s->stream)); /* what writes from `next` has ended */
    for (int t = 0; t < TENSORS; t++) {
        memset(s->next[t], 0, s->bytes[t]);
        TRY(d->ops->copy(d, s->next[t], s->data[t], s->bytes[t], s->stream));
    }
    TRY(d->ops->stream_sync(d, s->stream));
    for (int t = 0; t < TENSORS; t++)
        for (size_t i = 0; i < s->bytes[t] / 4; i++)
            if (s->next[t][i] != word_of(version, rank, t, i))
                return ERR(INTERNAL, "tensor %d, word %zu is %u, not %u of version %llu", t, i, s->next[t][i],
                           word_of(version, rank, t, i), (unsigned long long)version);
    return NULL;
}

struct job {
    struct store *store;
    uint64_t staging;
    int irregular;
    size_t scale;
    const char *device; /* NULL: the fake */
};

static status *open_both(struct comm *world, const struct job *j, struct device **dev, tessera **out)
{
    struct tessera_options o = TESSERA_OPTIONS;
    o.staging_bytes = j->staging;
    o.chunk_bytes = 1 << 20;
    o.keep_last = 2;
    o.irregular = j->irregular;
    if (j->device)
        TRY(device_open(j->device, 0, dev));
    else
        *dev = device_fake_open(NULL);
    return ckpt_open(&o, world, *dev, j->store, out);
}

static status *close_both(const struct job *j, struct device *dev, tessera *t, struct state *s)
{
    state_close_on(s);
    status *st = tessera_close(t);
    if (j->device)
        device_close(dev);
    else
        device_fake_close(dev);
    return st;
}

/* Saves whose tensors are overwritten one by one, each behind its fence, and a load of what was saved. */
static status *fenced(struct comm *world, void *arg)
{
    const struct job *j = arg;
    struct device *dev;
    tessera *t;
    struct state s;
    TRY(open_both(world, j, &dev, &t));
    TRY(state_open_on(t, world, dev, j->scale, &s));
    ckpt_set_stream(t, s.stream);
    for (uint64_t step = 1; step <= 3; step++) {
        TRY(write_all(&s, world->rank, step));
        TRY(tessera_save(t, s.list, step));
        TRY(dev->ops->stream_sync(dev, s.stream)); /* the host's copy is read no more */
        make(&s, world->rank, 100 + step);
        for (int i = 0; i < TENSORS; i++) {
            TRY(tessera_fence(t, s.data[i], s.bytes[i], s.stream));
            TRY(write_tensor(&s, i));
        }
        TRY(tessera_wait(t, NULL));
        TRY(check(&s, world->rank, 100 + step));
        TRY(tessera_load(t, s.list, step));
        TRY(check(&s, world->rank, step));
    }
    return close_both(j, dev, t, &s);
}

static void test_fenced(void **state)
{
    (void)state;
    static const struct job jobs[] = {
        { .scale = 6000 },
        { .scale = 6000, .staging = 2 << 20 }, /* fewer blocks than chunks */
        { .scale = 10 },
        { .scale = 3000, .irregular = TESSERA_MERGE },
    };
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) {
        for (int size = 1; size <= 3; size += 2) {
            struct root r = root_open(i % 2 != 0);
            struct job j = jobs[i];
            j.store = r.store;
            assert_ok(comm_threads_run(size, fenced, &j));
            root_close(&r);
        }
    }
}

/* Nobody on the host waits for the device: a save and its fence return while the stream that writes the tensors stands
 * still, then while the one that copies does. What is stored is what the first had been given before the save. */
static status *ordered(struct comm *world, void *arg)
{
    const struct job *j = arg;
    struct device *dev;
    tessera *t;
    struct state s;
    TRY(open_both(world, j, &dev, &t));
    TRY(state_open_on(t, world, dev, j->scale, &s));
    ckpt_set_stream(t, s.stream);
    TRY(write_all(&s, world->rank, 1));
    TRY(tessera_save(t, s.list, 1)); /* makes the plan */
    TRY(tessera_wait(t, NULL));
    make(&s, world->rank, 2);
    unsigned long syncs = device_fake_syncs(dev);

    device_fake_hold(dev, s.stream);
    for (int i = 0; i < TENSORS; i++)
        TRY(write_tensor(&s, i));
    TRY(tessera_save(t, s.list, 2));
    TRY(tessera_fence(t, NULL, 0, s.stream));
    if (device_fake_syncs(dev) != syncs)
        return ERR(INTERNAL, "the host waited for a stream");
    device_fake_let_go(dev, s.stream);
    TRY(tessera_wait(t, NULL));
    TRY(tessera_load(t, s.list, 2));
    TRY(check(&s, world->rank, 2));

    syncs = device_fake_syncs(dev);
    device_fake_hold_low(dev);
    TRY(tessera_save(t, s.list, 3)); /* version 2 */
    TRY(tessera_fence(t, s.data[0], s.bytes[0], s.stream));
    TRY(tessera_fence(t, NULL, 0, s.stream));
    if (device_fake_syncs(dev) != syncs)
        return ERR(INTERNAL, "the host waited for a stream");
    make(&s, world->rank, 3);
    for (int i = 0; i < TENSORS; i++)
        TRY(write_tensor(&s, i));
    device_fake_let_go_low(dev);
    TRY(tessera_wait(t, NULL));
    TRY(check(&s, world->rank, 3));
    TRY(tessera_load(t, s.list, 3));
    TRY(check(&s, world->rank, 2));
    return close_both(j, dev, t, &s);
}

static void test_ordered(void **state)
{
    (void)state;
    for (int size = 1; size <= 2; size++) {
        struct root r = root_open(false);
        struct job j = { .store = r.store, .scale = 6000 };
        assert_ok(comm_threads_run(size, ordered, &j));
        root_close(&r);
    }
}

/* ---- on a GPU */

static double rate(struct device *d, void *to, const void *from, size_t bytes, struct stream *s)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 5; i++) {
        uint64_t begin = clock_ns();
        assert_ok(d->ops->copy(d, to, from, bytes, s));
        assert_ok(d->ops->stream_sync(d, s));
        uint64_t ns = clock_ns() - begin;
        best = ns < best ? ns : best;
    }
    return (double)bytes / (double)best;
}

/* Pinned copies, and the rate at which a save gets its tensors off the device; staging holds all of them. */
static void print_rates(struct device *d, size_t mib)
{
    void *device, *pinned;
    struct stream *s;
    size_t bytes = (mib < 256 ? mib : 256) << 20;
    assert_ok(d->ops->alloc(d, bytes, &device));
    assert_ok(d->ops->alloc_pinned(d, bytes, &pinned));
    assert_ok(d->ops->stream_open(d, &s));
    printf("rate d2h %.2f GB/s\n", rate(d, pinned, device, bytes, s));
    printf("rate h2d %.2f GB/s\n", rate(d, device, pinned, bytes, s));
    d->ops->free(d, device, bytes);
    d->ops->free_pinned(d, pinned, bytes);
    d->ops->stream_close(d, s);

    struct comm *self;
    struct root r = root_open(false);
    struct tessera_options o = TESSERA_OPTIONS;
    struct state st;
    tessera *t;
    assert_ok(comm_open("self", NULL, NULL, &self));
    assert_ok(ckpt_open(&o, self, d, r.store, &t));
    assert_ok(state_open_on(t, self, d, (mib << 20) / 15 / 28, &st));
    ckpt_set_stream(t, st.stream);
    for (uint64_t step = 1; step <= 3; step++) {
        assert_ok(write_all(&st, 0, step));
        assert_ok(d->ops->stream_sync(d, st.stream));
        uint64_t begin = clock_ns();
        assert_ok(tessera_save(t, st.list, step));
        uint64_t called = clock_ns();
        assert_ok(tessera_fence(t, NULL, 0, st.stream));
        uint64_t queued = clock_ns();
        assert_ok(d->ops->stream_sync(d, st.stream)); /* which waits for the copies */
        uint64_t copied = clock_ns();
        struct tessera_progress p = TESSERA_PROGRESS;
        tessera_get_progress(t, &p);
        if (step == 3) {
            printf("rate save_d2h %.2f GB/s\n", (double)p.total_bytes / (double)(copied - begin));
            printf("time fence_host %.3f ms\n", (double)(queued - called) * 1e-6);
        }
        assert_ok(tessera_wait(t, NULL));
    }
    uint64_t begin = clock_ns();
    assert_ok(tessera_load(t, st.list, 3));
    printf("time load %.3f s of %zu MiB\n", ns_to_s(clock_ns() - begin), mib);
    assert_ok(check(&st, 0, 3));
    state_close_on(&st);
    assert_ok(tessera_close(t));
    comm_close(self);
    root_close(&r);
}

static int on_device(const char *name, size_t mib)
{
    struct device *d;
    status *st = device_open(name, 0, &d);
    if (st) {
        printf("skipped: %s\n", status_message(st));
        status_free(st);
        return 77;
    }
    struct root r = root_open(true);
    struct job j = { .store = r.store, .scale = 100000, .device = name };
    assert_ok(comm_threads_run(1, fenced, &j));
    root_close(&r);
    r = root_open(true);
    j.store = r.store;
    j.staging = 2 << 20;
    assert_ok(comm_threads_run(2, fenced, &j));
    root_close(&r);
    printf("tensors of device %s: saved and loaded\n", name);
    if (mib)
        print_rates(d, mib);
    device_close(d);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1)
        return on_device(argv[1], argc > 2 ? (size_t)atol(argv[2]) : 0);
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_fenced), cmocka_unit_test(test_ordered) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
