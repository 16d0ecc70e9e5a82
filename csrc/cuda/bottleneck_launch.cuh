// From the tensors of a bottleneck to the launch of one instance of its kernel.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cuda/activation.h"
#include "cuda/bottleneck.cuh"
#include "cuda/conv_launch.cuh"

namespace resnet_fused {

// Calls body(T{}) with bfloat16 or float16.
template <class Body>
void dispatch_16_bits(const char* op, const char* name, const Tensor& x, Body&& body) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return body(ptx::Half{});
    case ScalarType::BFloat16:
      return body(ptx::BFloat16{});
    default:
      fail(op, ": ", name, " must be bfloat16 or float16, got ",
           torch::headeronly::toString(x.scalar_type()));
  }
}

// The activations and convolutions of a bottleneck behind its first one.
struct BottleneckTail {
  const Tensor &y1, &residual;
  FoldedConvolution conv2, conv3;
};

// Throws unless y1 is (N, M, H, W) in channels_last.
inline void check_chain_input(const char* op, const char* name, const Tensor& x) {
  check_activation(op, name, x);
  dispatch_16_bits(op, name, x, [](auto) {});
  RESNET_FUSED_CHECK(x.numel() == 0 || is_channels_last(x), op, ": ", name,
                     " must be channels_last, got strides ", to_string(x.strides()));
  RESNET_FUSED_CHECK(address(x.const_data_ptr()) % kVectorBytes == 0, op, ": ", name,
                     " must be aligned to 16 bytes, got address ", x.const_data_ptr());
  // Positions behind the last pixel are numbers, too.
  constexpr int64_t kMostPixels = INT32_MAX / 2;
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  RESNET_FUSED_CHECK(pixels <= kMostPixels, op, ": ", name, " must have at most ", kMostPixels,
                     " pixels, got ", pixels);
}

inline void check_tail(const char* op, const BottleneckTail& tail) {
  check_chain_input(op, "y1", tail.y1);
  const int64_t middle = tail.y1.size(1), wide = kExpansion * middle;
  const std::array<int64_t, 4> shape = {tail.y1.size(0), wide, tail.y1.size(2), tail.y1.size(3)};
  RESNET_FUSED_CHECK(tail.residual.sizes() == torch::headeronly::IntHeaderOnlyArrayRef(shape), op,
                     ": residual must have shape ", to_string(shape), ", got ",
                     to_string(tail.residual.sizes()));
  RESNET_FUSED_CHECK(tail.residual.scalar_type() == tail.y1.scalar_type(), op,
                     ": residual must have the dtype of y1 ",
                     torch::headeronly::toString(tail.y1.scalar_type()), ", got ",
                     torch::headeronly::toString(tail.residual.scalar_type()));
  RESNET_FUSED_CHECK(tail.residual.device() == tail.y1.device(), op,
                     ": residual must be on the device of y1");
  check_chain_input(op, "residual", tail.residual);
  check_folded(op, tail.conv2, middle, middle, 3, tail.y1);
  check_folded(op, tail.conv3, wide, middle, 1, tail.y1);
}

// out, next_y1: like the results, and next_y1 and next_conv1 null where the kernel has none.
template <class Chain>
void launch_bottleneck(const char* op, const BottleneckTail& tail,
                       const FoldedConvolution* next_conv1, void* out, void* next_y1) {
  const Tensor& y1 = tail.y1;
  const int device = y1.get_device_index();
  const int64_t width = y1.size(3), height = y1.size(2);
  const int64_t pixels = y1.size(0) * height * width;
  const int64_t ring = ring_pixels(Chain::kPixels, width);
  const int64_t shared = shared_bytes<Chain>(ring);
  RESNET_FUSED_CHECK(shared <= most_shared_bytes(device), op, ": y1 must be less wide for ",
                     Chain::kMiddle, " channels, got ", width, " pixels, for which a block needs ",
                     shared, " bytes of shared memory where it can have ",
                     most_shared_bytes(device), " (use conv_bn_relu)");
  const Tensor weights = pack_chain(Chain::kShape, next_conv1, tail.conv2, tail.conv3, y1);
  const int64_t steps = ceil_div(pixels, Chain::kPixels);
  const ChainParameters p{y1.const_data_ptr(),
                          tail.residual.const_data_ptr(),
                          weights.const_data_ptr(),
                          out,
                          next_y1,
                          static_cast<int>(pixels),
                          static_cast<int>(steps),
                          Divider(width),
                          Divider(height),
                          static_cast<int>(ring)};
  const int64_t blocks =
      std::min<int64_t>(steps, int64_t{Chain::kResidentBlocks} * multiprocessor_count(device));
  allow_shared_bytes(bottleneck_kernel<Chain>, shared);
  RESNET_FUSED_LAUNCH((bottleneck_kernel<Chain>), static_cast<unsigned>(blocks), Chain::kThreads,
                      shared, current_stream(y1), p);
}

}  // namespace resnet_fused
