/* loadmove: see loadmove.h.
 *
 *   reader threads    run: read into a slot that the node sees, and verify -> what stays here to its place, what goes
 *                     to other nodes into messages
 *   calling thread    open trips -> send a trip's messages when its last run is packed -> unpack -> open the next;
 *                     and from the slots of others on the node to the places here, as they are filled
 *
 * A round in which this rank sends or receives messages is a trip. Up to MOVE_ROUNDS trips are open: one is read while
 * those before it travel; what comes before the next one may be read at any time. No rank waits for another one but for
 * its messages and for its slots: the oldest round that is not over is the oldest of all its ranks. A run whose bytes
 * are wanted here just as they are stored is read into its place, and copied nowhere else here. Where slots could not
 * have huge pages, runs are read into private memory that has and copied to slots: direct reads into pages of 4 KiB
 * take twice as long as that.
 *
 * Invariants: (1) only the calling thread calls comm; messages of a pair go in the order of rounds; (2) what a run
 * packs and places belongs to it alone, so readers share nothing but `synced`; (3) a rank that fails goes on taking
 * part, with whatever bytes its messages hold and slots that say so, and reads no more; its error is that of its first
 * bad run, however its threads were timed; (4) ranks of a node either all share slots, or none does and all messages
 * are like those to other nodes. */
#include "ckpt/loadmove.h"

#include "ckpt/loadring.h"
#include "comm/agree.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"
#include "comm/base/thread.h"

#include <stdio.h>
#include <string.h>

enum { NO_TRIP = UINT32_MAX };
enum { LOAD_TAG = 2, ALIGN = 4096, SLOT_BYTES = MOVE_RUN_BYTES + ALIGN, POLL_NS = 100000 };

/* An open trip. */
struct flight {
    uint64_t trip, left; /* left: runs that are not packed yet; synced */
    size_t *place;       /* where in `send` each part goes: by block and use, of those that travel */
    unsigned char *send, *receive;
    size_t *send_at, *receive_at; /* [size + 1] by peer */
    struct comm_req sending, receiving;
    bool sent, unpacked;
};

struct reader {
    struct move *v;
    unsigned char *slot; /* NULL: no run needs it */
    uint8_t *to;         /* [ranks of the node] */
    void *keep;          /* the source's */
    struct thread thread;
};

struct move {
    struct comm *c;
    const struct metadata *m;
    const struct load_want *want;
    const struct load_part *p;
    const struct load_source *from;
    struct load_ring ring;
    int32_t *local; /* [size] the rank's number on this node, if slots bring its bytes and ours; else -1 */
    const struct part_block **take; /* blocks to take from slots, by who reads them and number */
    uint64_t *first_take;           /* [ranks of the node + 1] */
    uint64_t left;                  /* of them */
    struct load_run *run;           /* this rank's, in the order of rounds */
    uint64_t *round_run;            /* [rounds + 1] the first one of a round */
    uint64_t runs;
    uint64_t *trip, trips;             /* the rounds that are trips, ascending */
    struct flight flight[MOVE_ROUNDS]; /* trip t: [t % MOVE_ROUNDS] */
    struct comm_xfer *xfer;            /* [size] */
    struct reader reader[MOVE_READERS_MOST];
    int readers;
    unsigned char *slots; /* of all readers; NULL: no run needs one */
    struct {
        pthread_mutex_t lock;
        pthread_cond_t work;
        uint64_t next, open; /* runs taken, and that may be */
        uint64_t over;       /* runs that were carried out */
        uint64_t bad;        /* the first run that failed; UINT64_MAX: none */
        status *st;          /* its error */
        bool quit;
    } synced;
};

/* ---- which bytes go where */

/* This rank's blocks of a round: [*first, *end) of the part's. */
static void my_blocks(const struct move *v, uint64_t round, uint64_t *first, uint64_t *end)
{
    const struct load_part *p = v->p;
    uint64_t i = p->round[round];
    while (i < p->round[round + 1] && p->block[i].reader != v->c->rank)
        i++;
    *first = i;
    while (i < p->round[round + 1] && p->block[i].reader == v->c->rank)
        i++;
    *end = i;
}

static size_t elem_bytes(const struct move *v, const struct part_block *b)
{
    return dtype_bytes(v->m->tensor[b->tensor].dtype);
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
static void block_elems(const struct move *v, const struct part_block *b, size_t elem, uint64_t *lo, uint64_t *hi)
{
    *lo = b->block * (META_BLOCK_BYTES / elem);
    *hi = *lo + block_bytes(&v->m->piece[b->piece], b->block) / elem;
}

static unsigned char *block_home(const struct move *v, const struct part_block *b)
{
    size_t elem = elem_bytes(v, b);
    uint64_t lo, hi;
    block_elems(v, b, elem, &lo, &hi);
    for (const struct part_use *u = &v->p->use[b->first_use]; u < &v->p->use[b->first_use + b->uses]; u++) {
        if (u->rank != v->c->rank)
            continue;
        unsigned char *home = home_of(&v->p->copy[u->copy], elem, lo, hi, &v->want[u->want]);
        if (home && ((uintptr_t)home - block_offset(v->m, b)) % v->from->align == 0)
            return home;
    }
    return NULL;
}

/* Another rank of the node takes some of it from a slot. */
static bool is_given(const struct move *v, const struct part_block *b)
{
    for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++)
        if (v->p->use[k].rank != v->c->rank && v->local[v->p->use[k].rank] >= 0)
            return true;
    return false;
}

/* Whether the block goes on in memory where the run ends. */
static bool goes_on(const struct load_run *r, uint64_t offset, const unsigned char *home)
{
    return home && r->home && offset == r->offset + r->bytes && home == r->home + r->bytes;
}

/* Whether a block can be read together with the run before it. */
static bool joins(const struct move *v, const struct load_run *r, const struct part_block *b, unsigned char *home)
{
    uint64_t offset = block_offset(v->m, b), end = r->offset + r->bytes, few = v->from->request_bytes;
    uint64_t bytes = block_bytes(&v->m->piece[b->piece], b->block);
    if (v->m->piece[b->piece].file != v->m->piece[r->block->piece].file || offset < end ||
        offset + bytes - r->offset > MOVE_RUN_BYTES)
        return false;
    if ((home || r->home) && bytes >= few && r->bytes >= few)
        return goes_on(r, offset, home);
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
            const struct part_block *b = &v->p->block[i];
            unsigned char *home = block_home(v, b);
            uint64_t offset = block_offset(v->m, b);
            if (v->runs == v->round_run[r] || !joins(v, &v->run[v->runs - 1], b, home))
                v->run[v->runs++] = (struct load_run){ .block = b, .trip = NO_TRIP, .offset = offset, .home = home };
            struct load_run *run = &v->run[v->runs - 1];
            if (run->blocks && !goes_on(run, offset, home))
                run->home = NULL;
            run->blocks++;
            run->given = run->given || is_given(v, b);
            run->bytes = offset + block_bytes(&v->m->piece[b->piece], b->block) - run->offset;
        }
        v->round_run[r + 1] = v->runs;
    }
    return NULL;
}

/* Bytes to each peer and from each peer in a round that travel as messages, as offsets into the two message buffers.
 * Returns the parts that this rank sends. */
static uint64_t measure(const struct move *v, uint64_t round, struct flight *f)
{
    const struct load_part *p = v->p;
    size_t n = (size_t)v->c->size;
    uint64_t parts = 0;
    int me = v->c->rank;
    memset(f->send_at, 0, (n + 1) * sizeof *f->send_at);
    memset(f->receive_at, 0, (n + 1) * sizeof *f->receive_at);
    for (uint64_t i = p->round[round]; i < p->round[round + 1]; i++) {
        const struct part_block *b = &p->block[i];
        size_t elem = elem_bytes(v, b);
        for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
            int to = p->use[k].rank, peer = b->reader == me ? to : b->reader;
            if (peer == me || v->local[peer] >= 0)
                continue;
            (b->reader == me ? f->send_at : f->receive_at)[peer + 1] += p->use[k].elems * elem;
            parts += b->reader == me;
        }
    }
    for (size_t r = 0; r < n; r++) {
        f->send_at[r + 1] += f->send_at[r];
        f->receive_at[r + 1] += f->receive_at[r];
    }
    return parts;
}

static uint64_t first_run(const struct move *v, uint64_t trip)
{
    return v->round_run[v->trip[trip]];
}

static uint64_t end_run(const struct move *v, uint64_t trip)
{
    return v->round_run[v->trip[trip] + 1];
}

/* Give every part that the trip's runs send its place. send_at is as measured before and after. */
static void give_places(struct move *v, struct flight *f)
{
    size_t n = (size_t)v->c->size;
    uint64_t at = 0;
    for (uint64_t i = first_run(v, f->trip); i < end_run(v, f->trip); i++) {
        struct load_run *r = &v->run[i];
        r->first_place = at;
        for (const struct part_block *b = r->block; b < r->block + r->blocks; b++)
            for (uint64_t k = b->first_use; k < b->first_use + b->uses; k++) {
                int to = v->p->use[k].rank;
                if (to == v->c->rank || v->local[to] >= 0)
                    continue;
                f->place[at++] = f->send_at[to];
                f->send_at[to] += v->p->use[k].elems * elem_bytes(v, b);
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

/* From a block to its place here, unless it was read there, and into messages (f NULL: there are none). Returns the
 * parts packed. */
static uint64_t spread_block(const struct move *v, const struct flight *f, const struct part_block *b,
                             const unsigned char *src, const size_t *place, struct spread *took)
{
    uint64_t parts = 0, lo, hi;
    size_t elem = elem_bytes(v, b);
    block_elems(v, b, elem, &lo, &hi);
    for (const struct part_use *u = &v->p->use[b->first_use]; u < &v->p->use[b->first_use + b->uses]; u++) {
        const struct reshard_copy *c = &v->p->copy[u->copy];
        bool here = u->rank == v->c->rank;
        uint64_t begin = clock_ns();
        if (here && home_of(c, elem, lo, hi, &v->want[u->want]) != src)
            reshard_apply(c, elem, src, lo, hi, v->want[u->want].dst);
        else if (!here && v->local[u->rank] < 0)
            reshard_pack(c, elem, src, lo, hi, f->send + place[parts++]);
        else
            continue;
        report_add(here ? &took->place : &took->pack, begin, clock_ns(), 0, u->elems * elem);
    }
    return parts;
}

/* What others on this node take of a block: its elements [*lo, *hi), and who they are. */
static void given_span(const struct move *v, const struct part_block *b, size_t elem, uint64_t *lo, uint64_t *hi,
                       uint8_t *to)
{
    uint64_t first, end, from = UINT64_MAX, until = 0;
    for (const struct part_use *u = &v->p->use[b->first_use]; u < &v->p->use[b->first_use + b->uses]; u++) {
        if (u->rank == v->c->rank || v->local[u->rank] < 0)
            continue;
        reshard_span(&v->p->copy[u->copy], &first, &end);
        from = first < from ? first : from;
        until = end > until ? end : until;
        to[v->local[u->rank]] = 1;
    }
    block_elems(v, b, elem, lo, hi);
    *lo = from > *lo ? from : *lo;
    *hi = until < *hi ? until : *hi;
}

/* Who on this node takes something of a run, and what of it they do, from src to the slot unless it is there already.
 */
static uint64_t fill_slot(struct reader *me, const struct load_run *r, const unsigned char *src, unsigned char *slot)
{
    const struct move *v = me->v;
    uint64_t bytes = 0, lo, hi;
    memset(me->to, 0, (size_t)v->ring.ranks);
    for (const struct part_block *b = r->block; b < r->block + r->blocks; b++) {
        size_t elem = elem_bytes(v, b);
        given_span(v, b, elem, &lo, &hi, me->to);
        if (!src || hi <= lo)
            continue;
        uint64_t at = block_offset(v->m, b) - r->offset + (lo - b->block * (META_BLOCK_BYTES / elem)) * elem;
        if (src != slot)
            memcpy(slot + at, src + at, (hi - lo) * elem);
        bytes += (hi - lo) * elem;
    }
    return bytes;
}

/* Read a run to `to`, or find it in memory. */
static status *fetch(const struct move *v, const struct load_run *r, unsigned char *to, const unsigned char **src)
{
    const unsigned char *at = v->from->at ? v->from->at(v->from->arg, r) : NULL;
    if (!at) {
        TRY(v->from->read(v->from->arg, r, to));
        at = to;
    }
    *src = at;
    return NULL;
}

static void spread(const struct move *v, const struct load_run *r, const unsigned char *src)
{
    const struct flight *f = r->trip == NO_TRIP ? NULL : &v->flight[r->trip % MOVE_ROUNDS];
    const size_t *place = f ? f->place + r->first_place : NULL;
    struct spread took = { 0 };
    for (const struct part_block *b = r->block; b < r->block + r->blocks; b++) {
        uint64_t parts = spread_block(v, f, b, src + (block_offset(v->m, b) - r->offset), place, &took);
        place = place ? place + parts : NULL;
    }
    report_note_clock(v->from->cost, REPORT_EXCHANGE, &took.pack);
    report_note_clock(v->from->cost, REPORT_PLACE, &took.place);
}

/* A run of which others on this node take parts: read to its place here, or into the slot that they see if that is as
 * good as this reader's memory. */
static status *do_given(struct reader *me, const struct load_run *r, bool skip)
{
    struct move *v = me->v;
    struct ring_mail mail = { .from = v->ring.rank, .first = r->block->number, .blocks = r->blocks };
    const unsigned char *src = NULL;
    status *st = NULL;
    if (r->home && !skip)
        st = fetch(v, r, r->home, &src);
    uint64_t begin = clock_ns();
    if (!ring_take(&v->ring, &mail.slot))
        return st;
    uint64_t waited = clock_ns() - begin;
    unsigned char *slot = ring_slot(&v->ring, v->ring.rank, mail.slot) + r->offset % ALIGN;
    if (!r->home && !skip)
        st = fetch(v, r, ring_is_huge(&v->ring, mail.slot) ? slot : me->slot + r->offset % ALIGN, &src);
    begin = clock_ns();
    uint64_t bytes = fill_slot(me, r, src, slot);
    mail.offset = r->offset - r->offset % ALIGN;
    mail.bad = !src;
    me->to[v->ring.rank] = src == slot;
    ring_give(&v->ring, &mail, me->to);
    report_note(v->from->cost, REPORT_EXCHANGE, begin - waited, waited, bytes);
    if (src)
        spread(v, r, src);
    if (src == slot)
        ring_done(&v->ring, &mail);
    return st;
}

/* skip: a run before it failed. */
static status *do_run(struct reader *me, const struct load_run *r, bool skip)
{
    const unsigned char *src;
    if (r->given)
        return do_given(me, r, skip);
    if (!skip) {
        TRY(fetch(me->v, r, r->home ? r->home : me->slot + r->offset % ALIGN, &src));
        spread(me->v, r, src);
    }
    return NULL;
}

/* How many of the runs that are open, from the first that nobody has, one reader takes: those that lie together, but
 * not more than its share of them and of what is left in the end, unless they are small. */
static uint64_t take_runs(struct move *v, struct reader *me)
{
    uint64_t i = v->synced.next, n = 1, readers = (uint64_t)v->readers;
    struct load_run *first = &v->run[i];
    uint64_t end = first->offset + first->bytes, most = (v->synced.open - i + readers - 1) / readers;
    for (; i + n < v->synced.open && (n < most || end - first->offset < v->from->request_bytes); n++) {
        const struct load_run *r = &v->run[i + n];
        if (v->m->piece[r->block->piece].file != v->m->piece[first->block->piece].file || r->offset < end ||
            r->offset - end > MOVE_GAP_BYTES || r->offset + r->bytes - first->offset > v->from->ahead_bytes)
            break;
        end = r->offset + r->bytes;
    }
    for (struct load_run *r = first; r < first + n; r++) {
        r->keep = &me->keep;
        r->ahead = end - r->offset;
    }
    v->synced.next += n;
    return n;
}

static status *reader_main(void *arg)
{
    struct reader *me = arg;
    struct move *v = me->v;
    uint64_t i = 0, end = 0;
    pthread_mutex_lock(&v->synced.lock);
    for (;; i++) {
        while (i == end && v->synced.next == v->synced.open && !v->synced.quit)
            pthread_cond_wait(&v->synced.work, &v->synced.lock);
        if (v->synced.quit)
            break;
        if (i == end) {
            i = v->synced.next;
            end = i + take_runs(v, me);
        }
        bool skip = v->synced.bad < i;
        pthread_mutex_unlock(&v->synced.lock);
        status *st = do_run(me, &v->run[i], skip);
        pthread_mutex_lock(&v->synced.lock);
        if (st && i < v->synced.bad) {
            status_free(v->synced.st);
            v->synced.st = st;
            v->synced.bad = i;
        } else {
            status_free(st);
        }
        uint32_t trip = v->run[i].trip;
        bool packed = trip != NO_TRIP && --v->flight[trip % MOVE_ROUNDS].left == 0;
        if (++v->synced.over == v->runs || packed)
            ring_bell(&v->ring);
    }
    pthread_mutex_unlock(&v->synced.lock);
    if (me->keep)
        v->from->drop(me->keep);
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

/* Let the readers have what comes before trip `next`. */
static void open_runs(struct move *v, uint64_t next)
{
    pthread_mutex_lock(&v->synced.lock);
    v->synced.open = next < v->trips ? first_run(v, next) : v->runs;
    pthread_cond_broadcast(&v->synced.work);
    pthread_mutex_unlock(&v->synced.lock);
}

/* Let the readers have a trip, and its messages arrive. */
static status *open_trip(struct move *v, uint64_t trip)
{
    struct flight *f = &v->flight[trip % MOVE_ROUNDS];
    f->trip = trip;
    f->sent = f->unpacked = false;
    measure(v, v->trip[trip], f);
    give_places(v, f);
    TRY(post(v, f, false, &f->receiving));
    f->left = end_run(v, trip) - first_run(v, trip); /* no reader has one of them yet */
    open_runs(v, trip + 1);
    return NULL;
}

static void unpack(const struct move *v, const struct flight *f)
{
    const struct load_part *p = v->p;
    uint64_t round = v->trip[f->trip];
    for (const struct part_block *b = &p->block[p->round[round]]; b < &p->block[p->round[round + 1]]; b++) {
        size_t elem = elem_bytes(v, b);
        uint64_t lo, hi;
        if (b->reader == v->c->rank || v->local[b->reader] >= 0)
            continue;
        block_elems(v, b, elem, &lo, &hi);
        for (const struct part_use *u = &p->use[b->first_use]; u < &p->use[b->first_use + b->uses]; u++)
            f->receive_at[b->reader] += reshard_unpack(&p->copy[u->copy], elem, f->receive + f->receive_at[b->reader],
                                                       lo, hi, v->want[u->want].dst);
    }
}

/* The first block of those that rank `from` of the node reads whose number is at least `number`. */
static uint64_t find_take(const struct move *v, int from, uint64_t number)
{
    uint64_t lo = v->first_take[from], hi = v->first_take[from + 1];
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (v->take[mid]->number < number)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Take this rank's parts from a slot, if one was filled. */
static bool take_mail(struct move *v)
{
    struct ring_mail mail;
    if (!ring_next(&v->ring, &mail))
        return false;
    const unsigned char *slot = ring_slot(&v->ring, mail.from, mail.slot);
    uint64_t begin = clock_ns(), bytes = 0, i = find_take(v, mail.from, mail.first), lo, hi;
    for (; i < v->first_take[mail.from + 1] && v->take[i]->number < mail.first + mail.blocks; i++, v->left--) {
        const struct part_block *b = v->take[i];
        const unsigned char *src = slot + (block_offset(v->m, b) - mail.offset);
        size_t elem = elem_bytes(v, b);
        block_elems(v, b, elem, &lo, &hi);
        for (uint64_t k = b->first_use; !mail.bad && k < b->first_use + b->uses; k++) {
            const struct part_use *u = &v->p->use[k];
            reshard_apply(&v->p->copy[u->copy], elem, src, lo, hi, v->want[u->want].dst);
            bytes += u->elems * elem;
        }
    }
    ring_done(&v->ring, &mail);
    report_note(v->from->cost, REPORT_PLACE, begin, 0, bytes);
    return true;
}

/* Move an open trip on as far as it goes without waiting. */
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

/* Until there is something to do, or it is time to look at the messages again. idle: this rank has nothing more to
 * send, so it waits for others. */
static void wait_for(struct move *v, uint64_t seen, bool messages, bool idle)
{
    uint64_t begin = clock_ns();
    ring_wait(&v->ring, seen, messages ? POLL_NS : 0);
    if (idle)
        report_note(v->from->cost, REPORT_EXCHANGE, begin, clock_ns() - begin, 0);
}

static bool all_over(struct move *v)
{
    pthread_mutex_lock(&v->synced.lock);
    bool over = v->synced.over == v->runs;
    pthread_mutex_unlock(&v->synced.lock);
    return over;
}

static bool is_packed(struct move *v, const struct flight *f)
{
    pthread_mutex_lock(&v->synced.lock);
    bool packed = f->left == 0;
    pthread_mutex_unlock(&v->synced.lock);
    return packed;
}

/* Only the transport's errors end it early. */
static status *move_all(struct move *v)
{
    uint64_t opened = 0, sent = 0, done = 0;
    open_runs(v, 0);
    for (;;) {
        bool moved = false, messages = false;
        uint64_t bells = ring_bells(&v->ring);
        while (opened < v->trips && opened < done + MOVE_ROUNDS)
            TRY(open_trip(v, opened++));
        if (sent < opened && is_packed(v, &v->flight[sent % MOVE_ROUNDS])) {
            struct flight *f = &v->flight[sent++ % MOVE_ROUNDS];
            TRY(post(v, f, true, &f->sending));
            f->sent = moved = true;
        }
        for (uint64_t t = done; t < opened; t++) {
            struct flight *f = &v->flight[t % MOVE_ROUNDS];
            TRY(move_on(v, f, &moved));
            messages = messages || comm_pending(&f->receiving) || comm_pending(&f->sending);
        }
        const struct flight *oldest = &v->flight[done % MOVE_ROUNDS];
        if (done < opened && oldest->sent && oldest->unpacked && !comm_pending(&oldest->sending)) {
            done++;
            moved = true;
        }
        moved = take_mail(v) || moved;
        bool over = all_over(v);
        if (done == v->trips && !v->left && over)
            return NULL;
        if (!moved)
            wait_for(v, bells, messages, over);
    }
}

/* ---- memory and threads */

/* Which ranks' bytes slots bring. */
static status *find_local(struct move *v, struct comm *node)
{
    int32_t me = v->c->rank, *world = mem_array(NULL, (size_t)node->size, sizeof *world);
    v->local = mem_array(NULL, (size_t)v->c->size, sizeof *v->local);
    status *st = world && v->local ? NULL : ERR(NO_MEMORY, "%d ranks", v->c->size);
    st = comm_agree(node, st);
    if (!st)
        st = comm_allgather(node, &me, world, sizeof me, NULL);
    for (int r = 0; !st && r < v->c->size; r++)
        v->local[r] = -1;
    for (int r = 0; !st && ring_shared(&v->ring) && r < node->size; r++)
        v->local[world[r]] = r;
    mem_free(world);
    return st;
}

/* Whether this rank reads something that others on the node want. */
static bool has_gifts(const struct load_part *p, int me)
{
    for (uint64_t i = 0; i < p->blocks; i++)
        for (uint64_t k = p->block[i].first_use; k < p->block[i].first_use + p->block[i].uses; k++)
            if (p->block[i].reader == me && p->use[k].rank != me)
                return true;
    return false;
}

/* Collective over the node. */
static status *share_slots(struct move *v, struct comm *node)
{
    TRY(ring_open(node, node->size > 1 && has_gifts(v->p, v->c->rank), SLOT_BYTES, &v->ring));
    return find_local(v, node);
}

static const struct part_block *next_take(const struct move *v, uint64_t *i)
{
    for (; *i < v->p->blocks; ++*i) {
        const struct part_block *b = &v->p->block[*i];
        if (b->reader != v->c->rank && v->local[b->reader] >= 0)
            return b;
    }
    return NULL;
}

static status *find_takes(struct move *v)
{
    const struct part_block *b;
    size_t n = (size_t)v->ring.ranks;
    v->first_take = mem_calloc(n + 2, sizeof *v->first_take);
    if (!v->first_take)
        return ERR(NO_MEMORY, "%zu ranks", n);
    for (uint64_t i = 0; (b = next_take(v, &i)); i++, v->left++)
        v->first_take[v->local[b->reader] + 2]++;
    for (size_t r = 0; r < n; r++)
        v->first_take[r + 2] += v->first_take[r + 1];
    v->take = mem_array(NULL, v->left + 1, sizeof *v->take);
    if (!v->take)
        return ERR(NO_MEMORY, "%llu blocks to take", (unsigned long long)v->left);
    for (uint64_t i = 0; (b = next_take(v, &i)); i++)
        v->take[v->first_take[v->local[b->reader] + 1]++] = b;
    return NULL;
}

/* Which rounds are trips, and what the largest one needs. */
static void find_trips(struct move *v, size_t *send, size_t *receive, uint64_t *parts)
{
    const struct flight *f = &v->flight[0];
    size_t n = (size_t)v->c->size;
    for (uint64_t r = 0; r < v->p->rounds; r++) {
        uint64_t k = measure(v, r, &v->flight[0]);
        if (!f->send_at[n] && !f->receive_at[n])
            continue;
        *parts = k > *parts ? k : *parts;
        *send = f->send_at[n] > *send ? f->send_at[n] : *send;
        *receive = f->receive_at[n] > *receive ? f->receive_at[n] : *receive;
        v->trip[v->trips++] = r;
        for (struct load_run *run = &v->run[v->round_run[r]]; run < &v->run[v->round_run[r + 1]]; run++)
            run->trip = (uint32_t)(v->trips - 1);
    }
}

static status *allocate(struct move *v)
{
    size_t n = (size_t)v->c->size, send = 0, receive = 0;
    uint64_t parts = 0;
    v->xfer = mem_calloc(n, sizeof *v->xfer);
    v->trip = mem_array(NULL, v->p->rounds + 1, sizeof *v->trip);
    for (uint64_t i = 0; i < MOVE_ROUNDS; i++) {
        v->flight[i].send_at = mem_calloc(n + 1, sizeof(size_t));
        v->flight[i].receive_at = mem_calloc(n + 1, sizeof(size_t));
        if (!v->flight[i].send_at || !v->flight[i].receive_at)
            return ERR(NO_MEMORY, "exchange with %zu ranks", n);
    }
    if (!v->trip)
        return ERR(NO_MEMORY, "%llu rounds", (unsigned long long)v->p->rounds);
    find_trips(v, &send, &receive, &parts);
    for (uint64_t i = 0; i < MOVE_ROUNDS && i < v->trips; i++) {
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
        v->slots = mem_block_untouched((size_t)v->readers * SLOT_BYTES, ALIGN); /* with huge slots it is not used */
        if (!v->slots)
            return ERR(NO_MEMORY, "%d bytes to read into", v->readers * SLOT_BYTES);
    }
    for (int i = 0; i < v->readers && (uint64_t)i < v->runs; i++) {
        char name[16];
        struct reader *r = &v->reader[i];
        snprintf(name, sizeof name, "tsr-load-%d", i & 0xff);
        r->v = v;
        r->to = mem_alloc((size_t)v->ring.ranks);
        if (!r->to)
            return ERR(NO_MEMORY, "%d ranks", v->ring.ranks);
        r->slot = v->slots ? v->slots + (size_t)i * SLOT_BYTES : NULL;
        TRY(thread_start(&r->thread, name, reader_main, r));
    }
    return NULL;
}

static void synced_init(struct move *v)
{
    pthread_mutex_init(&v->synced.lock, NULL);
    pthread_cond_init(&v->synced.work, NULL);
    v->synced.bad = UINT64_MAX;
}

static void stop(struct move *v)
{
    pthread_mutex_lock(&v->synced.lock);
    v->synced.quit = true;
    pthread_cond_broadcast(&v->synced.work);
    pthread_mutex_unlock(&v->synced.lock);
    if (v->ring.own)
        ring_quit(&v->ring);
    for (int i = 0; i < v->readers; i++) {
        status_free(thread_join(&v->reader[i].thread));
        mem_free(v->reader[i].to);
    }
    ring_close(&v->ring);
    mem_free(v->local);
    mem_free(v->take);
    mem_free(v->first_take);
    if (v->slots)
        mem_block_free(v->slots, (size_t)v->readers * SLOT_BYTES);
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
    mem_free(v->trip);
    pthread_mutex_destroy(&v->synced.lock);
    pthread_cond_destroy(&v->synced.work);
}

/* Nobody sends before all are ready to receive. */
static status *ready(struct move *v)
{
    TRY(make_runs(v));
    TRY(find_takes(v));
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

status *load_move(const struct nodes *n, const struct metadata *m, const struct load_want *want,
                  const struct load_part *p, const struct load_source *from)
{
    struct move v = { .c = n->all, .m = m, .want = want, .p = p, .from = from };
    v.readers = from->readers ? from->readers : MOVE_READERS;
    synced_init(&v);
    status *st = share_slots(&v, n->node);
    st = comm_agree(v.c, st ? st : ready(&v));
    status *broken = st ? NULL : move_all(&v);
    stop(&v);
    if (st || broken) {
        status_free(v.synced.st);
        return st ? st : broken;
    }
    return agree_asleep(v.c, v.synced.st);
}
