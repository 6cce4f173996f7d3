/* s3_writer: one large object, written in parts from any thread and in any order.
 *
 * The object is cut into parts at open, where the caller's extents begin if that leaves parts of a legal size, else
 * every 16 MiB (more where 10,000 parts would not do). A write that is a part is sent from the caller's memory, by the
 * caller's thread; so is what an extent fills of a part, with zeros around it. Of other writes all but the last of a
 * part are copied into a buffer of that part; the last one is sent from where it is, between what was copied. So memory
 * is what was copied into parts that are not complete: of writes in file order by n threads, at most n + 1 parts.
 * Objects up to 8 MiB are gathered whole and put in one request at the end.
 *
 * Near the end, when every part is on its way, one that takes three times as long as the others did is sent again on
 * another connection. */
#ifndef TESSERA_STORAGE_S3_WRITER_H
#define TESSERA_STORAGE_S3_WRITER_H

#include "storage/s3_call.h"
#include "storage/store.h"

/* The functions of struct store_ops, with the bucket. */
status *s3_writer_open(struct s3 *s, struct store_writer *w) WARN_UNUSED;
status *s3_writer_extents(struct store_writer *w, const struct store_extent *e, size_t n) WARN_UNUSED;
status *s3_writer_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n, size_t *put) WARN_UNUSED;
status *s3_writer_finish(struct store_writer *w) WARN_UNUSED;
void s3_writer_abort(struct store_writer *w);

/* Where parts begin: from `cut`, ascending, of an object of `bytes`; ends in begin[0 .. *parts], begin[*parts] = bytes.
 * begin has room for S3_PARTS + 1. Pure. */
void s3_writer_parts(uint64_t bytes, const uint64_t *cut, size_t cuts, uint64_t *begin, size_t *parts);

#endif
