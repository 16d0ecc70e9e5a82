// Batch norm with optional residual, batch norm of the residual, and ReLU: backward.
//
// With dy the gradient of the output where the ReLU passed and xc = x - mean:
//   grad_bias = sum(dy), grad_weight = sum(dy * xc) * invstd, grad_residual = dy,
//   grad_x = (dy - sum(dy) / n - xc * sum(dy * xc) * invstd^2 / n) * weight * invstd,
// without the two middle terms where the running statistics were used. The sums need a pass of
// their own only in training. With statistics over several processes each pass is an operator: the
// sums of all of them, divided by the n of all of them, are the averages of the second.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/activation.h"
#include "cuda/channels.h"
#include "cuda/reduction.h"

namespace resnet_fused {
namespace {

struct BranchBackward {
  BatchNorm bn;
  bool training;
  ChannelVector grad_weight, grad_bias;

  template <int kChannels>
  __device__ void write(int64_t first, const float* sum_dy, const float* sum_dy_xc) const {
    float invstd[kChannels], of_weight[kChannels], of_bias[kChannels];
    bn.get_invstd(first, invstd);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      of_weight[k] = sum_dy_xc[k] * invstd[k];
      of_bias[k] = sum_dy[k];
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
  // (sums per channel, C): of the reduction, the sums over `divisor` or null where nobody needs
  // them; of the apply pass, the sums over n.
  float* quotients;
  float divisor;
  const float* averages;
  float* sums;         // of the blocks: (splits, sums per channel, C)
  unsigned* finished;  // (columns,)
};

// Of the mask of a plain residual, all set without a ReLU.
template <int kUnroll, class AnyWalk>
__device__ inline void load_bits(const BackwardArguments& a, const AnyWalk& walk,
                                 unsigned (&bits)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    bits[u] = ~0u;
    if (a.relu && walk.valid(u)) {
      bits[u] = load(a.mask + walk.mask_byte(u)) >> walk.mask_shift(u);
    }
  }
}

// ---- Reduction ----
// Reads grad_out and x (and the residual, if it has a batch norm), sizeof(T) each per element, and
// with a plain residual 1 bit of mask. In training it then writes grad_residual of a plain
// residual, if the apply pass is to read that instead of grad_out and mask. Otherwise,
// kWithGradients, it writes all gradients, and there is no apply pass.

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
    if constexpr (kPlain) load_bits(a, walk, bits);
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
        if (a.grad_residual != nullptr) {
          store(vector_at<kWidth>(static_cast<T*>(a.grad_residual), walk.element(u)),
                grad_residual);
        }
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
  if (!writes) return;
  a.own.write<kChannels>(first, sums, sums + kChannels);
  if constexpr (kDual) a.other.write<kChannels>(first, sums, sums + 2 * kChannels);
  if (a.quotients == nullptr) return;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    store(a.quotients + v / kChannels * extent.channels + first + v % kChannels,
          sums[v] / a.divisor);
  }
}

// ---- Apply ----
// Reads grad_out and x and writes grad_x, sizeof(T) each per element; with a batch norm of the
// residual it reads that too and writes its gradient; with a plain residual, whose gradient the
// reduction has not written, it reads 1 bit of mask and writes it.

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

  __device__ void read(const BranchBackward& branch, const float* average_dy,
                       const float* average_dy_xc, int64_t first) {
    float invstd[kChannels];
    branch.bn.get_invstd(first, invstd);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      mean_dy[k] = branch.training ? load(average_dy + first + k) : 0.0f;
      slope[k] = branch.training ? load(average_dy_xc + first + k) * invstd[k] * invstd[k] : 0.0f;
    }
  }

  __device__ float apply(float dy, float xc, float scale, int j) const {
    return fmaf(-xc, slope[j % kChannels], dy - mean_dy[j % kChannels]) * scale;
  }
};

template <class T, class Layout, Residual kResidual>
__global__ void __launch_bounds__(
    kThreads, gradients_spread(kResidual == Residual::kBatchNorm).resident_blocks)
    gradients_kernel(const __grid_constant__ Extent extent,
                     const __grid_constant__ BackwardArguments a) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  constexpr bool kDual = kResidual == Residual::kBatchNorm;
  constexpr bool kPlain = kResidual == Residual::kPlain;
  constexpr int kUnroll = gradients_spread(kDual).unroll;
  const int64_t first = Layout::first_channel();
  Total<kChannels, kDual> total_of;
  if (first < extent.channels) total_of.read(a.own.bn, a.other.bn, first);
  Projection<kChannels> own, other;
  if (first < extent.channels) {
    const float* average_dy_xc = a.averages + extent.channels;
    own.read(a.own, a.averages, average_dy_xc, first);
    if constexpr (kDual) other.read(a.other, a.averages, average_dy_xc + extent.channels, first);
  }
  for (Walk<Layout, kUnroll, true> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> grad_out[kUnroll], x[kUnroll], residual[kUnroll];
    load_tile(a.grad_out, walk, grad_out);
    load_tile(a.x, walk, x);
    if constexpr (kDual) load_tile(a.residual, walk, residual);
    unsigned bits[kUnroll];
    if constexpr (kPlain) load_bits(a, walk, bits);
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
        bool passes;
        if constexpr (kPlain) {
          passes = bits[u] >> j & 1;
        } else {
          passes = passes_relu<T>(total_of.at(xc, rc, j)) | !a.relu;
        }
        const float dy = passes ? static_cast<float>(grad_out[u].values[j]) : 0.0f;
        grad_x.values[j] = static_cast<T>(own.apply(dy, xc, total_of.bn.scale[k], j));
        if constexpr (kPlain) grad_residual.values[j] = static_cast<T>(dy);
        if constexpr (kDual) {
          grad_residual.values[j] =
              static_cast<T>(other.apply(dy, rc, total_of.residual_bn.scale[k], j));
        }
      }
      store(vector_at<kWidth>(static_cast<T*>(a.grad_x), walk.element(u)), grad_x);
      if constexpr (kResidual != Residual::kNone) {
        store(vector_at<kWidth>(static_cast<T*>(a.grad_residual), walk.element(u)), grad_residual);
      }
    }
  }
}

// ---- Launchers ----

// What the operators are given. mask, residual and its batch norm count where the kind of residual
// has them.
struct BackwardTensors {
  const char* op;
  const Tensor &grad_out, &x;
  const OptionalTensor& mask;
  Residual kind;
  const OptionalTensor& residual;
  bool relu;

  bool dual() const { return kind == Residual::kBatchNorm; }
  bool needs_mask() const { return relu && kind == Residual::kPlain; }
};

// One batch norm of them.
struct BranchTensors {
  const char* prefix;  // of the names in messages
  const OptionalTensor &weight, &bias, &mean, &invstd;
  bool training;
};

void check_backward(const BackwardTensors& t, const BranchTensors& other) {
  check_activation(t.op, "x", t.x);
  check_like(t.op, "grad_out", t.grad_out, "x", t.x);
  if (!t.dual()) return;
  RESNET_FUSED_CHECK(t.residual && other.mean && other.invstd, t.op,
                     ": residual, residual_mean and residual_invstd must be given with "
                     "residual_bn, got None");
  check_like(t.op, "residual", *t.residual, "x", t.x);
}

void check_has_residual(const char* op, bool has_residual, bool residual_bn) {
  RESNET_FUSED_CHECK(has_residual || !residual_bn, op,
                     ": has_residual must be True with residual_bn, got False");
}

Residual kind_of(bool has_residual, bool residual_bn) {
  if (residual_bn) return Residual::kBatchNorm;
  return has_residual ? Residual::kPlain : Residual::kNone;
}

void check_mask(const BackwardTensors& t, const Activation& activation) {
  if (!t.needs_mask()) return;
  RESNET_FUSED_CHECK(t.mask.has_value(), t.op,
                     ": mask must be given with relu and a plain residual, got None "
                     "(save_mask=True in the forward keeps it)");
  const std::array<int64_t, 2> shape = activation.mask_shape();
  RESNET_FUSED_CHECK(t.mask->device() == t.x.device() && t.mask->is_contiguous() &&
                         t.mask->scalar_type() == ScalarType::Byte && t.mask->dim() == 2 &&
                         t.mask->size(0) == shape[0] && t.mask->size(1) == shape[1],
                     t.op, ": mask must be the contiguous uint8 tensor of shape ", to_string(shape),
                     " that the forward returned, got shape ", to_string(t.mask->sizes()));
}

BranchBackward branch_of(const BackwardTensors& t, const BranchTensors& branch) {
  const std::string prefix = branch.prefix;
  BranchBackward result{};
  result.bn = {channel_vector(t.op, prefix + "mean", branch.mean, t.x),
               channel_vector(t.op, prefix + "invstd", branch.invstd, t.x),
               false,
               0.0f,
               channel_vector(t.op, prefix + "weight", branch.weight, t.x),
               channel_vector(t.op, prefix + "bias", branch.bias, t.x)};
  result.training = branch.training;
  return result;
}

// Checked, and without what the kernels write.
BackwardArguments arguments_of(const BackwardTensors& t, const BranchTensors& own,
                               const BranchTensors& other, const Activation& activation) {
  check_mask(t, activation);
  BackwardArguments a{};
  a.grad_out = t.grad_out.const_data_ptr();
  a.x = t.x.const_data_ptr();
  a.residual = t.dual() ? t.residual->const_data_ptr() : nullptr;
  a.mask = t.needs_mask() ? static_cast<const uint8_t*>(t.mask->const_data_ptr()) : nullptr;
  a.own = branch_of(t, own);
  if (t.dual()) a.other = branch_of(t, other);
  a.relu = t.relu;
  return a;
}

// As all activations of a call lie in memory; grad_residual: may be empty.
Activation activation_of(const BackwardTensors& t, const void* grad_x, const void* grad_residual) {
  return Activation(t.x, address(t.grad_out.const_data_ptr()) | address(t.x.const_data_ptr()) |
                             address(t.dual() ? t.residual->const_data_ptr() : nullptr) |
                             address(grad_x) | address(grad_residual));
}

template <Residual kResidual>
void launch_reduction_of(const char* op, const Tensor& x, const Activation& activation,
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

void launch_reduction(const BackwardTensors& t, const Activation& activation,
                      const BackwardArguments& a, bool with_gradients, cudaStream_t stream) {
  const auto launch = [&](auto kind) {
    launch_reduction_of<kind()>(t.op, t.x, activation, a, with_gradients, stream);
  };
  if (t.kind == Residual::kNone) return launch(Constant<Residual::kNone>{});
  if (t.kind == Residual::kPlain) return launch(Constant<Residual::kPlain>{});
  launch(Constant<Residual::kBatchNorm>{});
}

void launch_gradients(const BackwardTensors& t, const Activation& activation, Residual kind,
                      const BackwardArguments& a, cudaStream_t stream) {
  const LaunchShape shape(activation, gradients_spread(t.dual()), t.x.get_device_index());
  dispatch_activation(t.op, t.x, activation, [&](auto element, auto layout) {
    using T = decltype(element);
    using Layout = decltype(layout);
    const auto launch = [&](auto kind_) {
      RESNET_FUSED_LAUNCH((gradients_kernel<T, Layout, kind_()>), shape.grid, shape.block, 0,
                          stream, shape.extent, a);
    };
    if (kind == Residual::kNone) return launch(Constant<Residual::kNone>{});
    if (kind == Residual::kPlain) return launch(Constant<Residual::kPlain>{});
    launch(Constant<Residual::kBatchNorm>{});
  });
}

// Gradients of weight and bias in the dtype of the weight.
std::pair<Tensor, Tensor> allocate_parameter_gradients(const Tensor& x,
                                                       const OptionalTensor& weight) {
  const int32_t dtype = weight ? dtype_code(*weight) : aoti_torch_dtype_float32();
  return {allocate_vector(x, x.size(1), dtype), allocate_vector(x, x.size(1), dtype)};
}

Tensor allocate_grad_residual(const BackwardTensors& t) {
  return t.kind == Residual::kNone ? allocate_vector(t.x, 0, dtype_code(t.x)) : allocate_like(t.x);
}

void* data_of(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BackwardResult bn_relu_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& /*out*/,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu) {
  const BackwardTensors t{"bn_relu_backward", grad_out, x, mask, kind_of(has_residual, residual_bn),
                          residual,           relu};
  const OptionalTensor own_mean = mean, own_invstd = invstd;
  const BranchTensors own{"", weight, bias, own_mean, own_invstd, training};
  const BranchTensors other{"residual_",   residual_weight, residual_bias,
                            residual_mean, residual_invstd, residual_training};
  check_has_residual(t.op, has_residual, residual_bn);
  check_backward(t, other);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Tensor grad_x = allocate_like(x), grad_residual = allocate_grad_residual(t);
  auto [grad_weight, grad_bias] = allocate_parameter_gradients(x, weight);
  const int32_t dtype = dtype_code(grad_weight);
  std::pair<Tensor, Tensor> residual_grads{allocate_vector(x, 0, dtype),
                                           allocate_vector(x, 0, dtype)};
  if (residual_bn) residual_grads = allocate_parameter_gradients(x, residual_weight);

  const Activation activation = activation_of(t, data_of(grad_x), data_of(grad_residual));
  BackwardArguments a = arguments_of(t, own, other, activation);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_residual = data_of(grad_residual);
  a.own.grad_weight = mutable_channel_vector(grad_weight);
  a.own.grad_bias = mutable_channel_vector(grad_bias);
  if (residual_bn) {
    a.other.grad_weight = mutable_channel_vector(residual_grads.first);
    a.other.grad_bias = mutable_channel_vector(residual_grads.second);
  }
  const bool two_passes = training || (residual_bn && residual_training);
  const int64_t sums = residual_bn ? 3 : 2;
  const Tensor averages =
      allocate_vector(x, two_passes ? sums * x.size(1) : 0, aoti_torch_dtype_float32());
  if (two_passes) {
    a.quotients = static_cast<float*>(averages.mutable_data_ptr());
    a.averages = a.quotients;
    a.divisor = static_cast<float>(activation.values_per_channel());
  }
  if (x.size(1) > 0) {
    launch_reduction(t, activation, a, !two_passes, stream);
    Residual kind = t.kind;
    if (kind == Residual::kPlain) {  // the reduction has applied the mask to it
      a.grad_out = a.grad_residual;
      a.relu = false;
      kind = Residual::kNone;
    }
    if (two_passes) launch_gradients(t, activation, kind, a, stream);
  }
  return {grad_x,        grad_weight,          grad_bias,
          grad_residual, residual_grads.first, residual_grads.second};
}

Tensor bn_relu_backward_sums_cuda(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& out, const OptionalTensor& mask,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& invstd, const OptionalTensor& residual, bool residual_bn,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_invstd, bool relu) {
  // Mask or output come from a forward with a residual.
  const bool has_residual = mask || out;
  const BackwardTensors t{"bn_relu_backward_sums",
                          grad_out,
                          x,
                          mask,
                          kind_of(has_residual, residual_bn),
                          residual,
                          relu};
  const OptionalTensor own_mean = mean, own_invstd = invstd;
  const BranchTensors own{"", weight, bias, own_mean, own_invstd, false};
  const BranchTensors other{"residual_",   residual_weight, residual_bias,
                            residual_mean, residual_invstd, false};
  check_backward(t, other);
  const DeviceGuard guard(x.get_device_index());
  const std::array<int64_t, 2> shape = {residual_bn ? 3 : 2, x.size(1)};
  const std::array<int64_t, 2> strides = {x.size(1), 1};
  const Tensor sums = allocate_like(x, shape, strides, aoti_torch_dtype_float32());
  const Activation activation = activation_of(t, nullptr, nullptr);
  BackwardArguments a = arguments_of(t, own, other, activation);
  a.quotients = static_cast<float*>(sums.mutable_data_ptr());
  a.divisor = 1;
  if (x.size(1) > 0) launch_reduction(t, activation, a, false, current_stream(x));
  return sums;
}

std::tuple<Tensor, Tensor> bn_relu_backward_apply_cuda(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& /*out*/,
    const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& residual_bias, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu,
    const Tensor& averages) {
  const BackwardTensors t{"bn_relu_backward_apply",           grad_out, x,   mask,
                          kind_of(has_residual, residual_bn), residual, relu};
  const OptionalTensor own_mean = mean, own_invstd = invstd;
  const BranchTensors own{"", weight, bias, own_mean, own_invstd, training};
  const BranchTensors other{"residual_",   residual_weight, residual_bias,
                            residual_mean, residual_invstd, residual_training};
  check_has_residual(t.op, has_residual, residual_bn);
  check_backward(t, other);
  const int64_t rows = residual_bn ? 3 : 2;
  RESNET_FUSED_CHECK(averages.device() == x.device() && averages.is_contiguous() &&
                         averages.scalar_type() == ScalarType::Float && averages.dim() == 2 &&
                         averages.size(0) == rows && averages.size(1) == x.size(1),
                     t.op, ": averages must be a contiguous float32 tensor of shape (", rows, ", ",
                     x.size(1), ") on the device of x, got shape ", to_string(averages.sizes()));
  const DeviceGuard guard(x.get_device_index());
  const Tensor grad_x = allocate_like(x), grad_residual = allocate_grad_residual(t);
  const Activation activation = activation_of(t, data_of(grad_x), data_of(grad_residual));
  BackwardArguments a = arguments_of(t, own, other, activation);
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_residual = data_of(grad_residual);
  a.averages = static_cast<const float*>(averages.const_data_ptr());
  if (x.size(1) > 0) launch_gradients(t, activation, t.kind, a, current_stream(x));
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bn_relu_backward", TORCH_BOX(&resnet_fused::bn_relu_backward_cuda));
  m.impl("bn_relu_backward_sums", TORCH_BOX(&resnet_fused::bn_relu_backward_sums_cuda));
  m.impl("bn_relu_backward_apply", TORCH_BOX(&resnet_fused::bn_relu_backward_apply_cuda));
}
