// Sums of products of unsigned weights and inputs of -127..127, four of each in a lane, in the form that the
// processor's instructions take: exact, so that every form gives the same.

#pragma once

#include "vectors.h"

inline Ints broadcast_4_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return all(four);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

using Int8Weights = Ints;
using Int8Inputs = Ints;
constexpr int64_t kInt8InputBytes = 1;  // of one prepared input
inline void store_int8_inputs(uint8_t* p, Ints x) { to_int8(p, x); }
inline Int8Weights int8_weights(Ints bytes) { return bytes; }
inline Int8Inputs int8_inputs(const uint8_t* four) { return broadcast_4_bytes(four); }
inline Ints dot_int8(Ints to, Int8Weights weights, Int8Inputs inputs) { return dot_bytes(to, weights, inputs); }

// The sum over a group of 32 inputs.
inline Ints begin_int4(int32_t start) { return all(start); }
inline Ints dot_int4(Ints to, Ints weights, Ints inputs) { return dot_bytes(to, weights, inputs); }
inline Ints end_int4(Ints sum, int32_t) { return sum; }

#else

// Bytes multiply into sums of two products of 16 bits. For 2 * 255 * 127 those are too few: int8 takes numbers of 16
// bits, two of the four, then the others. A whole group of int4's products, 16 * 15 * 127, fits: it is widened at its
// end.

struct Int8Weights {
  Ints even, odd;  // of each lane's bytes
};
struct Int8Inputs {
  __m256i even, odd;
};
constexpr int64_t kInt8InputBytes = 2;
inline void store_int8_inputs(uint8_t* p, Ints x) {  // of each four, first the even ones
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
}
inline Int8Weights int8_weights(Ints bytes) {
  const __m256i even = _mm256_set1_epi16(0xff);
  return {{_mm256_and_si256(bytes.low, even), _mm256_and_si256(bytes.high, even)},
          {_mm256_srli_epi16(bytes.low, 8), _mm256_srli_epi16(bytes.high, 8)}};
}
inline Int8Inputs int8_inputs(const uint8_t* four) {
  return {broadcast_4_bytes(four).low, broadcast_4_bytes(four + 4).low};
}
inline Ints dot_int8(Ints to, Int8Weights weights, Int8Inputs inputs) {
  add_products(to.low, weights.even.low, inputs.even), add_products(to.high, weights.even.high, inputs.even);
  add_products(to.low, weights.odd.low, inputs.odd), add_products(to.high, weights.odd.high, inputs.odd);
  return to;
}

inline Ints begin_int4(int32_t) { return all(0); }
inline Ints dot_int4(Ints to, Ints weights, Ints inputs) {
  add_short_products(to.low, weights.low, inputs.low), add_short_products(to.high, weights.high, inputs.high);
  return to;
}
inline Ints end_int4(Ints sum, int32_t start) {
  const __m256i ones = _mm256_set1_epi16(1);
  return add(all(start), {_mm256_madd_epi16(sum.low, ones), _mm256_madd_epi16(sum.high, ones)});
}

#endif
