/* nodes: see nodes.h. A bundle is what a leader sends or gets: for each rank of its node, in rank order, {u64 rank, u64
 * bytes}, then the bytes one behind another. Lengths come first, by themselves, so that memory is agreed on before
 * bytes travel. */
#include "ckpt/nodes.h"

#include "comm/agree.h"
#include "comm/base/bytes.h"
#include "comm/base/mem.h"

#include <stdlib.h>
#include <unistd.h>

enum { HEAD = 16 };

struct host {
    uint64_t hash;
    int32_t rank;
};

static int by_hash(const void *va, const void *vb)
{
    const struct host *a = va, *b = vb;
    if (a->hash != b->hash)
        return a->hash < b->hash ? -1 : 1;
    return a->rank < b->rank ? -1 : a->rank > b->rank;
}

/* node_of: nodes by the lowest rank that has the hash. */
static void number_nodes(struct host *h, int ranks, int32_t *node_of, int32_t *count)
{
    qsort(h, (size_t)ranks, sizeof *h, by_hash);
    for (int i = 0, first = 0; i < ranks; i++) {
        first = i && h[i].hash == h[i - 1].hash ? first : i;
        node_of[h[i].rank] = h[first].rank; /* its leader; the loop below puts numbers in place of leaders */
    }
    *count = 0;
    for (int r = 0; r < ranks; r++)
        node_of[r] = node_of[r] == r ? (*count)++ : node_of[node_of[r]];
}

status *nodes_open(struct comm *c, const char *host, struct nodes *out)
{
    struct nodes n = { .all = c };
    size_t ranks = (size_t)c->size;
    uint64_t mine = hash64(host, strlen(host));
    uint64_t *hash = mem_array(NULL, ranks, sizeof *hash);
    struct host *h = mem_array(NULL, ranks, sizeof *h);
    n.node_of = mem_array(NULL, ranks, sizeof *n.node_of);
    status *st = hash && h && n.node_of ? NULL : ERR(NO_MEMORY, "hosts of %d ranks", c->size);
    st = comm_agree(c, st);
    if (!st)
        st = comm_allgather(c, &mine, hash, sizeof mine, NULL);
    for (int r = 0; !st && r < c->size; r++)
        h[r] = (struct host){ hash[r], r };
    if (!st) {
        number_nodes(h, c->size, n.node_of, &n.count);
        st = comm_split(c, n.node_of[c->rank], c->rank, &n.node);
    }
    if (!st)
        st = comm_split(c, n.node->rank == 0 ? 0 : -1, c->rank, &n.leaders);
    mem_free(hash);
    mem_free(h);
    if (st || c->rank != 0) {
        mem_free(n.node_of);
        n.node_of = NULL;
    }
    if (st) {
        comm_close(n.node);
        return st;
    }
    *out = n;
    return NULL;
}

int nodes_share(const struct nodes *n, int most, int least)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    long share = (cores > 0 ? cores : 1) * most / (2 * n->node->size);
    share = share < most ? share : most;
    return share > least ? (int)share : least;
}

void nodes_close(struct nodes *n)
{
    comm_close(n->leaders);
    comm_close(n->node);
    mem_free(n->node_of);
    *n = (struct nodes){ 0 };
}

/* ---- up */

/* Leader: the bundle of what its node's ranks gave. world: their ranks in the job. */
static status *make_bundle(const unsigned char *data, const size_t *counts, const uint64_t *world, int ranks,
                           unsigned char **out, size_t *bytes)
{
    size_t head = (size_t)ranks * HEAD, n = head;
    for (int r = 0; r < ranks; r++)
        n += counts[r];
    unsigned char *b = mem_alloc(n);
    if (!b)
        return ERR(NO_MEMORY, "a node's %zu bytes", n);
    for (int r = 0; r < ranks; r++) {
        put_u64(b + (size_t)r * HEAD, world[r]);
        put_u64(b + (size_t)r * HEAD + 8, counts[r]);
    }
    if (n > head)
        memcpy(b + head, data, n - head);
    *out = b;
    *bytes = n;
    return NULL;
}

/* Rank 0: where in `all` each rank's bytes are. ranks_of[node]. */
static status *find_messages(const struct nodes *n, const unsigned char *all, const size_t *counts,
                             struct nodes_message *m)
{
    int32_t *ranks_of = mem_calloc((size_t)n->count, sizeof *ranks_of);
    if (!ranks_of)
        return ERR(NO_MEMORY, "%d nodes", n->count);
    for (int r = 0; r < n->all->size; r++)
        ranks_of[n->node_of[r]]++;
    for (int32_t k = 0; k < n->count; all += counts[k++]) {
        const unsigned char *data = all + (size_t)ranks_of[k] * HEAD;
        for (int32_t i = 0; i < ranks_of[k]; i++) {
            struct nodes_message *to = &m[get_u64(all + (size_t)i * HEAD)];
            *to = (struct nodes_message){ data, get_u64(all + (size_t)i * HEAD + 8) };
            data += to->bytes;
        }
    }
    mem_free(ranks_of);
    return NULL;
}

/* The ranks of this node in the job: at its leader. */
static status *gather_ranks(const struct nodes *n, uint64_t **out)
{
    uint64_t mine = (uint64_t)n->all->rank, *world = mem_array(NULL, (size_t)n->node->size, sizeof *world);
    status *st = comm_agree(n->node, world ? NULL : ERR(NO_MEMORY, "%d ranks", n->node->size));
    if (!st)
        st = comm_allgather(n->node, &mine, world, sizeof mine, NULL);
    if (st) {
        mem_free(world);
        return st;
    }
    *out = world;
    return NULL;
}

static status *gather_node(const struct nodes *n, const void *mine, size_t bytes, unsigned char **bundle,
                           size_t *bundle_bytes)
{
    void *data = NULL;
    size_t *counts = NULL;
    uint64_t *world = NULL;
    status *st = gather_ranks(n, &world);
    if (!st)
        st = comm_gather_bytes(n->node, mine, bytes, 0, &data, &counts);
    if (!st && n->leaders)
        st = make_bundle(data, counts, world, n->node->size, bundle, bundle_bytes);
    mem_free(data);
    mem_free(counts);
    mem_free(world);
    return st;
}

status *nodes_gather(const struct nodes *n, const void *mine, size_t bytes, struct nodes_message **message, void **buf,
                     size_t *buf_bytes)
{
    unsigned char *bundle = NULL;
    void *all = NULL;
    size_t bundle_bytes = 0, total = 0, *counts = NULL;
    struct nodes_message *m = NULL;
    status *st = comm_agree(n->all, gather_node(n, mine, bytes, &bundle, &bundle_bytes));
    if (!st && n->leaders)
        st = comm_gather_bytes(n->leaders, bundle, bundle_bytes, 0, &all, &counts);
    mem_free(bundle);
    if (!st && n->all->rank == 0) {
        for (int32_t k = 0; k < n->count; k++)
            total += counts[k];
        void *more = mem_realloc(all, total + 1);
        all = more ? more : all;
        m = mem_calloc((size_t)n->all->size, sizeof *m);
        if (more)
            ((unsigned char *)more)[total] = 0;
        st = more && m ? find_messages(n, all, counts, m) : ERR(NO_MEMORY, "messages of %d ranks", n->all->size);
    }
    mem_free(counts);
    st = comm_agree(n->all, st);
    if (st || n->all->rank != 0) {
        mem_free(all);
        mem_free(m);
        return st;
    }
    *message = m;
    *buf = all;
    *buf_bytes = total + 1;
    return NULL;
}

/* ---- down */

/* Rank 0: all bundles, by node; lengths[node]. */
static status *make_bundles(const struct nodes *n, const struct nodes_message *m, unsigned char **out, size_t *lengths)
{
    size_t total = 0, *at = mem_calloc((size_t)n->count * 2 + 1, sizeof *at), *head = at + n->count;
    if (!at)
        return ERR(NO_MEMORY, "%d nodes", n->count);
    memset(lengths, 0, (size_t)n->count * sizeof *lengths);
    for (int r = 0; r < n->all->size; r++) {
        lengths[n->node_of[r]] += HEAD + m[r].bytes;
        at[n->node_of[r]] += HEAD;
    }
    for (int32_t k = 0; k < n->count; k++) {
        head[k] = total;
        at[k] += total;
        total += lengths[k];
    }
    unsigned char *b = mem_alloc(total);
    for (int r = 0; b && r < n->all->size; r++) {
        int32_t k = n->node_of[r];
        put_u64(b + head[k], (uint64_t)r);
        put_u64(b + head[k] + 8, m[r].bytes);
        if (m[r].bytes)
            memcpy(b + at[k], m[r].data, m[r].bytes);
        head[k] += HEAD;
        at[k] += m[r].bytes;
    }
    mem_free(at);
    if (!b)
        return ERR(NO_MEMORY, "messages of %zu bytes", total);
    *out = b;
    return NULL;
}

/* From root to every rank of c: byte strings of any length; `each` and `data` at root. */
static status *scatter_bytes(struct comm *c, const void *data, const size_t *each, unsigned char **mine, size_t *bytes)
{
    size_t *words = mem_array(NULL, (size_t)c->size, sizeof *words), n = 0;
    for (int r = 0; words && r < c->size; r++)
        words[r] = sizeof n;
    status *st = comm_agree(c, words ? NULL : ERR(NO_MEMORY, "%d ranks", c->size));
    if (!st)
        st = comm_scatterv(c, each, words, &n, sizeof n, 0);
    mem_free(words);
    if (st)
        return st;
    unsigned char *b = mem_alloc(n);
    st = comm_agree(c, b ? NULL : ERR(NO_MEMORY, "a message of %zu bytes", n));
    if (!st)
        st = comm_scatterv(c, data, each, b, n, 0);
    if (st) {
        mem_free(b);
        return st;
    }
    *mine = b;
    *bytes = n;
    return NULL;
}

static status *scatter_leaders(const struct nodes *n, const struct nodes_message *message, unsigned char **bundle,
                               size_t *bytes)
{
    unsigned char *all = NULL;
    size_t *lengths = NULL;
    status *st = NULL;
    if (n->all->rank == 0) {
        lengths = mem_array(NULL, (size_t)n->count, sizeof *lengths);
        st = lengths ? make_bundles(n, message, &all, lengths) : ERR(NO_MEMORY, "%d nodes", n->count);
    }
    st = comm_agree(n->leaders, st);
    if (!st)
        st = scatter_bytes(n->leaders, all, lengths, bundle, bytes);
    mem_free(all);
    mem_free(lengths);
    return st;
}

status *nodes_scatter(const struct nodes *n, const struct nodes_message *message, void **mine, size_t *bytes)
{
    unsigned char *bundle = NULL, *own = NULL;
    size_t bundle_bytes = 0, own_bytes = 0, *each = NULL, ranks = (size_t)n->node->size;
    status *st = n->leaders ? scatter_leaders(n, message, &bundle, &bundle_bytes) : NULL;
    if (!st && n->leaders) {
        each = mem_array(NULL, ranks, sizeof *each);
        st = each ? NULL : ERR(NO_MEMORY, "%zu ranks", ranks);
        for (size_t r = 0; each && r < ranks; r++)
            each[r] = get_u64(bundle + r * HEAD + 8);
    }
    st = comm_agree(n->all, st);
    if (!st)
        st = scatter_bytes(n->node, bundle ? bundle + ranks * HEAD : NULL, each, &own, &own_bytes);
    mem_free(bundle);
    mem_free(each);
    st = comm_agree(n->all, st);
    if (st) {
        mem_free(own);
        return st;
    }
    *mine = own;
    *bytes = own_bytes;
    return NULL;
}
