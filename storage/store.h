/* store: puts bytes somewhere durable and gets ranges of them back. Opened by URI; one file a backend.
 *
 *   file:PATH, file:///PATH or a bare PATH  a directory (made if it is missing)        store_posix.c
 *   s3://BUCKET, s3://BUCKET/PREFIX         a bucket of an object store, or what is below a prefix   store_s3.c
 *   mem:                                     this handle's own memory, for tests        store_mem.c
 *
 * Keys are relative paths ("step-000000000100/model-00000.a1b2.h5"): segments of 1 to 255 of [A-Za-z0-9._-], none "."
 * or "..", none beginning with ".tmp-" (names of unfinished objects, which lists leave out); store.c refuses others, so
 * nothing outside the root can be named. All functions may be called from any thread.
 *
 * Durability: what store_put and store_writer_finish have returned NULL for survives a crash of the machine. Nothing of
 * a writer is visible under its key before finish. An implementation must not print, must not keep buffers after
 * return, and reports short transfers as errors (store.c loops on partial ones). */
#ifndef TESSERA_STORAGE_STORE_H
#define TESSERA_STORAGE_STORE_H

#include "comm/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct store;

struct store_info {
    uint64_t bytes;
    uint64_t mtime_ns; /* by the storage's clock, which may count whole seconds */
    bool is_dir;
};

struct store_entry {
    char *name; /* last segment */
    struct store_info info;
};
struct store_list {
    struct store_entry *entry; /* sorted by name */
    size_t count;
};

enum store_put_mode { STORE_REPLACE, STORE_EXCLUSIVE /* EXISTS if the key is there; atomic against racing puts */ };

/* What address, and what offset and length, must be multiples of for bytes to go to storage straight from the caller's
 * memory. {0, 0}: no bytes do. */
struct store_direct {
    uint32_t memory, offset;
};

struct store_writer {
    struct store *store;
    uint64_t bytes; /* full length, promised at open */
    char *key;
    void *impl;
};

struct store_extent {
    uint64_t offset, bytes;
};

enum { STORE_KEY_BYTES = 512 }; /* longest key, with its NUL */

struct store_ops {
    const char *name;
    const char *scheme;                                              /* "file" */
    status *(*open)(struct store *s, const char *path, bool create); /* path: what follows "scheme:" */
    void (*close)(struct store *s);
    status *(*put)(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode);
    /* up to n bytes from offset; *got = 0 at the end */
    status *(*get)(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got);
    /* the same past the host's cache; NULL: there is none, get serves */
    status *(*get_direct)(struct store *s, const char *key, uint64_t offset, void *buf, size_t n, size_t *got);
    /* NULL, all three: gets serve. bytes from offset, read in order; *got < n only at the object's end; read and close
     * by one thread at a time. What was open when the store is closed need not work any more */
    status *(*stream_open)(struct store *s, const char *key, uint64_t offset, uint64_t bytes, void **impl);
    status *(*stream_read)(void *impl, void *buf, size_t n, size_t *got);
    void (*stream_close)(void *impl);
    status *(*stat)(struct store *s, const char *key, struct store_info *out);
    /* children of dir ("" = root), not sorted; a missing dir has none. out is empty at the start; freed by store.c on
     * error */
    status *(*list)(struct store *s, const char *dir, struct store_list *out);
    /* one object or empty directory; missing is fine, EXISTS: a directory that is not empty */
    status *(*remove)(struct store *s, const char *key);
    status *(*remove_tree)(struct store *s, const char *dir); /* everything below; missing is fine */
    /* NULL: this store cannot. NOT_FOUND: no such dir; EXISTS: something is at `to` */
    status *(*rename_tree)(struct store *s, const char *from, const char *to);
    /* remove what dead writers and puts left in dir, if their key has `mark` in its last segment. NULL: they leave
     * nothing */
    status *(*sweep)(struct store *s, const char *dir, const char *mark);
    status *(*now)(struct store *s, uint64_t *ns); /* the storage's clock */
    status *(*writer_open)(struct store_writer *w);
    status *(*extents)(struct store_writer *w, const struct store_extent *e, size_t n); /* NULL: of no use */
    status *(*write)(struct store_writer *w, uint64_t offset, const void *buf, size_t n,
                     size_t *put);                         /* may be partial */
    status *(*finish)(struct store_writer *w);             /* durable and visible; frees impl, also on error */
    void (*abort)(struct store_writer *w);                 /* nothing stays; frees impl */
    struct store_direct (*direct)(struct store_writer *w); /* NULL: {0, 0} */
    bool sequential;                                       /* wants writes in file order */
    int streams;            /* requests at once, of a rank with cores of its own, that its rate comes from; 0: a disk */
    uint64_t request_bytes; /* longer streams cost little less a byte; 0: no stream does */
    bool retries;           /* has its own: what it calls UNAVAILABLE is final */
};

struct store {
    const struct store_ops *ops;
    char *uri;
    void *impl;
    _Atomic uint64_t retries; /* operations that were tried again, so far */
};

/* Open by URI. create: make what is missing (writing jobs); otherwise NOT_FOUND. INVALID names the known schemes. */
status *store_open(const char *uri, bool create, struct store **out) WARN_UNUSED;
void store_close(struct store *s); /* NULL is fine */
status *store_check_key(const char *key) WARN_UNUSED;

/* The functions of the table, with keys checked, transfers looped until whole, and UNAVAILABLE retried with a bounded
 * backoff. put: durable when it returns; at any time a reader sees the old object, the new one, or none. */
status *store_put(struct store *s, const char *key, const void *buf, size_t n, enum store_put_mode mode) WARN_UNUSED;
/* Exactly n bytes from offset; CORRUPT names key, offset and the length found when the object ends before. */
status *store_get(struct store *s, const char *key, uint64_t offset, void *buf, size_t n) WARN_UNUSED;
/* The same for bytes that are wanted once: they go straight to buf where the store can, and stay in no cache. For that,
 * buf - offset must be a multiple of STORE_DIRECT_BYTES (of some more on a few disks); right whatever it is. */
enum { STORE_DIRECT_BYTES = 512 };
status *store_get_direct(struct store *s, const char *key, uint64_t offset, void *buf, size_t n) WARN_UNUSED;
/* Bytes [offset, offset + bytes) of an object that are wanted in order, a bit at a time: one request, where requests
 * cost time, whose answer waits while nobody reads on. The store must stay open. One thread at a time. */
struct store_stream;
status *store_stream_open(struct store *s, const char *key, uint64_t offset, uint64_t bytes,
                          struct store_stream **out) WARN_UNUSED;
/* The next n bytes exactly, at most what is left; errors as store_get. After an error: close it. */
status *store_stream_read(struct store_stream *k, void *buf, size_t n) WARN_UNUSED;
/* Where the next byte lies in the object. */
uint64_t store_stream_at(const struct store_stream *k);
void store_stream_close(struct store_stream *k); /* NULL is fine; it need not have been read to its end */
/* A whole object of at most `max` bytes; *buf is the caller's to mem_free, with a NUL after its last byte. */
status *store_get_all(struct store *s, const char *key, size_t max, void **buf, size_t *n) WARN_UNUSED;
status *store_stat(struct store *s, const char *key, struct store_info *out) WARN_UNUSED;
status *store_list(struct store *s, const char *dir, struct store_list *out) WARN_UNUSED;
void store_list_free(struct store_list *l);
status *store_remove(struct store *s, const char *key) WARN_UNUSED;
status *store_remove_tree(struct store *s, const char *dir) WARN_UNUSED;
status *store_rename_tree(struct store *s, const char *from,
                          const char *to) WARN_UNUSED; /* UNSUPPORTED where it cannot */
status *store_sweep(struct store *s, const char *dir, const char *mark) WARN_UNUSED;
status *store_now(struct store *s, uint64_t *ns) WARN_UNUSED;

/* For backends: append a copy of name. */
status *store_list_add(struct store_list *l, const char *name, const struct store_info *info) WARN_UNUSED;

/* One writer an object; write from any thread at any offset below `bytes`, each byte at most once; then finish or
 * abort, which free w. Gaps that nobody wrote read back as zero (padding between datasets). */
status *store_writer_open(struct store *s, const char *key, uint64_t bytes, struct store_writer **out) WARN_UNUSED;
status *store_write(struct store_writer *w, uint64_t offset, const void *buf, size_t n) WARN_UNUSED;
/* What will be written, and nothing else, said before the first write; ascending, apart. A store that keeps an object
 * in parts cuts it where extents begin, so that a write of a whole part need not be copied, and sends a part as soon as
 * its extents are there, not when all is finished. Each may be written in several writes. */
status *store_writer_extents(struct store_writer *w, const struct store_extent *e, size_t n) WARN_UNUSED;
/* How writes can spare themselves a copy. A hint: any write is right whatever its alignment, and the answer may turn to
 * {0, 0} at any time, when the storage refuses after all. */
struct store_direct store_writer_direct(struct store_writer *w);
status *store_writer_finish(struct store_writer *w) WARN_UNUSED;
void store_writer_abort(struct store_writer *w); /* NULL is fine */

extern const struct store_ops *const store_registry[]; /* generated; ends with NULL */

#endif
