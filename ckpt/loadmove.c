/* loadmove: see loadmove.h.
 *
 *   reader threads    run: read and verify -> what stays here to its place, the rest into messages
 *   calling thread    open rounds -> send a round's messages when its last run is packed -> unpack -> open the next
 *
 * Up to MOVE_ROUNDS rounds are open: one is read while those before it travel. No rank waits for another one but for
 * its messages. A run whose bytes are wanted here just as they are stored is read into its place, and copied nowhere.
 *
 * Invariants: (1) only the calling thread calls comm; messages of a pair go in the order of rounds; (2) what a run
 * packs and places belongs to it alone, so readers share nothing but `synced`; (3) a rank that fails goes on taking
 * part, with whatever bytes its messages hold, and reads no more; its error is that of its first bad run, however its
 * threads were timed. */
#include "ckpt/loadmove.h"

#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { LOAD_TAG = 2, ALIGN = 4096, SLOT_BYTES = MOVE_RUN_BYTES + ALIGN, POLL_NS = 100000 };

/* An open round. */
struct flight {
    uint64_t round, left; /* left: runs that are not packed yet; synced */
    size_t *place;        /* where in `send` each part goes: by block, use and member, others than us */
    unsigned char *send, *receive;
    size_t *send_at, *receive_at; /* [size + 1] by peer */
    struct comm_req sending, receiving;
    bool sent, unpacked;
};

struct reader {
    struct move *v;
    unsigned char *slot; /* NULL: no run needs it */
    struct thread thread;
};

struct move {
    struct comm *c;
    const struct metadata *m;
    const struct load_want *want;
    const struct load_plan *p;
    const struct load_source *from;
    struct load_run *run; /* this rank's, in the order of rounds */
    uint64_t *round_run;  /* [rounds + 1] the first one of a round */
    uint64_t runs;
    struct flight flight[MOVE_ROUNDS]; /* round r: [r % MOVE_ROUNDS] */
    struct comm_xfer *xfer;            /* [size] */
    struct reader reader[MOVE_READERS];
    unsigned char *slots; /* of all readers; NULL: no run needs one */
    struct {
        pthread_mutex_t lock;
        pthread_cond_t work, packed;
        uint64_t next, open; /* runs taken, runs of open rounds */
        uint64_t packs;      /* rounds packed so far */
        uint64_t bad;        /* the first run that failed; UINT64_MAX: none */
        status *st;          /* its error */
        bool quit;
    } synced;
};

/* ---- which bytes go where */

/* This rank's blocks of a round: [*first, *end) of the plan's. */
static void my_blocks(const struct move *v, uint64_t round, uint64_t *first, uint64_t *end)
{
    const struct load_plan *p = v->p;
    uint64_t i = p->round[round];
    while (i < p->round[round + 1] && p->block[i].reader < v->c->rank)
        i++;
    *first = i;
    while (i < p->round[round + 1] && p->block[i].reader == v->c->rank)
        i++;
    *end = i;
}

static size_t elem_bytes(const struct move *v, const struct load_use *u)
{
    return dtype_bytes(v->m->tensor[use_group(v->p, u)->tensor].dtype);
}

/* The i-th rank's want that a use serves. */
static const struct load_want *want_of(const struct move *v, const struct load_group *g, uint64_t i)
{
    return &v->want[v->p->member[g->first + i]];
}

/* Where the want has element `lo` of the stored run, if [lo, hi) are in its memory as they are stored; else NULL. */
static unsigned char *home_of(const struct reshard_copy *c, size_t elem, uint64_t lo, uint64_t hi,
                              const struct load_want *w)
{
    if (c->ndim != 1 || c->src_stride[0] != 1 || c->dst_stride[0] != 1 || c->src > lo || c->src + c->len[0] < hi)
        return NULL;
    return (unsigned char *)w->dst + (c->dst + (lo - c->src)) * elem;
}

/* A block's elements, as positions in its stored run. */
static void block_elems(const struct move *v, const struct load_block *b, size_t elem, uint64_t *lo, uint64_t *hi)
{
    *lo = b->block * (META_BLOCK_BYTES / elem);
    *hi = *lo + block_bytes(&v->m->piece[b->piece], b->block) / elem;
}

static unsigned char *block_home(const struct move *v, const struct load_block *b)
{
    for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
        const struct load_use *u = &v->p->use[k];
        const struct load_group *g = use_group(v->p, u);
        size_t elem = elem_bytes(v, u);
        uint64_t lo, hi;
        block_elems(v, b, elem, &lo, &hi);
        for (uint64_t j = 0; j < g->count; j++) {
            const struct load_want *w = want_of(v, g, j);
            unsigned char *home = w->rank == v->c->rank ? home_of(&v->p->list.copy[u->copy], elem, lo, hi, w) : NULL;
            if (home && ((uintptr_t)home - block_offset(v->m, b)) % v->from->align == 0)
                return home;
        }
    }
    return NULL;
}

/* Whether a block can be read together with the run before it. */
static bool joins(const struct move *v, const struct load_run *r, const struct load_block *b, unsigned char *home)
{
    uint64_t offset = block_offset(v->m, b), end = r->offset + r->bytes;
    if (v->m->piece[b->piece].file != v->m->piece[r->block->piece].file || offset < end ||
        offset + block_bytes(&v->m->piece[b->piece], b->block) - r->offset > MOVE_RUN_BYTES)
        return false;
    if (home || r->home)
        return home && r->home && offset == end && home == r->home + r->bytes;
    return offset - end <= MOVE_GAP_BYTES;
}

static status *make_runs(struct move *v)
{
    uint64_t rounds = v->p->rounds, first, end, most = 0;
    v->round_run = mem_calloc(rounds + 1, sizeof *v->round_run);
    for (uint64_t r = 0; r < rounds; r++) {
        my_blocks(v, r, &first, &end);
        most += end - first;
    }
    v->run = mem_array(NULL, most + 1, sizeof *v->run);
    if (!v->round_run || !v->run)
        return ERR(NO_MEMORY, "%llu blocks to read", (unsigned long long)most);
    for (uint64_t r = 0; r < rounds; r++) {
        my_blocks(v, r, &first, &end);
        for (uint64_t i = first; i < end; i++) {
            const struct load_block *b = &v->p->block[i];
            unsigned char *home = block_home(v, b);
            uint64_t offset = block_offset(v->m, b);
            if (v->runs == v->round_run[r] || !joins(v, &v->run[v->runs - 1], b, home))
                v->run[v->runs++] =
                    (struct load_run){ .block = b, .round = (uint32_t)r, .offset = offset, .home = home };
            struct load_run *run = &v->run[v->runs - 1];
            run->blocks++;
            run->bytes = offset + block_bytes(&v->m->piece[b->piece], b->block) - run->offset;
        }
        v->round_run[r + 1] = v->runs;
    }
    return NULL;
}

/* Bytes to each peer and from each peer in a round, as offsets into the two message buffers. Returns the parts that
 * this rank sends. */
static uint64_t measure(const struct move *v, uint64_t round, struct flight *f)
{
    const struct load_plan *p = v->p;
    size_t n = (size_t)v->c->size;
    uint64_t parts = 0;
    int me = v->c->rank;
    memset(f->send_at, 0, (n + 1) * sizeof *f->send_at);
    memset(f->receive_at, 0, (n + 1) * sizeof *f->receive_at);
    for (uint64_t i = p->round[round]; i < p->round[round + 1]; i++) {
        const struct load_block *b = &p->block[i];
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            const struct load_group *g = use_group(p, &p->use[k]);
            size_t bytes = p->use[k].elems * elem_bytes(v, &p->use[k]);
            for (uint64_t j = 0; j < g->count; j++) {
                int to = want_of(v, g, j)->rank;
                if (b->reader == me && to != me) {
                    f->send_at[to + 1] += bytes;
                    parts++;
                }
                if (b->reader != me && to == me)
                    f->receive_at[b->reader + 1] += bytes;
            }
        }
    }
    for (size_t r = 0; r < n; r++) {
        f->send_at[r + 1] += f->send_at[r];
        f->receive_at[r + 1] += f->receive_at[r];
    }
    return parts;
}

/* Give every part that the round's runs send its place. send_at is as measured before and after. */
static void give_places(struct move *v, struct flight *f)
{
    size_t n = (size_t)v->c->size;
    uint64_t at = 0;
    for (uint64_t i = v->round_run[f->round]; i < v->round_run[f->round + 1]; i++) {
        struct load_run *r = &v->run[i];
        r->first_place = at;
        for (const struct load_block *b = r->block; b < r->block + r->blocks; b++)
            for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
                const struct load_use *u = &v->p->use[k];
                const struct load_group *g = use_group(v->p, u);
                for (uint64_t j = 0; j < g->count; j++) {
                    int to = want_of(v, g, j)->rank;
                    if (to == v->c->rank)
                        continue;
                    f->place[at++] = f->send_at[to];
                    f->send_at[to] += u->elems * elem_bytes(v, u);
                }
            }
    }
    memmove(f->send_at + 1, f->send_at, n * sizeof *f->send_at); /* each is now where the next one began */
    f->send_at[0] = 0;
}

/* ---- readers */

/* What a run took beside its reading. */
struct spread {
    struct report_clock pack, place;
};

/* From a block to its place here, unless it was read there, and into messages. Returns the parts packed. */
static uint64_t spread_block(const struct move *v, const struct flight *f, const struct load_block *b,
                             const unsigned char *src, const size_t *place, struct spread *took)
{
    uint64_t parts = 0;
    for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
        const struct load_use *u = &v->p->use[k];
        const struct reshard_copy *c = &v->p->list.copy[u->copy];
        const struct load_group *g = use_group(v->p, u);
        size_t elem = elem_bytes(v, u);
        uint64_t lo, hi;
        block_elems(v, b, elem, &lo, &hi);
        for (uint64_t j = 0; j < g->count; j++) {
            const struct load_want *w = want_of(v, g, j);
            bool here = w->rank == v->c->rank;
            uint64_t begin = clock_ns();
            if (!here)
                reshard_pack(c, elem, src, lo, hi, f->send + place[parts++]);
            else if (home_of(c, elem, lo, hi, w) != src)
                reshard_apply(c, elem, src, lo, hi, w->dst);
            else
                continue;
            report_add(here ? &took->place : &took->pack, begin, clock_ns(), 0, u->elems * elem);
        }
    }
    return parts;
}

static status *do_run(const struct move *v, const struct load_run *r, unsigned char *slot)
{
    const struct flight *f = &v->flight[r->round % MOVE_ROUNDS];
    const unsigned char *src = v->from->at ? v->from->at(v->from->arg, r) : NULL;
    if (!src) {
        unsigned char *to = r->home ? r->home : slot + r->offset % ALIGN;
        TRY(v->from->read(v->from->arg, v->p, r, to));
        src = to;
    }
    uint64_t place = r->first_place;
    struct spread took = { 0 };
    for (const struct load_block *b = r->block; b < r->block + r->blocks; b++)
        place += spread_block(v, f, b, src + (block_offset(v->m, b) - r->offset), f->place + place, &took);
    report_note_clock(v->from->cost, REPORT_EXCHANGE, &took.pack);
    report_note_clock(v->from->cost, REPORT_PLACE, &took.place);
    return NULL;
}

static status *reader_main(void *arg)
{
    const struct reader *me = arg;
    struct move *v = me->v;
    pthread_mutex_lock(&v->synced.lock);
    for (;;) {
        while (v->synced.next == v->synced.open && !v->synced.quit)
            pthread_cond_wait(&v->synced.work, &v->synced.lock);
        if (v->synced.quit)
            break;
        uint64_t i = v->synced.next++;
        bool skip = v->synced.bad < i;
        pthread_mutex_unlock(&v->synced.lock);
        status *st = skip ? NULL : do_run(v, &v->run[i], me->slot);
        pthread_mutex_lock(&v->synced.lock);
        if (st && i < v->synced.bad) {
            status_free(v->synced.st);
            v->synced.st = st;
            v->synced.bad = i;
        } else {
            status_free(st);
        }
        if (--v->flight[v->run[i].round % MOVE_ROUNDS].left == 0) {
            v->synced.packs++;
            pthread_cond_signal(&v->synced.packed);
        }
    }
    pthread_mutex_unlock(&v->synced.lock);
    return NULL;
}

/* ---- the calling thread */

static status *post(struct move *v, const struct flight *f, bool send, struct comm_req *req)
{
    const size_t *at = send ? f->send_at : f->receive_at;
    unsigned char *buf = send ? f->send : f->receive;
    size_t n = 0;
    for (int r = 0; r < v->c->size; r++)
        if (at[r + 1] > at[r])
            v->xfer[n++] = (struct comm_xfer){
                .peer = r, .tag = LOAD_TAG, .send = send, .buf = buf + at[r], .bytes = at[r + 1] - at[r]
            };
    return comm_iexchange(v->c, v->xfer, n, NULL, req);
}

/* Let the readers have a round, and its messages arrive. */
static status *open_round(struct move *v, uint64_t round)
{
    struct flight *f = &v->flight[round % MOVE_ROUNDS];
    f->round = round;
    f->sent = f->unpacked = false;
    measure(v, round, f);
    give_places(v, f);
    TRY(post(v, f, false, &f->receiving));
    pthread_mutex_lock(&v->synced.lock);
    f->left = v->round_run[round + 1] - v->round_run[round];
    v->synced.packs += f->left == 0;
    v->synced.open = v->round_run[round + 1];
    pthread_cond_broadcast(&v->synced.work);
    pthread_mutex_unlock(&v->synced.lock);
    return NULL;
}

static void unpack(const struct move *v, const struct flight *f)
{
    const struct load_plan *p = v->p;
    for (uint64_t i = p->round[f->round]; i < p->round[f->round + 1]; i++) {
        const struct load_block *b = &p->block[i];
        if (b->reader == v->c->rank)
            continue;
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            const struct reshard_copy *c = &p->list.copy[p->use[k].copy];
            const struct load_group *g = use_group(p, &p->use[k]);
            size_t elem = elem_bytes(v, &p->use[k]);
            uint64_t lo, hi;
            block_elems(v, b, elem, &lo, &hi);
            for (uint64_t j = 0; j < g->count; j++) {
                const struct load_want *w = want_of(v, g, j);
                if (w->rank == v->c->rank)
                    f->receive_at[b->reader] +=
                        reshard_unpack(c, elem, f->receive + f->receive_at[b->reader], lo, hi, w->dst);
            }
        }
    }
}

/* Move an open round on as far as it goes without waiting. */
static status *move_on(struct move *v, struct flight *f, bool *moved)
{
    bool done;
    if (!f->unpacked) {
        TRY(comm_test(&f->receiving, &done));
        if (done) {
            uint64_t begin = clock_ns(), bytes = f->receive_at[v->c->size];
            unpack(v, f);
            report_note(v->from->cost, REPORT_PLACE, begin, 0, bytes);
            f->unpacked = *moved = true;
        }
    }
    if (f->sent && comm_pending(&f->sending)) {
        TRY(comm_test(&f->sending, &done));
        *moved = *moved || done;
    }
    return NULL;
}

/* Until a round is packed that was not before (`seen`), or it is time to look at the messages again. */
static void wait_a_while(struct move *v, uint64_t seen, bool messages)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += POLL_NS;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    pthread_mutex_lock(&v->synced.lock);
    if (v->synced.packs == seen && messages)
        (void)pthread_cond_timedwait(&v->synced.packed, &v->synced.lock, &t);
    while (v->synced.packs == seen && !messages)
        pthread_cond_wait(&v->synced.packed, &v->synced.lock);
    pthread_mutex_unlock(&v->synced.lock);
}

/* idle: this rank has nothing more to send, so it waits for others. */
static void wait_for(struct move *v, uint64_t seen, bool messages, bool idle)
{
    uint64_t begin = clock_ns();
    wait_a_while(v, seen, messages);
    if (idle)
        report_note(v->from->cost, REPORT_EXCHANGE, begin, clock_ns() - begin, 0);
}

static uint64_t packs_of(struct move *v, const struct flight *f, bool *packed)
{
    pthread_mutex_lock(&v->synced.lock);
    uint64_t packs = v->synced.packs;
    *packed = f->left == 0;
    pthread_mutex_unlock(&v->synced.lock);
    return packs;
}

/* Only the transport's errors end it early. */
static status *move_rounds(struct move *v)
{
    uint64_t opened = 0, sent = 0, done = 0, rounds = v->p->rounds;
    while (done < rounds) {
        bool moved = false, packed = false, messages = false;
        while (opened < rounds && opened < done + MOVE_ROUNDS)
            TRY(open_round(v, opened++));
        uint64_t packs = packs_of(v, &v->flight[sent % MOVE_ROUNDS], &packed);
        if (sent < opened && packed) {
            struct flight *f = &v->flight[sent++ % MOVE_ROUNDS];
            TRY(post(v, f, true, &f->sending));
            f->sent = moved = true;
        }
        for (uint64_t r = done; r < opened; r++) {
            struct flight *f = &v->flight[r % MOVE_ROUNDS];
            TRY(move_on(v, f, &moved));
            messages = messages || comm_pending(&f->receiving) || comm_pending(&f->sending);
        }
        const struct flight *oldest = &v->flight[done % MOVE_ROUNDS];
        if (oldest->sent && oldest->unpacked && !comm_pending(&oldest->sending))
            done++;
        else if (!moved)
            wait_for(v, packs, messages, sent == opened);
    }
    return NULL;
}

/* ---- memory and threads */

static status *allocate(struct move *v)
{
    size_t n = (size_t)v->c->size, send = 0, receive = 0;
    uint64_t parts = 0, flights = v->p->rounds < MOVE_ROUNDS ? v->p->rounds : MOVE_ROUNDS;
    v->xfer = mem_calloc(n, sizeof *v->xfer);
    for (uint64_t i = 0; i < flights; i++) {
        v->flight[i].send_at = mem_calloc(n + 1, sizeof(size_t));
        v->flight[i].receive_at = mem_calloc(n + 1, sizeof(size_t));
        if (!v->flight[i].send_at || !v->flight[i].receive_at)
            return ERR(NO_MEMORY, "exchange with %zu ranks", n);
    }
    for (uint64_t r = 0; r < v->p->rounds; r++) {
        const struct flight *f = &v->flight[0];
        uint64_t k = measure(v, r, &v->flight[0]);
        parts = k > parts ? k : parts;
        send = f->send_at[n] > send ? f->send_at[n] : send;
        receive = f->receive_at[n] > receive ? f->receive_at[n] : receive;
    }
    for (uint64_t i = 0; i < flights; i++) {
        struct flight *f = &v->flight[i];
        f->place = mem_array(NULL, parts + 1, sizeof *f->place);
        f->send = mem_calloc(send + 1, 1); /* zeroed: what a rank that fails sends is defined */
        f->receive = mem_alloc(receive);
        if (!f->place || !f->send || !f->receive)
            return ERR(NO_MEMORY, "rounds of %zu bytes to send and %zu to receive", send, receive);
    }
    return v->xfer ? NULL : ERR(NO_MEMORY, "exchange with %zu ranks", n);
}

static bool needs_slots(const struct move *v)
{
    for (uint64_t i = 0; i < v->runs; i++)
        if (!v->run[i].home && !(v->from->at && v->from->at(v->from->arg, &v->run[i])))
            return true;
    return false;
}

static status *start_readers(struct move *v)
{
    if (needs_slots(v)) {
        v->slots = mem_block((size_t)MOVE_READERS * SLOT_BYTES, ALIGN);
        if (!v->slots)
            return ERR(NO_MEMORY, "%d bytes to read into", MOVE_READERS * SLOT_BYTES);
    }
    for (int i = 0; i < MOVE_READERS && (uint64_t)i < v->runs; i++) {
        char name[16];
        struct reader *r = &v->reader[i];
        snprintf(name, sizeof name, "tsr-load-%d", i);
        r->v = v;
        r->slot = v->slots ? v->slots + (size_t)i * SLOT_BYTES : NULL;
        TRY(thread_start(&r->thread, name, reader_main, r));
    }
    return NULL;
}

static void synced_init(struct move *v)
{
    pthread_condattr_t a;
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_mutex_init(&v->synced.lock, NULL);
    pthread_cond_init(&v->synced.work, NULL);
    pthread_cond_init(&v->synced.packed, &a);
    pthread_condattr_destroy(&a);
    v->synced.bad = UINT64_MAX;
}

static void stop(struct move *v)
{
    pthread_mutex_lock(&v->synced.lock);
    v->synced.quit = true;
    pthread_cond_broadcast(&v->synced.work);
    pthread_mutex_unlock(&v->synced.lock);
    for (int i = 0; i < MOVE_READERS; i++)
        status_free(thread_join(&v->reader[i].thread));
    if (v->slots)
        mem_block_free(v->slots, (size_t)MOVE_READERS * SLOT_BYTES);
    for (int i = 0; i < MOVE_ROUNDS; i++) {
        struct flight *f = &v->flight[i];
        mem_free(f->place);
        mem_free(f->send);
        mem_free(f->receive);
        mem_free(f->send_at);
        mem_free(f->receive_at);
    }
    mem_free(v->xfer);
    mem_free(v->run);
    mem_free(v->round_run);
    pthread_mutex_destroy(&v->synced.lock);
    pthread_cond_destroy(&v->synced.work);
    pthread_cond_destroy(&v->synced.packed);
}

/* Nobody sends before all are ready to receive. */
static status *ready(struct move *v)
{
    TRY(make_runs(v));
    TRY(allocate(v));
    return start_readers(v);
}

/* comm_agree, but ranks that are done leave their cores to the others. */
static status *agree_asleep(struct comm *c, status *st)
{
    uint64_t failed = st != NULL, any = 0;
    struct comm_req req;
    status *broken = comm_iallreduce(c, &failed, &any, 1, COMM_U64, COMM_MAX, &req);
    if (!broken)
        broken = comm_wait(&req);
    if (broken) {
        status_free(st);
        return broken;
    }
    return any ? comm_agree(c, st) : NULL;
}

status *load_move(struct comm *c, const struct metadata *m, const struct load_want *want, const struct load_plan *p,
                  const struct load_source *from, status *mine)
{
    struct move v = { .c = c, .m = m, .want = want, .p = p, .from = from };
    synced_init(&v);
    status *st = comm_agree(c, mine ? mine : ready(&v));
    status *broken = st ? NULL : move_rounds(&v);
    stop(&v);
    if (st || broken) {
        status_free(v.synced.st);
        return st ? st : broken;
    }
    return agree_asleep(c, v.synced.st);
}
