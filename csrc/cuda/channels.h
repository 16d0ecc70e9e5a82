// What is per channel: parameters, statistics and their gradients, in whatever dtype they are kept.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/activation.h"

namespace resnet_fused {

using OptionalTensor = std::optional<Tensor>;

// A (C,) tensor of any floating dtype and stride; without data every value is missing.
struct ChannelVector {
  void* data = nullptr;
  int64_t stride = 1;
  ScalarType dtype = ScalarType::Float;

  __device__ float get(int64_t c, float missing) const {
    if (data == nullptr) return missing;
    switch (dtype) {
      case ScalarType::Half:
        return load(static_cast<const torch::headeronly::Half*>(data) + c * stride);
      case ScalarType::BFloat16:
        return load(static_cast<const torch::headeronly::BFloat16*>(data) + c * stride);
      case ScalarType::Double:
        return static_cast<float>(load(static_cast<const double*>(data) + c * stride));
      default:
        return load(static_cast<const float*>(data) + c * stride);
    }
  }

  __device__ void set(int64_t c, float value) const {
    if (data == nullptr) return;
    switch (dtype) {
      case ScalarType::Half:
        return store(static_cast<torch::headeronly::Half*>(data) + c * stride,
                     torch::headeronly::Half(value));
      case ScalarType::BFloat16:
        return store(static_cast<torch::headeronly::BFloat16*>(data) + c * stride,
                     torch::headeronly::BFloat16(value));
      case ScalarType::Double:
        return store(static_cast<double*>(data) + c * stride, static_cast<double>(value));
      default:
        return store(static_cast<float*>(data) + c * stride, value);
    }
  }
};

// One batch norm as a kernel is given it: y = (x - mean) * invstd * weight + bias.
struct BatchNorm {
  ChannelVector mean;
  ChannelVector invstd_or_var;
  bool has_variance;  // then invstd = 1 / sqrt(var + eps)
  float eps;
  ChannelVector weight, bias;

  __device__ float invstd(int64_t c) const {
    const float value = invstd_or_var.get(c, 1.0f);
    return has_variance ? 1.0f / sqrtf(value + eps) : value;
  }
};

// The largest number that rounds to zero in T: a ReLU's output is positive above it.
template <class T>
constexpr float kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<torch::headeronly::Half> = 0x1p-25f;
template <>
inline constexpr float kRoundsToZero<torch::headeronly::BFloat16> = 0x1p-134f;

// Whether a gradient passes the ReLU of `total`. NaN passes, as in torch.relu.
template <class T>
__device__ inline bool passes_relu(float total) {
  return !(total <= kRoundsToZero<T>);
}

enum class Residual { kNone, kPlain, kBatchNorm };

// A batch norm for the channels of one thread, in registers. Forward and backward get bit-equal
// values of y from it, so that the sign of a ReLU can be computed again.
template <int kChannels>
struct Affine {
  float mean[kChannels], scale[kChannels], bias[kChannels];

  __device__ void read(const BatchNorm& bn, int64_t first_channel, int64_t channels) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int64_t c = first_channel + k;
      if (c >= channels) continue;
      mean[k] = bn.mean.get(c, 0.0f);
      scale[k] = bn.invstd(c) * bn.weight.get(c, 1.0f);
      bias[k] = bn.bias.get(c, 0.0f);
    }
  }

  // j: position in the thread's vector, which is all of one channel if kChannels is 1.
  __device__ float centered(float x, int j) const { return x - mean[j % kChannels]; }
};

// What goes into the ReLU: the sum of a batch norm and, in a dual one, that of the residual.
// Forward and backward get bit-equal totals from it, so that its sign can be computed again.
template <int kChannels, bool kDual>
struct Total {
  Affine<kChannels> bn, residual_bn;

  __device__ void read(const BatchNorm& own, const BatchNorm& of_residual, int64_t first_channel,
                       int64_t channels) {
    bn.read(own, first_channel, channels);
    if constexpr (kDual) {
      residual_bn.read(of_residual, first_channel, channels);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) bn.bias[k] += residual_bn.bias[k];
    }
  }

  // From the centred elements of x and, if dual, of the residual.
  __device__ float at(float xc, [[maybe_unused]] float rc, int j) const {
    const int k = j % kChannels;
    const float total = fmaf(xc, bn.scale[k], bn.bias[k]);
    if constexpr (kDual) return fmaf(rc, residual_bn.scale[k], total);
    return total;
  }
};

// ---- Host ----

inline ChannelVector channel_vector(const char* op, const std::string& name,
                                    const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  RESNET_FUSED_CHECK(t->device() == x.device(), op, ": ", name, " must be on the device of x");
  RESNET_FUSED_CHECK(t->dim() == 1 && t->size(0) == x.size(1), op, ": ", name,
                     " must have one value for each channel of x, shape (", x.size(1),
                     ",), got shape ", to_string(t->sizes()));
  const ScalarType dtype = t->scalar_type();
  dispatch_floating(op, name.c_str(), dtype, [](auto) {});
  return {t->mutable_data_ptr(), t->stride(0), dtype};
}

inline ChannelVector channel_vector(const Tensor& t) {
  return {t.mutable_data_ptr(), 1, t.scalar_type()};
}

inline const void* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace resnet_fused
