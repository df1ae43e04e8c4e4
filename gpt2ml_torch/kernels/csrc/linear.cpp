// Products with packed weights of 32, 16, 8 and 4 bits.
//
// Decoding reads every weight once for each token, so a matrix-vector product has to keep up with the memory, and the
// same packed weights have to serve the prompt's matrix product at the speed of the arithmetic units: there is no room
// for a second copy. One layout does both. M rows of x, N outputs, K inputs; outputs come in panels of 16, one for each
// 32-bit lane of a vector, and a panel's weights lie one after the other along K:
//
//     format     weight                                      scale, for each output and group     x becomes
//     float32    [N/16][K][16]                               -                                    float32
//     float16    [N/16][K][16]                               -                                    float32
//     bfloat16   [N/16][K/2][16][2]                          -                                    float32 or bfloat16
//     int8       [N/16][K/4][16][4] uint8, value + 128       [N/16][K/128][16] bfloat16           int8, scaled in
//     groups int4       [N/16][K/8][16][4] uint8, value + 8,        [N/16][K/32][16] bfloat16            int8, scaled
//     in groups
//                inputs 4..7 of 8 in the upper half-byte
//
// Without VNNI the int8 that meet int8 weights take 16 bits each: see integer_products.h.
// K is padded to a multiple of 32 and N to one of 16. The unsigned weights' offset is taken back by starting each sum
// at -offset * sum(x). An output's sum always runs along K in the same order, whatever M, the tile and the number of
// threads are, so a row's result never depends on its neighbours: batched and alone agree bit for bit.

#include "linear.h"

#include "integer_products.h"
#include "parallel.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int64_t kSerialWork = 1 << 16;    // elements of x that one thread prepares faster than two
constexpr int64_t kAhead = 2048;            // bytes of a panel that are fetched in advance: about what a load takes
constexpr int64_t kSliceBytes = 16 << 10;   // of a floating-point panel, for many rows: two stay in the first cache
constexpr int64_t kChunkBytes = 512 << 10;  // of prepared rows, along a slice: they stay in the second

// What a vector load of one panel holds: so many inputs of 16 outputs.
template <Format kFormat> constexpr int64_t kInputs = kFormat == Format::BFloat16 ? 2
                                                      : kFormat == Format::Int8   ? 4
                                                      : kFormat == Format::Int4   ? 8
                                                                                  : 1;
template <Format kFormat> constexpr int64_t kStepBytes = kFormat == Format::Float16 ? 32 : 64;
template <Format kFormat> constexpr bool kInteger = is_integer(kFormat);
template <Format kFormat> constexpr int64_t kGroup = group_of(kFormat);
// What is to be taken back of the unsigned weights.
template <Format kFormat> constexpr int32_t kOffset = kFormat == Format::Int4 ? 8 : 128;
template <Format kFormat> constexpr int64_t kInputBytes =  // of one prepared number
    kFormat == Format::Int8                              ? kInt8InputBytes
    : kFormat == Format::Int4                            ? 1
    : kFormat == Format::BFloat16 && kMultipliesBfloat16 ? 2
                                                         : 4;
template <Format kFormat> constexpr int kManyRows = kInteger<kFormat> ? kManyIntegerRows : kManyFloatingRows;
// Inputs that many rows are multiplied by before the next ones. Rows of integers are short: all at once is faster.
template <Format kFormat> constexpr int64_t kSlice =
    kInteger<kFormat> ? std::numeric_limits<int64_t>::max() : kSliceBytes / kStepBytes<kFormat> * kInputs<kFormat>;

// ---- the inputs: floating point, or int8 with a scale and a starting sum for each group

struct Inputs {
  std::unique_ptr<uint8_t, void (*)(void*)> memory{nullptr, std::free};
  const uint8_t* values = nullptr;  // [M][row_bytes]
  const float* scales = nullptr;    // [M][groups]
  const int32_t* starts = nullptr;  // [M][groups]: -offset * sum of the group's int8 values
  int64_t row_bytes = 0, groups = 0;
};

template <Format kFormat> void to_floating(Numbers x, int64_t row, int64_t K, uint8_t* out) {
  const Numbers target{out, kInputBytes<kFormat> == 2 ? Type::BFloat16 : Type::Float32};
  for (int64_t k = 0; k < round_up(K, kMultiple); k += kLanes) store(target, k, load_first(x, row * K + k, K - k));
}

// A group with a NaN or an infinity gets NaN as its scale, which then reaches the result.
template <Format kFormat>
void to_integers(Numbers x, int64_t row, int64_t K, uint8_t* out, float* scales, int32_t* starts) {
  const int64_t padded = round_up(K, kMultiple);
  for (int64_t begin = 0, g = 0; begin < padded; begin += kGroup<kFormat>, ++g) {
    const int64_t end = std::min(begin + kGroup<kFormat>, padded);
    Floats widest = all(0.0f), check = all(0.0f);
    for (int64_t k = begin; k < end; k += kLanes) {
      const Floats value = load_first(x, row * K + k, K - k);
      widest = max(widest, magnitude(value));
      check = fma(value, all(0.0f), check);  // NaN once one value is not finite
    }
    const float scale = largest(widest) + sum(check);
    const Floats inverse = all(scale > 0 ? 127.0f / scale : 0.0f);
    Ints total = all(0);
    for (int64_t k = begin; k < end; k += kLanes) {
      const Ints rounded = to_ints(load_first(x, row * K + k, K - k) * inverse);
      total = add(total, rounded);
      if constexpr (kFormat == Format::Int8) store_int8_inputs(out + k * kInt8InputBytes, rounded);
      else to_int8(out + k, rounded);
    }
    scales[g] = scale / 127.0f;
    starts[g] = -kOffset<kFormat> * sum(total);
  }
}

template <Format kFormat> Inputs prepare(Numbers x, int64_t M, int64_t K) {
  Inputs in;
  const int64_t padded = round_up(K, kMultiple);
  in.row_bytes = round_up(kInputBytes<kFormat> * padded, 64);
  if (kInputBytes<kFormat> == 4 && x.type == Type::Float32 && in.row_bytes == 4 * K) {
    in.values = static_cast<const uint8_t*>(x.data);
    return in;
  }
  if constexpr (kInteger<kFormat>) in.groups = (padded + kGroup<kFormat> - 1) / kGroup<kFormat>;
  const int64_t value_bytes = M * in.row_bytes, group_bytes = round_up(M * in.groups * 4, 64);
  in.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, value_bytes + 2 * group_bytes)));
  if (!in.memory) throw std::bad_alloc();
  uint8_t* values = in.memory.get();
  float* scales = reinterpret_cast<float*>(values + value_bytes);
  int32_t* starts = reinterpret_cast<int32_t*>(values + value_bytes + group_bytes);
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* out = values + row * in.row_bytes;
      if constexpr (kInteger<kFormat>)
        to_integers<kFormat>(x, row, K, out, scales + row * in.groups, starts + row * in.groups);
      else to_floating<kFormat>(x, row, K, out);
    }
  };
  if (M * K <= kSerialWork) rows(0, M);
  else parallel_for(0, M, 1, rows);
  in.values = values, in.scales = scales, in.starts = starts;
  return in;
}

// ---- the product

struct Job {
  Inputs in;
  const uint8_t* weight;
  const uint16_t* scale;
  Numbers bias, out;
  bool gelu;
  int64_t M, N, padded;  // padded: K rounded up
  int64_t panel_bytes;   // of one panel's weights
};

// The inputs [begin, end) of a product, and each row's sums up to there, (rows, kCols, 16): read unless begin is 0,
// written unless end is the last.
struct Slice {
  int64_t begin, end;
  float* sums;
};

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline Floats broadcast_float(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return all(value);
}

template <int kCols> inline void add_products(Floats (&sum)[kCols], const Floats (&weights)[kCols],
                                              const uint8_t* input) {
  const Floats value = broadcast_float(input);
  UNROLL(16)
  for (int c = 0; c < kCols; ++c) sum[c] = fma(weights[c], value, sum[c]);
}

// kRows rows of x times kCols panels; the accumulators stay in registers all along the slice. GCC keeps an array in
// registers only where it unrolls every loop over it early, and that takes the pragma.
template <Format kFormat, int kRows, int kCols>
void sums_floating(const Job& job, Slice slice, const uint8_t* x, const uint8_t* w, Floats (&sum)[kRows][kCols]) {
  constexpr bool kSplits = kInputBytes<kFormat> == 4 && kInputs<kFormat> == 2;  // pairs into their two numbers
  x += slice.begin * kInputBytes<kFormat>, w += slice.begin / kInputs<kFormat> * kStepBytes<kFormat>;
  for (int64_t k = slice.begin; k < slice.end;
       k += kInputs<kFormat>, x += kInputs<kFormat> * kInputBytes<kFormat>, w += kStepBytes<kFormat>) {
    Floats first[kCols], second[kCols];
    Ints pairs[kCols];
    UNROLL(16)
    for (int c = 0; c < kCols; ++c) {
      const uint8_t* weight = w + c * job.panel_bytes;
      prefetch(weight + kAhead);
      if constexpr (kFormat == Format::Float32) first[c] = load(reinterpret_cast<const float*>(weight));
      if constexpr (kFormat == Format::Float16) first[c] = from_half(weight);
      if constexpr (kFormat == Format::BFloat16) pairs[c] = load_bytes(weight), first[c] = first_of_pairs(pairs[c]);
      if constexpr (kSplits && kHoldsPairs) second[c] = second_of_pairs(pairs[c]);
    }
    UNROLL(16)
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* input = x + r * job.in.row_bytes;
      if constexpr (kInputBytes<kFormat> == 2) {
        const Ints pair = broadcast_4_bytes(input);
        UNROLL(16)
        for (int c = 0; c < kCols; ++c) sum[r][c] = dot_bfloat16(sum[r][c], pairs[c], pair);
      } else {
        add_products(sum[r], first, input);
        if constexpr (kSplits && kHoldsPairs) add_products(sum[r], second, input + 4);
      }
    }
    if constexpr (kSplits && !kHoldsPairs) {
      UNROLL(16)
      for (int c = 0; c < kCols; ++c) second[c] = second_of_pairs(pairs[c]);
      UNROLL(16)
      for (int r = 0; r < kRows; ++r) add_products(sum[r], second, x + r * job.in.row_bytes + 4);
    }
  }
}

template <Format kFormat, int kRows, int kCols>
void sums_integer(const Job& job, int64_t row, const uint8_t* x, const uint8_t* w, const uint16_t* scale,
                  Floats (&sum)[kRows][kCols]) {
  const float* x_scale = job.in.scales + row * job.in.groups;
  const int32_t* start = job.in.starts + row * job.in.groups;
  for (int64_t begin = 0, g = 0; begin < job.padded; begin += kGroup<kFormat>, ++g) {
    const int64_t end = std::min(begin + kGroup<kFormat>, job.padded);
    Ints dot[kRows][kCols];
    UNROLL(16)
    for (int r = 0; r < kRows; ++r) UNROLL(16)
    for (int c = 0; c < kCols; ++c) {
      const int32_t first = start[r * job.in.groups + g];
      dot[r][c] = kFormat == Format::Int4 ? begin_int4(first) : all(first);
    }
    for (int64_t k = begin; k < end; k += kInputs<kFormat>, x += kInputs<kFormat> * kInputBytes<kFormat>, w += 64) {
      Ints weight[kCols];
      UNROLL(16)
      for (int c = 0; c < kCols; ++c) {
        weight[c] = load_bytes(w + c * job.panel_bytes);
        prefetch(w + c * job.panel_bytes + kAhead);
      }
      if constexpr (kFormat == Format::Int8) {
        Int8Weights form[kCols];
        UNROLL(16)
        for (int c = 0; c < kCols; ++c) form[c] = int8_weights(weight[c]);
        UNROLL(16)
        for (int r = 0; r < kRows; ++r) {
          const Int8Inputs four = int8_inputs(x + r * job.in.row_bytes);
          UNROLL(16)
          for (int c = 0; c < kCols; ++c) dot[r][c] = dot_int8(dot[r][c], form[c], four);
        }
      } else {
        Ints low[kCols], high[kCols];
        UNROLL(16)
        for (int c = 0; c < kCols; ++c) low[c] = low_nibbles(weight[c]), high[c] = high_nibbles(weight[c]);
        UNROLL(16)
        for (int r = 0; r < kRows; ++r) {
          const uint8_t* input = x + r * job.in.row_bytes;
          const Ints four = broadcast_4_bytes(input), next = broadcast_4_bytes(input + 4);
          UNROLL(16)
          for (int c = 0; c < kCols; ++c) dot[r][c] = dot_int4(dot_int4(dot[r][c], low[c], four), high[c], next);
        }
      }
    }
    UNROLL(16)
    for (int c = 0; c < kCols; ++c) {
      const Floats weight_scale = from_bfloat16(scale + (c * job.in.groups + g) * kPanel);
      UNROLL(16)
      for (int r = 0; r < kRows; ++r) {
        const Floats both = weight_scale * all(x_scale[r * job.in.groups + g]);
        const Ints whole = kFormat == Format::Int4 ? end_int4(dot[r][c], start[r * job.in.groups + g]) : dot[r][c];
        sum[r][c] = fma(to_floats(whole), both, sum[r][c]);
      }
    }
  }
}

template <Format kFormat, int kRows, int kCols> void tile(const Job& job, Slice slice, int64_t row, int64_t panel) {
  Floats sum[kRows][kCols];
  UNROLL(16)
  for (int r = 0; r < kRows; ++r) UNROLL(16)
  for (int c = 0; c < kCols; ++c) sum[r][c] = slice.begin ? load(slice.sums + (r * kCols + c) * kPanel) : all(0.0f);
  const uint8_t* x = job.in.values + row * job.in.row_bytes;
  const uint8_t* w = job.weight + panel * job.panel_bytes;
  if constexpr (kInteger<kFormat>)
    sums_integer<kFormat, kRows, kCols>(job, row, x, w, job.scale + panel * job.in.groups * kPanel, sum);
  else sums_floating<kFormat, kRows, kCols>(job, slice, x, w, sum);
  if (slice.end < job.padded) {
    UNROLL(16)
    for (int r = 0; r < kRows; ++r) UNROLL(16)
    for (int c = 0; c < kCols; ++c) store(slice.sums + (r * kCols + c) * kPanel, sum[r][c]);
    return;
  }
  UNROLL(16)
  for (int c = 0; c < kCols; ++c) {
    // Through memory, so that the loop below need not be unrolled: an index that varies would keep `sum` itself there.
    alignas(64) float columns[kRows][kPanel];
    UNROLL(16)
    for (int r = 0; r < kRows; ++r) store(columns[r], sum[r][c]);
    const int64_t n = (panel + c) * kPanel, count = job.N - n;
    const Floats bias = job.bias.data ? load_first(job.bias, n, count) : all(0.0f);
    for (int r = 0; r < kRows; ++r) {
      const Floats y = load(columns[r]) + bias;
      store_first(job.out, (row + r) * job.N + n, count, job.gelu ? gelu(y) : y);
    }
  }
}

// Rows [row, end) of x for the panels [panel, panel + kCols), in tiles of kRows rows and smaller ones for the rest.
template <Format kFormat, int kRows, int kCols>
void column(const Job& job, Slice slice, int64_t panel, int64_t row, int64_t end) {
  for (; row + kRows <= end; row += kRows, slice.sums += kRows * kCols * kPanel)
    tile<kFormat, kRows, kCols>(job, slice, row, panel);
  if constexpr (kRows > 1)
    if (row < end) column<kFormat, kRows == 6 ? 4 : kRows / 2, kCols>(job, slice, panel, row, end);
}

template <Format kFormat> void multiply(const Job& job) {
  const int64_t panels = (job.N + kPanel - 1) / kPanel, slice = std::min(kSlice<kFormat>, job.padded);
  const int64_t chunk =
      std::max<int64_t>(kChunkBytes / (slice * kInputBytes<kFormat>) / kManyRows<kFormat>, 1) * kManyRows<kFormat>;
  for (int64_t row = 0; row < job.M; row += chunk) {
    const int64_t end = std::min(row + chunk, job.M), rows = end - row;
    const Slice whole{0, job.padded, nullptr};
    parallel_for(0, panels, 4, [&](int64_t panel, int64_t last) {
      if (rows > kFewRows) {
        std::vector<float> sums(slice < job.padded ? rows * kManyPanels * kPanel : 0);
        for (; panel + kManyPanels <= last; panel += kManyPanels)
          for (int64_t k = 0; k < job.padded; k += slice) {
            const Slice part{k, std::min(k + slice, job.padded), sums.data()};
            column<kFormat, kManyRows<kFormat>, kManyPanels>(job, part, panel, row, end);
          }
      } else if (rows > kSingleRows) {
        for (; panel + kFewPanels <= last; panel += kFewPanels)
          column<kFormat, kFewRows, kFewPanels>(job, whole, panel, row, end);
      }
      for (; panel < last; ++panel) column<kFormat, kSingleRows, 1>(job, whole, panel, row, end);
    });
  }
}

template <Format kFormat> void run(const Linear& layer, Numbers x, int64_t rows, Numbers out, bool with_gelu) {
  const int64_t padded = round_up(layer.inputs, kMultiple),
                panel_bytes = padded / kInputs<kFormat> * kStepBytes<kFormat>;
  multiply<kFormat>(Job{prepare<kFormat>(x, rows, layer.inputs), layer.weight, layer.scale, layer.bias, out, with_gelu,
                        rows, layer.outputs, padded, panel_bytes});
}

}  // namespace

void apply(const Linear& layer, Numbers x, int64_t rows, Numbers out, bool with_gelu) {
  switch (layer.format) {
    case Format::Float32:
      return run<Format::Float32>(layer, x, rows, out, with_gelu);
    case Format::Float16:
      return run<Format::Float16>(layer, x, rows, out, with_gelu);
    case Format::BFloat16:
      return run<Format::BFloat16>(layer, x, rows, out, with_gelu);
    case Format::Int8:
      return run<Format::Int8>(layer, x, rows, out, with_gelu);
    case Format::Int4:
      return run<Format::Int4>(layer, x, rows, out, with_gelu);
  }
}
