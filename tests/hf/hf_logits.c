/* hf_logits FOLDER...: the model in each folder, read as a run with model.init_from reads it, against the logits of
 * transformers in FOLDER/logits.safetensors (tests/hf/make_logits.py). Prints the largest difference of each; exit
 * status 1 if one is above 2e-3. */
#include "comm/base/log.h"
#include "comm/base/mem.h"
#include "comm/comm.h"
#include "trainer/hf/hf_config.h"
#include "trainer/hf/hf_load.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const double tolerance = 2e-3;

static status *open_model(const char *folder, struct model **out)
{
    struct hf_config c;
    const struct model_ops *ops = NULL;
    TRY(hf_config_read(folder, &c));
    TRY(model_lookup(hf_config_get(&c, "kind"), &ops));
    void *config = mem_calloc(1, ops->config_bytes);
    status *st = config ? options_defaults(ops->options, config) : ERR(NO_MEMORY, "%s", folder);
    for (int i = 0; i < c.count && !st; i++)
        st = options_set(ops->options, c.set[i].key, c.set[i].value, config, folder);
    if (!st)
        st = model_open(ops, config, 1, out);
    if (config)
        options_fini(ops->options, config);
    mem_free(config);
    return st;
}

/* A whole tensor of FOLDER/logits.safetensors; the caller frees it. */
static status *take(struct safetensors *s, const char *name, enum dtype dtype, void **out, const struct safetensor **t)
{
    *t = safetensors_find(s, name);
    if (!*t || (*t)->dtype != dtype)
        return ERR(INVALID, "%s/logits.safetensors has no %s of that type", s->url, name);
    struct piece whole = piece_whole(&(*t)->shape);
    *out = mem_alloc((*t)->bytes);
    return *out ? safetensors_read(s, *t, &whole, *out) : ERR(NO_MEMORY, "%s", name);
}

/* The largest difference of hidden head^T from want [n, v]. */
static double differ(const struct tensor *hidden, const struct tensor *head, const float *want, int64_t v)
{
    double most = 0;
    int64_t c = hidden->dim[1];
    for (int64_t i = 0; i < hidden->dim[0]; i++)
        for (int64_t j = 0; j < v; j++) {
            double sum = 0;
            for (int64_t k = 0; k < c; k++)
                sum += (double)((float *)hidden->data)[i * c + k] * (double)((float *)head->data)[j * c + k];
            double d = fabs(sum - (double)want[i * v + j]);
            most = d <= most ? most : d; /* NaN counts */
        }
    return most;
}

static status *run(struct model *m, const int64_t *id, int64_t n, const float *want, int64_t v, double *most)
{
    struct tape *t;
    int32_t *token = mem_array(NULL, (size_t)n, sizeof *token),
            *position = mem_array(NULL, (size_t)n, sizeof *position), offset[2] = { 0, (int32_t)n };
    if (!token || !position)
        return ERR(NO_MEMORY, "%lld tokens", (long long)n);
    for (int32_t i = 0; i < n; i++) {
        token[i] = (int32_t)id[i];
        position[i] = i;
    }
    struct model_input in = { .tokens = n, .token = token, .seg = { 1, offset, position } };
    TRY(tape_open(NULL, NULL, 0, &t));
    tape_begin(t, TAPE_FORWARD);
    struct tensor *hidden = m->ops->forward(m, t, &in);
    status *st = tape_end(t);
    if (!st)
        *most = differ(hidden, m->ops->head(m), want, v);
    tape_close(t);
    mem_free(token);
    mem_free(position);
    return st;
}

static status *compare(struct comm *self, const char *folder, double *most)
{
    char path[512];
    struct safetensors *s = NULL;
    const struct safetensor *ids = NULL, *logits = NULL;
    struct model *m = NULL;
    void *id = NULL, *want = NULL;
    uint64_t read;
    snprintf(path, sizeof path, "%s/logits.safetensors", folder);
    status *st = safetensors_open(path, &s);
    if (!st)
        st = take(s, "input_ids", DTYPE_I64, &id, &ids);
    if (!st)
        st = take(s, "logits", DTYPE_F32, &want, &logits);
    if (!st)
        st = open_model(folder, &m);
    if (!st && (logits->shape.ndim != 2 || logits->shape.dim[0] != ids->shape.dim[0] ||
                logits->shape.dim[1] != (uint64_t)m->vocab))
        st = ERR(INVALID, "%s: logits are not [tokens, vocabulary]", path);
    if (!st)
        st = params_alloc(&m->params, false);
    if (!st)
        st = hf_load(self, folder, &m->params, &read);
    if (!st)
        st = run(m, id, (int64_t)ids->shape.dim[0], want, m->vocab, most);
    model_close(m);
    mem_free(id);
    mem_free(want);
    safetensors_close(s);
    return st;
}

int main(int argc, char **argv)
{
    struct comm *self = NULL;
    struct log log = { LOG_INFO, -1 };
    status *st = argc < 2 ? ERR(INVALID, "hf_logits: which FOLDER?") : comm_open("self", NULL, NULL, &self);
    int failed = 0;
    for (int i = 1; i < argc && !st; i++) {
        double most = 0;
        st = compare(self, argv[i], &most);
        if (st)
            break;
        failed += !(most <= tolerance);
        printf("%s: logits differ by %.2g at most%s\n", argv[i], most, most <= tolerance ? "" : ": TOO MUCH");
    }
    comm_close(self);
    log_status(&log, LOG_ERROR, st);
    int code = status_exit_code(st);
    status_free(st);
    return code ? code : failed > 0;
}
