/* Between the ways numbers are held and fp32: parameters and their residuals, moments, gradients, τ. */
#ifndef TRIMTAB_CONVERT_H
#define TRIMTAB_CONVERT_H

#include "arithmetic.h"

#if defined(__F16C__)
#include <immintrin.h>
#define TRIMTAB_HALF 1
INLINE float from_half(uint16_t x) { return _cvtsh_ss(x); }
INLINE uint16_t to_half(float x) { return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
#define TRIMTAB_HALF 1
INLINE float from_half(uint16_t x) {
    __fp16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}
INLINE uint16_t to_half(float x) {
    __fp16 y = (__fp16)x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#else
#define TRIMTAB_HALF 0
INLINE float from_half(uint16_t x) { return (float)x; }
INLINE uint16_t to_half(float x) { return (uint16_t)x; }
#endif

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE int is_finite(uint32_t bits) { return (bits & 0x7F800000u) != 0x7F800000u; }
INLINE int is_nan(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }
INLINE int half_is_finite(uint16_t bits) { return (bits & 0x7C00u) != 0x7C00u; }

/* Round to nearest even. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    return is_nan(bits) ? 0x7FC0u : (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static void widen(float *restrict to, const void *from, int64_t kind, int64_t low, int n) {
    if (kind == BF16) {
        const uint16_t *x = (const uint16_t *)from + low;
        for (int i = 0; i < n; i++) to[i] = float_of((uint32_t)x[i] << 16);
    } else if (kind == FP16) {
        const uint16_t *x = (const uint16_t *)from + low;
        for (int i = 0; i < n; i++) to[i] = from_half(x[i]);
    } else if (kind == FP64) {
        const double *x = (const double *)from + low;
        for (int i = 0; i < n; i++) to[i] = (float)x[i];
    } else {
        memcpy(to, (const float *)from + low, (size_t)n * sizeof *to);
    }
}

/* -- masters (ops/rounding.py) */

static void join_bf16(float *restrict to, const uint16_t *restrict weight, const int16_t *restrict rest, int n) {
    for (int i = 0; i < n; i++) to[i] = float_of(((uint32_t)weight[i] << 16) + (uint32_t)(int32_t)rest[i]);
}

static void split_bf16(uint16_t *restrict weight, int16_t *restrict rest, const float *restrict master, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(master[i]);
        bits = is_nan(bits) ? (bits & 0xFFFF0000u) | 0x400000u : bits; /* a NaN must not carry into the sign */
        uint32_t upper = (bits + 0x8000u) >> 16;
        weight[i] = (uint16_t)upper;
        rest[i] = (int16_t)(uint16_t)(bits - (upper << 16));
    }
}

INLINE float joined_half(uint16_t weight, uint16_t rest) { return from_half(weight) + from_half(rest) / 2048.0f; }

static void join_half(float *restrict to, const uint16_t *restrict weight, const uint16_t *restrict rest, int n) {
    for (int i = 0; i < n; i++) to[i] = joined_half(weight[i], rest[i]);
}

static void split_half(uint16_t *restrict weight, uint16_t *restrict rest, const float *restrict master, int n) {
    for (int i = 0; i < n; i++) {
        uint16_t upper = to_half(master[i]);
        float error = half_is_finite(upper) ? master[i] - from_half(upper) : 0.0f;
        uint16_t lower = to_half(error * 2048.0f);
        if (half_is_finite(upper) && from_half(to_half(joined_half(upper, lower))) != from_half(upper))
            lower--; /* half a unit of the weight: back towards 0 */
        weight[i] = upper;
        rest[i] = lower;
    }
}

/* `random` holds 16 bits per entry. */
static void round_bf16(uint16_t *restrict to, const float *restrict x, const uint32_t *restrict random, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(x[i]);
        to[i] = is_finite(bits) ? (uint16_t)((bits + random[i]) >> 16) : to_bf16(x[i]);
    }
}

static void round_half(uint16_t *restrict to, const float *restrict x, const uint32_t *restrict random, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(x[i]);
        int usable = is_finite(bits) && (bits & 0x7FFFFFFFu) >= 0x38800000u; /* 2⁻¹⁴ */
        to[i] = to_half(usable ? float_of((bits + (random[i] >> 3)) & ~0x1FFFu) : x[i]);
    }
}

/* -- τ (ops/formats.py) */

static void widen_int8(float *restrict to, const Job *job, int64_t low, int64_t global, int n) {
    const int8_t *codes = (const int8_t *)job->tau + low;
    const int64_t block = job->scale_block;
    for (int i = 0; i < n;) {
        int64_t number = (global + i) / block, left = (number + 1) * block - (global + i);
        int end = left < n - i ? i + (int)left : n;
        float scale = job->scales[number - job->scale_first];
        for (; i < end; i++) to[i] = (float)codes[i] * scale;
    }
}

/* Puts the kept entries from `at` on, up to the local index `high`, into zeros; returns the first one beyond. */
static int64_t scatter(float *to, const Job *job, int64_t at, int64_t end, int64_t low, int64_t high) {
    const int64_t start = low / CHUNK * CHUNK;
    for (; at < end && start + job->offsets[at] < high; at++)
        widen(to + (start + job->offsets[at] - low), job->tau, job->tau_kind, at, 1);
    return at;
}

/* Puts the zeros back that `scatter` has overwritten. */
static void unscatter(float *to, const Job *job, int64_t from, int64_t end, int64_t low) {
    const int64_t start = low / CHUNK * CHUNK;
    for (int64_t at = from; at < end; at++) to[start + job->offsets[at] - low] = 0.0f;
}

#endif
