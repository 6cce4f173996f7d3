/* fuzz: what the fuzzers share. A fuzzer is one function that gets bytes and must return: whatever the bytes are, no
 * sanitizer may speak up and no MUST may fail. Run them by tests/fuzz/run.sh. */
#ifndef TESSERA_TESTS_FUZZ_FUZZ_H
#define TESSERA_TESTS_FUZZ_FUZZ_H

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* A finding: libFuzzer keeps the input that led here. */
#define MUST(cond)                                                                                                     \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: must hold: %s\n", __FILE__, __LINE__, #cond);                                      \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* True if st is no error; takes it. An error must have words, and never be a bug of ours. */
static inline bool fuzz_ok(status *st)
{
    if (!st)
        return true;
    MUST(status_code(st) != ST_INTERNAL && *status_message(st));
    status_free(st);
    return false;
}

/* The bytes as a text: a copy with a NUL behind it. */
static inline char *fuzz_text(const uint8_t *data, size_t n)
{
    char *text = mem_alloc(n + 1);
    MUST(text);
    memcpy(text, data, n);
    text[n] = 0;
    return text;
}

#endif
