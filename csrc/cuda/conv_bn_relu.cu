// Convolution, folded batch norm, residual and ReLU in one kernel.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cuda/conv_launch.cuh"

namespace resnet_fused {
namespace {

void launch(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
            const Tensor& shift, const OptionalTensor& residual, const Tensor& out, bool relu,
            const Convolution& conv, bool tf32, Choice wanted) {
  if (out.numel() == 0) return;
  dispatch_arithmetic(op, x, tf32, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using Math = typename decltype(arithmetic)::type;
    const ForwardProblem<T> problem(op, x, weight, conv, Grouping(conv, kChunk<T>), {});
    const std::vector<Phase>& phases = problem.phases;
    ConvParameters p = problem.parameters;
    p.result = out.mutable_data_ptr();
    p.has_vectors = has_vectors<T>(p.columns, address(p.result) | address(data_or_null(residual)));
    const ScaleShiftResidualRelu::Parameters epilogue{
        static_cast<const float*>(scale.const_data_ptr()),
        static_cast<const float*>(shift.const_data_ptr()), data_or_null(residual), relu};
    using Tiles = TilesOf<T, Math, Identity>;
    const Choice choice = choose_tile<Tiles>(op, phases, p.groups, p.columns, steps_of(p, phases),
                                             x.get_device_index(), wanted);
    visit_tile<Tiles>(choice.tile, [&](auto tile) {
      launch_conv<decltype(tile), Identity, ScaleShiftResidualRelu, false>(x, p, phases, choice, {},
                                                                           epilogue);
    });
  });
}

Convolution check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  const Tensor& shift, const std::vector<int64_t>& geometry) {
  check_activation(op, "x", x);
  const Convolution conv(op, x.size(0), {x.size(2), x.size(3)}, weight, geometry);
  check_channels(op, conv, x);
  check_coefficients(op, "scale", scale, conv.k, x);
  check_coefficients(op, "shift", shift, conv.k, x);
  return conv;
}

Tensor conv_bn_relu_cuda(const Tensor& x, const Tensor& weight, const Tensor& scale,
                         const Tensor& shift, const OptionalTensor& residual, bool relu,
                         std::vector<int64_t> geometry, bool tf32, int64_t tile, int64_t splits) {
  const char* op = "conv_bn_relu";
  const Convolution conv = check(op, x, weight, scale, shift, geometry);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = allocate_result(x, conv.n, conv.k, conv.p, conv.q);
  if (residual) check_like(op, "residual", *residual, "the output", out);
  launch(op, x, weight, scale, shift, residual, out, relu, conv, tf32, wanted_choice(tile, splits));
  return out;
}

// Into the memory of the residual: every block reads its tile of it before it writes it.
void conv_bn_relu_in_place_cuda(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                const Tensor& shift, const Tensor& residual, bool relu,
                                std::vector<int64_t> geometry, bool tf32, int64_t tile,
                                int64_t splits) {
  const char* op = "conv_bn_relu_";
  const Convolution conv = check(op, x, weight, scale, shift, geometry);
  const DeviceGuard guard(x.get_device_index());
  const std::array<int64_t, 4> shape = {conv.n, conv.k, conv.p, conv.q};
  RESNET_FUSED_CHECK(residual.sizes().equals(shape) && residual.scalar_type() == x.scalar_type() &&
                         is_channels_last(residual),
                     op, ": residual must be channels_last, have the dtype of x and shape ",
                     to_string(shape), ", got ", to_string(residual.sizes()));
  launch(op, x, weight, scale, shift, residual, residual, relu, conv, tf32,
         wanted_choice(tile, splits));
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("conv_bn_relu", TORCH_BOX(&resnet_fused::conv_bn_relu_cuda));
  m.impl("conv_bn_relu_", TORCH_BOX(&resnet_fused::conv_bn_relu_in_place_cuda));
}
