/* cli_diff: `tessera ckpt diff`: two steps, of one root or of two, tensor by tensor.
 *
 * Tensors pair up by part and name. Their values are read in pieces of bounded size: the elements of a piece of the
 * first step in order, and what the second step holds of them wherever its pieces lie (reshard_tensor), so the two may
 * be cut in any way. An alias stands for the tensor that holds its bytes. Checksums are not looked at: verify does
 * that. */
#include "ckpt/cast.h"
#include "ckpt/cli.h"
#include "ckpt/pin.h"
#include "ckpt/refs.h"
#include "ckpt/reshard.h"
#include "comm/base/mem.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { RUN_BYTES = 4 << 20, READ_BYTES = 1 << 20 };

struct side {
    struct store *store;
    uint64_t step;
    struct metadata *m;
    struct origins from;
    struct pin *pin;
};

struct diff {
    struct side a, b;
    unsigned char *run_a, *run_b; /* [RUN_BYTES] the same elements of both */
    unsigned char *read;          /* [READ_BYTES] of b's storage */
    uint64_t same, differ;
};

/* What differs between two tensors' values. */
struct gap {
    uint64_t elems;
    double max; /* NaN: a NaN on one side only */
};

/* ---- Values */

static const struct meta_tensor *holder(const struct metadata *m, const struct meta_tensor *t)
{
    return t->alias_of ? &m->tensor[metadata_find(m, t->part, t->alias_of)] : t;
}

static status *read_elems(const struct side *s, const struct meta_piece *p, size_t elem, uint64_t lo, uint64_t hi,
                          void *out)
{
    char key[STORE_KEY_BYTES];
    const struct meta_file *f = &s->m->file[p->file];
    TRY(origins_key(s->m, f, key));
    return store_get(origins_store(&s->from, f), key, p->offset + lo * elem, out, (size_t)((hi - lo) * elem));
}

/* One copy of b's elements to their places in run_b, a bounded part of the stored run at a time. */
static status *gather(struct diff *d, const struct meta_tensor *tb, const struct reshard_copy *c, size_t elem)
{
    const struct meta_piece *p = &d->b.m->piece[tb->first_piece + c->stored];
    uint64_t begin, end, most = READ_BYTES / elem;
    reshard_span(c, &begin, &end);
    for (uint64_t lo = begin, hi; lo < end; lo = hi) {
        hi = end - lo > most ? lo + most : end;
        if (reshard_count(c, lo, hi) == 0)
            continue;
        TRY(read_elems(&d->b, p, elem, lo, hi, d->read));
        reshard_apply(c, elem, d->read, lo, hi, d->run_b);
    }
    return NULL;
}

static uint64_t magnitude(enum dtype t, const unsigned char *a, const unsigned char *b, size_t elem)
{
    uint64_t x = 0, y = 0;
    memcpy(&x, a, elem);
    memcpy(&y, b, elem);
    if (t >= DTYPE_I64 && t <= DTYPE_I8) { /* signed, little-endian: order by flipping the sign bit */
        uint64_t sign = UINT64_C(1) << (8 * elem - 1);
        x ^= sign;
        y ^= sign;
    }
    return x > y ? x - y : y - x;
}

/* |a - b| of one element; for 8-bit floats and packed types, of their bytes. */
static double distance(enum dtype t, const unsigned char *a, const unsigned char *b, size_t elem)
{
    if (t != DTYPE_F64 && !cast_possible(t, DTYPE_F64))
        return (double)magnitude(t, a, b, elem);
    double x, y;
    cast_elems(t, DTYPE_F64, a, &x, 1);
    cast_elems(t, DTYPE_F64, b, &y, 1);
    if (isnan(x) && isnan(y))
        return 0;
    return x == y ? 0 : fabs(x - y);
}

static void compare(const struct diff *d, enum dtype t, uint64_t count, struct gap *gap)
{
    size_t elem = dtype_bytes(t);
    if (memcmp(d->run_a, d->run_b, (size_t)count * elem) == 0)
        return;
    for (uint64_t i = 0; i < count; i++) {
        const unsigned char *a = d->run_a + i * elem, *b = d->run_b + i * elem;
        if (memcmp(a, b, elem) == 0)
            continue;
        double x = distance(t, a, b, elem);
        gap->elems++;
        if (isnan(x) || x > gap->max)
            gap->max = x;
    }
}

/* Elements [lo, hi) of piece p of a, against b. */
static status *compare_run(struct diff *d, const struct meta_tensor *ta, const struct meta_tensor *tb,
                           const struct piece *stored, uint64_t piece, uint64_t lo, uint64_t hi, struct gap *gap)
{
    const struct meta_piece *p = &d->a.m->piece[ta->first_piece + piece];
    size_t elem = dtype_bytes(ta->dtype);
    struct piece want = p->piece;
    struct reshard_list l = { 0 };
    want.begin += lo;
    want.end = p->piece.begin + hi;
    TRY(read_elems(&d->a, p, elem, lo, hi, d->run_a));
    status *st = reshard_tensor(&tb->shape, stored, (uint32_t)tb->piece_count, &want, 1, &l);
    for (size_t i = 0; i < l.count && !st; i++)
        st = gather(d, tb, &l.copy[i], elem);
    reshard_list_free(&l);
    if (!st)
        compare(d, ta->dtype, hi - lo, gap);
    return st;
}

static status *compare_values(struct diff *d, const struct meta_tensor *ta, const struct meta_tensor *tb,
                              struct gap *gap)
{
    uint64_t most = RUN_BYTES / dtype_bytes(ta->dtype);
    struct piece *stored = mem_array(NULL, (size_t)tb->piece_count + 1, sizeof *stored);
    if (!stored)
        return ERR(NO_MEMORY, "a list of %" PRIu64 " pieces", tb->piece_count);
    for (uint64_t i = 0; i < tb->piece_count; i++)
        stored[i] = d->b.m->piece[tb->first_piece + i].piece;
    status *st = NULL;
    for (uint64_t i = 0; i < ta->piece_count && !st; i++) {
        uint64_t n = piece_elems(&d->a.m->piece[ta->first_piece + i].piece);
        for (uint64_t lo = 0; lo < n && !st; lo += most)
            st = compare_run(d, ta, tb, stored, i, lo, n - lo > most ? lo + most : n, gap);
    }
    mem_free(stored);
    return st;
}

/* ---- Tensors */

static void print_tensor(const char *before, const struct meta_tensor *t)
{
    fputs(before, stdout);
    cli_print(t->part);
    putchar('/');
    cli_print(t->name);
}

static void print_only(struct diff *d, const char *before, const struct meta_tensor *t)
{
    print_tensor(before, t);
    putchar('\n');
    d->differ++;
}

static bool same_shape(const struct shape *a, const struct shape *b)
{
    bool same = a->ndim == b->ndim;
    for (int i = 0; same && i < a->ndim; i++)
        same = a->dim[i] == b->dim[i];
    return same;
}

static status *compare_tensor(struct diff *d, const struct meta_tensor *ta, const struct meta_tensor *tb)
{
    struct gap gap = { 0 };
    if (ta->dtype != tb->dtype || !same_shape(&ta->shape, &tb->shape)) {
        char a[256], b[256];
        dims_text(ta->shape.ndim, ta->shape.dim, a, sizeof a);
        dims_text(tb->shape.ndim, tb->shape.dim, b, sizeof b);
        print_tensor("differs  ", ta);
        printf("  %s%s and %s%s\n", dtype_name(ta->dtype), a, dtype_name(tb->dtype), b);
        d->differ++;
        return NULL;
    }
    TRY(compare_values(d, holder(d->a.m, ta), holder(d->b.m, tb), &gap));
    if (gap.elems == 0) {
        d->same++;
        return NULL;
    }
    bool ok;
    print_tensor("differs  ", ta);
    printf("  %" PRIu64 " of %" PRIu64 " elements, max abs difference %.9g\n", gap.elems, shape_volume(&ta->shape, &ok),
           gap.max);
    d->differ++;
    return NULL;
}

/* Both lists are sorted by part and name. */
static status *compare_all(struct diff *d)
{
    const struct metadata *a = d->a.m, *b = d->b.m;
    for (uint64_t i = 0, j = 0; i < a->tensor_count || j < b->tensor_count;) {
        const struct meta_tensor *x = i < a->tensor_count ? &a->tensor[i] : NULL,
                                 *y = j < b->tensor_count ? &b->tensor[j] : NULL;
        int order = !x ? 1 : !y ? -1 : strcmp(x->part, y->part);
        if (x && y && order == 0)
            order = strcmp(x->name, y->name);
        if (order < 0)
            print_only(d, "only in the first   ", x);
        else if (order > 0)
            print_only(d, "only in the second  ", y);
        else
            TRY(compare_tensor(d, x, y));
        i += order <= 0;
        j += order >= 0;
    }
    return NULL;
}

/* ---- The two steps */

/* A URL of a root or a step (URL@STEP, URL/step-N), and the step that the argument after it names. */
static status *open_side(const struct request *r, int *at, struct side *out)
{
    uint64_t step = 0, other = 0;
    const char *text = *at == 0 ? r->url : *at <= r->arguments ? r->argument[*at - 1] : NULL;
    if (!text)
        return ERR(INVALID, "ckpt diff: which two steps? It takes URL [STEP] URL [STEP]");
    char *url = mem_strdup(text), *sign = url ? strrchr(url, '@') : NULL;
    if (!url)
        return ERR(NO_MEMORY, "ckpt diff");
    bool has_step = false;
    status *st = sign ? cli_step(sign + 1, &step) : NULL;
    if (sign && !st) {
        *sign = 0;
        has_step = true;
    }
    status_free(st); /* no number: a '@' of the path */
    has_step = cli_cut_step(url, &step) || has_step;
    (*at)++;
    if (*at <= r->arguments && r->argument[*at - 1][strspn(r->argument[*at - 1], "0123456789")] == 0) {
        st = cli_step(r->argument[*at - 1], &other);
        if (!st && has_step && other != step)
            st = ERR(INVALID, "ckpt diff: %s names step %" PRIu64 " and the argument after it step %" PRIu64, text,
                     step, other);
        step = other;
        has_step = true;
        (*at)++;
    } else {
        st = NULL;
    }
    if (!st)
        st = store_open(url, false, &out->store);
    mem_free(url);
    if (!st && !has_step)
        st = commit_newest(out->store, &step);
    out->step = step;
    if (!st)
        status_free(pin_open(out->store, out->step, 0, &out->pin)); /* better with one, and fine without */
    if (!st)
        st = status_wrap(commit_read(out->store, out->step, &out->m), "%s", text);
    return st ? st : origins_open(out->store, out->m, &out->from);
}

static status *run_diff(const struct request *r, struct diff *d)
{
    int at = 0;
    TRY(open_side(r, &at, &d->a));
    TRY(open_side(r, &at, &d->b));
    if (at <= r->arguments)
        return ERR(INVALID, "ckpt diff: one argument too many: \"%s\"; it takes URL [STEP] URL [STEP]",
                   r->argument[at - 1]);
    d->run_a = mem_alloc(RUN_BYTES);
    d->run_b = mem_alloc(RUN_BYTES);
    d->read = mem_alloc(READ_BYTES);
    if (!d->run_a || !d->run_b || !d->read)
        return ERR(NO_MEMORY, "buffers of %d bytes", 2 * RUN_BYTES + READ_BYTES);
    TRY(compare_all(d));
    printf("steps %" PRIu64 " and %" PRIu64 ": %" PRIu64 " tensor%s alike, %" PRIu64 " not\n", d->a.step, d->b.step,
           d->same, d->same == 1 ? "" : "s", d->differ);
    return d->differ ? ERR(INVALID, "%" PRIu64 " tensor%s differ%s, listed on standard output", d->differ,
                           d->differ == 1 ? "" : "s", d->differ == 1 ? "s" : "")
                     : NULL;
}

status *cli_diff(const struct request *r)
{
    struct diff d = { .same = 0 };
    status *st = run_diff(r, &d);
    mem_free(d.run_a);
    mem_free(d.run_b);
    mem_free(d.read);
    pin_close(d.a.pin);
    pin_close(d.b.pin);
    origins_close(&d.a.from);
    origins_close(&d.b.from);
    metadata_free(d.a.m);
    metadata_free(d.b.m);
    store_close(d.a.store);
    store_close(d.b.store);
    return st;
}
