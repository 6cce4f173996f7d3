/* planwire: a plan as bytes and back, whole or one rank's part of it, for the ranks that did not make it.
 *
 *   head: ranks, tensors, pieces, text bytes, 1 if rank_bytes follow, sources
 *   text, padded to words; rank_bytes; per tensor: texts as offsets, fields, dimensions, then its pieces; sources
 *
 * Words are 8 bytes, little-endian. What arrives may be damaged: every count is held against the bytes that are left
 * before anything is allocated by it, every piece against its tensor's shape. */
#include "ckpt/plan.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

enum { HEAD_WORDS = 6, TENSOR_WORDS = 7, PIECE_WORDS = 6, SOURCE_WORDS = 6 };

/* Writes, or only counts where p is NULL. */
struct pen {
    unsigned char *p;
    size_t used;
};

/* What is packed: `count` pieces of the plan, ascending; list NULL: all of it. */
struct pick {
    const struct plan *plan;
    const uint32_t *list;
    uint64_t count;
    const struct plan_source *source;
    uint64_t sources;
};

static uint64_t picked(const struct pick *k, uint64_t i)
{
    return k->list ? k->list[i] : i;
}

/* The next tensor to pack, with pieces [*at, *end) of the pick; false at the end. *tensor starts at UINT64_MAX. */
static bool next_tensor(const struct pick *k, uint64_t *tensor, uint64_t *at, uint64_t *end)
{
    const struct plan *p = k->plan;
    *at = *end;
    if (!k->list) {
        ++*tensor;
        if (*tensor < p->tensor_count)
            *end = *at + p->tensor[*tensor].piece_count;
        return *tensor < p->tensor_count;
    }
    if (*at == k->count)
        return false;
    *tensor = p->piece[k->list[*at]].tensor;
    while (*end < k->count && p->piece[k->list[*end]].tensor == *tensor)
        ++*end;
    return true;
}

static void pen_words(struct pen *w, const uint64_t *v, int n)
{
    for (int i = 0; i < n; i++, w->used += 8)
        if (w->p)
            put_u64(w->p + w->used, v[i]);
}

static void pen_text(struct pen *w, const char *s)
{
    size_t n = strlen(s) + 1;
    if (w->p)
        memcpy(w->p + w->used, s, n);
    w->used += n;
}

static void pen_piece(struct pen *w, const struct plan_piece *q, int ndim)
{
    const uint64_t who[PIECE_WORDS] = { (uint64_t)q->writer, q->local,       q->number,
                                        q->local_offset,     q->piece.begin, q->piece.end };
    pen_words(w, who, PIECE_WORDS);
    pen_words(w, q->piece.box.off, ndim);
    pen_words(w, q->piece.box.len, ndim);
}

/* Part, name and alias of each tensor, one behind the other; returns how many tensors. */
static uint64_t pen_texts(struct pen *w, const struct pick *k)
{
    uint64_t tensor = UINT64_MAX, at, end = 0, n = 0;
    for (; next_tensor(k, &tensor, &at, &end); n++) {
        const struct plan_tensor *t = &k->plan->tensor[tensor];
        pen_text(w, t->part);
        pen_text(w, t->name);
        if (t->alias_of)
            pen_text(w, t->alias_of);
    }
    return n;
}

static void pen_tensors(struct pen *w, const struct pick *k)
{
    uint64_t tensor = UINT64_MAX, at, end = 0, text = 0;
    while (next_tensor(k, &tensor, &at, &end)) {
        const struct plan_tensor *t = &k->plan->tensor[tensor];
        uint64_t name = text + strlen(t->part) + 1, alias = name + strlen(t->name) + 1;
        const uint64_t head[TENSOR_WORDS] = {
            text,    name, t->alias_of ? alias : UINT64_MAX, (uint64_t)t->dtype, t->trainable, (uint64_t)t->shape.ndim,
            end - at
        };
        text = alias + (t->alias_of ? strlen(t->alias_of) + 1 : 0);
        pen_words(w, head, TENSOR_WORDS);
        pen_words(w, t->shape.dim, t->shape.ndim);
        for (; at < end; at++)
            pen_piece(w, &k->plan->piece[picked(k, at)], t->shape.ndim);
    }
}

static void pen_sources(struct pen *w, const struct pick *k)
{
    for (uint64_t i = 0; i < k->sources; i++) {
        const struct plan_source *s = &k->source[i];
        const uint64_t word[SOURCE_WORDS] = { s->order,        (uint64_t)s->writer << 32 | (uint32_t)s->rank,
                                              s->local_offset, (uint64_t)s->elem_bytes << 32 | s->local,
                                              s->at,           s->elems };
        pen_words(w, word, SOURCE_WORDS);
    }
}

static void pen_plan(struct pen *w, const struct pick *k)
{
    const struct plan *p = k->plan;
    struct pen text = { .p = NULL };
    uint64_t tensors = pen_texts(&text, k);
    const uint64_t head[HEAD_WORDS] = { (uint64_t)p->ranks, tensors, k->count, text.used, !k->list, k->sources };
    pen_words(w, head, HEAD_WORDS);
    pen_texts(w, k);
    w->used = (w->used + 7) / 8 * 8;
    if (!k->list)
        pen_words(w, p->rank_bytes, p->ranks);
    pen_tensors(w, k);
    pen_sources(w, k);
}

static status *pack(const struct pick *k, void **buf, size_t *bytes)
{
    struct pen w = { .p = NULL };
    pen_plan(&w, k);
    unsigned char *b = mem_calloc(w.used, 1);
    if (!b)
        return ERR(NO_MEMORY, "a plan of %zu bytes", w.used);
    w = (struct pen){ .p = b };
    pen_plan(&w, k);
    *buf = b;
    *bytes = w.used;
    return NULL;
}

status *plan_pack(const struct plan *p, void **buf, size_t *bytes)
{
    struct pick k = { .plan = p, .count = p->piece_count, .source = p->source, .sources = p->source_count };
    return pack(&k, buf, bytes);
}

status *plan_pack_part(const struct plan *p, const uint32_t *piece, uint64_t count, const struct plan_source *source,
                       uint64_t sources, void **buf, size_t *bytes)
{
    static const uint32_t none;
    struct pick k = { .plan = p, .list = count ? piece : &none, .count = count, .source = source, .sources = sources };
    return pack(&k, buf, bytes);
}

/* ---- back */

struct eye {
    const unsigned char *p;
    size_t left;
};

static status *eye_words(struct eye *r, uint64_t *v, int n)
{
    if (r->left / 8 < (uint64_t)n)
        return ERR(CORRUPT, "a packed plan ends early");
    for (int i = 0; i < n; i++, r->p += 8, r->left -= 8)
        v[i] = get_u64(r->p);
    return NULL;
}

static status *eye_piece(struct eye *r, struct plan *p, const struct plan_tensor *t, uint32_t tensor)
{
    uint64_t who[PIECE_WORDS];
    struct plan_piece *q = &p->piece[p->piece_count];
    TRY(eye_words(r, who, PIECE_WORDS));
    *q = (struct plan_piece){ .tensor = tensor,
                              .writer = (int32_t)who[0],
                              .local = (uint32_t)who[1],
                              .number = (uint32_t)who[2],
                              .local_offset = who[3],
                              .piece = { .begin = who[4], .end = who[5] } };
    TRY(eye_words(r, q->piece.box.off, t->shape.ndim));
    TRY(eye_words(r, q->piece.box.len, t->shape.ndim));
    if (who[0] >= (uint64_t)p->ranks || who[1] > UINT32_MAX || who[2] > UINT32_MAX)
        return ERR(CORRUPT, "a packed plan: tensor %s/%s has writer %llu of %d", t->part, t->name,
                   (unsigned long long)who[0], p->ranks);
    p->piece_count++;
    return piece_check(&t->shape, &q->piece);
}

static status *eye_tensor(struct eye *r, struct plan *p, size_t text, uint64_t pieces)
{
    uint64_t head[TENSOR_WORDS];
    struct plan_tensor *t = &p->tensor[p->tensor_count];
    TRY(eye_words(r, head, TENSOR_WORDS));
    if (head[0] >= text || head[1] >= text || (head[2] >= text && head[2] != UINT64_MAX) || head[5] > LAYOUT_DIMS ||
        head[3] >= DTYPE_COUNT || head[6] > pieces - p->piece_count)
        return ERR(CORRUPT, "a packed plan: tensor %llu makes no sense", (unsigned long long)p->tensor_count);
    *t = (struct plan_tensor){ .part = p->text + head[0],
                               .name = p->text + head[1],
                               .dtype = (enum dtype)head[3],
                               .trainable = head[4] != 0,
                               .shape = { .ndim = (int)head[5] },
                               .first_piece = p->piece_count,
                               .piece_count = head[6] };
    t->alias_of = head[2] != UINT64_MAX ? p->text + head[2] : NULL;
    TRY(eye_words(r, t->shape.dim, t->shape.ndim));
    for (uint64_t i = 0; i < t->piece_count; i++)
        TRY(eye_piece(r, p, t, (uint32_t)p->tensor_count));
    p->tensor_count++;
    return NULL;
}

static status *eye_source(struct eye *r, struct plan *p)
{
    uint64_t word[SOURCE_WORDS];
    TRY(eye_words(r, word, SOURCE_WORDS));
    uint64_t writer = word[1] >> 32, rank = word[1] & UINT32_MAX;
    if (writer >= (uint64_t)p->ranks || rank >= (uint64_t)p->ranks)
        return ERR(CORRUPT, "a packed plan: rank %llu gives to rank %llu of %d", (unsigned long long)rank,
                   (unsigned long long)writer, p->ranks);
    p->source[p->source_count++] = (struct plan_source){ .order = word[0],
                                                         .writer = (int32_t)writer,
                                                         .rank = (int32_t)rank,
                                                         .local_offset = word[2],
                                                         .local = (uint32_t)word[3],
                                                         .elem_bytes = (uint32_t)(word[3] >> 32),
                                                         .at = word[4],
                                                         .elems = word[5] };
    return NULL;
}

static status *eye_plan(struct eye *r, struct plan *p)
{
    uint64_t head[HEAD_WORDS];
    TRY(eye_words(r, head, HEAD_WORDS));
    uint64_t ranks = head[0], tensors = head[1], pieces = head[2], text = head[3], whole = head[4], sources = head[5];
    if (ranks < 1 || ranks > INT32_MAX || whole > 1 || (whole && ranks > r->left / 8) ||
        tensors > r->left / (8 * TENSOR_WORDS) || pieces > r->left / (8 * PIECE_WORDS) || text > r->left / 8 * 8 ||
        sources > r->left / (8 * SOURCE_WORDS))
        return ERR(CORRUPT, "a packed plan counts more than its %zu bytes hold", r->left);
    p->ranks = (int)ranks;
    p->text = mem_calloc(text + 1, 1);
    p->tensor = mem_calloc(tensors, sizeof *p->tensor);
    p->piece = mem_calloc(pieces, sizeof *p->piece);
    p->source = mem_calloc(sources, sizeof *p->source);
    p->rank_bytes = whole ? mem_calloc(ranks, sizeof *p->rank_bytes) : NULL;
    if (!p->text || !p->tensor || !p->piece || !p->source || (whole && !p->rank_bytes))
        return ERR(NO_MEMORY, "a plan of %llu pieces", (unsigned long long)pieces);
    memcpy(p->text, r->p, text);
    r->p += (text + 7) / 8 * 8;
    r->left -= (text + 7) / 8 * 8;
    if (whole)
        TRY(eye_words(r, p->rank_bytes, p->ranks));
    while (p->tensor_count < tensors)
        TRY(eye_tensor(r, p, text, pieces));
    while (p->source_count < sources)
        TRY(eye_source(r, p));
    if (p->piece_count != pieces || r->left)
        return ERR(CORRUPT, "a packed plan has %zu bytes too many", r->left);
    return NULL;
}

status *plan_unpack(const void *buf, size_t bytes, struct plan **out)
{
    struct eye r = { .p = buf, .left = bytes };
    struct plan *p = mem_calloc(1, sizeof *p);
    if (!p)
        return ERR(NO_MEMORY, "a plan");
    status *st = eye_plan(&r, p);
    if (st)
        plan_free(p);
    else
        *out = p;
    return st;
}
