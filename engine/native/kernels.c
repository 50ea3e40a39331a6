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
PUBLIC int holdfast_version(void) { return 2; }

enum { LINE_BYTES = 64, MAX_THREADS = 64, STEP_BYTES = 256 << 10, MAX_VECTORS = 64 };

struct run {
    uint64_t to, from, size_bytes;
};

struct share {
    const struct run *runs;
    uint64_t begin, end; /* of the runs joined together */
};

/* memcpy that does not fetch the destination into the caches first: a third less to move. glibc does so only for
 * single copies beyond three quarters of the last cache, which on servers is more than any tensor has. */
static void stream(unsigned char *to, const unsigned char *from, size_t size_bytes) {
#if defined(__SSE2__)
    size_t head = -(uintptr_t)to % LINE_BYTES;
    if (head > size_bytes)
        head = size_bytes;
    memcpy(to, from, head);
    to += head, from += head, size_bytes -= head;
    for (; size_bytes >= LINE_BYTES; size_bytes -= LINE_BYTES, to += LINE_BYTES, from += LINE_BYTES) {
        const __m128i *in = (const __m128i *)from;
        __m128i *out = (__m128i *)to;
        __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
        __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    _mm_sfence(); /* whoever is told that the copy is done has to see it */
#endif
    memcpy(to, from, size_bytes);
}

static void *copy_share(void *argument) {
    const struct share *share = argument;
    const struct run *run = share->runs;
    uint64_t at = 0; /* where `run` begins */
    for (; at < share->end; at += run->size_bytes, run++) {
        uint64_t begin = share->begin > at ? share->begin - at : 0;
        uint64_t end = share->end - at < run->size_bytes ? share->end - at : run->size_bytes;
        if (begin < end)
            stream((unsigned char *)(uintptr_t)run->to + begin, (const unsigned char *)(uintptr_t)run->from + begin,
                   end - begin);
    }
    return NULL;
}

/* Copy every run. `threads` share the bytes evenly, the caller is one of them. */
PUBLIC void holdfast_copy(const struct run *runs, size_t count, int threads) {
    struct share shares[MAX_THREADS];
    pthread_t others[MAX_THREADS];
    int started[MAX_THREADS];
    uint64_t total = 0;
    for (size_t i = 0; i < count; i++)
        total += runs[i].size_bytes;
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    for (int i = 0; i < threads; i++) {
        shares[i] = (struct share){runs, total / threads * i, i == threads - 1 ? total : total / threads * (i + 1)};
        started[i] = i > 0 && pthread_create(&others[i], NULL, copy_share, &shares[i]) == 0;
    }
    for (int i = 0; i < threads; i++)
        if (!started[i])
            copy_share(&shares[i]);
    for (int i = 0; i < threads; i++)
        if (started[i])
            pthread_join(others[i], NULL);
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

/* Fill the views, one after the other, from byte `offset` with what the page cache holds, and digest each block.
 * By way of a buffer that stays in the processor's cache: memory is read once and written once. Returns the bytes
 * filled, whole blocks: fewer than all when the rest is not at hand or the file ends; or -errno. */
PUBLIC int64_t holdfast_read_at_hand(int fd, uint64_t offset, const struct view *views, uint64_t total_bytes,
                                     uint64_t block_bytes, unsigned char *digests) {
#if defined(RWF_NOWAIT)
    _Alignas(LINE_BYTES) unsigned char step[STEP_BYTES];
    uint64_t step_bytes = STEP_BYTES / block_bytes * block_bytes;
    uint64_t behind = 0; /* bytes of *views */
    if (!step_bytes)
        return -ENOTSUP;
    for (uint64_t at = 0; at < total_bytes; at += step_bytes) {
        uint64_t want = total_bytes - at < step_bytes ? total_bytes - at : step_bytes;
        struct iovec vector = {step, want};
        ssize_t got = preadv2(fd, &vector, 1, (off_t)(offset + at), RWF_NOWAIT);
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (got < (ssize_t)want)
            return (int64_t)at;
        holdfast_block_digests(step, want, block_bytes, digests);
        digests += step_bytes / block_bytes * sizeof(XXH64_canonical_t);
        for (uint64_t done = 0; done < want;) {
            uint64_t left = views->size_bytes - behind, run = left < want - done ? left : want - done;
            stream((unsigned char *)(uintptr_t)views->to + behind, step + done, run);
            done += run, behind += run;
            if (behind == views->size_bytes)
                views++, behind = 0;
        }
    }
    return (int64_t)total_bytes;
#else
    return -ENOTSUP;
#endif
}
