// A whole bottleneck without a projection in one kernel, for inference.
#include <torch/csrc/stable/library.h>

#include "cuda/bottleneck_launch.cuh"

namespace resnet_fused {
namespace {

Tensor bottleneck_block_cuda(const Tensor& x, const Tensor& weight1, const Tensor& scale1,
                             const Tensor& shift1, const Tensor& weight2, const Tensor& scale2,
                             const Tensor& shift2, const Tensor& weight3, const Tensor& scale3,
                             const Tensor& shift3) {
  const char* op = "bottleneck_block";
  constexpr int kMiddle = 64;
  check_chain_input(op, "x", x);
  RESNET_FUSED_CHECK(x.size(1) == kExpansion * kMiddle, op, ": x must have 256 channels, got ",
                     x.size(1), " (use bottleneck_tail)");
  const FoldedConvolution conv1{"", "1", weight1, scale1, shift1};
  const Bottleneck block{
      nullptr, x, &conv1, {"", "2", weight2, scale2, shift2}, {"", "3", weight3, scale3, shift3}};
  check_convolutions(op, block, kMiddle);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = allocate_result(x, x.size(0), x.size(1), x.size(2), x.size(3));
  if (out.numel() == 0) return out;
  dispatch_16_bits(op, "x", x, [&](auto element) {
    using T = decltype(element);
    launch_chain<LargeChainOf<T, WholeBlock, kMiddle>>(op, block, out.mutable_data_ptr(), nullptr);
  });
  return out;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bottleneck_block", TORCH_BOX(&resnet_fused::bottleneck_block_cuda));
}
