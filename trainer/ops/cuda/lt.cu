/* lt: cuBLASLt, opened at run time and never linked, since it is large and comes with the toolkit or with PyTorch's
 * packages.
 *
 * A shape's descriptors and algorithm are made once and kept: the heuristic's first answer, without split-K or any
 * other reduction across blocks (CUBLASLT_REDUCTION_SCHEME_NONE); if deterministic, also without a workspace, which is
 * what schemes that hand partial sums from block to block need. So a shape's sums have one order as long as the process
 * lives, and over processes as far as the heuristic gives the same answer: same library, same GPU. */
#include "trainer/ops/cuda/gpu.h"

extern "C" {
#include "comm/base/mem.h"
}

#include <cublasLt.h>
#include <dlfcn.h>

#define LT_FUNCTIONS(X)                                                                                                \
    X(cublasLtCreate)                                                                                                  \
    X(cublasLtDestroy)                                                                                                 \
    X(cublasLtMatmul)                                                                                                  \
    X(cublasLtMatmulAlgoGetHeuristic)                                                                                  \
    X(cublasLtMatmulDescCreate)                                                                                        \
    X(cublasLtMatmulDescDestroy)                                                                                       \
    X(cublasLtMatmulDescSetAttribute)                                                                                  \
    X(cublasLtMatrixLayoutCreate)                                                                                      \
    X(cublasLtMatrixLayoutDestroy)                                                                                     \
    X(cublasLtMatmulPreferenceCreate)                                                                                  \
    X(cublasLtMatmulPreferenceDestroy)                                                                                 \
    X(cublasLtMatmulPreferenceSetAttribute)

namespace
{
enum { SHAPES = 512, WORKSPACE = 32 << 20 };

/* What an algorithm is chosen for. */
struct shape {
    int64_t m, n, k, lda, ldb, ldc;
    int a_align, b_align, c_align; /* of the pointers, 256 bytes at most */
    int a_trans, b_trans, bf16, c_low, bias, add, elsewhere;
};

struct plan {
    struct shape of;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
    bool none; /* the library has no algorithm */
};
} // namespace

struct lt {
#define X(f) decltype(&::f) f;
    LT_FUNCTIONS(X)
#undef X
    void *so, *workspace;
    size_t workspace_bytes;
    cublasLtHandle_t handle;
    struct plan plan[SHAPES]; /* those in use come first */
    int plans, oldest;
};

/* The names under which the library is found: on the loader's path, or as $TESSERA_CUBLASLT says. */
static void *open_library(char *why, size_t size)
{
    static const char *const names[] = { "libcublasLt.so.13", "libcublasLt.so" };
    const char *own = getenv("TESSERA_CUBLASLT");
    void *so = own && *own ? dlopen(own, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (own && *own) {
        if (!so)
            snprintf(why, size, "%s", dlerror());
        return so;
    }
    for (size_t i = 0; !so && i < sizeof names / sizeof *names; i++) {
        so = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
        if (!so && i == 0)
            snprintf(why, size, "%s", dlerror());
    }
    return so;
}

static status *bind_functions(struct lt *lt)
{
#define X(f)                                                                                                           \
    lt->f = reinterpret_cast<decltype(&::f)>(dlsym(lt->so, #f));                                                       \
    if (!lt->f)                                                                                                        \
        return ERR(UNSUPPORTED, "cuda: the cuBLASLt of this machine has no " #f);
    LT_FUNCTIONS(X)
#undef X
    return NULL;
}

status *lt_open(struct workers *w, struct lt **out)
{
    char why[512] = "";
    struct lt *lt = static_cast<struct lt *>(mem_calloc(1, sizeof *lt));
    if (!lt)
        return ERR(NO_MEMORY, "cuda: handle of cuBLASLt");
    lt->so = open_library(why, sizeof why);
    status *st = lt->so ? bind_functions(lt)
                        : ERR(UNSUPPORTED,
                              "cuda: cuBLASLt 13 was not found (LD_LIBRARY_PATH, or the file that "
                              "$TESSERA_CUBLASLT names): %s",
                              why);
    cublasStatus_t rc = CUBLAS_STATUS_SUCCESS;
    if (!st && (rc = lt->cublasLtCreate(&lt->handle)) != CUBLAS_STATUS_SUCCESS)
        st = ERR(DEVICE, "cuda: cublasLtCreate: status %d", (int)rc);
    lt->workspace_bytes = w->deterministic ? 0 : WORKSPACE;
    if (!st && lt->workspace_bytes && cudaMalloc(&lt->workspace, lt->workspace_bytes) != cudaSuccess)
        st = ERR(NO_MEMORY, "cuda: %zu bytes of workspace for cuBLASLt", lt->workspace_bytes);
    if (st) {
        lt_close(lt);
        return st;
    }
    *out = lt;
    return NULL;
}

static void drop_plan(struct lt *lt, struct plan *p)
{
    if (p->desc)
        (void)lt->cublasLtMatmulDescDestroy(p->desc);
    if (p->a)
        (void)lt->cublasLtMatrixLayoutDestroy(p->a);
    if (p->b)
        (void)lt->cublasLtMatrixLayoutDestroy(p->b);
    if (p->c)
        (void)lt->cublasLtMatrixLayoutDestroy(p->c);
    memset(static_cast<void *>(p), 0, sizeof *p);
}

void lt_close(struct lt *lt)
{
    if (!lt)
        return;
    for (int i = 0; i < lt->plans; i++)
        drop_plan(lt, &lt->plan[i]);
    if (lt->handle)
        (void)lt->cublasLtDestroy(lt->handle);
    if (lt->workspace)
        (void)cudaFree(lt->workspace);
    if (lt->so)
        dlclose(lt->so);
    mem_free(lt);
}

static int alignment(const void *p)
{
    uintptr_t low = (uintptr_t)p & -(uintptr_t)p;
    return low && low < 256 ? (int)low : 256;
}

static struct shape shape_of(const struct lt_call *c)
{
    struct shape s;
    memset(&s, 0, sizeof s); /* compared as bytes */
    s.m = c->m;
    s.n = c->n;
    s.k = c->k;
    s.lda = c->lda;
    s.ldb = c->ldb;
    s.ldc = c->ldc;
    s.a_align = alignment(c->a);
    s.b_align = alignment(c->b);
    s.c_align = alignment(c->c) < alignment(c->from) ? alignment(c->c) : alignment(c->from);
    s.a_trans = c->a_trans;
    s.b_trans = c->b_trans;
    s.bf16 = c->bf16;
    s.bias = c->bias != NULL;
    s.c_low = c->c_low;
    s.add = c->beta != 0;
    s.elsewhere = c->from != c->c;
    return s;
}

#define SET(what, object, attribute, value)                                                                            \
    (rc = rc != CUBLAS_STATUS_SUCCESS ? rc : lt->what(object, attribute, &(value), sizeof(value)))

/* The descriptors of a shape. */
static cublasStatus_t describe(struct lt *lt, struct plan *p)
{
    const struct shape *s = &p->of;
    cublasOperation_t a = s->a_trans ? CUBLAS_OP_T : CUBLAS_OP_N, b = s->b_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = s->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cudaDataType_t type = s->bf16 ? CUDA_R_16BF : CUDA_R_32F, result = s->c_low ? CUDA_R_16BF : CUDA_R_32F;
    uint64_t m = (uint64_t)s->m, n = (uint64_t)s->n, k = (uint64_t)s->k;
    cublasStatus_t rc = lt->cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    SET(cublasLtMatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_TRANSA, a);
    SET(cublasLtMatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_TRANSB, b);
    SET(cublasLtMatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (s->bias)
        SET(cublasLtMatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, result);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = lt->cublasLtMatrixLayoutCreate(&p->a, type, s->a_trans ? k : m, s->a_trans ? m : k, s->lda);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = lt->cublasLtMatrixLayoutCreate(&p->b, type, s->b_trans ? n : k, s->b_trans ? k : n, s->ldb);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = lt->cublasLtMatrixLayoutCreate(&p->c, result, m, n, s->ldc);
    return rc;
}

static cublasStatus_t choose(struct lt *lt, struct plan *p)
{
    uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_NONE;
    uint32_t align[3] = { (uint32_t)p->of.a_align, (uint32_t)p->of.b_align, (uint32_t)p->of.c_align };
    uint64_t bytes = lt->workspace_bytes;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    cublasStatus_t rc = lt->cublasLtMatmulPreferenceCreate(&wish);
    if (rc != CUBLAS_STATUS_SUCCESS)
        return rc;
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes);
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, scheme);
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align[0]);
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align[1]);
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align[2]);
    SET(cublasLtMatmulPreferenceSetAttribute, wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align[2]);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = lt->cublasLtMatmulAlgoGetHeuristic(lt->handle, p->desc, p->a, p->b, p->c, p->c, wish, 1, &best, &found);
    (void)lt->cublasLtMatmulPreferenceDestroy(wish);
    p->none = rc == CUBLAS_STATUS_NOT_SUPPORTED || (rc == CUBLAS_STATUS_SUCCESS && !found);
    if (rc == CUBLAS_STATUS_SUCCESS && found)
        p->algo = best.algo;
    return p->none ? CUBLAS_STATUS_SUCCESS : rc;
}

/* A shape's plan, made if it is new; when all places are taken, in the place of the oldest. */
static cublasStatus_t plan_of(struct lt *lt, const struct shape *s, struct plan **out)
{
    for (int i = 0; i < lt->plans; i++)
        if (!memcmp(&lt->plan[i].of, s, sizeof *s)) {
            *out = &lt->plan[i];
            return CUBLAS_STATUS_SUCCESS;
        }
    int at = lt->plans < SHAPES ? lt->plans++ : lt->oldest++ % SHAPES;
    struct plan *p = &lt->plan[at];
    drop_plan(lt, p);
    p->of = *s;
    cublasStatus_t rc = describe(lt, p);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = choose(lt, p);
    if (rc != CUBLAS_STATUS_SUCCESS)
        drop_plan(lt, p);
    *out = p;
    return rc;
}

bool lt_matmul(struct workers *w, const struct lt_call *c)
{
    struct lt *lt = w->lt;
    struct shape s = shape_of(c);
    struct plan *p;
    float alpha = 1;
    cublasStatus_t rc = plan_of(lt, &s, &p);
    if (rc == CUBLAS_STATUS_SUCCESS && p->none)
        return false;
    if (rc == CUBLAS_STATUS_SUCCESS && c->bias)
        SET(cublasLtMatmulDescSetAttribute, p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, c->bias);
    if (rc == CUBLAS_STATUS_SUCCESS)
        rc = lt->cublasLtMatmul(lt->handle, p->desc, &alpha, c->a, p->a, c->b, p->b, &c->beta, c->from, p->c, c->c,
                                p->c, &p->algo, lt->workspace, lt->workspace_bytes, w->stream);
    if (rc != CUBLAS_STATUS_SUCCESS)
        w->error =
            status_first(w->error, ERR(DEVICE, "cuda: cuBLASLt, %s product of [%lld, %lld] and [%lld, %lld]: status %d",
                                       c->bf16 ? "bf16" : "f32", (long long)c->n, (long long)c->k, (long long)c->k,
                                       (long long)c->m, (int)rc));
    return true;
}
