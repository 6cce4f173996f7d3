/* s3_keys: credentials from the first source that has some, renewed while they are in use.
 *
 *     NONE --s3_config_keys--> [look] --found--> VALID --due_ns passed--> [look] --> VALID with newer ones
 *                                |                                          `--failed--> VALID, due again later
 *                                `--failed--> NONE, the error to all who waited
 *     VALID --expires_ns passed, or s3_config_renew--> [look], and all who ask wait for it
 *
 * Invariants: (1) one thread looks at a time, without the lock; (2) who waited for a look that failed gets its error
 * and does not look again itself; (3) what is replaced is wiped. */
#include "storage/s3_keys.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "storage/s3_ini.h"
#include "storage/s3_provider.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SECOND_NS 1000000000ull

enum {
    PROVIDER_LIMIT_MS = 60000,
    AHEAD_S = 300,  /* renewed so long before they expire, or a quarter of their life if that is less */
    MARGIN_S = 10,  /* not used for so long before they expire (or a sixteenth): a request takes time too */
    REREAD_S = 300, /* a session token of a file, whose end is not known, is read again */
    REPEAT_S = 30   /* after a renewal that failed, while the old ones are valid */
};

struct found {
    struct s3_keys keys;
    uint64_t expires_ns; /* wall time; 0: not known */
    bool from_file;
};

struct s3_keyring {
    char *profile;
    uint32_t provider_limit_ms;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t looked;
    bool looking, have;
    uint64_t looks;  /* that have ended */
    status *failure; /* of the last look; NULL: it found some */
    struct s3_keys keys;
    uint64_t end_ns, due_ns; /* wall time; 0: never */
};

void s3_keys_wipe(struct s3_keys *k)
{
    explicit_bzero(k, sizeof *k);
}

status *s3_keys_copy(char *out, size_t size, const char *text, const char *what)
{
    size_t n = strlen(text);
    if (n >= size)
        return ERR(INVALID, "%s has more than %zu characters", what, size - 1);
    for (size_t i = 0; i < n; i++)
        if (text[i] <= ' ' || text[i] > '~')
            return ERR(INVALID, "%s holds a blank, a control character or one that is not ASCII", what);
    if (n == 0)
        return ERR(INVALID, "%s is empty", what);
    memcpy(out, text, n + 1);
    return NULL;
}

/* ---- The sources */

static const char *variable(const char *name)
{
    const char *v = getenv(name);
    return v && *v ? v : NULL;
}

static status *from_environment(struct found *out, bool *found)
{
    const char *access = variable("AWS_ACCESS_KEY_ID"), *secret = variable("AWS_SECRET_ACCESS_KEY");
    const char *token = variable("AWS_SESSION_TOKEN");
    *found = access && secret;
    if (!access && !secret)
        return NULL;
    if (!*found)
        return ERR(INVALID, "s3: %s is set, but %s is not: set both or neither",
                   access ? "AWS_ACCESS_KEY_ID" : "AWS_SECRET_ACCESS_KEY",
                   access ? "AWS_SECRET_ACCESS_KEY" : "AWS_ACCESS_KEY_ID");
    TRY(s3_keys_copy(out->keys.access_key, sizeof out->keys.access_key, access, "s3: AWS_ACCESS_KEY_ID"));
    TRY(s3_keys_copy(out->keys.secret_key, sizeof out->keys.secret_key, secret, "s3: AWS_SECRET_ACCESS_KEY"));
    if (token)
        TRY(s3_keys_copy(out->keys.session_token, sizeof out->keys.session_token, token, "s3: AWS_SESSION_TOKEN"));
    return NULL;
}

static status *copy_value(char *out, size_t size, const struct s3_value *v, const char *name)
{
    char what[600];
    snprintf(what, sizeof what, "%s:%d: %s", v->path, v->line, name);
    return s3_keys_copy(out, size, v->text, what);
}

/* The three settings of a profile in one file. */
static status *from_file(const struct s3_ini *f, const char *profile, struct found *out, bool *found)
{
    struct s3_value access, secret, token;
    TRY(s3_entry_value(f, s3_ini_find(f, S3_PROFILE, profile, NULL, "aws_access_key_id"), &access));
    TRY(s3_entry_value(f, s3_ini_find(f, S3_PROFILE, profile, NULL, "aws_secret_access_key"), &secret));
    TRY(s3_entry_value(f, s3_ini_find(f, S3_PROFILE, profile, NULL, "aws_session_token"), &token));
    *found = access.text && secret.text;
    if (!access.text && !secret.text)
        return NULL;
    if (!*found)
        return ERR(INVALID, "%s:%d: profile %s has %s but no %s", f->path, access.text ? access.line : secret.line,
                   profile, access.text ? "aws_access_key_id" : "aws_secret_access_key",
                   access.text ? "aws_secret_access_key" : "aws_access_key_id");
    TRY(copy_value(out->keys.access_key, sizeof out->keys.access_key, &access, "aws_access_key_id"));
    TRY(copy_value(out->keys.secret_key, sizeof out->keys.secret_key, &secret, "aws_secret_access_key"));
    if (token.text)
        TRY(copy_value(out->keys.session_token, sizeof out->keys.session_token, &token, "aws_session_token"));
    out->from_file = true;
    return NULL;
}

static status *from_command(const struct s3_files *f, const char *profile, uint32_t limit_ms, struct found *out,
                            bool *found)
{
    struct s3_value command;
    TRY(s3_files_value(f, profile, NULL, "credential_process", &command));
    *found = command.text != NULL;
    if (!*found)
        return NULL;
    char where[600];
    snprintf(where, sizeof where, "%s:%d", command.path, command.line);
    TRY(s3_provider_run(command.text, where, limit_ms, &out->keys, &out->expires_ns));
    if (out->expires_ns && out->expires_ns <= clock_wall_ns())
        return ERR(UNAVAILABLE, "%s: the command of credential_process printed credentials that have expired already",
                   where);
    return NULL;
}

/* A profile that asks for a role or a login would be another identity without it. */
static status *refuse_unknown(const struct s3_files *f, const char *profile)
{
    static const char *const name[] = { "role_arn", "sso_session", "sso_start_url", "login_session" };
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) {
        struct s3_value v;
        TRY(s3_files_value(f, profile, NULL, name[i], &v));
        if (v.text)
            return ERR(UNSUPPORTED,
                       "%s:%d: profile %s has %s, which this program does not do by itself; let a command do it, in a "
                       "profile of its own: credential_process = aws configure export-credentials --profile %s",
                       v.path, v.line, profile, name[i], profile);
    }
    return NULL;
}

static void describe(const struct s3_ini *f, const char *profile, const char *fallback, char *text, size_t size)
{
    const char *path = f->path ? f->path : fallback;
    const char *why = !f->found                                                 ? "no such file"
                      : s3_ini_find(f, S3_PROFILE, profile, NULL, NULL) == NULL ? "no such profile in it"
                                                                                : "neither in this profile";
    snprintf(text, size, "%.300s (%s)", path, why);
}

static status *nothing_found(const struct s3_files *f, const char *profile)
{
    char config[360], credentials[360];
    describe(&f->config, profile, "~/.aws/config, where HOME is not set", config, sizeof config);
    describe(&f->credentials, profile, "~/.aws/credentials, where HOME is not set", credentials, sizeof credentials);
    return ERR(INVALID,
               "s3: no credentials: looked for AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY (not set), then for "
               "aws_access_key_id or credential_process of profile %.64s in %s and %s",
               profile, credentials, config);
}

static status *from_files(const struct s3_files *f, const char *profile, uint32_t limit_ms, struct found *out)
{
    bool found;
    TRY(refuse_unknown(f, profile));
    TRY(from_file(&f->credentials, profile, out, &found));
    if (!found)
        TRY(from_command(f, profile, limit_ms, out, &found));
    if (!found)
        TRY(from_file(&f->config, profile, out, &found));
    return found ? NULL : nothing_found(f, profile);
}

/* Without the lock; the keyring's profile and limit do not change. */
static status *look(const struct s3_keyring *r, struct found *out)
{
    bool found;
    struct s3_files f;
    TRY(from_environment(out, &found));
    if (found)
        return NULL;
    TRY(s3_files_read(&f));
    status *st = from_files(&f, r->profile, r->provider_limit_ms, out);
    s3_files_free(&f);
    return st;
}

/* ---- The keyring */

status *s3_keyring_open(const char *profile, struct s3_keyring **out)
{
    struct s3_keyring *r = mem_calloc(1, sizeof *r);
    char *copy = mem_strdup(profile);
    if (!r || !copy) {
        mem_free(r);
        mem_free(copy);
        return ERR(NO_MEMORY, "s3: credentials");
    }
    r->profile = copy;
    r->provider_limit_ms = PROVIDER_LIMIT_MS;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->looked, NULL);
    *out = r;
    return NULL;
}

void s3_keyring_close(struct s3_keyring *r)
{
    if (!r)
        return;
    s3_keys_wipe(&r->keys);
    status_free(r->failure);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->looked);
    mem_free(r->profile);
    mem_free(r);
}

void s3_config_set_provider_limit(struct s3_config *c, uint32_t limit_ms)
{
    c->keys->provider_limit_ms = limit_ms;
}

static bool same_keys(const struct s3_keys *a, const struct s3_keys *b)
{
    return strcmp(a->access_key, b->access_key) == 0 && strcmp(a->secret_key, b->secret_key) == 0 &&
           strcmp(a->session_token, b->session_token) == 0;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Synced. */
static void accept(struct s3_keyring *r, const struct found *f, uint64_t now)
{
    uint64_t generation = r->keys.generation;
    bool same = r->have && same_keys(&r->keys, &f->keys);
    r->keys = f->keys;
    r->keys.generation = same ? generation : generation + 1;
    r->have = true;
    r->end_ns = r->due_ns = 0;
    if (f->expires_ns) {
        uint64_t life = f->expires_ns - least(now, f->expires_ns);
        r->end_ns = f->expires_ns - least(MARGIN_S * SECOND_NS, life / 16);
        r->due_ns = f->expires_ns - least(AHEAD_S * SECOND_NS, life / 4);
    } else if (f->from_file && *f->keys.session_token) {
        r->due_ns = now + REREAD_S * SECOND_NS;
    }
}

static bool valid(const struct s3_keyring *r, uint64_t now)
{
    return r->have && (!r->end_ns || now < r->end_ns);
}

/* Called and returns with the lock held; looks without it. The failure is r's. */
static void look_once(struct s3_keyring *r)
{
    struct found f = { 0 };
    r->looking = true;
    pthread_mutex_unlock(&r->lock);
    status *st = look(r, &f);
    pthread_mutex_lock(&r->lock);
    status_free(r->failure);
    r->failure = st;
    uint64_t now = clock_wall_ns();
    if (!st)
        accept(r, &f, now);
    else if (r->due_ns)
        r->due_ns = now + REPEAT_S * SECOND_NS;
    s3_keys_wipe(&f.keys);
    r->looking = false;
    r->looks++;
    pthread_cond_broadcast(&r->looked);
}

/* Look, or wait for who is looking. Synced. NULL: it found some. */
static status *renew(struct s3_keyring *r)
{
    if (!r->looking) {
        look_once(r);
    } else {
        uint64_t before = r->looks;
        while (r->looks == before)
            pthread_cond_wait(&r->looked, &r->lock);
    }
    return r->failure ? status_copy(r->failure) : NULL;
}

status *s3_config_keys(struct s3_config *c, struct s3_keys *out)
{
    struct s3_keyring *r = c->keys;
    status *st = NULL;
    pthread_mutex_lock(&r->lock);
    uint64_t now = clock_wall_ns();
    bool due = r->due_ns && now >= r->due_ns;
    if (!valid(r, now))
        st = renew(r);
    else if (due && !r->looking)
        look_once(r); /* if that fails the old ones still do, and the error comes once they have expired */
    if (!st)
        *out = r->keys;
    pthread_mutex_unlock(&r->lock);
    return st;
}

status *s3_config_renew(struct s3_config *c, const struct s3_keys *refused)
{
    struct s3_keyring *r = c->keys;
    status *st = NULL;
    pthread_mutex_lock(&r->lock);
    if (r->have && r->keys.generation == refused->generation) {
        st = renew(r);
        if (!st && r->keys.generation == refused->generation)
            st = ERR(INVALID, "s3: the credentials have expired, and their source still holds the same ones");
    }
    pthread_mutex_unlock(&r->lock);
    return st;
}
