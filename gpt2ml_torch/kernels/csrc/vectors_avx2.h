// Sixteen numbers in two registers. `Floats` are 16 of 32 bits, `Ints` 16 integers of 32 bits or 64 bytes.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};

inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Ints load_bytes(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
inline void store_bytes(void* p, Ints x) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, x.low), _mm256_storeu_si256(halves + 1, x.high);
}

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a * b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a * b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) {  // b where one is NaN
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats min(Floats a, Floats b) {  // likewise
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats magnitude(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats nearest(Floats x) {
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT), _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT)};
}
inline __m256 times_power_of_2(__m256 x, __m256 n) {  // n whole; 0, of NaN too, below the powers of normal numbers
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 representable = _mm256_cmp_ps(n, _mm256_set1_ps(-127), _CMP_NLE_UQ);  // NaN too, which stays
  return _mm256_and_ps(representable, x * _mm256_castsi256_ps(exponent));
}
inline Floats times_power_of_2(Floats x, Floats n) {
  return {times_power_of_2(x.low, n.low), times_power_of_2(x.high, n.high)};
}
inline Floats where_positive(Floats x, Floats a, Floats b) {  // a where x >= 0, else b
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, zero, _CMP_GE_OQ)),
          _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, zero, _CMP_GE_OQ))};
}
inline Floats first_lanes(int64_t count, Floats x, Floats rest) {
  const __m256i limit = _mm256_set1_epi32(std::clamp<int64_t>(count, 0, 16)),
                lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(limit, lane),
                high = _mm256_cmpgt_epi32(limit, _mm256_add_epi32(lane, _mm256_set1_epi32(8)));
  return {_mm256_blendv_ps(rest.low, x.low, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(rest.high, x.high, _mm256_castsi256_ps(high))};
}
inline float sum(Floats x) {
  const __m256 eight = x.low + x.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Lane j of x[i] becomes lane i of x[j].
inline void transpose(__m256 (&x)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2)
    a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(a[i + j]), high = _mm256_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; ++i)
    x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20), x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
}
inline void transpose(Floats (&x)[16]) {
  __m256 quarters[2][2][8];  // of the rows, of the columns
  for (int i = 0; i < 16; ++i) quarters[i / 8][0][i % 8] = x[i].low, quarters[i / 8][1][i % 8] = x[i].high;
  for (auto& half : quarters)
    for (auto& quarter : half) transpose(quarter);
  for (int i = 0; i < 16; ++i) x[i] = {quarters[0][i / 8][i % 8], quarters[1][i / 8][i % 8]};
}
// Lane i is the sum over the lanes of x[i], in each quarter (0 + 2) + (1 + 3), and of the quarters (0 + 1) + (2 + 3).
inline Floats sum_each(Floats (&x)[16]) {
  transpose(x);
  Floats quarters[4];
  for (int i = 0; i < 4; ++i) quarters[i] = (x[4 * i] + x[4 * i + 2]) + (x[4 * i + 1] + x[4 * i + 3]);
  return (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
}

inline Floats from_half(const void* p) {
  const auto* halves = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256 from_bfloat16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats from_bfloat16(const void* p) {
  const auto* halves = static_cast<const __m128i*>(p);
  return {from_bfloat16(_mm_loadu_si128(halves)), from_bfloat16(_mm_loadu_si128(halves + 1))};
}
inline void to_half(void* p, Floats x) {
  auto* halves = static_cast<__m128i*>(p);
  _mm_storeu_si128(halves, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i to_bfloat16(__m256 x) {  // in the low half of each lane
  const __m256i bits = _mm256_castps_si256(x),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest_even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet_nan = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(nearest_even, quiet_nan, is_nan), 16);
}
inline void to_bfloat16(void* p, Floats x) {
  const __m256i packed = _mm256_packus_epi32(to_bfloat16(x.low), to_bfloat16(x.high));  // within 128-bit halves
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
// The first and the second of 16 pairs of bfloat16.
inline Floats first_of_pairs(Ints pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.low, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(pairs.high, 16))};
}
inline Floats second_of_pairs(Ints pairs) {
  const __m256i upper = _mm256_set1_epi32(-1 << 16);
  return {_mm256_castsi256_ps(_mm256_and_si256(pairs.low, upper)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs.high, upper))};
}

inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints shift_left(Ints x, int32_t bits) {
  return {_mm256_sllv_epi32(x.low, all(bits).low), _mm256_sllv_epi32(x.high, all(bits).high)};
}
inline int32_t sum(Ints x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }  // nearest
inline void to_int8(void* p, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}
inline Ints low_nibbles(Ints x) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, low), _mm256_and_si256(x.high, low)};
}
inline Ints high_nibbles(Ints x) { return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)}); }

#ifdef __AVXVNNI__
inline Ints dot_bytes(Ints to, Ints weights,
                      Ints inputs) {  // in each lane, `to` plus 4 products: unsigned times signed
  return {_mm256_dpbusd_avx_epi32(to.low, weights.low, inputs.low),
          _mm256_dpbusd_avx_epi32(to.high, weights.high, inputs.high)};
}
#endif

constexpr bool kMultipliesBfloat16 = false;
inline Floats dot_bfloat16(Floats to, Ints, Ints) { return to; }

// Rows and panels of a product's tile, by how many rows there are: as many accumulators as fit the registers.
constexpr int kManyFloatingRows = 6, kManyIntegerRows = 4, kManyPanels = 1, kFewRows = 4, kFewPanels = 1,
              kSingleRows = 4;

// Whether the registers hold both numbers of the weights' pairs of bfloat16 beside such a tile's accumulators.
constexpr bool kHoldsPairs = false;
