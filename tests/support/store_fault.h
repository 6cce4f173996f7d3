/* store_fault: a store around another one whose n-th operation fails, once, and whose writes may be slow, or claim to
 * be direct. What it does otherwise is the inner store's. */
#ifndef TESSERA_TESTS_SUPPORT_STORE_FAULT_H
#define TESSERA_TESTS_SUPPORT_STORE_FAULT_H

#include "storage/store.h"

/* How the operation fails: it is not done, or it is done and reported as failed. */
enum fault_mode { FAULT_BEFORE, FAULT_AFTER };

/* `inner` is borrowed; close the wrapper with store_fault_close, after its last user. */
status *store_fault_open(struct store *inner, struct store **out) WARN_UNUSED;
void store_fault_close(struct store *s);
/* Let the n-th operation from now on fail (0: the next one). */
void store_fault_arm(struct store *s, uint64_t n, enum fault_mode mode);
/* Disarm; whether the fault has happened, and in which operation. */
const char *store_fault_disarm(struct store *s);
/* Writes take up to most_us longer, drawn by the seed and the offset: they sleep, hand on the first half of the bytes,
 * sleep, hand on the rest. Only while nothing is written. */
void store_fault_slow(struct store *s, uint32_t most_us, uint64_t seed);
/* Every "finish" (or "get", or "put") takes so much longer. op is borrowed; NULL: none does. Only while nothing is
 * done. */
void store_fault_slow_op(struct store *s, const char *op, uint32_t us);
/* Claim that writes of this alignment go straight to storage, until `writes` of them were made. Only while nothing is
 * written. */
void store_fault_direct(struct store *s, struct store_direct align, uint64_t writes);

#endif
