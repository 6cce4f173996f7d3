/* view: see view.h. The file is made in memory by libhdf5's core driver and taken from it when it is closed, so that it
 * reaches the store as one put: there is no half view.
 *
 * Order: datasets whose paths nobody else needs, then those that must step aside, then aliases, whose targets have
 * their paths by then. */
#include "ckpt/view.h"

#include "ckpt/commit.h"
#include "ckpt/h5shard.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GROWTH = 256 << 10, EOF_AT = 28, SUPERBLOCK = 48 };

/* The bytes behind the core driver; its callbacks' udata. */
struct bytes {
    unsigned char *data; /* set when the file is closed */
};

struct view {
    const struct metadata *m;
    hid_t file, link_list;
    char **want;           /* [tensors] "/PART/NAME" */
    char **aside;          /* [tensors] where it is instead; NULL: it is where it is wanted */
    struct wanted *sorted; /* [tensors] by path, then index */
};

struct wanted {
    const char *path;
    uint64_t tensor;
};

/* ---- The driver's memory */

static void *bytes_alloc(size_t n, H5FD_file_image_op_t op, void *udata)
{
    (void)op;
    (void)udata;
    return mem_alloc(n);
}

static void *bytes_copy(void *to, const void *from, size_t n, H5FD_file_image_op_t op, void *udata)
{
    (void)op;
    (void)udata;
    return memcpy(to, from, n);
}

static void *bytes_grow(void *p, size_t n, H5FD_file_image_op_t op, void *udata)
{
    (void)op;
    (void)udata;
    return mem_realloc(p, n);
}

static herr_t bytes_free(void *p, H5FD_file_image_op_t op, void *udata)
{
    struct bytes *b = udata;
    if (op == H5FD_FILE_IMAGE_OP_FILE_CLOSE)
        b->data = p;
    else
        mem_free(p);
    return 0;
}

static void *same_udata(void *udata)
{
    return udata;
}

static herr_t leave_udata(void *udata)
{
    (void)udata;
    return 0;
}

/* ---- Paths */

static int by_path(const void *a, const void *b)
{
    const struct wanted *x = a, *y = b;
    int c = strcmp(x->path, y->path);
    return c ? c : x->tensor < y->tensor ? -1 : x->tensor > y->tensor;
}

static const char *path_of(const struct view *v, uint64_t i)
{
    return v->aside[i] ? v->aside[i] : v->want[i];
}

static char *join(const char *a, const char *between, const char *b)
{
    size_t n = strlen(a) + strlen(between) + strlen(b) + 1;
    char *text = mem_alloc(n);
    if (text)
        snprintf(text, n, "%s%s%s", a, between, b);
    return text;
}

static status *want_paths(struct view *v)
{
    const struct metadata *m = v->m;
    v->want = mem_calloc(m->tensor_count + 1, sizeof *v->want);
    v->aside = mem_calloc(m->tensor_count + 1, sizeof *v->aside);
    v->sorted = mem_calloc(m->tensor_count + 1, sizeof *v->sorted);
    if (!v->want || !v->aside || !v->sorted)
        return ERR(NO_MEMORY, "%llu paths", (unsigned long long)m->tensor_count);
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        char *part = join("/", m->tensor[i].part, "/");
        v->want[i] = part ? join(part, "", m->tensor[i].name) : NULL;
        mem_free(part);
        if (!v->want[i])
            return ERR(NO_MEMORY, "a path");
        v->sorted[i] = (struct wanted){ v->want[i], i };
    }
    qsort(v->sorted, m->tensor_count, sizeof *v->sorted, by_path);
    return NULL;
}

/* How many of the sorted paths come before `text`. */
static uint64_t before(const struct view *v, const char *text)
{
    uint64_t lo = 0, hi = v->m->tensor_count;
    while (lo < hi) {
        uint64_t mid = lo + (hi - lo) / 2;
        if (strcmp(v->sorted[mid].path, text) < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Whether tensor i must step aside: its path is a group for others, or another tensor's (the first one keeps it). */
static status *is_in_the_way(const struct view *v, uint64_t i, bool *group, bool *taken)
{
    char *folder = join(v->want[i], "/", "");
    if (!folder)
        return ERR(NO_MEMORY, "a path");
    uint64_t at = before(v, folder);
    *group = at < v->m->tensor_count && strncmp(v->sorted[at].path, folder, strlen(folder)) == 0;
    *taken = v->sorted[before(v, v->want[i])].tensor != i;
    mem_free(folder);
    return NULL;
}

/* Whether something is at an absolute path; its groups may be missing. */
static bool exists(const struct view *v, char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        bool there = H5Lexists(v->file, path, H5P_DEFAULT) > 0;
        *slash = '/';
        if (!there)
            return false;
    }
    return H5Lexists(v->file, path, H5P_DEFAULT) > 0;
}

static status *step_aside(struct view *v, uint64_t i)
{
    bool group = false, taken = false;
    TRY(is_in_the_way(v, i, &group, &taken));
    char *path = join(v->want[i], group ? "/_" : "", "");
    while (path && exists(v, path)) {
        char *longer = join(path, "_", "");
        mem_free(path);
        path = longer;
    }
    if (!path)
        return ERR(NO_MEMORY, "a path");
    v->aside[i] = path;
    return NULL;
}

/* ---- Datasets */

static status *put_attribute(hid_t object, const char *name, hid_t type, const void *value)
{
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t a = space < 0 ? -1 : H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = a >= 0 && H5Awrite(a, type, value) >= 0;
    if (a >= 0)
        ok = H5Aclose(a) >= 0 && ok;
    if (space >= 0)
        H5Sclose(space);
    return ok ? NULL : h5shard_error("write attribute", name);
}

static status *put_text(hid_t object, const char *name, const char *text)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    status *st = type < 0 || H5Tset_size(type, strlen(text) + 1) < 0 ? h5shard_error("describe attribute", name)
                                                                     : put_attribute(object, name, type, text);
    if (type >= 0)
        H5Tclose(type);
    return st;
}

/* A NaN as it is stored; 0 for a type without one. */
static uint64_t fill_bits(enum dtype t)
{
    switch (t) {
    case DTYPE_F64:
        return 0x7ff8000000000000u;
    case DTYPE_F32:
        return 0x7fc00000u;
    case DTYPE_F16:
        return 0x7e00u;
    case DTYPE_BF16:
        return 0x7fc0u;
    case DTYPE_F8E5M2:
        return 0x7eu;
    case DTYPE_F8E4M3:
        return 0x7fu;
    case DTYPE_E8M0:
        return 0xffu;
    default:
        return 0;
    }
}

/* The part of a tensor of shape `dims` that a piece holds, in the piece's own order: row-major order of the tensor is
 * that of a box, and of a run's boxes one after another. */
static hid_t select_piece(const struct shape *s, const hsize_t *dims, const struct piece *p)
{
    struct piece_box box[LAYOUT_BOXES];
    int n = piece_boxes(s->ndim, p, box);
    hid_t space = s->ndim ? H5Screate_simple(s->ndim, dims, NULL) : H5Screate(H5S_SCALAR);
    for (int i = 0; space >= 0 && s->ndim && i < n; i++) {
        hsize_t start[LAYOUT_DIMS], count[LAYOUT_DIMS];
        for (int d = 0; d < s->ndim; d++) {
            start[d] = box[i].box.off[d];
            count[d] = box[i].box.len[d];
        }
        if (H5Sselect_hyperslab(space, i ? H5S_SELECT_OR : H5S_SELECT_SET, start, NULL, count, NULL) < 0) {
            H5Sclose(space);
            return -1;
        }
    }
    return space;
}

/* The dataset of the piece in its shard: h5shard.c's item_space. */
static hid_t shard_space(const struct shape *s, const struct piece *p)
{
    hsize_t dims[LAYOUT_DIMS];
    if (!piece_is_box(s->ndim, p)) {
        dims[0] = piece_elems(p);
        return H5Screate_simple(1, dims, NULL);
    }
    for (int d = 0; d < s->ndim; d++)
        dims[d] = p->box.len[d];
    return s->ndim ? H5Screate_simple(s->ndim, dims, NULL) : H5Screate(H5S_SCALAR);
}

/* BEFORE + text + behind, with the text's '%' doubled: libhdf5 takes it for a pattern. */
static char *pattern_free(const char *before_text, const char *text, const char *behind)
{
    size_t n = strlen(before_text) + 2 * strlen(text) + strlen(behind) + 1, at = strlen(before_text);
    char *path = mem_alloc(n);
    if (!path)
        return NULL;
    memcpy(path, before_text, at);
    for (const char *c = text; *c; c++) {
        path[at++] = *c;
        if (*c == '%')
            path[at++] = *c;
    }
    snprintf(path + at, n - at, "%s", behind);
    return path;
}

/* "/NAME/pN" in the shard, by its name there. */
static char *shard_path(const char *tensor, uint64_t piece)
{
    char dataset[32];
    snprintf(dataset, sizeof dataset, "/p%llu", (unsigned long long)piece);
    return pattern_free("/", tensor, dataset);
}

/* A shard from where the view lies: beside it, in an owner's directory of this root, or in one of another root. */
static char *shard_file(const struct metadata *m, const struct meta_file *f)
{
    char dir[STEP_DIR_BYTES], behind[STEP_DIR_BYTES + 258];
    if (!f->owner)
        return mem_strdup(f->name);
    const struct meta_owner *o = &m->owner[f->owner - 1];
    const char *url = o->url ? o->url : "..";
    commit_step_dir(o->step, dir);
    snprintf(behind, sizeof behind, "/%s/%s", dir, f->name);
    return pattern_free("", strncmp(url, "file:", 5) == 0 ? url + 5 : url, behind);
}

static status *map_piece(const struct view *v, hid_t list, const struct meta_tensor *t, const hsize_t *dims, uint64_t i)
{
    const struct meta_piece *p = &v->m->piece[t->first_piece + i];
    char *path = shard_path(t->owner_name ? t->owner_name : t->name, i), *file = shard_file(v->m, &v->m->file[p->file]);
    if (!path || !file) {
        mem_free(path);
        mem_free(file);
        return ERR(NO_MEMORY, "a path");
    }
    hid_t to = select_piece(&t->shape, dims, &p->piece), from = shard_space(&t->shape, &p->piece);
    status *st = to < 0 || from < 0 || H5Pset_virtual(list, to, file, path, from) < 0
                     ? h5shard_error("map a piece of", t->name)
                     : NULL;
    if (to >= 0)
        H5Sclose(to);
    if (from >= 0)
        H5Sclose(from);
    mem_free(path);
    mem_free(file);
    return st;
}

static status *make_list(const struct view *v, const struct meta_tensor *t, const hsize_t *dims, hid_t type, hid_t *out)
{
    uint64_t fill = fill_bits(t->dtype);
    hid_t list = H5Pcreate(H5P_DATASET_CREATE);
    status *st = list < 0 || H5Pset_obj_track_times(list, false) < 0 || H5Pset_fill_value(list, type, &fill) < 0
                     ? h5shard_error("set up", t->name)
                     : NULL;
    for (uint64_t i = 0; i < t->piece_count && !st; i++)
        if (v->m->piece[t->first_piece + i].bytes)
            st = map_piece(v, list, t, dims, i);
    if (st) {
        if (list >= 0)
            H5Pclose(list);
        return st;
    }
    *out = list;
    return NULL;
}

static status *put_dataset(const struct view *v, const struct meta_tensor *t, const char *path)
{
    hsize_t dims[LAYOUT_DIMS];
    hid_t list = -1, type = (hid_t)h5shard_type(t->dtype);
    for (int d = 0; d < t->shape.ndim; d++)
        dims[d] = t->shape.dim[d];
    hid_t space = t->shape.ndim ? H5Screate_simple(t->shape.ndim, dims, NULL) : H5Screate(H5S_SCALAR);
    status *st = type < 0 || space < 0 ? h5shard_error("describe", t->name) : make_list(v, t, dims, type, &list);
    hid_t set = st ? -1 : H5Dcreate2(v->file, path, type, space, v->link_list, list, H5P_DEFAULT);
    if (!st && set < 0)
        st = h5shard_error("make dataset", path);
    const unsigned char trainable = t->trainable;
    if (!st)
        st = put_text(set, "dtype", dtype_name(t->dtype));
    if (!st)
        st = put_attribute(set, "trainable", H5T_STD_U8LE, &trainable);
    if (set >= 0 && H5Dclose(set) < 0)
        st = status_first(st, h5shard_error("close dataset", path));
    if (list >= 0)
        H5Pclose(list);
    if (space >= 0)
        H5Sclose(space);
    if (type >= 0)
        H5Tclose(type);
    return st;
}

static status *put_alias(struct view *v, uint64_t i)
{
    const struct meta_tensor *t = &v->m->tensor[i];
    const char *to = path_of(v, (uint64_t)metadata_find(v->m, t->part, t->alias_of)), *at = path_of(v, i);
    return H5Lcreate_soft(to, v->file, at, v->link_list, H5P_DEFAULT) < 0 ? h5shard_error("link", at) : NULL;
}

static status *put_tensors(struct view *v)
{
    const struct metadata *m = v->m;
    bool *late = mem_calloc(m->tensor_count + 1, sizeof *late);
    status *st = late ? NULL : ERR(NO_MEMORY, "%llu tensors", (unsigned long long)m->tensor_count);
    for (uint64_t i = 0; i < m->tensor_count && !st; i++) {
        bool group = false, taken = false;
        st = is_in_the_way(v, i, &group, &taken);
        late[i] = group || taken;
        if (!st && !late[i] && !m->tensor[i].alias_of)
            st = put_dataset(v, &m->tensor[i], v->want[i]);
    }
    for (uint64_t i = 0; i < m->tensor_count && !st; i++)
        if (late[i] && !m->tensor[i].alias_of) {
            st = step_aside(v, i);
            if (!st)
                st = put_dataset(v, &m->tensor[i], path_of(v, i));
        }
    for (uint64_t i = 0; i < m->tensor_count && !st; i++)
        if (m->tensor[i].alias_of) {
            st = late[i] || exists(v, v->want[i]) ? step_aside(v, i) : NULL;
            if (!st)
                st = put_alias(v, i);
        }
    mem_free(late);
    return st;
}

static status *put_facts(struct view *v)
{
    char attempt[17];
    snprintf(attempt, sizeof attempt, "%016llx", (unsigned long long)v->m->attempt);
    TRY(put_attribute(v->file, "step", H5T_STD_U64LE, &v->m->step));
    return put_text(v->file, "attempt", attempt);
}

/* ---- The file */

static status *open_file(struct view *v, struct bytes *b)
{
    H5FD_file_image_callbacks_t own = { bytes_alloc, bytes_copy, bytes_grow, bytes_free, same_udata, leave_udata, b };
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    bool ok = access >= 0 && H5Pset_fapl_core(access, GROWTH, false) >= 0 &&
              H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_LATEST) >= 0 &&
              H5Pset_file_image_callbacks(access, &own) >= 0 && H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0;
    v->link_list = H5Pcreate(H5P_LINK_CREATE);
    ok = ok && v->link_list >= 0 && H5Pset_create_intermediate_group(v->link_list, 1) >= 0;
    v->file = ok ? H5Fcreate(COMMIT_VIEW, H5F_ACC_TRUNC, H5P_DEFAULT, access) : -1;
    status *st = v->file < 0 ? h5shard_error("make", "a file in memory") : NULL;
    if (access >= 0)
        H5Pclose(access);
    return st;
}

/* A superblock of version 2 or 3, which libver bounds of 1.10 give, says where the file ends. */
static status *take_bytes(struct bytes *b, void **buf, size_t *bytes)
{
    if (!b->data || (b->data[8] != 2 && b->data[8] != 3) || b->data[9] != 8 || get_u64(b->data + EOF_AT) < SUPERBLOCK)
        return ERR(INTERNAL, "libhdf5 left no file of the kind that was asked for");
    *bytes = (size_t)get_u64(b->data + EOF_AT);
    *buf = b->data;
    b->data = NULL;
    return NULL;
}

static status *make(const struct metadata *m, void **buf, size_t *bytes)
{
    struct view v = { .m = m, .file = -1, .link_list = -1 };
    struct bytes b = { NULL };
    status *st = want_paths(&v);
    if (!st)
        st = open_file(&v, &b);
    if (!st)
        st = put_facts(&v);
    if (!st)
        st = put_tensors(&v);
    if (v.file >= 0 && H5Fclose(v.file) < 0)
        st = status_first(st, h5shard_error("close", "a file in memory"));
    if (v.link_list >= 0)
        H5Pclose(v.link_list);
    if (!st)
        st = take_bytes(&b, buf, bytes);
    mem_free(b.data);
    for (uint64_t i = 0; i < m->tensor_count; i++) {
        mem_free(v.want ? v.want[i] : NULL);
        mem_free(v.aside ? v.aside[i] : NULL);
    }
    mem_free(v.want);
    mem_free(v.aside);
    mem_free(v.sorted);
    return st;
}

status *view_make(const struct metadata *m, void **buf, size_t *bytes)
{
    H5E_auto2_t print;
    void *print_to;
    hbool_t safe = false;
    if (H5open() < 0 || H5is_library_threadsafe(&safe) < 0)
        return ERR(INTERNAL, "libhdf5 does not start");
    if (!safe)
        return ERR(UNSUPPORTED, "this system's libhdf5 was built without thread safety");
    H5Eget_auto2(H5E_DEFAULT, &print, &print_to);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    status *st = make(m, buf, bytes);
    H5Eset_auto2(H5E_DEFAULT, print, print_to);
    return status_wrap(st, "the view of step %llu", (unsigned long long)m->step);
}

status *view_check(const struct store *s)
{
    if (s->ops->scheme && strcmp(s->ops->scheme, "file") == 0)
        return NULL;
    return ERR(UNSUPPORTED, "%s: a view wants a directory; HDF5 opens its shard files by their names", s->uri);
}

status *view_write(struct store *s, const struct metadata *m)
{
    char key[STORE_KEY_BYTES];
    void *buf = NULL;
    size_t n = 0;
    TRY(view_check(s));
    TRY(commit_file_key(m->step, COMMIT_VIEW, key));
    TRY(view_make(m, &buf, &n));
    status *st = store_put(s, key, buf, n, STORE_REPLACE);
    mem_free(buf);
    return st;
}
