/* save_load DIRECTORY: a table of doubles, split by rows over the ranks. The first run fills and saves it; every later
 * one, with any number of ranks, loads it and checks each element.
 *
 *     mpicc -o save_load save_load.c $(pkg-config --cflags --libs tessera)
 *     mpirun -np 4 ./save_load /scratch/table
 *     mpirun -np 3 ./save_load /scratch/table */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <tessera.h>

enum { ROWS = 1001, COLS = 7 };

static void check(tessera_status *st)
{
    if (!st)
        return;
    fprintf(stderr, "save_load: %s\n", tessera_status_message(st));
    MPI_Abort(MPI_COMM_WORLD, tessera_status_code(st));
}

int main(int argc, char **argv)
{
    int rank, ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    uint64_t first = ROWS * (uint64_t)rank / (uint64_t)ranks, end = ROWS * ((uint64_t)rank + 1) / (uint64_t)ranks;
    uint64_t elems = (end - first) * COLS, wrong = 0, step;
    double *mine = calloc(elems + 1, sizeof *mine);

    tessera *t;
    struct tessera_options o = TESSERA_OPTIONS;
    o.url = argc > 1 ? argv[1] : "table";
    o.mpi_comm = MPI_Comm_c2f(MPI_COMM_WORLD);
    check(tessera_open(&o, &t));

    tessera_state *s;
    check(tessera_state_new(t, &s));
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model";
    a.name = "table";
    a.dtype = TESSERA_F64;
    a.ndim = 2;
    a.shape[0] = ROWS; /* of the whole table */
    a.shape[1] = COLS;
    a.offset[0] = first; /* of this rank's rows */
    a.length[0] = end - first;
    a.length[1] = COLS;
    a.data = mine;
    check(tessera_state_add_tensor(s, &a));

    tessera_status *st = tessera_load_newest(t, s, &step);
    if (tessera_status_code(st) == TESSERA_NOT_FOUND) { /* nothing saved yet: the first run */
        tessera_status_free(st);
        for (uint64_t i = 0; i < elems; i++)
            mine[i] = (double)(first * COLS + i);
        check(tessera_save(t, s, 1)); /* returns before the bytes are copied: `mine` may be read, not written */
        check(tessera_fence(t, NULL, 0, NULL)); /* copied: from here on it may be written */
        for (uint64_t i = 0; i < elems; i++)
            mine[i] = -1;
        check(tessera_wait(t, &step)); /* on storage, on all ranks */
    } else {
        check(st);
        for (uint64_t i = 0; i < elems; i++)
            wrong += mine[i] != (double)(first * COLS + i);
    }
    printf("rank %d of %d: step %d, %d elements wrong\n", rank, ranks, (int)step, (int)wrong);

    tessera_state_free(s);
    check(tessera_close(t));
    free(mine);
    MPI_Finalize();
    return wrong != 0;
}
