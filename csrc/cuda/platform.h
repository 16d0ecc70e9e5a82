// What a .cu file needs besides its kernels. With RESNET_FUSED_EMULATE the same source compiles as
// plain C++ and its kernels run on CPU tensors (csrc/emulator), under another namespace.
#pragma once

#ifdef RESNET_FUSED_EMULATE
#include "emulator/emulator.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <type_traits>

// These shims live in libtorch_cuda. Weak references let the extension load under a CPU-only torch
// too, where no CUDA tensor exists that could lead to a call of them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#define RESNET_FUSED_NAMESPACE resnet_fused_native
#define RESNET_FUSED_DISPATCH_KEY CUDA
#define RESNET_FUSED_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(__VA_ARGS__);               \
  STD_CUDA_KERNEL_LAUNCH_CHECK()

// A shared array of `count` elements, the same one for all threads of a block.
#define RESNET_FUSED_SHARED(T, name, count)         \
  __shared__ __align__(16) T name##_storage[count]; \
  const ::resnet_fused::SharedArray<T> name { name##_storage }

// The launch's dynamic shared memory as elements of T.
#define RESNET_FUSED_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char resnet_fused_dynamic_shared[]; \
  const ::resnet_fused::SharedArray<T> name { reinterpret_cast<T*>(resnet_fused_dynamic_shared) }

namespace resnet_fused {

using torch::stable::accelerator::DeviceGuard;

// Requires what makes a load or store of V a single instruction.
template <class V>
constexpr void check_access_type() {
  static_assert(std::is_trivially_copyable_v<V>);
  static_assert(sizeof(V) == 1 || sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 ||
                sizeof(V) == 16);
  static_assert(alignof(V) == sizeof(V), "would be split into narrower accesses");
}

// Global memory: one access of sizeof(V) bytes. Kernels use nothing else, so that the emulator sees
// every access.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  check_access_type<V>();
  return *p;
}

template <class V>
__device__ __forceinline__ void store(V* p, std::type_identity_t<V> value) {
  check_access_type<V>();
  *p = value;
}

// A view of shared memory, which a kernel passes on by value.
template <class T>
struct SharedArray {
  T* data;
  __device__ __forceinline__ T load(int i) const { return data[i]; }
  __device__ __forceinline__ void store(int i, T value) const { data[i] = value; }
};

inline bool is_kernel_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessor_count(int device) {
  constexpr int kCachedDevices = 64;
  // Two threads may both ask the driver first; they get the same answer.
  static std::array<std::atomic<int>, kCachedDevices> cache{};
  const bool cached = device >= 0 && device < kCachedDevices;
  int count = cached ? cache[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (cached) cache[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Before a launch with so much dynamic shared memory. Without it, a kernel gets up to 48 KiB,
// together with the arrays that it declares.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = 40 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(bytes)));
}

// That a block can have at most.
inline int64_t most_shared_bytes(int device) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

inline void zero_async(void* p, size_t bytes, cudaStream_t stream) {
  STD_CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, stream));
}

}  // namespace resnet_fused

#endif
