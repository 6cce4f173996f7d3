/* rng: Philox4x32-10, addressed. A draw is a pure function of (seed, where it is used); there is no hidden state, so
 * draws do not depend on rank count, micro-batching or order, and resuming needs no saved generator.
 *
 *   key = (seed_lo, seed_hi)     counter = (element/4, global sample index or name hash, step or draw, stream id)
 *   Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; ten rounds. */
#ifndef TESSERA_COMM_BASE_RNG_H
#define TESSERA_COMM_BASE_RNG_H

#include <stddef.h>
#include <stdint.h>

/* Who draws. Numbers are part of the reproducibility promise: never reuse or renumber. */
enum rng_stream {
    RNG_INIT = 1,    /* parameter initialisation: sample = hash of the tensor's name */
    RNG_SHUFFLE = 2, /* data permutation: step = epoch */
    RNG_DATA = 3,    /* generated data sets */
    RNG_TIME = 4,
    RNG_NOISE = 5,
    RNG_LABEL_DROP = 6,
    RNG_DROPOUT = 7,
    RNG_AUGMENT = 8,
    RNG_SAMPLER = 9,
    RNG_BOOTSTRAP = 10, /* confidence intervals */
    RNG_GENERATE = 11,  /* tokens: sample = the sequence's number, element = the token's place in its completion */
    RNG_ROUND = 12,     /* bf16 parameters: sample = hash of the tensor's name, element = the whole tensor's */
};

struct rng_at {
    uint64_t seed;
    uint32_t sample, step, stream;
};

/* Word `element` of the sequence at `at` (element = 4 x counter[0] + lane). */
uint32_t rng_u32(struct rng_at at, uint64_t element);
/* out[i] = word first + i, i < n. */
void rng_u32s(struct rng_at at, uint64_t first, size_t n, uint32_t *out);
/* Uniform in (0, 1): (w + 0.5) x 2^-32. */
double rng_uniform(struct rng_at at, uint64_t element);
/* Uniform integer in [0, n), n >= 1, by 64-bit multiply of two words (elements 2i, 2i+1); bias below n x 2^-64. */
uint64_t rng_below(struct rng_at at, uint64_t i, uint64_t n);
/* Standard normal: Box-Muller over word pairs (w0, w1), (w2, w3): r cos, r sin; elements 4c..4c+3 of block c. */
double rng_normal(struct rng_at at, uint64_t element);
/* out[i] = standard normal of element first + i, i < n. */
void rng_normals(struct rng_at at, uint64_t first, size_t n, float *out);

/* A keyed permutation of [0, n): the value at position i, O(1) memory (four-round Feistel network with cycle walking).
 */
uint64_t rng_permute(uint64_t seed, uint32_t epoch, uint64_t i, uint64_t n);

#endif
