// Statistics and sums of the tiles of a convolution, combined over tiles.
#include "cuda/conv_partials.h"

#include <algorithm>
#include <cstdint>

#include "cuda/activation.h"
#include "cuda/moments.h"
#include "cuda/reduction.h"

namespace resnet_fused {
namespace {

constexpr int kLanes = 32;          // channels of a block
constexpr int kTilesOfThread = 32;  // from which on more blocks share a channel
constexpr int kMaxSplits = 64;

// Both kinds: two values of each tile and channel, and those of the blocks that share a channel.
struct Partials {
  const float *first, *second;  // (tiles, channels)
  int64_t tiles, channels;
  int64_t pixels, tile_pixels;
  float* of_blocks;    // (splits, values, channels)
  unsigned* finished;  // of each column of blocks
  float *first_result, *second_result;
};

struct Statistics : Moments<1> {
  __device__ void read(const Partials& p, int64_t tile, int64_t channel) {
    const int64_t left = p.pixels - tile * p.tile_pixels;
    count() = static_cast<float>(left < p.tile_pixels ? left : p.tile_pixels);
    mean(0) = load(p.first + tile * p.channels + channel);
    m2(0) = load(p.second + tile * p.channels + channel);
  }
  __device__ void write(const Partials& p, int64_t channel) {
    store(p.first_result + channel, mean(0));
    store(p.second_result + channel, m2(0));
  }
};

struct Sums {
  static constexpr int kValues = 2;
  float values[kValues] = {};

  __device__ void read(const Partials& p, int64_t tile, int64_t channel) {
    values[0] = load(p.first + tile * p.channels + channel);
    values[1] = load(p.second + tile * p.channels + channel);
  }
  __device__ void write(const Partials& p, int64_t channel) {
    store(p.first_result + channel, values[0]);
    store(p.second_result + channel, values[1]);
  }
  static __device__ void combine(float (&a)[kValues], const float (&b)[kValues]) {
    a[0] += b[0];
    a[1] += b[1];
  }
};

// Grid: columns of kLanes channels, splits of the tiles. The last block of a column finishes it.
template <class Kind>
__global__ void __launch_bounds__(kThreads)
    combine_partials_kernel(const __grid_constant__ Partials p) {
  RESNET_FUSED_SHARED(float, shared, reduction_size(Kind::kValues));
  RESNET_FUSED_SHARED(unsigned, flag, 1);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x;
  const bool exists = channel < p.channels;
  Kind total;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t tile = blockIdx.y * blockDim.y + threadIdx.y; tile < p.tiles && exists;
       tile += step) {
    Kind other;
    other.read(p, tile, channel);
    Kind::combine(total.values, other.values);
  }
  reduce_rows(total.values, shared, Kind::combine);
  if (gridDim.y > 1) {
    if (threadIdx.y == 0 && exists) {
#pragma unroll
      for (int v = 0; v < Kind::kValues; ++v) {
        store(p.of_blocks + (blockIdx.y * Kind::kValues + v) * p.channels + channel,
              total.values[v]);
      }
    }
    if (!is_last_of_column(p.finished + blockIdx.x, flag)) return;
    total = Kind();
    for (unsigned split = threadIdx.y; split < gridDim.y && exists; split += blockDim.y) {
      Kind other;
#pragma unroll
      for (int v = 0; v < Kind::kValues; ++v) {
        other.values[v] = load(p.of_blocks + (split * Kind::kValues + v) * p.channels + channel);
      }
      Kind::combine(total.values, other.values);
    }
    reduce_rows(total.values, shared, Kind::combine);
  }
  if (threadIdx.y == 0 && exists) total.write(p, channel);
}

template <class Kind>
std::pair<Tensor, Tensor> combine_partials(const Tensor& first, const Tensor& second,
                                           int64_t pixels, int64_t tile_pixels) {
  const int32_t float32 = aoti_torch_dtype_float32();
  const int64_t tiles = first.size(0), channels = first.size(1);
  std::pair<Tensor, Tensor> results{allocate_vector(first, channels, float32),
                                    allocate_vector(first, channels, float32)};
  const int64_t columns = ceil_div(channels, kLanes);
  constexpr int kRows = kThreads / kLanes;
  const int64_t splits =
      std::clamp(ceil_div(tiles, kRows * kTilesOfThread), int64_t{1}, int64_t{kMaxSplits});
  const cudaStream_t stream = current_stream(first);
  Tensor workspace =
      allocate_vector(first, splits > 1 ? columns + splits * Kind::kValues * channels : 0, float32);
  float* memory = static_cast<float*>(workspace.mutable_data_ptr());
  if (splits > 1) zero_async(memory, columns * sizeof(unsigned), stream);
  const Partials p{static_cast<const float*>(first.const_data_ptr()),
                   static_cast<const float*>(second.const_data_ptr()),
                   tiles,
                   channels,
                   pixels,
                   tile_pixels,
                   memory + (splits > 1 ? columns : 0),
                   reinterpret_cast<unsigned*>(memory),
                   static_cast<float*>(results.first.mutable_data_ptr()),
                   static_cast<float*>(results.second.mutable_data_ptr())};
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(splits));
  RESNET_FUSED_LAUNCH((combine_partials_kernel<Kind>), grid, dim3(kLanes, kRows), 0, stream, p);
  return results;
}

}  // namespace

std::pair<Tensor, Tensor> combine_statistics(const Tensor& means, const Tensor& m2s, int64_t pixels,
                                             int64_t tile_pixels) {
  return combine_partials<Statistics>(means, m2s, pixels, tile_pixels);
}

std::pair<Tensor, Tensor> sum_over_tiles(const Tensor& first, const Tensor& second) {
  return combine_partials<Sums>(first, second, 0, 0);
}

}  // namespace resnet_fused
