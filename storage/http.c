/* http: read http_do: a request is one or two transfers of libcurl's multi interface, driven by the thread that asks.
 *
 * Invariants: (1) a slot (a multi handle with its connections, and two easy handles) belongs to one request at a time;
 * (2) when http_do returns, libcurl holds no pointer into the request any more. */
#include "storage/http.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <curl/curl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { POLL_MS = 100, UPLOAD_BUFFER = 512 << 10, RECEIVE_BUFFER = 256 << 10 };

struct slot {
    struct slot *next;
    CURLM *multi;
    CURL *easy[2];
};

struct http {
    char *ca_file;
    uint32_t connect_ms;
    struct {
        pthread_mutex_t lock;
        struct slot *idle; /* the one used last first: its connection lives */
    } synced;
};

/* One sending of a request. */
struct transfer {
    const struct http_request *q;
    CURL *easy;
    struct curl_slist *list;
    struct http_reply reply;
    size_t piece, sent; /* of the body: what is to be sent next */
    size_t text_room;
    size_t again; /* bytes of the body that libcurl gives once more after a pause */
    bool paused;  /* it holds back what there was no room for */
    bool over, overflow, no_memory;
    CURLcode code;
    char words[CURL_ERROR_SIZE];
};

/* A reply whose body goes on. */
struct http_rest {
    struct slot *slot;
    struct transfer *t;    /* [2], of which the first is under way */
    struct http_request q; /* its method, limits, and where the next bytes go */
    char url[];
};

/* ---- Clients and slots */

status *http_open(const struct http_options *o, struct http **out)
{
    /* Counted and, since 7.84, safe from any thread. */
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
        return ERR(INTERNAL, "libcurl could not be initialised");
    struct http *h = mem_calloc(1, sizeof *h);
    char *ca = o->ca_file ? mem_strdup(o->ca_file) : NULL;
    if (!h || (o->ca_file && !ca)) {
        mem_free(h);
        mem_free(ca);
        curl_global_cleanup();
        return ERR(NO_MEMORY, "an HTTP client");
    }
    h->ca_file = ca;
    h->connect_ms = o->connect_ms;
    pthread_mutex_init(&h->synced.lock, NULL);
    *out = h;
    return NULL;
}

static void slot_free(struct slot *s)
{
    if (!s)
        return;
    for (int i = 0; i < 2; i++)
        curl_easy_cleanup(s->easy[i]);
    curl_multi_cleanup(s->multi);
    mem_free(s);
}

void http_close(struct http *h)
{
    if (!h)
        return;
    while (h->synced.idle) {
        struct slot *s = h->synced.idle;
        h->synced.idle = s->next;
        slot_free(s);
    }
    pthread_mutex_destroy(&h->synced.lock);
    mem_free(h->ca_file);
    mem_free(h);
    curl_global_cleanup();
}

static struct slot *slot_take(struct http *h)
{
    pthread_mutex_lock(&h->synced.lock);
    struct slot *s = h->synced.idle;
    if (s)
        h->synced.idle = s->next;
    pthread_mutex_unlock(&h->synced.lock);
    if (s)
        return s;
    s = mem_calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->multi = curl_multi_init();
    s->easy[0] = curl_easy_init();
    s->easy[1] = curl_easy_init();
    if (!s->multi || !s->easy[0] || !s->easy[1]) {
        slot_free(s);
        return NULL;
    }
    return s;
}

static void slot_give(struct http *h, struct slot *s)
{
    pthread_mutex_lock(&h->synced.lock);
    s->next = h->synced.idle;
    h->synced.idle = s;
    pthread_mutex_unlock(&h->synced.lock);
}

/* ---- Headers and dates */

static char lower(char c)
{
    return (char)(c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c);
}

static bool name_char(char c)
{
    return c > ' ' && c < 0x7f && !strchr("()<>@,;:\\\"/[]?={}", c);
}

bool http_header_add(char have[HTTP_HEADER_BYTES + 1], const char *line, size_t n)
{
    size_t name = 0, used = strlen(have);
    while (name < n && name_char(line[name]))
        name++;
    if (name == 0 || name == n || line[name] != ':')
        return false;
    size_t begin = name + 1, end = n;
    while (end > begin && strchr(" \t\r\n", line[end - 1]) && line[end - 1])
        end--;
    while (begin < end && (line[begin] == ' ' || line[begin] == '\t'))
        begin++;
    for (size_t i = begin; i < end; i++)
        if (((unsigned char)line[i] < ' ' && line[i] != '\t') || line[i] == 0x7f)
            return false;
    if (name + 2 + (end - begin) + 1 > HTTP_HEADER_BYTES - used)
        return false;
    for (size_t i = 0; i < name; i++)
        have[used++] = lower(line[i]);
    have[used++] = ':';
    have[used++] = ' ';
    memcpy(have + used, line + begin, end - begin);
    used += end - begin;
    have[used++] = '\n';
    have[used] = 0;
    return true;
}

bool http_header(const struct http_reply *r, const char *name, char *buf, size_t size)
{
    size_t n = strlen(name);
    buf[0] = 0;
    for (const char *p = r->header; *p;) {
        const char *end = strchr(p, '\n');
        size_t line = end ? (size_t)(end - p) : strlen(p);
        if (line >= n + 2 && memcmp(p, name, n) == 0 && p[n] == ':') {
            size_t bytes = line - n - 2;
            if (bytes >= size)
                return false;
            memcpy(buf, p + n + 2, bytes);
            buf[bytes] = 0;
            return true;
        }
        p += end ? line + 1 : line;
    }
    return false;
}

bool http_date(const char *text, uint64_t *seconds)
{
    time_t t = curl_getdate(text, NULL);
    if (t < 0)
        return false;
    *seconds = (uint64_t)t;
    return true;
}

/* ---- libcurl's callbacks */

static size_t on_read(char *out, size_t size, size_t count, void *arg)
{
    struct transfer *t = arg;
    size_t room = size * count, done = 0;
    while (done < room && t->piece < t->q->pieces) {
        const struct http_piece *p = &t->q->body[t->piece];
        size_t n = p->bytes - t->sent < room - done ? p->bytes - t->sent : room - done;
        if (n)
            memcpy(out + done, (const char *)p->data + t->sent, n);
        done += n;
        t->sent += n;
        if (t->sent == p->bytes) {
            t->piece++;
            t->sent = 0;
        }
    }
    return done;
}

/* A connection that turned out to be dead: libcurl starts again on another. */
static int on_seek(void *arg, curl_off_t offset, int origin)
{
    struct transfer *t = arg;
    if (origin != SEEK_SET || offset != 0)
        return CURL_SEEKFUNC_CANTSEEK;
    t->piece = t->sent = 0;
    return CURL_SEEKFUNC_OK;
}

static size_t on_header(char *line, size_t size, size_t count, void *arg)
{
    struct transfer *t = arg;
    size_t n = size * count;
    if (n >= 5 && memcmp(line, "HTTP/", 5) == 0)
        t->reply.header[0] = 0; /* 100 Continue came before */
    else
        (void)http_header_add(t->reply.header, line, n);
    return n;
}

static bool keep_text(struct transfer *t, const char *data, size_t n)
{
    struct http_reply *r = &t->reply;
    if (n > t->q->text_max - r->text_bytes) {
        t->overflow = true;
        return false;
    }
    size_t need = r->text_bytes + n + 1;
    if (need > t->text_room) {
        size_t room = t->text_room ? t->text_room : 1024;
        while (room < need)
            room *= 2;
        char *more = mem_realloc(r->text, room);
        if (!more) {
            t->no_memory = true;
            return false;
        }
        r->text = more;
        t->text_room = room;
    }
    memcpy(r->text + r->text_bytes, data, n);
    r->text_bytes += n;
    r->text[r->text_bytes] = 0;
    return true;
}

static size_t on_write(char *data, size_t size, size_t count, void *arg)
{
    struct transfer *t = arg;
    size_t n = size * count;
    long code = 0;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &code);
    if (!t->q->into || code < 200 || code > 299)
        return keep_text(t, data, n) ? n : 0;
    size_t known = t->again < n ? t->again : n, left = n - known, room = t->q->room - t->reply.got;
    if (left > room && !t->q->more) {
        t->overflow = true;
        return 0;
    }
    size_t taken = left < room ? left : room;
    if (taken)
        memcpy((char *)t->q->into + t->reply.got, data + known, taken);
    t->reply.got += taken;
    t->again -= known;
    if (taken == left)
        return n;
    t->again = known + taken; /* libcurl keeps all n, and nothing of what came before */
    t->paused = true;
    return CURL_WRITEFUNC_PAUSE;
}

/* ---- Transfers */

static uint64_t body_bytes(const struct http_request *q)
{
    uint64_t n = 0;
    for (size_t i = 0; i < q->pieces; i++)
        n += q->body[i].bytes;
    return n;
}

static void set_method(CURL *e, const struct http_request *q)
{
    bool has_body = strcmp(q->method, "PUT") == 0 || strcmp(q->method, "POST") == 0;
    if (strcmp(q->method, "HEAD") == 0) {
        curl_easy_setopt(e, CURLOPT_NOBODY, 1L);
        return;
    }
    if (has_body) {
        curl_easy_setopt(e, CURLOPT_UPLOAD, 1L);
        curl_easy_setopt(e, CURLOPT_INFILESIZE_LARGE, (curl_off_t)body_bytes(q));
        if (body_bytes(q) > UPLOAD_BUFFER)
            curl_easy_setopt(e, CURLOPT_UPLOAD_BUFFERSIZE, (long)UPLOAD_BUFFER);
    }
    if (q->room > RECEIVE_BUFFER)
        curl_easy_setopt(e, CURLOPT_BUFFERSIZE, (long)RECEIVE_BUFFER);
    curl_easy_setopt(e, CURLOPT_CUSTOMREQUEST, q->method);
}

static bool set_headers(struct transfer *t)
{
    for (size_t i = 0; i < t->q->headers; i++) {
        struct curl_slist *more = curl_slist_append(t->list, t->q->header[i]);
        if (!more)
            return false;
        t->list = more;
    }
    /* A reply to "may I send?" costs a round trip and spares nothing here. */
    struct curl_slist *more = curl_slist_append(t->list, "Expect:");
    t->list = more ? more : t->list;
    return more && curl_easy_setopt(t->easy, CURLOPT_HTTPHEADER, t->list) == CURLE_OK;
}

static status *transfer_begin(struct http *h, struct transfer *t, const struct http_request *q, CURL *e, CURLM *multi)
{
    *t = (struct transfer){ .q = q, .easy = e, .reply = { .length = UINT64_MAX } };
    curl_easy_reset(e);
    curl_easy_setopt(e, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(e, CURLOPT_ERRORBUFFER, t->words);
    curl_easy_setopt(e, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(e, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(e, CURLOPT_CONNECTTIMEOUT_MS, (long)h->connect_ms);
    curl_easy_setopt(e, CURLOPT_TIMEOUT_MS, (long)q->total_ms);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_LIMIT, 1L);
    curl_easy_setopt(e, CURLOPT_LOW_SPEED_TIME, (long)((q->stall_ms + 999) / 1000));
    curl_easy_setopt(e, CURLOPT_PATH_AS_IS, 1L);
    if (h->ca_file)
        curl_easy_setopt(e, CURLOPT_CAINFO, h->ca_file);
    curl_easy_setopt(e, CURLOPT_READFUNCTION, on_read);
    curl_easy_setopt(e, CURLOPT_READDATA, t);
    curl_easy_setopt(e, CURLOPT_SEEKFUNCTION, on_seek);
    curl_easy_setopt(e, CURLOPT_SEEKDATA, t);
    curl_easy_setopt(e, CURLOPT_WRITEFUNCTION, on_write);
    curl_easy_setopt(e, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(e, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(e, CURLOPT_HEADERDATA, t);
    curl_easy_setopt(e, CURLOPT_PRIVATE, t);
    set_method(e, q);
    if (curl_easy_setopt(e, CURLOPT_PROTOCOLS_STR, "http,https") != CURLE_OK ||
        curl_easy_setopt(e, CURLOPT_URL, q->url) != CURLE_OK || !set_headers(t) ||
        curl_multi_add_handle(multi, e) != CURLM_OK)
        return ERR(NO_MEMORY, "a request");
    return NULL;
}

/* Ends it if it is under way; afterwards libcurl knows nothing of it. */
static void transfer_end(struct transfer *t, CURLM *multi)
{
    if (!t->easy)
        return;
    curl_multi_remove_handle(multi, t->easy);
    curl_easy_reset(t->easy);
    curl_slist_free_all(t->list);
    t->list = NULL;
    t->easy = NULL;
}

static void note_head(struct transfer *t)
{
    long http_code = 0;
    curl_off_t length = -1;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &http_code);
    curl_easy_getinfo(t->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &length);
    t->reply.status = (int)http_code;
    t->reply.length = length >= 0 ? (uint64_t)length : UINT64_MAX;
}

static void transfer_over(struct transfer *t, CURLcode code)
{
    note_head(t);
    t->code = code;
    t->over = true;
}

static bool transfer_good(const struct transfer *t)
{
    return t->over && t->code == CURLE_OK && t->reply.status >= 200 && t->reply.status < 300;
}

/* ---- Errors */

/* "PUT http://host/bucket/key": without the query. */
static void describe(const struct http_request *q, char *buf, size_t size)
{
    snprintf(buf, size, "%s %.*s", q->method, (int)strcspn(q->url, "?"), q->url);
}

static status *transfer_status(const struct transfer *t)
{
    char what[600];
    describe(t->q, what, sizeof what);
    const char *words = t->words[0] ? t->words : curl_easy_strerror(t->code);
    if (t->no_memory)
        return ERR(NO_MEMORY, "%s: the reply", what);
    if (t->overflow)
        return ERR(CORRUPT, "%s: the reply is longer than the %zu bytes expected", what,
                   t->q->into ? t->q->room : t->q->text_max);
    switch (t->code) {
    case CURLE_OK:
        return NULL;
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_SSL_CERTPROBLEM:
        return ERR(INVALID, "%s: the server's certificate is not trusted: %s", what, words);
    case CURLE_URL_MALFORMAT:
    case CURLE_UNSUPPORTED_PROTOCOL:
        return ERR(INVALID, "%s: %s", what, words);
    case CURLE_OUT_OF_MEMORY:
        return ERR(NO_MEMORY, "%s", what);
    default:
        return ERR(UNAVAILABLE, "%s: %s", what, words);
    }
}

/* ---- Requests */

static bool is_cancelled(const struct http_request *q)
{
    return q->cancel && atomic_load(q->cancel);
}

static void collect(CURLM *multi)
{
    CURLMsg *m;
    int left;
    while ((m = curl_multi_info_read(multi, &left))) {
        char *t = NULL;
        if (m->msg != CURLMSG_DONE)
            continue;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &t);
        transfer_over((struct transfer *)(void *)t, m->data.result);
    }
}

/* Its body goes on beyond the room there is. */
static bool is_full(const struct transfer *t)
{
    return t->q->more && t->reply.got == t->q->room && !t->over;
}

/* Drives up to two transfers until one is good or full, or all are over. *n: how many were begun. */
static status *drive(struct http *h, const struct http_request *q, struct slot *s, struct transfer t[2], int *n)
{
    uint64_t begin = clock_ns();
    while (!is_full(&t[0])) {
        int running;
        if (curl_multi_perform(s->multi, &running) != CURLM_OK)
            return ERR(INTERNAL, "libcurl: curl_multi_perform failed");
        collect(s->multi);
        bool all_over = t[0].over && (*n == 1 || t[1].over);
        if (all_over || is_full(&t[0]) || transfer_good(&t[0]) || (*n == 2 && transfer_good(&t[1])))
            return NULL;
        if (is_cancelled(q))
            return ERR(CANCELLED, "a request was given up");
        if (*n == 1 && q->hedge && !q->into && q->hedge(q->hedge_arg, clock_ns() - begin)) {
            *n = 2;
            TRY(transfer_begin(h, &t[1], q, s->easy[1], s->multi));
            continue;
        }
        if (curl_multi_poll(s->multi, NULL, 0, POLL_MS, NULL) != CURLM_OK)
            return ERR(INTERNAL, "libcurl: curl_multi_poll failed");
    }
    return NULL;
}

/* t[0] is full: what it needs to go on stays, in r->rest. Takes slot and transfers, unless it fails. */
static status *keep_rest(struct slot *s, struct transfer *t, struct http_reply *r)
{
    const struct http_request *q = t->q;
    size_t n = strlen(q->url) + 1;
    struct http_rest *k = mem_calloc(1, sizeof *k + n);
    if (!k)
        return ERR(NO_MEMORY, "an HTTP connection");
    *k = (struct http_rest){ .slot = s, .t = t, .q = { .method = q->method, .more = true, .cancel = q->cancel } };
    memcpy(k->url, q->url, n);
    k->q.url = k->url;
    t->q = &k->q;
    note_head(t);
    *r = t->reply;
    r->rest = k;
    return NULL;
}

status *http_do(struct http *h, const struct http_request *q, struct http_reply *r)
{
    *r = (struct http_reply){ .length = UINT64_MAX };
    struct slot *s = slot_take(h);
    struct transfer *t = mem_calloc(2, sizeof *t);
    if (!s || !t) {
        if (s)
            slot_give(h, s);
        mem_free(t);
        return ERR(NO_MEMORY, "an HTTP connection");
    }
    int n = 1;
    status *st = transfer_begin(h, &t[0], q, s->easy[0], s->multi);
    if (!st)
        st = drive(h, q, s, t, &n);
    if (!st && is_full(&t[0])) {
        st = keep_rest(s, t, r);
        if (!st)
            return NULL;
    }
    int best = n == 2 && !transfer_good(&t[0]) && (transfer_good(&t[1]) || !t[0].over) ? 1 : 0;
    if (!st)
        st = transfer_status(&t[best]);
    *r = t[best].reply;
    r->hedged = n == 2;
    for (int i = 0; i < n; i++) {
        if (i != best)
            mem_free(t[i].reply.text);
        transfer_end(&t[i], s->multi);
    }
    mem_free(t);
    slot_give(h, s);
    return st;
}

void http_leave(struct http *h, struct http_reply *r)
{
    struct http_rest *k = r->rest;
    if (!k)
        return;
    transfer_end(k->t, k->slot->multi);
    slot_give(h, k->slot);
    mem_free(k->t);
    mem_free(k);
    r->rest = NULL;
}

status *http_more(struct http *h, struct http_reply *r, void *into, size_t room, bool more)
{
    struct http_rest *k = r->rest;
    struct transfer *t = k->t;
    int n = 1;
    k->q.into = into;
    k->q.room = room;
    k->q.more = more;
    t->reply.got = 0;
    if (t->paused) {
        t->paused = false;
        CURLcode code = curl_easy_pause(t->easy, CURLPAUSE_CONT); /* gives at once what it held back */
        if (code != CURLE_OK)
            transfer_over(t, code);
    }
    status *st = t->over ? NULL : drive(h, &k->q, k->slot, t, &n);
    if (!st)
        st = transfer_status(t);
    r->got = t->reply.got;
    if (st || t->over)
        http_leave(h, r);
    return st;
}

void http_reply_free(struct http_reply *r)
{
    mem_free(r->text);
    r->text = NULL;
    r->text_bytes = 0;
}
