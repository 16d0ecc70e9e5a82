// Reductions over the rows of an activation, for the channels side by side in a block: first the
// rows of a thread, then those of a block through shared memory, then the blocks of a column of the
// grid, by the last of them to finish. The order is fixed by shapes, so results repeat bit by bit.
#pragma once

#include "cuda/activation.h"

namespace resnet_fused {

// Elements of shared memory that reduce_rows needs.
constexpr int reduction_size(int values) { return values * kThreads / 2; }

// Combines `values` over threadIdx.y as a binary tree; the results are those of threadIdx.y == 0.
// combine(values, others) adds the second to the first. blockDim.y is a power of two.
template <int kValues, class Shared, class Combine>
__device__ inline void reduce_rows(float (&values)[kValues], Shared shared, Combine combine) {
  const int row = threadIdx.y, lane = threadIdx.x, lanes = blockDim.x;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        shared.store(v * (kThreads / 2) + (row - half) * lanes + lane, values[v]);
      }
    }
    __syncthreads();
    if (row < half) {
      float others[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        others[v] = shared.load(v * (kThreads / 2) + row * lanes + lane);
      }
      combine(values, others);
    }
    __syncthreads();
  }
}

// Whether this block is the last of its column of the grid to come here. Then it sees what the
// others have written to global memory before. `finished` is 0 at first; all threads call.
template <class Shared>
__device__ inline bool is_last_of_column(unsigned* finished, Shared flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    flag.store(0, atomicAdd(finished, 1u) == gridDim.y - 1);
  }
  __syncthreads();
  const bool last = flag.load(0) != 0;
  if (last) __threadfence();
  return last;
}

}  // namespace resnet_fused
