// Argument checks shared by the CPU and CUDA launchers. Every message reads
// "op: argument must ..., got ...".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

// Throws (RuntimeError in Python) the concatenation of the other arguments unless `condition`.
// Unlike STD_TORCH_CHECK it puts no source location before the message.
#define RESNET_FUSED_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]           \
  ::resnet_fused::fail(__VA_ARGS__)

namespace resnet_fused {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// "(2, 64, 56, 56)"
template <class Extents>
inline std::string to_string(const Extents& extents) {
  std::string text = "(";
  for (size_t i = 0; i < extents.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(extents[i]);
  }
  return text + ")";
}

// Whether walking the dimensions in `order`, outermost first, visits memory without gaps.
// Dimensions of size 1 are never stepped over, so their stride is free.
inline bool is_dense_in_order(const Tensor& t, std::initializer_list<int64_t> order) {
  int64_t expected = 1;
  for (auto dim = std::rbegin(order); dim != std::rend(order); ++dim) {
    if (t.size(*dim) != 1 && t.stride(*dim) != expected) return false;
    expected *= t.size(*dim);
  }
  return true;
}

inline bool is_nchw_contiguous(const Tensor& t) {
  return t.dim() == 4 && is_dense_in_order(t, {0, 1, 2, 3});
}

inline bool is_channels_last(const Tensor& t) {
  return t.dim() == 4 && is_dense_in_order(t, {0, 2, 3, 1});
}

// `x` is the tensor that the layout of all other activations is measured against.
inline void check_dense(const char* op, const char* name, const Tensor& x) {
  RESNET_FUSED_CHECK(x.numel() == 0 || is_nchw_contiguous(x) || is_channels_last(x), op, ": ", name,
                     " must be a 4-d tensor, contiguous or channels_last, got shape ",
                     to_string(x.sizes()), " with strides ", to_string(x.strides()));
}

// Same shape, dtype, device and memory layout as `x`.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* x_name,
                       const Tensor& x) {
  RESNET_FUSED_CHECK(t.sizes().equals(x.sizes()), op, ": ", name, " must have the shape of ",
                     x_name, " ", to_string(x.sizes()), ", got ", to_string(t.sizes()));
  RESNET_FUSED_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of ",
                     x_name, " ", torch::headeronly::toString(x.scalar_type()), ", got ",
                     torch::headeronly::toString(t.scalar_type()));
  RESNET_FUSED_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of ",
                     x_name);
  bool same_layout = true;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    same_layout &= x.size(dim) == 1 || t.stride(dim) == x.stride(dim);
  }
  RESNET_FUSED_CHECK(x.numel() == 0 || same_layout, op, ": ", name, " must have the strides of ",
                     x_name, " ", to_string(x.strides()), ", got ", to_string(t.strides()));
}

}  // namespace resnet_fused
