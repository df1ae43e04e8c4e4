// Vectors of 16 floats: from and to the three floating types, and the two functions that the model needs.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512VNNI__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

using torch::headeronly::ScalarType;

constexpr int64_t kLanes = 16;

inline Floats load(const void* source, ScalarType type, int64_t index) {
  if (type == ScalarType::Float) return load(static_cast<const float*>(source) + index);
  const void* half = static_cast<const uint16_t*>(source) + index;
  return type == ScalarType::Half ? from_half(half) : from_bfloat16(half);
}

inline void store(void* target, ScalarType type, int64_t index, Floats value) {
  if (type == ScalarType::Float) return store(static_cast<float*>(target) + index, value);
  void* half = static_cast<uint16_t*>(target) + index;
  return type == ScalarType::Half ? to_half(half, value) : to_bfloat16(half, value);
}

inline int64_t bytes_of(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

// The same for the end of an array: the lanes from `count` on are 0, and are not stored.
inline Floats load_first(const void* source, ScalarType type, int64_t index, int64_t count) {
  if (count >= kLanes) return load(source, type, index);
  alignas(64) char buffer[64] = {};
  const int64_t size = bytes_of(type);
  if (count > 0) std::memcpy(buffer, static_cast<const char*>(source) + index * size, count * size);
  return load(buffer, type, 0);
}

inline void store_first(void* target, ScalarType type, int64_t index, int64_t count, Floats value) {
  if (count >= kLanes) return store(target, type, index, value);
  alignas(64) char buffer[64];
  const int64_t size = bytes_of(type);
  store(buffer, type, 0, value);
  std::memcpy(static_cast<char*>(target) + index * size, buffer, count * size);
}

// e^x for x <= 0, within 2 units in the last place: 2^n times a polynomial in the rest.
inline Floats exp_of_negative(Floats x) {
  const Floats n = nearest(x * all(1.44269504f));
  Floats rest = fnma(n, all(0.693359375f), x);  // ln 2 in two parts
  rest = fnma(n, all(-2.12194440e-4f), rest);
  Floats sum = all(1.9875691500e-4f);  // Cephes, expf
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = fma(sum, rest, all(c));
  sum = fma(sum, rest * rest, rest) + all(1.0f);
  return times_power_of_2(sum, n);
}

// x Φ(x), the exact GELU: erfc(z) = polynomial(1 / (1 + p z)) e^(-z²) with an error below 1.5e-7 (Abramowitz and
// Stegun, 7.1.26), z = |x| / sqrt(2); without the cancellation of 1 + erf for negative x.
inline Floats gelu(Floats x) {
  const Floats z = magnitude(x) * all(0.70710678f);
  const Floats t = all(1.0f) / fma(z, all(0.3275911f), all(1.0f));
  Floats sum = all(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = fma(sum, t, all(c));
  const Floats tail = sum * t * exp_of_negative(fnma(z, z, all(0.0f)));
  const Floats half = x * all(0.5f) * tail;  // x erfc(z) / 2
  return where_positive(x, x - half, half);
}
