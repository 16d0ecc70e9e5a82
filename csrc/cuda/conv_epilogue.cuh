// What happens to a tile of a convolution between the tensor cores and memory.
#pragma once

#include <cstdint>

#include "cuda/activation.h"
#include "cuda/channels.h"
#include "cuda/conv.cuh"

namespace resnet_fused {

// A tile of the result, as its accumulators lie in the registers of a block, and as it goes through
// shared memory so that global memory is read and written in rows.
template <class Tile>
class ResultTile {
  using T = typename Tile::T;
  static constexpr int kPitch = Tile::kN * sizeof(T);
  static constexpr int kChunks = kPitch / kChunkBytes;  // of a row
  static constexpr int kRowsApart = Tile::kThreads / kChunks;
  static constexpr int kCopies = Tile::kM / kRowsApart;
  static_assert(Tile::kM % kRowsApart == 0);

 public:
  static constexpr int kBytes = Tile::kM * kPitch;

  __device__ __forceinline__ ResultTile(const ConvParameters& p, const Phase& phase,
                                        const Place& place)
      : p_(p), phase_(phase), place_(place), shared_(ptx::dynamic_shared()) {
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    row_ = warp / Tile::kWarpsN * Tile::kWarpM + lane / 4;
    column_ = warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
  }

  // Of sum[i][j][2 * half] and the next element, in the tile.
  __device__ __forceinline__ int row(int i, int half) const { return row_ + 16 * i + 8 * half; }
  __device__ __forceinline__ int column(int j) const { return column_ + 8 * j; }

  __device__ __forceinline__ bool has_row(int row) const {
    return place_.first_row + row < phase_.pixels;
  }
  __device__ __forceinline__ int rows() const {
    const int left = phase_.pixels - place_.first_row;
    return left < Tile::kM ? left : Tile::kM;
  }
  __device__ __forceinline__ bool has_column(int column) const {
    return place_.first_column + column < p_.columns;
  }
  // Of all groups.
  __device__ __forceinline__ int channel(int column) const {
    return place_.group * p_.columns + place_.first_column + column;
  }
  __device__ __forceinline__ int channels() const { return p_.groups * p_.columns; }

  // Of one value for each channel.
  __device__ __forceinline__ float2 of_channels(const float* values, int j) const {
    const int first = column(j);
    return {has_column(first) ? load(values + channel(first)) : 0.0f,
            has_column(first + 1) ? load(values + channel(first + 1)) : 0.0f};
  }

  // In the result, of the tile's row.
  __device__ __forceinline__ int pixel(int row) const {
    const int pixel = place_.first_row + row;
    if (phase_.is_dense) return pixel;
    const int image = phase_.image_pixels.divide(pixel);
    const int in_image = pixel - image * phase_.image_pixels.divisor();
    const int y = phase_.row_pixels.divide(in_image);
    const int x = in_image - y * phase_.row_pixels.divisor();
    return phase_.result_first + image * phase_.result_image + y * phase_.result_row +
           x * phase_.result_pixel;
  }

  // Brings the tile of a tensor like the result to shared memory. All threads call it.
  __device__ __forceinline__ void read(const void* tensor) const {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copied_row(i);
      const T* from = static_cast<const T*>(tensor) + copied_element(row);
      if (p_.has_vectors) {
        ptx::copy_async(staged(row, copied_chunk()), from, copies(row));
      } else {
        Vector<T, kChunk<T>> elements{};
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) {
          if (has_row(row) && has_column(copied_column() + k)) elements.values[k] = load(from + k);
        }
        ptx::store_shared(staged(row, copied_chunk()), __builtin_bit_cast(uint4, elements));
      }
    }
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncthreads();
  }

  // The thread's own pair of elements of what was read.
  __device__ __forceinline__ float2 get(int i, int half, int j) const {
    const SharedAddress at = pair(i, half, j);
    if constexpr (sizeof(T) == 4)
      return ptx::load_shared<float2>(at);
    else
      return ptx::unpack<T>(ptx::load_shared<uint32_t>(at));
  }

  // Writes the tile. All threads call it.
  __device__ __forceinline__ void write(const typename Tile::Sum& sum, void* tensor) const {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float first = sum[i][j][2 * half], second = sum[i][j][2 * half + 1];
          if constexpr (sizeof(T) == 4) {
            ptx::store_shared(pair(i, half, j), float2{first, second});
          } else {
            ptx::store_shared(pair(i, half, j), ptx::pack<T>(first, second));
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copied_row(i);
      if (!copies(row)) continue;
      T* to = static_cast<T*>(tensor) + copied_element(row);
      const uint4 chunk = ptx::load_shared<uint4>(staged(row, copied_chunk()));
      if (p_.has_vectors) {
        store(reinterpret_cast<uint4*>(to), chunk);
      } else {
        const auto elements = __builtin_bit_cast(Vector<T, kChunk<T>>, chunk);
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k) {
          if (has_column(copied_column() + k)) store(to + k, elements.values[k]);
        }
      }
    }
  }

 private:
  // Chunks are permuted for the accesses of a warp to pairs.
  __device__ __forceinline__ SharedAddress staged(int row, int chunk) const {
    const int permutation = sizeof(T) == 4 ? (row & 3) << 1 : row & 7;
    return shared_ + row * kPitch + (chunk ^ permutation) * kChunkBytes;
  }

  __device__ __forceinline__ SharedAddress pair(int i, int half, int j) const {
    const int at = column(j);
    return staged(row(i, half), at / kChunk<T>) + at % kChunk<T> * sizeof(T);
  }

  __device__ __forceinline__ int copied_chunk() const { return threadIdx.x % kChunks; }
  __device__ __forceinline__ int copied_column() const { return copied_chunk() * kChunk<T>; }
  __device__ __forceinline__ int copied_row(int i) const {
    return threadIdx.x / kChunks + i * kRowsApart;
  }
  __device__ __forceinline__ int64_t copied_element(int row) const {
    return static_cast<int64_t>(pixel(row)) * channels() + channel(copied_column());
  }
  __device__ __forceinline__ bool copies(int row) const {
    return has_row(row) && has_column(copied_column());
  }

  const ConvParameters& p_;
  const Phase& phase_;
  const Place& place_;
  const SharedAddress shared_;
  int row_, column_;  // of the thread's first accumulator
};

// ---- Sums over the rows of a tile ----

// Sums over the 8 lanes that have the same columns: each is left with an eighth of the sums, which
// starts where the result says.
template <int kHalf, int kLane, int kCount>
__device__ __forceinline__ int reduce_scatter(float (&values)[kCount]) {
  if constexpr (kLane < 4) {
    return 0;
  } else {
    const bool upper = (threadIdx.x & kLane) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? values[i] : values[i + kHalf];
      const float kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(~0u, sent, kLane);
    }
    return (upper ? kHalf : 0) + reduce_scatter<kHalf / 2, kLane / 2>(values);
  }
}

// kSums sums for each column of a tile, in shared memory behind the tile itself.
template <class Tile, int kSums>
class ColumnSums {
 public:
  static constexpr int kBytes = kSums * Tile::kWarpsM * Tile::kN * sizeof(float);

  // values: of the thread's columns, over its rows.
  static __device__ __forceinline__ void put(float (&values)[2 * Tile::kFragmentsN], int sum) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first = reduce_scatter<Tile::kFragmentsN, 16>(values);
    const int column = warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN / 4; ++i) {
      const int value = first + i;
      ptx::store_shared(at(sum, warp / Tile::kWarpsN, column + value / 2 * 8 + value % 2),
                        values[i]);
    }
  }

  // Behind a barrier.
  static __device__ __forceinline__ float get(int sum, int column) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarpsM; ++warp) {
      total += ptx::load_shared<float>(at(sum, warp, column));
    }
    return total;
  }

 private:
  static __device__ __forceinline__ SharedAddress at(int sum, int warp, int column) {
    return ptx::dynamic_shared() + ResultTile<Tile>::kBytes +
           ((sum * Tile::kWarpsM + warp) * Tile::kN + column) * sizeof(float);
  }
};

// ---- Epilogues ----

// skip(): the next launch leaves its results so many values behind those of this one.

// relu(sum * scale + shift + residual).
struct ScaleShiftResidualRelu {
  static constexpr int kSums = 0;
  struct Parameters {
    const float *scale, *shift;  // (K,)
    const void* residual;        // like the result, or null
    bool relu;
  };
  static void skip(Parameters&, int64_t) {}

  template <class Tile>
  static __device__ __forceinline__ void apply(typename Tile::Sum& sum,
                                               const ResultTile<Tile>& tile, const Parameters& p,
                                               int) {
    if (p.residual != nullptr) tile.read(p.residual);
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const float2 scale = tile.of_channels(p.scale, j), shift = tile.of_channels(p.shift, j);
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 residual{0, 0};
          if (p.residual != nullptr) residual = tile.get(i, half, j);
          float& first = sum[i][j][2 * half];
          float& second = sum[i][j][2 * half + 1];
          first = fmaf(first, scale.x, shift.x) + residual.x;
          second = fmaf(second, scale.y, shift.y) + residual.y;
          // NaN is not less.
          if (p.relu && first < 0) first = 0;
          if (p.relu && second < 0) second = 0;
        }
      }
    }
  }
};

// Mean and sum of squared deviations (M2) of every column of a tile.
struct ChannelStats {
  static constexpr int kSums = 2;
  struct Parameters {
    float *means, *m2s;  // (tiles, K)
  };
  static void skip(Parameters& p, int64_t values) {
    p.means += values;
    p.m2s += values;
  }

  template <class Tile>
  static __device__ __forceinline__ void apply(typename Tile::Sum& sum,
                                               const ResultTile<Tile>& tile, const Parameters& p,
                                               int partial) {
    using Sums = ColumnSums<Tile, kSums>;
    float values[2 * Tile::kFragmentsN];
#pragma unroll
    for (int k = 0; k < 2 * Tile::kFragmentsN; ++k) {
      values[k] = 0;
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (tile.has_row(tile.row(i, half))) values[k] += sum[i][k / 2][2 * half + k % 2];
        }
      }
    }
    Sums::put(values, 0);
    __syncthreads();
    const float inverse = 1.0f / static_cast<float>(tile.rows());
#pragma unroll
    for (int k = 0; k < 2 * Tile::kFragmentsN; ++k) {
      const float mean = Sums::get(0, tile.column(k / 2) + k % 2) * inverse;
      values[k] = 0;
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float difference = sum[i][k / 2][2 * half + k % 2] - mean;
          if (tile.has_row(tile.row(i, half))) values[k] = fmaf(difference, difference, values[k]);
        }
      }
    }
    Sums::put(values, 1);
    __syncthreads();
    const int column = threadIdx.x;
    if (column < Tile::kN && tile.has_column(column)) {
      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + tile.channel(column);
      store(p.means + at, Sums::get(0, column) * inverse);
      store(p.m2s + at, Sums::get(1, column));
    }
  }
};

// The gradient, plus that of the shortcut, where the ReLU of the layer before has passed, and its
// sums over rows: of the gradient and of the gradient times (x - mean).
struct ReluMaskBnBackward {
  static constexpr int kSums = 2;
  struct Parameters {
    // Like the result, or null.
    const void *residual, *x;
    // (C,), or null: the ReLU has passed where not x * scale + shift <= 0.
    const float *scale, *shift;
    // Or it has passed where a bit is set: (pixels, mask_pitch) bytes, or null.
    const uint8_t* mask;
    int mask_pitch;
    const float* mean;        // (C,), or null: no sums
    float *sums, *sums_of_x;  // (tiles, C)
  };
  static void skip(Parameters& p, int64_t values) {
    p.sums += values;
    p.sums_of_x += values;
  }

  template <class Tile>
  static __device__ __forceinline__ void apply(typename Tile::Sum& sum,
                                               const ResultTile<Tile>& tile, const Parameters& p,
                                               int partial) {
    if (p.residual != nullptr) {
      tile.read(p.residual);
      for_each(tile, [&](int i, int half, int j) {
        const float2 residual = tile.get(i, half, j);
        sum[i][j][2 * half] += residual.x;
        sum[i][j][2 * half + 1] += residual.y;
      });
    }
    if (p.mask != nullptr) apply_mask(sum, tile, p);
    if (p.x == nullptr) return;
    tile.read(p.x);
    if (p.scale != nullptr) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        const float2 scale = tile.of_channels(p.scale, j), shift = tile.of_channels(p.shift, j);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 x = tile.get(i, half, j);
            // NaN passes.
            if (fmaf(x.x, scale.x, shift.x) <= 0) sum[i][j][2 * half] = 0;
            if (fmaf(x.y, scale.y, shift.y) <= 0) sum[i][j][2 * half + 1] = 0;
          }
        }
      }
    }
    if (p.mean != nullptr) reduce(sum, tile, p, partial);
  }

 private:
  template <class Tile, class Body>
  static __device__ __forceinline__ void for_each(const ResultTile<Tile>&, Body body) {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) body(i, half, j);
      }
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void apply_mask(typename Tile::Sum& sum,
                                                    const ResultTile<Tile>& tile,
                                                    const Parameters& p) {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile.row(i, half);
        if (!tile.has_row(row)) continue;
        const uint8_t* bytes = p.mask + static_cast<int64_t>(tile.pixel(row)) * p.mask_pitch;
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) {
          if (!tile.has_column(tile.column(j))) continue;
          // The first channel is even: both are in one byte.
          const int channel = tile.channel(tile.column(j));
          const unsigned bits = load(bytes + channel / kMaskBits) >> channel % kMaskBits;
          if ((bits & 1) == 0) sum[i][j][2 * half] = 0;
          if ((bits & 2) == 0) sum[i][j][2 * half + 1] = 0;
        }
      }
    }
  }

  template <class Tile>
  static __device__ __forceinline__ void reduce(const typename Tile::Sum& sum,
                                                const ResultTile<Tile>& tile, const Parameters& p,
                                                int partial) {
    using Sums = ColumnSums<Tile, kSums>;
    float sums[2 * Tile::kFragmentsN], sums_of_x[2 * Tile::kFragmentsN];
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const float2 mean = tile.of_channels(p.mean, j);
      float2 total{0, 0}, total_of_x{0, 0};
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!tile.has_row(tile.row(i, half))) continue;
          const float2 x = tile.get(i, half, j);
          const float first = sum[i][j][2 * half], second = sum[i][j][2 * half + 1];
          total.x += first;
          total.y += second;
          total_of_x.x = fmaf(first, x.x - mean.x, total_of_x.x);
          total_of_x.y = fmaf(second, x.y - mean.y, total_of_x.y);
        }
      }
      sums[2 * j] = total.x;
      sums[2 * j + 1] = total.y;
      sums_of_x[2 * j] = total_of_x.x;
      sums_of_x[2 * j + 1] = total_of_x.y;
    }
    Sums::put(sums, 0);
    Sums::put(sums_of_x, 1);
    __syncthreads();
    const int column = threadIdx.x;
    if (column < Tile::kN && tile.has_column(column)) {
      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + tile.channel(column);
      store(p.sums + at, Sums::get(0, column));
      store(p.sums_of_x + at, Sums::get(1, column));
    }
  }
};

}  // namespace resnet_fused
