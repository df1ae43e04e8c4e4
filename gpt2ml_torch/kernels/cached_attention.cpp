// Causal attention over the key-value cache, which holds the new tokens' keys and values already.
//
// B rows, T new tokens, S slots, H heads, K head size. A token at position p reads the slots 0..p and no other, however
// long the cache is: empty slots cost nothing. Every score, softmax and sum runs in an order that depends on p alone, so
// a token's result is the same bit for bit whether it came alone, in a chunk or in a batch.

#include "vectors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using torch::stable::Tensor;

struct Strided {  // (B, T or S, H, K), the last two contiguous
  char* data;
  int64_t row, token, head;  // strides in bytes

  explicit Strided(const Tensor& t)
      : data(static_cast<char*>(t.mutable_data_ptr())), row(t.stride(0) * t.element_size()), token(t.stride(1) * t.element_size()),
        head(t.size(3) * t.element_size()) {}
  char* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * token + h * head; }
};

struct Job {
  Strided q, keys, values, out;
  const int64_t* positions;
  int64_t B, T, S, H;
  float scale;
};

template <ScalarType kType> Floats part(const char* head, int v) { return load(head, kType, v * kLanes); }

// kVectors vectors hold one head of a token. `scores` has room for the slots, rounded up to 16.
template <ScalarType kType, int kVectors> void attend(const Job& job, int64_t b, int64_t t, int64_t h, float* scores) {
  const int64_t length = job.positions[b * job.T + t] + 1;
  const Floats lowest = all(-INFINITY);
  Floats q[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) q[v] = part<kType>(job.q.at(b, t, h), v) * all(job.scale);
  Floats highest = lowest;
  for (int64_t slot = 0; slot < length; slot += kLanes) {
    Floats dots[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const char* key = job.keys.at(b, std::min(slot + i, length - 1), h);
      dots[i] = q[0] * part<kType>(key, 0);
#pragma GCC unroll 16
      for (int v = 1; v < kVectors; ++v) dots[i] = fma(q[v], part<kType>(key, v), dots[i]);
    }
    const Floats score = first_lanes(length - slot, sum_each(dots), lowest);
    highest = max(highest, score);
    store(scores + slot, score);
  }
  const Floats top = all(largest(highest));
  Floats total = all(0.0f);
  for (int64_t slot = 0; slot < length; slot += kLanes) {
    const Floats weight = exp_of_negative(load(scores + slot) - top);
    total = total + weight;
    store(scores + slot, weight);
  }
  Floats mean[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) mean[v] = all(0.0f);
  for (int64_t slot = 0; slot < length; ++slot) {
    const Floats weight = all(scores[slot]);
    const char* value = job.values.at(b, slot, h);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) mean[v] = fma(weight, part<kType>(value, v), mean[v]);
  }
  const Floats inverse = all(1.0f / sum(total));
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) store(job.out.at(b, t, h), kType, v * kLanes, mean[v] * inverse);
}

template <ScalarType kType, int kVectors> void attend_all(const Job& job) {
  // Late tokens read more slots than early ones: the token runs fastest, so that threads share them evenly.
  torch::stable::parallel_for(0, job.B * job.H * job.T, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(job.S + kLanes);
    for (int64_t i = begin; i < end; ++i)
      attend<kType, kVectors>(job, i / job.T / job.H, i % job.T, i / job.T % job.H, scores.data());
  });
}

template <ScalarType kType> void dispatch(const Job& job, int64_t head_size) {
  switch (head_size) {
    case 16: return attend_all<kType, 1>(job);
    case 32: return attend_all<kType, 2>(job);
    case 64: return attend_all<kType, 4>(job);
    case 128: return attend_all<kType, 8>(job);
    default: STD_TORCH_CHECK(false, "cached_attention: the head size must be 16, 32, 64 or 128, not ", head_size);
  }
}

bool heads_contiguous(const Tensor& t) {
  return t.dim() == 4 && t.stride(3) == 1 && (t.size(2) == 1 || t.stride(2) == t.size(3));
}

Tensor cached_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& positions) {
  for (const Tensor* t : {&q, &keys, &values})
    STD_TORCH_CHECK(heads_contiguous(*t) && t->scalar_type() == q.scalar_type(),
                    "cached_attention: tensors must share a dtype and have contiguous heads");
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), K = q.size(3), S = keys.size(1);
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.numel() == B * T,
                  "cached_attention: positions must be int64 of shape (B, T)");
  const Tensor places = torch::stable::contiguous(positions);
  const int64_t* position = static_cast<const int64_t*>(places.const_data_ptr());
  for (int64_t i = 0; i < B * T; ++i)
    STD_TORCH_CHECK(position[i] >= 0 && position[i] < S, "position ", position[i], " is outside the cache of ", S, " slots");
  Tensor out = torch::stable::new_empty(q, {B, T, H, K});
  Job job{Strided(q), Strided(keys), Strided(values), Strided(out), position, B, T, S, H,
          1.0f / std::sqrt(static_cast<float>(K))};
  switch (q.scalar_type()) {
    case ScalarType::Float: dispatch<ScalarType::Float>(job, K); break;
    case ScalarType::BFloat16: dispatch<ScalarType::BFloat16>(job, K); break;
    case ScalarType::Half: dispatch<ScalarType::Half>(job, K); break;
    default: STD_TORCH_CHECK(false, "cached_attention: the dtype must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt2ml, CPU, m) { m.impl("cached_attention", TORCH_BOX(&cached_attention)); }
