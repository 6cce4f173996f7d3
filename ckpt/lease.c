/* lease: one live attempt a root. The protocol and its limits are at struct lease in commit.h.
 *
 * Invariants: (1) the highest epoch's object is never removed and its number never falls; (2) an epoch's object is made
 * once, by exclusive put, and replaced only by the attempt that made it; (3) a record has a fixed length, so a reader
 * that races with a renewal reads one record or the other, never a mixture.
 *
 * To read: the record as text, who is alive, then lease_take from its loop outwards. */
#include "ckpt/commit.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    RECORD_BYTES = 512,
    DEFAULT_SECONDS = 30,
    NO_EPOCH = 0,
    TAKE_TRIES = 64, /* races lost in a row before giving up */
};

/* Where a process runs: two are on one host, and see each other's pids, if all three texts agree. */
struct place {
    char host[64], boot[40], pid_ns[32];
};

struct record {
    uint64_t attempt, run_id, counter, start; /* start: of the process, in clock ticks since boot */
    uint32_t seconds;
    int pid, released;
    struct place place;
};

/* What lies on storage: the highest epoch, if any, and its record, if it can be read. */
struct held {
    uint64_t epoch;
    bool readable;
    struct record r;
    uint64_t age_ns; /* by the storage's clock */
};

/* ---- This process */

static void read_line(const char *path, char *text, size_t bytes)
{
    ssize_t n = -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        n = read(fd, text, bytes - 1);
        close(fd);
    }
    text[n > 0 ? n : 0] = 0;
    text[strcspn(text, " \t\n=")] = 0; /* values are words */
}

static struct place this_place(void)
{
    struct place p = { .host = "" };
    if (gethostname(p.host, sizeof p.host - 1) != 0)
        p.host[0] = 0;
    p.host[strcspn(p.host, " \t\n=")] = 0;
    read_line("/proc/sys/kernel/random/boot_id", p.boot, sizeof p.boot);
    ssize_t n = readlink("/proc/self/ns/pid", p.pid_ns, sizeof p.pid_ns - 1);
    p.pid_ns[n > 0 ? n : 0] = 0;
    return p;
}

static bool same_place(const struct place *a, const struct place *b)
{
    return a->host[0] && a->boot[0] && a->pid_ns[0] && strcmp(a->host, b->host) == 0 && strcmp(a->boot, b->boot) == 0 &&
           strcmp(a->pid_ns, b->pid_ns) == 0;
}

/* When the process started, in ticks since boot; 0: there is none, or it is dead and not yet waited for. proc(5),
 * fields 3 and 22. */
static uint64_t process_start(int pid)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *p = strrchr(text, ')'); /* the name before it may hold anything */
    if (!p || p[1] != ' ' || p[2] == 'Z' || p[2] == 'X')
        return 0;
    p += 2;
    for (int field = 3; field < 22 && p; field++)
        p = strchr(p + 1, ' ');
    return p ? strtoull(p, NULL, 10) : 0;
}

static status *draw(uint64_t *out)
{
    uint64_t r = 0;
    while (r == 0) /* 0 stands for "none" */
        if (getrandom(&r, sizeof r, 0) != (ssize_t)sizeof r && errno != EINTR)
            return ERR_SYS(errno, "getrandom");
    *out = r;
    return NULL;
}

/* ---- Records */

static void epoch_key(uint64_t epoch, char key[STORE_KEY_BYTES])
{
    snprintf(key, STORE_KEY_BYTES, "LEASE/%010" PRIu64, epoch);
}

/* RECORD_BYTES of key=value lines for people and for record_parse; spaces up to the end. */
static void record_print(const struct record *r, char text[RECORD_BYTES])
{
    memset(text, ' ', RECORD_BYTES);
    int n = snprintf(text, RECORD_BYTES,
                     "attempt=%016" PRIx64 "\nrun=%016" PRIx64 "\nreleased=%d\nseconds=%u\ncounter=%020" PRIu64
                     "\npid=%d\nstart=%" PRIu64 "\nhost=%s\nboot=%s\npidns=%s\nend=\n",
                     r->attempt, r->run_id, r->released, r->seconds, r->counter, r->pid, r->start, r->place.host,
                     r->place.boot, r->place.pid_ns);
    CHECK(n > 0 && n < RECORD_BYTES);
    text[n] = ' ';
    text[RECORD_BYTES - 1] = '\n';
}

/* The value of key in text, as a word of at most bytes - 1 characters. */
static bool value_of(const char *text, const char *key, char *word, size_t bytes)
{
    size_t len = strlen(key);
    for (const char *p = text; p; p = strchr(p, '\n'), p = p ? p + 1 : NULL) {
        if (strncmp(p, key, len) != 0 || p[len] != '=')
            continue;
        size_t n = strcspn(p + len + 1, "\n");
        if (n >= bytes)
            return false;
        memcpy(word, p + len + 1, n);
        word[n] = 0;
        return true;
    }
    return false;
}

static bool number_of(const char *text, const char *key, int base, uint64_t max, uint64_t *out)
{
    char word[32], *end;
    if (!value_of(text, key, word, sizeof word) || !word[0] || word[0] == '-')
        return false;
    errno = 0;
    *out = strtoull(word, &end, base);
    return !*end && errno == 0 && *out <= max;
}

static bool record_parse(const char *text, struct record *r)
{
    uint64_t released, seconds, pid;
    char end[2];
    *r = (struct record){ 0 };
    bool ok =
        number_of(text, "attempt", 16, UINT64_MAX, &r->attempt) && number_of(text, "run", 16, UINT64_MAX, &r->run_id) &&
        number_of(text, "released", 10, 1, &released) && number_of(text, "seconds", 10, 1000000, &seconds) &&
        number_of(text, "counter", 10, UINT64_MAX, &r->counter) && number_of(text, "pid", 10, INT_MAX, &pid) &&
        number_of(text, "start", 10, UINT64_MAX, &r->start) &&
        value_of(text, "host", r->place.host, sizeof r->place.host) &&
        value_of(text, "boot", r->place.boot, sizeof r->place.boot) &&
        value_of(text, "pidns", r->place.pid_ns, sizeof r->place.pid_ns) && value_of(text, "end", end, sizeof end);
    if (!ok)
        return false;
    r->released = (int)released;
    r->seconds = (uint32_t)seconds;
    r->pid = (int)pid;
    return true;
}

/* The highest epoch; NO_EPOCH if there is none. */
static status *highest_epoch(struct store *s, uint64_t *out)
{
    struct store_list l;
    uint64_t best = NO_EPOCH;
    TRY(store_list(s, "LEASE", &l));
    for (size_t i = 0; i < l.count; i++) {
        char *end;
        uint64_t e = strtoull(l.entry[i].name, &end, 10);
        if (!*end && e > best)
            best = e;
    }
    store_list_free(&l);
    *out = best;
    return NULL;
}

/* The lease as it is now. NOT_FOUND when its epoch was superseded and removed meanwhile: look again. */
static status *read_held(struct store *s, bool with_age, struct held *out)
{
    struct held h = { 0 };
    TRY(highest_epoch(s, &h.epoch));
    if (h.epoch != NO_EPOCH) {
        char key[STORE_KEY_BYTES];
        void *text;
        size_t n;
        struct store_info info;
        uint64_t now = 0;
        epoch_key(h.epoch, key);
        TRY(store_stat(s, key, &info));
        if (with_age)
            TRY(store_now(s, &now));
        h.age_ns = now > info.mtime_ns ? now - info.mtime_ns : 0;
        status *st = store_get_all(s, key, RECORD_BYTES, &text, &n);
        if (status_code(st) != ST_CORRUPT) {
            if (st)
                return st;
            h.readable = record_parse(text, &h.r);
            mem_free(text);
        }
        status_free(st); /* too long to be a record: not readable */
    }
    *out = h;
    return NULL;
}

static uint64_t lease_ns(const struct held *h)
{
    return (uint64_t)(h->readable ? h->r.seconds : DEFAULT_SECONDS) * 1000000000u;
}

/* ---- Taking */

enum verdict { FREE, DEAD, ALIVE, UNKNOWN };

/* What can be said of the holder without waiting. */
static enum verdict judge(const struct held *h, const struct place *here)
{
    if (h->epoch == NO_EPOCH || (h->readable && h->r.released))
        return FREE;
    if (h->readable && h->r.start && same_place(&h->r.place, here))
        return process_start(h->r.pid) == h->r.start ? ALIVE : DEAD;
    return h->age_ns >= lease_ns(h) ? DEAD : UNKNOWN;
}

status *lease_holder(struct store *s, uint64_t *attempt, bool *live)
{
    const struct place here = this_place();
    struct held h;
    status *st = read_held(s, true, &h);
    if (status_code(st) == ST_NOT_FOUND) { /* superseded while we looked */
        status_free(st);
        st = read_held(s, true, &h);
    }
    if (st)
        return st;
    enum verdict v = judge(&h, &here);
    *live = v == ALIVE || v == UNKNOWN;
    *attempt = h.readable ? h.r.attempt : 0;
    return NULL;
}

static status *held_by_another(struct store *s, const struct held *h)
{
    return ERR(EXISTS,
               "%s is held by a live job: attempt %016" PRIx64
               " on host %s (pid %d), its lease renewed %.1f s ago; stop that job, or give this one "
               "another URL",
               s->uri ? s->uri : "the root", h->r.attempt, h->readable ? h->r.place.host : "?", h->r.pid,
               ns_to_s(h->age_ns));
}

/* Wait until the lease in *h has expired; EXISTS if it is renewed, or goes to another, before. *h is then the newest.
 */
static status *watch(struct store *s, const struct place *here, struct held *h)
{
    const struct held first = *h;
    for (;;) {
        uint64_t left = lease_ns(h) > h->age_ns ? lease_ns(h) - h->age_ns : 0, step = lease_ns(h) / 20;
        step = step > 500000000u ? 500000000u : step;
        clock_sleep_us((uint32_t)((left < step ? left : step) / 1000 + 1000));
        status *st = read_held(s, true, h);
        if (status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            continue;
        }
        if (st)
            return st;
        enum verdict v = judge(h, here);
        if (v == FREE || v == DEAD)
            return NULL;
        if (v == ALIVE || h->epoch != first.epoch || h->r.counter != first.r.counter || h->r.attempt != first.r.attempt)
            return held_by_another(s, h);
    }
}

static void describe_death(const struct held *h, const struct place *here, char note[NOTE_BYTES])
{
    if (!h->readable)
        snprintf(note, NOTE_BYTES, "took over a lease that cannot be read, not renewed for %.1f s", ns_to_s(h->age_ns));
    else if (same_place(&h->r.place, here))
        snprintf(note, NOTE_BYTES, "took over the lease of attempt %016" PRIx64 ": its process %d on this host is gone",
                 h->r.attempt, h->r.pid);
    else
        snprintf(note, NOTE_BYTES,
                 "took over the lease of attempt %016" PRIx64 " on host %s (pid %d): not renewed for %.1f s",
                 h->r.attempt, h->r.place.host, h->r.pid, ns_to_s(h->age_ns));
}

static struct record record_of(const struct lease *l, const struct place *here, bool released)
{
    return (struct record){ .attempt = l->attempt,
                            .run_id = l->run_id,
                            .counter = l->counter,
                            .seconds = l->seconds,
                            .pid = getpid(),
                            .start = process_start(getpid()),
                            .released = released,
                            .place = *here };
}

/* Remove the epochs below ours; nobody needs them. */
static status *remove_older(struct store *s, uint64_t epoch)
{
    struct store_list l;
    TRY(store_list(s, "LEASE", &l));
    status *st = NULL;
    for (size_t i = 0; i < l.count && !st; i++) {
        char *end, key[STORE_KEY_BYTES];
        uint64_t e = strtoull(l.entry[i].name, &end, 10);
        if (*end || e >= epoch)
            continue;
        epoch_key(e, key);
        st = store_remove(s, key);
    }
    store_list_free(&l);
    return st;
}

/* Put the epoch after *h. EXISTS: another taker was faster. A taker that saw an old list may have made an epoch below
 * the highest (its number was removed since): it holds nothing then, and removes it. */
static status *claim(struct store *s, const struct place *here, const struct held *h, uint32_t seconds,
                     struct lease *out)
{
    struct lease l = { .store = s, .epoch = h->epoch + 1, .counter = 1, .seconds = seconds };
    l.parent = h->readable ? h->r.attempt : 0;
    l.run_id = h->readable ? h->r.run_id : 0;
    snprintf(l.host, sizeof l.host, "%s", here->host);
    TRY(draw(&l.attempt));
    if (!l.run_id)
        TRY(draw(&l.run_id));
    char key[STORE_KEY_BYTES], text[RECORD_BYTES];
    struct record r = record_of(&l, here, false);
    record_print(&r, text);
    epoch_key(l.epoch, key);
    l.renewed_ns = clock_ns();
    TRY(store_put(s, key, text, sizeof text, STORE_EXCLUSIVE));
    uint64_t top;
    status *st = highest_epoch(s, &top);
    if (!st && top != l.epoch)
        st = ERR(EXISTS, "%s was superseded", key);
    if (st)
        return status_first(st, store_remove(s, key));
    status_free(remove_older(s, l.epoch)); /* they do no harm */
    *out = l;
    return NULL;
}

status *lease_take(struct store *s, uint32_t seconds, struct lease *out, char note[NOTE_BYTES])
{
    const struct place here = this_place();
    if (seconds == 0)
        seconds = DEFAULT_SECONDS;
    for (int tries = 0; tries < TAKE_TRIES; tries++) {
        struct held h;
        status *st = read_held(s, true, &h);
        if (!st && judge(&h, &here) == UNKNOWN)
            st = watch(s, &here, &h);
        if (!st && judge(&h, &here) == ALIVE)
            return held_by_another(s, &h);
        enum verdict v = st ? UNKNOWN : judge(&h, &here);
        bool lost_race = status_code(st) == ST_NOT_FOUND;
        if (!st) {
            st = claim(s, &here, &h, seconds, out);
            lost_race = status_code(st) == ST_EXISTS;
        }
        if (st && !lost_race)
            return st;
        if (!st) {
            note[0] = 0;
            if (v == DEAD)
                describe_death(&h, &here, note);
            return NULL;
        }
        status_free(st); /* look who won */
    }
    return ERR(UNAVAILABLE, "the lease of %s changes hands again and again", s->uri ? s->uri : "the root");
}

/* ---- Keeping */

status *lease_check(struct lease *l)
{
    struct held h;
    status *st = read_held(l->store, false, &h);
    if (status_code(st) == ST_NOT_FOUND) { /* ours is never removed while it is the highest: it is not */
        status_free(st);
        TRY(read_held(l->store, false, &h));
    } else if (st) {
        return st;
    }
    if (h.epoch == l->epoch && h.readable && h.r.attempt == l->attempt)
        return NULL;
    if (h.epoch == NO_EPOCH)
        return ERR(CANCELLED, "the lease of attempt %016" PRIx64 " was removed", l->attempt);
    return ERR(CANCELLED, "attempt %016" PRIx64 " has lost its lease to attempt %016" PRIx64 " on host %s (pid %d)",
               l->attempt, h.r.attempt, h.readable ? h.r.place.host : "?", h.r.pid);
}

static status *replace_record(struct lease *l, bool released)
{
    const struct place here = this_place();
    char key[STORE_KEY_BYTES], text[RECORD_BYTES];
    l->counter++;
    struct record r = record_of(l, &here, released);
    record_print(&r, text);
    epoch_key(l->epoch, key);
    uint64_t now = clock_ns();
    TRY(store_put(l->store, key, text, sizeof text, STORE_REPLACE));
    l->renewed_ns = now;
    return NULL;
}

/* A look at our own object only, without an allocation: a steady job renews its lease between steps, too. Whoever takes
 * over removes the epochs below its own, so this is false soon after; until then a renewal of ours is one nobody reads.
 */
static bool own_record_stands(const struct lease *l)
{
    char key[STORE_KEY_BYTES], text[RECORD_BYTES + 1];
    struct record r;
    epoch_key(l->epoch, key);
    status *st = store_get(l->store, key, 0, text, RECORD_BYTES);
    text[RECORD_BYTES] = 0;
    bool stands = !st && record_parse(text, &r) && r.attempt == l->attempt;
    status_free(st);
    return stands;
}

status *lease_renew(struct lease *l)
{
    if (clock_ns() - l->renewed_ns < (uint64_t)l->seconds * 1000000000u / 3)
        return NULL;
    if (!own_record_stands(l))
        TRY(lease_check(l));
    return replace_record(l, false);
}

status *lease_give_back(struct lease *l)
{
    status *st = lease_check(l);
    if (status_code(st) == ST_CANCELLED) {
        status_free(st);
        return NULL;
    }
    if (st)
        return st;
    return replace_record(l, true);
}
