/* Sixteen numbers of a tensor that is held in fp32, bf16 or fp16, wherever it begins: to fp32 and back. */
#ifndef TRIMTAB_LANES_H
#define TRIMTAB_LANES_H

#include "convert.h"

#if PACKS_FAST /* AVX-512 */

INLINE vf vu_floats(vu x) { return _mm512_castsi512_ps(x); }
INLINE vu vu_max(vu a, vu b) { return _mm512_max_epu32(a, b); }

INLINE vf widen_lanes(const char *p, int64_t kind, int64_t i, int k) {
    if (kind == FP32) return vf_load((const float *)(p + 4 * i), k);
    p += 2 * i;
    __m256i x = k == W ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi16(first_lanes(k), p);
    if (kind == FP16) return _mm512_cvtph_ps(x);
    return vu_floats(vu_left(_mm512_cvtepu16_epi32(x), 16));
}

/* The lower halves. */
INLINE void store_halves(char *p, vu x, int64_t i, int k) {
    __m256i y = _mm512_cvtepi32_epi16(x);
    if (k == W)
        _mm256_storeu_si256((__m256i *)(p + 2 * i), y);
    else
        _mm256_mask_storeu_epi16(p + 2 * i, first_lanes(k), y);
}

INLINE vu half_bits(vf x) { return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE vf half_floats(vu x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
INLINE vf round_half_lanes(vf x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

#else

INLINE vf vu_floats(vu x) { return (vf)x; }
INLINE vu vu_max(vu a, vu b) {
    vm m = (vm)(a < b);
    return (vu)(((vm)b & m) | ((vm)a & ~m));
}

INLINE vu half_bits(vf x) {
    vu bits = {0};
    for (int j = 0; j < W; j++) bits[j] = to_half(x[j]);
    return bits;
}
INLINE vf half_floats(vu x) {
    vf y = {0};
    for (int j = 0; j < W; j++) y[j] = from_half((uint16_t)x[j]);
    return y;
}
INLINE vf round_half_lanes(vf x) { return half_floats(half_bits(x)); }

INLINE vf widen_lanes(const char *p, int64_t kind, int64_t i, int k) {
    uint16_t halves[W] = {0};
    vf x = {0};
    if (kind == FP32) {
        memcpy(&x, p + 4 * i, k == W ? sizeof x : (size_t)k * sizeof(float));
        return x;
    }
    memcpy(halves, p + 2 * i, k == W ? sizeof halves : (size_t)k * sizeof *halves);
    vu bits = {0};
    for (int j = 0; j < W; j++) bits[j] = halves[j];
    return kind == FP16 ? half_floats(bits) : (vf)(bits << 16);
}

INLINE void store_halves(char *p, vu x, int64_t i, int k) {
    uint16_t halves[W];
    for (int j = 0; j < W; j++) halves[j] = (uint16_t)x[j];
    memcpy(p + 2 * i, halves, k == W ? sizeof halves : (size_t)k * sizeof *halves);
}

#endif

#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u

/* To the nearest number of `kind`, ties to even. A NaN has to be one of arithmetic, or of a 16-bit number: then nothing
 * is carried into its sign. */
INLINE vf round_lanes(vf x, const int kind) {
    if (kind == FP32) return x;
    if (kind == FP16) return round_half_lanes(x);
    vu bits = vf_bits(x), odd = vu_and(vu_right(bits, 16), vu_set(1));
    return vu_floats(vu_and(vu_add(vu_add(bits, odd), vu_set(0x7FFFu)), vu_set(0xFFFF0000u)));
}

/* The same of any number. */
INLINE vf round_any(vf x, const int kind) {
    if (kind != BF16) return round_lanes(x, kind);
    return vf_choose(vf_isnan(x), vu_floats(vu_set(0x7FC00000u)), round_lanes(x, BF16));
}

/* Round what comes from arithmetic in `kind` to `to`, and store it; adds its magnitude to `top`. */
INLINE void store_lanes(char *p, int64_t to, const int kind, vf x, int64_t i, int k, vu *top) {
    if (to != kind && to != FP32) x = round_any(x, (int)to);
    *top = vu_max(*top, vu_and(vf_bits(k == W ? x : vf_keep(first_lanes(k), x)), vu_set(MAGNITUDE)));
    if (to == FP32)
        vf_store((float *)(p + 4 * i), x, k);
    else
        store_halves(p, to == FP16 ? half_bits(x) : vu_right(vf_bits(x), 16), i, k);
}

INLINE uint32_t greatest(vu x) {
    uint32_t lanes[W], most = 0;
    vu_store(lanes, x);
    for (int j = 0; j < W; j++) most = lanes[j] > most ? lanes[j] : most;
    return most;
}

/* Whether a range holds NaN or an infinity. */
static int holds_nonfinite(const void *from, int64_t kind, int64_t n) {
    vu top = vu_set(0);
    for (int64_t i = 0; i < n; i += W) {
        int k = n - i < W ? (int)(n - i) : W;
        top = vu_max(top, vu_and(vf_bits(widen_lanes(from, kind, i, k)), vu_set(MAGNITUDE)));
    }
    return greatest(top) >= INFINITE;
}

#endif
