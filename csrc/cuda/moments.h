// Count, mean and variance of values that are seen in pieces.
#pragma once

#include "cuda/activation.h"

namespace resnet_fused {

// Count, mean and sum of squared deviations from the mean (M2), of each channel of a thread. Chan,
// Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances",
// 1979.
template <int kChannels>
struct Moments {
  static constexpr int kValues = 1 + 2 * kChannels;
  float values[kValues] = {};  // count, means, M2s

  __device__ float& count() { return values[0]; }
  __device__ float& mean(int k) { return values[1 + k]; }
  __device__ float& m2(int k) { return values[1 + kChannels + k]; }

  static __device__ void combine(float (&a)[kValues], const float (&b)[kValues]) {
    const float count = a[0] + b[0];
    if (b[0] == 0) return;
    const float weight = b[0] / count;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const float difference = b[1 + k] - a[1 + k];
      a[1 + kChannels + k] += fmaf(difference * difference, a[0] * weight, b[1 + kChannels + k]);
      a[1 + k] = fmaf(difference, weight, a[1 + k]);
    }
    a[0] = count;
  }

  // Adds the rows of a tile that are valid. Sums are taken around the mean so far, or the first
  // value of all: what is subtracted from the sum of squares is then never nearly all of it,
  // wherever the mean lies.
  template <class T, int kWidth, int kUnroll, class AnyWalk>
  __device__ void add(const Vector<T, kWidth> (&vectors)[kUnroll], const AnyWalk& walk) {
    if (count() == 0) {
#pragma unroll
      for (int u = kUnroll - 1; u >= 0; --u) {
        if (!walk.valid(u)) continue;
#pragma unroll
        for (int k = 0; k < kChannels; ++k) mean(k) = static_cast<float>(vectors[u].values[k]);
      }
    }
    float sum[kChannels] = {}, squares[kChannels] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!walk.valid(u)) continue;
      count() += kWidth / kChannels;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int k = j % kChannels;
        const float difference = static_cast<float>(vectors[u].values[j]) - mean(k);
        sum[k] += difference;
        squares[k] = fmaf(difference, difference, squares[k]);
      }
    }
    const float inverse = count() > 0 ? 1 / count() : 0;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const float step = sum[k] * inverse;
      mean(k) += step;
      m2(k) += fmaf(-sum[k], step, squares[k]);
    }
  }
};

}  // namespace resnet_fused
