// What the compiler has to be told: loops to unroll, and instructions whose intrinsics it handles badly.

#pragma once

#include <immintrin.h>

// Unroll the loop that follows, early: only then does GCC keep the loop's arrays in registers.
#define UNROLL(times) UNROLL_PRAGMA(GCC unroll times)
#define UNROLL_PRAGMA(text) _Pragma(#text)

// In each lane of 32 bits, `to` plus two products of 16 bits. The instructions themselves, since around the intrinsics
// GCC 12 keeps half of the sums in memory.
inline void add_products(__m256i& to, __m256i weights, __m256i inputs) {
  __m256i products;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(to), "=&x"(products) : "x"(weights), "x"(inputs));
}

// In each lane of 16 bits, `to` plus two products of bytes, unsigned times signed; for the same reason.
inline void add_short_products(__m256i& to, __m256i weights, __m256i inputs) {
  __m256i products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(to), "=&x"(products) : "x"(weights), "x"(inputs));
}

#ifdef __AVX512VNNI__

// In each lane of 32 bits, `to` plus four products of bytes, unsigned times signed. The instruction itself, since
// around the intrinsic GCC 12 copies each accumulator twice.
inline __m512i dot_bytes(__m512i to, __m512i weights, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(to) : "v"(weights), "v"(inputs));
  return to;
}

#endif

#ifdef __AVX512BF16__

// In each lane, `to` plus the products of a pair of bfloat16; for the same reason.
inline __m512 dot_bfloat16(__m512 to, __m512i weights, __m512i inputs) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(to) : "v"(weights), "v"(inputs));
  return to;
}

#endif
