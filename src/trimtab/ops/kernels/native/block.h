/* A step on a block of neighbouring entries, all of it in fp32: the loop that the time goes into.
 *
 * What a block needs is a set of flags; frequent sets are compiled into loops of their own, all others share one. */
#ifndef TRIMTAB_BLOCK_H
#define TRIMTAB_BLOCK_H

#include "arithmetic.h"

enum {
    /* where Adam's u comes from */
    FROM_GRAD = 1,    /* the moments are advanced */
    FROM_MOMENTS = 2, /* they have been already */
    FROM_UPDATE = 4,  /* Δ is given in full */
    ANCHORED = 8,
    MERGES = 16,
    /* what F does to Δ and to τ; neither: nothing */
    DRAW_UPDATE = 32,
    CUT_UPDATE = 64,
    DRAW_TAU = 128,
    CUT_TAU = 256,
    FACTORS = 512,
    VOTES = 1024,            /* ⊕ is sign */
    VOTES_UNWEIGHTED = 2048, /* ⊕ is sign_unweighted */
    DECAYS_AFTER = 4096,
    REOPENS = 8192,
    MAXIMIZES = 16384,
    LERPS_FAR = 32768,
    SCATTERED = 65536, /* indices are listed */
};

#define OF_DELTA (FROM_GRAD | FROM_MOMENTS | FROM_UPDATE | ANCHORED | MAXIMIZES | LERPS_FAR) /* what Δ depends on */
#define PLACES 4  /* of a chunk of few arrays, that are worked on in turn */
#define AHEAD 512 /* entries: distance of prefetching */

typedef struct {
    float *param;
    const float *grad;
    float *first, *second;
    const float *tau;
    float *anchor;
    float *update;
    const uint32_t *index;
    uint32_t base; /* lower half of the first entry's global index */
    int n;
    int direct; /* the arrays are the tensors themselves, worth prefetching */
    uint32_t threshold;
    Keys keys;
    Cut cuts[2];
    Adam adam;
    float before, after, anchor_decay, weight_update, weight_tau, factor_update, factor_tau;
} Block;

/* Δ in full: u, or what has been gathered since the anchor and u. */
INLINE vf full_update(const int flags, vf moved, vf u) {
    if (!(flags & (FROM_GRAD | FROM_MOMENTS))) return moved;
    u = vf_add(u, vf_set(0.0f)); /* it is added to zeros: never −0 */
    return flags & ANCHORED ? vf_add(moved, u) : u;
}

/* u, the moments advanced (and stored where `keeps`). */
INLINE vf adam_lanes(const Block *b, const int flags, const int keeps, int i, int k) {
    vf m = vf_load(b->first + i, k), v = vf_load(b->second + i, k);
    if (flags & FROM_GRAD) {
        vf g = vf_load(b->grad + i, k);
        if (flags & MAXIMIZES) g = vf_neg(g);
        m = first_moment(m, g, b->adam, flags & LERPS_FAR);
        v = second_moment(v, g, b->adam);
        if (keeps) {
            vf_store(b->first + i, m, k);
            vf_store(b->second + i, v, k);
        }
    }
    return adam_update(m, v, b->adam);
}

/* `index`: the entries' global indices, unless they are listed. */
INLINE void step_lanes(const Block *b, const int flags, vu index, int i, int k) {
    vf theta = vf_mul(vf_load(b->param + i, k), vf_set(b->before)), u = vf_set(0.0f), result;
    if (flags & (FROM_GRAD | FROM_MOMENTS)) u = adam_lanes(b, flags, 1, i, k);
    if (flags & MERGES) {
        vf base = flags & ANCHORED ? vf_mul(vf_load(b->anchor + i, k), vf_set(b->anchor_decay)) : theta;
        vf x = flags & FROM_UPDATE ? vf_load(b->update + i, k) : full_update(flags, vf_sub(theta, base), u);
        vf y = vf_load(b->tau + i, k);
        vu word = index;
        if (flags & SCATTERED) index = vu_load(b->index + i, k);
        if (flags & (DRAW_UPDATE | DRAW_TAU)) word = hash(index, b->keys.k0, b->keys.k1);
        if (flags & DRAW_UPDATE)
            x = vf_keep(drawn(vu_and(word, vu_set(0xFFFF0000u)), b->threshold, index, b->keys, 0), x);
        if (flags & DRAW_TAU) y = vf_keep(drawn(vu_left(word, 16), b->threshold, index, b->keys, 1), y);
        if (flags & CUT_UPDATE) x = vf_keep(above_cut(x, index, b->cuts[0]), x);
        if (flags & CUT_TAU) y = vf_keep(above_cut(y, index, b->cuts[1]), y);
        if (flags & FACTORS) {
            x = vf_mul(x, vf_set(b->factor_update));
            y = vf_mul(y, vf_set(b->factor_tau));
        }
        int consensus = flags & VOTES ? SIGN : flags & VOTES_UNWEIGHTED ? SIGN_UNWEIGHTED : LINEAR;
        result = vf_add(base, bracket(x, y, b->weight_update, b->weight_tau, consensus));
    } else {
        result = flags & (FROM_GRAD | FROM_MOMENTS) ? vf_add(theta, u) : theta;
    }
    if (flags & DECAYS_AFTER) result = vf_mul(result, vf_set(b->after));
    vf_store(b->param + i, result, k);
    if (flags & REOPENS) vf_store(b->anchor + i, result, k);
}

INLINE void prefetch(const float *p, const int writes) {
    if (writes)
        __builtin_prefetch(p + AHEAD, 1);
    else
        __builtin_prefetch(p + AHEAD, 0);
}

INLINE void prefetch_lanes(const Block *b, const int flags, int i) {
    prefetch(b->param + i, 1);
    if (flags & (FROM_GRAD | FROM_MOMENTS)) {
        prefetch(b->first + i, flags & FROM_GRAD);
        prefetch(b->second + i, flags & FROM_GRAD);
    }
    if (flags & FROM_GRAD) prefetch(b->grad + i, 0);
    if (flags & MERGES) prefetch(b->tau + i, 0);
    if (flags & ANCHORED) prefetch(b->anchor + i, flags & REOPENS);
    if (flags & FROM_UPDATE) prefetch(b->update + i, 0);
}

INLINE void step_loop(const Block *shared, const int flags) {
    const Block own = *shared, *b = &own; /* a copy that no store can reach: its fields stay in registers */
    vu index = vu_add(vu_lanes(), vu_set(b->base));
    int i = 0;
    if (flags & ANCHORED && b->direct) { /* few arrays: places in turn, which memory answers side by side */
        const int part = b->n / (PLACES * W) * W;
        for (; i < part; i += W) {
            for (int k = 0; k < PLACES * part; k += part) {
                prefetch_lanes(b, flags, i + k);
                step_lanes(b, flags, vu_add(index, vu_set((uint32_t)(i + k))), i + k, W);
            }
        }
        i = PLACES * part;
        index = vu_add(index, vu_set((uint32_t)i));
    }
    for (; i + W <= b->n; i += W) {
        if (b->direct) prefetch_lanes(b, flags, i);
        step_lanes(b, flags, index, i, W);
        index = vu_add(index, vu_set(W));
    }
    if (i < b->n) step_lanes(b, flags, index, i, b->n - i);
}

static __attribute__((noinline)) void step_any(const Block *b, int flags) { step_loop(b, flags); }

#define FREQUENT(flags)                                                                                                \
    case flags:                                                                                                        \
        step_loop(b, flags);                                                                                           \
        return;

static __attribute__((noinline)) void step_block(const Block *b, int flags) {
    switch (flags) {
        FREQUENT(FROM_GRAD)                                                       /* the plain step */
        FREQUENT(FROM_GRAD | MERGES | DRAW_UPDATE)                                /* OnDARE, τ masked once */
        FREQUENT(FROM_GRAD | MERGES | DRAW_UPDATE | DRAW_TAU)                     /* OnDARE */
        FREQUENT(FROM_GRAD | MERGES | CUT_UPDATE | VOTES)                         /* OnTIES, bf16 moments */
        FREQUENT(FROM_UPDATE | MERGES | CUT_UPDATE | VOTES)                       /* OnTIES, from Δ in a buffer */
        FREQUENT(FROM_MOMENTS | MERGES | CUT_UPDATE | VOTES)                      /* OnTIES, of large tensors */
        FREQUENT(ANCHORED | MERGES | DRAW_UPDATE)                                 /* wrappers */
        FREQUENT(ANCHORED | MERGES | DRAW_UPDATE | DRAW_TAU)
        FREQUENT(ANCHORED | MERGES | CUT_UPDATE | VOTES)
    default: step_any(b, flags);
    }
}

/* -- looking for the cut */

#define SURVEY_SLACK W
#define BINS 2048

/* What a pass over Δ gathers: how many magnitudes lie above a bracket, and which lie inside, or how many of each size. */
typedef struct {
    uint32_t low, high; /* the bracket, both ends included */
    int64_t above;
    int64_t found;
    uint32_t *bits, *where; /* of what was found: magnitudes, local indices (where they are asked for) */
    int64_t *counts;        /* instead of these: BINS counters, of bits − low without its lowest `shift` bits */
    int shift;
} Found;

/* Δ of a block: formed, and stored where asked for. */
INLINE vf delta_lanes(const Block *b, const int flags, const int keeps, int i, int k) {
    vf u = vf_set(0.0f), moved = u;
    if (flags & FROM_UPDATE) return vf_load(b->update + i, k);
    if (flags & (FROM_GRAD | FROM_MOMENTS)) u = adam_lanes(b, flags, keeps, i, k);
    if (flags & ANCHORED) {
        vf theta = vf_mul(vf_load(b->param + i, k), vf_set(b->before));
        moved = vf_sub(theta, vf_mul(vf_load(b->anchor + i, k), vf_set(b->anchor_decay)));
    }
    vf x = full_update(flags, moved, u);
    if (b->update) vf_store(b->update + i, x, k);
    return x;
}

/* Count Δ's magnitudes. Writes at most n + SURVEY_SLACK places of each list. */
INLINE void survey_lanes(vf x, vu where, Found *found, vu *above, int k) {
    vu bits = magnitude(x);
    vm over = vu_lt(vu_set(found->high), bits), inside = vm_and(vm_not(over), vu_le(vu_set(found->low), bits));
    if (k < W) {
        over = vm_and(over, first_lanes(k));
        inside = vm_and(inside, first_lanes(k));
    }
    *above = vu_count_at(over, *above);
    if (found->counts) {
        uint32_t list[W];
        vu_pack(list, inside, vu_right_by(vu_sub(bits, vu_set(found->low)), found->shift));
        for (int j = vm_count(inside); j-- > 0;) found->counts[list[j]]++;
    } else if (PACKS_FAST || vm_any(inside)) { /* a branch that cannot be foreseen costs more than two packings */
        vu_pack(found->bits + found->found, inside, bits);
        if (found->where) vu_pack(found->where + found->found, inside, where);
        found->found += vm_count(inside);
    }
}

INLINE void survey_loop(const Block *shared, const int flags, const int keeps, Found *counts, uint32_t low) {
    const Block own = *shared, *b = &own;
    Found found = *counts;
    vu where = vu_add(vu_lanes(), vu_set(low)), above = vu_set(0);
    uint32_t lanes[W];
    int i = 0;
    for (; i + W <= b->n; i += W) {
        if (b->direct) {
            prefetch(b->first + i, keeps);
            prefetch(b->second + i, keeps);
            prefetch(b->grad + i, 0);
        }
        survey_lanes(delta_lanes(b, flags, keeps, i, W), where, &found, &above, W);
        where = vu_add(where, vu_set(W));
    }
    if (i < b->n) survey_lanes(delta_lanes(b, flags, keeps, i, b->n - i), where, &found, &above, b->n - i);
    vu_store(lanes, above);
    for (i = 0; i < W; i++) found.above += lanes[i];
    *counts = found;
}

static __attribute__((noinline)) void survey_any(const Block *b, int flags, int keeps, Found *found, uint32_t low) {
    survey_loop(b, flags, keeps, found, low);
}

/* Form Δ of a block and count it; `low` is the local index of its first entry. */
static __attribute__((noinline)) void survey_block(const Block *b, int flags, int keeps, Found *found, uint32_t low) {
    flags &= OF_DELTA;
    if (flags == FROM_GRAD && keeps)
        survey_loop(b, FROM_GRAD, 1, found, low);
    else if (flags == FROM_GRAD)
        survey_loop(b, FROM_GRAD, 0, found, low);
    else if (flags == FROM_UPDATE)
        survey_loop(b, FROM_UPDATE, 0, found, low);
    else
        survey_any(b, flags, keeps, found, low);
}

INLINE void update_loop(const Block *shared, const int flags) {
    const Block own = *shared, *b = &own;
    int i = 0;
    for (; i + W <= b->n; i += W) delta_lanes(b, flags, 1, i, W);
    if (i < b->n) delta_lanes(b, flags, 1, i, b->n - i);
}

static __attribute__((noinline)) void update_any(const Block *b, int flags) { update_loop(b, flags); }

/* Δ of a block into `update`, the moments advanced. */
static __attribute__((noinline)) void update_block(const Block *b, int flags) {
    flags &= OF_DELTA;
    if (flags == FROM_GRAD)
        update_loop(b, FROM_GRAD);
    else
        update_any(b, flags);
}

#endif
