/* Prints where the fields of tessera.h's structs lie; layout.f90 prints the same of tessera.f90. */
#include <stdio.h>
#include <tessera.h>

#define FIELD(type, field) printf("%s %d\n", #type "%" #field, (int)offsetof(struct tessera_##type, field))
#define SIZE(type)         printf("%s %d\n", #type, (int)sizeof(struct tessera_##type))

int main(void)
{
    FIELD(options, size);
    FIELD(options, url);
    FIELD(options, mpi_comm);
    FIELD(options, read_only);
    FIELD(options, keep_last);
    FIELD(options, rewind);
    FIELD(options, staging_bytes);
    FIELD(options, chunk_bytes);
    FIELD(options, writers);
    FIELD(options, lease_seconds);
    FIELD(options, build);
    FIELD(options, mesh);
    FIELD(options, warn);
    FIELD(options, warn_arg);
    FIELD(options, keep_every);
    FIELD(options, keep_best);
    FIELD(options, keep_lowest);
    FIELD(options, keep_metric);
    FIELD(options, view);
    FIELD(options, reference_frozen);
    FIELD(options, irregular);
    SIZE(options);
    FIELD(tensor, size);
    FIELD(tensor, part);
    FIELD(tensor, name);
    FIELD(tensor, dtype);
    FIELD(tensor, ndim);
    FIELD(tensor, shape);
    FIELD(tensor, offset);
    FIELD(tensor, length);
    FIELD(tensor, run_begin);
    FIELD(tensor, run_end);
    FIELD(tensor, stride);
    FIELD(tensor, data);
    FIELD(tensor, frozen);
    FIELD(tensor, alias_of);
    FIELD(tensor, reference);
    SIZE(tensor);
    FIELD(reference, size);
    FIELD(reference, url);
    FIELD(reference, step);
    FIELD(reference, part);
    FIELD(reference, name);
    SIZE(reference);
    FIELD(tick, size);
    FIELD(tick, flag);
    FIELD(tick, phase);
    FIELD(tick, committed);
    SIZE(tick);
    FIELD(load_options, size);
    FIELD(load_options, parts);
    FIELD(load_options, names);
    FIELD(load_options, roles);
    FIELD(load_options, allow);
    SIZE(load_options);
    FIELD(step, size);
    FIELD(step, step);
    FIELD(step, time_ns);
    FIELD(step, attempt);
    FIELD(step, parent_attempt);
    FIELD(step, run_id);
    FIELD(step, tensors);
    FIELD(step, blobs);
    FIELD(step, build);
    FIELD(step, ranks);
    FIELD(step, mesh);
    SIZE(step);
    FIELD(blob_info, size);
    FIELD(blob_info, part);
    FIELD(blob_info, name);
    FIELD(blob_info, rank);
    FIELD(blob_info, data);
    FIELD(blob_info, bytes);
    SIZE(blob_info);
    return 0;
}
