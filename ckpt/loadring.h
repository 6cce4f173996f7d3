/* loadring: ranks of a node hand one another what they have read. Each has slots in memory that all of them see
 * (comm/window.h); it fills one, tells the others what is in it, and gets it back when all of them have taken their
 * parts. And a bell, by which a rank's calling thread is woken, whatever there is to do.
 *
 * No rank waits for another one but for a free slot; who takes never waits, so slots always come back. */
#ifndef TESSERA_CKPT_LOADRING_H
#define TESSERA_CKPT_LOADRING_H

#include "comm/window.h"

enum { RING_SLOTS = 4 };

struct berth; /* a rank's slots, mail and bell */
struct load_ring {
    struct comm_window window;
    struct berth **berth; /* [ranks]; one, this rank's, where nothing is shared */
    struct berth *own;
    int rank, ranks; /* of the node */
    size_t slot_bytes;
    enum { RING_UNKNOWN, RING_HUGE, RING_SMALL } pages[RING_SLOTS]; /* of this rank's, each its taker's to look at */
};

/* What a rank was told: blocks [first, first + blocks) of those that `from` reads are in its slot. */
struct ring_mail {
    int32_t from; /* rank of the node */
    uint32_t slot;
    uint64_t first, offset; /* offset: in the file, of the slot's first byte */
    uint32_t blocks;
    bool bad; /* they could not be read: nothing is there */
};

/* giving: this rank has something to hand out. Collective over the node; the error is agreed. Where nobody gives or
 * nothing can be shared, ring_shared is false, and there is only the bell. */
status *ring_open(struct comm *node, bool giving, size_t slot_bytes, struct load_ring *out) WARN_UNUSED;
bool ring_shared(const struct load_ring *r);
/* Zeroed is fine. Local, when no thread of this rank uses it any more and all have taken what they were given. */
void ring_close(struct load_ring *r);

/* ---- by readers */

/* Wait for a free slot of this rank's; false: ring_quit was called. */
bool ring_take(struct load_ring *r, uint32_t *slot);
/* Whether a slot that was taken has huge pages; the first time they are asked for, which may take milliseconds. */
bool ring_is_huge(struct load_ring *r, uint32_t slot);
unsigned char *ring_slot(const struct load_ring *r, int rank, uint32_t slot);
/* Hand it out to the ranks of the node for which to[rank] is set, at least one. If this rank is one of them it gets no
 * mail, but the slot is its own, too, until ring_done. */
void ring_give(struct load_ring *r, const struct ring_mail *m, const uint8_t *to);
/* Wake this rank's calling thread. */
void ring_bell(struct load_ring *r);

/* This rank has taken what it wants of it. By any thread. */
void ring_done(struct load_ring *r, const struct ring_mail *m);

/* ---- by the calling thread */

/* How often the bell rang. */
uint64_t ring_bells(struct load_ring *r);
/* The next mail; false: there is none. */
bool ring_next(struct load_ring *r, struct ring_mail *out);
/* Until the bell has rung more than `seen` times, or timeout_ns have passed (0: however long it takes). */
void ring_wait(struct load_ring *r, uint64_t seen, uint64_t timeout_ns);
/* No reader of this rank waits for a slot from now on. */
void ring_quit(struct load_ring *r);

#endif
