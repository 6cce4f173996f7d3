/* loadring: see loadring.h.
 *
 * Invariants: (1) a berth's lock guards all of it but the slots' bytes, which belong to its rank until they are given,
 * and to those it was given to until the last of them is done; (2) a rank gets one mail for a slot until that slot is
 * given again, so mail never overflows; (3) nobody holds two locks. */
#include "ckpt/loadring.h"

#include "comm/agree.h"
#include "comm/base/mem.h"

#include <pthread.h>
#include <time.h>

enum { HUGE = WINDOW_HUGE_BYTES };

struct berth {
    pthread_mutex_t lock;
    pthread_cond_t bell, freed;
    uint64_t bells;
    uint32_t left[RING_SLOTS]; /* ranks that have not taken their parts; 0: free */
    bool filling[RING_SLOTS];
    bool quit;
    uint64_t head, tail; /* of mail, ever: got and put */
    struct ring_mail mail[];
};

static size_t up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

static size_t mails(const struct load_ring *r)
{
    return (size_t)r->ranks * RING_SLOTS;
}

static size_t berth_bytes(const struct load_ring *r)
{
    return up(sizeof(struct berth) + mails(r) * sizeof(struct ring_mail), HUGE); /* the slots are behind it */
}

/* From slot to slot: each begins where a huge page can; what none uses is no memory. */
static size_t stride(const struct load_ring *r)
{
    return up(r->slot_bytes, HUGE);
}

static void berth_init(struct berth *b)
{
    pthread_mutexattr_t m;
    pthread_condattr_t c;
    pthread_mutexattr_init(&m);
    pthread_mutexattr_setpshared(&m, PTHREAD_PROCESS_SHARED);
    pthread_condattr_init(&c);
    pthread_condattr_setpshared(&c, PTHREAD_PROCESS_SHARED);
    pthread_condattr_setclock(&c, CLOCK_MONOTONIC);
    pthread_mutex_init(&b->lock, &m);
    pthread_cond_init(&b->bell, &c);
    pthread_cond_init(&b->freed, &c);
    pthread_mutexattr_destroy(&m);
    pthread_condattr_destroy(&c);
}

status *ring_open(struct comm *node, bool giving, size_t slot_bytes, struct load_ring *out)
{
    struct load_ring r = { .rank = node->rank, .ranks = node->size, .slot_bytes = slot_bytes };
    uint8_t any = giving;
    *out = r;
    TRY(comm_allreduce(node, &any, 1, COMM_U8, COMM_MAX, NULL));
    if (any)
        TRY(comm_window_open(node, berth_bytes(&r) + (giving ? RING_SLOTS * stride(&r) : 0), &r.window));
    r.berth = mem_array(NULL, (size_t)r.ranks, sizeof *r.berth);
    for (int i = 0; r.berth && i < r.ranks; i++)
        r.berth[i] = r.window.part ? (struct berth *)(void *)r.window.part[i] : NULL;
    if (!r.window.part)
        r.own = mem_calloc(1, berth_bytes(&r));
    else if (r.berth)
        r.own = r.berth[r.rank];
    if (r.own)
        berth_init(r.own);
    /* and nobody uses another one's berth before this */
    status *st = comm_agree(node, r.berth && r.own ? NULL : ERR(NO_MEMORY, "ring of %d ranks", r.ranks));
    if (st)
        ring_close(&r);
    *out = r;
    return st;
}

bool ring_shared(const struct load_ring *r)
{
    return r->window.part;
}

void ring_close(struct load_ring *r)
{
    if (r->own && !r->window.part) {
        pthread_mutex_destroy(&r->own->lock);
        pthread_cond_destroy(&r->own->bell);
        pthread_cond_destroy(&r->own->freed);
        mem_free(r->own);
    }
    mem_free(r->berth);
    comm_window_close(&r->window); /* what is in it needs no end: it goes with the memory */
    *r = (struct load_ring){ 0 };
}

/* ---- by readers */

static uint32_t find_free(const struct berth *b)
{
    uint32_t i = 0;
    while (i < RING_SLOTS && (b->left[i] || b->filling[i]))
        i++;
    return i;
}

bool ring_take(struct load_ring *r, uint32_t *slot)
{
    struct berth *b = r->own;
    pthread_mutex_lock(&b->lock);
    uint32_t i = find_free(b);
    while (i == RING_SLOTS && !b->quit) {
        pthread_cond_wait(&b->freed, &b->lock);
        i = find_free(b);
    }
    bool found = i < RING_SLOTS;
    if (found)
        b->filling[i] = true;
    pthread_mutex_unlock(&b->lock);
    *slot = i;
    return found;
}

bool ring_is_huge(struct load_ring *r, uint32_t slot)
{
    size_t bytes = r->slot_bytes / HUGE * HUGE; /* what is over has small ones */
    if (r->pages[slot] == RING_UNKNOWN)
        r->pages[slot] =
            bytes && comm_window_huge(&r->window, berth_bytes(r) + slot * stride(r), bytes) ? RING_HUGE : RING_SMALL;
    return r->pages[slot] == RING_HUGE;
}

unsigned char *ring_slot(const struct load_ring *r, int rank, uint32_t slot)
{
    return r->window.part[rank] + berth_bytes(r) + slot * stride(r);
}

/* Put mail into a berth, unless it is NULL, and ring. */
static void ring_at(struct berth *b, const struct ring_mail *m, size_t room)
{
    pthread_mutex_lock(&b->lock);
    if (m)
        b->mail[b->tail++ % room] = *m;
    b->bells++;
    pthread_cond_signal(&b->bell);
    pthread_mutex_unlock(&b->lock);
}

void ring_give(struct load_ring *r, const struct ring_mail *m, const uint8_t *to)
{
    struct ring_mail mail = *m;
    uint32_t n = 0;
    mail.from = r->rank;
    for (int i = 0; i < r->ranks; i++)
        n += to[i] != 0;
    pthread_mutex_lock(&r->own->lock);
    r->own->left[m->slot] = n;
    r->own->filling[m->slot] = false;
    pthread_mutex_unlock(&r->own->lock);
    for (int i = 0; i < r->ranks; i++)
        if (to[i] && i != r->rank)
            ring_at(r->berth[i], &mail, mails(r));
}

void ring_bell(struct load_ring *r)
{
    ring_at(r->own, NULL, 0);
}

/* ---- by the calling thread */

uint64_t ring_bells(struct load_ring *r)
{
    pthread_mutex_lock(&r->own->lock);
    uint64_t n = r->own->bells;
    pthread_mutex_unlock(&r->own->lock);
    return n;
}

bool ring_next(struct load_ring *r, struct ring_mail *out)
{
    struct berth *b = r->own;
    pthread_mutex_lock(&b->lock);
    bool any = b->head < b->tail;
    if (any)
        *out = b->mail[b->head++ % mails(r)];
    pthread_mutex_unlock(&b->lock);
    return any;
}

void ring_done(struct load_ring *r, const struct ring_mail *m)
{
    struct berth *b = r->berth[m->from];
    pthread_mutex_lock(&b->lock);
    if (--b->left[m->slot] == 0)
        pthread_cond_signal(&b->freed);
    pthread_mutex_unlock(&b->lock);
}

void ring_wait(struct load_ring *r, uint64_t seen, uint64_t timeout_ns)
{
    struct berth *b = r->own;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    uint64_t until = (uint64_t)t.tv_nsec + timeout_ns;
    t.tv_sec += (time_t)(until / 1000000000);
    t.tv_nsec = (long)(until % 1000000000);
    pthread_mutex_lock(&b->lock);
    if (b->bells == seen && timeout_ns)
        (void)pthread_cond_timedwait(&b->bell, &b->lock, &t);
    while (b->bells == seen && !timeout_ns)
        pthread_cond_wait(&b->bell, &b->lock);
    pthread_mutex_unlock(&b->lock);
}

void ring_quit(struct load_ring *r)
{
    pthread_mutex_lock(&r->own->lock);
    r->own->quit = true;
    pthread_cond_broadcast(&r->own->freed);
    pthread_mutex_unlock(&r->own->lock);
}
