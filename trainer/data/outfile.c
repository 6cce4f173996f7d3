/* outfile: see outfile.h. */
#include "trainer/data/outfile.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const names[OUT_FILES] = { "sft.jsonl", "prefs_train.jsonl", "prefs_heldout.jsonl", "tasks.jsonl" };

/* mkdir -p */
static status *make_folders(const char *dir)
{
    status *st = NULL;
    char *path = mem_strdup(dir);
    if (!path)
        return ERR(NO_MEMORY, "%s: a path", dir);
    for (char *end = path; !st && *end;) {
        end += strspn(end, "/");
        end += strcspn(end, "/");
        char kept = *end;
        *end = 0;
        if (mkdir(path, 0777) && errno != EEXIST)
            st = ERR_SYS(errno, "%s: cannot make the folder", path);
        *end = kept;
    }
    mem_free(path);
    return st;
}

/* "dir/name" and, if pid is not 0, ".tmp.pid". */
static status *make_path(const char *dir, const char *name, int pid, char **out)
{
    size_t bytes = strlen(dir) + strlen(name) + 32;
    char *path = mem_alloc(bytes);
    if (!path)
        return ERR(NO_MEMORY, "%s/%s: a path", dir, name);
    int n = snprintf(path, bytes, "%s/%s", dir, name);
    if (pid)
        snprintf(path + n, bytes - (size_t)n, ".tmp.%d", pid);
    *out = path;
    return NULL;
}

static status *open_file(struct outfile *f, const char *dir, const char *name)
{
    *f = (struct outfile){ .last_problem = -1 };
    TRY(make_path(dir, name, 0, &f->path));
    TRY(make_path(dir, name, (int)getpid(), &f->temp));
    f->file = fopen(f->temp, "we");
    if (!f->file)
        return ERR_SYS(errno, "%s: cannot create", f->path);
    return NULL;
}

status *outset_open(struct outset *o, const char *dir)
{
    *o = (struct outset){ 0 };
    TRY(make_folders(dir));
    for (int i = 0; i < OUT_TASKS; i++)
        TRY(open_file(&o->file[i], dir, names[i]));
    return NULL;
}

status *outset_open_tasks(struct outset *o, const char *dir)
{
    return open_file(&o->file[OUT_TASKS], dir, names[OUT_TASKS]);
}

status *outset_open_folds(struct outset *o, const char *dir, int folds)
{
    static const char *const part[FOLD_PARTS] = { "train", "validation", "test" };
    for (int i = 0; i < folds * FOLD_PARTS; i++) {
        char name[64];
        snprintf(name, sizeof name, "fold%d_%s.jsonl", i / FOLD_PARTS, part[i % FOLD_PARTS]);
        TRY(open_file(&o->file[OUT_FILES + i], dir, name));
    }
    return NULL;
}

static int put_bytes(const char *p, size_t n, void *arg)
{
    struct outfile *f = arg;
    f->bytes += n;
    return fwrite(p, 1, n, f->file) == n ? 0 : -1;
}

/* Takes the row. NULL: it could not be made. */
static status *put_row(struct outfile *f, json_t *row)
{
    if (!row)
        return ERR(NO_MEMORY, "%s: row %llu", f->path, (unsigned long long)f->rows);
    errno = 0;
    bool failed = json_dump_callback(row, put_bytes, f, 0) || put_bytes("\n", 1, f);
    int why = errno ? errno : ENOMEM; /* the encoder itself can only run out of memory */
    json_decref(row);
    if (failed)
        return ERR_SYS(why, "%s: cannot write row %llu", f->path, (unsigned long long)f->rows);
    f->rows++;
    return NULL;
}

status *outset_sft(struct outset *o, struct text prompt, struct text completion)
{
    return put_row(&o->file[OUT_SFT],
                   json_pack("{s:s%, s:s%}", "prompt", prompt.p, prompt.n, "completion", completion.p, completion.n));
}

static status *put_pair(struct outfile *f, struct text prompt, struct text chosen, struct text rejected,
                        int64_t problem)
{
    json_t *row = json_pack("{s:s%, s:s%, s:s%, s:I}", "prompt", prompt.p, prompt.n, "chosen", chosen.p, chosen.n,
                            "rejected", rejected.p, rejected.n, "problem", (json_int_t)problem);
    f->problems += problem != f->last_problem;
    f->last_problem = problem;
    return put_row(f, row);
}

status *outset_pair(struct outset *o, bool heldout, struct text prompt, struct text chosen, struct text rejected,
                    int64_t problem)
{
    return put_pair(&o->file[heldout ? OUT_HELDOUT : OUT_TRAIN], prompt, chosen, rejected, problem);
}

status *outset_fold_pair(struct outset *o, int fold, enum fold_part part, struct text prompt, struct text chosen,
                         struct text rejected, int64_t problem)
{
    return put_pair(&o->file[OUT_FILES + fold * FOLD_PARTS + (int)part], prompt, chosen, rejected, problem);
}

status *outset_task(struct outset *o, struct text prompt, struct text answer)
{
    return put_row(&o->file[OUT_TASKS],
                   json_pack("{s:s%, s:s%}", "prompt", prompt.p, prompt.n, "answer", answer.p, answer.n));
}

/* All bytes on the disk, under the temporary name. */
static status *flush_file(struct outfile *f)
{
    int failed = 0;
    if (fflush(f->file) || fsync(fileno(f->file)))
        failed = errno;
    if (fclose(f->file) && !failed)
        failed = errno;
    f->file = NULL;
    return failed ? ERR_SYS(failed, "%s: cannot write", f->path) : NULL;
}

status *outset_commit(struct outset *o)
{
    for (int i = 0; i < OUT_SLOTS; i++)
        if (o->file[i].path)
            TRY(flush_file(&o->file[i]));
    for (int i = 0; i < OUT_SLOTS; i++) {
        struct outfile *f = &o->file[i];
        if (f->path && rename(f->temp, f->path))
            return ERR_SYS(errno, "%s: cannot rename to %s", f->temp, f->path);
        mem_free(f->temp);
        f->temp = NULL;
    }
    return NULL;
}

void outset_summary(const struct outset *o)
{
    for (int i = 0; i < OUT_SLOTS; i++) {
        const struct outfile *f = &o->file[i];
        if (!f->path)
            continue;
        const char *what = i == OUT_SFT ? "solutions" : i == OUT_TASKS ? "tasks" : "pairs";
        printf("%s: %llu %s", f->path, (unsigned long long)f->rows, what);
        if (i != OUT_SFT && i != OUT_TASKS)
            printf(" of %llu problems", (unsigned long long)f->problems);
        printf(", %llu bytes\n", (unsigned long long)f->bytes);
    }
}

void outset_close(struct outset *o)
{
    for (int i = 0; i < OUT_SLOTS; i++) {
        struct outfile *f = &o->file[i];
        if (f->file)
            (void)fclose(f->file); /* given up */
        if (f->temp)
            (void)unlink(f->temp);
        mem_free(f->path);
        mem_free(f->temp);
    }
    *o = (struct outset){ 0 };
}
