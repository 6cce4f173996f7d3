/* h5shard: see h5shard.h. libhdf5 runs twice over a driver of ours that hands out addresses itself:
 *
 *   headers   0, 1, 2, ...                     packed as libhdf5 asks for them
 *   payload   base, then 4 KiB aligned          nothing is ever written there
 *
 * The first run puts `base` far away and measures the headers; the second puts it at the next multiple of 4 KiB.
 * Addresses have one width whatever their value, so both runs ask for the same headers; if they did not, the second
 * would fail, not overlap. Invariants: (1) every write lies below `base`, or the driver refuses it; (2) bytes that were
 * never written are zero; (3) the state of a run is in its struct image, to which the file access list points: nothing
 * is shared between images. */
#include "ckpt/h5shard.h"

#include "comm/base/mem.h"
#include "comm/base/status.h"

#include <hdf5.h>
#include <string.h>

static const uint64_t FAR = (uint64_t)1 << 61; /* room for 2^62 bytes of payload above it */
enum { ERROR_BYTES = 256, COMPONENT_BYTES = 1024 };

/* ---- the driver ---- */

struct image {
    unsigned char *bytes; /* [0, cap), zero beyond what was written */
    uint64_t cap;
    uint64_t header_end; /* next free address for headers */
    uint64_t base, end;  /* payload: first address, next free one */
};

struct driver_file {
    H5FD_t pub; /* must be first */
    struct image *image;
};

static uint64_t align_up(uint64_t v)
{
    return (v + H5SHARD_ALIGN - 1) / H5SHARD_ALIGN * H5SHARD_ALIGN;
}

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t fapl, haddr_t max)
{
    (void)name;
    (void)flags;
    (void)max;
    struct image *const *info = H5Pget_driver_info(fapl);
    struct driver_file *f = info ? mem_calloc(1, sizeof *f) : NULL;
    if (!f)
        return NULL;
    f->image = *info;
    return &f->pub;
}

static herr_t driver_close(H5FD_t *file)
{
    mem_free(file);
    return 0;
}

static herr_t driver_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = 0; /* no aggregation: each request is placed as it comes */
    return 0;
}

static struct image *image_of(const H5FD_t *file)
{
    return ((const struct driver_file *)(const void *)file)->image;
}

static haddr_t driver_alloc(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, hsize_t size)
{
    (void)dxpl;
    struct image *m = image_of(file);
    bool payload = type == H5FD_MEM_DRAW;
    uint64_t at = payload ? align_up(m->end) : m->header_end;
    if (size > FAR || at > 2 * FAR || (!payload && size > m->base - at))
        return HADDR_UNDEF;
    *(payload ? &m->end : &m->header_end) = at + size;
    return at;
}

static herr_t driver_free(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t addr, hsize_t size)
{
    (void)file;
    (void)type;
    (void)dxpl;
    (void)addr;
    (void)size;
    return 0;
}

static haddr_t driver_get_eoa(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    const struct image *m = image_of(file);
    return m->header_end ? m->end : 0; /* 0 tells libhdf5 that the file is new; m->end is at least base */
}

static herr_t driver_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t addr)
{
    (void)file;
    (void)type;
    return addr > 3 * FAR ? -1 : 0; /* addresses come from driver_alloc alone */
}

static haddr_t driver_get_eof(const H5FD_t *file, H5FD_mem_t type)
{
    return driver_get_eoa(file, type);
}

static herr_t driver_read(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t addr, size_t size, void *to)
{
    (void)type;
    (void)dxpl;
    const struct image *m = image_of(file);
    uint64_t have = addr < m->cap ? m->cap - addr : 0;
    size_t n = have < size ? (size_t)have : size;
    if (n)
        memcpy(to, m->bytes + addr, n);
    memset((unsigned char *)to + n, 0, size - n);
    return 0;
}

static herr_t driver_write(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t addr, size_t size, const void *from)
{
    (void)type;
    (void)dxpl;
    struct image *m = image_of(file);
    if (addr > m->base || size > m->base - addr)
        return -1;
    uint64_t need = align_up(addr + size);
    if (need > m->cap) {
        uint64_t cap = need > 2 * m->cap ? need : 2 * m->cap;
        unsigned char *more = mem_realloc(m->bytes, cap);
        if (!more)
            return -1;
        memset(more + m->cap, 0, cap - m->cap);
        m->bytes = more;
        m->cap = cap;
    }
    memcpy(m->bytes + addr, from, size);
    return 0;
}

static const H5FD_class_t driver = {
    .name = "tessera header image",
    .maxaddr = (haddr_t)1 << 63,
    .fc_degree = H5F_CLOSE_STRONG, /* closing the file closes what an error left open */
    .fapl_size = sizeof(struct image *),
    .open = driver_open,
    .close = driver_close,
    .query = driver_query,
    .alloc = driver_alloc,
    .free = driver_free,
    .get_eoa = driver_get_eoa,
    .set_eoa = driver_set_eoa,
    .get_eof = driver_get_eof,
    .read = driver_read,
    .write = driver_write,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

/* ---- libhdf5's words ---- */

static herr_t keep_innermost(unsigned n, const H5E_error2_t *e, void *to)
{
    char *text = to;
    if (!n)
        snprintf(text, ERROR_BYTES, "%s: %s", e->func_name, e->desc);
    return 0;
}

status *h5shard_error(const char *what, const char *on)
{
    char text[ERROR_BYTES] = "no reason given";
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_innermost, text);
    H5Eclear2(H5E_DEFAULT);
    return ERR(INTERNAL, "libhdf5 cannot %s %s: %s", what, on, text);
}

/* ---- types ---- */

static hid_t float_type(size_t bytes, size_t sign, size_t exp_at, size_t exp_bits, size_t mantissa_bits, size_t bias)
{
    hid_t t = H5Tcopy(H5T_IEEE_F32LE);
    if (t >= 0 && (H5Tset_fields(t, sign, exp_at, exp_bits, 0, mantissa_bits) < 0 || H5Tset_ebias(t, bias) < 0 ||
                   H5Tset_precision(t, 8 * bytes) < 0 || H5Tset_size(t, bytes) < 0)) {
        H5Tclose(t);
        return -1;
    }
    return t;
}

_Static_assert(sizeof(hid_t) == sizeof(int64_t), "h5shard_type gives a hid_t to who includes hdf5.h");

/* f8e4m3 has no infinities, e8m0 no mantissa and u4x2 two values a byte: HDF5 has no such types, so they are bytes. */
int64_t h5shard_type(enum dtype t)
{
    switch (t) {
    case DTYPE_F64:
        return H5Tcopy(H5T_IEEE_F64LE);
    case DTYPE_F32:
        return H5Tcopy(H5T_IEEE_F32LE);
    case DTYPE_F16:
        return float_type(2, 15, 10, 5, 10, 15);
    case DTYPE_BF16:
        return float_type(2, 15, 7, 8, 7, 127);
    case DTYPE_F8E5M2:
        return float_type(1, 7, 2, 5, 2, 15);
    case DTYPE_I64:
        return H5Tcopy(H5T_STD_I64LE);
    case DTYPE_I32:
        return H5Tcopy(H5T_STD_I32LE);
    case DTYPE_I16:
        return H5Tcopy(H5T_STD_I16LE);
    case DTYPE_I8:
        return H5Tcopy(H5T_STD_I8LE);
    case DTYPE_U64:
        return H5Tcopy(H5T_STD_U64LE);
    case DTYPE_U32:
        return H5Tcopy(H5T_STD_U32LE);
    case DTYPE_U16:
        return H5Tcopy(H5T_STD_U16LE);
    default:
        return H5Tcopy(H5T_STD_U8LE);
    }
}

/* ---- one run ---- */

/* What is the same for every dataset of a run. */
struct build {
    hid_t file, dataset_list, group_list;
    hid_t type[DTYPE_COUNT];
};

static hid_t object_list(hid_t class)
{
    hid_t p = H5Pcreate(class);
    if (p >= 0 && H5Pset_obj_track_times(p, false) < 0) {
        H5Pclose(p);
        return -1;
    }
    return p;
}

static status *put_attribute(hid_t object, const char *name, hid_t type, hid_t space, const void *value)
{
    hid_t a = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    bool ok = a >= 0 && H5Awrite(a, type, value) >= 0;
    if (a >= 0)
        ok = H5Aclose(a) >= 0 && ok;
    return ok ? NULL : h5shard_error("write attribute", name);
}

static status *put_u64s(hid_t object, const char *name, const uint64_t *v, int n)
{
    hsize_t count = (hsize_t)n;
    hid_t space = H5Screate_simple(1, &count, NULL);
    if (space < 0)
        return h5shard_error("describe attribute", name);
    status *st = put_attribute(object, name, H5T_STD_U64LE, space, v);
    H5Sclose(space);
    return st;
}

static status *put_text(hid_t object, const char *name, const char *text)
{
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    status *st =
        type < 0 || space < 0 || H5Tset_size(type, strlen(text)) < 0 || H5Tset_strpad(type, H5T_STR_NULLPAD) < 0
            ? h5shard_error("describe attribute", name)
            : put_attribute(object, name, type, space, text);
    if (type >= 0)
        H5Tclose(type);
    if (space >= 0)
        H5Sclose(space);
    return st;
}

/* Attribute values are passed as they lie in memory, under file types: this code is for little-endian machines, as the
 * payload is. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "payload and attributes are written as they lie in memory");

static status *put_attributes(hid_t dataset, const struct h5shard_item *it)
{
    const uint64_t run[2] = { it->piece.begin, it->piece.end };
    TRY(put_text(dataset, "dtype", dtype_name(it->dtype)));
    TRY(put_u64s(dataset, "run", run, 2));
    if (!it->shape.ndim)
        return NULL;
    TRY(put_u64s(dataset, "global_shape", it->shape.dim, it->shape.ndim));
    TRY(put_u64s(dataset, "box_offset", it->piece.box.off, it->shape.ndim));
    return put_u64s(dataset, "box_length", it->piece.box.len, it->shape.ndim);
}

/* The group of a tensor, made where it is missing; to be closed. Empty components and "." are skipped, as HDF5 does. */
static status *open_group(const struct build *b, const char *tensor, hid_t *out)
{
    char name[COMPONENT_BYTES];
    hid_t at = H5Gopen2(b->file, "/", H5P_DEFAULT);
    for (const char *s = tensor; at >= 0 && *s;) {
        size_t n = strcspn(s, "/");
        const char *next = s[n] ? s + n + 1 : s + n;
        if (n >= sizeof name) {
            H5Gclose(at);
            return ERR(INVALID, "tensor %s: a part of the name has %zu characters; %d fit", tensor, n,
                       COMPONENT_BYTES - 1);
        }
        memcpy(name, s, n);
        name[n] = 0;
        s = next;
        if (!n || !strcmp(name, "."))
            continue;
        htri_t there = H5Lexists(at, name, H5P_DEFAULT);
        hid_t child = -1;
        if (there > 0 && (child = H5Gopen2(at, name, H5P_DEFAULT)) < 0) {
            H5Eclear2(H5E_DEFAULT);
            H5Gclose(at);
            return ERR(INVALID, "tensor %s: %s is a dataset already", tensor, name);
        }
        if (!there)
            child = H5Gcreate2(at, name, H5P_DEFAULT, b->group_list, H5P_DEFAULT);
        H5Gclose(at);
        at = child;
    }
    if (at < 0)
        return h5shard_error("make group", tensor);
    *out = at;
    return NULL;
}

static hid_t item_space(const struct h5shard_item *it)
{
    hsize_t dims[LAYOUT_DIMS];
    int ndim = it->shape.ndim;
    if (!piece_is_box(ndim, &it->piece)) {
        dims[0] = piece_elems(&it->piece);
        return H5Screate_simple(1, dims, NULL);
    }
    for (int d = 0; d < ndim; d++)
        dims[d] = it->piece.box.len[d];
    return ndim ? H5Screate_simple(ndim, dims, NULL) : H5Screate(H5S_SCALAR);
}

static status *add_dataset(const struct build *b, hid_t group, const struct h5shard_item *it, uint64_t *offset)
{
    htri_t there = H5Lexists(group, it->name, H5P_DEFAULT);
    if (there > 0)
        return ERR(INVALID, "dataset %s/%s is there twice", it->tensor, it->name);
    hid_t space = there < 0 ? -1 : item_space(it);
    hid_t set = space < 0
                    ? -1
                    : H5Dcreate2(group, it->name, b->type[it->dtype], space, H5P_DEFAULT, b->dataset_list, H5P_DEFAULT);
    status *st = set < 0 ? h5shard_error("make dataset", it->tensor) : put_attributes(set, it);
    if (!st) {
        haddr_t at = piece_elems(&it->piece) ? H5Dget_offset(set) : 0;
        if (at == HADDR_UNDEF)
            st = h5shard_error("place dataset", it->tensor);
        else
            *offset = at;
    }
    if (set >= 0 && H5Dclose(set) < 0)
        st = status_first(st, h5shard_error("close dataset", it->tensor));
    if (space >= 0)
        H5Sclose(space);
    return st;
}

/* All items; the group stays open while the tensor is the same. */
static status *add_items(const struct build *b, const struct h5shard_item *item, size_t count, uint64_t *offset)
{
    hid_t group = -1;
    status *st = NULL;
    for (size_t i = 0; i < count && !st; i++) {
        if (!i || strcmp(item[i].tensor, item[i - 1].tensor)) {
            if (group >= 0)
                H5Gclose(group);
            group = -1;
            st = open_group(b, item[i].tensor, &group);
        }
        if (!st)
            st = add_dataset(b, group, &item[i], &offset[i]);
    }
    if (group >= 0)
        H5Gclose(group);
    return st;
}

static status *open_lists(struct build *b)
{
    b->dataset_list = object_list(H5P_DATASET_CREATE);
    b->group_list = object_list(H5P_GROUP_CREATE);
    if (b->dataset_list < 0 || b->group_list < 0 || H5Pset_layout(b->dataset_list, H5D_CONTIGUOUS) < 0 ||
        H5Pset_alloc_time(b->dataset_list, H5D_ALLOC_TIME_EARLY) < 0 ||
        H5Pset_fill_time(b->dataset_list, H5D_FILL_TIME_NEVER) < 0)
        return h5shard_error("set up", "dataset creation");
    for (int t = 1; t < DTYPE_COUNT; t++) {
        b->type[t] = h5shard_type((enum dtype)t);
        if (b->type[t] < 0)
            return h5shard_error("describe type", dtype_name((enum dtype)t));
    }
    return NULL;
}

static void close_lists(struct build *b)
{
    for (int t = 1; t < DTYPE_COUNT; t++)
        if (b->type[t] > 0)
            H5Tclose(b->type[t]);
    if (b->group_list > 0)
        H5Pclose(b->group_list);
    if (b->dataset_list > 0)
        H5Pclose(b->dataset_list);
}

static status *open_file(struct build *b, hid_t id, struct image *m)
{
    hid_t access = H5Pcreate(H5P_FILE_ACCESS), create = object_list(H5P_FILE_CREATE);
    bool ok = access >= 0 && create >= 0 && H5Pset_driver(access, id, &m) >= 0 &&
              H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_LATEST) >= 0;
    b->file = ok ? H5Fcreate("image", H5F_ACC_TRUNC, create, access) : -1;
    status *st = b->file < 0 ? h5shard_error("make", "a file in memory") : NULL;
    if (create >= 0)
        H5Pclose(create);
    if (access >= 0)
        H5Pclose(access);
    return st;
}

static status *run(hid_t id, const struct h5shard_item *item, size_t count, uint64_t base, struct image *m,
                   uint64_t *offset)
{
    struct build b = { .file = -1 };
    *m = (struct image){ .base = base, .end = base };
    status *st = open_lists(&b);
    if (!st)
        st = open_file(&b, id, m);
    if (!st)
        st = add_items(&b, item, count, offset);
    if (b.file >= 0 && H5Fclose(b.file) < 0)
        st = status_first(st, h5shard_error("close", "a file in memory"));
    close_lists(&b);
    return st;
}

/* ---- both runs ---- */

static status *check_items(const struct h5shard_item *item, size_t count)
{
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        const struct h5shard_item *it = &item[i];
        if (!*it->tensor || !*it->name || strchr(it->name, '/') || !strcmp(it->name, "."))
            return ERR(INVALID, "dataset '%s' of tensor '%s' is no name in a file", it->name, it->tensor);
        if (!dtype_bytes(it->dtype))
            return ERR(INVALID, "tensor %s: dtype %d is none", it->tensor, (int)it->dtype);
        status *st = piece_check(&it->shape, &it->piece);
        if (st)
            return status_wrap(st, "tensor %s", it->tensor);
        uint64_t bytes;
        if (__builtin_mul_overflow(piece_elems(&it->piece), dtype_bytes(it->dtype), &bytes) || bytes > FAR - total)
            return ERR(INVALID, "tensor %s: the file would have more than 2^61 bytes", it->tensor);
        total += bytes;
    }
    return NULL;
}

static status *make(hid_t id, const struct h5shard_item *item, size_t count, struct h5shard_image *out)
{
    struct image m = { .bytes = NULL };
    uint64_t *offset = mem_calloc(count, sizeof *offset);
    if (!offset)
        return ERR(NO_MEMORY, "%zu datasets", count);
    status *st = run(id, item, count, FAR, &m, offset);
    uint64_t header = align_up(m.header_end);
    mem_free(m.bytes);
    m.bytes = NULL;
    if (!st)
        st = run(id, item, count, header, &m, offset);
    unsigned char *bytes = st ? NULL : mem_realloc(m.bytes, header);
    if (!st && !bytes)
        st = ERR(NO_MEMORY, "headers of %llu bytes", (unsigned long long)header);
    if (st) {
        mem_free(m.bytes);
        mem_free(offset);
        return st;
    }
    if (header > m.cap)
        memset(bytes + m.cap, 0, header - m.cap);
    *out = (struct h5shard_image){ .header = bytes, .header_bytes = header, .file_bytes = m.end, .offset = offset };
    return NULL;
}

status *h5shard_image(const struct h5shard_item *item, size_t count, struct h5shard_image *out)
{
    H5E_auto2_t print;
    void *print_to;
    TRY(check_items(item, count));
    if (H5open() < 0)
        return ERR(INTERNAL, "libhdf5 does not start");
    H5Eget_auto2(H5E_DEFAULT, &print, &print_to);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    hid_t id = H5FDregister(&driver);
    status *st = id < 0 ? h5shard_error("register", driver.name) : make(id, item, count, out);
    if (id >= 0 && H5FDunregister(id) < 0)
        st = status_first(st, h5shard_error("unregister", driver.name));
    H5Eset_auto2(H5E_DEFAULT, print, print_to);
    return st;
}

void h5shard_image_free(struct h5shard_image *i)
{
    mem_free(i->header);
    mem_free(i->offset);
    *i = (struct h5shard_image){ .header = NULL };
}
