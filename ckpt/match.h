/* match: which tensors of a state are loaded from which of a step: selection by part and name, renamed roles, what fits
 * and what does not, and where the bytes go.
 *
 * All ranks get the same lists: of wanted tensors that the step does not store (missing), of stored ones in the parts
 * that are loaded from which no rank wants (unexpected), and of stored ones of another shape or type (misshapen). */
#ifndef TESSERA_CKPT_MATCH_H
#define TESSERA_CKPT_MATCH_H

#include "ckpt/loadpipe.h"
#include "ckpt/state.h"
#include "comm/device/device.h"

enum { MATCH_LISTS = 3 }; /* enum tessera_load_list */

/* Names, "part/name", sorted. Zeroed is empty. */
struct match_lists {
    char *text;        /* what the names point into */
    const char **name; /* of the first list, then of the second, ... */
    size_t count[MATCH_LISTS];
};
void match_lists_free(struct match_lists *l);

/* Where a piece's elements arrive if they cannot go to its memory at once: strides, a device, another type. */
struct match_bounce {
    void *data; /* NULL: they go there at once */
    enum dtype stored;
};

/* What a load fills on this rank: a want for each piece that has elements. */
struct match_fill {
    struct load_want *want;
    uint64_t count;
    struct match_bounce *bounce; /* [the state's pieces] */
};
void match_fill_free(struct match_fill *f, size_t pieces);

/* Whether a list of patterns (tessera_load_options) lets a text in: the last pattern that fits decides; before the
 * first one, everything is in if it is a negation, or there is none. */
bool match_selected(const char *const *patterns, const char *text);
/* A checked copy of the caller's options with NULL as the defaults. INVALID. */
status *match_options(const struct tessera_load_options *in, struct tessera_load_options *out) WARN_UNUSED;

/* Collective; the error is agreed. *lists is replaced in any case; INVALID or NOT_FOUND: o does not allow what is in
 * them. Free *fill after an error too. */
status *match_state(struct comm *c, const struct device *dev, const struct metadata *m, const tessera_state *s,
                    const struct tessera_load_options *o, struct match_fill *fill,
                    struct match_lists *lists) WARN_UNUSED;
/* From the bounce buffers to where the pieces live. Local. */
status *match_place(struct device *dev, const tessera_state *s, const struct match_fill *f) WARN_UNUSED;

#endif
