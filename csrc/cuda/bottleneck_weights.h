// Weights of the convolutions in a bottleneck, in the order in which its kernel reads them.
//
// Channels come in slices of 64. Weights are cut into blocks: a slice of columns (output channels)
// times a slice of summed (input) channels. A column's channels lie side by side in a row of 128
// bytes, whose chunks of 16 bytes are permuted by row_offset: a block is copied to shared memory as
// it is, and ldmatrix meets no bank conflicts. The blocks follow each other as a step uses them:
//   conv1, where the kernel begins with it: for each summed slice, for each slice of columns
//   conv2: for each tap, for each summed slice, for each slice of columns
//   conv3: for each slice of columns, for each summed slice; then that slice of columns is a summed
//     one of the next block's conv1, if it is computed: for each slice of columns
// Behind the blocks lie the coefficients of the columns in the same order of channels: of conv2,
// conv3 and conv1, as (scale, scale, shift, shift) of two neighbouring columns.
#pragma once

#include <cstdint>

#include "common/checks.h"
#include "cuda/conv.cuh"

namespace resnet_fused {

constexpr int kSlice = 64;  // channels
constexpr int kBlockRowBytes = kSlice * 2;
constexpr int kBlockBytes = kSlice * kBlockRowBytes;
constexpr int kExpansion = 4;  // a block's output has so many times the channels of its 3x3
constexpr int kTaps = 9;

// Of a chunk of a row that is `row` modulo 8, in the row: any 8 neighbouring rows have the same
// chunk in 8 different groups of banks.
__host__ __device__ constexpr int row_offset(int row, int chunk) {
  return (chunk ^ (row & 7)) * kChunkBytes;
}

// The channel that stands in a column of the tensor cores, where a lane is to hold neighbouring
// channels: of 32 columns a lane gets two in each of four tiles, and these are 8 in a row.
__host__ __device__ constexpr int channel_of_column(int column) {
  return (column & ~31) | (column >> 1 & 3) << 3 | (column >> 3 & 3) << 1 | (column & 1);
}

// What a kernel's steps consist of.
struct ChainShape {
  int middle;          // channels of the 3x3 convolution: M
  bool begins_at_x;    // with conv1
  bool computes_next;  // ends with the next block's conv1

  __host__ __device__ constexpr int slices() const { return middle / kSlice; }
  __host__ __device__ constexpr int blocks_before() const {
    return begins_at_x ? kExpansion * slices() * slices() : 0;
  }
  __host__ __device__ constexpr int blocks_of_3x3() const { return kTaps * slices() * slices(); }
  // For a slice of the output.
  __host__ __device__ constexpr int blocks_of_slice() const {
    return slices() * (computes_next ? 2 : 1);
  }
  __host__ __device__ constexpr int blocks_behind() const {
    return kExpansion * slices() * blocks_of_slice();
  }
  __host__ __device__ constexpr int blocks() const {
    return blocks_before() + blocks_of_3x3() + blocks_behind();
  }
  __host__ __device__ constexpr int columns() const {
    return (begins_at_x || computes_next ? 2 : 1) * middle + kExpansion * middle;
  }
};

// A convolution and its folded batch norm, arguments that are called prefix + "weight" + number and
// so on.
struct FoldedConvolution {
  const char *prefix, *number;
  const Tensor &weight, &scale, &shift;
};

// Throws unless they are `columns` x `summed` channels and a square of taps, on the device of x.
void check_folded(const char* op, const FoldedConvolution& conv, int64_t columns, int64_t summed,
                  int64_t side, const Tensor& x);

// shape.blocks() blocks and shape.columns() coefficients, in the dtype of x. conv1: null where
// the kernel has none.
Tensor pack_chain(const ChainShape& shape, const FoldedConvolution* conv1,
                  const FoldedConvolution& conv2, const FoldedConvolution& conv3, const Tensor& x);

}  // namespace resnet_fused
