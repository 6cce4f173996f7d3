/* inspect: what the step that a find or a load settled on holds, and what the last load found. Local: every rank has
 * the metadata. */
#include "ckpt/handle.h"

static status *no_step(const char *what)
{
    return ERR(NOT_FOUND, "%s: no step was found or loaded yet", what);
}

status *tessera_blob(tessera *t, const char *part, const char *name, int rank, const void **data, size_t *bytes)
{
    if (!t->meta)
        return ERR(NOT_FOUND, "blob %s/%s: no step was found or loaded yet", part, name);
    const struct meta_blob *b = metadata_blob(t->meta, part, name, rank);
    if (!b)
        return ERR(NOT_FOUND, "step %llu: no blob %s/%s of rank %d", (unsigned long long)t->meta->step, part, name,
                   rank);
    *data = b->data;
    *bytes = b->bytes;
    return NULL;
}

static void describe(const struct meta_tensor *m, struct tessera_tensor *d)
{
    d->dtype = (int)m->dtype;
    d->ndim = m->shape.ndim;
    memcpy(d->shape, m->shape.dim, sizeof d->shape);
}

status *tessera_stored(tessera *t, const char *part, const char *name, struct tessera_tensor *d)
{
    if (d->size < STATE_TENSOR_BYTES)
        return ERR(INVALID, "stored tensor: struct of %zu bytes; set it with TESSERA_TENSOR", d->size);
    int64_t i = t->meta ? metadata_find(t->meta, part, name) : -1;
    if (i < 0)
        return ERR(NOT_FOUND, "%s/%s: not stored", part, name);
    const struct meta_tensor *m = &t->meta->tensor[i];
    describe(m, d);
    return NULL;
}

status *tessera_stored_at(tessera *t, uint64_t i, struct tessera_tensor *d)
{
    if (d->size < STATE_TENSOR_BYTES)
        return ERR(INVALID, "stored tensor: struct of %zu bytes; set it with TESSERA_TENSOR", d->size);
    if (!t->meta)
        return no_step("stored tensor");
    if (i >= t->meta->tensor_count)
        return ERR(NOT_FOUND, "step %llu: no tensor %llu of %llu", (unsigned long long)t->meta->step,
                   (unsigned long long)i, (unsigned long long)t->meta->tensor_count);
    const struct meta_tensor *m = &t->meta->tensor[i];
    describe(m, d);
    d->part = m->part;
    d->name = m->name;
    d->frozen = !m->trainable;
    d->alias_of = m->alias_of;
    if (d->size < STATE_REFERENCE_BYTES)
        return NULL;
    const struct meta_owner *o = metadata_owner(t->meta, m);
    t->stored_reference = (struct tessera_reference)TESSERA_REFERENCE;
    if (o) {
        t->stored_reference.url = o->url;
        t->stored_reference.step = o->step;
        t->stored_reference.part = m->owner_part;
        t->stored_reference.name = m->owner_name;
    }
    d->reference = o ? &t->stored_reference : NULL;
    return NULL;
}

status *tessera_blob_at(tessera *t, uint64_t i, struct tessera_blob_info *b)
{
    if (!t->meta)
        return no_step("blob");
    if (i >= t->meta->blob_count)
        return ERR(NOT_FOUND, "step %llu: no blob %llu of %llu", (unsigned long long)t->meta->step,
                   (unsigned long long)i, (unsigned long long)t->meta->blob_count);
    const struct meta_blob *m = &t->meta->blob[i];
    struct tessera_blob_info out = {
        .part = m->part, .name = m->name, .rank = m->rank, .data = m->data, .bytes = (size_t)m->bytes
    };
    handle_give(b, &out, sizeof out);
    return NULL;
}

status *tessera_get_step(tessera *t, struct tessera_step *out)
{
    const struct metadata *m = t->meta;
    if (!m)
        return no_step("step");
    struct tessera_step s = { .step = m->step,
                              .time_ns = m->time_ns,
                              .attempt = m->attempt,
                              .parent_attempt = m->parent_attempt,
                              .run_id = m->run_id,
                              .tensors = m->tensor_count,
                              .blobs = m->blob_count,
                              .build = m->build,
                              .ranks = (int)m->world };
    for (int a = 0; a < MESH_AXES; a++)
        s.mesh[a] = m->mesh.size[a];
    handle_give(out, &s, sizeof s);
    return NULL;
}

const char *tessera_load_name(tessera *t, int list, uint64_t i)
{
    size_t first = 0;
    if (list < 1 || list > MATCH_LISTS || i >= t->lists.count[list - 1])
        return NULL;
    for (int k = 0; k < list - 1; k++)
        first += t->lists.count[k];
    return t->lists.name[first + i];
}

void tessera_get_load_report(tessera *t, struct tessera_load_report *out)
{
    struct tessera_load_report r = t->report;
    handle_give(out, &r, sizeof r);
}
