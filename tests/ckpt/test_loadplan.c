/* The schedule of a load, against what it must be: every wanted element is brought once, every block has one reader,
 * rounds keep their bounds, nobody is left with all the reading, and every rank's part of it says what the whole says.
 */
#include "ckpt/loadpart.h"
#include "comm/base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

enum { RANKS = 5, MAX_WANTS = 64 };

/* A step of tensors [rows, columns] f32, cut into `cuts` row boxes each, all in one file. */
struct fixture {
    struct metadata m;
    struct meta_file file;
    struct meta_tensor tensor[8];
    struct meta_piece piece[64];
    struct load_want want[MAX_WANTS];
    uint64_t wants;
};

static void add_tensor(struct fixture *f, uint64_t rows, uint64_t columns, uint64_t cuts)
{
    struct metadata *m = &f->m;
    struct meta_tensor *t = &f->tensor[m->tensor_count++];
    *t = (struct meta_tensor){ .part = "model", .name = "t", .dtype = DTYPE_F32, .first_piece = m->piece_count };
    t->shape = (struct shape){ .ndim = 2, .dim = { rows, columns } };
    t->piece_count = cuts;
    for (uint64_t i = 0; i < cuts; i++) {
        uint64_t begin, end;
        layout_cut(rows, cuts, i, &begin, &end);
        struct box b = { .off = { begin, 0 }, .len = { end - begin, columns } };
        struct meta_piece *p = &f->piece[m->piece_count++];
        *p = (struct meta_piece){ .piece = piece_of_box(2, &b), .bytes = (end - begin) * columns * 4 };
        p->offset = f->file.bytes;
        f->file.bytes = (f->file.bytes + p->bytes + 4095) / 4096 * 4096;
    }
}

static void init(struct fixture *f)
{
    memset(f, 0, sizeof *f);
    f->file = (struct meta_file){ .name = "model-00000.h5", .bytes = 4096 };
    f->m = (struct metadata){ .file = &f->file, .file_count = 1, .tensor = f->tensor, .piece = f->piece };
}

/* Wants come sorted by (tensor, rank, piece). */
static void add_want(struct fixture *f, uint32_t tensor, int rank, uint64_t row, uint64_t rows, uint64_t column,
                     uint64_t columns)
{
    struct box b = { .off = { row, column }, .len = { rows, columns } };
    f->want[f->wants++] = (struct load_want){ .tensor = tensor, .rank = rank, .piece = piece_of_box(2, &b) };
}

static uint64_t bytes_of(const struct fixture *f, const struct load_block *b)
{
    return block_bytes(&f->piece[b->piece], b->block);
}

/* Elements of a want that copies bring, by the plan's uses. */
static void check_complete(const struct fixture *f, const struct load_plan *p)
{
    uint64_t have[MAX_WANTS] = { 0 };
    for (uint64_t i = 0; i < p->uses; i++)
        for (uint64_t j = 0; j < use_group(p, &p->use[i])->count; j++)
            have[p->member[use_group(p, &p->use[i])->first + j]] += p->use[i].elems;
    for (uint64_t i = 0; i < f->wants; i++)
        assert_int_equal(have[i], piece_elems(&f->want[i].piece));
}

static void check_blocks(const struct fixture *f, const struct load_plan *p)
{
    uint64_t uses = 0, bytes = 0;
    for (uint64_t i = 0; i < p->blocks; i++) {
        const struct load_block *b = &p->block[i];
        assert_in_range(b->reader, 0, RANKS - 1);
        assert_true((uint64_t)b->block * META_BLOCK_BYTES < f->piece[b->piece].bytes);
        for (uint64_t k = i + 1; k < p->blocks; k++)
            assert_false(p->block[k].piece == b->piece && p->block[k].block == b->block);
        for (uint64_t k = 0; k < b->uses; k++) {
            const struct load_use *u = &p->use[b->first_use + k];
            const struct reshard_copy c = load_copy_whole(p, u->copy);
            uint64_t per = META_BLOCK_BYTES / 4, lo = b->block * per;
            assert_int_equal(c.stored, b->piece);
            assert_int_equal(c.wanted, u->group);
            assert_int_equal(u->elems, reshard_count(&c, lo, lo + per));
            assert_true(u->elems > 0);
        }
        uses += b->uses;
        bytes += bytes_of(f, b);
    }
    assert_int_equal(uses, p->uses);
    assert_int_equal(bytes, p->totals.storage_bytes);
    assert_true(p->totals.unique_bytes <= bytes);
}

/* A round may pass a bound only by one block, or by what one block alone brings. */
static void check_rounds(const struct fixture *f, const struct load_plan *p)
{
    assert_int_equal(p->round[p->rounds], p->blocks);
    for (uint64_t r = 0; r < p->rounds; r++) {
        uint64_t read[RANKS] = { 0 }, sent[RANKS] = { 0 }, got[RANKS] = { 0 }, largest = META_BLOCK_BYTES * MAX_WANTS;
        int reader = 0;
        assert_true(p->round[r] < p->round[r + 1]);
        for (uint64_t i = p->round[r]; i < p->round[r + 1]; i++) {
            const struct load_block *b = &p->block[i];
            assert_int_equal(b->round, r);
            assert_true(b->reader >= reader);
            reader = b->reader;
            read[reader] += bytes_of(f, b);
            for (uint64_t k = 0; k < b->uses; k++) {
                const struct load_group *g = use_group(p, &p->use[b->first_use + k]);
                uint64_t n = (uint64_t)p->use[b->first_use + k].elems * 4;
                for (uint64_t j = 0; j < g->count; j++) {
                    sent[reader] += n;
                    got[f->want[p->member[g->first + j]].rank] += n;
                }
            }
        }
        for (int k = 0; k < RANKS; k++) {
            assert_true(read[k] <= ROUND_READ_BYTES);
            assert_true(sent[k] <= ROUND_SEND_BYTES);
            assert_true(got[k] <= ROUND_SEND_BYTES + largest);
        }
    }
}

/* ---- parts */

static bool same_copy(const struct reshard_copy *a, const struct reshard_copy *b)
{
    size_t n = (size_t)a->ndim * sizeof *a->len;
    return a->ndim == b->ndim && a->src == b->src && a->dst == b->dst && !memcmp(a->len, b->len, n) &&
           !memcmp(a->src_stride, b->src_stride, n) && !memcmp(a->dst_stride, b->dst_stride, n);
}

/* The part's block *at is the plan's block i as rank r sees it, if that has to do with it. */
static void check_part_block(const struct fixture *f, const struct load_plan *p, uint64_t i, uint64_t number, int r,
                             const struct load_want *sorted[], const uint64_t *first, const struct load_part *part,
                             uint64_t *at)
{
    const struct load_block *b = &p->block[i];
    const struct part_block *o = &part->block[*at];
    uint64_t k = 0;
    for (uint64_t u = b->first_use; u < b->first_use + b->uses; u++) {
        const struct load_group *g = use_group(p, &p->use[u]);
        for (uint64_t j = g->first; j < g->first + g->count; j++) {
            int rank = sorted[p->member[j]]->rank;
            if (rank != r && b->reader != r)
                continue;
            assert_true(*at < part->blocks && k < o->uses);
            const struct part_use *x = &part->use[o->first_use + k++];
            assert_int_equal(x->rank, rank);
            assert_int_equal(x->want + first[rank], p->member[j]);
            assert_int_equal(x->elems, p->use[u].elems);
            const struct reshard_copy c = load_copy_whole(p, p->use[u].copy);
            assert_true(same_copy(&part->copy[x->copy], &c));
        }
    }
    if (!k)
        return;
    assert_int_equal(o->uses, k);
    assert_true(o->piece == b->piece && o->block == b->block && o->round == b->round && o->reader == b->reader);
    assert_int_equal(o->number, number);
    assert_in_range(o->piece, f->tensor[o->tensor].first_piece,
                    f->tensor[o->tensor].first_piece + f->tensor[o->tensor].piece_count - 1);
    ++*at;
}

/* What is too short, or not of a part, is refused. */
static void check_refused(const struct nodes_message *m)
{
    struct load_part part;
    for (size_t n = 0; n < m->bytes; n += 1 + n / 7) {
        status *st = load_part_unpack(m->data, n, &part);
        assert_int_equal(status_code(st), ST_INTERNAL);
        status_free(st);
    }
}

/* The plan is made anew for wants by rank, as they are gathered. */
static void check_parts(struct fixture *f)
{
    static struct load_want all[MAX_WANTS];
    const struct load_want *sorted[MAX_WANTS];
    uint64_t first[RANKS + 1] = { 0 }, n = 0;
    struct load_plan p;
    struct nodes_message *m = NULL;
    for (int r = 0; r < RANKS; r++) {
        for (uint64_t i = 0; i < f->wants; i++)
            if (f->want[i].rank == r)
                all[n++] = f->want[i];
        first[r + 1] = n;
    }
    for (uint64_t i = 0; i < n; i++)
        sorted[i] = &all[i];
    assert_null(load_plan_make(&f->m, all, n, RANKS, &p));
    assert_null(load_parts_pack(&p, all, first, RANKS, &m));
    for (int r = 0; r < RANKS; r++) {
        struct load_part part;
        uint64_t at = 0, number[RANKS] = { 0 };
        assert_null(load_part_unpack(m[r].data, m[r].bytes, &part));
        check_refused(&m[r]);
        for (uint64_t i = 0; i < p.blocks; i++)
            check_part_block(f, &p, i, number[p.block[i].reader]++, r, sorted, first, &part, &at);
        assert_int_equal(at, part.blocks);
        assert_int_equal(part.rounds, p.rounds);
        assert_int_equal(part.totals.storage_bytes, p.totals.storage_bytes);
        assert_int_equal(part.totals.unique_bytes, p.totals.unique_bytes);
        for (uint64_t k = 0; k < part.rounds; k++)
            for (uint64_t i = part.round[k]; i < part.round[k + 1]; i++)
                assert_int_equal(part.block[i].round, k);
        assert_int_equal(part.round[part.rounds], part.blocks);
        for (uint64_t i = 0; i < part.copies; i++) /* each once */
            for (uint64_t k = i + 1; k < part.copies; k++)
                assert_false(part.copies < 200 && same_copy(&part.copy[i], &part.copy[k]) && f->m.tensor_count == 1);
        load_part_free(&part);
    }
    load_parts_free(m, RANKS);
    load_plan_free(&p);
}

static void make(struct fixture *f, struct load_plan *p)
{
    status *st = load_plan_make(&f->m, f->want, f->wants, RANKS, p);
    assert_null(st);
    check_complete(f, p);
    check_blocks(f, p);
    check_rounds(f, p);
    check_parts(f);
}

static void load_of(const struct fixture *f, const struct load_plan *p, uint64_t read[RANKS])
{
    memset(read, 0, RANKS * sizeof *read);
    for (uint64_t i = 0; i < p->blocks; i++)
        read[p->block[i].reader] += bytes_of(f, &p->block[i]);
}

/* Everybody wants all of it: each byte is read once, everyone reads a fifth. */
static void test_replicas_share(void **state)
{
    (void)state;
    struct fixture f;
    struct load_plan p;
    uint64_t read[RANKS], total = (uint64_t)5000 * 1024 * 4;
    init(&f);
    add_tensor(&f, 5000, 1024, 3);
    for (int r = 0; r < RANKS; r++)
        add_want(&f, 0, r, 0, 5000, 0, 1024);
    make(&f, &p);
    assert_int_equal(p.totals.storage_bytes, total);
    assert_int_equal(p.totals.unique_bytes, total);
    load_of(&f, &p, read);
    for (int r = 0; r < RANKS; r++)
        assert_in_range(read[r], total / RANKS - 2 * META_BLOCK_BYTES, total / RANKS + 2 * META_BLOCK_BYTES);
    load_plan_free(&p);
}

/* One rank wants 240 MiB and the others nothing: they help, and stay within the agreed distance. */
static void test_others_help(void **state)
{
    (void)state;
    struct fixture f;
    struct load_plan p;
    uint64_t read[RANKS], most = 0, least = UINT64_MAX;
    init(&f);
    add_tensor(&f, 60 * 1024, 1024, 7);
    add_want(&f, 0, 2, 0, 60 * 1024, 0, 1024);
    make(&f, &p);
    load_of(&f, &p, read);
    for (int r = 0; r < RANKS; r++) {
        most = read[r] > most ? read[r] : most;
        least = read[r] < least ? read[r] : least;
    }
    assert_int_equal(read[2], most);
    assert_true(least > 0 && most - least <= (uint64_t)2 * READ_AHEAD_BYTES);
    assert_true(p.rounds >= 2);
    load_plan_free(&p);
}

/* A little of one rank's own: nobody else reads it. Half of a block wanted: the block counts, the half is unique. */
static void test_own_reads(void **state)
{
    (void)state;
    struct fixture f;
    struct load_plan p;
    init(&f);
    add_tensor(&f, 1024, 512, 2);
    add_tensor(&f, 0, 512, 1);
    for (int r = 0; r < 4; r++)
        add_want(&f, 0, r, 256 * (uint64_t)r, 256, 0, 256);
    make(&f, &p);
    assert_int_equal(p.blocks, 2);
    assert_int_equal(p.rounds, 1);
    assert_int_equal(p.totals.storage_bytes, 2 << 20);
    assert_int_equal(p.totals.unique_bytes, 1 << 20);
    for (uint64_t i = 0; i < p.blocks; i++)
        assert_true(p.block[i].reader / 2 == (int)i);
    load_plan_free(&p);
    f.wants = 0;
    make(&f, &p);
    assert_int_equal(p.blocks + p.rounds + p.totals.storage_bytes, 0);
    load_plan_free(&p);
}

static void test_random(void **state)
{
    (void)state;
    static struct fixture f;
    for (uint32_t seed = 0; seed < 60; seed++) {
        struct load_plan p;
        struct {
            uint64_t rows, columns;
        } dim[6];
        uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
#define DRAW(n) ((x = x * 6364136223846793005u + 1442695040888963407u), (x >> 33) % (n))
        init(&f);
        for (int t = 0; t < 6; t++) {
            dim[t].rows = DRAW(3000);
            dim[t].columns = 1 + DRAW(700);
            add_tensor(&f, dim[t].rows, dim[t].columns, 1 + DRAW(6));
        }
        for (uint32_t t = 0; t < 6; t++)
            for (int r = 0; r < RANKS; r++) {
                uint64_t row = DRAW(dim[t].rows + 1), column = DRAW(dim[t].columns);
                uint64_t rows = DRAW(dim[t].rows - row + 1), columns = DRAW(dim[t].columns - column + 1);
                if (DRAW(4))
                    add_want(&f, t, r, row, rows, column, columns);
            }
        make(&f, &p);
        load_plan_free(&p);
    }
}

/* Bytes of the blocks that hold a wanted element, and of the wanted elements, by looking at every element. */
static void count_bytes(const struct fixture *f, uint64_t *storage, uint64_t *unique)
{
    *storage = *unique = 0;
    for (uint64_t t = 0; t < f->m.tensor_count; t++) {
        const struct meta_tensor *x = &f->tensor[t];
        uint64_t columns = x->shape.dim[1];
        for (uint64_t i = x->first_piece; i < x->first_piece + x->piece_count; i++) {
            const struct box *b = &f->piece[i].piece.box;
            uint64_t last = UINT64_MAX;
            for (uint64_t e = 0; e < piece_elems(&f->piece[i].piece); e++) {
                uint64_t row = b->off[0] + e / columns, column = e % columns, block = e * 4 / META_BLOCK_BYTES;
                bool wanted = false;
                for (uint64_t w = 0; w < f->wants && !wanted; w++) {
                    const struct box *o = &f->want[w].piece.box;
                    wanted = f->want[w].tensor == t && row >= o->off[0] && row < o->off[0] + o->len[0] &&
                             column >= o->off[1] && column < o->off[1] + o->len[1];
                }
                *unique += wanted ? 4 : 0;
                if (wanted && block != last) {
                    last = block;
                    *storage += block_bytes(&f->piece[i], (uint32_t)block);
                }
            }
        }
    }
}

/* Grids of wants, some held by several ranks, some by none: disjoint or equal, so both sums are exact. */
static void test_amplification(void **state)
{
    (void)state;
    static struct fixture f;
    bool partial = false;
    for (uint32_t seed = 0; seed < 12; seed++) {
        struct load_plan p;
        uint64_t storage, unique;
        uint64_t x = seed * 0x9e3779b97f4a7c15u + 5;
        init(&f);
        for (uint32_t t = 0; t < 3; t++) {
            uint64_t rows = 1 + DRAW(1500), columns = 1 + DRAW(600), by = 1 + DRAW(3), and = 1 + DRAW(2);
            add_tensor(&f, rows, columns, 1 + DRAW(5));
            for (uint64_t cell = 0; cell < by * and; cell++) {
                uint64_t r0, r1, c0, c1, ranks = DRAW(4);
                layout_cut(rows, by, cell / and, &r0, &r1);
                layout_cut(columns, and, cell % and, &c0, &c1);
                for (uint64_t r = 0; r < ranks && r1 > r0 && c1 > c0; r++)
                    add_want(&f, t, (int)((cell + r) % RANKS), r0, r1 - r0, c0, c1 - c0);
            }
        }
        make(&f, &p);
        count_bytes(&f, &storage, &unique);
        assert_int_equal(p.totals.storage_bytes, storage);
        assert_int_equal(p.totals.unique_bytes, unique);
        partial = partial || unique < storage;
        load_plan_free(&p);
    }
    assert_true(partial);
}

/* The order of the wants changes nothing but the order within groups. */
static void test_any_order(void **state)
{
    (void)state;
    static struct fixture f, g;
    struct load_plan p, q;
    init(&f);
    add_tensor(&f, 3000, 700, 5);
    add_tensor(&f, 900, 300, 2);
    for (int r = 0; r < RANKS; r++)
        add_want(&f, 0, r, r % 2 ? 1000 : 0, 1000, 0, 700);
    for (int r = 0; r < RANKS; r++)
        add_want(&f, 1, r, 0, 900, 60 * (uint64_t)r, 60);
    g = f;
    g.m.file = &g.file;
    g.m.tensor = g.tensor;
    g.m.piece = g.piece;
    for (uint64_t i = 0; i < f.wants; i++)
        g.want[i] = f.want[f.wants - 1 - i];
    make(&f, &p);
    make(&g, &q);
    assert_int_equal(p.blocks, q.blocks);
    for (uint64_t i = 0; i < p.blocks; i++)
        assert_true(p.block[i].piece == q.block[i].piece && p.block[i].block == q.block[i].block &&
                    p.block[i].reader == q.block[i].reader && p.block[i].round == q.block[i].round);
    load_plan_free(&p);
    load_plan_free(&q);
}

/* What is stored nowhere is an error that names step and tensor. */
static void test_missing(void **state)
{
    (void)state;
    struct fixture f;
    struct load_plan p;
    init(&f);
    f.m.step = 12;
    add_tensor(&f, 10, 4, 2);
    f.piece[1].piece.box.len[0] = 4;
    f.piece[1].piece.end = 16;
    add_want(&f, 0, 1, 0, 10, 0, 4);
    status *st = load_plan_make(&f.m, f.want, f.wants, RANKS, &p);
    assert_int_equal(status_code(st), ST_NOT_FOUND);
    assert_non_null(strstr(status_message(st), "step 12: model/t"));
    status_free(st);
}

/* All want all of pieces that lie one behind another: a reader gets stretches of READ_RUN_BYTES, not a block here and
 * there. */
static void test_stretches(void **state)
{
    (void)state;
    struct fixture f;
    struct load_plan p;
    uint64_t stretches = 0, length = 0;
    init(&f);
    add_tensor(&f, 40 * 256, 1024, 8); /* 5 MiB each */
    for (int r = 0; r < RANKS; r++)
        add_want(&f, 0, r, 0, 40 * 256, 200 * (uint64_t)r, 200);
    add_want(&f, 0, 0, 0, 40 * 256, 1000, 24);
    make(&f, &p);
    static int reader[40];
    for (uint64_t i = 0; i < p.blocks; i++)
        reader[p.block[i].piece * 5 + p.block[i].block] = p.block[i].reader;
    for (int i = 0; i < 40; i++) {
        bool new = i == 0 || reader[i] != reader[i - 1];
        length = new ? 1 : length + 1;
        stretches += new;
        assert_true(length <= READ_RUN_BYTES / META_BLOCK_BYTES);
    }
    assert_int_equal(stretches, 40 * META_BLOCK_BYTES / READ_RUN_BYTES);
    load_plan_free(&p);
}

/* Two ranks want every other 2 MiB of a file. Where requests are dear and both are on one node, they take turns with
 * long stretches of what both want. On two nodes, or from a disk, neither reads for the other. */
static void test_long_stretches(void **state)
{
    (void)state;
    enum { BLOCKS = 64, RUN = 8 };
    static struct fixture f;
    const int32_t together[RANKS] = { 1, 1, 0, 0, 2 }, apart[RANKS] = { 0, 1, 2, 2, 2 };
    const int32_t *const node[] = { together, apart, NULL };
    for (int n = 0; n < 3; n++) {
        struct load_plan p;
        init(&f);
        add_tensor(&f, BLOCKS * 256, 1024, 1);
        for (int r = 0; r < 2; r++)
            for (uint64_t i = (uint64_t)r; i < BLOCKS / 2; i += 2)
                add_want(&f, 0, r, i * 512, 512, 0, 1024);
        add_tensor(&f, BLOCKS / 2 * 256 * 3, 1024, 3); /* and the others have as much to read */
        for (int r = 2; r < RANKS; r++)
            add_want(&f, 1, r, (uint64_t)(r - 2) * BLOCKS / 2 * 256, BLOCKS / 2 * 256, 0, 1024);
        const struct load_reading how = { .run_bytes = RUN * META_BLOCK_BYTES, .node_of = node[n] };
        assert_null(load_plan_make_from(&f.m, f.want, f.wants, RANKS, &how, &p));
        check_blocks(&f, &p);
        check_complete(&f, &p);
        for (const struct load_block *b = p.block; b < p.block + p.blocks; b++)
            assert_int_equal(b->reader, b->piece == 0 ? b->block / (n == 0 ? RUN : 2) % 2 : b->piece + 1);
        load_plan_free(&p);
    }
}

/* Everybody wants 60 MiB of its own, in files one after another: nobody reads for another, whoever comes first. */
static void test_no_help_needed(void **state)
{
    (void)state;
    static struct fixture f;
    struct load_plan p;
    init(&f);
    add_tensor(&f, 15 * 1024 * RANKS, 1024, RANKS);
    for (int r = 0; r < RANKS; r++)
        add_want(&f, 0, r, 15 * 1024 * (uint64_t)r, 15 * 1024, 0, 1024);
    make(&f, &p);
    for (uint64_t i = 0; i < p.blocks; i++)
        assert_int_equal(p.block[i].reader, p.block[i].piece);
    load_plan_free(&p);
}

/* Pieces that lie in the files in another order than in the list, small ones and such of two blocks: a reader reads
 * from the files' beginnings to their ends. */
/* Rows of four ranks for three: blocks that two ranks want go to the one that has less to read of what it alone wants,
 * also if that comes later in the file. */
static void test_balance(void **state)
{
    (void)state;
    static struct fixture f;
    struct load_plan p;
    enum { TENSORS = 8, ROWS = 8 * 1024, COLUMNS = 256, MIB = 1 << 20 };
    uint64_t read[RANKS];
    init(&f);
    for (uint32_t t = 0; t < TENSORS; t++)
        add_tensor(&f, ROWS, COLUMNS, 4); /* 2 MiB each */
    /* the first pieces of all tensors, then the second ones, as four files have them */
    for (uint32_t i = 0; i < 4 * TENSORS; i++)
        f.piece[i].offset = 4096 + (i % 4 * TENSORS + i / 4) * f.piece[i].bytes;
    for (uint32_t t = 0; t < TENSORS; t++)
        for (int r = 0; r < 3; r++) {
            uint64_t begin, end;
            layout_cut(ROWS, 3, (uint64_t)r, &begin, &end);
            add_want(&f, t, r, begin, end - begin, 0, COLUMNS);
        }
    make(&f, &p);
    load_of(&f, &p, read);
    for (int r = 0; r < 3; r++)
        assert_in_range(read[r], 19 * MIB, 23 * MIB); /* without looking ahead: 16, 30 and 18 */
    load_plan_free(&p);
}

static void test_places(void **state)
{
    (void)state;
    static struct fixture f;
    enum { PIECES = 24 };
    for (int way = 0; way < 3; way++) {
        struct load_plan p;
        uint64_t blocks = 0;
        init(&f);
        add_tensor(&f, 8 * 400, 1024, 8); /* 1.6 MB each */
        add_tensor(&f, 160, 64, 16);
        for (uint32_t i = 0; i < PIECES; i++) {
            uint32_t at = way == 0 ? PIECES - 1 - i : (i * 7 + 3) % PIECES;
            f.piece[i].offset = (uint64_t)(at + 1) * 600 * 4096;
            f.piece[i].file = way == 1 ? 0 : i % 5 == 3 ? 70000 : i % 3;
            blocks += meta_blocks(f.piece[i].bytes);
        }
        add_want(&f, 0, 3, 0, 8 * 400, 0, 1024);
        add_want(&f, 1, 3, 0, 160, 0, 64);
        make(&f, &p);
        assert_int_equal(p.blocks, blocks);
        for (uint64_t i = 0; i < p.blocks; i++) {
            const struct load_block *b = &p.block[i], *before = b - 1;
            const struct meta_piece *x = &f.piece[b->piece], *y = i ? &f.piece[before->piece] : NULL;
            assert_int_equal(b->reader, 3);
            if (i)
                assert_true(x->file > y->file || (x->file == y->file && x->offset > y->offset) ||
                            (x == y && b->block == before->block + 1));
        }
        load_plan_free(&p);
    }
}

/* A rank that wants one block 4,096 times receives 4 GiB of it in one round, and what another reader has for it comes
 * in a later one. */
static void test_much_received(void **state)
{
    (void)state;
    enum { TIMES = 4096 };
    static struct fixture f;
    const int32_t reader[] = { 1, 2 };
    struct load_plan p;
    struct load_want *want = mem_calloc(TIMES + 1, sizeof *want);
    init(&f);
    add_tensor(&f, 512, 1024, 2);
    add_want(&f, 0, 0, 0, 256, 0, 1024);
    add_want(&f, 0, 0, 256, 256, 0, 1024);
    for (int i = 0; i < TIMES; i++)
        want[i] = f.want[0];
    want[TIMES] = f.want[1];
    assert_null(load_plan_make_from(&f.m, want, TIMES + 1, RANKS, &(struct load_reading){ .reader = reader }, &p));
    assert_int_equal(p.rounds, 2);
    assert_int_equal(p.blocks, 2);
    assert_true(p.block[0].piece == 0 && p.block[1].piece == 1);
    assert_int_equal(p.totals.wire_bytes, (uint64_t)(TIMES + 1) << 20);
    load_plan_free(&p);
    const int32_t own[] = { 0, 2 }; /* what it reads for itself is not sent, however often it wants it */
    assert_null(load_plan_make_from(&f.m, want, TIMES + 1, RANKS, &(struct load_reading){ .reader = own }, &p));
    assert_int_equal(p.totals.wire_bytes, 1 << 20);
    load_plan_free(&p);
    mem_free(want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_balance),        cmocka_unit_test(test_places),
        cmocka_unit_test(test_much_received),  cmocka_unit_test(test_replicas_share),
        cmocka_unit_test(test_others_help),    cmocka_unit_test(test_own_reads),
        cmocka_unit_test(test_random),         cmocka_unit_test(test_amplification),
        cmocka_unit_test(test_any_order),      cmocka_unit_test(test_missing),
        cmocka_unit_test(test_no_help_needed), cmocka_unit_test(test_stretches),
        cmocka_unit_test(test_long_stretches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
