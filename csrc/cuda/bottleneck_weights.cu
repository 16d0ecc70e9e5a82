// Packs the weights of a bottleneck: one launch in front of its kernel.
#include "cuda/bottleneck_weights.h"

#include <array>
#include <string>

#include "cuda/activation.h"
#include "cuda/conv_operands.h"

namespace resnet_fused {
namespace {

// A (columns, summed, R, S) weight of any floating dtype and strides, and its coefficients.
struct UnpackedConvolution {
  const void* weight;
  ScalarType dtype;
  int64_t stride[4];
  const float *scale, *shift;

  __device__ float element(int column, int summed, int tap, int side) const {
    const int row = tap / side;
    const int64_t at =
        column * stride[0] + summed * stride[1] + row * stride[2] + (tap - row * side) * stride[3];
    switch (dtype) {
      case ScalarType::Half:
        return load(static_cast<const ptx::Half*>(weight) + at);
      case ScalarType::BFloat16:
        return load(static_cast<const ptx::BFloat16*>(weight) + at);
      case ScalarType::Double:
        return static_cast<float>(load(static_cast<const double*>(weight) + at));
      default:
        return load(static_cast<const float*>(weight) + at);
    }
  }
};

struct PackParameters {
  ChainShape shape;
  UnpackedConvolution conv1, conv2, conv3;
};

// Where a block of the packed weights comes from; of its columns and its summed channels the first
// ones, and whether neighbouring channels are brought together in a lane.
struct Origin {
  const UnpackedConvolution& conv;
  int tap, side;
  int column, summed;
  bool permutes_columns, permutes_summed;
};

__device__ Origin origin_of(const PackParameters& p, int block) {
  const int slices = p.shape.slices();
  const auto at = [](int i) { return i * kSlice; };
  if (block < p.shape.blocks_before()) {
    return {p.conv1, 0, 1, at(block % slices), at(block / slices), true, true};
  }
  block -= p.shape.blocks_before();
  if (block < p.shape.blocks_of_3x3()) {
    const int tap = block / (slices * slices);
    return {p.conv2, tap, 3, at(block % slices), at(block / slices % slices), false, false};
  }
  block -= p.shape.blocks_of_3x3();
  const int of_output = block / p.shape.blocks_of_slice();
  block -= of_output * p.shape.blocks_of_slice();
  if (block < slices) return {p.conv3, 0, 1, at(of_output), at(block), true, false};
  return {p.conv1, 0, 1, at(block - slices), at(of_output), true, true};
}

template <class T>
__device__ uint4 packed_chunk(const PackParameters& p, int chunk) {
  constexpr int kChunksOfRow = kBlockRowBytes / kChunkBytes;
  constexpr int kChunksOfBlock = kBlockBytes / kChunkBytes;
  const Origin from = origin_of(p, chunk / kChunksOfBlock);
  const int row = chunk / kChunksOfRow % kSlice;
  const int first = row_offset(row, chunk % kChunksOfRow) / kChunkBytes * kChunk<T>;
  const int column = from.column + (from.permutes_columns ? channel_of_column(row) : row);
  Chunk<T> values;
#pragma unroll
  for (int k = 0; k < kChunk<T>; ++k) {
    const int summed = first + k;
    const int channel = from.summed + (from.permutes_summed ? channel_of_column(summed) : summed);
    values.values[k] = from.conv.element(column, channel, from.tap, from.side);
  }
  return values.pack();
}

// Of two columns of all convolutions.
__device__ float4 packed_coefficients(const PackParameters& p, int column) {
  const int middle = p.shape.middle, wide = kExpansion * middle;
  const auto of = [](const UnpackedConvolution& conv, int channel) {
    return float4{load(conv.scale + channel), load(conv.scale + channel + 1),
                  load(conv.shift + channel), load(conv.shift + channel + 1)};
  };
  if (column < middle) return of(p.conv2, column);
  column -= middle;
  if (column < wide) return of(p.conv3, channel_of_column(column));
  return of(p.conv1, channel_of_column(column - wide));
}

// 16 bytes per thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_chain_kernel(const __grid_constant__ PackParameters p, uint4* packed) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunks = p.shape.blocks() * (kBlockBytes / kChunkBytes);
  if (i < chunks) {
    store(packed + i, packed_chunk<T>(p, i));
  } else if (i < chunks + p.shape.columns() / 2) {
    const float4 coefficients = packed_coefficients(p, 2 * (i - chunks));
    store(packed + i, __builtin_bit_cast(uint4, coefficients));
  }
}

UnpackedConvolution unpacked(const FoldedConvolution& conv) {
  UnpackedConvolution result{conv.weight.const_data_ptr(),
                             conv.weight.scalar_type(),
                             {},
                             static_cast<const float*>(conv.scale.const_data_ptr()),
                             static_cast<const float*>(conv.shift.const_data_ptr())};
  for (int64_t i = 0; i < 4; ++i) result.stride[i] = conv.weight.stride(i);
  return result;
}

}  // namespace

void check_folded(const char* op, const FoldedConvolution& conv, int64_t columns, int64_t summed,
                  int64_t side, const Tensor& x) {
  const auto name = [&](const char* what) { return conv.prefix + std::string(what) + conv.number; };
  const std::array<int64_t, 4> expected = {columns, summed, side, side};
  RESNET_FUSED_CHECK(conv.weight.device() == x.device(), op, ": ", name("weight"),
                     " must be on the device of x");
  RESNET_FUSED_CHECK(conv.weight.sizes().equals(expected), op, ": ", name("weight"),
                     " must have shape ", to_string(expected), ", got ",
                     to_string(conv.weight.sizes()));
  dispatch_floating(op, name("weight").c_str(), conv.weight.scalar_type(), [](auto) {});
  check_coefficients(op, name("scale").c_str(), conv.scale, columns, x);
  check_coefficients(op, name("shift").c_str(), conv.shift, columns, x);
}

Tensor pack_chain(const ChainShape& shape, const FoldedConvolution* conv1,
                  const FoldedConvolution& conv2, const FoldedConvolution& conv3, const Tensor& x) {
  constexpr int64_t kChunksOfBlock = kBlockBytes / kChunkBytes;
  const PackParameters p{shape, conv1 ? unpacked(*conv1) : UnpackedConvolution{}, unpacked(conv2),
                         unpacked(conv3)};
  const int64_t chunks = shape.blocks() * kChunksOfBlock + shape.columns() / 2;
  Tensor packed = allocate_vector(x, chunks * kChunkBytes / x.element_size(), dtype_code(x));
  const auto grid = static_cast<unsigned>(ceil_div(chunks, kThreads));
  uint4* to = static_cast<uint4*>(packed.mutable_data_ptr());
  if (x.scalar_type() == ScalarType::Half) {
    RESNET_FUSED_LAUNCH((pack_chain_kernel<ptx::Half>), grid, kThreads, 0, current_stream(x), p,
                        to);
  } else {
    RESNET_FUSED_LAUNCH((pack_chain_kernel<ptx::BFloat16>), grid, kThreads, 0, current_stream(x), p,
                        to);
  }
  return packed;
}

}  // namespace resnet_fused
