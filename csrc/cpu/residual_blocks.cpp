// Residual blocks in inference: their convolutions through oneDNN's fused post-ops, called from
// here so that nothing but the convolutions runs between them. Between two convolutions the caches
// hold activations, and every line of interpreter code costs several times its usual time.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/dispatch_call.h"

namespace resnet_fused::cpu {
namespace {

// A convolution whose weight is folded and packed, and whose shift is its bias.
struct Convolution {
  const Tensor& weight;
  const Tensor& shift;
  const int64_t* geometry;

  std::vector<int64_t> pair(size_t i) const { return {geometry[2 * i], geometry[2 * i + 1]}; }
};

// relu(conv(x)), or conv(x).
Tensor convolve(const Tensor& x, const Convolution& conv, bool relu) {
  return call<1>("mkldnn::_convolution_pointwise", "", x, conv.weight,
                 std::make_optional(conv.shift), conv.pair(0), conv.pair(1), conv.pair(2),
                 conv.geometry[6], std::string(relu ? "relu" : "none"), std::vector<double>{},
                 std::nullopt)[0];
}

// relu(conv(x) + residual), in the memory of residual where `in_place`.
Tensor convolve_add_relu(const Tensor& x, const Convolution& conv, const Tensor& residual,
                         bool in_place) {
  const char* op = in_place ? "mkldnn::_convolution_pointwise_" : "mkldnn::_convolution_pointwise";
  return call<1>(op, "binary", in_place ? residual : x, in_place ? x : residual, conv.weight,
                 std::make_optional(conv.shift), conv.pair(0), conv.pair(1), conv.pair(2),
                 conv.geometry[6], std::string("add"), std::nullopt,
                 std::make_optional(std::string("relu")), std::vector<double>{}, std::nullopt)[0];
}

// weights, shifts, geometry: one entry (7 numbers) per convolution: those of the first block in
// order, then the projection of its shortcut if it has one, then the next block. convolutions: how
// many of them each block has, without the projection; projections: 1 or 0 for each block. x is
// kept, but the blocks overwrite each other's outputs.
Tensor residual_blocks(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> shifts,
                       std::vector<int64_t> geometry, std::vector<int64_t> convolutions,
                       std::vector<int64_t> projections) {
  STD_TORCH_CHECK(x.is_cpu(), "residual_blocks: x must be on the CPU");
  STD_TORCH_CHECK(projections.size() == convolutions.size(),
                  "residual_blocks: projections must have one number per block, got ",
                  projections.size(), " for ", convolutions.size());
  int64_t total = 0;
  for (size_t block = 0; block < convolutions.size(); ++block) {
    STD_TORCH_CHECK(convolutions[block] > 0 && (projections[block] | 1) == 1,
                    "residual_blocks: every block must have a convolution and at most one "
                    "projection, got ",
                    convolutions[block], " and ", projections[block]);
    total += convolutions[block] + projections[block];
  }
  STD_TORCH_CHECK(static_cast<size_t>(total) == weights.size() && weights.size() == shifts.size() &&
                      geometry.size() == kGeometry * weights.size(),
                  "residual_blocks: weights, shifts and geometry must describe ", total,
                  " convolutions, got ", weights.size(), ", ", shifts.size(), " and ",
                  geometry.size(), " numbers");
  size_t next = 0;
  const auto take = [&] {
    const size_t i = next++;
    return Convolution{weights[i], shifts[i], geometry.data() + kGeometry * i};
  };
  Tensor out = x;
  for (size_t block = 0; block < convolutions.size(); ++block) {
    Tensor z = out;
    for (int64_t i = 0; i + 1 < convolutions[block]; ++i) z = convolve(z, take(), true);
    const Convolution last = take();
    const Tensor residual = projections[block] ? convolve(out, take(), false) : out;
    out = convolve_add_relu(z, last, residual, projections[block] || block > 0);
  }
  return out;
}

}  // namespace
}  // namespace resnet_fused::cpu

// Packed weights carry a dispatch key of their own, so that CPU alone would not be found.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CompositeExplicitAutograd, m) {
  m.impl("residual_blocks", TORCH_BOX(&resnet_fused::cpu::residual_blocks));
}
