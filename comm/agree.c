/* agree: one verdict for all ranks. One small reduction when all is well; one broadcast more when it is not. */
#include "comm/agree.h"

#include <stdio.h>

/* What the failing rank tells the others. */
struct verdict {
    int32_t code, rank;
    char words[1024];
};

status *comm_agree(struct comm *c, status *st)
{
    int32_t lowest = st ? c->rank : c->size;
    status *transport = comm_allreduce(c, &lowest, 1, COMM_I32, COMM_MIN, NULL);
    if (transport)
        return status_first(st, transport);
    if (lowest == c->size)
        return NULL;
    struct verdict v = { 0 };
    bool mine = lowest == c->rank;
    if (mine) {
        st = status_at_rank(st, c->rank);
        v.code = (int32_t)status_code(st);
        v.rank = status_rank(st);
        snprintf(v.words, sizeof v.words, "%s", status_message(st));
    }
    transport = comm_bcast(c, &v, sizeof v, (int)lowest, NULL);
    if (mine || transport)
        return status_first(st, transport);
    status_free(st);
    st = status_new(__FILE__, __LINE__, (enum status_code)v.code, "%s", v.words);
    return status_at_rank(st, v.rank);
}
