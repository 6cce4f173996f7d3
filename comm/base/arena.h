/* arena: a bump allocator that grows by blocks and is emptied at once. What a tape and its activations live in.
 *
 * Memory is never given back before arena_fini; after the first few uses of the same sizes it makes no allocation. */
#ifndef TESSERA_COMM_BASE_ARENA_H
#define TESSERA_COMM_BASE_ARENA_H

#include "comm/base/status.h"

#include <stddef.h>
#include <stdint.h>

enum { ARENA_ALIGN = 64 };

/* Where blocks come from. */
struct arena_source {
    void *(*get)(void *arg, size_t bytes); /* at least 64-byte aligned; NULL: there are none */
    void (*put)(void *arg, void *p, size_t bytes);
    void *arg;
};

struct arena_block;
struct arena {
    struct arena_source source;
    struct arena_block *first, *current;
    size_t block_bytes; /* size of a new block, at least */
    size_t cap_bytes;   /* 0: no cap */
    size_t held_bytes;  /* sum over blocks */
    size_t peak_bytes;  /* most ever in use */
    size_t used_bytes;
    uint64_t grown; /* blocks obtained so far */
};
struct arena_mark {
    struct arena_block *block;
    size_t used, used_bytes;
};

/* block_bytes 0: 1 MiB. Neither allocates; arena_fini may be called twice. */
void arena_init(struct arena *a, size_t block_bytes, size_t cap_bytes);
/* The same of blocks of another memory, which the host may not be able to read (arena_zalloc is not for it). */
void arena_init_from(struct arena *a, struct arena_source source, size_t block_bytes, size_t cap_bytes);
void arena_fini(struct arena *a);
/* ARENA_ALIGN-byte aligned, not zeroed. NULL when over the cap or out of memory. */
void *arena_alloc(struct arena *a, size_t bytes);
void *arena_zalloc(struct arena *a, size_t bytes);
struct arena_mark arena_mark(const struct arena *a);
void arena_release(struct arena *a, struct arena_mark m); /* everything since m is free again */
void arena_reset(struct arena *a);

#endif
