/* share: from the job's plan to one rank's work: which files it writes, where each piece lies in them, and in which
 * chunks they are captured and written. Pure, made once a plan and cached with it, so that a steady save plans nothing,
 * calls no HDF5 and allocates nothing.
 *
 * A chunk is a stretch of one file, filled in memory exactly as it will lie there (pieces at their offsets, zeros
 * between), so that many small tensors leave in one write. Each file fills chunks of its own, however its pieces
 * alternate with those of other files. Invariants: chunks follow the order of the state by the first piece in them; a
 * checksum block (META_BLOCK_BYTES of a piece's payload) lies whole in one chunk; chunks and segments start at
 * multiples of 4 KiB of their file, and chunks do not overlap. A chunk has at most chunk_bytes, and not much more than
 * a 16th of the share, so that a rank's writers end together. */
#ifndef TESSERA_CKPT_SHARE_H
#define TESSERA_CKPT_SHARE_H

#include "ckpt/h5shard.h"
#include "ckpt/metadata.h"
#include "ckpt/plan.h"

/* Which pieces each rank writes, and into which of its files. Rank 0 knows it of all ranks, others of themselves,
 * alike: it follows from a writer's pieces in the order of the plan. */
struct roster {
    uint32_t *piece; /* [piece_count] plan pieces by writer, then as in the plan */
    uint32_t *file;  /* [piece_count] file of that entry, counted within its writer: one a part, by first appearance */
    uint64_t *first; /* [ranks + 1] a writer's entries */
    uint32_t *files; /* [ranks] */
    uint64_t *crcs;  /* [ranks] checksum blocks */
};
status *roster_make(const struct plan *p, struct roster *out) WARN_UNUSED;
void roster_free(struct roster *r);

struct share_piece {
    uint32_t plan_piece, file;
    uint32_t local;        /* the piece of the state it is (part of), or PLAN_MERGED */
    uint64_t local_offset; /* elements into that piece's run */
    int ndim;
    size_t elem_bytes;
    uint64_t bytes, offset; /* of the payload, in its file */
    uint64_t first_crc;
    uint64_t past_chunk; /* its bytes, and those of all pieces before it, lie in chunks below this one */
};

/* Where the bytes of a share's piece are now; filled at each save. */
struct share_source {
    struct piece piece; /* of the state */
    bool strided;
    int64_t stride[LAYOUT_DIMS];
    const void *base;
    uintptr_t begin, end; /* the addresses this piece reads lie in [begin, end) */
};

struct share_segment {
    uint32_t piece;
    uint64_t lo, hi; /* bytes of its payload; lo is a multiple of META_BLOCK_BYTES */
    uint64_t at;     /* byte in the chunk */
};

struct share_chunk {
    uint32_t file, first_piece; /* first_piece: of its segments; a header's: of the file */
    uint64_t offset, bytes;
    uint64_t payload_bytes;           /* of its segments */
    uint64_t first_segment, segments; /* no segments: the file's header */
};

struct share_file {
    const char *part; /* the plan's text */
    struct h5shard_image image;
    uint32_t header_crc;
    uint64_t chunks;
};

struct share {
    struct share_piece *piece; /* [pieces] in capture order: by (local, local_offset) */
    uint32_t *by_plan;         /* [pieces] the same in the roster's order: indices into piece. Merged pieces come last
                                * in `piece`, as in the plan */
    struct share_source *source;
    struct share_file *file;
    struct share_segment *segment;
    struct share_chunk *chunk;
    uint32_t *crc; /* [crcs] of the save in flight */
    uint64_t pieces, files, segments, chunks, crcs;
    uint64_t payload_bytes;
    uint64_t chunk_bytes;   /* as given; a chunk may be smaller */
    uint64_t block_bytes;   /* largest chunk with segments, up to 4 KiB; 0: none */
    uint64_t data_chunks;   /* chunks with segments */
    uint64_t own_pieces;    /* those before the merged ones */
    uint64_t tensor_chunks; /* chunks below hold pieces of this rank's tensors, the others merged ones */
    uint64_t own_chunks; /* the same, or where merged pieces are in memory (merge_gather), all: those that need nobody
                          * else to fill them (stage.h) */
};

/* chunk_bytes: a multiple of META_BLOCK_BYTES. The plan must outlive the share. */
status *share_make(const struct plan *p, const struct roster *r, int rank, uint64_t chunk_bytes,
                   struct share **out) WARN_UNUSED;
void share_free(struct share *s);

/* Copy n bytes of a segment from where they are now (host memory), beginning with its byte `from`; both fall between
 * elements. */
void share_gather(const struct share *s, const struct share_segment *seg, uint64_t from, size_t n, void *out);
/* Enter n bytes of a segment, from its byte `from` on, into their blocks' checksums. A block's bytes are entered in
 * their order. */
void share_checksum(struct share *s, const struct share_segment *seg, uint64_t from, const void *payload, size_t n);

#endif
