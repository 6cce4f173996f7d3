/* device: finds a backend by name, compiled in or as a plugin (plugin.h; the function is device_plugin), and opens it.
 */
#include "comm/device/device.h"

#include "comm/base/mem.h"
#include "comm/device/plugin.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#ifndef TESSERA_BUILD_ID
#define TESSERA_BUILD_ID "unknown"
#endif

static const struct {
    const char *name, *file;
} plugins[] = { { "cuda", "tessera_cuda.so" } };

enum { PLUGINS = sizeof plugins / sizeof *plugins };

static status *open_plugin(const char *name, const char *file, void **handle, const struct device_ops **ops)
{
    struct plugin p;
    TRY(plugin_open(name, file, "device_plugin", &p));
    device_plugin_fn *entry;
    memcpy(&entry, &p.symbol, sizeof entry);
    const struct device_plugin *said = entry();
    status *st = plugin_check(&p, said->abi, DEVICE_ABI, said->build_id, TESSERA_BUILD_ID);
    if (!st && strcmp(said->ops->name, name))
        st = ERR(UNSUPPORTED, "device: %s holds the backend %s, not %s", p.path, said->ops->name, name);
    if (st) {
        plugin_close(&p);
        return st;
    }
    *handle = p.handle;
    *ops = said->ops;
    return NULL;
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

/* d is of `name`; n: its index, or (turns) to be taken modulo the number of devices. */
static status *open_index(struct device *d, int n, bool turns)
{
    int count = 1;
    if (n < 0)
        return ERR(INVALID, "device: index %d", n);
    if (turns && d->ops->count)
        TRY(d->ops->count(&count));
    d->index = turns ? n % count : n;
    return d->ops->open(d, d->index);
}

static status *open_device(const char *name, int n, bool turns, struct device **out)
{
    struct device *d = mem_calloc(1, sizeof *d);
    if (!d)
        return ERR(NO_MEMORY, "device: handle");
    status *st = find_ops(name, &d->plugin, &d->ops);
    if (st) {
        mem_free(d);
        return st;
    }
    st = open_index(d, n, turns);
    if (st) {
        if (d->plugin)
            dlclose(d->plugin);
        mem_free(d);
        return st;
    }
    *out = d;
    return NULL;
}

status *device_open(const char *name, int index, struct device **out)
{
    return open_device(name, index, false, out);
}

status *device_open_nth(const char *name, int n, struct device **out)
{
    return open_device(name, n, true, out);
}

uint64_t device_identity(struct device *d)
{
    return d->ops->identity ? d->ops->identity(d) : (uint64_t)d->index;
}

void device_model(struct device *d, char *text, size_t bytes)
{
    if (d->ops->model)
        d->ops->model(d, text, bytes);
    else
        snprintf(text, bytes, "%s", d->ops->name);
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
