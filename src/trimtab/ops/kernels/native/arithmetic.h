/* The arithmetic of a step on sixteen lanes: masks, Adam, consensus; each operation as torch does it. */
#ifndef TRIMTAB_ARITHMETIC_H
#define TRIMTAB_ARITHMETIC_H

#include "job.h"
#include "vec.h"

#ifndef TRIMTAB_SQRT_NEWTON
#define TRIMTAB_SQRT_NEWTON 0
#elif TRIMTAB_SQRT_NEWTON && !HAS_RSQRT14
#error this torch rounds square roots in a way that the kernels know from processors with AVX-512 only
#endif

/* -- masks (ops/masks.py) */

typedef struct {
    uint32_t k0, k1, k2, k3;
} Keys;

static inline uint64_t finalized(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline Keys keys_of(const uint64_t *lanes, uint64_t step) {
    uint64_t a = finalized(lanes[0] + step * 0x9E3779B97F4A7C15u);
    uint64_t b = finalized(lanes[1] + step * 0x9E3779B97F4A7C15u);
    return (Keys){(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32)};
}

INLINE vu hash(vu index, uint32_t key0, uint32_t key1) {
    vu x = vu_add(index, vu_set(key0));
    x = vu_xor(x, vu_right(x, 16));
    x = vu_mul(x, vu_set(0x7FEB352Du));
    x = vu_xor3(x, vu_right(x, 15), vu_set(key1));
    x = vu_mul(x, vu_set(0x846CA68Bu));
    return vu_xor(x, vu_right(x, 16));
}

/* Lanes of a Bernoulli mask; `half` is the stream's half of the coarse word in the upper 16 bits. */
INLINE vm drawn(vu half, uint32_t threshold, vu index, Keys keys, const int odd) {
    vu cell = vu_set(threshold & 0xFFFF0000u);
    vm kept = vu_lt(half, cell);
    if (threshold & 0xFFFFu) {
        vm edge = vu_eq(half, cell);
        if (__builtin_expect(vm_any(edge), 0)) { /* one entry in 65,536 */
            vu fine = hash(index, keys.k2, keys.k3);
            fine = odd ? vu_and(fine, vu_set(0xFFFFu)) : vu_right(fine, 16);
            kept = vm_or(kept, vm_and(edge, vu_lt(fine, vu_set(threshold & 0xFFFFu))));
        }
    }
    return kept;
}

/* -- magnitudes (ops/sparsify.py) */

#define NAN_MAGNITUDE 0x7F800001u /* of every NaN: above infinity's */

/* The bits without the sign; every NaN is the largest number. */
INLINE vu magnitude(vf x) { return vu_min(vu_and(vf_bits(x), vu_set(0x7FFFFFFFu)), vu_set(NAN_MAGNITUDE)); }

/* A cut as a piece of a tensor knows it: all magnitudes above `bits`, and where `ties` is set those of `bits + 1` whose
 * indices lie at most `last` places from `from`. */
typedef struct {
    uint32_t bits, from, last;
    int ties;
} Cut;

INLINE vm above_cut(vf x, vu index, Cut cut) {
    vu bits = magnitude(x);
    vm kept = vu_lt(vu_set(cut.bits), bits);
    if (!cut.ties) return kept;
    vm late = vu_lt(vu_set(cut.last), vu_sub(index, vu_set(cut.from)));
    return vm_and(kept, vm_not(vm_and(late, vu_eq(bits, vu_set(cut.bits + 1)))));
}

/* -- Adam */

typedef struct {
    float lerp, beta2, gain, correction, inverse, eps, size;
    uint32_t usual; /* roots are divided by multiplication where v's bits are so far above TINY's at most; 0: nowhere */
} Adam;

#define TINY 0x0D800000u /* 2⁻¹⁰⁰ */

/* Whether 1 − β₁ ≥ 1/2: ATen then reckons lerp from the other end. */
static inline int lerps_far(const Settings *s) { return !((float)s->one_minus_beta1 < 0.5f); }

static inline Adam adam_of(const Settings *s) {
    float lerp = (float)s->one_minus_beta1, correction = (float)s->correction;
    uint32_t bits;
    memcpy(&bits, &correction, 4);
    int exact = (bits & 0x7FFFFFu) != 0x7FFFFFu && correction > 0x1p-20f; /* else Markstein's theorem does not hold */
    return (Adam){lerps_far(s) ? lerp - 1.0f : lerp, (float)s->beta2, (float)s->one_minus_beta2, correction,
                  1.0f / correction, (float)s->eps, (float)s->size, exact ? 0x7F800000u - TINY : 0};
}

/* torch.sqrt: MKL's AVX-512 kernel takes one Newton step and is not rounded correctly; others are. */
INLINE vf torch_sqrt(vf x) {
#if TRIMTAB_SQRT_NEWTON
    vf y = _mm512_rsqrt14_ps(x), root = vf_mul(x, y);
    return vf_fma(vf_fnma(root, root, x), vf_mul(y, vf_set(0.5f)), root);
#else
    return vf_sqrt(x);
#endif
}

/* sqrt(v)/correction where some v is 0, tiny, infinite or NaN. */
INLINE vf root_anywhere(vf v, Adam a) {
#if TRIMTAB_SQRT_NEWTON
    vm tiny = vf_lt(v, vf_set(0x1p-100f));
    vf root = torch_sqrt(vf_choose(tiny, vf_mul(v, vf_set(0x1p64f)), v));
    root = vf_choose(tiny, vf_mul(root, vf_set(0x1p-32f)), root);
    vm same = vm_or(vf_eq(v, vf_set(0.0f)), vf_eq(v, vf_set(__builtin_inff())));
    root = vf_choose(same, v, root);
#else
    vf root = torch_sqrt(v);
#endif
    return vf_div(root, vf_set(a.correction));
}

/* sqrt(v)/correction. Division by a known number, rounded correctly by Markstein's theorem, which wants no extremes. */
INLINE vf corrected_root(vf v, Adam a) {
    vm usual = vu_lt(vu_sub(vf_bits(v), vu_set(TINY)), vu_set(a.usual));
    if (__builtin_expect(!vm_all(usual), 0)) return root_anywhere(v, a);
    vf x = torch_sqrt(v), divisor = vf_set(a.correction), inverse = vf_set(a.inverse);
    vf q = vf_mul(x, inverse);
    q = vf_fma(vf_fnma(q, divisor, x), inverse, q);
    return vf_fma(vf_fnma(q, divisor, x), inverse, q);
}

/* exp_avg.lerp_(grad, 1 − β₁) */
INLINE vf first_moment(vf m, vf g, Adam a, const int far) {
    return vf_fma(vf_set(a.lerp), vf_sub(g, m), far ? g : m);
}

/* exp_avg_sq.mul_(β₂).addcmul_(grad, grad, value=1 − β₂), which ATen contracts */
INLINE vf second_moment(vf v, vf g, Adam a) {
    return vf_fma(vf_mul(vf_set(a.gain), g), g, vf_mul(v, vf_set(a.beta2)));
}

/* −lr/(1 − β₁ᵗ)·m / (√v/√(1 − β₂ᵗ) + ε) */
INLINE vf adam_update(vf m, vf v, Adam a) {
    return vf_div(vf_mul(vf_set(a.size), m), vf_add(corrected_root(v, a), vf_set(a.eps)));
}

/* -- consensus (ops/consensus.py) */

/* Of two terms that disagree the one with the sum's sign, which is the larger one or the smaller one; else their sum. */
INLINE vf elected(vf a, vf b) {
    vf sum = vf_add(a, b), zero = vf_set(0.0f);
    vm disagree = vu_is_negative(vu_xor(vf_bits(a), vf_bits(b)));
    vf result = vf_max_at(vm_and(disagree, vf_lt(zero, sum)), a, b, sum);
    result = vf_min_at(vm_and(disagree, vf_lt(sum, zero)), a, b, result);
    return vf_add(result, zero); /* what is outvoted is +0 */
}

/* The terms that agree with the sign of the sum before weighting, of which 0 counts as +; all where that is NaN. */
INLINE vf elected_unweighted(vf a, vf b, vf sum) {
    vf zero = vf_set(0.0f);
    vm down = vf_lt(sum, zero), up = vm_not(down), undecided = vf_isnan(sum);
    vm keeps_a = vm_or(vm_and(up, vf_lt(zero, a)), vm_and(down, vf_lt(a, zero)));
    vm keeps_b = vm_or(vm_and(up, vf_lt(zero, b)), vm_and(down, vf_lt(b, zero)));
    return vf_add(vf_keep(vm_or(keeps_a, undecided), a), vf_keep(vm_or(keeps_b, undecided), b));
}

INLINE vf bracket(vf x, vf y, float weight_x, float weight_y, const int consensus) {
    vf a = vf_mul(x, vf_set(weight_x)), b = vf_mul(y, vf_set(weight_y));
    if (consensus == LINEAR) return vf_add(a, b);
    return consensus == SIGN ? elected(a, b) : elected_unweighted(a, b, vf_add(x, y));
}

#endif
