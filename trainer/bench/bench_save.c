/* bench_save: training steps with saves and without, in turn; then saves and plain writes, in turn, while nothing else
 * runs.
 *
 *   windows:  pair 0: off on, pair 1: on off, pair 2: off on, ...      `steps` steps each, started by a barrier
 *   a step:   GEMMs, all-reduce of the gradient, {fence, overwrite} of each tensor, [save], tick
 *   rates:    save, all plain writes; save, all plain writes; ...
 *
 * (1) Both kinds of window run the same code; only tessera_save is left out. (2) An on window ends when its last save
 * is committed, so that none of its cost falls into the next. (3) The first save of all, which plans and takes memory,
 * belongs to no window. (4) Times are the slowest rank's, CPU seconds are sums over ranks. (5) On a GPU tensors and
 * products are its own; a step ends when it has done what was queued, and the rates' saves say how fast tensors left
 * it: from the call until all copies of the save are done. */
#include "trainer/bench/bench.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/bench/field.h"
#include "trainer/bench/limits.h"
#include "trainer/bench/measure.h"
#include "trainer/bench/site.h"
#include "trainer/ops/kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALIBRATION_STEPS = 5, GPU_SIDE = 4096, PLAIN_BYTES = 256 << 20, COPY_BYTES = 256 << 20 };

struct save_options {
    uint64_t state_bytes, grad_bytes, chunk_bytes, staging_bytes;
    int64_t tensors, windows, steps, step_ms, save_every, writers, repeats, side;
    int device;
    char *url;
};

#define AT(field) offsetof(struct save_options, field)
static const struct option rows[] = {
    { "device", OPT_ENUM, "cpu", 0, 0, "cpu|cuda", "", "where the tensors are, and the steps' products", AT(device) },
    { "url", OPT_STRING, "", 0, 0, NULL, "",
      "folder, or s3://BUCKET/PREFIX, in which the run makes one of its own, removed at the end", AT(url) },
    { "state_bytes", OPT_SIZE, "512MiB", 0, 0, NULL, "bytes", "what is saved, over all ranks", AT(state_bytes) },
    { "tensors", OPT_INT, "64", 1, 1e5, NULL, "", "it is cut into that many tensors", AT(tensors) },
    { "windows", OPT_INT, "15", 1, 1000, NULL, "", "pairs of windows, one with saves and one without", AT(windows) },
    { "steps", OPT_INT, "20", 2, 1e5, NULL, "", "steps of a window", AT(steps) },
    { "step_ms", OPT_INT, "500", 1, 1e5, NULL, "ms", "a step takes at least that long: it is filled up with GEMMs",
      AT(step_ms) },
    { "save_every", OPT_INT, "0", 0, 1e5, NULL, "steps",
      "in windows with saves; 0: once, in the first step. A save in flight is waited for", AT(save_every) },
    { "grad_bytes", OPT_SIZE, "16MiB", 4, 4e9, NULL, "bytes", "all-reduced in each step", AT(grad_bytes) },
    { "writers", OPT_INT, "0", 0, 64, NULL, "", "writer threads of a rank; 0: the library's default", AT(writers) },
    { "chunk_bytes", OPT_SIZE, "0", 0, 0, NULL, "bytes", "unit of writing; 0: the library's default", AT(chunk_bytes) },
    { "staging_bytes", OPT_SIZE, "0", 0, 0, NULL, "bytes", "cap of a rank's staging; 0: the library's default",
      AT(staging_bytes) },
    { "gemm_side", OPT_INT, "0", 0, 1 << 15, NULL, "", "of the products; 0: 384, on a GPU 4096", AT(side) },
    { "repeats", OPT_INT, "5", 1, LIMIT_REPEATS, NULL, "", "saves and plain writes for the rates", AT(repeats) },
};
static const char *const quick[][2] = {
    { "state_bytes", "64MiB" }, { "windows", "3" }, { "steps", "6" }, { "step_ms", "100" },
    { "grad_bytes", "1MiB" },   { "repeats", "2" }, { NULL, NULL },
};

/* What a rank measured, in arrays of nanoseconds whose elements get the maximum over ranks. */
struct samples {
    uint64_t *window;                /* [pair][off, on] */
    uint64_t *step;                  /* [pair][off, on][steps] */
    uint64_t *call, *call_cpu;       /* [save] */
    uint64_t *fence;                 /* [save]: waits in the step after it */
    uint64_t *fence_step;            /* [save]: that step */
    uint64_t *idle, *copied;         /* [repeat]; copied: until the tensors may be overwritten, on a GPU */
    uint64_t *all;                   /* where they lie, one after another */
    size_t count, saves, saves_room; /* saves in windows */
};

struct save_bench {
    struct bench *b;
    const struct save_options *o;
    struct field field;
    tessera *ckpt;
    tessera_state *state;
    struct site site;
    struct gemms products;
    float *grad, *change; /* the gradient; [1] where the tensors are: what a step adds */
    size_t grad_count;
    void *plain; /* what plain writes write */
    size_t plain_bytes;
    double to_host, to_device; /* pinned copies, bytes a second; NAN on the CPU */
    int64_t gemms;             /* of a step, of this rank */
    uint64_t step;             /* last one saved */
    struct samples s;
    uint64_t ckpt_cpu_ns, all_cpu_ns;   /* in on windows, this rank's */
    uint64_t live_bytes, written_bytes; /* of the last saves of on windows, this rank's */
    uint64_t rss_before, rss_peak, staging_peak, staging_cap;
    struct limits limits; /* rank 0 */
};

/* ---- a training step */

/* What the gradient and the tensors hold stays an ordinary number however long this runs. */
static status *train_step(struct save_bench *sb, uint64_t *fence_ns)
{
    const struct compute *c = sb->site.compute;
    gemms_run(&sb->products, sb->gemms);
    TRY(comm_allreduce(sb->b->world, sb->grad, sb->grad_count, COMM_F32, COMM_SUM, NULL));
    kernels_cpu.scale(NULL, sb->grad, sb->grad, 1.0f / (float)sb->b->world->size, (int64_t)sb->grad_count);
    const size_t elems = (size_t)(sb->field.box_rows * sb->field.box_cols);
    *fence_ns = 0;
    for (uint64_t i = 0; i < sb->field.tensors; i++) {
        float *x = field_tensor(&sb->field, i);
        uint64_t t0 = clock_ns();
        TRY(tessera_fence(sb->ckpt, x, elems * sizeof *x, c->stream));
        *fence_ns += clock_ns() - t0;
        c->kernels->add_scalar(c->workers, x, sb->change, (int64_t)elems);
    }
    return compute_check(sb->site.compute, true);
}

static status *tick(struct save_bench *sb, bool *busy)
{
    struct tessera_tick t = TESSERA_TICK;
    TRY(tessera_tick(sb->ckpt, &t));
    *busy = t.phase != TESSERA_IDLE;
    return NULL;
}

/* The fastest of a few steps, each as long as its slowest rank: what other programs do to the machine only adds. */
static status *time_steps(struct save_bench *sb, double *seconds)
{
    double took[CALIBRATION_STEPS];
    for (int i = 0; i < CALIBRATION_STEPS; i++) {
        uint64_t fence_ns, t0 = clock_ns();
        bool busy;
        TRY(train_step(sb, &fence_ns));
        TRY(tick(sb, &busy));
        took[i] = ns_to_s(clock_ns() - t0);
    }
    TRY(comm_allreduce(sb->b->world, took, CALIBRATION_STEPS, COMM_F64, COMM_MAX, NULL));
    *seconds = took[0];
    for (int i = 1; i < CALIBRATION_STEPS; i++)
        *seconds = took[i] < *seconds ? took[i] : *seconds;
    return NULL;
}

/* Find the number of GEMMs, the same on all ranks, that makes a step long enough. */
static status *calibrate(struct save_bench *sb)
{
    const double wanted = (double)sb->o->step_ms * 1e-3 * 1.05;
    double bare, filled;
    sb->gemms = 0;
    TRY(time_steps(sb, &bare));
    sb->gemms = 4;
    for (int round = 0; round < 8; round++) {
        TRY(time_steps(sb, &filled));
        if (filled >= wanted)
            return NULL;
        /* at most eightfold at once: the first rounds measure too little to be believed */
        double gain = filled > bare ? (wanted - bare) / (filled - bare) : 8;
        gain = gain < 1.02 ? 1.02 : gain > 8 ? 8 : gain;
        sb->gemms = (int64_t)ceil((double)sb->gemms * gain);
    }
    return NULL;
}

/* ---- windows */

/* Start a save, and keep what the call took. A save that is still in flight is waited for: inside the window. */
static status *start_save(struct save_bench *sb, bool busy)
{
    if (busy)
        TRY(tessera_wait(sb->ckpt, NULL));
    uint64_t t0 = clock_ns(), c0 = clock_thread_cpu_ns();
    TRY(tessera_save(sb->ckpt, sb->state, ++sb->step));
    sb->s.call_cpu[sb->s.saves] = clock_thread_cpu_ns() - c0;
    sb->s.call[sb->s.saves++] = clock_ns() - t0;
    return NULL;
}

/* One that is followed by a step of its window. */
static bool save_due(const struct save_options *o, int64_t step)
{
    return step + 1 < o->steps && (o->save_every ? step % o->save_every == 0 : step == 0);
}

/* Until the save is committed and the step before it removed. */
static status *rest(struct save_bench *sb)
{
    size_t steps;
    TRY(tessera_wait(sb->ckpt, NULL));
    return tessera_list_steps(sb->ckpt, NULL, 0, &steps); /* waits for removals */
}

static status *run_steps(struct save_bench *sb, bool on, uint64_t *step_ns)
{
    bool busy = false, fenced = true;
    for (int64_t i = 0; i < sb->o->steps; i++) {
        uint64_t fence_ns, t0 = clock_ns();
        TRY(train_step(sb, &fence_ns));
        bool due = on && save_due(sb->o, i);
        if (due)
            TRY(start_save(sb, busy));
        TRY(tick(sb, &busy));
        step_ns[i] = clock_ns() - t0;
        if (!fenced) {
            size_t last = sb->s.saves - 1 - due;
            sb->s.fence[last] = fence_ns;
            sb->s.fence_step[last] = step_ns[i];
        }
        fenced = !due;
    }
    return on ? rest(sb) : NULL;
}

/* Where the bytes of the window's last save went. */
static void note_ways(struct save_bench *sb)
{
    struct tessera_progress p = TESSERA_PROGRESS;
    tessera_get_progress(sb->ckpt, &p);
    sb->live_bytes += p.live_bytes;
    sb->written_bytes += p.written_bytes;
    sb->staging_peak = p.staging_peak_bytes > sb->staging_peak ? p.staging_peak_bytes : sb->staging_peak;
    sb->staging_cap = p.staging_cap_bytes;
}

static status *run_window(struct save_bench *sb, int64_t pair, bool on)
{
    size_t at = (size_t)pair * 2 + on;
    uint64_t ckpt0 = 0, ckpt1 = 0;
    TRY(comm_agree(sb->b->world, threads_cpu_ns("tsr-", &ckpt0)));
    uint64_t all0 = process_cpu_ns();
    TRY(comm_barrier(sb->b->world));
    uint64_t t0 = clock_ns();
    TRY(run_steps(sb, on, sb->s.step + at * (size_t)sb->o->steps));
    TRY(comm_barrier(sb->b->world));
    sb->s.window[at] = clock_ns() - t0;
    uint64_t all1 = process_cpu_ns();
    TRY(comm_agree(sb->b->world, threads_cpu_ns("tsr-", &ckpt1)));
    if (on) {
        sb->all_cpu_ns += all1 - all0;
        sb->ckpt_cpu_ns += ckpt1 - ckpt0;
        note_ways(sb);
    }
    return NULL;
}

static status *run_windows(struct save_bench *sb)
{
    for (int64_t p = 0; p < sb->o->windows; p++) {
        bool on_first = p % 2;
        TRY(run_window(sb, p, on_first));
        TRY(run_window(sb, p, !on_first));
    }
    return NULL;
}

/* ---- rates */

/* From the call to the commit, with nothing else to do. */
static status *save_and_wait(struct save_bench *sb, uint64_t *ns, uint64_t *copied)
{
    struct compute *c = sb->site.compute;
    TRY(bench_meet(sb->b));
    uint64_t t0 = clock_ns();
    TRY(tessera_save(sb->ckpt, sb->state, ++sb->step));
    if (!c->host) {
        TRY(tessera_fence(sb->ckpt, NULL, 0, c->stream));
        TRY(compute_check(c, true));
        *copied = clock_ns() - t0;
    }
    TRY(tessera_wait(sb->ckpt, NULL));
    *ns = clock_ns() - t0;
    return rest(sb);
}

static status *run_rates(struct save_bench *sb)
{
    for (int64_t r = 0; r < sb->o->repeats; r++) {
        TRY(save_and_wait(sb, &sb->s.idle[r], &sb->s.copied[r]));
        status *st = NULL;
        if (!sb->b->world->rank)
            st = limits_write(&sb->limits, sb->b->dir, sb->plain, sb->plain_bytes, field_total_bytes(&sb->field));
        TRY(bench_meet(sb->b));
        TRY(comm_agree(sb->b->world, st));
    }
    return NULL;
}

/* ---- results */

static double ms(uint64_t ns)
{
    return (double)ns * 1e-6;
}

static status *gather(struct save_bench *sb)
{
    struct comm *c = sb->b->world;
    uint64_t most[4] = { sb->rss_peak, sb->rss_peak - sb->rss_before, sb->staging_peak, sb->staging_cap };
    uint64_t sums[4] = { sb->ckpt_cpu_ns, sb->all_cpu_ns, sb->live_bytes, sb->written_bytes };
    TRY(comm_allreduce(c, sb->s.all, sb->s.count, COMM_U64, COMM_MAX, NULL));
    TRY(comm_allreduce(c, most, 4, COMM_U64, COMM_MAX, NULL));
    TRY(comm_allreduce(c, sums, 4, COMM_U64, COMM_SUM, NULL));
    sb->rss_peak = most[0], sb->rss_before = most[0] - most[1];
    sb->staging_peak = most[2], sb->staging_cap = most[3];
    sb->ckpt_cpu_ns = sums[0], sb->all_cpu_ns = sums[1];
    sb->live_bytes = sums[2], sb->written_bytes = sums[3];
    return NULL;
}

/* x[i] = ns[i] in milliseconds. */
static double median_ms(double *x, const uint64_t *ns, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = ms(ns[i]);
    return median_of(x, n);
}

static double largest_ms(const uint64_t *ns, size_t n)
{
    uint64_t most = 0;
    for (size_t i = 0; i < n; i++)
        most = ns[i] > most ? ns[i] : most;
    return ms(most);
}

/* scratch: room for every sample. */
static void report(struct save_bench *sb, const double load[2], double *scratch)
{
    const struct samples *s = &sb->s;
    size_t pairs = (size_t)sb->o->windows, steps = (size_t)sb->o->steps, n = 0;
    double bytes = (double)field_total_bytes(&sb->field);
    for (size_t p = 0; p < pairs; p++)
        for (size_t i = 0; i < steps; i++)
            scratch[n++] = ms(s->step[2 * p * steps + i]);
    double step_ms = median_of(scratch, n);
    double fence_step_ms = median_ms(scratch, s->fence_step, s->saves);
    double call_ms = median_ms(scratch, s->call, s->saves);
    double idle_ms = median_ms(scratch, s->idle, (size_t)sb->o->repeats), idle_best_ms = scratch[0];
    for (size_t p = 0; p < pairs; p++)
        scratch[p] = (double)s->window[2 * p] / (double)s->window[2 * p + 1];
    double ratio = median_of(scratch, pairs);
    struct interval i90 = median_interval(scratch, pairs, 0.9);
    double copied_ms = median_ms(scratch, s->copied, (size_t)sb->o->repeats);
    double off = sb->site.compute->host ? NAN : (double)sb->field.block_bytes / copied_ms * 1e3; /* of a rank */
    size_t best;
    double limit_s = limits_median(&sb->limits, &best), limit_best_s = limits_least(&sb->limits);
    const struct figure f[] = {
        { "device", 0, sb->site.name, 0, "where the tensors are" },
        { "call_cpu_ms_max", largest_ms(s->call_cpu, s->saves), NULL, 3, "ms CPU of the thread in tessera_save, most" },
        { "call_wall_ms_p50", call_ms, NULL, 3, "ms in tessera_save, median over saves" },
        { "fence_ms_max", largest_ms(s->fence, s->saves), NULL, 3, "ms waited in the fences of a step, most" },
        { "throughput_ratio", ratio, NULL, 4, "time without saves / with, median over pairs" },
        { "throughput_ratio_lo", i90.lo, NULL, 4, "its interval, from order statistics" },
        { "throughput_ratio_hi", i90.hi, NULL, 4, "" },
        { "interval_coverage", i90.coverage, NULL, 3, "of that interval (at least .9 from 5 pairs on)" },
        { "fence_step_ratio", fence_step_ms / step_ms, NULL, 4, "step with the fence / step without saves, medians" },
        { "ckpt_cpu_share", (double)sb->ckpt_cpu_ns / (double)sb->all_cpu_ns, NULL, 5,
          "CPU of checkpoint threads / of all, windows with saves" },
        { "ckpt_cpu_ms_save", ms(sb->ckpt_cpu_ns) / (double)s->saves, NULL, 1,
          "ms CPU of those threads a save, all ranks" },
        { "save_gbps", bytes / idle_ms * 1e-6, NULL, 3, "GB/s, call to commit, nothing else running, median" },
        { "limit_gbps", bytes / limit_s * 1e-9, NULL, 3, "GB/s, best plain write's median" },
        { "limit_method", 0, limit_method(best), 0, "that write" },
        { "rate_ratio", limit_s * 1e3 / idle_ms, NULL, 4, "save_gbps / limit_gbps" },
        { "save_gbps_best", bytes / idle_best_ms * 1e-6, NULL, 3, "GB/s, fastest save" },
        { "limit_gbps_best", bytes / limit_best_s * 1e-9, NULL, 3, "GB/s, fastest plain write" },
        { "d2h_gbps", sb->to_host * 1e-9, NULL, 2, "GB/s, device to pinned memory, a plain copy, fastest" },
        { "save_d2h_gbps", off * 1e-9, NULL, 2, "GB/s, from the call until a rank's tensors have left, median" },
        { "d2h_ratio", off / sb->to_host, NULL, 4, "that to the plain copy" },
        { "h2d_gbps", sb->to_device * 1e-9, NULL, 2, "GB/s, pinned memory to device, a plain copy, fastest" },
        { "live_bytes_share", (double)sb->live_bytes / (double)sb->written_bytes, NULL, 4,
          "written straight from the tensors, windows with saves" },
        { "staging_peak_bytes", (double)sb->staging_peak, NULL, 0, "of a rank, most" },
        { "staging_cap_bytes", (double)sb->staging_cap, NULL, 0, "of a rank" },
        { "rss_peak_bytes", (double)sb->rss_peak, NULL, 0, "of a rank, most" },
        { "rss_growth_bytes", (double)(sb->rss_peak - sb->rss_before), NULL, 0,
          "of a rank since before the first save" },
        { "state_bytes", bytes, NULL, 0, "saved, over all ranks" },
        { "step_ms_p50", step_ms, NULL, 1, "ms, a step without saves, median" },
        { "step_ms_wanted", (double)sb->o->step_ms, NULL, 0, "ms, at least" },
        { "gemms", (double)sb->gemms, NULL, 0, "square products in a step of a rank" },
        { "gemm_side", (double)sb->products.side, NULL, 0, "of each" },
        { "ranks", sb->b->world->size, NULL, 0, "" },
        { "pairs", (double)pairs, NULL, 0, "" },
        { "steps", (double)steps, NULL, 0, "of a window" },
        { "saves", (double)s->saves, NULL, 0, "in windows" },
        { "repeats", (double)sb->o->repeats, NULL, 0, "of each rate" },
        { "load_start", load[0], NULL, 2, "load average of the last minute" },
        { "load_end", load[1], NULL, 2, "" },
    };
    bench_print(sb->b, f, sizeof f / sizeof *f);
}

/* ---- the run */

static status *open_samples(struct save_bench *sb)
{
    const struct save_options *o = sb->o;
    struct samples *s = &sb->s;
    size_t windows = 2 * (size_t)o->windows, steps = windows * (size_t)o->steps, a_window = 0;
    for (int64_t i = 0; i < o->steps; i++)
        a_window += save_due(o, i);
    s->saves_room = (size_t)o->windows * a_window;
    s->count = windows + steps + 4 * s->saves_room + 2 * (size_t)o->repeats;
    s->all = mem_calloc(s->count, sizeof *s->all);
    if (!s->all)
        return ERR(NO_MEMORY, "%zu samples", s->count);
    s->window = s->all;
    s->step = s->window + windows;
    s->call = s->step + steps;
    s->call_cpu = s->call + s->saves_room;
    s->fence = s->call_cpu + s->saves_room;
    s->fence_step = s->fence + s->saves_room;
    s->idle = s->fence_step + s->saves_room;
    s->copied = s->idle + o->repeats;
    return NULL;
}

/* Plain writes take host memory; what is in it makes no difference to them. */
static status *open_plain(struct save_bench *sb)
{
    if (sb->site.compute->host) {
        sb->plain = sb->field.block;
        sb->plain_bytes = sb->field.block_bytes;
        return NULL;
    }
    sb->plain_bytes = PLAIN_BYTES < sb->field.block_bytes ? PLAIN_BYTES : sb->field.block_bytes;
    sb->plain = mem_block(sb->plain_bytes, 4096);
    if (!sb->plain)
        return ERR(NO_MEMORY, "%zu bytes to write", sb->plain_bytes);
    memset(sb->plain, 0x5a, sb->plain_bytes);
    return site_copy_rates(&sb->site, sb->field.block_bytes < COPY_BYTES ? sb->field.block_bytes : COPY_BYTES,
                           &sb->to_host, &sb->to_device);
}

static status *open_memory(struct save_bench *sb)
{
    const struct save_options *o = sb->o;
    const float change = 0x1p-20f;
    struct field_cut cut = { sb->b->world->rank, sb->b->world->size, false };
    void *room;
    TRY(site_open(o->device ? "cuda" : "cpu", sb->b->world->rank, 0, &sb->site));
    struct compute *c = sb->site.compute;
    TRY(field_open_on(c, o->state_bytes, (uint64_t)o->tensors, cut, &sb->field));
    if (sb->field.block_bytes < LIMIT_PIECE_BYTES)
        return ERR(INVALID, "state_bytes: a rank's share must be at least %d bytes", LIMIT_PIECE_BYTES);
    if (c->host)
        field_fill(&sb->field);
    TRY(open_plain(sb));
    sb->grad_count = (size_t)o->grad_bytes / sizeof *sb->grad;
    sb->grad = mem_calloc(sb->grad_count, sizeof *sb->grad);
    if (!sb->grad)
        return ERR(NO_MEMORY, "a gradient");
    for (size_t i = 0; i < sb->grad_count; i++)
        sb->grad[i] = 1;
    TRY(compute_alloc(c, sizeof change, &room));
    sb->change = room;
    TRY(compute_put(c, sb->change, &change, sizeof change));
    TRY(gemms_open(c, o->side ? o->side : c->host ? GEMMS_SIDE : GPU_SIDE, !c->host, &sb->products));
    return open_samples(sb);
}

static status *open_checkpoint(struct save_bench *sb)
{
    char root[BENCH_PATH_BYTES + 64];
    snprintf(root, sizeof root, "%s/ckpt", sb->b->dir);
    struct tessera_options o = TESSERA_OPTIONS;
    o.url = root;
    o.keep_last = 1;
    o.staging_bytes = sb->o->staging_bytes;
    o.chunk_bytes = sb->o->chunk_bytes;
    o.writers = (int)sb->o->writers;
    TRY(ckpt_open(&o, sb->b->world, sb->site.device, NULL, &sb->ckpt));
    ckpt_set_stream(sb->ckpt, sb->site.compute->stream);
    return comm_agree(sb->b->world, field_state(&sb->field, sb->ckpt, &sb->state));
}

static status *measure(struct save_bench *sb)
{
    uint64_t first, copied;
    double load[2] = { load_average(), NAN };
    TRY(open_checkpoint(sb));
    TRY(calibrate(sb));
    sb->rss_before = mem_peak_rss_bytes(); /* staging is taken by the first save */
    TRY(save_and_wait(sb, &first, &copied));
    TRY(run_windows(sb));
    sb->rss_peak = mem_peak_rss_bytes();
    TRY(run_rates(sb));
    load[1] = load_average();
    TRY(gather(sb));
    double *scratch = mem_array(NULL, sb->s.count, sizeof *scratch);
    TRY(comm_agree(sb->b->world, scratch ? NULL : ERR(NO_MEMORY, "%zu samples", sb->s.count)));
    report(sb, load, scratch);
    mem_free(scratch);
    return NULL;
}

static status *run(struct bench *b, const void *options)
{
    struct save_bench sb = {
        .b = b, .o = options, .limits = { .remote = b->remote }, .to_host = NAN, .to_device = NAN
    };
    status *st = comm_agree(b->world, open_memory(&sb));
    if (!st)
        st = measure(&sb);
    st = status_first(st, tessera_close(sb.ckpt));
    tessera_state_free(sb.state);
    if (sb.plain != sb.field.block)
        mem_block_free(sb.plain, sb.plain_bytes);
    field_close(&sb.field);
    mem_free(sb.grad);
    gemms_close(&sb.products);
    compute_free(sb.site.compute, sb.change, sizeof *sb.change);
    site_close(&sb.site);
    mem_free(sb.s.all);
    return st;
}

const struct bench_verb bench_save = {
    "save",
    "what saves cost training, and how near the disk they are",
    { "", rows, sizeof rows / sizeof *rows },
    sizeof(struct save_options),
    AT(url),
    true,
    quick,
    run,
};
