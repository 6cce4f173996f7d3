/* s3_xml: read walk_from: one pass over the bytes, a stack of names as one path, and the text of the innermost element.
 *
 * Invariant: whatever is not understood is an error, except foreign elements, which are walked and ignored, and foreign
 * character references below 0x20 (keys of others may hold them), which become '?'. */
#include "storage/s3_xml.h"

#include "comm/base/mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct walk {
    const char *p, *end, *begin;
    const struct s3_xml_sink *sink;
    char path[S3_XML_PATH_BYTES];
    size_t path_bytes, depth;
    size_t start[S3_XML_DEPTH]; /* of each name in path */
    bool has_child[S3_XML_DEPTH];
    bool had_root;
    char text[S3_XML_TEXT_BYTES];
    size_t text_bytes;
};

static status *bad(const struct walk *w, const char *what)
{
    return ERR(CORRUPT, "an XML reply: %s at byte %zu", what, (size_t)(w->p - w->begin));
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static bool is_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.' || c == ':';
}

static bool begins(const struct walk *w, const char *word)
{
    size_t n = strlen(word);
    return (size_t)(w->end - w->p) >= n && memcmp(w->p, word, n) == 0;
}

/* Past the next `word`. */
static bool skip_past(struct walk *w, const char *word)
{
    for (; w->p < w->end; w->p++)
        if (begins(w, word)) {
            w->p += strlen(word);
            return true;
        }
    return false;
}

/* ---- Text */

static status *add_char(struct walk *w, char c)
{
    if (w->text_bytes + 1 >= sizeof w->text)
        return bad(w, "a text that is too long");
    w->text[w->text_bytes++] = c;
    return NULL;
}

static status *add_utf8(struct walk *w, uint32_t c)
{
    if (c < 0x80)
        return add_char(w, (char)c);
    if (c < 0x800) {
        TRY(add_char(w, (char)(0xc0 | c >> 6)));
    } else {
        if (c < 0x10000) {
            TRY(add_char(w, (char)(0xe0 | c >> 12)));
        } else {
            TRY(add_char(w, (char)(0xf0 | c >> 18)));
            TRY(add_char(w, (char)(0x80 | (c >> 12 & 0x3f))));
        }
        TRY(add_char(w, (char)(0x80 | (c >> 6 & 0x3f))));
    }
    return add_char(w, (char)(0x80 | (c & 0x3f)));
}

static int digit_of(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : 99;
}

/* p is behind "&#". */
static status *add_number(struct walk *w)
{
    int base = 10;
    uint32_t c = 0;
    if (w->p < w->end && *w->p == 'x') {
        base = 16;
        w->p++;
    }
    const char *first = w->p;
    for (; w->p < w->end && digit_of(*w->p) < base; w->p++) {
        c = c * (uint32_t)base + (uint32_t)digit_of(*w->p);
        if (c > 0x10ffff)
            return bad(w, "a character reference beyond Unicode");
    }
    if (w->p == first || w->p == w->end || *w->p != ';')
        return bad(w, "a broken character reference");
    w->p++;
    return add_utf8(w, c < 0x20 && c != '\t' && c != '\n' && c != '\r' ? '?' : c);
}

static status *add_reference(struct walk *w)
{
    static const struct {
        const char *name;
        char c;
    } known[] = { { "&lt;", '<' }, { "&gt;", '>' }, { "&amp;", '&' }, { "&quot;", '"' }, { "&apos;", '\'' } };
    if (begins(w, "&#")) {
        w->p += 2;
        return add_number(w);
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (begins(w, known[i].name)) {
            w->p += strlen(known[i].name);
            return add_char(w, known[i].c);
        }
    return bad(w, "an unknown character reference");
}

static status *add_byte(struct walk *w)
{
    char c = *w->p++;
    if (c == 0)
        return bad(w, "a NUL");
    if (!w->depth)
        return is_blank(c) ? NULL : bad(w, "text outside the root element");
    return add_char(w, c);
}

static status *add_cdata(struct walk *w)
{
    w->p += strlen("<![CDATA[");
    if (!w->depth)
        return bad(w, "CDATA outside the root element");
    while (w->p < w->end && !begins(w, "]]>"))
        TRY(add_byte(w));
    return skip_past(w, "]]>") ? NULL : bad(w, "CDATA without an end");
}

/* ---- Elements */

/* The name at p, without its prefix, in *name and *n. */
static bool take_name(struct walk *w, const char **name, size_t *n)
{
    const char *first = w->p;
    while (w->p < w->end && is_name(*w->p))
        w->p++;
    const char *last = w->p;
    for (const char *c = first; c < last; c++)
        if (*c == ':')
            first = c + 1;
    *name = first;
    *n = (size_t)(last - first);
    return *n > 0;
}

static status *enter(struct walk *w, const char *name, size_t n)
{
    if (w->depth == S3_XML_DEPTH)
        return bad(w, "elements too deep in one another");
    if (!w->depth && w->had_root)
        return bad(w, "a second root element");
    if (w->path_bytes + n + 2 > sizeof w->path)
        return bad(w, "names of elements that are too long");
    if (w->depth) {
        w->has_child[w->depth - 1] = true;
        w->path[w->path_bytes++] = '/';
    }
    w->start[w->depth] = w->path_bytes;
    w->has_child[w->depth++] = false;
    memcpy(w->path + w->path_bytes, name, n);
    w->path_bytes += n;
    w->path[w->path_bytes] = 0;
    w->had_root = true;
    w->text_bytes = 0;
    return NULL;
}

static status *leave(struct walk *w)
{
    bool leaf = !w->has_child[w->depth - 1];
    w->text[w->text_bytes] = 0;
    if (leaf)
        TRY(w->sink->leaf(w->sink->arg, w->path, w->text));
    else if (w->sink->leave)
        TRY(w->sink->leave(w->sink->arg, w->path));
    w->text_bytes = 0;
    w->path_bytes = w->start[--w->depth];
    w->path_bytes -= w->depth ? 1 : 0;
    w->path[w->path_bytes] = 0;
    return NULL;
}

/* Up to the '>' of a tag; *closed: it was "/>". */
static status *skip_attributes(struct walk *w, bool *closed)
{
    char quote = 0;
    for (; w->p < w->end; w->p++) {
        char c = *w->p;
        if (quote) {
            quote = c == quote ? 0 : quote;
        } else if (c == '"' || c == '\'') {
            quote = c;
        } else if (c == '<') {
            break;
        } else if (c == '>') {
            *closed = w->p[-1] == '/';
            w->p++;
            return NULL;
        }
    }
    return bad(w, "a tag without an end");
}

static status *open_tag(struct walk *w)
{
    const char *name;
    size_t n;
    bool closed;
    w->p++;
    if (!take_name(w, &name, &n))
        return bad(w, "a tag without a name");
    if (w->p < w->end && !is_blank(*w->p) && *w->p != '>' && *w->p != '/')
        return bad(w, "a broken tag");
    TRY(skip_attributes(w, &closed));
    TRY(enter(w, name, n));
    return closed ? leave(w) : NULL;
}

static status *close_tag(struct walk *w)
{
    const char *name;
    size_t n;
    w->p += 2;
    if (!w->depth || !take_name(w, &name, &n))
        return bad(w, "an end tag that ends nothing");
    const char *open = w->path + w->start[w->depth - 1];
    if (strlen(open) != n || memcmp(open, name, n) != 0)
        return bad(w, "an end tag of another element");
    while (w->p < w->end && is_blank(*w->p))
        w->p++;
    if (w->p == w->end || *w->p != '>')
        return bad(w, "a tag without an end");
    w->p++;
    return leave(w);
}

static status *step(struct walk *w)
{
    if (*w->p == '&' && w->depth)
        return add_reference(w);
    if (*w->p != '<')
        return add_byte(w);
    if (begins(w, "<?"))
        return skip_past(w, "?>") ? NULL : bad(w, "a processing instruction without an end");
    if (begins(w, "<!--"))
        return skip_past(w, "-->") ? NULL : bad(w, "a comment without an end");
    if (begins(w, "<![CDATA["))
        return add_cdata(w);
    if (begins(w, "<!"))
        return bad(w, "a document type");
    return begins(w, "</") ? close_tag(w) : open_tag(w);
}

status *s3_xml_walk(const char *text, size_t n, const struct s3_xml_sink *sink)
{
    struct walk w = { .p = text, .begin = text, .end = text + n, .sink = sink };
    while (w.p < w.end)
        TRY(step(&w));
    if (w.depth || !w.had_root)
        return bad(&w, w.depth ? "the end, inside an element" : "no element");
    return NULL;
}

/* ---- Errors */

/* What follows `root` and '/' in path, or "". */
static const char *below(const char *path, const char *root)
{
    size_t n = strlen(root);
    return strncmp(path, root, n) == 0 && path[n] == '/' ? path + n + 1 : "";
}

/* Printable, and cut where it does not fit. */
static void keep(char *out, size_t size, const char *text)
{
    size_t n = 0;
    for (; *text && n + 1 < size; text++)
        if ((unsigned char)*text >= ' ' && *text != 0x7f)
            out[n++] = *text;
    out[n] = 0;
}

struct fault_walk {
    struct s3_fault *out;
    bool is_error;
};

static void keep_fault(struct s3_fault *f, const char *field, const char *text)
{
    if (strcmp(field, "Code") == 0)
        keep(f->code, sizeof f->code, text);
    else if (strcmp(field, "Message") == 0)
        keep(f->message, sizeof f->message, text);
    else if (strcmp(field, "Region") == 0)
        keep(f->region, sizeof f->region, text);
    else if (strcmp(field, "Endpoint") == 0)
        keep(f->endpoint, sizeof f->endpoint, text);
}

static status *fault_leaf(void *arg, const char *path, const char *text)
{
    struct fault_walk *k = arg;
    k->is_error = k->is_error || strncmp(path, "Error", 5) == 0;
    keep_fault(k->out, below(path, "Error"), text);
    return NULL;
}

bool s3_xml_fault(const char *text, size_t n, struct s3_fault *out)
{
    *out = (struct s3_fault){ 0 };
    struct fault_walk k = { .out = out };
    const struct s3_xml_sink sink = { .arg = &k, .leaf = fault_leaf };
    status *st = text ? s3_xml_walk(text, n, &sink) : NULL;
    status_free(st); /* no such document: no fault's */
    if (k.is_error && out->code[0])
        return true;
    *out = (struct s3_fault){ 0 };
    return false;
}

/* ---- Pages */

struct page_walk {
    status *(*found)(void *arg, const struct s3_found *f);
    void *arg;
    struct s3_page *page;
    char key[S3_XML_TEXT_BYTES], upload[1024];
    struct s3_found f;
    bool has_key, is_page;
};

static status *number(const char *text, uint64_t *out)
{
    char *end;
    unsigned long long v = *text >= '0' && *text <= '9' ? strtoull(text, &end, 10) : 0;
    if (*text < '0' || *text > '9' || *end || strlen(text) > 19)
        return ERR(CORRUPT, "an XML reply: \"%.40s\" is no size", text);
    *out = v;
    return NULL;
}

bool s3_xml_time(const char *text, uint64_t *ns)
{
    struct tm tm = { 0 };
    int used = 0;
    if (strlen(text) > 40 ||
        sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d%n", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &tm.tm_hour, &tm.tm_min,
               &tm.tm_sec, &used) != 6 ||
        tm.tm_year < 1970 || tm.tm_year > 2500 || tm.tm_mon < 1 || tm.tm_mon > 12 || tm.tm_mday < 1 ||
        tm.tm_mday > 31 || tm.tm_hour < 0 || tm.tm_hour > 23 || tm.tm_min < 0 || tm.tm_min > 59 || tm.tm_sec < 0 ||
        tm.tm_sec > 60)
        return false;
    uint64_t part = 0, unit = 100000000;
    text += used;
    if (*text == '.')
        for (text++; *text >= '0' && *text <= '9'; text++, unit /= 10)
            part += unit * (uint64_t)(*text - '0');
    if (strcmp(text, "Z") != 0 && strcmp(text, "+00:00") != 0 && *text)
        return false;
    tm.tm_year -= 1900;
    tm.tm_mon--;
    time_t t = timegm(&tm);
    if (t < 0)
        return false;
    *ns = (uint64_t)t * 1000000000u + part;
    return true;
}

static status *keep_whole(char *out, size_t size, const char *text)
{
    if (strlen(text) >= size)
        return ERR(CORRUPT, "an XML reply: \"%.40s...\" is too long", text);
    memcpy(out, text, strlen(text) + 1);
    return NULL;
}

static status *item_leaf(struct page_walk *k, const char *field, const char *text)
{
    if (strcmp(field, "Key") == 0 || strcmp(field, "Prefix") == 0) {
        k->has_key = true;
        return keep_whole(k->key, sizeof k->key, text);
    }
    if (strcmp(field, "UploadId") == 0)
        return keep_whole(k->upload, sizeof k->upload, text);
    if (strcmp(field, "Size") == 0)
        return number(text, &k->f.bytes);
    if (strcmp(field, "LastModified") == 0 && !s3_xml_time(text, &k->f.mtime_ns))
        return ERR(CORRUPT, "an XML reply: \"%.40s\" is no time", text);
    return NULL;
}

/* The name of the list's items if path is inside one: *field is then what follows. */
static bool in_item(const char *rest, const char **field)
{
    static const char *const items[] = { "Contents", "CommonPrefixes", "Upload" };
    for (size_t i = 0; i < sizeof items / sizeof *items; i++) {
        *field = below(rest, items[i]);
        if (**field)
            return true;
    }
    return false;
}

static const char *below_page(const char *path)
{
    const char *rest = below(path, "ListBucketResult");
    return *rest ? rest : below(path, "ListMultipartUploadsResult");
}

static status *page_leaf(void *arg, const char *path, const char *text)
{
    struct page_walk *k = arg;
    const char *rest = below_page(path), *field;
    k->is_page =
        k->is_page || *rest || strcmp(path, "ListBucketResult") == 0 || strcmp(path, "ListMultipartUploadsResult") == 0;
    if (in_item(rest, &field))
        return item_leaf(k, field, text);
    if (strcmp(rest, "IsTruncated") == 0)
        k->page->truncated = strcmp(text, "true") == 0;
    else if (strcmp(rest, "NextContinuationToken") == 0 || strcmp(rest, "NextKeyMarker") == 0)
        return keep_whole(k->page->next, sizeof k->page->next, text);
    else if (strcmp(rest, "NextUploadIdMarker") == 0)
        return keep_whole(k->page->next_upload, sizeof k->page->next_upload, text);
    return NULL;
}

static status *page_leave(void *arg, const char *path)
{
    struct page_walk *k = arg;
    const char *rest = below_page(path);
    bool is_prefix = strcmp(rest, "CommonPrefixes") == 0, is_upload = strcmp(rest, "Upload") == 0;
    if (!is_prefix && !is_upload && strcmp(rest, "Contents") != 0)
        return NULL;
    status *st = NULL;
    if (!k->has_key || (is_upload && !k->upload[0]))
        st = ERR(CORRUPT, "an XML reply: an entry without a key");
    k->f.key = k->key;
    k->f.upload_id = is_upload ? k->upload : NULL;
    k->f.is_prefix = is_prefix;
    if (!st)
        st = k->found(k->arg, &k->f);
    k->page->found++;
    k->f = (struct s3_found){ 0 };
    k->has_key = false;
    k->upload[0] = 0;
    return st;
}

status *s3_xml_page(const char *text, size_t n, status *(*found)(void *arg, const struct s3_found *f), void *arg,
                    struct s3_page *out)
{
    *out = (struct s3_page){ 0 };
    struct page_walk k = { .found = found, .arg = arg, .page = out };
    const struct s3_xml_sink sink = { .arg = &k, .leaf = page_leaf, .leave = page_leave };
    TRY(s3_xml_walk(text, n, &sink));
    if (!k.is_page)
        return ERR(CORRUPT, "an XML reply: not the list that was asked for");
    if (out->truncated && !out->next[0])
        return ERR(CORRUPT, "an XML reply: a list that goes on, but does not say where");
    return NULL;
}

/* ---- Uploads and deletions */

struct id_walk {
    char *id;
    size_t size;
};

static status *id_leaf(void *arg, const char *path, const char *text)
{
    const struct id_walk *k = arg;
    return strcmp(path, "InitiateMultipartUploadResult/UploadId") == 0 ? keep_whole(k->id, k->size, text) : NULL;
}

status *s3_xml_upload_id(const char *text, size_t n, char *id, size_t size)
{
    struct id_walk k = { id, size };
    const struct s3_xml_sink sink = { .arg = &k, .leaf = id_leaf };
    id[0] = 0;
    TRY(s3_xml_walk(text, n, &sink));
    return id[0] ? NULL : ERR(CORRUPT, "an XML reply: an upload without an id");
}

struct delete_walk {
    char *key;
    size_t size;
    struct s3_fault *first;
    char this_key[S3_XML_TEXT_BYTES];
    struct s3_fault this_fault;
    bool is_result;
};

static status *delete_leaf(void *arg, const char *path, const char *text)
{
    struct delete_walk *k = arg;
    const char *field = below(path, "DeleteResult/Error");
    k->is_result = k->is_result || strncmp(path, "DeleteResult", strlen("DeleteResult")) == 0;
    keep_fault(&k->this_fault, field, text);
    return strcmp(field, "Key") == 0 ? keep_whole(k->this_key, sizeof k->this_key, text) : NULL;
}

static status *delete_leave(void *arg, const char *path)
{
    struct delete_walk *k = arg;
    if (strcmp(path, "DeleteResult/Error") != 0)
        return NULL;
    if (!k->key[0] && strcmp(k->this_fault.code, "NoSuchKey") != 0) {
        keep(k->key, k->size, k->this_key[0] ? k->this_key : "?");
        *k->first = k->this_fault;
    }
    k->this_key[0] = 0;
    k->this_fault = (struct s3_fault){ 0 };
    return NULL;
}

status *s3_xml_deleted(const char *text, size_t n, char *key, size_t size, struct s3_fault *why)
{
    struct delete_walk k = { .key = key, .size = size, .first = why };
    const struct s3_xml_sink sink = { .arg = &k, .leaf = delete_leaf, .leave = delete_leave };
    key[0] = 0;
    *why = (struct s3_fault){ 0 };
    TRY(s3_xml_walk(text, n, &sink));
    return k.is_result ? NULL : ERR(CORRUPT, "an XML reply: not the result of a deletion");
}

/* ---- Writing */

static bool make_room(struct s3_text *t, size_t n)
{
    if (t->failed || t->room - t->bytes > n)
        return !t->failed;
    size_t room = t->room ? t->room : 1024;
    while (room - t->bytes <= n)
        room *= 2;
    char *more = mem_realloc(t->text, room);
    if (!more) {
        t->failed = true;
        return false;
    }
    t->text = more;
    t->room = room;
    return true;
}

void s3_text_add(struct s3_text *t, const char *fmt, ...)
{
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    if (n >= 0 && make_room(t, (size_t)n)) {
        vsnprintf(t->text + t->bytes, t->room - t->bytes, fmt, again);
        t->bytes += (size_t)n;
    }
    t->failed = t->failed || n < 0;
    va_end(again);
    va_end(args);
}

void s3_text_escaped(struct s3_text *t, const char *raw)
{
    for (; *raw; raw++) {
        const char *as = *raw == '&'    ? "&amp;"
                         : *raw == '<'  ? "&lt;"
                         : *raw == '>'  ? "&gt;"
                         : *raw == '"'  ? "&quot;"
                         : *raw == '\'' ? "&apos;"
                                        : NULL;
        if (as)
            s3_text_add(t, "%s", as);
        else
            s3_text_add(t, "%c", *raw);
    }
}
