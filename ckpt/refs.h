/* refs: tensors stored by reference: bytes that another committed step holds already. Storage only, no MPI.
 *
 * Saving: a state says it as text (refs_text), rank 0 looks the tensors up when it plans (refs_find) and their pieces,
 * places and checksums go into the new step's metadata as they are (vote.c). Reading: a file of the metadata lies in
 * the root and the step of its owner (origins). The owner's metadata is read at planning only. */
#ifndef TESSERA_CKPT_REFS_H
#define TESSERA_CKPT_REFS_H

#include "ckpt/commit.h"
#include "ckpt/plan.h"
#include "ckpt/tessera.h"

/* ---- as text, for descriptors: the same reference is the same text */

/* part, name: the tensor's own, for what r leaves out. *out is the caller's to mem_free. */
status *refs_text(const struct tessera_reference *r, const char *part, const char *name, char **out) WARN_UNUSED;

/* ---- where files lie */

struct origins {
    struct store *own;
    struct store **other; /* [count] of each owner; NULL: own */
    uint64_t count;
};
/* Open the roots of m's owners. CORRUPT names tensor and owner if one is not there. */
status *origins_open(struct store *own, const struct metadata *m, struct origins *out) WARN_UNUSED;
void origins_close(struct origins *o);
/* The store and the key of a file of m. */
struct store *origins_store(const struct origins *o, const struct meta_file *f);
status *origins_key(const struct metadata *m, const struct meta_file *f, char key[STORE_KEY_BYTES]) WARN_UNUSED;
/* For messages: "" for the step's own file, else "tensor PART/NAME lies in step N of URL: ". */
enum { REFS_WORDS = 1024 };
void refs_words(const struct metadata *m, const struct meta_file *f, char text[REFS_WORDS]);
/* CORRUPT: a file that m names, its own or an owner's, is missing or has another length. */
status *refs_check_files(struct store *own, const struct metadata *m, bool only_owned) WARN_UNUSED;

/* ---- what a plan's tensors by reference are made of */

struct ref_tensor {
    uint32_t tensor; /* of the plan */
    char *part, *name;
    uint64_t first_piece, piece_count; /* into refs.piece */
};

/* Zeroed: none. A file's owner is an index into owner, plus 1; a piece's file one into file, its first_crc one into
 * crc.
 */
struct refs {
    struct meta_owner *owner;
    struct meta_file *file;
    struct ref_tensor *tensor; /* in the plan's order */
    struct meta_piece *piece;
    uint32_t *crc;
    uint64_t owner_count, file_count, tensor_count, piece_count, crc_count;
};
/* Look up the tensors by reference of a plan that plan_make made, while its text is there, for a save of `step` into
 * `own`. NOT_FOUND or INVALID name the tensor and its owner: no such root, step or tensor there, another shape or
 * type, or not before `step`; CORRUPT: the owner is damaged. */
status *refs_find(struct store *own, uint64_t step, const struct plan *p, struct refs *out) WARN_UNUSED;
void refs_free(struct refs *r);

#endif
