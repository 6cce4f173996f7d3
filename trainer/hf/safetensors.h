/* safetensors: weights in the files of Hugging Face: read by ranges, written in shards.
 *
 * A file is a length (u64, little-endian), a JSON header of that many bytes, then the tensors' bytes:
 *   {"__metadata__": {"format": "pt"}, "NAME": {"dtype": "BF16", "shape": [V, C], "data_offsets": [begin, end]}, ...}
 * Offsets count from the end of the header; tensors are row-major and fill the rest of the file without overlap or hole
 * (github.com/huggingface/safetensors, README, "Format"). A folder holds model.safetensors, or several such files and
 * model.safetensors.index.json, whose weight_map says which tensor is in which file.
 *
 * Headers are a stranger's: everything is checked before it is used, and what is wrong is CORRUPT with the names of
 * file and tensor. Files are reached through storage/store.h, so that any URL will do. Not collective. */
#ifndef TESSERA_TRAINER_HF_SAFETENSORS_H
#define TESSERA_TRAINER_HF_SAFETENSORS_H

#include "ckpt/layout.h"
#include "comm/base/dtype.h"
#include "storage/store.h"

struct safetensor {
    char *name;
    enum dtype dtype;
    struct shape shape;
    uint64_t bytes, at; /* its length, and where it begins in the file */
    uint32_t file;
};

struct safetensors {
    struct store *store;
    char *url;
    char **file; /* keys in the store */
    uint32_t files;
    struct safetensor *tensor; /* sorted by name, each name once */
    uint64_t count;
    uint64_t bytes_read; /* of tensors, so far */
};

enum { SAFETENSORS_HEADER_MAX = 100000000 /* bytes; the format's own limit */, SAFETENSORS_INDEX_MAX = 100000000 };

/* "F32" of a dtype, NULL for one that such files do not know; and back, DTYPE_NONE if unknown. */
const char *safetensors_dtype(enum dtype t);
enum dtype safetensors_dtype_parse(const char *name);

/* Tensors of a header of n bytes in a file of file_bytes; `name` stands for the file in messages. *out, sorted by
 * place, is freed by safetensors_list_free; their `file` is 0. Not collective. */
status *safetensors_parse(const char *header, size_t n, uint64_t file_bytes, const char *name, struct safetensor **out,
                          uint64_t *count) WARN_UNUSED;
void safetensors_list_free(struct safetensor *t, uint64_t count);

/* Read all headers of a folder, or of one file "FOLDER/NAME.safetensors". NOT_FOUND: no such folder or file; CORRUPT:
 * a header or the index is not what the format wants, or they contradict each other. */
status *safetensors_open(const char *url, struct safetensors **out) WARN_UNUSED;
void safetensors_close(struct safetensors *s); /* NULL is fine */
/* The tensor of that name, or NULL. Borrowed. */
const struct safetensor *safetensors_find(const struct safetensors *s, const char *name);
/* Bytes of a piece of t (layout.h), as they are stored, one element after the other in the piece's order. Only these
 * ranges of the file are read. out has room for piece_elems(p) elements. */
status *safetensors_read(struct safetensors *s, const struct safetensor *t, const struct piece *p,
                         void *out) WARN_UNUSED;

/* ---- writing ---- */

struct safetensors_spec {
    const char *name;
    enum dtype dtype;
    struct shape shape;
};
struct safetensors_writer;

/* Begin a folder at url, which must not exist (EXISTS). Files hold the tensors in the list's order, at most shard_bytes
 * of them each (a larger tensor has a file of its own), and within a file by size of element, largest first, then by
 * name; the same list gives the same bytes. Nothing is at url before safetensors_finish: until then all lies in
 * "url.part-XXXX" beside it. UNSUPPORTED names a tensor whose type such files do not know. */
status *safetensors_create(const char *url, const struct safetensors_spec *list, uint64_t count, uint64_t shard_bytes,
                           struct safetensors_writer **out) WARN_UNUSED;
/* The same with files called STEM.safetensors, STEM-00001-of-00002.safetensors, ... in place of model.safetensors. */
status *safetensors_create_as(const char *url, const char *stem, const struct safetensors_spec *list, uint64_t count,
                              uint64_t shard_bytes, struct safetensors_writer **out) WARN_UNUSED;
/* Which of the list is the i-th to be written. */
uint64_t safetensors_order(const struct safetensors_writer *w, uint64_t i);
/* The next bytes of the tensors in that order, one after the other, in whatever lengths. */
status *safetensors_append(struct safetensors_writer *w, const void *buf, size_t n) WARN_UNUSED;
/* Another file of the folder ("config.json"). */
status *safetensors_extra(struct safetensors_writer *w, const char *name, const char *text) WARN_UNUSED;
/* Write the index if there are several files, and let the folder appear. Frees w, also on error, when nothing stays.
 * INVALID: bytes are missing. */
status *safetensors_finish(struct safetensors_writer *w) WARN_UNUSED;
void safetensors_abort(struct safetensors_writer *w); /* nothing stays; NULL is fine */

/* For messages: a stranger's text in at most `bytes`, control characters as '?'. */
void safetensors_text(const char *from, char *text, size_t bytes);
/* Cut "PARENT/LAST" in two; a text without '/' has "." as its parent. Frees nothing; both are the caller's. */
status *safetensors_split(const char *url, char **parent, char **last) WARN_UNUSED;

#endif
