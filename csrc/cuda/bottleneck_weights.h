// Weights of the convolutions in a bottleneck, in the order in which its kernel reads them.
//
// They are cut into blocks of 64 columns (output channels) x 64 summed (input) channels. A column's
// channels lie side by side in a row of 128 bytes, whose chunks of 16 bytes are permuted by
// row_offset: a block is copied to shared memory as it is, and ldmatrix meets no bank conflicts.
// The blocks of one step follow each other as they are used:
//   conv1 where the kernel begins with it: for each 64 of its 4M input channels
//   conv2: for each tap, for each 64 summed channels, for each 64 columns
//   conv3: for each 64 of its 4M columns, for each 64 summed channels; behind each of these 64
//     columns, which are summed channels of the next block's conv1, that one: for each 64 columns
// Behind the blocks lie the coefficients of the columns in the same order of channels: of conv2,
// conv3 and conv1, as (scale, scale, shift, shift) of two neighbouring columns.
#pragma once

#include <cstdint>

#include "common/checks.h"
#include "cuda/platform.h"

namespace resnet_fused {

constexpr int kBlockSide = 64;
constexpr int kBlockRowBytes = 128;
constexpr int kBlockBytes = kBlockSide * kBlockRowBytes;
constexpr int kBlockChunkBytes = 16;
constexpr int kExpansion = 4;  // a block's output has so many times the channels of its 3x3
constexpr int kTaps = 9;

// Of a chunk of a row that is `row` modulo 8, in the row: any 8 neighbouring rows have the same
// chunk in 8 different groups of banks.
__host__ __device__ constexpr int row_offset(int row, int chunk) {
  return (chunk ^ (row & 7)) * kBlockChunkBytes;
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

  __host__ __device__ constexpr int sides() const { return middle / kBlockSide; }
  __host__ __device__ constexpr int blocks_before() const {
    return begins_at_x ? kExpansion * sides() * sides() : 0;
  }
  __host__ __device__ constexpr int blocks_of_3x3() const { return kTaps * sides() * sides(); }
  // For 64 channels of the output.
  __host__ __device__ constexpr int blocks_of_chunk() const {
    return sides() * (computes_next ? 2 : 1);
  }
  __host__ __device__ constexpr int blocks_behind() const {
    return kExpansion * sides() * blocks_of_chunk();
  }
  __host__ __device__ constexpr int blocks() const {
    return blocks_before() + blocks_of_3x3() + blocks_behind();
  }
  __host__ __device__ constexpr int columns() const {
    return (begins_at_x || computes_next ? 2 : 1) * middle + kExpansion * middle;
  }
};

// A convolution and its folded batch norm. name: of the operator's arguments, as in "weight" +
// "2" or "next_" + "weight" + "1".
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
