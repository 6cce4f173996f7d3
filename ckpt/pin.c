/* pin: see pin.h. One thread a pin, which sleeps on a condition and writes the object again each third of its time. */
#include "ckpt/pin.h"

#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { PIN_BYTES = 64 };
static const char pins_dir[] = "PINS";

struct pin {
    struct store *store;
    uint64_t step;
    uint32_t seconds;
    char key[STORE_KEY_BYTES];
    struct thread thread;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        bool quit;
    } synced;
};

static status *put(const struct pin *p)
{
    char text[PIN_BYTES];
    int n = snprintf(text, sizeof text, "step=%020" PRIu64 " seconds=%010u\n", p->step, p->seconds);
    return store_put(p->store, p->key, text, (size_t)n, STORE_REPLACE);
}

static status *pin_main(void *arg)
{
    struct pin *p = arg;
    const uint64_t period = (uint64_t)p->seconds * 1000000000u / 3;
    uint64_t next = clock_ns() + period;
    pthread_mutex_lock(&p->synced.lock);
    while (!p->synced.quit) {
        if (clock_ns() < next) {
            struct timespec t = { (time_t)(next / 1000000000u), (long)(next % 1000000000u) };
            pthread_cond_timedwait(&p->synced.changed, &p->synced.lock, &t);
            continue;
        }
        pthread_mutex_unlock(&p->synced.lock);
        status_free(put(p)); /* if it cannot be, the next time may do */
        pthread_mutex_lock(&p->synced.lock);
        next = clock_ns() + period;
    }
    pthread_mutex_unlock(&p->synced.lock);
    return NULL;
}

static void free_pin(struct pin *p)
{
    pthread_cond_destroy(&p->synced.changed);
    pthread_mutex_destroy(&p->synced.lock);
    mem_free(p);
}

/* The pin, and its directory if it was the last one. */
static void take_away(const struct pin *p)
{
    status_free(store_remove(p->store, p->key));
    status_free(store_remove(p->store, pins_dir));
}

status *pin_open(struct store *s, uint64_t step, uint32_t seconds, struct pin **out)
{
    uint64_t r = 0;
    struct pin *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a pin");
    *p = (struct pin){ .store = s, .step = step, .seconds = seconds ? seconds : PIN_SECONDS };
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&p->synced.changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&p->synced.lock, NULL);
    bool drawn = getrandom(&r, sizeof r, 0) == (ssize_t)sizeof r;
    snprintf(p->key, sizeof p->key, "%s/%016" PRIx64, pins_dir, r);
    status *st = drawn ? put(p) : ERR(IO, "no random number");
    if (st) { /* a root that is not ours to write to */
        status_free(st);
        free_pin(p);
        *out = NULL;
        return NULL;
    }
    st = thread_start(&p->thread, "tsr-pin", pin_main, p);
    if (st) {
        take_away(p);
        free_pin(p);
        return st;
    }
    *out = p;
    return NULL;
}

uint64_t pin_step(const struct pin *p)
{
    return p->step;
}

void pin_close(struct pin *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->synced.lock);
    p->synced.quit = true;
    pthread_cond_broadcast(&p->synced.changed);
    pthread_mutex_unlock(&p->synced.lock);
    status_free(thread_join(&p->thread));
    take_away(p);
    free_pin(p);
}

/* ---- others' pins */

/* What a pin says. False: it is none. */
static bool parse(const char *text, uint64_t *step, uint64_t *seconds)
{
    char *end;
    if (strncmp(text, "step=", 5) != 0)
        return false;
    *step = strtoull(text + 5, &end, 10);
    if (strncmp(end, " seconds=", 9) != 0)
        return false;
    *seconds = strtoull(end + 9, &end, 10);
    return *end == '\n' && *seconds <= 1000000;
}

/* One pin: its step into the list, or away with it. NOT_FOUND: its reader was done meanwhile. */
static status *look_at(struct store *s, const struct store_entry *e, uint64_t now, bool tidy, struct step_list *l)
{
    char key[STORE_KEY_BYTES];
    void *text;
    size_t n;
    uint64_t step = 0, seconds = PIN_SECONDS, age = now > e->info.mtime_ns ? now - e->info.mtime_ns : 0;
    if (e->info.is_dir || (size_t)snprintf(key, sizeof key, "%s/%s", pins_dir, e->name) >= sizeof key)
        return NULL;
    status *st = store_get_all(s, key, PIN_BYTES, &text, &n);
    if (st && status_code(st) != ST_CORRUPT)
        return st;
    bool pin = !st && parse(text, &step, &seconds);
    if (!st)
        mem_free(text);
    status_free(st); /* too long to be a pin */
    seconds = pin ? seconds : PIN_SECONDS;
    if (age / 1000000000u >= seconds)
        return tidy ? store_remove(s, key) : NULL;
    if (pin)
        l->step[l->count++] = step;
    return NULL;
}

static int by_step(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

status *pins_read(struct store *s, bool tidy, struct step_list *out)
{
    struct store_list l;
    uint64_t now = 0;
    TRY(store_list(s, pins_dir, &l));
    struct step_list pins = { .step = mem_array(NULL, l.count + 1, sizeof(uint64_t)) };
    status *st = pins.step ? NULL : ERR(NO_MEMORY, "a list of %zu pins", l.count);
    if (!st && l.count)
        st = store_now(s, &now);
    for (size_t i = 0; i < l.count && !st; i++) {
        st = look_at(s, &l.entry[i], now, tidy, &pins);
        if (status_code(st) == ST_NOT_FOUND) {
            status_free(st);
            st = NULL;
        }
    }
    store_list_free(&l);
    if (st) {
        step_list_free(&pins);
        return status_wrap(st, "readers' pins");
    }
    qsort(pins.step, pins.count, sizeof *pins.step, by_step);
    *out = pins;
    return NULL;
}

bool pins_hold(const struct step_list *l, uint64_t step)
{
    for (size_t i = 0; i < l->count; i++)
        if (l->step[i] == step)
            return true;
    return false;
}
