// The layouts stand in linear.cpp; packing.py does the same with PyTorch.

#include "pack.h"

#include "parallel.h"

#include <algorithm>

namespace {

constexpr int64_t kLongestGroup = 128;

// The nearest values of a group under a scale, and the squared error that is left.
template <int kBits> float round_group(const float* group, int64_t size, float scale, int8_t* values) {
  const Floats inverse = all(scale == 0 ? 0.0f : 1 / scale), step = all(scale);
  const Floats low = all(kBits == 8 ? -127.0f : -8.0f), high = all(kBits == 8 ? 127.0f : 7.0f);
  Floats error = all(0.0f);
  for (int64_t k = 0; k < size; k += kLanes) {
    const Floats x = load(group + k);
    const Floats rounded = min(max(nearest(x * inverse), low), high);
    const Floats difference = fnma(rounded, step, x);
    error = fma(difference, difference, error);
    to_int8(values + k, to_ints(rounded));
  }
  return sum(error);
}

// Scale and values of one group of one row. At 4 bits the best of a few scales, of either sign: a negative one lets the
// group's largest weight, if positive, use the value -8.
template <int kBits> uint16_t quantize(const float* group, int64_t size, int8_t* values) {
  Floats widest = all(0.0f), check = all(0.0f);
  for (int64_t k = 0; k < size; k += kLanes) {
    widest = max(widest, magnitude(load(group + k)));
    check = fma(load(group + k), all(0.0f), check);  // NaN once a weight is not finite, and then the scale is too
  }
  const float first = from_bfloat16(to_bfloat16((largest(widest) + sum(check)) / (kBits == 8 ? 127 : 7)));
  float best = first, least = round_group<kBits>(group, size, first, values);
  if constexpr (kBits == 4) {
    int8_t tried[kLongestGroup];
    for (float ratio : {0.95f, 0.875f, -0.95f, -0.875f, -0.8f}) {
      const float scale = from_bfloat16(to_bfloat16(first * ratio));
      const float error = round_group<kBits>(group, size, scale, tried);
      if (!(error < least)) continue;
      best = scale, least = error;
      std::copy_n(tried, size, values);
    }
  }
  return to_bfloat16(best);
}

struct Rows {
  Numbers numbers;
  int64_t count, inputs;

  Floats part(int64_t row, int64_t k) const {  // 0 outside
    return row < count ? load_first(numbers, row * inputs + k, inputs - k) : all(0.0f);
  }
};

template <int kBits> void pack_integer_row(const Rows& rows, int64_t row, int64_t padded, uint8_t* panel, uint16_t* scales) {
  constexpr int64_t kGroup = group_of(kBits == 8 ? Format::Int8 : Format::Int4), kOffset = kBits == 8 ? 128 : 8;
  const int64_t lane = row % kPanel;
  for (int64_t begin = 0, g = 0; begin < padded; begin += kGroup, ++g) {
    const int64_t size = std::min(kGroup, padded - begin);
    alignas(64) float group[kGroup];
    int8_t values[kGroup];
    for (int64_t k = 0; k < size; k += kLanes) store(group + k, rows.part(row, begin + k));
    scales[g * kPanel + lane] = quantize<kBits>(group, size, values);
    for (int64_t k = 0; k < size; ++k) {
      const auto stored = static_cast<uint8_t>(values[k] + kOffset);
      const int64_t column = begin + k;
      if constexpr (kBits == 8) panel[(column / 4 * kPanel + lane) * 4 + column % 4] = stored;
      else {
        uint8_t& both = panel[(column / 8 * kPanel + lane) * 4 + column % 4];
        both = column % 8 < 4 ? stored : both | stored << 4;
      }
    }
  }
}

void pack_floating_row(const Rows& rows, int64_t row, int64_t padded, uint8_t* panel, ScalarType type) {
  const int64_t together = type == ScalarType::BFloat16 ? 2 : 1, lane = row % kPanel;
  for (int64_t k = 0; k < padded; k += kLanes) {
    alignas(64) char buffer[64];
    const Numbers converted{buffer, type};
    store(converted, 0, rows.part(row, k));
    for (int64_t i = 0; i < kLanes; i += together)
      std::memcpy(panel + ((k + i) / together * kPanel + lane) * together * converted.size(), converted.at(i), together * converted.size());
  }
}

}  // namespace

void pack_rows(Format format, Numbers rows, int64_t count, int64_t inputs, uint8_t* weight, uint16_t* scale) {
  const Rows source{rows, count, inputs};
  const int64_t padded = round_up(inputs, kMultiple), panel_bytes = kPanel * padded * bits_of(format) / 8;
  const int64_t panels = round_up(count, kPanel) / kPanel;
  const int64_t groups = is_integer(format) ? round_up(padded, group_of(format)) / group_of(format) : 0;
  parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kPanel; row < last * kPanel; ++row) {
      uint8_t* panel = weight + row / kPanel * panel_bytes;
      uint16_t* scales = scale + row / kPanel * groups * kPanel;
      switch (format) {
        case Format::Float32: pack_floating_row(source, row, padded, panel, ScalarType::Float); break;
        case Format::Float16: pack_floating_row(source, row, padded, panel, ScalarType::Half); break;
        case Format::BFloat16: pack_floating_row(source, row, padded, panel, ScalarType::BFloat16); break;
        case Format::Int8: pack_integer_row<8>(source, row, padded, panel, scales); break;
        case Format::Int4: pack_integer_row<4>(source, row, padded, panel, scales); break;
      }
    }
  });
}
