/* stage: hands out the chunks of a save, and copies those that cannot be written from where they are.
 *
 * Every chunk is taken once, in order, by one of two: a writer, which writes it from live memory, or the capture
 * thread, which copies it into a block of staging memory; writers take the blocks. A save begins live or not; the first
 * fence ends live for the rest of the save: from then on the capture thread copies ahead as far as there are blocks,
 * and a writer that has a live chunk in hand copies what is left of it (stage_try_block).
 *
 *   [0 .. next) taken | [next .. chunks) nobody's          live:      next -> a writer
 *                                                          not live:  next -> capture thread -> ready -> a writer
 *
 * Chunks of merged pieces (the share's own_chunks and after) read no tensor of this rank: the capture thread hands each
 * with a block to the sink, which fills it in its own time and gives it back by stage_filled.
 *
 * On a device whose memory is not the host's, nothing is live. The capture thread queues copies on a stream of low
 * priority as far as there are blocks, an event behind each, and passes a block on when its event is done. The host
 * does not wait for them in a fence: it waits until the copies are queued, and makes the stream that will overwrite the
 * tensors wait for the last of their events.
 *
 * Invariants: (1) what stage_wait(k) returned for may be overwritten: chunks below k are taken, and whoever took one of
 * them reads no tensor for it any more; (2) staging memory never grows past what stage_prepare set; (3) every chunk
 * reaches some writer, also after a failure (then without a block), so that whoever counts chunks always reaches the
 * end; (4) a writer holds at most one chunk, so a fence waits for at most `writers` live ones and one copy. */
#ifndef TESSERA_CKPT_STAGE_H
#define TESSERA_CKPT_STAGE_H

#include "ckpt/report.h"
#include "ckpt/share.h"
#include "comm/base/pool.h"
#include "comm/base/thread.h"
#include "comm/device/device.h"

#include <stdatomic.h>

enum { BOUNCE_BYTES = 256 << 10 }; /* a writer's own buffer, for the parts of live chunks that need a copy after all */

struct stage_sink {
    void *arg;
    void (*fail)(void *arg, status *st);                  /* takes st */
    const atomic_bool *failed;                            /* set: stop copying */
    bool (*hand)(void *arg, uint64_t chunk, void *block); /* true: taken over, until stage_filled */
};

/* A chunk that a writer has taken. live: from the tensors; else from block, which is NULL for a header and after a
 * failure. */
struct stage_item {
    uint64_t chunk;
    void *block;
    bool live;
};

/* A chunk whose copies are queued on the device. */
struct stage_flight {
    void *block; /* NULL: nothing is queued for it */
    uint64_t begin_ns, waited_ns;
    bool own;  /* of this rank's tensors: copied */
    bool gone; /* handed to the sink */
};

struct stage {
    struct device *dev;
    struct stream *stream;
    struct stream *writes; /* the one that writes the tensors: copies come after what it was given before a save */
    struct event *begin;
    struct event **filled; /* [filled_count] of the pool's blocks */
    size_t filled_count;
    struct stage_flight *flight; /* [room] by chunk; those in [landed, queued) are under way */
    struct stage_sink sink;
    struct thread thread;
    int writers;
    unsigned char *memory; /* pinned: the pool's blocks, then a bounce buffer a writer */
    size_t memory_bytes;
    struct pool pool;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        struct share *share; /* being captured; the last one afterwards, not to be looked at */
        bool live;
        uint64_t chunks, own_chunks, tensor_chunks, next;
        uint64_t *reading; /* [writers + 1] the chunk that each writer, and last the capture thread, reads tensors
                            * for; UINT64_MAX: none */
        struct stage_item *ready; /* [room] what the capture thread is done with, in order */
        uint64_t room, put, got;  /* of ready: in all put in, and taken out */
        uint64_t queued, landed;  /* chunks below are on the device's stream, and have left it */
        uint64_t captured_bytes;
        struct report_clock clock; /* of the copies; waits: for a block */
        size_t peak_blocks;
        bool quit;
    } synced;
};

/* Start the capture thread. It has no memory until stage_prepare. */
status *stage_open(struct stage *g, struct device *dev, int writers, struct stage_sink sink) WARN_UNUSED;
/* Everyone in stage_take gets false. No save may be in flight. */
void stage_quit(struct stage *g);
/* End the thread and free the memory; after stage_quit and the last stage_take. */
void stage_close(struct stage *g);
/* Have `blocks` blocks of block_bytes, and room for the books of a share of `chunks`. `touched` of the blocks, which
 * are used first, are resident from here on; the others from the first time that so many are in use at once. Only while
 * nothing is captured. */
status *stage_prepare(struct stage *g, size_t block_bytes, size_t blocks, size_t touched, uint64_t chunks) WARN_UNUSED;
/* Begin with s, after what g->writes has been given so far; live only on a host device. */
void stage_start(struct stage *g, struct share *s, bool live);

/* A writer's next chunk; waits. False: quit. A live one is given back by stage_release, a block by stage_give. */
bool stage_take(struct stage *g, int writer, struct stage_item *out);
/* The writer reads no tensor for its live chunk any more; `bytes` of them it has passed on. */
void stage_release(struct stage *g, int writer, uint64_t bytes);
void stage_give(struct stage *g, void *block);
/* What the sink has taken over is filled, or never will be; the writers take it from here. */
void stage_filled(struct stage *g, uint64_t chunk, void *block);
/* For a writer between two parts of a live chunk: NULL while it shall go on, else a block to copy the rest into. */
void *stage_try_block(struct stage *g);
void *stage_bounce(struct stage *g, int writer);
/* From here on everything is copied. */
void stage_end_live(struct stage *g);

/* End live, and wait until chunks [0, count) are free of readers; on a device that is not the host: make `s` wait for
 * that. Returns the nanoseconds that the host has waited. */
uint64_t stage_wait(struct stage *g, uint64_t count, struct stream *s);

struct stage_view {
    bool captured;
    uint64_t captured_bytes, cap_bytes, peak_bytes;
    struct report_clock clock;
};
/* One consistent look at the save in flight, or the last one. captured: nothing reads a tensor any more. */
void stage_look(struct stage *g, struct stage_view *out);

#endif
