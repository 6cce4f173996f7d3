/* tokenizer: see tokenizer.h. */
#include "trainer/data/tokenizer.h"

size_t tokenize_bytes(const char *text, size_t n, int32_t *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = (unsigned char)text[i];
    return n;
}
