// Causal attention over the key-value cache, which holds the new tokens' keys and values already.

#pragma once

#include "vectors.h"

// A row's tokens or slots, each of `heads` contiguous heads; strides in numbers.
struct Heads {
  Numbers numbers;
  int64_t row, token;

  Numbers at(int64_t b, int64_t t, int64_t h, int64_t size) const {
    return {numbers.at(b * row + t * token + h * size), numbers.type};
  }
};

struct Attention {
  Heads q, keys, values, out;  // q and out are float32
  const int64_t* positions;    // (rows, tokens)
  int64_t rows, tokens, slots, heads, head_size;
};

bool supports_head_size(int64_t size);

// A token at position p reads the slots 0..p. Its result does not depend on the other tokens and rows, bit for bit.
void attend(const Attention& job);
