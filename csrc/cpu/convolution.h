// Convolutions of training: PyTorch's, or matrix products where those are faster.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

namespace resnet_fused::cpu {

using torch::stable::Tensor;

constexpr int64_t kGeometry = 7;  // padding, stride, dilation (two each), groups

// conv2d(x, weight) without bias.
Tensor convolve(const Tensor& x, const Tensor& weight, const int64_t* geometry);

// (grad_x, grad_weight) of `convolve`; what is not wanted is undefined.
std::pair<Tensor, Tensor> convolve_backward(const Tensor& grad_y, const Tensor& x,
                                            const Tensor& weight, const int64_t* geometry,
                                            bool want_grad_x, bool want_grad_weight);

}  // namespace resnet_fused::cpu
