/* The magnitudes of one model's delta in a range: counted, listed and summed, to decide what F does (ops/select.py,
 * ops/exact_sum.py). */
#ifndef TRIMTAB_RANK_H
#define TRIMTAB_RANK_H

#include <stdlib.h>

#include "merge.h"

#define TABLES 4 /* counters of each number: neighbours are often equal, and a counter takes time to come back */
#define PIECE_OF 512

/* Every field takes eight bytes (merging.py). */
typedef struct {
    const char *anchor;
    const char *model;
    int64_t anchor_kind;
    int64_t model_kind;
    int64_t kind; /* of the arithmetic */
    int64_t n;
    /* a survey: magnitudes as fp32's bits */
    int64_t low, high; /* a bracket */
    int64_t above;     /* how many lie above it */
    int64_t at_high, at_low; /* how many are one of its ends */
    int64_t found;     /* how many lie strictly inside; which of equal ones is looked for */
    uint32_t *list;    /* these, or all where low > high (n + 16 places) */
    int64_t lines;     /* of a sample: so many times 16 neighbours, anywhere in the range; 0: everything */
    /* histograms: digits of the magnitudes in their dtype */
    int64_t *counts;
    const int64_t *prefixes; /* of the digits before, or null */
    int64_t prefix_count;
    int64_t width, below; /* bits of the digit, and of what comes after it */
    /* Σ|δ| and Σ|F(δ)| */
    const Term *term;
    int64_t base;
    int64_t *sums; /* 2 × 2 × 256: of δ and of F(δ), for each exponent how many, and the sum of their fractions */
} Ranked;

INLINE vf delta_of(const Ranked *r, const int kind, int64_t i, int k) {
    vf anchor = of_dtype(r->anchor, r->anchor_kind, kind, i, k);
    vf d = round_lanes(vf_sub(of_dtype(r->model, r->model_kind, kind, i, k), anchor), kind);
    return d;
}

INLINE void fetch_both(const Ranked *r, int64_t i) {
    fetch(r->anchor, r->anchor_kind, i);
    fetch(r->model, r->model_kind, i);
}

/* -- a bracket */

INLINE void survey_lanes_of(Ranked *r, const int kind, int64_t i, int k, vu *counts) {
    vu bits = magnitude(delta_of(r, kind, i, k)), low = vu_set((uint32_t)r->low), high = vu_set((uint32_t)r->high);
    vm all = first_lanes(k), over = vu_lt(high, bits), top = vu_eq(high, bits), under = vu_le(bits, low);
    counts[0] = vu_count_at(vm_and(over, all), counts[0]);
    counts[1] = vu_count_at(vm_and(top, all), counts[1]);
    counts[2] = vu_count_at(vm_and(vu_eq(bits, low), all), counts[2]);
    vm inside = vm_and(all, vm_not(vm_or(vm_or(over, top), under)));
    if (PACKS_FAST || vm_any(inside)) {
        vu_pack(r->list + r->found, inside, bits);
        r->found += vm_count(inside);
    }
}

INLINE int64_t lanes_total(vu x) {
    uint32_t lanes[W];
    int64_t sum = 0;
    vu_store(lanes, x);
    for (int j = 0; j < W; j++) sum += lanes[j];
    return sum;
}

INLINE void survey_loop_of(Ranked *shared, const int kind) {
    Ranked own = *shared, *r = &own;
    vu counts[3] = {vu_set(0), vu_set(0), vu_set(0)};
    int64_t i = 0;
    r->found = 0;
    for (; i + W <= r->n; i += W) {
        fetch_both(r, i);
        survey_lanes_of(r, kind, i, W, counts);
    }
    if (i < r->n) survey_lanes_of(r, kind, i, (int)(r->n - i), counts);
    shared->found = r->found;
    shared->above = lanes_total(counts[0]);
    shared->at_high = lanes_total(counts[1]);
    shared->at_low = r->low < r->high ? lanes_total(counts[2]) : 0;
}

#define LINES_AHEAD 16 /* lines of a sample fetched ahead */

/* Where the j-th line of a sample begins: anywhere in its share of the range. */
INLINE int64_t line_of(const Ranked *r, int64_t j) {
    const int64_t whole = r->n / W, from = whole * j / r->lines, to = whole * (j + 1) / r->lines;
    return W * (from + (int64_t)((finalized((uint64_t)(j + 1)) >> 32) * (uint64_t)(to - from) >> 32));
}

/* Magnitudes as they lie there, or those of a sample of lines. */
INLINE void list_loop(Ranked *shared, const int kind) {
    const Ranked own = *shared, *r = &own;
    if (r->lines) { /* at most the whole ones */
        for (int64_t j = 0; j < r->lines + LINES_AHEAD; j++) {
            if (j >= LINES_AHEAD) {
                const int64_t before = j - LINES_AHEAD, i = line_of(r, before);
                vu_store(r->list + W * before, magnitude(delta_of(r, kind, i, W)));
            }
            if (j < r->lines) {
                const int64_t i = line_of(r, j);
                __builtin_prefetch(r->anchor + i * (r->anchor_kind == FP32 ? 4 : 2));
                __builtin_prefetch(r->model + i * (r->model_kind == FP32 ? 4 : 2));
            }
        }
        shared->found = W * r->lines;
        return;
    }
    for (int64_t i = 0; i < r->n; i += W)
        vu_store(r->list + i, magnitude(delta_of(r, kind, i, r->n - i < W ? (int)(r->n - i) : W)));
    shared->found = r->n;
}

/* Where the found-th (from 1) of the entries of magnitude `high` is; −1 where there are not as many. */
INLINE int64_t place_loop(const Ranked *shared, const int kind) {
    const Ranked own = *shared, *r = &own;
    int64_t left = r->found;
    for (int64_t i = 0; i < r->n; i += W) {
        const int k = r->n - i < W ? (int)(r->n - i) : W;
        fetch_both(r, i);
        vu bits = magnitude(delta_of(r, kind, i, k));
        vm same = vm_and(vu_eq(bits, vu_set((uint32_t)r->high)), first_lanes(k));
        const int count = vm_count(same);
        if (left <= count) {
            uint32_t lanes[W];
            vu_pack(lanes, same, vu_lanes());
            return i + lanes[left - 1];
        }
        left -= count;
    }
    return -1;
}

static int64_t place_of(const Ranked *r) {
    if (r->kind == FP32) return place_loop(r, FP32);
    return r->kind == BF16 ? place_loop(r, BF16) : place_loop(r, FP16);
}

static void survey_of(Ranked *r) {
    if (r->low > r->high) {
        if (r->kind == FP32)
            list_loop(r, FP32);
        else if (r->kind == BF16)
            list_loop(r, BF16);
        else
            list_loop(r, FP16);
    } else if (r->kind == FP32) {
        survey_loop_of(r, FP32);
    } else if (r->kind == BF16) {
        survey_loop_of(r, BF16);
    } else {
        survey_loop_of(r, FP16);
    }
}

/* -- histograms */

/* Magnitudes in the dtype of the arithmetic, the greatest number for every NaN (ops/bits.py). */
INLINE vu ordered(vf x, const int kind) {
    vu bits = vu_and(vf_bits(x), vu_set(MAGNITUDE));
    vm nan = vu_lt(vu_set(INFINITE), bits);
    if (kind == FP16) bits = half_bits(vu_floats(bits));
    bits = vf_bits(vf_choose(nan, vu_floats(vu_set(kind == FP16 ? 0x7FFFu : MAGNITUDE)), vu_floats(bits)));
    return kind == BF16 ? vu_right(bits, 16) : bits;
}

INLINE void histogram_loop(const Ranked *r, const int kind, uint32_t *tables) {
    uint32_t piece[PIECE_OF + W], matching[PIECE_OF + 2 * W];
    const int below = (int)r->below, above = (int)(r->below + r->width);
    const uint32_t digits = (1u << r->width) - 1;
    for (int64_t low = 0; low < r->n; low += PIECE_OF) {
        const int n = r->n - low < PIECE_OF ? (int)(r->n - low) : PIECE_OF;
        for (int i = 0; i < n; i += W) {
            fetch_both(r, low + i);
            vu bits = ordered(delta_of(r, kind, low + i, n - i < W ? n - i : W), kind);
            vu_store(piece + i, r->prefixes ? bits : vu_right_by(bits, below));
        }
        if (!r->prefixes) {
            int i = 0;
            for (; i + TABLES <= n; i += TABLES)
                for (int t = 0; t < TABLES; t++) tables[(size_t)piece[i + t] * TABLES + (size_t)t]++;
            for (; i < n; i++) tables[(size_t)piece[i] * TABLES]++;
            continue;
        }
        for (int64_t p = 0; p < r->prefix_count; p++) {
            int64_t *counts = r->counts + (p << r->width);
            int found = 0;
            for (int i = 0; i < n; i += W) {
                vu bits = vu_load(piece + i, W);
                vm same = vu_eq(vu_right_by(bits, above), vu_set((uint32_t)r->prefixes[p]));
                same = vm_and(same, first_lanes(n - i < W ? n - i : W));
                if (!vm_any(same)) continue;
                vu_pack(matching + found, same, vu_and(vu_right_by(bits, below), vu_set(digits)));
                found += vm_count(same);
            }
            for (int i = 0; i < found; i++) counts[matching[i]]++;
        }
    }
}

/* Adds to `counts`; 0 where there is no memory. At most 2^32 entries. */
static int histogram_of(const Ranked *r) {
    const size_t bins = (size_t)1 << r->width;
    uint32_t *tables = 0;
    if (!r->prefixes && !(tables = calloc(bins * TABLES, sizeof *tables))) return 0;
    if (r->kind == FP32)
        histogram_loop(r, FP32, tables);
    else if (r->kind == BF16)
        histogram_loop(r, BF16, tables);
    else
        histogram_loop(r, FP16, tables);
    for (size_t i = 0; tables && i < bins; i++)
        for (int t = 0; t < TABLES; t++) r->counts[i] += tables[i * TABLES + (size_t)t];
    free(tables);
    return 1;
}

/* -- sums */

#define SUMS 8            /* counters of each exponent: neighbours have often the same */
#define FLUSHED (1 << 16) /* entries after which the fractions' sums might reach the counts */
#define ONE (1ULL << 40)  /* a count, above a sum of fractions */

INLINE void l1_loop(const Ranked *r, const int kind) {
    uint64_t tables[512][SUMS];
    uint32_t at[PIECE_OF + W], fraction[PIECE_OF + W];
    const Term term = *r->term;
    for (int64_t start = 0; start < r->n; start += FLUSHED) {
        const int64_t end = r->n - start < FLUSHED ? r->n : start + FLUSHED;
        memset(tables, 0, sizeof tables);
        for (int64_t low = start; low < end; low += PIECE_OF) {
            const int n = end - low < PIECE_OF ? (int)(end - low) : PIECE_OF;
            for (int i = 0; i < n; i += W) {
                fetch_both(r, low + i);
                vf d = delta_of(r, kind, low + i, n - i < W ? n - i : W);
                vu bits = vu_and(vf_bits(d), vu_set(MAGNITUDE)), words[1];
                vu where = vu_add(vu_lanes(), vu_set((uint32_t)(low + i)));
                vm kept = first_lanes(W);
                if (term.keeps != KEEPS_ALL)
                    kept = kept_lanes(&term, 0, d, where, vu_add(where, vu_set((uint32_t)r->base)), words);
                vu upper = vf_bits(vf_keep(kept, vu_floats(vu_set(256))));
                vu_store(at + i, vu_add(vu_right(bits, 23), upper));
                vu_store(fraction + i, vu_and(bits, vu_set(0x7FFFFFu)));
            }
            int i = 0;
            for (; i + SUMS <= n; i += SUMS)
                for (int t = 0; t < SUMS; t++) tables[at[i + t]][t] += ONE + fraction[i + t];
            for (; i < n; i++) tables[at[i]][0] += ONE + fraction[i];
        }
        for (int e = 0; e < 512; e++) {
            int64_t count = 0, sum = 0;
            for (int t = 0; t < SUMS; t++) {
                count += (int64_t)(tables[e][t] / ONE);
                sum += (int64_t)(tables[e][t] % ONE);
            }
            r->sums[e & 255] += count;
            r->sums[256 + (e & 255)] += sum;
            r->sums[512 + (e < 256 ? 0 : e - 256)] += count; /* what is dropped counts as zeros */
            r->sums[768 + (e & 255)] += e < 256 ? 0 : sum;
        }
    }
}

static void l1_of(const Ranked *r) {
    if (r->kind == FP32)
        l1_loop(r, FP32);
    else if (r->kind == BF16)
        l1_loop(r, BF16);
    else
        l1_loop(r, FP16);
}

#endif
