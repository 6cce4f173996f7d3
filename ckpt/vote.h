/* vote: what every rank tells rank 0 when its files are finished, and the metadata that rank 0 makes of it. A rank that
 * takes part says yes; a rank that cannot has said no in the tick's reduction before, and then there is no vote.
 *
 * Message lengths follow from the plan, so that one exchange without a handshake carries everything:
 *   u64 {file bytes, header bytes, header crc} of each file, u64 offset of each piece, u32 crc of each block (padded to
 * 8), u64 blob bytes, blobs (padded to blob_room, the longest of any rank), the u64 of a struct report_rank. */
#ifndef TESSERA_CKPT_VOTE_H
#define TESSERA_CKPT_VOTE_H

#include "ckpt/refs.h"
#include "ckpt/report.h"
#include "ckpt/share.h"
#include "ckpt/state.h"
#include "comm/comm.h"

struct vote {
    const struct plan *plan;
    const struct roster *roster;
    size_t blob_room;
    unsigned char *mine;   /* this rank's message */
    unsigned char *theirs; /* rank 0: all messages, by rank */
    size_t mine_cap, theirs_cap;
    struct comm_xfer *xfer; /* rank 0: one a rank */
    size_t xfer_cap;
    struct comm_req req;
};
/* Free the message buffers; nothing may be in flight. */
void vote_fini(struct vote *v);
/* Have the memory for votes of this plan with blobs of up to blob_room bytes a rank; keeps what is large enough. */
status *vote_prepare(struct vote *v, struct comm *c, const struct plan *p, const struct roster *r,
                     size_t blob_room) WARN_UNUSED;
/* Start the exchange. Every rank; fails only with the transport. Rank 0's own blobs are not sent. cost: what this rank
 * reports; the bytes of its vote are entered. */
status *vote_start(struct vote *v, struct comm *c, const struct share *s, const struct state_bytes *blobs,
                   struct report_rank *cost) WARN_UNUSED;
/* Rank 0, after v->req is done: every rank's cost into r (of c's ranks). */
void vote_costs(const struct vote *v, struct report *r);

/* Facts of the save that no rank's vote carries. */
struct vote_facts {
    uint64_t run_id, attempt, parent_attempt, step;
    struct mesh mesh;
    const char *build;
};
/* Rank 0, after v->req is done: the step's metadata. It borrows texts from the plan and `refs` (of that plan), and
 * blobs from v and `own`; free with vote_metadata_free. INTERNAL: a message is not well formed. */
status *vote_metadata(struct vote *v, struct comm *c, const struct vote_facts *f, struct state_bytes *own,
                      const struct refs *refs, struct metadata **out) WARN_UNUSED;
void vote_metadata_free(struct metadata *m);

#endif
