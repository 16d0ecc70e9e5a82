// The convolutions of a bottleneck in one kernel, what lies between them in registers:
//   y1 = relu(conv1x1(x) * scale1 + shift1)
//   y2 = relu(conv3x3(y1) * scale2 + shift2)
//   out = relu(conv1x1(y2) * scale3 + shift3 + residual)
//   next_y1 = relu(conv1x1(out) * next_scale1 + next_shift1), the next block's first convolution
// It begins with y1, or with x, which then is the residual, too.
//
// A batch is one row of pixels. A block walks over a part of it, some pixels a step; the y1 of
// these pixels and of the rows above and below lies in a ring in shared memory, so that a pixel is
// read once, but for the two rows that parts have in common. A tap of the 3x3 is the same pixels of
// the ring, moved; taps outside of the image read a row of zeros. Sums of one convolution are the
// operand of the next one in the same registers: only where pixels leave the kernel are a lane's
// channels neighbours, by the order of columns and summed channels in which the weights were packed
// (bottleneck_weights.h). All weights stream through shared memory in every step, from the
// second-level cache.
// Bytes per pixel, in 16 bits: y1 2M or none, residual and out 8M each, next_y1 2M or none.
#pragma once

#include <cstdint>

#include "cuda/bottleneck_weights.h"
#include "cuda/conv.cuh"

namespace resnet_fused {

// What a kernel computes of a block.
struct Tail {
  static constexpr bool kBeginsAtX = false, kComputesNext = false;
};
struct Roll {
  static constexpr bool kBeginsAtX = false, kComputesNext = true;
};
struct WholeBlock {
  static constexpr bool kBeginsAtX = true, kComputesNext = false;
};

// M channels of y1 and y2, in the dtype T of the tensors. kRowTiles tiles of 16 pixels for each
// warp; kStages blocks of weights in shared memory, all but one of them under way; registers leave
// room for kResidentBlocks.
template <class T_, class Part, int kMiddle_, int kWarps_, int kRowTiles_, int kResidentBlocks_>
struct Chain {
  using T = T_;
  static constexpr bool kBeginsAtX = Part::kBeginsAtX, kComputesNext = Part::kComputesNext;
  static constexpr int kMiddle = kMiddle_, kWide = kExpansion * kMiddle;
  static constexpr int kThreads = kWarps_ * kWarp, kResidentBlocks = kResidentBlocks_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarpPixels = 16 * kRowTiles, kPixels = kWarps_ * kWarpPixels;  // of a step
  static constexpr int kStages = 4;
  static constexpr ChainShape kShape{kMiddle, kBeginsAtX, kComputesNext};
  static constexpr int kSlices = kShape.slices();
  static constexpr int kBlocks = kShape.blocks(), kBlocksBefore = kShape.blocks_before();
  static constexpr int kColumnPairs = kShape.columns() / 2;
  static constexpr int kCoefficientBytes = kColumnPairs * static_cast<int>(sizeof(float4));

  // The pixels of a step and those around them that taps reach, in groups of 8.
  static constexpr int64_t ring_pixels(int64_t width) {
    return (kPixels + 2 * width + 2 + 7) / 8 * 8;
  }

  // Weights, coefficients and the ring: for each slice its pixels and one of zeros.
  static constexpr int64_t shared_bytes(int64_t ring_pixels) {
    return kStages * kBlockBytes + kCoefficientBytes + kSlices * (ring_pixels + 1) * kBlockRowBytes;
  }

  // A warp's sums of a slice of columns, and its operand of a summed slice.
  using Sum = float[kRowTiles][kSlice / 8][4];
  using Fragments = uint32_t[kSlice / 16][kRowTiles][4];
};

struct ChainParameters {
  const void *y1, *residual;  // y1 is null where it is computed from x, which is the residual
  const void* weights;        // packed
  void *out, *next_y1;
  int pixels, steps;
  Divider width, height;
  int ring_pixels;
};

// Of the coefficients of a column.
constexpr int kBytesOfColumn = sizeof(float4) / 2;

__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

// ---- Weights ----

// Block after block from global memory, and from the beginning again. conv1 comes some times before
// what follows it comes for the first time.
template <class Chain>
class WeightStream {
  static constexpr int kThreads = Chain::kThreads, kStages = Chain::kStages;
  static constexpr int kCopies = kBlockBytes / kChunkBytes / kThreads;
  static_assert(kBlockBytes % (kThreads * kChunkBytes) == 0);

 public:
  // The first blocks, and whatever this thread has copied before, are under way.
  __device__ __forceinline__ WeightStream(const void* weights, int first_passes)
      : weights_(static_cast<const uint8_t*>(weights) + threadIdx.x * kChunkBytes),
        shared_(ptx::dynamic_shared()),
        passes_(first_passes) {
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy_block(stage * kBlockBytes);
    // Where ldmatrix begins to read: rows of two tiles of columns, in both halves of a product.
    const int row = lane() % 8 + lane() / 16 * 8;
    first_ = shared_ + row * kBlockRowBytes + row_offset(row, lane() / 8 % 2);
  }

  // The next block, as the lane reads it. All threads have read the one before, in whose place a
  // later one is copied, and with it whatever this thread has copied since the last call.
  __device__ __forceinline__ SharedAddress next() {
    ptx::wait_for_copies<kStages - 2>();
    __syncthreads();
    copy_block(read_ == 0 ? kLastStage : read_ - kBlockBytes);
    const SharedAddress block = first_ + read_;
    read_ = read_ == kLastStage ? 0 : read_ + kBlockBytes;
    return block;
  }

 private:
  static constexpr uint32_t kLastStage = (kStages - 1) * kBlockBytes;

  __device__ __forceinline__ void copy_block(uint32_t stage) {
    const uint8_t* from = weights_ + ahead_ * kBlockBytes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = i * kThreads * kChunkBytes;
      ptx::copy_async(shared_ + stage + threadIdx.x * kChunkBytes + at, from + at, true);
    }
    ptx::commit_copies();
    ahead_ = ahead_ + 1 == Chain::kBlocks ? 0 : ahead_ + 1;
    if constexpr (Chain::kBeginsAtX) {
      if (ahead_ == Chain::kBlocksBefore && --passes_ > 0) ahead_ = 0;
    }
  }

  const uint8_t* weights_;
  const SharedAddress shared_;
  SharedAddress first_;
  int passes_;         // over conv1 that are left of the first ones
  int ahead_ = 0;      // the block that is copied next
  uint32_t read_ = 0;  // the stage that is used next
};

// sum += fragments * block.
template <class Chain>
__device__ __forceinline__ void multiply(typename Chain::Sum& sum,
                                         const typename Chain::Fragments& fragments,
                                         SharedAddress block) {
#pragma unroll
  for (int product = 0; product < kSlice / 16; ++product) {
    uint32_t columns[kSlice / 8][2];
#pragma unroll
    for (int j = 0; j < kSlice / 8; j += 2) {
      uint32_t pair[4];
      ptx::load_matrices(pair, (block ^ (product * kInstructionBytes)) + j * 8 * kBlockRowBytes);
      columns[j][0] = pair[0];
      columns[j][1] = pair[1];
      columns[j + 1][0] = pair[2];
      columns[j + 1][1] = pair[3];
    }
    ptx::multiply_add<typename Chain::T>(sum, fragments[product], columns);
  }
}

// ---- Sums and fragments ----

template <class Chain>
__device__ __forceinline__ void clear(typename Chain::Sum& sum) {
#pragma unroll
  for (int i = 0; i < Chain::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kSlice / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[i][j][k] = 0;
    }
  }
}

// sum * scale + shift, with the coefficients of the sum's first column.
template <class Chain>
__device__ __forceinline__ void scale_shift(typename Chain::Sum& sum, SharedAddress coefficients) {
  const SharedAddress own = coefficients + lane() % 4 * sizeof(float4);
#pragma unroll
  for (int j = 0; j < kSlice / 8; ++j) {
    const float4 c = ptx::load_shared<float4>(own + j * 4 * sizeof(float4));
#pragma unroll
    for (int i = 0; i < Chain::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& first = sum[i][j][2 * half];
        float& second = sum[i][j][2 * half + 1];
        first = fmaf(first, c.x, c.z);
        second = fmaf(second, c.y, c.w);
      }
    }
  }
}

// Calls visit(word, first, second) for each word of a warp's fragments, with the two sums that
// belong there: a tile of 16 x 8 sums lies like one half of a tile of an operand.
template <class Chain, class Visit>
__device__ __forceinline__ void for_each_word(typename Chain::Sum& sum,
                                              typename Chain::Fragments& fragments, Visit visit) {
#pragma unroll
  for (int product = 0; product < kSlice / 16; ++product) {
#pragma unroll
    for (int i = 0; i < Chain::kRowTiles; ++i) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float (&four)[4] = sum[i][2 * product + word / 2];
        visit(fragments[product][i][word], four[word % 2 * 2], four[word % 2 * 2 + 1]);
      }
    }
  }
}

template <class Chain>
__device__ __forceinline__ void relu(typename Chain::Sum& sum,
                                     typename Chain::Fragments& fragments) {
  for_each_word<Chain>(sum, fragments, [](uint32_t& word, float first, float second) {
    word = ptx::pack_relu<typename Chain::T>(first, second);
  });
}

// The fragments hold the residual before.
template <class Chain>
__device__ __forceinline__ void add_relu(typename Chain::Sum& sum,
                                         typename Chain::Fragments& fragments) {
  using T = typename Chain::T;
  for_each_word<Chain>(sum, fragments, [](uint32_t& word, float first, float second) {
    const float2 residual = ptx::unpack<T>(word);
    word = ptx::pack_relu<T>(first + residual.x, second + residual.y);
  });
}

// ---- Pixels in memory ----

// Where channels were brought together by channel_of_column, a lane has 16 bytes in each 32
// channels, of two pixels in each tile of rows.
constexpr int kGroupChunks = 32 / 8;

// Calls visit(i, half, group) for each 16 bytes of a lane's fragments.
template <class Chain, class Visit>
__device__ __forceinline__ void for_each_chunk(Visit visit) {
#pragma unroll
  for (int group = 0; group < kSlice / 32; ++group) {
#pragma unroll
    for (int i = 0; i < Chain::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) visit(i, half, group);
    }
  }
}

template <class Chain>
__device__ __forceinline__ uint4 get_chunk(const typename Chain::Fragments& fragments, int i,
                                           int half, int group) {
  return {fragments[2 * group][i][half], fragments[2 * group][i][2 + half],
          fragments[2 * group + 1][i][half], fragments[2 * group + 1][i][2 + half]};
}

template <class Chain>
__device__ __forceinline__ void set_chunk(typename Chain::Fragments& fragments, int i, int half,
                                          int group, const uint4& chunk) {
  fragments[2 * group][i][half] = chunk.x;
  fragments[2 * group][i][2 + half] = chunk.y;
  fragments[2 * group + 1][i][half] = chunk.z;
  fragments[2 * group + 1][i][2 + half] = chunk.w;
}

// Of a lane's 16 bytes, in as many pixels as a step has.
template <class Chain>
__device__ __forceinline__ int pixel_of_chunk(int i, int half) {
  return warp() * Chain::kWarpPixels + 16 * i + 8 * half + lane() / 4;
}

__device__ __forceinline__ bool exists(const ChainParameters& p, int pixel) {
  return static_cast<unsigned>(pixel) < static_cast<unsigned>(p.pixels);
}

// A lane's share of as many pixels as a step has, in a tensor of kChannels.
template <class Chain>
class LanePixels {
 public:
  __device__ __forceinline__ LanePixels(const ChainParameters& p, int first_pixel)
      : p_(p), first_(first_pixel) {}

  // Of a slice. Pixels that do not exist are zero.
  template <int kChannels>
  __device__ __forceinline__ void read(typename Chain::Fragments& fragments, const void* tensor,
                                       int first_channel) const {
    const uint4* from = static_cast<const uint4*>(tensor) + offset<kChannels>(first_channel);
    for_each_chunk<Chain>([&](int i, int half, int group) {
      uint4 chunk{0, 0, 0, 0};
      if (has(i, half)) chunk = load(from + step<kChannels>(i, half, group));
      set_chunk<Chain>(fragments, i, half, group, chunk);
    });
  }

  template <int kChannels>
  __device__ __forceinline__ void write(const typename Chain::Fragments& fragments, void* tensor,
                                        int first_channel) const {
    uint4* to = static_cast<uint4*>(tensor) + offset<kChannels>(first_channel);
    for_each_chunk<Chain>([&](int i, int half, int group) {
      const uint4 chunk = get_chunk<Chain>(fragments, i, half, group);
      if (has(i, half)) store(to + step<kChannels>(i, half, group), chunk);
    });
  }

 private:
  template <int kChannels>
  static constexpr int kChunksOfPixel = kChannels / kChunk<typename Chain::T>;

  __device__ __forceinline__ bool has(int i, int half) const {
    return exists(p_, first_ + pixel_of_chunk<Chain>(i, half));
  }

  // Of the lane's first 16 bytes, and from these to others.
  template <int kChannels>
  __device__ __forceinline__ int64_t offset(int first_channel) const {
    return static_cast<int64_t>(first_ + pixel_of_chunk<Chain>(0, 0)) * kChunksOfPixel<kChannels> +
           first_channel / kChunk<typename Chain::T> + lane() % kGroupChunks;
  }
  template <int kChannels>
  static __device__ __forceinline__ int step(int i, int half, int group) {
    return (16 * i + 8 * half) * kChunksOfPixel<kChannels> + group * kGroupChunks;
  }

  const ChainParameters& p_;
  const int first_;
};

// ---- y1 ----

// The y1 of the pixels of a step and around it, slice by slice: a row of 128 bytes for every pixel,
// and behind them a row of zeros.
template <class Chain>
class Ring {
  static constexpr int kChunksOfRow = kBlockRowBytes / kChunkBytes;
  static constexpr int kChunksOfPixel = Chain::kSlices * kChunksOfRow;
  static constexpr int kPixelsApart = Chain::kThreads / kChunksOfPixel;
  static_assert(Chain::kThreads % kChunksOfPixel == 0);

 public:
  __device__ __forceinline__ Ring(const ChainParameters& p, SharedAddress memory, int first_of_step)
      : p_(p),
        memory_(memory),
        slice_bytes_((p.ring_pixels + 1) * kBlockRowBytes),
        first_(first_of_step - p.width.divisor() - 1) {
    for (int i = threadIdx.x; i < kChunksOfPixel; i += Chain::kThreads) {
      ptx::store_shared(
          row(p.ring_pixels) + i / kChunksOfRow * slice_bytes_ + i % kChunksOfRow * kChunkBytes,
          uint4{0, 0, 0, 0});
    }
  }

  // Goes on to the next step. Its last pixels, as many as a step has, take the place of what only
  // this step needed.
  __device__ __forceinline__ void advance() {
    first_ += Chain::kPixels;
    start_ = wrap(start_ + Chain::kPixels);
  }

  // Positions begin with the first pixel that a step needs. From here on they are not in the ring
  // after advance().
  __device__ __forceinline__ int new_position() const { return 2 * p_.width.divisor() + 2; }
  __device__ __forceinline__ int pixel(int position) const { return first_ + position; }

  // Starts copies of all pixels from this position on.
  __device__ __forceinline__ void copy(int position) const {
    const int chunk = threadIdx.x % kChunksOfPixel;
    const SharedAddress slice = chunk / kChunksOfRow * slice_bytes_;
    const auto* y1 =
        static_cast<const uint4*>(p_.y1) + static_cast<int64_t>(first_) * kChunksOfPixel + chunk;
    const int end = new_position() + Chain::kPixels;
    for (int i = position + threadIdx.x / kChunksOfPixel; i < end; i += kPixelsApart) {
      if (!exists(p_, pixel(i))) continue;
      const int slot = wrap(start_ + i);
      ptx::copy_async(row(slot) + slice + row_offset(slot, chunk % kChunksOfRow),
                      y1 + i * kChunksOfPixel, true);
    }
  }

  // Stores a slice of as many pixels as a step has. They may begin before the first position.
  __device__ __forceinline__ void put(const typename Chain::Fragments& y1, int slice,
                                      int position) const {
    for_each_chunk<Chain>([&](int i, int half, int group) {
      const int own = position + pixel_of_chunk<Chain>(i, half);
      if (own < 0 || !exists(p_, pixel(own))) return;
      const int slot = wrap(start_ + own);
      ptx::store_shared(row(slot) + slice * slice_bytes_ +
                            row_offset(slot, group * kGroupChunks + lane() % kGroupChunks),
                        get_chunk<Chain>(y1, i, half, group));
    });
  }

  // Where a lane finds the pixels of one step, for ldmatrix.
  class Rows {
   public:
    __device__ __forceinline__ Rows(const Ring& ring) : ring_(ring) {
      const int width = ring.p_.width.divisor(), height = ring.p_.height.divisor();
#pragma unroll
      for (int i = 0; i < Chain::kRowTiles; ++i) {
        const int in_step = warp() * Chain::kWarpPixels + 16 * i + lane() % 16;
        const int pixel = ring.first_ + width + 1 + in_step;
        const int row = ring.p_.width.divide(pixel);
        const int x = pixel - row * width;
        const int y = row - ring.p_.height.divide(row) * height;
        slot_[i] = ring.wrap(ring.start_ + in_step);
        missing_[i] = (y == 0 ? kFirstRow : 0) | (y == height - 1 ? kFirstRow << 6 : 0) |
                      (x == 0 ? kFirstColumn : 0) | (x == width - 1 ? kFirstColumn << 2 : 0) |
                      (pixel < ring.p_.pixels ? 0 : ~0u);
      }
    }

    __device__ __forceinline__ void move_to(int tap) {
      const int tap_row = tap / 3;
      const int moved = tap_row * ring_.p_.width.divisor() + tap - 3 * tap_row;
#pragma unroll
      for (int i = 0; i < Chain::kRowTiles; ++i) {
        // Zeros have the permutation of what they stand for: 8 neighbouring pixels never meet in
        // the same banks.
        const int slot = ring_.wrap(slot_[i] + moved);
        const bool is_missing = missing_[i] >> tap & 1;
        row_[i] =
            ring_.row(is_missing ? ring_.p_.ring_pixels : slot) + row_offset(slot, lane() / 16);
      }
    }

    __device__ __forceinline__ void read(typename Chain::Fragments& fragments, int slice) const {
#pragma unroll
      for (int product = 0; product < kSlice / 16; ++product) {
#pragma unroll
        for (int i = 0; i < Chain::kRowTiles; ++i) {
          ptx::load_matrices(fragments[product][i], (row_[i] ^ (product * kInstructionBytes)) +
                                                        slice * ring_.slice_bytes_);
        }
      }
    }

   private:
    // Of the taps of a 3x3, from the first row to the last one.
    static constexpr uint32_t kFirstRow = 0b000'000'111, kFirstColumn = 0b001'001'001;

    const Ring& ring_;
    int slot_[Chain::kRowTiles];          // of the first tap
    uint32_t missing_[Chain::kRowTiles];  // taps
    SharedAddress row_[Chain::kRowTiles];
  };

 private:
  __device__ __forceinline__ int wrap(int slot) const {
    return slot >= p_.ring_pixels ? slot - p_.ring_pixels : slot;
  }
  __device__ __forceinline__ SharedAddress row(int slot) const {
    return memory_ + slot * kBlockRowBytes;
  }

  const ChainParameters& p_;
  const SharedAddress memory_;
  const uint32_t slice_bytes_;
  int first_;      // pixel, which may lie before all images
  int start_ = 0;  // its slot
};

// ---- The kernel ----

// Brings what the step will read of a tensor to the second-level cache.
template <class Chain>
__device__ __forceinline__ void prefetch_step(const ChainParameters& p, const void* tensor,
                                              int first_pixel) {
  constexpr int kLineBytes = 128;
  constexpr int kPixelBytes = Chain::kWide * sizeof(typename Chain::T);
  constexpr int kBytesApart = Chain::kThreads * kLineBytes;
  const auto* from =
      static_cast<const uint8_t*>(tensor) + static_cast<int64_t>(first_pixel) * kPixelBytes;
  const int left = p.pixels - first_pixel;
#pragma unroll
  for (int i = 0; i < Chain::kPixels * kPixelBytes / kBytesApart; ++i) {
    const int at = i * kBytesApart + threadIdx.x * kLineBytes;
    if (at / kPixelBytes < left) ptx::prefetch(from + at);
  }
}

// Where they begin in shared memory, and where they end.
struct Coefficients {
  SharedAddress conv2, conv3, conv1, end;
};

template <class Chain>
__device__ __forceinline__ Coefficients coefficients_at(SharedAddress memory) {
  const SharedAddress conv3 = memory + Chain::kMiddle * kBytesOfColumn;
  const SharedAddress conv1 = conv3 + Chain::kWide * kBytesOfColumn;
  return {memory, conv3, conv1, memory + Chain::kCoefficientBytes};
}

template <class Chain>
__device__ __forceinline__ void copy_coefficients(const ChainParameters& p, SharedAddress to) {
  const auto* from =
      static_cast<const uint4*>(p.weights) + Chain::kBlocks * (kBlockBytes / kChunkBytes);
  for (int i = threadIdx.x; i < Chain::kColumnPairs; i += Chain::kThreads) {
    ptx::store_shared(to + i * kChunkBytes, load(from + i));
  }
}

// Computes y1 of the last pixels that a step needs, `passes` times as many as it has.
template <class Chain>
__device__ __forceinline__ void compute_y1(const ChainParameters& p, const Ring<Chain>& ring,
                                           WeightStream<Chain>& weights, SharedAddress coefficients,
                                           int passes) {
  constexpr int kSlices = Chain::kSlices, kSummedSlices = kExpansion * kSlices;
  int position = ring.new_position() - (passes - 1) * Chain::kPixels;
#pragma unroll 1
  for (; passes > 0; --passes, position += Chain::kPixels) {
    const LanePixels<Chain> pixels(p, ring.pixel(position));
    typename Chain::Sum sum[kSlices];
#pragma unroll
    for (int n = 0; n < kSlices; ++n) clear<Chain>(sum[n]);
    typename Chain::Fragments x[2];
    pixels.template read<Chain::kWide>(x[0], p.residual, 0);
#pragma unroll
    for (int k = 0; k < kSummedSlices; ++k) {
      if (k + 1 < kSummedSlices) {
        pixels.template read<Chain::kWide>(x[(k + 1) % 2], p.residual, (k + 1) * kSlice);
      }
#pragma unroll
      for (int n = 0; n < kSlices; ++n) multiply<Chain>(sum[n], x[k % 2], weights.next());
    }
#pragma unroll
    for (int n = 0; n < kSlices; ++n) {
      scale_shift<Chain>(sum[n], coefficients + n * kSlice * kBytesOfColumn);
      typename Chain::Fragments y1;
      relu<Chain>(sum[n], y1);
      ring.put(y1, n, position);
    }
  }
}

template <class Chain>
__device__ __forceinline__ void compute_y2(const Ring<Chain>& ring, WeightStream<Chain>& weights,
                                           SharedAddress coefficients,
                                           typename Chain::Fragments (&y2)[Chain::kSlices]) {
  constexpr int kSlices = Chain::kSlices;
  typename Chain::Sum sum[kSlices];
#pragma unroll
  for (int n = 0; n < kSlices; ++n) clear<Chain>(sum[n]);
  typename Ring<Chain>::Rows rows(ring);
#pragma unroll 1
  for (int tap = 0; tap < kTaps; ++tap) {
    rows.move_to(tap);
#pragma unroll 1
    for (int k = 0; k < kSlices; ++k) {
      typename Chain::Fragments y1;
#pragma unroll
      for (int n = 0; n < kSlices; ++n) {
        const SharedAddress block = weights.next();
        // Behind the barrier, at the first tap: then y1 is there.
        if (n == 0) rows.read(y1, k);
        multiply<Chain>(sum[n], y1, block);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kSlices; ++n) {
    scale_shift<Chain>(sum[n], coefficients + n * kSlice * kBytesOfColumn);
    relu<Chain>(sum[n], y2[n]);
  }
}

// And next_y1.
template <class Chain>
__device__ __forceinline__ void compute_out(const ChainParameters& p,
                                            const LanePixels<Chain>& pixels,
                                            WeightStream<Chain>& weights,
                                            const Coefficients& coefficients,
                                            const typename Chain::Fragments (&y2)[Chain::kSlices]) {
  constexpr int kSlices = Chain::kSlices;
  typename Chain::Sum next[Chain::kComputesNext ? kSlices : 1];
#pragma unroll
  for (auto& sum : next) clear<Chain>(sum);
#pragma unroll 1
  for (int channel = 0; channel < Chain::kWide; channel += kSlice) {
    typename Chain::Fragments out;
    pixels.template read<Chain::kWide>(out, p.residual, channel);
    typename Chain::Sum sum;
    clear<Chain>(sum);
#pragma unroll
    for (int k = 0; k < kSlices; ++k) multiply<Chain>(sum, y2[k], weights.next());
    scale_shift<Chain>(sum, coefficients.conv3 + channel * kBytesOfColumn);
    add_relu<Chain>(sum, out);
    pixels.template write<Chain::kWide>(out, p.out, channel);
    if constexpr (Chain::kComputesNext) {
#pragma unroll
      for (int n = 0; n < kSlices; ++n) multiply<Chain>(next[n], out, weights.next());
    }
  }
  if constexpr (Chain::kComputesNext) {
#pragma unroll
    for (int n = 0; n < kSlices; ++n) {
      scale_shift<Chain>(next[n], coefficients.conv1 + n * kSlice * kBytesOfColumn);
      typename Chain::Fragments next_y1;
      relu<Chain>(next[n], next_y1);
      pixels.template write<Chain::kMiddle>(next_y1, p.next_y1, n * kSlice);
    }
  }
}

// Grid: as many parts of the steps.
template <class Chain>
__global__ void __launch_bounds__(Chain::kThreads, Chain::kResidentBlocks)
    bottleneck_kernel(const __grid_constant__ ChainParameters p) {
  const Coefficients coefficients =
      coefficients_at<Chain>(ptx::dynamic_shared() + Chain::kStages * kBlockBytes);
  copy_coefficients<Chain>(p, coefficients.conv2);
  int step = static_cast<int>(static_cast<int64_t>(p.steps) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(p.steps) * (blockIdx.x + 1) / gridDim.x);
  Ring<Chain> ring(p, coefficients.end, step * Chain::kPixels);
  if constexpr (!Chain::kBeginsAtX) ring.copy(0);
  // The first step computes all y1 that it needs, later ones what is new.
  int passes = 1 + (ring.new_position() + Chain::kPixels - 1) / Chain::kPixels;
  WeightStream<Chain> weights(p.weights, passes);
#pragma unroll 1
  for (; step < end; ++step) {
    if constexpr (Chain::kBeginsAtX) {
      compute_y1<Chain>(p, ring, weights, coefficients.conv1, passes);
      passes = 1;
      // Of the next step's y1. The residual was read for that of an earlier one.
      prefetch_step<Chain>(p, p.residual, ring.pixel(ring.new_position() + Chain::kPixels));
    } else {
      prefetch_step<Chain>(p, p.residual, step * Chain::kPixels);
    }
    typename Chain::Fragments y2[Chain::kSlices];
    compute_y2<Chain>(ring, weights, coefficients.conv2, y2);
    ring.advance();
    if constexpr (!Chain::kBeginsAtX) {
      // All have read the ring.
      __syncthreads();
      if (step + 1 < end) ring.copy(ring.new_position());
      static_assert(Chain::kShape.blocks_behind() >= Chain::kStages - 1,
                    "y1 lands before the next step");
    }
    const LanePixels<Chain> pixels(p, step * Chain::kPixels);
    compute_out<Chain>(p, pixels, weights, coefficients, y2);
  }
  ptx::wait_for_copies<0>();
}

}  // namespace resnet_fused
