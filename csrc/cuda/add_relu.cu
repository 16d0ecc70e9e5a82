// relu(x + residual) and its backward, each in one pass over memory.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "cuda/activation.h"

namespace resnet_fused {
namespace {

// Loads in flight per thread and tensor, before the first value is used.
constexpr int kVectorsPerThread = 2;

// The comparison is written so that NaN passes, as in torch.relu; fmaxf would hide it.
struct AddRelu {
  static __device__ float apply(float x, float residual) {
    const float sum = x + residual;
    return sum < 0 ? 0 : sum;
  }
};

struct ReluMask {
  static __device__ float apply(float grad_out, float out) { return out <= 0 ? 0 : grad_out; }
};

template <class Op, class T>
__device__ inline T apply(T a, T b) {
  return static_cast<T>(Op::apply(static_cast<float>(a), static_cast<float>(b)));
}

// result[i] = Op(a[i], b[i]) for i < n. Moves 3 * sizeof(T) bytes per element.
// kWidth elements go in one access, which needs pointers aligned to it; the rest of n goes one by
// one, an element per thread of the last block.
template <class Op, class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ result,
                       int64_t n) {
  using Vec = Vector<T, kWidth>;
  const int64_t n_vectors = n / kWidth;
  const int64_t block_begin = static_cast<int64_t>(blockIdx.x) * kThreads * kVectorsPerThread;
  Vec a_vectors[kVectorsPerThread], b_vectors[kVectorsPerThread];
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = block_begin + u * kThreads + threadIdx.x;
    if (i < n_vectors) {
      a_vectors[u] = load(reinterpret_cast<const Vec*>(a) + i);
      b_vectors[u] = load(reinterpret_cast<const Vec*>(b) + i);
    }
  }
#pragma unroll
  for (int u = 0; u < kVectorsPerThread; ++u) {
    const int64_t i = block_begin + u * kThreads + threadIdx.x;
    if (i < n_vectors) {
      Vec combined;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        combined.values[j] = apply<Op>(a_vectors[u].values[j], b_vectors[u].values[j]);
      }
      store(reinterpret_cast<Vec*>(result) + i, combined);
    }
  }
  const int64_t rest = n_vectors * kWidth + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < n) {
    store(result + rest, apply<Op>(load(a + rest), load(b + rest)));
  }
}

template <class Op, class T, int kWidth>
void launch(const T* a, const T* b, T* result, int64_t n, cudaStream_t stream) {
  const int64_t blocks = ceil_div(ceil_div(n, kWidth), kThreads * kVectorsPerThread);
  RESNET_FUSED_LAUNCH((elementwise_kernel<Op, T, kWidth>), static_cast<unsigned>(blocks), kThreads,
                      0, stream, a, b, result, n);
}

template <class Op>
Tensor elementwise(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                   const Tensor& b) {
  check_activation(op, a_name, a);
  check_like(op, b_name, b, a_name, a);
  const DeviceGuard guard(a.get_device_index());
  Tensor result = allocate_like(a);
  if (a.numel() == 0) return result;
  const cudaStream_t stream = current_stream(a);
  dispatch_up_to_float32(op, a_name, a.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* a_data = static_cast<const T*>(a.const_data_ptr());
    const T* b_data = static_cast<const T*>(b.const_data_ptr());
    T* result_data = static_cast<T*>(result.mutable_data_ptr());
    const uintptr_t addresses = address(a_data) | address(b_data) | address(result_data);
    if (addresses % kVectorBytes == 0) {
      launch<Op, T, kVectorBytes / sizeof(T)>(a_data, b_data, result_data, a.numel(), stream);
    } else {
      launch<Op, T, 1>(a_data, b_data, result_data, a.numel(), stream);
    }
  });
  return result;
}

Tensor add_relu_cuda(const Tensor& x, const Tensor& residual) {
  return elementwise<AddRelu>("add_relu", "x", x, "residual", residual);
}

Tensor add_relu_backward_cuda(const Tensor& grad_out, const Tensor& out) {
  return elementwise<ReluMask>("add_relu_backward", "grad_out", grad_out, "out", out);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("add_relu", TORCH_BOX(&resnet_fused::add_relu_cuda));
  m.impl("add_relu_backward", TORCH_BOX(&resnet_fused::add_relu_backward_cuda));
}
