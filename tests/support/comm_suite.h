/* comm_suite: what every communicator must do, as checks that any backend can run: self, MPI, ranks as threads. */
#ifndef TESSERA_TESTS_SUPPORT_COMM_SUITE_H
#define TESSERA_TESTS_SUPPORT_COMM_SUITE_H

#include "comm/comm.h"

/* Run all checks on `world`, any number of ranks. INTERNAL names the check that does not hold and the place.
 * Collective. */
status *comm_suite_run(struct comm *world) WARN_UNUSED;

#endif
