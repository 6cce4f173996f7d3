/* mem: the only place that calls malloc. Counts calls, so that "no allocation in a steady step" is a test and not a
 * hope. */
#ifndef TESSERA_COMM_BASE_MEM_H
#define TESSERA_COMM_BASE_MEM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* NULL when memory is out (the caller returns ERR(NO_MEMORY, ...)); a size of 0 gives a valid pointer. */
void *mem_alloc(size_t bytes) __attribute__((malloc));
void *mem_calloc(size_t count, size_t bytes) __attribute__((malloc)); /* zeroed; checks the product */
void *mem_realloc(void *p, size_t bytes);
void *mem_array(void *p, size_t count, size_t bytes); /* realloc of count x bytes; checks the product */
char *mem_strdup(const char *s);
void mem_free(void *p);

/* A large block: aligned to `align` (a power of two, at least 4096), zeroed, on huge pages where the system has them,
 * touched. */
void *mem_block(size_t bytes, size_t align);
/* The same, but neither zeroed nor touched: each part becomes resident when it is first written. */
void *mem_block_untouched(size_t bytes, size_t align);
void mem_block_free(void *p, size_t bytes);

/* Calls to all of the above that obtained memory, on all threads of the process since its start. */
uint64_t mem_count(void);

/* Largest resident set of this process so far, in bytes. */
uint64_t mem_peak_rss_bytes(void);

#ifdef __cplusplus
}
#endif

#endif
