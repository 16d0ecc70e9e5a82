// The gradient of a convolution's weight, with batch norm and ReLU in front of x.
//
// A product with a row for every kernel, a column for every element of a kernel (tap and channel),
// and a sum over pixels, which is divided among blocks: their shares are added in a fixed order by
// a second kernel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cuda/conv_launch.cuh"
#include "cuda/reduction.h"

namespace resnet_fused {
namespace {

struct WgradParameters {
  const void *grad, *x;              // (pixels, grad_pitch), (N, H, W, x_pitch)
  float* shares;                     // (splits, groups, kernels, columns)
  int pixels;                        // N * P * Q
  Divider image_pixels, row_pixels;  // P * Q, Q
  int height, width;
  int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int grad_pitch, x_pitch;  // from pixel to pixel, in elements
  int grad_group, x_group;  // from group to group, in elements
  int kernels, columns;     // of a group; columns: taps * channels, which are padded
  Divider channels, taps_of_row;
  int row_tiles, column_tiles;  // of a group
  bool is_pointwise;            // pixels of x are those of grad
};

// Where a block works, and which of the pixels are its own.
struct WgradPlace {
  int group, first_row, first_column;
  int first_pixel, end_pixel;
};

// Step by step through the pixels: gradients and the patches of x that they are multiplied with. No
// pixel exists behind the last step.
template <class Tile, class Prologue>
class PixelPairs {
  using T = typename Tile::T;
  static constexpr int kThreads = Tile::kThreads;

 public:
  using A = RowsSideBySide<T, Tile::kM, kThreads>;
  using B = RowsSideBySide<T, Tile::kN, kThreads>;
  static constexpr bool kTransforms = Prologue::kTransforms;
  static constexpr uint32_t kOffsetOfB = A::kBytes;
  static constexpr uint32_t kStageBytes = kOffsetOfB + B::kBytes;

  __device__ __forceinline__ PixelPairs(const WgradParameters& p,
                                        const typename Prologue::Parameters& prologue,
                                        const WgradPlace& place)
      : p_(p),
        end_(place.end_pixel),
        channel_(place.group * p.x_group + own_column(place) -
                 p.channels.divide(own_column(place)) * p.channels.divisor()),
        coefficients_(prologue, channel_) {
    const SharedAddress shared = ptx::dynamic_shared();
    const int chunk_a = threadIdx.x % A::kChunks, summed_a = threadIdx.x / A::kChunks;
    to_a_ = shared + A::at(summed_a, chunk_a);
    const int kernel = place.first_row + chunk_a * kChunk<T>;
    exists_a_ = kernel < p.kernels;
    next_a_ = place.first_pixel + summed_a;
    grad_ = static_cast<const T*>(p.grad) + static_cast<int64_t>(next_a_) * p.grad_pitch +
            place.group * p.grad_group + kernel;
    // A thread has the same tap and channels for all pixels.
    const int chunk_b = threadIdx.x % B::kChunks, summed_b = threadIdx.x / B::kChunks;
    to_b_ = shared + kOffsetOfB + B::at(summed_b, chunk_b);
    const int column = own_column(place);
    exists_b_ = column < p.columns;
    next_b_ = place.first_pixel + summed_b;
    const int tap = p.channels.divide(column);
    const int tap_y = p.taps_of_row.divide(tap);
    const int tap_x = tap - tap_y * p.taps_of_row.divisor();
    first_y_ = tap_y * p.dilation_y - p.padding_y;
    first_x_ = tap_x * p.dilation_x - p.padding_x;
  }

  __device__ __forceinline__ void copy(uint32_t stage, bool) {
#pragma unroll
    for (int i = 0; i < A::kCopies; ++i) {
      const bool exists = exists_a_ && next_a_ + i * A::kSummedApart < end_;
      ptx::copy_async(to_a_ + stage + i * A::kBytesApart,
                      ptx::offset<sizeof(T)>(grad_, i * A::kSummedApart * p_.grad_pitch), exists);
    }
    next_a_ += Tile::kSummed;
    grad_ += Tile::kSummed * p_.grad_pitch;
#pragma unroll
    for (int i = 0; i < B::kCopies; ++i) {
      bool exists = exists_b_ && next_b_ + i * B::kSummedApart < end_;
      const T* from = pixel_of_x(next_b_ + i * B::kSummedApart, exists);
      ptx::copy_async(to_b_ + stage + i * B::kBytesApart, from + channel_, exists);
      if constexpr (kTransforms) exists_ = exists_ << 1 | static_cast<unsigned>(exists);
    }
    next_b_ += Tile::kSummed;
    if constexpr (kTransforms) waiting_ += B::kCopies;
  }

  // Applies the prologue to what this thread has copied. Zeros of the padding stay zeros.
  __device__ __forceinline__ void transform(uint32_t stage, bool) {
    if constexpr (kTransforms) {
#pragma unroll
      for (int i = 0; i < B::kCopies; ++i) {
        --waiting_;
        if ((exists_ >> waiting_ & 1) == 0) continue;
        const SharedAddress at = to_b_ + stage + i * B::kBytesApart;
        ptx::store_shared(at, coefficients_.apply(ptx::load_shared<uint4>(at)));
      }
    }
  }

 private:
  static_assert(B::kCopies * Tile::kStages <= 32, "exists_ holds a bit for each copy under way");

  static __device__ __forceinline__ int own_column(const WgradPlace& place) {
    return place.first_column + threadIdx.x % B::kChunks * kChunk<T>;
  }

  // The pixel that the thread's tap finds at a pixel of the gradient; exists: whether it does.
  __device__ __forceinline__ const T* pixel_of_x(int pixel, bool& exists) const {
    const T* x = static_cast<const T*>(p_.x);
    if (p_.is_pointwise) return x + static_cast<int64_t>(pixel) * p_.x_pitch;
    const int image = p_.image_pixels.divide(pixel);
    const int in_image = pixel - image * p_.image_pixels.divisor();
    const int row = p_.row_pixels.divide(in_image);
    const int y = row * p_.stride_y + first_y_;
    const int x_ = (in_image - row * p_.row_pixels.divisor()) * p_.stride_x + first_x_;
    exists = exists && y >= 0 && y < p_.height && x_ >= 0 && x_ < p_.width;
    const int64_t source = (static_cast<int64_t>(image) * p_.height + y) * p_.width + x_;
    return x + source * p_.x_pitch;
  }

  const WgradParameters& p_;
  const int end_;
  const int channel_;  // of x
  const typename Prologue::template Coefficients<T> coefficients_;
  SharedAddress to_a_, to_b_;
  const T* grad_;
  int next_a_, next_b_;  // the thread's first pixel in the next step
  int first_y_, first_x_;
  bool exists_a_, exists_b_;
  // Of the copies that wait for their prologue, the newest in the lowest bit.
  uint32_t exists_ = 0;
  int waiting_ = 0;
};

// A tile of the gradient, summed over a share of the pixels. Grid: tiles, shares.
template <class Tile, class Prologue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResidentBlocks)
    conv_wgrad_kernel(const __grid_constant__ WgradParameters p,
                      const __grid_constant__ typename Prologue::Parameters prologue) {
  const int tiles_of_group = p.row_tiles * p.column_tiles;
  const int group = blockIdx.x / tiles_of_group, tile = blockIdx.x % tiles_of_group;
  const int64_t steps = ceil_div(p.pixels, Tile::kSummed);
  const int first_step = static_cast<int>(steps * blockIdx.y / gridDim.y);
  const int end_step = static_cast<int>(steps * (blockIdx.y + 1) / gridDim.y);
  const int end_pixel =
      end_step * int64_t{Tile::kSummed} < p.pixels ? end_step * Tile::kSummed : p.pixels;
  const WgradPlace place{group, tile % p.row_tiles * Tile::kM, tile / p.row_tiles * Tile::kN,
                         first_step * Tile::kSummed, end_pixel};
  typename Tile::Sum sum{};
  PixelPairs<Tile, Prologue> pairs(p, prologue, place);
  main_loop<Tile>(sum, pairs, end_step - first_step);

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = place.first_row + warp / Tile::kWarpsN * Tile::kWarpM + lane / 4;
  const int column = place.first_column + warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
  const int64_t groups = gridDim.x / tiles_of_group;
  float* share = p.shares + (blockIdx.y * groups + group) * p.kernels * p.columns;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int kernel = row + 16 * i + 8 * half;
      if (kernel >= p.kernels) continue;
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        if (column + 8 * j >= p.columns) continue;
        float* to = share + static_cast<int64_t>(kernel) * p.columns + column + 8 * j;
        store(reinterpret_cast<float2*>(to), float2{sum[i][j][2 * half], sum[i][j][2 * half + 1]});
      }
    }
  }
}

// ---- Sums of the shares ----

constexpr int kLanes = 32;

struct SumSizes {
  int64_t elements;  // of a share
  int shares;
  int kernels, rows, columns, padded_channels;  // K of a group, R, S
  int own_kernels, channels;                    // of a group of the convolution
  int64_t stride[4];                            // of the gradient
};

// A lane adds the shares of kVector neighbouring channels; threadIdx.y divides the shares.
constexpr int kSumVector = 4;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_shares_kernel(const float* shares, const float* scale, T* grad_weight,
                      const __grid_constant__ SumSizes z) {
  RESNET_FUSED_SHARED(float, shared, reduction_size(kSumVector));
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * kSumVector;
  float total[kSumVector] = {};
  for (int share = threadIdx.y; share < z.shares && first < z.elements; share += blockDim.y) {
    const float4 four = load(reinterpret_cast<const float4*>(shares + share * z.elements + first));
    total[0] += four.x;
    total[1] += four.y;
    total[2] += four.z;
    total[3] += four.w;
  }
  reduce_rows(total, shared, [](float (&a)[kSumVector], const float (&b)[kSumVector]) {
#pragma unroll
    for (int k = 0; k < kSumVector; ++k) a[k] += b[k];
  });
  if (threadIdx.y != 0 || first >= z.elements) return;
  const int64_t tap = first / z.padded_channels;
  const int s = static_cast<int>(tap % z.columns);
  const int r = static_cast<int>(tap / z.columns % z.rows);
  const int64_t kernel = tap / z.columns / z.rows;
  const float factor = scale == nullptr ? 1.0f : load(scale + kernel);
  // Of merged groups only the blocks on the diagonal are gradients.
  const int own_group = static_cast<int>(kernel % z.kernels) / z.own_kernels;
  const int first_channel = static_cast<int>(first % z.padded_channels) - own_group * z.channels;
#pragma unroll
  for (int k = 0; k < kSumVector; ++k) {
    const int c = first_channel + k;
    if (c < 0 || c >= z.channels) continue;
    T* to =
        grad_weight + kernel * z.stride[0] + c * z.stride[1] + r * z.stride[2] + s * z.stride[3];
    store(to, static_cast<T>(total[k] * factor));
  }
}

// ---- Launcher ----

WgradParameters wgrad_parameters(const Convolution& conv, const Grouping& grouping) {
  WgradParameters p{};
  p.pixels = as_int(conv.n * conv.p * conv.q);
  p.image_pixels = Divider(conv.p * conv.q);
  p.row_pixels = Divider(conv.q);
  p.height = as_int(conv.h);
  p.width = as_int(conv.w);
  p.stride_y = as_int(conv.stride[0]);
  p.stride_x = as_int(conv.stride[1]);
  p.padding_y = as_int(conv.padding[0]);
  p.padding_x = as_int(conv.padding[1]);
  p.dilation_y = as_int(conv.dilation[0]);
  p.dilation_x = as_int(conv.dilation[1]);
  p.grad_pitch = as_int(grouping.groups * grouping.padded_kernels);
  p.x_pitch = as_int(grouping.groups * grouping.padded_channels);
  p.grad_group = as_int(grouping.padded_kernels);
  p.x_group = as_int(grouping.padded_channels);
  p.kernels = as_int(grouping.kernels);
  p.columns = as_int(conv.taps() * grouping.padded_channels);
  p.channels = Divider(grouping.padded_channels);
  p.taps_of_row = Divider(conv.s);
  p.is_pointwise = conv.is_pointwise() && conv.stride == std::array<int64_t, 2>{1, 1};
  return p;
}

struct WgradChoice {
  int tile;
  int splits;
};

// The largest tile of which enough is used; then as many shares as fill the device once.
template <class Types>
WgradChoice choose_wgrad(const char* op, const WgradParameters& p, int64_t groups, int64_t steps,
                         int device, Choice wanted) {
  constexpr int64_t kLeastSteps = 8;
  constexpr auto kShapes = shapes_of<Types>();
  constexpr int kTiles = as_int(kShapes.size());
  RESNET_FUSED_CHECK(wanted.tile < kTiles, op, ": tile must be less than ", kTiles, ", got ",
                     wanted.tile);
  const auto tiles_of = [&](const TileShape& shape) {
    return ceil_div(p.kernels, shape.m) * ceil_div(p.columns, shape.n);
  };
  int tile = wanted.tile < 0 ? 0 : wanted.tile;
  const auto uses_enough = [&](const TileShape& shape) {
    return int64_t{p.kernels} * p.columns * 4 >= tiles_of(shape) * shape.m * shape.n * 3;
  };
  if (wanted.tile < 0) {
    while (tile + 1 < kTiles && !uses_enough(kShapes[tile])) ++tile;
  }
  const TileShape& shape = kShapes[tile];
  const int64_t room = int64_t{multiprocessor_count(device)} * shape.resident_blocks;
  const int64_t most = std::max<int64_t>(steps / kLeastSteps, 1);
  int64_t splits = std::clamp(room / (tiles_of(shape) * groups), int64_t{1}, most);
  if (wanted.splits > 0) splits = wanted.splits;
  return {tile, as_int(splits)};
}

// x: any tensor on the device.
template <class Tile, class Prologue>
void launch_wgrad(const Tensor& x, WgradParameters p, int64_t groups, int splits,
                  const typename Prologue::Parameters& prologue) {
  constexpr size_t kShared = Tile::kStages * PixelPairs<Tile, Prologue>::kStageBytes;
  allow_shared_bytes(conv_wgrad_kernel<Tile, Prologue>, kShared);
  p.row_tiles = as_int(ceil_div(p.kernels, Tile::kM));
  p.column_tiles = as_int(ceil_div(p.columns, Tile::kN));
  const dim3 grid(static_cast<unsigned>(int64_t{p.row_tiles} * p.column_tiles * groups),
                  static_cast<unsigned>(splits));
  RESNET_FUSED_LAUNCH((conv_wgrad_kernel<Tile, Prologue>), grid, Tile::kThreads, kShared,
                      current_stream(x), p, prologue);
}

// Like weight, of the shares (splits, groups, kernels, R, S, padded channels).
Tensor sum_shares(const char* op, const Tensor& shares, int splits, const Tensor& weight,
                  const Convolution& conv, const Grouping& grouping, const OptionalTensor& scale) {
  const std::array<int64_t, 4> sizes = {weight.size(0), weight.size(1), conv.r, conv.s};
  const int64_t c = sizes[1], taps = conv.taps();
  const std::array<int64_t, 4> channels_last = {taps * c, 1, conv.s * c, c};
  const std::array<int64_t, 4> contiguous = {c * taps, taps, conv.s, 1};
  const auto& strides = is_channels_last(weight) ? channels_last : contiguous;
  Tensor grad_weight = allocate_like(weight, sizes, strides, dtype_code(weight));
  SumSizes z{conv.k * taps * grouping.padded_channels,
             splits,
             as_int(grouping.kernels),
             as_int(conv.r),
             as_int(conv.s),
             as_int(grouping.padded_channels),
             as_int(conv.k / conv.groups),
             as_int(c),
             {strides[0], strides[1], strides[2], strides[3]}};
  const float* factors = static_cast<const float*>(data_or_null(scale));
  const int64_t blocks = ceil_div(z.elements, kLanes * kSumVector);
  // Few elements leave room for more threads to each.
  int rows = 1;
  while (rows < splits && rows < kThreads / kLanes) rows *= 2;
  dispatch_floating(op, "weight", weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    RESNET_FUSED_LAUNCH((sum_shares_kernel<T>), static_cast<unsigned>(blocks),
                        dim3(kLanes, static_cast<unsigned>(rows)), 0, current_stream(shares),
                        static_cast<const float*>(shares.const_data_ptr()), factors,
                        static_cast<T*>(grad_weight.mutable_data_ptr()), z);
  });
  return grad_weight;
}

Tensor conv_wgrad_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& scale, const OptionalTensor& shift,
                       const OptionalTensor& output_scale, std::vector<int64_t> geometry, bool tf32,
                       int64_t tile, int64_t splits) {
  const char* op = "conv_wgrad";
  check_activation(op, "x", x);
  check_activation(op, "grad_y", grad_y);
  const Convolution conv(op, x.size(0), {x.size(2), x.size(3)}, weight, geometry);
  check_channels(op, conv, x);
  check_output_shape(op, "grad_y", conv, grad_y);
  RESNET_FUSED_CHECK(grad_y.scalar_type() == x.scalar_type(), op,
                     ": grad_y must have the dtype of x");
  RESNET_FUSED_CHECK(grad_y.numel() > 0, op, ": grad_y must not be empty, got shape ",
                     to_string(grad_y.sizes()));
  check_prologue(op, conv, scale, shift, x);
  if (output_scale) check_coefficients(op, "output_scale", *output_scale, conv.k, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor grad_weight;
  dispatch_arithmetic(op, x, tf32, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using Math = typename decltype(arithmetic)::type;
    const Grouping grouping(conv, kChunk<T>);
    check_sizes(op, conv, grouping);
    const bool fuses = scale && has_vector_coefficients(grouping, *scale, *shift);
    Tensor source = scale && !fuses ? scale_shift_relu(op, x, *scale, *shift) : x;
    source = with_padded_groups(op, source, grouping.groups, grouping.channels,
                                grouping.padded_channels);
    const Tensor grad =
        with_padded_groups(op, grad_y, grouping.groups, grouping.kernels, grouping.padded_kernels);
    WgradParameters p = wgrad_parameters(conv, grouping);
    p.grad = grad.const_data_ptr();
    p.x = source.const_data_ptr();
    const auto run = [&](auto policy, const typename decltype(policy)::Parameters& prologue) {
      using Prologue = decltype(policy);
      // Without a prologue, too: the places of pixels take as many registers.
      using Tiles = TilesOf<T, Math, ScaleShiftRelu>;
      const WgradChoice choice =
          choose_wgrad<Tiles>(op, p, grouping.groups, ceil_div(p.pixels, kStepBytes / sizeof(T)),
                              x.get_device_index(), wanted_choice(tile, splits));
      const Tensor shares =
          allocate_vector(x, choice.splits * conv.k * p.columns, aoti_torch_dtype_float32());
      p.shares = static_cast<float*>(shares.mutable_data_ptr());
      visit_tile<Tiles>(choice.tile, [&](auto tile) {
        launch_wgrad<decltype(tile), Prologue>(x, p, grouping.groups, choice.splits, prologue);
      });
      grad_weight = sum_shares(op, shares, choice.splits, weight, conv, grouping, output_scale);
    };
    if (fuses) {
      run(ScaleShiftRelu{}, {static_cast<const float*>(scale->const_data_ptr()),
                             static_cast<const float*>(shift->const_data_ptr())});
    } else {
      run(Identity{}, {});
    }
  });
  return grad_weight;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("conv_wgrad", TORCH_BOX(&resnet_fused::conv_wgrad_cuda));
}
