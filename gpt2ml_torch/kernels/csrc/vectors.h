// Vectors of 16 floats: from and to the three floating types, and the two functions that the model needs.

#pragma once

#include "compiler.h"

#include <cstdint>
#include <cstring>

#ifdef __AVX512VNNI__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

constexpr int64_t kLanes = 16;

enum class Type { Float32, BFloat16, Float16 };

// An array of one of the three floating types.
struct Numbers {
  void* data;
  Type type;

  int64_t size() const { return type == Type::Float32 ? 4 : 2; }  // of one number, in bytes
  void* at(int64_t index) const { return static_cast<char*>(data) + index * size(); }
};

inline Floats load(Numbers source, int64_t index) {
  const void* p = source.at(index);
  return source.type == Type::Float32   ? load(static_cast<const float*>(p))
         : source.type == Type::Float16 ? from_half(p)
                                        : from_bfloat16(p);
}

inline void store(Numbers target, int64_t index, Floats value) {
  void* p = target.at(index);
  if (target.type == Type::Float32) store(static_cast<float*>(p), value);
  else if (target.type == Type::Float16) to_half(p, value);
  else to_bfloat16(p, value);
}

// The same for the end of an array: the lanes from `count` on are 0, and are not stored.
inline Floats load_first(Numbers source, int64_t index, int64_t count) {
  if (count >= kLanes) return load(source, index);
  alignas(64) char buffer[64] = {};
  if (count > 0) std::memcpy(buffer, source.at(index), count * source.size());
  return load(Numbers{buffer, source.type}, 0);
}

inline void store_first(Numbers target, int64_t index, int64_t count, Floats value) {
  if (count >= kLanes) return store(target, index, value);
  alignas(64) char buffer[64];
  store(Numbers{buffer, target.type}, 0, value);
  std::memcpy(target.at(index), buffer, count * target.size());
}

// e^x for x <= 0, within 2 units in the last place: 2^n times a polynomial in the rest. For -infinity the polynomial is
// NaN, and 2^n of it 0.
inline Floats exp_of_negative(Floats x) {
  const Floats n = nearest(x * all(1.44269504f));
  Floats rest = fnma(n, all(0.693359375f), x);  // ln 2 in two parts
  rest = fnma(n, all(-2.12194440e-4f), rest);
  Floats sum = all(1.9875691500e-4f);  // Cephes, expf
  UNROLL(16)
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
  UNROLL(16)
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = fma(sum, t, all(c));
  const Floats tail = sum * t * exp_of_negative(fnma(z, z, all(0.0f)));
  const Floats half = x * all(0.5f) * tail;  // x erfc(z) / 2
  return where_positive(x, x - half, half);
}
