/* save_load.c in C++17: the same table in the same files, owned by a vector, with errors as exceptions. Built with
 * find_package(tessera):
 *
 *     find_package(MPI REQUIRED COMPONENTS CXX)
 *     find_package(tessera REQUIRED)
 *     add_executable(save_load save_load.cpp)
 *     target_link_libraries(save_load PRIVATE tessera::tessera MPI::MPI_CXX) */
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <mpi.h>
#include <tessera.h>

constexpr std::uint64_t rows = 1001, cols = 7;

/* A collective call fails on all ranks or on none, so all of them leave by the same throw. */
static void check(tessera_status *st)
{
    if (!st)
        return;
    std::string message = tessera_status_message(st);
    tessera_status_free(st);
    throw std::runtime_error(message);
}

struct free_state {
    void operator()(tessera_state *s) const
    {
        tessera_state_free(s);
    }
};

struct close_handle { /* on the way out of an error; the ordinary way reports what close returns */
    void operator()(tessera *t) const
    {
        tessera_status_free(tessera_close(t));
    }
};

static std::uint64_t save_or_load(const char *url, int rank, int ranks)
{
    std::uint64_t first = rows * rank / ranks, end = rows * (rank + 1) / ranks, step = 0, wrong = 0;
    /* Destroyed last to first: the handle, which may still be saving them, before the state and the table. */
    std::vector<double> mine((end - first) * cols);
    std::unique_ptr<tessera_state, free_state> s;
    std::unique_ptr<tessera, close_handle> t;

    struct tessera_options o = TESSERA_OPTIONS;
    o.url = url;
    o.mpi_comm = MPI_Comm_c2f(MPI_COMM_WORLD);
    tessera *handle = nullptr;
    check(tessera_open(&o, &handle));
    t.reset(handle);

    tessera_state *state = nullptr;
    check(tessera_state_new(handle, &state));
    s.reset(state);
    struct tessera_tensor a = TESSERA_TENSOR;
    a.part = "model";
    a.name = "table";
    a.dtype = TESSERA_F64;
    a.ndim = 2;
    a.shape[0] = rows;
    a.shape[1] = cols;
    a.offset[0] = first;
    a.length[0] = end - first;
    a.length[1] = cols;
    a.data = mine.data();
    check(tessera_state_add_tensor(state, &a));

    tessera_status *st = tessera_load_newest(handle, state, &step);
    if (tessera_status_code(st) == TESSERA_NOT_FOUND) {
        tessera_status_free(st);
        for (std::size_t i = 0; i < mine.size(); i++)
            mine[i] = double(first * cols + i);
        check(tessera_save(handle, state, 1));
        check(tessera_fence(handle, nullptr, 0, nullptr));
        mine.assign(mine.size(), -1);
        check(tessera_wait(handle, &step));
    } else {
        check(st);
        for (std::size_t i = 0; i < mine.size(); i++)
            wrong += mine[i] != double(first * cols + i);
    }
    std::printf("rank %d of %d: step %d, %d elements wrong\n", rank, ranks, int(step), int(wrong));
    check(tessera_close(t.release()));
    return wrong;
}

int main(int argc, char **argv)
{
    int rank = 0, ranks = 1, failed = 1;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    try {
        failed = save_or_load(argc > 1 ? argv[1] : "table", rank, ranks) != 0;
    } catch (const std::exception &e) {
        std::fprintf(stderr, "save_load: %s\n", e.what());
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    MPI_Finalize();
    return failed;
}
