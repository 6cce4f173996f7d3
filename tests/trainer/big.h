/* big: pseudo-random numbers, and eight arrays of them that are larger than a tile or chunk of any kernel. */
#ifndef TESSERA_TESTS_TRAINER_BIG_H
#define TESSERA_TESTS_TRAINER_BIG_H

#include <stdint.h>

static inline float draw(uint32_t *s)
{
    *s = *s * 1664525u + 1013904223u;
    return (float)(int32_t)(*s & 0xffffff00u) * 0x1p-31f;
}

enum { BIG = 1 << 18 };
static float big[8][BIG];

static inline void fill_big(void)
{
    uint32_t s = 5;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < BIG; j++)
            big[i][j] = draw(&s);
}

#endif
