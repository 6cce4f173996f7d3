/* The CUDA kernels against the CPU's, forward and backward, on odd shapes. Without arguments they run in an emulator
 * (tests/support/cuda_emu.h), which needs no GPU and no nvcc; `--device cuda` runs the same cases on a GPU with the
 * real plugin, and counts as skipped where there is none.
 *
 * A case is one function over an array of buffers; it runs with kernels_cpu on copies in host memory, and twice with
 * the CUDA kernels on copies in device memory. What they leave must be close to the CPU's, everything else untouched,
 * guards behind the buffers too, and both runs must give the same bits: in the emulator threads and blocks take turns
 * in ascending order in one of them and in descending order in the other, so that a missing barrier shows. Cases run
 * with buffers that are 16-byte aligned and with such that are not; small ones with each buffer alone that is not. */
#include "comm/base/mem.h"
#include "comm/device/device.h"
#include "tests/trainer/cuda_cases.h"
#include "trainer/ops/device_kernels.h"

#include <unistd.h>

/* Of the emulator. */
extern ops_plugin_fn ops_plugin;
void emu_order(bool descending);

enum { SKIPPED = 77, GUARD = 64, SMALL = 48 << 10 };

/* ---- where cases run ---- */

static struct device *device; /* a GPU's; NULL: the emulator */
static struct stream *stream;
static const struct ops_plugin *plugin;
static struct workers *workers[2]; /* with products by our own kernel; by the library */

static void assert_ok(status *st)
{
    if (st)
        print_error("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    assert_null(st);
}

static void *device_take(size_t bytes)
{
    void *p = NULL;
    if (device)
        assert_ok(device->ops->alloc(device, bytes, &p));
    else
        p = mem_alloc(bytes);
    assert_non_null(p);
    return p;
}

static void device_give(void *p, size_t bytes)
{
    if (device)
        device->ops->free(device, p, bytes);
    else
        mem_free(p);
}

static void device_copy(void *dst, const void *src, size_t bytes)
{
    if (device) {
        assert_ok(device->ops->copy(device, dst, src, bytes, stream));
        assert_ok(device->ops->stream_sync(device, stream));
    } else {
        memcpy(dst, src, bytes);
    }
}

static int open_all(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct ops_options o = { .stream = stream, .deterministic = true, .own_gemm = i == OWN };
        assert_ok(plugin->open(&o, &workers[i]));
    }
    return 0;
}

static int close_all(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++)
        plugin->close(workers[i]);
    return 0;
}

/* ---- a case ---- */

static uint32_t seed = 1;

float draw(void)
{
    seed = seed * 1664525u + 1013904223u;
    return (float)(int32_t)seed * 0x1p-30f;
}

int32_t draw_below(int32_t n)
{
    seed = seed * 1664525u + 1013904223u;
    return (int32_t)((seed >> 8) % (uint32_t)n);
}

void *add_buffer(struct run *r, enum kind kind, size_t bytes)
{
    assert_true(r->count < MOST);
    void *p = mem_calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    r->b[r->count++] = (struct buffer){ kind, bytes, p, 0 };
    return p;
}

float *floats(struct run *r, enum kind kind, int64_t n)
{
    float *p = add_buffer(r, kind, (size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++)
        p[i] = draw();
    return p;
}

int32_t *ints(struct run *r, int64_t n)
{
    return add_buffer(r, INTS, (size_t)n * sizeof(int32_t));
}

uint16_t *halves(struct run *r, enum kind kind, int64_t n)
{
    uint16_t *p = add_buffer(r, kind, (size_t)n * sizeof *p);
    for (int64_t i = 0; i < n; i++)
        p[i] = bf16_from_f32(draw());
    return p;
}

void array_buffer(struct run *r, enum kind kind, bool low, int64_t n)
{
    if (low)
        (void)halves(r, kind == CLOSE ? CLOSE_LOW : kind, n);
    else
        (void)floats(r, kind, n);
}

struct array array_begin(const struct kernels *k, void *p, bool low, bool fresh, int64_t n)
{
    if (k != &kernels_cpu || !p)
        return (struct array){ p, low, fresh };
    float *x = p;
    if (low) {
        x = mem_calloc((size_t)n + 1, sizeof *x);
        assert_non_null(x);
        kernels_cpu.widen(NULL, x, p, n);
    }
    if (fresh)
        memset(x, 0, (size_t)n * sizeof *x);
    return array_of(x);
}

void array_done(const struct kernels *k, void *p, bool low, struct array a, int64_t n)
{
    if (k != &kernels_cpu || !low || !p)
        return;
    kernels_cpu.narrow(NULL, p, a.at, n);
    mem_free(a.at);
}

static void near_low(const struct run *r, int b, const uint16_t *got, const uint16_t *want, int round)
{
    for (size_t i = 0; i < r->b[b].bytes / sizeof *got; i++) {
        double g = (double)bf16_to_f32(got[i]), w = (double)bf16_to_f32(want[i]);
        if (!(fabs(g - w) <= 0x1p-7 * fabs(w) + r->tolerance))
            fail_msg("%s: buffer %d, element %zu is %.9g, the CPU's %.9g (run %d)", r->what, b, i, g, w, round);
    }
}

static void near_cpu(const struct run *r, int b, const void *got, const void *want, int round)
{
    if (r->b[b].kind == CLOSE_LOW) {
        near_low(r, b, got, want, round);
        return;
    }
    const float *g = got, *w = want;
    double tolerance = r->b[b].tolerance > 0 ? r->b[b].tolerance : r->tolerance;
    for (size_t i = 0; r->b[b].kind == CLOSE && i < r->b[b].bytes / sizeof *g; i++)
        if (!(fabs((double)g[i] - (double)w[i]) <= tolerance * (1 + fabs((double)w[i]))) && !(g[i] == w[i]))
            fail_msg("%s: buffer %d, element %zu is %.9g, the CPU's %.9g (run %d)", r->what, b, i, (double)g[i],
                     (double)w[i], round);
    if (r->b[b].kind != CLOSE && r->b[b].kind != JUNK && memcmp(got, want, r->b[b].bytes))
        fail_msg("%s: buffer %d differs (run %d)", r->what, b, round);
}

/* Once with the CUDA kernels, the buffers `skewed` (a bit each) lying askew: results into `out`. */
static void run_device(const struct run *r, uint32_t skewed, bool descending, unsigned char **out)
{
    void *p[MOST] = { 0 }, *base[MOST];
    size_t size[MOST], skews[MOST];
    for (int b = 0; b < r->count; b++) {
        size_t skew = skews[b] = skewed >> b & 1 ? sizeof(double) : 0;
        size[b] = r->b[b].bytes + skew + GUARD;
        unsigned char *image = mem_alloc(size[b]);
        memset(image, 0x5a, size[b]);
        memcpy(image + skew, r->b[b].value, r->b[b].bytes);
        base[b] = device_take(size[b]);
        device_copy(base[b], image, size[b]);
        p[b] = (unsigned char *)base[b] + skew;
        mem_free(image);
    }
    if (!device)
        emu_order(descending);
    r->call(plugin->kernels, workers[r->gemm], p, r->arg);
    assert_ok(plugin->check(workers[r->gemm], true));
    for (int b = 0; b < r->count; b++) {
        unsigned char *image = mem_alloc(size[b]);
        size_t skew = skews[b];
        device_copy(image, base[b], size[b]);
        for (size_t i = 0; i < size[b]; i++)
            if ((i < skew || i >= skew + r->b[b].bytes) && image[i] != 0x5a)
                fail_msg("%s: buffer %d of %zu bytes is written at %zd", r->what, b, r->b[b].bytes,
                         (ssize_t)i - (ssize_t)skew);
        memcpy(out[b], image + skew, r->b[b].bytes);
        mem_free(image);
        device_give(base[b], size[b]);
    }
}

static void finish(struct run *r)
{
    for (int b = 0; b < r->count; b++)
        mem_free(r->b[b].value);
    r->count = 0;
}

/* Twice, in both orders. */
static void check_places(const struct run *r, uint32_t skewed, void **host, unsigned char *(*out)[MOST])
{
    for (int i = 0; i < 2; i++) {
        run_device(r, skewed, i == 1, out[i]);
        for (int b = 0; b < r->count; b++)
            near_cpu(r, b, out[i][b], host[b], i);
    }
    for (int b = 0; b < r->count; b++)
        if (r->b[b].kind != JUNK && memcmp(out[0][b], out[1][b], r->b[b].bytes))
            fail_msg("%s: buffer %d has other bits in a second run", r->what, b);
}

void check_one(struct run *r, bool skewed)
{
    void *host[MOST];
    unsigned char *out[2][MOST];
    size_t all = 0;
    for (int b = 0; b < r->count; b++) {
        size_t bytes = r->b[b].bytes + 1;
        all += bytes;
        host[b] = mem_alloc(bytes);
        out[0][b] = mem_alloc(bytes);
        out[1][b] = mem_alloc(bytes);
        memcpy(host[b], r->b[b].value, r->b[b].bytes);
    }
    r->call(&kernels_cpu, NULL, host, r->arg);
    check_places(r, skewed ? UINT32_MAX : 0, host, out);
    for (int b = 0; skewed && all <= SMALL && b < r->count; b++)
        check_places(r, 1u << b, host, out);
    for (int b = 0; b < r->count; b++) {
        mem_free(host[b]);
        mem_free(out[0][b]);
        mem_free(out[1][b]);
    }
    finish(r);
}

/* ---- errors ---- */

static void no_such_gpu(void **state)
{
    (void)state;
    struct workers *w = NULL;
    status *st = plugin->open(&(struct ops_options){ .index = 1000, .own_gemm = true }, &w);
    assert_int_equal(status_code(st), ST_DEVICE);
    assert_non_null(strstr(status_message(st), "1000"));
    assert_null(w);
    status_free(st);
}

static void refuses(const char *name, const char *words)
{
    const struct ops_plugin *found = NULL;
    status *st = device_kernels(name, &found);
    assert_int_equal(status_code(st), ST_UNSUPPORTED);
    assert_non_null(strstr(status_message(st), words));
    assert_null(found);
    status_free(st);
}

static void no_plugin(void **state)
{
    (void)state;
    refuses("cpu", "device cpu: no plugin has kernels for it");
    assert_int_equal(setenv("TESSERA_PLUGINS", "/nowhere", 1), 0);
    refuses("cuda", "cuda was asked for, but this program was built or installed without tessera_ops_cuda.so");
}

/* 0, or why the cases cannot run on a GPU. */
static int open_gpu(void)
{
    if (!getenv("TESSERA_PLUGINS"))
        assert_int_equal(setenv("TESSERA_PLUGINS", "..", 1), 0);
    status *st = device_open("cuda", 0, &device);
    st = st ? st : device_kernels("cuda", &plugin);
    st = st ? st : device->ops->stream_open(device, &stream);
    if (!st)
        return 0;
    printf("%s: %s\n", status_code_name(status_code(st)), status_message(st));
    int code = status_code(st) == ST_DEVICE || !device ? SKIPPED : 1;
    status_free(st);
    return code;
}

int main(int argc, char **argv)
{
#define CASE(name) { #name, test_##name, NULL, NULL, NULL },
    const struct CMUnitTest tests[] = {
        CUDA_CASES(CASE) cmocka_unit_test(no_such_gpu),
    };
    const struct CMUnitTest without[] = { cmocka_unit_test(no_plugin) };
    plugin = ops_plugin();
    int rc = argc > 2 && !strcmp(argv[1], "--device") && !strcmp(argv[2], "cuda") ? open_gpu() : 0;
    if (rc)
        return rc;
    rc = cmocka_run_group_tests(tests, open_all, close_all);
    rc += device ? 0 : cmocka_run_group_tests(without, NULL, NULL);
    if (device)
        device->ops->stream_close(device, stream);
    device_close(device);
    return rc;
}
