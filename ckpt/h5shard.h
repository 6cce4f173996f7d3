/* h5shard: datasets in, HDF5 header bytes and payload offsets out. Pure, and the only user of libhdf5 besides the view
 * writer.
 *
 * libhdf5 writes into a small header-only driver in memory: datasets are contiguous, allocated early, never filled,
 * aligned to 4 KiB, bounds V18..LATEST, no time stamps; a metadata block large enough for all headers keeps them in
 * front, so the payload is one stretch of adjacent datasets. The same input gives the same bytes. Any store can hold
 * the file: write the header at 0, each payload at its offset, zero elsewhere. */
#ifndef TESSERA_CKPT_H5SHARD_H
#define TESSERA_CKPT_H5SHARD_H

#include "ckpt/layout.h"
#include "comm/base/dtype.h"

#include <stddef.h>

enum { H5SHARD_ALIGN = 4096 };

struct h5shard_item {
    const char *tensor; /* group: "model.layers.0.mlp.up_proj.weight"; '/' makes subgroups */
    const char *name;   /* dataset in that group: "p0", "p1", ...; unique there */
    enum dtype dtype;
    struct shape shape; /* of the whole tensor */
    struct piece piece; /* a box becomes a dataset of its lengths, a run a 1-D dataset */
};

struct h5shard_image {
    void *header; /* file bytes [0, header_bytes): every byte libhdf5 wrote lies here */
    uint64_t header_bytes;
    uint64_t file_bytes;
    uint64_t *offset; /* of each item's payload; multiples of H5SHARD_ALIGN, ascending; empty items: 0 */
};

/* Attributes of each dataset: "global_shape" (u64[ndim], absent for a scalar), "dtype" (string, our name), "box_offset"
 * and "box_length" (u64[ndim], absent for a scalar), "run" (u64[2]). bf16 and the 8-bit floats are HDF5 float types of
 * that layout where HDF5 can express them, else u8 with the dtype attribute. Payload is stored little-endian, in item
 * order. Errors: INVALID for a duplicate path; NO_MEMORY; INTERNAL with libhdf5's words. */
status *h5shard_image(const struct h5shard_item *item, size_t count, struct h5shard_image *out) WARN_UNUSED;
void h5shard_image_free(struct h5shard_image *i);

/* For the view writer: the file type of a dtype (a hid_t, to be closed; negative: libhdf5 failed), and an error with
 * the innermost line of this thread's error stack, which is cleared: "libhdf5 cannot WHAT ON: ...". */
int64_t h5shard_type(enum dtype t);
status *h5shard_error(const char *what, const char *on) WARN_UNUSED;

#endif
