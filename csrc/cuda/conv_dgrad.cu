// The gradient of a convolution's input, with what lies around it in a ResNet.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/conv_launch.cuh"
#include "cuda/conv_partials.h"

namespace resnet_fused {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Where the prologue is part of the product: pixels of the gradient are read once, in their order.
bool fuses_batch_norm(const Convolution& conv, const Grouping& grouping) {
  return conv.is_pointwise() && conv.stride == std::array<int64_t, 2>{1, 1} &&
         grouping.groups == 1 && grouping.kernels == grouping.padded_kernels;
}

const float* floats_or_null(const OptionalTensor& t) {
  return static_cast<const float*>(data_or_null(t));
}

// As bn_relu leaves it for an activation in channels_last.
void check_mask(const char* op, const Tensor& mask, const Convolution& conv) {
  const std::array<int64_t, 2> shape = {conv.n * conv.h * conv.w, ceil_div(conv.c, kMaskBits)};
  RESNET_FUSED_CHECK(
      mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.sizes().equals(shape),
      op, ": mask must be contiguous, uint8 and of shape ", to_string(shape), ", got ",
      to_string(mask.sizes()), " of ", torch::headeronly::toString(mask.scalar_type()));
}

Result conv_dgrad_cuda(const Tensor& grad_y, const Tensor& weight, std::vector<int64_t> input_size,
                       const OptionalTensor& y, const OptionalTensor& coefficients,
                       const OptionalTensor& residual, const OptionalTensor& x,
                       const OptionalTensor& scale, const OptionalTensor& shift,
                       const OptionalTensor& mask, const OptionalTensor& mean,
                       const OptionalTensor& output_scale, std::vector<int64_t> geometry, bool tf32,
                       int64_t tile, int64_t splits) {
  const char* op = "conv_dgrad";
  check_activation(op, "grad_y", grad_y);
  RESNET_FUSED_CHECK(input_size.size() == 2, op, ": input_size must be (H, W), got ",
                     to_string(input_size));
  const Convolution conv(op, grad_y.size(0), {input_size[0], input_size[1]}, weight, geometry);
  check_output_shape(op, "grad_y", conv, grad_y);
  const DeviceGuard guard(grad_y.get_device_index());
  Tensor grad_x = allocate_result(grad_y, conv.n, conv.c, conv.h, conv.w);
  RESNET_FUSED_CHECK(grad_x.numel() > 0, op, ": grad_x must not be empty, got shape ",
                     to_string(grad_x.sizes()));
  if (residual) check_like(op, "residual", *residual, "grad_x", grad_x);
  if (x) check_like(op, "x", *x, "grad_x", grad_x);
  for (const OptionalTensor& t : {scale, shift, mean}) {
    if (t) check_coefficients(op, "scale, shift and mean", *t, conv.c, grad_y);
  }
  RESNET_FUSED_CHECK(scale.has_value() == shift.has_value(), op,
                     ": scale and shift must be given together");
  RESNET_FUSED_CHECK(x || !(scale || mean), op, ": x must be given with scale and mean, got None");
  RESNET_FUSED_CHECK(y.has_value() == coefficients.has_value(), op,
                     ": y and coefficients must be given together");
  if (mask) check_mask(op, *mask, conv);
  Tensor source = grad_y;
  Tensor grad_conv = allocate_vector(grad_y, 0, dtype_code(grad_y));
  Tensor sum_grad = allocate_vector(grad_y, 0, aoti_torch_dtype_float32());
  Tensor sum_grad_x = allocate_vector(grad_y, 0, aoti_torch_dtype_float32());
  dispatch_arithmetic(op, grad_y, tf32, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using Math = typename decltype(arithmetic)::type;
    constexpr int64_t kStepChannels = kStepBytes / sizeof(T);
    const Grouping grouping(conv, kChunk<T>);
    check_sizes(op, conv, grouping);
    bool fuses = false;
    if (coefficients) {
      check_coefficients(op, "coefficients", *coefficients, 3 * conv.k, grad_y);
      check_like(op, "y", *y, "grad_y", grad_y);
      fuses = fuses_batch_norm(conv, grouping) &&
              (address(grad_y.const_data_ptr()) | address(y->const_data_ptr()) |
               address(coefficients->const_data_ptr())) %
                      kVectorBytes ==
                  0;
      grad_conv =
          fuses ? allocate_like(grad_y) : batch_norm_backward(op, grad_y, *y, *coefficients);
      if (!fuses) source = grad_conv;
    }
    source =
        with_padded_groups(op, source, grouping.groups, grouping.kernels, grouping.padded_kernels);
    const Tensor packed = packed_weight(op, weight, grad_y, conv, grouping, output_scale);
    ConvParameters p = gradient_parameters(conv, grouping, kStepChannels);
    const std::vector<Phase> phases = gradient_phases(conv, grouping, kStepChannels);
    p.source = source.const_data_ptr();
    p.weight = packed.const_data_ptr();
    p.result = grad_x.mutable_data_ptr();
    p.has_vectors = has_vectors<T>(
        p.columns, address(p.result) | address(data_or_null(residual)) | address(data_or_null(x)));
    const auto run = [&](auto policy, const typename decltype(policy)::Parameters& prologue) {
      using Prologue = decltype(policy);
      using Tiles = TilesOf<T, Math, Prologue>;
      const Choice choice =
          choose_tile<Tiles>(op, phases, p.groups, p.columns, steps_of(p, phases),
                             grad_y.get_device_index(), wanted_choice(tile, splits));
      const int64_t partials = mean ? choice.row_tiles * static_cast<int64_t>(phases.size()) : 0;
      const Tensor sums = allocate_partials(grad_y, partials, conv.c);
      const Tensor sums_of_x = allocate_partials(grad_y, partials, conv.c);
      const ReluMaskBnBackward::Parameters epilogue{
          data_or_null(residual),
          scale || mean ? data_or_null(x) : nullptr,
          floats_or_null(scale),
          floats_or_null(shift),
          static_cast<const uint8_t*>(data_or_null(mask)),
          static_cast<int>(ceil_div(conv.c, kMaskBits)),
          floats_or_null(mean),
          static_cast<float*>(sums.mutable_data_ptr()),
          static_cast<float*>(sums_of_x.mutable_data_ptr())};
      visit_tile<Tiles>(choice.tile, [&](auto tile) {
        launch_conv<decltype(tile), Prologue, ReluMaskBnBackward, true>(grad_y, p, phases, choice,
                                                                        prologue, epilogue);
      });
      if (mean) std::tie(sum_grad, sum_grad_x) = sum_over_tiles(sums, sums_of_x);
    };
    if (fuses) {
      const float* a = static_cast<const float*>(coefficients->const_data_ptr());
      run(BatchNormBackward{},
          {a, a + conv.k, a + 2 * conv.k, y->const_data_ptr(), grad_conv.mutable_data_ptr()});
    } else {
      run(Identity{}, {});
    }
  });
  return {grad_x, sum_grad, sum_grad_x, grad_conv};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("conv_dgrad", TORCH_BOX(&resnet_fused::conv_dgrad_cuda));
}
