/* live: write a chunk from where the tensors are. */
#ifndef TESSERA_CKPT_LIVE_H
#define TESSERA_CKPT_LIVE_H

#include "ckpt/report.h"
#include "ckpt/share.h"
#include "storage/store.h"

/* Checksum chunk c of s and write it with w. Whole, aligned pages of contiguous tensors go from their memory; what lies
 * between (ends of tensors, small ones, strided or unaligned ones) is gathered in `bounce` (page-aligned, a multiple of
 * the pages) and leaves in its order. *straight: bytes that were not copied. clock: of the stages, added to. The
 * tensors must not change meanwhile. */
status *live_write(struct share *s, const struct share_chunk *c, struct store_writer *w, unsigned char *bounce,
                   size_t bounce_bytes, uint64_t *straight, struct report_clock clock[REPORT_STAGES]) WARN_UNUSED;

#endif
