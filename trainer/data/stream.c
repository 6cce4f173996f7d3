/* stream: see stream.h. */
#include "trainer/data/stream.h"

#include "comm/base/mem.h"
#include "comm/base/rng.h"

status *stream_init(struct stream *s, const struct dataset *d, uint64_t seed, uint32_t global_batch,
                    uint32_t micro_batch, bool shuffle)
{
    if (!global_batch || !micro_batch || global_batch % micro_batch)
        return ERR(INVALID, "micro_batch %u must divide global_batch %u, and both be at least 1", micro_batch,
                   global_batch);
    CHECK(d->rows > 0, "a dataset without rows");
    struct stream n = { .data = d,
                        .seed = seed,
                        .global_batch = global_batch,
                        .micro_batch = micro_batch,
                        .shuffle = shuffle,
                        .row = mem_calloc(global_batch, sizeof *n.row),
                        .order = mem_calloc(global_batch, 3 * sizeof *n.order) };
    if (!n.row || !n.order) {
        stream_fini(&n);
        return ERR(NO_MEMORY, "the work space of a stream of %u rows a step", global_batch);
    }
    *s = n;
    return NULL;
}

void stream_fini(struct stream *s)
{
    mem_free(s->row);
    mem_free(s->order);
    *s = (struct stream){ 0 };
}

uint64_t stream_row(const struct stream *s, uint64_t sample)
{
    uint64_t rows = s->data->rows, epoch = sample / rows, at = sample % rows;
    return s->shuffle ? rng_permute(s->seed, (uint32_t)epoch, at, rows) : at;
}

/* Sift v[i] down in the heap v[0..n), largest on top. */
static void sift(uint64_t *v, size_t i, size_t n)
{
    uint64_t x = v[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        child += child + 1 < n && v[child + 1] > v[child];
        if (v[child] <= x)
            break;
        v[i] = v[child];
    }
    v[i] = x;
}

/* Heap sort, ascending: libc's qsort may allocate. */
static void sort(uint64_t *v, size_t n)
{
    for (size_t i = n / 2; i-- > 0;)
        sift(v, i, n);
    while (n > 1) {
        uint64_t top = v[0];
        v[0] = v[--n];
        v[n] = top;
        sift(v, 0, n);
    }
}

/* Tokens of a row. Fewer than 2^32: both its sequences came from one line of at most LINE_BYTES. */
static uint64_t row_tokens(const struct dataset *d, uint64_t row)
{
    uint64_t n = 0;
    for (int side = 0; side < d->sequences; side++)
        n += d->seq[row * (uint64_t)d->sequences + (uint64_t)side].length;
    return n;
}

void stream_deal(struct stream *s, uint64_t first)
{
    size_t batch = s->global_batch, micro = s->micro_batch, packs = batch / micro;
    uint64_t *order = s->order, *tokens = s->order + batch, *filled = tokens + batch; /* [batch], [packs], [packs] */
    for (size_t j = 0; j < batch; j++) /* ascending keys: longest first, then by sample number */
        order[j] = (UINT32_MAX - row_tokens(s->data, stream_row(s, first + j))) << 32 | j;
    sort(order, batch);
    for (size_t k = 0; k < packs; k++)
        tokens[k] = filled[k] = 0;
    for (size_t i = 0; i < batch; i++) {
        uint64_t length = UINT32_MAX - (order[i] >> 32), j = (uint32_t)order[i];
        size_t best = SIZE_MAX;
        for (size_t k = 0; k < packs; k++)
            if (filled[k] < micro && (best == SIZE_MAX || tokens[k] < tokens[best]))
                best = k;
        s->row[best * micro + filled[best]++] = j;
        tokens[best] += length;
    }
    for (size_t k = 0; k < packs; k++)
        sort(s->row + k * micro, micro);
    for (size_t i = 0; i < batch; i++)
        s->row[i] = stream_row(s, first + s->row[i]);
}
