// What batch norms normalise by, as launchers get it.
#pragma once

#include "cuda/channels.h"

namespace resnet_fused {

// One batch norm as the operator is given it; `prefix` goes before the names in messages.
struct BatchNormTensors {
  const char* prefix;
  const OptionalTensor &weight, &bias, &running_mean, &running_var;
  bool training;
  double momentum, eps;
};

// mean and invstd are what the operator returns: (C,) in float32.
struct Statistics {
  Tensor mean, invstd;
  BatchNorm bn;

  // For the kernel that applies them to write, which is to compute invstd then; null in training.
  float* unwritten(const Tensor& t) const {
    return bn.has_variance ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  }
};

// Checks the tensors. In training it launches what computes the statistics of x and updates the
// running ones.
Statistics normalisation(const char* op, const Tensor& x, const BatchNormTensors& bn);

}  // namespace resnet_fused
