/* s3_list: read s3_list: pages until the server says that there are no more. */
#include "storage/s3_list.h"

#include "comm/base/mem.h"

#include <stdio.h>
#include <string.h>

enum { DELETE_KEYS = 1000 };

status *s3_date(const struct http_reply *r, uint64_t *ns)
{
    char date[64];
    uint64_t seconds;
    if (!http_header(r, "date", date, sizeof date) || !http_date(date, &seconds))
        return ERR(IO, "the server's reply has no Date");
    *ns = seconds * 1000000000u;
    return NULL;
}

/* ---- Pages */

struct page_of {
    const struct s3_listing *l;
    char root[S3_KEY_BYTES]; /* prefix of the URL with its '/' */
};

/* Keys of others may be anything; those that do not begin as asked for are a server's mistake and no one's entry. */
static status *found(void *arg, const struct s3_found *f)
{
    const struct page_of *p = arg;
    size_t n = strlen(p->root);
    if (!p->l->found || strncmp(f->key, p->root, n) != 0)
        return NULL;
    return p->l->found(p->l->arg, f->key + n, f);
}

static status *get_page(struct s3 *s, const struct s3_call *c, struct page_of *p, struct s3_page *page, uint64_t *ns)
{
    struct http_reply r;
    status *st = s3_send(s, c, &r);
    if (!st)
        st = s3_xml_page(r.text ? r.text : "", r.text_bytes, found, p, page);
    if (!st && ns)
        st = s3_date(&r, ns);
    http_reply_free(&r);
    return status_wrap(st, "list s3://%s/%s%s", s->config.bucket, p->root, p->l->prefix);
}

static void objects_page(const struct s3_listing *l, const char *prefix, const char *most, const struct s3_page *last,
                         struct s3_call *c)
{
    size_t n = 0;
    c->param[n++] = (struct s3_param){ "list-type", "2" };
    c->param[n++] = (struct s3_param){ "prefix", prefix };
    c->param[n++] = (struct s3_param){ "max-keys", most };
    if (!l->flat)
        c->param[n++] = (struct s3_param){ "delimiter", "/" };
    if (last->truncated)
        c->param[n++] = (struct s3_param){ "continuation-token", last->next };
}

static void uploads_page(const char *prefix, const char *most, const struct s3_page *last, struct s3_call *c)
{
    size_t n = 0;
    c->param[n++] = (struct s3_param){ "uploads", "" };
    c->param[n++] = (struct s3_param){ "prefix", prefix };
    c->param[n++] = (struct s3_param){ "max-uploads", most };
    if (last->truncated) {
        c->param[n++] = (struct s3_param){ "key-marker", last->next };
        c->param[n++] = (struct s3_param){ "upload-id-marker", last->next_upload };
    }
}

status *s3_list(struct s3 *s, const struct s3_listing *l, uint64_t *server_ns)
{
    char prefix[S3_KEY_BYTES], most[16];
    struct page_of p = { .l = l };
    struct s3_page *page = mem_calloc(2, sizeof *page); /* the one before, the next */
    status *st = page ? NULL : ERR(NO_MEMORY, "a list");
    if (!st && s->config.prefix[0])
        st = s3_config_object(&s->config, "", p.root, sizeof p.root);
    if (!st && snprintf(prefix, sizeof prefix, "%s%s", p.root, l->prefix) >= (int)sizeof prefix)
        st = ERR(INVALID, "prefix %.60s...: too long", l->prefix);
    snprintf(most, sizeof most, "%u", l->most ? (unsigned)l->most : 1000u);
    while (!st) {
        struct s3_call c = { .method = "GET" };
        if (l->uploads)
            uploads_page(prefix, most, &page[0], &c);
        else
            objects_page(l, prefix, most, &page[0], &c);
        st = get_page(s, &c, &p, &page[1], server_ns);
        if (!st && page[1].truncated && strcmp(page[0].next, page[1].next) == 0 &&
            strcmp(page[0].next_upload, page[1].next_upload) == 0)
            st = ERR(IO, "list s3://%s/%s: the server sends the same page again", s->config.bucket, prefix);
        page[0] = page[1];
        if (!page[1].truncated || l->most)
            break;
    }
    mem_free(page);
    return st;
}

static status *count_one(void *arg, const char *key, const struct s3_found *f)
{
    (void)key, (void)f;
    *(bool *)arg = true;
    return NULL;
}

status *s3_any_below(struct s3 *s, const char *prefix, bool *yes)
{
    *yes = false;
    const struct s3_listing l = { .prefix = prefix, .flat = true, .most = 1, .found = count_one, .arg = yes };
    return s3_list(s, &l, NULL);
}

/* ---- Removal */

struct removal {
    struct s3 *s;
    struct s3_text text;
    size_t keys;
};

static status *send_removal(struct removal *k)
{
    char md5[S3_MD5_TEXT_BYTES], key[S3_KEY_BYTES];
    if (!k->keys)
        return NULL;
    s3_text_add(&k->text, "</Delete>");
    if (k->text.failed)
        return ERR(NO_MEMORY, "a list of %zu keys", k->keys);
    TRY(s3_md5(k->text.text, k->text.bytes, md5));
    const struct http_piece body = { k->text.text, k->text.bytes };
    const struct s3_call c = { .method = "POST",
                               .param = { { "delete", "" } },
                               .header = { { "content-md5", md5 } },
                               .body = &body,
                               .pieces = 1 };
    struct http_reply r;
    struct s3_fault why;
    status *st = s3_send(k->s, &c, &r);
    if (!st)
        st = s3_xml_deleted(r.text ? r.text : "", r.text_bytes, key, sizeof key, &why);
    if (!st && key[0])
        st = ERR(IO, "s3://%s/%s could not be removed: %s%s%s", k->s->config.bucket, key, why.code,
                 why.message[0] ? ": " : "", why.message);
    http_reply_free(&r);
    k->keys = 0;
    k->text.bytes = 0;
    return st;
}

static status *remove_one(void *arg, const char *key, const struct s3_found *f)
{
    struct removal *k = arg;
    (void)key;
    if (!k->keys)
        s3_text_add(&k->text, "<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>true</Quiet>");
    s3_text_add(&k->text, "<Object><Key>");
    s3_text_escaped(&k->text, f->key);
    s3_text_add(&k->text, "</Key></Object>");
    return ++k->keys == DELETE_KEYS ? send_removal(k) : NULL;
}

status *s3_remove_below(struct s3 *s, const char *prefix)
{
    struct removal k = { .s = s };
    const struct s3_listing l = { .prefix = prefix, .flat = true, .found = remove_one, .arg = &k };
    status *st = s3_list(s, &l, NULL);
    if (!st)
        st = send_removal(&k);
    mem_free(k.text.text);
    return st;
}
