// Vectors of 16 floats: from and to the three floating types, and the two functions that the model needs.

#pragma once

#include <immintrin.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

using torch::headeronly::ScalarType;

constexpr int64_t kLanes = 16;

inline __m512 load16(const void* source, ScalarType type, int64_t index, __mmask16 mask) {
  if (type == ScalarType::Float) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + index);
  __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(source) + index);
  if (type == ScalarType::Half) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store16(void* target, ScalarType type, int64_t index, __mmask16 mask, __m512 value) {
  if (type == ScalarType::Float) return _mm512_mask_storeu_ps(static_cast<float*>(target) + index, mask, value);
  __m256i half = type == ScalarType::Half ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                          : (__m256i)_mm512_cvtneps_pbh(value);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(target) + index, mask, half);
}

inline __mmask16 first_lanes(int64_t count) { return count >= kLanes ? 0xffff : (__mmask16)((1u << std::max<int64_t>(count, 0)) - 1); }

// e^x within 2 units in the last place: 2^n times a polynomial in the rest; 0 and infinity where it leaves the range.
inline __m512 exp16(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);  // Cephes, expf
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c));
  sum = _mm512_add_ps(_mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), rest), _mm512_set1_ps(1));
  return _mm512_scalef_ps(sum, n);
}

// x Φ(x), the exact GELU: erfc(z) = polynomial(1 / (1 + p z)) e^(-z²) with an error below 1.5e-7 (Abramowitz and
// Stegun, 7.1.26), z = |x| / sqrt(2); without the cancellation of 1 + erf for negative x.
inline __m512 gelu16(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 t = _mm512_div_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1)));
  __m512 sum = _mm512_set1_ps(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(c));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(sum, t), exp16(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));
  const __m512 half = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), tail);  // x erfc(z) / 2
  return _mm512_mask_sub_ps(half, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), x, half);
}
