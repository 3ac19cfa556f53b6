/* Copies that bypass the caches, of what nobody reads before they have forgotten it. */
#ifndef TRIMTAB_COPY_H
#define TRIMTAB_COPY_H

#include "job.h"
#include "vec.h"

#define PIECE (1 << 22) /* bytes that one thread takes at a time */
#define STREAMS 4       /* places of a piece that are copied in turn: memory answers them side by side */

static void copy_piece(char *to, const char *from, int64_t bytes) {
#if HAS_STREAM
    const int64_t line = W * sizeof(float), part = bytes / STREAMS / line * line;
    if ((uintptr_t)to % line == 0) {
        for (int64_t i = 0; i < part; i += line)
            for (int k = 0; k < STREAMS; k++) {
                __builtin_prefetch(from + k * part + i + 64 * line);
                vf_stream((float *)(to + k * part + i), vf_load((const float *)(from + k * part + i), W));
            }
        stream_end();
        to += STREAMS * part;
        from += STREAMS * part;
        bytes -= STREAMS * part;
    }
#endif
    memcpy(to, from, (size_t)bytes);
}

/* The item-th piece of all copies. */
static void copy_item(const Copies *all, int64_t item, int64_t *i) {
    while (all->ends[*i] <= item) ++*i;
    int64_t at = (item - (*i ? all->ends[*i - 1] : 0)) * PIECE, left = all->bytes[*i] - at;
    copy_piece((char *)all->to[*i] + at, (const char *)all->from[*i] + at, left < PIECE ? left : PIECE);
}

#endif
