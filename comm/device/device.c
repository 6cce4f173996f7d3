/* device: finds a backend by name, compiled in or as a plugin, and opens it.
 *
 * A plugin is a shared object with one exported function, device_plugin. It stays loaded once opened (RTLD_NODELETE):
 * errors that it made point to its strings. The places searched, in order: $TESSERA_PLUGINS, the program's folder, and
 * ../lib/tessera seen from there. */
#include "comm/device/device.h"

#include "comm/base/mem.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

static const struct {
    const char *name, *file;
} plugins[] = { { "cuda", "tessera_cuda.so" } };

enum { PLUGINS = sizeof plugins / sizeof *plugins, PLACES = 3, PATH_BYTES = PATH_MAX + 64 };

/* The full names to try; those that do not exist on this system are empty. */
static void places(const char *file, char path[PLACES][PATH_BYTES])
{
    char folder[PATH_MAX] = "";
    ssize_t n = readlink("/proc/self/exe", folder, sizeof folder - 1);
    folder[n > 0 ? n : 0] = 0;
    char *slash = strrchr(folder, '/');
    if (slash)
        *slash = 0;
    const char *own = getenv("TESSERA_PLUGINS");
    path[0][0] = path[1][0] = path[2][0] = 0;
    if (own && *own)
        snprintf(path[0], PATH_BYTES, "%.4000s/%.40s", own, file);
    if (slash) {
        snprintf(path[1], PATH_BYTES, "%.4000s/%.40s", folder, file);
        snprintf(path[2], PATH_BYTES, "%.4000s/../lib/tessera/%.40s", folder, file);
    }
}

/* Check what the opened plugin says of itself. */
static status *plugin_table(void *handle, const char *name, const char *path, const struct device_ops **out)
{
    device_plugin_fn *entry;
    void *symbol = dlsym(handle, "device_plugin");
    if (!symbol)
        return ERR(UNSUPPORTED, "device: %s is no Tessera plugin (it exports no device_plugin)", path);
    memcpy(&entry, &symbol, sizeof entry);
    const struct device_plugin *p = entry();
    if (p->abi != DEVICE_ABI)
        return ERR(UNSUPPORTED, "device: %s has plugin interface %d, this program has %d; build both together", path,
                   p->abi, DEVICE_ABI);
    if (strcmp(p->build_id, TESSERA_BUILD_ID))
        return ERR(UNSUPPORTED, "device: %s is of build %s, this program of build %s; build both together", path,
                   p->build_id, TESSERA_BUILD_ID);
    if (strcmp(p->ops->name, name))
        return ERR(UNSUPPORTED, "device: %s holds the backend %s, not %s", path, p->ops->name, name);
    *out = p->ops;
    return NULL;
}

static status *open_plugin(const char *name, const char *file, void **handle, const struct device_ops **ops)
{
    char path[PLACES][PATH_BYTES];
    places(file, path);
    for (int i = 0; i < PLACES; i++) {
        if (!*path[i] || access(path[i], F_OK) != 0)
            continue;
        void *h = dlopen(path[i], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (!h)
            return ERR(UNSUPPORTED, "device: %s was asked for, but its plugin cannot be opened: %s", name, dlerror());
        status *st = plugin_table(h, name, path[i], ops);
        if (st) {
            dlclose(h);
            return st;
        }
        *handle = h;
        return NULL;
    }
    return ERR(UNSUPPORTED,
               "device: %s was asked for, but this program was built or installed without %s (looked in "
               "$TESSERA_PLUGINS, beside the program, and in ../lib/tessera)",
               name, file);
}

static status *unknown_device(const char *name)
{
    char names[256] = "";
    size_t used = 0;
    for (size_t i = 0; device_registry[i] && used < sizeof names; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", device_registry[i]->name);
    for (size_t i = 0; i < PLUGINS && used < sizeof names; i++)
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", plugins[i].name);
    return ERR(INVALID, "device: no backend is called \"%.100s\" (there are: %s)", name, names);
}

/* The table for `name`; *handle is what it was loaded from, NULL if it is compiled in. */
static status *find_ops(const char *name, void **handle, const struct device_ops **ops)
{
    *handle = NULL;
    for (size_t i = 0; device_registry[i]; i++) {
        if (!strcmp(device_registry[i]->name, name)) {
            *ops = device_registry[i];
            return NULL;
        }
    }
    for (size_t i = 0; i < PLUGINS; i++)
        if (!strcmp(plugins[i].name, name))
            return open_plugin(name, plugins[i].file, handle, ops);
    return unknown_device(name);
}

status *device_open(const char *name, int index, struct device **out)
{
    struct device *d = mem_calloc(1, sizeof *d);
    if (!d)
        return ERR(NO_MEMORY, "device: handle");
    status *st = find_ops(name, &d->plugin, &d->ops);
    if (st) {
        mem_free(d);
        return st;
    }
    d->index = index;
    st = index < 0 ? ERR(INVALID, "device: index %d", index) : d->ops->open(d, index);
    if (st) {
        if (d->plugin)
            dlclose(d->plugin);
        mem_free(d);
        return st;
    }
    *out = d;
    return NULL;
}

void device_close(struct device *d)
{
    if (!d)
        return;
    d->ops->close(d);
    if (d->plugin)
        dlclose(d->plugin);
    mem_free(d);
}
