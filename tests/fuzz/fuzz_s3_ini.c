/* fuzz_s3_ini: one text as a config file, as a credentials file, and as what a credential command prints. Entries are
 * strings inside the file's text, in the order of its lines; keys that are taken are printable and whole. Messages hold
 * none of the text. */
#include "storage/s3_ini.h"
#include "storage/s3_provider.h"
#include "tests/fuzz/fuzz.h"

enum { RUN_BYTES = 12 }; /* a stretch of text that could be of a credential */

/* Takes st: no stretch of the input that holds a digit and neither blank, colon nor dash is in its message. */
static void taken(status *st, const char *text, size_t n)
{
    char run[RUN_BYTES + 1] = "";
    for (size_t i = 0; i + RUN_BYTES <= n; i++) {
        memcpy(run, text + i, RUN_BYTES);
        if (strlen(run) == RUN_BYTES && strpbrk(run, "0123456789") && !strpbrk(run, " :-"))
            MUST(!strstr(status_message(st), run));
    }
    fuzz_ok(st);
}

static void check_text(const struct s3_ini *f, const char *s)
{
    MUST(s >= f->text && s + strlen(s) <= f->text + f->bytes);
}

static void try_file(const char *text, size_t n, bool credentials)
{
    struct s3_ini f;
    status *st = s3_ini_parse(text, n, "file", credentials, &f);
    if (st) {
        taken(st, text, n);
        return;
    }
    int line = 0;
    for (size_t i = 0; i < f.count; i++) {
        const struct s3_entry *e = &f.entry[i];
        MUST(e->line > line);
        line = e->line;
        MUST(*e->section && (!e->name || (*e->name && e->value)) && (!e->group || e->name));
        if (strcmp(e->section, "default") != 0)
            check_text(&f, e->section);
        if (e->name) {
            check_text(&f, e->name);
            check_text(&f, e->value);
        }
        const struct s3_entry *last = s3_ini_find(&f, e->kind, e->section, e->group, e->name);
        MUST(last && last >= e);
        struct s3_value v;
        if (e->name && fuzz_ok(s3_entry_value(&f, e, &v)))
            MUST(!v.text == !*e->value);
    }
    s3_ini_free(&f);
}

static void printable(const char *s, size_t size)
{
    size_t n = strlen(s);
    MUST(n < size);
    for (size_t i = 0; i < n; i++)
        MUST(s[i] > ' ' && s[i] <= '~');
}

static void try_reply(const char *text, size_t n)
{
    struct s3_keys k;
    uint64_t expires = 1;
    status *st = s3_provider_parse(text, n, "command", &k, &expires);
    if (st) {
        taken(st, text, n);
        return;
    }
    printable(k.access_key, sizeof k.access_key);
    printable(k.secret_key, sizeof k.secret_key);
    printable(k.session_token, sizeof k.session_token);
    MUST(*k.access_key && *k.secret_key && expires % 1000000000u == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char *exact = mem_alloc(n); /* without a NUL behind it */
    MUST(exact);
    memcpy(exact, data, n);
    try_file(exact, n, false);
    try_file(exact, n, true);
    try_reply(exact, n);
    mem_free(exact);
    return 0;
}
