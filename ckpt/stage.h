/* stage: the copy-out. One thread copies a share's pieces from the tensors into blocks of staging memory, in capture
 * order, and hands each filled chunk on. What it has passed may be overwritten: that is all a fence waits for.
 *
 * Invariants: staging memory never grows past what stage_prepare set; a save in flight calls `emit` once for every
 * chunk of its share, in order, also after a failure (then without a block), so that whoever counts chunks always
 * reaches the end. */
#ifndef TESSERA_CKPT_STAGE_H
#define TESSERA_CKPT_STAGE_H

#include "ckpt/share.h"
#include "comm/base/pool.h"
#include "comm/base/thread.h"
#include "comm/device/device.h"

#include <stdatomic.h>

struct stage_sink {
    void *arg;
    /* Take chunk number i; block is NULL for a header and after a failure. May wait. */
    void (*emit)(void *arg, uint64_t i, void *block);
    void (*fail)(void *arg, status *st); /* takes st */
    const atomic_bool *failed;           /* set: stop copying */
};

struct stage {
    struct device *dev;
    struct stream *stream;
    struct stage_sink sink;
    struct thread thread;
    unsigned char *memory; /* pinned */
    size_t memory_bytes;
    struct pool pool;
    struct {
        pthread_mutex_t lock;
        pthread_cond_t changed;
        struct share *share;      /* being captured; NULL: nothing to do */
        uint64_t captured_pieces; /* all pieces below it have been copied out */
        uint64_t captured_bytes;
        size_t peak_blocks;
        bool quit;
    } synced;
};

/* Start the capture thread. It has no memory until stage_prepare. */
status *stage_open(struct stage *g, struct device *dev, struct stage_sink sink) WARN_UNUSED;
/* End the thread and free the blocks; no save may be in flight. */
void stage_close(struct stage *g);
/* Have `blocks` blocks of block_bytes, touched. Only while nothing is captured. */
status *stage_prepare(struct stage *g, size_t block_bytes, size_t blocks) WARN_UNUSED;
void stage_start(struct stage *g, struct share *s);
/* Wait until pieces [0, count) are copied out. Returns the nanoseconds waited. */
uint64_t stage_wait(struct stage *g, uint64_t count);
void stage_give(struct stage *g, void *block);

#endif
