/* pin: "I am reading this step": an object of a reader that retention, rm and gc of others respect until it expires.
 *
 * PINS/RANDOM holds the step and for how long it counts after it was last written, by the storage's clock. It is put
 * before the reader looks at the step, rewritten by a thread while it reads, removed when it is done. A reader that
 * dies, or is stopped for too long, holds nothing up for longer than that. A pin is a courtesy, not a lock: a step
 * that was listed for removal before the pin was there goes, and a reader that may not write to the root has none; the
 * reader notices and takes a newer step (load.c). No commit ever waits for a pin, only a removal is put off. */
#ifndef TESSERA_CKPT_PIN_H
#define TESSERA_CKPT_PIN_H

#include "ckpt/commit.h"

enum { PIN_SECONDS = 60 };

struct pin;
/* seconds 0: PIN_SECONDS. *out is NULL where the root cannot be written to. Fails only for want of memory or threads.
 */
status *pin_open(struct store *s, uint64_t step, uint32_t seconds, struct pin **out) WARN_UNUSED;
uint64_t pin_step(const struct pin *p);
void pin_close(struct pin *p); /* NULL is fine */

/* The steps with pins that have not expired, ascending, each once or more. Expired ones are removed if `tidy`. What
 * cannot be read as a pin counts for no step, and expires as others do. */
status *pins_read(struct store *s, bool tidy, struct step_list *out) WARN_UNUSED;
bool pins_hold(const struct step_list *l, uint64_t step);

#endif
