// PyTorch's threads, so that there is one pool of them. operators.cpp has what this declares: it alone includes
// PyTorch's headers, which take longer to compile than most of the kernels.

#pragma once

#include <cstdint>

int64_t get_num_threads();

using Part = void (*)(const void* work, int64_t begin, int64_t end);
void parallel_for(int64_t begin, int64_t end, int64_t grain, const void* work, Part part);

// Calls work(from, to) for parts of [begin, end), of `grain` or more, side by side.
template <class Work> void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  parallel_for(begin, end, grain, &work,
               [](const void* work, int64_t from, int64_t to) { (*static_cast<const Work*>(work))(from, to); });
}
