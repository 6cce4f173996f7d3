/* comm_suite: what every communicator must do, as checks that any backend can run: self, MPI, ranks as threads. */
#ifndef TESSERA_TESTS_SUPPORT_COMM_SUITE_H
#define TESSERA_TESTS_SUPPORT_COMM_SUITE_H

#include "comm/comm.h"

/* Run all checks on `world`, any number of ranks. INTERNAL names the check that does not hold and the place.
 * Collective. */
status *comm_suite_run(struct comm *world) WARN_UNUSED;
/* The same without what a communicator for device memory does not promise (comm_over): that a reduction in flight lets
 * an exchange pass, and that a copying one (comm_on_device) allocates nothing. */
status *comm_suite_run_in_order(struct comm *world) WARN_UNUSED;

#endif
