// Calls of PyTorch operators by name, with C++ arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace resnet_fused::cpu {

using torch::stable::Tensor;

// The results of `op`, which returns kResults tensors.
template <size_t kResults, class... Arguments>
std::array<Tensor, kResults> call(const char* op, const char* overload,
                                  const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), kResults)> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return [&]<size_t... i>(std::index_sequence<i...>) {
    return std::array<Tensor, kResults>{torch::stable::detail::to<Tensor>(stack[i])...};
  }(std::make_index_sequence<kResults>{});
}

}  // namespace resnet_fused::cpu
