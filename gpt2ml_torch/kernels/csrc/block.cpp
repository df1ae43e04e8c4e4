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

}  // namespace

void run(const Block& block, Numbers h, Numbers out, Heads keys, Heads values, const int64_t* positions, int64_t rows,
         int64_t tokens, int64_t slots, int64_t heads) {
  const int64_t count = rows * tokens, width = block.output.outputs, head_size = width / heads;
  Buffer x(count, width), normed(count, width);
  {
    Buffer qkv(count, 3 * width);
    apply(block.qkv, h, count, qkv.numbers());
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
  apply(block.output, normed.numbers(), count, x.numbers());
  for_rows(count, [&](int64_t i) {  // x = h + attention(h)
    const Numbers row{x.row(i), Type::Float32};
    for (int64_t k = 0; k < width; k += kLanes)
      store_first(row, k, width - k, load_first(row, k, width - k) + load_first(h, i * width + k, width - k));
    normalize(x.row(i), width, block.mlp_norm, normed.numbers(), i * width);
  });
  Buffer inner(count, block.up.outputs);
  apply(block.up, normed.numbers(), count, inner.numbers(), true);
  apply(block.down, inner.numbers(), count, normed.numbers());
  for_rows(count, [&](int64_t i) {  // LayerNorm(x + mlp(LayerNorm(x)))
    const Numbers sum{normed.row(i), Type::Float32}, row{x.row(i), Type::Float32};
    for (int64_t k = 0; k < width; k += kLanes)
      store_first(sum, k, width - k, load_first(sum, k, width - k) + load_first(row, k, width - k));
    normalize(normed.row(i), width, block.output_norm, out, i * width);
  });
}
