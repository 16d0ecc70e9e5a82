// Batch norm with optional residual, batch norm of the residual, and ReLU: forward.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "cuda/activation.h"
#include "cuda/channels.h"
#include "cuda/conv_operands.h"
#include "cuda/moments.h"
#include "cuda/reduction.h"
#include "cuda/statistics.h"

namespace resnet_fused {
namespace {

// ---- Statistics ----
// Reads x, sizeof(T) per element.

// One wave: every block leaves partial results behind.
constexpr Spread kStatisticsSpread = {
    .max_lanes = 16, .unroll = 4, .resident_blocks = 2, .waves = 1, .min_tiles = 2};

// One batch norm in training: its input, results, and room for the blocks of a column to meet. Of
// invstd and M2, what is null is not wanted.
struct StatisticsBranch {
  const void* x;
  float *mean, *invstd, *m2;
  ChannelVector running_mean, running_var;
  float momentum, eps;
  float *counts, *means, *m2s;  // of the blocks: (columns, splits), (splits, C), (splits, C)
  unsigned* finished;           // (columns,)

  template <int kChannels>
  __device__ void write(int64_t first, Moments<kChannels>& moments) const {
    const float count = moments.count();
    float means[kChannels], unbiased[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      means[k] = moments.mean(k);
      unbiased[k] = moments.m2(k) / (count - 1);
      store(mean + first + k, means[k]);
      if (invstd != nullptr) store(invstd + first + k, 1 / sqrtf(moments.m2(k) / count + eps));
      if (m2 != nullptr) store(m2 + first + k, moments.m2(k));
    }
    update(running_mean, first, means);
    update(running_var, first, unbiased);
  }

 private:
  template <int kChannels>
  __device__ void update(const ChannelVector& running, int64_t first,
                         const float (&batch)[kChannels]) const {
    float values[kChannels];
    running.get(first, 0.0f, values);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      values[k] = fmaf(momentum, batch[k], (1 - momentum) * values[k]);
    }
    running.set(first, values);
  }
};

// Mean and invstd of every channel, and the running statistics. blockIdx.z chooses the branch.
template <class T, class Layout>
__global__ void __launch_bounds__(kThreads, kStatisticsSpread.resident_blocks)
    statistics_kernel(const __grid_constant__ Extent extent,
                      const __grid_constant__ StatisticsBranch own,
                      const __grid_constant__ StatisticsBranch of_residual) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  constexpr int kUnroll = kStatisticsSpread.unroll;
  using M = Moments<kChannels>;
  RESNET_FUSED_SHARED(float, shared, reduction_size(M::kValues));
  RESNET_FUSED_SHARED(unsigned, flag, 1);
  const StatisticsBranch& branch = blockIdx.z == 0 ? own : of_residual;

  M moments;
  for (Walk<Layout, kUnroll, false> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> vectors[kUnroll];
    load_tile(branch.x, walk, vectors);
    moments.add(vectors, walk);
  }
  reduce_rows(moments.values, shared, M::combine);

  const int64_t first = Layout::first_channel();
  const bool writes = threadIdx.y == 0 && first < extent.channels;
  if (gridDim.y > 1) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * gridDim.y;
    if (writes) {
      const int64_t at = blockIdx.y * extent.channels + first;
      if (threadIdx.x == 0) store(branch.counts + column + blockIdx.y, moments.count());
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        store(branch.means + at + k, moments.mean(k));
        store(branch.m2s + at + k, moments.m2(k));
      }
    }
    if (!is_last_of_column(branch.finished + blockIdx.x, flag)) return;
    moments = M();
    for (unsigned split = threadIdx.y; split < gridDim.y; split += blockDim.y) {
      if (first >= extent.channels) continue;
      const int64_t at = split * extent.channels + first;
      M other;
      other.count() = load(branch.counts + column + split);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        other.mean(k) = load(branch.means + at + k);
        other.m2(k) = load(branch.m2s + at + k);
      }
      M::combine(moments.values, other.values);
    }
    reduce_rows(moments.values, shared, M::combine);
  }
  if (writes) branch.write(first, moments);
}

// ---- Apply ----
// Reads x (and the residual) and writes out, sizeof(T) each per element, and 1 bit of mask.

// As many loads in flight whether there are two tensors to read or one.
constexpr Spread apply_spread(bool has_residual) {
  return {.max_lanes = 32,
          .unroll = has_residual ? 2 : 4,
          .resident_blocks = 2,
          .waves = 4,
          .min_tiles = 1};
}

struct ApplyArguments {
  const void *x, *residual;
  void* out;
  uint8_t* mask;
  BatchNorm bn, residual_bn;
  // Where invstd is computed from variances: what the operator returns of it. Else null.
  float *mean, *invstd, *residual_mean, *residual_invstd;
  bool relu;
};

// Bits of one vector, put into the byte that neighbouring threads share with it. All threads call.
template <int kWidth>
__device__ inline void store_mask(uint8_t* mask, int64_t byte, int shift, unsigned bits,
                                  bool valid) {
  if constexpr (kWidth < kMaskBits) {
    bits = valid ? bits << shift : 0;
#pragma unroll
    for (int lanes = 1; lanes * kWidth < kMaskBits; lanes *= 2) {
      bits |= __shfl_xor_sync(~0u, bits, lanes);
    }
    valid = valid && shift == 0;
  }
  if (valid) store(mask + byte, static_cast<uint8_t>(bits));
}

template <class T, class Layout, Residual kResidual, bool kSaveMask>
__global__ void __launch_bounds__(kThreads,
                                  apply_spread(kResidual != Residual::kNone).resident_blocks)
    apply_kernel(const __grid_constant__ Extent extent, const __grid_constant__ ApplyArguments a) {
  constexpr int kChannels = Layout::kChannels, kWidth = Layout::kWidth;
  constexpr int kUnroll = apply_spread(kResidual != Residual::kNone).unroll;
  const int64_t first = Layout::first_channel();
  constexpr bool kDual = kResidual == Residual::kBatchNorm;
  Total<kChannels, kDual> total_of;
  if (first < extent.channels) {
    total_of.read(a.bn, a.residual_bn, first);
    if (blockIdx.y == 0 && threadIdx.y == 0) {
      write_statistics<kChannels>(a.bn, first, a.mean, a.invstd);
      write_statistics<kChannels>(a.residual_bn, first, a.residual_mean, a.residual_invstd);
    }
  }
  for (Walk<Layout, kUnroll, true> walk(extent); walk.inside(); walk.next()) {
    Vector<T, kWidth> x[kUnroll], residual[kUnroll];
    load_tile(a.x, walk, x);
    if constexpr (kResidual != Residual::kNone) load_tile(a.residual, walk, residual);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unsigned bits = 0;
      if (walk.valid(u)) {
        Vector<T, kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const float xc = total_of.bn.centered(static_cast<float>(x[u].values[j]), j);
          float r = 0;
          if constexpr (kResidual != Residual::kNone) r = static_cast<float>(residual[u].values[j]);
          if constexpr (kDual) r = total_of.residual_bn.centered(r, j);
          float total = total_of.at(xc, r, j);
          if constexpr (kResidual == Residual::kPlain) total += r;
          const bool passes = passes_relu<T>(total);
          if constexpr (kSaveMask) bits |= static_cast<unsigned>(passes) << j;
          out.values[j] = static_cast<T>(passes || !a.relu ? total : 0.0f);
        }
        store(vector_at<kWidth>(static_cast<T*>(a.out), walk.element(u)), out);
      }
      if constexpr (kSaveMask) {
        store_mask<kWidth>(a.mask, walk.mask_byte(u), walk.mask_shift(u), bits, walk.valid(u));
      }
    }
  }
}

// ---- Launchers ----

Statistics check_branch(const char* op, const Tensor& x, const BatchNormTensors& bn) {
  const std::string prefix = bn.prefix;
  const ChannelVector weight = channel_vector(op, prefix + "weight", bn.weight, x);
  const ChannelVector bias = channel_vector(op, prefix + "bias", bn.bias, x);
  const ChannelVector mean = channel_vector(op, prefix + "running_mean", bn.running_mean, x);
  const ChannelVector var = channel_vector(op, prefix + "running_var", bn.running_var, x);
  const float eps = static_cast<float>(bn.eps);
  RESNET_FUSED_CHECK(bn.training || (bn.running_mean && bn.running_var), op, ": ", prefix,
                     "running_mean and ", prefix,
                     "running_var must be given when not training, got None");
  const int64_t values = x.size(0) * x.size(2) * x.size(3);
  RESNET_FUSED_CHECK(!bn.training || values > 1, op,
                     ": expected more than 1 value per channel when training, got input size ",
                     to_string(x.sizes()));
  const int32_t float32 = aoti_torch_dtype_float32();
  Statistics result{allocate_vector(x, x.size(1), float32), allocate_vector(x, x.size(1), float32),
                    BatchNorm{mean, var, true, eps, weight, bias}};
  if (bn.training) {
    result.bn.mean = mutable_channel_vector(result.mean);
    result.bn.invstd_or_var = mutable_channel_vector(result.invstd);
    result.bn.has_variance = false;
  }
  return result;
}

StatisticsBranch branch_of(const Tensor& x, const BatchNormTensors& bn, const Statistics& s) {
  StatisticsBranch branch{};
  branch.x = x.const_data_ptr();
  branch.mean = static_cast<float*>(s.mean.mutable_data_ptr());
  branch.invstd = static_cast<float*>(s.invstd.mutable_data_ptr());
  branch.running_mean = mutable_channel_vector(bn.running_mean);
  branch.running_var = mutable_channel_vector(bn.running_var);
  branch.momentum = static_cast<float>(bn.momentum);
  branch.eps = static_cast<float>(bn.eps);
  return branch;
}

void launch_statistics(const char* op, const Tensor& x, const Activation& activation,
                       StatisticsBranch* branches, unsigned count, cudaStream_t stream) {
  LaunchShape shape(activation, kStatisticsSpread, x.get_device_index());
  if (shape.extent.channels == 0) return;
  shape.grid.z = count;
  const int64_t columns = shape.grid.x, splits = shape.splits(), channels = x.size(1);
  const int64_t words = columns + columns * splits + 2 * splits * channels;
  Tensor workspace = allocate_vector(x, splits > 1 ? count * words : 0, aoti_torch_dtype_float32());
  float* memory = static_cast<float*>(workspace.mutable_data_ptr());
  if (splits > 1) {
    for (unsigned i = 0; i < count; ++i) {
      branches[i].finished = reinterpret_cast<unsigned*>(memory) + i * columns;
      branches[i].counts = memory + count * columns + i * columns * splits;
      branches[i].means = memory + count * columns * (1 + splits) + 2 * i * splits * channels;
      branches[i].m2s = branches[i].means + splits * channels;
    }
    zero_async(memory, count * columns * sizeof(unsigned), stream);
  }
  dispatch_activation(op, x, activation, [&](auto element, auto layout) {
    RESNET_FUSED_LAUNCH((statistics_kernel<decltype(element), decltype(layout)>), shape.grid,
                        shape.block, 0, stream, shape.extent, branches[0], branches[count - 1]);
  });
}

void launch_apply(const char* op, const Tensor& x, const Activation& activation, Residual residual,
                  const ApplyArguments& arguments, cudaStream_t stream) {
  const LaunchShape shape(activation, apply_spread(residual != Residual::kNone),
                          x.get_device_index());
  if (shape.extent.channels == 0) return;
  dispatch_activation(op, x, activation, [&](auto element, auto layout) {
    using T = decltype(element);
    using Layout = decltype(layout);
    const auto launch = [&](auto kind, auto save_mask) {
      RESNET_FUSED_LAUNCH((apply_kernel<T, Layout, kind(), save_mask()>), shape.grid, shape.block,
                          0, stream, shape.extent, arguments);
    };
    if (residual == Residual::kNone) {
      launch(Constant<Residual::kNone>{}, Constant<false>{});
    } else if (residual == Residual::kBatchNorm) {
      launch(Constant<Residual::kBatchNorm>{}, Constant<false>{});
    } else if (arguments.mask == nullptr) {
      launch(Constant<Residual::kPlain>{}, Constant<false>{});
    } else {
      launch(Constant<Residual::kPlain>{}, Constant<true>{});
    }
  });
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult bn_relu_cuda(const Tensor& x, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& running_mean,
                           const OptionalTensor& running_var, bool training, double momentum,
                           double eps, const OptionalTensor& residual, bool residual_bn,
                           const OptionalTensor& residual_weight,
                           const OptionalTensor& residual_bias,
                           const OptionalTensor& residual_running_mean,
                           const OptionalTensor& residual_running_var, bool residual_training,
                           double residual_momentum, double residual_eps, bool relu,
                           bool save_mask) {
  const char* op = "bn_relu";
  check_activation(op, "x", x);
  if (residual) check_like(op, "residual", *residual, "x", x);
  RESNET_FUSED_CHECK(residual || !residual_bn, op,
                     ": residual must be given with residual_bn, got None");
  RESNET_FUSED_CHECK(!save_mask || (relu && residual && !residual_bn), op,
                     ": save_mask must come with relu and a residual without residual_bn");
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const BatchNormTensors own_tensors{"",          weight,   bias,     running_mean,
                                     running_var, training, momentum, eps};
  const BatchNormTensors other_tensors{
      "residual_",          residual_weight,   residual_bias,     residual_running_mean,
      residual_running_var, residual_training, residual_momentum, residual_eps};
  const Statistics own = check_branch(op, x, own_tensors);
  const int32_t float32 = aoti_torch_dtype_float32();
  Statistics other{allocate_vector(x, 0, float32), allocate_vector(x, 0, float32), BatchNorm{}};
  if (residual_bn) other = check_branch(op, *residual, other_tensors);

  Tensor out = allocate_like(x);
  const uintptr_t addresses =
      address(x.const_data_ptr()) | address(data_or_null(residual)) | address(out.const_data_ptr());
  const Activation activation(x, addresses);
  StatisticsBranch branches[2];
  unsigned count = 0;
  if (training) branches[count++] = branch_of(x, own_tensors, own);
  if (residual_bn && residual_training) {
    branches[count++] = branch_of(*residual, other_tensors, other);
  }
  if (count > 0) launch_statistics(op, x, activation, branches, count, stream);

  const std::array<int64_t, 2> mask_shape = activation.mask_shape();
  const std::array<int64_t, 2> mask_strides = {mask_shape[1], 1};
  Tensor mask = save_mask ? allocate_like(x, mask_shape, mask_strides, aoti_torch_dtype_uint8())
                          : allocate_vector(x, 0, aoti_torch_dtype_uint8());
  ApplyArguments a{};
  a.x = x.const_data_ptr();
  a.residual = data_or_null(residual);
  a.out = out.mutable_data_ptr();
  a.mask = save_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  a.bn = own.bn;
  a.residual_bn = other.bn;
  a.mean = own.unwritten(own.mean);
  a.invstd = own.unwritten(own.invstd);
  a.residual_mean = other.unwritten(other.mean);
  a.residual_invstd = other.unwritten(other.invstd);
  a.relu = relu;
  const Residual kind = residual_bn ? Residual::kBatchNorm
                        : residual  ? Residual::kPlain
                                    : Residual::kNone;
  launch_apply(op, x, activation, kind, a, stream);
  return {out, own.mean, own.invstd, other.mean, other.invstd, mask};
}

std::tuple<Tensor, Tensor> bn_statistics_cuda(const Tensor& x) {
  const char* op = "bn_statistics";
  check_activation(op, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const int32_t float32 = aoti_torch_dtype_float32();
  const Tensor mean = allocate_vector(x, x.size(1), float32);
  const Tensor m2 = allocate_vector(x, x.size(1), float32);
  StatisticsBranch branch{};
  branch.x = x.const_data_ptr();
  branch.mean = static_cast<float*>(mean.mutable_data_ptr());
  branch.m2 = static_cast<float*>(m2.mutable_data_ptr());
  const Activation activation(x, address(branch.x));
  launch_statistics(op, x, activation, &branch, 1, current_stream(x));
  return {mean, m2};
}

Tensor bn_relu_apply_cuda(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& mean, const Tensor& invstd, bool relu) {
  const char* op = "bn_relu_apply";
  check_activation(op, "x", x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = allocate_like(x);
  ApplyArguments a{};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.bn.mean = channel_vector(op, "mean", mean, x);
  a.bn.invstd_or_var = channel_vector(op, "invstd", invstd, x);
  a.bn.weight = channel_vector(op, "weight", weight, x);
  a.bn.bias = channel_vector(op, "bias", bias, x);
  a.relu = relu;
  const Activation activation(x, address(a.x) | address(a.out));
  launch_apply(op, x, activation, Residual::kNone, a, current_stream(x));
  return out;
}

}  // namespace

Statistics normalisation(const char* op, const Tensor& x, const BatchNormTensors& bn) {
  const Statistics result = check_branch(op, x, bn);
  if (bn.training) {
    StatisticsBranch branch = branch_of(x, bn, result);
    const Activation activation(x, address(x.const_data_ptr()));
    launch_statistics(op, x, activation, &branch, 1, current_stream(x));
  }
  return result;
}

Tensor scale_shift_relu(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift) {
  Tensor out = allocate_like(x);
  ApplyArguments a{};
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.bn.weight = channel_vector(op, "scale", scale, x);
  a.bn.bias = channel_vector(op, "shift", shift, x);
  a.relu = true;
  const Activation activation(x, address(a.x) | address(a.out));
  launch_apply(op, x, activation, Residual::kNone, a, current_stream(x));
  return out;
}

}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("bn_relu", TORCH_BOX(&resnet_fused::bn_relu_cuda));
  m.impl("bn_relu_apply", TORCH_BOX(&resnet_fused::bn_relu_apply_cuda));
  m.impl("bn_statistics", TORCH_BOX(&resnet_fused::bn_statistics_cuda));
}
