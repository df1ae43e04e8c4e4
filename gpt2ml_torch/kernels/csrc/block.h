// One layer of the model with packed weights, over the key-value cache.

#pragma once

#include "attention.h"
#include "linear.h"

struct Norm {
  Numbers weight, bias;
};

struct Block {
  Linear qkv, output, up, down;
  Norm mlp_norm, output_norm;
};

// h and out: (rows * tokens, width), contiguous, and may be the same. The tokens' keys and values are written to the
// slots of their positions, and each token attends to all slots up to its own. Sums and what lies between the layers
// are float32.
void run(const Block& block, Numbers h, Numbers out, Heads keys, Heads values, const int64_t* positions, int64_t rows,
         int64_t tokens, int64_t slots, int64_t heads);
