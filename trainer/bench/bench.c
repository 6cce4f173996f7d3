/* bench: the command line, the working folder and the printing of bench.h. */
#include "trainer/bench/bench.h"

#include "comm/agree.h"
#include "comm/base/mem.h"
#include "storage/store.h"

#include <errno.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

static const struct bench_verb *const verbs[] = { &bench_save, &bench_load, &bench_irregular, &bench_train,
                                                  &bench_comm };
enum { VERBS = sizeof verbs / sizeof *verbs };

/* ---- options */

static status *set_word(const struct bench_verb *v, const char *word, void *options)
{
    char key[64], where[64];
    const char *eq = strchr(word, '=');
    snprintf(where, sizeof where, "bench %s", v->name);
    if (!eq)
        return ERR(INVALID, "%s: \"%.100s\" is neither key=value nor --json nor --quick", where, word);
    snprintf(key, sizeof key, "%.*s", (int)(eq - word < 63 ? eq - word : 63), word);
    return options_set(&v->options, key, eq + 1, options, where);
}

static status *read_words(const struct bench_verb *v, int argc, char **argv, struct bench *b, void *options)
{
    TRY(options_defaults(&v->options, options));
    for (int i = 0; i < argc; i++)
        if (!strcmp(argv[i], "--quick"))
            for (size_t k = 0; v->quick[k][0]; k++)
                TRY(options_set(&v->options, v->quick[k][0], v->quick[k][1], options, "bench --quick"));
    for (int i = 0; i < argc; i++) {
        if (!strcmp(argv[i], "--json"))
            b->json = true;
        else if (strcmp(argv[i], "--quick") != 0)
            TRY(set_word(v, argv[i], options));
    }
    return NULL;
}

/* ---- the working folder */

/* A prefix is there as soon as an object is. */
static status *choose_prefix(const char *url, char dir[BENCH_PATH_BYTES])
{
    unsigned long long name;
    size_t n = strlen(url);
    while (n && url[n - 1] == '/')
        n--;
    if (getrandom(&name, sizeof name, 0) != (ssize_t)sizeof name)
        return ERR_SYS(errno, "getrandom");
    if (n > BENCH_PATH_BYTES - 256)
        return ERR(INVALID, "url: it is too long");
    snprintf(dir, BENCH_PATH_BYTES, "%.*s/tessera-bench-%016llx", (int)n, url, name);
    return NULL;
}

static status *make_folder(const char *url, char dir[BENCH_PATH_BYTES])
{
    if (!strncmp(url, "file://", 7))
        url += 7;
    else if (!strncmp(url, "file:", 5))
        url += 5;
    else if (strstr(url, ":/"))
        return ERR(INVALID, "url=%.200s: this bench compares with plain files: a folder is needed (file:PATH)", url);
    char path[BENCH_PATH_BYTES];
    if (snprintf(path, sizeof path, "%s/tessera-bench-XXXXXX", *url ? url : ".") >= (int)sizeof path - 256)
        return ERR(INVALID, "url: the path is too long");
    if (!mkdtemp(path))
        return ERR_SYS(errno, "make a folder %s", path);
    memcpy(dir, path, sizeof path);
    return NULL;
}

static int remove_one(const char *path, const struct stat *s, int kind, struct FTW *at)
{
    (void)s, (void)kind, (void)at;
    return remove(path);
}

static status *remove_folder(const char *dir)
{
    if (nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS))
        return ERR_SYS(errno, "remove %s", dir);
    return NULL;
}

static status *remove_prefix(const char *dir)
{
    char url[BENCH_PATH_BYTES];
    struct store *s;
    size_t n = (size_t)(strrchr(dir, '/') - dir);
    snprintf(url, sizeof url, "%.*s", (int)n, dir);
    TRY(store_open(url, true, &s));
    status *st = store_remove_tree(s, dir + n + 1);
    store_close(s);
    return st;
}

static status *make_place(const struct bench *b, const char *url, char dir[BENCH_PATH_BYTES])
{
    return b->remote ? choose_prefix(url, dir) : make_folder(url, dir);
}

static status *run_in_folder(const struct bench_verb *v, struct bench *b, const void *options)
{
    const char *url = *(char *const *)((const char *)options + v->url_offset);
    b->remote = v->remote && !strncmp(url, "s3://", 5);
    TRY(comm_agree(b->world, b->world->rank ? NULL : make_place(b, url, b->dir)));
    TRY(comm_bcast(b->world, b->dir, sizeof b->dir, 0, NULL));
    status *st = v->run(b, options);
    status *gone = b->world->rank ? NULL : b->remote ? remove_prefix(b->dir) : remove_folder(b->dir);
    return status_first(st, comm_agree(b->world, gone));
}

/* ---- printing */

status *bench_meet(struct bench *b)
{
    uint64_t in = 0, out;
    struct comm_req req = { 0 };
    TRY(comm_iallreduce(b->world, &in, &out, 1, COMM_U64, COMM_SUM, &req));
    return comm_wait(&req);
}

static void print_value(const struct figure *f)
{
    if (f->text)
        printf("\"%s\"", f->text);
    else if (isfinite(f->value))
        printf("%.*f", f->digits, f->value);
    else
        fputs("null", stdout);
}

void bench_print(const struct bench *b, const struct figure *f, size_t count)
{
    if (b->world->rank)
        return;
    for (size_t i = 0; i < count; i++) {
        printf(b->json ? "%s\"%s\": " : "%s%-26s", !b->json ? "" : i ? ", " : "{", f[i].key);
        if (b->json) {
            print_value(&f[i]);
        } else {
            char text[64];
            snprintf(text, sizeof text, "%.*f", f[i].digits, f[i].value);
            printf("%16s  %s\n", f[i].text ? f[i].text : isfinite(f[i].value) ? text : "-", f[i].note);
        }
    }
    puts(b->json ? "}" : "");
    fflush(stdout);
}

static void help(void)
{
    for (size_t i = 0; i < VERBS; i++) {
        printf("mpirun -np N tessera bench %s [key=value ...] [--json] [--quick]\n    %s\n", verbs[i]->name,
               verbs[i]->help);
        options_help(&verbs[i]->options, stdout);
    }
    puts("--json prints JSON objects; --quick takes less of everything: for a look, not for figures to quote");
}

status *bench_cli(struct comm *world, int argc, char **argv)
{
    const char *name = argc ? argv[0] : "";
    if (!strcmp(name, "help") || !strcmp(name, "--help")) {
        if (!world->rank)
            help();
        return NULL;
    }
    for (size_t i = 0; i < VERBS; i++) {
        const struct bench_verb *v = verbs[i];
        if (strcmp(name, v->name) != 0)
            continue;
        struct bench b = { .world = world };
        void *options = mem_calloc(1, v->options_bytes);
        status *st = options ? read_words(v, argc - 1, argv + 1, &b, options) : ERR(NO_MEMORY, "options");
        st = comm_agree(world, st);
        if (!st)
            st = v->url_offset == BENCH_NO_URL ? v->run(&b, options) : run_in_folder(v, &b, options);
        if (options)
            options_fini(&v->options, options);
        mem_free(options);
        return st;
    }
    return ERR(INVALID, "bench: \"%.100s\" is no bench (legal: save, load, irregular, train, comm, help)", name);
}
