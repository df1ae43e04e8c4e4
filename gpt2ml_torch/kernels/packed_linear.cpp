// y = x Wᵀ + b, or its GELU, for packed weights of 16, 8 and 4 bits, with AVX-512 (VNNI, BF16).
//
// Decoding reads every weight once for each token, so a matrix-vector product has to keep up with the memory, and the
// same packed weights have to serve the prompt's matrix product at the speed of the arithmetic units: there is no room
// for a second copy. One layout does both. M rows of x, N outputs, K inputs; outputs come in panels of 16, one for each
// 32-bit lane of a vector register, and a panel's weights lie one after the other along K:
//
//     bits  weight, 64 bytes a step                      scale, one for each output and group     inputs of x become
//      16   [N/16][K/2][16][2] bfloat16                  -                                        bfloat16
//       8   [N/16][K/4][16][4] uint8, value + 128        [N/16][K/128][16] bfloat16               int8, scaled in groups
//       4   [N/16][K/8][16][4] uint8, value + 8, inputs  [N/16][K/32][16] bfloat16                int8, scaled in groups
//           4..7 of the eight in the upper half-byte
//
// K is padded to a multiple of 32 and N to one of 16. The unsigned weights' offset is taken back by starting each sum
// at -offset * sum(x). An output's sum always runs along K in the same order, whatever M, the tile and the number of
// threads are, so a row's result never depends on its neighbours: batched and alone agree bit for bit.

#include "vectors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kPanel = kLanes;   // outputs in a panel
constexpr int64_t kMultiple = 32;    // K is padded to a multiple of it
constexpr int64_t kSerialWork = 1 << 16;  // elements of x that one thread prepares faster than two

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <int kBits> constexpr int64_t kGroup = kBits == 8 ? 128 : kBits == 4 ? 32 : 0;  // inputs that share a scale
template <int kBits> constexpr int32_t kOffset = kBits == 8 ? 128 : 8;

// ---- the inputs: bfloat16, or int8 with a scale and a starting sum for each group

struct Inputs {
  std::unique_ptr<uint8_t, void (*)(void*)> memory{nullptr, std::free};
  const uint8_t* values = nullptr;   // [M][row_bytes]
  const float* scales = nullptr;     // [M][groups]
  const int32_t* starts = nullptr;   // [M][groups]: -offset * sum of the group's int8 values
  int64_t row_bytes = 0, groups = 0;
};

void to_bfloat16(const void* x, ScalarType type, int64_t row, int64_t K, uint16_t* out) {
  for (int64_t k = 0; k < round_up(K, kMultiple); k += kPanel) {
    __m512 value = load16(x, type, row * K + k, first_lanes(K - k));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + k), (__m256i)_mm512_cvtneps_pbh(value));
  }
}

// The largest magnitude is found among the bit patterns, where NaN is the largest: it then reaches the scale and the result.
template <int kBits>
void to_int8(const void* x, ScalarType type, int64_t row, int64_t K, uint8_t* out, float* scales, int32_t* starts) {
  const int64_t padded = round_up(K, kMultiple);
  for (int64_t begin = 0, g = 0; begin < padded; begin += kGroup<kBits>, ++g) {
    const int64_t end = std::min(begin + kGroup<kBits>, padded);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t k = begin; k < end; k += kPanel) {
      __m512i bits = _mm512_castps_si512(load16(x, type, row * K + k, first_lanes(K - k)));
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const float magnitude = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(largest))));
    const __m512 inverse = _mm512_set1_ps(magnitude > 0 ? 127.0f / magnitude : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = begin; k < end; k += kPanel) {
      __m512 value = load16(x, type, row * K + k, first_lanes(K - k));
      __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + k), _mm512_cvtsepi32_epi8(rounded));
    }
    scales[g] = magnitude / 127.0f;
    starts[g] = -kOffset<kBits> * _mm512_reduce_add_epi32(sum);
  }
}

template <int kBits> Inputs prepare(const Tensor& x, int64_t M, int64_t K) {
  Inputs in;
  const int64_t padded = round_up(K, kMultiple);
  const ScalarType type = x.scalar_type();
  const void* source = x.const_data_ptr();
  in.row_bytes = round_up(kBits == 16 ? 2 * padded : padded, 64);
  if constexpr (kBits != 16) in.groups = (padded + kGroup<kBits> - 1) / kGroup<kBits>;
  const int64_t value_bytes = M * in.row_bytes, group_bytes = round_up(M * in.groups * 4, 64);
  in.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, value_bytes + 2 * group_bytes)));
  STD_TORCH_CHECK(in.memory, "packed_linear: out of memory for the inputs");
  uint8_t* values = in.memory.get();
  float* scales = reinterpret_cast<float*>(values + value_bytes);
  int32_t* starts = reinterpret_cast<int32_t*>(values + value_bytes + group_bytes);
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* out = values + row * in.row_bytes;
      if constexpr (kBits == 16) to_bfloat16(source, type, row, K, reinterpret_cast<uint16_t*>(out));
      else to_int8<kBits>(source, type, row, K, out, scales + row * in.groups, starts + row * in.groups);
    }
  };
  if (M * K <= kSerialWork) rows(0, M);
  else torch::stable::parallel_for(0, M, 1, rows);
  in.values = values, in.scales = scales, in.starts = starts;
  return in;
}

// ---- the product

struct Job {
  Inputs in;
  const uint8_t* weight;
  const uint16_t* scale;  // bfloat16; null for 16 bits
  const void* bias;       // or null
  ScalarType bias_type, out_type;
  bool gelu;
  void* out;
  int64_t M, N, padded;   // padded: K rounded up
  int64_t panel_bytes;    // of one panel's weights
};

__m512 scale16(const uint16_t* scale) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

__m512i four_inputs(const uint8_t* values) {
  int32_t four;
  __builtin_memcpy(&four, values, 4);
  return _mm512_set1_epi32(four);
}

// kRows rows of x times kCols panels; the accumulators stay in registers for the whole of K. GCC keeps an array in
// registers only where it unrolls every loop over it early, and that takes the pragma.
template <int kRows, int kCols> void sums_16(const Job& job, const uint8_t* x, const uint8_t* w, __m512 (&sum)[kRows][kCols]) {
  for (int64_t k = 0; k < job.padded; k += 2, x += 4, w += 64) {
    __m512bh weight[kCols];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      weight[c] = (__m512bh)_mm512_loadu_si512(w + c * job.panel_bytes);
      if (kRows <= 8 && kCols == 1) _mm_prefetch(reinterpret_cast<const char*>(w + 2048), _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = (__m512bh)four_inputs(x + r * job.in.row_bytes);
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], weight[c], pair);
    }
  }
}

template <int kBits, int kRows, int kCols>
void sums_int(const Job& job, int64_t row, const uint8_t* x, const uint8_t* w, const uint16_t* scale, __m512 (&sum)[kRows][kCols]) {
  const __m512i low = _mm512_set1_epi8(15);
  const float* x_scale = job.in.scales + row * job.in.groups;
  const int32_t* start = job.in.starts + row * job.in.groups;
  for (int64_t begin = 0, g = 0; begin < job.padded; begin += kGroup<kBits>, ++g) {
    const int64_t end = std::min(begin + kGroup<kBits>, job.padded);
    __m512i dot[kRows][kCols];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) dot[r][c] = _mm512_set1_epi32(start[r * job.in.groups + g]);
    for (int64_t k = begin; k < end; k += 32 / kBits, x += 32 / kBits, w += 64) {
      __m512i weight[kCols];
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) weight[c] = _mm512_loadu_si512(w + c * job.panel_bytes);
      if (kRows <= 8 && kCols == 1) _mm_prefetch(reinterpret_cast<const char*>(w + 2048), _MM_HINT_T0);
#pragma GCC unroll 8
      for (int part = 0; part < 8 / kBits; ++part) {
        __m512i part_weight[kCols];
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) {
          __m512i shifted = part ? _mm512_srli_epi16(weight[c], 4) : weight[c];
          part_weight[c] = kBits == 8 ? weight[c] : _mm512_and_si512(shifted, low);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i four = four_inputs(x + r * job.in.row_bytes + 4 * part);
#pragma GCC unroll 8
          for (int c = 0; c < kCols; ++c) dot[r][c] = _mm512_dpbusd_epi32(dot[r][c], part_weight[c], four);
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      const __m512 weight_scale = scale16(scale + (c * job.in.groups + g) * kPanel);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        __m512 both = _mm512_mul_ps(weight_scale, _mm512_set1_ps(x_scale[r * job.in.groups + g]));
        sum[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][c]), both, sum[r][c]);
      }
    }
  }
}

template <int kBits, int kRows, int kCols> void tile(const Job& job, int64_t row, int64_t panel) {
  __m512 sum[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) sum[r][c] = _mm512_setzero_ps();
  const uint8_t* x = job.in.values + row * job.in.row_bytes;
  const uint8_t* w = job.weight + panel * job.panel_bytes;
  if constexpr (kBits == 16) sums_16<kRows, kCols>(job, x, w, sum);
  else sums_int<kBits, kRows, kCols>(job, row, x, w, job.scale + panel * job.in.groups * kPanel, sum);
#pragma GCC unroll 8
  for (int c = 0; c < kCols; ++c) {
    // Through memory, so that the loop below need not be unrolled: an index that varies would keep `sum` itself there.
    alignas(64) float columns[kRows][kPanel];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) _mm512_store_ps(columns[r], sum[r][c]);
    const int64_t n = (panel + c) * kPanel;
    const __mmask16 mask = first_lanes(job.N - n);
    const __m512 bias = job.bias ? load16(job.bias, job.bias_type, n, mask) : _mm512_setzero_ps();
    for (int r = 0; r < kRows; ++r) {
      const __m512 y = _mm512_add_ps(_mm512_load_ps(columns[r]), bias);
      store16(job.out, job.out_type, (row + r) * job.N + n, mask, job.gelu ? gelu16(y) : y);
    }
  }
}

// All rows of x for the panels [panel, panel + kCols), in tiles of kRows rows and a smaller last one.
template <int kBits, int kRows, int kCols> void column(const Job& job, int64_t panel, int64_t row) {
  for (; row + kRows <= job.M; row += kRows) tile<kBits, kRows, kCols>(job, row, panel);
  if constexpr (kRows > 1)
    if (row < job.M) column<kBits, kRows - 1, kCols>(job, panel, row);
}

template <int kBits> void multiply(const Job& job) {
  const int64_t panels = (job.N + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    int64_t panel = begin;
    if (job.M > 8)
      for (; panel + 2 <= end; panel += 2) column<kBits, 6, 2>(job, panel, 0);
    for (; panel < end; ++panel) column<kBits, 8, 1>(job, panel, 0);
  });
}

template <int kBits>
Tensor run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, int64_t N, bool gelu) {
  const int64_t K = x.size(x.dim() - 1), M = K ? x.numel() / K : 0, padded = round_up(K, kMultiple);
  const int64_t panels = (N + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(weight.is_contiguous() && (int64_t)(weight.numel() * weight.element_size()) == panels * kPanel * padded * kBits / 8,
                  "packed_linear: the weight is not packed for ", K, " inputs, ", N, " outputs and ", kBits, " bits");
  if constexpr (kBits != 16)
    STD_TORCH_CHECK(scale && scale->is_contiguous() && scale->scalar_type() == ScalarType::BFloat16 &&
                        scale->numel() == panels * kPanel * ((padded + kGroup<kBits> - 1) / kGroup<kBits>),
                    "packed_linear: the scales don't fit the weight");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == N), "packed_linear: the bias needs ", N, " values");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  Tensor out = torch::stable::new_empty(x, sizes);
  if (M == 0 || N == 0) return out;
  Job job{prepare<kBits>(torch::stable::contiguous(x), M, K), static_cast<const uint8_t*>(weight.const_data_ptr()),
          scale ? static_cast<const uint16_t*>(scale->const_data_ptr()) : nullptr,
          bias ? bias->const_data_ptr() : nullptr, bias ? bias->scalar_type() : ScalarType::Float, x.scalar_type(), gelu,
          out.mutable_data_ptr(), M, N, padded, kPanel * padded * kBits / 8};
  multiply<kBits>(job);
  return out;
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                     int64_t bits, int64_t outputs, bool gelu) {
  STD_TORCH_CHECK(is_floating(x.scalar_type()) && (!bias || is_floating(bias->scalar_type())),
                  "packed_linear: inputs and bias must be float32, bfloat16 or float16");
  if (bits == 16) return run<16>(x, weight, scale, bias, outputs, gelu);
  if (bits == 8) return run<8>(x, weight, scale, bias, outputs, gelu);
  STD_TORCH_CHECK(bits == 4, "packed_linear: bits must be 16, 8 or 4, not ", bits);
  return run<4>(x, weight, scale, bias, outputs, gelu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt2ml, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear)); }
