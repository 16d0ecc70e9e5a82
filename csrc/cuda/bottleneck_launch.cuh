// From the tensors of a bottleneck to the launch of one instance of its kernel.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cuda/activation.h"
#include "cuda/bottleneck_tiles.h"
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

// What the operators are given.
struct Bottleneck {
  const Tensor* y1;                // null where it is computed from x
  const Tensor& residual;          // or x
  const FoldedConvolution* conv1;  // of this block, or of the next one, or null
  FoldedConvolution conv2, conv3;
};

// Throws unless x is (N, C, H, W) in channels_last.
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

// y1 and the residual that goes with it.
inline void check_chain_inputs(const char* op, const Tensor& y1, const Tensor& residual) {
  check_chain_input(op, "y1", y1);
  const std::array<int64_t, 4> shape = {y1.size(0), kExpansion * y1.size(1), y1.size(2),
                                        y1.size(3)};
  RESNET_FUSED_CHECK(residual.sizes().equals(shape), op, ": residual must have shape ",
                     to_string(shape), ", got ", to_string(residual.sizes()));
  RESNET_FUSED_CHECK(residual.scalar_type() == y1.scalar_type(), op,
                     ": residual must have the dtype of y1 ",
                     torch::headeronly::toString(y1.scalar_type()), ", got ",
                     torch::headeronly::toString(residual.scalar_type()));
  RESNET_FUSED_CHECK(residual.device() == y1.device(), op,
                     ": residual must be on the device of y1");
  check_chain_input(op, "residual", residual);
}

// Of a block with so many channels in its 3x3 convolution.
inline void check_convolutions(const char* op, const Bottleneck& block, int64_t middle) {
  const int64_t wide = kExpansion * middle;
  check_folded(op, block.conv2, middle, middle, 3, block.residual);
  check_folded(op, block.conv3, wide, middle, 1, block.residual);
  if (block.conv1) check_folded(op, *block.conv1, middle, wide, 1, block.residual);
}

// From the pixels of a batch to what an instance of the kernel needs for them.
template <class Chain>
struct ChainLaunch {
  int64_t ring, shared, steps;

  explicit ChainLaunch(const Tensor& residual)
      : ring(Chain::ring_pixels(residual.size(3))),
        shared(Chain::shared_bytes(ring)),
        steps(ceil_div(residual.size(0) * residual.size(2) * residual.size(3), Chain::kPixels)) {}
};

// out: like the residual. next_y1: null where the kernel has none.
template <class Chain>
void launch_chain(const char* op, const Bottleneck& block, void* out, void* next_y1) {
  const Tensor& residual = block.residual;
  const int device = residual.get_device_index();
  const int64_t width = residual.size(3), height = residual.size(2);
  const ChainLaunch<Chain> launch(residual);
  RESNET_FUSED_CHECK(launch.shared <= most_shared_bytes(device), op,
                     ": images must be less wide with ", Chain::kWide, " channels, got ", width,
                     " pixels, for which a block needs ", launch.shared,
                     " bytes of shared memory where it can have ", most_shared_bytes(device),
                     " (use conv_bn_relu)");
  const Tensor weights = pack_chain(Chain::kShape, block.conv1, block.conv2, block.conv3, residual);
  const ChainParameters p{block.y1 ? block.y1->const_data_ptr() : nullptr,
                          residual.const_data_ptr(),
                          weights.const_data_ptr(),
                          out,
                          next_y1,
                          static_cast<int>(residual.size(0) * height * width),
                          static_cast<int>(launch.steps),
                          Divider(width),
                          Divider(height),
                          static_cast<int>(launch.ring)};
  const int64_t blocks = std::min<int64_t>(
      launch.steps, int64_t{Chain::kResidentBlocks} * multiprocessor_count(device));
  allow_shared_bytes(bottleneck_kernel<Chain>, launch.shared);
  RESNET_FUSED_LAUNCH((bottleneck_kernel<Chain>), static_cast<unsigned>(blocks), Chain::kThreads,
                      launch.shared, current_stream(residual), p);
}

// The small instance, where the steps of the large one are too few for all multiprocessors, or its
// ring is too large.
template <class T, class Part, int kMiddle>
void launch_bottleneck(const char* op, const Bottleneck& block, void* out, void* next_y1) {
  using Large = LargeChainOf<T, Part, kMiddle>;
  const int device = block.residual.get_device_index();
  const ChainLaunch<Large> large(block.residual);
  if (large.steps >= multiprocessor_count(device) && large.shared <= most_shared_bytes(device)) {
    return launch_chain<Large>(op, block, out, next_y1);
  }
  launch_chain<SmallChainOf<T, Part, kMiddle>>(op, block, out, next_y1);
}

}  // namespace resnet_fused
