/* s3_ini: one pass over a copy of the text, which is cut into strings in place. See the header for the format. */
#include "storage/s3_ini.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct reader {
    struct s3_ini *out;
    size_t room;
    bool credentials;
    bool profile_default; /* [profile default] was there */
    int line;
    /* where the lines below belong */
    bool in_section;
    struct s3_entry section;
    size_t last;    /* the setting that indented lines go on with; its index + 1, 0: none */
    bool has_group; /* it has no value of its own */
};

static bool blank(char c)
{
    return c == ' ' || c == '\t';
}

static char *trim(char *s)
{
    while (blank(*s))
        s++;
    size_t n = strlen(s);
    while (n && blank(s[n - 1]))
        s[--n] = 0;
    return s;
}

/* A "#" or ";" at the start or after a blank begins a comment. */
static void cut_comment(char *s)
{
    for (char *c = s; *c; c++)
        if ((*c == '#' || *c == ';') && (c == s || blank(c[-1]))) {
            *c = 0;
            return;
        }
}

static status *wrong(const struct reader *r, const char *why)
{
    return ERR(INVALID, "%s:%d: %s", r->out->path, r->line, why);
}

static status *append(struct reader *r, struct s3_entry e)
{
    struct s3_ini *f = r->out;
    if (f->count == r->room) {
        size_t room = r->room ? r->room * 2 : 32;
        struct s3_entry *grown = mem_array(f->entry, room, sizeof *grown);
        if (!grown)
            return ERR(NO_MEMORY, "%s: %zu settings", f->path, room);
        f->entry = grown;
        r->room = room;
    }
    e.line = r->line;
    f->entry[f->count++] = e;
    return NULL;
}

static char *unquote(char *s)
{
    size_t n = strlen(s);
    if (n >= 2 && (*s == '"' || *s == '\'') && s[n - 1] == *s) {
        s[n - 1] = 0;
        return s + 1;
    }
    return s;
}

/* What follows `word` and a blank in s; NULL if s does not begin so. */
static char *after_word(char *s, const char *word)
{
    size_t n = strlen(word);
    return strncmp(s, word, n) == 0 && blank(s[n]) ? unquote(trim(s + n)) : NULL;
}

static status *read_section(struct reader *r, char *s)
{
    static const char legal[] = "a section's line is [default], [profile NAME] or [services NAME] in the config file, "
                                "[NAME] in the credentials file, and nothing behind it but a comment";
    char *end = strchr(s, ']');
    if (!end)
        return wrong(r, legal);
    *end = 0;
    char *rest = trim(end + 1), *name = trim(s + 1), *of;
    if ((*rest && *rest != '#' && *rest != ';') || !*name)
        return wrong(r, legal);
    struct s3_entry e = { .kind = S3_OTHER, .section = name };
    if (r->credentials) {
        e.kind = S3_PROFILE;
        e.section = unquote(name);
    } else if ((of = after_word(name, "profile"))) {
        e = (struct s3_entry){ .kind = S3_PROFILE, .section = of };
        r->profile_default = r->profile_default || strcmp(of, "default") == 0;
    } else if ((of = after_word(name, "services"))) {
        e = (struct s3_entry){ .kind = S3_SERVICES, .section = of };
    } else if (strcmp(name, "default") == 0) {
        e = (struct s3_entry){ .kind = S3_PROFILE, .section = "" }; /* "default", unless [profile default] is there */
    }
    if (e.kind != S3_OTHER && e.section != NULL && !*e.section && strcmp(name, "default") != 0)
        return wrong(r, legal);
    r->in_section = true;
    r->section = e;
    r->last = 0;
    return append(r, e);
}

/* "name = value" into e; NULL values are "". */
static status *split_setting(const struct reader *r, char *s, struct s3_entry *e)
{
    static const char legal[] = "a line is [SECTION], NAME = VALUE or a comment that begins with #; "
                                "a NAME is made of letters, digits, _ - and .";
    char *equals = strchr(s, '=');
    if (!equals)
        return wrong(r, legal);
    *equals = 0;
    char *name = trim(s), *value = trim(equals + 1);
    if (!*name)
        return wrong(r, legal);
    for (char *c = name; *c; c++) {
        if (*c >= 'A' && *c <= 'Z')
            *c = (char)(*c - 'A' + 'a');
        if (!((*c >= 'a' && *c <= 'z') || (*c >= '0' && *c <= '9') || *c == '_' || *c == '-' || *c == '.'))
            return wrong(r, legal);
    }
    if (strcmp(name, "credential_process") != 0) /* a command may hold anything */
        cut_comment(value);
    e->name = name;
    e->value = trim(value);
    return NULL;
}

static status *read_indented(struct reader *r, char *s)
{
    if (!r->last)
        return wrong(r, "a line that begins with a blank belongs to the setting above it, and this section has none "
                        "above it");
    if (*s == '[')
        return wrong(r, "a section's line begins at the line's first column");
    struct s3_entry *of = &r->out->entry[r->last - 1];
    if (!r->has_group) {
        of->more = true;
        return NULL;
    }
    struct s3_entry e = r->section;
    e.group = of->name;
    TRY(split_setting(r, s, &e));
    return append(r, e);
}

static status *read_line(struct reader *r, char *s)
{
    size_t n = strlen(s);
    if (n && s[n - 1] == '\r')
        s[--n] = 0;
    for (size_t i = 0; i < n; i++)
        if (((unsigned char)s[i] < ' ' && s[i] != '\t') || s[i] == 0x7f)
            return wrong(r, "a control character; these files are plain text");
    bool indented = blank(*s);
    s = trim(s);
    if (!*s || *s == '#' || *s == ';')
        return NULL;
    if (indented)
        return read_indented(r, s);
    if (*s == '[')
        return read_section(r, s);
    if (!r->in_section)
        return wrong(r, "a setting stands before the first [SECTION]");
    struct s3_entry e = r->section;
    TRY(split_setting(r, s, &e));
    TRY(append(r, e));
    r->last = r->out->count;
    r->has_group = !*e.value;
    return NULL;
}

static status *read_lines(struct reader *r)
{
    char *at = r->out->text, *end = at + r->out->bytes;
    if (r->out->bytes >= 3 && memcmp(at, "\xef\xbb\xbf", 3) == 0)
        at += 3;
    while (at < end) {
        r->line++;
        char *stop = memchr(at, '\n', (size_t)(end - at));
        stop = stop ? stop : end;
        *stop = 0; /* the text has a byte more than the file */
        if (strlen(at) != (size_t)(stop - at))
            return wrong(r, "a NUL byte; these files are plain text");
        TRY(read_line(r, at));
        at = stop + 1;
    }
    for (size_t i = 0; i < r->out->count; i++) {
        struct s3_entry *e = &r->out->entry[i];
        if (e->kind == S3_PROFILE && !*e->section) {
            e->section = "default";
            e->kind = r->profile_default ? S3_OTHER : S3_PROFILE;
        }
    }
    return NULL;
}

/* Cut f->text, which is f's, into entries. */
static status *parse(struct s3_ini *f, bool credentials)
{
    struct reader r = { .out = f, .credentials = credentials };
    f->found = true;
    return read_lines(&r);
}

static status *take(struct s3_ini *f, status *st, struct s3_ini *out)
{
    if (st)
        s3_ini_free(f);
    else
        *out = *f;
    return st;
}

/* f with room for n bytes of text and one behind. */
static status *prepare(struct s3_ini *f, const char *path, size_t n)
{
    f->path = mem_strdup(path);
    f->text = mem_calloc(n + 1, 1);
    f->bytes = n;
    return f->path && f->text ? NULL : ERR(NO_MEMORY, "%s: %zu bytes", path, n);
}

status *s3_ini_parse(const char *text, size_t n, const char *path, bool credentials, struct s3_ini *out)
{
    struct s3_ini f = { 0 };
    status *st = prepare(&f, path, n);
    if (!st) {
        memcpy(f.text, text, n);
        st = parse(&f, credentials);
    }
    return take(&f, st, out);
}

/* The whole file into f->text; by read(2), since a FILE would leave a copy of the secrets behind. */
static status *read_all(struct s3_ini *f, int fd)
{
    size_t got = 0;
    for (;;) {
        ssize_t n = read(fd, f->text + got, S3_INI_BYTES + 1 - got);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return ERR_SYS(errno, "read %s", f->path);
        got += (size_t)n;
        if (got > S3_INI_BYTES)
            return ERR(INVALID, "%s: longer than %d bytes", f->path, S3_INI_BYTES);
        if (n == 0)
            break;
    }
    f->bytes = got;
    return NULL;
}

status *s3_ini_read(const char *path, bool credentials, struct s3_ini *out)
{
    struct s3_ini f = { 0 };
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) {
        if (path && errno != ENOENT && errno != ENOTDIR)
            return ERR_SYS(errno, "open %s", path);
        f.path = path ? mem_strdup(path) : NULL;
        *out = f;
        return path && !f.path ? ERR(NO_MEMORY, "%s", path) : NULL;
    }
    status *st = prepare(&f, path, S3_INI_BYTES + 1);
    if (!st)
        st = read_all(&f, fd);
    close(fd);
    if (!st)
        st = parse(&f, credentials);
    return take(&f, st, out);
}

void s3_ini_free(struct s3_ini *f)
{
    if (f->text)
        explicit_bzero(f->text, f->bytes);
    mem_free(f->text);
    mem_free(f->entry);
    mem_free(f->path);
    *f = (struct s3_ini){ 0 };
}

static bool same(const char *a, const char *b)
{
    return a == b || (a && b && strcmp(a, b) == 0);
}

const struct s3_entry *s3_ini_find(const struct s3_ini *f, enum s3_section kind, const char *section, const char *group,
                                   const char *name)
{
    for (size_t i = f->count; i-- > 0;) {
        const struct s3_entry *e = &f->entry[i];
        if (e->kind == kind && same(e->section, section) && same(e->group, group) && same(e->name, name))
            return e;
    }
    return NULL;
}

/* ---- Both files */

/* The variable's path, else ~/.aws/NAME; "~/" is HOME in both. *out NULL: HOME is not set. */
static status *find_file(const char *variable, const char *name, char **out)
{
    const char *set = getenv(variable), *home = getenv("HOME");
    char path[4096];
    int n;
    if (set && *set && strncmp(set, "~/", 2) != 0)
        n = snprintf(path, sizeof path, "%s", set);
    else if (!home || !*home)
        return NULL;
    else if (set && *set)
        n = snprintf(path, sizeof path, "%s/%s", home, set + 2);
    else
        n = snprintf(path, sizeof path, "%s/.aws/%s", home, name);
    if (n < 0 || (size_t)n >= sizeof path)
        return ERR(INVALID, "%s: the path has more than %zu bytes", variable, sizeof path - 1);
    *out = mem_strdup(path);
    return *out ? NULL : ERR(NO_MEMORY, "%s", path);
}

static status *read_file(const char *variable, const char *name, bool credentials, struct s3_ini *out)
{
    char *path = NULL;
    TRY(find_file(variable, name, &path));
    status *st = s3_ini_read(path, credentials, out);
    mem_free(path);
    return st;
}

status *s3_files_read(struct s3_files *out)
{
    struct s3_files f = { 0 };
    status *st = read_file("AWS_CONFIG_FILE", "config", false, &f.config);
    if (!st)
        st = read_file("AWS_SHARED_CREDENTIALS_FILE", "credentials", true, &f.credentials);
    if (st)
        s3_files_free(&f);
    else
        *out = f;
    return st;
}

void s3_files_free(struct s3_files *f)
{
    s3_ini_free(&f->config);
    s3_ini_free(&f->credentials);
}

status *s3_entry_value(const struct s3_ini *f, const struct s3_entry *e, struct s3_value *out)
{
    *out = (struct s3_value){ 0 };
    if (!e)
        return NULL;
    if (e->more)
        return ERR(INVALID, "%s:%d: %s takes one line, and an indented one follows it", f->path, e->line, e->name);
    if (*e->value)
        *out = (struct s3_value){ e->value, f->path, e->line };
    return NULL;
}

status *s3_files_value(const struct s3_files *f, const char *profile, const char *group, const char *name,
                       struct s3_value *out)
{
    TRY(s3_entry_value(&f->credentials, s3_ini_find(&f->credentials, S3_PROFILE, profile, group, name), out));
    return out->text ? NULL
                     : s3_entry_value(&f->config, s3_ini_find(&f->config, S3_PROFILE, profile, group, name), out);
}
