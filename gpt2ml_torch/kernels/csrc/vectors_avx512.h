// Sixteen numbers in one register. `Floats` are 16 of 32 bits, `Ints` 16 integers of 32 bits or 64 bytes.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

using Floats = __m512;
using Ints = __m512i;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Ints load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store_bytes(void* p, Ints x) { _mm512_storeu_si512(p, x); }

inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }                   // b where one is NaN
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }                   // likewise
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Floats times_power_of_2(Floats x, Floats n) {
  return _mm512_scalef_ps(x, n);
}  // n whole; 0, of NaN too, for -infinity
inline Floats where_positive(Floats x, Floats a, Floats b) {  // a where x >= 0, else b
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), b, a);
}
inline Floats first_lanes(int64_t count, Floats x, Floats rest) {
  const auto mask = count >= 16 ? 0xffff : (__mmask16)((1u << std::max<int64_t>(count, 0)) - 1);
  return _mm512_mask_blend_ps(mask, rest, x);
}
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// Lane i is the sum over the lanes of x[i], in each quarter (0 + 2) + (1 + 3), and of the quarters (0 + 1) + (2 + 3).
inline Floats sum_each(Floats (&x)[16]) {
  Floats eighths[8], fours[4], twos[2];
  UNROLL(16)
  for (int i = 0; i < 8; ++i)
    eighths[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  UNROLL(16)
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(eighths[2 * i]), b = _mm512_castps_pd(eighths[2 * i + 1]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  UNROLL(16)
  for (int i = 0; i < 2; ++i)
    twos[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) +
              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
  return _mm512_shuffle_f32x4(twos[0], twos[1], 0x88) + _mm512_shuffle_f32x4(twos[0], twos[1], 0xdd);
}

// Lane j of x[i] becomes lane i of x[j].
inline void transpose(Floats (&x)[16]) {
  Floats a[16], b[16];
  UNROLL(16)
  for (int i = 0; i < 16; i += 2)
    a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  UNROLL(16)
  for (int i = 0; i < 16; i += 4) UNROLL(16)
  for (int j = 0; j < 2; ++j) {
    const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
    b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
    b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
  }
  UNROLL(16)
  for (int i = 0; i < 4; ++i) {  // quarters of the registers, in two steps
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88),
          a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  UNROLL(16)
  for (int i = 0; i < 8; ++i)
    x[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88), x[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
}

inline Floats from_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline Floats from_bfloat16(const void* p) {
  const Ints wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void to_half(void* p, Floats x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline void to_bfloat16(void* p, Floats x) {
  const Ints bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), all(1));
  const Ints nearest_even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, all(0x7fff)));
  const Ints quiet_nan = _mm512_or_si512(bits, all(1 << 22));
  const Ints result = _mm512_mask_mov_epi32(nearest_even, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet_nan);
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
// The first and the second of 16 pairs of bfloat16.
inline Floats first_of_pairs(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats second_of_pairs(Ints pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, all(-1 << 16))); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints shift_left(Ints x, int32_t bits) { return _mm512_sllv_epi32(x, all(bits)); }
inline int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints to_ints(Floats x) { return _mm512_cvtps_epi32(x); }  // nearest
inline void to_int8(void* p, Ints x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }
inline Ints low_nibbles(Ints x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }

// Whether pairs of bfloat16 are multiplied as they are.
#ifdef __AVX512BF16__
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = false;
inline Floats dot_bfloat16(Floats to, Ints, Ints) { return to; }
#endif

// Rows and panels of a product's tile, by how many rows there are: as many accumulators as fit the registers.
constexpr int kManyFloatingRows = 12, kManyIntegerRows = 6, kManyPanels = 2, kFewRows = 8, kFewPanels = 2,
              kSingleRows = 4;

// Whether the registers hold both numbers of the weights' pairs of bfloat16 beside such a tile's accumulators.
constexpr bool kHoldsPairs = true;
