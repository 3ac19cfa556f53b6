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

/* The bits without the sign; every NaN is the largest number. */
INLINE vu magnitude(vf x) {
    vu bits = vu_and(vf_bits(x), vu_set(0x7FFFFFFFu));
    return vu_choose(vu_lt(vu_set(0x7F800000u), bits), vu_set(0x7FFFFFFFu), bits);
}

/* A cut as a range of indices knows it: all above `bits`; of those equal to `tied`, up to `last` places from `from`. */
typedef struct {
    uint32_t bits, tied, from, last;
} Cut;

INLINE vm above_cut(vf x, vu index, Cut cut) {
    vu bits = magnitude(x);
    vm ties = vm_and(vu_eq(bits, vu_set(cut.tied)), vu_le(vu_sub(index, vu_set(cut.from)), vu_set(cut.last)));
    return vm_or(vu_lt(vu_set(cut.bits), bits), ties);
}

/* -- Adam */

typedef struct {
    float lerp, far, beta2, gain, correction, inverse, eps, size; /* far: whether 1 − β₁ ≥ 1/2 */
} Adam;

static inline Adam adam_of(const Settings *s) {
    float lerp = (float)s->one_minus_beta1, correction = (float)s->correction;
    int far = !(lerp < 0.5f); /* as ATen decides, and what it then does */
    return (Adam){far ? lerp - 1.0f : lerp,  (float)far,         (float)s->beta2, (float)s->one_minus_beta2,
                  correction,                1.0f / correction,  (float)s->eps,   (float)s->size};
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
    vm usual = vu_lt(vu_sub(vf_bits(v), vu_set(0x0D800000u)), vu_set(0x7F800000u - 0x0D800000u));
    if (__builtin_expect(!vm_all(usual), 0)) return root_anywhere(v, a);
    vf x = torch_sqrt(v), divisor = vf_set(a.correction), inverse = vf_set(a.inverse);
    vf q = vf_mul(x, inverse);
    q = vf_fma(vf_fnma(q, divisor, x), inverse, q);
    return vf_fma(vf_fnma(q, divisor, x), inverse, q);
}

/* exp_avg.lerp_(grad, 1 − β₁) */
INLINE vf first_moment(vf m, vf g, Adam a) {
    return vf_fma(vf_set(a.lerp), vf_sub(g, m), a.far != 0.0f ? g : m);
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

/* The terms that agree with a vote for + (its lanes in `up`) or −; all where it is undecided. */
INLINE vf agreeing(vf term, vm up, vm down, vm undecided) {
    vf zero = vf_set(0.0f);
    vm agrees = vm_or(vm_and(up, vf_lt(zero, term)), vm_and(down, vf_lt(term, zero)));
    return vf_keep(vm_or(agrees, undecided), term);
}

INLINE vf bracket(vf x, vf y, float weight_x, float weight_y, const int consensus) {
    vf a = vf_mul(x, vf_set(weight_x)), b = vf_mul(y, vf_set(weight_y)), zero = vf_set(0.0f);
    if (consensus == LINEAR) return vf_add(a, b);
    vf vote = consensus == SIGN ? vf_add(a, b) : vf_add(x, y);
    vm undecided = vf_isnan(vote), down = vf_lt(vote, zero);
    vm up = consensus == SIGN ? vf_lt(zero, vote) : vm_not(down);
    return vf_add(agreeing(a, up, down, undecided), agreeing(b, up, down, undecided));
}

#endif
