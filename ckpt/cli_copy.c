/* cli_copy: `tessera ckpt copy`: its words, and what it says at the end. The work is copy.c's. */
#include "ckpt/cli.h"
#include "ckpt/copy.h"
#include "ckpt/pin.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_RANKS = 100000 };

struct words {
    const char *url[2];
    int urls;
    bool has_step;
    uint64_t step;
    const char *part[CLI_ARGUMENTS + 1], *match[CLI_ARGUMENTS + 1];
    int parts, matches;
    struct copy_options o;
};

static status *take_step(struct words *w, const char *text)
{
    uint64_t step = 0;
    TRY(cli_step(text, &step));
    if (w->has_step && w->step != step)
        return ERR(INVALID, "ckpt copy: it is told to copy step %" PRIu64 " and step %" PRIu64, w->step, step);
    w->has_step = true;
    w->step = step;
    return NULL;
}

/* "pp=2,dp=4,tp=2": axes that are not named are 1. */
static status *take_mesh(struct words *w, const char *text)
{
    int64_t ranks = 1;
    for (int a = 0; a < MESH_AXES; a++)
        w->o.mesh.size[a] = 1;
    for (const char *s = text; *s;) {
        size_t n = strcspn(s, ",");
        int axis = 0;
        char *end = NULL;
        while (axis < MESH_AXES && (strncmp(s, mesh_axis_names[axis], 2) != 0 || s[2] != '='))
            axis++;
        long size = axis < MESH_AXES ? strtol(s + 3, &end, 10) : 0;
        if (axis == MESH_AXES || end != s + n || size < 1 || size > MOST_RANKS)
            return ERR(INVALID,
                       "ckpt copy: --to wants axes of pp, dp, ep, cp, tp with sizes, as in pp=2,tp=4; not \"%s\"",
                       text);
        w->o.mesh.size[axis] = (int)size;
        s += n + (s[n] == ',');
    }
    for (int a = 0; a < MESH_AXES && ranks <= MOST_RANKS; a++)
        ranks *= w->o.mesh.size[a];
    if (!*text || ranks > MOST_RANKS)
        return ERR(INVALID, "ckpt copy: --to %s: 1 to %d ranks", text, MOST_RANKS);
    w->o.recut = true;
    return NULL;
}

static status *take_ranks(struct words *w, const char *text)
{
    char mesh[32];
    uint64_t n = 0;
    TRY(cli_step(text, &n));
    if (n < 1 || n > MOST_RANKS)
        return ERR(INVALID, "ckpt copy: --ranks wants 1 to %d, not %s", MOST_RANKS, text);
    snprintf(mesh, sizeof mesh, "dp=%d", (int)n);
    return take_mesh(w, mesh);
}

static status *take_option(struct words *w, const char *name, const char *value)
{
    if (strcmp(name, "--step") == 0)
        return take_step(w, value);
    if (w->o.recut && (strcmp(name, "--to") == 0 || strcmp(name, "--ranks") == 0))
        return ERR(INVALID, "ckpt copy: one of --to and --ranks, once");
    if (strcmp(name, "--to") == 0)
        return take_mesh(w, value);
    if (strcmp(name, "--ranks") == 0)
        return take_ranks(w, value);
    if (strcmp(name, "--part") == 0)
        w->part[w->parts++] = value;
    else
        w->match[w->matches++] = value;
    return NULL;
}

static status *take_words(const struct request *r, struct words *w)
{
    static const char *const option[] = { "--step", "--to", "--ranks", "--part", "--match" };
    for (int i = 0; i < r->arguments; i++) {
        const char *a = r->argument[i], *value = NULL;
        if (a[0] != '-' && w->urls == 1 && a[strspn(a, "0123456789")] == 0) {
            TRY(take_step(w, a));
            continue;
        }
        if (a[0] != '-' && w->urls < 2) {
            w->url[w->urls++] = a;
            continue;
        }
        size_t k = 0, n = strcspn(a, "=");
        while (k < sizeof option / sizeof *option && (strlen(option[k]) != n || strncmp(a, option[k], n) != 0))
            k++;
        if (k == sizeof option / sizeof *option)
            return ERR(INVALID, "ckpt copy: what is \"%s\"? There are --step, --to, --ranks, --part, --match", a);
        value = a[n] ? a + n + 1 : i + 1 < r->arguments ? r->argument[++i] : NULL;
        if (!value)
            return ERR(INVALID, "ckpt copy: %s of what?", a);
        TRY(take_option(w, option[k], value));
    }
    if (w->urls < 2)
        return ERR(INVALID, "ckpt copy: from where to where? It takes URL [STEP] URL");
    w->o.parts = w->parts ? w->part : NULL;
    w->o.names = w->matches ? w->match : NULL;
    return NULL;
}

/* The source's root, and which step: of the words, of its URL (URL/step-N, URL@N), or the newest. */
static status *open_source(struct words *w, struct store **out)
{
    uint64_t step = 0;
    char text[24];
    char *url = mem_strdup(w->url[0]), *sign = url ? strrchr(url, '@') : NULL;
    if (!url)
        return ERR(NO_MEMORY, "ckpt copy");
    bool named = sign && sign[1] && sign[1 + strspn(sign + 1, "0123456789")] == 0;
    status *st = named ? take_step(w, sign + 1) : NULL;
    if (named)
        *sign = 0;
    if (!st && cli_cut_step(url, &step)) {
        snprintf(text, sizeof text, "%" PRIu64, step);
        st = take_step(w, text);
    }
    if (!st)
        st = store_open(url, false, out);
    mem_free(url);
    return st || w->has_step ? st : commit_newest(*out, &w->step);
}

static status *copy_between(struct words *w, struct store *from, struct store *to)
{
    struct cli_progress p;
    struct copy_result r = { 0 };
    char what[64], size[16];
    uint64_t start = clock_ns();
    snprintf(what, sizeof what, "copy: step %" PRIu64, w->step);
    cli_progress_begin(&p, what);
    w->o.progress = cli_progress_add;
    w->o.progress_arg = &p;
    struct pin *pin = NULL; /* the step stays meanwhile, if we may say so */
    status_free(pin_open(from, w->step, 0, &pin));
    status *st = copy_step(from, w->step, to, &w->o, &r);
    pin_close(pin);
    cli_progress_end(&p);
    if (st)
        return st;
    double seconds = (double)(clock_ns() - start) / 1e9;
    cli_size(r.bytes, size);
    printf("copied step %" PRIu64 ": %" PRIu64 " tensors, %s in %" PRIu64 " files, %.2f s\n", w->step, r.tensors, size,
           r.files, seconds);
    return NULL;
}

status *cli_copy(const struct request *r)
{
    struct words w = { .urls = 0 };
    struct store *from = NULL, *to = NULL;
    uint64_t step;
    TRY(take_words(r, &w));
    char *target = mem_strdup(w.url[1]);
    if (!target)
        return ERR(NO_MEMORY, "ckpt copy");
    bool names_step = cli_cut_step(target, &step);
    mem_free(target);
    if (names_step)
        return ERR(INVALID, "ckpt copy: to the URL of a root, not of a step: the step keeps its number");
    status *st = open_source(&w, &from);
    if (!st)
        st = store_open(w.url[1], true, &to);
    if (!st)
        st = copy_between(&w, from, to);
    store_close(to);
    store_close(from);
    return st;
}
