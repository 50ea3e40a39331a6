/* Loops over a checkpoint's bytes, called through ctypes, which lets go of the GIL meanwhile. None of them checks
 * its arguments: kernels.py does. */

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define XXH_INLINE_ALL
#include "xxhash.h"

#define PUBLIC __attribute__((visibility("default")))

/* Raised with every change of a signature below: a library that was built from older source is not used. */
PUBLIC int holdfast_version(void) { return 4; }

/* Whether this processor runs what kernels_avx2.c is built to. */
PUBLIC int holdfast_runs_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

enum { LINE_BYTES = 64, MAX_THREADS = 64, STEP_BYTES = 256 << 10, PIECE_BYTES = 4096, TURN_BLOCKS = 16 };

struct run {
    uint64_t to, from, size_bytes;
};

struct fill {
    unsigned char *file;
    const struct run *runs, *runs_end;
    uint64_t next, end, file_bytes, block_bytes; /* bytes before `next` are somebody's */
    unsigned char *digests;
};

/* memcpy that does not fetch the destination into the caches first: a third less to move. glibc does so only for
 * single copies beyond three quarters of the last cache, which on servers is more than any tensor has. With `keep`,
 * the same bytes go there too, to stay in the cache. */
static void stream(unsigned char *to, unsigned char *keep, const unsigned char *from, size_t size_bytes) {
#if defined(__SSE2__)
    size_t head = -(uintptr_t)to % LINE_BYTES;
    if (head > size_bytes)
        head = size_bytes;
    memcpy(to, from, head);
    if (keep)
        memcpy(keep, to, head), keep += head;
    to += head, from += head, size_bytes -= head;
    for (; size_bytes >= LINE_BYTES; size_bytes -= LINE_BYTES, to += LINE_BYTES, from += LINE_BYTES) {
        const __m128i *in = (const __m128i *)from;
        __m128i *out = (__m128i *)to, *kept = (__m128i *)keep;
        __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
        __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
        if (keep) {
            _mm_storeu_si128(kept, a);
            _mm_storeu_si128(kept + 1, b);
            _mm_storeu_si128(kept + 2, c);
            _mm_storeu_si128(kept + 3, d);
            keep += LINE_BYTES;
        }
    }
#endif
    memcpy(to, from, size_bytes);
    if (keep)
        memcpy(keep, to, size_bytes); /* not `from`: what is digested has to be what lies in the file */
}

/* Whoever is told that streamed copies are done has to see them. */
static void settle(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Bytes that are wanted next come from memory while the ones before are digested. */
static void fetch(const unsigned char *from, size_t size_bytes) {
    for (size_t at = 0; at < size_bytes; at += LINE_BYTES)
        __builtin_prefetch(from + at);
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Make bytes [at, end) of the file what `run` and the runs after it say, and leave a copy in `piece`. Returns the
 * first run that reaches beyond. */
static const struct run *fill_piece(const struct fill *fill, const struct run *run, uint64_t at, uint64_t end,
                                    unsigned char *piece) {
    while (at < end) {
        unsigned char *to = fill->file + at;
        while (run < fill->runs_end && run->to + run->size_bytes <= (uintptr_t)to)
            run++;
        uint64_t size_bytes = end - at;
        if (run < fill->runs_end && run->to <= (uintptr_t)to) {
            uint64_t into = (uintptr_t)to - run->to, left = run->size_bytes - into;
            const unsigned char *from = (const unsigned char *)(uintptr_t)run->from + into;
            size_bytes = least(size_bytes, left);
            stream(to, piece, from, size_bytes);
            fetch(from + size_bytes, least(PIECE_BYTES, left - size_bytes));
        } else { /* here already */
            if (run < fill->runs_end)
                size_bytes = least(size_bytes, run->to - (uintptr_t)to);
            memcpy(piece, to, size_bytes);
        }
        at += size_bytes, piece += size_bytes;
    }
    return run;
}

static const struct run *fill_blocks(const struct fill *fill, const struct run *run, uint64_t begin, uint64_t to) {
    _Alignas(LINE_BYTES) unsigned char piece[PIECE_BYTES];
    XXH3_state_t state;
    for (uint64_t end; begin < to; begin = end) {
        end = least(begin + fill->block_bytes, to);
        XXH3_64bits_reset(&state);
        for (uint64_t at = begin; at < end; at += PIECE_BYTES) {
            uint64_t piece_end = least(at + PIECE_BYTES, end);
            run = fill_piece(fill, run, at, piece_end, piece);
            XXH3_64bits_update(&state, piece, piece_end - at);
        }
        if (end == least(begin + fill->block_bytes, fill->file_bytes))
            XXH64_canonicalFromHash((XXH64_canonical_t *)fill->digests + begin / fill->block_bytes,
                                    XXH3_64bits_digest(&state));
    }
    return run;
}

/* A few blocks at a time: a thread that another program holds up does not hold up the others. */
static void *take_turns(void *argument) {
    struct fill *fill = argument;
    const struct run *run = fill->runs;
    uint64_t turn_bytes = TURN_BLOCKS * fill->block_bytes, begin;
    while ((begin = __atomic_fetch_add(&fill->next, turn_bytes, __ATOMIC_RELAXED)) < fill->end)
        run = fill_blocks(fill, run, begin, least(begin + turn_bytes, fill->end));
    settle();
    return NULL;
}

/* Make bytes [begin, end) of a file in memory what the runs say, those between them staying as they are, and digest
 * each block that is whole then. Runs are in the order of their destinations; `begin` is on a block's boundary;
 * `digests` is the file's. `threads` share the work, the caller is one of them. */
PUBLIC void holdfast_fill(unsigned char *file, uint64_t file_bytes, uint64_t begin, uint64_t end,
                          const struct run *runs, size_t count, uint64_t block_bytes, int threads,
                          unsigned char *digests) {
    struct fill fill = {file, runs, runs + count, begin, end, file_bytes, block_bytes, digests};
    uint64_t turns = (end - begin) / (TURN_BLOCKS * block_bytes) + 1;
    pthread_t others[MAX_THREADS];
    int more = (int)least(least(threads, turns), MAX_THREADS) - 1, started = 0;
    while (started < more && pthread_create(&others[started], NULL, take_turns, &fill) == 0)
        started++;
    take_turns(&fill);
    while (started > 0)
        pthread_join(others[--started], NULL);
}

/* XXH3 of each block, the last possibly short, as 8 big-endian bytes each into `digests`. */
PUBLIC void holdfast_block_digests(const unsigned char *from, size_t size_bytes, size_t block_bytes,
                                   unsigned char *digests) {
    for (; size_bytes > 0; digests += sizeof(XXH64_canonical_t)) {
        size_t block = size_bytes < block_bytes ? size_bytes : block_bytes;
        XXH64_canonicalFromHash((XXH64_canonical_t *)digests, XXH3_64bits(from, block));
        from += block, size_bytes -= block;
    }
}

struct view {
    uint64_t to, size_bytes;
};

/* Where the next byte goes: `behind` bytes of the first view are filled. */
struct place {
    const struct view *views;
    uint64_t behind;
};

static struct place scatter(struct place place, const unsigned char *from, uint64_t size_bytes) {
    while (size_bytes > 0) {
        uint64_t run = least(place.views->size_bytes - place.behind, size_bytes);
        if (place.views->to)
            stream((unsigned char *)(uintptr_t)place.views->to + place.behind, NULL, from, run);
        from += run, size_bytes -= run, place.behind += run;
        if (place.behind == place.views->size_bytes)
            place = (struct place){place.views + 1, 0};
    }
    return place;
}

/* Piece by piece, so that writing to memory goes on while the next piece is digested. */
static struct place digest_and_scatter(struct place place, const unsigned char *from, uint64_t size_bytes,
                                       uint64_t block_bytes, unsigned char *digests) {
    XXH3_state_t state;
    for (uint64_t begin = 0, end; begin < size_bytes; begin = end, digests += sizeof(XXH64_canonical_t)) {
        end = least(begin + block_bytes, size_bytes);
        XXH3_64bits_reset(&state);
        for (uint64_t at = begin; at < end; at += PIECE_BYTES) {
            uint64_t piece_bytes = least(PIECE_BYTES, end - at);
            XXH3_64bits_update(&state, from + at, piece_bytes);
            place = scatter(place, from + at, piece_bytes);
        }
        XXH64_canonicalFromHash((XXH64_canonical_t *)digests, XXH3_64bits_digest(&state));
    }
    return place;
}

/* Copy bytes in memory into the views, one after the other, and digest each block. A view at address 0 is left
 * out. */
PUBLIC void holdfast_scatter(const unsigned char *from, const struct view *views, uint64_t total_bytes,
                             uint64_t block_bytes, unsigned char *digests) {
    digest_and_scatter((struct place){views, 0}, from, total_bytes, block_bytes, digests);
    settle();
}

/* The same with the file's bytes from `offset` on, if the page cache holds them. By way of a buffer that stays in
 * the processor's cache: memory is read once and written once. Returns the bytes filled, whole blocks: fewer than
 * all when the rest is not at hand or the file ends; or -errno. */
PUBLIC int64_t holdfast_read_at_hand(int fd, uint64_t offset, const struct view *views, uint64_t total_bytes,
                                     uint64_t block_bytes, unsigned char *digests) {
#if defined(RWF_NOWAIT)
    _Alignas(LINE_BYTES) unsigned char step[STEP_BYTES];
    uint64_t step_bytes = STEP_BYTES / block_bytes * block_bytes, at = 0;
    struct place place = {views, 0};
    if (!step_bytes)
        return -ENOTSUP;
    while (at < total_bytes) {
        uint64_t want = least(total_bytes - at, step_bytes);
        struct iovec vector = {step, want};
        ssize_t got = preadv2(fd, &vector, 1, (off_t)(offset + at), RWF_NOWAIT);
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (got < (ssize_t)want)
            break;
        place = digest_and_scatter(place, step, want, block_bytes, digests);
        digests += step_bytes / block_bytes * sizeof(XXH64_canonical_t);
        at += want;
    }
    settle();
    return (int64_t)at;
#else
    return -ENOTSUP;
#endif
}
