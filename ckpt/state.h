/* state: what one rank wants saved or loaded: a list of pieces and blobs. Rank-local, no I/O, no communication.
 *
 * Order of adding is the order of capture. Texts and strides are owned, tensor memory is borrowed. */
#ifndef TESSERA_CKPT_STATE_H
#define TESSERA_CKPT_STATE_H

#include "ckpt/share.h"
#include "ckpt/tessera.h"

#include <stdbool.h>

struct state_piece {
    char *part, *name;
    char *alias_of;  /* NULL: none */
    char *reference; /* refs_text; NULL: none */
    enum dtype dtype;
    bool trainable;
    struct shape shape;
    struct piece piece;
    bool strided;
    int64_t stride[LAYOUT_DIMS]; /* elements */
    void *data;                  /* strided: the box's first element; else the run's first element */
};

struct state_blob {
    char *part, *name;
    bool per_rank;
    void *data;
    size_t bytes;
};

struct tessera_state {
    struct state_piece *piece;
    struct state_blob *blob;
    size_t count, cap, blob_count, blob_cap;
    size_t blob_bytes; /* sum over blobs */
    /* What state_describe made; valid while described. */
    bool described;
    struct plan_desc *desc; /* [count] */
    char *text;
    size_t text_bytes;
    struct hash128 fingerprint;
};

/* The caller's struct as first released: none is smaller; and with references. */
enum {
    STATE_TENSOR_BYTES = offsetof(struct tessera_tensor, alias_of) + sizeof(char *),
    STATE_REFERENCE_BYTES = offsetof(struct tessera_tensor, reference) + sizeof(struct tessera_reference *)
};
enum { STATE_BLOB_BYTES = 64 << 10, STATE_BLOBS_BYTES = 4 << 20 };

/* Fill desc, text and fingerprint; does nothing (and allocates nothing) when no piece was added since the last call. */
status *state_describe(struct tessera_state *s) WARN_UNUSED;

/* Where elements [first, first + elems) of the piece's run are read from. */
void state_source(const struct state_piece *p, uint64_t first, uint64_t elems, struct share_source *out);

/* A growing byte string; zeroed is empty. */
struct state_bytes {
    unsigned char *data;
    size_t bytes, cap;
};
/* Pack the blobs that `rank` stores (rank 0: the replicated ones too) into `out`, which is overwritten and kept for the
 * next save. Record: i32 rank (-1 replicated), u32 part bytes, u32 name bytes, u32 data bytes, then part, name (both
 * with their NUL), data. */
status *state_pack_blobs(const struct tessera_state *s, int rank, struct state_bytes *out) WARN_UNUSED;
/* Take the record at *at; moves *at on. The pointers point into `buf`. False at the end or when it is not well formed.
 */
struct state_blob_view {
    int32_t rank;
    char *part, *name;
    void *data;
    uint32_t bytes;
};
bool state_next_blob(void *buf, size_t bytes, size_t *at, struct state_blob_view *out);

#endif
