// Batch norm with optional residual, batch norm of the residual, and ReLU; its backward. Also in
// the pieces that statistics over several processes need.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "cpu/batch_norm.h"

namespace resnet_fused::cpu {
namespace {

template <class A>
Columns<A> make_columns(const Geometry& g, const Normalised<A>& bn) {
  // One rounding each, here and nowhere else: backward recomputes the same values.
  return {expand<A>(g, [&](int64_t c) { return bn.mean[c]; }),
          expand<A>(g, [&](int64_t c) { return bn.weight[c] * bn.invstd[c]; }),
          expand<A>(g, [&](int64_t c) { return bn.bias[c]; })};
}

template <class A>
Tensor apply(const Geometry& g, const Tensor& x, DType dtype, const Columns<A>& bn,
             const OptionalTensor& residual, const Columns<A>* residual_bn, bool relu) {
  Tensor out = allocate_like(x);
  const Residual kind = !residual ? kNoResidual : residual_bn ? kBatchNormResidual : kPlainResidual;
  const auto kernel = kernels().apply[dtype][kind][relu];
  const int64_t size = static_cast<int64_t>(x.element_size());
  const void* px = x.const_data_ptr();
  const void* pr = data_or_null(residual);
  void* po = out.mutable_data_ptr();
  g.for_each_matrix([&](int64_t element, const Matrix& m, int64_t column) {
    kernel(m, {offset(px, element, size), offset(pr, element, size), offset(po, element, size),
               bn.at(column), residual_bn ? residual_bn->at(column) : Affine{}});
  });
  return out;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
ForwardResult forward(const Tensor& x, DType dtype, const BatchNorm& bn,
                      const OptionalTensor& residual, bool has_residual_bn,
                      const BatchNorm& residual_bn, bool relu) {
  const Geometry g(x);
  const char* op = "bn_relu";
  const Normalised<A> own = normalise<A>(op, g, x, dtype, bn);
  const Columns<A> columns = make_columns(g, own);
  Normalised<A> other;
  Columns<A> residual_columns;
  if (has_residual_bn) {
    other = normalise<A>(op, g, *residual, dtype, residual_bn);
    residual_columns = make_columns(g, other);
  }
  Tensor out =
      apply(g, x, dtype, columns, residual, has_residual_bn ? &residual_columns : nullptr, relu);
  const Tensor mask = empty_vector(0, aoti_torch_dtype_uint8());
  return {out,
          to_tensor<A>(own.mean),
          to_tensor<A>(own.invstd),
          to_tensor<A>(other.mean),
          to_tensor<A>(other.invstd),
          mask};
}

ForwardResult bn_relu_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          bool training, double momentum, double eps,
                          const OptionalTensor& residual, bool residual_bn,
                          const OptionalTensor& residual_weight,
                          const OptionalTensor& residual_bias,
                          const OptionalTensor& residual_running_mean,
                          const OptionalTensor& residual_running_var, bool residual_training,
                          double residual_momentum, double residual_eps, bool relu,
                          bool save_mask) {
  const char* op = "bn_relu";
  STD_TORCH_CHECK(!save_mask, op,
                  ": save_mask must be False on a CPU, where the backward reads the output");
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  if (residual) check_like(op, "residual", *residual, "x", x);
  STD_TORCH_CHECK(residual || !residual_bn, op,
                  ": residual must be given with residual_bn, got None");
  const BatchNorm own{"", weight, bias, running_mean, running_var, training, momentum, eps};
  const BatchNorm other{"residual_",           residual_weight,      residual_bias,
                        residual_running_mean, residual_running_var, residual_training,
                        residual_momentum,     residual_eps};
  return dtype == kFloat64 ? forward<double>(x, dtype, own, residual, residual_bn, other, relu)
                           : forward<float>(x, dtype, own, residual, residual_bn, other, relu);
}

template <class A>
Columns<A> read_columns(const char* op, const Geometry& g, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd) {
  return make_columns<A>(g, {read_channels<A>(op, "mean", mean, g.channels, 0),
                             read_channels<A>(op, "invstd", invstd, g.channels, 0),
                             read_channels<A>(op, "weight", weight, g.channels, 1),
                             read_channels<A>(op, "bias", bias, g.channels, 0)});
}

Tensor bn_relu_apply_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& mean, const Tensor& invstd, bool relu) {
  const char* op = "bn_relu_apply";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const Geometry g(x);
  const auto run = [&](auto arithmetic) {
    using A = decltype(arithmetic);
    return apply<A>(g, x, dtype, read_columns<A>(op, g, weight, bias, mean, invstd), std::nullopt,
                    nullptr, relu);
  };
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

std::tuple<Tensor, Tensor> bn_statistics_cpu(const Tensor& x) {
  const char* op = "bn_statistics";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const Geometry g(x);
  const auto run = [&](auto arithmetic) -> std::tuple<Tensor, Tensor> {
    using A = decltype(arithmetic);
    const Moments moments = batch_moments<A>(op, g, x, dtype);
    return {to_tensor<A>(moments.mean), to_tensor<A>(moments.m2)};
  };
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

// What backward knows of one batch norm.
struct BatchNormBackward {
  const char *weight_name, *mean_name, *invstd_name;
  const OptionalTensor &weight, &bias;
  const OptionalTensor &mean, &invstd;
  bool training;
};

// The arguments of backward, or of one of its two passes.
struct BackwardArguments {
  const char* op;
  const Tensor &grad_out, &x;
  const OptionalTensor &out, &residual;
  bool has_residual, has_residual_bn, relu;
  BatchNormBackward own, other;

  Residual kind() const {
    return has_residual_bn ? kBatchNormResidual : has_residual ? kPlainResidual : kNoResidual;
  }
  Mask mask() const { return !relu ? kNoMask : out ? kMaskFromOut : kMaskFromX; }
  // Of the residual that is normalised: no other is read.
  const void* residual_data() const {
    return has_residual_bn ? residual->const_data_ptr() : nullptr;
  }

  DType check() const {
    check_4d(op, "x", x);
    const DType dtype = dtype_of(op, "x", x);
    check_like(op, "grad_out", grad_out, "x", x);
    if (out) check_like(op, "out", *out, "x", x);
    STD_TORCH_CHECK(out || !relu || !has_residual, op,
                    ": out must be given when there are a residual and a ReLU, got None");
    STD_TORCH_CHECK(has_residual || !has_residual_bn, op,
                    ": has_residual must be True with residual_bn, got False");
    if (has_residual_bn) {
      STD_TORCH_CHECK(residual && other.mean && other.invstd, op,
                      ": residual, residual_mean and residual_invstd must be given with "
                      "residual_bn, got None");
      check_like(op, "residual", *residual, "x", x);
    }
    return dtype;
  }
};

// For each channel of dy, dy * (x - mean) and, with a batch norm of the residual, dy * (residual -
// residual mean), where dy is the masked grad_out: the sum, or the average.
using Sums = std::vector<std::vector<double>>;

template <class A>
struct ColumnsBackward {
  Columns<A> affine;
  std::vector<A> invstd;
  std::vector<A> mean_dy, slope;

  ColumnsBackward(const char* op, const Geometry& g, const BatchNormBackward& bn)
      : invstd(read_channels<A>(op, bn.invstd_name, bn.invstd, g.channels, 0)) {
    affine = make_columns<A>(g, {read_channels<A>(op, bn.mean_name, bn.mean, g.channels, 0), invstd,
                                 read_channels<A>(op, bn.weight_name, bn.weight, g.channels, 1),
                                 read_channels<A>(op, "bias", bn.bias, g.channels, 0)});
  }

  void project(const Geometry& g, const std::vector<double>& average_dy,
               const std::vector<double>& average_dy_x) {
    mean_dy = expand<A>(g, [&](int64_t c) { return static_cast<A>(average_dy[c]); });
    slope = expand<A>(g, [&](int64_t c) {
      const double s = invstd[c];
      return static_cast<A>(average_dy_x[c] * s * s);
    });
  }

  Projection at(int64_t column) const { return {mean_dy.data() + column, slope.data() + column}; }
};

// Both batch norms of backward, as its passes need them.
template <class A>
struct BranchesBackward {
  ColumnsBackward<A> own;
  std::optional<ColumnsBackward<A>> other;

  BranchesBackward(const Geometry& g, const BackwardArguments& a) : own(a.op, g, a.own) {
    if (a.has_residual_bn) other.emplace(a.op, g, a.other);
  }

  void project(const Geometry& g, const Sums& averages) {
    own.project(g, averages[0], averages[1]);
    if (other) other->project(g, averages[0], averages[2]);
  }
};

// The first pass. Where there is a grad_residual, it receives dy.
template <class A>
Sums reduce(const Geometry& g, const BackwardArguments& a, DType dtype,
            const BranchesBackward<A>& branches, void* grad_residual) {
  const int64_t size = static_cast<int64_t>(a.x.element_size());
  const auto& other = branches.other;
  const Residual kind = other ? kBatchNormResidual : grad_residual ? kPlainResidual : kNoResidual;
  const auto kernel = kernels().reduce[dtype][a.mask()][kind];
  const void *pg = a.grad_out.const_data_ptr(), *po = data_or_null(a.out);
  const void *px = a.x.const_data_ptr(), *pr = a.residual_data();
  ChunkSums sum_dy(g), sum_dy_x(g);
  std::optional<ChunkSums> sum_dy_residual;
  if (other) sum_dy_residual.emplace(g);
  g.for_each_chunk([&](int64_t chunk, int64_t element, const Matrix& m, int64_t column) {
    kernel(m, {offset(pg, element, size), offset(po, element, size), offset(px, element, size),
               offset(pr, element, size), offset(grad_residual, element, size),
               branches.own.affine.at(column), other ? other->affine.at(column) : Affine{},
               sum_dy.at(chunk, column), sum_dy_x.at(chunk, column),
               sum_dy_residual ? sum_dy_residual->at(chunk, column) : nullptr});
  });
  Sums sums{sum_dy.totals(), sum_dy_x.totals()};
  if (other) sums.push_back(sum_dy_residual->totals());
  return sums;
}

// The second pass, of projected branches.
template <class A>
void apply_gradients(const Geometry& g, const BackwardArguments& a, DType dtype,
                     const BranchesBackward<A>& branches, const Tensor& grad_x,
                     const Tensor& grad_residual) {
  const int64_t size = static_cast<int64_t>(a.x.element_size());
  const auto& other = branches.other;
  const auto kernel = kernels().gradients[dtype][a.mask()][a.kind()][a.own.training]
                                         [a.has_residual_bn && a.other.training];
  const void *pg = a.grad_out.const_data_ptr(), *po = data_or_null(a.out);
  const void *px = a.x.const_data_ptr(), *pr = a.residual_data();
  void *pgx = grad_x.mutable_data_ptr(), *pgr = grad_residual.mutable_data_ptr();
  g.for_each_matrix([&](int64_t element, const Matrix& m, int64_t column) {
    kernel(m, {offset(pg, element, size), offset(po, element, size), offset(px, element, size),
               offset(pr, element, size), offset(pgx, element, size), offset(pgr, element, size),
               branches.own.affine.at(column), other ? other->affine.at(column) : Affine{},
               branches.own.at(column), other ? other->at(column) : Projection{}});
  });
}

Tensor allocate_grad_residual(const BackwardArguments& a) {
  return a.has_residual ? allocate_like(a.x) : empty_vector(0, dtype_code(a.x));
}

// Gradients of weight and bias in the dtype of the weight.
template <class A>
std::array<Tensor, 2> parameter_gradients(const char* op, const OptionalTensor& weight,
                                          const std::vector<double>& sum_dy,
                                          const std::vector<double>& sum_dy_x,
                                          const std::vector<A>& invstd) {
  const int64_t channels = static_cast<int64_t>(invstd.size());
  const int32_t code = weight ? dtype_code(*weight) : arithmetic_dtype_code<A>();
  std::array<Tensor, 2> grads{empty_vector(channels, code), empty_vector(channels, code)};
  update_channels(op, "weight", grads[0],
                  [&](int64_t c, double) { return sum_dy_x[c] * invstd[c]; });
  update_channels(op, "weight", grads[1], [&](int64_t c, double) { return sum_dy[c]; });
  return grads;
}

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
BackwardResult backward(const BackwardArguments& a, DType dtype) {
  const Geometry g(a.x);
  BranchesBackward<A> branches(g, a);
  Tensor grad_x = allocate_like(a.x), grad_residual = allocate_grad_residual(a);
  const bool plain = a.kind() == kPlainResidual;
  const Sums sums =
      reduce(g, a, dtype, branches, plain ? grad_residual.mutable_data_ptr() : nullptr);
  auto [grad_weight, grad_bias] =
      parameter_gradients<A>(a.op, a.own.weight, sums[0], sums[1], branches.own.invstd);
  std::array<Tensor, 2> residual_grads{empty_vector(0, dtype_code(grad_weight)),
                                       empty_vector(0, dtype_code(grad_weight))};
  if (branches.other) {
    residual_grads =
        parameter_gradients<A>(a.op, a.other.weight, sums[0], sums[2], branches.other->invstd);
  }
  Sums averages = sums;
  for (auto& row : averages) {
    for (double& value : row) value /= static_cast<double>(g.values_per_channel());
  }
  branches.project(g, averages);
  if (plain) {
    // The reduction has left the masked gradient there: that is one tensor less to read.
    const BackwardArguments masked{a.op,  grad_residual, a.x,   a.out, a.residual,
                                   false, false,         false, a.own, a.other};
    apply_gradients(g, masked, dtype, branches, grad_x, grad_residual);
  } else {
    apply_gradients(g, a, dtype, branches, grad_x, grad_residual);
  }
  return {grad_x, grad_weight, grad_bias, grad_residual, residual_grads[0], residual_grads[1]};
}

BackwardResult bn_relu_backward_cpu(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& out,
    const OptionalTensor& /*mask*/, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& /*residual_bias*/, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu) {
  const OptionalTensor own_mean = mean, own_invstd = invstd, none;
  const BackwardArguments a{
      "bn_relu_backward",
      grad_out,
      x,
      out,
      residual,
      has_residual,
      residual_bn,
      relu,
      {"weight", "mean", "invstd", weight, bias, own_mean, own_invstd, training},
      {"residual_weight", "residual_mean", "residual_invstd", residual_weight, none, residual_mean,
       residual_invstd, residual_training}};
  const DType dtype = a.check();
  return dtype == kFloat64 ? backward<double>(a, dtype) : backward<float>(a, dtype);
}

// (sums, C)
template <class A>
Tensor backward_sums(const BackwardArguments& a, DType dtype) {
  const Geometry g(a.x);
  const Sums sums = reduce(g, a, dtype, BranchesBackward<A>(g, a), nullptr);
  const std::array<int64_t, 2> sizes = {static_cast<int64_t>(sums.size()), g.channels};
  const std::array<int64_t, 2> strides = {g.channels, 1};
  Tensor result = empty_strided(sizes, strides, arithmetic_dtype_code<A>());
  A* p = static_cast<A*>(result.mutable_data_ptr());
  for (const auto& row : sums) {
    for (const double value : row) *p++ = static_cast<A>(value);
  }
  return result;
}

Tensor bn_relu_backward_sums_cpu(const Tensor& grad_out, const Tensor& x, const OptionalTensor& out,
                                 const OptionalTensor& mask, const OptionalTensor& weight,
                                 const OptionalTensor& bias, const Tensor& mean,
                                 const Tensor& invstd, const OptionalTensor& residual,
                                 bool residual_bn, const OptionalTensor& residual_weight,
                                 const OptionalTensor& /*residual_bias*/,
                                 const OptionalTensor& residual_mean,
                                 const OptionalTensor& residual_invstd, bool relu) {
  const OptionalTensor own_mean = mean, own_invstd = invstd, none;
  // A mask comes from a forward with a residual.
  const bool has_residual = residual_bn || mask;
  const BackwardArguments a{"bn_relu_backward_sums",
                            grad_out,
                            x,
                            out,
                            residual,
                            has_residual,
                            residual_bn,
                            relu,
                            {"weight", "mean", "invstd", weight, bias, own_mean, own_invstd, false},
                            {"residual_weight", "residual_mean", "residual_invstd", residual_weight,
                             none, residual_mean, residual_invstd, false}};
  const DType dtype = a.check();
  return dtype == kFloat64 ? backward_sums<double>(a, dtype) : backward_sums<float>(a, dtype);
}

template <class A>
std::tuple<Tensor, Tensor> backward_apply(const BackwardArguments& a, DType dtype,
                                          const Tensor& averages) {
  const Geometry g(a.x);
  const int64_t rows = a.has_residual_bn ? 3 : 2;
  STD_TORCH_CHECK(averages.is_cpu() && averages.dim() == 2 && averages.size(0) == rows &&
                      averages.size(1) == g.channels && averages.is_contiguous() &&
                      dtype_code(averages) == arithmetic_dtype_code<A>(),
                  a.op, ": averages must be a contiguous ", sizeof(A) == 8 ? "float64" : "float32",
                  " tensor of shape (", rows, ", ", g.channels, ") on the CPU, got shape ",
                  to_string(averages.sizes()));
  const A* p = static_cast<const A*>(averages.const_data_ptr());
  Sums read;
  for (int64_t row = 0; row < rows; ++row, p += g.channels) read.emplace_back(p, p + g.channels);
  BranchesBackward<A> branches(g, a);
  branches.project(g, read);
  Tensor grad_x = allocate_like(a.x), grad_residual = allocate_grad_residual(a);
  apply_gradients(g, a, dtype, branches, grad_x, grad_residual);
  return {grad_x, grad_residual};
}

std::tuple<Tensor, Tensor> bn_relu_backward_apply_cpu(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& out,
    const OptionalTensor& /*mask*/, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& /*residual_bias*/, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu,
    const Tensor& averages) {
  const OptionalTensor own_mean = mean, own_invstd = invstd, none;
  const BackwardArguments a{
      "bn_relu_backward_apply",
      grad_out,
      x,
      out,
      residual,
      has_residual,
      residual_bn,
      relu,
      {"weight", "mean", "invstd", weight, bias, own_mean, own_invstd, training},
      {"residual_weight", "residual_mean", "residual_invstd", residual_weight, none, residual_mean,
       residual_invstd, residual_training}};
  const DType dtype = a.check();
  return dtype == kFloat64 ? backward_apply<double>(a, dtype, averages)
                           : backward_apply<float>(a, dtype, averages);
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("bn_relu", TORCH_BOX(&resnet_fused::cpu::bn_relu_cpu));
  m.impl("bn_relu_apply", TORCH_BOX(&resnet_fused::cpu::bn_relu_apply_cpu));
  m.impl("bn_relu_backward", TORCH_BOX(&resnet_fused::cpu::bn_relu_backward_cpu));
  m.impl("bn_relu_backward_sums", TORCH_BOX(&resnet_fused::cpu::bn_relu_backward_sums_cpu));
  m.impl("bn_relu_backward_apply", TORCH_BOX(&resnet_fused::cpu::bn_relu_backward_apply_cpu));
  m.impl("bn_statistics", TORCH_BOX(&resnet_fused::cpu::bn_statistics_cpu));
}
