/* A small step made by hand, byte by byte, for tests of what reads steps: two files, tensors of one and of several
 * checksum blocks, a scalar, an empty one, an alias, blobs, and padding everywhere it can be: behind the header,
 * between payloads, at the end. */
#ifndef TESSERA_TESTS_CKPT_FAKE_STEP_H
#define TESSERA_TESTS_CKPT_FAKE_STEP_H

#include "ckpt/commit.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    FAKE_HEADER = 3000,
    FAKE_TAIL = 50,
    FAKE_FILES = 2,
    FAKE_TENSORS = 5,
    FAKE_PIECES = 5,
    FAKE_CRCS = 16,
    FAKE_BLOBS = 2
};

struct fake_step {
    struct metadata m;
    struct meta_file file[FAKE_FILES];
    struct meta_tensor tensor[FAKE_TENSORS];
    struct meta_piece piece[FAKE_PIECES];
    uint32_t crc[FAKE_CRCS];
    struct meta_blob blob[FAKE_BLOBS];
    char name[FAKE_FILES][STORE_KEY_BYTES];
    unsigned char *data[FAKE_FILES];
};

static inline void fake_piece(struct fake_step *f, uint32_t file, uint64_t begin, uint64_t end, uint64_t bytes)
{
    struct meta_tensor *t = &f->tensor[f->m.tensor_count - 1];
    struct meta_piece *p = &f->piece[f->m.piece_count++];
    *p = (struct meta_piece){
        .piece = piece_whole(&t->shape), .file = file, .bytes = bytes, .first_crc = f->m.crc_count
    };
    p->piece.begin = begin;
    p->piece.end = end;
    if (bytes) {
        p->offset = (f->file[file].bytes + 4095) / 4096 * 4096 +
                    (f->m.piece_count == 2 ? 4096 : 0); /* once, a whole page of padding */
        f->file[file].bytes = p->offset + bytes;
        f->m.crc_count += meta_blocks(bytes);
    }
    t->piece_count++;
}

static inline void fake_tensor(struct fake_step *f, const char *part, const char *name, enum dtype dtype, int ndim,
                               uint64_t d0, uint64_t d1)
{
    f->tensor[f->m.tensor_count++] = (struct meta_tensor){ .part = (char *)(size_t)part,
                                                           .name = (char *)(size_t)name,
                                                           .dtype = dtype,
                                                           .shape = { ndim, { d0, d1 } },
                                                           .trainable = true,
                                                           .first_piece = f->m.piece_count };
}

/* Bytes and checksums, once the places are known. */
static inline void fake_fill(struct fake_step *f, uint64_t seed)
{
    for (int i = 0; i < FAKE_FILES; i++) {
        f->file[i].bytes += FAKE_TAIL;
        f->data[i] = mem_calloc(1, f->file[i].bytes);
        for (int k = 0; k < FAKE_HEADER; k++)
            f->data[i][k] = (unsigned char)(k * 7 + i + 1);
        f->file[i].header_crc = crc32c(0, f->data[i], FAKE_HEADER);
    }
    for (uint64_t i = 0; i < f->m.piece_count; i++) {
        const struct meta_piece *p = &f->piece[i];
        unsigned char *to = f->data[p->file] + p->offset;
        for (uint64_t k = 0; k < p->bytes; k++)
            to[k] = (unsigned char)((k * 2654435761u + seed + i) >> 7);
        for (uint64_t b = 0; b < meta_blocks(p->bytes); b++) {
            uint64_t at = b * META_BLOCK_BYTES, left = p->bytes - at;
            f->crc[p->first_crc + b] = crc32c(0, to + at, left < META_BLOCK_BYTES ? left : META_BLOCK_BYTES);
        }
    }
}

/* A step with its bytes in memory. name: of its largest tensor, sorting before "norm". */
static inline struct fake_step *fake_step_make(uint64_t step, uint64_t attempt, const char *name)
{
    struct fake_step *f = mem_calloc(1, sizeof *f);
    static const char *const part[FAKE_FILES] = { "model", "policy/optim" };
    for (int i = 0; i < FAKE_FILES; i++) {
        char key[STORE_KEY_BYTES];
        commit_shard_key(step, part[i], 0, attempt, key);
        snprintf(f->name[i], sizeof f->name[i], "%s", strchr(key, '/') + 1);
        f->file[i] = (struct meta_file){ .name = f->name[i], .bytes = FAKE_HEADER, .header_bytes = FAKE_HEADER };
    }
    f->m = (struct metadata){ .run_id = 77,
                              .attempt = attempt,
                              .parent_attempt = 5,
                              .step = step,
                              .time_ns = 1700000000000000000u,
                              .mesh = { { 1, 2, 1, 1, 1 } },
                              .world = 2,
                              .build = (char *)(size_t) "v0 \"test\"",
                              .file = f->file,
                              .tensor = f->tensor,
                              .piece = f->piece,
                              .crc = f->crc,
                              .blob = f->blob,
                              .file_count = FAKE_FILES,
                              .blob_count = FAKE_BLOBS };
    const uint64_t rows = 3,
                   cols = 200001; /* 2,400,012 bytes: two blocks and a part in the first piece, one in the second */
    fake_tensor(f, "model", name, DTYPE_F32, 2, rows, cols);
    fake_piece(f, 0, 0, 550000, 2200000);
    fake_piece(f, 0, 550000, rows * cols, rows * cols * 4 - 2200000);
    fake_tensor(f, "model", "norm", DTYPE_U8, 1, 5, 0);
    fake_piece(f, 0, 0, 5, 5);
    fake_tensor(f, "model", "tied", DTYPE_U8, 1, 5, 0);
    f->tensor[2].alias_of = (char *)(size_t) "norm";
    f->tensor[2].trainable = false;
    fake_tensor(f, "policy/optim", "a.empty", DTYPE_F32, 1, 0, 0);
    fake_piece(f, 1, 0, 0, 0);
    fake_tensor(f, "policy/optim", "t", DTYPE_F64, 0, 0, 0);
    fake_piece(f, 1, 0, 1, 8);
    f->blob[0] =
        (struct meta_blob){ (char *)(size_t) "extra", (char *)(size_t) "config", -1, (char *)(size_t) "a: 1\n", 5 };
    f->blob[1] = (struct meta_blob){ (char *)(size_t) "rng", (char *)(size_t) "state", 1, (char *)(size_t) "xyz", 3 };
    fake_fill(f, step);
    return f;
}

static inline void fake_step_free(struct fake_step *f)
{
    for (int i = 0; i < FAKE_FILES; i++)
        mem_free(f->data[i]);
    mem_free(f);
}

/* Its files, without the commit. */
static inline status *fake_step_put_files(struct store *s, const struct fake_step *f)
{
    for (int i = 0; i < FAKE_FILES; i++) {
        char key[STORE_KEY_BYTES];
        TRY(commit_file_key(f->m.step, f->name[i], key));
        TRY(store_put(s, key, f->data[i], f->file[i].bytes, STORE_REPLACE));
    }
    return NULL;
}

static inline status *fake_step_commit(struct store *s, uint64_t step, uint64_t attempt)
{
    struct fake_step *f = fake_step_make(step, attempt, "big.weight");
    status *st = fake_step_put_files(s, f);
    if (!st)
        st = commit_put(s, &f->m);
    fake_step_free(f);
    return st;
}

#endif
