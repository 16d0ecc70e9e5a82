// Tensors and parameters as the convolution kernels want them.
#include "cuda/conv_operands.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>

#include "cuda/activation.h"
#include "cuda/channels.h"

namespace resnet_fused {
namespace {

// A multiprocessor has room for so many blocks of these kernels, and the grid for a few waves.
constexpr int64_t kBlocksPerMultiprocessor = 8;

unsigned blocks_for(const Tensor& t, int64_t threads) {
  const int64_t most = kBlocksPerMultiprocessor * multiprocessor_count(t.get_device_index());
  return static_cast<unsigned>(std::clamp(ceil_div(threads, kThreads), int64_t{1}, most));
}

// ---- Padding ----

struct PaddingSizes {
  int64_t rows;  // N * H
  int width, side, groups, channels, padded;
};

// out (rows, side + width + side, groups, padded) of x (rows, width, groups, channels): a block
// takes row after row, a thread chunk after chunk of it.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    pad_kernel(const T* x, T* out, const __grid_constant__ PaddingSizes z) {
  const int chunks_of_run = z.padded / kWidth;
  const int chunks = (z.width + 2 * z.side) * z.groups * chunks_of_run;
  for (int64_t row = blockIdx.x; row < z.rows; row += gridDim.x) {
    for (int i = threadIdx.x; i < chunks; i += kThreads) {
      const int run = i / chunks_of_run;  // of the row: a group of a pixel
      const int first = (i - run * chunks_of_run) * kWidth;
      const int run_of_x = run - z.side * z.groups;
      const bool exists = run_of_x >= 0 && run_of_x < z.width * z.groups;
      const T* from = x + (row * z.width * z.groups + run_of_x) * z.channels + first;
      Vector<T, kWidth> elements{};
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (exists && first + k < z.channels) elements.values[k] = load(from + k);
      }
      store(vector_at<kWidth>(out, (row * chunks + i) * kWidth), elements);
    }
  }
}

// ---- Weights ----

struct WeightSizes {
  int64_t elements;            // of what is packed
  int kernels, rows, columns;  // K of a group, R, S
  int padded_channels;
  int own_kernels, channels;  // of a group of the convolution
  int merged;                 // of those groups
  int64_t stride[4];          // of the weight
};

// One element per thread and step.
template <class From, class T>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const From* weight, T* packed, const float* scale,
                       const __grid_constant__ WeightSizes z) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < z.elements;
       i += threads) {
    const int channel = static_cast<int>(i % z.padded_channels);
    const int64_t tap = i / z.padded_channels;
    const int s = static_cast<int>(tap % z.columns);
    const int r = static_cast<int>(tap / z.columns % z.rows);
    const int64_t kernel = tap / z.columns / z.rows;
    const int own_group = static_cast<int>(kernel % z.kernels) / z.own_kernels;
    const int c = channel - own_group * z.channels;
    float value = 0;
    if (c >= 0 && c < z.channels) {
      value = static_cast<float>(load(weight + kernel * z.stride[0] + c * z.stride[1] +
                                      r * z.stride[2] + s * z.stride[3]));
      if (scale != nullptr) value *= load(scale + kernel);
    }
    store(packed + i, static_cast<T>(value));
  }
}

// ---- Batch norm backward ----

constexpr Spread kCombineSpread = {
    .max_lanes = 32, .unroll = 2, .resident_blocks = 2, .waves = 4, .min_tiles = 1};

template <class T, class Layout>
__global__ void __launch_bounds__(kThreads, kCombineSpread.resident_blocks)
    combine_kernel(const __grid_constant__ Extent extent, const void* gradient, const void* y,
                   const float* coefficients, void* out) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  const int64_t first = Layout::first_channel();
  float a[kChannels], b[kChannels], d[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    if (first + k >= extent.channels) break;
    a[k] = load(coefficients + first + k);
    b[k] = load(coefficients + extent.channels + first + k);
    d[k] = load(coefficients + 2 * extent.channels + first + k);
  }
  for (Walk<Layout, kCombineSpread.unroll, false> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> gradients[kCombineSpread.unroll], outputs[kCombineSpread.unroll];
    load_tile(gradient, walk, gradients);
    load_tile(y, walk, outputs);
#pragma unroll
    for (int u = 0; u < kCombineSpread.unroll; ++u) {
      if (!walk.valid(u)) continue;
      Vector<T, kWidth> result;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int k = j % kChannels;
        const float g = static_cast<float>(gradients[u].values[j]);
        const float value =
            fmaf(a[k], g, fmaf(b[k], static_cast<float>(outputs[u].values[j]), d[k]));
        result.values[j] = static_cast<T>(value);
      }
      store(vector_at<kWidth>(static_cast<T*>(out), walk.element(u)), result);
    }
  }
}

// ---- Parameters ----

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// What is common to the forward and the gradient.
ConvParameters parameters(const Convolution& conv, const Grouping& grouping, bool forward,
                          int64_t step_channels) {
  ConvParameters p{};
  const int64_t height = forward ? conv.h : conv.p, width = forward ? conv.w : conv.q;
  const int64_t padded = forward ? grouping.padded_channels : grouping.padded_kernels;
  p.source_width = as_int(width);
  p.source_pixels = as_int(height * width);
  p.source_group = as_int(padded);
  p.source_pitch = as_int(forward ? grouping.pixel_channels : padded * grouping.groups);
  p.groups = as_int(grouping.groups);
  p.channels = as_int(forward ? grouping.channels : grouping.kernels);
  p.columns = as_int(forward ? grouping.kernels : grouping.channels);
  p.steps_of_tap = as_int(ceil_div(p.channels, step_channels));
  const int64_t kernel = conv.taps() * grouping.padded_channels;
  p.weight_pitch = as_int(kernel);
  p.weight_group = as_int(grouping.kernels * kernel);
  return p;
}

// An axis of the forward, or of a phase of the gradient: which taps reach it, and the first of them
// as the weight counts.
struct Taps {
  Axis axis;
  int64_t result;  // pixels
  int64_t first, step;
};

Taps forward_taps(int64_t size, int64_t result, int64_t taps, int64_t stride, int64_t padding,
                  int64_t dilation) {
  return {{as_int(size), as_int(stride), as_int(-padding), as_int(taps), Divider(dilation)},
          result,
          0,
          1};
}

// Of the pixels `phase`, phase + stride, ... of the input. Pixel i meets tap t in the output pixel
// (i + padding - t * dilation) / stride, where that is whole: for every `period`-th tap, if for
// any. In descending order, so that the output pixels ascend.
Taps gradient_taps(int64_t phase, int64_t size, int64_t output, int64_t taps, int64_t stride,
                   int64_t padding, int64_t dilation) {
  const int64_t period = stride / std::gcd(stride, dilation);
  int64_t first = 0;
  while (first < std::min(period, taps) && (phase + padding - first * dilation) % stride != 0) {
    ++first;
  }
  const bool any = first < std::min(period, taps);
  const int64_t count = any ? ceil_div(taps - first, period) : 0;
  const int64_t last = any ? first + (count - 1) * period : 0;
  const int64_t pixels_apart = period * dilation / stride;
  const int64_t first_pixel = any ? (phase + padding - last * dilation) / stride : 0;
  return {{as_int(output), 1, as_int(first_pixel), as_int(count),
           Divider(std::max<int64_t>(pixels_apart, 1))},
          ceil_div(size - phase, stride),
          last,
          -period};
}

Phase make_phase(const Convolution& conv, const Grouping& grouping, bool forward,
                 int64_t step_channels, Taps rows, Taps columns) {
  const ConvParameters p = parameters(conv, grouping, forward, step_channels);
  // A loop over taps wants all of them or none.
  if (rows.axis.taps == 0 || columns.axis.taps == 0) rows.axis.taps = 0, columns.axis.taps = 1;
  Phase phase{};
  phase.pixels = as_int(conv.n * rows.result * columns.result);
  phase.image_pixels = Divider(std::max<int64_t>(rows.result * columns.result, 1));
  phase.row_pixels = Divider(std::max<int64_t>(columns.result, 1));
  phase.rows = rows.axis;
  phase.columns = columns.axis;
  const int64_t channels = p.steps_of_tap * step_channels;
  const int64_t to_next = columns.axis.dilation.divisor() * p.source_pitch;
  const int64_t to_next_row = rows.axis.dilation.divisor() * p.source_width * p.source_pitch;
  phase.source_next_tap = as_int(to_next - channels);
  phase.source_next_row = as_int(to_next_row - columns.axis.taps * to_next);
  const int64_t weight_step = columns.step * grouping.padded_channels;
  const int64_t weight_row = rows.step * conv.s * grouping.padded_channels;
  const int64_t pitch = forward ? 1 : p.weight_pitch;
  phase.weight_first = as_int((rows.first * conv.s + columns.first) * grouping.padded_channels);
  phase.weight_next_tap = as_int(weight_step - channels * pitch);
  phase.weight_next_row = as_int(weight_row - columns.axis.taps * weight_step);
  return phase;
}

}  // namespace

Convolution::Convolution(const char* op, int64_t n, std::array<int64_t, 2> image,
                         const Tensor& weight, const std::vector<int64_t>& geometry)
    : n(n), h(image[0]), w(image[1]) {
  RESNET_FUSED_CHECK(geometry.size() == 7, op,
                     ": geometry must have 7 numbers: stride, padding, dilation and groups, got ",
                     geometry.size());
  RESNET_FUSED_CHECK(weight.dim() == 4, op, ": weight must be (K, C / groups, R, S), got shape ",
                     to_string(weight.sizes()));
  stride = {geometry[0], geometry[1]};
  padding = {geometry[2], geometry[3]};
  dilation = {geometry[4], geometry[5]};
  groups = geometry[6];
  RESNET_FUSED_CHECK(std::min({stride[0], stride[1], dilation[0], dilation[1], groups}) >= 1, op,
                     ": stride, dilation and groups must be at least 1, got ", to_string(geometry));
  RESNET_FUSED_CHECK(std::min(padding[0], padding[1]) >= 0, op,
                     ": padding must not be negative, got ", to_string(padding));
  k = weight.size(0);
  c = weight.size(1) * groups;
  r = weight.size(2);
  s = weight.size(3);
  RESNET_FUSED_CHECK(k % groups == 0, op, ": groups must divide the kernels of weight (", k,
                     "), got ", groups);
  RESNET_FUSED_CHECK(r <= kMaxTaps && s <= kMaxTaps, op, ": weight must be at most ", kMaxTaps,
                     " x ", kMaxTaps, " for the cuda backend, got ", r, " x ", s,
                     " (choose another backend)");
  p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) / stride[0] + 1;
  q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) / stride[1] + 1;
  RESNET_FUSED_CHECK(
      h + 2 * padding[0] > dilation[0] * (r - 1) && w + 2 * padding[1] > dilation[1] * (s - 1), op,
      ": x must be at least as large as the kernel, got ", h, " x ", w);
}

Grouping::Grouping(const Convolution& conv, int64_t chunk) {
  // As many channels as the smallest tile has columns.
  constexpr int64_t kEnough = 64;
  const int64_t own_channels = conv.c / conv.groups, own_kernels = conv.k / conv.groups;
  for (merged = 1; merged < conv.groups; ++merged) {
    if (conv.groups % merged == 0 && merged * own_channels % chunk == 0 &&
        merged * own_kernels % chunk == 0 && merged * own_channels >= kEnough) {
      break;
    }
  }
  groups = conv.groups / merged;
  channels = merged * own_channels;
  kernels = merged * own_kernels;
  padded_channels = round_up(channels, chunk);
  padded_kernels = round_up(kernels, chunk);
  pixel_channels = groups * padded_channels;
}

void join_row_taps(Convolution& conv, Grouping& grouping) {
  conv.w += 2 * conv.padding[1];
  conv.padding[1] = 0;
  grouping.channels = grouping.padded_channels = conv.s * grouping.padded_channels;
  conv.s = 1;
}

Tensor with_padded_groups(const char* op, const Tensor& t, int64_t groups, int64_t channels,
                          int64_t padded, int64_t side) {
  RESNET_FUSED_CHECK(is_channels_last(t), op, ": activations must be channels_last, got strides ",
                     to_string(t.strides()));
  const bool is_aligned = address(t.const_data_ptr()) % kVectorBytes == 0;
  if (channels == padded && side == 0 && is_aligned) return t;
  const std::array<int64_t, 4> sizes = {t.size(0), t.size(2), t.size(3) + 2 * side,
                                        groups * padded};
  const std::array<int64_t, 4> strides = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3],
                                          sizes[3], 1};
  Tensor out = allocate_like(t, sizes, strides, dtype_code(t));
  const PaddingSizes z{sizes[0] * sizes[1], as_int(t.size(3)), as_int(side),
                       as_int(groups),      as_int(channels),  as_int(padded)};
  const int64_t blocks = blocks_for(t, z.rows * kThreads);
  dispatch_up_to_float32(op, "x", t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kVectorBytes / sizeof(T);
    RESNET_FUSED_LAUNCH((pad_kernel<T, kWidth>), static_cast<unsigned>(blocks), kThreads, 0,
                        current_stream(t), static_cast<const T*>(t.const_data_ptr()),
                        static_cast<T*>(out.mutable_data_ptr()), z);
  });
  return out;
}

Tensor packed_weight(const char* op, const Tensor& weight, const Tensor& x, const Convolution& conv,
                     const Grouping& grouping, const OptionalTensor& scale) {
  const bool as_is = weight.scalar_type() == x.scalar_type() && is_channels_last(weight) &&
                     grouping.merged == 1 && grouping.channels == grouping.padded_channels &&
                     address(weight.const_data_ptr()) % kVectorBytes == 0 && !scale;
  if (as_is) return weight;
  const int64_t elements = conv.k * conv.taps() * grouping.padded_channels;
  Tensor packed = allocate_vector(x, elements, dtype_code(x));
  WeightSizes z{elements,
                as_int(grouping.kernels),
                as_int(conv.r),
                as_int(conv.s),
                as_int(grouping.padded_channels),
                as_int(conv.k / conv.groups),
                as_int(conv.c / conv.groups),
                as_int(grouping.merged),
                {}};
  for (int64_t i = 0; i < 4; ++i) z.stride[i] = weight.stride(i);
  const float* factors = nullptr;
  if (scale) {
    check_coefficients(op, "scale", *scale, conv.k, x);
    factors = static_cast<const float*>(scale->const_data_ptr());
  }
  dispatch_floating(op, "weight", weight.scalar_type(), [&](auto from) {
    dispatch_up_to_float32(op, "x", x.scalar_type(), [&](auto to) {
      using From = decltype(from);
      using T = decltype(to);
      RESNET_FUSED_LAUNCH((pack_weight_kernel<From, T>), blocks_for(x, elements), kThreads, 0,
                          current_stream(x), static_cast<const From*>(weight.const_data_ptr()),
                          static_cast<T*>(packed.mutable_data_ptr()), factors, z);
    });
  });
  return packed;
}

void check_channels(const char* op, const Convolution& conv, const Tensor& x) {
  RESNET_FUSED_CHECK(x.size(1) == conv.c, op,
                     ": weight must have C / groups = ", x.size(1) / conv.groups,
                     " input channels, got ", conv.c / conv.groups);
}

void check_output_shape(const char* op, const char* name, const Convolution& conv,
                        const Tensor& t) {
  const std::array<int64_t, 4> shape = {conv.n, conv.k, conv.p, conv.q};
  RESNET_FUSED_CHECK(t.sizes().equals(shape), op, ": ", name,
                     " must have the shape of the convolution's output ", to_string(shape),
                     ", got ", to_string(t.sizes()));
}

void check_prologue(const char* op, const Convolution& conv, const OptionalTensor& scale,
                    const OptionalTensor& shift, const Tensor& x) {
  RESNET_FUSED_CHECK(scale.has_value() == shift.has_value(), op,
                     ": scale and shift must be given together");
  if (!scale) return;
  check_coefficients(op, "scale", *scale, conv.c, x);
  check_coefficients(op, "shift", *shift, conv.c, x);
}

void check_sizes(const char* op, const Convolution& conv, const Grouping& grouping) {
  // Kernels count some tiles beyond the end.
  constexpr int64_t kMost = INT32_MAX - (int64_t{1} << 20);
  const auto check = [op](const char* what, int64_t value) {
    RESNET_FUSED_CHECK(value <= kMost, op, ": x must have less than 2^31 ", what, ", got ", value,
                       " (choose another backend)");
  };
  // A tile may begin in one image and end in a later one.
  constexpr int64_t kPixelsOfTile = 128;
  const int64_t images = 2 + kPixelsOfTile / std::max<int64_t>(conv.p * conv.q, 1);
  const int64_t rows = 2 * (conv.padding[0] + conv.dilation[0]);
  check("pixels", std::max(conv.n * conv.h * conv.w, conv.n * conv.p * conv.q));
  check("elements in the images of a tile", (images * conv.h + rows) *
                                                (conv.w + 2 * conv.padding[1]) * grouping.groups *
                                                grouping.padded_channels);
  check("elements in the gradients of a tile",
        (2 + kPixelsOfTile) * (conv.p + rows) * (conv.q + 2 * conv.padding[1]) * grouping.groups *
            grouping.padded_kernels / std::max<int64_t>(conv.p * conv.q, 1));
  check("elements of weight", conv.k * conv.taps() * grouping.padded_channels);
}

bool has_vector_coefficients(const Grouping& grouping, const Tensor& scale, const Tensor& shift) {
  return grouping.channels == grouping.padded_channels &&
         (address(scale.const_data_ptr()) | address(shift.const_data_ptr())) % kVectorBytes == 0;
}

void check_coefficients(const char* op, const char* name, const Tensor& t, int64_t length,
                        const Tensor& x) {
  RESNET_FUSED_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of x");
  RESNET_FUSED_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == length &&
                         (length == 0 || t.stride(t.dim() - 1) == 1),
                     op, ": ", name, " must have ", length,
                     " values in float32, side by side, got shape ", to_string(t.sizes()), " of ",
                     torch::headeronly::toString(t.scalar_type()));
}

Tensor batch_norm_backward(const char* op, const Tensor& gradient, const Tensor& y,
                           const Tensor& coefficients) {
  Tensor out = allocate_like(gradient);
  const Activation activation(gradient, address(gradient.const_data_ptr()) |
                                            address(y.const_data_ptr()) |
                                            address(out.const_data_ptr()));
  const LaunchShape shape(activation, kCombineSpread, gradient.get_device_index());
  dispatch_activation(op, gradient, activation, [&](auto element, auto layout) {
    RESNET_FUSED_LAUNCH(
        (combine_kernel<decltype(element), decltype(layout)>), shape.grid, shape.block, 0,
        current_stream(gradient), shape.extent, gradient.const_data_ptr(), y.const_data_ptr(),
        static_cast<const float*>(coefficients.const_data_ptr()), out.mutable_data_ptr());
  });
  return out;
}

ConvParameters forward_parameters(const Convolution& conv, const Grouping& grouping,
                                  int64_t step_channels) {
  return parameters(conv, grouping, true, step_channels);
}

std::vector<Phase> forward_phases(const Convolution& conv, const Grouping& grouping,
                                  int64_t step_channels) {
  Phase phase = make_phase(
      conv, grouping, true, step_channels,
      forward_taps(conv.h, conv.p, conv.r, conv.stride[0], conv.padding[0], conv.dilation[0]),
      forward_taps(conv.w, conv.q, conv.s, conv.stride[1], conv.padding[1], conv.dilation[1]));
  phase.is_dense = true;
  return {phase};
}

ConvParameters gradient_parameters(const Convolution& conv, const Grouping& grouping,
                                   int64_t step_channels) {
  return parameters(conv, grouping, false, step_channels);
}

std::vector<Phase> gradient_phases(const Convolution& conv, const Grouping& grouping,
                                   int64_t step_channels) {
  std::vector<Phase> phases;
  const std::array<int64_t, 2> stride = conv.stride;
  for (int64_t y = 0; y < std::min(stride[0], conv.h); ++y) {
    for (int64_t x = 0; x < std::min(stride[1], conv.w); ++x) {
      Phase phase = make_phase(
          conv, grouping, false, step_channels,
          gradient_taps(y, conv.h, conv.p, conv.r, stride[0], conv.padding[0], conv.dilation[0]),
          gradient_taps(x, conv.w, conv.q, conv.s, stride[1], conv.padding[1], conv.dilation[1]));
      phase.result_first = as_int(y * conv.w + x);
      phase.result_pixel = as_int(stride[1]);
      phase.result_row = as_int(stride[0] * conv.w);
      phase.result_image = as_int(conv.h * conv.w);
      phase.is_dense = stride[0] == 1 && stride[1] == 1;
      phases.push_back(phase);
    }
  }
  // Those with most taps first: what is left for the end is small.
  std::stable_sort(phases.begin(), phases.end(), [](const Phase& a, const Phase& b) {
    return a.rows.taps * a.columns.taps > b.rows.taps * b.columns.taps;
  });
  return phases;
}

}  // namespace resnet_fused
