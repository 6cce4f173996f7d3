/* cli: `tessera ckpt VERB`; ls and show here, others in cli_*.c: what a checkpoint root holds, for people
 * (tables) and for programs (--json), on stdout.
 *
 * A verb is a row of `verbs`. Texts that come out of a checkpoint (names, build) are printed with control characters
 * replaced, or escaped in JSON, for whoever made the file may be no friend. ls and show write nothing, verify and
 * diff nothing but a reader's pin (pin.h). */
#include "ckpt/cli.h"
#include "ckpt/ckpt.h"
#include "ckpt/commit.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Text */

/* Length of the well-formed UTF-8 sequence at p, 0 if it is none (Unicode 15, table 3-7). */
static size_t utf8_length(const unsigned char *p)
{
    unsigned char lo = 0x80, hi = 0xbf;
    size_t n = p[0] < 0x80                    ? 1
               : p[0] >= 0xc2 && p[0] <= 0xdf ? 2
               : (p[0] & 0xf0) == 0xe0        ? 3
               : p[0] >= 0xf0 && p[0] <= 0xf4 ? 4
                                              : 0;
    if (p[0] == 0xe0)
        lo = 0xa0;
    if (p[0] == 0xed)
        hi = 0x9f;
    if (p[0] == 0xf0)
        lo = 0x90;
    if (p[0] == 0xf4)
        hi = 0x8f;
    for (size_t i = 1; i < n; i++, lo = 0x80, hi = 0xbf)
        if (p[i] < lo || p[i] > hi)
            return 0;
    return n;
}

/* A JSON string (RFC 8259); what is no UTF-8 becomes U+FFFD. */
static void print_json(const char *text)
{
    putchar('"');
    for (const unsigned char *p = (const unsigned char *)text; *p;) {
        size_t n = utf8_length(p);
        if (n == 0)
            fputs("\\ufffd", stdout);
        else if (*p == '"' || *p == '\\')
            printf("\\%c", *p);
        else if (*p < 0x20 || *p == 0x7f)
            printf("\\u%04x", *p);
        else
            fwrite(p, 1, n, stdout);
        p += n ? n : 1;
    }
    putchar('"');
}

void cli_print(const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p;) {
        size_t n = utf8_length(p);
        if (n == 0 || *p < 0x20 || *p == 0x7f)
            putchar('?');
        else
            fwrite(p, 1, n, stdout);
        p += n ? n : 1;
    }
}

void cli_size(uint64_t bytes, char text[16])
{
    static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
    double v = (double)bytes;
    size_t u = 0;
    while (v >= 1023.95 && u + 1 < sizeof unit / sizeof *unit) {
        v /= 1024;
        u++;
    }
    snprintf(text, 16, u ? "%.1f %s" : "%.0f %s", v, unit[u]);
}

static void age_text(uint64_t time_ns, char text[24])
{
    uint64_t now = clock_wall_ns(), s = now > time_ns ? (now - time_ns) / 1000000000u : 0;
    if (time_ns == 0)
        snprintf(text, 24, "?");
    else if (s < 120)
        snprintf(text, 24, "%" PRIu64 " s", s);
    else if (s < 7200)
        snprintf(text, 24, "%" PRIu64 " min", s / 60);
    else if (s < 172800)
        snprintf(text, 24, "%" PRIu64 " h", s / 3600);
    else
        snprintf(text, 24, "%" PRIu64 " d", s / 86400);
}

static void print_shape(const char *name, int ndim, const uint64_t dim[LAYOUT_DIMS])
{
    printf("%s[", name);
    for (int d = 0; d < ndim; d++)
        printf("%s%" PRIu64, d ? "," : "", dim[d]);
    putchar(']');
}

/* ---- What a step sums up to */

/* Of its own files. */
static uint64_t file_bytes(const struct metadata *m)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < m->file_count; i++)
        n += m->file[i].owner ? 0 : m->file[i].bytes;
    return n;
}

static uint64_t own_files(const struct metadata *m)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < m->file_count; i++)
        n += m->file[i].owner == 0;
    return n;
}

/* "step 10", "step 10 of file:/PATH" */
static void print_owner(const struct meta_owner *o)
{
    printf("step %" PRIu64, o->step);
    if (o->url)
        fputs(" of ", stdout);
    cli_print(o->url ? o->url : "");
}

static void owner_json(const struct meta_owner *o)
{
    printf("{\"step\":%" PRIu64 ",\"run\":\"%016" PRIx64 "\",\"attempt\":\"%016" PRIx64 "\",\"url\":", o->step,
           o->run_id, o->attempt);
    if (o->url)
        print_json(o->url);
    else
        fputs("null", stdout);
    putchar('}');
}

static void owners_json(const struct metadata *m)
{
    fputs("\"owners\":[", stdout);
    for (uint64_t i = 0; i < m->owner_count; i++) {
        fputs(i ? "," : "", stdout);
        owner_json(&m->owner[i]);
    }
    putchar(']');
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct parts of tensors and blobs, in order; they point into m. */
static status *parts_of(const struct metadata *m, const char ***out, size_t *count)
{
    size_t all = (size_t)(m->tensor_count + m->blob_count), n = 0;
    const char **part = mem_array(NULL, all + 1, sizeof *part);
    if (!part)
        return ERR(NO_MEMORY, "a list of %zu parts", all);
    for (uint64_t i = 0; i < m->tensor_count; i++)
        part[n++] = m->tensor[i].part;
    for (uint64_t i = 0; i < m->blob_count; i++)
        part[n++] = m->blob[i].part;
    qsort(part, n, sizeof *part, by_text);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (kept == 0 || strcmp(part[kept - 1], part[i]) != 0)
            part[kept++] = part[i];
    *out = part;
    *count = kept;
    return NULL;
}

static void print_ids_json(const struct metadata *m)
{
    printf("\"run\":\"%016" PRIx64 "\",\"attempt\":\"%016" PRIx64 "\",\"parent\":\"%016" PRIx64
           "\",\"time_ns\":%" PRIu64,
           m->run_id, m->attempt, m->parent_attempt, m->time_ns);
}

/* ---- ls */

static status *ls_row(const struct metadata *m, bool json)
{
    const char **part = NULL;
    size_t parts = 0;
    TRY(parts_of(m, &part, &parts));
    char size[16], age[24];
    cli_size(file_bytes(m), size);
    age_text(m->time_ns, age);
    if (json)
        printf("{\"step\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"files\":%" PRIu64 ",\"tensors\":%" PRIu64
               ",\"blobs\":%" PRIu64 ",\"parts\":[",
               m->step, file_bytes(m), own_files(m), m->tensor_count, m->blob_count);
    else
        printf("%12" PRIu64 "  %10s  %7" PRIu64 "  %016" PRIx64 "  %7s  ", m->step, size, m->tensor_count, m->attempt,
               age);
    for (size_t i = 0; i < parts; i++) {
        if (i)
            putchar(',');
        if (json)
            print_json(part[i]);
        else
            cli_print(part[i]);
    }
    mem_free(part);
    if (json) {
        fputs("],", stdout);
        print_ids_json(m);
        putchar(',');
        owners_json(m);
        fputs(",\"damage\":null}", stdout);
        return NULL;
    }
    for (uint64_t i = 0; i < m->owner_count; i++) {
        fputs(i ? ", " : "  refers to ", stdout);
        print_owner(&m->owner[i]);
    }
    putchar('\n');
    return NULL;
}

static void ls_damaged(uint64_t step, const char *why, bool json)
{
    if (json)
        printf("{\"step\":%" PRIu64 ",\"damage\":", step);
    else
        printf("%12" PRIu64 "  DAMAGED: ", step);
    (json ? print_json : cli_print)(why);
    putchar(json ? '}' : '\n');
}

static status *ls_steps(const struct request *r, const struct step_list *l)
{
    if (r->json)
        putchar('[');
    else if (l->count)
        printf("%12s  %10s  %7s  %-16s  %7s  %s\n", "STEP", "BYTES", "TENSORS", "ATTEMPT", "AGE", "PARTS");
    else
        puts("no committed step");
    for (size_t i = 0; i < l->count; i++) {
        struct metadata *m = NULL;
        if (r->json && i)
            fputs(",\n", stdout);
        status *st = commit_read(r->store, l->step[i], &m);
        if (status_code(st) == ST_CORRUPT || status_code(st) == ST_UNSUPPORTED) {
            ls_damaged(l->step[i], status_message(st), r->json);
            status_free(st);
            continue;
        }
        if (!st)
            st = ls_row(m, r->json);
        metadata_free(m);
        if (st)
            return st;
    }
    if (r->json)
        puts("]");
    return NULL;
}

status *cli_steps(const struct request *r, struct step_list *out)
{
    struct step_list l;
    TRY(commit_list(r->store, &l));
    if (!r->has_step) {
        *out = l;
        return NULL;
    }
    for (size_t i = 0; i < l.count; i++)
        if (l.step[i] == r->step) {
            l.step[0] = r->step;
            l.count = 1;
            *out = l;
            return NULL;
        }
    status *st = l.count
                     ? ERR(NOT_FOUND, "step %" PRIu64 " is not committed; there are %zu from %" PRIu64 " to %" PRIu64,
                           r->step, l.count, l.step[0], l.step[l.count - 1])
                     : ERR(NOT_FOUND, "step %" PRIu64 " is not committed; no step is", r->step);
    step_list_free(&l);
    return st;
}

status *cli_one_step(const struct request *r, uint64_t *step)
{
    struct step_list l;
    if (!r->has_step)
        return commit_newest(r->store, step);
    TRY(cli_steps(r, &l));
    *step = l.step[0];
    step_list_free(&l);
    return NULL;
}

static status *do_ls(const struct request *r)
{
    struct step_list l;
    TRY(cli_steps(r, &l));
    status *st = ls_steps(r, &l);
    step_list_free(&l);
    return st;
}

/* ---- show */

static uint64_t tensor_bytes(const struct metadata *m, const struct meta_tensor *t)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < t->piece_count; i++)
        n += m->piece[t->first_piece + i].bytes;
    return n;
}

static void show_tensor_json(const struct metadata *m, const struct meta_tensor *t)
{
    fputs("{\"part\":", stdout);
    print_json(t->part);
    fputs(",\"name\":", stdout);
    print_json(t->name);
    printf(",\"dtype\":\"%s\"", dtype_name(t->dtype));
    print_shape(",\"shape\":", t->shape.ndim, t->shape.dim);
    printf(",\"trainable\":%s,\"alias_of\":", t->trainable ? "true" : "false");
    if (t->alias_of)
        print_json(t->alias_of);
    else
        fputs("null", stdout);
    fputs(",\"reference\":", stdout);
    const struct meta_owner *o = metadata_owner(m, t);
    if (o) {
        fputs("{\"part\":", stdout);
        print_json(t->owner_part);
        fputs(",\"name\":", stdout);
        print_json(t->owner_name);
        fputs(",\"owner\":", stdout);
        owner_json(o);
        putchar('}');
    } else {
        fputs("null", stdout);
    }
    printf(",\"bytes\":%" PRIu64 ",\"pieces\":[", tensor_bytes(m, t));
    for (uint64_t i = 0; i < t->piece_count; i++) {
        const struct meta_piece *p = &m->piece[t->first_piece + i];
        printf("%s{\"file\":%u,\"offset\":%" PRIu64 ",\"bytes\":%" PRIu64, i ? "," : "", p->file, p->offset, p->bytes);
        print_shape(",\"box_offset\":", t->shape.ndim, p->piece.box.off);
        print_shape(",\"box_length\":", t->shape.ndim, p->piece.box.len);
        printf(",\"run\":[%" PRIu64 ",%" PRIu64 "]}", p->piece.begin, p->piece.end);
    }
    fputs("]}", stdout);
}

static void show_json(const struct metadata *m, const struct mark_list *marks)
{
    printf("{\"step\":%" PRIu64 ",", m->step);
    print_ids_json(m);
    printf(",\"bytes\":%" PRIu64 ",\"world\":%u,\"mesh\":{", file_bytes(m), m->world);
    for (int a = 0; a < MESH_AXES; a++)
        printf("%s\"%s\":%d", a ? "," : "", mesh_axis_names[a], m->mesh.size[a]);
    fputs("},\"build\":", stdout);
    print_json(m->build ? m->build : "");
    fputs(",\n\"files\":[", stdout);
    for (uint64_t i = 0; i < m->file_count; i++) {
        fputs(i ? ",\n{\"name\":" : "\n{\"name\":", stdout);
        print_json(m->file[i].name);
        printf(",\"bytes\":%" PRIu64 ",\"header_bytes\":%" PRIu64 ",\"step\":%" PRIu64 "}", m->file[i].bytes,
               m->file[i].header_bytes, m->file[i].owner ? m->owner[m->file[i].owner - 1].step : m->step);
    }
    fputs("],\n", stdout);
    owners_json(m);
    fputs(",\n\"tensors\":[", stdout);
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        fputs(i ? ",\n" : "\n", stdout);
        show_tensor_json(m, &m->tensor[i]);
    }
    fputs("],\n\"blobs\":[", stdout);
    for (uint64_t i = 0; i < m->blob_count; i++) {
        fputs(i ? ",\n{\"part\":" : "\n{\"part\":", stdout);
        print_json(m->blob[i].part);
        fputs(",\"name\":", stdout);
        print_json(m->blob[i].name);
        printf(",\"rank\":%d,\"bytes\":%" PRIu64 "}", m->blob[i].rank, m->blob[i].bytes);
    }
    fputs("],\n\"metrics\":{", stdout);
    for (size_t i = 0; i < marks->count; i++) {
        fputs(i ? "," : "", stdout);
        print_json(marks->mark[i].name);
        printf(":%.17g", marks->mark[i].value);
    }
    puts("}}");
}

static void show_tensor(const struct metadata *m, const struct meta_tensor *t)
{
    fputs("  ", stdout);
    cli_print(t->part);
    putchar(' ');
    cli_print(t->name);
    printf("  %s", dtype_name(t->dtype));
    print_shape("", t->shape.ndim, t->shape.dim);
    if (t->alias_of) {
        fputs("  alias of ", stdout);
        cli_print(t->alias_of);
    } else {
        printf("  %" PRIu64 " bytes in %" PRIu64 " piece%s", tensor_bytes(m, t), t->piece_count,
               t->piece_count == 1 ? "" : "s");
    }
    fputs(t->trainable ? "" : "  frozen", stdout);
    const struct meta_owner *o = metadata_owner(m, t);
    if (o) {
        fputs("  in ", stdout);
        print_owner(o);
        fputs(" as ", stdout);
        cli_print(t->owner_part);
        putchar(' ');
        cli_print(t->owner_name);
    }
    putchar('\n');
}

static void show_plain(const struct metadata *m)
{
    char size[16], age[24], mesh[128];
    cli_size(file_bytes(m), size);
    age_text(m->time_ns, age);
    mesh_text(&m->mesh, mesh, sizeof mesh);
    printf("step %" PRIu64 "  %s in %" PRIu64 " files  %s old\nrun %016" PRIx64 "  attempt %016" PRIx64
           "  parent %016" PRIx64 "\nranks %u  %s  build ",
           m->step, size, own_files(m), age, m->run_id, m->attempt, m->parent_attempt, m->world, mesh);
    cli_print(m->build ? m->build : "");
    printf("\nfiles (%" PRIu64 ")\n", m->file_count);
    for (uint64_t i = 0; i < m->file_count; i++) {
        fputs("  ", stdout);
        cli_print(m->file[i].name);
        printf("  %" PRIu64 " bytes", m->file[i].bytes);
        if (m->file[i].owner) {
            fputs("  of ", stdout);
            print_owner(&m->owner[m->file[i].owner - 1]);
        }
        putchar('\n');
    }
    printf("tensors (%" PRIu64 ")\n", m->tensor_count);
    for (uint64_t i = 0; i < m->tensor_count; i++)
        show_tensor(m, &m->tensor[i]);
    printf("blobs (%" PRIu64 ")\n", m->blob_count);
    for (uint64_t i = 0; i < m->blob_count; i++) {
        fputs("  ", stdout);
        cli_print(m->blob[i].part);
        putchar(' ');
        cli_print(m->blob[i].name);
        if (m->blob[i].rank >= 0)
            printf("  of rank %d", m->blob[i].rank);
        printf("  %" PRIu64 " bytes\n", m->blob[i].bytes);
    }
}

static status *do_show(const struct request *r)
{
    struct metadata *m;
    uint64_t step = 0;
    TRY(cli_one_step(r, &step));
    TRY(commit_read(r->store, step, &m));
    struct mark_list marks = { 0 };
    status *st = commit_marks(r->store, step, &marks);
    if (!st && r->json)
        show_json(m, &marks);
    else if (!st)
        show_plain(m);
    for (size_t i = 0; i < marks.count && !r->json; i++) {
        fputs(i ? "  " : "metrics\n  ", stdout);
        cli_print(marks.mark[i].name);
        printf("  %.9g\n", marks.mark[i].value);
    }
    mark_list_free(&marks);
    metadata_free(m);
    return st;
}

/* ---- Verbs and arguments */

/* What a verb takes besides URL and --help. OWN_URLS: all arguments are its own to read; LIST: those after the URL are;
 * OWN_WORDS: options too, and there is no URL. */
enum { STEP = 1, JSON = 2, LIST = 4, OWN_URLS = 8, FORCE = 16, DRY_RUN = 32, THREADS = 64, OWN_WORDS = 128 };

static const struct verb {
    const char *name, *arguments, *help;
    status *(*run)(const struct request *r);
    unsigned takes;
} verbs[] = {
    { "ls", "URL [STEP] [--json]", "the committed steps: bytes, tensors, attempt, age, parts; which is damaged and why",
      do_ls, STEP | JSON },
    { "show", "URL [STEP] [--json]", "one step (the newest): files, tensors with type, shape and pieces, blobs",
      do_show, STEP | JSON },
    { "verify", "URL [STEP] [-j N]",
      "read every byte of one or all steps, also what lies in others, with N threads; one line a damage, and exit code "
      "71 if there is any. Under "
      "mpirun the ranks share the work",
      cli_verify, STEP | THREADS },
    { "diff", "URL [STEP] URL [STEP]",
      "compare two steps: names, types, shapes, every value; exit code 65 if they differ", cli_diff, OWN_URLS },
    { "view", "URL [STEP]", "write view.h5 of a step (the newest): every tensor whole, for h5py, h5dump, MATLAB",
      cli_view, STEP },
    { "copy", "URL [STEP] URL [--to pp=..,dp=..,tp=..|--ranks N] [--part P] [--match NAMES]",
      "a step (the newest) as a step of another root, verified, cut anew if asked for, whole or in part", cli_copy,
      OWN_WORDS },
    { "mark", "URL STEP NAME=VALUE", "set a metric of a committed step, for keep_best", cli_mark, LIST },
    { "rm", "URL STEP... [--force]", "remove steps; the newest valid one only with --force", cli_rm, LIST | FORCE },
    { "gc", "URL [--dry-run] [--age=SECONDS]",
      "remove what dead jobs left, and .bad and .retired steps, older than a day", cli_gc, DRY_RUN },
    { "report", "URL [STEP] [--load] [--stage NAME] [--over K] [--mtbf S] [--interval S] [--trace FILE] [--json]",
      "what the last save (or load) cost: a map over the mesh, stragglers, ETTR, a trace for Perfetto", cli_report,
      OWN_WORDS },
    { "export", "URL [STEP] FOLDER [--dtype=bf16|f16|f32|f64] [--shard-bytes=N]",
      "the model of a step (the newest) as a Hugging Face folder: safetensors and config.json", NULL, OWN_WORDS },
    { "import", "FOLDER URL [STEP]", "a Hugging Face folder as a step (0) of a new root, types as they are", NULL,
      OWN_WORDS },
    { "plan", "--model NAME --mesh pp=,dp=,tp= [--zero 0|1] [--to MESH] [--json]",
      "plan a save and a load of a known model (or --synthetic tensors=,pieces=) on any mesh, here", cli_plan,
      OWN_WORDS },
};
enum { VERBS = sizeof verbs / sizeof *verbs };

static void print_help(void)
{
    for (size_t i = 0; i < VERBS; i++)
        printf("%s tessera ckpt %-7s%-31s %s\n", i ? "      " : "usage:", verbs[i].name, verbs[i].arguments,
               verbs[i].help);
    puts("URL is a checkpoint root (file:PATH or PATH) or one step in it (PATH/step-000000000100).");
}

static status *unknown_verb(const char *verb)
{
    char legal[160] = "";
    size_t n = 0;
    for (size_t i = 0; i < VERBS; i++)
        n += (size_t)snprintf(legal + n, sizeof legal - n, "%s%s", i ? ", " : "", verbs[i].name);
    return verb ? ERR(INVALID, "ckpt: no verb \"%s\"; there are %s", verb, legal)
                : ERR(INVALID, "ckpt: which verb? There are %s", legal);
}

status *cli_step(const char *text, uint64_t *step)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno)
        return ERR(INVALID, "ckpt: step \"%s\" is no number", text);
    *step = v;
    return NULL;
}

bool cli_cut_step(char *url, uint64_t *step)
{
    size_t n = strlen(url);
    while (n > 1 && url[n - 1] == '/')
        url[--n] = 0;
    char *slash = strrchr(url, '/'), *colon = strchr(url, ':');
    char *last = slash ? slash + 1 : colon ? colon + 1 : url;
    if (!commit_parse_dir(last, step))
        return false;
    if (slash && slash > url && slash[-1] != ':')
        *slash = 0;
    else
        snprintf(last, 2, "%s", slash ? "" : "."); /* "/step-N" -> "/", "step-N" -> "." */
    return true;
}

static status *run_verb(const struct verb *v, struct request *r, char *url)
{
    uint64_t step;
    if (!v->run)
        return ERR(UNSUPPORTED, "ckpt %s: this program is built without models",
                   v->name); /* trainer/hf/hf_cli.c has it */
    if (v->takes & (OWN_URLS | OWN_WORDS))
        return v->run(r);
    if (cli_cut_step(url, &step)) {
        if (r->has_step && r->step != step)
            return ERR(INVALID, "ckpt %s: the URL names step %" PRIu64 " and the argument step %" PRIu64, v->name, step,
                       r->step);
        r->has_step = true;
        r->step = step;
    }
    status *st = store_open(url, false, &r->store);
    if (r->comm)
        st = comm_agree(r->comm, st);
    if (!st)
        st = v->run(r);
    store_close(r->store);
    return st;
}

/* One word after the verb. */
static status *take_argument(const struct verb *v, struct request *r, const char *a)
{
    if (v->takes & OWN_WORDS && r->arguments < CLI_ARGUMENTS) {
        r->argument[r->arguments++] = a;
    } else if (strcmp(a, "--json") == 0 && v->takes & JSON) {
        r->json = true;
    } else if (strcmp(a, "--force") == 0 && v->takes & FORCE) {
        r->force = true;
    } else if (strcmp(a, "--dry-run") == 0 && v->takes & DRY_RUN) {
        r->dry_run = true;
    } else if (strncmp(a, "--age=", 6) == 0 && v->takes & DRY_RUN) {
        status *st = cli_step(a + 6, &r->age_seconds);
        if (st || r->age_seconds > 1000000000) {
            status_free(st);
            return ERR(INVALID, "ckpt %s: --age wants seconds, not \"%s\"", v->name, a + 6);
        }
    } else if (strncmp(a, "-j", 2) == 0 && v->takes & THREADS) {
        uint64_t n = 0;
        status *st = cli_step(a + 2, &n);
        if (st || n < 1 || n > CLI_THREADS) {
            status_free(st);
            return ERR(INVALID, "ckpt %s: -j wants 1 to %d threads, not \"%s\"", v->name, CLI_THREADS, a + 2);
        }
        r->threads = (int)n;
    } else if (a[0] == '-') {
        return ERR(INVALID, "ckpt %s: no option \"%s\"; it takes %s", v->name, a, v->arguments);
    } else if (!r->url) {
        r->url = a;
    } else if (v->takes & STEP && !r->has_step) {
        TRY(cli_step(a, &r->step));
        r->has_step = true;
    } else if (v->takes & (LIST | OWN_URLS) && r->arguments < CLI_ARGUMENTS) {
        r->argument[r->arguments++] = a;
    } else {
        return ERR(INVALID, "ckpt %s: one argument too many: \"%s\"; it takes %s", v->name, a, v->arguments);
    }
    return NULL;
}

static status *run_and_flush(const struct verb *v, struct request *r)
{
    if (v->takes & OWN_WORDS)
        r->url = "";
    if (!r->url)
        return ERR(INVALID, "ckpt %s: which URL? It takes %s", v->name, v->arguments);
    char *copy = mem_strdup(r->url);
    if (!copy)
        return ERR(NO_MEMORY, "ckpt %s", v->name);
    status *st = run_verb(v, r, copy);
    mem_free(copy);
    if (fflush(stdout) != 0 || ferror(stdout))
        st = status_first(st, ERR_SYS(errno, "write to standard output"));
    return st;
}

status *ckpt_cli(int argc, char **argv)
{
    return ckpt_cli_ranks(NULL, argc, argv);
}

status *ckpt_cli_ranks(struct comm *c, int argc, char **argv)
{
    const struct verb *v = NULL;
    if (argc < 1)
        return unknown_verb(NULL);
    if (strcmp(argv[0], "--help") == 0 || strcmp(argv[0], "-h") == 0 || strcmp(argv[0], "help") == 0) {
        print_help();
        return NULL;
    }
    for (size_t i = 0; i < VERBS && !v; i++)
        v = strcmp(argv[0], verbs[i].name) == 0 ? &verbs[i] : NULL;
    if (!v)
        return unknown_verb(argv[0]);
    struct request r = { .age_seconds = 86400, .comm = c };
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help();
            return NULL;
        }
        char joined[32];
        bool apart = v->takes & THREADS && strcmp(argv[i], "-j") == 0 && i + 1 < argc; /* "-j N" is "-jN" */
        if (apart)
            snprintf(joined, sizeof joined, "-j%s", argv[++i]);
        TRY(take_argument(v, &r, apart ? joined : argv[i]));
    }
    return run_and_flush(v, &r);
}
