/* remesh: tessera_reshard: a state's tensors from another state of the same ranks. The plan that a save would make says
 * which rank gives each stored piece; then everything is as in a load, with memory as the source. */
#include "ckpt/handle.h"
#include "ckpt/loadmove.h"
#include "ckpt/together.h"
#include "comm/agree.h"
#include "comm/base/mem.h"

/* What is there, as if it were a step. */
struct giver {
    const tessera_state *from;
    struct plan *plan;
    struct metadata m; /* file: the rank that gives a piece; texts are the plan's */
    int32_t *reader;   /* [pieces] */
};

static uint64_t first_elem(const struct giver *g, const struct load_run *r, size_t elem)
{
    const struct plan_piece *p = &g->plan->piece[r->block->piece];
    return p->local_offset + r->block->block * (META_BLOCK_BYTES / elem);
}

static size_t piece_elem_bytes(const struct giver *g, const struct load_run *r)
{
    return dtype_bytes(g->plan->tensor[g->plan->piece[r->block->piece].tensor].dtype);
}

/* A run lies in one piece: pieces have gaps between them that no run bridges. */
static const unsigned char *piece_at(const void *arg, const struct load_run *r)
{
    const struct giver *g = arg;
    const struct state_piece *p = &g->from->piece[g->plan->piece[r->block->piece].local];
    size_t elem = piece_elem_bytes(g, r);
    return p->strided ? NULL : (const unsigned char *)p->data + first_elem(g, r, elem) * elem;
}

static status *read_piece(const void *arg, const struct load_run *r, unsigned char *to)
{
    const struct giver *g = arg;
    const struct state_piece *p = &g->from->piece[g->plan->piece[r->block->piece].local];
    size_t elem = piece_elem_bytes(g, r);
    uint64_t first = first_elem(g, r, elem);
    piece_gather(p->shape.ndim, &p->piece, elem, p->data, p->strided ? p->stride : NULL, first, first + r->bytes / elem,
                 to);
    return NULL;
}

/* Fill g->m and g->reader from the plan. */
static status *describe(struct giver *g)
{
    const struct plan *p = g->plan;
    uint64_t at = 0;
    g->m.tensor = mem_calloc(p->tensor_count, sizeof *g->m.tensor);
    g->m.piece = mem_calloc(p->piece_count, sizeof *g->m.piece);
    g->reader = mem_array(NULL, p->piece_count, sizeof *g->reader);
    if (!g->m.tensor || !g->m.piece || !g->reader)
        return ERR(NO_MEMORY, "%llu pieces", (unsigned long long)p->piece_count);
    for (uint64_t i = 0; i < p->tensor_count; i++) {
        const struct plan_tensor *t = &p->tensor[i];
        g->m.tensor[i] = (struct meta_tensor){ .part = (char *)(uintptr_t)t->part,
                                               .name = (char *)(uintptr_t)t->name,
                                               .dtype = t->dtype,
                                               .shape = t->shape,
                                               .trainable = t->trainable,
                                               .alias_of = (char *)(uintptr_t)t->alias_of,
                                               .first_piece = t->first_piece,
                                               .piece_count = t->piece_count };
    }
    for (uint64_t i = 0; i < p->piece_count; i++) {
        const struct plan_piece *k = &p->piece[i];
        uint64_t bytes = piece_elems(&k->piece) * dtype_bytes(p->tensor[k->tensor].dtype);
        g->m.piece[i] =
            (struct meta_piece){ .piece = k->piece, .file = (uint32_t)k->writer, .offset = at, .bytes = bytes };
        g->reader[i] = k->writer;
        at += bytes + MOVE_GAP_BYTES + 1;
    }
    g->m.tensor_count = p->tensor_count;
    g->m.piece_count = p->piece_count;
    return NULL;
}

/* The whole plan on every rank. Takes what plan_together gave. Collective; the error is agreed. */
static status *share_plan(struct comm *c, struct plan *mine, struct plan **out)
{
    void *buf = NULL;
    size_t bytes = 0;
    status *st = comm_agree(c, c->rank == 0 ? plan_pack(mine, &buf, &bytes) : NULL);
    if (!st)
        st = comm_bcast_bytes(c, &buf, &bytes, 0);
    plan_free(mine);
    if (!st)
        st = comm_agree(c, plan_unpack(buf, bytes, out));
    mem_free(buf);
    return st;
}

/* As `from`, but what is stored by reference is given from memory. Borrows from it; free with describe_free. */
static status *describe_state(const tessera_state *from, tessera_state *out)
{
    *out = (tessera_state){ .count = from->count, .cap = from->count };
    out->piece = mem_array(NULL, from->count, sizeof *out->piece);
    if (!out->piece)
        return ERR(NO_MEMORY, "%zu pieces", from->count);
    for (size_t i = 0; i < from->count; i++) {
        out->piece[i] = from->piece[i];
        out->piece[i].reference = NULL;
    }
    return state_describe(out);
}

static void describe_free(tessera_state *s)
{
    mem_free(s->piece);
    mem_free(s->desc);
    mem_free(s->text);
}

static status *plan_givers(tessera *t, const tessera_state *from, struct giver *g)
{
    tessera_state plain = { 0 };
    struct plan *plan = NULL;
    status *mine = from ? describe_state(from, &plain) : ERR(INVALID, "no state to take tensors from");
    status *st = plan_together(&t->nodes, &plain, mine, PLAN_AS_GIVEN, NULL, &plan);
    if (!st)
        st = share_plan(t->x, plan, &g->plan);
    describe_free(&plain);
    return st ? st : comm_agree(t->x, describe(g));
}

static status *fill_from(tessera *t, const struct giver *g, tessera_state *to, const struct tessera_load_options *o)
{
    const struct load_source source = { .arg = g, .read = read_piece, .at = piece_at, .align = 1 };
    struct match_fill f = { 0 };
    struct load_totals totals;
    status *st = match_state(t->x, t->dev, &g->m, to, o, &f, &t->lists);
    if (!st)
        st = loadpipe_from(&t->nodes, &g->m, &source, g->reader, f.want, f.count, NULL, &totals);
    if (!st)
        st = comm_agree(t->x, match_place(t->dev, to, &f));
    match_fill_free(&f, to ? to->count : 0);
    return st;
}

status *tessera_reshard(tessera *t, const tessera_state *from, tessera_state *to, const struct tessera_load_options *o)
{
    struct tessera_load_options checked;
    struct giver g = { .from = from };
    TRY(save_settle(t));
    match_lists_free(&t->lists);
    status *st = match_options(o, &checked);
    if (!st && !t->dev->host)
        st = ERR(UNSUPPORTED, "reshard in the memory of device %s", t->dev->ops->name);
    TRY(comm_agree(t->x, st));
    st = plan_givers(t, from, &g);
    if (!st)
        st = fill_from(t, &g, to, &checked);
    mem_free(g.m.tensor);
    mem_free(g.m.piece);
    mem_free(g.reader);
    plan_free(g.plan);
    return status_wrap(st, "reshard");
}
