/* tokenizer: text -> token ids. Byte-level: id = byte value, then the special ids. */
#ifndef TESSERA_TRAINER_DATA_TOKENIZER_H
#define TESSERA_TRAINER_DATA_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

enum { TOKEN_BOS = 256, TOKEN_EOS = 257, TOKEN_VOCAB = 258 };

/* out[i] = byte i; returns n. out has room for n ids. */
size_t tokenize_bytes(const char *text, size_t n, int32_t *out);

#endif
