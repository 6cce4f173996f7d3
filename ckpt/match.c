/* match: each rank looks at its own pieces (look), then all put together what they found (put_together), and judge it
 * alike (judge). */
#include "ckpt/match.h"

#include "ckpt/cast.h"
#include "ckpt/reshard.h"
#include "comm/agree.h"
#include "comm/base/mem.h"

#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PART_BYTES = 128, NAME_BYTES = PART_BYTES + 256, DETAIL_BYTES = 600 };

/* What all ranks together want of a stored tensor; the maximum over ranks counts. */
enum mark { MARK_NONE, MARK_PART /* its part is loaded from */, MARK_WANTED };

struct match {
    struct comm *c;
    const struct device *dev;
    const struct metadata *m;
    const tessera_state *s;
    const struct tessera_load_options *o;
    uint8_t *mark;            /* [tensors of the step + 1], enum mark; the last: whether anything was selected */
    uint8_t *behind;          /* [the state's pieces] 1: an alias has asked for it */
    struct state_bytes found; /* entries: the list's number, name, NUL, what is wrong, NUL */
};

void match_lists_free(struct match_lists *l)
{
    mem_free(l->text);
    mem_free(l->name);
    *l = (struct match_lists){ 0 };
}

void match_fill_free(struct match_fill *f, size_t pieces)
{
    for (size_t i = 0; f->bounce && i < pieces; i++)
        mem_free(f->bounce[i].data);
    mem_free(f->bounce);
    mem_free(f->want);
}

/* ---- options */

status *match_options(const struct tessera_load_options *in, struct tessera_load_options *out)
{
    *out = (struct tessera_load_options)TESSERA_LOAD_OPTIONS;
    if (!in)
        return NULL;
    if (in->size < offsetof(struct tessera_load_options, allow) + sizeof in->allow || in->size > 4096)
        return ERR(INVALID, "load options: a struct of %zu bytes; set it with TESSERA_LOAD_OPTIONS", in->size);
    memcpy(out, in, in->size < sizeof *out ? in->size : sizeof *out);
    if (out->allow & ~(TESSERA_LENIENT | TESSERA_ALLOW_CAST))
        return ERR(INVALID, "load options: allow %#x", (unsigned)out->allow);
    for (const char *const *r = out->roles; r && *r; r++)
        if (!strchr(*r, '='))
            return ERR(INVALID, "load options: role \"%s\" is not WANTED=STORED", *r);
    return NULL;
}

bool match_selected(const char *const *patterns, const char *text)
{
    bool in = !patterns || !*patterns || **patterns == '!';
    for (; patterns && *patterns; patterns++) {
        bool negated = **patterns == '!';
        if (in == negated && fnmatch(*patterns + negated, text, 0) == 0)
            in = !negated;
    }
    return in;
}

/* The part that `part` is loaded from: by the first rule whose left side is it, or whole segments at its front. */
static status *stored_part(const struct tessera_load_options *o, const char *part, char out[PART_BYTES])
{
    const char *from = "", *rest = part;
    for (const char *const *r = o->roles; r && *r; r++) {
        size_t n = (size_t)(strchr(*r, '=') - *r);
        if (n && (strncmp(*r, part, n) != 0 || (part[n] && part[n] != '/')))
            continue;
        from = *r + n + 1;
        rest = n && part[n] ? part + n + 1 : part + n;
        break;
    }
    int n = snprintf(out, PART_BYTES, "%s%s%s", from, *from && *rest ? "/" : "", rest);
    if (n <= 0 || n >= PART_BYTES)
        return ERR(INVALID, "part %s: its role makes \"%s%s%s\" of it, which is no part", part, from,
                   *from && *rest ? "/" : "", rest);
    return NULL;
}

/* ---- one rank's look */

static status *note(struct match *x, int list, const char *part, const char *name, const char *detail)
{
    struct state_bytes *f = &x->found;
    size_t need = strlen(part) + strlen(name) + strlen(detail) + 4;
    if (f->bytes + need > f->cap) {
        size_t cap = 2 * (f->bytes + need);
        unsigned char *more = mem_realloc(f->data, cap);
        if (!more)
            return ERR(NO_MEMORY, "lists of names of %zu bytes", cap);
        f->data = more;
        f->cap = cap;
    }
    unsigned char *at = f->data + f->bytes;
    *at++ = (unsigned char)list;
    snprintf((char *)at, need - 1, "%s/%s%c%s", part, name, 0, detail);
    f->bytes += need;
    return NULL;
}

/* All tensors of a stored part are looked at for unexpected ones. They lie together, sorted. */
static void mark_part(struct match *x, const char *part)
{
    uint64_t lo = 0, hi = x->m->tensor_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (strcmp(x->m->tensor[mid].part, part) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo < x->m->tensor_count && x->mark[lo] != MARK_NONE)
        return;
    for (; lo < x->m->tensor_count && !strcmp(x->m->tensor[lo].part, part); lo++)
        x->mark[lo] = MARK_PART;
}

/* Whether the stored tensor can fill the piece; if not, detail says why not. */
static bool fits(const struct match *x, const struct state_piece *p, const struct meta_tensor *t, char *detail)
{
    char have[256], want[256];
    if (t->shape.ndim != p->shape.ndim ||
        memcmp(t->shape.dim, p->shape.dim, (size_t)p->shape.ndim * sizeof p->shape.dim[0]) != 0) {
        dims_text(t->shape.ndim, t->shape.dim, have, sizeof have);
        dims_text(p->shape.ndim, p->shape.dim, want, sizeof want);
        snprintf(detail, DETAIL_BYTES, "has shape %s and is wanted as %s", have, want);
        return false;
    }
    bool cast = x->o->allow & TESSERA_ALLOW_CAST;
    if (cast ? cast_possible(t->dtype, p->dtype) : t->dtype == p->dtype)
        return true;
    snprintf(detail, DETAIL_BYTES, "is stored as %s and wanted as %s%s", dtype_name(t->dtype), dtype_name(p->dtype),
             !cast && cast_possible(t->dtype, p->dtype) ? " (ALLOW_CAST)" : "");
    return false;
}

static status *want_piece(const struct match *x, const struct state_piece *p, uint64_t found, struct match_fill *f,
                          struct match_bounce *bounce)
{
    const struct meta_tensor *t = &x->m->tensor[found];
    struct load_want *w = &f->want[f->count];
    int64_t holder = t->alias_of ? metadata_find(x->m, t->part, t->alias_of) : (int64_t)found;
    uint64_t elems = piece_elems(&p->piece);
    if (holder < 0)
        return ERR(CORRUPT, "step %llu: %s/%s is an alias of %s, which is not there", (unsigned long long)x->m->step,
                   t->part, t->name, t->alias_of);
    if (!elems)
        return NULL;
    *w = (struct load_want){ .tensor = (uint32_t)holder, .piece = p->piece, .dst = p->data };
    bounce->stored = t->dtype;
    if (p->strided || !x->dev->host || t->dtype != p->dtype) {
        if (p->strided && !x->dev->host)
            return ERR(UNSUPPORTED, "%s/%s: strided memory on device %s", p->part, p->name, x->dev->ops->name);
        w->dst = bounce->data = mem_alloc(elems * dtype_bytes(t->dtype));
        if (!w->dst)
            return ERR(NO_MEMORY, "%s/%s: %llu elements", p->part, p->name, (unsigned long long)elems);
    }
    f->count++;
    return NULL;
}

/* An alias whose target is not chosen, or is nowhere: the target's memory, which is its own, is filled from what is
 * stored under the alias' name, or else under the target's. Once, however many aliases ask. */
static status *look_behind(struct match *x, const struct state_piece *alias, int64_t found, const char *part,
                           struct match_fill *f)
{
    char detail[DETAIL_BYTES];
    if (match_selected(x->o->names, alias->alias_of))
        return NULL; /* it is loaded by itself */
    if (found < 0)
        found = metadata_find(x->m, part, alias->alias_of);
    if (found < 0)
        return note(x, TESSERA_MISSING, alias->part, alias->name, "");
    x->mark[found] = MARK_WANTED;
    for (size_t i = 0; i < x->s->count; i++) {
        const struct state_piece *p = &x->s->piece[i];
        if (strcmp(p->name, alias->alias_of) != 0 || strcmp(p->part, alias->part) != 0 || p->alias_of || x->behind[i])
            continue;
        x->behind[i] = 1;
        if (!fits(x, p, &x->m->tensor[found], detail))
            return note(x, TESSERA_MISSHAPEN, alias->part, alias->name, detail);
        TRY(want_piece(x, p, (uint64_t)found, f, &f->bounce[i]));
    }
    return NULL;
}

static status *look_at(struct match *x, const struct state_piece *p, struct match_fill *f, struct match_bounce *bounce)
{
    char part[PART_BYTES], detail[DETAIL_BYTES];
    if (!match_selected(x->o->parts, p->part) || !match_selected(x->o->names, p->name))
        return NULL;
    TRY(stored_part(x->o, p->part, part));
    x->mark[x->m->tensor_count] = MARK_WANTED;
    mark_part(x, part);
    int64_t found = metadata_find(x->m, part, p->name);
    if (found >= 0)
        x->mark[found] = MARK_WANTED;
    if (p->alias_of) /* its bytes are its target's */
        return look_behind(x, p, found, part, f);
    if (found < 0)
        return note(x, TESSERA_MISSING, p->part, p->name, "");
    if (!fits(x, p, &x->m->tensor[found], detail))
        return note(x, TESSERA_MISSHAPEN, p->part, p->name, detail);
    return want_piece(x, p, (uint64_t)found, f, bounce);
}

/* Local. */
static status *look(struct match *x, struct match_fill *f)
{
    if (!x->s)
        return ERR(INVALID, "load of step %llu: no state", (unsigned long long)x->m->step);
    size_t n = x->s->count;
    x->mark = mem_calloc(x->m->tensor_count + 1, 1);
    f->want = mem_calloc(n + 1, sizeof *f->want);
    f->bounce = mem_calloc(n + 1, sizeof *f->bounce);
    x->behind = mem_calloc(n + 1, 1);
    if (!x->mark || !x->behind || !f->want || !f->bounce)
        return ERR(NO_MEMORY, "a load of %zu pieces", n);
    for (size_t i = 0; i < n; i++)
        TRY(look_at(x, &x->s->piece[i], f, &f->bounce[i]));
    if (!n) /* nothing to select from is no mistake */
        x->mark[x->m->tensor_count] = MARK_PART;
    return NULL;
}

/* ---- all ranks together */

/* The entry behind e. */
static const char *next_entry(const char *e)
{
    e += strlen(e) + 1;
    return e + strlen(e) + 1;
}

/* By list, whose number is the first byte and not 0, then by name. */
static int entry_compare(const void *a, const void *b)
{
    const char *x = *(const char *const *)a, *y = *(const char *const *)b;
    int order = strcmp(x, y);
    return order ? order : strcmp(x + strlen(x) + 1, y + strlen(y) + 1);
}

/* Rank 0: the stored tensors that nobody wants. */
static status *note_unexpected(struct match *x)
{
    for (uint64_t i = 0; i < x->m->tensor_count; i++) {
        const struct meta_tensor *t = &x->m->tensor[i];
        if (x->mark[i] == MARK_PART && match_selected(x->o->names, t->name))
            TRY(note(x, TESSERA_UNEXPECTED, t->part, t->name, ""));
    }
    return NULL;
}

/* Pointers to the entries of a text. */
static status *split(const char *text, size_t bytes, const char ***out, size_t *count)
{
    size_t n = 0;
    for (const char *e = text; e < text + bytes; e = next_entry(e))
        n++;
    const char **entry = mem_calloc(n + 1, sizeof(char *));
    if (!entry)
        return ERR(NO_MEMORY, "a list of %zu names", n);
    n = 0;
    for (const char *e = text; e < text + bytes; e = next_entry(e))
        entry[n++] = e;
    *out = entry;
    *count = n;
    return NULL;
}

/* Rank 0: sort the entries of all ranks, each once. */
static status *sort_entries(const char *all, size_t bytes, char **out, size_t *out_bytes)
{
    const char **entry;
    size_t n, used = 0;
    TRY(split(all, bytes, &entry, &n));
    if (n)
        qsort(entry, n, sizeof *entry, entry_compare);
    char *text = mem_alloc(bytes + 1);
    for (size_t i = 0; text && i < n; i++) {
        if (i && !strcmp(entry[i], entry[i - 1]))
            continue;
        size_t one = (size_t)(next_entry(entry[i]) - entry[i]);
        memcpy(text + used, entry[i], one);
        used += one;
    }
    mem_free(entry);
    if (!text)
        return ERR(NO_MEMORY, "lists of names of %zu bytes", bytes);
    *out = text;
    *out_bytes = used;
    return NULL;
}

/* Everybody's entries, sorted, on every rank. Collective; an error is agreed. */
static status *share_entries(struct match *x, char **text, size_t *bytes)
{
    void *all = NULL, *sorted = NULL;
    size_t *counts = NULL, total = 0, n = 0;
    TRY(comm_gather_bytes(x->c, x->found.data, x->found.bytes, 0, &all, &counts));
    for (int r = 0; counts && r < x->c->size; r++)
        total += counts[r];
    status *st = NULL;
    if (x->c->rank == 0)
        st = sort_entries(all, total, (char **)&sorted, &n);
    mem_free(all);
    mem_free(counts);
    st = comm_agree(x->c, st);
    if (!st)
        st = comm_bcast_bytes(x->c, &sorted, &n, 0);
    if (st) {
        mem_free(x->c->rank == 0 ? sorted : NULL);
        return st;
    }
    *text = sorted;
    *bytes = n;
    return NULL;
}

/* Collective; an error is agreed. */
static status *put_together(struct match *x, struct match_lists *l)
{
    size_t bytes = 0, n = 0;
    TRY(comm_allreduce(x->c, x->mark, x->m->tensor_count + 1, COMM_U8, COMM_MAX, NULL));
    TRY(comm_agree(x->c, x->c->rank == 0 ? note_unexpected(x) : NULL));
    TRY(share_entries(x, &l->text, &bytes));
    TRY(comm_agree(x->c, split(l->text, bytes, &l->name, &n)));
    for (size_t i = 0; i < n; i++) {
        l->count[*l->name[i] - 1]++;
        l->name[i]++; /* past the list's number */
    }
    return NULL;
}

/* ---- the verdict */

/* " 2 missing: model/a model/b;" with as many names as fit in `room`. */
static size_t list_words(const char *what, const char *const *name, size_t count, char *text, size_t bytes, size_t room)
{
    if (!count)
        return 0;
    size_t used = (size_t)snprintf(text, bytes, "%zu %s:", count, what), i = 0;
    for (; i < count; i++) {
        const char *detail = name[i] + strlen(name[i]) + 1;
        size_t need = strlen(name[i]) + strlen(detail) + 2;
        if (i && used + need > room)
            break;
        int n = snprintf(text + used, bytes - used, " %s%s%s", name[i], *detail ? " " : "", detail);
        used = used + (size_t)n < bytes ? used + (size_t)n : bytes - 1;
    }
    if (i < count)
        used += (size_t)snprintf(text + used, bytes - used, " ...");
    return used < bytes ? used : bytes - 1;
}

/* Local; alike on all ranks that have the same options. */
static status *judge(const struct match *x, const struct match_lists *l)
{
    static const char *const words[MATCH_LISTS] = { "missing", "unexpected", "misshapen" };
    static const int allow[MATCH_LISTS] = { TESSERA_ALLOW_MISSING, TESSERA_ALLOW_UNEXPECTED, TESSERA_ALLOW_MISSHAPEN };
    static const int order[MATCH_LISTS] = { 2, 0, 1 }; /* in which they are told */
    unsigned long long step = x->m->step;
    char text[900] = "";
    size_t used = 0, begin[MATCH_LISTS] = { 0, l->count[0], l->count[0] + l->count[1] };
    bool refused[MATCH_LISTS], any = false;
    for (int k = 0; k < MATCH_LISTS; k++) {
        refused[k] = l->count[k] && !(x->o->allow & allow[k]);
        any = any || refused[k];
    }
    if (x->mark[x->m->tensor_count] == MARK_NONE)
        return ERR(INVALID, "load of step %llu: parts and names select no tensor of the state", step);
    if (!any)
        return NULL;
    for (int i = 0; i < MATCH_LISTS; i++) {
        int k = order[i];
        if (!refused[k])
            continue;
        used += (size_t)snprintf(text + used, sizeof text - used, "%s", used ? "; " : "");
        used += list_words(words[k], l->name + begin[k], l->count[k], text + used, sizeof text - used - 8, 260);
    }
    if (refused[0] && !refused[2])
        return ERR(NOT_FOUND, "step %llu does not hold what is wanted: %s", step, text);
    return ERR(INVALID, "step %llu does not fit what is wanted: %s", step, text);
}

status *match_state(struct comm *c, const struct device *dev, const struct metadata *m, const tessera_state *s,
                    const struct tessera_load_options *o, struct match_fill *fill, struct match_lists *lists)
{
    struct match x = { .c = c, .dev = dev, .m = m, .s = s, .o = o };
    match_lists_free(lists);
    status *st = comm_agree(c, look(&x, fill));
    if (!st)
        st = put_together(&x, lists);
    if (!st)
        st = comm_agree(c, judge(&x, lists));
    mem_free(x.mark);
    mem_free(x.behind);
    mem_free(x.found.data);
    return st;
}

/* ---- placing */

static status *place_piece(struct device *dev, const struct state_piece *p, const struct match_bounce *b)
{
    uint64_t elems = piece_elems(&p->piece);
    size_t elem = dtype_bytes(p->dtype);
    bool cast = b->stored != p->dtype, direct = dev->host && !p->strided;
    void *as_wanted = b->data;
    if (cast) {
        as_wanted = direct ? p->data : mem_alloc(elems * elem);
        if (!as_wanted)
            return ERR(NO_MEMORY, "%s/%s: %llu elements", p->part, p->name, (unsigned long long)elems);
        cast_elems(b->stored, p->dtype, b->data, as_wanted, elems);
    }
    status *st = NULL;
    if (!dev->host)
        st = dev->ops->copy(dev, p->data, as_wanted, elems * elem, NULL);
    else if (p->strided)
        piece_scatter(p->shape.ndim, &p->piece, elem, p->data, p->stride, 0, elems, as_wanted);
    if (!dev->host && cast) /* the copy reads it */
        st = status_first(st, dev->ops->stream_sync(dev, NULL));
    if (cast && !direct)
        mem_free(as_wanted);
    return st;
}

status *match_place(struct device *dev, const tessera_state *s, const struct match_fill *f)
{
    for (size_t i = 0; i < s->count; i++)
        if (f->bounce[i].data)
            TRY(place_piece(dev, &s->piece[i], &f->bounce[i]));
    return dev->host ? NULL : dev->ops->stream_sync(dev, NULL);
}
