/* view: a step as one HDF5 file, COMMIT_VIEW in its directory: every tensor whole at /PART/NAME, as if it had never
 * been cut, and no copy of the data (virtual datasets over the shard files, by relative names; what lies in another
 * step is looked for there).
 *
 * It is for looking, with h5py, h5dump or MATLAB, and no part of the step: metadata.pb does not name it, a load does
 * not read it, it can be made anew at any time. HDF5 shows fill values where a shard is missing, without an error:
 * verify is the judge.
 *
 * What is where: a piece is one mapping (a run's boxes, joined, to its flat dataset). Types as in h5shard.h, with the
 * attribute "dtype"; "trainable" is 0 for what is frozen. Aliases are soft links. The fill value is a NaN of the type
 * where it has one (also of the bytes that stand for f8e4m3 and e8m0), else 0. Empty tensors are empty datasets. A
 * tensor whose path is a group of others' too is "_" in that group; one whose path is taken has "_" behind its name. */
#ifndef TESSERA_CKPT_VIEW_H
#define TESSERA_CKPT_VIEW_H

#include "ckpt/metadata.h"
#include "storage/store.h"

/* Most pieces of a step whose view is written unasked. */
enum { VIEW_PIECES = 20000 };

/* Why there can be no view on this store: UNSUPPORTED unless it is a directory that HDF5 can open files of. */
status *view_check(const struct store *s) WARN_UNUSED;
/* The file's bytes; *buf is the caller's to mem_free. UNSUPPORTED: libhdf5 of this system cannot be used beside the
 * training thread; INTERNAL with libhdf5's words. */
status *view_make(const struct metadata *m, void **buf, size_t *bytes) WARN_UNUSED;
/* Write or replace the view of a committed step. */
status *view_write(struct store *s, const struct metadata *m) WARN_UNUSED;

#endif
