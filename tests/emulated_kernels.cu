// Small kernels that use all that the emulator watches over. test_emulator.py runs them as they are
// here, and breaks them one line at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "common/checks.h"
#include "cuda/platform.h"

namespace resnet_fused {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kWidth = 4;

struct alignas(16) Vector {
  float values[kWidth];
};

__device__ inline float warp_sum(float value) {
  for (int lane_mask = kWarp / 2; lane_mask > 0; lane_mask /= 2) {
    value += __shfl_xor_sync(~0u, value, lane_mask);
  }
  return value;
}

// Of all values of the block, in thread 0.
template <class Shared>
__device__ float block_sum(Shared sums, float value) {
  const int thread = static_cast<int>(threadIdx.x);
  sums.store(thread, value);
  __syncthreads();  // first
  for (int half = kThreads / 2; half >= kWarp; half /= 2) {
    if (thread < half) {
      sums.store(thread, sums.load(thread) + sums.load(thread + half));
    }
    __syncthreads();  // second
  }
  float sum = 0;
  if (thread < kWarp) {
    sum = warp_sum(sums.load(thread));
  }
  return sum;
}

// The block that finishes last adds up what all blocks have found.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* __restrict__ x, float* partial_sums, unsigned* finished, float* result,
               int64_t n) {
  RESNET_FUSED_SHARED(float, sums, kThreads);
  RESNET_FUSED_SHARED(bool, is_last, 1);
  float sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += load(x + i);
  }
  sum = block_sum(sums, sum);
  if (threadIdx.x == 0) {
    store(partial_sums + blockIdx.x, sum);
    __threadfence();
    is_last.store(0, atomicInc(finished, gridDim.x - 1) == gridDim.x - 1);
  }
  __syncthreads();  // third
  if (!is_last.load(0)) return;
  float total = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    total += load(partial_sums + block);
  }
  total = block_sum(sums, total);
  if (threadIdx.x == 0) store(result, total);
}

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const float* __restrict__ x, float* __restrict__ result, int64_t n) {
  const int64_t n_vectors = n / kWidth;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n_vectors) {
    const Vector vector = load(reinterpret_cast<const Vector*>(x) + i);
    store(reinterpret_cast<Vector*>(result) + i, vector);
  }
  const int64_t rest = n_vectors * kWidth + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) {
    store(result + rest, load(x + rest));
  }
}

// The elements of each 32 in reverse, without a barrier of the block.
__global__ void __launch_bounds__(kThreads)
    reverse_kernel(const float* __restrict__ x, float* __restrict__ result) {
  RESNET_FUSED_DYNAMIC_SHARED(float, values);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  values.store(thread, load(x + i));
  __syncwarp();
  store(result + i, values.load(thread ^ (kWarp - 1)));
}

const float* data_of(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

float* mutable_data_of(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// x: any number of float32. `blocks` as a tensor's size would be.
Tensor sum_cuda(const Tensor& x, int64_t blocks) {
  Tensor workspace = torch::stable::new_zeros(x, {blocks + 1});
  Tensor result = torch::stable::new_empty(x, {1});
  float* partial_sums = mutable_data_of(workspace);
  RESNET_FUSED_LAUNCH(sum_kernel, static_cast<unsigned>(blocks), kThreads, 0, current_stream(x),
                      data_of(x), partial_sums, reinterpret_cast<unsigned*>(partial_sums + blocks),
                      mutable_data_of(result), x.numel());
  return result;
}

Tensor copy_cuda(const Tensor& x) {
  Tensor result = torch::stable::empty_like(x);
  const int64_t blocks = (x.numel() + kThreads * kWidth - 1) / (kThreads * kWidth);
  RESNET_FUSED_LAUNCH(copy_kernel, static_cast<unsigned>(blocks), kThreads, 0, current_stream(x),
                      data_of(x), mutable_data_of(result), x.numel());
  return result;
}

// x: a multiple of kThreads of float32.
Tensor reverse_cuda(const Tensor& x) {
  Tensor result = torch::stable::empty_like(x);
  const int64_t blocks = x.numel() / kThreads;
  RESNET_FUSED_LAUNCH(reverse_kernel, static_cast<unsigned>(blocks), kThreads,
                      kThreads * sizeof(float), current_stream(x), data_of(x),
                      mutable_data_of(result));
  return result;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(RESNET_FUSED_NAMESPACE, m) {
  m.def("sum(Tensor x, int blocks) -> Tensor");
  m.def("copy(Tensor x) -> Tensor");
  m.def("reverse(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("sum", TORCH_BOX(&resnet_fused::sum_cuda));
  m.impl("copy", TORCH_BOX(&resnet_fused::copy_cuda));
  m.impl("reverse", TORCH_BOX(&resnet_fused::reverse_cuda));
}
