// The operators of ops.py for the CPU: what PyTorch's tensors hold is checked here, and nowhere below.

#include "block.h"
#include "pack.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? Type::Float32 : type == ScalarType::Half ? Type::Float16 : Type::BFloat16;
}

Numbers numbers(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "expected a contiguous tensor");
  return {t.mutable_data_ptr(), type_of(t)};
}

Format format_of(const Tensor& weight, int64_t bits) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return Format::Float32;
    case ScalarType::Half:
      return Format::Float16;
    case ScalarType::BFloat16:
      return Format::BFloat16;
    default:
      STD_TORCH_CHECK(bits == 8 || bits == 4, "integers must have 8 or 4 bits, not ", bits);
  }
  return bits == 8 ? Format::Int8 : Format::Int4;
}

// Checks that the panels and their scales have the sizes of `outputs` rows.
void check_panels(Format format, const Tensor& weight, const Maybe& scale, int64_t outputs, int64_t inputs) {
  const int64_t rows = round_up(outputs, kPanel), padded = round_up(inputs, kMultiple);
  const int64_t bytes = weight.numel() * weight.element_size();
  STD_TORCH_CHECK(weight.is_contiguous() && bytes == rows * padded * bits_of(format) / 8,
                  "the weight is not packed for ", inputs, " inputs and ", outputs, " outputs");
  if (!is_integer(format)) return;
  const int64_t groups = round_up(padded, group_of(format)) / group_of(format);
  STD_TORCH_CHECK(scale && scale->is_contiguous() && scale->scalar_type() == ScalarType::BFloat16 &&
                      scale->numel() == rows * groups,
                  "the scales don't fit the weight");
}

Linear linear(const Tensor& weight, const Maybe& scale, const Maybe& bias, int64_t bits, int64_t outputs,
              int64_t inputs) {
  const Format format = format_of(weight, bits);
  check_panels(format, weight, scale, outputs, inputs);
  STD_TORCH_CHECK(!bias || bias->numel() == outputs, "the bias needs ", outputs, " values");
  return {format,
          inputs,
          outputs,
          static_cast<const uint8_t*>(weight.const_data_ptr()),
          is_integer(format) ? static_cast<const uint16_t*>(scale->const_data_ptr()) : nullptr,
          bias ? numbers(*bias) : Numbers{nullptr, Type::Float32}};
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias, int64_t bits,
                     int64_t outputs) {
  const int64_t inputs = x.size(x.dim() - 1), rows = inputs ? x.numel() / inputs : 0;
  const Linear layer = linear(weight, scale, bias, bits, outputs, inputs);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = outputs;
  Tensor out = torch::stable::new_empty(x, sizes);
  const Tensor source = torch::stable::contiguous(x);
  if (rows && outputs) apply(layer, numbers(source), rows, numbers(out));
  return out;
}

// One layer's part of a cache, (layers, rows, slots, heads, head size).
Heads heads_of(const Tensor& cache, int64_t layer) {
  const Numbers all{cache.mutable_data_ptr(), type_of(cache)};
  return {{all.at(layer * cache.stride(0)), all.type}, cache.stride(1), cache.stride(2)};
}

void check_cache(const Tensor& cache, const Tensor& h, int64_t layers) {
  const bool fits = cache.dim() == 5 && cache.size(0) == layers && cache.size(1) == h.size(0) &&
                    cache.size(3) * cache.size(4) == h.size(2);
  STD_TORCH_CHECK(
      fits && cache.stride(4) == 1 && cache.stride(3) == cache.size(4) && cache.scalar_type() == h.scalar_type(),
      "the cache must be (layers, rows, slots, heads, head size) of h's dtype, with contiguous heads");
  STD_TORCH_CHECK(supports_head_size(cache.size(4)), "heads of ", cache.size(4), " are not supported");
}

// What each adapter adds to one layer's products: `changes` holds, for each adapter and product, the narrow matrix and
// the wide one of all layers, (layers, panels, ...), or two empty tensors. `sizes` are the products' inputs and
// outputs.
std::vector<std::array<LowRank, kProducts>> adapters_of(const std::vector<Tensor>& changes, int64_t layer,
                                                        int64_t layers, const int64_t (&sizes)[kProducts][2]) {
  std::vector<std::array<LowRank, kProducts>> adapters(changes.size() / (2 * kProducts));
  const auto matrix = [&](const Tensor& all, int64_t outputs, int64_t inputs) {
    STD_TORCH_CHECK(all.size(0) == layers, "an adapter needs a matrix for each layer");
    const Format format = format_of(all, 0);
    const int64_t bytes = round_up(outputs, kPanel) * round_up(inputs, kMultiple) * bits_of(format) / 8;
    STD_TORCH_CHECK(all.is_contiguous() && all.numel() * all.element_size() == layers * bytes,
                    "an adapter's matrix is not packed for ", inputs, " inputs and ", outputs, " outputs");
    const uint8_t* start = static_cast<const uint8_t*>(all.const_data_ptr());
    return Linear{format, inputs, outputs, start + layer * bytes, nullptr, Numbers{nullptr, Type::Float32}};
  };
  for (size_t i = 0; i < adapters.size() * kProducts; ++i) {
    const Tensor &narrow = changes[2 * i], &wide = changes[2 * i + 1];
    if (!narrow.numel()) continue;
    const int64_t product = i % kProducts, rank = narrow.size(1) * kPanel;
    adapters[i / kProducts][product] = {matrix(narrow, rank, sizes[product][0]), matrix(wide, sizes[product][1], rank)};
  }
  return adapters;
}

Tensor packed_layers(const Tensor& h, const Tensor& positions, Tensor keys, Tensor values, std::vector<Tensor> weights,
                     std::vector<Tensor> scales, std::vector<Tensor> biases, std::vector<Tensor> norms, int64_t bits,
                     std::vector<Tensor> changes, Maybe adapter_of_row) {
  const int64_t B = h.size(0), T = h.size(1), D = h.size(2), layers = weights.size() / kProducts;
  STD_TORCH_CHECK(weights.size() == layers * kProducts && biases.size() == weights.size() &&
                      norms.size() == weights.size() && (scales.empty() || scales.size() == weights.size()),
                  "expected four products, with biases and scales, and two norms of each layer");
  check_cache(keys, h, layers);
  check_cache(values, h, layers);
  const int64_t S = std::min(keys.size(2), values.size(2)), H = keys.size(3);
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.numel() == B * T,
                  "positions must be int64 of shape (B, T)");
  const Tensor places = torch::stable::contiguous(positions);
  const int64_t* position = static_cast<const int64_t*>(places.const_data_ptr());
  for (int64_t i = 0; i < B * T; ++i)
    STD_TORCH_CHECK(position[i] >= 0 && position[i] < S, "position ", position[i], " is outside the cache of ", S,
                    " slots");
  for (const Tensor& norm : norms) STD_TORCH_CHECK(norm.numel() == D, "a norm needs ", D, " values");
  STD_TORCH_CHECK(changes.size() % (2 * kProducts) == 0 && changes.empty() == !adapter_of_row,
                  "expected two matrices for each product of an adapter, and an adapter for each row");
  STD_TORCH_CHECK(!adapter_of_row || (adapter_of_row->scalar_type() == ScalarType::Long &&
                                      adapter_of_row->numel() == B && adapter_of_row->is_contiguous()),
                  "adapter_of_row must be int64 of shape (B,)");
  const int64_t adapters = changes.size() / (2 * kProducts);
  const int64_t* adapter = adapter_of_row ? static_cast<const int64_t*>(adapter_of_row->const_data_ptr()) : nullptr;
  for (int64_t row = 0; adapter && row < B; ++row)
    STD_TORCH_CHECK(adapter[row] >= -1 && adapter[row] < adapters, "there is no adapter ", adapter[row]);

  Tensor out = torch::stable::new_empty(h, {B, T, D});
  Tensor source = torch::stable::contiguous(h);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t inner = biases[kProducts * layer + kUp].numel();
    const int64_t sizes[kProducts][2] = {{D, 3 * D}, {D, D}, {D, inner}, {inner, D}};
    const auto product = [&](Product which) {
      const int64_t i = kProducts * layer + which;
      const Maybe scale = scales.empty() ? Maybe() : Maybe(scales[i]);
      return linear(weights[i], scale, biases[i], bits, sizes[which][1], sizes[which][0]);
    };
    const auto norm = [&](int64_t i) {
      return Norm{numbers(norms[4 * layer + 2 * i]), numbers(norms[4 * layer + 2 * i + 1])};
    };
    const Block block{{product(kQkv), product(kOutput), product(kUp), product(kDown)},
                      norm(0),
                      norm(1),
                      adapters_of(changes, layer, layers, sizes),
                      adapter};
    run(block, numbers(layer ? out : source), numbers(out), heads_of(keys, layer), heads_of(values, layer), position, B,
        T, S, H);
  }
  return out;
}

void pack(const Tensor& rows, Tensor weight, Maybe scale, int64_t bits) {
  const Format format = format_of(weight, bits);
  check_panels(format, weight, scale, weight.size(0) * kPanel, rows.size(1));
  STD_TORCH_CHECK(weight.size(0) == round_up(rows.size(0), kPanel) / kPanel, "the rows don't fill the panels");
  pack_rows(format, numbers(rows), rows.size(0), rows.size(1), static_cast<uint8_t*>(weight.mutable_data_ptr()),
            is_integer(format) ? static_cast<uint16_t*>(scale->mutable_data_ptr()) : nullptr);
}

}  // namespace

int64_t get_num_threads() { return torch::stable::get_num_threads(); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, const void* work, Part part) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { part(work, from, to); });
}

STABLE_TORCH_LIBRARY_IMPL(gpt2ml, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_layers", TORCH_BOX(&packed_layers));
  m.impl("pack", TORCH_BOX(&pack));
}
