// Runs CUDA kernels without barriers or shared memory on the CPU, one thread after the other.
// Stands in for csrc/cuda/platform.h's CUDA part when a .cu file is compiled with
// RESNET_FUSED_EMULATE.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __launch_bounds__(threads)

#define RESNET_FUSED_NAMESPACE resnet_fused_emulated
#define RESNET_FUSED_DISPATCH_KEY CPU
#define RESNET_FUSED_LAUNCH(kernel, blocks, threads, stream, ...) \
  gridDim.x = blocks;                                             \
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)      \
    for (threadIdx.x = 0; threadIdx.x < unsigned(threads); ++threadIdx.x) kernel(__VA_ARGS__)

struct Index {
  unsigned x = 0;
};
inline thread_local Index gridDim, blockIdx, threadIdx;

using cudaStream_t = void*;

namespace resnet_fused {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool is_kernel_device(const torch::stable::Tensor& t) { return t.is_cpu(); }

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

}  // namespace resnet_fused
