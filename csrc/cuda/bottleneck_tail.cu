// All of a bottleneck but its first convolution in one kernel, for inference.
#include <torch/csrc/stable/library.h>

#include "cuda/bottleneck_launch.cuh"

namespace resnet_fused {
namespace {

Tensor bottleneck_tail_cuda(const Tensor& y1, const Tensor& residual, const Tensor& weight2,
                            const Tensor& scale2, const Tensor& shift2, const Tensor& weight3,
                            const Tensor& scale3, const Tensor& shift3) {
  const char* op = "bottleneck_tail";
  check_chain_inputs(op, y1, residual);
  const int64_t middle = y1.size(1);
  const Bottleneck block{&y1,
                         residual,
                         nullptr,
                         {"", "2", weight2, scale2, shift2},
                         {"", "3", weight3, scale3, shift3}};
  check_convolutions(op, block, middle);
  const DeviceGuard guard(y1.get_device_index());
  Tensor out = allocate_result(y1, y1.size(0), residual.size(1), y1.size(2), y1.size(3));
  if (out.numel() == 0) return out;
  dispatch_16_bits(op, "y1", y1, [&](auto element) {
    using T = decltype(element);
    void* const to = out.mutable_data_ptr();
    switch (middle) {
      case 64:
        return launch_bottleneck<T, Tail, 64>(op, block, to, nullptr);
      case 128:
        return launch_bottleneck<T, Tail, 128>(op, block, to, nullptr);
      case 256:
        return launch_bottleneck<T, Tail, 256>(op, block, to, nullptr);
      default:
        fail(op, ": y1 must have 64, 128 or 256 channels, got ", middle, " (use conv_bn_relu)");
    }
  });
  return out;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bottleneck_tail", TORCH_BOX(&resnet_fused::bottleneck_tail_cuda));
}
