/* bench_load: a state saved by some ranks, loaded by others and with other cuts; each load beside plain reads of the
 * same files.
 *
 * (1) The files are taken out of the page cache before every load and every plain read. (2) Targets are allocated and
 * touched before the clock starts, for both. (3) Every loaded element is compared with what was saved, outside the
 * clock. (4) A load's time is the slowest rank's, from a common start to the end of tessera_load: metadata, reads,
 * checksums and exchange are in it. */
#include "trainer/bench/bench.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "trainer/bench/field.h"
#include "trainer/bench/limits.h"
#include "trainer/bench/measure.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct load_options {
    uint64_t state_bytes;
    int64_t tensors, repeats;
    char *url, *cases;
};

#define AT(field) offsetof(struct load_options, field)
static const struct option rows[] = {
    { "url", OPT_STRING, "", 0, 0, NULL, "",
      "folder, or s3://BUCKET/PREFIX, in which the run makes one of its own, removed at the end", AT(url) },
    { "state_bytes", OPT_SIZE, "512MiB", 0, 0, NULL, "bytes", "what is saved and loaded, over all ranks",
      AT(state_bytes) },
    { "tensors", OPT_INT, "64", 1, 1e5, NULL, "", "it is cut into that many tensors", AT(tensors) },
    { "cases", OPT_STRING, "", 0, 0, NULL, "",
      "FROM-TO, by commas, with meshes dpN or tpN of launched ranks: dp4-dp8,dp4-tp4; empty: what N ranks allow",
      AT(cases) },
    { "repeats", OPT_INT, "5", 1, LIMIT_REPEATS, NULL, "", "loads and plain reads of each case", AT(repeats) },
};
static const char *const quick[][2] = { { "state_bytes", "64MiB" }, { "repeats", "2" }, { NULL, NULL } };

/* The first `ranks` of the world, who cut tensors by rows (dp) or columns (tp). */
struct mesh_end {
    int ranks;
    bool columns;
};
struct load_case {
    struct mesh_end from, to;
};

struct load_bench {
    struct bench *b;
    const struct load_options *o;
    char root[BENCH_PATH_BYTES + 64]; /* of the case */
    struct limits limits;             /* rank 0 */
    double seconds[LIMIT_REPEATS];    /* of the loads, the slowest rank's */
    double cached;                    /* rank 0: most of the files that was in the page cache before a load */
    uint64_t storage_bytes, unique_bytes;
};

/* What a rank of one end holds; all zeros for the others. */
struct end {
    struct comm *comm;
    struct field field;
    tessera *ckpt;
    tessera_state *state;
};

static void end_close_memory(struct end *e)
{
    tessera_state_free(e->state);
    field_close(&e->field);
}

/* The handle first, on the ranks that have one; then what it used. Collective over the world. */
static status *end_close(struct load_bench *lb, struct end *e)
{
    status *st = comm_agree(lb->b->world, tessera_close(e->ckpt));
    end_close_memory(e);
    comm_close(e->comm);
    return st;
}

static status *end_open_here(struct load_bench *lb, struct mesh_end m, bool read_only, struct end *e)
{
    struct field_cut cut = { e->comm->rank, e->comm->size, m.columns };
    TRY(comm_agree(e->comm, field_open(lb->o->state_bytes, (uint64_t)lb->o->tensors, cut, &e->field)));
    struct tessera_options o = TESSERA_OPTIONS;
    o.url = lb->root;
    o.read_only = read_only;
    TRY(ckpt_open(&o, e->comm, NULL, NULL, &e->ckpt));
    return comm_agree(e->comm, field_state(&e->field, e->ckpt, &e->state));
}

/* Collective over the world; on an error, too, e is to be closed. */
static status *end_open(struct load_bench *lb, struct mesh_end m, bool read_only, struct end *e)
{
    struct comm *w = lb->b->world;
    TRY(comm_split(w, w->rank < m.ranks ? 0 : -1, w->rank, &e->comm));
    return comm_agree(w, e->comm ? end_open_here(lb, m, read_only, e) : NULL);
}

static status *save_here(struct end *e)
{
    field_fill(&e->field);
    TRY(tessera_save(e->ckpt, e->state, 1));
    return tessera_wait(e->ckpt, NULL);
}

static status *save_case(struct load_bench *lb, struct mesh_end from)
{
    struct end e = { 0 };
    status *st = end_open(lb, from, false, &e);
    if (!st)
        st = comm_agree(lb->b->world, e.comm ? save_here(&e) : NULL);
    return status_first(st, end_close(lb, &e));
}

static status *drop(struct load_bench *lb, const struct file_list *files)
{
    double cached;
    if (lb->b->remote)
        return NULL;
    TRY(files_drop(files));
    TRY(files_cached(files, &cached));
    lb->cached = cached > lb->cached ? cached : lb->cached;
    return NULL;
}

static status *load_once(struct load_bench *lb, struct end *e, const struct file_list *files, double *seconds)
{
    struct comm *w = lb->b->world;
    if (e->comm)
        field_clear(&e->field);
    TRY(comm_agree(w, w->rank ? NULL : drop(lb, files)));
    TRY(bench_meet(lb->b));
    uint64_t t0 = clock_ns();
    status *st = e->comm ? tessera_load(e->ckpt, e->state, 1) : NULL;
    double mine = ns_to_s(clock_ns() - t0);
    TRY(bench_meet(lb->b)); /* ranks that load nothing sleep here */
    if (!st && e->comm)
        st = field_check(&e->field);
    TRY(comm_agree(w, st));
    mine = e->comm ? mine : 0;
    TRY(comm_allreduce(w, &mine, 1, COMM_F64, COMM_MAX, NULL));
    *seconds = mine;
    return NULL;
}

static status *read_plainly(struct load_bench *lb, const struct file_list *files, void *to, size_t to_bytes)
{
    status *st = lb->b->world->rank ? NULL : limits_read(&lb->limits, files, to, to_bytes);
    TRY(bench_meet(lb->b));
    return comm_agree(lb->b->world, st);
}

static status *load_all(struct load_bench *lb, struct end *e, const struct file_list *files, void *to, size_t to_bytes)
{
    for (int64_t r = 0; r < lb->o->repeats; r++) {
        TRY(load_once(lb, e, files, &lb->seconds[r]));
        TRY(read_plainly(lb, files, to, to_bytes));
    }
    if (lb->b->world->rank)
        return NULL;
    struct tessera_load_report report = TESSERA_LOAD_REPORT;
    tessera_get_load_report(e->ckpt, &report);
    lb->storage_bytes = report.storage_bytes;
    lb->unique_bytes = report.unique_bytes;
    return NULL;
}

static status *load_case(struct load_bench *lb, struct mesh_end to_mesh)
{
    struct comm *w = lb->b->world;
    struct end e = { 0 };
    struct file_list files = { 0 };
    size_t piece = LIMIT_PIECE_BYTES, to_bytes = 0;
    void *to = NULL;
    status *st = end_open(lb, to_mesh, true, &e);
    if (!st && !w->rank) {
        /* as much as a rank's tensors: memory that caches cannot hold */
        to_bytes = e.field.block_bytes / piece * piece;
        to_bytes = to_bytes < LIMIT_THREADS * piece ? LIMIT_THREADS * piece : to_bytes;
        to = mem_block(to_bytes, 4096);
        st = to ? files_below(lb->root, ".h5", &files) : ERR(NO_MEMORY, "%zu bytes to read into", to_bytes);
    }
    st = comm_agree(w, st);
    if (!st)
        st = load_all(lb, &e, &files, to, to_bytes);
    files_free(&files);
    if (to)
        mem_block_free(to, to_bytes);
    return status_first(st, end_close(lb, &e));
}

static void report(struct load_bench *lb, const struct load_case *k, const double load[2])
{
    if (lb->b->world->rank)
        return;
    char from[32], to[32];
    snprintf(from, sizeof from, "%s=%d", k->from.columns ? "tp" : "dp", k->from.ranks);
    snprintf(to, sizeof to, "%s=%d", k->to.columns ? "tp" : "dp", k->to.ranks);
    size_t best;
    double bytes = (double)lb->unique_bytes, limit_s = limits_median(&lb->limits, &best);
    double limit_best_s = limits_least(&lb->limits), load_s = median_of(lb->seconds, (size_t)lb->o->repeats);
    const struct figure f[] = {
        { "from_mesh", 0, from, 0, "saved so" },
        { "to_mesh", 0, to, 0, "loaded so" },
        { "load_gbps", bytes / load_s * 1e-9, NULL, 3, "GB/s, median" },
        { "limit_gbps", bytes / limit_s * 1e-9, NULL, 3, "GB/s, best plain read's median" },
        { "limit_method", 0, limit_method(best), 0, "that read" },
        { "rate_ratio", limit_s / load_s, NULL, 4, "load_gbps / limit_gbps" },
        { "load_gbps_best", bytes / lb->seconds[0] * 1e-9, NULL, 3, "GB/s, fastest load" },
        { "limit_gbps_best", bytes / limit_best_s * 1e-9, NULL, 3, "GB/s, fastest plain read" },
        { "read_amplification", (double)lb->storage_bytes / bytes, NULL, 4, "bytes read from storage / wanted" },
        { "cached_share", lb->cached, NULL, 4, "of the files, in the page cache before a load, most" },
        { "state_bytes", bytes, NULL, 0, "" },
        { "ranks", lb->b->world->size, NULL, 0, "launched" },
        { "repeats", (double)lb->o->repeats, NULL, 0, "" },
        { "load_start", load[0], NULL, 2, "load average of the last minute" },
        { "load_end", load[1], NULL, 2, "" },
    };
    bench_print(lb->b, f, sizeof f / sizeof *f);
}

static status *run_case(struct bench *b, const struct load_options *o, const struct load_case *k, int number)
{
    struct load_bench lb = { .b = b, .o = o, .limits = { .remote = b->remote }, .cached = b->remote ? NAN : 0 };
    snprintf(lb.root, sizeof lb.root, "%s/ckpt-%d", b->dir, number);
    double load[2] = { load_average(), NAN };
    TRY(save_case(&lb, k->from));
    TRY(load_case(&lb, k->to));
    load[1] = load_average();
    report(&lb, k, load);
    return NULL;
}

/* "dp4" or "tp4" at *text; moves it on. */
static bool read_mesh(const char **text, int most, struct mesh_end *m)
{
    char *end;
    m->columns = strncmp(*text, "tp", 2) == 0;
    if (!m->columns && strncmp(*text, "dp", 2) != 0)
        return false;
    if ((*text)[2] < '1' || (*text)[2] > '9')
        return false;
    long ranks = strtol(*text + 2, &end, 10);
    m->ranks = (int)ranks;
    *text = end;
    return ranks <= most;
}

/* The next case of a list; moves it on. */
static status *next_case(const char **list, int most, struct load_case *k)
{
    const char *at = *list;
    if (!read_mesh(&at, most, &k->from) || *at++ != '-' || !read_mesh(&at, most, &k->to) ||
        (*at && (*at != ',' || !at[1])))
        return ERR(INVALID, "cases: \"%s\" does not begin with a case like dp4-tp2 of at most %d ranks", *list, most);
    *list = at + (*at == ',');
    return NULL;
}

static status *run_listed(struct bench *b, const struct load_options *o)
{
    struct load_case k;
    for (const char *at = o->cases; *at;)
        TRY(next_case(&at, b->world->size, &k)); /* a slip at the end is told at once */
    int number = 0;
    for (const char *at = o->cases; *at;) {
        TRY(next_case(&at, b->world->size, &k));
        TRY(run_case(b, o, &k, number++));
    }
    return NULL;
}

static status *run(struct bench *b, const void *options)
{
    const struct load_options *o = options;
    int n = b->world->size;
    const struct load_case cases[] = {
        { { n, false }, { n, false } },
        { { n, false }, { n - 1, false } },
        { { n / 2, false }, { n, false } },
        { { n, false }, { n, true } },
    };
    if (o->cases && *o->cases)
        return run_listed(b, o);
    for (int i = 0; i < (n > 1 ? 4 : 1); i++)
        TRY(run_case(b, o, &cases[i], i));
    return NULL;
}

const struct bench_verb bench_load = {
    "load",
    "how near the disk loads are, with the same cuts and with others",
    { "", rows, sizeof rows / sizeof *rows },
    sizeof(struct load_options),
    AT(url),
    true,
    quick,
    run,
};
