/* fuzz_jsonl: dataset_open on any bytes, as each kind, at a length that cuts and one that does not. What was read
 * can be walked: sequences lie in the tokens, and something of each is scored. */
#include "tests/fuzz/fuzz.h"
#include "trainer/data/dataset.h"

#include <sys/mman.h>
#include <unistd.h>

static void walk(const struct dataset *d, uint32_t max_length)
{
    uint64_t sum = 0;
    MUST(d->sequences == (d->kind == DATASET_SFT ? 1 : 2));
    MUST((d->kind == DATASET_LABELLED) == (d->desirable != NULL));
    for (uint64_t i = 0; i < d->rows * (uint64_t)d->sequences; i++) {
        const struct sequence *s = &d->seq[i];
        uint32_t scored = 0;
        MUST(s->length >= 2 && s->length <= max_length && s->length <= d->longest);
        MUST(s->begin + s->length <= d->tokens);
        for (uint32_t k = 0; k < s->length; k++) {
            MUST(d->token[s->begin + k] >= 0 && d->score[s->begin + k] <= 1);
            scored += d->score[s->begin + k];
        }
        MUST(scored == s->scored);
    }
    for (uint64_t i = 0; i < d->rows; i++)
        sum += d->hash[i] + d->group[i] + (d->desirable ? d->desirable[i] : 0);
    static volatile uint64_t sink;
    sink = sum;
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    char path[64];
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    MUST(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    for (int kind = DATASET_SFT; kind < DATASET_KINDS; kind++)
        for (uint32_t max_length = 12; max_length <= 4096; max_length += 4084) {
            struct dataset *d;
            if (fuzz_ok(dataset_open(path, (enum dataset_kind)kind, max_length, &d))) {
                walk(d, max_length);
                dataset_close(d);
            }
        }
    close(fd);
    return 0;
}
