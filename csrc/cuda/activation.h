// Activations (N, C, H, W) in either memory format, as the blocks of a kernel walk over them.
//
// A thread sees the same channels all the time, so that what is per channel stays in registers:
// kWidth neighbouring channels in channels_last, where one access reads as many, and one channel in
// NCHW. Below, a row is what lies between two steps of a thread: a pixel in channels_last, kWidth
// neighbouring pixels of a plane in NCHW. threadIdx.x and blockIdx.x choose the channels,
// threadIdx.y and blockIdx.y the rows; the rows of one step of a block are a tile.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "common/allocate.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "cuda/platform.h"

namespace resnet_fused {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

template <int kWidth, class T>
__device__ inline const Vector<T, kWidth>* vector_at(const T* p, int64_t element) {
  return reinterpret_cast<const Vector<T, kWidth>*>(p + element);
}

template <int kWidth, class T>
__device__ inline Vector<T, kWidth>* vector_at(T* p, int64_t element) {
  return reinterpret_cast<Vector<T, kWidth>*>(p + element);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Extent {
  int64_t images, channels, plane;  // plane = H * W
  int64_t rows;                     // channels_last: pixels; NCHW: rows of one channel
  int64_t plane_rows;               // NCHW: rows of one plane
  int64_t tiles;                    // that the rows of one channel make
};

// How one kernel is spread over the device.
struct Spread {
  int max_lanes;        // of threadIdx.x: channel groups side by side in a block
  int unroll;           // rows of a thread in a tile: loads in flight of each tensor
  int resident_blocks;  // per multiprocessor, for which registers must suffice
  int waves;            // of resident blocks in the grid, if there are rows enough
  int min_tiles;        // of a block, if there are blocks enough
};

// Elements that share a byte of the mask lie in one run: the channels of a pixel, or a plane in
// NCHW. Every run begins with a new byte.
constexpr int kMaskBits = 8;

// Memory formats. kWidth elements go in one access; kChannels is how many channels a thread sees.
template <int kWidth_>
struct ChannelsLast {
  static constexpr int kWidth = kWidth_;
  static constexpr int kChannels = kWidth_;

  static __device__ int64_t first_channel() {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  }
};

template <int kWidth_>
struct Nchw {
  static constexpr int kWidth = kWidth_;
  static constexpr int kChannels = 1;

  static __device__ int64_t first_channel() { return blockIdx.x; }
};

// The rows of one thread, kUnroll of them in each of its block's tiles. Backwards, the walk begins
// with the last rows: what an earlier pass has read last is still in the second-level cache.
template <class Layout, int kUnroll, bool kBackwards>
class Walk;

template <int kWidth, int kUnroll, bool kBackwards>
class Walk<ChannelsLast<kWidth>, kUnroll, kBackwards> {
 public:
  __device__ explicit Walk(const Extent& extent)
      : extent_(extent),
        channel_(ChannelsLast<kWidth>::first_channel()),
        tile_(blockIdx.y),
        row_(tile_ * kUnroll * blockDim.y + threadIdx.y) {}

  // The same for all threads of a block, as are the calls of next().
  __device__ bool inside() const { return tile_ < extent_.tiles; }

  __device__ void next() {
    tile_ += gridDim.y;
    row_ += static_cast<int64_t>(gridDim.y) * kUnroll * blockDim.y;
  }

  __device__ bool valid(int u) const {
    return row_ + u * static_cast<int64_t>(blockDim.y) < extent_.rows &&
           channel_ < extent_.channels;
  }

  // Offset of the vector's first element.
  __device__ int64_t element(int u) const { return row(u) * extent_.channels + channel_; }

  __device__ int64_t mask_byte(int u) const {
    return row(u) * ceil_div(extent_.channels, kMaskBits) + channel_ / kMaskBits;
  }

  __device__ int mask_shift(int) const { return static_cast<int>(channel_ % kMaskBits); }

 private:
  __device__ int64_t row(int u) const {
    const int64_t row = row_ + u * static_cast<int64_t>(blockDim.y);
    return kBackwards ? extent_.rows - 1 - row : row;
  }

  const Extent& extent_;
  const int64_t channel_;
  int64_t tile_, row_;
};

template <int kWidth, int kUnroll, bool kBackwards>
class Walk<Nchw<kWidth>, kUnroll, kBackwards> {
 public:
  __device__ explicit Walk(const Extent& extent)
      : extent_(extent), channel_(Nchw<kWidth>::first_channel()), tile_(blockIdx.y) {
    // The grid is small enough for 32 bits, and so is every quotient and remainder below.
    const unsigned first = blockIdx.y * kUnroll * blockDim.y + threadIdx.y;
    const unsigned tiles_apart = gridDim.y * kUnroll * blockDim.y;
    constexpr int64_t kLargest = ~0u;
    const unsigned plane_rows = extent.plane_rows < kLargest ? extent.plane_rows : kLargest;
    image_[0] = first / plane_rows;
    row_[0] = first % plane_rows;
#pragma unroll
    for (int u = 1; u < kUnroll; ++u) {
      image_[u] = image_[u - 1];
      row_[u] = row_[u - 1];
      step(u, blockDim.y / plane_rows, blockDim.y % plane_rows);
    }
    step_images_ = tiles_apart / plane_rows;
    step_rows_ = tiles_apart % plane_rows;
  }

  __device__ bool inside() const { return tile_ < extent_.tiles; }

  __device__ void next() {
    tile_ += gridDim.y;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) step(u, step_images_, step_rows_);
  }

  // Planes are padded to whole bytes of the mask.
  __device__ bool valid(int u) const {
    return image_[u] < extent_.images && row(u) * kWidth < extent_.plane;
  }

  __device__ int64_t element(int u) const { return plane(u) * extent_.plane + row(u) * kWidth; }

  __device__ int64_t mask_byte(int u) const {
    return plane(u) * ceil_div(extent_.plane, kMaskBits) + row(u) * kWidth / kMaskBits;
  }

  __device__ int mask_shift(int u) const { return static_cast<int>(row(u) * kWidth % kMaskBits); }

 private:
  // rows is less than a plane has.
  __device__ void step(int u, int64_t images, int64_t rows) {
    image_[u] += images;
    row_[u] += rows;
    if (row_[u] >= extent_.plane_rows) {
      row_[u] -= extent_.plane_rows;
      ++image_[u];
    }
  }

  __device__ int64_t plane(int u) const {
    const int64_t image = kBackwards ? extent_.images - 1 - image_[u] : image_[u];
    return image * extent_.channels + channel_;
  }

  __device__ int64_t row(int u) const {
    return kBackwards ? extent_.plane_rows - 1 - row_[u] : row_[u];
  }

  const Extent& extent_;
  const int64_t channel_;
  int64_t tile_;
  int64_t step_images_, step_rows_;
  int64_t image_[kUnroll], row_[kUnroll];
};

// The rows of a tile that are valid; the others are left as they are.
template <class T, int kWidth, int kUnroll, class AnyWalk>
__device__ inline void load_tile(const void* p, const AnyWalk& walk,
                                 Vector<T, kWidth> (&vectors)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (walk.valid(u)) {
      vectors[u] = load(vector_at<kWidth>(static_cast<const T*>(p), walk.element(u)));
    }
  }
}

// ---- Host ----

inline Tensor allocate_like(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  return empty_strided(sizes, strides, dtype, device_type, t.get_device_index());
}

inline Tensor allocate_like(const Tensor& t) {
  return allocate_like(t, t.sizes(), t.strides(), dtype_code(t));
}

// (length,) on the device of t.
inline Tensor allocate_vector(const Tensor& t, int64_t length, int32_t dtype) {
  const int64_t stride = 1;
  return allocate_like(t, {&length, 1}, {&stride, 1}, dtype);
}

inline uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

inline void check_activation(const char* op, const char* name, const Tensor& x) {
  RESNET_FUSED_CHECK(is_kernel_device(x), op, ": ", name, " must be a CUDA tensor");
  RESNET_FUSED_CHECK(x.dim() == 4, op, ": ", name, " must be a 4-d tensor (N, C, H, W), got shape ",
                     to_string(x.sizes()));
  check_dense(op, name, x);
}

// An activation as seen by kernels that move `width` elements per access.
struct Activation {
  Extent extent;
  bool channels_last;
  int width;

  // x is dense; addresses: those of all activations of the kernel, combined by |.
  Activation(const Tensor& x, uintptr_t addresses)
      : extent{x.size(0), x.size(1), x.size(2) * x.size(3), 0, 0, 0},
        channels_last(is_channels_last(x)) {
    const int64_t element = static_cast<int64_t>(x.element_size());
    const int64_t run = channels_last ? extent.channels : extent.plane;
    const bool vectors = addresses % kVectorBytes == 0 && run * element % kVectorBytes == 0;
    width = vectors ? static_cast<int>(kVectorBytes / element) : 1;
    // As many neighbouring threads work on one byte of a mask: its rows are theirs or nobody's.
    const int64_t sharing = std::max(1, kMaskBits / width);
    extent.plane_rows = std::max<int64_t>(1, ceil_div(extent.plane, width * sharing)) * sharing;
    extent.rows = extent.images * (channels_last ? extent.plane : extent.plane_rows);
  }

  int64_t values_per_channel() const { return extent.images * extent.plane; }

  // Shape of the mask: runs and the bytes of each.
  std::array<int64_t, 2> mask_shape() const {
    const int64_t runs = extent.images * (channels_last ? extent.plane : extent.channels);
    return {runs, ceil_div(channels_last ? extent.channels : extent.plane, kMaskBits)};
  }
};

struct LaunchShape {
  Extent extent;
  dim3 grid, block;

  LaunchShape(const Activation& activation, const Spread& spread, int device)
      : extent(activation.extent) {
    const int64_t groups =
        activation.channels_last ? ceil_div(extent.channels, activation.width) : extent.channels;
    unsigned lanes = 1;
    if (activation.channels_last) {
      // Never fewer than share one byte of a mask.
      lanes = static_cast<unsigned>(std::max(1, kMaskBits / activation.width));
      while (lanes < groups && lanes < static_cast<unsigned>(spread.max_lanes)) lanes *= 2;
    }
    block = dim3(lanes, kThreads / lanes);
    grid.x = static_cast<unsigned>(
        activation.channels_last ? ceil_div(groups, static_cast<int64_t>(lanes)) : groups);
    set_tiles(ceil_div(extent.rows, static_cast<int64_t>(block.y) * spread.unroll), spread, device);
  }

  // Spreads the tiles of one channel; for kernels that do not take theirs from rows.
  void set_tiles(int64_t tiles, const Spread& spread, int device) {
    extent.tiles = tiles;
    const int64_t blocks =
        static_cast<int64_t>(multiprocessor_count(device)) * spread.resident_blocks * spread.waves;
    // Rounded down: a block more than a wave takes would be a second wave.
    const int64_t splits = std::min(
        {blocks / std::max<int64_t>(grid.x, 1), ceil_div(tiles, spread.min_tiles), int64_t{65535}});
    grid.y = static_cast<unsigned>(std::max<int64_t>(splits, 1));
  }

  unsigned splits() const { return grid.y; }
};

// A value as a type, for generic lambdas.
template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// Calls body(T{}, Layout{}) with the element type of x and the layout of the activation.
template <class Body>
void dispatch_activation(const char* op, const Tensor& x, const Activation& activation,
                         Body&& body) {
  dispatch_up_to_float32(op, "x", x.scalar_type(), [&](auto element) {
    constexpr int kWidth = kVectorBytes / sizeof(element);
    const bool vectors = activation.width > 1;
    if (activation.channels_last) {
      if (vectors) return body(element, ChannelsLast<kWidth>{});
      return body(element, ChannelsLast<1>{});
    }
    if (vectors) return body(element, Nchw<kWidth>{});
    return body(element, Nchw<1>{});
  });
}

}  // namespace resnet_fused
