// B rows, T new tokens, S slots, H heads. Every score, softmax and sum runs in an order that depends on the position
// alone, and slots beyond it are not read: however long the cache is, empty slots cost nothing.

#include "attention.h"

#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t kAhead = 2;          // heads that are fetched in advance
constexpr int64_t kTogether = 4;       // tokens whose sums fit the registers
constexpr int64_t kTokensAtOnce = 32;  // that share what was read of a head

// Weights that sum to 1 from scores of `size` slots, a multiple of 16.
void softmax(float* scores, int64_t size) {
  Floats highest = all(-INFINITY), total = all(0.0f);
  for (int64_t slot = 0; slot < size; slot += kLanes) highest = max(highest, load(scores + slot));
  const Floats top = all(largest(highest));
  for (int64_t slot = 0; slot < size; slot += kLanes) {
    const Floats weight = exp_of_negative(load(scores + slot) - top);
    total = total + weight;
    store(scores + slot, weight);
  }
  const Floats inverse = all(1.0f / sum(total));
  for (int64_t slot = 0; slot < size; slot += kLanes) store(scores + slot, load(scores + slot) * inverse);
}

// The scores of 16 keys, (kSize, 16), for kCount queries, (kCount, kSize). A score's products are summed as `sum_each`
// sums a vector: first those 16 apart, then fours, then the rest.
template <int kCount, int kSize> [[gnu::noinline]] void score(const float* q, const float* keys,
                                                              Floats (&scores)[kCount]) {
  Floats quarters[4][kCount];
  UNROLL(4)
  for (int quarter = 0; quarter < 4; ++quarter) {
    Floats sum[kCount][4];
    UNROLL(4)
    for (int lane = 0; lane < 4; ++lane) UNROLL(8)
    for (int k = 4 * quarter + lane; k < kSize; k += kLanes) {
      const Floats key = load(keys + k * kLanes);
      UNROLL(8)
      for (int c = 0; c < kCount; ++c) {
        const Floats value = all(q[c * kSize + k]);
        sum[c][lane] = k < kLanes ? value * key : fma(value, key, sum[c][lane]);
      }
    }
    UNROLL(8)
    for (int c = 0; c < kCount; ++c) quarters[quarter][c] = (sum[c][0] + sum[c][2]) + (sum[c][1] + sum[c][3]);
  }
  UNROLL(8)
  for (int c = 0; c < kCount; ++c) scores[c] = (quarters[0][c] + quarters[1][c]) + (quarters[2][c] + quarters[3][c]);
}

// Adds `count` values, (count, kSize), times their weights, `stride` apart for each of kCount queries, to the means.
template <int kCount, int kSize>
[[gnu::noinline]] void add_weighted(const float* values, int64_t count, const float* weights, int64_t stride,
                                    float* means) {
  constexpr int kVectors = kSize / kLanes;
  Floats sum[kCount][kVectors];
  UNROLL(8)
  for (int c = 0; c < kCount; ++c) UNROLL(8)
  for (int v = 0; v < kVectors; ++v) sum[c][v] = load(means + c * kSize + v * kLanes);
  for (int64_t j = 0; j < count; ++j) UNROLL(8)
  for (int c = 0; c < kCount; ++c) {
    const Floats weight = all(weights[c * stride + j]);
    UNROLL(8)
    for (int v = 0; v < kVectors; ++v) sum[c][v] = fma(weight, load(values + j * kSize + v * kLanes), sum[c][v]);
  }
  UNROLL(8)
  for (int c = 0; c < kCount; ++c) UNROLL(8)
  for (int v = 0; v < kVectors; ++v) store(means + c * kSize + v * kLanes, sum[c][v]);
}

// One thread's work: some tokens of some heads. Both run inside slots: tokens then share what was read of a head, and
// heads read the cache as it lies in memory. A token's sums have the same order in any company.
template <Type kType, int kSize> class Attender {
 public:
  Attender(const Attention& job, int64_t items)
      : job_(job), lengths_(items), scores_(items * (job.slots + kLanes)), q_(items * kSize), means_(items * kSize) {}

  // Tokens [t, t + tokens) of heads [h, h + heads) of row b.
  void run(int64_t b, int64_t t, int64_t tokens, int64_t h, int64_t heads) {
    int64_t longest = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      lengths_[i] = job_.positions[b * job_.tokens + t + i] + 1;
      longest = std::max(longest, lengths_[i]);
    }
    const int64_t stride = round_up(longest);
    const Floats scale = all(1.0f / std::sqrt(static_cast<float>(kSize)));
    for (int64_t i = 0; i < tokens * heads; ++i)  // an item is a token's head
      for (int64_t k = 0; k < kSize; k += kLanes) {
        store(&q_[i * kSize + k], load(job_.q.at(b, t + i % tokens, h + i / tokens, kSize), k) * scale);
        store(&means_[i * kSize + k], all(0.0f));
      }
    for (int64_t slot = 0; slot < longest; slot += kLanes)
      for (int64_t i = 0; i < heads; ++i) {
        fetch(job_.keys, b, slot, longest, h, i + kAhead, heads);
        if (tokens == 1) {
          score_alone(b, slot, longest, h + i, i, stride);
          continue;
        }
        read_keys(b, slot, longest, h + i);
        int64_t token = 0;
        for (; token + kTogether <= tokens; token += kTogether)
          score_tile<kTogether>(slot, stride, token, i * tokens + token);
        for (; token < tokens; ++token) score_tile<1>(slot, stride, token, i * tokens + token);
      }
    for (int64_t i = 0; i < tokens * heads; ++i) softmax(&scores_[i * stride], round_up(lengths_[i % tokens]));
    for (int64_t slot = 0; slot < longest; slot += kLanes)
      for (int64_t i = 0; i < heads; ++i) {
        fetch(job_.values, b, slot, longest, h, i + kAhead, heads);
        if (tokens == 1) {
          add_alone(b, slot, longest, h + i, i, stride);
          continue;
        }
        read_values(b, slot, longest, h + i);
        int64_t token = 0;
        for (; token + kTogether <= tokens; token += kTogether)
          add_tile<kTogether>(slot, stride, token, i * tokens + token);
        for (; token < tokens; ++token) add_tile<1>(slot, stride, token, i * tokens + token);
      }
    for (int64_t i = 0; i < tokens * heads; ++i)
      for (int64_t k = 0; k < kSize; k += kLanes)
        store(job_.out.at(b, t + i % tokens, h + i / tokens, kSize), k, load(&means_[i * kSize + k]));
  }

 private:
  template <int kCount> void score_tile(int64_t slot, int64_t stride, int64_t token, int64_t item) {
    Floats scores[kCount];
    score<kCount, kSize>(&q_[item * kSize], block_, scores);
    for (int c = 0; c < kCount; ++c)
      store(&scores_[(item + c) * stride + slot], first_lanes(lengths_[token + c] - slot, scores[c], all(-INFINITY)));
  }

  template <int kCount> void add_tile(int64_t slot, int64_t stride, int64_t token, int64_t item) {
    const float* weights = &scores_[item * stride + slot];
    int64_t common = kLanes;
    for (int c = 0; c < kCount; ++c) common = std::clamp<int64_t>(lengths_[token + c] - slot, 0, common);
    add_weighted<kCount, kSize>(block_, common, weights, stride, &means_[item * kSize]);
    for (int c = 0; c < kCount && kCount > 1; ++c) {
      const int64_t more = std::min(lengths_[token + c] - slot, kLanes) - common;
      if (more > 0)
        add_weighted<1, kSize>(block_ + common * kSize, more, weights + c * stride + common, stride,
                               &means_[(item + c) * kSize]);
    }
  }

  // A single token's scores and means, straight from the cache.
  void score_alone(int64_t b, int64_t slot, int64_t end, int64_t h, int64_t item, int64_t stride) {
    Floats dots[kLanes];
    UNROLL(16)
    for (int64_t j = 0; j < kLanes; ++j) {
      const char* key = head(job_.keys, b, std::min(slot + j, end - 1), h);
      dots[j] = load(&q_[item * kSize]) * part(key, 0);
      UNROLL(8)
      for (int k = kLanes; k < kSize; k += kLanes) dots[j] = fma(load(&q_[item * kSize + k]), part(key, k), dots[j]);
    }
    store(&scores_[item * stride + slot], first_lanes(end - slot, sum_each(dots), all(-INFINITY)));
  }

  void add_alone(int64_t b, int64_t slot, int64_t end, int64_t h, int64_t item, int64_t stride) {
    Floats sum[kSize / kLanes];
    UNROLL(8)
    for (int v = 0; v < kSize / kLanes; ++v) sum[v] = load(&means_[item * kSize + v * kLanes]);
    for (int64_t j = slot; j < std::min(slot + kLanes, end); ++j) {
      const char* value = head(job_.values, b, j, h);
      const Floats weight = all(scores_[item * stride + j]);
      UNROLL(8)
      for (int v = 0; v < kSize / kLanes; ++v) sum[v] = fma(weight, part(value, v * kLanes), sum[v]);
    }
    UNROLL(8)
    for (int v = 0; v < kSize / kLanes; ++v) store(&means_[item * kSize + v * kLanes], sum[v]);
  }

  // 16 keys, (kSize, 16), from a slot on; those past the end are the last one again.
  void read_keys(int64_t b, int64_t slot, int64_t end, int64_t h) {
    const char* rows[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) rows[j] = head(job_.keys, b, std::min(slot + j, end - 1), h);
    for (int k = 0; k < kSize; k += kLanes) {
      Floats keys[kLanes];
      UNROLL(16)
      for (int j = 0; j < kLanes; ++j) keys[j] = part(rows[j], k);
      transpose(keys);
      UNROLL(16)
      for (int j = 0; j < kLanes; ++j) store(&block_[(k + j) * kLanes], keys[j]);
    }
  }

  // Up to 16 values, (16, kSize), from a slot on.
  void read_values(int64_t b, int64_t slot, int64_t end, int64_t h) {
    for (int64_t j = 0; j < std::min(kLanes, end - slot); ++j) {
      const char* row = head(job_.values, b, slot + j, h);
      for (int k = 0; k < kSize; k += kLanes) store(&block_[j * kSize + k], part(row, k));
    }
  }

  // Asks for what is read some heads later, since the slots lie too far apart for the processor to guess.
  static void fetch(const Heads& cache, int64_t b, int64_t slot, int64_t end, int64_t h, int64_t i, int64_t heads) {
    for (; i >= heads; i -= heads) slot += kLanes;
    for (int64_t j = slot; j < std::min(slot + kLanes, end); ++j)
      for (int byte = 0; byte < kSize * kBytes; byte += 64) _mm_prefetch(head(cache, b, j, h + i) + byte, _MM_HINT_T0);
  }

  static constexpr int kBytes = kType == Type::Float32 ? 4 : 2;
  static const char* head(const Heads& cache, int64_t b, int64_t slot, int64_t h) {
    return static_cast<const char*>(cache.numbers.data) + (b * cache.row + slot * cache.token + h * kSize) * kBytes;
  }
  static Floats part(const char* head, int k) { return load(Numbers{const_cast<char*>(head), kType}, k); }
  static int64_t round_up(int64_t length) { return (length + kLanes - 1) / kLanes * kLanes; }

  const Attention& job_;
  std::vector<int64_t> lengths_;
  std::vector<float> scores_, q_, means_;
  alignas(64) float block_[kLanes * kSize];
};

template <Type kType, int kSize> void attend_all(const Attention& job) {
  // A single token's heads go together, several tokens head by head.
  const bool single = job.tokens == 1;
  const int64_t heads = single ? std::clamp<int64_t>(job.rows * job.heads / get_num_threads(), 1, job.heads) : 1;
  const int64_t tokens = std::min(job.tokens, kTokensAtOnce);
  const int64_t head_groups = (job.heads + heads - 1) / heads, token_groups = (job.tokens + tokens - 1) / tokens;
  // Late tokens read more slots than early ones: tokens run fastest, so that threads share them evenly.
  parallel_for(0, job.rows * head_groups * token_groups, 1, [&](int64_t begin, int64_t end) {
    Attender<kType, kSize> attender(job, heads * tokens);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % token_groups * tokens, h = i / token_groups % head_groups * heads;
      const int64_t b = i / token_groups / head_groups;
      attender.run(b, t, std::min(tokens, job.tokens - t), h, std::min(heads, job.heads - h));
    }
  });
}

template <Type kType> void dispatch(const Attention& job) {
  switch (job.head_size) {
    case 16:
      return attend_all<kType, 16>(job);
    case 32:
      return attend_all<kType, 32>(job);
    case 64:
      return attend_all<kType, 64>(job);
    case 128:
      return attend_all<kType, 128>(job);
  }
}

}  // namespace

bool supports_head_size(int64_t size) { return size == 16 || size == 32 || size == 64 || size == 128; }

void attend(const Attention& job) {
  switch (job.keys.numbers.type) {
    case Type::BFloat16:
      return dispatch<Type::BFloat16>(job);
    case Type::Float16:
      return dispatch<Type::Float16>(job);
    default:
      return dispatch<Type::Float32>(job);
  }
}
