// A residual block in inference: its convolutions through oneDNN's fused post-ops, called from here so
// that nothing but the convolutions runs between them. Between two convolutions the caches hold
// activations, and every line of interpreter code costs several times its usual time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace resnet_fused::cpu {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr size_t kGeometry = 7;  // padding, stride, dilation (two each), groups

// A convolution whose weight is folded and packed, and whose shift is its bias.
struct Convolution {
  const Tensor& weight;
  const Tensor& shift;
  const int64_t* geometry;

  StableIValue pair(size_t i) const {
    return from(std::vector<int64_t>{geometry[2 * i], geometry[2 * i + 1]});
  }
};

// relu(conv(x)), or conv(x).
Tensor convolve(const Tensor& x, const Convolution& conv, bool relu) {
  std::array<StableIValue, 10> stack{from(x),
                                     from(conv.weight),
                                     from(std::make_optional(conv.shift)),
                                     conv.pair(0),
                                     conv.pair(1),
                                     conv.pair(2),
                                     from(conv.geometry[6]),
                                     from(std::string(relu ? "relu" : "none")),
                                     from(std::vector<double>{}),
                                     from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_convolution_pointwise", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// relu(conv(x) + residual), in the memory of residual where `in_place`.
Tensor convolve_add_relu(const Tensor& x, const Convolution& conv, const Tensor& residual,
                         bool in_place) {
  std::array<StableIValue, 13> stack{from(in_place ? residual : x),
                                     from(in_place ? x : residual),
                                     from(conv.weight),
                                     from(std::make_optional(conv.shift)),
                                     conv.pair(0),
                                     conv.pair(1),
                                     conv.pair(2),
                                     from(conv.geometry[6]),
                                     from(std::string("add")),
                                     from(std::nullopt),
                                     from(std::make_optional(std::string("relu"))),
                                     from(std::vector<double>{}),
                                     from(std::nullopt)};
  const char* op = in_place ? "mkldnn::_convolution_pointwise_" : "mkldnn::_convolution_pointwise";
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, "binary", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// weights, shifts, geometry: one entry (7 numbers) for each convolution of the block in order, then for
// the projection of the shortcut if there is one. reuse_input: x may be overwritten with the result.
Tensor residual_block(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> shifts,
                      std::vector<int64_t> geometry, bool has_projection, bool reuse_input) {
  STD_TORCH_CHECK(x.is_cpu(), "residual_block: x must be on the CPU");
  const size_t convolutions = weights.size() - has_projection;
  STD_TORCH_CHECK(weights.size() > static_cast<size_t>(has_projection) &&
                      shifts.size() == weights.size() &&
                      geometry.size() == kGeometry * weights.size(),
                  "residual_block: weights, shifts and geometry must describe the same "
                  "convolutions, got ",
                  weights.size(), ", ", shifts.size(), " and ", geometry.size(), " numbers");
  const auto conv = [&](size_t i) {
    return Convolution{weights[i], shifts[i], geometry.data() + kGeometry * i};
  };
  const Tensor residual = has_projection ? convolve(x, conv(convolutions), false) : x;
  Tensor z = x;
  for (size_t i = 0; i + 1 < convolutions; ++i) z = convolve(z, conv(i), true);
  return convolve_add_relu(z, conv(convolutions - 1), residual, has_projection || reuse_input);
}

}  // namespace
}  // namespace resnet_fused::cpu

// Packed weights carry a dispatch key of their own, so that CPU alone would not be found.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CompositeExplicitAutograd, m) {
  m.impl("residual_block", TORCH_BOX(&resnet_fused::cpu::residual_block));
}
