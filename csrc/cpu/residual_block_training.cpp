// A residual block in training, forward and backward, around the convolutions of `convolve`. One
// call each way: between convolutions the caches are cold, and the steps of an interpreter cost
// several times their usual time. What is kept for the backward is described in
// nn/block_function.py.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/dispatch_call.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kParameters =
    5;                        // per convolution: weight, BN's weight, bias, running statistics
constexpr int64_t kKept = 3;  // per convolution: output, mean, invstd

using OptionalTensor = std::optional<Tensor>;

// One convolution and the normalisation of its output.
struct Branch {
  const OptionalTensor* parameters;
  const int64_t* geometry;
  bool training;
  double momentum, eps;

  const Tensor& weight() const { return *parameters[0]; }
};

struct Branches {
  std::vector<OptionalTensor> parameters;
  std::vector<int64_t> geometry, training;
  std::vector<double> momentum_and_eps;

  size_t size() const { return training.size(); }
  Branch operator[](size_t i) const {
    return {&parameters[kParameters * i], &geometry[kGeometry * i], training[i] != 0,
            momentum_and_eps[2 * i], momentum_and_eps[2 * i + 1]};
  }
  void check(const char* op, bool has_projection) const {
    const size_t n = size();
    STD_TORCH_CHECK(
        n > static_cast<size_t>(has_projection) && parameters.size() == kParameters * n &&
            geometry.size() == kGeometry * n && momentum_and_eps.size() == 2 * n,
        op, ": parameters, geometry, training, momentum and eps must describe the same ", n,
        " convolutions, got ", parameters.size(), ", ", geometry.size(), ", ", training.size(),
        " and ", momentum_and_eps.size(), " values");
    for (size_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(parameters[kParameters * i].has_value(), op,
                      ": every convolution must have a weight");
    }
  }
};

// (out, mean, invstd, residual_mean, residual_invstd, no mask)
std::array<Tensor, 6> bn_relu(const Tensor& y, const Branch& bn, const OptionalTensor& residual,
                              const Branch* residual_bn) {
  const OptionalTensor none;
  const auto parameter = [&](int64_t i) { return residual_bn ? residual_bn->parameters[i] : none; };
  return call<6>("resnet_fused_native::bn_relu", "", y, bn.parameters[1], bn.parameters[2],
                 bn.parameters[3], bn.parameters[4], bn.training, bn.momentum, bn.eps, residual,
                 residual_bn != nullptr, parameter(1), parameter(2), parameter(3), parameter(4),
                 residual_bn && residual_bn->training, residual_bn ? residual_bn->momentum : 0.0,
                 residual_bn ? residual_bn->eps : 0.0, true, false);
}

// residual: what is added without a projection. Returns out, then output, mean and invstd of every
// convolution.
std::vector<Tensor> residual_block_forward(const Tensor& x, const OptionalTensor& residual,
                                           std::vector<OptionalTensor> parameters,
                                           std::vector<int64_t> geometry,
                                           std::vector<int64_t> training,
                                           std::vector<double> momentum_and_eps,
                                           bool has_projection) {
  const Branches branches{std::move(parameters), std::move(geometry), std::move(training),
                          std::move(momentum_and_eps)};
  branches.check("residual_block_forward", has_projection);
  STD_TORCH_CHECK(residual.has_value() != has_projection,
                  "residual_block_forward: residual must be given where there is no projection");
  const size_t last = branches.size() - has_projection - 1;
  std::vector<Tensor> results(1);
  Tensor z = x;
  for (size_t i = 0; i < last; ++i) {
    const Branch branch = branches[i];
    const Tensor y = convolve(z, branch.weight(), branch.geometry);
    const auto normalised = bn_relu(y, branch, std::nullopt, nullptr);
    z = normalised[0];
    results.insert(results.end(), {y, normalised[1], normalised[2]});
  }
  const Branch branch = branches[last];
  const Tensor y = convolve(z, branch.weight(), branch.geometry);
  z = Tensor();  // its memory is free for what follows
  if (has_projection) {
    const Branch projection = branches[last + 1];
    const Tensor shortcut = convolve(x, projection.weight(), projection.geometry);
    const auto normalised = bn_relu(y, branch, shortcut, &projection);
    results[0] = normalised[0];
    results.insert(results.end(),
                   {y, normalised[1], normalised[2], shortcut, normalised[3], normalised[4]});
  } else {
    const auto normalised = bn_relu(y, branch, residual, nullptr);
    results[0] = normalised[0];
    results.insert(results.end(), {y, normalised[1], normalised[2]});
  }
  return results;
}

// (grad_y, grad_weight, grad_bias, grad_residual, grad_residual_weight, grad_residual_bias)
std::array<Tensor, 6> bn_relu_backward(const Tensor& grad, const OptionalTensor* kept,
                                       const Branch& bn, const OptionalTensor& out,
                                       const OptionalTensor* residual_kept,
                                       const Branch* residual_bn) {
  const OptionalTensor none;
  const auto residual = [&](int64_t i) { return residual_kept ? residual_kept[i] : none; };
  const auto parameter = [&](int64_t i) { return residual_bn ? residual_bn->parameters[i] : none; };
  return call<6>("resnet_fused_native::bn_relu_backward", "", grad, *kept[0], out, none,
                 bn.parameters[1], bn.parameters[2], *kept[1], *kept[2], bn.training,
                 out.has_value(), residual(0), residual_bn != nullptr, parameter(1), parameter(2),
                 residual(1), residual(2), residual_bn && residual_bn->training, true);
}

// relu(bn(y)) once more.
Tensor relu_output(const OptionalTensor* kept, const Branch& bn) {
  return call<1>("resnet_fused_native::bn_relu_apply", "", *kept[0], bn.parameters[1],
                 bn.parameters[2], *kept[1], *kept[2], true)[0];
}

// kept: what the forward returned after out; outputs of the last convolution and of the projection
// may be missing and are computed once more. needed: whether x, then every convolution's weight,
// needs its gradient. Returns the gradient of x through the convolutions, that of the shortcut (of
// x through the projection, or of the residual), then those of weight, BN's weight and BN's bias of
// every convolution; what is not needed is undefined.
std::vector<Tensor> residual_block_backward(const Tensor& grad_out, const Tensor& out,
                                            const Tensor& x, std::vector<OptionalTensor> kept,
                                            std::vector<OptionalTensor> parameters,
                                            std::vector<int64_t> geometry,
                                            std::vector<int64_t> training,
                                            std::vector<double> momentum_and_eps,
                                            bool has_projection, std::vector<int64_t> needed) {
  const Branches branches{std::move(parameters), std::move(geometry), std::move(training),
                          std::move(momentum_and_eps)};
  branches.check("residual_block_backward", has_projection);
  STD_TORCH_CHECK(kept.size() == kKept * branches.size() && needed.size() == 1 + branches.size(),
                  "residual_block_backward: kept and needed must describe ", branches.size(),
                  " convolutions, got ", kept.size(), " and ", needed.size(), " values");
  const size_t last = branches.size() - has_projection - 1;
  std::vector<Tensor> grads(2 + 3 * branches.size());
  const auto place = [&](size_t i, const Tensor& weight, const Tensor& bn_weight,
                         const Tensor& bn_bias) {
    grads[2 + 3 * i] = weight;
    grads[3 + 3 * i] = bn_weight;
    grads[4 + 3 * i] = bn_bias;
  };
  const Branch final_branch = branches[last];
  const auto input_of = [&](size_t i) {
    return i ? relu_output(&kept[kKept * (i - 1)], branches[i - 1]) : x;
  };
  OptionalTensor z;  // input of the convolution at hand
  OptionalTensor& y = kept[kKept * last];
  if (!y) {
    z = input_of(last);
    y = convolve(*z, final_branch.weight(), final_branch.geometry);
  }
  std::array<Tensor, 6> bn_grads;
  if (has_projection) {
    const Branch projection = branches[last + 1];
    OptionalTensor& shortcut = kept[kKept * (last + 1)];
    if (!shortcut) shortcut = convolve(x, projection.weight(), projection.geometry);
    bn_grads = bn_relu_backward(grad_out, &kept[kKept * last], final_branch, out,
                                &kept[kKept * (last + 1)], &projection);
    const auto [grad_x, grad_weight] =
        convolve_backward(bn_grads[3], x, projection.weight(), projection.geometry, needed[0] != 0,
                          needed[2 + last] != 0);
    grads[1] = grad_x;
    place(last + 1, grad_weight, bn_grads[4], bn_grads[5]);
  } else {
    bn_grads = bn_relu_backward(grad_out, &kept[kKept * last], final_branch, out, nullptr, nullptr);
    grads[1] = bn_grads[3];
  }
  for (size_t i = last;; --i) {
    const Branch branch = branches[i];
    if (!z) z = input_of(i);
    const auto [grad_z, grad_weight] =
        convolve_backward(bn_grads[0], *z, branch.weight(), branch.geometry,
                          i > 0 || needed[0] != 0, needed[1 + i] != 0);
    place(i, grad_weight, bn_grads[1], bn_grads[2]);
    if (i == 0) {
      grads[0] = grad_z;
      return grads;
    }
    z.reset();
    bn_grads = bn_relu_backward(grad_z, &kept[kKept * (i - 1)], branches[i - 1], std::nullopt,
                                nullptr, nullptr);
  }
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("residual_block_forward", TORCH_BOX(&resnet_fused::cpu::residual_block_forward));
  m.impl("residual_block_backward", TORCH_BOX(&resnet_fused::cpu::residual_block_backward));
}
