// What a .cu file needs besides its kernels. With RESNET_FUSED_EMULATE the same source compiles as
// plain C++ and its kernels run on CPU tensors (tests/emulator), under another namespace.
#pragma once

#ifdef RESNET_FUSED_EMULATE
#include "emulator.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// These shims live in libtorch_cuda. Weak references let the extension load under a CPU-only torch
// too, where no CUDA tensor exists that could lead to a call of them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#define RESNET_FUSED_NAMESPACE resnet_fused_native
#define RESNET_FUSED_DISPATCH_KEY CUDA
#define RESNET_FUSED_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__);            \
  STD_CUDA_KERNEL_LAUNCH_CHECK()

namespace resnet_fused {

using torch::stable::accelerator::DeviceGuard;

inline bool is_kernel_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace resnet_fused

#endif
