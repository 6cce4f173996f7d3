/* together: see together.h. A rank's message is
 *
 *   u64 descriptors, text bytes, blob bytes, fingerprint (2); then the descriptors as words; then the text
 *
 * A descriptor's words: part, name, alias, reference (offsets in the text), {dtype, trainable, ndim}, run, and ndim
 * each of shape, box offsets and box lengths. Rank 0 plans on the texts as they arrived. */
#include "ckpt/together.h"

#include "ckpt/commit.h"
#include "ckpt/merge_plan.h"
#include "comm/agree.h"
#include "comm/base/mem.h"

enum { HEAD_WORDS = 5, DESC_WORDS = 7 };

/* ---- up */

static size_t desc_words(const struct plan_desc *d)
{
    return DESC_WORDS + 3 * (size_t)d->shape.ndim;
}

static unsigned char *put_words(unsigned char *p, const uint64_t *v, int n)
{
    for (int i = 0; i < n; i++, p += 8)
        put_u64(p, v[i]);
    return p;
}

static const unsigned char *get_words(const unsigned char *p, uint64_t *v, int n)
{
    for (int i = 0; i < n; i++, p += 8)
        v[i] = get_u64(p);
    return p;
}

static status *pack_descriptors(const tessera_state *s, void **buf, size_t *bytes)
{
    size_t n = HEAD_WORDS * 8 + s->text_bytes;
    for (size_t i = 0; i < s->count; i++)
        n += desc_words(&s->desc[i]) * 8;
    unsigned char *p = mem_alloc(n), *at = p;
    if (!p)
        return ERR(NO_MEMORY, "descriptors of %zu bytes", n);
    const uint64_t head[HEAD_WORDS] = { s->count, s->text_bytes, s->blob_bytes, s->fingerprint.a, s->fingerprint.b };
    at = put_words(at, head, HEAD_WORDS);
    for (size_t i = 0; i < s->count; i++) {
        const struct plan_desc *d = &s->desc[i];
        int k = d->shape.ndim;
        uint64_t kind = (uint64_t)d->dtype | (uint64_t)(d->trainable != 0) << 16 | (uint64_t)k << 32;
        const uint64_t word[DESC_WORDS] = {
            d->part, d->name, d->alias, kind, d->piece.begin, d->piece.end, d->reference
        };
        at = put_words(at, word, DESC_WORDS);
        at = put_words(at, d->shape.dim, k);
        at = put_words(at, d->piece.box.off, k);
        at = put_words(at, d->piece.box.len, k);
    }
    if (s->text_bytes)
        memcpy(at, s->text, s->text_bytes);
    *buf = p;
    *bytes = n;
    return NULL;
}

/* What rank 0 plans from. */
struct joined {
    struct plan_desc *desc;
    uint64_t count;
    uint64_t *extra;       /* [ranks] bytes of blobs */
    struct hash128 *print; /* [ranks] */
};

static const unsigned char *read_desc(const unsigned char *p, struct plan_desc *d)
{
    uint64_t word[DESC_WORDS];
    p = get_words(p, word, DESC_WORDS);
    *d = (struct plan_desc){ .part = word[0],
                             .name = word[1],
                             .alias = word[2],
                             .reference = word[6],
                             .dtype = (enum dtype)(word[3] & 0xffff),
                             .trainable = word[3] >> 16 & 1,
                             .shape = { .ndim = (int)(word[3] >> 32) },
                             .piece = { .begin = word[4], .end = word[5] } };
    p = get_words(p, d->shape.dim, d->shape.ndim);
    p = get_words(p, d->piece.box.off, d->shape.ndim);
    return get_words(p, d->piece.box.len, d->shape.ndim);
}

/* All ranks' descriptors, their texts as offsets into `all`. */
static status *join(const struct nodes_message *m, int ranks, const unsigned char *all, struct joined *j)
{
    uint64_t n = 0;
    for (int r = 0; r < ranks; r++)
        n += get_u64(m[r].data);
    j->desc = mem_array(NULL, n, sizeof *j->desc);
    j->extra = mem_array(NULL, (size_t)ranks, sizeof *j->extra);
    j->print = mem_array(NULL, (size_t)ranks, sizeof *j->print);
    if (!j->desc || !j->extra || !j->print)
        return ERR(NO_MEMORY, "descriptors of %llu pieces", (unsigned long long)n);
    for (int r = 0; r < ranks; r++) {
        uint64_t head[HEAD_WORDS], first = j->count;
        const unsigned char *p = get_words(m[r].data, head, HEAD_WORDS);
        for (uint64_t i = 0; i < head[0]; i++) {
            struct plan_desc *d = &j->desc[j->count++];
            p = read_desc(p, d);
            d->rank = r;
            d->local = (uint32_t)i;
        }
        uint64_t text = (uint64_t)(p - all);
        for (uint64_t i = first; i < j->count; i++) {
            j->desc[i].part += text;
            j->desc[i].name += text;
            j->desc[i].alias += j->desc[i].alias == UINT64_MAX ? 0 : text;
            j->desc[i].reference += j->desc[i].reference ? text : 0;
        }
        j->extra[r] = head[2];
        j->print[r] = (struct hash128){ head[3], head[4] };
    }
    return NULL;
}

static void free_joined(struct joined *j)
{
    mem_free(j->desc);
    mem_free(j->extra);
    mem_free(j->print);
}

static status *plan_joined(const struct nodes *n, const struct nodes_message *m, void **all, size_t bytes,
                           int irregular, const struct plan_hooks *hooks, struct plan **out)
{
    struct joined j = { .count = 0 };
    struct plan *plan = NULL;
    status *st = join(m, n->all->size, *all, &j);
    if (!st && hooks)
        st = hooks->before(hooks->arg, j.desc, j.count, (char **)all, &bytes);
    if (!st) {
        const struct plan_options o = { .node_of = n->node_of, .extra_bytes = j.extra, .irregular = irregular };
        st = plan_make(j.desc, j.count, *all, bytes, n->all->size, &o, &plan);
    }
    if (!st && hooks)
        st = hooks->after(hooks->arg, plan);
    if (!st) {
        plan->rank_print = j.print;
        j.print = NULL;
        *out = plan;
        plan = NULL;
    }
    plan_free(plan);
    free_joined(&j);
    return st;
}

/* ---- down */

/* Pieces by writer: list[first[r], first[r + 1]) are rank r's, ascending. */
static status *sort_by_writer(const struct plan *p, uint32_t **list, uint64_t **first)
{
    size_t ranks = (size_t)p->ranks;
    uint32_t *l = mem_array(NULL, p->piece_count, sizeof *l);
    uint64_t *f = mem_calloc(ranks + 2, sizeof *f);
    if (!l || !f) {
        mem_free(l);
        mem_free(f);
        return ERR(NO_MEMORY, "%llu pieces", (unsigned long long)p->piece_count);
    }
    for (uint64_t i = 0; i < p->piece_count; i++)
        f[p->piece[i].writer + 2]++;
    for (size_t r = 0; r < ranks; r++)
        f[r + 2] += f[r + 1];
    for (uint64_t i = 0; i < p->piece_count; i++)
        l[f[p->piece[i].writer + 1]++] = (uint32_t)i;
    *list = l;
    *first = f;
    return NULL;
}

static void free_parts(struct nodes_message *m, int ranks)
{
    for (int r = 0; m && r < ranks; r++)
        mem_free((void *)(uintptr_t)m[r].data);
    mem_free(m);
}

/* Rank 0: what each other rank gets. */
static status *pack_parts(const struct plan *p, int irregular, struct nodes_message **out)
{
    uint32_t *list = NULL;
    uint64_t *first = NULL, *first_source = NULL;
    struct plan_source *source = NULL;
    struct nodes_message *m = mem_calloc((size_t)p->ranks, sizeof *m);
    status *st = m ? sort_by_writer(p, &list, &first) : ERR(NO_MEMORY, "%d ranks", p->ranks);
    if (!st)
        st = plan_sources_by_rank(p, irregular == PLAN_GATHER, &source, &first_source);
    for (int r = 1; !st && r < p->ranks; r++) {
        void *buf = NULL;
        st = plan_pack_part(p, list + first[r], first[r + 1] - first[r], source + first_source[r],
                            first_source[r + 1] - first_source[r], &buf, &m[r].bytes);
        m[r].data = buf;
    }
    if (st)
        free_parts(m, p->ranks);
    else
        *out = m;
    mem_free(list);
    mem_free(first);
    mem_free(source);
    mem_free(first_source);
    return st;
}

static status *spread(const struct nodes *n, struct plan *whole, int irregular, struct plan **out)
{
    struct nodes_message *parts = NULL;
    void *mine = NULL;
    size_t bytes = 0;
    status *st = comm_agree(n->all, whole ? pack_parts(whole, irregular, &parts) : NULL);
    if (!st)
        st = nodes_scatter(n, parts, &mine, &bytes);
    if (!st)
        st = comm_agree(n->all, whole ? NULL : plan_unpack(mine, bytes, out));
    free_parts(parts, n->all->size);
    mem_free(mine);
    return st;
}

status *plan_together(const struct nodes *n, const tessera_state *s, status *mine, int irregular,
                      const struct plan_hooks *hooks, struct plan **out)
{
    void *packed = NULL, *all = NULL;
    size_t packed_bytes = 0, bytes = 0;
    struct nodes_message *m = NULL;
    struct plan *whole = NULL, *part = NULL;
    status *st = comm_agree(n->all, mine ? mine : pack_descriptors(s, &packed, &packed_bytes));
    if (!st)
        st = nodes_gather(n, packed, packed_bytes, &m, &all, &bytes);
    mem_free(packed);
    if (!st)
        st = comm_agree(n->all, n->all->rank == 0 ? plan_joined(n, m, &all, bytes, irregular, hooks, &whole) : NULL);
    mem_free(all);
    mem_free(m);
    if (!st)
        st = spread(n, whole, irregular, &part);
    if (st) {
        plan_free(whole);
        plan_free(part);
        return st;
    }
    *out = whole ? whole : part;
    return NULL;
}

/* ---- from a step */

/* Which of the state's pieces a stored one is (part of). */
struct source {
    uint32_t local; /* UINT32_MAX: none */
    uint64_t offset;
};

/* writer[file]; false if a name is not one of ours. */
static bool read_writers(const struct metadata *m, int32_t *writer)
{
    for (uint64_t i = 0; i < m->file_count; i++)
        if (!commit_parse_writer(m->file[i].name, &writer[i]) || (uint32_t)writer[i] >= m->world)
            return false;
    return true;
}

static bool same_tensor(const struct plan_desc *d, const struct meta_tensor *t)
{
    return d->dtype == t->dtype && d->shape.ndim == t->shape.ndim && !d->trainable == !t->trainable &&
           !memcmp(d->shape.dim, t->shape.dim, (size_t)t->shape.ndim * sizeof *t->shape.dim);
}

/* Find this rank's stored pieces in its state; false if one is not there. source: [pieces], all none. */
static bool find_sources(const struct metadata *m, const tessera_state *s, int rank, const int32_t *writer,
                         struct source *source)
{
    for (size_t i = s->count; i-- > 0;) { /* backwards: the first of equal pieces stays */
        const struct plan_desc *d = &s->desc[i];
        int64_t at = metadata_find(m, s->text + d->part, s->text + d->name);
        if (at < 0 || !same_tensor(d, &m->tensor[at]))
            return false;
        const struct meta_tensor *t = &m->tensor[at];
        for (uint64_t k = t->first_piece; k < t->first_piece + t->piece_count; k++) {
            const struct piece *p = &m->piece[k].piece;
            if (writer[m->piece[k].file] == rank && !memcmp(&p->box, &d->piece.box, sizeof p->box) &&
                p->begin >= d->piece.begin && p->end <= d->piece.end)
                source[k] = (struct source){ .local = (uint32_t)i, .offset = p->begin - d->piece.begin };
        }
    }
    for (uint64_t k = 0; k < m->piece_count; k++)
        if (writer[m->piece[k].file] == rank && source[k].local == UINT32_MAX)
            return false;
    return true;
}

static const char *keep(char **to, const char *text)
{
    const char *at = *to;
    size_t n = strlen(text) + 1;
    memcpy(*to, text, n);
    *to += n;
    return at;
}

static status *make_room(const struct metadata *m, int ranks, struct plan **out)
{
    size_t text = 1;
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        text += strlen(t->part) + strlen(t->name) + 2 + (t->alias_of ? strlen(t->alias_of) + 1 : 0);
    }
    struct plan *p = mem_calloc(1, sizeof *p);
    if (p) {
        p->ranks = ranks;
        p->tensor = mem_calloc(m->tensor_count, sizeof *p->tensor);
        p->piece = mem_calloc(m->piece_count, sizeof *p->piece);
        p->rank_bytes = mem_calloc((size_t)ranks, sizeof *p->rank_bytes);
        p->rank_print = mem_calloc((size_t)ranks, sizeof *p->rank_print);
        p->text = mem_alloc(text);
    }
    if (!p || !p->tensor || !p->piece || !p->rank_bytes || !p->rank_print || !p->text) {
        plan_free(p);
        return ERR(NO_MEMORY, "a plan of %llu pieces", (unsigned long long)m->piece_count);
    }
    *out = p;
    return NULL;
}

/* rank 0: everything; else only what this rank writes, and its tensors. */
static void fill(const struct metadata *m, const int32_t *writer, const struct source *source, int rank, struct plan *p)
{
    char *text = p->text;
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        const struct meta_tensor *t = &m->tensor[i];
        struct plan_tensor *to = &p->tensor[p->tensor_count];
        *to = (struct plan_tensor){
            .dtype = t->dtype, .trainable = t->trainable, .shape = t->shape, .first_piece = p->piece_count
        };
        for (uint64_t k = t->first_piece; k < t->first_piece + t->piece_count; k++) {
            int32_t w = writer[m->piece[k].file];
            if (rank && w != rank)
                continue;
            p->piece[p->piece_count++] = (struct plan_piece){ .tensor = (uint32_t)p->tensor_count,
                                                              .writer = w,
                                                              .local = w == rank ? source[k].local : 0,
                                                              .number = (uint32_t)(k - t->first_piece),
                                                              .piece = m->piece[k].piece,
                                                              .local_offset = w == rank ? source[k].offset : 0 };
            p->rank_bytes[w] += m->piece[k].bytes;
        }
        to->piece_count = p->piece_count - to->first_piece;
        if (rank && !to->piece_count)
            continue;
        to->part = keep(&text, t->part);
        to->name = keep(&text, t->name);
        to->alias_of = t->alias_of ? keep(&text, t->alias_of) : NULL;
        p->tensor_count++;
    }
    for (int r = 0; r < p->ranks; r++)
        p->rank_print[r] = (struct hash128){ m->state_print[2 * r], m->state_print[2 * r + 1] };
}

status *plan_of_step(const struct metadata *m, const tessera_state *s, int rank, int ranks, struct plan **out)
{
    const uint64_t *print = m->state_print;
    if (!print || m->owner_count || m->world != (uint32_t)ranks || print[2 * rank] != s->fingerprint.a ||
        print[2 * rank + 1] != s->fingerprint.b)
        return NULL;
    struct plan *p = NULL;
    int32_t *writer = mem_array(NULL, m->file_count, sizeof *writer);
    struct source *source = mem_array(NULL, m->piece_count, sizeof *source);
    status *st = writer && source ? NULL : ERR(NO_MEMORY, "%llu pieces", (unsigned long long)m->piece_count);
    for (uint64_t k = 0; !st && k < m->piece_count; k++)
        source[k].local = UINT32_MAX;
    if (!st && read_writers(m, writer) && find_sources(m, s, rank, writer, source)) {
        st = make_room(m, ranks, &p);
        if (!st)
            fill(m, writer, source, rank, p);
    }
    mem_free(writer);
    mem_free(source);
    if (!st)
        *out = p;
    return st;
}
