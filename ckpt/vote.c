/* vote: write_message and read_message are each other's mirror; vote_metadata puts the messages of all ranks together.
 */
#include "ckpt/vote.h"

#include "ckpt/commit.h"
#include "comm/base/clock.h"
#include "comm/base/mem.h"

enum { VOTE_TAG = 1, FILE_WORDS = 3, COST_WORDS = sizeof(struct report_rank) / 8 };

static size_t crcs_at(const struct roster *r, int rank)
{
    return 8 * (FILE_WORDS * (size_t)r->files[rank] + (size_t)(r->first[rank + 1] - r->first[rank]));
}

static size_t blobs_at(const struct roster *r, int rank)
{
    return crcs_at(r, rank) + (size_t)(r->crcs[rank] + 1) / 2 * 8;
}

static size_t cost_at(const struct vote *v, int rank)
{
    return blobs_at(v->roster, rank) + 8 + v->blob_room;
}

static size_t message_bytes(const struct vote *v, int rank)
{
    return cost_at(v, rank) + 8 * COST_WORDS;
}

void vote_fini(struct vote *v)
{
    mem_free(v->mine);
    mem_free(v->theirs);
    mem_free(v->xfer);
    *v = (struct vote){ 0 };
}

static status *have(unsigned char **p, size_t *cap, size_t bytes)
{
    if (bytes <= *cap)
        return NULL;
    unsigned char *more = mem_realloc(*p, bytes);
    if (!more)
        return ERR(NO_MEMORY, "votes of %zu bytes", bytes);
    *p = more;
    *cap = bytes;
    return NULL;
}

status *vote_prepare(struct vote *v, struct comm *c, const struct plan *p, const struct roster *r, size_t blob_room)
{
    v->plan = p;
    v->roster = r;
    v->blob_room = (blob_room + 7) / 8 * 8;
    TRY(have(&v->mine, &v->mine_cap, message_bytes(v, c->rank)));
    if (c->rank != 0)
        return NULL;
    size_t all = 0;
    for (int i = 0; i < c->size; i++)
        all += message_bytes(v, i);
    TRY(have(&v->theirs, &v->theirs_cap, all));
    if (v->xfer_cap < (size_t)c->size) {
        mem_free(v->xfer);
        v->xfer = mem_calloc((size_t)c->size, sizeof *v->xfer);
        v->xfer_cap = v->xfer ? (size_t)c->size : 0;
    }
    return v->xfer ? NULL : ERR(NO_MEMORY, "votes of %d ranks", c->size);
}

static void write_message(const struct vote *v, int rank, const struct share *s, const struct state_bytes *blobs,
                          unsigned char *m)
{
    memset(m, 0, message_bytes(v, rank));
    unsigned char *at = m;
    for (uint64_t f = 0; f < s->files; f++, at += 8 * FILE_WORDS) {
        put_u64(at, s->file[f].image.file_bytes);
        put_u64(at + 8, s->file[f].image.header_bytes);
        put_u64(at + 16, s->file[f].header_crc);
    }
    for (uint64_t i = 0; i < s->pieces; i++, at += 8)
        put_u64(at, s->piece[s->by_plan[i]].offset);
    for (uint64_t i = 0; i < s->pieces; i++) {
        const struct share_piece *p = &s->piece[s->by_plan[i]];
        for (uint64_t b = 0; b < meta_blocks(p->bytes); b++, at += 4)
            put_u32(at, s->crc[p->first_crc + b]);
    }
    at = m + blobs_at(v->roster, rank);
    if (rank == 0)
        return; /* its blobs stay where they are */
    put_u64(at, blobs->bytes);
    if (blobs->bytes)
        memcpy(at + 8, blobs->data, blobs->bytes);
}

static void write_cost(const struct report_rank *r, unsigned char *at)
{
    uint64_t word[COST_WORDS];
    memcpy(word, r, sizeof word);
    for (size_t i = 0; i < COST_WORDS; i++)
        put_u64(at + 8 * i, word[i]);
}

void vote_costs(const struct vote *v, struct report *r)
{
    const unsigned char *message = v->theirs;
    for (int k = 0; k < r->world; k++) {
        uint64_t word[COST_WORDS];
        for (size_t i = 0; i < COST_WORDS; i++)
            word[i] = get_u64(message + cost_at(v, k) + 8 * i);
        memcpy(&r->rank[k], word, sizeof word);
        message += message_bytes(v, k);
    }
}

status *vote_start(struct vote *v, struct comm *c, const struct share *s, const struct state_bytes *blobs,
                   struct report_rank *cost)
{
    write_message(v, c->rank, s, blobs, v->mine);
    cost->stage[REPORT_VOTE].bytes = message_bytes(v, c->rank);
    write_cost(cost, v->mine + cost_at(v, c->rank));
    if (c->rank != 0) {
        struct comm_xfer x = {
            .peer = 0, .tag = VOTE_TAG, .send = true, .buf = v->mine, .bytes = message_bytes(v, c->rank)
        };
        return comm_iexchange(c, &x, 1, NULL, &v->req);
    }
    unsigned char *at = v->theirs;
    memcpy(at, v->mine, message_bytes(v, 0));
    for (int i = 1; i < c->size; i++) {
        at += message_bytes(v, i - 1);
        v->xfer[i - 1] = (struct comm_xfer){ .peer = i, .tag = VOTE_TAG, .buf = at, .bytes = message_bytes(v, i) };
    }
    return comm_iexchange(c, v->xfer, (size_t)c->size - 1, NULL, &v->req);
}

/* ---- metadata, on rank 0: one allocation an array, texts borrowed from the plan */

void vote_metadata_free(struct metadata *m)
{
    if (!m)
        return;
    if (m->file)
        mem_free(m->file[0].name); /* one block holds all names */
    mem_free(m->file);
    mem_free(m->tensor);
    mem_free(m->piece);
    mem_free(m->crc);
    mem_free(m->blob);
    mem_free(m);
}

static uint64_t count_blobs(void *data, size_t bytes)
{
    uint64_t n = 0;
    struct state_blob_view b;
    for (size_t at = 0; state_next_blob(data, bytes, &at, &b);)
        n++;
    return n;
}

static status *put_blobs(struct metadata *m, void *data, size_t bytes, int rank)
{
    struct state_blob_view b;
    size_t at = 0;
    while (state_next_blob(data, bytes, &at, &b))
        m->blob[m->blob_count++] =
            (struct meta_blob){ .part = b.part, .name = b.name, .rank = b.rank, .data = b.data, .bytes = b.bytes };
    return at == bytes ? NULL
                       : ERR(INTERNAL, "blobs of rank %d: record at %zu of %zu bytes is not whole", rank, at, bytes);
}

/* Where rank's blobs lie: rank 0's own, or in its message (*bytes clipped to the message by the caller's check). */
static unsigned char *blobs_of(struct vote *v, int rank, unsigned char *message, struct state_bytes *own,
                               uint64_t *bytes)
{
    unsigned char *at = message + blobs_at(v->roster, rank);
    *bytes = rank == 0 ? own->bytes : get_u64(at);
    return rank == 0 ? own->data : at + 8;
}

static status *allocate(struct vote *v, struct comm *c, struct state_bytes *own, const struct refs *refs,
                        struct metadata *m)
{
    const struct plan *p = v->plan;
    uint64_t files = 0, crcs = 0, blobs = 0;
    unsigned char *message = v->theirs;
    for (int r = 0; r < c->size; r++) {
        uint64_t bytes;
        void *data = blobs_of(v, r, message, own, &bytes);
        if (r && bytes > v->blob_room)
            return ERR(INTERNAL, "rank %d voted with %llu bytes of blobs where %zu fit", r, (unsigned long long)bytes,
                       v->blob_room);
        files += v->roster->files[r];
        crcs += v->roster->crcs[r];
        blobs += count_blobs(data, bytes);
        message += message_bytes(v, r);
    }
    m->file = mem_calloc(files + refs->file_count + 1, sizeof *m->file);
    m->tensor = mem_calloc(p->tensor_count + 1, sizeof *m->tensor);
    m->piece = mem_calloc(p->piece_count + refs->piece_count + 1, sizeof *m->piece);
    m->crc = mem_calloc(crcs + refs->crc_count + 1, sizeof *m->crc);
    m->blob = mem_calloc(blobs + 1, sizeof *m->blob);
    if (!m->file || !m->tensor || !m->piece || !m->crc || !m->blob)
        return ERR(NO_MEMORY, "metadata of %llu pieces", (unsigned long long)p->piece_count);
    m->file[0].name = mem_calloc(files + 1, STORE_KEY_BYTES);
    return m->file[0].name ? NULL : ERR(NO_MEMORY, "names of %llu files", (unsigned long long)files);
}

/* Pieces of tensors by reference come between those of the plan: a plan's piece k of tensor i is the step's piece
 * k - plan.tensor[i].first_piece + m->tensor[i].first_piece. */
static void put_tensors(const struct plan *p, const struct refs *refs, struct metadata *m)
{
    const struct ref_tensor *ref = refs->tensor, *end = ref + refs->tensor_count;
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        bool by_reference = ref != end && ref->tensor == i;
        m->tensor[i] = (struct meta_tensor){ .part = (char *)(uintptr_t)t->part,
                                             .name = (char *)(uintptr_t)t->name,
                                             .dtype = t->dtype,
                                             .shape = t->shape,
                                             .trainable = t->trainable,
                                             .alias_of = (char *)(uintptr_t)t->alias_of,
                                             .first_piece = m->piece_count,
                                             .piece_count = by_reference ? ref->piece_count : t->piece_count };
        m->piece_count += m->tensor[i].piece_count;
        if (by_reference) {
            m->tensor[i].owner_part = ref->part;
            m->tensor[i].owner_name = ref->name;
            ref++;
        }
    }
    m->tensor_count = p->tensor_count;
}

/* Behind the files and checksums of all ranks. */
static void put_references(const struct refs *refs, struct metadata *m)
{
    for (uint64_t i = 0; i < refs->tensor_count; i++) {
        const struct ref_tensor *from = &refs->tensor[i];
        struct meta_piece *to = &m->piece[m->tensor[from->tensor].first_piece];
        for (uint64_t k = 0; k < from->piece_count; k++) {
            to[k] = refs->piece[from->first_piece + k];
            to[k].file += (uint32_t)m->file_count;
            to[k].first_crc += m->crc_count;
        }
    }
    if (refs->file_count)
        memcpy(m->file + m->file_count, refs->file, refs->file_count * sizeof *m->file);
    if (refs->crc_count)
        memcpy(m->crc + m->crc_count, refs->crc, refs->crc_count * sizeof *m->crc);
    m->file_count += refs->file_count;
    m->crc_count += refs->crc_count;
    m->owner = refs->owner;
    m->owner_count = refs->owner_count;
}

/* The name inside the step's directory. */
static void put_file_name(const struct vote *v, int rank, uint64_t entry, const struct metadata *m, char *name)
{
    const struct plan *p = v->plan;
    char key[STORE_KEY_BYTES], dir[STEP_DIR_BYTES];
    const char *part = p->tensor[p->piece[v->roster->piece[entry]].tensor].part;
    commit_shard_key(m->step, part, rank, m->attempt, key);
    commit_step_dir(m->step, dir);
    size_t skip = strlen(dir) + 1;
    memcpy(name, key + skip, strlen(key + skip) + 1);
}

static void read_message(const struct vote *v, int rank, const unsigned char *message, struct metadata *m)
{
    const struct roster *r = v->roster;
    const struct plan *p = v->plan;
    const uint64_t file0 = m->file_count, crc0 = m->crc_count;
    const unsigned char *at = message;
    char *names = m->file[0].name;
    for (uint32_t f = 0; f < r->files[rank]; f++, at += 8 * FILE_WORDS, m->file_count++)
        m->file[m->file_count] = (struct meta_file){ .name = names + m->file_count * STORE_KEY_BYTES,
                                                     .bytes = get_u64(at),
                                                     .header_bytes = get_u64(at + 8),
                                                     .header_crc = (uint32_t)get_u64(at + 16) };
    for (uint64_t e = r->first[rank]; e < r->first[rank + 1]; e++, at += 8) {
        uint32_t i = r->piece[e];
        uint64_t file = file0 + r->file[e];
        uint64_t bytes = piece_elems(&p->piece[i].piece) * dtype_bytes(p->tensor[p->piece[i].tensor].dtype);
        if (!m->file[file].name[0])
            put_file_name(v, rank, e, m, m->file[file].name);
        uint32_t tensor = p->piece[i].tensor;
        uint64_t to = m->tensor[tensor].first_piece + i - p->tensor[tensor].first_piece;
        m->piece[to] = (struct meta_piece){ .piece = p->piece[i].piece,
                                            .file = (uint32_t)file,
                                            .offset = get_u64(at),
                                            .bytes = bytes,
                                            .first_crc = m->crc_count };
        m->crc_count += meta_blocks(bytes);
    }
    at = message + crcs_at(r, rank);
    for (uint64_t i = 0; i < r->crcs[rank]; i++, at += 4)
        m->crc[crc0 + i] = get_u32(at);
}

status *vote_metadata(struct vote *v, struct comm *c, const struct vote_facts *f, struct state_bytes *own,
                      const struct refs *refs, struct metadata **out)
{
    struct metadata *m = mem_calloc(1, sizeof *m);
    if (!m)
        return ERR(NO_MEMORY, "metadata");
    *m = (struct metadata){ .run_id = f->run_id,
                            .attempt = f->attempt,
                            .parent_attempt = f->parent_attempt,
                            .step = f->step,
                            .time_ns = clock_wall_ns(),
                            .mesh = f->mesh,
                            .world = (uint32_t)c->size,
                            .build = (char *)(uintptr_t)f->build,
                            .state_print = (uint64_t *)(void *)v->plan->rank_print };
    status *st = allocate(v, c, own, refs, m);
    if (!st)
        put_tensors(v->plan, refs, m);
    unsigned char *message = v->theirs;
    for (int r = 0; !st && r < c->size; r++) {
        read_message(v, r, message, m);
        uint64_t bytes;
        void *data = blobs_of(v, r, message, own, &bytes);
        st = put_blobs(m, data, bytes, r);
        message += message_bytes(v, r);
    }
    if (st) {
        vote_metadata_free(m);
        return st;
    }
    put_references(refs, m);
    *out = m;
    return NULL;
}
