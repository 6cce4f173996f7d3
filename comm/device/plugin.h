/* plugin: shared objects that are opened at run time because a config asks for them. Each exports one function, which
 * returns {interface number, build id, tables}. */
#ifndef TESSERA_COMM_DEVICE_PLUGIN_H
#define TESSERA_COMM_DEVICE_PLUGIN_H

#include "comm/base/status.h"

enum { PLUGIN_PATH = 4096 + 64 };

struct plugin {
    void *handle;
    void *symbol; /* the exported function */
    char path[PLUGIN_PATH];
};

/* Open `file`, the first of these that is there: in $TESSERA_PLUGINS, beside the program, in ../lib/tessera seen from
 * there; and find `symbol` in it. It stays loaded once opened (errors that it made point to its strings). `name` is
 * what a config asked for. UNSUPPORTED: it is nowhere, or cannot be opened, or has no such symbol. */
status *plugin_open(const char *name, const char *file, const char *symbol, struct plugin *out) WARN_UNUSED;
/* UNSUPPORTED unless the plugin's interface and build are the program's. */
status *plugin_check(const struct plugin *p, int abi, int own_abi, const char *build,
                     const char *own_build) WARN_UNUSED;
void plugin_close(struct plugin *p); /* one that was never opened is fine */

#endif
