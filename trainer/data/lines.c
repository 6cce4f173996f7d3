/* lines: see lines.h. */
#include "trainer/data/lines.h"

#include "comm/base/mem.h"

#include <errno.h>
#include <string.h>

status *lines_open(struct lines *l, const char *path)
{
    *l = (struct lines){ .path = path };
    l->file = fopen(path, "re");
    if (!l->file)
        return ERR_SYS(errno, "%s: cannot open", path);
    return NULL;
}

void lines_close(struct lines *l)
{
    if (l->file)
        (void)fclose(l->file); /* it was only read */
    mem_free(l->text);
    *l = (struct lines){ 0 };
}

static status *push(struct lines *l, char c)
{
    if (l->n == l->cap) {
        if (l->cap >= LINE_BYTES)
            return ERR(INVALID, "%s:%llu: the line is longer than %d bytes", l->path, (unsigned long long)l->number,
                       (int)LINE_BYTES);
        size_t cap = l->cap ? 2 * l->cap : 4096;
        char *text = mem_realloc(l->text, cap);
        if (!text)
            return ERR(NO_MEMORY, "%s:%llu: a line of %zu bytes", l->path, (unsigned long long)l->number, cap);
        l->text = text;
        l->cap = cap;
    }
    l->text[l->n++] = c;
    return NULL;
}

/* One line, blank or not. *more: there was one, if only an unfinished one. */
static status *read_line(struct lines *l, bool *more)
{
    int c;
    l->n = 0;
    l->number++;
    while ((c = getc_unlocked(l->file)) != EOF && c != '\n')
        TRY(push(l, (char)c));
    if (c == EOF && ferror(l->file))
        return ERR_SYS(errno, "%s:%llu: cannot read", l->path, (unsigned long long)l->number);
    *more = c != EOF || l->n > 0;
    return NULL;
}

static bool is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r')
            return false;
    return true;
}

status *lines_next(struct lines *l, bool *more)
{
    static const char mark[] = { '\xef', '\xbb', '\xbf' };
    do {
        TRY(read_line(l, more));
        if (l->number == 1 && l->n >= sizeof mark && !memcmp(l->text, mark, sizeof mark)) {
            l->n -= sizeof mark;
            memmove(l->text, l->text + sizeof mark, l->n);
        }
    } while (*more && is_blank(l->text, l->n));
    return NULL;
}
