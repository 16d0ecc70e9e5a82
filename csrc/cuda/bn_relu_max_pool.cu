// Batch norm, ReLU and max pooling in one, and the backward, without the ReLU's output in memory.
//
// The forward leaves behind which tap of its window each output is: a byte, kClosed where none is
// positive. With g the gradient that comes to an element of x from the outputs which it is, and
// xc = x - mean, the backward is in two passes:
//   sums = sum(g), sum(g * xc),
//   grad_x = (g - averages[0] - xc * invstd^2 * averages[1]) * weight * invstd,
// without the two middle terms where the running statistics were used.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/activation.h"
#include "cuda/channels.h"
#include "cuda/reduction.h"
#include "cuda/statistics.h"

namespace resnet_fused {
namespace {

constexpr int kClosed = 255;  // of an output: no gradient passes
constexpr int kMaxKernel = 15;
constexpr int kMaxPlaneSide = 1 << 30;  // so that 32 bits hold a pixel's row and column

// ---- Windows ----

// Along one axis of the images: pixels of x and of the output, and the windows between them.
struct WindowAxis {
  int inputs, outputs, kernel, stride, padding;

  // Windows that a pixel of x may lie in.
  __host__ __device__ int overlap() const { return (kernel + stride - 1) / stride; }

  // A pixel of x in any case: an argmax from elsewhere reads nothing else.
  __device__ int clamped(int input) const { return std::clamp(input, 0, inputs - 1); }
};

struct Windows {
  WindowAxis rows, columns;
};

// Windows of a side and stride that the compiler knows, or of any.
template <int kSide, int kStride>
struct KnownWindows {
  static __device__ Windows of(Windows windows) {
    windows.rows.kernel = windows.columns.kernel = kSide;
    windows.rows.stride = windows.columns.stride = kStride;
    return windows;
  }
  // Loads of a thread that are in flight together: two rows of a window, all windows of a pixel.
  static constexpr int kTaps = 2 * kSide;
  static constexpr int kOverlap =
      (kSide + kStride - 1) / kStride * ((kSide + kStride - 1) / kStride);
};

struct AnyWindows {
  static __device__ Windows of(const Windows& windows) { return windows; }
  static constexpr int kTaps = 4;
  static constexpr int kOverlap = 2;
};

// ---- Pixels ----

// (N, C, H, W) in tiles of neighbouring pixels, whose windows meet in the first-level cache.
struct Pixels {
  int64_t images, channels;
  int height, width;
  int tile_height, tile_width;
  unsigned tiles_down, tiles_across;  // of an image
  unsigned tiles;
};

// Of each tile of its block a thread has one pixel. Backwards as in `Walk`.
template <bool kBackwards>
class PixelWalk {
 public:
  __device__ explicit PixelWalk(const Pixels& pixels) : pixels_(pixels), tile_(blockIdx.y) {
    place();
  }

  // The same for all threads of a block.
  __device__ bool inside() const { return tile_ < pixels_.tiles; }

  __device__ void next() {
    tile_ += gridDim.y;
    place();
  }

  __device__ bool valid() const { return row < pixels_.height && column < pixels_.width; }

  int image, row, column;

 private:
  __device__ void place() {
    const unsigned tile = kBackwards ? pixels_.tiles - 1 - tile_ : tile_;
    const unsigned down = tile / pixels_.tiles_across, across = tile % pixels_.tiles_across;
    const int thread = static_cast<int>(threadIdx.y);
    image = static_cast<int>(down / pixels_.tiles_down);
    row = static_cast<int>(down % pixels_.tiles_down) * pixels_.tile_height +
          thread / pixels_.tile_width;
    column = static_cast<int>(across) * pixels_.tile_width + thread % pixels_.tile_width;
  }

  const Pixels& pixels_;
  unsigned tile_;
};

// Where the elements of one channel lie in an activation.
template <class Layout>
struct Plane {
  static constexpr bool kIsNchw = std::is_same_v<Layout, Nchw<Layout::kWidth>>;
  int64_t channels, channel;
  int height, width;

  __device__ int64_t at(int image, int row, int column) const {
    if constexpr (kIsNchw) {
      return ((image * channels + channel) * height + row) * width + column;
    } else {
      return ((static_cast<int64_t>(image) * height + row) * width + column) * channels + channel;
    }
  }

  // Elements from a pixel to another one of its image.
  __device__ int64_t step(int rows, int columns) const {
    const int64_t pixels = static_cast<int64_t>(rows) * width + columns;
    return kIsNchw ? pixels : pixels * channels;
  }
};

// ---- Forward ----
// Reads x and writes out, sizeof(T) each per element of theirs, and a byte of argmax per element of
// out. What windows share is read again, mostly from the first-level cache.

constexpr Spread kForwardSpread = {
    .max_lanes = 16, .unroll = 1, .resident_blocks = 2, .waves = 4, .min_tiles = 1};

struct ForwardArguments {
  const void* x;
  void* out;
  uint8_t* argmax;
  BatchNorm bn;
  float *mean, *invstd;  // as in `write_statistics`
  Windows windows;
};

template <class T, class Layout, class Kind>
__global__ void __launch_bounds__(kThreads, kForwardSpread.resident_blocks)
    max_pool_kernel(const __grid_constant__ Pixels pixels,
                    const __grid_constant__ ForwardArguments a) {
  constexpr int kWidth = Layout::kWidth, kTaps = Kind::kTaps;
  const auto [rows, columns] = Kind::of(a.windows);
  const int64_t first = Layout::first_channel();
  Affine<kWidth> affine;
  if (first < pixels.channels) {
    affine.read(a.bn, first);
    if (blockIdx.y == 0 && threadIdx.y == 0) {
      write_statistics<kWidth>(a.bn, first, a.mean, a.invstd);
    }
  }
  const Plane<Layout> of_x{pixels.channels, first, rows.inputs, columns.inputs};
  const Plane<Layout> of_out{pixels.channels, first, rows.outputs, columns.outputs};
  const int taps = rows.kernel * columns.kernel;
  for (PixelWalk<true> walk(pixels); walk.inside(); walk.next()) {
    if (!walk.valid() || first >= pixels.channels) continue;
    const int row = walk.row * rows.stride - rows.padding;
    const int column = walk.column * columns.stride - columns.padding;
    const int64_t corner = of_x.at(walk.image, row, column);
    // Of the taps so far: what is not positive is no maximum.
    float best[kWidth];
    int argmax[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      best[j] = 0;
      argmax[j] = kClosed;
    }
    int down = 0, across = 0;
#pragma unroll 1
    for (int tap = 0; tap < taps; tap += kTaps) {
      Vector<T, kWidth> x[kTaps];
      bool exists[kTaps];
#pragma unroll
      for (int u = 0; u < kTaps; ++u) {
        exists[u] = tap + u < taps && row + down >= 0 && row + down < rows.inputs &&
                    column + across >= 0 && column + across < columns.inputs;
        if (exists[u]) {
          const int64_t at = corner + of_x.step(down, across);
          x[u] = load(vector_at<kWidth>(static_cast<const T*>(a.x), at));
        }
        if (++across == columns.kernel) {
          across = 0;
          ++down;
        }
      }
#pragma unroll
      for (int u = 0; u < kTaps; ++u) {
        if (!exists[u]) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float xc = affine.centered(static_cast<float>(x[u].values[j]), j);
          const float y = fmaf(xc, affine.scale[j], affine.bias[j]);
          // The first of equals, and NaN over all, as in PyTorch.
          if (y > best[j] || y != y) {
            best[j] = y;
            argmax[j] = tap + u;
          }
        }
      }
    }
    Vector<T, kWidth> out;
    Vector<uint8_t, kWidth> argmaxes;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      out.values[j] = static_cast<T>(best[j]);
      argmaxes.values[j] = static_cast<uint8_t>(argmax[j]);
    }
    const int64_t at = of_out.at(walk.image, walk.row, walk.column);
    store(vector_at<kWidth>(static_cast<T*>(a.out), at), out);
    store(vector_at<kWidth>(a.argmax, at), argmaxes);
  }
}

// ---- Sums ----
// Reads grad_out, sizeof(T), and a byte of argmax per element of theirs, and for each of them that
// is open the one element of x which it is.

// One wave: every block leaves partial results behind.
constexpr Spread kSumsSpread = {
    .max_lanes = 16, .unroll = 1, .resident_blocks = 3, .waves = 1, .min_tiles = 2};

struct SumsArguments {
  const void *grad_out, *x;
  const uint8_t* argmax;
  ChannelVector mean;
  Windows windows;
  float* sums;         // (2, C)
  float* block_sums;   // (splits, 2, C)
  unsigned* finished;  // (columns,)
};

template <class T, class Layout, class Kind>
__global__ void __launch_bounds__(kThreads, kSumsSpread.resident_blocks)
    pooled_sums_kernel(const __grid_constant__ Pixels pixels,
                       const __grid_constant__ SumsArguments a) {
  constexpr int kWidth = Layout::kWidth, kValues = 2 * kWidth;
  RESNET_FUSED_SHARED(float, shared, reduction_size(kValues));
  RESNET_FUSED_SHARED(unsigned, flag, 1);
  const auto [rows, columns] = Kind::of(a.windows);
  const int64_t first = Layout::first_channel();
  const Plane<Layout> of_x{pixels.channels, first, rows.inputs, columns.inputs};
  const Plane<Layout> of_out{pixels.channels, first, rows.outputs, columns.outputs};
  float mean[kWidth];
  if (first < pixels.channels) a.mean.get(first, 0.0f, mean);

  float sums[kValues] = {};  // of g and of g * xc
  for (PixelWalk<false> walk(pixels); walk.inside(); walk.next()) {
    if (!walk.valid() || first >= pixels.channels) continue;
    const int64_t at = of_out.at(walk.image, walk.row, walk.column);
    const int row = walk.row * rows.stride - rows.padding;
    const int column = walk.column * columns.stride - columns.padding;
    const int64_t image = of_x.at(walk.image, 0, 0);
    const auto grad_out = load(vector_at<kWidth>(static_cast<const T*>(a.grad_out), at));
    const auto argmax = load(vector_at<kWidth>(a.argmax, at));
    T x[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const int tap = argmax.values[j], down = tap / columns.kernel;
      if (tap == kClosed) continue;
      const int64_t step = of_x.step(rows.clamped(row + down),
                                     columns.clamped(column + tap - down * columns.kernel));
      x[j] = load(static_cast<const T*>(a.x) + image + step + j);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (argmax.values[j] == kClosed) continue;
      const float g = static_cast<float>(grad_out.values[j]);
      sums[j] += g;
      sums[kWidth + j] = fmaf(g, static_cast<float>(x[j]) - mean[j], sums[kWidth + j]);
    }
  }
  const auto add = [](float (&values)[kValues], const float (&others)[kValues]) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) values[v] += others[v];
  };
  reduce_rows(sums, shared, add);

  const bool writes = threadIdx.y == 0 && first < pixels.channels;
  const auto address_of = [&](float* of_block, int v) {
    return of_block + v / kWidth * pixels.channels + first + v % kWidth;
  };
  if (gridDim.y > 1) {
    if (writes) {
      float* of_block = a.block_sums + blockIdx.y * 2 * pixels.channels;
#pragma unroll
      for (int v = 0; v < kValues; ++v) store(address_of(of_block, v), sums[v]);
    }
    if (!is_last_of_column(a.finished + blockIdx.x, flag)) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) sums[v] = 0;
    for (unsigned split = threadIdx.y; split < gridDim.y; split += blockDim.y) {
      if (first >= pixels.channels) continue;
      float* of_block = a.block_sums + split * 2 * pixels.channels;
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums[v] += load(address_of(of_block, v));
    }
    reduce_rows(sums, shared, add);
  }
  if (writes) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) store(address_of(a.sums, v), sums[v]);
  }
}

// ---- Gradients ----
// Reads x in training and writes grad_x, sizeof(T) each per element of theirs, and reads grad_out,
// sizeof(T), and a byte of argmax per element of theirs. What pixels share is read again, mostly
// from the first-level cache.

constexpr Spread kGradientsSpread = {
    .max_lanes = 16, .unroll = 1, .resident_blocks = 2, .waves = 4, .min_tiles = 1};

struct GradientsArguments {
  const void *grad_out, *x;
  const uint8_t* argmax;
  void* grad_x;
  BatchNorm bn;
  bool training;
  ChannelVector mean_g, mean_g_xc;  // averages of g and of g * xc
  Windows windows;
};

// The tap that a pixel of x is of an output; negative where it is none, or there is no such output.
__device__ inline int tap_along(const WindowAxis& axis, int input, int output) {
  const int tap = input + axis.padding - output * axis.stride;
  return output >= 0 && output < axis.outputs && tap < axis.kernel ? tap : -1;
}

template <class T, class Layout, class Kind>
__global__ void __launch_bounds__(kThreads, kGradientsSpread.resident_blocks)
    pooled_gradients_kernel(const __grid_constant__ Pixels pixels,
                            const __grid_constant__ GradientsArguments a) {
  constexpr int kWidth = Layout::kWidth, kOverlap = Kind::kOverlap;
  const auto [rows, columns] = Kind::of(a.windows);
  const int64_t first = Layout::first_channel();
  const Plane<Layout> of_x{pixels.channels, first, rows.inputs, columns.inputs};
  const Plane<Layout> of_out{pixels.channels, first, rows.outputs, columns.outputs};
  Affine<kWidth> affine;
  float mean_g[kWidth], slope[kWidth];
  if (first < pixels.channels) {
    affine.read(a.bn, first);
    float invstd[kWidth];
    a.bn.get_invstd(first, invstd);
    a.mean_g.get(first, 0.0f, mean_g);
    a.mean_g_xc.get(first, 0.0f, slope);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) slope[j] *= invstd[j] * invstd[j];
  }
  const int windows = rows.overlap() * columns.overlap();
  for (PixelWalk<true> walk(pixels); walk.inside(); walk.next()) {
    if (!walk.valid() || first >= pixels.channels) continue;
    const int64_t at = of_x.at(walk.image, walk.row, walk.column);
    Vector<T, kWidth> x;
    if (a.training) x = load(vector_at<kWidth>(static_cast<const T*>(a.x), at));
    // The outputs from the first one whose window can reach this pixel.
    const int top = (walk.row + rows.padding) / rows.stride - rows.overlap() + 1;
    const int left = (walk.column + columns.padding) / columns.stride - columns.overlap() + 1;
    const int64_t corner = of_out.at(walk.image, top, left);
    float g[kWidth] = {};
    int down = 0, across = 0;
    for (int window = 0; window < windows; window += kOverlap) {
      Vector<T, kWidth> grad_out[kOverlap];
      Vector<uint8_t, kWidth> argmax[kOverlap];
      int tap[kOverlap];
#pragma unroll
      for (int u = 0; u < kOverlap; ++u) {
        const int tap_row = tap_along(rows, walk.row, top + down);
        const int tap_column = tap_along(columns, walk.column, left + across);
        const bool exists = tap_row >= 0 && tap_column >= 0;
        tap[u] = exists ? tap_row * columns.kernel + tap_column : -1;
        if (exists) {
          const int64_t output = corner + of_out.step(down, across);
          grad_out[u] = load(vector_at<kWidth>(static_cast<const T*>(a.grad_out), output));
          argmax[u] = load(vector_at<kWidth>(a.argmax, output));
        }
        if (++across == columns.overlap()) {
          across = 0;
          ++down;
        }
      }
#pragma unroll
      for (int u = 0; u < kOverlap; ++u) {
        if (tap[u] < 0) continue;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const bool is_maximum = argmax[u].values[j] == tap[u];
          g[j] += is_maximum ? static_cast<float>(grad_out[u].values[j]) : 0.0f;
        }
      }
    }
    Vector<T, kWidth> grad_x;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (a.training) {
        const float xc = affine.centered(static_cast<float>(x.values[j]), j);
        g[j] = fmaf(-xc, slope[j], g[j] - mean_g[j]);
      }
      grad_x.values[j] = static_cast<T>(g[j] * affine.scale[j]);
    }
    store(vector_at<kWidth>(static_cast<T*>(a.grad_x), at), grad_x);
  }
}

// ---- Launchers ----

WindowAxis window_axis(const char* op, int64_t inputs, int64_t kernel, int64_t stride,
                       int64_t padding) {
  RESNET_FUSED_CHECK(kernel >= 1 && kernel <= kMaxKernel, op, ": kernel_size must be 1 to ",
                     kMaxKernel, " along each axis, got ", kernel);
  RESNET_FUSED_CHECK(stride >= 1 && stride < kMaxPlaneSide, op, ": stride must be positive, got ",
                     stride);
  RESNET_FUSED_CHECK(padding >= 0 && 2 * padding <= kernel, op,
                     ": padding must be at most half of kernel_size ", kernel, ", got ", padding);
  RESNET_FUSED_CHECK(inputs < kMaxPlaneSide, op, ": x must have less than 2^30 rows and columns");
  const int64_t outputs = (inputs + 2 * padding - kernel) / stride + 1;
  RESNET_FUSED_CHECK(inputs + 2 * padding >= kernel && inputs > 0, op,
                     ": x must be as large as a window, ", kernel - 2 * padding,
                     " pixels or more along each axis, got ", inputs);
  return {static_cast<int>(inputs), static_cast<int>(outputs), static_cast<int>(kernel),
          static_cast<int>(stride), static_cast<int>(padding)};
}

using Pair = std::vector<int64_t>;

// A call: x, checked, and the windows over it.
struct Problem {
  const char* op;
  const Tensor& x;
  Windows windows;
  bool nchw;  // for the kernels of channels_last otherwise

  Problem(const char* op, const Tensor& x, const Pair& kernel, const Pair& stride,
          const Pair& padding)
      : op(op), x(x) {
    check_activation(op, "x", x);
    RESNET_FUSED_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                       ": kernel_size, stride and padding must be two integers each");
    windows.rows = window_axis(op, x.size(2), kernel[0], stride[0], padding[0]);
    windows.columns = window_axis(op, x.size(3), kernel[1], stride[1], padding[1]);
    nchw = is_nchw_contiguous(x);
  }

  std::array<int64_t, 4> output_sizes() const {
    return {x.size(0), x.size(1), windows.rows.outputs, windows.columns.outputs};
  }

  Tensor allocate_output(int32_t dtype) const {
    const std::array<int64_t, 4> sizes = output_sizes();
    const auto [n, c, h, w] = sizes;
    const auto strides = nchw ? std::array<int64_t, 4>{c * h * w, h * w, w, 1}
                              : std::array<int64_t, 4>{c * h * w, 1, w * c, c};
    return allocate_like(x, sizes, strides, dtype);
  }

  void check_output(const char* name, const Tensor& t, ScalarType dtype) const {
    const std::array<int64_t, 4> sizes = output_sizes();
    RESNET_FUSED_CHECK(std::ranges::equal(t.sizes(), sizes), op, ": ", name,
                       " must have the shape of the output ", to_string(sizes), ", got ",
                       to_string(t.sizes()));
    RESNET_FUSED_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ",
                       torch::headeronly::toString(dtype), ", got ",
                       torch::headeronly::toString(t.scalar_type()));
    RESNET_FUSED_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of x");
    const bool same_format = nchw ? is_nchw_contiguous(t) : is_channels_last(t);
    RESNET_FUSED_CHECK(t.numel() == 0 || same_format, op, ": ", name,
                       " must have the memory format of x, got shape ", to_string(t.sizes()),
                       " with strides ", to_string(t.strides()));
  }

  bool has_known_windows() const {
    const auto known = [](const WindowAxis& axis) { return axis.kernel == 3 && axis.stride == 2; };
    return known(windows.rows) && known(windows.columns);
  }

  Pixels inputs() const {
    return {x.size(0), x.size(1), windows.rows.inputs, windows.columns.inputs};
  }

  Pixels outputs() const {
    return {x.size(0), x.size(1), windows.rows.outputs, windows.columns.outputs};
  }
};

// As square as a tile can be, but in NCHW with rows of a warp's pixels.
void set_tiles(const char* op, Pixels& pixels, int threads, bool nchw) {
  constexpr int kWarp = 32;
  pixels.tile_width = nchw ? kWarp : 1;
  while (pixels.tile_width * pixels.tile_width < threads) pixels.tile_width *= 2;
  pixels.tile_height = threads / pixels.tile_width;
  pixels.tiles_down = static_cast<unsigned>(ceil_div(pixels.height, pixels.tile_height));
  pixels.tiles_across = static_cast<unsigned>(ceil_div(pixels.width, pixels.tile_width));
  const int64_t of_image = int64_t{pixels.tiles_down} * pixels.tiles_across;
  constexpr int64_t kMost = INT32_MAX;
  RESNET_FUSED_CHECK(pixels.images <= kMost / of_image, op, ": x must have at most ",
                     kMost / of_image, " images of that size, got ", pixels.images);
  pixels.tiles = static_cast<unsigned>(pixels.images * of_image);
}

// Calls body(shape, pixels, element, layout, kind) with the kernel's place on the device, and what
// instance of it is to run. addresses: of all its activations, combined by |.
template <class Body>
void dispatch(const Problem& problem, const Spread& spread, Pixels pixels, uintptr_t addresses,
              Body&& body) {
  const int device = problem.x.get_device_index();
  Activation activation(problem.x, addresses);
  activation.channels_last = !problem.nchw;
  LaunchShape shape(activation, spread, device);
  set_tiles(problem.op, pixels, static_cast<int>(shape.block.y), problem.nchw);
  shape.set_tiles(pixels.tiles, spread, device);
  dispatch_up_to_float32(problem.op, "x", problem.x.scalar_type(), [&](auto element) {
    constexpr int kWidth = kVectorBytes / sizeof(element);
    if (problem.nchw) return body(shape, pixels, element, Nchw<1>{}, AnyWindows{});
    if (activation.width == 1) {
      return body(shape, pixels, element, ChannelsLast<1>{}, AnyWindows{});
    }
    if (!problem.has_known_windows()) {
      return body(shape, pixels, element, ChannelsLast<kWidth>{}, AnyWindows{});
    }
    return body(shape, pixels, element, ChannelsLast<kWidth>{}, KnownWindows<3, 2>{});
  });
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ForwardResult bn_relu_max_pool_cuda(const Tensor& x, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, bool training,
                                    double momentum, double eps, Pair kernel_size, Pair stride,
                                    Pair padding) {
  const Problem problem("bn_relu_max_pool", x, kernel_size, stride, padding);
  const DeviceGuard guard(x.get_device_index());
  const Statistics statistics = normalisation(
      problem.op, x, {"", weight, bias, running_mean, running_var, training, momentum, eps});
  Tensor out = problem.allocate_output(dtype_code(x));
  Tensor argmax = problem.allocate_output(aoti_torch_dtype_uint8());
  ForwardArguments a{};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.argmax = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  a.bn = statistics.bn;
  a.mean = statistics.unwritten(statistics.mean);
  a.invstd = statistics.unwritten(statistics.invstd);
  a.windows = problem.windows;
  if (x.size(1) > 0) {
    const uintptr_t addresses = address(a.x) | address(a.out) | address(a.argmax);
    dispatch(
        problem, kForwardSpread, problem.outputs(), addresses,
        [&](const LaunchShape& shape, const Pixels& pixels, auto element, auto layout, auto kind) {
          RESNET_FUSED_LAUNCH(
              (max_pool_kernel<decltype(element), decltype(layout), decltype(kind)>), shape.grid,
              shape.block, 0, current_stream(x), pixels, a);
        });
  }
  return {out, statistics.mean, statistics.invstd, argmax};
}

Tensor bn_relu_max_pool_backward_sums_cuda(const Tensor& grad_out, const Tensor& x,
                                           const Tensor& argmax, const Tensor& mean,
                                           Pair kernel_size, Pair stride, Pair padding) {
  const Problem problem("bn_relu_max_pool_backward_sums", x, kernel_size, stride, padding);
  problem.check_output("grad_out", grad_out, x.scalar_type());
  problem.check_output("argmax", argmax, ScalarType::Byte);
  const DeviceGuard guard(x.get_device_index());
  const int64_t channels = x.size(1);
  const std::array<int64_t, 2> sizes = {2, channels}, strides = {channels, 1};
  Tensor sums = allocate_like(x, sizes, strides, aoti_torch_dtype_float32());
  SumsArguments a{};
  a.grad_out = grad_out.const_data_ptr();
  a.x = x.const_data_ptr();
  a.argmax = static_cast<const uint8_t*>(argmax.const_data_ptr());
  a.mean = channel_vector(problem.op, "mean", mean, x);
  a.windows = problem.windows;
  a.sums = static_cast<float*>(sums.mutable_data_ptr());
  if (channels == 0) return sums;
  const cudaStream_t stream = current_stream(x);
  const uintptr_t addresses = address(a.grad_out) | address(a.x) | address(a.argmax);
  dispatch(
      problem, kSumsSpread, problem.outputs(), addresses,
      [&](const LaunchShape& shape, const Pixels& pixels, auto element, auto layout, auto kind) {
        const int64_t blocks = shape.grid.x, splits = shape.splits();
        const int64_t words = splits > 1 ? blocks + splits * 2 * channels : 0;
        Tensor workspace = allocate_vector(x, words, aoti_torch_dtype_float32());
        if (splits > 1) {
          a.finished = static_cast<unsigned*>(workspace.mutable_data_ptr());
          a.block_sums = static_cast<float*>(workspace.mutable_data_ptr()) + blocks;
          zero_async(a.finished, blocks * sizeof(unsigned), stream);
        }
        RESNET_FUSED_LAUNCH(
            (pooled_sums_kernel<decltype(element), decltype(layout), decltype(kind)>), shape.grid,
            shape.block, 0, stream, pixels, a);
      });
  return sums;
}

// Row `index` of (2, C), side by side.
ChannelVector average(const char* op, const Tensor& averages, int64_t index, const Tensor& x) {
  const bool fits = averages.dim() == 2 && averages.size(0) == 2 && averages.size(1) == x.size(1) &&
                    averages.scalar_type() == ScalarType::Float;
  RESNET_FUSED_CHECK(fits, op, ": averages must be float32 of shape (2, ", x.size(1), "), got ",
                     torch::headeronly::toString(averages.scalar_type()), " of shape ",
                     to_string(averages.sizes()));
  RESNET_FUSED_CHECK(averages.device() == x.device(), op, ": averages must be on the device of x");
  const auto* data = static_cast<const float*>(averages.const_data_ptr());
  return {const_cast<float*>(data + index * averages.stride(0)), averages.stride(1),
          ScalarType::Float};
}

Tensor bn_relu_max_pool_backward_apply_cuda(const Tensor& grad_out, const Tensor& x,
                                            const Tensor& argmax, const OptionalTensor& weight,
                                            const Tensor& mean, const Tensor& invstd, bool training,
                                            const Tensor& averages, Pair kernel_size, Pair stride,
                                            Pair padding) {
  const Problem problem("bn_relu_max_pool_backward_apply", x, kernel_size, stride, padding);
  problem.check_output("grad_out", grad_out, x.scalar_type());
  problem.check_output("argmax", argmax, ScalarType::Byte);
  const DeviceGuard guard(x.get_device_index());
  Tensor grad_x = allocate_like(x);
  GradientsArguments a{};
  a.grad_out = grad_out.const_data_ptr();
  a.x = x.const_data_ptr();
  a.argmax = static_cast<const uint8_t*>(argmax.const_data_ptr());
  a.grad_x = grad_x.mutable_data_ptr();
  a.bn.mean = channel_vector(problem.op, "mean", mean, x);
  a.bn.invstd_or_var = channel_vector(problem.op, "invstd", invstd, x);
  a.bn.weight = channel_vector(problem.op, "weight", weight, x);
  a.training = training;
  a.mean_g = average(problem.op, averages, 0, x);
  a.mean_g_xc = average(problem.op, averages, 1, x);
  a.windows = problem.windows;
  if (x.numel() == 0) return grad_x;
  const uintptr_t addresses =
      address(a.grad_out) | address(a.x) | address(a.argmax) | address(a.grad_x);
  dispatch(
      problem, kGradientsSpread, problem.inputs(), addresses,
      [&](const LaunchShape& shape, const Pixels& pixels, auto element, auto layout, auto kind) {
        RESNET_FUSED_LAUNCH(
            (pooled_gradients_kernel<decltype(element), decltype(layout), decltype(kind)>),
            shape.grid, shape.block, 0, current_stream(x), pixels, a);
      });
  return grad_x;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bn_relu_max_pool", TORCH_BOX(&resnet_fused::bn_relu_max_pool_cuda));
  m.impl("bn_relu_max_pool_backward_sums",
         TORCH_BOX(&resnet_fused::bn_relu_max_pool_backward_sums_cuda));
  m.impl("bn_relu_max_pool_backward_apply",
         TORCH_BOX(&resnet_fused::bn_relu_max_pool_backward_apply_cuda));
}
