/* Sixteen lanes of 32 bits: the few operations the kernels need, for AVX-512 and for anything else.
 *
 * vf: floats, vu: unsigned integers, vm: a truth value per lane. Every float operation rounds once; vfma is fused.
 * Functions with a lane count k touch the first k lanes only (k = 16 compiles to plain loads and stores).
 */
#ifndef TRIMTAB_VEC_H
#define TRIMTAB_VEC_H

#include <stdint.h>
#include <string.h>

#define W 16
#define INLINE static inline __attribute__((always_inline))

#if !defined(TRIMTAB_GENERIC) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>
#define VEC_NAME "AVX-512"
#define HAS_RSQRT14 1
#define PACKS_FAST 1

typedef __m512 vf;
typedef __m512i vu;
typedef __mmask16 vm;

INLINE vm first_lanes(int k) { return (vm)(k >= W ? 0xFFFFu : (1u << k) - 1u); }

INLINE vf vf_load(const float *p, int k) {
    return k == W ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(k), p);
}
INLINE void vf_store(float *p, vf x, int k) {
    if (k == W)
        _mm512_storeu_ps(p, x);
    else
        _mm512_mask_storeu_ps(p, first_lanes(k), x);
}
#define HAS_STREAM 1
INLINE void vf_stream(float *p, vf x) { _mm512_stream_ps(p, x); } /* past the caches */
INLINE void stream_end(void) { _mm_sfence(); }
INLINE vu vu_load(const uint32_t *p, int k) {
    return k == W ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32(first_lanes(k), p);
}
INLINE void vu_store(uint32_t *p, vu x) { _mm512_storeu_si512(p, x); }

INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c − a·b */
INLINE vf vf_sqrt(vf x) { return _mm512_sqrt_ps(x); }
INLINE vf vf_neg(vf x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
INLINE vf vf_keep(vm m, vf x) { return _mm512_maskz_mov_ps(m, x); }
INLINE vf vf_choose(vm m, vf yes, vf no) { return _mm512_mask_mov_ps(no, m, yes); }
INLINE vu vf_bits(vf x) { return _mm512_castps_si512(x); }

INLINE vu vu_set(uint32_t x) { return _mm512_set1_epi32((int)x); }
INLINE vu vu_lanes(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
INLINE vu vu_add(vu a, vu b) { return _mm512_add_epi32(a, b); }
INLINE vu vu_sub(vu a, vu b) { return _mm512_sub_epi32(a, b); }
INLINE vu vu_mul(vu a, vu b) { return _mm512_mullo_epi32(a, b); }
INLINE vu vu_and(vu a, vu b) { return _mm512_and_si512(a, b); }
INLINE vu vu_xor(vu a, vu b) { return _mm512_xor_si512(a, b); }
INLINE vu vu_xor3(vu a, vu b, vu c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
INLINE vu vu_right(vu x, const int n) { return _mm512_srli_epi32(x, (unsigned)n); }
INLINE vu vu_right_by(vu x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
INLINE vu vu_count_at(vm m, vu counts) { return _mm512_mask_sub_epi32(counts, m, counts, _mm512_set1_epi32(-1)); }
INLINE vu vu_left(vu x, const int n) { return _mm512_slli_epi32(x, (unsigned)n); }
INLINE vu vu_min(vu a, vu b) { return _mm512_min_epu32(a, b); }

INLINE vf vf_max_at(vm m, vf a, vf b, vf no) { return _mm512_mask_max_ps(no, m, a, b); }
INLINE vf vf_min_at(vm m, vf a, vf b, vf no) { return _mm512_mask_min_ps(no, m, a, b); }

INLINE vm vu_is_negative(vu a) { return _mm512_movepi32_mask(a); }
INLINE vm vu_lt(vu a, vu b) { return _mm512_cmplt_epu32_mask(a, b); }
INLINE vm vu_le(vu a, vu b) { return _mm512_cmple_epu32_mask(a, b); }
INLINE vm vu_eq(vu a, vu b) { return _mm512_cmpeq_epi32_mask(a, b); }
INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE vm vf_isnan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
INLINE vm vm_and(vm a, vm b) { return (vm)(a & b); }
INLINE vm vm_or(vm a, vm b) { return (vm)(a | b); }
INLINE vm vm_not(vm a) { return (vm)~a; }
INLINE int vm_all(vm a) { return _kortestc_mask16_u8(a, a); }
INLINE int vm_any(vm a) { return !_kortestz_mask16_u8(a, a); }
INLINE int vm_count(vm a) { return __builtin_popcount(a); }

/* Writes the lanes that m has, side by side; up to 16 places at p are overwritten. */
INLINE void vu_pack(uint32_t *p, vm m, vu x) { _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, x)); }

#else

#define VEC_NAME "vectors of the compiler"
#define HAS_STREAM 0
#define HAS_RSQRT14 0
#define PACKS_FAST 0

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vm __attribute__((vector_size(64)));

INLINE vu vu_lanes(void) { return (vu){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE vu vu_set(uint32_t x) { return (vu){0} + x; }
INLINE vm first_lanes(int k) { return (vm)(vu_lanes() < vu_set((uint32_t)k)); }

INLINE vf vf_load(const float *p, int k) {
    vf x = {0};
    memcpy(&x, p, k == W ? sizeof x : (size_t)k * sizeof *p);
    return x;
}
INLINE void vf_store(float *p, vf x, int k) { memcpy(p, &x, k == W ? sizeof x : (size_t)k * sizeof *p); }
INLINE vu vu_load(const uint32_t *p, int k) {
    vu x = {0};
    memcpy(&x, p, k == W ? sizeof x : (size_t)k * sizeof *p);
    return x;
}
INLINE void vu_store(uint32_t *p, vu x) { memcpy(p, &x, sizeof x); }

INLINE vf vf_set(float x) { return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vf vf_add(vf a, vf b) { return a + b; }
INLINE vf vf_sub(vf a, vf b) { return a - b; }
INLINE vf vf_mul(vf a, vf b) { return a * b; }
INLINE vf vf_div(vf a, vf b) { return a / b; }
INLINE vf vf_neg(vf x) { return -x; }

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
typedef union {
    vf whole;
    __m256 half[2];
} vf_halves;
INLINE vf vf_fma(vf a, vf b, vf c) {
    vf_halves x = {.whole = a}, y = {.whole = b}, z = {.whole = c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
}
INLINE vf vf_fnma(vf a, vf b, vf c) {
    vf_halves x = {.whole = a}, y = {.whole = b}, z = {.whole = c};
    for (int i = 0; i < 2; i++) z.half[i] = _mm256_fnmadd_ps(x.half[i], y.half[i], z.half[i]);
    return z.whole;
}
INLINE vf vf_sqrt(vf a) {
    vf_halves x = {.whole = a};
    for (int i = 0; i < 2; i++) x.half[i] = _mm256_sqrt_ps(x.half[i]);
    return x.whole;
}
#else
INLINE vf vf_fma(vf a, vf b, vf c) {
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE vf vf_fnma(vf a, vf b, vf c) { return vf_fma(-a, b, c); }
INLINE vf vf_sqrt(vf x) {
    for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
#endif

INLINE vu vf_bits(vf x) { return (vu)x; }
INLINE vf vf_keep(vm m, vf x) { return (vf)((vm)x & m); }
INLINE vf vf_choose(vm m, vf yes, vf no) { return (vf)(((vm)yes & m) | ((vm)no & ~m)); }

INLINE vu vu_add(vu a, vu b) { return a + b; }
INLINE vu vu_sub(vu a, vu b) { return a - b; }
INLINE vu vu_mul(vu a, vu b) { return a * b; }
INLINE vu vu_and(vu a, vu b) { return a & b; }
INLINE vu vu_xor(vu a, vu b) { return a ^ b; }
INLINE vu vu_xor3(vu a, vu b, vu c) { return a ^ b ^ c; }
INLINE vu vu_right(vu x, const int n) { return x >> n; }
INLINE vu vu_right_by(vu x, int n) { return x >> n; }
INLINE vu vu_count_at(vm m, vu counts) { return counts - (vu)m; }
INLINE vu vu_left(vu x, const int n) { return x << n; }
INLINE vu vu_min(vu a, vu b) {
    vm m = (vm)(a < b);
    return (vu)(((vm)a & m) | ((vm)b & ~m));
}
INLINE vf vf_max_at(vm m, vf a, vf b, vf no) { return vf_choose(m, vf_choose((vm)(a > b), a, b), no); }
INLINE vf vf_min_at(vm m, vf a, vf b, vf no) { return vf_choose(m, vf_choose((vm)(a < b), a, b), no); }

INLINE vm vu_is_negative(vu a) { return (vm)a < 0; }

INLINE vm vu_lt(vu a, vu b) { return (vm)(a < b); }
INLINE vm vu_le(vu a, vu b) { return (vm)(a <= b); }
INLINE vm vu_eq(vu a, vu b) { return (vm)(a == b); }
INLINE vm vf_lt(vf a, vf b) { return (vm)(a < b); }
INLINE vm vf_eq(vf a, vf b) { return (vm)(a == b); }
INLINE vm vf_isnan(vf a) { return (vm)(a != a); }
INLINE vm vm_and(vm a, vm b) { return a & b; }
INLINE vm vm_or(vm a, vm b) { return a | b; }
INLINE vm vm_not(vm a) { return ~a; }
INLINE int vm_count(vm a) {
    int n = 0;
    for (int i = 0; i < W; i++) n -= a[i];
    return n;
}
INLINE int vm_any(vm a) {
    int32_t any = 0;
    for (int i = 0; i < W; i++) any |= a[i];
    return any != 0;
}
INLINE int vm_all(vm a) { return !vm_any(~a); }
INLINE void vu_pack(uint32_t *p, vm m, vu x) {
    for (int i = 0; i < W; i++) {
        *p = x[i];
        p -= m[i];
    }
}

#endif
#endif
