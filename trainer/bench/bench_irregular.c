/* bench_irregular: one state that TP and ZeRO-1 cut, saved in each of the three ways to store runs (default, merge,
 * gather), in turns; then loaded on another mesh from each of the three.
 *
 *   rounds:  {default: window without saves, window with one, save alone}, {merge: ...}, {gather: ...}; again; ...
 *   a step:  GEMMs, all-reduce of a small buffer, {fence, overwrite} of each tensor, [save], tick
 *
 * (1) Each way has a handle and a root of its own; all of them save the same memory. (2) The first save of each, which
 * plans and takes memory, comes before all rounds. (3) A window ends when its save is committed. (4) Times are the
 * slowest rank's, bytes are sums over ranks. */
#include "trainer/bench/bench.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/bench/limits.h"
#include "trainer/bench/measure.h"
#include "trainer/bench/site.h"
#include "trainer/bench/slices.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MODES = 3, REDUCE = 1 << 16 };
static const char *const mode_name[MODES] = { "default", "merge", "gather" }; /* TESSERA_AS_GIVEN ... */

struct irregular_options {
    uint64_t state_bytes, staging_bytes;
    int64_t tp, steps, step_ms, repeats;
    char *url;
};

#define AT(field) offsetof(struct irregular_options, field)
static const struct option rows[] = {
    { "url", OPT_STRING, "", 0, 0, NULL, "", "folder in which the run makes one of its own, removed at the end",
      AT(url) },
    { "state_bytes", OPT_SIZE, "256MiB", 0, 0, NULL, "bytes", "what is saved, over all ranks", AT(state_bytes) },
    { "tp", OPT_INT, "0", 0, 1e3, NULL, "ranks",
      "tensor-parallel; the others share optimiser state by ZeRO-1; 0: 2 if that leaves 2, else 1", AT(tp) },
    { "steps", OPT_INT, "8", 3, 1e5, NULL, "", "steps of a window; with a save after the first one", AT(steps) },
    { "step_ms", OPT_INT, "100", 1, 1e5, NULL, "ms", "about what the GEMMs of a step take", AT(step_ms) },
    { "staging_bytes", OPT_SIZE, "0", 0, 0, NULL, "bytes", "cap of a rank's staging; 0: the library's default",
      AT(staging_bytes) },
    { "repeats", OPT_INT, "5", 1, LIMIT_REPEATS, NULL, "", "rounds, and loads of each", AT(repeats) },
};
static const char *const quick[][2] = {
    { "state_bytes", "48MiB" }, { "steps", "4" }, { "step_ms", "30" }, { "repeats", "2" }, { NULL, NULL },
};

/* Of one way; seconds of this rank until they are gathered, then the slowest one's. */
struct way {
    char root[BENCH_PATH_BYTES + 64];
    tessera *ckpt;
    tessera_state *state;
    uint64_t step;
    double plan;
    double off[LIMIT_REPEATS], on[LIMIT_REPEATS], call[LIMIT_REPEATS], fence[LIMIT_REPEATS], stall[LIMIT_REPEATS],
        idle[LIMIT_REPEATS], load[LIMIT_REPEATS];
    uint64_t wire_bytes, load_wire_bytes, memory_bytes;
};

struct irregular_bench {
    struct bench *b;
    const struct irregular_options *o;
    struct mesh mesh;
    struct slices held;
    struct gemms products;
    float *reduce; /* a buffer */
    int64_t gemms; /* of a step */
    struct way way[MODES];
};

/* ---- a training step */

/* Adds what the step's fences took to *fence. */
static status *train_step(struct irregular_bench *ib, struct way *w, double *fence)
{
    gemms_run(&ib->products, ib->gemms);
    TRY(comm_allreduce(ib->b->world, ib->reduce, REDUCE, COMM_F32, COMM_MAX, NULL));
    for (uint64_t i = 0; i < ib->held.layers * SLICES_KINDS; i++) {
        const struct slice *x = &ib->held.slice[i];
        if (!x->bytes)
            continue;
        uint64_t t0 = clock_ns();
        TRY(tessera_fence(w->ckpt, x->data, x->bytes, NULL));
        *fence += ns_to_s(clock_ns() - t0);
        for (size_t k = 0; k < x->bytes; k += 64) /* every line of it */
            x->data[k]++;
    }
    return NULL;
}

/* The same on all ranks: a step's GEMMs take step_ms where nothing else runs. */
static status *calibrate(struct irregular_bench *ib)
{
    double best = INFINITY;
    for (int i = 0; i < 5; i++) {
        TRY(comm_barrier(ib->b->world));
        uint64_t t0 = clock_ns();
        gemms_run(&ib->products, 8);
        double took = ns_to_s(clock_ns() - t0) / 8;
        TRY(comm_allreduce(ib->b->world, &took, 1, COMM_F64, COMM_MAX, NULL));
        best = took < best ? took : best;
    }
    ib->gemms = (int64_t)ceil((double)ib->o->step_ms * 1e-3 / best);
    return NULL;
}

/* ---- rounds */

static status *tick(struct way *w, double *stall)
{
    uint64_t t0 = clock_ns();
    TRY(tessera_tick(w->ckpt, NULL));
    *stall += ns_to_s(clock_ns() - t0);
    return NULL;
}

/* A window; on: with a save after its first step. */
static status *run_window(struct irregular_bench *ib, struct way *w, bool on, int64_t round)
{
    double nothing = 0, *stall = on ? &w->stall[round] : &nothing;
    TRY(comm_barrier(ib->b->world));
    uint64_t t0 = clock_ns();
    for (int64_t i = 0; i < ib->o->steps; i++) {
        double fence = 0;
        TRY(train_step(ib, w, &fence));
        if (on && i == 0) {
            uint64_t t1 = clock_ns();
            TRY(tessera_save(w->ckpt, w->state, ++w->step));
            w->call[round] = ns_to_s(clock_ns() - t1);
            *stall += w->call[round];
        } else if (on) {
            w->fence[round] = fence > w->fence[round] ? fence : w->fence[round];
            *stall += fence;
        }
        TRY(tick(w, stall));
    }
    TRY(tessera_wait(w->ckpt, NULL));
    TRY(comm_barrier(ib->b->world));
    *(on ? &w->on[round] : &w->off[round]) = ns_to_s(clock_ns() - t0);
    return NULL;
}

static status *save_alone(struct irregular_bench *ib, struct way *w, double *seconds)
{
    TRY(bench_meet(ib->b));
    uint64_t t0 = clock_ns();
    TRY(tessera_save(w->ckpt, w->state, ++w->step));
    TRY(tessera_wait(w->ckpt, NULL));
    *seconds = ns_to_s(clock_ns() - t0);
    return NULL;
}

static status *run_round(struct irregular_bench *ib, int64_t round)
{
    for (int m = 0; m < MODES; m++) {
        struct way *w = &ib->way[(m + round) % MODES];
        TRY(run_window(ib, w, round % 2, round));
        TRY(run_window(ib, w, !(round % 2), round));
        TRY(save_alone(ib, w, &w->idle[round]));
    }
    return NULL;
}

/* ---- loads */

/* The other mesh: every rank cuts columns, nothing is shared. */
struct other {
    struct slices held;
    tessera *ckpt;
    tessera_state *state;
};

static status *open_other(struct irregular_bench *ib, struct way *w, struct other *o)
{
    struct mesh m = { .size = { 1, 1, 1, 1, 1 } };
    m.size[MESH_TP] = ib->b->world->size;
    struct tessera_options options = TESSERA_OPTIONS;
    options.url = w->root;
    options.read_only = 1;
    TRY(comm_agree(ib->b->world, slices_open(ib->o->state_bytes, &m, ib->b->world->rank, false, &o->held)));
    TRY(ckpt_open(&options, ib->b->world, NULL, NULL, &o->ckpt));
    return comm_agree(ib->b->world, slices_state(&o->held, o->ckpt, &o->state));
}

static status *drop(const struct way *w)
{
    struct file_list files;
    TRY(files_below(w->root, ".h5", &files));
    status *st = files_drop(&files);
    files_free(&files);
    return st;
}

static status *load_once(struct irregular_bench *ib, struct way *w, struct other *o, int64_t round)
{
    struct comm *c = ib->b->world;
    struct tessera_load_report r = TESSERA_LOAD_REPORT;
    memset(o->held.block, 0xff, o->held.block_bytes);
    TRY(comm_agree(c, c->rank ? NULL : drop(w)));
    TRY(bench_meet(ib->b));
    uint64_t t0 = clock_ns();
    TRY(tessera_load(o->ckpt, o->state, w->step));
    w->load[round] = ns_to_s(clock_ns() - t0);
    tessera_get_load_report(o->ckpt, &r);
    w->load_wire_bytes = r.wire_bytes;
    return comm_agree(c, slices_check(&o->held));
}

static status *load_all(struct irregular_bench *ib)
{
    struct other other[MODES] = { 0 };
    status *st = NULL;
    for (int m = 0; !st && m < MODES; m++)
        st = open_other(ib, &ib->way[m], &other[m]);
    for (int64_t r = 0; r < ib->o->repeats; r++)
        for (int m = 0; !st && m < MODES; m++)
            st = load_once(ib, &ib->way[(m + r) % MODES], &other[(m + r) % MODES], r);
    for (int m = 0; m < MODES; m++) {
        st = status_first(st, tessera_close(other[m].ckpt));
        tessera_state_free(other[m].state);
        slices_close(&other[m].held);
    }
    return st;
}

/* ---- results */

static status *gather(struct irregular_bench *ib, struct way *w)
{
    double *const all[] = { w->off, w->on, w->call, w->fence, w->stall, w->idle, w->load };
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(w->ckpt, &p);
    w->wire_bytes = p.wire_bytes;
    w->memory_bytes = p.staging_cap_bytes;
    w->plan = (double)p.plan_ns * 1e-9;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        TRY(comm_allreduce(ib->b->world, all[i], (size_t)ib->o->repeats, COMM_F64, COMM_MAX, NULL));
    TRY(comm_allreduce(ib->b->world, &w->plan, 1, COMM_F64, COMM_MAX, NULL));
    TRY(comm_allreduce(ib->b->world, &w->memory_bytes, 1, COMM_U64, COMM_MAX, NULL));
    return comm_allreduce(ib->b->world, &w->wire_bytes, 1, COMM_U64, COMM_SUM, NULL);
}

static void report(struct irregular_bench *ib, int mode, const double load[2])
{
    struct way *w = &ib->way[mode];
    size_t n = (size_t)ib->o->repeats;
    double lost[LIMIT_REPEATS], fence = 0, bytes = (double)slices_total_bytes(&ib->held);
    for (size_t i = 0; i < n; i++) {
        lost[i] = w->on[i] - w->off[i];
        fence = w->fence[i] > fence ? w->fence[i] : fence;
    }
    double load_s = median_of(w->load, n);
    const struct figure f[] = {
        { "mode", 0, mode_name[mode], 0, "checkpoint.irregular" },
        { "plan_s", w->plan, NULL, 5, "s, the first plan: descriptors to rank 0, planning, parts back" },
        { "wire_bytes", (double)w->wire_bytes, NULL, 0, "of tensors, sent from rank to rank in a save" },
        { "call_wall_ms_p50", median_of(w->call, n) * 1e3, NULL, 3, "ms in tessera_save, median" },
        { "fence_ms_max", fence * 1e3, NULL, 3, "ms in the fences of a step, most" },
        { "stall_ms", median_of(w->stall, n) * 1e3, NULL, 3,
          "ms in tessera_save, and in fences and ticks after it, median" },
        { "lost_ms", median_of(lost, n) * 1e3, NULL, 1, "ms, window with a save - window without, median" },
        { "save_gbps", bytes / median_of(w->idle, n) * 1e-9, NULL, 3, "GB/s, call to commit, nothing else running" },
        { "load_s", load_s, NULL, 4, "s, load of what this way saved on the other mesh, median" },
        { "load_gbps", bytes / load_s * 1e-9, NULL, 3, "GB/s" },
        { "load_wire_bytes", (double)w->load_wire_bytes, NULL, 0, "of tensors, sent from rank to rank in it" },
        { "staging_bytes", (double)w->memory_bytes, NULL, 0, "memory of a save, of the rank with the most" },
        { "state_bytes", bytes, NULL, 0, "" },
        { "step_ms", median_of(w->off, n) / (double)ib->o->steps * 1e3, NULL, 1, "ms, a step without saves" },
        { "ranks", ib->b->world->size, NULL, 0, "" },
        { "tp", ib->mesh.size[MESH_TP], NULL, 0, "tensor-parallel ranks; loaded with tp = ranks" },
        { "dp", ib->mesh.size[MESH_DP], NULL, 0, "ranks that share optimiser state" },
        { "repeats", (double)ib->o->repeats, NULL, 0, "" },
        { "load_start", load[0], NULL, 2, "load average of the last minute" },
        { "load_end", load[1], NULL, 2, "" },
    };
    bench_print(ib->b, f, sizeof f / sizeof *f);
}

/* ---- the run */

static status *open_way(struct irregular_bench *ib, int mode)
{
    struct way *w = &ib->way[mode];
    struct tessera_options o = TESSERA_OPTIONS;
    double first;
    snprintf(w->root, sizeof w->root, "%s/%s", ib->b->dir, mode_name[mode]);
    o.url = w->root;
    o.keep_last = 1;
    o.view = -1;
    o.irregular = mode;
    o.staging_bytes = ib->o->staging_bytes;
    TRY(ckpt_open(&o, ib->b->world, NULL, NULL, &w->ckpt));
    TRY(comm_agree(ib->b->world, slices_state(&ib->held, w->ckpt, &w->state)));
    return save_alone(ib, w, &first);
}

static status *open_memory(struct irregular_bench *ib)
{
    int n = ib->b->world->size, tp = (int)ib->o->tp;
    tp = tp ? tp : n % 2 || n < 4 ? 1 : 2;
    if (n % tp)
        return ERR(INVALID, "tp=%d does not divide %d ranks", tp, n);
    ib->mesh = (struct mesh){ .size = { 1, 1, 1, 1, 1 } };
    ib->mesh.size[MESH_TP] = tp;
    ib->mesh.size[MESH_DP] = n / tp;
    TRY(slices_open(ib->o->state_bytes, &ib->mesh, ib->b->world->rank, true, &ib->held));
    TRY(gemms_open(NULL, GEMMS_SIDE, false, &ib->products));
    ib->reduce = mem_calloc(REDUCE, sizeof *ib->reduce);
    return ib->reduce ? NULL : ERR(NO_MEMORY, "a buffer");
}

static status *measure(struct irregular_bench *ib)
{
    double load[2] = { load_average(), NAN };
    TRY(calibrate(ib));
    for (int m = 0; m < MODES; m++)
        TRY(open_way(ib, m));
    for (int64_t r = 0; r < ib->o->repeats; r++)
        TRY(run_round(ib, r));
    slices_fill(&ib->held);
    for (int m = 0; m < MODES; m++) {
        double last;
        TRY(save_alone(ib, &ib->way[m], &last));
    }
    TRY(load_all(ib));
    load[1] = load_average();
    for (int m = 0; m < MODES; m++) {
        TRY(gather(ib, &ib->way[m]));
        report(ib, m, load);
    }
    return NULL;
}

static status *run(struct bench *b, const void *options)
{
    struct irregular_bench *ib = mem_calloc(1, sizeof *ib);
    TRY(comm_agree(b->world, ib ? NULL : ERR(NO_MEMORY, "samples")));
    ib->b = b;
    ib->o = options;
    status *st = comm_agree(b->world, open_memory(ib));
    if (!st)
        st = measure(ib);
    for (int m = 0; m < MODES; m++) {
        st = status_first(st, tessera_close(ib->way[m].ckpt));
        tessera_state_free(ib->way[m].state);
    }
    slices_close(&ib->held);
    gemms_close(&ib->products);
    mem_free(ib->reduce);
    mem_free(ib);
    return st;
}

const struct bench_verb bench_irregular = {
    "irregular",
    "what it costs to store the runs that ZeRO makes: as they are, merged, or gathered first",
    { "", rows, sizeof rows / sizeof *rows },
    sizeof(struct irregular_options),
    AT(url),
    false,
    quick,
    run,
};
