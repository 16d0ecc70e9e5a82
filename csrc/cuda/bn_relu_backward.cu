// Batch norm with optional residual, batch norm of the residual, and ReLU: backward.
//
// With dy the gradient of the output where the ReLU passed and xc = x - mean:
//   grad_bias = sum(dy), grad_weight = sum(dy * xc) * invstd, grad_residual = dy,
//   grad_x = (dy - sum(dy) / n - xc * sum(dy * xc) * invstd^2 / n) * weight * invstd,
// without the two middle terms where the running statistics were used. The sums need a pass of
// their own only in training.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "cuda/activation.h"
#include "cuda/channels.h"
#include "cuda/reduction.h"

namespace resnet_fused {
namespace {

struct BranchBackward {
  BatchNorm bn;
  bool training;
  ChannelVector grad_weight, grad_bias;
  float *mean_dy, *slope;  // (C,): sum(dy) / n and sum(dy * xc) * invstd^2 / n; 0 if not training

  template <int kChannels>
  __device__ void write(int64_t first, float n, const float* sum_dy, const float* sum_dy_xc) const {
    float invstd[kChannels], of_weight[kChannels], of_bias[kChannels];
    bn.get_invstd(first, invstd);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      of_weight[k] = sum_dy_xc[k] * invstd[k];
      of_bias[k] = sum_dy[k];
      if (mean_dy == nullptr) continue;
      store(mean_dy + first + k, training ? sum_dy[k] / n : 0.0f);
      store(slope + first + k, training ? of_weight[k] * invstd[k] / n : 0.0f);
    }
    grad_weight.set(first, of_weight);
    grad_bias.set(first, of_bias);
  }
};

struct BackwardArguments {
  const void *grad_out, *x, *residual;
  const uint8_t* mask;
  void *grad_x, *grad_residual;
  BranchBackward own, other;
  bool relu;
  float values_per_channel;
  float* sums;         // of the blocks: (splits, sums per channel, C)
  unsigned* finished;  // (columns,)
};

// ---- Reduction ----
// Reads grad_out and x (and the residual, if it has a batch norm), sizeof(T) each per element, and
// with a plain residual 1 bit of mask. In training it then writes grad_residual of a plain
// residual: the apply pass reads that instead of grad_out and mask. Otherwise, kWithGradients, it
// writes all gradients, and there is no apply pass.

// One wave: every block leaves partial results behind. A thread with two batch norms has twice the
// values per channel in registers, and with their gradients too many for a second block.
constexpr Spread reduction_spread(bool dual, bool with_gradients) {
  return {.max_lanes = 16,
          .unroll = dual ? 1 : 2,
          .resident_blocks = dual && with_gradients ? 1 : 2,
          .waves = 1,
          .min_tiles = 2};
}

template <class T, class Layout, Residual kResidual, bool kWithGradients>
__global__ void __launch_bounds__(
    kThreads, reduction_spread(kResidual == Residual::kBatchNorm, kWithGradients).resident_blocks)
    reduction_kernel(const __grid_constant__ Extent extent,
                     const __grid_constant__ BackwardArguments a) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  constexpr bool kDual = kResidual == Residual::kBatchNorm;
  constexpr int kUnroll = reduction_spread(kDual, kWithGradients).unroll;
  constexpr bool kPlain = kResidual == Residual::kPlain;
  constexpr int kSums = kDual ? 3 : 2, kValues = kSums * kChannels;
  RESNET_FUSED_SHARED(float, shared, reduction_size(kValues));
  RESNET_FUSED_SHARED(unsigned, flag, 1);
  const int64_t first = Layout::first_channel();
  Total<kChannels, kDual> total_of;
  if (first < extent.channels) total_of.read(a.own.bn, a.other.bn, first);

  float sums[kValues] = {};  // of dy, of dy * xc, of dy * rc, each for all channels
  for (Walk<Layout, kUnroll, false> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> grad_out[kUnroll], x[kUnroll], residual[kUnroll];
    load_tile(a.grad_out, walk, grad_out);
    load_tile(a.x, walk, x);
    if constexpr (kDual) load_tile(a.residual, walk, residual);
    unsigned bits[kUnroll];
    if constexpr (kPlain) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        bits[u] = ~0u;
        if (a.relu && walk.valid(u)) {
          bits[u] = load(a.mask + walk.mask_byte(u)) >> walk.mask_shift(u);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!walk.valid(u)) continue;
      Vector<T, kWidth> grad_x, grad_residual;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int k = j % kChannels;
        const float xc = total_of.bn.centered(static_cast<float>(x[u].values[j]), j);
        float dy = static_cast<float>(grad_out[u].values[j]);
        [[maybe_unused]] float rc = 0;
        if constexpr (kPlain) {
          dy = bits[u] >> j & 1 ? dy : 0.0f;
        } else {
          if constexpr (kDual) {
            rc = total_of.residual_bn.centered(static_cast<float>(residual[u].values[j]), j);
          }
          dy = a.relu && !passes_relu<T>(total_of.at(xc, rc, j)) ? 0.0f : dy;
        }
        sums[k] += dy;
        sums[kChannels + k] = fmaf(dy, xc, sums[kChannels + k]);
        if constexpr (kDual) sums[2 * kChannels + k] = fmaf(dy, rc, sums[2 * kChannels + k]);
        if constexpr (kWithGradients) grad_x.values[j] = static_cast<T>(dy * total_of.bn.scale[k]);
        if constexpr (kPlain) grad_residual.values[j] = static_cast<T>(dy);
        if constexpr (kDual && kWithGradients) {
          grad_residual.values[j] = static_cast<T>(dy * total_of.residual_bn.scale[k]);
        }
      }
      if constexpr (kWithGradients) {
        store(vector_at<kWidth>(static_cast<T*>(a.grad_x), walk.element(u)), grad_x);
      }
      if constexpr (kPlain || (kDual && kWithGradients)) {
        store(vector_at<kWidth>(static_cast<T*>(a.grad_residual), walk.element(u)), grad_residual);
      }
    }
  }
  const auto add = [](float (&values)[kValues], const float (&others)[kValues]) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) values[v] += others[v];
  };
  reduce_rows(sums, shared, add);

  const bool writes = threadIdx.y == 0 && first < extent.channels;
  if (gridDim.y > 1) {
    if (writes) {
      float* block_sums = a.sums + blockIdx.y * kSums * extent.channels + first;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        store(block_sums + v / kChannels * extent.channels + v % kChannels, sums[v]);
      }
    }
    if (!is_last_of_column(a.finished + blockIdx.x, flag)) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) sums[v] = 0;
    for (unsigned split = threadIdx.y; split < gridDim.y; split += blockDim.y) {
      if (first >= extent.channels) continue;
      const float* block_sums = a.sums + split * kSums * extent.channels + first;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        sums[v] += load(block_sums + v / kChannels * extent.channels + v % kChannels);
      }
    }
    reduce_rows(sums, shared, add);
  }
  if (writes) {
    a.own.write<kChannels>(first, a.values_per_channel, sums, sums + kChannels);
    if constexpr (kDual) {
      a.other.write<kChannels>(first, a.values_per_channel, sums, sums + 2 * kChannels);
    }
  }
}

// ---- Apply ----
// Reads grad_out and x and writes grad_x, sizeof(T) each per element; with a batch norm of the
// residual it reads that too and writes its gradient.

constexpr Spread gradients_spread(bool dual) {
  return {.max_lanes = 32,
          .unroll = 2,
          .resident_blocks = dual ? 1 : 2,
          .waves = dual ? 8 : 4,
          .min_tiles = 1};
}

// dy to the gradient of the input of one batch norm, for the channels of one thread.
template <int kChannels>
struct Projection {
  float mean_dy[kChannels], slope[kChannels];

  __device__ void read(const BranchBackward& branch, int64_t first) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      mean_dy[k] = load(branch.mean_dy + first + k);
      slope[k] = load(branch.slope + first + k);
    }
  }

  __device__ float apply(float dy, float xc, float scale, int j) const {
    return fmaf(-xc, slope[j % kChannels], dy - mean_dy[j % kChannels]) * scale;
  }
};

template <class T, class Layout, bool kDual>
__global__ void __launch_bounds__(kThreads, gradients_spread(kDual).resident_blocks)
    gradients_kernel(const __grid_constant__ Extent extent,
                     const __grid_constant__ BackwardArguments a) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  constexpr int kUnroll = gradients_spread(kDual).unroll;
  const int64_t first = Layout::first_channel();
  Total<kChannels, kDual> total_of;
  if (first < extent.channels) total_of.read(a.own.bn, a.other.bn, first);
  Projection<kChannels> own, other;
  if (first < extent.channels) {
    own.read(a.own, first);
    if constexpr (kDual) other.read(a.other, first);
  }
  for (Walk<Layout, kUnroll, true> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> grad_out[kUnroll], x[kUnroll], residual[kUnroll];
    load_tile(a.grad_out, walk, grad_out);
    load_tile(a.x, walk, x);
    if constexpr (kDual) load_tile(a.residual, walk, residual);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!walk.valid(u)) continue;
      Vector<T, kWidth> grad_x, grad_residual;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int k = j % kChannels;
        const float xc = total_of.bn.centered(static_cast<float>(x[u].values[j]), j);
        [[maybe_unused]] float rc = 0;
        if constexpr (kDual) {
          rc = total_of.residual_bn.centered(static_cast<float>(residual[u].values[j]), j);
        }
        const bool passes = passes_relu<T>(total_of.at(xc, rc, j)) | !a.relu;
        const float dy = passes ? static_cast<float>(grad_out[u].values[j]) : 0.0f;
        grad_x.values[j] = static_cast<T>(own.apply(dy, xc, total_of.bn.scale[k], j));
        if constexpr (kDual) {
          grad_residual.values[j] =
              static_cast<T>(other.apply(dy, rc, total_of.residual_bn.scale[k], j));
        }
      }
      store(vector_at<kWidth>(static_cast<T*>(a.grad_x), walk.element(u)), grad_x);
      if constexpr (kDual) {
        store(vector_at<kWidth>(static_cast<T*>(a.grad_residual), walk.element(u)), grad_residual);
      }
    }
  }
}

// ---- Launchers ----

template <Residual kResidual>
void launch_reduction(const char* op, const Tensor& x, const Activation& activation,
                      BackwardArguments a, bool with_gradients, cudaStream_t stream) {
  constexpr bool kDual = kResidual == Residual::kBatchNorm;
  constexpr int kSums = kDual ? 3 : 2;
  const LaunchShape shape(activation, reduction_spread(kDual, with_gradients),
                          x.get_device_index());
  const int64_t columns = shape.grid.x, splits = shape.splits();
  const int64_t words = splits > 1 ? columns + splits * kSums * x.size(1) : 0;
  Tensor workspace = allocate_vector(x, words, aoti_torch_dtype_float32());
  if (splits > 1) {
    a.finished = static_cast<unsigned*>(workspace.mutable_data_ptr());
    a.sums = static_cast<float*>(workspace.mutable_data_ptr()) + columns;
    zero_async(a.finished, columns * sizeof(unsigned), stream);
  }
  dispatch_activation(op, x, activation, [&](auto element, auto layout) {
    using T = decltype(element);
    using Layout = decltype(layout);
    if (with_gradients) {
      RESNET_FUSED_LAUNCH((reduction_kernel<T, Layout, kResidual, true>), shape.grid, shape.block,
                          0, stream, shape.extent, a);
    } else {
      RESNET_FUSED_LAUNCH((reduction_kernel<T, Layout, kResidual, false>), shape.grid, shape.block,
                          0, stream, shape.extent, a);
    }
  });
}

template <bool kDual>
void launch_gradients(const char* op, const Tensor& x, const Activation& activation,
                      const BackwardArguments& a, cudaStream_t stream) {
  const LaunchShape shape(activation, gradients_spread(kDual), x.get_device_index());
  dispatch_activation(op, x, activation, [&](auto element, auto layout) {
    RESNET_FUSED_LAUNCH((gradients_kernel<decltype(element), decltype(layout), kDual>), shape.grid,
                        shape.block, 0, stream, shape.extent, a);
  });
}

// Gradients of weight and bias in the dtype of the weight.
std::pair<Tensor, Tensor> allocate_parameter_gradients(const Tensor& x,
                                                       const OptionalTensor& weight) {
  const int32_t dtype = weight ? dtype_code(*weight) : aoti_torch_dtype_float32();
  return {allocate_vector(x, x.size(1), dtype), allocate_vector(x, x.size(1), dtype)};
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult bn_relu_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& /*out*/,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu) {
  const char* op = "bn_relu_backward";
  check_activation(op, "x", x);
  check_like(op, "grad_out", grad_out, "x", x);
  RESNET_FUSED_CHECK(has_residual || !residual_bn, op,
                     ": has_residual must be True with residual_bn, got False");
  if (residual_bn) {
    RESNET_FUSED_CHECK(residual && residual_mean && residual_invstd, op,
                       ": residual, residual_mean and residual_invstd must be given with "
                       "residual_bn, got None");
    check_like(op, "residual", *residual, "x", x);
  }
  const bool needs_mask = relu && has_residual && !residual_bn;
  const Tensor grad_x = allocate_like(x);
  const Tensor grad_residual =
      has_residual ? allocate_like(x) : allocate_vector(x, 0, dtype_code(x));
  const Activation activation(x, address(grad_out.const_data_ptr()) | address(x.const_data_ptr()) |
                                     address(residual_bn ? residual->const_data_ptr() : nullptr) |
                                     address(grad_x.const_data_ptr()) |
                                     address(grad_residual.const_data_ptr()));
  if (needs_mask) {
    RESNET_FUSED_CHECK(mask.has_value(), op,
                       ": mask must be given with relu and a plain residual, got None "
                       "(save_mask=True in the forward keeps it)");
    const std::array<int64_t, 2> shape = activation.mask_shape();
    RESNET_FUSED_CHECK(mask->device() == x.device() && mask->is_contiguous() &&
                           mask->scalar_type() == ScalarType::Byte && mask->dim() == 2 &&
                           mask->size(0) == shape[0] && mask->size(1) == shape[1],
                       op, ": mask must be the contiguous uint8 tensor of shape ", to_string(shape),
                       " that the forward returned, got shape ", to_string(mask->sizes()));
  }
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  auto [grad_weight, grad_bias] = allocate_parameter_gradients(x, weight);
  const int32_t dtype = dtype_code(grad_weight);
  std::pair<Tensor, Tensor> residual_grads{allocate_vector(x, 0, dtype),
                                           allocate_vector(x, 0, dtype)};
  if (residual_bn) residual_grads = allocate_parameter_gradients(x, residual_weight);

  BackwardArguments a{};
  a.grad_out = grad_out.const_data_ptr();
  a.x = x.const_data_ptr();
  a.residual = residual_bn ? residual->const_data_ptr() : nullptr;
  a.mask = needs_mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_residual = has_residual ? grad_residual.mutable_data_ptr() : nullptr;
  a.relu = relu;
  a.values_per_channel = static_cast<float>(activation.values_per_channel());
  const auto branch = [&](const char* prefix, const OptionalTensor& branch_mean,
                          const OptionalTensor& branch_invstd, const OptionalTensor& branch_weight,
                          const OptionalTensor& branch_bias, bool branch_training,
                          const Tensor& branch_grad_weight, const Tensor& branch_grad_bias) {
    const std::string p = prefix;
    BranchBackward result{};
    result.bn = {channel_vector(op, p + "mean", branch_mean, x),
                 channel_vector(op, p + "invstd", branch_invstd, x),
                 false,
                 0.0f,
                 channel_vector(op, p + "weight", branch_weight, x),
                 channel_vector(op, p + "bias", branch_bias, x)};
    result.training = branch_training;
    result.grad_weight = mutable_channel_vector(branch_grad_weight);
    result.grad_bias = mutable_channel_vector(branch_grad_bias);
    return result;
  };
  a.own = branch("", mean, invstd, weight, bias, training, grad_weight, grad_bias);
  if (residual_bn) {
    a.other = branch("residual_", residual_mean, residual_invstd, residual_weight, residual_bias,
                     residual_training, residual_grads.first, residual_grads.second);
  }
  const bool two_passes = training || (residual_bn && residual_training);
  const int64_t channels = x.size(1);
  const Tensor projections =
      allocate_vector(x, two_passes ? 4 * channels : 0, aoti_torch_dtype_float32());
  if (two_passes) {
    float* memory = static_cast<float*>(projections.mutable_data_ptr());
    a.own.mean_dy = memory;
    a.own.slope = memory + channels;
    a.other.mean_dy = memory + 2 * channels;
    a.other.slope = memory + 3 * channels;
  }
  if (channels == 0) {
    return {grad_x,        grad_weight,          grad_bias,
            grad_residual, residual_grads.first, residual_grads.second};
  }

  if (residual_bn) {
    launch_reduction<Residual::kBatchNorm>(op, x, activation, a, !two_passes, stream);
    if (two_passes) launch_gradients<true>(op, x, activation, a, stream);
  } else if (has_residual) {
    launch_reduction<Residual::kPlain>(op, x, activation, a, !two_passes, stream);
    a.grad_out = a.grad_residual;
    a.relu = false;
    if (two_passes) launch_gradients<false>(op, x, activation, a, stream);
  } else {
    launch_reduction<Residual::kNone>(op, x, activation, a, !two_passes, stream);
    if (two_passes) launch_gradients<false>(op, x, activation, a, stream);
  }
  return {grad_x,        grad_weight,          grad_bias,
          grad_residual, residual_grads.first, residual_grads.second};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bn_relu_backward", TORCH_BOX(&resnet_fused::bn_relu_backward_cuda));
}
