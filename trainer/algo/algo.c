/* algo: look-up by name, and the logistic function in forms that neither overflow nor cancel. */
#include "trainer/algo/algo.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

status *algo_lookup(const char *name, const struct algo_ops **out)
{
    char names[512] = "";
    for (size_t i = 0, used = 0; algo_registry[i]; i++) {
        if (!strcmp(algo_registry[i]->name, name)) {
            *out = algo_registry[i];
            return NULL;
        }
        if (used < sizeof names)
            used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", algo_registry[i]->name);
    }
    return ERR(INVALID, "no algorithm is called \"%s\" (this build has: %s)", name, names);
}

double algo_neg_log_sigmoid(double z)
{
    return (z < 0 ? -z : 0) + log1p(exp(-fabs(z)));
}

double algo_sigmoid(double z)
{
    double e = exp(-fabs(z));
    return (z < 0 ? e : 1) / (1 + e);
}
