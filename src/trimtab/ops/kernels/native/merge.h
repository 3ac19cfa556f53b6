/* Offline merging of one range of a tensor: anchor + λ·⊕_w(F(θ₁ − anchor), F(θ₂ − anchor), …), in one pass.
 *
 * Every operation rounds as torch's in ops/combine.py does: to fp32, or to a 16-bit dtype through fp32. Numbers of any
 * dtype are sixteen floats here, and floats that hold 16-bit numbers are exact. */
#ifndef TRIMTAB_MERGE_H
#define TRIMTAB_MERGE_H

#include "lanes.h"

#define TERMS 62 /* models, at most: a bit for each in what is reported */
#define SIGN_OR_PLUS 3 /* beside the consensus of job.h */
#define FETCH 2048 /* bytes fetched ahead */

enum { KEEPS_ALL, KEEPS_ABOVE, KEEPS_DRAWN };

/* One model: what F does to its delta, and its weight. Every field takes eight bytes (merging.py). */
typedef struct {
    const char *from;
    int64_t kind;
    int64_t keeps;
    int64_t least;     /* above a cut: the smallest magnitude that is kept, as fp32's bits */
    int64_t ties;      /* entries from this one on do not keep `least` itself; −1: all do */
    int64_t threshold; /* drawn: round(p·2^32) */
    int64_t odd;       /* the stream's half of a word */
    int64_t shares;    /* the first model whose word it is */
    int64_t keys[4];
    double factor;
    double weight;
} Term;

typedef struct {
    char *out;
    const char *anchor;
    const Term *terms;
    int64_t count; /* of terms */
    int64_t n;     /* of entries */
    int64_t base;  /* lower half of the first entry's index */
    int64_t out_kind;
    int64_t anchor_kind;
    int64_t kind; /* of the arithmetic */
    int64_t consensus;
    int64_t normalize;
    double scale;
    /* what is found */
    int64_t inputs; /* bits of the models that hold NaN or infinities; bit TERMS is the anchor's */
    int64_t output;
} Merge;

/* -- one delta */

INLINE vf of_dtype(const char *from, int64_t held, const int kind, int64_t i, int k) {
    vf x = widen_lanes(from, held, i, k);
    return kind == FP32 || held == kind ? x : round_any(x, kind);
}

/* The entries that F keeps. `where`: places in the range; `words`: of the terms before. */
INLINE vm kept_lanes(const Term *t, const int self, vf x, vu where, vu index, vu *words) {
    if (t->keeps == KEEPS_ABOVE) {
        vu bits = magnitude(x), least = vu_set((uint32_t)t->least);
        vm kept = vu_le(least, bits);
        if (t->ties < 0) return kept;
        return vm_and(kept, vm_not(vm_and(vu_eq(bits, least), vu_le(vu_set((uint32_t)t->ties), where))));
    }
    Keys keys = {(uint32_t)t->keys[0], (uint32_t)t->keys[1], (uint32_t)t->keys[2], (uint32_t)t->keys[3]};
    words[self] = t->shares == self ? hash(index, keys.k0, keys.k1) : words[t->shares];
    if (t->odd) return drawn(vu_left(words[self], 16), (uint32_t)t->threshold, index, keys, 1);
    return drawn(vu_and(words[self], vu_set(0xFFFF0000u)), (uint32_t)t->threshold, index, keys, 0);
}

/* -- consensus (ops/consensus.py) */

/* From left to right; 16-bit numbers are rounded once. */
INLINE vf sum_lanes(const vf *x, const int count, const int kind) {
    vf sum = x[0];
    for (int j = 1; j < count; j++) sum = vf_add(sum, x[j]);
    return count > 1 ? round_lanes(sum, kind) : sum;
}

/* What is kept of the weighted terms becomes `votes`: the weights of those that count. */
INLINE void elect(vf *terms, vf *votes, vf total, const int64_t consensus, const int count) {
    vf zero = vf_set(0.0f);
    vm open = vf_isnan(total); /* undecided: all stay */
    vm decided = first_lanes(W);
    if (consensus == SIGN)
        decided = vm_not(vf_eq(total, zero));
    else
        total = vf_add(total, zero); /* −0 counts as + */
    for (int j = 0; j < count; j++) {
        vm agrees = vm_not(vu_is_negative(vu_xor(vf_bits(terms[j]), vf_bits(total))));
        vm stays = vm_or(vm_and(agrees, decided), open);
        terms[j] = vf_keep(stays, terms[j]);
        votes[j] = vf_keep(vm_and(stays, vm_not(vf_eq(terms[j], zero))), votes[j]);
    }
}

INLINE vf divided(const Merge *m, vf total, vf votes, const int kind) {
    vf zero = vf_set(0.0f), quotient = round_lanes(vf_div(total, votes), kind);
    return vf_choose(vf_eq(votes, zero), m->consensus == SIGN_OR_PLUS ? total : zero, quotient);
}

/* -- the loop */

INLINE void merge_lanes(const Merge *m, const Term *terms, const int count, const int kind, int64_t i, int k, vu *tops) {
    vf a[TERMS], x[TERMS], votes[TERMS];
    vu words[TERMS], where = vu_add(vu_lanes(), vu_set((uint32_t)i)), index = vu_add(where, vu_set((uint32_t)m->base));
    const vf anchor = of_dtype(m->anchor, m->anchor_kind, kind, i, k);
#pragma GCC unroll 3
    for (int j = 0; j < count; j++) {
        const Term *t = terms + j;
        vf d = round_lanes(vf_sub(of_dtype(t->from, t->kind, kind, i, k), anchor), kind);
        tops[1] = vu_max(tops[1], vu_and(vf_bits(d), vu_set(MAGNITUDE)));
        if (t->keeps != KEEPS_ALL) d = vf_keep(kept_lanes(t, j, d, where, index, words), d);
        if (t->factor != 1.0) d = round_lanes(vf_mul(d, vf_set((float)t->factor)), kind);
        x[j] = d;
        a[j] = kind == FP32 || t->weight != 1.0 ? round_lanes(vf_mul(d, vf_set((float)t->weight)), kind) : d;
        votes[j] = vf_set((float)t->weight);
    }
    if (m->consensus != LINEAR) {
        vf total = m->consensus == SIGN_UNWEIGHTED ? sum_lanes(x, count, kind) : sum_lanes(a, count, kind);
        elect(a, votes, total, m->consensus, count);
    }
    vf mixed = sum_lanes(a, count, kind);
    if (m->normalize) mixed = divided(m, mixed, sum_lanes(votes, count, kind), kind);
    if (m->scale != 1.0) mixed = round_lanes(vf_mul(mixed, vf_set((float)m->scale)), kind);
    store_lanes(m->out, m->out_kind, kind, round_lanes(vf_add(anchor, mixed), kind), i, k, tops);
}

INLINE void fetch(const char *p, int64_t kind, int64_t i) { __builtin_prefetch(p + i * (kind == FP32 ? 4 : 2) + FETCH); }

/* Whole sixteens from entry 0 on; returns where it ends. */
INLINE int64_t merge_loop(const Merge *shared, const Term *given, const int count, const int kind, vu *tops) {
    const Merge own = *shared, *m = &own; /* a copy that no store can reach */
    Term terms[3];
    vu found[2] = {tops[0], tops[1]};
    int64_t i = 0;
    memcpy(terms, given, (size_t)count * sizeof *terms);
    for (; i + W <= m->n; i += W) {
        fetch(m->anchor, m->anchor_kind, i);
#pragma GCC unroll 3
        for (int j = 0; j < count; j++) fetch(terms[j].from, terms[j].kind, i);
        merge_lanes(m, terms, count, kind, i, W, found);
    }
    tops[0] = found[0];
    tops[1] = found[1];
    return i;
}

#define LOOPS(kind)                                                                                                    \
    static __attribute__((noinline)) void merge_in_##kind(Merge *m, vu *tops) {                                        \
        int64_t i = 0;                                                                                                 \
        if (m->count == 2)                                                                                             \
            i = merge_loop(m, m->terms, 2, kind, tops);                                                                \
        else if (m->count == 3)                                                                                        \
            i = merge_loop(m, m->terms, 3, kind, tops);                                                                \
        for (; i < m->n; i += W)                                                                                       \
            merge_lanes(m, m->terms, (int)m->count, kind, i, m->n - i < W ? (int)(m->n - i) : W, tops);                \
    }
LOOPS(FP32)
LOOPS(BF16)
LOOPS(FP16)

static void merge_range(Merge *m) {
    vu tops[2] = {vu_set(0), vu_set(0)};
    if (m->kind == FP32)
        merge_in_FP32(m, tops);
    else if (m->kind == BF16)
        merge_in_BF16(m, tops);
    else
        merge_in_FP16(m, tops);
    m->inputs = 0;
    m->output = greatest(tops[0]) >= INFINITE;
    if (greatest(tops[1]) < INFINITE && !m->output) return;
    m->inputs = (int64_t)holds_nonfinite(m->anchor, m->anchor_kind, m->n) << TERMS;
    for (int j = 0; j < m->count; j++)
        m->inputs |= (int64_t)holds_nonfinite(m->terms[j].from, m->terms[j].kind, m->n) << j;
}

/* -- weighted sums of models (combine.weighted_sum, interpolate.slerp), in fp32 */

enum { ADDED, FUSED };

/* `scale` is what the sum is divided by. FUSED: 0 + x₁w₁ + x₂w₂ + …, each product added with one rounding. */
INLINE void sum_loop(const Merge *shared, const int count, const int fused, vu *tops) {
    const Merge own = *shared, *m = &own;
    for (int64_t i = 0; i < m->n; i += W) {
        const int k = m->n - i < W ? (int)(m->n - i) : W;
        vf sum = vf_set(0.0f);
        for (int j = 0; j < count; j++) {
            const Term *t = m->terms + j;
            fetch(t->from, t->kind, i);
            vf x = widen_lanes(t->from, t->kind, i, k), w = vf_set((float)t->weight);
            sum = fused ? vf_fma(x, w, sum) : j ? vf_add(sum, vf_mul(w, x)) : vf_mul(w, x);
        }
        if (m->scale != 1.0) sum = vf_div(sum, vf_set((float)m->scale));
        store_lanes(m->out, m->out_kind, FP32, sum, i, k, tops);
    }
}

static void sum_range(Merge *m) {
    vu top = vu_set(0);
    if (m->consensus != FUSED)
        sum_loop(m, 2, ADDED, &top);
    else if (m->count == 2)
        sum_loop(m, 2, FUSED, &top);
    else
        sum_loop(m, (int)m->count, FUSED, &top);
    m->inputs = 0;
    m->output = greatest(top) >= INFINITE;
    for (int j = 0; m->output && j < m->count; j++) /* what is not finite stays so, times 0 as well */
        m->inputs |= (int64_t)holds_nonfinite(m->terms[j].from, m->terms[j].kind, m->n) << j;
}

#endif
