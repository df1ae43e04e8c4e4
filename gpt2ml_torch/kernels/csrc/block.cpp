#include "block.h"

#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <memory>

namespace {

constexpr float kEpsilon = 1e-5f;   // of every LayerNorm of GPT2_ML
constexpr int64_t kSerialRows = 8;  // that one thread handles faster than two

struct Buffer {  // (tokens, size) of float32
  Buffer(int64_t tokens, int64_t size) : size(size), data(new float[tokens * size]) {}

  Numbers numbers() const { return {data.get(), Type::Float32}; }
  float* row(int64_t token) const { return data.get() + token * size; }

  int64_t size;
  std::unique_ptr<float[]> data;
};

template <typename Function> void for_rows(int64_t count, const Function& function) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  };
  if (count <= kSerialRows) some(0, count);
  else parallel_for(0, count, 1, some);
}

void normalize(const float* x, int64_t size, const Norm& norm, Numbers out, int64_t start) {
  Floats total = all(0.0f), squares = all(0.0f);
  const Numbers source{const_cast<float*>(x), Type::Float32};
  for (int64_t k = 0; k < size; k += kLanes) total = total + load_first(source, k, size - k);
  const Floats mean = all(sum(total) / size);
  for (int64_t k = 0; k < size; k += kLanes) {
    const Floats centred = first_lanes(size - k, load_first(source, k, size - k) - mean, all(0.0f));
    squares = fma(centred, centred, squares);
  }
  const Floats factor = all(1.0f / std::sqrt(sum(squares) / size + kEpsilon));
  for (int64_t k = 0; k < size; k += kLanes) {
    const int64_t left = size - k;
    const Floats y = (load_first(source, k, left) - mean) * factor;
    store_first(out, start + k, left, fma(y, load_first(norm.weight, k, left), load_first(norm.bias, k, left)));
  }
}

// Adds to y, (count, outputs), what the adapter of each row adds to a product of x, (count, inputs).
void add_adapters(const Block& block, Product product, Numbers x, int64_t count, int64_t tokens, const Buffer& y) {
  for (size_t adapter = 0; adapter < block.adapters.size(); ++adapter) {
    const auto& [narrow, wide] = block.adapters[adapter][product];
    if (!narrow.weight) continue;
    std::vector<int64_t> own;  // of the tokens
    for (int64_t i = 0; i < count; ++i)
      if (block.adapter_of_row[i / tokens] == static_cast<int64_t>(adapter)) own.push_back(i);
    if (own.empty()) continue;
    const int64_t size = own.size(), inputs = narrow.inputs, outputs = wide.outputs;
    Buffer inputs_of_own(size, inputs), inner(size, narrow.outputs), added(size, outputs);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t k = 0; k < inputs; k += kLanes)
        store_first(inputs_of_own.numbers(), i * inputs + k, inputs - k,
                    load_first(x, own[i] * inputs + k, inputs - k));
    apply(narrow, inputs_of_own.numbers(), size, inner.numbers());
    apply(wide, inner.numbers(), size, added.numbers());
    for (int64_t i = 0; i < size; ++i)
      for (int64_t k = 0; k < outputs; ++k) y.row(own[i])[k] += added.row(i)[k];
  }
}

// A product of x, (count, inputs), with what the rows' adapters add to it.
void multiply(const Block& block, Product product, Numbers x, int64_t count, int64_t tokens, const Buffer& y) {
  const bool with_gelu = product == kUp, no_adapters = block.adapters.empty();
  apply(block.products[product], x, count, y.numbers(), with_gelu && no_adapters);
  if (no_adapters) return;
  add_adapters(block, product, x, count, tokens, y);
  if (with_gelu)
    for_rows(count, [&](int64_t i) {
      const Numbers row{y.row(i), Type::Float32};
      for (int64_t k = 0; k < y.size; k += kLanes)
        store_first(row, k, y.size - k, gelu(load_first(row, k, y.size - k)));
    });
}

}  // namespace

void run(const Block& block, Numbers h, Numbers out, Heads keys, Heads values, const int64_t* positions, int64_t rows,
         int64_t tokens, int64_t slots, int64_t heads) {
  const int64_t count = rows * tokens, width = block.products[kOutput].outputs, head_size = width / heads;
  Buffer x(count, width), normed(count, width);
  {
    Buffer qkv(count, 3 * width);
    multiply(block, kQkv, h, count, tokens, qkv);
    for_rows(count, [&](int64_t i) {
      const int64_t b = i / tokens, slot = positions[i];
      const Numbers fresh{qkv.row(i), Type::Float32};
      for (int64_t k = 0; k < width; k += kLanes) {
        store_first(keys.at(b, slot, 0, 0), k, width - k, load_first(fresh, width + k, width - k));
        store_first(values.at(b, slot, 0, 0), k, width - k, load_first(fresh, 2 * width + k, width - k));
      }
    });
    const Heads q{qkv.numbers(), tokens * 3 * width, 3 * width}, attended{normed.numbers(), tokens * width, width};
    attend(Attention{q, keys, values, attended, positions, rows, tokens, slots, heads, head_size});
  }
  multiply(block, kOutput, normed.numbers(), count, tokens, x);
  for_rows(count, [&](int64_t i) {  // x = h + attention(h)
    const Numbers row{x.row(i), Type::Float32};
    for (int64_t k = 0; k < width; k += kLanes)
      store_first(row, k, width - k, load_first(row, k, width - k) + load_first(h, i * width + k, width - k));
    normalize(x.row(i), width, block.mlp_norm, normed.numbers(), i * width);
  });
  Buffer inner(count, block.products[kUp].outputs);
  multiply(block, kUp, normed.numbers(), count, tokens, inner);
  multiply(block, kDown, inner.numbers(), count, tokens, normed);
  for_rows(count, [&](int64_t i) {  // LayerNorm(x + mlp(LayerNorm(x)))
    const Numbers sum{normed.row(i), Type::Float32}, row{x.row(i), Type::Float32};
    for (int64_t k = 0; k < width; k += kLanes)
      store_first(sum, k, width - k, load_first(sum, k, width - k) + load_first(row, k, width - k));
    normalize(normed.row(i), width, block.output_norm, out, i * width);
  });
}
