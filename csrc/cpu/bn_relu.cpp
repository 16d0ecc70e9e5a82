// Batch norm with optional residual, batch norm of the residual, and ReLU; its backward.
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
          to_tensor(own.mean),
          to_tensor(own.invstd),
          to_tensor(other.mean),
          to_tensor(other.invstd),
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

// What backward knows of one batch norm.
struct BatchNormBackward {
  const char *weight_name, *mean_name, *invstd_name;
  const OptionalTensor &weight, &bias;
  const OptionalTensor &mean, &invstd;
  bool training;
};

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

  void project(const Geometry& g, const std::vector<double>& sum_dy,
               const std::vector<double>& sum_dy_x) {
    const double n = static_cast<double>(g.values_per_channel());
    mean_dy = expand<A>(g, [&](int64_t c) { return static_cast<A>(sum_dy[c] / n); });
    slope = expand<A>(g, [&](int64_t c) {
      const double s = invstd[c];
      return static_cast<A>(sum_dy_x[c] / n * s * s);
    });
  }

  Projection at(int64_t column) const { return {mean_dy.data() + column, slope.data() + column}; }
};

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
BackwardResult backward(const char* op, const Tensor& grad_out, const Tensor& x,
                        const OptionalTensor& out, DType dtype, const BatchNormBackward& bn,
                        Residual residual_kind, const OptionalTensor& residual,
                        const BatchNormBackward& residual_bn, bool relu) {
  const Geometry g(x);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const bool has_residual_bn = residual_kind == kBatchNormResidual;
  const Mask mask = !relu ? kNoMask : out ? kMaskFromOut : kMaskFromX;
  ColumnsBackward<A> own(op, g, bn);
  std::optional<ColumnsBackward<A>> other;
  if (has_residual_bn) other.emplace(op, g, residual_bn);

  Tensor grad_x = allocate_like(x);
  Tensor grad_residual =
      residual_kind == kNoResidual ? empty_vector(0, dtype_code(x)) : allocate_like(x);
  const void* px = x.const_data_ptr();
  const void* pr = data_or_null(residual);
  void* pgx = grad_x.mutable_data_ptr();
  void* pgr = grad_residual.mutable_data_ptr();

  ChunkSums sum_dy(g), sum_dy_x(g);
  std::optional<ChunkSums> sum_dy_residual;
  if (has_residual_bn) sum_dy_residual.emplace(g);
  {
    const auto kernel = kernels().reduce[dtype][mask][residual_kind];
    const void *pg = grad_out.const_data_ptr(), *po = data_or_null(out);
    g.for_each_chunk([&](int64_t chunk, int64_t element, const Matrix& m, int64_t column) {
      kernel(m, {offset(pg, element, size), offset(po, element, size), offset(px, element, size),
                 offset(pr, element, size), offset(pgr, element, size), own.affine.at(column),
                 other ? other->affine.at(column) : Affine{}, sum_dy.at(chunk, column),
                 sum_dy_x.at(chunk, column),
                 sum_dy_residual ? sum_dy_residual->at(chunk, column) : nullptr});
    });
  }
  const std::vector<double> total_dy = sum_dy.totals(), total_dy_x = sum_dy_x.totals();
  own.project(g, total_dy, total_dy_x);
  auto [grad_weight, grad_bias] =
      parameter_gradients<A>(op, bn.weight, total_dy, total_dy_x, own.invstd);
  std::array<Tensor, 2> residual_grads{empty_vector(0, dtype_code(grad_weight)),
                                       empty_vector(0, dtype_code(grad_weight))};
  if (other) {
    const std::vector<double> total_dy_residual = sum_dy_residual->totals();
    other->project(g, total_dy, total_dy_residual);
    residual_grads =
        parameter_gradients<A>(op, residual_bn.weight, total_dy, total_dy_residual, other->invstd);
  }

  // The reduction has left the masked gradient in grad_residual: that is one tensor less to read.
  const bool reuse = residual_kind == kPlainResidual;
  const void* pg = reuse ? pgr : grad_out.const_data_ptr();
  const void* po = data_or_null(out);
  const auto kernel = kernels().gradients[dtype][reuse ? kNoMask : mask][has_residual_bn]
                                         [bn.training][has_residual_bn && residual_bn.training];
  g.for_each_matrix([&](int64_t element, const Matrix& m, int64_t column) {
    kernel(m, {offset(pg, element, size), offset(po, element, size), offset(px, element, size),
               offset(pr, element, size), offset(pgx, element, size), offset(pgr, element, size),
               own.affine.at(column), other ? other->affine.at(column) : Affine{}, own.at(column),
               other ? other->at(column) : Projection{}});
  });
  return {grad_x, grad_weight, grad_bias, grad_residual, residual_grads[0], residual_grads[1]};
}

BackwardResult bn_relu_backward_cpu(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& out,
    const OptionalTensor& /*mask*/, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& invstd, bool training, bool has_residual,
    const OptionalTensor& residual, bool residual_bn, const OptionalTensor& residual_weight,
    const OptionalTensor& /*residual_bias*/, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_invstd, bool residual_training, bool relu) {
  const char* op = "bn_relu_backward";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  check_like(op, "grad_out", grad_out, "x", x);
  if (out) check_like(op, "out", *out, "x", x);
  STD_TORCH_CHECK(out || !relu || !has_residual, op,
                  ": out must be given when there are a residual and a ReLU, got None");
  STD_TORCH_CHECK(has_residual || !residual_bn, op,
                  ": has_residual must be True with residual_bn, got False");
  if (residual_bn) {
    STD_TORCH_CHECK(residual && residual_mean && residual_invstd, op,
                    ": residual, residual_mean and residual_invstd must be given with "
                    "residual_bn, got None");
    check_like(op, "residual", *residual, "x", x);
  }
  const OptionalTensor own_mean = mean, own_invstd = invstd, none;
  const BatchNormBackward own{"weight", "mean",   "invstd",   weight,
                              bias,     own_mean, own_invstd, training};
  const BatchNormBackward other{
      "residual_weight", "residual_mean", "residual_invstd", residual_weight, none,
      residual_mean,     residual_invstd, residual_training};
  const Residual kind = residual_bn    ? kBatchNormResidual
                        : has_residual ? kPlainResidual
                                       : kNoResidual;
  const OptionalTensor& used_residual = residual_bn ? residual : none;
  const auto run = [&](auto arithmetic) {
    return backward<decltype(arithmetic)>(op, grad_out, x, out, dtype, own, kind, used_residual,
                                          other, relu);
  };
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("bn_relu", TORCH_BOX(&resnet_fused::cpu::bn_relu_cpu));
  m.impl("bn_relu_apply", TORCH_BOX(&resnet_fused::cpu::bn_relu_apply_cpu));
  m.impl("bn_relu_backward", TORCH_BOX(&resnet_fused::cpu::bn_relu_backward_cpu));
}
