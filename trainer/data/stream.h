/* stream: the one global order of samples, and the micro-batches (packs) cut from it. Pure functions of (dataset, seed,
 * counter).
 *
 * Sample i (counted from the start of training, never reset) is row permute(seed, epoch = i / rows, i % rows). Step s
 * takes samples [s B, (s + 1) B) and deals them into K = B / micro_batch packs of micro_batch rows each: longest first
 * to the pack with the fewest tokens that still has room, ties by pack then sample number; inside a pack rows stand in
 * sample order. So a pack's content does not depend on the mesh, and the whole state of the loader is the number of
 * samples consumed. */
#ifndef TESSERA_TRAINER_DATA_STREAM_H
#define TESSERA_TRAINER_DATA_STREAM_H

#include "trainer/data/dataset.h"
#include "trainer/model/model.h"

struct stream {
    const struct dataset *data; /* borrowed */
    uint64_t seed;
    uint32_t global_batch, micro_batch; /* rows; micro_batch divides global_batch */
    bool shuffle;                       /* false: rows in file order (evaluation) */
    /* work space of stream_deal */
    uint64_t *row;   /* [global_batch] rows in pack order: pack k is [k * micro_batch, + micro_batch) */
    uint64_t *order; /* [3 * global_batch] */
};
/* Make the work space. INVALID if micro_batch does not divide global_batch. */
status *stream_init(struct stream *s, const struct dataset *d, uint64_t seed, uint32_t global_batch,
                    uint32_t micro_batch, bool shuffle) WARN_UNUSED;
void stream_fini(struct stream *s); /* also of {0} */
/* Row of global sample i. */
uint64_t stream_row(const struct stream *s, uint64_t sample);
/* Deal samples [first, first + global_batch) into s->row. No allocation. */
void stream_deal(struct stream *s, uint64_t first);

/* Rows laid out for a model: packed sequences with next-token targets. Buffers are made once for the largest pack and
 * reused. */
struct pack {
    const struct dataset *data;
    uint32_t rows, cap_rows;
    int first_side, sides; /* of each row: sequences [first_side, first_side + sides) */
    int64_t cap_tokens;
    uint64_t *row;         /* [rows] dataset rows */
    struct model_input in; /* rows * sides segments; row r's sequences are r * sides + side - first_side */
    int32_t *token, *position, *offset;
    int32_t *target; /* [N] id of the next token if that token is scored, else -1: logp[n] belongs to token n + 1 */
    uint64_t scored; /* targets >= 0 */
    /* What this rank's model sees, of a pack that `ranks` ranks share: every ranks-th token from number `rank` on, on
     * all of them ceil(N / ranks) rows (a row behind the pack's end is a token 0 at position 0 without a target);
     * segments are the whole pack's. ranks 1: the pack. */
    struct model_input own;
    const int32_t *own_target;
    int rank, ranks;
    int32_t *share; /* [3][rows]: tokens, positions, targets */
};
status *pack_init(struct pack *p, const struct dataset *d, uint32_t max_rows) WARN_UNUSED;
void pack_fini(struct pack *p);
/* From now on so many context-parallel ranks share every pack. NO_MEMORY. */
status *pack_share(struct pack *p, int rank, int ranks) WARN_UNUSED;
/* Lay out these rows (row[0..n), n <= max_rows). No allocation. */
void pack_build(struct pack *p, const uint64_t *row, uint32_t n);
/* Only these sequences of each row. */
void pack_build_sides(struct pack *p, const uint64_t *row, uint32_t n, int first_side, int sides);
/* logp[N] -> sums[segments], each the sum in f64 of its scored tokens in order; lengths[segments] (may be NULL) how
 * many. */
void pack_sequence_sums(const struct pack *p, const float *logp, double *sums, uint32_t *lengths);

#endif
