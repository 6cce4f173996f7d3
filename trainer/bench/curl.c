/* curl: see curl.h. What a command is to do, keys included, is in a file in memory that this user alone can read: a
 * command line could be read by all. */
#include "trainer/bench/curl.h"

#include "comm/base/clock.h"
#include "storage/s3_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { COMMANDS = 16, URL_BYTES = 4096, WORDS_BYTES = 400 };

struct command {
    FILE *config; /* in memory */
    FILE *says;   /* stdout and stderr of the command: nothing, if all is well */
};

/* name = "value" */
static void line(FILE *f, const char *name, const char *value)
{
    fprintf(f, "%s = \"", name);
    for (; *value; value++)
        fprintf(f, *value == '"' || *value == '\\' ? "\\%c" : "%c", *value);
    fputs("\"\n", f);
}

static status *add_move(FILE *f, struct s3_config *c, const struct s3_keys *k, const struct curl_moves *m,
                        const struct curl_move *one)
{
    char url[URL_BYTES], text[S3_SESSION_TOKEN_BYTES + 64];
    TRY(s3_config_url(c, one->key, NULL, url, sizeof url));
    fputs("next\nsilent\nshow-error\nfail\n", f);
    line(f, "url", url);
    line(f, "output", "/dev/null");
    if (c->ca_file)
        line(f, "cacert", c->ca_file);
    snprintf(text, sizeof text, "aws:amz:%s:s3", c->region);
    line(f, "aws-sigv4", text);
    snprintf(text, sizeof text, "%s:%s", k->access_key, k->secret_key);
    line(f, "user", text);
    line(f, "header", "x-amz-content-sha256: UNSIGNED-PAYLOAD");
    snprintf(text, sizeof text, "x-amz-security-token: %s", k->session_token);
    if (k->session_token[0])
        line(f, "header", text);
    explicit_bzero(text, sizeof text);
    snprintf(text, sizeof text, "%llu-%llu", (unsigned long long)one->begin,
             (unsigned long long)(one->begin + one->bytes - 1));
    line(f, m->upload ? "upload-file" : "range", m->upload ? m->upload : text);
    return NULL;
}

static status *open_config(struct command *c)
{
    int fd = memfd_create("curl", MFD_CLOEXEC);
    if (fd < 0)
        return ERR_SYS(errno, "memory for what curl is to do");
    c->config = fdopen(fd, "w");
    if (!c->config) {
        close(fd);
        return ERR(NO_MEMORY, "what curl is to do");
    }
    return NULL;
}

/* Write down the share of command `index`. */
static status *prepare(struct command *c, int index, int commands, const struct curl_moves *m, struct s3_config *config,
                       const struct s3_keys *keys)
{
    TRY(open_config(c));
    for (size_t i = (size_t)index; i < m->count; i += (size_t)commands)
        TRY(add_move(c->config, config, keys, m, &m->move[i]));
    return fflush(c->config) ? ERR_SYS(errno, "write what curl is to do") : NULL;
}

static status *start(struct command *c)
{
    char text[128];
    snprintf(text, sizeof text, "exec curl -q -K /proc/%d/fd/%d 2>&1", (int)getpid(), fileno(c->config));
    c->says = popen(text, "re");
    return c->says ? NULL : ERR_SYS(errno, "start curl");
}

/* Wait for its end. */
static status *finish(struct command *c)
{
    char words[WORDS_BYTES];
    size_t n = 0, more;
    if (!c->says)
        return NULL;
    while (n < sizeof words - 1 && (more = fread(words + n, 1, sizeof words - 1 - n, c->says)) > 0)
        n += more;
    words[n] = 0;
    words[strcspn(words, "\n")] = 0;
    int rc = pclose(c->says);
    return rc ? ERR(IO, "curl failed (wait status %d): %s", rc, words) : NULL;
}

static status *run_commands(const struct curl_moves *m, int commands, struct command *c, struct s3_config *config,
                            double *seconds)
{
    struct s3_keys keys;
    TRY(s3_config_keys(config, &keys));
    status *st = strchr(keys.access_key, ':')
                     ? ERR(UNSUPPORTED, "curl takes no access key id with a colon: no plain requests to compare with")
                     : NULL;
    for (int i = 0; !st && i < commands; i++)
        st = prepare(&c[i], i, commands, m, config, &keys);
    s3_keys_wipe(&keys);
    uint64_t t0 = clock_ns();
    for (int i = 0; !st && i < commands; i++)
        st = start(&c[i]);
    for (int i = 0; i < commands; i++)
        st = status_first(st, finish(&c[i]));
    *seconds = ns_to_s(clock_ns() - t0);
    return st;
}

status *curl_run(const struct curl_moves *m, int commands, double *seconds)
{
    struct command c[COMMANDS] = { { 0 } };
    struct s3_config config;
    CHECK(commands <= COMMANDS && m->count);
    commands = m->count < (size_t)commands ? (int)m->count : commands;
    if (system("command -v curl >/dev/null 2>&1") != 0) /* NOLINT: no word of it comes from elsewhere */
        return ERR(UNSUPPORTED, "there is no curl(1) here to compare with: install curl");
    TRY(s3_config_open(strchr(m->url, ':') + 1, &config));
    status *st = run_commands(m, commands, c, &config, seconds);
    for (int i = 0; i < commands; i++)
        if (c[i].config)
            fclose(c[i].config);
    s3_config_close(&config);
    return st;
}
