/* fuzz_metadata: metadata_decode on hostile files. The input is tried as it is and as a body behind a header whose
 * length and checksum fit, else no mutation would get past the checksum. What decodes can be indexed without looking,
 * and comes back from encode and decode as it is. */
#include "ckpt/metadata.h"
#include "comm/base/bytes.h"
#include "tests/fuzz/fuzz.h"

enum { HEADER = 24 };

/* Touch everything the header says may be touched. */
static void walk(const struct metadata *m)
{
    uint64_t sum = 0;
    for (uint64_t t = 0; t < m->tensor_count; t++) {
        const struct meta_tensor *a = &m->tensor[t];
        bool ok;
        uint64_t elems = 0, want = shape_volume(&a->shape, &ok);
        MUST(ok && metadata_find(m, a->part, a->name) == (int64_t)t && dtype_bytes(a->dtype));
        if (a->alias_of)
            MUST(!a->piece_count && metadata_find(m, a->part, a->alias_of) >= 0);
        const struct meta_owner *owner = metadata_owner(m, a);
        MUST(!owner == !a->owner_name && !owner == !a->owner_part);
        for (uint64_t k = 0; k < a->piece_count; k++) {
            MUST(a->first_piece + k < m->piece_count);
            const struct meta_piece *p = &m->piece[a->first_piece + k];
            MUST(m->file[p->file].owner == (owner ? (uint32_t)(owner - m->owner) + 1 : 0));
            elems += piece_elems(&p->piece);
            MUST(p->bytes == piece_elems(&p->piece) * dtype_bytes(a->dtype) && p->file < m->file_count);
            MUST(!p->bytes || (p->offset >= m->file[p->file].header_bytes && p->bytes <= m->file[p->file].bytes &&
                               p->offset <= m->file[p->file].bytes - p->bytes));
            for (uint64_t b = 0; b < meta_blocks(p->bytes); b++)
                sum += m->crc[p->first_crc + b];
        }
        MUST(a->alias_of || elems == want);
    }
    for (uint64_t i = 0; i < m->owner_count; i++)
        MUST(m->owner[i].url ? strlen(m->owner[i].url) < META_URL_BYTES : m->owner[i].step < m->step);
    for (uint64_t i = 0; i < m->file_count; i++)
        MUST(m->file[i].owner <= m->owner_count && !strchr(m->file[i].name, '/') && strcmp(m->file[i].name, "..") != 0);
    for (uint64_t i = 0; i < m->blob_count; i++) {
        const struct meta_blob *b = &m->blob[i];
        MUST(metadata_blob(m, b->part, b->name, b->rank) == b);
        sum += crc32c(0, b->data, b->bytes);
    }
    static volatile uint64_t sink;
    sink = sum + strlen(m->build);
    (void)sink;
}

static void decode(const void *buf, size_t n)
{
    struct metadata *m, *again;
    void *out, *out2;
    size_t bytes, bytes2;
    if (!fuzz_ok(metadata_decode(buf, n, &m)))
        return;
    walk(m);
    MUST(fuzz_ok(metadata_encode(m, &out, &bytes)));
    MUST(fuzz_ok(metadata_decode(out, bytes, &again)));
    MUST(fuzz_ok(metadata_encode(again, &out2, &bytes2)));
    MUST(bytes == bytes2 && !memcmp(out, out2, bytes));
    mem_free(out);
    mem_free(out2);
    metadata_free(again);
    metadata_free(m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    decode(data, n);
    unsigned char *file = mem_calloc(1, HEADER + n);
    MUST(file);
    memcpy(file, "TESSERA\x89\1", 9);
    put_u64(file + 12, n);
    memcpy(file + HEADER, data, n);
    put_u32(file + 20, crc32c(0, file + HEADER, n));
    decode(file, HEADER + n);
    file[8] = META_VERSION;
    decode(file, HEADER + n);
    mem_free(file);
    return 0;
}
