/* cli_report: `tessera ckpt report`: what a save or a load cost, as a map over the mesh, a list of stragglers, the ETTR
 * that follows, and as a Chrome trace. Reads reports (report.h) and writes nothing but the trace's file. */
#include "ckpt/cli.h"
#include "ckpt/report.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Three hours: what Llama 3 saw on 16,384 GPUs, 419 interruptions in 54 days. */
#define DEFAULT_MTBF     10800.0
#define DEFAULT_OVER     2.0
#define STRAGGLER_MIN_NS 1000000u /* less above the median is noise */

struct words {
    char url[STORE_KEY_BYTES];
    bool has_url, has_step, load, json;
    uint64_t step;
    enum report_stage stage;
    double over, mtbf, interval; /* interval 0: the report's own */
    const char *trace;
};

/* ---- arguments */

static status *take_step(struct words *w, const char *text)
{
    uint64_t step = 0;
    TRY(cli_step(text, &step));
    if (w->has_step && w->step != step)
        return ERR(INVALID, "ckpt report: of step %" PRIu64 " or of step %" PRIu64 "?", w->step, step);
    w->has_step = true;
    w->step = step;
    return NULL;
}

static status *take_url(struct words *w, const char *text)
{
    uint64_t step;
    if (w->has_url)
        return ERR(INVALID, "ckpt report: one argument too many: \"%s\"", text);
    if ((size_t)snprintf(w->url, sizeof w->url, "%s", text) >= sizeof w->url)
        return ERR(INVALID, "ckpt report: a URL of %zu characters", strlen(text));
    w->has_url = true;
    if (cli_cut_step(w->url, &step)) {
        w->has_step = true;
        w->step = step;
    }
    return NULL;
}

static status *take_stage(struct words *w, const char *text)
{
    for (int i = 0; i <= REPORT_TOTAL; i++)
        if (strcmp(report_stage_names[i], text) == 0) {
            w->stage = (enum report_stage)i;
            return NULL;
        }
    return ERR(INVALID,
               "ckpt report: no stage \"%s\"; there are capture, checksum, write, fsync, vote, commit of a save, read, "
               "checksum, exchange, place of a load, and total",
               text);
}

static status *take_number(const char *name, const char *text, double *out)
{
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v) || v <= 0)
        return ERR(INVALID, "ckpt report: %s wants a number above 0, not \"%s\"", name, text);
    *out = v;
    return NULL;
}

static status *take_option(struct words *w, const char *name, const char *value)
{
    if (strcmp(name, "--stage") == 0)
        return take_stage(w, value);
    if (strcmp(name, "--over") == 0)
        return take_number(name, value, &w->over);
    if (strcmp(name, "--mtbf") == 0)
        return take_number(name, value, &w->mtbf);
    if (strcmp(name, "--interval") == 0)
        return take_number(name, value, &w->interval);
    w->trace = value;
    return NULL;
}

static status *take_words(const struct request *r, struct words *w)
{
    static const char *const option[] = { "--stage", "--over", "--mtbf", "--interval", "--trace" };
    for (int i = 0; i < r->arguments; i++) {
        const char *a = r->argument[i];
        char name[16];
        if (strcmp(a, "--load") == 0 || strcmp(a, "--json") == 0) {
            *(a[2] == 'l' ? &w->load : &w->json) = true;
            continue;
        }
        if (a[0] != '-') {
            TRY(w->has_url ? take_step(w, a) : take_url(w, a));
            continue;
        }
        size_t k = 0, n = strcspn(a, "=");
        snprintf(name, sizeof name, "%.*s", (int)(n < sizeof name ? n : sizeof name - 1), a);
        while (k < sizeof option / sizeof *option && strcmp(option[k], name) != 0)
            k++;
        if (k == sizeof option / sizeof *option)
            return ERR(INVALID,
                       "ckpt report: no option \"%s\"; there are --load, --json, --stage, --over, --mtbf, --interval, "
                       "--trace",
                       a);
        const char *value = a[n] ? a + n + 1 : i + 1 < r->arguments ? r->argument[++i] : NULL;
        if (!value)
            return ERR(INVALID, "ckpt report: %s wants a value", name);
        TRY(take_option(w, name, value));
    }
    return w->has_url ? NULL : ERR(INVALID, "ckpt report: which URL? It takes URL [STEP]");
}

/* ---- the map */

/* The axes of more than one rank, outermost first; at least one. */
static int axes_of(const struct mesh *m, int axis[MESH_AXES])
{
    int n = 0;
    for (int a = 0; a < MESH_AXES; a++)
        if (m->size[a] > 1)
            axis[n++] = a;
    if (!n)
        axis[n++] = MESH_DP;
    return n;
}

/* "dp 1, tp 0" */
static void place_text(const struct mesh *m, int rank, char *text, size_t room)
{
    int axis[MESH_AXES], coord[MESH_AXES], n = axes_of(m, axis);
    size_t used = 0;
    mesh_coords(m, rank, coord);
    text[0] = 0;
    for (int i = 0; i < n && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s%s %d", i ? ", " : "", mesh_axis_names[axis[i]],
                                 coord[axis[i]]);
}

/* 0 for nothing, 9 for the most. */
static int shade(uint64_t ns, uint64_t most)
{
    return most ? (int)((double)ns / (double)most * 9 + 0.5) : 0;
}

/* A cell's digit; on a terminal on a ground from blue over green and yellow to red (of the 256 colours). */
static void print_cell(int digit, bool colour)
{
    static const unsigned char ground[10] = { 17, 19, 25, 30, 34, 76, 148, 220, 208, 196 };
    if (colour)
        printf("\x1b[48;5;%d;38;5;%dm %d \x1b[0m", ground[digit], digit < 5 ? 231 : 16, digit);
    else
        printf(" %d", digit);
}

static bool wants_colour(void)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    return isatty(STDOUT_FILENO) && !(no && *no) && term && strcmp(term, "dumb") != 0;
}

struct map {
    const struct report *r;
    enum report_stage stage;
    uint64_t most;
    int row, column; /* axes; row -1: one row */
    bool colour;
};

/* The rows below `coord`, which says where on the axes that are neither rows nor columns. */
static void print_block(const struct map *m, int coord[MESH_AXES])
{
    const int *size = m->r->mesh.size;
    const int wide = m->colour ? 3 : 2;
    printf("%4s  ", m->row < 0 ? "" : mesh_axis_names[m->row]);
    printf("%*s\n", wide, mesh_axis_names[m->column]);
    printf("      ");
    for (int c = 0; c < size[m->column]; c++)
        printf(m->colour ? " %d " : " %d", c % 10);
    putchar('\n');
    for (int i = 0; i < (m->row < 0 ? 1 : size[m->row]); i++) {
        if (m->row < 0)
            printf("      ");
        else
            printf("%4d  ", i);
        for (int c = 0; c < size[m->column]; c++) {
            if (m->row >= 0)
                coord[m->row] = i;
            coord[m->column] = c;
            int rank = mesh_rank(&m->r->mesh, coord);
            print_cell(shade(report_ns(m->r, rank, m->stage), m->most), m->colour);
        }
        putchar('\n');
    }
}

/* A block for each place on the outer axes; the two innermost are rows and columns. */
static void print_map(const struct report *r, enum report_stage stage)
{
    int axis[MESH_AXES], coord[MESH_AXES], n = axes_of(&r->mesh, axis), slowest = 0;
    struct map m = { .r = r, .stage = stage, .column = axis[n - 1], .row = n > 1 ? axis[n - 2] : -1 };
    m.colour = wants_colour();
    for (int i = 0; i < r->world; i++)
        if (report_ns(r, i, stage) > m.most) {
            m.most = report_ns(r, i, stage);
            slowest = i;
        }
    printf("%s of each rank, 9 is %.3f s (rank %d):\n", report_stage_names[stage], (double)m.most * 1e-9, slowest);
    int per = r->mesh.size[m.column] * (m.row < 0 ? 1 : r->mesh.size[m.row]);
    for (int rank = 0; rank < r->world; rank += per) {
        mesh_coords(&r->mesh, rank, coord);
        for (int i = 0; i + 2 < n; i++)
            printf("%s%s %d%s", i ? ", " : "", mesh_axis_names[axis[i]], coord[axis[i]], i + 3 < n ? "" : ":\n");
        print_block(&m, coord);
    }
}

/* ---- stragglers */

struct straggler {
    int rank;
    enum report_stage stage;
    uint64_t ns, median_ns;
};

/* Vote and commit are rank 0's alone. */
static bool can_straggle(int stage)
{
    return stage != REPORT_VOTE && stage != REPORT_COMMIT;
}

static int by_excess(const void *a, const void *b)
{
    const struct straggler *x = a, *y = b;
    uint64_t p = x->ns - x->median_ns, q = y->ns - y->median_ns;
    return p != q ? (p < q) - (p > q) : x->rank - y->rank;
}

/* Slowest first. */
static status *find_stragglers(const struct report *r, double over, struct straggler **out, size_t *count)
{
    size_t n = 0;
    struct straggler *s = mem_array(NULL, (size_t)r->world * (REPORT_TOTAL + 1), sizeof *s);
    status *st = s ? NULL : ERR(NO_MEMORY, "stragglers among %d ranks", r->world);
    for (int stage = 0; stage <= REPORT_TOTAL && !st; stage++) {
        uint64_t median = 0;
        if (can_straggle(stage))
            st = report_median(r, (enum report_stage)stage, &median);
        for (int i = 0; i < r->world && !st && can_straggle(stage); i++) {
            uint64_t ns = report_ns(r, i, (enum report_stage)stage);
            if (ns > median && ns - median >= STRAGGLER_MIN_NS && (double)ns > over * (double)median)
                s[n++] = (struct straggler){ i, (enum report_stage)stage, ns, median };
        }
    }
    if (st) {
        mem_free(s);
        return st;
    }
    if (n)
        qsort(s, n, sizeof *s, by_excess);
    *out = s;
    *count = n;
    return NULL;
}

static void print_stragglers(const struct report *r, const struct straggler *s, size_t n, double over)
{
    enum { LINES = 20 };
    printf("stragglers, over %g x the median:%s\n", over, n ? "" : " none");
    for (size_t i = 0; i < n && i < LINES; i++) {
        char place[64];
        place_text(&r->mesh, s[i].rank, place, sizeof place);
        printf("  rank %d (%s): %s %.3f s, the median is %.3f s\n", s[i].rank, place, report_stage_names[s[i].stage],
               (double)s[i].ns * 1e-9, (double)s[i].median_ns * 1e-9);
    }
    if (n > LINES)
        printf("  and %zu more\n", n - LINES);
}

/* ---- ETTR */

struct ettr {
    double interval, block, save, load, mtbf, ratio;
    bool measured_load;
};

static double most_stalled(const struct report *r)
{
    uint64_t most = 0;
    for (int i = 0; i < r->world; i++)
        most = r->rank[i].stall_ns > most ? r->rank[i].stall_ns : most;
    return (double)most * 1e-9;
}

/* save: the report of a save; load: of the last load, NULL: none. */
static struct ettr measure_ettr(const struct words *w, const struct report *save, const struct report *load)
{
    struct ettr e = { .block = most_stalled(save), .save = (double)save->span_ns * 1e-9, .mtbf = w->mtbf };
    double between = (double)save->interval_ns * 1e-9;
    e.interval = w->interval > 0 ? w->interval : between > e.block ? between - e.block : 0;
    e.measured_load = load != NULL;
    e.load = load ? (double)load->span_ns * 1e-9 : 0;
    e.ratio = report_ettr(e.interval, e.block, e.save, e.load, e.mtbf);
    return e;
}

static void print_ettr(const struct ettr *e)
{
    if (!(e->interval > 0)) {
        puts("ETTR: this is the first save of its job; --interval SECONDS says how far apart saves are");
        return;
    }
    printf("ETTR %.5f: %.1f s of training between saves, a save holds it up for %.3f s and counts after %.3f s, a load "
           "takes %.3f s%s, a failure every %.0f s\n",
           e->ratio, e->interval, e->block, e->save, e->load, e->measured_load ? "" : " (none was measured)", e->mtbf);
}

/* ---- JSON, for programs */

static void json_number(const char *key, double v)
{
    if (isfinite(v))
        printf(",\"%s\":%.9g", key, v);
    else
        printf(",\"%s\":null", key);
}

static void print_json(const struct words *w, const struct report *r, const struct straggler *s, size_t n,
                       const struct ettr *e)
{
    printf("{\"kind\":\"%s\",\"step\":%" PRIu64 ",\"world\":%d,\"s\":%.9f,\"stage\":\"%s\",\"seconds\":[",
           r->load ? "load" : "save", r->step, r->world, (double)r->span_ns * 1e-9, report_stage_names[w->stage]);
    for (int i = 0; i < r->world; i++)
        printf("%s%.9f", i ? "," : "", (double)report_ns(r, i, w->stage) * 1e-9);
    printf("],\"over\":%.9g,\"stragglers\":[", w->over);
    for (size_t i = 0; i < n; i++)
        printf("%s{\"rank\":%d,\"stage\":\"%s\",\"s\":%.9f,\"median_s\":%.9f}", i ? "," : "", s[i].rank,
               report_stage_names[s[i].stage], (double)s[i].ns * 1e-9, (double)s[i].median_ns * 1e-9);
    putchar(']');
    if (e) {
        json_number("ettr", e->ratio);
        json_number("interval_s", e->interval);
        json_number("block_s", e->block);
        json_number("save_s", e->save);
        json_number("load_s", e->measured_load ? e->load : (double)NAN);
        json_number("mtbf_s", e->mtbf);
    }
    puts("}");
}

/* ---- the trace: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, as Perfetto and
 * chrome://tracing read it; microseconds */

static void trace_name(FILE *f, const char *what, int pid, int tid, const char *name)
{
    fprintf(f, ",\n{\"ph\":\"M\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"args\":{\"name\":\"%s\"}}", what, pid, tid,
            name);
}

/* tid 0 shows the whole save or load, tid 1 + i stage i. */
static void trace_rank(FILE *f, const struct report *r, int rank, uint64_t end_ns)
{
    const struct report_rank *k = &r->rank[rank];
    const char *kind = r->load ? "load" : "save";
    char place[64], name[96];
    place_text(&r->mesh, rank, place, sizeof place);
    snprintf(name, sizeof name, "rank %d (%s)", rank, place);
    trace_name(f, "process_name", rank, 0, name);
    trace_name(f, "thread_name", rank, 0, kind);
    fprintf(f,
            ",\n{\"ph\":\"X\",\"name\":\"%s of step %" PRIu64 "\",\"pid\":%d,\"tid\":0,\"ts\":%.3f,\"dur\":%.3f,"
            "\"args\":{\"bytes\":%" PRIu64 ",\"s\":%.9f,\"stall_s\":%.9f}}",
            kind, r->step, rank, (double)k->begin_ns * 1e-3, (double)(end_ns - k->begin_ns) * 1e-3, k->bytes,
            (double)k->total_ns * 1e-9, (double)k->stall_ns * 1e-9);
    for (int i = 0; i < REPORT_STAGES; i++) {
        const struct report_clock *c = &k->stage[i];
        if (c->last_ns <= c->first_ns)
            continue;
        trace_name(f, "thread_name", rank, i + 1, report_stage_names[i]);
        fprintf(f,
                ",\n{\"ph\":\"X\",\"name\":\"%s\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,\"dur\":%.3f,\"args\":{\"bytes\":"
                "%" PRIu64 ",\"busy_s\":%.9f,\"wait_s\":%.9f,\"retries\":%" PRIu64 "}}",
                report_stage_names[i], rank, i + 1, (double)(k->begin_ns + c->first_ns) * 1e-3,
                (double)(c->last_ns - c->first_ns) * 1e-3, c->bytes, (double)c->busy_ns * 1e-9,
                (double)c->wait_ns * 1e-9, c->retries);
    }
}

/* When the last thing ended, after the first rank's call. */
static uint64_t end_of(const struct report *r)
{
    uint64_t end = r->rank[0].begin_ns + r->span_ns;
    for (int i = 0; i < r->world; i++) {
        const struct report_rank *k = &r->rank[i];
        end = k->begin_ns + k->total_ns > end ? k->begin_ns + k->total_ns : end;
        for (int s = 0; s < REPORT_STAGES; s++)
            end = k->begin_ns + k->stage[s].last_ns > end ? k->begin_ns + k->stage[s].last_ns : end;
    }
    return end;
}

static status *write_trace(const struct report *r, const char *path)
{
    FILE *f = fopen(path, "we");
    if (!f)
        return ERR_SYS(errno, "open %s", path);
    uint64_t end = end_of(r);
    fprintf(f, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{\"ph\":\"M\",\"name\":\"process_sort_index\",\"pid\":0,"
               "\"tid\":0,\"args\":{\"sort_index\":0}}");
    for (int i = 0; i < r->world; i++)
        trace_rank(f, r, i, end);
    fputs("\n]}\n", f);
    bool bad = ferror(f);
    if (fclose(f) != 0 || bad)
        return ERR_SYS(errno, "write %s", path);
    return NULL;
}

/* ---- the verb */

static void print_summary(const struct report *r)
{
    char size[16], rate[16], mesh[64];
    uint64_t bytes = 0;
    for (int i = 0; i < r->world; i++)
        bytes += r->rank[i].bytes;
    double s = (double)r->span_ns * 1e-9;
    cli_size(bytes, size);
    cli_size(s > 0 ? (uint64_t)((double)bytes / s) : 0, rate);
    mesh_text(&r->mesh, mesh, sizeof mesh);
    printf("%s of step %" PRIu64 " on %d rank%s (%s): %s in %.3f s, %s/s", r->load ? "load" : "save", r->step, r->world,
           r->world == 1 ? "" : "s", mesh, size, s, rate);
    if (r->load)
        printf("; %" PRIu64 " bytes read for %" PRIu64 " wanted\n", r->storage_bytes, r->unique_bytes);
    else
        printf("; training was held up for %.3f s\n", most_stalled(r));
}

static status *show(const struct words *w, const struct report *r, const struct report *load)
{
    struct straggler *s = NULL;
    size_t n = 0;
    TRY(find_stragglers(r, w->over, &s, &n));
    struct ettr e = { 0 };
    if (!r->load)
        e = measure_ettr(w, r, load);
    if (w->json) {
        print_json(w, r, s, n, r->load ? NULL : &e);
    } else {
        print_summary(r);
        print_map(r, w->stage);
        print_stragglers(r, s, n, w->over);
        if (!r->load)
            print_ettr(&e);
    }
    mem_free(s);
    return w->trace ? write_trace(r, w->trace) : NULL;
}

/* The last load, for the ETTR of a save; none is no error. */
static status *read_load(struct store *s, struct report **out)
{
    status *st = report_read(s, true, NULL, out);
    if (status_code(st) != ST_NOT_FOUND)
        return st;
    status_free(st);
    return NULL;
}

status *cli_report(const struct request *r)
{
    struct words w = { .stage = REPORT_TOTAL, .over = DEFAULT_OVER, .mtbf = DEFAULT_MTBF };
    struct store *s = NULL;
    struct report *report = NULL, *load = NULL;
    TRY(take_words(r, &w));
    TRY(store_open(w.url, false, &s));
    status *st = report_read(s, w.load, w.has_step ? &w.step : NULL, &report);
    if (!st && !w.load)
        st = read_load(s, &load);
    if (!st && !report_has_stage(w.load, w.stage))
        st = ERR(INVALID, "ckpt report: a %s has no stage %s", w.load ? "load" : "save", report_stage_names[w.stage]);
    if (!st)
        st = show(&w, report, load);
    mem_free(report);
    mem_free(load);
    store_close(s);
    return st;
}
