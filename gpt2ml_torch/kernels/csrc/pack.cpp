// The layouts stand in linear.cpp; packing.py does the same with PyTorch.

#include "pack.h"

#include "parallel.h"

#include <algorithm>
#include <limits>

namespace {

// A panel's rows are turned first, so that each lane has a row from there on.
constexpr int64_t kColumns = 128;  // at a time: whole groups
static_assert(kColumns % group_of(Format::Int8) == 0 && kColumns % group_of(Format::Int4) == 0);

// Sixteen rows from `row` on, `size` columns from `begin` on; what lies beyond the last row and column is 0.
void turn(Numbers rows, int64_t row, int64_t count, int64_t inputs, int64_t begin, int64_t size, Floats* columns) {
  for (int64_t k = begin; k < begin + size; k += kLanes, columns += kLanes) {
    Floats square[kPanel];
    for (int64_t lane = 0; lane < kPanel; ++lane)
      square[lane] = row + lane < count ? load_first(rows, (row + lane) * inputs + k, inputs - k) : all(0.0f);
    transpose(square);
    std::copy_n(square, kLanes, columns);
  }
}

inline Floats to_bfloat16_and_back(Floats x) {
  uint16_t rounded[kLanes];
  to_bfloat16(rounded, x);
  return from_bfloat16(rounded);
}

inline Floats inverse_of(Floats scale) {
  return where_positive(all(0.0f) - magnitude(scale), all(0.0f), all(1.0f) / scale);  // 0 of 0
}

// The nearest value of the format.
template <Format kFormat> Floats round(Floats x, Floats inverse) {
  const Floats low = all(kFormat == Format::Int8 ? -127.0f : -8.0f),
               high = all(kFormat == Format::Int8 ? 127.0f : 7.0f);
  return min(max(nearest(x * inverse), low), high);
}

// The squared error that a scale leaves.
template <Format kFormat> Floats error_of(const Floats* group, int64_t size, Floats scale) {
  const Floats inverse = inverse_of(scale);
  Floats error = all(0.0f);
  for (int64_t k = 0; k < size; ++k) {
    const Floats difference = fnma(round<kFormat>(group[k], inverse), scale, group[k]);
    error = fma(difference, difference, error);
  }
  return min(error, all(std::numeric_limits<float>::max()));
}

// The scales of a group. At 4 bits the best of a few, of either sign: a negative one lets the group's largest weight,
// if positive, use the value -8.
template <Format kFormat> Floats scale_of(const Floats* group, int64_t size) {
  Floats widest = all(0.0f), check = all(0.0f);
  for (int64_t k = 0; k < size; ++k) {
    widest = max(widest, magnitude(group[k]));
    check = fma(group[k], all(0.0f), check);  // NaN once a weight is not finite, and then the scale is too
  }
  const Floats first = to_bfloat16_and_back((widest + check) / all(kFormat == Format::Int8 ? 127.0f : 7.0f));
  if constexpr (kFormat == Format::Int8) return first;
  Floats best = first, least = error_of<kFormat>(group, size, first);
  for (float ratio : {0.95f, 0.875f, -0.95f, -0.875f, -0.8f}) {
    const Floats scale = to_bfloat16_and_back(first * all(ratio)), error = error_of<kFormat>(group, size, scale);
    best = where_positive(error - least, best, scale), least = min(error, least);
  }
  return best;
}

// A group's values, unsigned, in words of 4 or 8 of them for each row.
template <Format kFormat> void store_values(const Floats* group, int64_t size, Floats scale, uint8_t* out) {
  constexpr int kValues = kFormat == Format::Int8 ? 4 : 8;
  const Floats inverse = inverse_of(scale), offset = all(kFormat == Format::Int8 ? 128.0f : 8.0f);
  for (int64_t k = 0; k < size; k += kValues, out += 4 * kPanel) {
    Ints word = all(0);
    UNROLL(8)
    for (int i = 0; i < kValues; ++i)
      word = add(word, shift_left(to_ints(round<kFormat>(group[k + i], inverse) + offset), i % 4 * 8 + i / 4 * 4));
    store_bytes(out, word);
  }
}

// A chunk of columns as the format stores them, and the scales of its groups, if it has any.
template <Format kFormat> void store_columns(const Floats* columns, int64_t size, uint8_t* out, uint16_t* scales) {
  if constexpr (is_integer(kFormat)) {
    for (int64_t begin = 0; begin < size; begin += group_of(kFormat), scales += kPanel) {
      const int64_t group = std::min(group_of(kFormat), size - begin);
      const Floats scale = scale_of<kFormat>(columns + begin, group);
      to_bfloat16(scales, scale);
      store_values<kFormat>(columns + begin, group, scale, out + begin * kPanel * bits_of(kFormat) / 8);
    }
  } else if constexpr (kFormat == Format::BFloat16) {
    for (int64_t k = 0; k < size; k += 2) {
      uint16_t pair[2][kPanel], steps[kPanel][2];
      to_bfloat16(pair[0], columns[k]), to_bfloat16(pair[1], columns[k + 1]);
      for (int64_t lane = 0; lane < kPanel; ++lane) steps[lane][0] = pair[0][lane], steps[lane][1] = pair[1][lane];
      std::memcpy(out + k * kPanel * 2, steps, sizeof steps);
    }
  } else {
    const Numbers target{out, kFormat == Format::Float32 ? Type::Float32 : Type::Float16};
    for (int64_t k = 0; k < size; ++k) store(target, k * kPanel, columns[k]);
  }
}

template <Format kFormat> void pack(Numbers rows, int64_t count, int64_t inputs, uint8_t* weight, uint16_t* scale) {
  const int64_t padded = round_up(inputs, kMultiple), panel_bytes = kPanel * padded * bits_of(kFormat) / 8;
  const int64_t group = is_integer(kFormat) ? group_of(kFormat) : padded, groups = round_up(padded, group) / group;
  parallel_for(0, round_up(count, kPanel) / kPanel, 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      uint8_t* out = weight + panel * panel_bytes;
      uint16_t* scales = is_integer(kFormat) ? scale + panel * groups * kPanel : nullptr;
      for (int64_t begin = 0; begin < padded; begin += kColumns) {
        const int64_t size = std::min(kColumns, padded - begin);
        Floats columns[kColumns];
        turn(rows, panel * kPanel, count, inputs, begin, size, columns);
        store_columns<kFormat>(columns, size, out, scales);
        out += size * kPanel * bits_of(kFormat) / 8;
        if (is_integer(kFormat)) scales += kColumns / group * kPanel;
      }
    }
  });
}

}  // namespace

void pack_rows(Format format, Numbers rows, int64_t count, int64_t inputs, uint8_t* weight, uint16_t* scale) {
  switch (format) {
    case Format::Float32:
      return pack<Format::Float32>(rows, count, inputs, weight, scale);
    case Format::Float16:
      return pack<Format::Float16>(rows, count, inputs, weight, scale);
    case Format::BFloat16:
      return pack<Format::BFloat16>(rows, count, inputs, weight, scale);
    case Format::Int8:
      return pack<Format::Int8>(rows, count, inputs, weight, scale);
    case Format::Int4:
      return pack<Format::Int4>(rows, count, inputs, weight, scale);
  }
}
