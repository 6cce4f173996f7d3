/* plan: who writes what. Pure: the descriptors of all ranks in, one list of stored pieces out. No MPI inside, so any
 * model and mesh can be planned in one process.
 *
 * Replicas are found by equality of (tensor, piece). Each tensor's distinct pieces must tile it exactly once (sort and
 * sweep, never pairwise). Pieces larger than `split_bytes` with several holders are split among them as runs at
 * multiples of 4 KiB. Pieces with one holder are its own; then, largest first, each other piece goes to the holder
 * with the fewest bytes so far, among equals on the node with the fewest, then to the lowest rank. Empty pieces are not
 * stored: an empty tensor, like an alias or a tensor by reference, has no pieces. The result depends only on the input,
 * not on its order.
 *
 * With `irregular` every stored piece is a box where that can be: pieces are split at whole rows, and the runs that
 * make up a box are merged into it (merge_plan.h). */
#ifndef TESSERA_CKPT_PLAN_H
#define TESSERA_CKPT_PLAN_H

#include "ckpt/layout.h"
#include "comm/base/bytes.h"
#include "comm/base/dtype.h"

#include <stddef.h>

/* What a rank holds: one record a piece. Names live in one text block, so that descriptors are plain memory and travel
 * as bytes. */
struct plan_desc {
    uint64_t part, name; /* offsets of NUL-ended strings in the text block */
    uint64_t alias;      /* offset of the name of the tensor (same part) that holds the bytes; UINT64_MAX: none */
    uint64_t reference;  /* 1 + offset of a text that says which step holds the bytes (refs.h); 0: none */
    enum dtype dtype;
    uint32_t trainable;
    struct shape shape;
    struct piece piece;
    int32_t rank;
    uint32_t local; /* index of the piece in that rank's state */
};

struct plan_tensor {
    const char *part, *name, *alias_of; /* point into the plan's own text */
    const char *reference; /* into plan_make's `text`; does not travel. NULL: none, or the plan was unpacked */
    enum dtype dtype;
    bool trainable;
    struct shape shape;
    uint64_t first_piece, piece_count;
};

enum plan_irregular { PLAN_AS_GIVEN, PLAN_MERGE, PLAN_GATHER }; /* TESSERA_AS_GIVEN ... */
#define PLAN_MERGED UINT32_MAX                                  /* plan_piece.local of a merged piece */

struct plan_piece {
    uint32_t tensor;
    int32_t writer;
    uint32_t local;        /* the writer's own piece it is (part of), or PLAN_MERGED */
    uint32_t number;       /* its place among the tensor's pieces, also where the others are not listed */
    struct piece piece;    /* what is stored: equal to that piece, or a run of it when split */
    uint64_t local_offset; /* elements into the writer's local run */
};

/* A part of a merged piece: its elements [at, at + elems) are those of `rank`'s piece `local` from local_offset on. */
struct plan_source {
    uint64_t order; /* of the merged piece: its index in the whole plan */
    int32_t writer, rank;
    uint32_t local, elem_bytes;
    uint64_t local_offset, at, elems;
};

struct plan {
    int ranks;
    struct plan_tensor *tensor; /* sorted by (part, name) */
    struct plan_piece *piece;   /* grouped by tensor, in piece_compare order */
    uint64_t tensor_count, piece_count;
    struct plan_source *source; /* of all merged pieces, by (order, at); in a part, those that the rank was given */
    uint64_t source_count;
    uint64_t *rank_bytes;       /* [ranks] of the pieces it writes; NULL in a part */
    struct hash128 *rank_print; /* [ranks] plan_fingerprint of each; NULL where nobody has set it; not packed */
    char *text;
};

struct plan_options {
    const int32_t *node_of;      /* [ranks] node of each rank, or NULL: one node */
    const uint64_t *extra_bytes; /* [ranks] what each rank stores besides its pieces, or NULL: nothing */
    uint64_t split_bytes;        /* 0: 4 MiB */
    int irregular;               /* enum plan_irregular; MERGE and GATHER give the same plan */
};

/* Errors name the tensor: INVALID when ranks disagree on shape, dtype, trainable, alias or reference,
 * when pieces overlap or leave a hole (with coordinates), or an alias names no tensor of its part. */
status *plan_make(const struct plan_desc *desc, uint64_t count, const char *text, size_t text_bytes, int ranks,
                  const struct plan_options *o, struct plan **out) WARN_UNUSED;
void plan_free(struct plan *p);
/* 128-bit fingerprint of one rank's descriptors: names, shapes, dtypes, pieces. */
struct hash128 plan_fingerprint(const struct plan_desc *desc, uint64_t count, const char *text);
/* A plan as bytes and back, for sending to other ranks. *buf is the caller's to mem_free. A part holds the listed
 * pieces (ascending; those of one rank, say) and their tensors alone, the given sources, and no rank_bytes. */
status *plan_pack(const struct plan *p, void **buf, size_t *bytes) WARN_UNUSED;
status *plan_pack_part(const struct plan *p, const uint32_t *piece, uint64_t count, const struct plan_source *source,
                       uint64_t sources, void **buf, size_t *bytes) WARN_UNUSED;
status *plan_unpack(const void *buf, size_t bytes, struct plan **out) WARN_UNUSED;

#endif
