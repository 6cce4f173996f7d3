/* cli_plan: `tessera ckpt plan`: what saving and loading a state of any size on any mesh would plan, in one process and
 * without the state: the descriptors that ranks would gather, the plan, the metadata it leads to, and the load plan of
 * another mesh. Times are CPU seconds of the one thread, so what else the machine does hardly counts. */
#include "ckpt/cli.h"
#include "ckpt/loadplan.h"
#include "ckpt/merge_plan.h"
#include "ckpt/models.h"
#include "ckpt/share.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TENSORS = 1 << 20, MAX_PIECES = 1 << 20, CACHED_RUNS = 5 };
static const char usage[] = "--model NAME --mesh pp=,dp=,ep=,cp=,tp= [--zero 0|1] or --synthetic tensors=,pieces=; "
                            "[--irregular default|merge|gather] [--to MESH] [--json]";

static const char *const irregular_name[] = { "default", "merge", "gather" }; /* enum plan_irregular */

struct wish {
    const char *model, *mesh, *to, *synthetic;
    int zero, irregular;
    bool json;
    const struct model_table *table;
    struct mesh from_mesh, to_mesh;
    uint64_t tensors, pieces;
};

struct figures {
    uint64_t pieces, tensors, ranks, descriptors, files, metadata_bytes, crcs, copies, blocks, wire_bytes,
        load_wire_bytes;
    double describe_s, plan_s, cached_plan_s, metadata_s, wants_s, load_plan_s, balance, amplification;
};

/* ---- what is asked for */

static status *number_after(const char *text, const char *what, uint64_t most, const char **end, uint64_t *out)
{
    char *stop;
    errno = 0;
    unsigned long long v = strtoull(text, &stop, 10);
    if (*text < '0' || *text > '9' || errno || (*stop && *stop != ',') || v < 1 || v > most)
        return ERR(INVALID, "ckpt plan: %s wants a number from 1 to %" PRIu64 ", not \"%s\"", what, most, text);
    *end = *stop ? stop + 1 : stop;
    *out = v;
    return NULL;
}

/* "pp=16,dp=70,tp=8": what is not named is 1. */
static status *read_mesh(const char *text, struct mesh *m)
{
    const char *at = text;
    for (int a = 0; a < MESH_AXES; a++)
        m->size[a] = 1;
    while (*at) {
        int axis = 0;
        size_t n = strcspn(at, "=");
        while (axis < MESH_AXES && (strlen(mesh_axis_names[axis]) != n || strncmp(at, mesh_axis_names[axis], n) != 0))
            axis++;
        if (axis == MESH_AXES || !at[n])
            return ERR(INVALID, "ckpt plan: a mesh is pp=,dp=,ep=,cp=,tp=, not \"%s\"", text);
        uint64_t v;
        TRY(number_after(at + n + 1, mesh_axis_names[axis], 1 << 20, &at, &v));
        m->size[axis] = (int)v;
    }
    return NULL;
}

static status *read_synthetic(const char *text, struct wish *w)
{
    for (const char *at = text; *at;) {
        if (strncmp(at, "tensors=", 8) == 0)
            TRY(number_after(at + 8, "tensors", MAX_TENSORS, &at, &w->tensors));
        else if (strncmp(at, "pieces=", 7) == 0)
            TRY(number_after(at + 7, "pieces", MAX_PIECES, &at, &w->pieces));
        else
            return ERR(INVALID, "ckpt plan: --synthetic takes tensors=,pieces=, not \"%s\"", text);
    }
    if (!w->tensors || !w->pieces)
        return ERR(INVALID, "ckpt plan: --synthetic needs tensors= and pieces=");
    if (w->tensors * w->pieces > 1u << 24)
        return ERR(INVALID, "ckpt plan: %" PRIu64 " tensors of %" PRIu64 " pieces; 2^24 pieces can be planned here",
                   w->tensors, w->pieces);
    w->from_mesh = (struct mesh){ .size = { 1, (int)w->pieces, 1, 1, 1 } };
    return NULL;
}

/* `--name value` or `--name=value`. */
static const char *value_of(const struct request *r, int *i, const char *name)
{
    const char *a = r->argument[*i];
    size_t n = strlen(name);
    if (strncmp(a, name, n) != 0 || (a[n] && a[n] != '='))
        return NULL;
    if (a[n] == '=')
        return a + n + 1;
    return *i + 1 < r->arguments ? r->argument[++*i] : "";
}

static status *read_irregular(const char *text, int *out)
{
    for (int i = PLAN_AS_GIVEN; i <= PLAN_GATHER; i++)
        if (strcmp(text, irregular_name[i]) == 0) {
            *out = i;
            return NULL;
        }
    return ERR(INVALID, "ckpt plan: --irregular is default, merge or gather, not \"%s\"", text);
}

static status *read_words(const struct request *r, struct wish *w)
{
    for (int i = 0; i < r->arguments; i++) {
        const char *v;
        if (strcmp(r->argument[i], "--json") == 0)
            w->json = true;
        else if ((v = value_of(r, &i, "--model")))
            w->model = v;
        else if ((v = value_of(r, &i, "--mesh")))
            w->mesh = v;
        else if ((v = value_of(r, &i, "--to")))
            w->to = v;
        else if ((v = value_of(r, &i, "--synthetic")))
            w->synthetic = v;
        else if ((v = value_of(r, &i, "--zero"))) {
            if (strcmp(v, "0") != 0 && strcmp(v, "1") != 0)
                return ERR(INVALID, "ckpt plan: --zero is 0 or 1, not \"%s\"", v);
            w->zero = v[0] - '0';
        } else if ((v = value_of(r, &i, "--irregular")))
            TRY(read_irregular(v, &w->irregular));
        else
            return ERR(INVALID, "ckpt plan: no option \"%s\"; it takes %s", r->argument[i], usage);
    }
    return NULL;
}

static status *read_wish(const struct request *r, struct wish *w)
{
    char names[256];
    TRY(read_words(r, w));
    if (!w->model == !w->synthetic)
        return ERR(INVALID, "ckpt plan: one of --model and --synthetic; it takes %s", usage);
    if (w->synthetic) {
        if (w->mesh)
            return ERR(INVALID, "ckpt plan: --synthetic has a rank a piece, and takes no --mesh");
        TRY(read_synthetic(w->synthetic, w));
    } else {
        w->table = model_find(w->model);
        model_names(names, sizeof names);
        if (!w->table)
            return ERR(INVALID, "ckpt plan: no model \"%s\"; there are %s", w->model, names);
        if (!w->mesh)
            return ERR(INVALID, "ckpt plan: --model needs --mesh");
        TRY(read_mesh(w->mesh, &w->from_mesh));
        TRY(status_wrap(model_fits(w->table, &w->from_mesh, w->zero), "ckpt plan: --mesh"));
    }
    w->to_mesh = w->from_mesh;
    if (w->to)
        TRY(read_mesh(w->to, &w->to_mesh));
    if (w->table)
        TRY(status_wrap(model_fits(w->table, &w->to_mesh, w->zero), "ckpt plan: --to"));
    else if (mesh_world(&w->to_mesh) != w->to_mesh.size[MESH_DP] || w->to_mesh.size[MESH_DP] > MAX_PIECES)
        return ERR(INVALID, "ckpt plan: --synthetic is loaded by dp=N ranks");
    return NULL;
}

static status *describe(const struct wish *w, const struct mesh *m, struct descs *out)
{
    if (w->table)
        return model_descs(w->table, m, w->zero, out);
    return model_synthetic(w->tensors, w->pieces, m->size[MESH_DP], out);
}

/* ---- saving */

/* What a rank does at a save whose plan is cached: make its fingerprint, at most, and compare. The rank with most. */
static double time_cached(const struct descs *d)
{
    int most = 0;
    uint64_t best = UINT64_MAX;
    struct hash128 all = { 0 };
    for (int r = 1; r < d->ranks; r++)
        if (d->first[r + 1] - d->first[r] > d->first[most + 1] - d->first[most])
            most = r;
    for (int i = 0; i < CACHED_RUNS; i++) {
        uint64_t t = clock_thread_cpu_ns();
        struct hash128 h = plan_fingerprint(d->desc + d->first[most], d->first[most + 1] - d->first[most], d->text);
        t = clock_thread_cpu_ns() - t;
        all.a ^= h.a;
        best = t < best ? t : best;
    }
    return ns_to_s(best + (all.a == 1)); /* the result is used */
}

static double balance_of(const struct plan *p)
{
    uint64_t most = 0;
    double sum = 0;
    for (int r = 0; r < p->ranks; r++) {
        most = p->rank_bytes[r] > most ? p->rank_bytes[r] : most;
        sum += (double)p->rank_bytes[r];
    }
    return sum > 0 ? (double)most * p->ranks / sum : 1;
}

/* ---- the metadata of such a step: as a save's, with headers of a guessed length and checksums of noughts */

enum { HEADER_FIRST = 4096, HEADER_PIECE = 700 /* measured: about this much of HDF5 headers a dataset */ };

static void free_step(struct metadata *m)
{
    if (m->file)
        mem_free(m->file[0].name);
    mem_free(m->file);
    mem_free(m->tensor);
    mem_free(m->piece);
    mem_free(m->crc);
    *m = (struct metadata){ 0 };
}

static void put_tensors(const struct plan *p, struct metadata *m)
{
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        m->tensor[i] = (struct meta_tensor){ .part = (char *)(uintptr_t)t->part,
                                             .name = (char *)(uintptr_t)t->name,
                                             .dtype = t->dtype,
                                             .shape = t->shape,
                                             .trainable = t->trainable,
                                             .first_piece = t->first_piece,
                                             .piece_count = t->piece_count };
    }
    m->tensor_count = p->tensor_count;
    m->piece_count = p->piece_count;
}

/* Lay the pieces of one writer into its files. count[f]: datasets of its file f. */
static void put_writer(const struct plan *p, const struct roster *r, int writer, uint64_t *count, struct metadata *m)
{
    uint64_t file0 = m->file_count;
    memset(count, 0, r->files[writer] * sizeof *count);
    for (uint64_t e = r->first[writer]; e < r->first[writer + 1]; e++)
        count[r->file[e]]++;
    for (uint64_t f = 0; f < r->files[writer]; f++) {
        uint64_t header = HEADER_FIRST + count[f] * HEADER_PIECE;
        header = (header + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
        m->file[file0 + f] = (struct meta_file){ .name = m->file[0].name + (file0 + f) * STORE_KEY_BYTES,
                                                 .bytes = header,
                                                 .header_bytes = header };
    }
    for (uint64_t e = r->first[writer]; e < r->first[writer + 1]; e++) {
        uint32_t i = r->piece[e];
        const struct plan_tensor *t = &p->tensor[p->piece[i].tensor];
        struct meta_file *f = &m->file[file0 + r->file[e]];
        char key[STORE_KEY_BYTES], dir[STEP_DIR_BYTES];
        struct meta_piece *q = &m->piece[i];
        *q = (struct meta_piece){ .piece = p->piece[i].piece, .file = (uint32_t)(file0 + r->file[e]) };
        q->bytes = piece_elems(&q->piece) * dtype_bytes(t->dtype);
        q->offset = f->bytes;
        f->bytes = (f->bytes + q->bytes + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
        if (!f->name[0]) {
            commit_shard_key(m->step, t->part, writer, m->attempt, key);
            commit_step_dir(m->step, dir);
            memcpy(f->name, key + strlen(dir) + 1, strlen(key + strlen(dir)));
        }
    }
    m->file_count += r->files[writer];
}

static status *make_step(const struct plan *p, const struct roster *r, const struct mesh *mesh, struct metadata *out)
{
    static const char build[] = "000000000000";
    struct metadata m = {
        .run_id = UINT64_MAX, .attempt = UINT64_MAX, .step = 1000000, .mesh = *mesh, .build = (char *)(uintptr_t)build
    };
    uint64_t files = 0, most = 0;
    m.time_ns = clock_wall_ns();
    m.world = (uint32_t)p->ranks;
    for (int w = 0; w < p->ranks; w++) {
        files += r->files[w];
        m.crc_count += r->crcs[w];
        most = r->files[w] > most ? r->files[w] : most;
    }
    uint64_t *count = mem_calloc(most + 1, sizeof *count);
    char *names = mem_calloc(files + 1, STORE_KEY_BYTES);
    m.file = mem_calloc(files + 1, sizeof *m.file);
    m.tensor = mem_calloc(p->tensor_count + 1, sizeof *m.tensor);
    m.piece = mem_calloc(p->piece_count + 1, sizeof *m.piece);
    m.crc = mem_calloc(m.crc_count + 1, sizeof *m.crc);
    if (m.file)
        m.file[0].name = names;
    else
        mem_free(names);
    if (!count || !names || !m.file || !m.tensor || !m.piece || !m.crc) {
        mem_free(count);
        free_step(&m);
        return ERR(NO_MEMORY, "metadata of %" PRIu64 " pieces", p->piece_count);
    }
    put_tensors(p, &m);
    for (int w = 0; w < p->ranks; w++)
        put_writer(p, r, w, count, &m);
    uint64_t crc = 0;
    for (uint64_t i = 0; i < m.piece_count; i++) {
        m.piece[i].first_crc = crc;
        crc += meta_blocks(m.piece[i].bytes);
    }
    mem_free(count);
    *out = m;
    return NULL;
}

static status *measure_metadata(const struct metadata *m, struct figures *f)
{
    void *buf = NULL;
    size_t bytes = 0;
    uint64_t t = clock_thread_cpu_ns();
    TRY(metadata_encode(m, &buf, &bytes));
    f->metadata_s = ns_to_s(clock_thread_cpu_ns() - t);
    f->metadata_bytes = bytes;
    f->crcs = m->crc_count;
    f->files = m->file_count;
    mem_free(buf);
    return NULL;
}

/* ---- loading */

/* What ranks of the other mesh want: their descriptors, by the metadata's tensors. */
static status *make_wants(const struct metadata *m, const struct descs *d, struct load_want **out)
{
    struct load_want *want = mem_calloc(d->count + 1, sizeof *want);
    if (!want)
        return ERR(NO_MEMORY, "%" PRIu64 " wants", d->count);
    for (uint64_t i = 0; i < d->count; i++) {
        int64_t t = metadata_find(m, d->text + d->desc[i].part, d->text + d->desc[i].name);
        want[i] = (struct load_want){ .tensor = (uint32_t)t, .rank = d->desc[i].rank, .piece = d->desc[i].piece };
    }
    *out = want;
    return NULL;
}

static status *measure_load(const struct wish *w, const struct metadata *m, struct figures *f)
{
    struct descs d = { 0 };
    struct load_want *want = NULL;
    struct load_plan plan = { 0 };
    status *st = describe(w, &w->to_mesh, &d);
    if (!st)
        st = make_wants(m, &d, &want);
    uint64_t count = d.count;
    int ranks = d.ranks;
    descs_free(&d);
    uint64_t t = clock_thread_cpu_ns();
    if (!st)
        st = load_plan_make(m, want, count, ranks, &plan);
    f->load_plan_s = ns_to_s(clock_thread_cpu_ns() - t);
    if (!st) {
        f->amplification =
            plan.totals.unique_bytes ? (double)plan.totals.storage_bytes / (double)plan.totals.unique_bytes : 1;
        f->copies = plan.copies;
        f->blocks = plan.blocks;
        f->load_wire_bytes = plan.totals.wire_bytes;
        load_plan_free(&plan);
    }
    mem_free(want);
    return st;
}

static status *measure_save(const struct wish *w, struct metadata *m, struct plan **plan, struct figures *f)
{
    struct descs d = { 0 };
    struct roster roster = { 0 };
    uint64_t t = clock_thread_cpu_ns();
    TRY(describe(w, &w->from_mesh, &d));
    f->describe_s = ns_to_s(clock_thread_cpu_ns() - t);
    f->descriptors = d.count;
    f->cached_plan_s = time_cached(&d);
    t = clock_thread_cpu_ns();
    const struct plan_options o = { .irregular = w->irregular };
    status *st = plan_make(d.desc, d.count, d.text, d.text_bytes, d.ranks, &o, plan);
    if (!st)
        st = roster_make(*plan, &roster);
    f->plan_s = ns_to_s(clock_thread_cpu_ns() - t);
    descs_free(&d);
    if (!st) {
        f->pieces = (*plan)->piece_count;
        f->tensors = (*plan)->tensor_count;
        f->ranks = (uint64_t)(*plan)->ranks;
        f->balance = balance_of(*plan);
        f->wire_bytes = merge_wire_bytes(*plan, w->irregular == PLAN_GATHER);
        st = make_step(*plan, &roster, &w->from_mesh, m);
    }
    roster_free(&roster);
    return st;
}

static void print(const struct wish *w, const struct figures *f)
{
    double beside = f->pieces ? (double)(f->metadata_bytes - 4 * f->crcs) / (double)f->pieces : 0;
    char from[128], to[128];
    mesh_text(&w->from_mesh, from, sizeof from);
    mesh_text(&w->to_mesh, to, sizeof to);
    const char *model = w->model ? w->model : "synthetic";
    if (w->json) {
        printf("{\"model\":\"%s\",\"from_mesh\":\"%s\",\"to_mesh\":\"%s\",\"zero\":%d,\"params\":%" PRIu64
               ",\"tensors\":%" PRIu64 ",\"descriptors\":%" PRIu64 ",\"pieces\":%" PRIu64 ",\"ranks\":%" PRIu64
               ",\"plan_s\":%.6f,\"cached_plan_s\":%.9f,\"metadata_bytes\":%" PRIu64
               ",\"metadata_bytes_per_piece\":%.3f,\"checksum_bytes\":%" PRIu64
               ",\"rank_bytes_max_over_mean\":%.6f,\"files\":%" PRIu64
               ",\"metadata_s\":%.6f,\"load_plan_s\":%.6f,\"read_amplification\":%.6f,\"irregular\":\"%s\""
               ",\"wire_bytes\":%" PRIu64 ",\"load_wire_bytes\":%" PRIu64 "}\n",
               model, from, to, w->zero, w->table ? model_params(w->table) : 0, f->tensors, f->descriptors, f->pieces,
               f->ranks, f->plan_s, f->cached_plan_s, f->metadata_bytes, beside, 4 * f->crcs, f->balance, f->files,
               f->metadata_s, f->load_plan_s, f->amplification, irregular_name[w->irregular], f->wire_bytes,
               f->load_wire_bytes);
        return;
    }
    printf("%s on %" PRIu64 " ranks (%s), %" PRIu64 " tensors, %" PRIu64 " descriptors\n", model, f->ranks, from,
           f->tensors, f->descriptors);
    printf("  save   %" PRIu64 " pieces in %" PRIu64 " files, planned in %.3f s, from the cache in %.6f s\n", f->pieces,
           f->files, f->plan_s, f->cached_plan_s);
    printf("         bytes a rank, most / mean: %.4f; irregular: %s, %" PRIu64 " bytes from rank to rank\n", f->balance,
           irregular_name[w->irregular], f->wire_bytes);
    printf("         metadata of %" PRIu64 " bytes: %.1f a piece, and %" PRIu64 " of checksums\n", f->metadata_bytes,
           beside, 4 * f->crcs);
    printf("  load   by %d ranks (%s), planned in %.3f s; storage bytes / unique bytes: %.4f, %" PRIu64
           " bytes from rank to rank\n",
           mesh_world(&w->to_mesh), to, f->load_plan_s, f->amplification, f->load_wire_bytes);
}

status *cli_plan(const struct request *r)
{
    struct wish w = { .zero = 1 };
    struct figures f = { 0 };
    struct metadata m = { 0 };
    struct plan *plan = NULL;
    TRY(read_wish(r, &w));
    status *st = measure_save(&w, &m, &plan, &f);
    if (!st)
        st = measure_metadata(&m, &f);
    if (!st)
        st = measure_load(&w, &m, &f);
    if (!st)
        print(&w, &f);
    free_step(&m);
    plan_free(plan);
    return st;
}
