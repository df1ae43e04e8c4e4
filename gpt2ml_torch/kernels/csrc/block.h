// One layer of the model with packed weights, over the key-value cache.

#pragma once

#include "attention.h"
#include "linear.h"

#include <array>
#include <vector>

struct Norm {
  Numbers weight, bias;
};

// What a LoRA adapter adds to a product: wide(narrow(x)). Without weights where it adds nothing.
struct LowRank {
  Linear narrow, wide;
};

enum Product { kQkv, kOutput, kUp, kDown, kProducts };

struct Block {
  Linear products[kProducts];
  Norm mlp_norm, output_norm;
  std::vector<std::array<LowRank, kProducts>> adapters;
  const int64_t* adapter_of_row;  // an index of `adapters` for each row, or -1; null where there are none
};

// h and out: (rows * tokens, width), contiguous, and may be the same. The tokens' keys and values are written to the
// slots of their positions, and each token attends to all slots up to its own. Sums and what lies between the layers
// are float32.
void run(const Block& block, Numbers h, Numbers out, Heads keys, Heads values, const int64_t* positions, int64_t rows,
         int64_t tokens, int64_t slots, int64_t heads);
