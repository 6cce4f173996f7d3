#include "comm/base/arena.h"

#include "comm/base/mem.h"

#include <string.h>

struct arena_block {
    struct arena_block *next;
    size_t bytes, used;
    unsigned char *data;
};

static void *get_block(void *arg, size_t bytes)
{
    (void)arg;
    return mem_block(bytes, 4096);
}

static void put_block(void *arg, void *p, size_t bytes)
{
    (void)arg;
    mem_block_free(p, bytes);
}

void arena_init(struct arena *a, size_t block_bytes, size_t cap_bytes)
{
    arena_init_from(a, (struct arena_source){ get_block, put_block, NULL }, block_bytes, cap_bytes);
}

void arena_init_from(struct arena *a, struct arena_source source, size_t block_bytes, size_t cap_bytes)
{
    *a = (struct arena){ .source = source, .block_bytes = block_bytes ? block_bytes : 1 << 20, .cap_bytes = cap_bytes };
}

void arena_fini(struct arena *a)
{
    for (struct arena_block *b = a->first, *next; b; b = next) {
        next = b->next;
        a->source.put(a->source.arg, b->data, b->bytes);
        mem_free(b);
    }
    *a = (struct arena){ 0 };
}

static struct arena_block *new_block(struct arena *a, size_t bytes)
{
    size_t size = bytes > a->block_bytes ? bytes : a->block_bytes;
    if (a->cap_bytes && (a->held_bytes > a->cap_bytes || size > a->cap_bytes - a->held_bytes))
        return NULL;
    struct arena_block *b = mem_alloc(sizeof *b);
    if (!b)
        return NULL;
    *b = (struct arena_block){ .bytes = size, .data = a->source.get(a->source.arg, size) };
    if (!b->data) {
        mem_free(b);
        return NULL;
    }
    a->held_bytes += size;
    a->grown++;
    return b;
}

void *arena_alloc(struct arena *a, size_t bytes)
{
    if (bytes > SIZE_MAX - ARENA_ALIGN)
        return NULL;
    size_t n = (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    struct arena_block *b = a->current;
    while (b && n > b->bytes - b->used && b->next) { /* blocks after current are empty */
        b = b->next;
        b->used = 0;
    }
    if (!b || n > b->bytes - b->used) {
        struct arena_block *fresh = new_block(a, n);
        if (!fresh)
            return NULL;
        if (b)
            b->next = fresh;
        else
            a->first = fresh;
        b = fresh;
    }
    a->current = b;
    void *p = b->data + b->used;
    b->used += n;
    a->used_bytes += n;
    if (a->used_bytes > a->peak_bytes)
        a->peak_bytes = a->used_bytes;
    return p;
}

void *arena_zalloc(struct arena *a, size_t bytes)
{
    void *p = arena_alloc(a, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

struct arena_mark arena_mark(const struct arena *a)
{
    return (struct arena_mark){ a->current, a->current ? a->current->used : 0, a->used_bytes };
}

void arena_release(struct arena *a, struct arena_mark m)
{
    a->current = m.block ? m.block : a->first;
    if (a->current)
        a->current->used = m.block ? m.used : 0;
    a->used_bytes = m.used_bytes;
}

void arena_reset(struct arena *a)
{
    arena_release(a, (struct arena_mark){ 0 });
}
