#include "trainer/hf/hf_load.h"

#include "ckpt/ckpt.h"
#include "comm/agree.h"
#include "comm/base/mem.h"
#include "trainer/ops/compute.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tessera_tensor hf_tensor(const char *name, enum dtype dtype, const struct shape *shape)
{
    struct tessera_tensor d = TESSERA_TENSOR;
    d.part = "model";
    d.name = name;
    d.dtype = (int)dtype;
    d.ndim = shape->ndim;
    for (int i = 0; i < d.ndim; i++)
        d.shape[i] = d.length[i] = shape->dim[i];
    return d;
}

enum { BATCH_BYTES = 256 << 20, LIST_BYTES = 768 };

/* ---- names ---- */

static const char among[] = ".experts.";

void hf_name(const char *ours, uint64_t e, char out[PARAM_NAME_BYTES])
{
    const char *at = strstr(ours, among);
    size_t head = at ? (size_t)(at - ours) + sizeof among - 1 : 0;
    if (at)
        snprintf(out, PARAM_NAME_BYTES, "%.*s%" PRIu64 ".%s", (int)head, ours, e, ours + head);
    else
        snprintf(out, PARAM_NAME_BYTES, "%s", ours);
}

int64_t hf_expert(const char *theirs, char ours[PARAM_NAME_BYTES])
{
    const char *at = strstr(theirs, among);
    size_t head = at ? (size_t)(at - theirs) + sizeof among - 1 : 0, digits = strspn(theirs + head, "0123456789");
    bool one = at && digits > 0 && digits < 10 && theirs[head + digits] == '.';
    if (one)
        snprintf(ours, PARAM_NAME_BYTES, "%.*s%s", (int)head, theirs, theirs + head + digits + 1);
    else
        snprintf(ours, PARAM_NAME_BYTES, "%s", theirs);
    return one ? strtoll(theirs + head, NULL, 10) : -1;
}

struct tessera_tensor hf_part(const char *ours, enum dtype dtype, const struct shape *theirs, int64_t e,
                              uint64_t experts)
{
    struct shape stack = { 3, { experts, theirs->dim[0], theirs->dim[1] } };
    if (e < 0)
        return hf_tensor(ours, dtype, theirs);
    struct tessera_tensor d = hf_tensor(ours, dtype, &stack);
    d.offset[0] = (uint64_t)e;
    d.length[0] = 1;
    return d;
}

/* Tensors of a folder that make p. */
static uint64_t parts_of(const struct param *p)
{
    return p->experts ? p->shape.dim[0] : 1;
}

static const struct safetensor *part_at(const struct safetensors *s, const struct param *p, uint64_t e)
{
    char name[PARAM_NAME_BYTES];
    if (!p->experts)
        return safetensors_find(s, p->name);
    hf_name(p->name, e, name);
    return safetensors_find(s, name);
}

/* A list of complaints, cut off where it becomes long. */
struct complaints {
    char text[LIST_BYTES];
    size_t used;
    int left_out;
};

static void complain(struct complaints *c, const char *what, const char *name)
{
    char text[PARAM_NAME_BYTES];
    safetensors_text(name, text, sizeof text);
    int n = snprintf(c->text + c->used, sizeof c->text - c->used, "%s%s%s", c->used ? "; " : "", what, text);
    if (n < 0 || (size_t)n >= sizeof c->text - c->used) {
        c->text[c->used] = 0;
        c->left_out++;
    } else {
        c->used += (size_t)n;
    }
}

static bool is_float(enum dtype t)
{
    return t == DTYPE_F64 || t == DTYPE_F32 || t == DTYPE_F16 || t == DTYPE_BF16;
}

static void match_one(const struct safetensors *s, const struct param *p, uint64_t e, struct complaints *c)
{
    const struct safetensor *t = part_at(s, p, e), *first = part_at(s, p, 0);
    struct shape shape = p->shape;
    char have[64], want[64], what[224], name[PARAM_NAME_BYTES];
    hf_name(p->name, e, name);
    if (p->experts)
        shape = (struct shape){ 2, { p->shape.dim[1], p->shape.dim[2] } };
    else
        snprintf(name, sizeof name, "%s", p->name);
    if (!t) {
        complain(c, "missing ", name);
        return;
    }
    if (t->shape.ndim != shape.ndim || memcmp(t->shape.dim, shape.dim, (size_t)shape.ndim * sizeof t->shape.dim[0])) {
        dims_text(t->shape.ndim, t->shape.dim, have, sizeof have);
        dims_text(shape.ndim, shape.dim, want, sizeof want);
        snprintf(what, sizeof what, "%s, not %s, is the shape of ", have, want);
        complain(c, what, name);
    } else if (!is_float(t->dtype)) {
        snprintf(what, sizeof what, "%s is no type of weights: ", safetensors_dtype(t->dtype));
        complain(c, what, name);
    } else if (first && first->dtype != t->dtype) {
        snprintf(what, sizeof what, "%s, not expert 0's %s, is the type of ", safetensors_dtype(t->dtype),
                 safetensors_dtype(first->dtype));
        complain(c, what, name);
    }
}

/* Does the model have a tensor of that name? */
static bool expected(const struct params *ps, const char *name)
{
    char ours[PARAM_NAME_BYTES];
    int64_t e = hf_expert(name, ours);
    const struct param *p = params_find(ps, e < 0 ? name : ours);
    return p && p->experts == (e >= 0) && (e < 0 || (uint64_t)e < p->shape.dim[0]);
}

static bool ignored(const char *name)
{
    static const char angles[] = ".rotary_emb.inv_freq";
    size_t n = strlen(name), m = sizeof angles - 1;
    return n > m && !strcmp(name + n - m, angles);
}

status *hf_match(const struct safetensors *s, const struct params *ps)
{
    struct complaints c = { .used = 0 };
    for (int i = 0; i < ps->count; i++)
        for (uint64_t e = 0; ps->p[i].alias < 0 && !ps->p[i].adapter && e < parts_of(&ps->p[i]); e++)
            match_one(s, &ps->p[i], e, &c);
    for (uint64_t i = 0; i < s->count; i++)
        if (!expected(ps, s->tensor[i].name) && !ignored(s->tensor[i].name))
            complain(&c, "unexpected ", s->tensor[i].name);
    if (!c.used)
        return NULL;
    char more[32] = "";
    if (c.left_out)
        snprintf(more, sizeof more, "; and %d more", c.left_out);
    return ERR(INVALID, "%s does not fit the model: %s%s", s->url, c.text, more);
}

/* ---- values ---- */

struct loading {
    struct comm *world;
    struct safetensors *s;
    struct params *ps;
    tessera *t;
};

/* This rank's 1/n of p: read, and added to `from`. The bytes live at buf. */
static status *add_read(const struct loading *l, const struct param *p, uint64_t e, tessera_state *from,
                        unsigned char *buf, size_t *used)
{
    const struct safetensor *t = part_at(l->s, p, e);
    struct piece part = piece_whole(&t->shape);
    layout_cut(part.end, (uint64_t)l->world->size, (uint64_t)l->world->rank, &part.begin, &part.end);
    if (part.begin == part.end)
        return NULL;
    TRY(safetensors_read(l->s, t, &part, buf + *used));
    struct tessera_tensor d =
        hf_part(p->name, t->dtype, &t->shape, p->experts ? (int64_t)e : -1, p->experts ? p->shape.dim[0] : 0);
    d.run_begin = part.begin;
    d.run_end = part.end;
    d.data = buf + *used;
    *used += (piece_elems(&part) * dtype_bytes(t->dtype) + 63) / 64 * 64;
    return tessera_state_add_tensor(from, &d);
}

/* Does the batch fill this parameter here? */
static bool is_wanted(const struct param *p)
{
    return p->alias < 0 && !p->adapter && !p->away;
}

static size_t held_bytes(const struct param *p)
{
    return box_volume(p->shape.ndim, &p->box) * dtype_bytes(p->value.dtype);
}

static status *add_wanted(const struct param *p, void *data, tessera_state *to)
{
    struct tessera_tensor d = TESSERA_TENSOR;
    d.part = "model";
    d.name = p->name;
    d.dtype = (int)p->value.dtype;
    d.ndim = p->shape.ndim;
    d.data = data;
    for (int i = 0; i < d.ndim; i++) {
        d.shape[i] = p->shape.dim[i];
        d.offset[i] = p->box.off[i];
        d.length[i] = p->box.len[i];
    }
    return tessera_state_add_tensor(to, &d);
}

/* Parameters [first, end) from where load_batch has put them for a memory that is not the host's. */
static status *put_away(const struct loading *l, int first, int end, const unsigned char *held)
{
    for (int i = first; held && i < end; i++) {
        const struct param *p = &l->ps->p[i];
        if (!is_wanted(p))
            continue;
        TRY(compute_put(l->ps->compute, p->value.data, held, held_bytes(p)));
        held += held_bytes(p);
    }
    return NULL;
}

/* Parameters [first, end). */
static status *load_batch(const struct loading *l, int first, int end, size_t bytes)
{
    tessera_state *from = NULL, *to = NULL;
    size_t used = 0, held = 0, filled = 0;
    for (int i = first; !compute_host(l->ps->compute) && i < end; i++)
        held += is_wanted(&l->ps->p[i]) ? held_bytes(&l->ps->p[i]) : 0;
    unsigned char *buf = mem_alloc(bytes), *room = held ? mem_alloc(held) : NULL;
    status *st = buf && (room || !held) ? NULL : ERR(NO_MEMORY, "%zu bytes of weights at a time", bytes + held);
    if (!st)
        st = tessera_state_new(l->t, &from);
    if (!st)
        st = tessera_state_new(l->t, &to);
    for (int i = first; i < end && !st; i++) {
        const struct param *p = &l->ps->p[i];
        if (p->alias >= 0 || p->adapter)
            continue;
        for (uint64_t e = 0; e < parts_of(p) && !st; e++)
            st = add_read(l, p, e, from, buf, &used);
        if (!st && is_wanted(p))
            st = add_wanted(p, room ? (void *)(room + filled) : p->value.data, to);
        filled += room && is_wanted(p) ? held_bytes(p) : 0;
    }
    st = comm_agree(l->world, st);
    struct tessera_load_options o = TESSERA_LOAD_OPTIONS;
    o.allow = TESSERA_ALLOW_CAST;
    if (!st)
        st = tessera_reshard(l->t, from, to, &o);
    if (!st)
        st = comm_agree(l->world, put_away(l, first, end, room));
    tessera_state_free(from);
    tessera_state_free(to);
    mem_free(buf);
    mem_free(room);
    return st;
}

/* Room for a rank's share of p, at most. */
static size_t share_of(const struct loading *l, const struct param *p)
{
    const struct safetensor *t = p->alias < 0 ? part_at(l->s, p, 0) : NULL;
    return t ? parts_of(p) * (t->bytes / (uint64_t)l->world->size + 128) : 0;
}

static status *load_all(const struct loading *l)
{
    for (int first = 0, end; first < l->ps->count; first = end) {
        size_t bytes = share_of(l, &l->ps->p[first]);
        for (end = first + 1; end < l->ps->count && bytes + share_of(l, &l->ps->p[end]) <= BATCH_BYTES; end++)
            bytes += share_of(l, &l->ps->p[end]);
        TRY(load_batch(l, first, end, bytes));
    }
    return NULL;
}

status *hf_load(struct comm *world, const char *folder, struct params *ps, uint64_t *read)
{
    struct loading l = { .world = world, .ps = ps };
    struct tessera_options o = TESSERA_OPTIONS;
    status *st = safetensors_open(folder, &l.s);
    if (!st)
        st = hf_match(l.s, ps);
    st = comm_agree(world, st);
    o.url = "mem:"; /* a handle to reshard with: nothing is stored */
    if (!st)
        st = ckpt_open(&o, world, NULL, NULL, &l.t);
    if (!st)
        st = load_all(&l);
    if (l.t)
        st = status_first(st, tessera_close(l.t));
    if (!st)
        *read = l.s->bytes_read;
    safetensors_close(l.s);
    return st;
}
