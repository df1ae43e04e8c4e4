// PyTorch's threads, so that there is one pool of them.

#pragma once

#include <torch/csrc/stable/ops.h>

using torch::stable::get_num_threads;
using torch::stable::parallel_for;
