// Batch norm on a CPU: its arguments, the statistics of a batch and the running ones.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {

// The arguments of one batch norm; `prefix` goes before their names in messages.
struct BatchNorm {
  const char* prefix;
  const OptionalTensor &weight, &bias, &running_mean, &running_var;
  bool training;
  double momentum, eps;
};

inline std::string name_of(const BatchNorm& bn, const char* argument) {
  return std::string(bn.prefix) + argument;
}

template <class A, class Value>
Tensor to_tensor(const std::vector<Value>& values) {
  Tensor t = empty_vector(static_cast<int64_t>(values.size()), arithmetic_dtype_code<A>());
  A* p = static_cast<A*>(t.mutable_data_ptr());
  for (const Value value : values) *p++ = static_cast<A>(value);
  return t;
}

// Mean and sum of squared differences from it, of every channel.
struct Moments {
  std::vector<double> mean, m2;
};

inline const void* offset(const void* p, int64_t elements, int64_t size) {
  return p ? static_cast<const char*>(p) + elements * size : nullptr;
}

inline void* offset(void* p, int64_t elements, int64_t size) {
  return p ? static_cast<char*>(p) + elements * size : nullptr;
}

// The first value of each channel, as the point that sums are taken around.
template <class A>
std::vector<A> first_values(const char* op, const Geometry& g, const Tensor& x) {
  std::vector<A> values(g.channels);
  const int64_t stride = g.channels_last ? 1 : g.plane;
  dispatch_floating(op, "x", x.scalar_type(), [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(x.const_data_ptr());
    for (int64_t c = 0; c < g.channels; ++c) values[c] = static_cast<A>(p[c * stride]);
  });
  return values;
}

// 0 where x is empty.
template <class A>
Moments batch_moments(const char* op, const Geometry& g, const Tensor& x, DType dtype) {
  if (g.values_per_channel() == 0) {
    return {std::vector<double>(g.channels), std::vector<double>(g.channels)};
  }
  const std::vector<A> first = first_values<A>(op, g, x);
  const std::vector<A> shift = expand<A>(g, [&](int64_t c) { return first[c]; });
  const int64_t size = static_cast<int64_t>(x.element_size());
  const void* px = x.const_data_ptr();
  const auto kernel = kernels().statistics[dtype];
  ChunkSums sum(g), sum_squares(g);
  g.for_each_chunk([&](int64_t chunk, int64_t element, const Matrix& m, int64_t column) {
    kernel(m, {offset(px, element, size), shift.data() + column, sum.at(chunk, column),
               sum_squares.at(chunk, column)});
  });
  Moments moments{sum.totals(), sum_squares.totals()};
  const double n = static_cast<double>(g.values_per_channel());
  for (int64_t c = 0; c < g.channels; ++c) {
    const double delta = moments.mean[c] / n;
    moments.m2[c] = std::max(moments.m2[c] - n * delta * delta, 0.0);
    moments.mean[c] = first[c] + delta;
  }
  return moments;
}

// What x is normalised by, for each channel, in the dtype of arithmetic.
template <class A>
struct Normalised {
  std::vector<A> mean, invstd, weight, bias;
};

// Updates the running statistics in training.
template <class A>
Normalised<A> normalise(const char* op, const Geometry& g, const Tensor& x, DType dtype,
                        const BatchNorm& bn) {
  const std::string mean_name = name_of(bn, "running_mean"), var_name = name_of(bn, "running_var");
  auto weight = read_channels<A>(op, name_of(bn, "weight").c_str(), bn.weight, g.channels, 1);
  auto bias = read_channels<A>(op, name_of(bn, "bias").c_str(), bn.bias, g.channels, 0);
  std::vector<A> mean(g.channels), invstd(g.channels);
  if (bn.training) {
    if (bn.running_mean) check_channels(op, mean_name.c_str(), *bn.running_mean, g.channels);
    if (bn.running_var) check_channels(op, var_name.c_str(), *bn.running_var, g.channels);
    const int64_t n = g.values_per_channel();
    STD_TORCH_CHECK(n > 1, op,
                    ": Expected more than 1 value per channel when training, got input size ",
                    to_string(x.sizes()));
    const Moments moments = batch_moments<A>(op, g, x, dtype);
    const double count = static_cast<double>(n);
    for (int64_t c = 0; c < g.channels; ++c) {
      mean[c] = static_cast<A>(moments.mean[c]);
      invstd[c] = static_cast<A>(1 / std::sqrt(moments.m2[c] / count + bn.eps));
    }
    if (bn.running_mean) {
      update_channels(op, mean_name.c_str(), *bn.running_mean, [&](int64_t c, double old) {
        return bn.momentum * moments.mean[c] + (1 - bn.momentum) * old;
      });
    }
    if (bn.running_var) {
      update_channels(op, var_name.c_str(), *bn.running_var, [&](int64_t c, double old) {
        return bn.momentum * moments.m2[c] / (count - 1) + (1 - bn.momentum) * old;
      });
    }
  } else {
    STD_TORCH_CHECK(bn.running_mean && bn.running_var, op, ": ", mean_name, " and ", var_name,
                    " must be given when not training, got None (use training=True)");
    mean = read_channels<A>(op, mean_name.c_str(), bn.running_mean, g.channels, 0);
    const auto var = read_channels<A>(op, var_name.c_str(), bn.running_var, g.channels, 0);
    for (int64_t c = 0; c < g.channels; ++c) {
      invstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(var[c]) + bn.eps));
    }
  }
  return {std::move(mean), std::move(invstd), std::move(weight), std::move(bias)};
}

// Per-channel values in the dtype of arithmetic, one for each column of a matrix.
template <class A>
struct Columns {
  std::vector<A> mean, scale, bias;

  Affine at(int64_t column) const {
    return {mean.data() + column, scale.data() + column, bias.data() + column};
  }
};

}  // namespace resnet_fused::cpu
