/* pipeline: one rank's save, from tensors to finished files, on threads of its own that live as long as the handle.
 *
 *   pipeline_start -> stage: hands out chunks, live or copied -> writer threads: checksum, store_write
 *                                                                  -> [last chunk of a file] finish (fsync)
 *                                                                  -> [all files] drained
 *
 * On a host device, and while the store takes bytes straight from memory (store_writer_direct), chunks are written from
 * the tensors until the first fence; else, and afterwards, from staging. A share of no more than chunk_bytes is staged
 * at once, if all of it fits: copying it is over long before the first fence, while a write may wait for the disk.
 *
 * A fence waits for what writers have given to the storage from tensors, and for copies: one write of each writer,
 * small enough that those of a node's ranks together are LIVE_FLIGHT_BYTES (but each 256 KiB to 4 MiB), then the rest
 * of each writer's chunk and of the chunks before the fenced range. On a node of R ranks with W writers each, with a
 * disk of `rate` and memory copied at `memory`, and blocks for all (staging_bytes 0): wait <= W R piece / rate + (W
 * chunk_bytes + what is left before the range) / memory, piece = max(256 KiB, min(4 MiB, LIVE_FLIGHT_BYTES / (W R)))
 *
 * Invariants: (1) the first error sticks; after it nothing more is copied or written, but every chunk still passes, so
 * the end is always reached and every block comes back; (2) when a save that failed is over, no writer is open:
 * unfinished files were aborted; (3) staging memory is bounded by what pipeline_prepare set; (4) nothing here calls
 * MPI. */
#ifndef TESSERA_CKPT_PIPELINE_H
#define TESSERA_CKPT_PIPELINE_H

#include "ckpt/report.h"
#include "ckpt/share.h"
#include "comm/device/device.h"
#include "storage/store.h"

enum { LIVE_FLIGHT_BYTES = 16 << 20 };

struct pipeline;
struct pipeline_options {
    struct device *dev;
    struct store *store;
    int writers, rank;
    int node_ranks; /* how many ranks of this node save at the same time */
    uint64_t attempt;
    bool (*hand)(void *arg, uint64_t chunk, void *block); /* as in stage_sink; back by pipeline_filled */
    void *hand_arg;
};
/* Start the capture and writer threads; they live until pipeline_close. o's device and store are borrowed. */
status *pipeline_open(const struct pipeline_options *o, struct pipeline **out) WARN_UNUSED;
/* NULL is fine. Stops a save in flight; files it has finished stay, since they may count by now. */
void pipeline_close(struct pipeline *p);

/* Size staging and books for saves of this share: as many blocks as staging_bytes holds beside the writers' bounce
 * buffers (BOUNCE_BYTES each), at least two, at most one a chunk. Only while no save is in flight. */
status *pipeline_prepare(struct pipeline *p, const struct share *s, uint64_t staging_bytes) WARN_UNUSED;
/* Start saving s (prepared, its sources filled) as `step`. s is the pipeline's until pipeline_end. */
void pipeline_start(struct pipeline *p, struct share *s, uint64_t step);

/* For who was handed a chunk: it is filled, or never will be (after pipeline_give_up or a failure). */
void pipeline_filled(struct pipeline *p, uint64_t chunk, void *block);

/* Wait until what overlaps [addr, addr + bytes), and what lies before it in capture order, was copied out or written;
 * addr NULL: everything. Returns the nanoseconds waited. */
uint64_t pipeline_fence(struct pipeline *p, const void *addr, size_t bytes, struct stream *s);
/* The stream that writes the tensors, on a device that is not the host; without a save in flight. */
void pipeline_set_stream(struct pipeline *p, struct stream *s);

/* Consistent: drained without failed means that every file is durable and nothing of this save can fail any more. */
struct pipeline_view {
    bool captured, drained, failed;
    uint64_t captured_bytes, written_bytes, live_bytes, staging_cap_bytes, staging_peak_bytes;
};
/* One consistent look at the save in flight, or the last one. */
void pipeline_look(struct pipeline *p, struct pipeline_view *out);
/* Of the save that is drained: what it took, by clock_ns. Stages are added to r->stage, r->bytes is set; total_ns is
 * the time when the last file was durable. */
void pipeline_report(struct pipeline *p, struct report_rank *r);
/* The error that stopped the save, once; NULL if there is none. */
status *pipeline_take_error(struct pipeline *p) WARN_UNUSED;
enum pipeline_end {
    PIPELINE_KEEP,  /* it is drained and counts */
    PIPELINE_STOP,  /* give it up: waits until the threads are done with it; finished files stay */
    PIPELINE_REMOVE /* give it up, and remove the files this rank had finished */
};
/* From any thread: the save in flight fails for this reason (taken). */
void pipeline_fail(struct pipeline *p, status *st);
/* Nothing more of this save is written; it is still to be ended. */
void pipeline_give_up(struct pipeline *p);
/* End a save: afterwards the share is the caller's again. At once when there is none. */
void pipeline_end(struct pipeline *p, enum pipeline_end how);

#endif
