// A linear layer with packed weights: y = x Wᵀ + b, or its GELU.

#pragma once

#include "vectors.h"

enum class Format { Float32, Float16, BFloat16, Int8, Int4 };

constexpr int64_t kPanel = kLanes;  // outputs in a panel
constexpr int64_t kMultiple = 32;   // inputs are padded to a multiple of it

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr bool is_integer(Format format) { return format == Format::Int8 || format == Format::Int4; }
// Inputs that share a scale.
constexpr int64_t group_of(Format format) { return format == Format::Int8 ? 128 : format == Format::Int4 ? 32 : 0; }
constexpr int64_t bits_of(Format format) {
  return format == Format::Float32 ? 32 : format == Format::Int8 ? 8 : format == Format::Int4 ? 4 : 16;
}

struct Linear {
  Format format;
  int64_t inputs, outputs;
  const uint8_t* weight;
  const uint16_t* scale;  // bfloat16; null for floating-point weights
  Numbers bias;           // or null
};

// x: (rows, inputs), out: (rows, outputs), both contiguous. A row's result does not depend on the other rows.
void apply(const Linear& layer, Numbers x, int64_t rows, Numbers out, bool with_gelu = false);
