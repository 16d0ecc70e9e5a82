// All of a bottleneck but its first convolution, and that of the next one, for inference.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/bottleneck_launch.cuh"

namespace resnet_fused {
namespace {

std::tuple<Tensor, Tensor> bottleneck_roll_cuda(
    const Tensor& y1, const Tensor& residual, const Tensor& weight2, const Tensor& scale2,
    const Tensor& shift2, const Tensor& weight3, const Tensor& scale3, const Tensor& shift3,
    const Tensor& next_weight1, const Tensor& next_scale1, const Tensor& next_shift1) {
  const char* op = "bottleneck_roll";
  check_chain_inputs(op, y1, residual);
  const int64_t middle = y1.size(1);
  const FoldedConvolution conv1{"next_", "1", next_weight1, next_scale1, next_shift1};
  const Bottleneck block{&y1,
                         residual,
                         &conv1,
                         {"", "2", weight2, scale2, shift2},
                         {"", "3", weight3, scale3, shift3}};
  check_convolutions(op, block, middle);
  const DeviceGuard guard(y1.get_device_index());
  Tensor out = allocate_result(y1, y1.size(0), residual.size(1), y1.size(2), y1.size(3));
  Tensor next_y1 = allocate_result(y1, y1.size(0), middle, y1.size(2), y1.size(3));
  if (out.numel() == 0) return {out, next_y1};
  dispatch_16_bits(op, "y1", y1, [&](auto element) {
    using T = decltype(element);
    void* const to = out.mutable_data_ptr();
    void* const next_to = next_y1.mutable_data_ptr();
    switch (middle) {
      case 64:
        return launch_bottleneck<T, Roll, 64>(op, block, to, next_to);
      case 128:
        return launch_bottleneck<T, Roll, 128>(op, block, to, next_to);
      default:
        fail(op, ": y1 must have 64 or 128 channels, got ", middle, " (use bottleneck_tail)");
    }
  });
  return {out, next_y1};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bottleneck_roll", TORCH_BOX(&resnet_fused::bottleneck_roll_cuda));
}
