/* metadata: the one file that makes a step a checkpoint: what is stored where. Pure: bytes in, checked struct out.
 *
 * File: "TESSERA\x89", u32 format version, u64 length of the body, u32 crc32c of the body, then the body, a protobuf
 * message (metadata.proto) whose pieces are packed columns and which repeats a version other than 1. Everything is
 * checked against everything else before use: a hostile file can neither name a path outside its step nor ask for
 * memory that it does not carry, and what decode returns can be indexed without looking: the pieces of each tensor tile
 * it, payloads lie in their files and do not overlap, aliases have a tensor of the same shape and dtype.
 *
 * A tensor by reference is one whose pieces lie in files of another step, its owner: places, lengths and checksums are
 * recorded here, so the owner's own metadata is not needed to read it, and a change of its bytes is seen. A reference
 * always names the step that holds the bytes, never one that refers on; owners in the same root are older steps. */
#ifndef TESSERA_CKPT_METADATA_H
#define TESSERA_CKPT_METADATA_H

#include "ckpt/layout.h"
#include "comm/base/dtype.h"

#include <stddef.h>

enum { META_VERSION = 2 /* 1 is written where there are no owners */, META_BLOCK_BYTES = 1 << 20 /* checksum block */ };
enum { META_URL_BYTES = 1024 /* longest URL of an owner, with its NUL */ };

/* A committed step that holds bytes of this one. */
struct meta_owner {
    char *url; /* of its root; NULL: the root of this step */
    uint64_t step, run_id, attempt;
};

struct meta_file {
    char *name; /* inside the directory of its step */
    uint64_t bytes, header_bytes;
    uint32_t header_crc; /* crc32c of [0, header_bytes) */
    uint32_t owner;      /* k > 0: it is a file of owner[k - 1]; 0: of this step */
};

struct meta_piece {
    struct piece piece;
    uint32_t file;          /* index into files */
    uint64_t offset, bytes; /* payload in that file */
    uint64_t
        first_crc; /* index into crcs: one crc32c for each META_BLOCK_BYTES of the payload, the last may be short */
};

struct meta_tensor {
    char *part; /* "model", "optim", "ref/logps" */
    char *name;
    enum dtype dtype;
    struct shape shape;
    bool trainable;
    char *alias_of; /* another tensor of this part that holds the bytes, or NULL; then there are no pieces */
    uint64_t first_piece, piece_count;
    char *owner_part, *owner_name; /* by reference: what its owner calls it; both NULL: this step's own bytes */
};

struct meta_blob {
    char *part, *name;
    int32_t rank; /* -1: one for all ranks */
    void *data;
    uint64_t bytes;
};

struct metadata {
    uint64_t run_id, attempt, parent_attempt; /* parent 0: none */
    uint64_t step, time_ns;
    struct mesh mesh;
    uint32_t world;
    char *build;
    struct meta_file *file;
    struct meta_tensor *tensor; /* sorted by (part, name) */
    struct meta_piece *piece;   /* grouped by tensor */
    uint32_t *crc;
    struct meta_blob *blob;
    uint64_t *state_print; /* [2 world] fingerprint (a, b) of each rank's descriptors, or NULL: unknown */
    struct meta_owner *owner;
    uint64_t owner_count;
    uint64_t file_count, tensor_count, piece_count, crc_count, blob_count;
};

/* CORRUPT-proof both ways: encode checks the same invariants as decode (INTERNAL). *buf is the caller's to mem_free. */
status *metadata_encode(const struct metadata *m, void **buf, size_t *bytes) WARN_UNUSED;
/* CORRUPT says what is wrong: magic, version, length, crc, or which tensor, piece, file disagrees with what.
 * UNSUPPORTED: a newer version, undamaged; NO_MEMORY. */
status *metadata_decode(const void *buf, size_t bytes, struct metadata **out) WARN_UNUSED;
void metadata_free(struct metadata *m);
/* Whether a file with this beginning may have owners, without a look at its body; false: it has none, or cannot be
 * decoded. */
enum { META_HEAD_BYTES = 12 };
bool metadata_may_refer(const unsigned char head[META_HEAD_BYTES]);
/* Index of a tensor, or -1. Binary search. */
int64_t metadata_find(const struct metadata *m, const char *part, const char *name);
/* The owner of a tensor by reference; NULL: the bytes, if there are any, are the step's own. */
const struct meta_owner *metadata_owner(const struct metadata *m, const struct meta_tensor *t);
const struct meta_blob *metadata_blob(const struct metadata *m, const char *part, const char *name, int32_t rank);
/* Checksum blocks of a payload of that many bytes. */
static inline uint64_t meta_blocks(uint64_t bytes)
{
    return (bytes + META_BLOCK_BYTES - 1) / META_BLOCK_BYTES;
}

#endif
