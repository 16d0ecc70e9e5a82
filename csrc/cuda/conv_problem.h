// Convolutions as the kernels are given them, and how the host describes one.
//
// Activations lie in channels_last, weights as (K, R, S, C / groups). The forward and the gradient
// of the input are both a product with a row for every pixel of the result, a column for every
// channel of it, and a sum over taps (positions in the filter) and channels of the source:
// source pixel = step * result pixel + first + dilation * tap, along each axis. The gradient of a
// strided convolution is one such product for each phase: the pixels of the result with the same
// position between two steps, which the same taps reach.
#pragma once

#include <cstdint>

#include "cuda/platform.h"

namespace resnet_fused {

// n / divisor for 0 <= n < 2^31 by one multiplication. Granlund, Montgomery, "Division by Invariant
// Integers using Multiplication", 1994.
class Divider {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor);
    shift_ = 31 + bits;
  }

  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * factor_ >> shift_);
  }

  __host__ __device__ __forceinline__ int divisor() const { return static_cast<int>(divisor_); }

 private:
  uint32_t divisor_ = 1;
  uint32_t factor_ = 1u << 31;
  int shift_ = 31;
};

// Along one axis of the images.
struct Axis {
  int source;  // pixels
  int step, first;
  int taps;
  Divider dilation;
};

// Part of the result that one set of taps computes.
struct Phase {
  int pixels;                        // N * P * Q
  Divider image_pixels, row_pixels;  // P * Q, Q
  Axis rows, columns;
  // Elements of the source from the end of one tap to the next, and what is added where a row of
  // taps ends; the same of the weight, and its first tap.
  int source_next_tap, source_next_row;
  int weight_next_tap, weight_next_row, weight_first;
  // Pixels of the whole result: the first one, and from pixel to pixel, row to row, image to image.
  int result_first, result_pixel, result_row, result_image;
  bool is_dense;  // all of them in their order
};

// A stride of 2 has so many; more take several launches.
constexpr int kMaxPhases = 4;
constexpr int kMaxTaps = 15;  // along an axis

struct ConvParameters {
  const void* source;
  const void* weight;
  void* result;
  int source_width;
  int source_pixels;  // of an image
  int source_pitch;   // from pixel to pixel, in elements
  int source_group;   // from group to group, in elements
  int groups;
  int channels;      // of the source in a group: the sum over one tap
  int columns;       // of the result in a group
  int steps_of_tap;  // of the main loop
  // Of the weight: from group to group, and between columns (forward) or channels (gradient of the
  // input), in elements.
  int weight_group, weight_pitch;
  bool has_vectors;  // the result, and what is read like it, moves 16 bytes at a time
  int row_tiles;     // of the phase that has most
  int column_tiles;  // of a group
  // Of each part of the steps and each tile its sums; of each tile how many parts are there.
  float4* partial_sums;
  unsigned* finished;
  Phase phases[kMaxPhases];
};

}  // namespace resnet_fused
