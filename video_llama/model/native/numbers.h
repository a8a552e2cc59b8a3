/* Sixteen numbers at a time: bfloat16 from and to float32, and functions that the compiler has not. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline __m512 from_bf16(const bf16 *numbers) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline void store_bf16(bf16 *target, __m512 low, __m512 high) {
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* e^x for x <= 0 to about 2 units in the last place: 2^n times a Taylor polynomial of the rest. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* in this order NaN stays NaN */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

/* x/2 (1 + erf(x / sqrt 2)), with erf of Abramowitz and Stegun, 7.1.26, whose error is below 1.5e-7. */
static inline __m512 gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 sum = _mm512_set1_ps(1.061405429f);
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
    const __m512 zero = _mm512_setzero_ps(), falling = exponential(_mm512_fnmadd_ps(z, z, zero));
    const __m512 outside = _mm512_mul_ps(_mm512_mul_ps(sum, t), falling); /* 1 - erf(z) */
    /* What a negative x is left with, and a positive one loses: */
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), outside);
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, zero, _CMP_GE_OQ), x, tail);
}
