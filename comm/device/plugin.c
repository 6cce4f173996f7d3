/* plugin: see plugin.h. */
#include "comm/device/plugin.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PLACES = 3 };

/* The full names to try; those that do not exist on this system are empty. */
static void places(const char *file, char path[PLACES][PLUGIN_PATH])
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
        snprintf(path[0], PLUGIN_PATH, "%.4000s/%.40s", own, file);
    if (slash) {
        snprintf(path[1], PLUGIN_PATH, "%.4000s/%.40s", folder, file);
        snprintf(path[2], PLUGIN_PATH, "%.4000s/../lib/tessera/%.40s", folder, file);
    }
}

status *plugin_open(const char *name, const char *file, const char *symbol, struct plugin *out)
{
    char path[PLACES][PLUGIN_PATH];
    places(file, path);
    for (int i = 0; i < PLACES; i++) {
        if (!*path[i] || access(path[i], F_OK) != 0)
            continue;
        void *h = dlopen(path[i], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (!h)
            return ERR(UNSUPPORTED, "device: %s was asked for, but its plugin cannot be opened: %s", name, dlerror());
        void *found = dlsym(h, symbol);
        if (!found) {
            dlclose(h);
            return ERR(UNSUPPORTED, "device: %s is no Tessera plugin (it exports no %s)", path[i], symbol);
        }
        out->handle = h;
        out->symbol = found;
        memcpy(out->path, path[i], sizeof out->path);
        return NULL;
    }
    return ERR(UNSUPPORTED,
               "device: %s was asked for, but this program was built or installed without %s (looked in "
               "$TESSERA_PLUGINS, beside the program, and in ../lib/tessera)",
               name, file);
}

status *plugin_check(const struct plugin *p, int abi, int own_abi, const char *build, const char *own_build)
{
    if (abi != own_abi)
        return ERR(UNSUPPORTED, "device: %s has plugin interface %d, this program has %d; build both together", p->path,
                   abi, own_abi);
    if (strcmp(build, own_build))
        return ERR(UNSUPPORTED, "device: %s is of build %s, this program of build %s; build both together", p->path,
                   build, own_build);
    return NULL;
}

void plugin_close(struct plugin *p)
{
    if (p->handle)
        dlclose(p->handle);
    p->handle = NULL;
}
