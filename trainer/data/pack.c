/* pack: rows of a dataset laid end to end for a model. See stream.h. */
#include "comm/base/bytes.h"
#include "comm/base/mem.h"
#include "trainer/data/stream.h"

#include <string.h>

/* Tokens of the longest row, all its sequences together. */
static uint64_t longest_row(const struct dataset *d)
{
    uint64_t longest = 0;
    for (uint64_t row = 0; row < d->rows; row++) {
        uint64_t n = 0;
        for (int side = 0; side < d->sequences; side++)
            n += d->seq[row * (uint64_t)d->sequences + (uint64_t)side].length;
        longest = n > longest ? n : longest;
    }
    return longest;
}

status *pack_init(struct pack *p, const struct dataset *d, uint32_t max_rows)
{
    uint64_t cap, segments = (uint64_t)max_rows * (uint64_t)d->sequences;
    if (!max_rows)
        return ERR(INVALID, "a pack must have room for a row");
    if (__builtin_mul_overflow(longest_row(d), max_rows, &cap) || cap > INT32_MAX || segments >= INT32_MAX)
        return ERR(INVALID, "%u rows of up to %llu tokens do not fit into one pack of at most %d tokens", max_rows,
                   (unsigned long long)longest_row(d), INT32_MAX);
    struct pack n = { .data = d, .cap_rows = max_rows, .cap_tokens = (int64_t)cap, .ranks = 1 };
    n.row = mem_calloc(max_rows, sizeof *n.row);
    n.token = mem_calloc(cap, sizeof *n.token);
    n.position = mem_calloc(cap, sizeof *n.position);
    n.target = mem_calloc(cap, sizeof *n.target);
    n.offset = mem_calloc(segments + 1, sizeof *n.offset);
    if (!n.row || !n.token || !n.position || !n.target || !n.offset) {
        pack_fini(&n);
        return ERR(NO_MEMORY, "a pack of %u rows, %llu tokens", max_rows, (unsigned long long)cap);
    }
    n.in.token = n.token;
    n.in.seg.offset = n.offset;
    n.in.seg.position = n.position;
    *p = n;
    return NULL;
}

void pack_fini(struct pack *p)
{
    mem_free(p->row);
    mem_free(p->token);
    mem_free(p->position);
    mem_free(p->target);
    mem_free(p->offset);
    mem_free(p->share);
    *p = (struct pack){ 0 };
}

static int64_t shared_rows(const struct pack *p, int64_t tokens)
{
    return (tokens + p->ranks - 1) / p->ranks;
}

status *pack_share(struct pack *p, int rank, int ranks)
{
    p->rank = rank;
    p->ranks = ranks;
    size_t rows = (size_t)shared_rows(p, p->cap_tokens);
    int32_t *share = ranks > 1 ? mem_calloc(3 * rows, sizeof *share) : NULL;
    if (ranks > 1 && !share)
        return ERR(NO_MEMORY, "a share of a pack of %lld tokens", (long long)p->cap_tokens);
    mem_free(p->share);
    p->share = share;
    return NULL;
}

/* What this rank sees of the pack. */
static void take_share(struct pack *p)
{
    uint64_t content[] = { hash64(p->token, (size_t)p->in.tokens * sizeof *p->token),
                           hash64(p->offset, ((size_t)p->in.seg.count + 1) * sizeof *p->offset) };
    p->in.content = hash64(content, sizeof content);
    p->own = p->in;
    p->own_target = p->target;
    if (p->ranks == 1)
        return;
    int64_t rows = shared_rows(p, p->in.tokens), cap = shared_rows(p, p->cap_tokens);
    int32_t *token = p->share, *position = token + cap, *target = position + cap;
    for (int64_t j = 0; j < rows; j++) {
        int64_t i = j * p->ranks + p->rank;
        bool inside = i < p->in.tokens;
        token[j] = inside ? p->token[i] : 0;
        position[j] = inside ? p->position[i] : 0;
        target[j] = inside ? p->target[i] : -1;
    }
    p->own.tokens = rows;
    p->own.padding = (rows - 1) * p->ranks + p->rank >= p->in.tokens;
    p->own.token = token;
    p->own.seg.position = position;
    p->own_target = target;
}

/* Append one sequence, targets shifted inside it. */
static void put_sequence(struct pack *p, const struct sequence *s)
{
    const int32_t *token = p->data->token + s->begin;
    const uint8_t *score = p->data->score + s->begin;
    int64_t at = p->in.tokens;
    CHECK(at + s->length <= p->cap_tokens, "a pack of %lld tokens is full", (long long)p->cap_tokens);
    memcpy(p->token + at, token, s->length * sizeof *token);
    for (uint32_t i = 0; i < s->length; i++) {
        bool scored = i + 1 < s->length && score[i + 1];
        p->position[at + i] = (int32_t)i;
        p->target[at + i] = scored ? token[i + 1] : -1;
        p->scored += scored;
    }
    p->in.tokens = at + s->length;
    p->offset[++p->in.seg.count] = (int32_t)p->in.tokens;
}

void pack_build(struct pack *p, const uint64_t *row, uint32_t n)
{
    pack_build_sides(p, row, n, 0, p->data->sequences);
}

void pack_build_sides(struct pack *p, const uint64_t *row, uint32_t n, int first_side, int sides)
{
    CHECK(n <= p->cap_rows, "%u rows for a pack of %u", n, p->cap_rows);
    CHECK(first_side >= 0 && first_side + sides <= p->data->sequences, "sides of a row");
    p->rows = n;
    p->first_side = first_side;
    p->sides = sides;
    p->scored = 0;
    p->in.tokens = 0;
    p->in.seg.count = 0;
    p->offset[0] = 0;
    for (uint32_t r = 0; r < n; r++) {
        p->row[r] = row[r];
        for (int side = first_side; side < first_side + sides; side++)
            put_sequence(p, &p->data->seq[row[r] * (uint64_t)p->data->sequences + (uint64_t)side]);
    }
    take_share(p);
}

void pack_sequence_sums(const struct pack *p, const float *logp, double *sums, uint32_t *lengths)
{
    for (int32_t s = 0; s < p->in.seg.count; s++) {
        double sum = 0;
        uint32_t count = 0;
        for (int32_t i = p->offset[s]; i < p->offset[s + 1]; i++) {
            if (p->target[i] < 0)
                continue;
            sum += (double)logp[i];
            count++;
        }
        sums[s] = sum;
        if (lengths)
            lengths[s] = count;
    }
}
