// What is per channel: parameters, statistics and their gradients, in whatever dtype they are kept.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/activation.h"

namespace resnet_fused {

// A (C,) tensor of any floating dtype and stride; without data every value is missing.
struct ChannelVector {
  void* data = nullptr;
  int64_t stride = 1;
  ScalarType dtype = ScalarType::Float;

  // Of kChannels neighbouring channels.
  template <int kChannels>
  __device__ void get(int64_t first, float missing, float (&values)[kChannels]) const {
    if (data == nullptr) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) values[k] = missing;
      return;
    }
    with_element_type([&](auto* p) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        values[k] = static_cast<float>(load(p + (first + k) * stride));
      }
    });
  }

  template <int kChannels>
  __device__ void set(int64_t first, const float (&values)[kChannels]) const {
    if (data == nullptr) return;
    with_element_type([&](auto* p) {
      using T = std::remove_reference_t<decltype(*p)>;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        store(p + (first + k) * stride, static_cast<T>(values[k]));
      }
    });
  }

 private:
  template <class Body>
  __device__ void with_element_type(Body body) const {
    switch (dtype) {
      case ScalarType::Half:
        return body(static_cast<torch::headeronly::Half*>(data));
      case ScalarType::BFloat16:
        return body(static_cast<torch::headeronly::BFloat16*>(data));
      case ScalarType::Double:
        return body(static_cast<double*>(data));
      default:
        return body(static_cast<float*>(data));
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

  template <int kChannels>
  __device__ void get_invstd(int64_t first, float (&values)[kChannels]) const {
    invstd_or_var.get(first, 1.0f, values);
    if (!has_variance) return;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) values[k] = 1 / sqrtf(values[k] + eps);
  }
};

// For neighbouring channels: what a batch norm normalises by, where there is room to keep it.
template <int kChannels>
__device__ inline void write_statistics(const BatchNorm& bn, int64_t first, float* mean,
                                        float* invstd) {
  if (mean == nullptr) return;
  float means[kChannels], invstds[kChannels];
  bn.mean.get(first, 0.0f, means);
  bn.get_invstd(first, invstds);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    store(mean + first + k, means[k]);
    store(invstd + first + k, invstds[k]);
  }
}

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

  __device__ void read(const BatchNorm& bn, int64_t first) {
    float weight[kChannels];
    bn.mean.get(first, 0.0f, mean);
    bn.get_invstd(first, scale);
    bn.weight.get(first, 1.0f, weight);
    bn.bias.get(first, 0.0f, bias);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) scale[k] *= weight[k];
  }

  // j: position in the thread's vector, which is all of one channel if kChannels is 1.
  __device__ float centered(float x, int j) const { return x - mean[j % kChannels]; }
};

// What goes into the ReLU: the sum of a batch norm and, in a dual one, that of the residual.
// Forward and backward get bit-equal totals from it, so that its sign can be computed again.
template <int kChannels, bool kDual>
struct Total {
  Affine<kChannels> bn, residual_bn;

  __device__ void read(const BatchNorm& own, const BatchNorm& of_residual, int64_t first) {
    bn.read(own, first);
    if constexpr (kDual) {
      residual_bn.read(of_residual, first);
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

inline void check_channels(const char* op, const std::string& name, const Tensor& t,
                           const Tensor& x) {
  RESNET_FUSED_CHECK(t.device() == x.device(), op, ": ", name, " must be on the device of x");
  RESNET_FUSED_CHECK(t.dim() == 1 && t.size(0) == x.size(1), op, ": ", name,
                     " must have one value for each channel of x, shape (", x.size(1),
                     ",), got shape ", to_string(t.sizes()));
  dispatch_floating(op, name.c_str(), t.scalar_type(), [](auto) {});
}

// To be read only.
inline ChannelVector channel_vector(const char* op, const std::string& name,
                                    const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  check_channels(op, name, *t, x);
  return {const_cast<void*>(t->const_data_ptr()), t->stride(0), t->scalar_type()};
}

// To be written as well.
inline ChannelVector mutable_channel_vector(const OptionalTensor& t) {
  if (!t) return {};
  return {t->mutable_data_ptr(), t->stride(0), t->scalar_type()};
}

}  // namespace resnet_fused
